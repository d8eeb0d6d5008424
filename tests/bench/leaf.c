/* A tight loop of calls: what does one more thing per call cost?
 *
 * Commands on stdin, an answer line each on stdout:
 *
 *     cycles NAME N R     core cycles per call of a loop of N calls of NAME:
 *                         the least of R loops, as whoever shares the core
 *                         can only add to them
 *     threads K NAME MS   calls per second of CPU time of each of K threads
 *                         that run for MS ms at once, each on its own CPU
 *
 * The first line printed is "PID METHOD", where METHOD tells what a cycle is:
 *
 *     perf        perf_event_open, user and kernel
 *     perf-user   the same, user only (uprobe hits are then understated)
 *     adds        no counter here: elapsed time, divided by the time that one
 *                 add of a long chain of dependent adds takes, measured just
 *                 before; such an add takes one cycle on every x86-64
 */
#define _GNU_SOURCE
#include <linux/perf_event.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define ALONE __attribute__((noinline, noclone, aligned(64)))
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 8
#undef ALONE
#define ALONE __attribute__((noipa, aligned(64)))
#endif

static unsigned long counter __attribute__((aligned(64)));

/* The explicit callbacks that a rebuilt program would call. */
ALONE void callback_atomic(void)
{
    __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
}

ALONE void callback_plain(void)
{
    *(volatile unsigned long *)&counter += 1;
}

ALONE unsigned opaque(unsigned x)
{
    return x ^ 0x55;
}

/* leaf: a function of three instructions; most registers are free in it. */
ALONE unsigned leaf(unsigned x)
{
    return (x * 3 + 1) ^ 0x5555;
}

ALONE unsigned leaf_atomic(unsigned x)
{
    callback_atomic();
    return (x * 3 + 1) ^ 0x5555;
}

ALONE unsigned leaf_plain(unsigned x)
{
    callback_plain();
    return (x * 3 + 1) ^ 0x5555;
}

/* outer: hands everything on to another, so that no register is free. */
ALONE unsigned outer(unsigned x)
{
    return opaque(x * 3 + 1) + 1;
}

ALONE unsigned outer_atomic(unsigned x)
{
    callback_atomic();
    return opaque(x * 3 + 1) + 1;
}

ALONE unsigned outer_plain(unsigned x)
{
    callback_plain();
    return opaque(x * 3 + 1) + 1;
}

/* caller: its first five bytes hold a call, which has to be displaced. */
ALONE unsigned caller(unsigned x)
{
    return opaque(x) + 1;
}

ALONE unsigned caller_atomic(unsigned x)
{
    callback_atomic();
    return opaque(x) + 1;
}

ALONE unsigned caller_plain(unsigned x)
{
    callback_plain();
    return opaque(x) + 1;
}

/* What a rebuilt program would call to do what each action does. */
static inline unsigned long rdtsc(void)
{
    unsigned low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (unsigned long)high << 32 | low;
}

static struct histogram {
    unsigned long sum, bucket[496];
} histogram __attribute__((aligned(64)));

static void add_to(struct histogram *h, unsigned long v)
{
    int e = 63 - __builtin_clzl(v | 1);
    unsigned long i = v < 8 ? v : 8 * (e - 2) + ((v >> (e - 3)) & 7);
    __atomic_fetch_add(&h->bucket[i], 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&h->sum, v, __ATOMIC_RELAXED);
}

ALONE void callback_hist(unsigned long v)
{
    add_to(&histogram, v);
}

static struct {
    unsigned long key, n;
} table[1024] __attribute__((aligned(64)));

ALONE void callback_key(unsigned long key)
{
    unsigned long i = key * 0x9e3779b97f4a7c15ul >> 54;
    while (1) {
        unsigned long seen = 0;
        if (table[i].key == key + 1)
            break;
        if (!table[i].key && __atomic_compare_exchange_n(
                &table[i].key, &seen, key + 1, 0, __ATOMIC_RELAXED,
                __ATOMIC_RELAXED))
            break;
        if (seen == key + 1)
            break;
        i = (i + 1) & 1023;
    }
    __atomic_fetch_add(&table[i].n, 1, __ATOMIC_RELAXED);
}

static struct record {
    unsigned long sequence, tsc, where, site, a, b;
} ring[4096] __attribute__((aligned(64)));
static __thread unsigned thread_id = 1, cpu_number = 0;

ALONE void callback_trace(unsigned long a, unsigned long b)
{
    unsigned long n = __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
    struct record *r = &ring[n & 4095];
    __atomic_store_n(&r->sequence, 2 * n + 1, __ATOMIC_RELAXED);
    r->tsc = rdtsc();
    r->where = (unsigned long)cpu_number << 32 | thread_id;
    r->site = 1;
    r->a = a;
    r->b = b;
    __atomic_store_n(&r->sequence, 2 * n + 2, __ATOMIC_RELEASE);
}

ALONE unsigned leaf_hist(unsigned x)
{
    callback_hist(x);
    return (x * 3 + 1) ^ 0x5555;
}

ALONE unsigned leaf_key(unsigned x)
{
    callback_key(x & 15);
    return (x * 3 + 1) ^ 0x5555;
}

ALONE unsigned leaf_trace(unsigned x)
{
    callback_trace(x, x + 1);
    return (x * 3 + 1) ^ 0x5555;
}

ALONE unsigned leaf_condition(unsigned x)
{
    if (x == 0)
        callback_atomic();
    return (x * 3 + 1) ^ 0x5555;
}

ALONE unsigned leaf_latency(unsigned x)
{
    unsigned long start = rdtsc();
    unsigned y = (x * 3 + 1) ^ 0x5555;
    callback_hist(rdtsc() - start);
    return y;
}

