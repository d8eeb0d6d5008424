/* tls before|after: raw clone threads whose thread-local storage is a few
 * bytes at the start or at the end of a page between two guard pages.
 * `before`: they run from the start; `after`: from command c on.
 *
 * Commands: c create them; p park, report; g go on; r report; q quit. */
#include "target.h"
#include <asm/prctl.h>
#include <sched.h>

CALLED long hot(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }
static volatile long counts[3], bad, parked, in_park[3], stop;
static atomic_int ended;

static void sleep_raw(void)
{
    struct timespec t = {0, 500000};
    long r;
    __asm__ volatile("syscall" : "=a"(r) : "0"(35), "D"(&t), "S"(0)
                     : "rcx", "r11", "memory");
}

/* No libc in here: errno and the stack protector would use fs. */
static int raw(void *argument)
{
    long me = (long)argument;
    while (!stop) {
        for (long i = 0; i < 100; i++)
            if (hot(i) != (i ^ 0x5bd1e995) * 31 + (i >> 7))
                bad++;
        counts[me] += 100;
        while (parked && !stop) {
            in_park[me] = 1;
            sleep_raw();
        }
        in_park[me] = 0;
    }
    __atomic_fetch_add((int *)&ended, 1, __ATOMIC_SEQ_CST);
    return 0;
}

static void create(long me, int at_end)
{
    char *stack = mmap(NULL, 65536, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *page = mmap(NULL, 3 * 4096, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(page + 4096, 4096, PROT_READ | PROT_WRITE);
    char *tls = page + 4096 + (at_end ? 4096 - 64 : 0);
    *(void **)tls = tls;
    if (clone(raw, stack + 65536, CLONE_VM | CLONE_FS | CLONE_FILES
              | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS,
              (void *)me, NULL, tls, NULL) < 0)
        wrong("clone: %s", strerror(errno));
}

static void *ordinary(void *argument)
{
    raw(NULL);
    return NULL;
}

static void report(void)
{
    say("hot=%ld raw=%ld wrong=%ld", counts[0] + counts[1] + counts[2],
        counts[1] + counts[2], n_wrong + bad);
}

int main(int argc, char **argv)
{
    int c, created = 0;
    bounded();
    pthread_t thread = start(ordinary, NULL);
    if (argc > 1 && argv[1][0] == 'b') {
        create(1, 0), create(2, 1);
        created = 2;
    }
    nap_us(10000);
    say("ready");
    while ((c = command()) != 'q') {
        if (c == 'c') {
            create(1, 0), create(2, 1);
            created = 2;
            nap_us(20000);
            report();
        } else if (c == 'p') {
            parked = 1;
            while (!in_park[0] || (created && !(in_park[1] && in_park[2])))
                nap_us(500);
            report();
        } else if (c == 'g') {
            parked = 0;
        } else if (c == 'r') {
            report();
        }
    }
    stop = 1;
    pthread_join(thread, NULL);
    while (ended < 1 + created)
        nap_us(500);
    nap_us(2000);
    n_wrong += bad;
    return verdict();
}
