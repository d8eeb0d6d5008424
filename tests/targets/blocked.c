/* blocked GROUP[,NAME...]: one thread per kind of blocking call, each checks
 * result, errno, duration and data of every round. GROUP: strict, loose (a
 * kill between stop and repair may show there), transfer, signal, all; or
 * names of single operations.
 *
 * Commands: r report one line an operation, then "end"; q quit. */
#include "target.h"
#include <linux/futex.h>
#include <mqueue.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/uio.h>

enum { STRICT = 1, LOOSE = 2, TRANSFER = 4, SIGNAL = 8, NONE = 16 };

struct op {
    const char *name;
    int group, ms;                      /* ms: how long a round blocks */
    void (*round)(struct op *);
    void (*setup)(struct op *);
    void *(*partner)(void *);
    long rounds, eintr, shorts, early, amiss;
    uint64_t late_ns, begun, begun_coarse;
    int fd[2], word, in_jiffies;
    pthread_t thread;
    sem_t sem, go;
    atomic_int ready;
    unsigned char *data, *buffer;
};

static void is_wrong(struct op *op, const char *what)
{
    if (errno == EINTR)
        op->eintr++;
    else
        op->amiss++;
    wrong("%s round %ld: %s: %s", op->name, op->rounds, what,
          strerror(errno));
}

static void is_short(struct op *op, long n, long size)
{
    if (n < 0) {
        is_wrong(op, "transfer");
    } else {
        op->shorts++;
        wrong("%s round %ld: %ld of %ld bytes", op->name, op->rounds, n, size);
    }
}

/* The time as of the last tick, which is when the kernel counts jiffies. */
static uint64_t coarse_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void begin(struct op *op)
{
    op->begun = now_ns();
    op->begun_coarse = coarse_ns();
}

/* The call must have lasted op->ms; a stop may make it last longer. Timeouts
 * of sockets, and of semaphores before Linux 5.16, are counted in jiffies. A
 * host that keeps the processor which counts them waiting makes them lag,
 * by 20 ms as seen, and then leap: such a call is short by the clock, with
 * or without a tracer, but never by the ticks. */
static void ended(struct op *op)
{
    int64_t over = now_ns() - op->begun - op->ms * 1000000ll;
    if (op->in_jiffies && over < 0)
        over = coarse_ns() - op->begun_coarse - op->ms * 1000000ll;
    if (over < -1000000) {
        op->early++;
        wrong("%s round %ld: %ld us early", op->name, op->rounds,
              (long)(-over / 1000));
    } else if (over > (int64_t)op->late_ns) {
        op->late_ns = over;
    }
}

/* value is what the call returned, wanted what it should (error: errno). */
static void check(struct op *op, long value, long wanted, int error)
{
    int saved = errno;
    if (value != -1 || errno != EINTR)
        ended(op);
    errno = saved;
    if (value != wanted || (value == -1 && errno != error))
        is_wrong(op, "result");
}

static struct timespec span(int ms)
{
    return (struct timespec){ms / 1000, ms % 1000 * 1000000};
}

static struct timespec at(clockid_t clock, int ms)
{
    struct timespec t;
    clock_gettime(clock, &t);
    t.tv_nsec += ms * 1000000;
    t.tv_sec += t.tv_nsec / 1000000000;
    t.tv_nsec %= 1000000000;
    return t;
}

/* ---- calls that only wait ---------------------------------------------- */
static void round_nanosleep(struct op *op)
{
    struct timespec t = span(op->ms);
    begin(op);
    check(op, nanosleep(&t, NULL), 0, 0);
}

static void round_clock_rel(struct op *op)
{
    struct timespec t = span(op->ms);
    begin(op);
    int error = clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL);
    errno = error;
    check(op, error, 0, 0);
}

static void round_clock_abs(struct op *op)
{
    begin(op);
    struct timespec t = at(CLOCK_MONOTONIC, op->ms);
    int error = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
    errno = error;
    check(op, error, 0, 0);
}

static void round_futex(struct op *op)
{
    struct timespec t = span(op->ms);
    begin(op);
    check(op, syscall(SYS_futex, &op->word, FUTEX_WAIT, 0, &t, 0, 0),
          -1, ETIMEDOUT);
}

