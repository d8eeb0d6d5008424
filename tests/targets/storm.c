/* Many threads run bodies at once, while signals arrive, processors change,
 * a child is forked, and another process reads the rings.
 *
 *   storm CODE DATA HIT CALL THREADS CALLS
 *         RING SLOT_SIZE N_SLOTS SHARDS SHIFT POLICY
 *
 * CODE is mapped r-x at 0x10000000, DATA rw- and shared at 0x20000000. HIT is
 * the vaddr of a function hit(value, i, thread), CALL that of one that calls
 * *(DATA + 0x40) between an entry and an exit, or 0. RING is the offset of a
 * ring in each shard, or 0; its records hold value, i, thread and a check.
 * Prints: hits in handlers, accepted, torn, twice; calls; returns; jumps.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define DATA 0x20000000ul
#define SHARDS (DATA + 0x1000)
#define MAX_THREADS 16
#define HANDLER 98
#define CHILD 99

typedef long hit_function(long value, long i, long thread);
typedef long call_function(long depth, long i, long thread);

static hit_function *hit;
static call_function *call;
static long n_threads, n_calls, ring, slot_size, n_slots, n_shards, shift;
static int is_overwrite;
static long n_handled, n_called, n_returned, n_jumped;
static int is_over;
static pthread_t threads[MAX_THREADS];
static volatile int tids[MAX_THREADS];
static __thread jmp_buf back;
static __thread int can_jump;

static struct shared {          /* at DATA + 0x100 */
    long stop, accepted, torn, twice;
} *shared = (void *)(DATA + 0x100);

static long value_of(long i, long thread)
{
    return (i * 2654435761u + thread * 40503) % 5000 - 2000;
}

static void handler(int signal)
{
    (void)signal;
    long i = __atomic_fetch_add(&n_handled, 1, __ATOMIC_RELAXED);
    hit(value_of(i, HANDLER), i, HANDLER);
}

/* What CALL calls: sometimes recurses, sometimes never comes back. */
static long work(long depth, long i, long thread)
{
    if (can_jump && depth == 2 && i % 7 == 3) {
        __atomic_fetch_add(&n_jumped, 1, __ATOMIC_RELAXED);
        longjmp(back, 1);
    }
    if (depth > 0) {
        __atomic_fetch_add(&n_called, 1, __ATOMIC_RELAXED);
        call(depth - 1, i, thread);
        __atomic_fetch_add(&n_returned, 1, __ATOMIC_RELAXED);
    }
    return depth * 10;
}

static void *run(void *arg)
{
    long thread = (long)arg;
    tids[thread] = syscall(SYS_gettid);
    for (long i = 0; i < n_calls; i++) {
        hit(value_of(i, thread), i, thread);
        if (call && i % 8 == 0) {
            can_jump = thread & 1;
            if (!setjmp(back)) {
                __atomic_fetch_add(&n_called, 1, __ATOMIC_RELAXED);
                call(i % 5, i, thread);
                __atomic_fetch_add(&n_returned, 1, __ATOMIC_RELAXED);
            }
            can_jump = 0;
        }
    }
    tids[thread] = 0;
    return 0;
}

/* Moves threads from processor to processor, and interrupts them. */
static void *storm(void *arg)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned k = 1;
    (void)arg;
    while (!__atomic_load_n(&is_over, __ATOMIC_RELAXED)) {
        k = k * 1103515245 + 12345;
        int tid = tids[(k >> 8) % n_threads];
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET((k >> 16) % n, &set);
        if (tid) {
            sched_setaffinity(tid, sizeof set, &set);
            syscall(SYS_tgkill, getpid(), tid, SIGUSR1);
        }
        usleep(20);
    }
    return 0;
}

/* The reader: another process. It never waits for a record. */
static unsigned char *seen[MAX_THREADS + 100];
static uint64_t aside[1 << 16];
static long n_aside;

static uint64_t *word(long shard, long offset)
{
    return (uint64_t *)(SHARDS + (shard << shift) + ring + offset);
}

static int accept_record(long shard, uint64_t ticket)
{
    uint64_t *slot = word(shard, 128 + (ticket & (n_slots - 1)) * slot_size);
    uint64_t copy[8];
    if (__atomic_load_n(slot, __ATOMIC_ACQUIRE) != 2 * ticket + 2)
        return 0;
    for (int i = 0; i < 8; i++)
        copy[i] = __atomic_load_n(slot + i, __ATOMIC_ACQUIRE);
    if (__atomic_load_n(slot, __ATOMIC_ACQUIRE) != 2 * ticket + 2)
        return 0;
    long value = copy[4], i = copy[5], thread = copy[6];
    shared->accepted++;
    if ((long)copy[7] != value * 31 + i * 7 + thread
            || thread < 0 || thread > CHILD || i < 0 || i >= 1 << 22
            || value != value_of(i, thread)) {
        shared->torn++;
        return 1;
    }
    if (!seen[thread])
        seen[thread] = calloc(1, 1 << 22);
    shared->twice += seen[thread][i]++;
    return 1;
}

