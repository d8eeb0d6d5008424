"""What a target could see of each strategy, and what a kill -9 leaves.

    python3 tests/bench/transparency.py

The trade-off of 2010 ("so we have a tradeoff between transparency and
speed"), with numbers: every cell is measured on tests/targets/life.c.

    ns/hit   what a call takes longer            call   how many times longer
    text     bytes of its text that differ from the file: a checksum tells
    vmas     lines that /proc/self/maps has more
    DRs      debug registers that are left of four: perf_event_open(2) and
             ptrace(2) tell
"""
import contextlib
import os
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.dirname(HERE)]

import live            # noqa: E402
import ubp             # noqa: E402

ROUNDS = 9
_RESOLUTION_NS = 20     # of this measurement; `make bench count` has cycles
ARMED = ("t = ubp.attach(%d)\n"
         "t.probe('exe:step', ubp.Count(), strategy=%r)\n"
         "g = t._guardian\n"
         "print('armed', g.process.pid if g else 0, flush=True)\n"
         "time.sleep(60)\n")


# A row | the strategy | UBP_ARENA
ROWS = """
jump         | jump      | auto
jump, slack  | jump      | slack
int3         | int3      | auto
hw           | hw        | auto
hw-ptrace    | hw-ptrace | auto
"""


@contextlib.contextmanager
def arena_kind(kind):
    """Have arenas made of that kind meanwhile."""
    before = os.environ.get("UBP_ARENA", "auto")
    os.environ["UBP_ARENA"] = kind
    try:
        yield
    finally:
        os.environ["UBP_ARENA"] = before


def seconds_per_call(process):
    """The shortest of some rounds of calls, over the number of calls."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        n = process.ask("c")["n"]
        best = min(best, (time.perf_counter() - began) / n)
    return best


def what_is_left(strategy, both):
    """What a kill -9 of the tracer, or of its guardian too, does. -> text"""
    with live.Target("life") as process:
        with live.python(ARMED % (process.pid, strategy)) as tracer:
            guardian = int(tracer.line().split()[1])
            if both and guardian:
                os.kill(guardian, signal.SIGKILL)
            tracer.process.kill()
            tracer.wait()
        live.settled(lambda: not live.tracers(process.pid), 10)
        live.settled(lambda: not live.changed_text(process.pid), 1)
        try:
            process.ask("c", 10)
        except live.Wrong:
            return "target dead (signal %d)" % -process.process.wait()
        n = len(live.changed_text(process.pid))
        return "lives, %s" % ("text as in its file" if n == 0 else
                              "%d bytes stay, ubp clean" % n)


def row(name, strategy):
    """The cells of one row, measured."""
    with live.Target("life") as process:
        base, before = seconds_per_call(process), live.Snapshot(process.pid)
        with ubp.attach(process.pid) as target:
            probe = target.probe("exe:step", ubp.Count(), strategy=strategy)
            now = seconds_per_call(process)
            cost = now - base
            if probe.read() != ROUNDS * 1009:
                raise RuntimeError("%d hits" % probe.read())
            after, n_free = live.Snapshot(process.pid), ubp.n_free_registers(
                process.pid, int(process.ready["counter"], 16))
        process.quit()
    return [name, "< %d" % _RESOLUTION_NS if cost * 1e9 < _RESOLUTION_NS
            else "%.0f" % (cost * 1e9), "%.0f x" % max(1, now / base),
            "%d" % len(after.text),
            "%d" % len([m for m in after.maps if m not in before.maps]),
            "%d" % n_free, "yes" if after.tracers else "no",
            what_is_left(strategy, False)]


def print_table():
    """Print the table; a strategy that cannot be had here says why."""
    form = "%-12s %7s %7s %5s %5s %4s %6s  %s"
    print(form % ("strategy", "ns/hit", "call", "text", "vmas", "DRs",
                  "traced", "after kill -9 of ubp"))
    for line in ROWS.strip().splitlines():
        name, strategy, kind = [word.strip() for word in line.split("|")]
        with arena_kind(kind):
            try:
                print(form % tuple(row(name, strategy)), flush=True)
            except ubp.UbpError as error:
                print("%-12s %s" % (name, error))
    for strategy in "int3", "hw-ptrace":
        try:
            print("%s, with its guardian killed too: %s" % (
                strategy, what_is_left(strategy, True)))
        except live.Wrong as error:
            print("%s: %s" % (strategy, error))


if __name__ == "__main__":
    print_table()
