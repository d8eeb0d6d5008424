"""What ubp costs, beside what a user would use instead: `make bench`.

    python3 tests/bench/run.py [--quick] [--json FILE] [ROW ...]

Machines are noisy, shared and slow to repeat, so each number is the median
of many short runs, variants are interleaved (A B A B), and what counts are
the ratios to yardsticks that ran in between. What takes a few cycles is the
least of many loops in each run, since a neighbour on the same core can only
add to it. The yardsticks:

    uprobe     the kernel's probe on the same function, through tracefs
    atomic     the same function rebuilt with a call to a compiled-in callback
               that does an atomic increment of one counter
    plain      the same with an increment that threads could lose
    compiled   the same work as the row's, by a callback that does just it
    bpftrace   a script that does the same, where there is bpftrace

A cycle is a core cycle as perf_event_open counts it or, where it may not,
the time of one dependent add (see leaf.c).
"""
import argparse
import collections
import contextlib
import functools
import gc
import json
import os
import platform
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from common import (ANSWER_SECONDS, BUILT, ROOT, Child, Leaf, Result, Skip,
                    Yardstick, compiled, is_met, many_symbols, timed)

import actions
import loads
import quiet
import reading
import servers
import transparency
import ubp
import ubp_x86


# ---- rows: the restore after a death ---------------------------------------

ARMED = ("import sys, time\nsys.path.insert(0, %r)\nimport ubp\n"
         "t = ubp.attach(%d)\np = t.probe(%r, ubp.Count(), strategy='int3', "
         "timeout=60)\nprint(len(p.sites), flush=True)\ntime.sleep(60)\n")


def restore_row(row, where, n_threads, is_quick):
    """kill -9 of a ubp with int3s: how long until its guardian has put all
    text back? Beside it until the target is rid of guardian and arena.
    """
    text, free = [], []
    for _ in range(3 if is_quick else 9):
        with Child(compiled("pause"), str(n_threads), "0") as child:
            child.ask()
            with open("/proc/%d/maps" % child.pid) as file:
                low, high = next([int(word, 16) for word in
                                  line.split()[0].split("-")]
                                 for line in file if " r-xp " in line)
            with open("/proc/%d/mem" % child.pid, "rb", 0) as memory:
                before = os.pread(memory.fileno(), high - low, low)
                with Child(sys.executable, "-c", ARMED % (
                        ROOT, child.pid, where)) as tracer:
                    n_sites = int(tracer.ask())
                    began = time.perf_counter()
                    os.kill(tracer.pid, signal.SIGKILL)
                    while os.pread(memory.fileno(), high - low,
                                   low) != before:
                        time.sleep(0.0005)
                    text.append(1e3 * (time.perf_counter() - began))
                while (ubp.tracer_of(child.pid)
                       or ubp.find_arenas(child.pid)):
                    time.sleep(0.005)
                free.append(1e3 * (time.perf_counter() - began))
            child.ask("gap")
    ours = statistics.median(text)
    return Result(row, "restore after kill -9 of ubp: %d int3s, %d threads"
                  % (n_sites, n_threads), "ms", text, "", (Yardstick(
                      "until nothing of ubp is in the target",
                      statistics.median(free),
                      statistics.median(free) / ours),))


RESTORES = collections.OrderedDict(
    (row, functools.partial(restore_row, row, where, n_threads))
    for row, where, n_threads in (
        ("restore-1", "exe:pf_555", 1), ("restore-1-100", "exe:pf_555", 100),
        ("restore-1000", "exe:pf_*", 1),
        ("restore-1000-100", "exe:pf_*", 100)))


# ---- rows: the pause -------------------------------------------------------

def pause_row(row, what, goal_ms, n_threads, n_busy, where, rounds):
    """Arm `rounds` times: the stop that patches, as ubp measures it.

    Beside it the stop before, once per target, that maps the arena; and
    the longest gap that the target saw, with its usual gaps.
    """
    seen, idle, stops = [], [], {}
    for _ in range(rounds):
        with Child(compiled("pause"), str(n_threads), str(n_busy)) as child:
            child.ask()
            time.sleep(0.15)
            child.ask("gap")
            time.sleep(0.15)
            idle.append(float(child.ask("gap")) / 1000)
            with ubp.attach(child.pid) as target:
                target.probe(where, ubp.Count())
                seen.append(float(child.ask("gap")) / 1000)
                for purpose, value in target._tracer.pauses.items():
                    stops.setdefault(purpose, []).append(value / 1000)
    pauses = stops.pop("patch")
    marks = [("the stop to " + purpose, samples)
             for purpose, samples in sorted(stops.items())]
    marks += [("longest gap the target saw", seen),
              ("the same, nothing done to it", idle)]
    ours = statistics.median(pauses)
    return Result(row, what, "ms", pauses, "<= %g" % goal_ms, tuple(
        Yardstick(name, statistics.median(samples),
                  statistics.median(samples) / ours)
        for name, samples in marks))


