/* The CPU as judge. Reads struct request after struct request on stdin, lets
 * a child run each one, answers with a struct reply on stdout.
 *
 * The child is a process of ours that does nothing else. Its code, stack and
 * data are shared memory at fixed addresses; each code area is followed by a
 * page that cannot be read, so that fetching an instruction's bytes beyond
 * the area faults there. The tracer single-steps it (never done by ubp
 * itself), or lets it run to the next int3, of which the areas are full. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define AREA 0x4000
#define N_PLACES 8

static const uint64_t areas[] = {      /* tests/judge.py knows them too */
    0x30000000,                        /* code within reach of imm32 */
    0x30800000,                        /* where low copies go */
    0x7a0000000000,                    /* code beyond it */
    0x7a0008000000,                    /* where high copies go */
    0x50000000,                        /* stack */
    0x60000000,                        /* data */
};
enum { N_CODE = 4, STACK = 4, DATA = 5, N_AREAS = 6 };

struct place {
    uint64_t vaddr;
    uint32_t size;
    uint8_t bytes[44];
};

struct request {
    uint32_t is_step, n_places;
    struct user_regs_struct regs;
    struct place places[N_PLACES];
};

struct reply {
    uint32_t signal, unused;
    uint64_t address;                  /* of the fault */
    struct user_regs_struct regs;
    struct user_fpregs_struct fpregs;
    uint8_t stack[512], data[256];
};

static int child;
static struct user_fpregs_struct fpregs;

static void die(const char *what)
{
    perror(what);
    if (child > 0)
        kill(child, SIGKILL);
    exit(3);
}

static void wait_for_stop(void)
{
    int status;
    if (waitpid(child, &status, __WALL) != child || !WIFSTOPPED(status)) {
        fprintf(stderr, "the child is gone: status 0x%x\n", status);
        exit(3);
    }
}

static void start_child(void)
{
    for (int i = 0; i < N_AREAS; i++) {
        void *at = (void *)areas[i];
        if (mmap(at, AREA, PROT_READ | PROT_WRITE | PROT_EXEC,
                 MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)
            != at)
            die("mmap");
        if (mmap((char *)at + AREA, 4096, PROT_NONE, MAP_PRIVATE |
                 MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)
            != (char *)at + AREA)
            die("mmap");
        if (i < N_CODE)
            memset(at, 0xcc, AREA);
    }
    child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        _exit(4);
    }
    wait_for_stop();
    if (ptrace(PTRACE_SETOPTIONS, child, 0, PTRACE_O_EXITKILL) ||
        ptrace(PTRACE_GETFPREGS, child, 0, &fpregs))
        die("ptrace");
    for (unsigned i = 0; i < sizeof fpregs.xmm_space / 4; i++)
        fpregs.xmm_space[i] = 0x3f000000 + i * 0x10101;
}

static void fill(void)
{
    uint8_t *stack = (uint8_t *)areas[STACK] + AREA / 2 - 256;
    uint8_t *data = (uint8_t *)areas[DATA] + AREA / 2;
    for (int i = 0; i < 512; i++)
        stack[i] = i * 7 + 1;
    for (int i = 0; i < 256; i++)
        data[i] = i * 11;
}

static void run(struct request *request, struct reply *reply)
{
    siginfo_t info;
    fill();
    for (unsigned i = 0; i < request->n_places; i++)
        memcpy((void *)request->places[i].vaddr, request->places[i].bytes,
               request->places[i].size);
    if (ptrace(PTRACE_GETREGS, child, 0, &reply->regs))
        die("PTRACE_GETREGS");
    request->regs.cs = reply->regs.cs;
    request->regs.ss = 0x2b;
    request->regs.orig_rax = -1;
    if (ptrace(PTRACE_SETREGS, child, 0, &request->regs))
        die("PTRACE_SETREGS");
    if (ptrace(PTRACE_SETFPREGS, child, 0, &fpregs))
        die("PTRACE_SETFPREGS");
    if (ptrace(request->is_step ? PTRACE_SINGLESTEP : PTRACE_CONT, child, 0,
               0))
        die("PTRACE_CONT");
    wait_for_stop();
    if (ptrace(PTRACE_GETSIGINFO, child, 0, &info) ||
        ptrace(PTRACE_GETREGS, child, 0, &reply->regs) ||
        ptrace(PTRACE_GETFPREGS, child, 0, &reply->fpregs))
        die("PTRACE_GETREGS");
    reply->signal = info.si_signo;
    reply->address = (uint64_t)info.si_addr;
    memcpy(reply->stack, (void *)(areas[STACK] + AREA / 2 - 256), 512);
    memcpy(reply->data, (void *)(areas[DATA] + AREA / 2), 256);
    for (unsigned i = 0; i < request->n_places; i++)
        memset((void *)request->places[i].vaddr, 0xcc,
               request->places[i].size);
}

int main(void)
{
    static struct request request;
    static struct reply reply;
    alarm(300);
    start_child();
    while (fread(&request, sizeof request, 1, stdin) == 1) {
        run(&request, &reply);
        if (fwrite(&reply, sizeof reply, 1, stdout) != 1)
            die("write");
    }
    kill(child, SIGKILL);
    return 0;
}
