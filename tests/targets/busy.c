/* busy THREADS: threads that call small functions, count the calls, and check
 * every result, all general registers, flags, ymm, mxcsr, x87 and red zone.
 *
 * Commands: g run free; p park, report; c a fixed prime number of calls a
 * thread, then report; m report the longest stand-still in us;
 * q quit. */
#include "target.h"
#include <fenv.h>
#include <xmmintrin.h>

enum { PARKED, FREE, FIXED, QUIT };
enum { HOTS = 100003 };             /* a prime */
static atomic_int state, n_parked;
static int n_threads, with_avx;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static atomic_long generation;

/* hot is C; tiny is exactly five bytes; keep changes rax only, no flag;
 * marked begins with an endbr64; shorty is too short for any jump. */
CALLED long hot(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }
long tiny(long), marked(long), shorty(long);
FUNCTION(tiny, "lea 1(%rdi),%rax\n ret");
FUNCTION(keep, "lea 3(%rax),%rax\n nopl (%rax)\n ret");
FUNCTION(marked, "endbr64\n mov %rdi,%rax\n add $9,%rax\n ret");
FUNCTION(shorty, "mov %edi,%eax\n ret\n .byte 0xcc");

/* regs_*(struct regs *): load everything, call keep, store everything. */
struct regs {
    uint64_t in[16], out[16];           /* 14 general, flags, unused */
    uint8_t vector_in[512], vector_out[512];
};
void regs_avx(struct regs *), regs_sse(struct regs *);
#define REGS(name, load, store) \
    FUNCTION(name, \
    "push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n" \
    "push %rdi\n" load \
    "pushq 112(%rdi)\n popfq\n" \
    "mov (%rdi),%rax\n mov 8(%rdi),%rbx\n mov 16(%rdi),%rcx\n" \
    "mov 24(%rdi),%rdx\n mov 32(%rdi),%rsi\n mov 40(%rdi),%rbp\n" \
    "mov 48(%rdi),%r8\n mov 56(%rdi),%r9\n mov 64(%rdi),%r10\n" \
    "mov 72(%rdi),%r11\n mov 80(%rdi),%r12\n mov 88(%rdi),%r13\n" \
    "mov 96(%rdi),%r14\n mov 104(%rdi),%r15\n mov 120(%rdi),%rdi\n" \
    "call keep\n" \
    "push %rdi\n mov 8(%rsp),%rdi\n" \
    "mov %rax,128(%rdi)\n mov %rbx,136(%rdi)\n mov %rcx,144(%rdi)\n" \
    "mov %rdx,152(%rdi)\n mov %rsi,160(%rdi)\n mov %rbp,168(%rdi)\n" \
    "mov %r8,176(%rdi)\n mov %r9,184(%rdi)\n mov %r10,192(%rdi)\n" \
    "mov %r11,200(%rdi)\n mov %r12,208(%rdi)\n mov %r13,216(%rdi)\n" \
    "mov %r14,224(%rdi)\n mov %r15,232(%rdi)\n popq 248(%rdi)\n" \
    "pushfq\n popq 240(%rdi)\n" store \
    "pop %rdi\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n" \
    "pop %rbx\n cld\n ret")
REGS(regs_avx,
     ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
     "vmovdqu 256+32*\\n(%rdi),%ymm\\n\n.endr\n",
     ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
     "vmovdqu %ymm\\n,768+32*\\n(%rdi)\n.endr\n vzeroupper\n");
REGS(regs_sse,
     ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
     "movdqu 256+32*\\n(%rdi),%xmm\\n\n.endr\n",
     ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
     "movdqu %xmm\\n,768+32*\\n(%rdi)\n.endr\n");

static const uint64_t FLAGS[] = {0x246, 0x203, 0xad7, 0x202, 0xa03, 0x6d6};

static void check_registers(uint64_t seed)
{
    struct regs r;
    memset(&r, 0, sizeof r);
    for (int i = 0; i < 16; i++)
        r.in[i] = seed * (2 * i + 3) + i;
    r.in[14] = FLAGS[seed % 6];
    for (int i = 0; i < 512; i++)
        r.vector_in[i] = seed * 7 + i * 13 + 1;
    (with_avx ? regs_avx : regs_sse)(&r);
    r.in[0] += 3;
    for (int i = 0; i < 16; i++)
        if (r.in[i] != r.out[i])
            wrong("register %d is %lx, not %lx", i, r.out[i], r.in[i]);
    for (int i = 0; i < 512; i++)
        if (r.vector_in[i] != r.vector_out[i] && (with_avx || i % 32 < 16)) {
            wrong("byte %d of vector %d changed", i % 32, i / 32);
            break;
        }
}

/* A leaf: its locals lie in the red zone below rsp. */
CALLED long red_zone(long x)
{
    volatile long local[14];
    for (int i = 0; i < 14; i++)
        local[i] = x + i;
    for (int turn = 0; turn < 20; turn++)
        for (int i = 0; i < 14; i++)
            if (local[i] != x + i)
                return -1;
    return x;
}

CALLED double series(double x)
{
    double sum = 0;
    for (int i = 1; i < 60; i++)
        sum += x / i - 1 / (x + i);
    return sum;
}

CALLED long double series87(long double x)
{
    long double sum = 0;
    for (int i = 1; i < 20; i++)
        sum += x / i;
    return sum;
}

