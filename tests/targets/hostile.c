/* hostile: unusual uses of SIGTRAP round calls of step. Each command checks
 * that signals do what they do in a program that nobody traces, and answers
 * with the number of calls, n, that it made.
 *
 * Commands: a SIGTRAP on an alternate stack; b a handler that SIGTRAP enters
 * again; o handlers for once that set themselves again; c siglongjmp and
 * longjmp out of handlers; d a signalfd; e sigwaitinfo in a thread; f SIGTRAP
 * from another process; g siginfo of its own making; i what exec inherits of
 * SIGTRAP, by vfork and fork; I the same if they ignore it; j timers; m
 * threads that begin with SIGTRAP blocked; s sigsuspend and ppoll that let it
 * in; t faults whose handler blocks it; u actions changed by another thread;
 * q quit.
 * "hostile report" says by its exit status what it has inherited. */
#include "target.h"
#include <setjmp.h>
#include <sys/signalfd.h>
#include <ucontext.h>

enum { TURNS = 20 };
CALLED long step(long a) { return a * 3 + 1; }

static volatile long n_caught, n_in;
static atomic_long n_calls, *n_shared;
static siginfo_t told[16];
static sigjmp_buf back;

static void call(void)
{
    long n = ++n_calls;
    if (step(n) != n * 3 + 1)
        wrong("step");
}

static void handle(int signo, void (*handler)(int, siginfo_t *, void *),
                   int flags)
{
    struct sigaction action = {.sa_flags = SA_SIGINFO | flags};
    action.sa_sigaction = handler;
    if (!handler)
        action.sa_handler = SIG_DFL;
    if (sigaction(signo, &action, NULL))
        wrong("sigaction");
}

static void on_trap(int signo, siginfo_t *info, void *context)
{
    told[n_caught++ & 15] = *info;
    call();
}

static void mask(int how)
{
    sigset_t set;
    sigemptyset(&set), sigaddset(&set, SIGTRAP);
    pthread_sigmask(how, &set, NULL);
}

static int is_blocked(void)
{
    sigset_t set;
    pthread_sigmask(SIG_BLOCK, NULL, &set);
    return sigismember(&set, SIGTRAP);
}

static void expect(const char *what, long is, long should_be)
{
    if (is != should_be)
        wrong("%s: %ld, not %ld", what, is, should_be);
}

static void own_int3(void) { __asm__ volatile("int3"); }

static volatile uintptr_t low, high;

static void on_stack(int signo, siginfo_t *info, void *context)
{
    int here;
    if ((uintptr_t)&here < low || (uintptr_t)&here >= high)
        wrong("the handler is on another stack");
    call();
    n_caught++;
}

static void by_stack(void)
{
    static char memory[65536];
    stack_t stack = {.ss_sp = memory, .ss_size = sizeof memory}, now;
    low = (uintptr_t)memory, high = low + sizeof memory;
    sigaltstack(&stack, NULL);
    handle(SIGTRAP, on_stack, SA_ONSTACK);
    for (int i = 0; i < TURNS; i++) {
        long before = n_caught;
        call();
        own_int3();
        raise(SIGTRAP);
        expect("caught", n_caught - before, 2);
        mask(SIG_BLOCK);
        call();
        raise(SIGTRAP);
        call();
        expect("blocked", n_caught - before, 2);
        mask(SIG_UNBLOCK);
        expect("freed", n_caught - before, 3);
        sigaltstack(NULL, &now);
        expect("stack", (long)now.ss_sp, (long)memory);
        expect("its flags", now.ss_flags, 0);
    }
    stack.ss_flags = SS_DISABLE;
    sigaltstack(&stack, NULL);
}

static void on_again(int signo, siginfo_t *info, void *context)
{
    expect("blocked in its own handler", is_blocked(), 0);
    call();
    if (++n_in % 4)
        own_int3();
    call();
    n_caught++;
}