static void *partner_futex(void *argument)
{
    struct op *op = argument;
    for (;;) {
        sem_wait(&op->go);
        nap_us(op->ms * 1000);
        __atomic_store_n(&op->word, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &op->word, FUTEX_WAKE, 1, 0, 0, 0);
        sem_post(&op->sem);
    }
    return NULL;
}

static void round_futex_wake(struct op *op)
{
    __atomic_store_n(&op->word, 0, __ATOMIC_SEQ_CST);
    begin(op);
    sem_post(&op->go);
    long n = syscall(SYS_futex, &op->word, FUTEX_WAIT, 0, 0, 0, 0);
    if (n == -1 && errno == EAGAIN)
        n = 0;
    if (n == 0 && !__atomic_load_n(&op->word, __ATOMIC_SEQ_CST))
        op->early++, wrong("futex_wake: woken by nobody");
    check(op, n, 0, 0);
    sem_wait(&op->sem);         /* a late wake would meet the next round */
}

static void round_sem(struct op *op)
{
    begin(op);
    struct timespec t = at(CLOCK_REALTIME, op->ms);
    check(op, sem_timedwait(&op->sem, &t), -1, ETIMEDOUT);
}

static void round_cond(struct op *op)
{
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    pthread_mutex_lock(&mutex);
    begin(op);
    struct timespec t = at(CLOCK_REALTIME, op->ms);
    int error = pthread_cond_timedwait(&cond, &mutex, &t);
    errno = error;
    check(op, error, ETIMEDOUT, 0);
    pthread_mutex_unlock(&mutex);
}

static void setup_pipe(struct op *op)
{
    if (pipe(op->fd))
        is_wrong(op, "pipe");
}

static void round_poll(struct op *op)
{
    struct pollfd p = {op->fd[0], POLLIN, 0};
    begin(op);
    check(op, poll(&p, 1, op->ms), 0, 0);
}

static void round_ppoll(struct op *op)
{
    struct pollfd p = {op->fd[0], POLLIN, 0};
    struct timespec t = span(op->ms);
    sigset_t set;
    sigemptyset(&set);
    begin(op);
    check(op, ppoll(&p, 1, &t, &set), 0, 0);
}

static void round_select(struct op *op)
{
    struct timeval t = {0, op->ms * 1000};
    fd_set set;
    FD_ZERO(&set);
    FD_SET(op->fd[0], &set);
    begin(op);
    check(op, select(op->fd[0] + 1, &set, 0, 0, &t), 0, 0);
}

static void round_pselect(struct op *op)
{
    struct timespec t = span(op->ms);
    sigset_t mask;
    fd_set set;
    sigemptyset(&mask);
    FD_ZERO(&set);
    FD_SET(op->fd[0], &set);
    begin(op);
    check(op, pselect(op->fd[0] + 1, &set, 0, 0, &t, &mask), 0, 0);
}

static void *partner_byte(void *argument)
{
    struct op *op = argument;
    for (;;) {
        sem_wait(&op->go);
        nap_us(op->ms * 1000);
        if (write(op->fd[1], "x", 1) != 1)
            is_wrong(op, "write of a byte");
    }
    return NULL;
}

static void round_read(struct op *op)
{
    char c = 0;
    begin(op);
    sem_post(&op->go);
    check(op, read(op->fd[0], &c, 1), 1, 0);
}

static void setup_timerfd(struct op *op)
{
    op->fd[0] = timerfd_create(CLOCK_MONOTONIC, 0);
}

static void round_timerfd(struct op *op)
{
    struct itimerspec t = {{0, 0}, span(op->ms)};
    uint64_t n;
    begin(op);
    timerfd_settime(op->fd[0], 0, &t, NULL);
    check(op, read(op->fd[0], &n, 8), 8, 0);
}

static void round_waitpid(struct op *op)
{
    int status;
    begin(op);
    pid_t pid = fork();
    if (pid == 0) {
        struct timespec t = span(op->ms);
        _exit(nanosleep(&t, NULL) ? 8 : 7);
    }
    check(op, waitpid(pid, &status, 0), pid, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 7)
        op->amiss++, wrong("waitpid: status %x", status);
}

static void setup_lock(struct op *op)
{
    char path[40];
    op->fd[0] = memfd_create("lock", MFD_CLOEXEC);
    snprintf(path, sizeof path, "/proc/self/fd/%d", op->fd[0]);
    op->fd[1] = open(path, O_RDWR | O_CLOEXEC);
}

