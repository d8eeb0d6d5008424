/* children MODE: threads and processes that come and go.
 *
 *   forks    command f: fork four children, each calls hot 1009 times and
 *            stays until command w; command k: a child that forks a child
 *   threads  a storm: threads are created, call hot, and end
 *   storm    a storm of forks; each child calls hot and exits
 *   spawn    a storm of fork + exec of /bin/true
 *   exec     command x: this process executes itself anew (argument: again)
 *
 * Commands: r report; q quit. */
#include "target.h"

enum { CALLS = 1009 };
CALLED long hot(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }
static atomic_long n_hot, n_rounds;
static int parked;
static atomic_int is_parked;

static void call(long n)
{
    for (long i = 0; i < n; i++)
        if (hot(i * 77777) != ((i * 77777) ^ 0x5bd1e995) * 31
                              + ((i * 77777) >> 7))
            wrong("hot(%ld)", i);
}

static void *brief(void *argument)
{
    call(7);
    return (void *)7;
}

static void storm_of_threads(void)
{
    pthread_t t[4];
    void *value;
    for (int i = 0; i < 4; i++)
        t[i] = start(brief, NULL);
    for (int i = 0; i < 4; i++) {
        if (pthread_join(t[i], &value) || value != (void *)7)
            wrong("a thread returned %p", value);
        n_hot += 7;
    }
}

static void storm_of_forks(int and_exec)
{
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        call(11);
        if (and_exec)
            execl("/bin/true", "true", NULL);
        _exit(n_wrong ? 9 : 0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
        wrong("a child ended with %x", status);
    n_hot += 11;
}

static void *storm(void *argument)
{
    const char *mode = argument;
    while (!quitting) {
        is_parked = parked;
        if (parked) {
            nap_us(500);
            continue;
        }
        if (mode[0] == 't')
            storm_of_threads();
        else
            storm_of_forks(mode[1] == 'p');
        n_rounds++;
    }
    return NULL;
}

static int to_child[2], from_child[2];

/* A child calls, says its pid, and waits until its pipe is closed. With a
 * depth it has a child of its own. */
static void child(int depth)
{
    char c;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(to_child[1]);
    for (; depth; depth--)
        if (fork())
            break;
    call(CALLS);
    dprintf(from_child[1], "%8d", n_wrong ? -1 : getpid());
    if (read(to_child[0], &c, 1) != 0)
        _exit(8);
    call(10);
    if (depth)
        wait(NULL);
    _exit(n_wrong ? 9 : 0);
}

static void fork_children(int n, int depth)
{
    char line[300] = "children=", pid[9] = "";
    if (pipe(to_child) || pipe(from_child))
        wrong("pipe");
    for (int i = 0; i < n; i++)
        if (fork() == 0)
            child(depth);
    for (int i = 0; i < n * (depth + 1); i++) {
        if (read(from_child[0], pid, 8) != 8 || atoi(pid) < 0)
            wrong("a child saw a wrong value");
        sprintf(line + strlen(line), "%s%d", i ? "," : "", atoi(pid));
        n_hot += CALLS;
    }
    say("%s hot=%ld", line, atomic_load(&n_hot));
}

static void end_children(void)
{
    int status, n = 0;
    close(to_child[1]);
    close(to_child[0]);
    while (wait(&status) > 0) {
        n++;
        if (status)
            wrong("a child ended with %x", status);
    }
    close(from_child[0]);
    close(from_child[1]);
    say("ended=%d wrong=%ld", n, atomic_load(&n_wrong));
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "forks";
    pthread_t thread = 0;
    int c;
    bounded();
    if (strcmp(mode, "forks") && strcmp(mode, "exec"))
        thread = start(storm, (void *)mode);
    nap_us(10000);
    say("ready again=%d", argc > 2);
    while ((c = command()) != 'q') {
        if (c == 'f') {
            fork_children(4, 0);
        } else if (c == 'k') {
            fork_children(1, 1);
        } else if (c == 'w') {
            end_children();
        } else if (c == 'c') {
            call(CALLS);
            n_hot += CALLS;
            say("hot=%ld wrong=%ld", n_hot, atomic_load(&n_wrong));
        } else if (c == 'p' || c == 'g') {
            parked = c == 'p';
            while (thread && is_parked != parked)
                nap_us(500);
            say("hot=%ld rounds=%ld wrong=%ld", n_hot, n_rounds,
                atomic_load(&n_wrong));
        } else if (c == 'r') {
            say("hot=%ld rounds=%ld wrong=%ld", n_hot, n_rounds,
                atomic_load(&n_wrong));
        } else if (c == 'x') {
            execl("/proc/self/exe", argv[0], mode, "again", NULL);
            wrong("execl: %s", strerror(errno));
        }
    }
    quitting = 1;
    if (thread)
        pthread_join(thread, NULL);
    return verdict();
}
