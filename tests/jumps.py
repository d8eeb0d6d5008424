"""How many functions, and how many instructions, take a jump.

    jumps.py [--reasons] [NAME...]     a table over all functions of PROGRAMS

--reasons lists each refused function: its bytes, and the rule with its why.
Only planned, in live processes: what they map, and which signals they catch,
decides. Of the functions of five bytes or more those count whose entry takes
a jump. Every instruction is a site in some of the functions, all at once.
"""
import collections
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
    ("redis", (99.7, 85)), ("nginx", (99.9, 95)), ("postgres", (99.9, 95))])
SERVERS = {"redis": servers.Redis, "nginx": servers.Nginx,
           "postgres": servers.Postgres}
LIBRARIES = {"libc": "None", "libstdc++": "'libstdc++.so.6'",
             "libcrypto": "'libcrypto.so.3'", "python3": "None"}

MOST_REASONS = 40
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


def look(name, most=None, most_instructions=20000, longest=1 << 20):
    """(Share of functions, Share of instructions) of a program.

    most, most_instructions   to be looked at;   longest   bytes of a
    function of which every instruction is
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
                return functions, of_instructions(name, planner, [
                    site for site in sites if site.module.bounds(
                        site.vaddr)[1] <= longest], most_instructions)
            finally:
                planner.close()


def of_instructions(name, planner, sites, most):
    """The Share of all instructions of some functions, none armed.

    Not counted: nops that no way leads to, which nobody can hit.
    """
    planner.keep_only({})
    began, plans, step = time.process_time(), [], max(1, len(sites) // 200)
    for first in range(step):
        for site in sites[first::step]:
            if len(plans) >= most:
                return share(name, plans, began)
            plans += [plan for plan in of_function(planner, site)
                      if plan.rule != "unreachable"]
    return share(name, plans, began)


def of_function(planner, site):
    """Plans of every instruction of a function, as one probe has them."""
    function = planner.function(site.module, site.vaddr)
    try:
        starts = planner.scan(site.module).analysis(function).starts
    except (RefusalError, AttributeError):
        return []
    return planner.settle([planner.plan(site._replace(
        vaddr=vaddr, offset=vaddr - site.vaddr)) for vaddr in starts])


def row(what, goal):
    """A Share as a line."""
    return "%-10s %7d %8.3f %% %s %6.1f s  %s" % (
        what.name, what.n, what.percent, "      " if what.percent >= goal
        else "< %4g" % goal, what.seconds, ", ".join(
            "%s %d" % item for item in what.rules.most_common()) or "-")


def main(names):
    """Print the table. -> exit status"""
    status, others, are_listed = 0, [], "--reasons" in names
    names = [name for name in names if name != "--reasons"]
    print("functions that take a jump")
    for name in names or PROGRAMS:
        reason = missing(name)
        if reason:
            print("%-10s %s" % (name, reason))
            continue
        try:
            functions, instructions = look(name)
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
    sys.exit(main(sys.argv[1:]))
