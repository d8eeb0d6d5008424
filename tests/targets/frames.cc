// frames: functions that are left, interrupted and resumed in unusual ways.
//
//   thrower(n)   throws if n is odd      through(n)  calls it, catches not
//   yielder(n)   runs in one of two ucontext coroutines, which take turns
//                in the middle of it, so their frames overlap in time
//   on_alt(n)    runs in a signal handler on an alternate stack, while
//   raiser(n)    waits for it
//
// Command r: call each 100 times, judge the results, report; q quit.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <sys/prctl.h>
#include <ucontext.h>
#include <unistd.h>

#define KEPT extern "C" __attribute__((noinline, used, noclone))

static long n_wrong, n_thrown;
static volatile long sink;

KEPT long thrower(long n)
{
    if (n & 1)
        throw n;
    return n + 1;
}

KEPT long through(long n)
{
    long below = thrower(n);
    sink = below;
    return below * 2;
}

static ucontext_t home, sides[2];
static char stacks[2][1 << 16];

KEPT long yielder(long n)
{
    if (swapcontext(&sides[n & 1], &home))
        n_wrong++;
    sink = n;
    return n * 2;
}

static void coroutine(int side)
{
    for (long i = 0; i < 50; i++)
        if (yielder(2 * i + side) != 2 * (2 * i + side))
            n_wrong++;
    for (;;)
        swapcontext(&sides[side], &home);
}

static volatile long answered;

KEPT long on_alt(long n)
{
    sink = n;
    return n + 7;
}

static void handler(int)
{
    answered = on_alt(answered + 1);
}

KEPT long raiser(long n)
{
    answered = n;
    if (raise(SIGUSR1))
        n_wrong++;
    return answered;
}

static void run()
{
    for (long n = 0; n < 100; n++) {
        try {
            if (through(n) != 2 * (n + 1))
                n_wrong++;
        } catch (long thrown) {
            n_thrown++;
            n_wrong += thrown != n;
        }
        if (raiser(n) != n + 8)
            n_wrong++;
    }
    for (int side = 0; side < 2; side++) {
        getcontext(&sides[side]);
        sides[side].uc_stack.ss_sp = stacks[side];
        sides[side].uc_stack.ss_size = sizeof stacks[side];
        makecontext(&sides[side], reinterpret_cast<void (*)()>(coroutine), 1,
                    side);
    }
    for (int turn = 0; turn < 51; turn++)
        for (int side = 0; side < 2; side++)
            swapcontext(&home, &sides[side]);
}

int main()
{
    static char alternate[1 << 16];
    stack_t stack = {};
    stack.ss_sp = alternate;
    stack.ss_size = sizeof alternate;
    struct sigaction action = {};
    action.sa_handler = handler;
    action.sa_flags = SA_ONSTACK;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(60);
    if (sigaltstack(&stack, nullptr) || sigaction(SIGUSR1, &action, nullptr))
        return 2;
    setvbuf(stdout, nullptr, _IOLBF, 0);
    std::puts("ready");
    for (int c; (c = getchar()) != 'q' && c != EOF;)
        if (c == 'r') {
            run();
            std::printf("thrown=%ld wrong=%ld\n", n_thrown, n_wrong);
        }
    std::printf("wrong=%ld\n", n_wrong);
    return n_wrong != 0;
}
