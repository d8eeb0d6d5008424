/* masks: calls of step between a change of what is to become of SIGTRAP and
 * the next syscall, many times over, by every way to say it.
 *
 *     masks caught|not TURNS [WAY]    is there a handler of SIGTRAP?
 *
 * WAY to make the system calls: c the C library's functions (if none is
 * named), s its syscall(), i instructions with a number in front of them, r
 * one that takes any number.
 *
 * Commands, each for all THREADS at once: b pthread_sigmask; p sigprocmask
 * and SIG_SETMASK; f all signals; t all others; m a handler's sa_mask; n one
 * of all signals; j siglongjmp; s a handler that runs in sigsuspend; o one that runs
 * while SIGTRAP is blocked; e one that runs in ppoll, with SIGTRAP free and
 * then blocked meanwhile; c setcontext and swapcontext; w all of these and
 * questions for the action. In one thread: a actions that change; r one that
 * is for one signal; k a child that forks; v posix_spawn; d children that
 * SIGTRAP ends; i SIGTRAP is ignored, then not; u many masks that have
 * nothing to do with it, for two seconds; g other system calls through the
 * C library's syscall(), as long; z one that is pending, if it is caught; q
 * quit.
 * Each answers with the calls that it made, n. */
#include "target.h"
#include <setjmp.h>
#include <spawn.h>
#ifdef __GLIBC__
#include <ucontext.h>
#endif

enum { THREADS = 4 };
CALLED long step(long a) { return a * 3 + 1; }

static __thread volatile long n_caught, n_other;
static __thread volatile int in_handler;
static __thread sigjmp_buf back;
static atomic_long *n_calls;            /* of children, too */
static volatile long n_second;
static int is_caught_here, turns;
static void (*todo)(void);

static char way = 'c';

/* struct kernel_sigaction, <asm/signal.h>. */
struct raw_action {
    void (*handler)(int);
    unsigned long flags;
    void (*restorer)(void);
    unsigned long mask;
};
enum { RAW_SIZE = 8, RAW_RESTORER = 0x04000000 };
void raw_return(void);
FUNCTION(raw_return, "mov $15,%eax\n syscall");
long raw_any(long number, long a, long b, long c, long d);
FUNCTION(raw_any, "mov %rdi,%rax\n mov %rsi,%rdi\n mov %rdx,%rsi\n"
         "mov %rcx,%rdx\n mov %r8,%r10\n syscall\n ret");

static inline __attribute__((always_inline)) long
raw_here(long number, long a, long b, long c, long d)
{
    register long fourth __asm__("r10") = d;
    long result;
    __asm__ volatile("syscall" : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth)
                     : "rcx", "r11", "memory");
    return result;
}

/* number must be a constant: it is set in front of the instruction. */
static inline __attribute__((always_inline)) long
system_call(long number, long a, long b, long c, long d)
{
    long result;
    if (way == 's')
        return syscall(number, a, b, c, d, RAW_SIZE);
    result = way == 'i' ? raw_here(number, a, b, c, d)
                        : raw_any(number, a, b, c, d);
    if (result >= 0)
        return result;
    errno = -result;
    return -1;
}

static int sig_mask(int how, const sigset_t *set, sigset_t *old)
{
    if (way == 'c')
        return pthread_sigmask(how, set, old);
    if (old)
        sigemptyset(old);
    return system_call(SYS_rt_sigprocmask, how, (long)set, (long)old,
                       RAW_SIZE);
}

static int sig_mask_of_process(int how, const sigset_t *set, sigset_t *old)
{
    return way == 'c' ? sigprocmask(how, set, old) : sig_mask(how, set, old);
}

static int sig_action(int signo, const struct sigaction *action,
                      struct sigaction *old)
{
    struct raw_action set, was;
    long result;
    if (way == 'c')
        return sigaction(signo, action, old);
    if (action) {
        set.handler = action->sa_handler;
        set.flags = action->sa_flags | RAW_RESTORER;
        set.restorer = raw_return;
        memcpy(&set.mask, &action->sa_mask, RAW_SIZE);
    }
    result = system_call(SYS_rt_sigaction, signo, action ? (long)&set : 0,
                         old ? (long)&was : 0, RAW_SIZE);
    if (old) {
        memset(old, 0, sizeof *old);
        old->sa_handler = was.handler;
        old->sa_flags = was.flags;
    }
    return result;
}

