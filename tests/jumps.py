"""How many functions, and how many instructions, take a jump.

    jumps.py [--reasons] [--every N] [NAME...]     tables over PROGRAMS

--reasons lists each refused function: its bytes, and the rule with its why.
Only planned, in live processes: what they map, and which signals they catch,
decides. Of the functions of five bytes or more those count whose entry takes
a jump. Every instruction is a site in each N-th function of all, in the order
of addresses, all at once; without --every about INSTRUCTIONS are. Functions
of more than LARGE bytes are few, and one would be half of a sample: each is
looked at, and counts once in the percentage, where the others count N times.
"""
import argparse
import collections
import math
import os
import re
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import servers                                              # noqa: E402
import ubp                                                  # noqa: E402
from ubp_x86 import RefusalError                            # noqa: E402

# Percent of functions, and of every instruction of a function, that must
# take a jump. redis-server catches SIGSEGV, so what may fault has to stay;
# python3 as Debian has it has parts of one to three bytes before the next
# entry that look like functions, and no relocations: --reasons shows each.
PROGRAMS = collections.OrderedDict([
    ("libc", (99.9, 95)), ("libstdc++", (99.9, 95)),
    ("libcrypto", (99.9, 95)), ("python3", (99.9, 95)),
    ("redis", (99.7, 95)), ("nginx", (99.9, 95)), ("postgres", (99.9, 95))])
SERVERS = {"redis": servers.Redis, "nginx": servers.Nginx,
           "postgres": servers.Postgres}
LIBRARIES = {"libc": "None", "libstdc++": "'libstdc++.so.6'",
             "libcrypto": "'libcrypto.so.3'", "python3": "None"}

MOST_REASONS = 40
INSTRUCTIONS, MEAN_SIZE = 20000, 4.2    # of a table's row; bytes of one
LARGE = 32768
Share = collections.namedtuple("Share",
                               "name n percent rules seconds refused")


