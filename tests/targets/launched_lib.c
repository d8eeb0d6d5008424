/* A library with a constructor, which runs before the program's entry. */
__attribute__((noinline)) long library_counted(long x)
{
    return x * 3 + 5;
}

static volatile long sink;

__attribute__((constructor)) static void at_load(void)
{
    for (int i = 0; i < 17; i++)
        sink = library_counted(i);
}
