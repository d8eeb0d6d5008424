/* forged FILE SIZE CODE [private]: a process that claims to hold an arena of ubp.
 *
 * It tells the addresses of its arena-to-be, of a function and of data. At
 * command m it maps a memfd "ubp" of SIZE bytes that begins with what FILE
 * holds: CODE bytes as r-x, the rest as rw-; or private memory. Command j writes a jump to the
 * arena's offset CODE - 64 over its own data. c calls counted; q quit. */
#include "target.h"

CALLED long counted(long x) { return (x ^ 0x5bd1e995) * 31 + (x >> 7); }
static unsigned char data[8192] __attribute__((aligned(4096))) = {1};
static char *base;

static void map(const char *path, size_t size, size_t code)
{
    static char buffer[1 << 20];
    int file = open(path, O_RDONLY), fd = syscall(SYS_memfd_create, "ubp", 0);
    ssize_t n = read(file, buffer, sizeof buffer);
    if (ftruncate(fd, size) || n < 0 || pwrite(fd, buffer, n, 0) != n)
        wrong("memfd: %s", strerror(errno));
    if (mmap(base, code, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED, fd, 0)
        == MAP_FAILED
        || mmap(base + code, size - code, PROT_READ | PROT_WRITE,
                MAP_SHARED | MAP_FIXED, fd, code) == MAP_FAILED)
        wrong("mmap: %s", strerror(errno));
    close(file);
    say("fd=%d wrong=%ld", fd, atomic_load(&n_wrong));
}

static void map_private(const char *path, size_t size, size_t code)
{
    int file = open(path, O_RDONLY);
    if (mmap(base, size, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED
        || read(file, base, code) < 0
        || mprotect(base, code, PROT_READ | PROT_EXEC))
        wrong("mmap: %s", strerror(errno));
    close(file);
    say("fd=-1 wrong=%ld", atomic_load(&n_wrong));
}

int main(int argc, char **argv)
{
    int c;
    size_t size = atol(argv[2]), code = atol(argv[3]);
    bounded();
    base = (char *)(((uintptr_t)counted - (1ul << 30)) & -(1ul << 21));
    say("ready base=%p at=%p data=%p", base, counted, data);
    while ((c = command()) != 'q') {
        if (c == 'm' && argc > 4) {
            map_private(argv[1], size, code);
        } else if (c == 'm') {
            map(argv[1], size, code);
        } else if (c == 'j') {
            int32_t relative = base + code - 64 - (char *)(data + 5);
            data[0] = 0xe9;
            memcpy(data + 1, &relative, 4);
            say("wrong=%ld", atomic_load(&n_wrong));
        } else if (c == 'c') {
            for (long i = 0; i < 1009; i++)
                if (counted(i) != (i ^ 0x5bd1e995) * 31 + (i >> 7))
                    wrong("counted");
            say("counted=1009 wrong=%ld", atomic_load(&n_wrong));
        }
    }
    return verdict();
}
