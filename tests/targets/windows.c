/* windows MODE: threads that live inside the first five bytes of functions.
 *
 *   loop     threads call functions whose windows hold several instructions
 *   signals  the same, while timer signals interrupt them; the handlers stay
 *            a while, on the thread's stack or on an alternate one
 *   tight    the same; each alternate stack has just room for the handler,
 *            and below it lie bytes that nobody may touch
 *   sleep    threads block in `syscall` instructions in or behind a window
 *   sibling  another process in the same address space calls them too
 *   vfork [MS [apart]]  a thread spends its life waiting for a child of
 *            vfork that sleeps; apart: the child has memory of its own
 *
 * Commands: p park, report; g go on; r report progress; e the sibling becomes
 * another program; q quit. */
#include "target.h"
#include <sched.h>

/* cpuid takes long (in a virtual machine: it traps), so threads are nearly
 * always found on it, three bytes into the window. */
FUNCTION(win_slow, "push %rbx\n mov %edi,%eax\n cpuid\n"
                   "lea 1(%rdi),%rax\n pop %rbx\n ret");
FUNCTION(win_ones, "push %rbx\n push %rdi\n pop %rbx\n clc\n cmc\n"
                   "lea 2(%rbx),%rax\n pop %rbx\n ret");
FUNCTION(win_pause, "push %rbx\n pause\n pause\n lea 3(%rdi),%rax\n"
                    "pop %rbx\n ret");
FUNCTION(win_call, "call win_deep\n lea 1(%rax),%rax\n ret");
FUNCTION(win_call1, "push %rbx\n call win_deep\n lea 2(%rax),%rax\n"
                    "pop %rbx\n ret");
/* Returns its argument plus the distance of its return address. */
FUNCTION(win_deep, "mov (%rsp),%rax\n lea win_slow(%rip),%rcx\n"
                   "sub %rcx,%rax\n pause\n pause\n pause\n ret");
/* A branch back into the window, from behind the jump. */
FUNCTION(win_round, "push %rdi\n 1: pause\n lea -1(%rdi),%rdi\n pause\n"
                    "test %rdi,%rdi\n jnz 1b\n pop %rax\n ret");
/* A branch back to the entry, and a rip-relative operand in the window. */
FUNCTION(win_back, "dec %rdi\n jnz win_back\n mov $7,%eax\n ret");
FUNCTION(win_data, "mov win_word(%rip),%eax\n add %edi,%eax\n ret");
__asm__(".data\n win_word: .long 1234567\n.text");
/* Two bytes fit before a branch of another function leads into win_tight, and
 * near it is no padding: its slot lies in what win_patient has displaced. */
__asm__(".p2align 10\n .fill 136, 1, 0xc3\n"
        ".globl win_tight, win_patient, win_round_about\n"
        ".type win_tight, @function\n .type win_patient, @function\n"
        ".type win_round_about, @function\n"
        "win_tight: xor %eax,%eax\n"
        "1: lea 1(%rdi,%rax),%rax\n ret\n .size win_tight, .-win_tight\n"
        "win_patient: push %rbx\n push %r12\n lea 5(%rdi),%r12\n"
        "lea 7(%rdi,%r12),%r8\n lea 1(%r8),%rax\n"
        "2: xor %ecx,%ecx\n mov %r8,%rsi\n cpuid\n mov $77,%r9d\n"
        "lea -7(%rsi,%r9),%rax\n sub %r12,%rax\n"
        "pop %r12\n pop %rbx\n ret\n .size win_patient, .-win_patient\n"
        "win_round_about: mov $2,%eax\n jmp 1b\n"
        ".size win_round_about, .-win_round_about\n"
        ".fill 136, 1, 0xc3\n");
/* Five more with room for two bytes. Each reaches a slot in its own dead nops,
 * but for the last, and the one in front of these. */
#define WAY(n, nops) \
        ".globl win_way" n ", win_into" n "\n" \
        ".type win_way" n ", @function\n .type win_into" n ", @function\n" \
        "win_way" n ": xor %eax,%eax\n" \
        ".Lway" n ": lea 1(%rdi,%rax),%rax\n ret\n" \
        ".fill " nops ", 1, 0x90\n .fill 117 - " nops ", 1, 0xc3\n" \
        ".size win_way" n ", 125\n"