static void *partner_lock(void *argument)
{
    struct op *op = argument;
    struct flock f = {.l_type = F_WRLCK, .l_len = 1};
    for (;;) {
        sem_wait(&op->go);
        f.l_type = F_WRLCK;
        if (fcntl(op->fd[1], F_OFD_SETLKW, &f))
            is_wrong(op, "lock of the partner");
        op->ready = 1;
        nap_us(op->ms * 1000 + 2000);
        f.l_type = F_UNLCK;
        fcntl(op->fd[1], F_OFD_SETLKW, &f);
    }
    return NULL;
}

static void round_lock(struct op *op)
{
    struct flock f = {.l_type = F_WRLCK, .l_len = 1};
    op->ready = 0;
    sem_post(&op->go);
    while (!op->ready)
        nap_us(100);
    op->begun = now_ns() - op->ms * 1000000ll;      /* only lateness */
    check(op, fcntl(op->fd[0], F_OFD_SETLKW, &f), 0, 0);
    f.l_type = F_UNLCK;
    fcntl(op->fd[0], F_OFD_SETLKW, &f);
}

static void setup_mq(struct op *op)
{
    char name[40];
    struct mq_attr a = {.mq_maxmsg = 1, .mq_msgsize = 8};
    snprintf(name, sizeof name, "/ubp-test-%d", getpid());
    op->fd[0] = mq_open(name, O_RDWR | O_CREAT, 0600, &a);
    mq_unlink(name);
}

static void round_mq(struct op *op)
{
    char data[8];
    if (op->fd[0] < 0) {
        nap_us(op->ms * 1000);
        return;
    }
    begin(op);
    struct timespec t = at(CLOCK_REALTIME, op->ms);
    check(op, mq_timedreceive(op->fd[0], data, 8, NULL, &t), -1, ETIMEDOUT);
}

/* ---- calls that Linux ends with EINTR at a mere stop ------------------- */
static void setup_epoll(struct op *op)
{
    struct epoll_event e = {EPOLLIN, {0}};
    setup_pipe(op);
    op->word = epoll_create1(EPOLL_CLOEXEC);
    epoll_ctl(op->word, EPOLL_CTL_ADD, op->fd[0], &e);
}

static void round_epoll(struct op *op)
{
    struct epoll_event e;
    begin(op);
    check(op, epoll_wait(op->word, &e, 1, op->ms), 0, 0);
}

static void round_epoll_event(struct op *op)
{
    struct epoll_event e;
    char c;
    begin(op);
    sem_post(&op->go);
    check(op, epoll_wait(op->word, &e, 1, 30000), 1, 0);
    if (read(op->fd[0], &c, 1) != 1)
        is_wrong(op, "read of the event");
}

static void round_sigtimedwait(struct op *op)
{
    struct timespec t = span(op->ms);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 5);
    begin(op);
    check(op, sigtimedwait(&set, NULL, &t), -1, EAGAIN);
}

static void limit(struct op *op, int fd, int name)
{
    op->in_jiffies = 1;
    struct timeval t = {0, op->ms * 1000};
    if (setsockopt(fd, SOL_SOCKET, name, &t, sizeof t))
        is_wrong(op, "setsockopt");
}

static void setup_pair(struct op *op)
{
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, op->fd))
        is_wrong(op, "socketpair");
}

static void setup_rcvtimeo(struct op *op)
{
    setup_pair(op);
    limit(op, op->fd[0], SO_RCVTIMEO);
}

static void round_rcvtimeo(struct op *op)
{
    char c;
    begin(op);
    check(op, recv(op->fd[0], &c, 1, 0), -1, EAGAIN);
}

static void setup_accept(struct op *op)
{
    struct sockaddr_un a = {AF_UNIX, ""};
    op->fd[0] = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(op->fd[0], (void *)&a, 2) || listen(op->fd[0], 1))
        is_wrong(op, "listen");
    limit(op, op->fd[0], SO_RCVTIMEO);
}

static void round_accept(struct op *op)
{
    begin(op);
    check(op, accept(op->fd[0], NULL, NULL), -1, EAGAIN);
}

