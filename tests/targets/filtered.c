/* filtered MODE: targets that forbid some syscalls, as sandboxes do.
 *
 *   memfd     memfd_create gives EPERM          (systemd's ~memfd_create)
 *   wx        no mapping both writable and executable, no mprotect to x
 *                                               (MemoryDenyWriteExecute=)
 *   munmap    munmap kills                      exec     mmap of x kills
 *   late      from command l on, munmap kills; from t on, all but read and
 *             write (strict mode)
 *   readv     process_vm_readv kills
 *
 * Commands: r calls hot, reports; s computes for a second while Syscall User
 * Dispatch blocks all calls, as Wine does, and reports: a call in that time
 * is a SIGSYS; l and t see late; q quit. */
#include "target.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>

CALLED long hot(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }
static long n_hot;
static volatile char selector;      /* of Syscall User Dispatch: 1 block */
#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#endif

#define ARGUMENT(n) offsetof(struct seccomp_data, args[n])
#define LOAD(at) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, at)
#define IF(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip)
#define IF_BITS(bits) \
    BPF_STMT(BPF_ALU | BPF_AND | BPF_K, bits), IF(bits, 1)
#define RETURN(what) BPF_STMT(BPF_RET | BPF_K, what)
#define NUMBER LOAD(offsetof(struct seccomp_data, nr))
#define REFUSE RETURN(SECCOMP_RET_ERRNO | EPERM)
#define KILL RETURN(SECCOMP_RET_KILL_PROCESS)
#define ALLOW RETURN(SECCOMP_RET_ALLOW)

static struct sock_filter
    no_memfd[] = {NUMBER, IF(SYS_memfd_create, 1), REFUSE, ALLOW},
    no_munmap[] = {NUMBER, IF(SYS_munmap, 1), KILL, ALLOW},
    no_readv[] = {NUMBER, IF(SYS_process_vm_readv, 1), KILL, ALLOW},
    no_exec[] = {NUMBER, IF(SYS_mmap, 4), LOAD(ARGUMENT(2)), IF_BITS(4),
                 KILL, ALLOW},
    no_wx[] = {NUMBER, IF(SYS_mmap, 5), LOAD(ARGUMENT(2)), IF_BITS(6),
               REFUSE, ALLOW,
               IF(SYS_mprotect, 4), LOAD(ARGUMENT(2)), IF_BITS(4), REFUSE,
               ALLOW};

static void filter(struct sock_filter *code, int n)
{
    struct sock_fprog program = {n, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        wrong("seccomp: %s", strerror(errno));
}
#define FILTER(code) filter(code, sizeof code / sizeof *code)

static void caught(int signo, siginfo_t *info, void *context)
{
    selector = 0;
    wrong("SIGSYS for call %d", info->si_syscall);
}

static void call(long n)
{
    for (long i = 0; i < n; i++, n_hot++)
        if (hot(i) != (i ^ 0x5bd1e995) * 31 + (i >> 7))
            wrong("hot(%ld)", i);
}

/* For a second, compute with calls blocked, but in [allowed, allowed + n). */
static void compute_blocked(void *allowed, size_t n)
{
    uint64_t end = now_ns() + 1000000000;
    if (prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, allowed, n, &selector))
        wrong("dispatch: %s", strerror(errno));
    say("spins");
    selector = 1;
    while (now_ns() < end && selector)
        call(1);
    selector = 0;
    prctl(PR_SET_SYSCALL_USER_DISPATCH, 0, 0, 0, 0);
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "memfd";
    struct sigaction action = {.sa_sigaction = caught,
                               .sa_flags = SA_SIGINFO};
    int c;
    bounded();
    sigaction(SIGSYS, &action, NULL);
    if (!strcmp(mode, "memfd"))
        FILTER(no_memfd);
    else if (!strcmp(mode, "wx"))
        FILTER(no_wx);
    else if (!strcmp(mode, "munmap"))
        FILTER(no_munmap);
    else if (!strcmp(mode, "exec"))
        FILTER(no_exec);
    else if (!strcmp(mode, "readv"))
        FILTER(no_readv);
    say("ready");
    while ((c = command()) != 'q') {
        if (c == 'l')
            FILTER(no_munmap);
        if (c == 't' && prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT))
            wrong("seccomp: %s", strerror(errno));
        if (c == 's')
            compute_blocked(0, 0);
        else
            call(10007);
        say("hot=%ld wrong=%ld", n_hot, atomic_load(&n_wrong));
    }
    return verdict();
}