#define INTO(n) \
        "win_into" n ": mov $2,%eax\n jmp .Lway" n "\n" \
        ".size win_into" n ", .-win_into" n "\n"
__asm__(".p2align 10\n .fill 136, 1, 0xc3\n"
        ".globl win_spare\n .type win_spare, @function\n"
        "win_spare: ret\n .fill 5, 1, 0x90\n .size win_spare, 1\n"
        WAY("0", "5") WAY("1", "5") WAY("2", "5") WAY("3", "5") WAY("4", "0")
        INTO("0") INTO("1") INTO("2") INTO("3") INTO("4")
        ".fill 136, 1, 0xc3\n");
/* The system call's number is in the caller's rax. */
FUNCTION(nap_inside, "nop\n syscall\n nop\n nop\n ret");
FUNCTION(nap_behind, "nopl (%rax)\n syscall\n nop\n ret");
FUNCTION(nap_alone, "mov $35,%eax\n syscall\n ret");

long win_slow(long), win_ones(long), win_pause(long), win_call(long),
     win_call1(long), win_deep(long), win_back(long), win_data(long),
     win_round(long), win_tight(long), win_patient(long),
     win_round_about(long), win_way0(long), win_way1(long), win_way2(long),
     win_way3(long), win_way4(long), win_into0(long), win_into1(long),
     win_into2(long), win_into3(long), win_into4(long);
static long (*const ways[])(long) = {win_way0, win_way1, win_way2, win_way3,
                                     win_way4};
static long (*const into[])(long) = {win_into0, win_into1, win_into2,
                                     win_into3, win_into4};
extern char win_call_return[];

static long call_nap(void *function, long number, long a, long b, long c,
                     long d)
{
    register long r10 __asm__("r10") = d;
    long value = number;
    __asm__ volatile("call *%[function]" : "+a"(value)
                     : [function] "r"(function), "D"(a), "S"(b), "d"(c),
                       "r"(r10)
                     : "rcx", "r11", "memory");
    return value;
}
extern char nap_inside[], nap_behind[], nap_alone[];

static atomic_int parked, n_parked, n_threads;
static atomic_long n_slow, n_ones, n_pause, n_call, n_call1, n_back, n_data,
                   n_round, n_tight,
                   n_nap, n_handled, n_vfork, max_late_us;
static long far_call, far_call1;
static int mode;
static __thread int has_stack;
enum { N_CANARIES = 4096 };
static __thread unsigned char canaries[N_CANARIES + (128 << 10)]
    __attribute__((aligned(64)));
#define stack (canaries + N_CANARIES)
static __thread size_t stack_size;

static void rest(void)
{
    sigset_t all, saved;
    if (!parked)
        return;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    n_parked++;
    while (parked && !quitting)
        nap_us(500);
    n_parked--;
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
}

static void check_stack(int flags)
{
    stack_t s;
    if (!has_stack)
        return;
    if (sigaltstack(NULL, &s))
        wrong("sigaltstack: %s", strerror(errno));
    if (s.ss_flags != flags || s.ss_sp != stack
        || s.ss_size != stack_size)
        wrong("alternate stack: flags %d, not %d", s.ss_flags, flags);
    for (int i = 0; i < N_CANARIES; i++)
        if (canaries[i] != 0x5a) {
            wrong("%d bytes below the alternate stack were changed",
                  N_CANARIES - i);
            memset(canaries, 0x5a, N_CANARIES);
        }
}

