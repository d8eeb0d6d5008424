/* launched HOW [N]: ends in a known way, after known numbers of calls.
 *
 *   exit N    main returns N        kill N    it dies of signal N
 *
 * With UBP_TEST_EARLY=N a constructor calls _exit(N), before main.
 * Built with -DLIBRARY it also calls library_counted of launched_lib.c. */
#include "target.h"

CALLED long counted(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }
#ifdef LIBRARY
long library_counted(long x);
#else
#define library_counted counted
#endif

static volatile long sink;

__attribute__((constructor)) static void before_main(void)
{
    const char *early = getenv("UBP_TEST_EARLY");
    bounded();
    for (int i = 0; i < 13; i++)
        sink = counted(i);
    if (early)
        _exit(atoi(early));
}

int main(int argc, char **argv)
{
    long n = argc > 2 ? atol(argv[argc - 1]) : 0;
    for (int i = 0; i < 1009; i++)
        sink = counted(i);
    for (int i = 0; i < 499; i++)
        sink = library_counted(i);
    if (argc > 2 && !strcmp(argv[1], "kill")) {
        signal(n, SIG_DFL);
        kill(getpid(), n);
    }
    return n;
}
