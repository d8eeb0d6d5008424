/* A library whose constructor calls its own function 53 times, through a
 * pointer that the loader has to relocate. In a program that exports
 * plug_calls, that function counts its calls there. */
#include <stdatomic.h>
atomic_long *plug_calls(void) __attribute__((weak));
static atomic_long *counter;

__attribute__((noinline)) long plug(long x)
{
    long y = x * 5;
    __asm__ volatile("" : "+r"(y));
    if (counter)
        atomic_fetch_add(counter, 1);
    return y + 1;
}

long (*const volatile pointer)(long) = plug;

__attribute__((constructor)) static void construct(void)
{
    if (plug_calls)
        counter = plug_calls();
    for (long i = 0; i < 53; i++)
        pointer(i);
}