static int sig_suspend(const sigset_t *set)
{
    return way == 'c' ? sigsuspend(set)
        : system_call(SYS_rt_sigsuspend, (long)set, RAW_SIZE, 0, 0);
}

static int sig_poll(const struct timespec *timeout, const sigset_t *set)
{
    struct timespec copy = *timeout;
    if (way == 'c')
        return ppoll(NULL, 0, timeout, set);
    if (way == 's')
        return syscall(SYS_ppoll, NULL, 0, &copy, set, RAW_SIZE);
    struct { const sigset_t *set; size_t size; } sixth = {set, RAW_SIZE};
    register long five __asm__("r8") = (long)&copy;
    register void *six __asm__("r9") = &sixth;
    register long four __asm__("r10") = 0;
    long result;
    __asm__ volatile("syscall" : "=a"(result)
                     : "a"(SYS_pselect6), "D"(0), "S"(0), "d"(0), "r"(four),
                     "r"(five), "r"(six) : "rcx", "r11", "memory");
    errno = -result;
    return result < 0 ? -1 : result;
}

static void call(void)
{
    long n = ++*n_calls;
    if (step(n) != n * 3 + 1)
        wrong("step");
}

static void on_trap(int signo)
{
    n_caught++;
}

static void on_second(int signo)
{
    n_second++;
}

static void handle(int signo, void (*handler)(int), int masked)
{
    struct sigaction action = {.sa_handler = handler};
    if (masked < 0)
        sigfillset(&action.sa_mask);
    else if (masked)
        sigaddset(&action.sa_mask, masked);
    if (sig_action(signo, &action, NULL))
        wrong("sigaction");
}

static int is_blocked(void)
{
    sigset_t set;
    sig_mask(SIG_BLOCK, NULL, &set);
    return sigismember(&set, SIGTRAP);
}

static int is_pending(void)
{
    sigset_t set;
    sigpending(&set);
    return sigismember(&set, SIGTRAP);
}

/* SIGTRAP is blocked from here on, says the caller. */
static void while_blocked(const char *how)
{
    long before = n_caught;
    call();
    if (!is_blocked())
        wrong("%s: SIGTRAP is not blocked", how);
    raise(SIGTRAP);
    call();
    if (!is_pending())
        wrong("%s: SIGTRAP is not pending", how);
    if (n_caught != before)
        wrong("%s: SIGTRAP came while it was blocked", how);
    call();
    if (!is_caught_here) {              /* or it would end the program */
        sigset_t set;
        siginfo_t info;
        struct timespec none = {0, 0};
        sigemptyset(&set), sigaddset(&set, SIGTRAP);
        if (sigtimedwait(&set, &info, &none) != SIGTRAP)
            wrong("%s: no SIGTRAP to wait for", how);
        else if (info.si_code > 0 || info.si_pid != getpid())
            wrong("%s: from %d, code %d", how, info.si_pid, info.si_code);
        call();
    }
}

static void while_free(const char *how, long before)
{
    if (n_caught - before != is_caught_here)
        wrong("%s: %ld SIGTRAP came", how, n_caught - before);
    call();
    if (is_blocked())
        wrong("%s: SIGTRAP is blocked", how);
}

static void set_mask(int how, sigset_t *old)
{
    sigset_t set;
    sigemptyset(&set), sigaddset(&set, SIGTRAP);
    sig_mask(how, &set, old);
}

static void by_thread(void)
{
    long before = n_caught;
    set_mask(SIG_BLOCK, NULL);
    while_blocked("pthread_sigmask");
    set_mask(SIG_UNBLOCK, NULL);
    while_free("pthread_sigmask", before);
}

static void by_process(void)
{
    long before = n_caught;
    sigset_t set, old;
    sigemptyset(&set), sigaddset(&set, SIGTRAP), sigaddset(&set, SIGUSR1);
    sig_mask_of_process(SIG_SETMASK, &set, &old);
    while_blocked("sigprocmask");
    sig_mask_of_process(SIG_SETMASK, &old, NULL);
    while_free("sigprocmask", before);
}

