/* foreign: functions whose entries somebody else jumps into, or whose windows
 * cross a page; code in a shared mapping (argv[1]: a library file, argv[2]:
 * the vaddr of shared_hot in it).
 *
 * Commands: r call everything, report; q quit. */
#include "target.h"
#include <sys/stat.h>

/* entered_rel32 is entered at +3 by jumper, entered_rel8 at +3 by its
 * neighbour, entered_call at +1 by a call; plain is entered at +5 only. */
FUNCTION(entered_rel32, "mov %rdi,%rax\n .Linside_rel32: add $5,%rax\n"
                        "add $1,%rax\n ret");
FUNCTION(jumper, "lea 100(%rdi),%rax\n jmp .Linside_rel32\n");
FUNCTION(entered_rel8, "mov %rdi,%rax\n .Linside_rel8: add $6,%rax\n ret");
FUNCTION(jumper8, "lea 50(%rdi),%rax\n .byte 0xeb\n"
                  ".byte .Linside_rel8-.-1\n");
FUNCTION(entered_call, "nop\n .Linside_call: lea 7(%rdi),%rax\n nop\n ret");
FUNCTION(caller, "call .Linside_call\n add $1000,%rax\n ret");
FUNCTION(entered_jcc, "xor %eax,%eax\n .Linside_jcc: lea 9(%rdi,%rax),%rax\n"
                      "ret");
FUNCTION(jumper_jcc, "mov $3,%eax\n test %rdi,%rdi\n jne .Linside_jcc\n"
                     "mov $-1,%rax\n ret");
FUNCTION(plain, "mov %rdi,%rax\n shl $1,%rax\n .Linside_plain: add $8,%rax\n"
                "ret");
FUNCTION(jumper_plain, "mov $64,%eax\n jmp .Linside_plain\n");
/* The first three bytes are the last ones of a page. */
__asm__(".text\n.p2align 12\n.skip 4093,0xcc\n.globl crossing\n"
        ".type crossing,@function\ncrossing: mov %rdi,%rax\n add $3,%rax\n"
        "shl $1,%rax\n ret\n.size crossing,.-crossing\n");
/* A loop back to +2, inside of the window. */
FUNCTION(looping, "xor %eax,%eax\n 1: add %edi,%eax\n dec %edi\n jnz 1b\n"
                  "ret");

long entered_rel32(long), jumper(long), entered_rel8(long), jumper8(long),
     entered_call(long), caller(long), entered_jcc(long), jumper_jcc(long),
     plain(long), jumper_plain(long), crossing(long), looping(long);

static const struct { long (*function)(long); long argument, value;
                      const char *name; } CASES[] = {
    {entered_rel32, 10, 16, "entered_rel32"}, {jumper, 10, 116, "jumper"},
    {entered_rel8, 10, 16, "entered_rel8"}, {jumper8, 10, 66, "jumper8"},
    {entered_call, 10, 17, "entered_call"}, {caller, 10, 1017, "caller"},
    {entered_jcc, 10, 19, "entered_jcc"}, {jumper_jcc, 10, 22, "jumper_jcc"},
    {jumper_jcc, 0, -1, "jumper_jcc"}, {plain, 10, 28, "plain"},
    {jumper_plain, 1, 72, "jumper_plain"}, {crossing, 10, 26, "crossing"},
    {looping, 10, 55, "looping"},
};
enum { N = sizeof CASES / sizeof *CASES };

int main(int argc, char **argv)
{
    long (*shared)(long) = NULL;
    long n_shared = 0;
    int c;
    bounded();
    if (argc > 2) {
        struct stat s;
        int fd = open(argv[1], O_RDWR);
        fstat(fd, &s);
        char *base = mmap(NULL, s.st_size, PROT_READ | PROT_EXEC, MAP_SHARED,
                          fd, 0);
        close(fd);
        if (base == MAP_FAILED)
            wrong("mmap: %s", strerror(errno));
        else
            shared = (long (*)(long))(base + strtol(argv[2], NULL, 0));
    }
    say("ready shared=%p", shared);
    while ((c = command()) != 'q') {
        for (int turn = 0; turn < 101; turn++) {
            for (int i = 0; i < N; i++) {
                long value = CASES[i].function(CASES[i].argument);
                if (value != CASES[i].value)
                    wrong("%s(%ld) is %ld", CASES[i].name, CASES[i].argument,
                          value);
            }
            if (shared && (n_shared++, shared(turn) != turn * 3 + 5))
                wrong("shared_hot");
        }
        say("shared=%ld wrong=%ld", n_shared, atomic_load(&n_wrong));
    }
    return verdict();
}