static void by_nesting(void)
{
    handle(SIGTRAP, on_again, SA_NODEFER);
    for (int i = 0; i < TURNS; i++) {
        long before = n_caught;
        n_in = 0;
        own_int3();
        call();
        expect("nested", n_caught - before, 4);
        raise(SIGTRAP);
        expect("nested again", n_caught - before, 8);
    }
}

static void on_once(int signo, siginfo_t *info, void *context)
{
    struct sigaction action;
    sigaction(SIGTRAP, NULL, &action);
    expect("it is for once", action.sa_handler != SIG_DFL, 0);
    call();
    if (++n_in % 3)
        handle(SIGTRAP, on_once, SA_RESETHAND | SA_NODEFER);
    call();
    n_caught++;
}

static void by_once(void)
{
    for (int i = 0; i < TURNS; i++) {
        long before = n_caught;
        struct sigaction action;
        n_in = 0;
        handle(SIGTRAP, on_once, SA_RESETHAND | SA_NODEFER);
        call();
        own_int3();
        raise(SIGTRAP);
        call();
        own_int3();
        expect("once, three times", n_caught - before, 3);
        sigaction(SIGTRAP, NULL, &action);
        expect("no handler is left", action.sa_handler != SIG_DFL, 0);
        call();
    }
}

static void on_leave(int signo, siginfo_t *info, void *context)
{
    expect("free in its own handler", is_blocked(), 1);
    call();
    n_caught++;
    siglongjmp(back, 1);
}

static void by_jumping(void)
{
    handle(SIGTRAP, on_leave, 0);
    for (volatile int i = 0; i < TURNS; i++) {
        volatile long before = n_caught;
        if (sigsetjmp(back, 1) == 0)
            own_int3();
        expect("blocked behind it", is_blocked(), 0);
        call();
        if (sigsetjmp(back, 1) == 0)
            raise(SIGTRAP);
        call();
        expect("still blocked", is_blocked(), 0);
        if (sigsetjmp(back, 0) == 0)            /* the mask is left */
            own_int3();
        call();
        expect("free behind it", is_blocked(), 1);
        raise(SIGTRAP);
        call();
        expect("jumped", n_caught - before, 3);
        if (sigsetjmp(back, 0) == 0)
            mask(SIG_UNBLOCK);
        call();
        expect("jumped once more", n_caught - before, 4);
        mask(SIG_UNBLOCK);
        call();
    }
}

static void by_signalfd(void)
{
    struct signalfd_siginfo info;
    sigset_t set;
    int fd;
    handle(SIGTRAP, on_trap, 0);
    mask(SIG_BLOCK);
    sigemptyset(&set), sigaddset(&set, SIGTRAP);
    fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    for (int i = 0; i < TURNS; i++) {
        long before = n_caught;
        union sigval value = {.sival_int = 1000 + i};
        call();
        expect("empty", read(fd, &info, sizeof info), -1);
        kill(getpid(), SIGTRAP);
        call();
        expect("killed", read(fd, &info, sizeof info), sizeof info);
        expect("its code", info.ssi_code, SI_USER);
        expect("its pid", info.ssi_pid, getpid());
        raise(SIGTRAP);
        call();
        expect("raised", read(fd, &info, sizeof info), sizeof info);
        expect("its code", info.ssi_code, SI_TKILL);
        sigqueue(getpid(), SIGTRAP, value);
        call();
        expect("queued", read(fd, &info, sizeof info), sizeof info);
        expect("its code", info.ssi_code, SI_QUEUE);
        expect("its value", info.ssi_int, 1000 + i);
        pthread_sigqueue(pthread_self(), SIGTRAP, value);
        call();
        call();
        expect("queued here", read(fd, &info, sizeof info), sizeof info);
        expect("its code", info.ssi_code, SI_QUEUE);
        expect("its value", info.ssi_int, 1000 + i);
        expect("empty", read(fd, &info, sizeof info), -1);
        expect("caught", n_caught - before, 0);
    }
    close(fd);
    mask(SIG_UNBLOCK);
}