static void by_all(void)
{
    long before = n_caught;
    sigset_t set, old;
    sigfillset(&set);
    sig_mask(SIG_SETMASK, &set, &old);
    while_blocked("all");
    sig_mask(SIG_SETMASK, &old, NULL);
    while_free("all", before);
}

static void by_all_others(void)
{
    long before = n_caught;
    sigset_t set, old;
    sigfillset(&set), sigdelset(&set, SIGTRAP);
    sig_mask(SIG_SETMASK, &set, &old);
    call();
    raise(SIGTRAP * is_caught_here);
    while_free("all others", before);
    sigaddset(&set, SIGTRAP);
    sig_mask(SIG_BLOCK, &set, NULL);
    before = n_caught;
    while_blocked("all others, then all");
    sig_mask(SIG_SETMASK, &old, NULL);
    while_free("all others, then all", before);
}

/* The first call finds one pending. */
static void by_pending(void)
{
    long before = n_caught;
    set_mask(SIG_BLOCK, NULL);
    raise(SIGTRAP);
    call();
    if (!is_pending())
        wrong("SIGTRAP is not pending any more");
    set_mask(SIG_UNBLOCK, NULL);
    while_free("pending", before);
}

static void on_masked(int signo)
{
    while_blocked("sa_mask");
    n_other++;
}

static void by_handler(void)
{
    long before = n_caught, others = n_other;
    raise(SIGUSR1);
    if (n_other != others + 1)
        wrong("no handler ran");
    while_free("sa_mask", before);
}

static void by_full_handler(void)
{
    long before = n_caught, others = n_other;
    raise(SIGIO);
    if (n_other != others + 1)
        wrong("no handler ran");
    while_free("sa_mask of all", before);
}

static void by_longjmp(void)
{
    volatile long before = n_caught;
    set_mask(SIG_BLOCK, NULL);
    if (sigsetjmp(back, 1) == 0) {
        set_mask(SIG_UNBLOCK, NULL);
        call();
        siglongjmp(back, 1);
    }
    while_blocked("siglongjmp");
    set_mask(SIG_UNBLOCK, NULL);
    while_free("siglongjmp", before);
}

static void on_free(int signo)
{
    call();
    if (is_blocked())
        wrong("SIGTRAP is blocked in a handler of sigsuspend");
    call();
    n_other++;
}

static void by_suspend(void)
{
    long before = n_caught, others = n_other;
    sigset_t set, none;
    sigemptyset(&none), sigemptyset(&set);
    sigaddset(&set, SIGTRAP), sigaddset(&set, SIGUSR2);
    sig_mask(SIG_BLOCK, &set, NULL);
    raise(SIGUSR2);
    sig_suspend(&none);
    if (n_other != others + 1)
        wrong("no handler ran in sigsuspend");
    while_blocked("sigsuspend");
    sig_mask(SIG_UNBLOCK, &set, NULL);
    while_free("sigsuspend", before);
}

static __thread volatile int is_to_be_blocked;

static void on_poll(int signo)
{
    call();
    if (is_blocked() != is_to_be_blocked)
        wrong("SIGTRAP blocked in a handler of ppoll: %d", is_blocked());
    call();
    n_other++;
}

static void by_poll(void)
{
    long before = n_caught, others = n_other;
    struct timespec none = {0, 0};
    sigset_t set, old;
    sigemptyset(&set), sigaddset(&set, SIGWINCH);
    sig_mask(SIG_BLOCK, &set, &old);
    for (is_to_be_blocked = 0; is_to_be_blocked < 2; is_to_be_blocked++) {
        sigemptyset(&set);
        if (is_to_be_blocked)
            sigaddset(&set, SIGTRAP);
        raise(SIGWINCH);
        call();
        if (sig_poll(&none, &set) != -1 || errno != EINTR)
            wrong("ppoll was not interrupted");
    }
    if (n_other != others + 2)
        wrong("no handler ran in ppoll");
    raise(SIGTRAP * is_caught_here);
    while_free("ppoll", before);
    sig_mask(SIG_SETMASK, &old, NULL);
}