/* Live ymm values over some hundred instructions without any memory. */
static int spin_avx(void)
{
    uint32_t bad = 0;
    if (!with_avx)
        return 0;
    __asm__ volatile(
        "vpcmpeqd %%xmm0,%%xmm0,%%xmm0\n vinsertf128 $1,%%xmm0,%%ymm0,%%ymm5\n"
        "vxorps %%ymm1,%%ymm1,%%ymm1\n mov $300,%%ecx\n"
        "1: vxorps %%ymm5,%%ymm1,%%ymm1\n vxorps %%ymm5,%%ymm1,%%ymm1\n"
        "dec %%ecx\n jnz 1b\n"
        "vxorps %%ymm5,%%ymm1,%%ymm2\n vmovmskps %%ymm2,%0\n vzeroupper\n"
        : "=r"(bad) : : "ecx", "xmm0", "xmm1", "xmm2", "xmm5");
    return bad != 0xff;
}

/* How long this thread has waited for a processor so far, in ns. */
static uint64_t waited_ns(void)
{
    char text[100] = "";
    unsigned long ran, waited = 0;
    int fd = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && read(fd, text, sizeof text - 1) > 0)
        sscanf(text, "%lu %lu", &ran, &waited);
    close(fd);
    return waited;
}

static struct worker {
    long hots, tinies, labses, keeps, markeds, shorties;
    uint64_t gap, waited;
} workers[1200];

/* A gap of this thread: stopped, not just waiting for a processor. */
static void note_gap(struct worker *w, uint64_t gap)
{
    uint64_t waited = waited_ns(), delay = waited - w->waited;
    w->waited = waited;
    gap = gap > delay ? gap - delay : 0;
    if (gap > w->gap)
        w->gap = gap;
}

static long (*volatile labs_call)(long) = labs;

static void call_each(struct worker *w, uint64_t n)
{
    long x = n * 2654435761u + 17;
    if (hot(x) != ((x ^ 0x5bd1e995) * 31 + (x >> 7)))
        wrong("hot(%lx)", x);
    w->hots++;
    if (n % 10 == 0) {
        w->tinies++;
        if (tiny(x) != x + 1)
            wrong("tiny(%lx)", x);
    }
    if (n % 20 == 0) {
        w->labses++, w->markeds++, w->shorties++;
        if (labs_call(-(long)n) != (long)n)
            wrong("labs");
        if (marked(x) != x + 9)
            wrong("marked(%lx)", x);
        if (shorty(x) != (uint32_t)x)
            wrong("shorty(%lx)", x);
    }
    if (n % 25 == 0)
        w->keeps++, check_registers(n);
}

static void check_state(double expected, long double expected87, int mxcsr)
{
    if (red_zone(n_threads) != n_threads)
        wrong("red zone");
    if (series(1.7) != expected || series87(1.7L) != expected87)
        wrong("floating point");
    if ((int)(_mm_getcsr() & 0xffc0) != mxcsr)
        wrong("mxcsr is %x, not %x", _mm_getcsr(), mxcsr);
    if (spin_avx())
        wrong("ymm");
}

static void *work(void *argument)
{
    struct worker *w = argument;
    long seen = 0;
    if ((w - workers) % 2)
        fesetround(FE_DOWNWARD);            /* mxcsr and x87 control word */
    int mxcsr = _mm_getcsr() & 0xffc0;
    double expected = series(1.7);
    long double expected87 = series87(1.7L);
    for (;;) {
        pthread_mutex_lock(&lock);
        n_parked++;
        pthread_cond_broadcast(&changed);
        while (generation == seen)
            pthread_cond_wait(&changed, &lock);
        seen = generation;
        pthread_mutex_unlock(&lock);
        if (state == QUIT)
            return NULL;
        uint64_t last = now_ns();
        for (uint64_t n = 0; state == FREE || (state == FIXED && n < HOTS);
             n++) {
            call_each(w, n);
            if (n % 64)
                continue;
            check_state(expected, expected87, mxcsr);
            uint64_t now = now_ns();
            if (now - last > 200000)
                note_gap(w, now - last), now = now_ns();
            last = now;
        }
    }
}

static void set_state(int new)
{
    pthread_mutex_lock(&lock);
    state = new;
    n_parked = 0;
    generation++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void wait_parked(void)
{
    pthread_mutex_lock(&lock);
    while (n_parked < n_threads)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static void report(void)
{
    struct worker sum = {0};
    for (int i = 0; i < n_threads; i++) {
        sum.hots += workers[i].hots, sum.tinies += workers[i].tinies;
        sum.labses += workers[i].labses, sum.keeps += workers[i].keeps;
        sum.markeds += workers[i].markeds, sum.shorties += workers[i].shorties;
    }
    say("hot=%ld tiny=%ld labs=%ld keep=%ld marked=%ld shorty=%ld wrong=%ld",
        sum.hots, sum.tinies, sum.labses, sum.keeps, sum.markeds,
        sum.shorties, atomic_load(&n_wrong));
}

static void report_gap(void)
{
    uint64_t gap = 0;
    for (int i = 0; i < n_threads; i++) {
        if (workers[i].gap > gap)
            gap = workers[i].gap;
        workers[i].gap = 0;
    }
    say("gap_us=%lu wrong=%ld", gap / 1000, atomic_load(&n_wrong));
}

int main(int argc, char **argv)
{
    static pthread_t threads[1200];
    bounded();
    with_avx = __builtin_cpu_supports("avx") != 0;
    n_threads = argc > 1 ? atoi(argv[1]) : 2;
    for (int i = 0; i < n_threads; i++)
        threads[i] = start(work, &workers[i]);
    wait_parked();
    say("ready");
    for (int c; (c = command()) != 'q';) {
        if (c == 'g') {
            set_state(FREE);
        } else if (c == 'p') {
            state = PARKED;
            wait_parked();
            report();
        } else if (c == 'c') {
            set_state(FIXED);
            wait_parked();
            report();
        } else if (c == 'm') {
            report_gap();
        }
    }
    state = PARKED;
    wait_parked();
    set_state(QUIT);
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    return verdict();
}
