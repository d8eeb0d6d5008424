/* life: calls, accesses to memory, threads and children, in prime numbers,
 * each only when it is told to: so that whoever counts them can be judged.
 *
 * Commands, each with an answer: c calls of step; w writes to counter; r
 * reads of it; z system calls that write to buffer; t calls in new threads;
 * f calls in a forked child; v in one that then becomes another program;
 * + adds 3 to total in memory; x ends the main thread: another one answers
 * from then on, to c, t and q; q quit. */
#include "target.h"

enum { CALLS = 1009, WRITES = 101, READS = 53, FILLS = 7, THREADS = 4,
       EACH = 211, CHILD = 307 };
volatile long counter, total;
int odd_sized[3];
char buffer[64];
__thread long own;
CALLED long step(long a, long b) { return a * 3 + b + own; }

static void call(long n)
{
    for (long i = 0; i < n; i++)
        if (step(i, n) != i * 3 + n)
            wrong("step(%ld)", i);
}

static void *in_thread(void *argument)
{
    call(EACH);
    return argument;
}

static void in_threads(void)
{
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        threads[i] = start(in_thread, NULL);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

static void in_child(int and_exec)
{
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        call(CHILD);
        if (and_exec)
            execl("/bin/true", "true", NULL);
        _exit(n_wrong != 0);
    }
    if (waitpid(pid, &status, 0) != pid || status)
        wrong("a child ended with %x", status);
}

static void *outlive(void *main_thread)
{
    int c = 'x';
    pthread_join(*(pthread_t *)main_thread, NULL);
    nap_us(20000);                  /* it is joined before it has ended */
    do {
        if (c == 'c')
            call(CALLS);
        else if (c == 't')
            in_threads();
        say("n=%d wrong=%ld", c == 'c' ? CALLS : c == 't' ? THREADS * EACH : 0,
            atomic_load(&n_wrong));
    } while ((c = command()) != 'q');
    exit(verdict());
}

int main(void)
{
    pthread_t self = pthread_self();
    int c, zero = open("/dev/zero", O_RDONLY);
    long sum = 0;
    bounded();
    say("ready counter=%p step=%p", (void *)&counter, (void *)step);
    while ((c = command()) != 'q') {
        long n = 0;
        if (c == 'c') {
            call(n = CALLS);
        } else if (c == 'w') {
#pragma GCC unroll 1                    /* one instruction writes all */
            for (; n < WRITES; n++)
                counter = n * 7;
        } else if (c == 'r') {
            for (; n < READS; n++)
                sum += counter;
        } else if (c == 'z') {
            for (; n < FILLS; n++)
                if (read(zero, buffer, sizeof buffer) != sizeof buffer)
                    wrong("read of /dev/zero");
        } else if (c == '+') {
            __asm__ volatile("addq $3, %0" : "+m"(total) :: "cc");
            sum = total;
        } else if (c == 't') {
            in_threads();
            n = THREADS * EACH;
        } else if (c == 'f' || c == 'v') {
            in_child(c == 'v');
            n = CHILD;
        } else if (c == 'x') {
            start(outlive, &self);
            pthread_exit(NULL);
        }
        say("n=%ld wrong=%ld sum=%ld", n, atomic_load(&n_wrong), sum);
    }
    return verdict();
}
