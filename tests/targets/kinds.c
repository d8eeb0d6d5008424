/* kinds [MODE [N]]: functions called a known number of times, in a program
 * that is built in every way a linker knows, and lives in every kind of need.
 *
 *   plain    nothing else
 *   leader   the main thread has ended; another one takes the commands
 *   threads  N threads, each of which calls counted 7 times at a command c
 *   around   no free page within 2 GiB of the program
 *   mdwe     PR_SET_MDWE: no mapping may become executable
 *   closed   not dumpable
 *   privs    no_new_privs
 *
 * Commands: c calls each function, reports how often; f forks a child that
 * calls counted 11 times; q quit. */
#include "target.h"
#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#endif

CALLED long counted(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }
long same_as_counted(long) __attribute__((alias("counted")));

#ifdef MANY                         /* many_0 ... each 16 bytes, lea; ret */
#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)
__asm__(".text\n.altmacro\n.macro one n\n.p2align 4\n.globl many_\\n\n"
        ".type many_\\n,@function\nmany_\\n: lea 1(%rdi),%rax\n ret\n"
        ".size many_\\n,.-many_\\n\n.endm\n.set i,0\n"
        ".rept " TEXT(MANY) "\none %i\n.set i,i+1\n.endr\n.noaltmacro\n");
extern char many_0[];
#else
#define MANY 0
static char many_0[1];
#endif

static size_t (*volatile strlen_call)(const char *) = strlen;
static int (*volatile clock_call)(clockid_t, struct timespec *) =
    clock_gettime;
static int n_threads;
static pthread_barrier_t begin, end;

static void call(long n, long (*function)(long))
{
    for (long i = 0; i < n; i++)
        if (function(i * 77777) != ((i * 77777) ^ 0x5bd1e995) * 31
                                   + ((i * 77777) >> 7))
            wrong("counted(%ld)", i * 77777);
}

static void call_all(void)
{
    static const char text[] = "an argument of strlen";
    struct timespec t;
    if (n_threads)
        pthread_barrier_wait(&begin);
    call(1009, counted);
    call(503, same_as_counted);
    for (int i = 0; i < 251; i++)
        if (strlen_call(text + i % 20) != sizeof text - 1 - i % 20)
            wrong("strlen");
    for (int i = 0; i < 127; i++)
        if (clock_call(CLOCK_MONOTONIC, &t) || t.tv_nsec > 999999999)
            wrong("clock_gettime");
    for (long i = 0; i < MANY; i++)
        if (((long (*)(long))(many_0 + 16 * i))(i) != i + 1)
            wrong("many_%ld", i);
    if (n_threads)
        pthread_barrier_wait(&end);
    say("counted=%d strlen=251 clock=127 many=%d wrong=%ld",
        1009 + 503 + 7 * n_threads, MANY, atomic_load(&n_wrong));
}

static void *work(void *argument)
{
    for (;;) {
        pthread_barrier_wait(&begin);
        if (quitting)
            return NULL;
        call(7, counted);
        pthread_barrier_wait(&end);
    }
}

static void fork_child(void)
{
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        call(11, counted);
        _exit(n_wrong != 0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
        wrong("a child ended with %x", status);
    say("counted=11 wrong=%ld", atomic_load(&n_wrong));
}

/* Map every gap within 3 GiB of here, but a page beside the stack. */
static void fill(void)
{
    uintptr_t here = (uintptr_t)counted & -4096ul, reach = 3ull << 30;
    uintptr_t low = here > reach ? here - reach : 65536, high = here + reach;
    uintptr_t last = low, from, to;
    char line[400];
    FILE *f = fopen("/proc/self/maps", "r");
    static struct { uintptr_t from, to; } gaps[200];
    int n = 0;
    while (f && fgets(line, sizeof line, f)) {
        sscanf(line, "%lx-%lx", &from, &to);
        if (from > last && last < high)
            gaps[n].from = last, gaps[n++].to = from < high ? from : high;
        if (to > last)
            last = to;
    }
    fclose(f);
    for (int i = 0; i < n; i++)
        if (mmap((void *)gaps[i].from, gaps[i].to - gaps[i].from, PROT_NONE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
                 -1, 0) == MAP_FAILED)
            wrong("mmap of [%lx, %lx): %s", gaps[i].from, gaps[i].to,
                  strerror(errno));
}

static void *serve(void *leader)
{
    int c, mdwe = 0;
    const char *mode = leader;
    if (!strcmp(mode, "leader"))
        nap_us(20000);
    if (!strcmp(mode, "around"))
        fill();
    if (!strcmp(mode, "mdwe"))
        mdwe = prctl(PR_SET_MDWE, 1, 0, 0, 0) == 0;
    if (!strcmp(mode, "closed") && prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
        wrong("PR_SET_DUMPABLE: %s", strerror(errno));
    if (!strcmp(mode, "privs") && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        wrong("PR_SET_NO_NEW_PRIVS: %s", strerror(errno));
    say("ready pid=%d tid=%ld at=%p strlen=%p mdwe=%d", getpid(),
        syscall(SYS_gettid), counted, strlen_call, mdwe);
    while ((c = command()) != 'q') {
        if (c == 'c')
            call_all();
        else if (c == 'f')
            fork_child();
    }
    quitting = 1;
    if (n_threads)
        pthread_barrier_wait(&begin);
    exit(verdict());
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "plain";
    bounded();
    if (!strcmp(mode, "threads")) {
        n_threads = atoi(argv[2]);
        pthread_barrier_init(&begin, NULL, n_threads + 1);
        pthread_barrier_init(&end, NULL, n_threads + 1);
        for (int i = 0; i < n_threads; i++)
            start(work, NULL);
    }
    if (!strcmp(mode, "leader")) {
        start(serve, "leader");
        pthread_exit(NULL);
    }
    serve((void *)mode);
}