/* A semaphore set of an own namespace dies with the process. */
static void setup_semop(struct op *op)
{
    op->word = -1;
    op->in_jiffies = 1;
    if (unshare(CLONE_NEWIPC) == 0)
        op->word = semget(IPC_PRIVATE, 1, 0600);
}

static void round_semop(struct op *op)
{
    struct sembuf b = {0, -1, 0};
    struct timespec t = span(op->ms);
    if (op->word < 0) {
        nap_us(op->ms * 1000);
        return;
    }
    begin(op);
    check(op, semtimedop(op->word, &b, 1, &t), -1, EAGAIN);
}

/* ---- transfers --------------------------------------------------------- */
enum { PIPE_SIZE = 1 << 20, SOCKET_SIZE = 8 << 20, RECEIVE_SIZE = 10000 };

static unsigned char pattern(struct op *op, long i)
{
    return i * 31 + (i >> 12) + op->ms;
}

static void fill(struct op *op, long size)
{
    op->data = malloc(size);
    op->buffer = malloc(256 << 10);
    memset(op->buffer, 0, 256 << 10);
    for (long i = 0; i < size; i++)
        op->data[i] = pattern(op, i);
}

static void setup_write(struct op *op)
{
    setup_pipe(op);
    fill(op, PIPE_SIZE);
}

static void setup_send(struct op *op)
{
    setup_pair(op);
    fill(op, SOCKET_SIZE);
}

/* Read size bytes slowly, in pieces, and check them against the pattern. */
static void drain(struct op *op, long size, long piece, int us)
{
    long done = 0;
    while (done < size) {
        struct pollfd p = {op->fd[0], POLLIN, 0};
        if (poll(&p, 1, 2000) == 0)
            break;                      /* the writer stopped short */
        long n = read(op->fd[0], op->buffer,
                      piece < size - done ? piece : size - done);
        if (n <= 0) {
            is_wrong(op, "read of the partner");
            break;
        }
        if (memcmp(op->buffer, op->data + done, n))
            op->amiss++, wrong("%s: data differ", op->name);
        done += n;
        nap_us(us);
    }
}

static void *partner_pipe(void *argument)
{
    struct op *op = argument;
    for (;;) {
        sem_wait(&op->go);
        nap_us(3000);
        drain(op, PIPE_SIZE, 65536, 500);
        sem_post(&op->sem);
    }
    return NULL;
}

static void *partner_socket(void *argument)
{
    struct op *op = argument;
    for (;;) {
        sem_wait(&op->go);
        nap_us(3000);
        drain(op, SOCKET_SIZE, 256 << 10, 300);
        sem_post(&op->sem);
    }
    return NULL;
}

static void transferred(struct op *op, long n, long size)
{
    if (n != size)
        is_short(op, n, size);
    while (sem_wait(&op->sem))
        is_wrong(op, "sem_wait");
    nap_us(op->ms * 1000);
}

static void round_write(struct op *op)
{
    sem_post(&op->go);
    transferred(op, write(op->fd[1], op->data, PIPE_SIZE), PIPE_SIZE);
}

static void round_writev(struct op *op)
{
    struct iovec v[2] = {{op->data, 300000},
                         {op->data + 300000, PIPE_SIZE - 300000}};
    sem_post(&op->go);
    transferred(op, writev(op->fd[1], v, 2), PIPE_SIZE);
}

static void round_send(struct op *op)
{
    sem_post(&op->go);
    transferred(op, send(op->fd[1], op->data, SOCKET_SIZE, 0), SOCKET_SIZE);
}

static void setup_sendfile(struct op *op)
{
    setup_send(op);
    op->word = memfd_create("data", MFD_CLOEXEC);
    if (write(op->word, op->data, PIPE_SIZE) != PIPE_SIZE)
        is_wrong(op, "memfd");
}

/* Nobody reads for three seconds: a deadline passes in the middle. */
static void *partner_stuck(void *argument)
{
    struct op *op = argument;
    for (;;) {
        sem_wait(&op->go);
        nap_us(3000000);
        drain(op, PIPE_SIZE, 65536, 500);
        sem_post(&op->sem);
    }
    return NULL;
}

static void *partner_sendfile(void *argument)
{
    struct op *op = argument;
    for (;;) {
        sem_wait(&op->go);
        nap_us(3000);
        drain(op, PIPE_SIZE, 65536, 500);
        sem_post(&op->sem);
    }
    return NULL;
}

