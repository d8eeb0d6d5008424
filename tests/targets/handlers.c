/* handlers THREADS CALLS [FILTER]: functions whose calls a tracer's function
 * may look at, change or skip, and a judge of every register.
 *
 *   FILTER   a system call by its number that is forbidden: it kills
 *
 * Commands: g each thread calls add(n, key) for n below CALLS, report how
 * many, the sum of the results, how many were -12, and the time of all; b the
 * same without an end, until the next command; w one call of add(40, 2) by
 * the main thread, report; m many(1, ..., 8); f fork a child that calls add
 * 1009 times, wait for it; j the judge, 100 times; s a timer of 2 ms whose
 * handler calls add, too, while the main thread does CALLS times; l as often
 * leaves add, from that handler, by siglongjmp; k text("alpha"), deep(5) and
 * tail(3); c a thread is cancelled in add; v vfork, where the child calls
 * add; o as s, but its handler forks, and the child goes on with the call
 * and ends; e exec this program anew; q quit. */
#include "target.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <setjmp.h>
#include <stddef.h>
#include <sys/time.h>

enum { MOST = 64 };
static long n_calls, n_threads;
static atomic_long sum, n_failed, n_odd, n_done;
static atomic_int is_busy;
static pthread_barrier_t begin, end;

CALLED long add(long a, long b) { return a + b; }
CALLED long many(long a, long b, long c, long d, long e, long f, long g,
                 long h)
{
    return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h;
}
CALLED long text(char *at) { return at[0] + 256 * at[1]; }
CALLED long inner(long n) { return n * 7; }
CALLED long deep(long n)
{
    long below = n ? deep(n - 1) : inner(n);
    __asm__ volatile("" : "+r"(below));
    return below + 1;
}
CALLED long other(long n) { return n * 5; }
CALLED long tail(long n)
{
    if (n < 0)
        return n - 1;
    return other(n + 1);
}

static void call(long n, long key)
{
    long got = add(n, key);
    sum += got;
    n_failed += got == -12;
    n_odd += got != n + key && got != -12;
    n_done++;
}

/* ---- the judge: what is in each register before and behind a site ------- */
struct judged {
    uint64_t in[16], out[16];           /* rax rcx rdx rbx rsp rbp rsi rdi … */
    uint64_t flags_in, flags_out;       /* at 256 */
    uint64_t red_in[16], red_out[16];   /* at 272, 400 */
    uint64_t saved_sp, has_avx;         /* at 528, 536 */
    uint8_t vectors_in[16][32], vectors_out[16][32];    /* at 544, 1056 */
    uint32_t mxcsr_in, mxcsr_out;       /* at 1568 */
    uint16_t control_in, control_out;   /* at 1576 */
    uint32_t unused;
    double stack_out[2];                /* at 1584 */
} J __attribute__((used, visibility("hidden")));
_Static_assert(offsetof(struct judged, vectors_in) == 544
               && offsetof(struct judged, mxcsr_in) == 1568
               && offsetof(struct judged, stack_out) == 1584, "layout");

#define EACH(what) what(0) what(1) what(2) what(3) what(4) what(5) what(6) \
    what(7) what(8) what(9) what(10) what(11) what(12) what(13) what(14) \
    what(15)
#define EACH_REGISTER(what) what(rax, 0) what(rcx, 1) what(rdx, 2) \
    what(rbx, 3) what(rbp, 5) what(rsi, 6) what(rdi, 7) what(r8, 8) \
    what(r9, 9) what(r10, 10) what(r11, 11) what(r12, 12) what(r13, 13) \
    what(r14, 14) what(r15, 15)
#define LOAD_XMM(n) "movups J+544+32*" #n "(%rip), %xmm" #n "\n"
#define LOAD_YMM(n) "vmovups J+544+32*" #n "(%rip), %ymm" #n "\n"
#define STORE_XMM(n) "movups %xmm" #n ", J+1056+32*" #n "(%rip)\n"
#define STORE_YMM(n) "vmovups %ymm" #n ", J+1056+32*" #n "(%rip)\n"
#define LOAD_RED(n) "mov J+272+8*" #n "(%rip), %rax\n" \
    "mov %rax, -8*(" #n "+1)(%rsp)\n"
#define STORE_RED(n) "mov -8*(" #n "+1)(%rsp), %rax\n" \
    "mov %rax, J+400+8*" #n "(%rip)\n"