class Library:
    """A process that maps a library and waits for its stdin to end."""

    def __init__(self, name):
        code = ("import ctypes, sys; ctypes.CDLL(%s); print(1, flush=True); "
                "sys.stdin.read()" % LIBRARIES[name])
        path = "/usr/bin/python3"
        self.process = subprocess.Popen(
            [path if os.path.exists(path) else sys.executable, "-c", code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        self.pid = self.process.pid

    def __enter__(self):
        if not self.process.stdout.readline():
            self.__exit__()
            raise OSError("the library is not here")
        return self

    def __exit__(self, *ignored):
        servers.end_by_eof(self.process)


def running(name):
    """(a context manager of a process, the pattern of what to plan)."""
    if name in SERVERS:
        return SERVERS[name](), "exe:*"
    return Library(name), "exe:*" if name == "python3" else name + ":*"


def missing(name):
    """Why a program of PROGRAMS cannot be looked at here, or "" """
    return SERVERS[name].missing() if name in SERVERS else ""


def chosen(sites, most, n_runs=6):
    """At most so many of sites, in runs of neighbours, which compete for
    padding; all of them if most is None."""
    if most is None or len(sites) <= most:
        return sites
    each, found = most // n_runs, []
    for n in range(n_runs):
        at = n * (len(sites) - each) // (n_runs - 1)
        found += sites[at:at + each]
    return found


def reason(plan):
    """Two lines on a SitePlan that is refused, with the file's vaddrs."""
    module = plan.site.module
    start, size, _ = module.bounds(plan.site.vaddr)
    return "  %s 0x%x %s, %d bytes: %s\n      %s: %s" % (
        module.name, plan.site.vaddr - module.bias, plan.site.function.name,
        size, module.read_file(start, min(size, 24)).hex(), plan.rule,
        re.sub("0x[0-9a-f]{6,}", lambda found: "0x%x" % (
            int(found.group(), 16) - module.bias), plan.why))


def share(name, plans, began):
    """The Share of plans that are jumps."""
    refused = [plan for plan in plans if not plan.strategy]
    rules = collections.Counter(plan.rule for plan in refused)
    return Share(name, len(plans), 100 * (1 - len(refused)
                                          / max(len(plans), 1)),
                 rules, time.process_time() - began,
                 list(map(reason, refused[:MOST_REASONS])))


def look(name, most=None, n_instructions=INSTRUCTIONS, longest=1 << 20,
         every=None):
    """(Share of functions, Share of instructions) of a program.

    most            functions whose entries are tried, None: all
    n_instructions  about how many are tried, if every is None
    longest         bytes of a function of which every instruction is
    every           N: of each N-th such function
    """
    process, pattern = running(name)
    with process:
        pid = process.worker_pids()[0] if name == "nginx" else process.pid
        with ubp.attach(pid) as target:
            sites = target.find(pattern)
            planner = ubp.Planner(pid, target._read)
            try:
                entries = [site for site in chosen(sites, most)
                           if site.module.bounds(site.vaddr)[1] >= 5]
                began = time.process_time()
                plans = planner.settle(list(map(planner.plan, entries)))
                functions = share(name, plans, began)
                return functions, of_instructions(name, planner, sample(
                    sites, n_instructions, longest, every))
            finally:
                planner.close()


def sample(sites, n_instructions, longest, every):
    """[(site, how many functions it stands for)]; see look()."""
    small, large = [], []
    for site in sorted(sites, key=lambda site: site.vaddr):
        size = site.module.bounds(site.vaddr)[1]
        if size <= longest:
            (small if size <= LARGE else large).append((site, size))
    n = every or math.ceil(sum(size for _, size in small)
                           / MEAN_SIZE / n_instructions) or 1
    return [(site, n) for site, _ in small[n // 2::n]] + [
        (site, 1) for site, _ in large]


def of_instructions(name, planner, sampled):
    """The Share of all instructions of some functions, none armed.

    Not counted: nops that no way leads to, which nobody can hit.
    """
    planner.keep_only({})
    began, plans, n_all, n_jumps = time.process_time(), [], 0, 0
    for site, weight in sampled:
        found = [plan for plan in of_function(planner, site)
                 if plan.rule != "unreachable"]
        plans += found
        n_all += weight * len(found)
        n_jumps += weight * sum(bool(plan.strategy) for plan in found)
    return share(name, plans, began)._replace(
        percent=100 * n_jumps / max(n_all, 1))


def of_function(planner, site):
    """Plans of every instruction of a function, as one probe has them; of
    one that does not decode that of its entry, which is refused."""
    try:
        starts = planner.scan(site.module).analysis(
            planner.function(site.module, site.vaddr)).starts
    except RefusalError:
        starts = [site.vaddr]
    return planner.settle([planner.plan(site._replace(
        vaddr=vaddr, offset=vaddr - site.vaddr)) for vaddr in starts])


def row(what, goal):
    """A Share as a line."""
    return "%-10s %7d %8.3f %% %s %6.1f s  %s" % (
        what.name, what.n, what.percent, "      " if what.percent >= goal
        else "< %4g" % goal, what.seconds, ", ".join(
            "%s %d" % item for item in what.rules.most_common()) or "-")


def options():
    """What the command line says; ends the program if it says nonsense."""
    parser = argparse.ArgumentParser(
        usage="jumps.py [--reasons] [--every N] [NAME...]",
        description="How many functions, and how many instructions, take a "
        "jump. Nothing is armed.", epilog="NAME is one of %s; all of them if "
        "there is none." % ", ".join(PROGRAMS))
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="a program or library")
    parser.add_argument("--reasons", action="store_true",
                        help="list refused functions")
    parser.add_argument("--every", type=int, metavar="N", help="try every "
                        "instruction of each N-th function, 1: of all; else "
                        "about %d in all" % INSTRUCTIONS)
    found = parser.parse_args()
    for name in found.names:
        if name not in PROGRAMS:
            parser.error("no program %s; there are %s" % (
                name, ", ".join(PROGRAMS)))
    if found.every is not None and found.every < 1:
        parser.error("--every %d: it is 1 or more" % found.every)
    return found


def main(names, are_listed, every):
    """Print the table. -> exit status"""
    status, others = 0, []
    print("functions that take a jump")
    for name in names or PROGRAMS:
        reason = missing(name)
        if reason:
            print("%-10s %s" % (name, reason))
            continue
        try:
            functions, instructions = look(name, every=every)
        except OSError as error:
            print("%-10s %s" % (name, error))
            continue
        print(row(functions, PROGRAMS[name][0]), flush=True)
        for line in functions.refused if are_listed else ():
            print(line, flush=True)
        others.append(instructions)
        status |= functions.percent < PROGRAMS[name][0]
    print("instructions that take a jump, all of a function at once")
    for instructions in others:
        goal = PROGRAMS[instructions.name][1]
        print(row(instructions, goal))
        status |= instructions.percent < goal
    return status


if __name__ == "__main__":
    chosen_options = options()
    sys.exit(main(chosen_options.names, chosen_options.reasons,
                  chosen_options.every))
