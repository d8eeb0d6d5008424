/* traps: what a program does with SIGTRAP and signals round calls of step.
 *
 * Each command answers with the number of calls, n, that it made, and checks
 * that signals did what they do in a program that nobody traces.
 *
 * Commands: c calls; i own int3 and int $3, caught; r raise(SIGTRAP), caught;
 * b calls while SIGTRAP is blocked; p also with one pending; h handlers of a
 * signal storm that call; m calls of many threads at once; f a child that
 * forks; v posix_spawn; e a child of vfork that calls; j siglongjmp out of a
 * handler; s calls with all signals blocked; d as b, but some time after it
 * was blocked; q quit.
 * With the argument "ignored", SIGTRAP is ignored from the start; with
 * "later", a handler is set by the command l, and k ignores it. */
#include "target.h"
#include <setjmp.h>
#include <spawn.h>

enum { CALLS = 211, THREADS = 8, EACH = 101 };
CALLED long step(long a, long b) { return a * 3 + b; }
/* One instruction of every kind that has to be moved with care. */
long odd_call(long), odd_jump(long), odd_loop(long), odd_rip(long);
long odd_indirect(long), odd_push(long), odd_ret(long), odd_tight(long);
long odd_exit(long);
FUNCTION(odd_call, "sub $8,%rsp\n call odd_ret\n add $8,%rsp\n ret");
FUNCTION(odd_jump, "test %rdi,%rdi\n jz 1f\n lea 1(%rdi),%rax\n ret\n"
         "1: mov $1,%eax\n ret");
FUNCTION(odd_loop, "mov %rdi,%rcx\n xor %eax,%eax\n inc %rcx\n"
         "1: inc %rax\n loop 1b\n ret");
FUNCTION(odd_rip, "mov odd_word(%rip),%rax\n add %rdi,%rax\n ret");
FUNCTION(odd_indirect, "lea odd_ret(%rip),%rax\n sub $8,%rsp\n call *%rax\n"
         "add $8,%rsp\n ret");
FUNCTION(odd_push, "push %rdi\n pop %rax\n inc %rax\n ret");
FUNCTION(odd_ret, "lea 1(%rdi),%rax\n ret");
/* No jump fits at +11: a call before it, behind it a branch's target, and
 * the branch too far away for a window that has both. */
FUNCTION(odd_tight, "sub $8,%rsp\n xor %ecx,%ecx\n call odd_ret\n nop\n"
         "1: dec %rcx\n .fill 220,1,0x90\n jz 1b\n add $8,%rsp\n ret");
/* Its one exit takes no jump: one branch leads behind it, and another, too
 * far away for a window that has both, to it. */
FUNCTION(odd_exit, "lea 1(%rdi),%rax\n test %rdi,%rdi\n js 2f\n 1: ret\n"
         "2: dec %rax\n .fill 220,1,0x90\n inc %rax\n jmp 1b");
long odd_word = 1;
static long (*odd[])(long) = {odd_call, odd_jump, odd_loop, odd_rip,
                              odd_tight, odd_indirect, odd_push, odd_exit,
                              odd_ret};

static atomic_long n_caught, n_in_handler;
static sigjmp_buf back;
static int is_jumping;

static void call(long n)
{
    for (long i = 0; i < n; i++) {
        if (step(i, n) != i * 3 + n)
            wrong("step(%ld)", i);
        for (unsigned k = 0; k < sizeof odd / sizeof *odd; k++)
            if (odd[k](i) != i + 1)
                wrong("odd %u of %ld is %ld", k, i, odd[k](i));
    }
}

static void on_trap(int signo, siginfo_t *info, void *context)
{
    n_caught++;
}

static void on_usr(int signo)
{
    int kept = errno;
    call(3);
    n_in_handler += 3;
    errno = kept;
    if (is_jumping)
        siglongjmp(back, 1);
}

static void handle(int signo, void *handler)
{
    struct sigaction action = {.sa_flags = SA_SIGINFO};
    action.sa_handler = handler;
    sigaction(signo, &action, NULL);
}

static int is_blocked(int signo)
{
    sigset_t set;
    pthread_sigmask(SIG_SETMASK, NULL, &set);
    return sigismember(&set, signo);
}

static int is_caught(int signo)
{
    struct sigaction action;
    sigaction(signo, NULL, &action);
    return action.sa_sigaction == on_trap;
}

static long own_traps(void)
{
    long before = n_caught;
    for (int i = 0; i < 10; i++) {
        __asm__ volatile("int3");
        call(1);
        __asm__ volatile(".byte 0xcd, 3");
        call(1);
    }
    if (n_caught - before != 20)
        wrong("%ld of 20 own int3 were caught", n_caught - before);
    return 20;
}