static atomic_int state;
static pthread_t waiter;

static void *in_wait(void *unused)
{
    sigset_t set;
    siginfo_t info;
    mask(SIG_BLOCK);
    sigemptyset(&set), sigaddset(&set, SIGTRAP);
    for (int i = 0; i < 2 * TURNS; i++) {
        call();
        state = 1;
        expect("waited", sigwaitinfo(&set, &info), SIGTRAP);
        if (i % 2 || info.si_code != SI_TKILL)      /* glibc changes that */
            expect("its code", info.si_code, i % 2 ? SI_QUEUE : SI_USER);
        if (i % 2)
            expect("its value", info.si_value.sival_int, i);
        call();
        expect("free behind it", is_blocked(), 1);
        state = 2;
    }
    return unused;
}

static void by_waiting(void)
{
    long before = n_caught;
    handle(SIGTRAP, on_trap, 0);
    state = 0;
    waiter = start(in_wait, NULL);
    for (int i = 0; i < 2 * TURNS; i++) {
        union sigval value = {.sival_int = i};
        while (state != 1)
            nap_us(100);
        if (i & 4)
            nap_us(2000);
        call();
        state = 0;
        if (i % 2)
            pthread_sigqueue(waiter, SIGTRAP, value);
        else
            pthread_kill(waiter, SIGTRAP);
        call();
        while (state == 0)
            nap_us(100);
    }
    pthread_join(waiter, NULL);
    expect("caught", n_caught - before, 0);
}

static void by_others(void)
{
    pid_t self = getpid(), pid;
    int status, words[2];
    long before = n_caught;
    char c = 0;
    handle(SIGTRAP, on_trap, 0);
    if (pipe(words))
        wrong("pipe");
    pid = fork();
    if (pid == 0) {
        for (int i = 0; i < 5 * TURNS; i++) {
            if (read(words[0], &c, 1) != 1)
                _exit(1);
            kill(self, SIGTRAP);
        }
        _exit(0);
    }
    for (int i = 0; i < 5 * TURNS; i++) {
        long now = n_caught;
        if (i % 3 == 0)
            mask(SIG_BLOCK);
        if (write(words[1], &c, 1) != 1)
            wrong("write");
        if (i % 3 == 0) {
            sigset_t set;
            do {
                call();
                sigpending(&set);
            } while (!sigismember(&set, SIGTRAP));
            call();
            expect("it is blocked", n_caught - now, 0);
            mask(SIG_UNBLOCK);
        }
        while (n_caught == now)
            call();
        expect("from", told[now & 15].si_pid, pid);
        expect("its code", told[now & 15].si_code, SI_USER);
    }
    if (waitpid(pid, &status, 0) != pid || status)
        wrong("the other ended with %x", status);
    expect("caught", n_caught - before, 5 * TURNS);
    close(words[0]), close(words[1]);
}

static void by_siginfo(void)
{
    static const int codes[] = {SI_KERNEL, 1, 2, 4, SI_QUEUE, SI_TIMER,
                                SI_MESGQ, SI_ASYNCIO, SI_SIGIO, -60};
    handle(SIGTRAP, on_trap, 0);
    for (unsigned i = 0; i < 4 * sizeof codes / sizeof *codes; i++) {
        long before = n_caught;
        siginfo_t info = {.si_signo = SIGTRAP, .si_code = codes[i / 4],
                          .si_errno = 7};
        info.si_pid = getpid();
        info.si_value.sival_int = 500 + i;
        if (i % 2)
            mask(SIG_BLOCK);
        if (i & 2)
            syscall(SYS_rt_sigqueueinfo, getpid(), SIGTRAP, &info);
        else
            syscall(SYS_rt_tgsigqueueinfo, getpid(), getpid(), SIGTRAP,
                    &info);
        call();
        call();
        if (i % 2) {
            expect("it is blocked", n_caught - before, 0);
            mask(SIG_UNBLOCK);
        }
        expect("caught", n_caught - before, 1);
        expect("its code", told[before & 15].si_code, codes[i / 4]);
        expect("its errno", told[before & 15].si_errno, 7);
        expect("its value", told[before & 15].si_value.sival_int, 500 + i);
    }
}