static void round_sendfile(struct op *op)
{
    off_t offset = 0;
    sem_post(&op->go);
    transferred(op, sendfile(op->fd[1], op->word, &offset, PIPE_SIZE),
                PIPE_SIZE);
}

static void setup_waitall(struct op *op)
{
    setup_pair(op);
    fill(op, RECEIVE_SIZE);
}

static void *partner_waitall(void *argument)
{
    struct op *op = argument;
    for (;;) {
        sem_wait(&op->go);
        nap_us(1000);
        if (send(op->fd[1], op->data, 1000, 0) != 1000)
            is_wrong(op, "send of the partner");
        nap_us(8000);
        if (send(op->fd[1], op->data + 1000, 9000, 0) != 9000)
            is_wrong(op, "send of the partner");
        sem_post(&op->sem);
    }
    return NULL;
}

static void round_waitall(struct op *op)
{
    unsigned char buffer[RECEIVE_SIZE];
    sem_post(&op->go);
    long n = recv(op->fd[0], buffer, RECEIVE_SIZE, MSG_WAITALL);
    if (n == RECEIVE_SIZE && memcmp(buffer, op->data, n))
        op->amiss++, wrong("waitall: data differ");
    transferred(op, n, RECEIVE_SIZE);
    if (n > 0 && n < RECEIVE_SIZE)
        recv(op->fd[0], buffer, RECEIVE_SIZE - n, MSG_WAITALL);
}

/* ---- signals that must interrupt --------------------------------------- */
static __thread volatile int n_handled;
static __thread volatile uint64_t handled_ns;

static void handler(int number)
{
    n_handled++;
    handled_ns = now_ns();
}