static long raised(void)
{
    long before = n_caught;
    for (int i = 0; i < 10; i++) {
        raise(SIGTRAP);
        call(1);
        kill(getpid(), SIGTRAP);
        call(1);
    }
    if (n_caught - before != 20)
        wrong("%ld of 20 SIGTRAP were caught", n_caught - before);
    return 20;
}

static long blocked(int is_pending, int how_many)
{
    sigset_t set, old, pending;
    long before = n_caught, was_caught = is_caught(SIGTRAP);
    if (how_many == 1)
        sigfillset(&set);
    else
        sigemptyset(&set), sigaddset(&set, SIGTRAP);
    pthread_sigmask(SIG_BLOCK, &set, &old);
    if (how_many == 2)
        nap_us(400000);
    if (is_pending)
        raise(SIGTRAP);
    call(17);
    if (!is_blocked(SIGTRAP))
        wrong("SIGTRAP is not blocked any more");
    sigpending(&pending);
    if (sigismember(&pending, SIGTRAP) != is_pending)
        wrong("SIGTRAP pending: %d", sigismember(&pending, SIGTRAP));
    if (n_caught != before)
        wrong("a blocked SIGTRAP was delivered");
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (n_caught - before != is_pending)
        wrong("%ld SIGTRAP after unblocking", n_caught - before);
    if (is_blocked(SIGTRAP))
        wrong("SIGTRAP is still blocked");
    if (is_caught(SIGTRAP) != was_caught)
        wrong("the handler of SIGTRAP is gone");
    return 17;
}

static long storm(void)
{
    long before = n_in_handler;
    pid_t self = getpid(), pid = fork();
    int status;
    if (pid == 0) {
        for (int i = 0; i < 200; i++) {
            kill(self, SIGUSR1);
            nap_us(200);
        }
        _exit(0);
    }
    call(CALLS);
    while (waitpid(pid, &status, 0) != pid)
        ;
    nap_us(1000);
    return CALLS + n_in_handler - before;
}

static void *in_thread(void *argument)
{
    call(EACH);
    return argument;
}

static long many(void)
{
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        threads[i] = start(in_thread, NULL);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    return THREADS * EACH;
}

static void reap(pid_t pid)
{
    int status;
    if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
        wrong("a child ended with %x", status);
}

static long forked(void)
{
    pid_t pid = fork();
    if (pid == 0) {
        call(13);
        pid = fork();
        if (pid == 0) {
            call(7);
            _exit(n_wrong != 0);
        }
        reap(pid);
        _exit(n_wrong != 0);
    }
    reap(pid);
    return 20;
}

static long spawned(void)
{
    char *words[] = {"true", NULL};
    pid_t pid;
    for (int i = 0; i < 5; i++) {
        call(2);
        if (posix_spawn(&pid, "/bin/true", NULL, NULL, words, NULL))
            wrong("posix_spawn");
        reap(pid);
    }
    return 10;
}

static long vforked(void)
{
    pid_t pid = vfork();
    if (pid == 0) {
        call(5);
        execl("/bin/true", "true", NULL);
        _exit(9);
    }
    reap(pid);
    call(5);
    return 10;
}

static long jumped(void)
{
    volatile long n = 0;
    for (volatile int i = 0; i < 20; i++) {
        if (sigsetjmp(back, 1) == 0) {
            is_jumping = 1;
            raise(SIGUSR2);
            wrong("no jump");
        }
        is_jumping = 0;
        n += 3;
        call(1);
        n++;
    }
    return n;
}

int main(int argc, char **argv)
{
    int c;
    bounded();
    if (argc > 1 && !strcmp(argv[1], "ignored"))
        signal(SIGTRAP, SIG_IGN);
    else if (argc == 1)
        handle(SIGTRAP, on_trap);
    handle(SIGUSR1, on_usr);
    handle(SIGUSR2, on_usr);
    say("ready");
    while ((c = command()) != 'q') {
        long n = 0;
        switch (c) {
        case 'c': call(n = CALLS); break;
        case 'i': n = own_traps(); break;
        case 'r': n = raised(); break;
        case 'b': n = blocked(0, 0); break;
        case 'p': n = blocked(1, 0); break;
        case 's': n = blocked(0, 1); break;
        case 'd': n = blocked(0, 2); break;
        case 'h': n = storm(); break;
        case 'm': n = many(); break;
        case 'f': n = forked(); break;
        case 'v': n = spawned(); break;
        case 'e': n = vforked(); break;
        case 'j': n = jumped(); break;
        case 'l': handle(SIGTRAP, on_trap); nap_us(400000); break;
        case 'k': signal(SIGTRAP, SIG_IGN); nap_us(400000);
            call(n = 17);
            raise(SIGTRAP);
            break;
        }
        say("n=%ld wrong=%ld", n, atomic_load(&n_wrong));
    }
    return verdict();
}
