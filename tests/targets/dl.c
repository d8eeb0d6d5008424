/* dl LIBRARY: calls shared_hot of a library that it can unload and reload.
 *
 * Commands: c call it 1009 times; u unload; l load again; q quit. */
#include "target.h"
#include <dlfcn.h>

static void *library;
static long (*shared_hot)(long);

static void load(const char *path)
{
    library = dlopen(path, RTLD_NOW);
    if (!library)
        wrong("%s", dlerror());
    else
        shared_hot = (long (*)(long))dlsym(library, "shared_hot");
    say("at=%p wrong=%ld", shared_hot, atomic_load(&n_wrong));
}

int main(int argc, char **argv)
{
    long n_calls = 0;
    int c;
    bounded();
    load(argv[1]);
    say("ready");
    while ((c = command()) != 'q') {
        if (c == 'c') {
            for (long i = 0; i < 1009; i++, n_calls++)
                if (shared_hot(i) != i * 3 + 5)
                    wrong("shared_hot(%ld)", i);
            say("calls=%ld wrong=%ld", n_calls, atomic_load(&n_wrong));
        } else if (c == 'u') {
            if (dlclose(library))
                wrong("dlclose");
            say("wrong=%ld", atomic_load(&n_wrong));
        } else if (c == 'l') {
            load(argv[1]);
        }
    }
    return verdict();
}
