/* What every test target shares: bounded in time, dies with its parent,
 * takes one-letter commands on stdin, answers with one "key=value ..." line
 * on stdout, judges itself, exits non-zero if anything was wrong. */
#ifndef TARGET_H
#define TARGET_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static atomic_long n_wrong;         /* what this program found amiss */
static atomic_int quitting __attribute__((unused));

/* One line, one write: no stdio buffer that a fork could duplicate. */
static void say(const char *format, ...)
{
    char line[4000];
    va_list ap;
    va_start(ap, format);
    int n = vsnprintf(line, sizeof line - 1, format, ap);
    va_end(ap);
    line[n++] = '\n';
    if (write(1, line, n) != n)
        _exit(3);
}

/* Count an error; print the first few on stderr. */
static void wrong(const char *format, ...)
{
    char line[500];
    if (atomic_fetch_add(&n_wrong, 1) >= 20)
        return;
    va_list ap;
    va_start(ap, format);
    int n = vsnprintf(line, sizeof line - 1, format, ap);
    va_end(ap);
    line[n++] = '\n';
    if (write(2, line, n) != n)
        _exit(3);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void nap_us(long us)
{
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    if (nanosleep(&t, NULL))
        wrong("nanosleep: %s", strerror(errno));
}

/* SIGALRM is never caught: it ends a target that somebody forgot. The
 * seconds come from the environment (UBP_TEST_SECONDS). */
static void bounded(void)
{
    const char *seconds = getenv("UBP_TEST_SECONDS");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(seconds ? atoi(seconds) : 240);
}

/* The next command; 'q' at end of file. An EINTR here is an error too. */
static int command(void)
{
    char c;
    ssize_t n = read(0, &c, 1);
    if (n < 0) {
        wrong("read of a command: %s", strerror(errno));
        return ' ';
    }
    return n ? c : 'q';
}

static int verdict(void)
{
    say("wrong=%ld", atomic_load(&n_wrong));
    return n_wrong ? 1 : 0;
}

static pthread_t start(void *(*function)(void *), void *argument)
{
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    int error = pthread_create(&thread, &attributes, function, argument);
    if (error) {
        wrong("pthread_create: %s", strerror(error));
        _exit(3);
    }
    return thread;
}

#define CALLED __attribute__((noinline, noclone, used, externally_visible))
#define FUNCTION(name, body) \
    __asm__(".text\n.p2align 4\n.globl " #name "\n.type " #name \
            ",@function\n" #name ":\n" body "\n.size " #name ",.-" #name "\n")
#endif
