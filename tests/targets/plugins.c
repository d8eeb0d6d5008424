/* plugins LIBRARY N: loads and unloads a library, as plugin hosts do.
 *
 * Commands, each with an answer: o load it; c call its plug 1009 times; u
 * unload it; l N times load it, call plug once, unload it; n load it into a
 * namespace of its own; t load and unload it in 4 threads at once, N / 4
 * times each; f load, call and unload it in a forked child; b call beat in
 * a thread of its own; s install a filter that kills who calls futex (2);
 * q quit. calls: how often plug has run, as the library
 * itself counts, its constructor's calls included; us: how long it took. */
#define _GNU_SOURCE
#include "target.h"
#include <dlfcn.h>
#ifdef __GLIBC__
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <stddef.h>

static void forbid_futex(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_futex, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW) };
    struct sock_fprog program = { sizeof code / sizeof *code, code };
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        wrong("seccomp");
}
#endif

enum { ROUND = 1009, THREADS = 4 };
static const char *path;
static void *library;
static atomic_long n_calls;
static long n_rounds;

/* Its own count is in memory of ours, as that of the library goes with it. */
atomic_long *plug_calls(void) { return &n_calls; }

static void *load(void)
{
    void *handle = dlopen(path, RTLD_NOW);
    if (!handle)
        wrong("%s", dlerror());
    return handle;
}

static void call(void *handle, long n)
{
    long (*plug)(long) = (long (*)(long))dlsym(handle, "plug");
    for (long i = 0; i < n; i++)
        if (!plug || plug(i) != i * 5 + 1)
            wrong("plug(%ld)", i);
}

static void unload(void *handle)
{
    if (dlclose(handle))
        wrong("dlclose");
}

CALLED long beat(long a) { return a + 1; }

static void *beats(void *argument)
{
    if (beat(41) != 42)
        wrong("beat");
    return argument;
}

static void rounds(long n)
{
    while (n--) {
        void *handle = load();
        call(handle, 1);
        unload(handle);
    }
}

static void *in_thread(void *argument)
{
    rounds(n_rounds / THREADS);
    return argument;
}

static long now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

int main(int argc, char **argv)
{
    int c, status;
    path = argv[1];
    n_rounds = atol(argv[2]);
    bounded();
    say("ready");
    while ((c = command()) != 'q') {
        long took = now_us();
        if (c == 'o') {
            library = load();
        } else if (c == 'c') {
            call(library, ROUND);
        } else if (c == 'u') {
            unload(library);
        } else if (c == 'l') {
            rounds(n_rounds);
        } else if (c == 't') {
            pthread_t threads[THREADS];
            for (int i = 0; i < THREADS; i++)
                threads[i] = start(in_thread, NULL);
            for (int i = 0; i < THREADS; i++)
                pthread_join(threads[i], NULL);
        } else if (c == 'b') {
            pthread_detach(start(beats, NULL));
        } else if (c == 'f') {
            pid_t pid = fork();
            if (pid == 0) {
                rounds(3);
                _exit(atomic_load(&n_wrong) != 0);
            }
            if (waitpid(pid, &status, 0) != pid || status)
                wrong("a child ended with %x", status);
#ifdef __GLIBC__
        } else if (c == 's') {
            forbid_futex();
        } else if (c == 'n') {
            void *handle = dlmopen(LM_ID_NEWLM, path, RTLD_NOW);
            if (!handle)
                wrong("%s", dlerror());
            else
                call(handle, ROUND);
#endif
        }
        say("calls=%ld us=%ld wrong=%ld", atomic_load(&n_calls),
            now_us() - took, atomic_load(&n_wrong));
    }
    return verdict();
}
