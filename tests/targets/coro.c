/* coro alone|idle: coroutines on 2 KiB stacks that lie side by side. The lower
 * half of each is filled with a pattern that nobody may touch. `alone`: the
 * process has no other thread; `idle`: another one waits on its own stack.
 *
 * Commands: r report; q quit (looked for every 8192 switches). */
#include "target.h"

enum { N = 64, SIZE = 2048, GUARDED = 1024 };
struct context { void *sp; };
static struct context contexts[N];
static unsigned char *stacks;
static long n_switches, n_hot;

/* switch_to(save, load): the callee-saved registers lie on the stack. */
void switch_to(struct context *, struct context *);
FUNCTION(switch_to, "push %rbx\n push %rbp\n push %r12\n push %r13\n"
         "push %r14\n push %r15\n mov %rsp,(%rdi)\n mov (%rsi),%rsp\n"
         "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n"
         "ret");
FUNCTION(begin_coroutine, "mov %rbx,%rdi\n call coroutine\n hlt");
extern char begin_coroutine[];

CALLED long hot(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }

static void check_stacks(void)
{
    for (int i = 0; i < N; i++)
        for (int k = 0; k < GUARDED; k++)
            if (stacks[i * SIZE + k] != (unsigned char)(0xa5 + i)) {
                wrong("byte %d of stack %d was overwritten", k, i);
                stacks[i * SIZE + k] = 0xa5 + i;
            }
}

static struct context here;

CALLED void coroutine(long me)
{
    for (;;) {
        for (long n = 0; n < 50; n++)
            if (hot(me + n) != ((me + n) ^ 0x5bd1e995) * 31
                               + ((me + n) >> 7))
                n_wrong++;
        n_hot += 50;
        n_switches++;
        if (me == 0 && n_switches % 8192 == 1)
            switch_to(&contexts[0], &here);     /* look for a command */
        switch_to(&contexts[me], &contexts[(me + 1) % N]);
    }
}

static void *idle(void *argument)
{
    for (;;)
        nap_us(20000);
    return NULL;
}

int main(int argc, char **argv)
{
    bounded();
    stacks = mmap(NULL, N * SIZE, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < N; i++) {
        memset(stacks + i * SIZE, 0xa5 + i, SIZE);
        uint64_t *top = (uint64_t *)(stacks + (i + 1) * SIZE) - 2;
        *--top = (uint64_t)begin_coroutine;
        *--top = i;                                     /* rbx */
        top -= 5;
        contexts[i].sp = top;
    }
    if (argc > 1 && argv[1][0] == 'i')
        start(idle, NULL);
    say("ready");
    for (;;) {
        struct pollfd p = {0, POLLIN, 0};
        switch_to(&here, &contexts[0]);
        check_stacks();
        if (poll(&p, 1, 0) == 0)
            continue;
        if (command() == 'q')
            return verdict();
        say("hot=%ld wrong=%ld", n_hot, atomic_load(&n_wrong));
    }
}
