/* actions THREADS [CALLS] [signals] [migrate] [notsc]: threads that call
 * functions a known number of times with known arguments.
 *
 *   signals  each thread is sent signals, whose handler calls work, too
 *   migrate  a thread moves all the others from processor to processor
 *   notsc    PR_SET_TSC: reading the time stamp counter is a SIGSEGV
 *
 * Commands: g a fixed number of calls of each thread, then report; f fork a
 * child that calls 1009 times, wait for it; r recursion, longjmp and the
 * like, report; b the same calls of work as g, over and over, until the next
 * command; q quit.
 *
 * work(n, key, text): n counts from 0 in each thread, key is the thread's
 * number (or 99 in the handler), text one of five. */
#include "target.h"
#include <sched.h>
#include <setjmp.h>

enum { CHILD = 1009, MOST = 64 };
static long n_calls = 20011;
static const char *const texts[] = {"alpha", "beta", "gamma", "delta", ""};
static int n_threads, with_signals, with_migration;
static long n_cpus;
static pthread_t threads[MOST];
static pthread_barrier_t begin, end;
static atomic_long n_handled;
static atomic_int is_busy;

CALLED long work(long n, long key, const char *text)
{
    return n * 3 + key + (text[0] == 'a');
}

static void call(long n, long key, const char *text)
{
    if (work(n, key, text) != n * 3 + key + (text[0] == 'a'))
        wrong("work(%ld, %ld)", n, key);
}

/* Calls itself n times: n + 1 entries, n + 1 exits. */
CALLED long deep(long n)
{
    if (n <= 0)
        return 1;
    long below = deep(n - 1);
    __asm__ volatile("" : "+r"(below));
    return below + 1;
}

/* Leaves by longjmp if n is odd: then its exit is never passed. */
static jmp_buf back;
CALLED long jumper(long n)
{
    if (n & 1)
        longjmp(back, 1);
    return n + 1;
}

/* Ends in a tail jump if n is negative. */
CALLED long other(long n) { return n * 5; }
CALLED long tail(long n)
{
    if (n < 0)
        return other(n - 1);
    return n + 2;
}

/* The same by way of a pointer, as -fno-plt has it. */
long far_tail(long n), far_end(long n);
long (*far_word)(long) = far_end;
FUNCTION(far_end, "lea (%rdi,%rdi,4),%rax\n ret");
FUNCTION(far_tail, "test %rdi,%rdi\n js 1f\n lea 2(%rdi),%rax\n ret\n"
         "1: dec %rdi\n jmp *far_word(%rip)");

/* Takes a known time at least. */
CALLED long sleeper(long us)
{
    nap_us(us);
    return us;
}

static void handler(int signo)
{
    int error = errno;
    call(1, 99, "signal");
    atomic_fetch_add(&n_handled, 1);
    errno = error;
}

static void batch(long key)
{
    for (long n = 0; n < n_calls; n++)
        call(n, key, texts[n % 5]);
}

static atomic_int storming, is_calm = 1, is_settling;

static void *runner(void *argument)
{
    long key = (long)argument;
    for (;;) {
        pthread_barrier_wait(&begin);
        if (quitting)
            return NULL;
        if (!is_settling)
            do
                batch(key);
            while (is_busy);
        pthread_barrier_wait(&end);
    }
}

static void *storm(void *unused)
{
    long n = 0;
    while (!quitting) {
        if (!storming) {
            is_calm = 1;
            nap_us(500);
            continue;
        }
        is_calm = 0;
        pthread_t thread = threads[n % n_threads];
        if (with_migration) {
            cpu_set_t set;
            CPU_ZERO(&set);
            CPU_SET(n / n_threads % n_cpus, &set);
            pthread_setaffinity_np(thread, sizeof set, &set);
        }
        if (with_signals && n % 5 == 0)
            pthread_kill(thread, SIGUSR1);
        n++;
        nap_us(50);
    }
    return NULL;
}

static void run_all(void)
{
    storming = 1;
    pthread_barrier_wait(&begin);
    pthread_barrier_wait(&end);
    storming = 0;
    nap_us(1000);
    while (!is_calm)
        nap_us(1000);
    is_settling = 1;                /* who comes out of a barrier has */
    pthread_barrier_wait(&begin);   /* handled what was sent to it */
    pthread_barrier_wait(&end);
    is_settling = 0;
}

static void fork_child(void)
{
    pid_t pid = fork();
    if (pid == 0) {
        for (long n = 0; n < CHILD; n++)
            call(n, 77, "child");
        _exit(n_wrong ? 1 : 0);
    }
    int status;
    if (waitpid(pid, &status, 0) != pid || status)
        wrong("the child ended with %x", status);
    say("pid=%d calls=%d", pid, CHILD);
}

static void frames(void)
{
    volatile long n_jumps = 0;
    for (int i = 0; i < 100; i++)
        if (deep(i % 10) != i % 10 + 1)
            wrong("deep(%d)", i % 10);
    for (volatile long i = 0; i < 100; i++)
        if (setjmp(back) == 0) {
            if (jumper(i) != i + 1)
                wrong("jumper(%ld)", i);
        } else
            n_jumps++;
    for (long i = -50; i < 50; i++)
        if (tail(i) != (i < 0 ? (i - 1) * 5 : i + 2))
            wrong("tail(%ld)", i);
    for (long i = -50; i < 50; i++)
        if (far_tail(i) != (i < 0 ? (i - 1) * 5 : i + 2))
            wrong("far_tail(%ld)", i);
    for (int i = 0; i < 5; i++)
        if (sleeper(2000 * i) != 2000 * i)
            wrong("sleeper");
    say("deep=550 jumper=100 jumps=%ld tail=100 other=50 sleeper=5",
        n_jumps);
}

int main(int argc, char **argv)
{
    bounded();
    n_threads = argc > 1 ? atoi(argv[1]) : 2;
    for (int i = 2; i < argc; i++) {
        with_signals |= !strcmp(argv[i], "signals");
        with_migration |= !strcmp(argv[i], "migrate");
        if (!strcmp(argv[i], "notsc")
                && prctl(PR_SET_TSC, PR_TSC_SIGSEGV))
            wrong("PR_SET_TSC: %s", strerror(errno));
        n_calls = atol(argv[i]) ? atol(argv[i]) : n_calls;
    }
    n_cpus = sysconf(_SC_NPROCESSORS_ONLN);
    struct sigaction action = {.sa_handler = handler,
                               .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    pthread_barrier_init(&begin, NULL, n_threads + 1);
    pthread_barrier_init(&end, NULL, n_threads + 1);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    for (long i = 0; i < n_threads; i++)
        threads[i] = start(runner, (void *)i);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    pthread_t other_thread = start(storm, NULL);
    say("ready calls=%ld", n_calls);
    for (int c; (c = command()) != 'q';) {
        long handled = n_handled;
        if (c == 'g') {
            run_all();
            say("calls=%ld handled=%ld", n_calls * n_threads,
                (long)n_handled - handled);
        } else if (c == 'f')
            fork_child();
        else if (c == 'r')
            frames();
        else if (c == 'b') {
            is_busy = 1;
            pthread_barrier_wait(&begin);
            command();
            is_busy = 0;
            pthread_barrier_wait(&end);
            say("handled=%ld", (long)n_handled - handled);
        }
    }
    quitting = 1;
    pthread_barrier_wait(&begin);
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    pthread_join(other_thread, NULL);
    return verdict();
}