static void setup_signal(struct op *op)
{
    sigset_t set;
    struct sigaction a = {.sa_handler = handler, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &a, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    setup_epoll(op);
}

/* At a different instant each time: signals meet every stage of a stop. */
static void *partner_signal(void *argument)
{
    struct op *op = argument;
    unsigned seed = op->group * 17 + op->name[0];
    for (;;) {
        sem_wait(&op->go);
        seed = seed * 1103515245 + 12345;
        nap_us(100 + (seed >> 16) % 3000);
        pthread_kill(op->thread, SIGUSR1);
    }
    return NULL;
}

/* The signal is blocked outside of the call: exactly one must end it. */
static void interrupted(struct op *op, long value)
{
    uint64_t now = now_ns();
    if (value == -1 && errno == EINTR && n_handled == 0)
        op->eintr++, wrong("%s: EINTR without a signal", op->name);
    else if (value != -1 || errno != EINTR || n_handled != 1)
        op->amiss++, wrong("%s: returned %ld after %d signals: %s", op->name,
                           value, n_handled, strerror(errno));
    else if (now - handled_ns > 2000000000ull)
        op->amiss++, wrong("%s: slept on after the signal", op->name);
    n_handled = 0;
}

static void round_epoll_signal(struct op *op)
{
    struct epoll_event e;
    sigset_t none;
    sigemptyset(&none);
    sem_post(&op->go);
    interrupted(op, epoll_pwait(op->word, &e, 1, 8000, &none));
}

static void round_ppoll_signal(struct op *op)
{
    struct timespec t = {8, 0};
    sigset_t none;
    sigemptyset(&none);
    sem_post(&op->go);
    interrupted(op, ppoll(NULL, 0, &t, &none));
}

static void round_sigsuspend(struct op *op)
{
    sigset_t none;
    sigemptyset(&none);
    sem_post(&op->go);
    interrupted(op, sigsuspend(&none));
}

static struct op ops[] = {
    {"nanosleep", STRICT, 21, round_nanosleep},
    {"clock_rel", STRICT, 19, round_clock_rel},
    {"clock_abs", STRICT, 23, round_clock_abs},
    {"futex", STRICT, 20, round_futex},
    {"futex_wake", STRICT, 17, round_futex_wake, NULL, partner_futex},
    {"sem", STRICT, 25, round_sem},
    {"cond", STRICT, 26, round_cond},
    {"poll", STRICT, 18, round_poll, setup_pipe},
    {"ppoll", STRICT, 22, round_ppoll, setup_pipe},
    {"select", STRICT, 24, round_select, setup_pipe},
    {"pselect", STRICT, 27, round_pselect, setup_pipe},
    {"read", STRICT, 16, round_read, setup_pipe, partner_byte},
    {"timerfd", STRICT, 28, round_timerfd, setup_timerfd},
    {"waitpid", STRICT, 40, round_waitpid},
    {"lock", STRICT, 15, round_lock, setup_lock, partner_lock},
    {"mq", STRICT, 29, round_mq, setup_mq},
    {"epoll", LOOSE, 20, round_epoll, setup_epoll},
    {"epoll_event", LOOSE, 18, round_epoll_event, setup_epoll, partner_byte},
    {"sigtimedwait", LOOSE, 21, round_sigtimedwait},
    {"rcvtimeo", LOOSE, 23, round_rcvtimeo, setup_rcvtimeo},
    {"accept", LOOSE, 24, round_accept, setup_accept},
    {"semop", LOOSE, 22, round_semop, setup_semop},
    {"write", TRANSFER, 20, round_write, setup_write, partner_pipe},
    {"writev", TRANSFER, 19, round_writev, setup_write, partner_pipe},
    {"send", TRANSFER, 18, round_send, setup_send, partner_socket},
    {"sendfile", TRANSFER, 17, round_sendfile, setup_sendfile,
     partner_sendfile},
    {"waitall", TRANSFER, 16, round_waitall, setup_waitall, partner_waitall},
    {"stuck", NONE, 20, round_write, setup_write, partner_stuck},
    {"epoll_signal", SIGNAL, 0, round_epoll_signal, setup_signal,
     partner_signal},
    {"ppoll_signal", SIGNAL, 0, round_ppoll_signal, setup_signal,
     partner_signal},
    {"sigsuspend", SIGNAL, 0, round_sigsuspend, setup_signal, partner_signal},
};
enum { N_OPS = sizeof ops / sizeof *ops };

/* A function to probe, called in each round. */
CALLED long hot(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }

static atomic_int n_started;

static void *run(void *argument)
{
    struct op *op = argument;
    op->thread = pthread_self();
    if (op->setup)
        op->setup(op);
    if (op->partner)
        start(op->partner, op);
    n_started++;
    while (!quitting) {
        op->round(op);
        op->rounds++;
        if (hot(op->rounds) != (op->rounds ^ 0x5bd1e995) * 31
                               + (op->rounds >> 7))
            wrong("hot");
    }
    return NULL;
}

static int is_chosen(struct op *op, const char *list)
{
    static const char *const groups[] = {"strict", "loose", "transfer",
                                         "signal"};
    char text[500], *rest, *word;
    snprintf(text, sizeof text, "%s", list);
    for (word = strtok_r(text, ",", &rest); word;
         word = strtok_r(NULL, ",", &rest)) {
        if (!strcmp(word, op->name) || (!strcmp(word, "all")
                                         && op->group != NONE))
            return 1;
        for (int i = 0; i < 4; i++)
            if (!strcmp(word, groups[i]) && op->group == 1 << i)
                return 1;
    }
    return 0;
}

static void report(void)
{
    for (int i = 0; i < N_OPS; i++)
        if (ops[i].thread)
            say("op=%s rounds=%ld eintr=%ld short=%ld early=%ld amiss=%ld "
                "late_us=%lu", ops[i].name, ops[i].rounds, ops[i].eintr,
                ops[i].shorts, ops[i].early, ops[i].amiss,
                ops[i].late_ns / 1000);
    say("end=1 wrong=%ld", atomic_load(&n_wrong));
}

int main(int argc, char **argv)
{
    int chosen = 0, c;
    bounded();
    prctl(PR_SET_TIMERSLACK, 1);
    for (int i = 0; i < N_OPS; i++) {
        sem_init(&ops[i].sem, 0, 0);
        sem_init(&ops[i].go, 0, 0);
        if (is_chosen(&ops[i], argc > 1 ? argv[1] : "all"))
            start(run, &ops[i]), chosen++;
    }
    while (n_started < chosen)
        nap_us(1000);
    nap_us(100000);
    say("ready");
    while ((c = command()) != 'q')
        if (c == 'r')
            report();
    quitting = 1;
    for (int i = 0; i < N_OPS; i++)
        if (ops[i].thread)
            pthread_join(ops[i].thread, NULL);
    return verdict();
}
