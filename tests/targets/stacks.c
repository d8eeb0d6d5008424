/* stacks: a program whose stack is worth looking at. Commands:
 *
 *   w  work, then exit: recursion, callbacks, alloca, a realigned stack,
 *      printf, malloc, longjmp, a tail call, signals, some on a stack of
 *      their own, for a judge that executes it step by step
 *   n  nest (recursion, a qsort callback, a signal handler) and stay there;
 *      answers "backtrace=0x..,0x.." that glibc's backtrace() found inside
 *   m  malloc and free in a loop, for ever
 */
#include "target.h"
#include <alloca.h>
#include <setjmp.h>
#ifdef __GLIBC__
#include <execinfo.h>
#endif

static volatile long sink;
static jmp_buf back;
static volatile int stays;

#define KEPT __attribute__((noinline, noclone, used))

KEPT long leaf(long x) { return x * 31 + (x >> 3); }

KEPT long tail(long x) { return leaf(x + 1); }

KEPT long fib(long n)
{
    return n < 2 ? leaf(n) : fib(n - 1) + fib(n - 2);
}

KEPT long variable(long n)                  /* the CFA is rbp's here */
{
    char *p = alloca(n * 8 + 16);
    long v[n];
    memset(p, n, n * 8);
    for (long i = 0; i < n; i++)
        v[i] = leaf(p[i]);
    sink += v[n - 1];
    return leaf(v[0]);
}

KEPT long realigned(long n)                 /* and an expression's here */
{
    long v[4] __attribute__((aligned(64))) = {n, n + 1, n + 2, n + 3};
    sink += (long)v & 63;
    return leaf(v[n & 3]) + tail(v[0]);
}

KEPT long many(long a, long b, long c, long d, long e, long f, long g, long h)
{
    return leaf(a + b + c + d) * leaf(e + f + g + h) + tail(a ^ h);
}

KEPT void jump(long n)
{
    if (n == 0)
        longjmp(back, 1);
    jump(n - 1);
    sink++;
}

KEPT void settle(void)
{
#ifdef __GLIBC__
    void *found[64];
    char text[2000] = "";
    int n = backtrace(found, 64), at = 0;
    for (int i = 0; i < n; i++)
        at += snprintf(text + at, sizeof text - at, "%s%p", i ? "," : "",
                       found[i]);
    say("backtrace=%s", text);
#else
    say("backtrace=");
#endif
    for (;;)
        pause();
}

KEPT void on_signal(int number)
{
    sink += leaf(number);
    if (stays)
        settle();
}

KEPT int compare(const void *a, const void *b)
{
    long x = *(const long *)a, y = *(const long *)b;
    sink += leaf(x);
    if (stays && x == 3)
        raise(SIGUSR1);
    return (x > y) - (x < y);
}

KEPT long sorted(long n)
{
    long v[] = {9, 3, 7, 1, 8, n & 7, 2};
    qsort(v, 7, sizeof *v, compare);
    return v[0] + leaf(v[1]);
}

KEPT long nested(long n)
{
    return n ? nested(n - 1) + leaf(n) : sorted(n);
}

KEPT long work(long n)
{
    char text[100];
    struct timespec t;
    sink += fib(5) + variable(n) + realigned(n) + nested(3);
    sink += many(1, 2, 3, 4, 5, 6, n, 8);
    snprintf(text, sizeof text, "%ld %s %g", n, "text", 2.5 * n);
    free(realloc(malloc(n * 100), n * 5000));
    clock_gettime(CLOCK_MONOTONIC, &t);     /* in the vdso */
    if (setjmp(back) == 0)
        jump(4);
    raise(SIGUSR1);
    raise(SIGUSR2);                         /* has its own stack */
    return leaf(strlen(text));
}

int main(void)
{
    static char other[65536];
    struct sigaction a = {.sa_handler = on_signal};
    stack_t stack = {.ss_sp = other, .ss_size = sizeof other};
    char c;
    bounded();
    sigaltstack(&stack, NULL);
    sigaction(SIGUSR1, &a, NULL);
    a.sa_flags = SA_ONSTACK;
    sigaction(SIGUSR2, &a, NULL);
    say("ready");
    while (read(0, &c, 1) == 1) {
        if (c == 'w') {
            sink += work(5);
            say("done");
            return 0;
        }
        stays = c == 'n';
        if (stays)
            nested(4);
        while (c == 'm')
            free(malloc(1 + (sink++ & 4095)));
    }
    return 0;
}