#define LOAD(name, n) "mov J+8*" #n "(%rip), %" #name "\n"
#define STORE(name, n) "mov %" #name ", J+128+8*" #n "(%rip)\n"

void judged(void);
FUNCTION(judged,
    "push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
    "mov %rsp, J+528(%rip)\n"
    "fninit\n fldcw J+1576(%rip)\n fldpi\n fld1\n"
    "ldmxcsr J+1568(%rip)\n"
    "cmpl $0, J+536(%rip)\n je 1f\n" EACH(LOAD_YMM) "jmp 2f\n"
    "1:" EACH(LOAD_XMM)
    "2: push J+256(%rip)\n popfq\n"
    EACH(LOAD_RED) EACH_REGISTER(LOAD)
    "jmp judged_site\n"
    ".globl judged_back\n judged_back:\n"
    EACH_REGISTER(STORE)
    "mov %rsp, J+128+32(%rip)\n"
    EACH(STORE_RED)
    "mov J+528(%rip), %rsp\n"
    "pushfq\n pop J+264(%rip)\n cld\n"
    "cmpl $0, J+536(%rip)\n je 3f\n" EACH(STORE_YMM) "vzeroupper\n jmp 4f\n"
    "3:" EACH(STORE_XMM)
    "4: stmxcsr J+1572(%rip)\n fnstcw J+1578(%rip)\n"
    "fstpl J+1584(%rip)\n fstpl J+1592(%rip)\n fninit\n"
    "push $0x1f80\n ldmxcsr (%rsp)\n pop %rax\n"
    "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n");
FUNCTION(judged_site, ".byte 0x0f,0x1f,0x44,0,0\n jmp judged_back\n");

/* Say what differs: registers by bit, then what the handler is told of. */
static void judge(void)
{
    static uint64_t seed = 88172645463325252ull;
    uint8_t *bytes = (uint8_t *)&J;
    unsigned registers = 0, vectors = 0;
    for (unsigned i = 0; i < sizeof J; i++) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        bytes[i] = seed >> 32;
    }
    J.flags_in = (seed & 0x8d5) | 0x202;
    J.has_avx = __builtin_cpu_supports("avx") != 0;
    J.mxcsr_in = 0x1f80 | (seed & 0x6000);
    J.control_in = 0x37f | (seed & 0xc00);
    judged();
    J.in[4] = J.saved_sp;
    for (int n = 0; n < 16; n++) {
        registers |= (J.in[n] != J.out[n]) << n;
        vectors |= (memcmp(J.vectors_in[n], J.vectors_out[n],
                           J.has_avx ? 32 : 16) != 0) << n;
    }
    say("registers=%u flags=%lu red=%d vectors=%u fpu=%d rdi=%ld rdi_in=%ld "
        "flags_in=%lu", registers, J.flags_out & 0x8d5,
        memcmp(J.red_in, J.red_out, sizeof J.red_in) != 0, vectors,
        J.mxcsr_in != J.mxcsr_out || J.control_in != J.control_out
        || J.stack_out[0] != 1.0 || J.stack_out[1] < 3.14159265,
        J.out[7], J.in[7], J.flags_in & 0x8d5);
}

/* ---- signals, threads, processes --------------------------------------- */
static sigjmp_buf back;
static atomic_int must_jump, n_handled, is_inside;

static void handler(int signo)
{
    int error = errno;
    call(1, 2);
    n_handled++;
    errno = error;
    if (must_jump && is_inside)
        siglongjmp(back, 1);
}

/* Forks, now and then, in whatever was interrupted: the child goes on with
 * that, and ends. */
static atomic_int must_fork, is_child;
static pid_t children[MOST];
static int n_children;

static void forking(int signo)
{
    int error = errno;
    if (is_inside && n_children < MOST && !is_child) {
        pid_t pid = fork();
        if (pid == 0)
            is_child = 1;
        else
            children[n_children++] = pid;
    }
    errno = error;
}

static void timer(long us)
{
    struct itimerval value = {{0, us}, {0, us}};
    if (setitimer(ITIMER_REAL, &value, NULL))
        wrong("setitimer: %s", strerror(errno));
}

