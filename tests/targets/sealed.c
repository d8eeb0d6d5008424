/* sealed MODE: targets under seccomp. They count for about the time that
 * argv[2] gives in ms, or until 'q', and check themselves.
 *
 *   strict   SECCOMP_MODE_STRICT
 *   kill     a filter that kills at any call but read, write, exit, nanosleep
 *   errno    the same, with EPERM instead
 *   trap     the same, with a SIGSYS that is caught, as browsers do
 *   allow    a filter that allows everything
 *
 * Commands: r report; q quit. */
#include "target.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>

CALLED long hot(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }
static long n_hot;

static void on_sigsys(int signo)
{
    wrong("signal %d", signo);
}

static void filter(uint32_t otherwise)
{
    static const int allowed[] = {SYS_read, SYS_write, SYS_exit,
                                  SYS_exit_group, SYS_nanosleep,
                                  SYS_rt_sigreturn};
    struct sock_filter code[40];
    int n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(
        BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < 6; i++) {
        code[n++] = (struct sock_filter)BPF_JUMP(
            BPF_JMP | BPF_JEQ | BPF_K, allowed[i], 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K,
                                                 SECCOMP_RET_ALLOW);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, otherwise);
    struct sock_fprog program = {n, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        wrong("seccomp: %s", strerror(errno));
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "allow";
    char c;
    bounded();
    say("ready");
    if (mode[0] == 's') {
        if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT))
            wrong("seccomp: %s", strerror(errno));
    } else {
        signal(SIGSYS, on_sigsys);
        filter(mode[0] == 't' ? SECCOMP_RET_TRAP
               : mode[0] == 'k' ? SECCOMP_RET_KILL_PROCESS
               : mode[0] == 'e' ? SECCOMP_RET_ERRNO | EPERM
               : SECCOMP_RET_ALLOW);
    }
    do {
        ssize_t n = read(0, &c, 1);
        if (n < 0)
            wrong("read");
        if (n <= 0)
            break;
        for (long i = 0; i < 10007; i++, n_hot++)
            if (hot(i) != (i ^ 0x5bd1e995) * 31 + (i >> 7))
                wrong("hot(%ld)", i);
        if (c == 'r')
            say("hot=%ld wrong=%ld", n_hot, atomic_load(&n_wrong));
    } while (c != 'q');
    say("wrong=%ld", atomic_load(&n_wrong));
    syscall(SYS_exit, n_wrong ? 1 : 0);
}
