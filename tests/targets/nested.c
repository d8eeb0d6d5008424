/* Functions in which others begin, as hand-written code has them: of two
 * that hold an address, the one that begins last is meant. The outer ones end
 * in what is no instruction.
 *
 * Commands: q quit. */
#include "target.h"

__asm__(".text\n.altmacro\n"
        ".macro one name\n.p2align 4\n.type \\name, @function\n"
        "\\name: mov $1, %eax\nmov $2, %ecx\nret\n.endm\n"
        ".macro group n\none plain\\n\n.size plain\\n, . - plain\\n\n"
        "one outer\\n\none first\\n\n.size first\\n, . - first\\n\n"
        "one second\\n\n.size second\\n, . - second\\n\n"
        ".byte 6, 6\n.size outer\\n, . - outer\\n\n.endm\n"
        ".set i, 0\n.rept 100\ngroup %i\n.set i, i + 1\n.endr\n"
        ".noaltmacro\n"
        ".p2align 4\n");

int main(void)
{
    bounded();
    say("ready");
    while (command() != 'q')
        ;
    return verdict();
}
