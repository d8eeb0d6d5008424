/* golike: code as Go's compiler makes it, and what Go's runtime does with it:
 * it goes on at addresses that no thread's rip, stack or code ever told. A
 * preempted goroutine waits on the heap, at any of its instructions; and each
 * returns to goexit + 1.
 *
 * Commands: r report: calls of each function so far; q quit. */
#include "target.h"

/* As the linker of Go names the table of its functions. */
__asm__(".pushsection .gopclntab,\"a\"\n .long 0xfffffff1\n .popsection");

static struct { void *g[2]; uint64_t guard; } goroutine;
static void *back_here __attribute__((used));

/* enter(fn, plus, x): go to fn + plus with x in rax and rbx, as if it had been
 * preempted there, and return to goexit + 1. -> rax there */
long enter(void *fn, long plus, long x, void *g);
FUNCTION(enter, "push %rbx\n push %rbp\n push %r12\n push %r14\n mov %rcx,%r14\n"
         "mov %rsp,back_here(%rip)\n mov %rdx,%rax\n mov %rdx,%rbx\n"
         "lea go_exit(%rip),%rcx\n inc %rcx\n push %rcx\n"
         "mov %rsp,%r12\n add %rsi,%rdi\n jmp *%rdi");
FUNCTION(go_exit, "nop\n call go_exit1\n nop");
FUNCTION(go_exit1, "mov back_here(%rip),%rsp\n pop %r14\n pop %r12\n pop %rbp\n"
         "pop %rbx\n ret");
#define PAD "\n .fill 24,1,0xcc"
FUNCTION(go_leaf, "mov %rbx,%rax\n add $5,%rax\n xor $0x55,%rax\n ret" PAD);
FUNCTION(go_checked, "cmp 16(%r14),%rsp\n jbe 1f\n sub $24,%rsp\n"
         "mov %rbx,16(%rsp)\n mov 16(%rsp),%rax\n add $24,%rsp\n ret\n"
         "1: mov $-1,%rax\n ret" PAD);
FUNCTION(go_large, "lea -0x120(%rsp),%r12\n cmp 16(%r14),%r12\n jbe 1f\n"
         "lea 7(%rbx),%rax\n ret\n 1: mov $-1,%rax\n ret" PAD);
extern char go_leaf[], go_checked[], go_large[];

static const struct { char *name, *fn; int plus; long add, flip; } cases[] = {
    {"leaf", go_leaf, 0, 5, 0x55}, {"", go_leaf, 3, 5, 0x55},
    {"", go_leaf, 7, 0, 0x55},
    {"checked", go_checked, 0, 0, 0}, {"", go_checked, 6, 0, 0},
    {"large", go_large, 0, 7, 0}, {"", go_large, 8, 7, 0},
};
enum { N_CASES = sizeof cases / sizeof *cases };

static void fault(int signo)
{
    _exit(128 + signo);
}

int main(void)
{
    struct pollfd p = {0, POLLIN, 0};
    long n = 0;
    bounded();
    signal(SIGSEGV, fault);         /* as Go's runtime does */
    goroutine.guard = 4096;
    say("ready");
    for (;;) {
        for (int i = 0; i < 1000; i++, n++)
            for (int k = 0; k < N_CASES; k++) {
                long is = enter(cases[k].fn, cases[k].plus, n, &goroutine);
                long must = (n + cases[k].add) ^ cases[k].flip;
                if (is != must)
                    wrong("case %d: %ld, not %ld", k, is, must);
            }
        if (poll(&p, 1, 0) == 0)
            continue;
        char command = 0;
        if (read(0, &command, 1) != 1)
            return 3;
        say("leaf=%ld checked=%ld large=%ld exit=%ld wrong=%ld", n, n, n,
            n * N_CASES, (long)n_wrong);
        if (command == 'q')
            return n_wrong != 0;
    }
}