static void with_signals(int jumps)
{
    struct sigaction action = {.sa_handler = must_fork ? forking : handler};
    long failed = n_failed;
    unsigned seconds = alarm(0);
    sigaction(SIGALRM, &action, NULL);
    must_jump = jumps;
    n_handled = 0;
    timer(2000);
    for (long n = 0; n < n_calls; n++)
        if (!sigsetjmp(back, 1)) {
            is_inside = 1;
            call(n, 0);
            is_inside = 0;
            if (is_child)
                _exit(n_failed != failed);
            failed = n_failed;
        }
    timer(0);
    is_inside = 0;
    signal(SIGALRM, SIG_DFL);
    alarm(seconds);
}

static void report(uint64_t since)
{
    say("calls=%ld sum=%ld failed=%ld odd=%ld handled=%d us=%ld",
        atomic_exchange(&n_done, 0), atomic_exchange(&sum, 0),
        atomic_exchange(&n_failed, 0), atomic_exchange(&n_odd, 0), n_handled,
        (long)((now_ns() - since) / 1000));
}

static void *runner(void *argument)
{
    long key = (long)argument;
    for (;;) {
        pthread_barrier_wait(&begin);
        if (quitting)
            return NULL;
        do
            for (long n = 0; n < n_calls; n++)
                call(n, key);
        while (is_busy);
        pthread_barrier_wait(&end);
    }
}

static void *cancelled(void *unused)
{
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
    long n = 1;
    do
        __asm__ volatile("" : "+r"(n));
    while (add(n, 2));
    return NULL;
}

static void child(pid_t pid)
{
    int status;
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        wrong("fork: %s", strerror(errno));
    say("status=%d", status);
}

static void in_child(void)
{
    n_odd = 0;
    for (long n = 0; n < 1009; n++)
        call(n, 9);
    _exit(n_odd != 0);
}

static void forbid(int number)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {4, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        wrong("seccomp: %s", strerror(errno));
}

int main(int argc, char **argv)
{
    static char word[8] = "alpha";
    n_threads = atoi(argv[1]);
    n_calls = atol(argv[2]);
    bounded();
    pthread_barrier_init(&begin, NULL, n_threads + 1);
    pthread_barrier_init(&end, NULL, n_threads + 1);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);           /* it is for the main thread */
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    for (long n = 0; n < n_threads; n++)
        start(runner, (void *)n);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    if (argc > 3)
        forbid(atoi(argv[3]));
    say("ready pid=%d", getpid());
    for (;;) {
        int what = command();
        uint64_t since = now_ns();
        if (is_busy && what != 'e') {   /* that ends them all */
            is_busy = 0;
            pthread_barrier_wait(&end);
        }
        switch (what) {
        case 'b':
            is_busy = 1;
            pthread_barrier_wait(&begin);
            say("busy=1");
            break;
        case 'g':
            pthread_barrier_wait(&begin);
            pthread_barrier_wait(&end);
            report(since);
            break;
        case 'w':
            call(40, 2);
            report(since);
            break;
        case 'm':
            say("result=%ld", many(1, 2, 3, 4, 5, 6, 7, 8));
            break;
        case 'k':
            say("text=%ld deep=%ld tail=%ld", text(word), deep(5), tail(3));
            break;
        case 'j':
            judge();
            break;
        case 's':
        case 'l':
            with_signals(what == 'l');
            report(since);
            break;
        case 'o': {
            int status = 0, n_wrong_ones = 0;
            must_fork = 1;
            n_children = 0;
            with_signals(0);
            must_fork = 0;
            for (int n = 0; n < n_children; n++)
                if (waitpid(children[n], &status, 0) < 0 || status)
                    n_wrong_ones++;
            say("children=%d wrong=%d calls=%ld failed=%ld", n_children,
                n_wrong_ones, atomic_exchange(&n_done, 0),
                atomic_exchange(&n_failed, 0));
            break;
        }
        case 'f': {
            pid_t pid = fork();
            if (pid == 0)
                in_child();
            child(pid);
            break;
        }
        case 'v': {
            pid_t pid = vfork();
            if (pid == 0)
                _exit(add(40, 2) & 0xff);
            child(pid);
            break;
        }
        case 'c': {
            pthread_t thread = start(cancelled, NULL);
            nap_us(50000);
            pthread_cancel(thread);
            pthread_join(thread, NULL);
            say("cancelled=1");
            break;
        }
        case 'e':
            execv("/proc/self/exe", argv);
            wrong("execv: %s", strerror(errno));
            break;
        case 'q':
            quitting = 1;
            pthread_barrier_wait(&begin);
            return verdict();
        }
    }
}
