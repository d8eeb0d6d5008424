/* unmaps LIBRARY: does to its own text, and to memory that it did not map,
 * what no program should, while probes are in it.
 *
 * Commands, each with an answer: c calls; a unmaps memfds named ubp;
 * n makes victim's page PROT_NONE; w makes it writable; x executable again;
 * o overwrites victim's first bytes with code of its own; g gives the
 * library's text to anonymous memory, full of int3; d unloads it, and has such
 * memory where its text was, that cannot be executed, m pages of this program;
 * h tells how much of the int3s is there still; q quit. */
#include "target.h"
#include <dlfcn.h>

__asm__(".text\n.p2align 12\n.globl victim\n.type victim,@function\n"
        "victim: lea 1(%rdi),%rax\n nop\n nop\n nop\n nop\n ret\n"
        ".size victim,.-victim\n.p2align 12\n");
long victim(long);
CALLED long bystander(long n) { return n * 7; }

static long added = 1;
static long (*shared_hot)(long);
static char *stolen;

static void call(void)
{
    for (long i = 0; i < 101; i++)
        if (victim(i) != i + added || bystander(i) != i * 7)
            wrong("victim(%ld)", i);
    for (long i = 0; i < 101 && !stolen; i++)
        if (shared_hot(i) != i * 3 + 5)
            wrong("shared_hot(%ld)", i);
}

/* Unmaps what is named ubp, or finds the text that holds a vaddr. */
static void maps(void (*found)(char *, size_t), uintptr_t vaddr)
{
    char line[512], name[256], perms[8];
    unsigned long low, high;
    FILE *file = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, file)) {
        name[0] = 0;
        sscanf(line, "%lx-%lx %7s %*s %*s %*s %255s", &low, &high, perms,
               name);
        if (vaddr ? low <= vaddr && vaddr < high
                  : !strncmp(name, "/memfd:ubp", 10))
            found((char *)low, high - low);
    }
    fclose(file);
}

static void unmap(char *start, size_t size)
{
    if (munmap(start, size))
        wrong("munmap");
}

static void steal_as(char *start, size_t size, int protection)
{
    stolen = mmap(start, size, protection,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    memset(stolen, 0xcc, size);
}

static void steal(char *start, size_t size)
{
    steal_as(start, size, PROT_READ | PROT_WRITE | PROT_EXEC);
}

static void *library;

static void reuse(char *start, size_t size)
{
    if (dlclose(library))
        wrong("dlclose");
    steal_as(start, size, PROT_READ | PROT_WRITE);
}

static void map_file(char *start, size_t size)
{
    int fd = open("/proc/self/exe", O_RDONLY);
    if (dlclose(library))
        wrong("dlclose");
    stolen = mmap(start, size, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 0);
    close(fd);
}

static long n_kept;

static void look(char *start, size_t size)
{
    for (size_t n = 0; n < size; n++)
        n_kept += start[n] == (char)0xcc;
    n_kept -= size;
}

int main(int argc, char **argv)
{
    int c;
    library = dlopen(argv[1], RTLD_NOW);
    bounded();
    shared_hot = (long (*)(long))dlsym(library, "shared_hot");
    say("ready");
    while ((c = command()) != 'q') {
        char *page = (char *)victim;
        switch (c) {
        case 'c': call(); break;
        case 'a': maps(unmap, 0); break;
        case 'n': mprotect(page, 4096, PROT_NONE); break;
        case 'w': mprotect(page, 4096, PROT_READ | PROT_WRITE); break;
        case 'x': mprotect(page, 4096, PROT_READ | PROT_EXEC); break;
        case 'o':
            mprotect(page, 4096, PROT_READ | PROT_WRITE);
            memcpy(page, "\x8d\x47\x02\xc3\x90", 5);  /* lea 2(%rdi),%eax; ret */
            mprotect(page, 4096, PROT_READ | PROT_EXEC);
            added = 2;
            break;
        case 'g': maps(steal, (uintptr_t)shared_hot); break;
        case 'd': maps(reuse, (uintptr_t)shared_hot); break;
        case 'm': maps(map_file, (uintptr_t)shared_hot); break;
        case 'h': maps(look, (uintptr_t)shared_hot); break;
        }
        say("kept=%ld wrong=%ld", n_kept, atomic_load(&n_wrong));
    }
    _exit(verdict());           /* the library's own end may be gone */
}
