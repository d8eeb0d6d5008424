/* signals: queued signals that carry a sequence number must arrive complete,
 * in order, and with their siginfo; timers with theirs. Three receivers: one
 * computes, one sleeps in nanosleep (EINTR is right there), one in read.
 *
 * Commands: r report; q quit. */
#include "target.h"

CALLED long hot(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }

enum { N = 3 };
static struct receiver {
    pthread_t thread;
    pid_t tid;
    atomic_long sent, received, ticks;
    int fd[2];
} receivers[N];
static __thread struct receiver *self;
static atomic_int n_ready;

static void on_queued(int number, siginfo_t *info, void *context)
{
    long expected = self->received++;
    if (info->si_code != SI_QUEUE)
        wrong("si_code is %d, not SI_QUEUE", info->si_code);
    else if ((long)info->si_value.sival_ptr != expected)
        wrong("queued signal %ld, not %ld", (long)info->si_value.sival_ptr,
              expected);
    if (info->si_pid != getpid())
        wrong("si_pid is %d", info->si_pid);
}

static void on_timer(int number, siginfo_t *info, void *context)
{
    self->ticks++;
    if (info->si_code != SI_TIMER || info->si_value.sival_ptr != self)
        wrong("timer: si_code %d", info->si_code);
}

static void *receive(void *argument)
{
    struct sigevent e = {.sigev_notify = SIGEV_THREAD_ID,
                         .sigev_signo = SIGUSR1};
    struct itimerspec t = {{0, 3100000}, {0, 3100000}};
    timer_t timer;
    self = argument;
    long kind = self - receivers;
    self->thread = pthread_self();
    self->tid = syscall(SYS_gettid);
    e.sigev_value.sival_ptr = self;
    e._sigev_un._tid = self->tid;
    if (pipe(self->fd) || timer_create(CLOCK_MONOTONIC, &e, &timer)
        || timer_settime(timer, 0, &t, NULL))
        wrong("timer or pipe");
    n_ready++;
    for (long i = 0; !quitting; i++) {
        struct timespec span = {0, 2000000};
        char c;
        if (kind == 0) {
            for (long n = 0; n < 1000; n++)
                if (hot(n) != (n ^ 0x5bd1e995) * 31 + (n >> 7))
                    wrong("hot");
        } else if (kind == 1) {
            if (nanosleep(&span, NULL) && errno != EINTR)
                wrong("nanosleep");
        } else if (read(self->fd[0], &c, 1) < 0) {
            wrong("read: %s", strerror(errno));     /* SA_RESTART */
        }
    }
    timer_delete(timer);
    return NULL;
}

static void *send_all(void *argument)
{
    sigset_t set;
    sigfillset(&set);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    for (unsigned seed = 1; !quitting; seed = seed * 1103515245 + 12345) {
        for (int i = 0; i < N; i++) {
            struct receiver *r = &receivers[i];
            siginfo_t info = {.si_code = SI_QUEUE};
            if (r->sent - r->received > 100)
                continue;
            info.si_pid = getpid();
            info.si_uid = getuid();
            info.si_value.sival_ptr = (void *)r->sent;
            if (syscall(SYS_rt_tgsigqueueinfo, getpid(), r->tid,
                        SIGRTMIN + 3, &info) == 0)
                r->sent++;
        }
        nap_us((seed >> 16) % 300);
    }
    return NULL;
}

static void report(void)
{
    long ticks = 0, sent = 0, received = 0;
    for (int i = 0; i < N; i++) {
        ticks += receivers[i].ticks;
        sent += receivers[i].sent;
        received += receivers[i].received;
    }
    say("ticks=%ld sent=%ld received=%ld wrong=%ld", ticks, sent, received,
        atomic_load(&n_wrong));
}

int main(void)
{
    struct sigaction a = {.sa_flags = SA_SIGINFO | SA_RESTART};
    pthread_t sender;
    sigset_t set;
    int c;
    bounded();
    a.sa_sigaction = on_queued;
    sigaction(SIGRTMIN + 3, &a, NULL);
    a.sa_sigaction = on_timer;
    sigaction(SIGUSR1, &a, NULL);
    for (int i = 0; i < N; i++)
        start(receive, &receivers[i]);
    sigfillset(&set);
    sigdelset(&set, SIGALRM);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    while (n_ready < N)
        nap_us(1000);
    sender = start(send_all, NULL);
    say("ready");
    while ((c = command()) != 'q')
        report();
    quitting = 1;
    pthread_join(sender, NULL);
    for (int turn = 0; turn < 2000; turn++) {
        int done = 1;
        for (int i = 0; i < N; i++)
            done &= receivers[i].sent == receivers[i].received;
        if (done)
            break;
        nap_us(1000);
    }
    for (int i = 0; i < N; i++)
        if (receivers[i].sent != receivers[i].received)
            wrong("receiver %d: %ld sent, %ld received", i, receivers[i].sent,
                  receivers[i].received);
    for (int i = 0; i < N; i++) {
        if (write(receivers[i].fd[1], "q", 1) != 1)
            wrong("write");
        pthread_join(receivers[i].thread, NULL);
    }
    return verdict();
}
