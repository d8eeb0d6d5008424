"""python3 tests/soak.py [CYCLES]: attach, probe, remove, detach a busy target
CYCLES times (10 000), and look for leaks in the target and in ourselves.

Prints a line each twentieth part of the work; exit status 1 at any leak,
wrong value or difference. Run by `make soak`, never by the default tests.
"""
import gc
import sys
import time
import unittest

import live

SITES = ["exe:hot", "exe:tiny", "exe:keep", "exe:marked", "libc:labs"]


def resident(pid):
    """(RSS in KiB, number of mappings, of descriptors, of threads)."""
    return (int(live.status(pid)["VmRSS"].split()[0]), len(live.maps(pid)),
            len(live.descriptors(pid)), len(live.threads(pid)))


def one_cycle(ubp, process, must_detach):
    """Attach, probe, remove, close. -> the longest pause, microseconds"""
    try:
        with ubp.attach(process.pid) as target:
            probe = target.probe(SITES, ubp.Count())
            probe.read()
            probe.remove()
            if must_detach:
                target.detach()
            return target.pause_us
    except ubp.UbpError as error:
        raise live.Wrong("%s; %s" % (error, process.account(
            "ended" if process.has_ended() else "lives")))


def main(arguments):
    ubp = live.core()
    cycles = int(arguments[0]) if arguments else 10000
    seconds = 120 + cycles
    judge = unittest.TestCase()
    own = []
    with live.Target("busy", 2, seconds=seconds) as process:
        before = live.Snapshot(process.pid)
        process.send("g")
        first = None
        begun, longest = time.monotonic(), 0.0
        for cycle in range(1, cycles + 1):
            longest = max(longest, one_cycle(ubp, process, cycle % 2))
            if cycle == min(500, cycles // 2):
                gc.collect()
                first = resident(process.pid), resident("self")
            if cycle % max(1, cycles // 20) == 0:
                own.append(resident("self"))
                print("cycle %6d  %6.1f s  target %s  tracer %s  longest "
                      "pause %.0f us" % (cycle, time.monotonic() - begun,
                                         resident(process.pid), own[-1],
                                         longest), flush=True)
        gc.collect()
        last = resident(process.pid), resident("self")
        process.ask("p")
        live.Snapshot(process.pid).compare(judge, before)
        process.quit()
    print("after warming up: target %s, tracer %s; at the end: %s, %s"
          % (first + last))
    grown = [last[i][k] - first[i][k] for i in (0, 1) for k in range(4)]
    allowed = [256, 0, 0, 0, 2048, 4, 0, 0]     # malloc's own play
    leaks = [n for n, most in zip(grown, allowed) if n > most]
    print("grown (KiB, mappings, descriptors, threads): %s: %s"
          % (grown, "LEAK" if leaks else "no leak"))
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