static void *work(void *argument)
{
    long kind = (long)argument, i = 0;
    for (; !quitting; i++) {
        rest();
        switch (kind % 4) {
        case 0:
            if (win_slow(i % 3) != i % 3 + 1)
                wrong("win_slow");
            for (int n = 0; n < 20; n++)
                if (win_tight(n) != n + 1 || win_round_about(n) != n + 3)
                    wrong("win_tight");
            for (int n = 0; n < 100; n++)
                if (ways[n % 5](n) != n + 1 || into[n % 5](n) != n + 3)
                    wrong("win_way%d", n % 5);
            if (win_patient(i) != i + 77)
                wrong("win_patient");
            n_slow++;
            n_tight += 20;
            break;
        case 1:
            for (int n = 0; n < 200; n++)
                if (win_ones(n) != n + 2)
                    wrong("win_ones");
            n_ones += 200;
            break;
        case 2:
            for (int n = 0; n < 50; n++)
                if (win_pause(n) != n + 3)
                    wrong("win_pause");
            if (win_back(30) != 7 || win_data(3) != 1234570)
                wrong("win_back or win_data");
            if (win_round(50) != 50)
                wrong("win_round");
            n_pause += 50;
            n_back += 30;
            n_data++;
            n_round++;
            break;
        case 3:
            for (int n = 0; n < 50; n++) {
                if (win_call(n) != far_call + 1)
                    wrong("win_call sees another return address");
                if (win_call1(n) != far_call1 + 2)
                    wrong("win_call1 sees another return address");
            }
            n_call += 50;
            n_call1 += 50;
            break;
        }
        check_stack(0);
    }
    return NULL;
}

/* ---- signals ----------------------------------------------------------- */
static void handler(int number)
{
    struct timespec t = {0, 200000};
    int saved = errno;
    check_stack(SS_ONSTACK);
    if (nanosleep(&t, NULL) && errno != EINTR)
        wrong("nanosleep in the handler");
    n_handled++;
    errno = saved;
}

static void *work_signalled(void *argument)
{
    long kind = (long)argument;
    struct sigevent e = {.sigev_notify = SIGEV_THREAD_ID,
                         .sigev_signo = kind % 2 ? SIGUSR1 : SIGUSR2};
    /* Slow enough for the thread to get on between two signals, even where
     * it has to wait for a processor. */
    struct itimerspec t = {{0, 4000000 + kind * 130000}, {0, 1000000}};
    timer_t timer;
    if (kind & 4 || mode == 't') {
        stack_size = 128 << 10;
        stack_t s = {.ss_sp = stack, .ss_size = stack_size};
        memset(canaries, 0x5a, sizeof canaries);
        if (mode == 't') {              /* what does the handler need? */
            sigaltstack(&s, NULL);
            raise(SIGUSR1);
            unsigned char *lowest = stack;
            while (*lowest == 0x5a)
                lowest++;
            stack_size = (stack + stack_size - lowest + 700) & ~15l;
            s.ss_size = stack_size;
        }
        if (sigaltstack(&s, NULL))
            wrong("sigaltstack: %s", strerror(errno));
        has_stack = 1;
    }
    e._sigev_un._tid = syscall(SYS_gettid);
    if (timer_create(CLOCK_MONOTONIC, &e, &timer)
        || timer_settime(timer, 0, &t, NULL))
        wrong("timer: %s", strerror(errno));
    work(argument);
    timer_delete(timer);
    return NULL;
}

/* ---- blocked in the window --------------------------------------------- */
static void *work_asleep(void *argument)
{
    long kind = (long)argument;
    struct timespec t = {0, 5000000}, until;
    while (!quitting) {
        rest();
        long r;
        uint64_t begun = now_ns();
        if (kind % 4 == 0) {
            r = call_nap(nap_inside, 35, (long)&t, 0, 0, 0);
        } else if (kind % 4 == 1) {
            r = call_nap(nap_behind, 35, (long)&t, 0, 0, 0);
        } else if (kind % 4 == 2) {
            r = call_nap(nap_alone, 0, (long)&t, 0, 0, 0);
        } else {
            clock_gettime(CLOCK_MONOTONIC, &until);
            until.tv_nsec += 5000000;
            if (until.tv_nsec >= 1000000000)
                until.tv_sec++, until.tv_nsec -= 1000000000;
            r = call_nap(nap_inside, 230, CLOCK_MONOTONIC, TIMER_ABSTIME,
                         (long)&until, 0);
        }
        if (r)
            wrong("sleep %ld in the window: %ld", kind % 4, r);
        if (now_ns() - begun < 4900000)
            wrong("sleep %ld in the window: early", kind % 4);
        n_nap++;
    }
    return NULL;
}

/* ---- another process in the same address space ------------------------- */
static volatile long sibling_calls, sibling_wrong, sibling_quit, sibling_exec;

