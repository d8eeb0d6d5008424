/* growth MODE: resources whose numbers and places a program relies on.
 *
 *   fds    a thread opens and closes; it must always get the same number
 *   brk    commands b: grow the heap by 64 MiB and use it; s: shrink it again
 *   lock   mlockall(MCL_CURRENT | MCL_FUTURE) first
 *
 * Commands: r report; q quit. hot is called all the time. */
#include "target.h"

CALLED long hot(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }
static atomic_long n_opens, n_hot;
static long n_bad_numbers;

static void *work_hot(void *argument)
{
    for (long i = 0; !quitting; i++, n_hot++)
        if (hot(i) != (i ^ 0x5bd1e995) * 31 + (i >> 7))
            wrong("hot(%ld)", i);
    return NULL;
}

static void *work_fds(void *argument)
{
    int first = open("/dev/null", O_RDONLY);
    close(first);
    while (!quitting) {
        int fd = open("/dev/null", O_RDONLY);
        if (fd != first) {
            n_bad_numbers++;
            wrong("open gave %d, not %d", fd, first);
        }
        if (close(fd))
            wrong("close: %s", strerror(errno));
        n_opens++;
    }
    return NULL;
}

static void grow(void)
{
    for (int i = 0; i < 64; i++) {
        char *p = sbrk(1 << 20);
        if (p == (void *)-1) {
            wrong("sbrk of MiB %d: %s", i, strerror(errno));
            break;
        }
        memset(p, i, 1 << 20);
    }
    say("brk=%p wrong=%ld", sbrk(0), atomic_load(&n_wrong));
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "fds";
    pthread_t hots, fds = 0;
    void *heap;
    int c;
    bounded();
    if (!strcmp(mode, "lock") && mlockall(MCL_CURRENT | MCL_FUTURE))
        wrong("mlockall: %s", strerror(errno));
    hots = start(work_hot, NULL);
    if (!strcmp(mode, "fds"))
        fds = start(work_fds, NULL);
    nap_us(20000);
    heap = sbrk(0);
    say("ready");
    while ((c = command()) != 'q') {
        if (c == 'b') {
            grow();
        } else if (c == 's') {
            if (brk(heap))
                wrong("brk: %s", strerror(errno));
            say("brk=%p wrong=%ld", sbrk(0), atomic_load(&n_wrong));
        } else if (c == 'r') {
            say("opens=%ld hot=%ld bad=%ld wrong=%ld", n_opens, n_hot,
                n_bad_numbers, atomic_load(&n_wrong));
        }
    }
    quitting = 1;
    pthread_join(hots, NULL);
    if (fds)
        pthread_join(fds, NULL);
    return verdict();
}
