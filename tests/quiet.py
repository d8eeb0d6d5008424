"""CPU time as it would be if no neighbour shared the core.

A busy hyperthread, a full cache and a throttled clock double the CPU time
of the same work. So a loop of known length is timed beside each run: what
it takes longer than on the quiet machine that our numbers were stated on,
the work took longer too, and so it is with an interpreter slower than
CPython 3.11. There, and on a faster machine, nothing changes.
"""
import statistics
import time

# CPU seconds of yardstick() on that machine, where nothing else runs:
# CPython 3.11 on an AMD EPYC at 2.1 GHz, the best of 1000.
YARD = 0.0054


def yardstick():
    """What interpreters do all day: small numbers, a dict, a loop."""
    table = {}
    for n in range(30000):
        table[n & 1023] = table.get(n >> 3 & 1023, 0) + n


def cpu_seconds(work):
    """Return (CPU seconds of this process for work(), its result)."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def quiet_seconds(work, runs=9):
    """Return (CPU seconds of work() as on a quiet machine, its last result).

    The best of some runs, or what the median run is in yardsticks around it.
    """
    times, ratios = [], []
    for _ in range(runs):
        before, _ = cpu_seconds(yardstick)
        seconds, result = cpu_seconds(work)
        behind, _ = cpu_seconds(yardstick)
        times.append(seconds)
        ratios.append(2 * seconds / (before + behind))
    return min(min(times), YARD * statistics.median(ratios)), result
