/* Runs bodies on chosen registers, and checks what they leave behind.
 *
 *   bodies info                prints the offsets from the fs base of
 *                              rseq.cpu_id and of a thread's tid, or 0
 *   bodies run|forbid|step CODE DATA CASES OUT
 *
 * CODE is mapped r-x at 0x10000000; DATA rw- at 0x20000000, shared, so that
 * its file holds what the bodies wrote. OUT gets a struct result per case.
 * "forbid": a filter kills the process at process_vm_readv or futex.
 * "step": the trap flag is set, and OUT gets a struct step before each
 * instruction of CODE.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CODE ((unsigned char *)0x10000000)
#define DATA ((unsigned char *)0x20000000)
#define STACK 0x30000000ul
#define STACK_SIZE 0x40000ul

enum { RSP = 4, N_REGS = 16, STEP_STACK = 1024, TRAP_FLAG = 0x100 };

struct request {
    uint64_t vaddr;             /* of the body; it ends in a jump to landing */
    uint64_t flags, is_flags_live;
    uint64_t live;              /* mask of registers that must not change */
    uint64_t regs[N_REGS];
};

struct result {
    uint64_t signal, address, wrong_regs, wrong_flags, wrong_stack;
};

struct step {
    uint64_t n_case, regs[N_REGS], rip, flags;
    unsigned char stack[STEP_STACK];    /* up to the rsp of the case */
};

uint64_t in[N_REGS], out[N_REGS], flags_in, flags_out, target, host_sp;

void enter(void);
void landing(void);
__asm__(
    ".text\n.globl enter, landing\n"
    "enter: push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
    "mov %rsp, host_sp(%rip)\n"
    "push flags_in(%rip); popf\n"
    "mov in+0(%rip), %rax; mov in+8(%rip), %rcx; mov in+16(%rip), %rdx\n"
    "mov in+24(%rip), %rbx; mov in+32(%rip), %rsp; mov in+40(%rip), %rbp\n"
    "mov in+48(%rip), %rsi; mov in+56(%rip), %rdi; mov in+64(%rip), %r8\n"
    "mov in+72(%rip), %r9; mov in+80(%rip), %r10; mov in+88(%rip), %r11\n"
    "mov in+96(%rip), %r12; mov in+104(%rip), %r13\n"
    "mov in+112(%rip), %r14; mov in+120(%rip), %r15\n"
    "jmp *target(%rip)\n"
    "landing:\n"
    "mov %rax, out+0(%rip); mov %rcx, out+8(%rip); mov %rdx, out+16(%rip)\n"
    "mov %rbx, out+24(%rip); mov %rsp, out+32(%rip); mov %rbp, out+40(%rip)\n"
    "mov %rsi, out+48(%rip); mov %rdi, out+56(%rip); mov %r8, out+64(%rip)\n"
    "mov %r9, out+72(%rip); mov %r10, out+80(%rip); mov %r11, out+88(%rip)\n"
    "mov %r12, out+96(%rip); mov %r13, out+104(%rip)\n"
    "mov %r14, out+112(%rip); mov %r15, out+120(%rip)\n"
    "mov host_sp(%rip), %rsp\n"
    "pushf; pop flags_out(%rip); cld\n"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n");

static volatile sig_atomic_t caught;
static volatile uint64_t caught_at;

static void handler(int signal, siginfo_t *info, void *context)
{
    ucontext_t *c = context;
    caught = signal;
    caught_at = c->uc_mcontext.gregs[REG_RIP];
    c->uc_mcontext.gregs[REG_RIP] = (uint64_t)landing;
}

static FILE *steps;
static uint64_t n_cases;

static void stepped(int signal, siginfo_t *info, void *context)
{
    static const int order[] = {
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI,
        REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13,
        REG_R14, REG_R15};
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    struct step step = {.n_case = n_cases};
    if (regs[REG_RIP] == (greg_t)landing)
        regs[REG_EFL] &= ~TRAP_FLAG;
    if (regs[REG_RIP] < (greg_t)CODE || regs[REG_RIP] >= (greg_t)DATA)
        return;
    for (int i = 0; i < N_REGS; i++)
        step.regs[i] = regs[order[i]];
    step.rip = regs[REG_RIP];
    step.flags = regs[REG_EFL];
    memcpy(step.stack, (void *)(in[RSP] - STEP_STACK), STEP_STACK);
    fwrite(&step, sizeof step, 1, steps);
}

static void *map(const char *path, void *at, int prot, int flags)
{
    int fd = open(path, O_RDWR);
    struct stat st;
    if (fd < 0 || fstat(fd, &st))
        exit(3);
    void *p = mmap(at, st.st_size, prot, flags | MAP_FIXED_NOREPLACE, fd, 0);
    if (p == MAP_FAILED || (at && p != at))
        exit(4);
    close(fd);
    return p;
}

static int info(void)
{
    char *fs;
    __asm__("mov %%fs:0x10, %0" : "=r"(fs));
    long rseq = 0, tid = 0;
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 35)
    extern const ptrdiff_t __rseq_offset;
    rseq = __rseq_offset + 4;
#endif
    for (long at = 0; at < 1024 && !tid; at += 4)
        if (*(int *)(fs + at) == (int)syscall(SYS_gettid))
            tid = at;
    printf("%ld %ld\n", rseq, tid);
    return 0;
}

