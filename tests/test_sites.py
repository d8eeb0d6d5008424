"""Every instruction of a function is a site, armed and removed in any order.

The judges: the program, which compares what its threads compute with what
they did before; the CPU, whose trap flag told how often each instruction
runs in a call; and its text afterwards.
"""
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
import unittest
from unittest import mock

import live
import servers
import ubp

ACTIONS = (ubp.Count, lambda: ubp.Hist("rdi"), lambda: ubp.Count(sum="rbx"),
           lambda: ubp.Count(by="rcx & 1"))


class Model:
    """What is armed by random steps, and what must have been counted."""

    def __init__(self, test, target, child, seed):
        self.test, self.target, self.child = test, target, child
        self.random, self.probes = random.Random(seed), []
        ready, sites = child.ready, child.ask("t")
        self.sites = {}
        starts = sorted(int(ready[name]) for name in ("leaf", "all", "round"))
        for name in ("leaf", "all", "round"):
            end = min([start for start in starts
                       if start > int(ready[name])] + [1 << 32])
            for at, n in sites.items():
                at = int(at) - int(ready[name])
                if 0 <= at < min(128, end - int(ready[name])):
                    self.sites.setdefault(
                        "exe:site_%s+0x%x" % (name, at), n)
        self.n_asked = self.n_armed = 0

    def arm(self, names):
        action = self.random.choice(ACTIONS)()
        self.n_asked += len(names)
        try:
            probe = self.target.probe(names, action, timeout=10)
        except ubp.ProbeError:          # each of them was refused
            return
        self.n_armed += len(probe.sites)
        self.probes.append(probe)

    def step(self):
        """Arm one to four sites, or remove a probe."""
        rand = self.random
        if self.probes and rand.random() < 0.4 or len(self.probes) > 25:
            probe = self.probes.pop(rand.randrange(len(self.probes)))
            probe.remove(timeout=10)
        else:
            self.arm(rand.sample(sorted(self.sites), rand.randint(1, 4)))

    def counts(self):
        return {(n, name(site)): reading.hits
                for n, probe in enumerate(self.probes)
                for site, reading in probe.readings().items()}

    def check(self):
        """Count while nobody else calls the function."""
        self.child.ask("s")
        before = self.counts()
        times = self.child.ask("g")["times"]
        after = self.counts()
        self.child.ask("r")
        self.test.assertEqual(
            {key: after[key] - before[key] for key in after},
            {(n, where): times * self.sites[where] for n, where in after})

    def remove_all(self):
        self.random.shuffle(self.probes)
        while self.probes:
            self.probes.pop().remove(timeout=10)


def name(site):
    return "exe:%s+0x%x" % (site.function.name, site.offset)


class AnyOrder(unittest.TestCase):

    def run_model(self, us, seed, play):
        with live.Target("sites", us, seconds=240) as child, \
                ubp.attach(child.pid) as target:
            model = Model(self, target, child, seed)
            with self.subTest(seed=seed):
                play(model)
                model.remove_all()
                target.close()
                self.assertEqual(live.changed_text(child.pid), [])
                child.quit()
        return model

    def test_random_steps(self):
        for seed in range(3):
            def play(model):
                for n in range(28):
                    model.step()
                    if n % 4 == 3:
                        model.check()
            model = self.run_model(300 if seed % 2 else 0, seed, play)
            self.assertGreater(model.n_armed, 0.85 * model.n_asked)

    def test_random_steps_with_lenders(self):
        """As if there were no padding, and each site might borrow a slot
        before anything else is tried."""
        x86, lent = ubp.ubp_x86, []
        best, plan = x86._best_window, x86.plan_window

        def best_window(analysis, site, limits):
            try:
                if limits.may_borrow:
                    return x86._ladder(analysis, site, limits, refusal)
            except x86.RefusalError:
                pass
            return best(analysis, site, limits)

        def plan_window(*args, **rest):
            rest["may_borrow"] = not rest["through"] and args[1] % 2
            window = plan(*args, **rest)
            lent.append(window.lender)
            return window

        def play(model):
            for n in range(28):
                model.step()
                if n % 4 == 3:
                    model.check()

        refusal = x86.RefusalError("", "", 0)
        with mock.patch.multiple(x86, _slot=lambda *_: 0,
                                 _best_window=best_window,
                                 plan_window=plan_window):
            for seed in range(2):
                self.run_model(300 * seed, seed, play)
        self.assertGreater(sum(map(bool, lent)), 4)

    def test_one_by_one_in_each_direction(self):
        """The number that takes a probe hardly depends on the order."""
        armed = {}
        for order in "down", "shuffled", "together":
            def play(model):
                names = sorted(model.sites, key=lambda text: (
                    text[:10], int(text.split("+")[1], 16)))
                if order == "down":
                    names.reverse()
                elif order == "shuffled":
                    model.random.shuffle(names)
                groups = [names] if order == "together" else [
                    [each] for each in names]
                for group in groups:
                    model.arm(group)
                model.check()
            model = self.run_model(0, 1, play)
            armed[order] = model.n_armed / model.n_asked
        sys.stderr.write("\nevery instruction of three functions: %s\n" % (
            ", ".join("%s %.0f %%" % (order, 100 * share)
                      for order, share in armed.items())))
        self.assertGreaterEqual(min(armed.values()), 0.9, armed)