def row_pause_1(is_quick):
    return pause_row("pause-1", "pause: 1 probe, 1 thread", 0.3, 1, 1,
                     "exe:pf_555", 5 if is_quick else 15)


def row_pause_1000(is_quick):
    return pause_row("pause-1000", "pause: 1000 probes, 100 threads", 5,
                     100, 0, "exe:pf_*", 3 if is_quick else 7)


def row_pause_busy(is_quick):
    return pause_row("pause-busy", "pause: 1 probe, 50 of 100 threads busy",
                     5, 100, 50, "exe:pf_555", 3 if is_quick else 9)


def row_arm_10000(is_quick):
    """Arm 10 000 functions that are planned: data, trampolines, the pause."""
    times, pauses, plans, removals = [], [], [], []
    for _ in range(1 if is_quick else 3):
        with servers.Python() as server, ubp.attach(server.pid) as target:
            sites = target._sites("*")[:10000]
            target._sites = lambda where: sites
            install, began = target._installer.install, time.process_time()

            def timed_install(*args):
                plans.append(time.process_time() - began)
                install(*args)
                times.append(time.process_time() - began - plans[-1])
            target._installer.install = timed_install
            probe = target.probe("*", ubp.Count(), timeout=60)
            pauses.append(target._tracer.pauses["patch"] / 1e3)
            began = time.process_time()
            probe.remove(timeout=60)
            removals.append(time.process_time() - began)
    ours = statistics.median(times)
    return Result("arm-10000", "arm 10 000 functions, planned", "s CPU",
                  times, "<= 2", tuple(
                      Yardstick("%s, %g %s" % (name, statistics.median(
                          samples), unit), statistics.median(samples),
                          statistics.median(samples) / ours)
                      for name, samples, unit in (
                          ("its pause (goal 50)", pauses, "ms"),
                          ("to plan them", plans, "s CPU"),
                          ("to remove them", removals, "s CPU"))),
                  "%d sites" % len(probe.sites))


# ---- rows: ubp itself ------------------------------------------------------

def first_output(argv, env, folder=None):
    """Return ms from starting argv to the first byte on its stdout, and
    the ms of CPU time that it used until its end."""
    start = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=folder,
                               stderr=subprocess.PIPE, env=env)
    select.select([process.stdout], [], [], ANSWER_SECONDS)
    elapsed = (time.perf_counter() - start) * 1000
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    process.stdout.close()
    process.stderr.close()
    if status or not out:
        raise RuntimeError("%s: status %d: %s" % (
            argv, status, err.decode("utf-8", "replace")))
    return elapsed, (usage.ru_utime + usage.ru_stime) * 1000


@contextlib.contextmanager
def copied():
    """Copy the two files to a folder of their own, as a user would.

    There python keeps what it compiled, whatever our environment says.
    """
    with tempfile.TemporaryDirectory(prefix="ubp-bench-") as folder:
        for name in "ubp.py", "ubp_x86.py":
            shutil.copy(os.path.join(ROOT, name), folder)
        env = {key: value for key, value in os.environ.items()
               if not key.startswith("PYTHON")}
        run_python("import ubp", folder, env)
        yield folder, env


def row_first(is_quick):
    """From exec of `ubp count` to its table, and of an empty Python."""
    ours, as_module, empty = [], [], []
    with Leaf() as leaf, copied() as (folder, env):
        words = ["count", "-p", str(leaf.pid), "exe:leaf", "--duration",
                 "0.001"]
        for _ in range(5 if is_quick else 15):
            ours.append(first_output(
                [sys.executable, os.path.join(folder, "ubp.py")] + words,
                env))
            # What is imported is kept compiled; a script never is.
            as_module.append(first_output(
                [sys.executable, "-m", "ubp"] + words, env, folder))
            empty.append(first_output(
                [sys.executable, "-c", "print(1)"], env))
    wall = statistics.median(sample[0] for sample in ours)
    marks = []
    for name, value in (
            ("CPU time of all of it, exit included",
             statistics.median(sample[1] for sample in ours)),
            ("the same by python -m ubp, which is kept compiled",
             statistics.median(sample[0] for sample in as_module)),
            ("python -c print(1)",
             statistics.median(sample[0] for sample in empty)),
            ("CPU time of that",
             statistics.median(sample[1] for sample in empty))):
        marks.append(Yardstick(name, value, value / wall))
    return Result("first", "command start to first result", "ms",
                  [sample[0] for sample in ours], "<= 150", tuple(marks))