static void forbid(void)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),          /* the number */
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_futex, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {5, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        exit(6);
}

int main(int argc, char **argv)
{
    if (argc == 2)
        return info();
    if (argc != 6)
        return 2;
    alarm(300);
    map(argv[2], CODE, PROT_READ | PROT_EXEC, MAP_PRIVATE);
    map(argv[3], DATA, PROT_READ | PROT_WRITE, MAP_SHARED);
    FILE *cases = fopen(argv[4], "rb"), *results = fopen(argv[5], "wb");
    unsigned char *stack = mmap((void *)STACK, STACK_SIZE, 3, MAP_PRIVATE
                                | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    for (unsigned char *p = stack; p < stack + STACK_SIZE; p++)
        *p = (uintptr_t)p * 37;
    static unsigned char alt[65536];
    sigaltstack(&(stack_t){.ss_sp = alt, .ss_size = sizeof alt}, NULL);
    struct sigaction act = {.sa_sigaction = handler,
                            .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigaction(SIGSEGV, &act, 0), sigaction(SIGILL, &act, 0);
    sigaction(SIGFPE, &act, 0), sigaction(SIGTRAP, &act, 0);
    sigaction(SIGBUS, &act, 0);
    *(uint64_t *)DATA = (uint64_t)landing;
    *(uint64_t *)(DATA + 8) = getpid();
    if (!strcmp(argv[1], "forbid"))
        forbid();
    int is_step = !strcmp(argv[1], "step");
    if (is_step) {
        steps = results;
        act.sa_sigaction = stepped;
        sigaction(SIGTRAP, &act, 0);
    }
    struct request r;
    while (fread(&r, sizeof r, 1, cases) == 1) {
        struct result s = {0};
        memcpy(in, r.regs, sizeof in);
        unsigned char copy[4096];
        memcpy(copy, (void *)(in[RSP] - 128), sizeof copy);
        flags_in = r.flags | (is_step ? TRAP_FLAG : 0), target = r.vaddr, caught = 0;
        enter();
        s.signal = caught, s.address = caught_at;
        for (int i = 0; i < N_REGS; i++)
            if (r.live >> i & 1 && in[i] != out[i])
                s.wrong_regs |= 1ul << i;
        if (r.is_flags_live)
            s.wrong_flags = (flags_in ^ flags_out) & 0xcd5;
        else
            s.wrong_flags = (flags_in ^ flags_out) & 0x400;
        s.wrong_stack = !!memcmp(copy, (void *)(in[RSP] - 128), sizeof copy);
        if (!is_step)
            fwrite(&s, sizeof s, 1, results);
        n_cases++;
    }
    return fclose(results) != 0;
}
