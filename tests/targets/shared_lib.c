/* A library that needs no relocation: foreign maps it MAP_SHARED, dl loads,
 * unloads and reloads it. */
__attribute__((noinline)) long shared_hot(long x)
{
    long y = x * 3;
    __asm__ volatile("" : "+r"(y));
    return y + 5;
}
