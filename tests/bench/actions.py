"""Rows: what a hit of each action costs, one thread and two, and sizes.

A cost is the cycles of a loop of calls with the probe, less those of the same
loop without it. What a rebuilt program would pay for the same is in leaf.c,
what the kernel asks in uprobe.py; variants are interleaved.
"""
import collections
import contextlib
import os
import statistics
import time
import typing

import common
import servers
import ubp
import uprobe
from common import Child, Leaf, Result, Skip, Yardstick, armed

DRAINED = 3500              # calls whose records fit a ring of 4096
SLOW = 1000, 5              # calls, loops: of what takes microseconds
FALSE = "arg0 == 0"         # the loops call with n down to 1


class Work(typing.NamedTuple):
    """What one row has each of the ways do at each hit."""
    what: str
    goal: float                 # cycles, beyond those of the floor
    action: ubp.Action
    when: str = ""
    function: str = "leaf"
    callbacks: tuple = ()       # (suffix in leaf.c, goal of the ratio)
    uprobe_ratio: float = 300
    floor: str = ""             # a loop of leaf.c: what cannot be less
    args: str = ""              # of the kernel's probe
    filter: str = ""
    is_latency: bool = False
    bpftrace: str = ""          # what it does at FUNCTION


ATOMIC = (("atomic", "<= 1.0"), ("plain", ""))
WORKS = collections.OrderedDict([
    ("count", Work(
        "count a 3-instruction function", 5, ubp.Count(), "", "leaf",
        ATOMIC, bpftrace="uprobe:FUNCTION { @ = count(); }")),
    ("count-live", Work(
        "the same, no register provably free", 5, ubp.Count(), "", "outer",
        ATOMIC)),
    ("count-call", Work(
        "the same, first five bytes hold a call", 5, ubp.Count(), "",
        "caller", ATOMIC)),
    ("false", Work(
        "a count whose condition is false", 4, ubp.Count(), FALSE,
        callbacks=(("condition", ""),), args="a=%di:u64",
        filter="a == 0",
        bpftrace="uprobe:FUNCTION /arg0 == 0/ { @ = count(); }")),
    ("hist", Work(
        "histogram of an argument", 8, ubp.Hist("arg0"),
        callbacks=(("hist", ""),), args="a=%di:u64",
        bpftrace="uprobe:FUNCTION { @ = hist(arg0); }")),
    ("by-key", Work(
        "count by key, 16 of them", 12, ubp.Count(by="arg0 & 15"),
        callbacks=(("key", ""),), args="a=%di:u64",
        bpftrace="uprobe:FUNCTION { @[arg0 & 15] = count(); }")),
    ("trace", Work(
        "trace: time, cpu, tid, two arguments", 8,
        ubp.Trace("arg0, arg1"), callbacks=(("trace", ""),),
        uprobe_ratio=60, floor="leaf_rdtsc", args="a=%di:u64 b=%si:u64",
        bpftrace="uprobe:FUNCTION { @[nsecs % 16] = "
                 "sum(arg0 + arg1 + cpu + tid); }")),
    ("trace-overwrite", Work(
        "the same, a flight recorder", 8,
        ubp.Trace("arg0, arg1", overflow="overwrite"),
        callbacks=(("trace", ""),), uprobe_ratio=60, floor="leaf_rdtsc",
        args="a=%di:u64 b=%si:u64")),
    ("latency", Work(
        "latency: entry, exit, histogram", 30, ubp.Latency(),
        callbacks=(("latency", ""),), uprobe_ratio=40, floor="leaf_2rdtsc",
        is_latency=True,
        bpftrace="uprobe:FUNCTION { @s[tid] = nsecs; } "
                 "uretprobe:FUNCTION /@s[tid]/ { @ = hist(nsecs - @s[tid]); "
                 "delete(@s[tid]); }")),
])


