/* How long do threads see nothing happen while they are being probed?
 *
 *     pause THREADS BUSY
 *
 * THREADS threads in all; BUSY of them compute, the others sleep in futexes;
 * one more, of real-time priority where allowed, wakes every 50 us and notes
 * its longest lateness. With BUSY equal to THREADS equal to 1 there is only
 * the main thread, which notes the longest gap between two looks at the clock.
 * Each line on stdin ("gap") is answered with the longest gap in us since the
 * last such line. Of the functions pf_100 to pf_1099 four are called by the
 * busy ones.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define ALONE __attribute__((noinline, noclone))
#define F(n) ALONE unsigned pf_##n(unsigned x, unsigned y) \
    { __asm__ volatile("" : "+r"(x)); return (x * 3 + y) ^ (0x1000 + n); }
#define F10(n) F(n##0) F(n##1) F(n##2) F(n##3) F(n##4) \
    F(n##5) F(n##6) F(n##7) F(n##8) F(n##9)
#define F100(n) F10(n##0) F10(n##1) F10(n##2) F10(n##3) F10(n##4) \
    F10(n##5) F10(n##6) F10(n##7) F10(n##8) F10(n##9)
F100(1) F100(2) F100(3) F100(4) F100(5)
F100(6) F100(7) F100(8) F100(9) F100(10)

static volatile double longest;
static pthread_mutex_t closed = PTHREAD_MUTEX_INITIALIZER;

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static unsigned some_work(unsigned x)
{
    for (int i = 0; i < 20; i++)
        x = pf_100(x, 1) + pf_555(x, 2) + pf_999(x, 3) + pf_1099(x, 4);
    return x;
}

static void *busy(void *unused)
{
    unsigned x = 1;
    for (;;)
        x = some_work(x);
    return unused;
}

static void *idle(void *unused)
{
    pthread_mutex_lock(&closed);
    return unused;
}

static void *watch(void *unused)
{
    struct sched_param param = {.sched_priority = 50};
    struct timespec step = {0, 50000};
    double last = now_us(), t;
    sched_setscheduler(0, SCHED_FIFO, &param);
    for (;;) {
        clock_nanosleep(CLOCK_MONOTONIC, 0, &step, 0);
        t = now_us();
        if (t - last > longest)
            longest = t - last;
        last = t;
    }
    return unused;
}

static void answer(void)
{
    char line[100];
    if (!fgets(line, sizeof line, stdin))
        exit(0);
    printf("%.1f\n", longest);
    longest = 0;
}

static void alone(void)
{
    struct pollfd input = {0, POLLIN, 0};
    unsigned x = 1;
    double last = now_us(), t;
    for (long n = 0;; n++) {
        x = some_work(x);
        t = now_us();
        if (t - last > longest)
            longest = t - last;
        last = t;
        if (n % 4096 == 0 && poll(&input, 1, 0)) {
            answer();
            last = now_us();
        }
    }
}

int main(int argc, char **argv)
{
    int n = argc > 1 ? atoi(argv[1]) : 1;
    int n_busy = argc > 2 ? atoi(argv[2]) : 1;
    pthread_t thread;
    alarm(300);
    setvbuf(stdout, 0, _IOLBF, 0);
    printf("%d\n", (int)getpid());
    if (n == 1)
        alone();
    pthread_mutex_lock(&closed);
    for (int i = 0; i < n - 2; i++)
        pthread_create(&thread, 0, i < n_busy ? busy : idle, 0);
    pthread_create(&thread, 0, watch, 0);
    for (;;)
        answer();
}