static void in_child(void)
{
    long n = ++*n_shared;
    if (step(n) != n * 3 + 1)
        _exit(98);
}

static void inherited(const char *what, int is_vforked, int blocks,
                      int ignores, int status_wanted)
{
    char *words[] = {"hostile", "report", NULL};
    int status;
    pid_t pid = is_vforked ? vfork() : fork();
    if (pid == 0) {
        in_child();
        if (blocks)
            mask(SIG_BLOCK);
        in_child();
        if (ignores)
            signal(SIGTRAP, SIG_IGN);
        if (!ignores || is_vforked)     /* others are let go then */
            in_child();
        execv("/proc/self/exe", words);
        _exit(99);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid
            || status != status_wanted << 8)
        wrong("%s: it has inherited %x", what, status);
    call();
}

static void by_exec(int ignores)
{
    handle(SIGTRAP, on_trap, 0);
    for (int i = 0; i < TURNS / 4; i++) {
        inherited("vfork", 1, 0, ignores, 2 * ignores);
        inherited("vfork, blocked", 1, 1, ignores, 1 + 2 * ignores);
        inherited("fork", 0, 0, ignores, 2 * ignores);
        inherited("fork, blocked", 0, 1, ignores, 1 + 2 * ignores);
        expect("blocked by a child", is_blocked(), 0);
        mask(SIG_BLOCK);
        inherited("vfork from blocked", 1, 0, ignores, 1 + 2 * ignores);
        inherited("fork from blocked", 0, 0, ignores, 1 + 2 * ignores);
        expect("free by a child", is_blocked(), 1);
        mask(SIG_UNBLOCK);
    }
}

static void by_timers(void)
{
    handle(SIGTRAP, on_trap, 0);
    for (int i = 0; i < TURNS; i++) {
        timer_t timer;
        struct itimerspec when = {.it_value = {0, 1000000}};
        struct sigevent event = {.sigev_notify = i % 2 ? SIGEV_SIGNAL
                                 : SIGEV_THREAD_ID, .sigev_signo = SIGTRAP};
        long before = n_caught;
        event.sigev_value.sival_int = i;
        event._sigev_un._tid = getpid();
        if (timer_create(CLOCK_MONOTONIC, &event, &timer))
            wrong("timer_create");
        if (i & 2)
            mask(SIG_BLOCK);
        timer_settime(timer, 0, &when, NULL);
        if (i & 2) {
            nap_us(3000);
            call();
            call();
            expect("it is blocked", n_caught - before, 0);
            mask(SIG_UNBLOCK);
        }
        while (n_caught == before)
            call();
        expect("its code", told[before & 15].si_code, SI_TIMER);
        expect("its value", told[before & 15].si_value.sival_int, i);
        timer_delete(timer);
        expect("caught", n_caught - before, 1);
    }
}

static void *in_thread(void *unused)
{
    call();
    expect("free in a new thread", is_blocked(), 1);
    raise(SIGTRAP);
    call();
    call();
    mask(SIG_UNBLOCK);
    call();
    return unused;
}

static void by_threads(void)
{
    handle(SIGTRAP, on_trap, 0);
    for (int i = 0; i < TURNS; i++) {
        pthread_t threads[3];
        long before = n_caught;
        mask(SIG_BLOCK);
        for (int k = 0; k < 3; k++) {
            threads[k] = start(in_thread, NULL);
            call();
            pthread_join(threads[k], NULL);
        }
        call();
        expect("caught", n_caught - before, 3);
        expect("free", is_blocked(), 1);
        mask(SIG_UNBLOCK);
    }
}