def by_call(probe):
    return {site.function.name + "+%d" % site.offset: n
            for site, n in probe.counts().items()}


class Lenders(unittest.TestCase):
    """A slot in bytes that another window has displaced for it.

    windows.c's win_tight has room for two bytes, and no padding near it; its
    slot is in what is displaced of win_patient, in which threads nearly
    always stand on cpuid, and which compares what it computes.
    """
    TIGHT, LENDER = "exe:win_tight", "exe:win_patient+0x10"
    INSIDE = "exe:win_patient+0x12"

    @contextlib.contextmanager
    def attached(self):
        with live.Target("windows", "signals", seconds=240) as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as target:
                yield process, target
            process.ask("p")
            live.Snapshot(process.pid).compare(self, before, masks=False)
            process.quit()

    def test_the_slot_is_where_nothing_is_executed_any_more(self):
        with self.attached() as (_, target):
            plan, = target.plan(self.TIGHT)
            window, lender = plan.window, plan.window.lender
            self.assertEqual((window.size, lender.site % 0x400),
                             (2, window.site % 0x400 + 24))
            self.assertLessEqual(lender.site + 5, window.slot)
            self.assertLessEqual(window.slot + 5, lender.site + lender.size)
            self.assertNotIn(window.slot,
                             [insn.vaddr for insn in lender.insns])
            self.assertEqual([part.window for part in plan.all_parts],
                             [window, lender])
            target.probe(self.TIGHT, ubp.Count())
            found, = ubp.status(target.pid)
            self.assertEqual([site.name for site in found.sites],
                             ["win_tight"])
            self.assertEqual([text.split(":")[1] for text in found.lenders],
                             ["win_patient+0x10"])
            target.close()
            self.assertEqual((1, 1), target.removal[:2])

    def test_it_is_of_one_site_alone(self):
        """Capitals arm: T win_tight, L and I instructions of the lender;
        small ones remove the first of these; ! what is refused. Where
        the lender is taken already, T finds another."""
        where = {"t": self.TIGHT, "l": self.LENDER, "i": self.INSIDE}
        for orders in ("TTtt", "TtTt", "TTtTtt", "TL!I!tLl", "LTlt", "LTtl",
                       "ITLtTliTt"):
            with self.subTest(orders), self.attached() as (process, target):
                armed = []
                for n, step in enumerate(orders):
                    if orders[n + 1:n + 2] == "!":
                        with self.assertRaisesRegex(
                                ubp.ProbeError, "patched already|leads to"):
                            target.probe(where[step.lower()], ubp.Count())
                    elif step.isupper():
                        armed.append((step.lower(), target.probe(
                            where[step.lower()], ubp.Count())))
                    elif step != "!":
                        first = next(each for each in armed
                                     if each[0] == step)
                        armed.remove(first)
                        first[1].remove()
                    self.judge(process, armed)
                lent = [view.lenders for view in ubp.status(target.pid)]
                self.assertEqual([view for view in lent if view],
                                 [lent[0]] if any(
                                     each == "t" for each, _ in armed) else [])
                target.close()

    def test_who_is_between_the_jumps_is_moved_before_they_go(self):
        with self.attached() as (process, target):
            target.probe(self.TIGHT, ubp.Count())
            patch = next(patch for patch in target._installer.patches.values()
                         if patch.window.lender)
            done, move, write = [], ubp.move_threads, ubp.Patches.write

            def moving(tracer, inside, *rest):
                done.append(inside.get(patch.window.slot))
                return move(tracer, inside, *rest)

            def writing(patches):
                done.append("write")
                return write(patches)
            with mock.patch.object(ubp, "move_threads", moving), \
                    mock.patch.object(ubp.Patches, "write", writing):
                target.close()
            self.assertEqual([patch.window.site, "write"], done[:2])

    def judge(self, process, armed):
        """Each probe counts what the program does."""
        first = process.ask("p")
        before = [by_call(probe) for _, probe in armed]
        process.send("g")
        time.sleep(0.02)
        last = process.ask("p")
        for (which, probe), old in zip(armed, before):
            (name, n), = by_call(probe).items()
            self.assertEqual(n - old[name], {
                "t": int(last["tight"]) - int(first["tight"])}.get(
                    which, int(last["slow"]) - int(first["slow"])), name)
        self.assertEqual(last["wrong"], 0)
        process.send("g")

    def test_what_another_changed_there_is_kept_whole(self):
        """While the slot's jump, or the one to it, is not ours, the lender
        stays; when its own is not, only that is told."""
        with self.attached() as (process, target):
            plan, = target.plan(self.TIGHT)
            window = plan.window
        for vaddr, kept in ((window.slot + 4, "slot and lender"),
                            (window.site + 1, "site and lender"),
                            (window.lender.site + 4, "lender")):
            with self.subTest(kept), self.attached() as (process, target):
                process.ask("p")        # nobody runs what we break here
                moved = int(process.ready["tight"]) - window.site
                vaddr += moved
                target.probe(self.TIGHT, ubp.Count())
                with open("/proc/%d/mem" % process.pid, "r+b", 0) as memory:
                    ours = os.pread(memory.fileno(), 1, vaddr)
                    os.pwrite(memory.fileno(), b"\xf4", vaddr)
                    target.close()
                    self.assertIn("changed by another tool",
                                  "\n".join(target.removal.notes))
                    there = os.pread(memory.fileno(), 5,
                                     window.lender.site + moved)
                    self.assertEqual(there[:1], b"\xe9", kept)
                    os.pwrite(memory.fileno(), ours, vaddr)
                self.assertTrue(ubp.clean(process.pid))
                process.send("g")

    def test_none_is_armed_without_the_other(self):
        """The text of one changes between the plan and the pause: xor gets
        its other encoding."""
        arm = ubp.arm
        for changed in "lender", "site":
            plans = []

            def late(tracer, *rest):
                window = plans[0].window
                vaddr = (window.lender if changed == "lender"
                         else window).site
                with open("/proc/%d/mem" % tracer.tgid, "r+b", 0) as memory:
                    self.assertEqual(os.pread(memory.fileno(), 1, vaddr),
                                     b"\x31")
                    os.pwrite(memory.fileno(), b"\x33", vaddr)
                    try:
                        return arm(tracer, *rest)
                    finally:
                        os.pwrite(memory.fileno(), b"\x31", vaddr)

            with self.subTest(changed), self.attached() as (process, target):
                plans += target.plan(self.TIGHT)
                with mock.patch.object(ubp, "arm", late):
                    with self.assertRaisesRegex(ubp.ProbeError, "changed"):
                        target.probe(self.TIGHT, ubp.Count())
                self.assertEqual({}, target._installer.patches)
                process.ask("p")
                self.assertEqual(live.changed_text(process.pid), [])
                process.send("g")