@contextlib.contextmanager
def uprobed(path, offset, work):
    """The kernel's probes that do what is nearest to a Work."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(uprobe.Uprobe(path, offset, False, work.args,
                                          work.filter))
        if work.is_latency:
            stack.enter_context(uprobe.Uprobe(path, offset, True))
        yield


def probed_cost(leaf, work):
    """Return the cycles per hit; every hit must have been recorded.

    Where a ring could fill, it is read between the loops.
    """
    is_drained = (isinstance(work.action, ubp.Trace)
                  and work.action.overflow == "drop")
    calls, loops, n_asked = ((DRAINED, 1, common.LOOPS) if is_drained else
                             (common.CALLS, common.LOOPS, 1))
    base, cost = leaf.cycles(work.function, calls), 1e9
    with ubp.attach(leaf.pid) as target:
        probe = target.probe("exe:" + work.function, work.action,
                             work.when or None)
        for _ in range(n_asked):
            cost = min(cost, leaf.cycles(work.function, calls, loops))
            if is_drained:
                target.read_events(True)
        reading = probe.reading()
    want = 0 if work.when else n_asked * (calls * loops + calls // 20 + 1)
    is_lossy = getattr(work.action, "overflow", "drop") == "overwrite"
    if reading.hits != want or reading.recorded != want and not is_lossy:
        raise RuntimeError("%s: %d hits, %d recorded, not %d" % (
            work.what, reading.hits, reading.recorded, want))
    return cost - base


def measure(leaf, work, rounds):
    """Return {way: [cycles per hit of each round]}, interleaved."""
    costs = collections.defaultdict(list)
    with ubp.attach(leaf.pid) as target:
        site, = target.find("exe:" + work.function)
    where = common.file_offset(leaf.pid, site.vaddr)
    for _ in range(rounds):
        costs["ubp"].append(probed_cost(leaf, work))
        base = leaf.cycles(work.function)
        for suffix, _ in work.callbacks:
            costs[suffix].append(leaf.cycles("%s_%s" % (
                work.function, suffix)) - base)
        if work.floor:
            costs["floor"].append(leaf.cycles(work.floor) - base)
        if not uprobe.unusable():
            with uprobed(where[0], where[1], work):
                costs["uprobe"].append(
                    leaf.cycles(work.function, *SLOW) - base)
    return costs, where[0]


def bpftrace_cost(leaf, work, path):
    """Return the cycles per hit of a bpftrace script, or raise Skip."""
    if uprobe.Bpftrace.unusable():
        raise Skip(uprobe.Bpftrace.unusable())
    text = work.bpftrace.replace("FUNCTION", "%s:%s" % (path, work.function))
    base = leaf.cycles(work.function)
    try:
        with uprobe.Bpftrace(text, leaf.pid):
            cost = leaf.cycles(work.function, *SLOW) - base
    except OSError as error:
        raise Skip(str(error))
    if cost < 100:
        raise Skip("bpftrace: its probe was not hit")
    return cost


def work_row(row, is_quick):
    work = WORKS[row]
    with Leaf() as leaf:
        costs, path = measure(leaf, work, 3 if is_quick else 9)
        note = "cycles by " + leaf.method
        if work.bpftrace and not is_quick:
            try:
                costs["bpftrace"] = [bpftrace_cost(leaf, work, path)]
            except Skip as skip:
                note += "; " + str(skip)
    if "uprobe" not in costs:
        note += "; no uprobe: " + uprobe.unusable()
    ours, limit = statistics.median(costs["ubp"]), work.goal
    marks = []
    if work.floor:
        floor = statistics.median(costs["floor"])
        limit += floor
        marks.append(Yardstick(
            {"leaf_rdtsc": "rdtsc alone"}.get(work.floor, "two rdtsc alone"),
            floor, ours / max(floor, 0.01)))
        note = "goal: that of rdtsc + %g; %s" % (work.goal, note)
    for suffix, goal in work.callbacks:
        median = statistics.median(costs[suffix])
        marks.append(Yardstick("compiled in" if suffix not in
                               ("atomic", "plain") else suffix + " callback",
                               median, ours / max(median, 0.01), goal))
    for name, goal in (("uprobe", ">= %g" % work.uprobe_ratio),
                       ("bpftrace", "")):
        if name in costs:
            median = statistics.median(costs[name])
            marks.append(Yardstick(
                name + (" + uretprobe" if work.is_latency
                        and name == "uprobe" else ""),
                median, median / max(ours, 0.01), goal))
    return Result(row, work.what, "cycles", costs["ubp"],
                  "<= %.3g" % limit, tuple(marks), note)


# ---- two threads -----------------------------------------------------------

def row_threads(is_quick):
    """Hits of two threads on two CPUs over those of one, for each action.

    Per second of CPU time, which others on a shared machine do not take.
    """
    if len(os.sched_getaffinity(0)) < 2:
        raise Skip("one CPU only")
    ms, rounds = (20, 3) if is_quick else (50, 11)
    ratios = collections.defaultdict(list)

    def measure_one(leaf, key, name):
        one = leaf.rates(1, name, ms)[0]
        ratios[key].append(sum(leaf.rates(2, name, ms)) / one)
    with Leaf() as leaf:
        for _ in range(rounds):
            measure_one(leaf, "unprobed", "leaf")
            measure_one(leaf, "atomic callback", "leaf_atomic")
            for row in ("count", "false", "hist", "by-key",
                        "trace-overwrite", "latency"):
                work = WORKS[row]
                with armed(leaf.pid, "exe:leaf", work.action,
                           work.when or None):
                    measure_one(leaf, row, "leaf")
    medians = {key: statistics.median(each) for key, each in ratios.items()}
    ours = ratios.pop("count")
    return Result("threads", "hits of two threads over one, counted", "x",
                  ours, ">= 1.9", tuple(
                      Yardstick(name, medians[name], medians[name],
                                ">= 1.9" if name in WORKS else "")
                      for name in ratios))


# ---- handlers --------------------------------------------------------------

def handled_us(leaf, function, where="exe:leaf", strategy="jump"):
    """Return the wall us per hit that a Python function answers: of some
    batches the fastest."""
    calls, batches, fastest = 300, 12, 1e9
    want = calls + calls // 20 + 1
    with ubp.attach(leaf.pid) as target:
        probe = target.probe(where, ubp.Call(function), strategy=strategy)
        for _ in range(batches):
            start = time.monotonic()
            leaf.cycles("leaf", calls, 1)
            fastest = min(fastest, time.monotonic() - start)
        reading = probe.reading()
    if reading.recorded != want * batches:
        raise RuntimeError("handlers: %d hits, %d answered, not %d" % (
            reading.hits, reading.recorded, want * batches))
    return fastest / want * 1e6


def row_call(is_quick):
    """A hit that waits for a Python function to answer, by the clock."""
    def set_result(hit):
        hit.ret = hit.arg0 + 1
    ways = [("at an exit, with another result", ("exe:leaf%return",),
             set_result),
            ("at an entry, skipped", ("exe:leaf",),
             lambda hit: hit.skip(-12)),
            ("by int3, empty", ("exe:leaf", "int3"), lambda hit: None)]
    ours, costs = [], collections.defaultdict(list)
    with Leaf() as leaf:
        for _ in range(3 if is_quick else 9):
            ours.append(handled_us(leaf, lambda hit: None))
            for name, where, function in ways:
                costs[name].append(handled_us(leaf, function, *where))
    return Result("call", "an empty Python function at a hit", "us", ours,
                  "<= 50", tuple(Yardstick(
                      name, statistics.median(costs[name]),
                      statistics.median(costs[name])
                      / statistics.median(ours)) for name, _, _ in ways),
                  "of 12 batches of 316 hits the fastest, by the clock")


# ---- sizes -----------------------------------------------------------------

def trampoline_size(target, planner, work):
    """Return the bytes of all trampolines of a Work at its function."""
    spec, entry = ubp.make_specs(work.action, work.when or None)
    site, = target.find("exe:" + work.function)
    plan = planner.plan(site, spec, 0, entry)
    if not plan.strategy:
        raise Skip("%s: %s" % (work.what, plan.why))
    return plan.trampoline_size


def row_trampoline(is_quick):
    """Of a count, and beside it those of the other actions."""
    sizes = {}
    with Leaf() as leaf, ubp.attach(leaf.pid) as target:
        for row, work in WORKS.items():
            planner = ubp.Planner(leaf.pid, target._read)
            sizes[row] = trampoline_size(target, planner, work)
            planner.close()
    counts = [size for row, size in sizes.items() if row.startswith("count")]
    median = statistics.median(counts)
    return Result("trampoline", "trampoline of a count, 3 functions",
                  "bytes", counts, "<= 64", tuple(
                      Yardstick(row, size, size / median)
                      for row, size in sizes.items()
                      if not row.startswith("count")))


# ---- exits -----------------------------------------------------------------

@contextlib.contextmanager
def with_libstdcxx():
    """A process that has libstdc++; its pid."""
    with Child("python3", "-c", "import ctypes, sys\n"
               "ctypes.CDLL('libstdc++.so.6'); print(1, flush=True)\n"
               "sys.stdin.read()") as child:
        child.ask()
        yield child.pid


@contextlib.contextmanager
def with_server(kind):
    if kind.missing():
        raise Skip(kind.missing())
    with kind() as server:
        yield server.pid


def exits_of(pid, pattern):
    """Return (functions, those of which every exit takes a jump, rules)."""
    with ubp.attach(pid) as target:
        plans = target.plan(pattern + ":*%return")
    large = [p for p in plans if p.site.function.size >= 5]
    rules = collections.Counter(p.rule for p in large
                                if p.strategy != "jump")
    return len(large), len(large) - sum(rules.values()), rules


def row_exits(is_quick):
    """Functions of 5 bytes or more of which every exit takes a jump."""
    places = [("libc", "libc", with_libstdcxx),
              ("libstdc++", "libstdc++", with_libstdcxx)]
    if not is_quick:
        places += [(kind.name, "exe", lambda kind=kind: with_server(kind))
                   for kind in (servers.Python, servers.Redis, servers.Nginx,
                                servers.Postgres)]
    marks, total, good, missing = [], 0, 0, []
    for name, pattern, context in places:
        try:
            with context() as pid:
                if name == "python" and any(
                        m.name.startswith("libpython")
                        for m in ubp.modules(pid)):
                    pattern = "libpython*"
                n, n_good, rules = exits_of(pid, pattern)
        except Skip as skip:
            missing.append(str(skip))
            continue
        total, good = total + n, good + n_good
        marks.append(Yardstick(
            "%s: %d functions" % (name, n), n_good, 100 * n_good / n,
            ">= 99"))
        missing.append("%s refused: %s" % (name, ", ".join(
            "%d %s" % (count, rule)
            for rule, count in rules.most_common(5))))
    return Result("exits", "functions of which every exit takes a jump",
                  "%", [100 * good / total], ">= 99", tuple(marks),
                  "; ".join(missing))


ROWS = collections.OrderedDict(
    (row, lambda is_quick, row=row: work_row(row, is_quick))
    for row in WORKS)
ROWS.update([("call", row_call), ("threads", row_threads),
             ("trampoline", row_trampoline),
             ("exits", row_exits)])