static void by_suspending(void)
{
    struct timespec none = {0, 0};
    sigset_t empty;
    sigemptyset(&empty);
    handle(SIGTRAP, on_trap, 0);
    for (int i = 0; i < TURNS; i++) {
        long before = n_caught;
        mask(SIG_BLOCK);
        call();
        raise(SIGTRAP);
        call();
        expect("it is blocked", n_caught - before, 0);
        if (i % 2)
            expect("sigsuspend", sigsuspend(&empty), -1);
        else
            expect("ppoll", ppoll(NULL, 0, &none, &empty), -1);
        expect("errno", errno, EINTR);
        expect("caught", n_caught - before, 1);
        call();
        expect("free", is_blocked(), 1);
        mask(SIG_UNBLOCK);
        call();
    }
}

static void on_fault(int signo, siginfo_t *info, void *context)
{
    ucontext_t *where = context;
    expect("free in it", is_blocked(), 1);
    call();
    raise(SIGTRAP);
    call();
    where->uc_mcontext.gregs[REG_RIP] += 2;     /* over the ud2 */
    n_in++;
}

static void by_faults(void)
{
    struct sigaction action = {.sa_flags = SA_SIGINFO};
    action.sa_sigaction = on_fault;
    sigaddset(&action.sa_mask, SIGTRAP);
    sigaction(SIGILL, &action, NULL);
    handle(SIGTRAP, on_trap, 0);
    for (int i = 0; i < TURNS; i++) {
        long before = n_caught, in = n_in;
        call();
        __asm__ volatile("ud2");
        call();
        expect("faults", n_in - in, 1);
        expect("caught", n_caught - before, 1);
        expect("blocked", is_blocked(), 0);
    }
}

static void on_other(int signo, siginfo_t *info, void *context)
{
    n_caught += 1000;
}

static void *in_change(void *unused)
{
    for (int i = 0; i < 5 * TURNS; i++) {
        handle(SIGTRAP, i % 2 ? on_trap : on_other, 0);
        call();
    }
    handle(SIGTRAP, on_trap, 0);
    state = 7;
    return unused;
}

static void by_changes(void)
{
    pthread_t thread;
    struct sigaction action;
    long before = n_caught;
    handle(SIGTRAP, on_trap, 0);
    mask(SIG_BLOCK);
    state = 0;
    thread = start(in_change, NULL);
    while (state != 7) {
        call();
        expect("free", is_blocked(), 1);
    }
    pthread_join(thread, NULL);
    call();
    sigaction(SIGTRAP, NULL, &action);
    expect("another handler", action.sa_sigaction != on_trap, 0);
    raise(SIGTRAP);
    call();
    mask(SIG_UNBLOCK);
    expect("caught", n_caught - before, 1);
}

static int report(void)
{
    struct sigaction action;
    sigaction(SIGTRAP, NULL, &action);
    return is_blocked() + 2 * (action.sa_handler == SIG_IGN);
}

int main(int argc, char **argv)
{
    int c;
    bounded();
    if (argc > 1)
        return report();
    n_shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    say("ready");
    while ((c = command()) != 'q') {
        n_calls = *n_shared = 0;
        switch (c) {
        case 'a': by_stack(); break;
        case 'b': by_nesting(); break;
        case 'o': by_once(); break;
        case 'c': by_jumping(); break;
        case 'd': by_signalfd(); break;
        case 'e': by_waiting(); break;
        case 'f': by_others(); break;
        case 'g': by_siginfo(); break;
        case 'i': by_exec(0); break;
        case 'I': by_exec(1); break;
        case 'j': by_timers(); break;
        case 'm': by_threads(); break;
        case 's': by_suspending(); break;
        case 't': by_faults(); break;
        case 'u': by_changes(); break;
        }
        say("n=%ld wrong=%ld", (long)n_calls + *n_shared,
            atomic_load(&n_wrong));
    }
    return verdict();
}