static void read_shard(long shard)
{
    uint64_t from = *word(shard, 64);
    uint64_t to = __atomic_load_n(word(shard, 0), __ATOMIC_ACQUIRE);
    if (is_overwrite && to - from > (uint64_t)n_slots)
        from = to - n_slots;
    for (; from != to; from++)
        if (!accept_record(shard, from) && n_aside < 1 << 16)
            aside[n_aside++] = from << 8 | shard;
    __atomic_store_n(word(shard, 64), to, __ATOMIC_RELEASE);
}

static int reader(uint32_t *tracer)
{
    long is_last;
    *tracer = syscall(SYS_gettid) | FUTEX_WAITERS;
    do {
        is_last = __atomic_load_n(&shared->stop, __ATOMIC_ACQUIRE);
        for (long shard = 0; shard < n_shards; shard++)
            read_shard(shard);
        long left = 0;
        for (long i = 0; i < n_aside; i++)
            if (!accept_record(aside[i] & 255, aside[i] >> 8))
                aside[left++] = aside[i];
        n_aside = left;
        syscall(SYS_futex, tracer, FUTEX_WAKE, 1 << 20, 0, 0, 0);
        if (!is_last)
            usleep(300);
    } while (!is_last);
    return 0;
}

static void map(const char *path, unsigned long at, int prot, int flags)
{
    int fd = open(path, O_RDWR);
    struct stat st;
    if (fd < 0 || fstat(fd, &st))
        exit(3);
    if (mmap((void *)at, st.st_size, prot, flags | MAP_FIXED_NOREPLACE, fd, 0)
            != (void *)at)
        exit(4);
    close(fd);
}

int main(int argc, char **argv)
{
    if (argc != 13)
        return 2;
    alarm(300);
    map(argv[1], 0x10000000, PROT_READ | PROT_EXEC, MAP_PRIVATE);
    map(argv[2], DATA, PROT_READ | PROT_WRITE, MAP_SHARED);
    hit = (hit_function *)strtoul(argv[3], 0, 0);
    call = (call_function *)strtoul(argv[4], 0, 0);
    n_threads = atol(argv[5]), n_calls = atol(argv[6]);
    ring = atol(argv[7]), slot_size = atol(argv[8]);
    n_slots = atol(argv[9]);
    n_shards = atol(argv[10]), shift = atol(argv[11]);
    is_overwrite = !strcmp(argv[12], "overwrite");
    *(long *)(DATA + 8) = getpid();
    *(void **)(DATA + 0x40) = (void *)work;
    pid_t child = ring ? fork() : 0;
    if (ring && !child)
        _exit(reader((uint32_t *)(DATA + 0x60)));
    signal(SIGUSR1, handler);
    for (long i = 0; i < n_threads; i++)
        pthread_create(&threads[i], 0, run, (void *)i);
    pthread_t stormer;
    pthread_create(&stormer, 0, storm, 0);
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL,
                             .sigev_signo = SIGUSR1};
    struct itimerspec often = {{0, 50000}, {0, 50000}};
    timer_t timer;
    if (timer_create(CLOCK_MONOTONIC, &event, &timer)
            || timer_settime(timer, 0, &often, 0))
        return 5;
    usleep(2000);
    pid_t other = fork();               /* it has the same shards */
    if (!other) {
        signal(SIGUSR1, SIG_IGN);
        for (long i = 0; i < n_calls; i++)
            hit(value_of(i, CHILD), i, CHILD);
        _exit(0);
    }
    for (long i = 0; i < n_threads; i++)
        pthread_join(threads[i], 0);
    __atomic_store_n(&is_over, 1, __ATOMIC_RELAXED);
    timer_delete(timer);
    pthread_join(stormer, 0);
    int status = 0, status_2 = 0;
    waitpid(other, &status, 0);
    __atomic_store_n(&shared->stop, 1, __ATOMIC_RELEASE);
    if (ring)
        waitpid(child, &status_2, 0);
    printf("%ld %ld %ld %ld %ld %ld %ld\n", n_handled, shared->accepted,
           shared->torn, shared->twice, n_called, n_returned, n_jumped);
    return status || status_2;
}