def row_import(is_quick):
    with_ubp, without = [], []
    with copied() as (folder, env):
        for _ in range(5 if is_quick else 15):
            with_ubp.append(run_python("import ubp", folder, env))
            without.append(run_python("pass", folder, env))
    base = statistics.median(without)
    cost = statistics.median(with_ubp) - base
    return Result("import", "import ubp beyond an empty python, CPU", "ms",
                  [ms - base for ms in with_ubp], "",
                  (Yardstick("empty python", base, cost / base),))


def run_python(code, folder, env):
    """Return the ms of CPU time that python takes to run code in a folder."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=env,
                   check=True)
    after = os.times()
    return 1000 * (after.children_user + after.children_system
                   - before.children_user - before.children_system)


def libc_path():
    """Return the path of the libc that this python uses."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.split(None, 5)[-1].strip()
            if os.path.basename(path).startswith(("libc.so", "libc-2",
                                                  "ld-musl")):
                return path
    raise Skip("this python has no shared libc")


def text_section(path):
    """Return (bytes, vaddr) of .text, by binutils' words."""
    text = subprocess.run(["readelf", "-SW", path], check=True,
                          stdout=subprocess.PIPE,
                          universal_newlines=True).stdout
    for line in text.splitlines():
        fields = line.replace("[ ", "[").split()
        if len(fields) > 5 and fields[1] == ".text":
            vaddr, offset, size = (int(word, 16) for word in fields[3:6])
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(size), vaddr
    raise Skip("%s has no .text" % path)


def row_decode(is_quick):
    """decode_all over libc's .text, in a linear sweep."""
    code, vaddr = text_section(libc_path())
    rates = []
    for _ in range(3 if is_quick else 7):
        seconds, insns = timed(ubp_x86.decode_all, code, vaddr)
        rates.append(len(insns) / seconds / 1000)
    return Result("decode", "decoder, linear sweep of libc .text",
                  "k insn/s", rates, ">= 250", (),
                  "CPython %s" % platform.python_version())


def elf_row(row, what, goal, pid, pick, queries, rounds):
    """Time fresh looks for a name, for a pattern, and for all functions."""
    name, pattern = queries
    asks = (lambda module: module.named(name),
            lambda module: module.matching(pattern),
            lambda module: list(module.functions()))
    times = [[], [], []]
    for _ in range(rounds):
        for samples, ask in zip(times, asks):
            seconds, found = timed(
                lambda: ask([m for m in ubp.modules(pid) if pick(m)][0]))
            if not found:
                raise RuntimeError("nothing found")
            samples.append(seconds * 1000)
    ours = statistics.median(times[0])
    return Result(row, what, "ms", times[0], goal, tuple(
        Yardstick(text, statistics.median(samples),
                  statistics.median(samples) / ours)
        for text, samples in zip(("a pattern", "all functions listed"),
                                 times[1:])))


def row_elf_libc(is_quick):
    name = os.path.basename(libc_path())
    with Leaf() as leaf:
        return elf_row("elf-libc", "ELF: find malloc in libc", "<= 20",
                       leaf.pid, lambda m: m.name == name,
                       ("malloc", "mallo?"), 5 if is_quick else 15)


def row_elf_500k(is_quick):
    name = "module%02d_of_a_large_program_function_123456" % (123456 % 97)
    with Child(many_symbols(500000)) as child:
        time.sleep(0.2)
        return elf_row("elf-500k", "ELF: find 1 of 500 000 symbols",
                       "<= 1000", child.pid, lambda m: m.is_exe,
                       (name, "*_function_12345?"), 1 if is_quick else 3)


