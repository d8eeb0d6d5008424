/* preempted: user threads, each on a stack from malloc. A timer's handler
 * leaves for the next one by swapcontext, so those that wait have a signal
 * frame on a stack that no thread runs on. They call tiny and loop, and check
 * what these return. Argument: guards, where the stacks are parts of one vma,
 * each with a page below it that cannot be read and that no map shows, as
 * those of threads are since glibc 2.42, also that of the second thread, which
 * takes the commands: "guards=0" if Linux is older than 6.13. q quits. */
#include "target.h"
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

enum { N = 8, SIZE = 64 << 10, ROUNDS = 50 };
static ucontext_t contexts[N];
static int current;

FUNCTION(tiny, "mov %rdi,%rax\n inc %rax\n rol $3,%rax\n not %rax\n not %rax\n"
         "ror $3,%rax\n dec %rax\n ret");
FUNCTION(loop, "mov %rdi,%rax\n1: inc %rax\n dec %rsi\n jnz 1b\n ret");
long tiny(long), loop(long, long);

static void preempt(int signo)
{
    int me = current;
    current = (me + 1) % N;
    swapcontext(&contexts[me], &contexts[current]);
}

static void run(int me)
{
    for (long i = me; !quitting; i++) {
        if (tiny(i) != i)
            wrong("tiny(%ld)", i);
        if (loop(i, ROUNDS) != i + ROUNDS)
            wrong("loop(%ld)", i);
    }
    exit(verdict());
}

static void *serve(void *argument)
{
    while (command() != 'q')
        say("wrong=%ld", atomic_load(&n_wrong));
    quitting = 1;
    for (;;)
        pause();
}

#define GUARD_INSTALL 102               /* MADV_GUARD_INSTALL */
static char *stacks;
static int n_guards;

static void *stack(int i)
{
    char *low = stacks + i * SIZE;
    if (!stacks)
        return malloc(SIZE);
    n_guards += madvise(low, 4096, GUARD_INSTALL) == 0;
    memset(low + 4096, 0, SIZE - 4096); /* the next guard follows at once */
    return low;
}

int main(int argc, char **argv)
{
    struct sigaction action = {.sa_handler = preempt, .sa_flags = SA_RESTART};
    struct itimerval each = {{0, 200}, {0, 200}};
    sigset_t alarms, before;
    bounded();
    if (argc > 1 && !strcmp(argv[1], "guards"))
        stacks = mmap(NULL, (N + 1) * SIZE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < N; i++) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = stack(i);
        contexts[i].uc_stack.ss_size = SIZE;
        makecontext(&contexts[i], (void (*)(void))run, 1, i);
    }
    sigemptyset(&alarms);
    sigaddset(&alarms, SIGVTALRM);
    pthread_sigmask(SIG_BLOCK, &alarms, &before);
    if (stacks) {               /* on one of these stacks, too */
        pthread_attr_t attr;
        pthread_t thread;
        pthread_attr_init(&attr);
        pthread_attr_setstack(&attr, (char *)stack(N) + 4096, SIZE - 4096);
        if (pthread_create(&thread, &attr, serve, NULL))
            wrong("pthread_create");
    } else
        start(serve, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    sigaction(SIGVTALRM, &action, NULL);
    setitimer(ITIMER_VIRTUAL, &each, NULL);
    say("ready guards=%d", n_guards);
    setcontext(&contexts[0]);
    return 1;
}
