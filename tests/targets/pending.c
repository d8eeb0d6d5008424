/* pending: a thread that waits with SIGTRAP blocked and pending, with the
 * siginfo that an int3 has. A test lets it come, and says where it came.
 * Its "ready" line tells where that may be, and where to go on: there it
 * says that it has come by, and takes q to quit. */
#include "target.h"

long at(void);
void onward(void);
FUNCTION(at, "nop\n nop\n ud2");
FUNCTION(onward, "and $-16,%rsp\n call finish\n ud2");

CALLED void finish(void)
{
    say("n=1 wrong=%ld", atomic_load(&n_wrong));
    while (command() != 'q')
        ;
    _exit(verdict());
}

int main(void)
{
    siginfo_t info = {.si_signo = SIGTRAP, .si_code = SI_KERNEL};
    sigset_t set;
    bounded();
    sigemptyset(&set), sigaddset(&set, SIGTRAP);
    sigprocmask(SIG_BLOCK, &set, NULL);
    if (syscall(SYS_rt_tgsigqueueinfo, getpid(), getpid(), SIGTRAP, &info))
        wrong("rt_tgsigqueueinfo: %s", strerror(errno));
    say("ready at=%lx onward=%lx", (long)at, (long)onward);
    for (;;)
        nap_us(60000000);
}
