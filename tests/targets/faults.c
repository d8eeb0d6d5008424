/* faults: instructions that raise a signal, each with what its handler sees,
 * relative to where the instruction and the stack are: so that a program
 * that is probed can be compared with one that is not. And calls and returns
 * that no copy elsewhere can make.
 *
 * Commands: r runs every case, a line for each; q quit. */
#include "target.h"
#include <setjmp.h>
#include <ucontext.h>

FUNCTION(f_ud2, "ud2\n ret");
FUNCTION(f_hlt, "hlt\n ret");
FUNCTION(f_int3, "int3\n ret");
FUNCTION(f_int_3, ".byte 0xcd, 3\n ret");
FUNCTION(f_int1, ".byte 0xf1\n ret");
FUNCTION(f_int_33, "int $33\n ret");
FUNCTION(f_load, "mov (%rdi),%rax\n ret");
FUNCTION(f_store, "mov %rax,8(%rdi)\n ret");
FUNCTION(f_odd_load, "movaps 1(%rsp),%xmm0\n ret");
FUNCTION(f_divide, "div %rdi\n ret");
FUNCTION(f_jump, "nop\n jmp *%rdi");
FUNCTION(f_jump_memory, "nop\n jmp *(%rdi)");
FUNCTION(f_call_memory, "call *(%rdi)\n ret");
FUNCTION(f_call_far_away, "call *%rdi\n ret");
FUNCTION(f_call_stack, "call *%rsp\n ret");
FUNCTION(f_call_below, "mov %rdi,-8(%rsp)\n call *-8(%rsp)\n ret");
FUNCTION(f_below_bad, "mov %rdi,%rax\n xchg %rax,%rsp\n call *-8(%rsp)\n ret");
FUNCTION(f_call_no_stack, "xchg %rdi,%rsp\n call f_good\n ret");
FUNCTION(f_ret_bad, "push %rdi\n ret");
FUNCTION(f_good, "lea 42(%rdi),%rax\n ret");
FUNCTION(g_call_below, "sub $24,%rsp\n lea f_good(%rip),%rax\n"
         "mov %rax,-8(%rsp)\n call *-8(%rsp)\n add $24,%rsp\n ret");
FUNCTION(g_far_return, "lea 1f(%rip),%rax\n mov %cs,%ecx\n push %rcx\n"
         "push %rax\n lretq\n 1: lea 42(%rdi),%rax\n ret");
FUNCTION(g_interrupt_return, "mov %rsp,%rdx\n mov %ss,%ecx\n push %rcx\n"
         "push %rdx\n pushfq\n mov %cs,%ecx\n push %rcx\n lea 1f(%rip),%rax\n"
         "push %rax\n iretq\n 1: lea 42(%rdi),%rax\n ret");
FUNCTION(g_old_syscall, "push %rbx\n mov $20,%eax\n int $0x80\n pop %rbx\n"
         "ret");

#define CASES(X) X(f_ud2) X(f_hlt) X(f_int3) X(f_int_3) X(f_int1) \
    X(f_int_33) X(f_load) X(f_store) X(f_odd_load) X(f_divide) X(f_jump) \
    X(f_jump_memory) X(f_call_memory) X(f_call_far_away) X(f_call_stack) \
    X(f_call_below) X(f_below_bad) X(f_call_no_stack) X(f_ret_bad) \
    X(f_good) X(g_call_below) X(g_far_return) X(g_interrupt_return) \
    X(g_old_syscall)
#define DECLARE(name) long name(uintptr_t);
CASES(DECLARE)
#define ROW(name) {#name, name},
static const struct { const char *name; long (*run)(uintptr_t); } cases[] =
    {CASES(ROW)};

static sigjmp_buf back;
static volatile uintptr_t code, stack, argument;

/* An address, told by what it is near to. */
static const char *place(uintptr_t vaddr, char *text)
{
    if (vaddr - code < 64)
        sprintf(text, "code+%d", (int)(vaddr - code));
    else if (vaddr - stack + 256 < 512)
        sprintf(text, "stack%+d", (int)(vaddr - stack));
    else if (vaddr - argument + 64 < 128)
        sprintf(text, "argument%+d", (int)(vaddr - argument));
    else if (vaddr < 4096)
        sprintf(text, "%d", (int)vaddr);
    else
        sprintf(text, "elsewhere");
    return text;
}

static void handler(int signo, siginfo_t *info, void *context)
{
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    char a[30], b[30], c[30], d[30];
    uintptr_t top = regs[REG_RSP];
    const char *pushed = "none";
    if (top - stack + 256 < 512)
        pushed = place(*(uintptr_t *)top, d);
    say("signal=%d code=%d address=%s rip=%s rsp=%s pushed=%s trap=%d",
        signo, info->si_code, place((uintptr_t)info->si_addr, a),
        place(regs[REG_RIP], b), place(top, c), pushed,
        (int)regs[REG_TRAPNO]);
    siglongjmp(back, 1);
}

/* Every function is called from here, so that all have the same stack. */
static __attribute__((noinline)) long run(long (*function)(uintptr_t))
{
    stack = (uintptr_t)__builtin_frame_address(0);
    return function(argument);
}

static void all(void)
{
    uintptr_t hole = (uintptr_t)mmap(NULL, 8192, PROT_NONE, MAP_PRIVATE
                                     | MAP_ANONYMOUS, -1, 0) + 4096;
    for (volatile unsigned n = 0; n < sizeof cases / sizeof *cases; n++) {
        code = (uintptr_t)cases[n].run;
        argument = cases[n].name[0] == 'g' || cases[n].run == f_good ? 1
            : cases[n].run == f_divide ? 0 : hole;
        if (cases[n].run == f_ret_bad)
            argument = (uintptr_t)1 << 63;
        if (sigsetjmp(back, 1) == 0) {
            long result = run(cases[n].run);
            say("result=%ld", cases[n].run == g_old_syscall ?
                result == getpid() : result);
        }
    }
}

int main(void)
{
    static char spare[65536];
    stack_t where = {.ss_sp = spare, .ss_size = sizeof spare};
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_ONSTACK};
    int c, signals[] = {SIGILL, SIGTRAP, SIGSEGV, SIGBUS, SIGFPE};
    bounded();
    sigaltstack(&where, NULL);
    action.sa_sigaction = handler;
    for (int n = 0; n < 5; n++)
        sigaction(signals[n], &action, NULL);
    say("ready");
    while ((c = command()) != 'q')
        if (c == 'r') {
            all();
            say("end");
        }
    return verdict();
}