def plan_row(row, what, pid, pattern, rounds):
    """Plan every function; how many entries of >= 5 bytes take a jump.

    A yardstick line is their share; its goal is DESIGN 9's.
    """
    times, plans = [], []
    gc.disable()            # as the command does until it counts
    for _ in range(rounds):
        with ubp.attach(pid) as target:
            seconds, plans = timed(target.plan, pattern)
        times.append(seconds)
    gc.enable()
    large = [plan for plan in plans if plan.site.function.size >= 5]
    fit = sum(plan.strategy == "jump" for plan in large)
    sizes = sorted(plan.trampoline_size for plan in large
                   if plan.strategy == "jump")
    rules = collections.Counter(plan.rule for plan in large
                                if plan.strategy != "jump")
    note = "trampolines: median %d, 90 %% <= %d, largest %d bytes" % (
        sizes[len(sizes) // 2], sizes[len(sizes) * 9 // 10], sizes[-1])
    if rules:
        note += "; refused: " + ", ".join(
            "%d %s" % (n, rule) for rule, n in rules.most_common())
    share = 100 * fit / len(large)
    return Result(row, what, "s CPU", times, "<= 5", (
        Yardstick("% of functions >= 5 bytes that fit", fit, share,
                  ">= 99.9"),), note)


def row_plan_libc(is_quick):
    with Leaf() as leaf:
        return plan_row("plan-libc", "plan all functions of libc", leaf.pid,
                        "libc:*", 1 if is_quick else 3)


def row_plan_python(is_quick):
    """The interpreter that runs this: its libpython, or the program."""
    with servers.Python() as python:
        names = [m.name for m in ubp.modules(python.pid)]
        module = ("libpython*" if any(n.startswith("libpython")
                                      for n in names) else "exe")
        return plan_row("plan-python", "plan all functions of CPython",
                        python.pid, module + ":*", 1 if is_quick else 3)


ECHO = "import sys\nfor line in sys.stdin:\n    print(line, flush=True)"


def row_plan_both(is_quick):
    """libc and the interpreter in one plan, with all CPUs and with one."""
    walls, spent, alone, cpus = [], [], [], os.sched_getaffinity(0)
    with Child(sys.executable, "-S", "-c", ECHO) as python:
        python.ask("up")
        what = ["libc:*"] + [m.name + ":*" for m in ubp.modules(python.pid)
                             if m.is_exe or m.name.startswith("libpython")]
        gc.disable()            # as the command does until it counts
        for n in range(2 if is_quick else 6):
            with ubp.attach(python.pid) as target:
                os.sched_setaffinity(0, {min(cpus)} if n % 2 else cpus)
                try:
                    began = time.monotonic()
                    seconds, _ = timed(target.plan, what)
                    (alone if n % 2 else walls).append(
                        time.monotonic() - began)
                    spent += [] if n % 2 else [seconds]
                finally:
                    os.sched_setaffinity(0, cpus)
        gc.enable()
    wall, one, cpu = map(statistics.median, (walls, alone, spent))
    return Result("plan-both", "plan all of libc and CPython", "s wall",
                  walls, "<= 5", (
                      Yardstick("s CPU, its children's too", cpu, wall / cpu),
                      Yardstick("s wall, on one CPU", one, wall / one)))


def row_plan_servers(is_quick):
    """The programs of three servers, as they run; the share that fits."""
    marks, times, rules = [], [], collections.Counter()
    for kind in servers.Redis, servers.Nginx, servers.Postgres:
        if kind.missing():
            continue
        with kind() as server, ubp.attach(server.pid) as target:
            seconds, plans = timed(target.plan, "exe:*")
        large = [p for p in plans if p.site.function.size >= 5]
        fit = sum(p.strategy == "jump" for p in large)
        rules.update(p.rule for p in large if p.strategy != "jump")
        times.append(seconds)
        marks.append(Yardstick("% of the functions of " + kind.name, fit,
                               100 * fit / len(large), ">= 99.9"))
    if not times:
        raise Skip(servers.Redis.missing())
    return Result("plan-servers", "plan all functions of a server", "s CPU",
                  times, "", tuple(marks), "refused: " + ", ".join(
                      "%d %s" % (n, rule)
                      for rule, n in rules.most_common()))


# ---- the table -------------------------------------------------------------

ROWS = collections.OrderedDict()
ROWS.update(actions.ROWS)
ROWS.update([
    ("pause-1", row_pause_1), ("pause-1000", row_pause_1000),
    ("pause-busy", row_pause_busy), ("arm-10000", row_arm_10000),
    ("first", row_first)])
ROWS.update(RESTORES)
ROWS.update([
    ("import", row_import), ("decode", row_decode),
    ("elf-libc", row_elf_libc), ("elf-500k", row_elf_500k),
    ("plan-libc", row_plan_libc), ("plan-python", row_plan_python),
    ("plan-both", row_plan_both), ("plan-servers", row_plan_servers)])
ROWS.update(reading.ROWS)
ROWS.update(loads.ROWS)
WORDS = {True: "met", False: "MISSED", None: ""}


def number(value):
    """Return value with about three digits."""
    return ("%.2f" if 99 < value < 100 else "%.0f" if abs(value) >= 100 else
            "%.1f" if abs(value) >= 10 else "%.2f") % value


def print_result(result):
    spread = "(%s..%s)" % (number(min(result.samples)),
                           number(max(result.samples)))
    print("%-41s %7s %-9s %-8s %s" % (
        result.what, number(result.median), result.unit, result.goal,
        WORDS[is_met(result.median, result.goal)]))
    print("    %-12s %s, n=%d" % (result.name, spread, len(result.samples)))
    for mark in result.yardsticks:
        print("    %-37s %7s %-9s %s" % (
            mark.name, number(mark.median),
            "x %s" % number(mark.ratio),
            "%-8s %s" % (mark.goal, WORDS[is_met(mark.ratio, mark.goal)])
            if mark.goal else ""))
    while result.note:
        cut = (len(result.note) if len(result.note) <= 74
               else result.note.rfind(" ", 0, 74))
        print("    " + result.note[:cut])
        result = result._replace(note=result.note[cut:].strip())
    sys.stdout.flush()


def as_json(result):
    record = result._asdict()
    record.update(median=result.median,
                  met=is_met(result.median, result.goal),
                  yardsticks=[dict(mark._asdict(),
                                   met=is_met(mark.ratio, mark.goal))
                              for mark in result.yardsticks])
    return dict(record)


def others_share(seconds=0.5):
    """Return the % of all CPUs that others use while we sleep."""
    def busy_and_all():
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)
    before = busy_and_all()
    time.sleep(seconds)
    after = busy_and_all()
    return (100 * (after[0] - before[0])
            / max(1, after[1] - before[1]))


def cpu_model():
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def arguments():
    parser = argparse.ArgumentParser(
        description="Measure ubp beside what one would use instead.",
        epilog="rows: " + " ".join(ROWS))
    parser.add_argument("rows", nargs="*", metavar="ROW",
                        help="measure only these")
    parser.add_argument("--quick", action="store_true",
                        help="fewer repetitions, about a minute")
    parser.add_argument("--json", metavar="FILE",
                        default=os.path.join(BUILT, "bench.json"),
                        help="where the results go (%(default)s)")
    options = parser.parse_args()
    unknown = [row for row in options.rows if row not in ROWS]
    if unknown:
        parser.error("no row %s; rows: %s" % (unknown[0], " ".join(ROWS)))
    return options


def main():
    options = arguments()
    machine = "%s, %d CPUs, Linux %s, CPython %s" % (
        cpu_model(), os.cpu_count(), platform.release(),
        platform.python_version())
    busy = others_share()
    if busy > 10:
        slower = statistics.median(quiet.cpu_seconds(quiet.yardstick)[0]
                                   for _ in range(30)) / quiet.YARD
        print("bench: others use %d %% of the CPUs: pauses and wall times "
              "will be too long; a loop takes %.1f x the CPU time that it "
              "takes alone" % (busy, slower), file=sys.stderr)
    print("%-41s %7s %-9s %-8s" % ("ubp on " + cpu_model()[:33], "median",
                                   "", "goal"))
    print("-" * 79)
    results, skipped, failed = [], {}, {}
    for row in options.rows or ROWS:
        try:
            results.append(ROWS[row](options.quick))
        except Skip as skip:
            skipped[row] = str(skip)
            print("%-12s skipped: %s" % (row, skip))
            continue
        except ubp.UbpError as error:
            failed[row] = str(error)
            print("%-12s FAILED: %s" % (row, error))
            continue
        print_result(results[-1])
    verdicts = [is_met(result.median, result.goal) for result in results]
    print("-" * 79)
    print("%d of %d goals met; %d skipped; %d failed; %s" % (
        verdicts.count(True), len(verdicts) - verdicts.count(None),
        len(skipped), len(failed), machine))
    if not options.rows:
        print("-" * 79)
        transparency.print_table()
    os.makedirs(os.path.dirname(os.path.abspath(options.json)),
                exist_ok=True)
    with open(options.json, "w") as file:
        json.dump({"v": 1, "machine": machine, "time_ns": time.time_ns()
                   if hasattr(time, "time_ns") else int(time.time() * 1e9),
                   "quick": options.quick, "others_cpu_percent": busy,
                   "skipped": skipped, "failed": failed,
                   "results": [as_json(result) for result in results]},
                  file, indent=1)
        file.write("\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
