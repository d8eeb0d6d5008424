// stacks_cxx: exceptions, destructors, templates and virtual calls on the
// stack. Command w: work, then exit; n: stay in a catch block that is deep.
#include <unistd.h>
#include <sys/prctl.h>
#include <signal.h>
#include <stdlib.h>
#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define KEPT __attribute__((noinline, used))
static volatile long sink;

struct Guard {
    long value;
    explicit Guard(long value) : value(value) {}
    KEPT ~Guard() { sink += value; }
};

struct Shape {
    virtual ~Shape() {}
    virtual long area(long n) = 0;
};

struct Square : Shape {
    KEPT long area(long n) override
    {
        Guard guard(n);
        if (n > 3)
            throw std::runtime_error("too large a square: " +
                                     std::to_string(n));
        return n * n;
    }
};

KEPT static long descend(Shape &shape, long n)
{
    Guard guard(n);
    std::string text(n * 10, 'x');
    return n > 4 ? shape.area(n) : descend(shape, n + 1) + text.size();
}

KEPT static void stay()
{
    if (write(1, "deep\n", 5) != 5)
        _exit(1);
    for (;;)
        pause();
}

KEPT static long caught(long n, bool stays)
{
    try {
        std::unique_ptr<Shape> shape(new Square);
        return descend(*shape, n);
    } catch (const std::runtime_error &error) {
        if (stays)
            stay();
        return std::string(error.what()).size();
    }
}

extern "C" KEPT long work(bool stays)
{
    std::map<std::string, std::vector<long>> table;
    for (long i = 0; i < 3; i++)
        table[std::to_string(i * 7919)].push_back(i);
    std::vector<long> values{5, 2, 9, 1};
    std::sort(values.begin(), values.end(),
              [](long a, long b) { sink += a; return a < b; });
    std::function<long(long)> twice = [&](long n) {
        return caught(n, stays) + values[0]; };
    return twice(2) + table.size();
}

int main()
{
    char c;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(atoi(getenv("UBP_TEST_SECONDS") ?: "60"));
    if (write(1, "ready\n", 6) != 6)
        return 1;
    while (read(0, &c, 1) == 1) {
        sink += work(c == 'n');
        if (c == 'w')
            break;
    }
    return 0;
}