class Moves(unittest.TestCase):
    """Who is planned first takes the nearest slot; it moves to another if
    one that has no other needs it, and it is not armed yet.

    windows.c's win_way0 to 4 reach a slot each in their own nops, and the
    one in front of it; the last has none of its own.
    """
    WAYS = ["exe:win_way%d" % n for n in range(5)]
    attached = Lenders.attached

    def slots(self, plans):
        """By which function a slot is in front of a way, or its own."""
        first = plans[0].site.vaddr
        return [(plan.window.slot - first) // 125 for plan in plans]

    def test_all_have_one_only_if_all_but_the_last_move(self):
        with self.attached() as (process, target):
            for order in self.WAYS, self.WAYS[::-1], self.WAYS[2:4]:
                plans = target.plan(order)
                self.assertEqual(["jump"] * len(order),
                                 [plan.strategy for plan in plans])
            plans = target.plan(self.WAYS)
            self.assertEqual([-1, 0, 1, 2, 3], self.slots(plans))
            self.assertEqual([0, 1, 2, 3],
                             self.slots(target.plan(self.WAYS[:4])))
            for plan in plans:
                (slot, _), (site, _) = plan.old
                self.assertEqual((slot, site), (plan.window.slot,
                                                plan.window.site))
            target.close()
            process.ask("p")
            process.send("g")

    def test_the_fewest_move(self):
        with self.attached() as (process, target):
            ways = self.WAYS
            for order, expected in (
                    ([0, 3, 4], [0, 2, 3]), ([0, 2, 3, 4], [0, 1, 2, 3]),
                    ([1, 2], [1, 2])):
                plans = target.plan([ways[n] for n in order])
                first = plans[0].site.vaddr - 125 * order[0]
                self.assertEqual(expected, [
                    (plan.window.slot - first) // 125 for plan in plans])
            process.ask("p")
            process.send("g")

    def test_what_is_armed_stays(self):
        """A way that finds none is refused, until it is one's turn to go."""
        with self.attached() as (process, target):
            first = [target.probe(way, ubp.Count()) for way in self.WAYS[:4]]
            armed = live.changed_text(process.pid)
            with self.assertRaisesRegex(ubp.ProbeError, "leads to"):
                target.probe(self.WAYS[4], ubp.Count())
            self.assertEqual(armed, live.changed_text(process.pid))
            first.pop().remove()
            last = target.probe(self.WAYS[4], ubp.Count())
            with self.assertRaisesRegex(ubp.ProbeError, "leads to"):
                target.probe(self.WAYS[3], ubp.Count())
            self.judge(process, first + [last])
            target.close()

    def test_random_groups_count_what_is_called(self):
        rand = random.Random(5)
        with self.attached() as (process, target):
            armed, n_moved = [], 0
            old = ubp.Planner._move

            def move(planner, *which):
                nonlocal n_moved
                is_moved = old(planner, *which)
                n_moved += is_moved
                return is_moved
            with mock.patch.object(ubp.Planner, "_move", move):
                for turn in range(24):
                    if armed and rand.random() < 0.5:
                        armed.pop(rand.randrange(len(armed))).remove()
                    else:
                        try:
                            armed.append(target.probe(rand.sample(
                                self.WAYS, rand.randint(1, 5)), ubp.Count()))
                        except ubp.ProbeError:
                            continue        # each of them was refused
                    if turn % 4 == 3:
                        self.judge(process, armed)
            self.assertGreater(n_moved, 3)
            target.close()

    def judge(self, process, probes):
        """Each way is called as often as win_tight."""
        first = process.ask("p")
        before = [by_call(probe) for probe in probes]
        process.send("g")
        time.sleep(0.02)
        last = process.ask("p")
        n = int(last["tight"]) - int(first["tight"])
        for probe, old in zip(probes, before):
            self.assertEqual({name: n for name in old}, {
                name: count - old[name]
                for name, count in by_call(probe).items()})
        self.assertEqual(last["wrong"], 0)
        process.send("g")


class Named(unittest.TestCase):
    """A register that the program needs no more, and a probe names."""

    SITES = "0x1c", "0x20", "0x24", "0x26", "0x2b"       # of a loop

    def counts(self, arm):
        """What arm(target, sites) -> probe has of r8 to r11, called."""
        with live.Target("sites", 0, seconds=60) as child, \
                ubp.attach(child.pid) as target:
            child.ask("s")
            probe = arm(target, ["exe:site_dead+" + at for at in self.SITES])
            times = child.ask("d")["times"]
            found = probe.read()
            target.close()
            child.quit()
        return times, found

    def test_all_sites_see_what_the_program_left_there(self):
        by = "r8, r9, r10, r11"

        def one_probe(target, sites):
            return target.probe(sites, ubp.Count(by=by))

        def first_of_two(target, sites):
            probe = target.probe(sites[1::2], ubp.Count(by=by))
            target.probe(sites, ubp.Hist("rax * rcx + rdx", by="rcx, rax"))
            return probe
        for arm, n in (one_probe, 5), (first_of_two, 2):
            with self.subTest(arm.__name__):
                times, found = self.counts(arm)
                self.assertEqual(found, {(8, 9, 10, 11): 5 * n * times})


class Planning(unittest.TestCase):

    def test_text_is_read_once_for_all_sites_and_anew_for_the_next(self):
        """What others wrote between two plannings is seen by the second."""
        with live.Target("sites", 0, seconds=60) as child, \
                ubp.attach(child.pid) as target:
            reads = []

            def read(vaddr, size):
                reads.append(vaddr)
                data = target._read(vaddr, size)
                return bytes(size) if is_changed else data
            planner = ubp.Planner(child.pid, read)
            sites = target._sites("exe:site_*")
            for is_changed, rule in (False, ""), (True, "changed text"):
                planner.keep_only({})
                reads.clear()
                plans = planner.settle([planner.plan(site)
                                        for site in sites])
                pages = {plan.window.site & -4096 for plan in plans
                         if plan.window} or set(reads)
                self.assertLess(len(pages), len(sites))
                self.assertEqual([reads.count(page) for page in pages],
                                 [1] * len(pages))
                self.assertIn(rule, {plan.rule for plan in plans})
            planner.close()
            target.close()
            child.quit()


    def test_a_plan_knows_the_probes_that_are_in(self):
        with live.Target("busy", 1) as process, \
                ubp.attach(process.pid) as target:
            alone, = target.plan("exe:hot")
            where = ["exe:hot", "exe:hot+%d" % (
                alone.window.insns[1].vaddr - alone.window.site)]
            target.probe(where[0], ubp.Count())
            for plan in target.plan(where):
                self.assertEqual(plan.window, alone.window)
                self.assertGreater(plan.trampoline_size,
                                   alone.trampoline_size)
            with ubp.attach(process.pid) as other:
                self.assertEqual(["changed text"] * 2,
                                 [plan.rule for plan in other.plan(where)])


HELPED = r"""
import gc, json, os, signal, subprocess, sys, threading, time
sys.path.insert(0, %(root)r)
import ubp

CASES, us, n_forks, original = {}, os.getpid(), [0], ubp.syscall
signals, ubp.memory_left = [], lambda: 1 << 40

def case(function):
    CASES[function.__name__] = function

def counted(number, *args):
    n_forks[0] += number == ubp.SYS_clone
    return original(number, *args)

def plan(target, what, cpus=(0, 1), **options):
    os.sched_getaffinity = lambda pid: set(cpus)
    return target.plan(what, **options)

def small():
    "It takes fewer sites."
    ubp._LEAST_TO_FORESEE, ubp._CHUNK = 300, 16

def help_by(work):
    "Children do that instead."
    ubp.Foresight._help = lambda self, *args: work(self, *args)

@case
def dies(*args):
    os._exit(1)

@case
def is_killed_in_the_middle(self, *args):
    foresee = self._foresee
    def half(chunk):
        for n, found in enumerate(foresee(chunk)):
            if n == 9 and chunk > self._first + 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield found
    self._foresee = half
    helped(self, *args)

@case
def hangs(*args):
    time.sleep(1000)

@case
def stops(*args):
    os.kill(os.getpid(), signal.SIGSTOP)

@case
def raises(*args):
    raise RuntimeError("for nobody")

@case
def interrupts_itself(self, *args):
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1000)

@case
def says_rubbish(self, *args):
    self._map[ubp.PAGE:] = os.urandom(len(self._map) - ubp.PAGE)

@case
def says_half_of_it(self, *args):
    seal = ubp._sealed
    ubp._sealed = lambda data: seal(data)[:-3]
    helped(self, *args)

@case
def says_nothing_is_left(self, *args):
    self._map[:8] = bytes(8)

@case
def may_not_read(self, *args):
    def read(vaddr, size):
        raise ubp.TraceeGone("read", "it", "EPERM")
    self._planner.read = read
    self._foresee = lambda chunk: [
        (site.vaddr, (ubp.ubp_x86.Window(site.vaddr, 5, ()), ()))
        for site in self._sites]        # told if it went on all the same
    helped(self, *args)

def left():
    "Children, zombies too, and descriptors."
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%%s/stat" %% pid) as f:
                if int(f.read().rpartition(")")[2].split()[1]) == us:
                    found.append(int(pid))
        except OSError:
            pass
    return sorted(found), sorted(os.listdir("/proc/self/fd"))

def tell(name, *values):
    print(json.dumps([name] + list(values)), flush=True)

helped, ubp.syscall = ubp.Foresight._help, counted
with ubp.attach(int(sys.argv[1])) as target:
    %(code)s
"""


class Helped(unittest.TestCase):
    """Plans that forked children help with: each must equal, in all fields,
    what one process plans. The judge of what is left is /proc."""

    def host(self, pid, code, *arguments):
        """{case: values} of what a host of its own tells."""
        code = HELPED % {"root": os.path.dirname(os.path.abspath(
            ubp.__file__)), "code": code.strip().replace("\n", "\n    ")}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, "%d" % pid]
            + list(arguments), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, timeout=200)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        return {name: values for name, *values in map(
            json.loads, done.stdout.splitlines())}

    def test_a_plan_is_that_of_one_process(self):
        code = """
what, how = sys.argv[2].split(), {}
if len(what) > 1:
    how["action"] = ubp.Hist("arg0")    # exits need something at the entry
    small()
one = plan(target, what, {0}, **how)
before, forks = left(), n_forks[0]
other = plan(target, what, range(int(sys.argv[3])), **how)
tell("found", one == other, len(one), forks, n_forks[0], before == left())
"""
        for kind, what, n in ((live.Target, "libc:*", 3),
                              (live.Target, "libc:s* libc:s*%return", 2),
                              (servers.Redis, "exe:*", 2),
                              (servers.Nginx, "exe:*", 6)):
            if kind != live.Target and kind.missing():
                continue
            with self.subTest((kind, what)), kind(
                    *["busy"] * (kind == live.Target)) as target:
                is_equal, n_sites, *rest = self.host(
                    target.pid, code, what, "%d" % n)["found"]
                self.assertTrue(is_equal)
                self.assertGreater(n_sites, 600)
                self.assertEqual(rest, [0, min(n, 4) - 1, True])

    def test_functions_that_begin_in_others_are_planned_in_any_order(self):
        """The outer ones do not decode; those within are functions."""
        code = """
small()
one = plan(target, "exe:*", {0})
alone = [plan(target, "exe:" + name, {0})[0] for name in (
    "outer3", "first7", "second50", "plain99")]
other = plan(target, "exe:*")
of = {each.site.vaddr: each for each in one}
tell("found", one == other, [each.strategy for each in alone],
     [bool(of[each.site.vaddr].strategy) for each in alone], n_forks[0])
"""
        with live.Target("nested", seconds=100) as child:
            self.assertEqual(self.host(child.pid, code)["found"], [
                True, ["", "jump", "jump", "jump"],
                [False, True, True, True], 1])

    def test_sites_that_share_windows_are_planned_as_by_one_process(self):
        """What is foreseen of a site does not hold where the bytes have been
        taken for another, and for one that has a debug register."""
        code = """
small()
sites = []
for each in plan(target, "libc:s*", {0}):
    sites += [each.site._replace(vaddr=insn.vaddr, offset=insn.vaddr
              - each.site.vaddr) for insn in (
              each.window.insns[:3] if each.window else ())]
def made(cpus, n_watched=0):
    os.sched_getaffinity = lambda pid: set(cpus)
    planner = ubp.Planner(target.pid, target._read, len(sites))
    planner.watch([site.vaddr for site in sites[:n_watched]])
    found = planner.settle(ubp._by_address(
        planner, sites, ("jump",), lambda n, site: ubp._plan_site(
            planner, site, ("jump",), index=n)))
    planner.close()
    return found
for n_watched in 0, 300:
    one, forks = made({0}, n_watched), n_forks[0]
    tell(str(n_watched), one == made({0, 1}, n_watched), forks, n_forks[0],
         len({each.rule for each in one}),
         len({each.window and each.window.site for each in one}) < len(one))
    n_forks[0] = 0
"""
        with live.Target("busy", 1, seconds=100) as child:
            found = self.host(child.pid, code)
        for name, n_rules in ("0", 1), ("300", 2):
            self.assertEqual(found[name][:3] + found[name][4:],
                             [True, 0, 1, True])
            self.assertGreaterEqual(found[name][3], n_rules)

    def test_a_child_that_fails_costs_its_help_and_nothing_else(self):
        code = """
small()
one, before = plan(target, "libc:s*", {0}), left()
for name, work in CASES.items():
    help_by(work)
    shares = []
    other = plan(target, "libc:s*", progress=lambda n, n_all: shares.append(n))
    tell(name, one == other, n_forks[0], before == left(),
         shares == list(range(1, 1 + len(one))))
    n_forks[0] = 0
"""
        with live.Target("busy", 1, seconds=100) as child:
            found = self.host(child.pid, code)
        self.assertEqual(len(found), 10)
        for name, values in found.items():
            self.assertEqual(values, [True, 1, True, True], name)

    def test_where_a_fork_is_unsafe_or_not_worth_it_there_is_none(self):
        code = """
tell("few", len(plan(target, "libc:s*")) > 300, n_forks[0])
small()
for name, options in (("one cpu", {"cpus": (3,)}),
                      ("no jump", {"strategy": "int3"})):
    tell(name, len(plan(target, "libc:s*", **options)) > 300, n_forks[0])
ubp.memory_left = lambda: (512 << 20) - 1
tell("no memory", len(plan(target, "libc:s*")) > 300, n_forks[0])
ubp.memory_left = lambda: 1 << 40
done = threading.Event()
thread = threading.Thread(target=done.wait)
thread.start()
tell("a thread", len(plan(target, "libc:s*")) > 300, n_forks[0])
done.set()
thread.join()
"""
        with live.Target("busy", 1, seconds=100) as child:
            found = self.host(child.pid, code)
        self.assertEqual(found, dict.fromkeys(
            ("few", "one cpu", "no jump", "no memory", "a thread"),
            [True, 0]))

    # MemAvailable, kB | /proc/self/cgroup | files that tell | bytes left
    LEFT = """
    1000 | 0::/        |                                          | 1024000
         | 0::/        |                                          | 0
    1000 | 0::/        | memory.max 5000 memory.current 2000      | 3000
    1000 | 0::/        | memory.max max memory.current 2000       | 1024000
    1000 | 0::/        | memory.max 2000 memory.current 5000      | 0
    1000 | 0::/        | memory.high 4000 memory.current 2000     | 2000
    1000 | 0::/a/b     | a/memory.max 5000 a/memory.current 2000  | 3000
    1000 | 0::/a/b     | a/b/memory.max 9 a/b/memory.current 2    | 7
    1000 | 0::/a       | b/memory.max 9 b/memory.current 2        | 1024000
    1000 | 4:memory:/a | memory/a/memory.limit_in_bytes 9000 \
                         memory/a/memory.usage_in_bytes 8000      | 1000
    1000 | 4:memory:/a | memory/memory.limit_in_bytes 900 \
                         memory/memory.usage_in_bytes 800         | 100
    1000 | 4:cpu:/a    | memory/a/memory.limit_in_bytes 9000 \
                         memory/a/memory.usage_in_bytes 8000      | 1024000
    """

    def test_the_memory_that_is_left_is_that_of_the_tightest_cgroup(self):
        for line in self.LEFT.replace("\\\n", " ").strip().splitlines():
            total, groups, tells, left = [
                word.strip() for word in line.split("|")]
            words = tells.split()
            files = {"/sys/fs/cgroup/" + name: value.encode() + b"\n"
                     for name, value in zip(words[::2], words[1::2])}
            files["/proc/self/cgroup"] = groups.encode() + b"\n"
            files["/proc/meminfo"] = b"MemTotal: 7 kB\n" + (
                b"MemAvailable: %s kB\n" % total.encode() if total else b"")
            with self.subTest(line), mock.patch.object(
                    ubp, "read_proc", lambda path: files.get(path, b"")):
                self.assertEqual(int(left), ubp.memory_left())

    def test_there_is_memory_left_here(self):
        pages = os.sysconf("SC_PHYS_PAGES")
        self.assertIn(ubp.memory_left() // os.sysconf("SC_PAGE_SIZE"),
                      range(1, pages))

    def test_the_host_does_not_notice_the_children(self):
        """Not by SIGCHLD, at-fork hooks, wait(2) or what signals to the
        whole group do to its handlers; its mask stays."""
        code = """
woken = os.pipe2(os.O_NONBLOCK)
signal.set_wakeup_fd(woken[1])
signal.signal(signal.SIGUSR1, lambda *args: None)
os.register_at_fork(before=lambda: signals.append("fork"),
                    after_in_child=lambda: signals.append("fork"))
small()
one = plan(target, "libc:s*", {0})
for name, handler in (("ignored", signal.SIG_IGN),
                      ("handled", lambda *args: signals.append("CHLD"))):
    signal.signal(signal.SIGCHLD, handler)
    before, found = left(), []
    def look(n, n_all):
        for pid in left()[0] if n == 1 else ():
            os.kill(pid, signal.SIGUSR1)
        try:
            found.append(os.waitpid(-1, os.WNOHANG))
        except ChildProcessError:
            pass
    same = one == plan(target, "libc:s*", progress=look)
    try:
        signals += os.read(woken[0], 99)
    except BlockingIOError:
        pass
    tell(name, same, n_forks[0], signals, found, before == left(),
         sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    n_forks[0] = 0
""" if sys.version_info >= (3, 7) else "tell('old')"
        with live.Target("busy", 1, seconds=100) as child:
            found = self.host(child.pid, code)
        for values in found.values():
            self.assertIn(values, ([], [True, 1, [], [], True, []]))

    def test_an_interrupted_plan_leaves_no_child(self):
        code = """
plan(target, "libc:*printf")
before = left()
for name, at, error in ("Ctrl-C", 300, KeyboardInterrupt), (
        "a bug of the host", 1500, ZeroDivisionError):
    def stop(n, n_all):
        if n == at:
            raise error
    try:
        plan(target, "libc:*", progress=stop)
    except error:
        tell(name, n_forks[0], before == left())
"""
        with live.Target("busy", 1, seconds=100) as child:
            self.assertEqual(self.host(child.pid, code), {
                "Ctrl-C": [1, True], "a bug of the host": [2, True]})

    def test_children_end_with_their_parent(self):
        """kill -9 of it is no reason for them to stay."""
        code = """
def look(n, n_all):
    if n == 1:
        tell("children", left()[0])
        os.kill(os.getpid(), signal.SIGKILL)
help_by(lambda *args: (helped(*args), time.sleep(1000)))
plan(target, "libc:*", progress=look)
"""
        code = HELPED % {"root": os.path.dirname(os.path.abspath(
            ubp.__file__)), "code": code.strip().replace("\n", "\n    ")}
        with live.Target("busy", 1, seconds=100) as child:
            done = subprocess.run([sys.executable, "-c", code,
                                   "%d" % child.pid], stdout=subprocess.PIPE,
                                  timeout=60)
        (_, (pid,)), = map(json.loads, done.stdout.splitlines())
        self.assertTrue(live.settled(
            lambda: not os.path.exists("/proc/%d/exe" % pid), 5))


class Faults(unittest.TestCase):

    def test_20_a_load_that_may_fault_stays_where_a_handler_looks(self):
        """Behind it a probe counts the calls that go on, and reads what the
        load leaves alone."""
        with live.Target("sites", 0, "catch", seconds=60) as child, \
                ubp.attach(child.pid) as target:
            count = target.probe("exe:site_load", ubp.Count())
            hist = target.probe("exe:site_load", ubp.Hist("arg1"))
            for action, when in ((ubp.Hist("rax"), None),
                                 (ubp.Count(), "rax > 3")):
                with self.assertRaises(ubp.ProbeError) as caught:
                    target.probe("exe:site_load", action, when)
                self.assertIn("has to stay", str(caught.exception))
            times = child.ask("l")["times"]
            self.assertEqual(count.read(), times)
            self.assertEqual((hist.read().count, hist.read().max),
                             (times, times - 1))
            hist.remove()
            child.ask("l")
            self.assertEqual(count.read(), 2 * times)
            target.close()
            self.assertEqual(live.changed_text(child.pid), [])
            child.quit()

    def test_20_all_that_stay_in_front_of_a_jump_share_it_in_any_order(self):
        names = ["exe:site_load+%d" % at for at in (0, 3, 9)]
        with live.Target("sites", 0, "catch", seconds=60) as child, \
                ubp.attach(child.pid) as target:
            plans = target.plan(names)
            self.assertEqual({plan.window.site % 32 for plan in plans},
                             {plans[0].site.vaddr % 32 + 9})
            for order in itertools.permutations(names):
                with self.subTest(order):
                    probes = [target.probe(name, ubp.Hist("arg1"))
                              for name in order]
                    times = child.ask("l")["times"]
                    self.assertEqual([probe.read().count for probe in probes],
                                     [times] * 3)
                    probes.pop(0).remove()
                    child.ask("l")
                    self.assertEqual([probe.read().count for probe in probes],
                                     [2 * times] * 2)
                    for probe in probes:
                        probe.remove()
            with self.assertRaisesRegex(ubp.ProbeError, "has to stay"):
                target.probe(names[1], ubp.Hist("rdx"))
            target.close()
            self.assertEqual(live.changed_text(child.pid), [])
            child.quit()


if __name__ == "__main__":
    unittest.main()
