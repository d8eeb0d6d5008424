/* execs HOW [N]: calls step, and becomes another program.
 *
 *   once         1009 calls, then the end
 *   chain        211 calls, then itself as `once`, N times over
 *   thread       the same, by a thread that is not the first
 *   wait         the same at each command x; c calls; q quit
 *   fail         an exec that fails, then 1009 calls
 *
 * The last program exits with 7; each says what it called. */
#include "target.h"

enum { CALLS = 1009, BEFORE = 211 };
volatile long counter;
CALLED long step(long a, long b) { return a * 3 + b + counter; }

static char **arguments;

static void call(long n)
{
    for (long i = 0; i < n; i++)
        if (step(i, n) != i * 3 + n)
            wrong("step(%ld)", i);
    say("n=%ld wrong=%ld", n, atomic_load(&n_wrong));
}

static void *become(void *how)
{
    char number[20];
    long n = arguments[2] ? atol(arguments[2]) : 0;
    snprintf(number, sizeof number, "%ld", n - 1);
    execl("/proc/self/exe", "execs", n > 1 ? how : "once", number, NULL);
    wrong("exec: %s", strerror(errno));
    return NULL;
}

int main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "once";
    int c;
    arguments = argv;
    bounded();
    say("ready how=%s", how);
    if (strcmp(how, "once") == 0) {
        call(CALLS);
        return n_wrong ? 1 : 7;
    }
    if (strcmp(how, "fail") == 0) {
        execl("/nonesuch", "nonesuch", NULL);
        call(CALLS);
        return n_wrong ? 1 : 7;
    }
    if (strcmp(how, "wait") == 0) {
        while ((c = command()) != 'q') {
            call(BEFORE);
            if (c == 'x')
                become("wait");
        }
        return verdict();
    }
    call(BEFORE);
    if (strcmp(how, "chain") == 0)
        become("chain");
    start(become, "thread");
    for (;;)
        pause();
}
