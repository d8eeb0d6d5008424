/* epoll_term: waits 8 s in epoll_wait until a SIGTERM (handler with
 * SA_RESTART) interrupts it; the signal is blocked outside of the wait.
 *
 * Commands: w announce a wait, wait, report how it ended; q quit. */
#include "target.h"
#include <sys/epoll.h>

CALLED long hot(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }
static volatile int n_handled;
static void handler(int number) { n_handled++; }

int main(void)
{
    struct sigaction a = {.sa_handler = handler, .sa_flags = SA_RESTART};
    struct epoll_event e;
    sigset_t set, none;
    int fd = epoll_create1(EPOLL_CLOEXEC), c;
    long n_waits = 0;
    bounded();
    sigaction(SIGTERM, &a, NULL);
    sigemptyset(&none);
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    say("ready");
    while ((c = command()) != 'q') {
        say("waits=%ld", ++n_waits);
        uint64_t begun = now_ns();
        int n = epoll_pwait(fd, &e, 1, 8000, &none);
        int error = errno;
        if (n != -1 || error != EINTR || n_handled != n_waits)
            wrong("epoll_wait: %d after %d signals", n, n_handled);
        if (hot(n_waits) != (n_waits ^ 0x5bd1e995) * 31 + (n_waits >> 7))
            wrong("hot");
        say("ended=%s after_ms=%lu", n == -1 && error == EINTR ? "EINTR"
            : "other", (now_ns() - begun) / 1000000);
    }
    return verdict();
}
