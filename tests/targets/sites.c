/* sites SIGNALS: a function in which every instruction is a probe's site.
 *
 * Threads call site_all() all the time and compare what it returns with what
 * it returned before anything was probed. With SIGNALS a timer interrupts
 * them every so many microseconds.
 *
 * Commands: r run again; s stand still, answers when nobody runs it;
 * g call it CALLS times from here; t tell how often each of its instructions
 * runs in one call, as the CPU's trap flag saw it before any probe; l call
 * site_load() CALLS times with a good pointer and CALLS times with a bad one,
 * whose fault must be told of its first instruction; d call site_dead()
 * CALLS times; q quit.
 */
#include "target.h"
#include <setjmp.h>
#include <sys/time.h>
#include <ucontext.h>

#define CALLS 50
#define ROOM 4096

/* One byte to nine; blocks shorter than a jump; a loop, calls, a red zone,
 * flags that live across sites, padding within and behind. */
FUNCTION(site_all,
    "push %rbx\n push %rbp\n mov %rdi,%rbx\n xor %eax,%eax\n"
    "push %r12\n lea site_word(%rip),%rbp\n mov $5,%ecx\n"
    "1: add %rcx,%rax\n test $1,%cl\n jz 2f\n inc %rax\n"
    "2: add (%rbp),%rax\n dec %ecx\n jnz 1b\n"
    "stc\n adc $0,%rax\n cmp $3,%rbx\n jb 3f\n clc\n cmc\n rcl $1,%rax\n"
    "3: nop\n push %rax\n mov %ebx,%edi\n call site_leaf\n pop %rdx\n"
    "xor %rdx,%rax\n mov %rax,%rdi\n call site_round\n"
    "lea site_leaf(%rip),%r12\n mov %rax,%rdi\n call *%r12\n"
    "jmp 4f\n .byte 0x66,0x90,0x0f,0x1f,0x40,0x00\n"
    "4: imul $0x1000193,%rax,%rax\n bswap %rax\n pop %r12\n pop %rbp\n"
    "pop %rbx\n ret\n .balign 32, 0x90");
FUNCTION(site_leaf,
    "mov %rdi,-8(%rsp)\n rol $7,%rdi\n test %dil,%dil\n js 1f\n"
    "add $3,%rdi\n1: mov %rdi,%rax\n sub -8(%rsp),%rax\n ret\n"
    ".balign 32, 0xcc");
/* Loops back into what a jump would overwrite, and within that. */
FUNCTION(site_round, "xor %eax,%eax\n1: inc %eax\n2: rol $3,%rdi\n"
    "test $4,%dil\n jz 3f\n inc %rdi\n3: test $1,%al\n jnz 1b\n"
    "cmp $9,%eax\n jae 4f\n inc %eax\n jmp 2b\n4: xor %rdi,%rax\n ret\n"
    ".balign 32, 0x90");
/* r8 to r11 are overwritten at the end, and nobody reads them before. */
FUNCTION(site_dead, "mov $8,%r8d\n mov $9,%r9d\n mov $10,%r10d\n"
    "mov $11,%r11d\n xor %eax,%eax\n xor %ecx,%ecx\n"
    "1: lea 3(%rax),%rax\n nopl 0(%rax,%rax,1)\n inc %ecx\n"
    "nopw 0(%rax,%rax,1)\n cmp $5,%ecx\n jne 1b\n"
    "xor %r8d,%r8d\n xor %r9d,%r9d\n xor %r10d,%r10d\n xor %r11d,%r11d\n"
    "ret");
/* The first instructions may fault: where, the handler looks. */
FUNCTION(site_load, "mov (%rdi),%rax\n mov (%rdi),%rcx\n mov (%rdi),%rdx\n"
                    "add %rsi,%rax\n add %rdi,%rax\n xor %rsi,%rax\n ret");
__asm__(".data\n site_word: .quad 0x123456789\n.text");
long site_all(long), site_leaf(long), site_round(long), site_dead(void),
     site_load(long *, long);

static atomic_int still, n_still;
static atomic_long n_calls, n_signals;
static uint32_t counts[2 * ROOM];
static long wanted[8];

static char *base(void)
{
    char *a = (char *)site_all, *b = (char *)site_leaf;
    char *c = (char *)site_round;
    a = a < b ? a : b;
    return a < c ? a : c;
}