static void on_other(int signo)
{
    call();
    if (!is_blocked())
        wrong("SIGTRAP is free in a handler");
    n_other++;
}

static void by_other(void)
{
    long before = n_caught, others = n_other;
    set_mask(SIG_BLOCK, NULL);
    raise(SIGURG);
    if (n_other != others + 1)
        wrong("no other handler ran");
    while_blocked("handler");
    set_mask(SIG_UNBLOCK, NULL);
    while_free("handler", before);
}

#ifdef __GLIBC__
static void by_context(void)
{
    volatile long before = n_caught;
    volatile int step_no = 0;
    ucontext_t context, other;
    getcontext(&context);               /* with SIGTRAP free */
    if (step_no++ == 0) {
        set_mask(SIG_BLOCK, NULL);
        getcontext(&other);             /* with SIGTRAP blocked */
        if (step_no++ == 1) {
            set_mask(SIG_UNBLOCK, NULL);
            setcontext(&other);
        }
        while_blocked("setcontext");
        setcontext(&context);
    }
    while_free("setcontext", before);
}
#else
#define by_context by_thread
#endif

static void by_question(void)
{
    struct sigaction action;
    if (sig_action(SIGTRAP, NULL, &action)
            || action.sa_handler != (is_caught_here ? on_trap : SIG_DFL))
        wrong("another handler is told");
    call();
}

static void by_each(void)
{
    static void (*each[])(void) = {
        by_thread, by_process, by_all, by_handler, by_full_handler,
        by_longjmp, by_suspend, by_other, by_poll, by_context,
        by_question};
    static atomic_uint place;
    each[place++ * 7 % (sizeof each / sizeof *each)]();
}

static void by_one_shot(void)
{
    struct sigaction action = {.sa_handler = on_second,
                               .sa_flags = SA_RESETHAND};
    long before = n_second;
    sig_action(SIGTRAP, &action, NULL);
    set_mask(SIG_BLOCK, NULL);
    call();
    raise(SIGTRAP);
    call();
    set_mask(SIG_UNBLOCK, NULL);
    if (n_second != before + 1)
        wrong("a handler for once ran %ld times", n_second - before);
    set_mask(SIG_BLOCK, NULL);
    call();
    sig_action(SIGTRAP, NULL, &action);
    if (action.sa_handler != SIG_DFL)
        wrong("a handler for once is still there");
    set_mask(SIG_UNBLOCK, NULL);
    handle(SIGTRAP, is_caught_here ? on_trap : SIG_DFL, 0);
}

static void by_action(void)
{
    long before;
    sigset_t old;
    struct sigaction action;
    handle(SIGTRAP, on_second, 0);
    before = n_second;
    call();
    set_mask(SIG_BLOCK, &old);
    call();
    raise(SIGTRAP);
    call();
    sig_mask(SIG_SETMASK, &old, NULL);
    if (n_second != before + 1)
        wrong("the second handler ran %ld times", n_second - before);
    sig_action(SIGTRAP, NULL, &action);
    if (action.sa_handler != on_second)
        wrong("the second handler is gone");
    handle(SIGTRAP, is_caught_here ? on_trap : SIG_DFL, 0);
    call();
    sig_action(SIGTRAP, NULL, &action);
    if (action.sa_handler != (is_caught_here ? on_trap : SIG_DFL))
        wrong("another handler is there");
}

