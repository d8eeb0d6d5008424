"""python3 tests/soak.py [CYCLES]: attach, probe, remove, detach a busy target
CYCLES times (10 000), and look for leaks in the target and in ourselves.

Prints a line each twentieth part of the work; exit status 1 at any leak,
wrong value or difference. Run by `make soak`, never by the default tests.
"""
import collections
import gc
import sys
import time
import unittest

import live

SITES = ["exe:hot", "exe:tiny", "exe:keep", "exe:marked"]
LARGE = "libc:labs"         # in a module whose scan takes most of a cycle
LARGE_EACH = 8              # cycles

# What may have grown since the first tenth, KiB and numbers. An object of
# Python that is left at each cycle shows in blocks, whatever malloc does;
# the resident size swings by some MiB and tells of memory outside of them.
ALLOWED = collections.OrderedDict([
    ("target KiB", 256), ("target maps", 0), ("target fds", 0),
    ("target threads", 0), ("KiB", 8192), ("maps", 8), ("fds", 0),
    ("threads", 0), ("blocks", 500)])


def resident(pid):
    """(RSS in KiB, number of mappings, of descriptors, of threads)."""
    return (int(live.status(pid)["VmRSS"].split()[0]), len(live.maps(pid)),
            len(live.descriptors(pid)), len(live.threads(pid)))


def measure(pid):
    """What ALLOWED names, of the target and of this process."""
    gc.collect()
    blocks = sys.getallocatedblocks()
    return resident(pid) + resident("self") + (blocks,)


def one_cycle(ubp, process, n):
    """Attach, probe, remove, detach or close."""
    try:
        with ubp.attach(process.pid) as target:
            probe = target.probe(
                SITES + ([] if n % LARGE_EACH else [LARGE]), ubp.Count())
            probe.read()
            probe.remove()
            if n % 2:
                target.detach()
    except ubp.UbpError as error:
        raise live.Wrong("cycle %d: %s; %s" % (n, error, process.account(
            "ended" if process.has_ended() else "lives")))


def main(arguments):
    ubp = live.core()
    cycles = int(arguments[0]) if arguments else 10000
    judge = unittest.TestCase()
    with live.Target("busy", 2, seconds=120 + 2 * cycles) as process:
        before = live.Snapshot(process.pid)
        process.send("g")
        first, begun = None, time.monotonic()
        for n in range(1, cycles + 1):
            one_cycle(ubp, process, n)
            if n % max(1, cycles // 20) == 0:
                now = measure(process.pid)
                first = first or (now if n >= cycles // 10 else None)
                print("cycle %6d %7.1f s  %s" % (
                    n, time.monotonic() - begun, ", ".join(
                        "%s %d" % pair for pair in zip(ALLOWED, now))),
                    flush=True)
        last = measure(process.pid)
        process.ask("p")
        live.Snapshot(process.pid).compare(judge, before)
        process.quit()
    grown = [b - a for a, b in zip(first, last)]
    leaks = ["%s %d" % (name, n) for (name, most), n
             in zip(ALLOWED.items(), grown) if n > most]
    print("grown by: %s\n%s" % (
        ", ".join("%s %d" % pair for pair in zip(ALLOWED, grown)),
        "LEAK: " + ", ".join(leaks) if leaks else "no leak"))
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
