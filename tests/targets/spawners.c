/* Threads that vfork all the time: spawners N [MS].
 *
 * Each thread in turn spawns true(1), runs a child of vfork that calls
 * step() and ends, and one that becomes true(1), as fast as it can. There is
 * always one of them in vfork. The children sleep for MS milliseconds first.
 *
 * Commands: p park, report; g go on; r report; q quit; v the leader itself
 * has a child that becomes true(1), report; h a new thread has one in a
 * handler with a frame of 600 KiB, of a signal that it sends itself by
 * call_self(); j wait for that thread, report. A report: the calls of step(),
 * by whomever; what was tried, and what ended as it was to. */
#include "target.h"
#include <sched.h>
#include <spawn.h>

extern char **environ;
static atomic_long n_steps, n_tried, n_good;
static atomic_int parked, n_parked;
static int sleep_ms;

CALLED long step(long n)
{
    __asm__ volatile("" : "+r"(n));
    return 3 * n + 1;
}

static void take_step(long n)
{
    if (step(n) != 3 * n + 1)
        wrong("step(%ld)", n);
    n_steps++;
}

static pid_t one(long n)
{
    static char *const argv[] = {"true", NULL};
    struct timespec t = {sleep_ms / 1000, sleep_ms % 1000 * 1000000};
    pid_t pid;
    if (n % 3 == 0) {
        int error = posix_spawn(&pid, "/bin/true", NULL, NULL, argv, environ);
        return error ? -error : pid;
    }
    pid = vfork();
    if (pid)
        return pid;
    if (sleep_ms)
        syscall(SYS_nanosleep, &t, NULL);
    if (n % 3 == 1)
        execv("/bin/true", argv);
    take_step(n);
    _exit(step(1) == 4 ? n_steps++, 0 : 8);
}

static void *work(void *argument)
{
    for (long n = (long)argument; !quitting; n++) {
        int status = -1;
        if (parked) {
            n_parked++;
            while (parked && !quitting)
                nap_us(500);
            n_parked--;
        }
        take_step(n);
        n_tried++;
        pid_t pid = one(n);
        if (pid > 0 && waitpid(pid, &status, 0) == pid && status == 0)
            n_good++;
        else
            wrong("child %ld: pid %d status %x", n % 3, pid, status);
    }
    return NULL;
}

/* tgkill(pid, tid, signo): the handler's return address is in the middle. */
long call_self(long pid, long tid, long signo);
FUNCTION(call_self, "mov $234, %eax\nsyscall\nmov $7, %ecx\nret");

static int become_true(void *argument)
{
    nap_us(sleep_ms * 1000l);
    return execl("/bin/true", "true", argument);
}

/* As posix_spawn has: on a stack of its own. */
static void one_that_becomes_true(void)
{
    static char stack[64 << 10] __attribute__((aligned(16)));
    int status = -1;
    n_tried++;
    pid_t pid = clone(become_true, stack + sizeof stack,
                      CLONE_VM | CLONE_VFORK | SIGCHLD, NULL);
    if (pid > 0 && waitpid(pid, &status, 0) == pid && status == 0)
        n_good++;
    else
        wrong("its child: pid %d status %x", pid, status);
}

static void handler(int signo)
{
    volatile char frame[600 << 10];
    frame[0] = frame[sizeof frame - 1] = (char)signo;
    one_that_becomes_true();
    if (frame[0] != (char)signo || frame[sizeof frame - 1] != (char)signo)
        wrong("the frame of the handler");
}

static void *call_oneself(void *argument)
{
    long error = call_self(getpid(), syscall(SYS_gettid), SIGUSR1);
    if (error)
        wrong("tgkill: %ld", error);
    return argument;
}

static void report(void)
{
    say("steps=%ld tried=%ld good=%ld wrong=%ld", n_steps, n_tried, n_good,
        n_wrong);
}

int main(int argc, char **argv)
{
    int n_threads = argc > 1 ? atoi(argv[1]) : 1, c;
    pthread_t threads[64], one = 0;
    sleep_ms = argc > 2 ? atoi(argv[2]) : 0;
    bounded();
    signal(SIGUSR1, handler);
    parked = 1;
    for (long n = 0; n < n_threads; n++)
        threads[n] = start(work, (void *)n);
    say("ready");
    while ((c = command()) != 'q') {
        if (c == 'g')
            parked = 0;
        if (c == 'p') {
            parked = 1;
            while (n_parked < n_threads)
                nap_us(1000);
        }
        if (c == 'v')
            one_that_becomes_true();
        if (c == 'h' && pthread_create(&one, NULL, call_oneself, NULL))
            wrong("pthread_create");
        if (c == 'j')
            pthread_join(one, NULL);
        if (strchr("prvj", c))
            report();
    }
    quitting = 1;
    for (int n = 0; n < n_threads; n++)
        pthread_join(threads[n], NULL);
    if (n_tried != n_good)
        wrong("%ld of %ld", n_good, n_tried);
    return verdict();
}