static void by_fork(void)
{
    int status;
    pid_t pid;
    set_mask(SIG_BLOCK, NULL);
    pid = fork();
    if (pid == 0) {
        while_blocked("child");
        set_mask(SIG_UNBLOCK, NULL);
        while_free("child", 0);
        _exit(n_wrong != 0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
        wrong("a child ended with %x", status);
    call();
    if (!is_blocked())
        wrong("SIGTRAP is free behind fork");
    set_mask(SIG_UNBLOCK, NULL);
}

static void by_spawn(void)
{
    char *words[] = {"true", NULL};
    int status;
    pid_t pid;
    call();
    if (posix_spawn(&pid, "/bin/true", NULL, NULL, words, NULL)
            || waitpid(pid, &status, 0) != pid || status)
        wrong("posix_spawn");
    by_question();
    by_thread();
}

static void own_trap(void)
{
    __asm__ volatile("int3");
}

static void raised_trap(void)
{
    raise(SIGTRAP);
}

static void ending(const char *what, int is_masked, void (*function)(void),
                   int is_deadly)
{
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL), alarm(20);
        if (is_masked)
            set_mask(SIG_BLOCK, NULL);
        call();
        function();
        call();
        _exit(0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid
            || status % 128 != (is_deadly ? SIGTRAP : 0))
        wrong("%s: a child ended with %x", what, status);
}

/* In children: a core may be dumped, and is not wanted. */
static void by_ending(void)
{
    ending("int3, blocked", 1, own_trap, 1);
    ending("int3", 0, own_trap, !is_caught_here);
    ending("raise, blocked", 1, raised_trap, 0);
    ending("raise", 0, raised_trap, !is_caught_here);
}

static void by_ignoring(void)
{
    handle(SIGTRAP, SIG_IGN, 0);
    call();
    raise(SIGTRAP);
    call();
    handle(SIGTRAP, is_caught_here ? on_trap : SIG_DFL, 0);
}

static void by_many(void)
{
    sigset_t set;
    uint64_t end = now_ns() + 2000000000ull;
    sigemptyset(&set), sigaddset(&set, SIGUSR1);
    while (now_ns() < end) {
        sig_mask_of_process(SIG_BLOCK, &set, NULL);
        sig_mask_of_process(SIG_UNBLOCK, &set, NULL);
    }
    call();
}

static void by_others(void)
{
    uint64_t end = now_ns() + 2000000000ull;
    while (now_ns() < end)
        if (syscall(SYS_getppid) != getppid())
            wrong("getppid");
    call();
}

static void *in_thread(void *unused)
{
    for (int i = 0; i < turns; i++)
        todo();
    return unused;
}

static void in_threads(void (*function)(void), int n)
{
    pthread_t threads[THREADS];
    todo = function;
    for (int i = 0; i < n; i++)
        threads[i] = start(in_thread, NULL);
    for (int i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
}

int main(int argc, char **argv)
{
    int c;
    bounded();
    is_caught_here = !strcmp(argv[1], "caught");
    turns = atoi(argv[2]);
    way = argc > 3 ? *argv[3] : 'c';
    if (is_caught_here)
        handle(SIGTRAP, on_trap, 0);
    handle(SIGUSR1, on_masked, SIGTRAP);
    handle(SIGUSR2, on_free, 0);
    handle(SIGURG, on_other, 0);
    handle(SIGWINCH, on_poll, 0);
    handle(SIGIO, on_masked, -1);
    n_calls = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    say("ready");
    while ((c = command()) != 'q') {
        *n_calls = 0;
        switch (c) {
        case 'b': in_threads(by_thread, THREADS); break;
        case 'p': in_threads(by_process, THREADS); break;
        case 'f': in_threads(by_all, THREADS); break;
        case 't': in_threads(by_all_others, THREADS); break;
        case 'n': in_threads(by_full_handler, THREADS); break;
        case 'w': in_threads(by_each, THREADS); break;
        case 'r': in_threads(by_one_shot, 1); break;
        case 'u': by_many(); break;
        case 'g': by_others(); break;
        case 'z': in_threads(by_pending, 1); break;
        case 'v': in_threads(by_spawn, 1); break;
        case 'd': in_threads(by_ending, 1); break;
        case 'm': in_threads(by_handler, THREADS); break;
        case 'j': in_threads(by_longjmp, THREADS); break;
        case 's': in_threads(by_suspend, THREADS); break;
        case 'o': in_threads(by_other, THREADS); break;
        case 'e': in_threads(by_poll, THREADS); break;
        case 'c': in_threads(by_context, THREADS); break;
        case 'a': in_threads(by_action, 1); break;
        case 'k': in_threads(by_fork, 1); break;
        case 'i': in_threads(by_ignoring, 1); break;
        }
        say("n=%ld wrong=%ld", (long)*n_calls, atomic_load(&n_wrong));
    }
    return verdict();
}