/* The floor of whatever takes the time: one rdtsc, and two. */
ALONE unsigned leaf_rdtsc(unsigned x)
{
    rdtsc();
    return (x * 3 + 1) ^ 0x5555;
}

ALONE unsigned leaf_2rdtsc(unsigned x)
{
    unsigned y;
    rdtsc();
    y = (x * 3 + 1) ^ 0x5555;
    rdtsc();
    return y;
}

#define LOOP(name) \
    ALONE static void loop_##name(long n) { do name(n); while (--n); }
LOOP(leaf) LOOP(leaf_atomic) LOOP(leaf_plain)
LOOP(outer) LOOP(outer_atomic) LOOP(outer_plain)
LOOP(caller) LOOP(caller_atomic) LOOP(caller_plain)
LOOP(leaf_hist) LOOP(leaf_key) LOOP(leaf_trace) LOOP(leaf_condition)
LOOP(leaf_latency) LOOP(leaf_rdtsc) LOOP(leaf_2rdtsc)

static const struct {
    const char *name;
    void (*loop)(long);
} loops[] = {
    {"leaf", loop_leaf},
    {"leaf_atomic", loop_leaf_atomic},
    {"leaf_plain", loop_leaf_plain},
    {"outer", loop_outer},
    {"outer_atomic", loop_outer_atomic},
    {"outer_plain", loop_outer_plain},
    {"caller", loop_caller},
    {"caller_atomic", loop_caller_atomic},
    {"caller_plain", loop_caller_plain},
    {"leaf_hist", loop_leaf_hist},
    {"leaf_key", loop_leaf_key},
    {"leaf_trace", loop_leaf_trace},
    {"leaf_condition", loop_leaf_condition},
    {"leaf_latency", loop_leaf_latency},
    {"leaf_rdtsc", loop_leaf_rdtsc},
    {"leaf_2rdtsc", loop_leaf_2rdtsc},
    {0, 0}
};

static int counter_fd = -1;
static const char *method = "adds";

static void open_counter(void)
{
    struct perf_event_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.size = sizeof attr;
    attr.type = PERF_TYPE_HARDWARE;
    attr.config = PERF_COUNT_HW_CPU_CYCLES;
    attr.exclude_hv = 1;
    method = "perf";
    counter_fd = syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
    if (counter_fd < 0) {
        attr.exclude_kernel = 1;
        method = "perf-user";
        counter_fd = syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
    }
    if (counter_fd < 0)
        method = "adds";
}

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static double cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static double ns_per_cycle(void)
{
    double best = 1e9, t;
    long x = 0;
    for (int k = 0; k < 5; k++) {
        t = now_ns();
        for (int i = 0; i < 20000; i++)
            __asm__ volatile("add $1,%0\nadd $1,%0\nadd $1,%0\nadd $1,%0\n"
                             "add $1,%0\nadd $1,%0\nadd $1,%0\nadd $1,%0\n"
                             "add $1,%0\nadd $1,%0\n" : "+r"(x));
        t = (now_ns() - t) / 200000;
        if (t < best)
            best = t;
    }
    return best;
}

static double cycles(void (*loop)(long), long n, int rounds)
{
    long start, end;
    double t, unit, best = 1e18;
    loop(n / 20 + 1);
    while (rounds--) {
        if (counter_fd >= 0 && read(counter_fd, &start, 8) == 8) {
            loop(n);
            t = read(counter_fd, &end, 8) == 8 ? (double)(end - start) : 1e18;
        } else {
            unit = ns_per_cycle();
            t = now_ns();
            loop(n);
            t = (now_ns() - t) / unit;
        }
        if (t < best)
            best = t;
    }
    return best / n;
}

struct job {
    void (*loop)(long);
    int cpu;
    double ms, rate;
};

static void *work(void *arg)
{
    struct job *job = arg;
    cpu_set_t set;
    double start, cpu;
    long n = 0;
    CPU_ZERO(&set);
    CPU_SET(job->cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
    job->loop(20000);
    start = now_ns();
    cpu = cpu_ns();
    do {
        job->loop(20000);
        n += 20000;
    } while (now_ns() - start < job->ms * 1e6);
    job->rate = n / (cpu_ns() - cpu) * 1e9;
    return 0;
}

static void run_threads(int k, void (*loop)(long), double ms)
{
    pthread_t thread[64];
    struct job job[64];
    cpu_set_t set;
    int cpu = -1;
    sched_getaffinity(0, sizeof set, &set);
    for (int i = 0; i < k; i++) {
        do
            cpu = (cpu + 1) % CPU_SETSIZE;
        while (!CPU_ISSET(cpu, &set));
        job[i] = (struct job){loop, cpu, ms, 0};
        pthread_create(&thread[i], 0, work, &job[i]);
    }
    for (int i = 0; i < k; i++) {
        pthread_join(thread[i], 0);
        printf("%.0f ", job[i].rate);
    }
    printf("\n");
}

int main(void)
{
    char line[200], verb[32], name[32];
    open_counter();
    setvbuf(stdout, 0, _IOLBF, 0);
    printf("%d %s\n", (int)getpid(), method);
    alarm(600);
    while (fgets(line, sizeof line, stdin)) {
        int k = 1, rounds = 1, i = 0;
        double n = 0;
        if (sscanf(line, "threads %d %31s %lf", &k, name, &n) == 3)
            strcpy(verb, "threads");
        else if (sscanf(line, "%31s %31s %lf %d", verb, name, &n, &rounds) < 3)
            return 2;
        while (loops[i].name && strcmp(loops[i].name, name))
            i++;
        if (!loops[i].name || k > 64)
            return 2;
        if (!strcmp(verb, "cycles"))
            printf("%.4f\n", cycles(loops[i].loop, (long)n, rounds));
        else
            run_threads(k, loops[i].loop, n);
    }
    return 0;
}