static void trapped(int signo, siginfo_t *info, void *context)
{
    ucontext_t *u = context;
    long at = (char *)u->uc_mcontext.gregs[REG_RIP] - base();
    (void)signo, (void)info;
    if (at >= 0 && at < 2 * ROOM)
        counts[at]++;
}

static sigjmp_buf back;

static void faulted(int signo, siginfo_t *info, void *context)
{
    ucontext_t *u = context;
    (void)signo, (void)info;
    if ((char *)u->uc_mcontext.gregs[REG_RIP] != (char *)site_load)
        wrong("a fault at %lx, not in site_load",
              (long)u->uc_mcontext.gregs[REG_RIP]);
    siglongjmp(back, 1);
}

static void load(void)
{
    long value = 7;
    for (volatile int i = 0; i < CALLS; i++) {
        if (site_load(&value, i) != ((7 + i + (long)&value) ^ i))
            wrong("site_load() differs");
        if (!sigsetjmp(back, 1)) {
            site_load((long *)16, i);
            wrong("no fault");
        }
    }
}

static void alarmed(int signo)
{
    (void)signo;
    n_signals++;
}

static void *work(void *number)
{
    for (long i = (long)number; !quitting; i++) {
        if (still) {
            n_still++;
            while (still && !quitting)
                nap_us(200);
            n_still--;
        }
        long got = site_all(i & 7);
        if (got != wanted[i & 7])
            wrong("site_all(%ld) is %lx, was %lx", i & 7, got,
                  wanted[i & 7]);
        n_calls++;
    }
    return NULL;
}

/* Run it once under the trap flag; the stack below is not touched by it. */
static void trace(long argument)
{
    struct sigaction action = { .sa_sigaction = trapped,
                                .sa_flags = SA_SIGINFO };
    sigaction(SIGTRAP, &action, NULL);
    __asm__ volatile("pushfq\n orq $0x100,(%%rsp)\n popfq" ::: "memory");
    long got = site_all(argument);
    __asm__ volatile("pushfq\n andq $~0x100,(%%rsp)\n popfq" ::: "memory");
    signal(SIGTRAP, SIG_DFL);
    if (got != wanted[argument])
        wrong("the trap flag changed the result");
}

int main(int argc, char **argv)
{
    pthread_t threads[3];
    long us = argc > 1 ? atol(argv[1]) : 0;

    bounded();
    for (long i = 0; i < 8; i++)
        wanted[i] = site_all(i);
    for (long i = 0; i < 8; i++)
        trace(i);
    for (long i = 0; i < 3; i++)
        pthread_create(&threads[i], NULL, work, (void *)i);
    if (us) {
        struct sigaction action = { .sa_handler = alarmed,
                                    .sa_flags = SA_RESTART };
        struct itimerval every = { { 0, us }, { 0, us } };
        sigaction(SIGVTALRM, &action, NULL);
        setitimer(ITIMER_VIRTUAL, &every, NULL);
    }
    if (argc > 2) {
        struct sigaction action = { .sa_sigaction = faulted,
                                    .sa_flags = SA_SIGINFO };
        sigaction(SIGSEGV, &action, NULL);
    }
    say("ready all=%ld leaf=%ld round=%ld", (char *)site_all - base(),
        (char *)site_leaf - base(), (char *)site_round - base());
    for (char c; read(0, &c, 1) == 1 && c != 'q';) {
        if (c == 's') {
            still = 1;
            while (n_still < 3)
                nap_us(100);
            say("still=1 calls=%ld", (long)n_calls);
        } else if (c == 'r') {
            still = 0;
            say("still=0");
        } else if (c == 'g') {
            for (long i = 0; i < 8 * CALLS; i++)
                if (site_all(i & 7) != wanted[i & 7])
                    wrong("site_all(%ld) differs", i & 7);
            say("times=%d", CALLS);
        } else if (c == 'd') {
            for (int i = 0; i < CALLS; i++)
                if (site_dead() != 15)
                    wrong("site_dead() differs");
            say("times=%d", CALLS);
        } else if (c == 'l') {
            load();
            say("times=%d", CALLS);
        } else if (c == 't') {
            char line[3500];
            int n = 0;
            for (int at = 0; at < 2 * ROOM && n < 3400; at++)
                if (counts[at])
                    n += sprintf(line + n, "%d=%u ", at, counts[at]);
            say("%s", line);
        }
    }
    quitting = 1;
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    say("calls=%ld signals=%ld wrong=%ld", (long)n_calls, (long)n_signals,
        (long)n_wrong);
    return n_wrong != 0;
}