/* No libc here: this process shares the thread-local storage of main. */
static int sibling(void *argument)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (!sibling_quit) {
        if (sibling_exec)
            execl("/bin/sleep", "sleep", "240", NULL);
        if (win_slow(1) != 2)
            sibling_wrong++;
        for (int n = 0; n < 100; n++)
            if (win_ones(n) != n + 2)
                sibling_wrong++;
        sibling_calls++;
    }
    return 0;
}

/* ---- vfork ------------------------------------------------------------- */
static int vfork_ms = 300, is_apart;

static void *work_vfork(void *argument)
{
    struct timespec t = {vfork_ms / 1000, vfork_ms % 1000 * 1000000};
    while (!quitting) {
        int status;
        uint64_t begun = now_ns();
        pid_t pid = is_apart ? syscall(SYS_clone, CLONE_VFORK | SIGCHLD, 0, 0,
                                       0, 0) : vfork();
        if (pid == 0) {
            long r = syscall(SYS_nanosleep, &t, NULL);
            syscall(SYS_exit, r ? 8 : 7);
        }
        long late = (long)(now_ns() - begun) / 1000 - vfork_ms * 1000;
        if (late > max_late_us)
            max_late_us = late;
        if (late < -1000)
            wrong("vfork child ended early");
        if (waitpid(pid, &status, 0) != pid || WEXITSTATUS(status) != 7)
            wrong("vfork child: status %x", status);
        n_vfork++;
        if (win_ones(3) != 5)
            wrong("win_ones");
        n_ones++;
        nap_us(60000);
    }
    return NULL;
}

static void report(void)
{
    say("slow=%ld ones=%ld pause=%ld call=%ld call1=%ld back=%ld data=%ld "
        "round=%ld tight=%ld nap=%ld handled=%ld sibling=%ld vfork=%ld late_us=%ld "
        "wrong=%ld",
        n_slow, n_ones, n_pause, n_call, n_call1, n_back, n_data,
        n_round, n_tight, n_nap, n_handled, sibling_calls, n_vfork, max_late_us,
        n_wrong + sibling_wrong);
}

int main(int argc, char **argv)
{
    static pthread_t threads[16];
    static char sibling_stack[65536] __attribute__((aligned(64)));
    pid_t pid = 0;
    int c;
    bounded();
    mode = argc > 1 ? argv[1][0] : 'l';
    if (argc > 2)
        vfork_ms = atoi(argv[2]);
    is_apart = argc > 3;
    if (mode == 's' && argv[1][1] == 'l')
        mode = 'n';                     /* sleep */
    else if (mode == 's' && argv[1][2] == 'b')
        mode = 'c';                     /* sibling */
    far_call = win_call(0) - 1;
    far_call1 = win_call1(0) - 2;
    struct sigaction a = {.sa_handler = handler,
                          .sa_flags = SA_ONSTACK | SA_RESTART};
    sigaction(SIGUSR1, &a, NULL);
    sigaction(SIGUSR2, &a, NULL);
    n_threads = mode == 'v' ? 2 : mode == 's' || mode == 'n' ? 8 : 4;
    for (long i = 0; i < n_threads; i++)
        threads[i] = start(mode == 's' || mode == 't' ? work_signalled
                           : mode == 'n' ? work_asleep
                           : mode == 'v' && i == 0 ? work_vfork : work,
                           (void *)i);
    if (mode == 'c') {
        pid = clone(sibling, sibling_stack + sizeof sibling_stack,
                    CLONE_VM | CLONE_FS | CLONE_FILES | SIGCHLD, NULL);
        if (pid < 0)
            wrong("clone: %s", strerror(errno));
    }
    nap_us(50000);
    say("ready sibling=%d tight=%ld", pid, (long)win_tight);
    while ((c = command()) != 'q') {
        if (c == 'p') {
            parked = 1;
            while (n_parked < n_threads - (mode == 'v'))
                nap_us(1000);
            report();
        } else if (c == 'g') {
            parked = 0;
        } else if (c == 'r') {
            report();
        } else if (c == 'e') {
            sibling_exec = 1;
        }
    }
    quitting = 1;
    sibling_quit = 1;
    if (sibling_exec)
        kill(pid, SIGKILL);
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    if (pid)
        waitpid(pid, NULL, 0);
    n_wrong += sibling_wrong;
    return verdict();
}
