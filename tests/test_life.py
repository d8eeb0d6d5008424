"""The slower strategies, and targets that fork, exec and start threads.

A target says itself how often it did what was counted (targets/life.c), in
primes; what may not change is read from /proc.
"""
import collections
import ctypes
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import live

TOP = os.path.dirname(live.HERE)


def setUpModule():
    global ubp
    ubp = live.core()


def probed(target, where, strategy):
    """The Probe of a Count, or None where it is refused."""
    try:
        return target.probe(where, ubp.Count(), strategy=strategy)
    except ubp.ProbeError:
        return None


def killed_when_armed(pid, strategy, *where):
    """A process that has probes in pid is ended by SIGKILL."""
    with live.python(
            "t = ubp.attach(%d)\n"
            "p = t.probe(%r, ubp.Count(), strategy=%r)\n"
            "print('armed', flush=True)\n"
            "time.sleep(60)\n" % (pid, list(where), strategy)) as tracer:
        assert tracer.line() == "armed"
        tracer.kill()


class Hardware(unittest.TestCase):
    """Debug registers by perf_event_open."""

    @classmethod
    def setUpClass(cls):
        try:
            ubp.check_debug_registers()
        except ubp.ProbeError as refusal:
            raise unittest.SkipTest("%s (%s)" % (refusal, refusal.hint))

    # what is probed | what the target is told | which hits that are
    COUNTS = """
    exe:step               | c   | calls
    exe:step               | ct  | calls in threads that start later
    exe:step               | tcf | calls in a forked child too
    exe:step               | vc  | calls of a child that then becomes another
    mem:counter            | w   | writes
    mem:counter/4          | w   | writes of eight bytes to a watched half
    mem:exe:counter/8:rw   | wr  | writes and reads
    mem:buffer/8           | z   | writes by the kernel
    """

    def test_counts_what_the_target_did(self):
        for line in self.COUNTS.strip().splitlines():
            where, commands, what = [w.strip() for w in line.split("|")]
            if what == "writes by the kernel" and not live.IS_ROOT:
                continue
            with self.subTest(what), live.Target("life") as process, \
                    ubp.attach(process.pid) as target:
                probe = target.probe(where, ubp.Count(), strategy="hw")
                n = sum(process.ask(c)["n"] for c in commands)
                self.assertEqual((n, n, 0),
                                 (probe.read(), probe.hits, probe.dropped))
                target.close()
                process.ask("c")
                process.ask("w")
                self.assertEqual(n, probe.read(), "counted after removal")
                process.quit()

    def test_computes_what_a_jump_computes(self):
        for make in (lambda: ubp.Count(sum="arg0"),
                     lambda: ubp.Hist("arg0 - 500"),
                     lambda: ubp.Hist("arg1 * arg0 % 777")):
            with self.subTest(repr(make())), live.Target("life") as process, \
                    ubp.attach(process.pid) as target:
                for when in (None, "arg0 % 3 == 1 and arg1 > 300"):
                    by_hw = target.probe("exe:step", make(), when, "hw")
                    by_jump = target.probe("exe:step", make(), when)
                    for command in "ctf":
                        process.ask(command)
                    self.assertGreater(by_jump.hits, 400)
                    self.assertEqual(by_jump.read(), by_hw.read())
                    self.assertEqual(by_jump.hits, by_hw.hits)
                    by_hw.remove()
                    by_jump.remove()
                process.quit()

    def test_keys_tell_threads_processes_and_callers_apart(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            tids = target.probe("exe:step", ubp.Count(by="tid"),
                                strategy="hw")
            pids = target.probe("exe:step", ubp.Count(by="pid, cpu >= 0"),
                                strategy="hw")
            callers = target.probe("exe:step", ubp.Count(by="caller"),
                                   strategy="hw")
            for command in "ctf":
                process.ask(command)
            counts = tids.read()
            self.assertEqual(counts.pop(process.pid), 1009)
            self.assertEqual(sorted(counts.values()), [211] * 4 + [307])
            self.assertEqual(sorted(pids.read().values()), [307, 1853])
            self.assertEqual(pids.read()[process.pid, 1], 1853)
            functions = {}
            for vaddr, n in callers.read().items():
                name = target.find("0x%x" % vaddr)[0].function.name
                functions[name] = functions.get(name, 0) + n
            self.assertEqual(2160, sum(functions.values()))
            self.assertEqual(2160, callers.hits)
            process.quit()

    def test_a_watch_tells_who_wrote(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            probe = target.probe("mem:counter:rw", ubp.Count(by="caller"),
                                 strategy="hw")
            process.ask("w")
            process.ask("r")
            self.assertEqual([53, 101], sorted(probe.read().values()))
            for vaddr in probe.read():
                self.assertEqual("main", target.find("0x%x" % vaddr)[
                    0].function.name)
            process.quit()

    def test_records_the_same_events_as_a_jump(self):
        seen = []
        for strategy in ("jump", "hw"):
            with live.Target("life") as process:
                with ubp.attach(process.pid) as target:
                    target.probe("exe:step", ubp.Trace(
                        "arg0", "arg0 + arg1", "s32(rdi) // 3"),
                        "arg0 % 2", strategy)
                    for command in "cf":
                        process.ask(command)
                    events = list(target.events(0.3))
                self.assertEqual(events, sorted(
                    events, key=lambda event: event.time_ns))
                seen.append([(event.values, event.kind, event.site.offset)
                             for event in events])
                process.quit()
        self.assertEqual(*seen)
        self.assertEqual(504 + 153, len(seen[0]))

    EXITS = """
    exe:step%return         | Count                       |
    exe:step%return         | Hist ret                    | arg0 % 5 == 2
    exe:step%return         | Hist ret - arg0 * 3 - arg1  |
    exe:step%return         | Count by arg0 % 3, ret & 1  | ret > 900
    exe:step%return         | Count sum ret               | arg0 < 99
    exe:step                | Latency                     | arg0 % 7 == 1
    exe:step%return         | Count                       | elapsed >= 0
    """

    def test_exits_compute_what_those_of_a_jump_do(self):
        actions = {"Count": lambda text: ubp.Count(),
                   "Count by": lambda text: ubp.Count(by=text),
                   "Count sum": lambda text: ubp.Count(sum=text),
                   "Hist": ubp.Hist, "Latency": lambda text: ubp.Latency()}
        for line in self.EXITS.strip().splitlines():
            where, what, when = [w.strip() for w in line.split("|")]
            name = re.match("Count by|Count sum|[A-Z][a-z]+", what).group()
            action = actions[name](what[len(name):].strip())
            with self.subTest(line), live.Target("life") as process, \
                    ubp.attach(process.pid) as target:
                by_hw = target.probe(where, action, when or None, "hw")
                by_jump = target.probe(where, action, when or None)
                for command in "ct":
                    process.ask(command)
                self.assertGreater(by_jump.hits, 50)
                self.assertEqual(by_jump.hits, by_hw.hits)
                self.assertEqual((0, 0), (by_jump.dropped, by_hw.dropped))
                if name == "Latency":
                    self.assertEqual(by_jump.read().count,
                                     by_hw.read().count)
                    self.assertGreater(by_hw.read().min, 0)
                elif "elapsed" not in when:
                    self.assertEqual(by_jump.read(), by_hw.read())
                reading = by_hw.reading()
                self.assertEqual((0, 0, 0), (
                    reading.unmatched, reading.abandoned,
                    reading.unfinished))
                target.close()
                process.quit()

    def test_exits_that_need_more_registers_than_there_are(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            with self.assertRaises(ubp.ProbeError) as caught:
                target.probe("libc:strlen", ubp.Latency(), strategy="hw")
            self.assertRegex(str(caught.exception),
                             r"\d+ exits and its entry would take \d+ "
                             "debug registers of 4")
            target.probe("exe:step", ubp.Latency(), strategy="hw")
            target.probe("mem:counter", ubp.Count(), strategy="hw")
            with self.assertRaises(ubp.ProbeError) as caught:
                target.probe("exe:step", ubp.Latency(), strategy="hw")
            self.assertIn("step, step+0x", str(caught.exception))
            process.quit()

    def test_stacks_are_counted_as_by_a_jump(self):
        for make in (lambda: ubp.Stack(unwind="cfi"),
                     lambda: ubp.Stack(sum="arg0", unwind="cfi"),
                     lambda: ubp.Stack(2, unwind="cfi")):
            with self.subTest(repr(make())), live.Target("life") as process, \
                    ubp.attach(process.pid) as target:
                by_hw = target.probe("exe:step", make(), strategy="hw")
                by_jump = target.probe("exe:step", make())
                process.ask("c")
                self.assertEqual((1009, 1009), (by_jump.hits, by_hw.hits))
                names = [{tuple(frame.function for frame in stack): n
                          for stack, n in probe.read().items()}
                         for probe in (by_jump, by_hw)]
                self.assertEqual(*names)
                target.close()
                process.quit()

    def test_stacks_of_who_writes_a_variable(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            probe = target.probe("mem:counter", ubp.Stack(), "new >= 70",
                                 "hw")
            process.ask("w")
            [(stack, n)] = probe.read().items()
            self.assertEqual(("main", 91), (stack[0].function, n))
            self.assertEqual((91, 0), (probe.hits, probe.dropped))
            process.quit()

    def test_the_command_tells_who_writes_a_variable(self):
        for words, wanted in (
                (["count", "--by", "caller"], r"101 .*main\+0x"),
                (["stack"], r"main"),
                (["trace", "-e", "old, new", "--stack"],
                 r"(?s)old=63 new=70.*main")):
            with self.subTest(words[0]), live.Target("life") as process:
                with live.Process([sys.executable, TOP + "/ubp.py", *words,
                                   "-p", process.pid, "mem:counter",
                                   "--strategy", "hw"]) as command:
                    self.assertTrue(live.settled(
                        lambda: "by hw" in command.stderr(), 10))
                    process.ask("w")
                    time.sleep(0.2)
                    command.process.send_signal(signal.SIGINT)
                    self.assertEqual(0, command.wait())
                    text = command.process.stdout.read().decode()
                    self.assertIn("hits 101 = recorded 101", command.stderr())
                self.assertRegex(text, wanted)
                process.quit()

    def test_a_watch_knows_the_value_before_and_after(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            probe = target.probe("mem:counter", ubp.Trace("old", "new"),
                                 strategy="hw")
            process.ask("w")
            seen = [event.values for event in target.events(0.3)]
            values = [7 * n for n in range(101)]
            self.assertEqual(list(zip([0] + values, values)), seen)
            self.assertEqual((101, 0), (probe.hits, probe.dropped))
            only = target.probe("mem:counter", ubp.Count(),
                                "new == 70 and old == 63", "hw")
            process.ask("w")
            self.assertEqual(1, only.read())
            process.quit()

    def test_what_no_register_tells_is_read_or_a_fault(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            probe = target.probe("mem:total", ubp.Trace("old", "new"),
                                 strategy="hw")
            values = []
            for _ in range(5):
                n = process.ask("+")["sum"]
                values += [event.values for event in target.events(0.3)]
            known = [new for _, new in values if new is not None]
            self.assertEqual(len(values), probe.hits)
            self.assertEqual(5, len(values))
            self.assertEqual(n, values[-1][1])
            self.assertEqual(sorted(known), known)
            process.quit()

    def test_the_stack_of_who_wrote(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            target.probe("mem:counter", ubp.Trace("new", stack=True),
                         "new == 70", "hw")
            target.probe("exe:step", ubp.Trace("arg0", stack=True),
                         "arg0 == 7", "hw")
            process.ask("w")
            process.ask("t")
            events = list(target.events(0.5))
            self.assertEqual([70] + [7] * 4,
                             [event.values[0] for event in events])
            names = [[frame.function for frame in event.stack]
                     for event in events]
            self.assertEqual("main", names[0][0])
            for each in names[1:]:
                self.assertEqual("step", each[0])
                self.assertIn("in_thread", each)
            process.quit()

    def test_old_and_new_need_a_watch(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            with self.assertRaises(ubp.ProbeError) as caught:
                target.probe("exe:step", ubp.Hist("new"))
            self.assertIn("mem:", str(caught.exception))

    def test_memory_that_cannot_be_read_is_a_counted_fault(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            probe = target.probe("exe:step", ubp.Hist("u64[arg0]"),
                                 strategy="hw")
            n = process.ask("c")["n"]
            self.assertEqual((n, n, 0), (probe.hits, probe.dropped,
                                         probe.read().count))
            process.quit()

    def test_hits_that_find_no_room_are_counted(self):
        with live.Target("busy", 2) as process, \
                ubp.attach(process.pid) as target:
            small, ubp._RING_PAGES = ubp._RING_PAGES, (1,)
            try:
                probe = target.probe("exe:hot", ubp.Count(by="tid"),
                                     strategy="hw")
            finally:
                ubp._RING_PAGES = small
            control = target.probe("exe:hot", ubp.Count())
            with probe._parts[0]._lock:         # nobody reads meanwhile
                process.send("g")
                time.sleep(0.3)
                process.ask("p")
            self.assertGreater(control.hits, 0)
            self.assertEqual(control.hits, probe.hits)
            self.assertGreater(probe.dropped, 0)
            self.assertEqual(control.hits - probe.dropped,
                             sum(probe.read().values()))
            process.quit()

    def test_watch_of_writes_ignores_reads_and_neighbours(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            writes = target.probe("mem:counter:w", ubp.Count(), strategy="hw")
            beside = target.probe("mem:odd_sized+4/4:rw", ubp.Count(),
                                  strategy="hw")
            process.ask("r")
            self.assertEqual((0, 0), (writes.read(), beside.read()))
            process.quit()

    def test_nothing_of_the_target_changes_while_armed(self):
        with live.Target("life") as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as target:
                target.probe(["exe:step", "mem:counter"], ubp.Count(),
                             strategy="hw")
                live.Snapshot(process.pid).compare(self, before)
                self.assertEqual(0.0, target.pause_us)
                process.ask("c")
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_agrees_with_a_jump_at_the_same_site(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            by_hw = target.probe("exe:step", ubp.Count(), strategy="hw")
            by_jump = target.probe("exe:step", ubp.Count())
            for command in "cftc":
                process.ask(command)
                self.assertEqual(by_jump.read(), by_hw.read())
            by_jump.remove()
            process.ask("c")
            self.assertEqual(by_jump.read() + 1009, by_hw.read())
            process.quit()

    def test_a_fifth_is_refused_and_names_the_four(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            first = target.probe("exe:step", ubp.Count(), strategy="hw")
            target.probe(["exe:main", "mem:counter", "mem:buffer/8"],
                         ubp.Count(), strategy="hw")
            with self.assertRaises(ubp.ProbeError) as caught:
                target.probe("libc:write", ubp.Count(), strategy="hw")
            for name in ("step", "main", "mem:counter/8:w", "mem:buffer/8:w"):
                self.assertIn(name, str(caught.exception))
            first.remove()
            probe = target.probe("libc:write", ubp.Count(), strategy="hw")
            process.ask("c")
            self.assertEqual(1, probe.read())
            process.quit()

    def test_registers_that_others_hold_are_told(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as one, \
                ubp.attach(process.pid) as other:
            one.probe(["exe:main", "mem:counter", "mem:buffer/8"],
                      ubp.Count(), strategy="hw")
            with self.assertRaises(ubp.ProbeError) as caught:
                other.probe(["exe:step", "libc:write"], ubp.Count(),
                            strategy="hw")
            self.assertRegex(str(caught.exception), "ENOSPC.*others")
            self.assertEqual([], other.probes)
            other.probe("exe:step", ubp.Count(), strategy="hw")
            process.quit()

    REFUSED = """
    mem:odd_sized           | odd_sized has 12 bytes
    mem:own                 | thread-local
    mem:counter+1/8         | aligned
    mem:nonesuch            | no variable of that name
    mem:0x10/8              | nothing is mapped there
    """

    def test_what_cannot_be_watched_says_why(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            for line in self.REFUSED.strip().splitlines():
                where, why = [w.strip() for w in line.split("|")]
                with self.subTest(where):
                    with self.assertRaises(ubp.UbpError) as caught:
                        target.probe(where, ubp.Count(), strategy="hw")
                    self.assertIn(why, str(caught.exception))
            process.quit()

    def test_memory_without_hw_is_refused(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            with self.assertRaises(ubp.ProbeError) as caught:
                target.probe("mem:counter", ubp.Count())
            self.assertIn("--strategy hw", str(caught.exception))

    def test_tried_in_order_a_jump_comes_first(self):
        with live.Target("traps") as process, \
                ubp.attach(process.pid) as target:
            where = ["exe:step", "exe:odd_tight+11"]
            for strategies, second in (("jump,hw", "hw"),
                                       ("jump,int3,hw", "int3")):
                plans = target.plan(where, strategies)
                self.assertEqual(["jump", second],
                                 [plan.strategy for plan in plans])

    def test_a_jump_and_a_debug_register_never_hide_a_hit(self):
        """What a jump displaces runs elsewhere, where no debug register
        waits for it: one of both is refused, whichever comes second."""
        ways = ["exe:win_round+3"], ["exe:win_round", "exe:win_round+1"]
        for order in (("hw", "jump"), ("jump", "hw")):
            with self.subTest(order), live.Target("windows", "loop") \
                    as process, ubp.attach(process.pid) as target:
                probes = {}
                for strategy in order:
                    probes[strategy] = [p for p in (
                        probed(target, where, strategy)
                        for where in ways[strategy == "jump"]) if p]
                self.assertTrue(probes[order[0]])
                start = process.ask("p")["round"]
                hits = [p.read() for p in probes["hw"]]
                process.send("g")
                time.sleep(0.02)
                n = process.ask("p")["round"] - start
                self.assertGreater(n, 0)
                self.assertEqual([50 * n] * len(hits), [
                    p.read() - before for p, before in zip(
                        probes["hw"], hits)])
                process.send("g")
                process.quit()

    def test_no_thread_of_a_storm_is_missed_or_counted_twice(self):
        for _ in range(5):
            with live.Target("children", "threads") as process, \
                    ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count(), strategy="hw")
                start = process.ask("p")["hot"], probe.read()
                process.send("g")
                process.answer()
                time.sleep(0.05)
                end = process.ask("p")["hot"], probe.read()
                self.assertGreater(end[0], start[0])
                self.assertEqual(end[0] - start[0], end[1] - start[1])
                target.close()
                process.send("g")
                process.answer()
                process.quit()

    def test_breakpoints_end_with_a_tracer_that_is_killed(self):
        with live.Target("life") as process:
            before = live.Snapshot(process.pid)
            killed_when_armed(process.pid, "hw", "exe:step", "exe:main",
                              "mem:counter", "mem:buffer/8")
            live.Snapshot(process.pid).compare(self, before)
            with ubp.attach(process.pid) as target:     # all four are free
                probe = target.probe(
                    ["exe:step", "exe:main", "mem:counter", "mem:buffer/8"],
                    ubp.Count(), strategy="hw")
                self.assertEqual(process.ask("c")["n"], probe.read())
            process.quit()

    def test_the_command_says_that_nothing_was_written(self):
        with live.Target("life") as process:
            with live.Process([sys.executable, TOP + "/ubp.py", "count", "-p",
                               process.pid, "--strategy", "hw", "exe:step",
                               "mem:counter"]) as ubp_process:
                self.assertTrue(live.settled(
                    lambda: "2 sites by hw" in ubp_process.stderr(), 10))
                process.ask("c")
                process.ask("w")
                ubp_process.process.send_signal(signal.SIGINT)
                self.assertEqual(0, ubp_process.wait())
                text = ubp_process.stderr()
            self.assertIn("removed, no page was written; hits 1110 = "
                          "recorded 1110 + dropped 0", text)
            process.quit()

    def test_breakpoints_are_not_left_behind(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            target.probe("exe:step", ubp.Count(), strategy="hw")
            with self.assertRaises(ubp.ProbeError):
                target.detach()


class Traced(unittest.TestCase):
    """Debug registers by ptrace, hw-ptrace: the guardian stops at each hit."""

    @classmethod
    def setUpClass(cls):
        try:
            ubp.check_debug_registers()
        except ubp.ProbeError as refusal:
            raise unittest.SkipTest("%s (%s)" % (refusal, refusal.hint))

    # what is probed | what the target is told, %s answered n
    COUNTS = """
    exe:step               | c
    exe:step               | ct
    exe:step               | tcfv
    mem:counter            | w
    mem:exe:counter/8:rw   | wr
    """

    def test_a_thread_in_a_long_vfork_keeps_no_debug_registers(self):
        """The guardian stays for it, as long as that takes."""
        with live.Target("spawners", "1", "5000") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(),
                                     strategy="hw-ptrace")
                process.send("g")
                self.assertTrue(live.settled(lambda: probe.hits == 2, 4))
                target.close(timeout=1)
            self.assertTrue(live.settled(
                lambda: not live.tracers(process.pid), 20))
            found = process.ask("p")
            self.assertGreater(found["steps"], 2)
            self.assertEqual((found["tried"], 0), (
                found["good"], found["wrong"]), process.stderr())
            process.send("g")
            process.quit()

    def test_nor_does_one_whose_guardian_has_other_work_by_then(self):
        with live.Target("spawners", "1", "6000") as process:
            with ubp.attach(process.pid, follow_exec=True) as target:
                probe = target.probe("exe:step", ubp.Count(),
                                     strategy="hw-ptrace")
                process.send("g")
                self.assertTrue(live.settled(lambda: probe.hits == 2, 4))
                probe.remove(timeout=1)
                target.probe("exe:main", ubp.Count(), strategy="int3")
                self.assertTrue(live.settled(
                    lambda: process.ask("r")["steps"] > 4, 20))
                self.assertEqual(0, process.ask("p")["wrong"])
                process.send("g")
            process.quit()

    def test_a_stack_that_ends_soon_is_told_to_its_end(self):
        """A thread's has less above it than is asked for."""
        with live.Target("busy", 2) as process, \
                ubp.attach(process.pid) as target:
            probe = target.probe("exe:hot", ubp.Stack(),
                                 strategy="hw-ptrace")
            process.send("g")
            self.assertTrue(live.settled(lambda: probe.hits > 100, 20))
            for stack in probe.read():
                self.assertEqual(["hot", "work"], [
                    frame.function for frame in stack[:2]])
                self.assertGreater(len(stack), 2)

    def test_counts_what_the_target_did_and_leaves_no_trace(self):
        for line in self.COUNTS.strip().splitlines():
            where, commands = [w.strip() for w in line.split("|")]
            with self.subTest(line), live.Target("life") as process:
                for command in commands:        # stacks of threads are kept
                    process.ask(command)
                before = live.Snapshot(process.pid)
                with ubp.attach(process.pid) as target:
                    probe = target.probe(where, ubp.Count(),
                                         strategy="hw-ptrace")
                    self.assertEqual([], live.changed_text(process.pid))
                    self.assertNotEqual({}, live.tracers(process.pid))
                    self.assertIn("kill -9", " ".join(target.notes))
                    n = sum(process.ask(c)["n"] for c in commands)
                    self.assertEqual((n, n, 0), (probe.read(), probe.hits,
                                                 probe.dropped))
                live.Snapshot(process.pid).compare(self, before)
                for command in "cwrt":
                    process.ask(command)
                self.assertEqual(n, probe.read())
                process.quit()

    def test_computes_what_a_jump_computes(self):
        for action in (ubp.Count(sum="arg0"), ubp.Hist("arg0 - 500"),
                       ubp.Count(by="arg1 % 3, caller")):
            with self.subTest(repr(action)), live.Target("life") as process, \
                    ubp.attach(process.pid) as target:
                by_hw = target.probe("exe:step", action, "arg0 % 3 == 1",
                                     "hw-ptrace")
                by_jump = target.probe("exe:step", action, "arg0 % 3 == 1")
                for command in "ct":
                    process.ask(command)
                self.assertEqual(by_jump.read(), by_hw.read())
                self.assertEqual(by_jump.hits, by_hw.hits)
                target.close()
                process.quit()

    def test_a_watch_knows_the_value_before_and_after_and_the_stack(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            probe = target.probe("mem:counter",
                                 ubp.Trace("old", "new", stack=True),
                                 strategy="hw-ptrace")
            process.ask("w")
            events = list(target.events(0.3))
            values = [7 * n for n in range(101)]
            self.assertEqual(list(zip([0] + values, values)),
                             [event.values for event in events])
            self.assertEqual({"main"}, {
                event.stack[0].function for event in events})
            self.assertEqual((101, 0), (probe.hits, probe.dropped))
            total = target.probe("mem:total", ubp.Trace("old", "new"),
                                 strategy="hw-ptrace")
            for _ in range(3):
                process.ask("+")
            self.assertEqual([(0, 3), (3, 6), (6, 9)], [
                event.values for event in target.events(0.3)])
            self.assertEqual(3, total.hits)
            process.quit()

    def test_latency_and_all_four_together(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            times = target.probe("exe:step", ubp.Latency(),
                                 strategy="hw-ptrace")
            watch = target.probe("mem:counter", ubp.Count(),
                                 strategy="hw-ptrace")
            fourth = target.probe("mem:total", ubp.Count(), strategy="hw")
            with self.assertRaises(ubp.ProbeError) as caught:
                target.probe("mem:buffer/8", ubp.Count(),
                             strategy="hw-ptrace")
            for name in "step", "mem:counter/8:w", "mem:total/8:w":
                self.assertIn(name, str(caught.exception))
            for command in "cw+":
                process.ask(command)
            self.assertEqual((1009, 101, 1), (
                times.read().count, watch.read(), fourth.read()))
            times.remove()
            process.ask("w")
            self.assertEqual(202, watch.read())
            target.close()
            process.ask("c")
            process.quit()

    def test_front_end_killed_the_registers_are_taken_out(self):
        with live.Target("life") as process:
            before = live.Snapshot(process.pid)
            killed_when_armed(process.pid, "hw-ptrace", "exe:step")
            self.assertTrue(live.settled(
                lambda: not live.tracers(process.pid)))
            live.Snapshot(process.pid).compare(self, before)
            for command in "ct":
                process.ask(command)
            process.quit()

    def test_both_killed_clean_saves_the_target_before_the_next_hit(self):
        with live.Target("life") as process:
            with live.python(
                    "t = ubp.attach(%d)\n"
                    "p = t.probe('exe:step', ubp.Count(),"
                    " strategy='hw-ptrace')\n"
                    "print(t._guardian.process.pid, flush=True)\n"
                    "time.sleep(60)\n" % process.pid) as tracer:
                os.kill(int(tracer.line()), signal.SIGKILL)
                tracer.kill()
            self.assertTrue(live.settled(
                lambda: not live.tracers(process.pid)))
            self.assertIn("1 thread", " ".join(ubp.clean(process.pid).notes))
            self.assertEqual((), ubp.clean(process.pid).notes)
            process.ask("c")
            process.quit()

    def test_guardian_killed_another_clears_the_registers(self):
        with live.Target("life") as process, \
                ubp.attach(process.pid) as target:
            probe = target.probe("exe:step", ubp.Count(),
                                 strategy="hw-ptrace")
            process.ask("c")
            self.assertEqual(1009, probe.read())
            killed = target._guardian
            os.kill(killed.process.pid, signal.SIGKILL)
            self.assertTrue(live.settled(
                lambda: target._guardian not in (killed, None)
                and target._guardian.is_armed))
            process.ask("c")
            self.assertEqual(2018, probe.read())
            target.close()
            process.ask("c")
            process.quit()

    def test_signals_that_the_program_sends_itself_are_its_own(self):
        for command in "irbpsh":
            with self.subTest(command), live.Target("traps") as process, \
                    ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(),
                                     strategy="hw-ptrace")
                n = process.ask(command)["n"]
                self.assertEqual(n, probe.read())
                target.close()
                process.quit()


class Forbidden(unittest.TestCase):
    """Machines without debug registers, kernels that allow no perf."""

    # errno of perf_event_open | what is said | and advised
    ERRORS = r"""
    EACCES     | perf_event_paranoid is -?\d   | PERFMON
    EPERM      | perf_event_paranoid is -?\d   | PERFMON
    ENOSYS     | no hardware breakpoints        | --strategy jump
    ENOENT     | no hardware breakpoints        | --strategy jump
    EOPNOTSUPP | no hardware breakpoints        | --strategy jump
    EMFILE     | a descriptor is needed         | ulimit
    """

    def test_what_the_kernel_forbids_is_said_and_nothing_is_changed(self):
        for line in self.ERRORS.strip().splitlines():
            name, why, hint = [w.strip() for w in line.split("|")]
            code = getattr(errno, name)

            def refuse(attr, tid, cpu):
                raise OSError(code, os.strerror(code))
            with self.subTest(name), live.Target("life") as process, \
                    mock.patch.object(ubp, "perf_event_open", refuse), \
                    mock.patch.object(ubp, "_has_debug_registers", []):
                before = live.Snapshot(process.pid)
                with ubp.attach(process.pid) as target:
                    with self.assertRaises(ubp.ProbeError) as caught:
                        target.probe("exe:step", ubp.Count(), strategy="hw")
                    self.assertRegex(str(caught.exception),
                                     errno.errorcode[code] + ".*" + why)
                    self.assertIn(hint, caught.exception.hint)
                    live.Snapshot(process.pid).compare(self, before)
                    jump = target.probe("exe:step", ubp.Count())
                    self.assertEqual(process.ask("c")["n"], jump.read())
                process.quit()

    def test_registers_that_never_trap_are_found_out(self):
        def deaf(attr, tid, cpu):
            return os.open("/dev/zero", os.O_RDONLY)
        with live.Target("life") as process, \
                mock.patch.object(ubp, "perf_event_open", deaf), \
                mock.patch.object(ubp, "_has_debug_registers", []), \
                ubp.attach(process.pid) as target:
            with self.assertRaises(ubp.ProbeError) as caught:
                target.probe("exe:step", ubp.Count(), strategy="hw")
            self.assertIn("did not trap", str(caught.exception))
            self.assertIn("--strategy jump", caught.exception.hint)
            process.quit()


class Int3(unittest.TestCase):
    """One byte, a stop per hit, and a guardian that sends threads on."""

    # what traps.c is told | what that is
    SIGNALS = """
    c | calls
    m | calls in threads that start later, several at the site at once
    i | int3 and int $3 of the program's own, with a handler
    r | raise(SIGTRAP) and kill(), with a handler
    b | calls while SIGTRAP is blocked
    p | calls while it is blocked and pending
    s | calls while every signal is blocked
    h | a storm of signals whose handler makes calls too
    j | handlers that leave by siglongjmp
    f | a child that forks
    v | posix_spawn
    e | vfork, calls in the child, exec
    """
    # what is probed in traps.c | hits for each call of step
    WHERE = """
    exe:step         | 1
    exe:odd_push     | 1
    exe:odd_push+1   | 1
    exe:odd_call+4   | 1
    exe:odd_jump+3   | 1
    exe:odd_jump+9   | -
    exe:odd_rip      | 1
    exe:odd_indirect+11 | 1
    exe:odd_ret+4    | 4
    """

    def unchanged(self, process):
        self.assertEqual([], live.changed_text(process.pid)[:8])
        self.assertEqual({}, live.tracers(process.pid))
        self.assertEqual([], live.arenas(process.pid))

    def test_signals_do_what_they_do_unprobed(self):
        with live.Target("traps", seconds=240) as process:
            fds = live.descriptors(process.pid)
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(), strategy="int3")
                guardian = target._guardian.process.pid
                self.assertEqual({guardian}, set(live.tracers(
                    process.pid).values()))
                for line in self.SIGNALS.strip().splitlines():
                    command, what = [w.strip() for w in line.split("|")]
                    with self.subTest(what):
                        before = probe.read()
                        answer = process.ask(command)
                        self.assertEqual((answer["n"], 0), (
                            probe.read() - before, answer["wrong"]),
                            process.stderr())
            self.unchanged(process)
            self.assertEqual(fds, live.descriptors(process.pid))
            process.quit()

    def test_any_instruction_takes_one(self):
        for line in self.WHERE.strip().splitlines():
            where, share = [w.strip() for w in line.split("|")]
            with self.subTest(where), live.Target("traps") as process:
                with ubp.attach(process.pid) as target:
                    probe = target.probe(where, ubp.Count(), strategy="int3")
                    n = sum(process.ask(c)["n"] for c in "cmbps")
                    if share != "-":
                        self.assertEqual(int(share) * n, probe.read())
                    self.assertGreater(probe.read(), 0)
                self.unchanged(process)
                process.quit()

    def test_every_instruction_at_once(self):
        with live.Target("traps", seconds=240) as process:
            with ubp.attach(process.pid) as target:
                sites = ["exe:odd_%s+%d" % (name, at) for name, offsets in (
                    ("call", (0, 4, 9, 13)), ("jump", (0, 3, 5, 9, 10, 15)),
                    ("loop", (0, 3, 5, 8, 11, 13)), ("rip", (0, 7, 10)),
                    ("indirect", (0, 7, 11, 13, 17)), ("push", (0, 1, 2, 5)),
                    ("ret", (0, 4))) for at in offsets]
                probe = target.probe(sites, ubp.Count(), strategy="int3")
                self.assertEqual(len(sites), len(probe.sites), probe.refused)
                for command in "bpsi":
                    self.assertEqual(0, process.ask(command)["wrong"],
                                     process.stderr())
                self.assertGreater(min(probe.counts().values()), 0)
            self.unchanged(process)
            process.quit()

    # Here the body itself has no stack to work on.
    NO_STACK = {("f_below_bad", 5), ("f_call_no_stack", 3)}

    def sites_of(self, path, prefix, mnemonic=""):
        """["exe:NAME+OFFSET"] of every instruction of some functions, or
        of some of them, as objdump and nm tell."""
        text = subprocess.check_output(["nm", "-S", path]).decode()
        sizes = {words[3]: int(words[1], 16) for words in map(
            str.split, text.splitlines()) if len(words) == 4}
        text = subprocess.check_output(
            ["objdump", "-d", "--no-show-raw-insn", path]).decode()
        sites, name, base = [], "", 0
        for line in text.splitlines():
            head = re.match(r"([0-9a-f]+) <(\w+)>:", line)
            insn = re.match(r"\s+([0-9a-f]+):\t(\w*)", line)
            if head:
                base, name = int(head.group(1), 16), head.group(2)
            elif insn and name.startswith(prefix) and (
                    mnemonic in ("", insn.group(2))):
                at = int(insn.group(1), 16) - base
                if at < sizes[name] and (name, at) not in self.NO_STACK:
                    sites.append("exe:%s+%d" % (name, at))
        return sites

    def told(self, process):
        process.send("r")
        lines = [process.line()]
        while lines[-1] != "end":
            lines.append(process.line())
        return lines

    def test_faults_and_traps_are_told_as_where_they_belong(self):
        with live.Target("faults") as process:
            unprobed = self.told(process)
            with ubp.attach(process.pid) as target:
                probe = target.probe(self.sites_of(
                    process.path, ("f_", "g_")), ubp.Count(), strategy="int3")
                self.assertEqual([], probe.refused)
                self.assertGreater(len(probe.sites), 70)
                self.assertEqual(unprobed, self.told(process))
                for site, n in probe.counts().items():
                    # What faults is the last instruction that is reached.
                    if site.offset == 0:
                        self.assertGreater(n, 0, site.function.name)
                self.assertEqual(unprobed, self.told(process))
            self.unchanged(process)
            self.assertEqual(unprobed, self.told(process))
            process.quit()

    def test_every_instruction_of_a_library_can_run_elsewhere(self):
        """All of the C library's mathematics, by objdump's boundaries."""
        import ubp_x86
        path = next(m.path for m in live.maps(os.getpid())
                    if "/libm.so" in m.path or "/libm-" in m.path)
        text = subprocess.check_output(["objdump", "-d", "-w",
                                        "--insn-width=16", path]).decode()
        n = 0
        for at, code in re.findall(r"^ +([0-9a-f]+):\t([0-9a-f ]+)\t",
                                   text, re.M)[::5]:
            insn = ubp_x86.decode(bytes.fromhex(code), int(at, 16))
            ubp_x86.relocate_trapped(insn, insn.vaddr + (1 << 30))
            n += 1
        self.assertGreater(n, 10000)

    def test_computes_what_a_jump_computes(self):
        for make in (lambda: ubp.Count(sum="arg0"),
                     lambda: ubp.Hist("arg0 - 50")):
            with self.subTest(repr(make())), \
                    live.Target("traps", seconds=240) as process:
                results = []
                for strategy in ("jump", "int3"):
                    with ubp.attach(process.pid) as target:
                        probe = target.probe("exe:step", make(),
                                             "arg0 % 3 != 1", strategy)
                        for command in "cmfve":
                            process.ask(command)
                        results.append((probe.hits, probe.read()))
                self.assertEqual(*results)
                self.assertGreater(results[0][0], 400)
                self.unchanged(process)
                process.quit()

    def test_records_the_same_events_as_a_jump(self):
        seen = []
        for strategy in ("jump", "int3"):
            with live.Target("traps", seconds=240) as process:
                with ubp.attach(process.pid) as target:
                    target.probe("exe:step", ubp.Trace("arg0", "arg0 + arg1"),
                                 "arg0 % 2", strategy)
                    for command in "cfe":
                        process.ask(command)
                    events = list(target.events(0.3))
                self.assertEqual(events, sorted(
                    events, key=lambda event: event.time_ns))
                seen.append([(event.values, event.kind, event.site.offset)
                             for event in events])
                process.quit()
        self.assertEqual(*seen)
        self.assertEqual(105 + 6 + 3 + 2 + 2, len(seen[0]))

    def test_returns_and_latency_by_int3(self):
        for strategy in ("int3", "jump,int3"):
            with self.subTest(strategy), \
                    live.Target("traps", seconds=240) as process:
                with ubp.attach(process.pid) as target:
                    values = target.probe("exe:odd_jump%return",
                                          ubp.Hist("ret - arg0"),
                                          strategy=strategy)
                    took = target.probe("exe:odd_call", ubp.Latency(),
                                        strategy=strategy)
                    n = sum(process.ask(c)["n"] for c in "cmb")
                    found = values.read()
                    self.assertEqual((n, 1, 1), (found.count, found.min,
                                                 found.max))
                    self.assertEqual(n, took.read().count)
                self.unchanged(process)
                process.quit()

    def test_entry_by_jump_and_exits_by_int3_share_their_frames(self):
        with live.Target("traps", seconds=90) as process:
            with ubp.attach(process.pid) as target:
                with self.assertRaises(ubp.ProbeError) as caught:
                    target.probe("exe:odd_exit", ubp.Latency())
                self.assertIn("its exit at +0x9", str(caught.exception))
                both = "jump,int3"
                took = target.probe("exe:odd_exit", ubp.Latency(), None, both)
                kept = target.probe("exe:odd_exit%return", ubp.Trace(
                    "arg0", "ret"), "arg0 % 2", both)
                sums = target.probe("exe:odd_exit%return", ubp.Count(
                    by="ret - arg0", sum="arg0"), None, both)
                changed = {vaddr: new for _, vaddr, _, new
                           in live.changed_text(process.pid)}
                entry = took.sites[0].vaddr
                self.assertEqual((0xe9, 0xcc), (changed[entry],
                                                changed[entry + 9]))
                n = sum(process.ask(c)["n"] for c in "cmbhf")
                self.assertEqual((n, n), (took.read().count,
                                          sums.read()[1].count))
                values = [event.values for event in target.events(0.3)]
                self.assertTrue(all(a % 2 and r == a + 1 for a, r in values))
                self.assertEqual(kept.hits, len(values))
                self.assertEqual(0, took.reading().unfinished)
            self.unchanged(process)
            process.quit()

    def test_a_launched_program_runs_as_it_would(self):
        path = live.build("launched")
        for how, code in (("exit 7", 7), ("kill 9", -9), ("kill 15", -15)):
            for strategy in ("int3", "hw"):
                with self.subTest(how, strategy=strategy):
                    target = ubp.launch([path] + how.split())
                    first = target.probe("exe:counted", ubp.Count(),
                                         strategy=strategy)
                    both = target.probe("exe:counted", ubp.Count(by="tid"),
                                        strategy=strategy)
                    self.assertTrue(target.wait(20))
                    self.assertEqual(code, target.returncode)
                    jump = ubp.launch([path] + how.split())
                    by_jump = jump.probe("exe:counted", ubp.Count())
                    self.assertTrue(jump.wait(20))
                    self.assertGreater(by_jump.read(), 13)
                    self.assertEqual(by_jump.read(), first.read())
                    self.assertEqual({target.pid: first.read()},
                                     both.read())
                    target.close()
                    jump.close()

    def test_what_a_jump_refuses_takes_an_int3(self):
        with live.Target("traps") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe(["exe:step", "exe:odd_tight+11"],
                                     ubp.Count(), strategy="jump,int3")
                changed = {vaddr: new for _, vaddr, _, new
                           in live.changed_text(process.pid)}
                first = {site.function.name: changed[site.vaddr]
                         for site in probe.sites}
                self.assertEqual(0xcc, first["odd_tight"])
                self.assertNotEqual(0xcc, first["step"])
                n = process.ask("c")["n"]
                counts = {site.function.name: n for site, n
                          in probe.counts().items()}
                self.assertEqual({"step": n, "odd_tight": n}, counts)
            self.unchanged(process)
            process.quit()

    def test_probes_that_come_and_go_beside_it_keep_it(self):
        with live.Target("traps", seconds=240) as process:
            with ubp.attach(process.pid) as target:
                first = target.probe("exe:step", ubp.Count(),
                                     strategy="int3")
                process.ask("c")
                jump = target.probe("exe:odd_rip", ubp.Count())
                third = target.probe("exe:step", ubp.Hist("arg0"),
                                     strategy="int3")
                n = process.ask("c")["n"]
                self.assertEqual((2 * n, n, n),
                                 (first.read(), jump.read(), third.hits))
                self.assertTrue(any("out for" in note
                                    for note in target.notes))
                jump.remove()
                process.ask("c")
                self.assertEqual((3 * n, n, 2 * n),
                                 (first.read(), jump.read(), third.hits))
            self.unchanged(process)
            process.quit()

    def test_removal_tells_of_the_pages_that_are_the_files_again(self):
        """Those that the guardian has put back, jumps' pages once."""
        for where, strategy, n in (("exe:step", "int3", 1),
                                   (["exe:step", "exe:odd_*"], "int3", 10),
                                   (["exe:odd_tight+11", "exe:step"],
                                    "jump,int3", 2)):
            with self.subTest(where), live.Target("traps") as process:
                with ubp.attach(process.pid) as target:
                    sites = target.probe(where, ubp.Count(),
                                         strategy=strategy).sites
                pages = {site.vaddr & -4096 for site in sites}
                self.assertEqual((len(sites), len(pages), len(pages)),
                                 target.removal[:3])
                self.assertEqual(n, len(sites))
                process.quit()

    def test_stopped_and_continued_it_stays_so(self):
        with live.Target("traps") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(),
                                     strategy="int3")
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(0.1)
                process.send("m")
                time.sleep(0.2)         # what stops traced shows as t
                self.assertEqual(("t", 0), (live.states(process.pid),
                                            probe.read()))
                os.kill(process.pid, signal.SIGCONT)
                self.assertEqual(process.answer()["n"], probe.read())
            self.unchanged(process)
            process.quit()

    def test_a_program_that_ignores_sigtrap_is_refused(self):
        with live.Target("traps", "ignored") as process:
            with ubp.attach(process.pid) as target:
                with self.assertRaises(ubp.ProbeError) as caught:
                    target.probe("exe:step", ubp.Count(), strategy="int3")
                self.assertIn("ignores SIGTRAP", str(caught.exception))
                guardian = target._guardian.process
            self.assertEqual(0, guardian.poll())    # it has ended, too
            self.unchanged(process)

    def test_sigtrap_handled_or_blocked_later_stays_so(self):
        """Where nobody catches it, only the thread's mask could be lost."""
        for how, commands, last in (("handled", "clbpsri", "b"),
                                    ("blocked", "cdsdc", "d")):
            with self.subTest(how), live.Target("traps", "later") as process:
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:step", ubp.Count(),
                                         strategy="int3")
                    n = 0
                    for command in commands:
                        answer = process.ask(command)
                        n += answer["n"]
                        self.assertEqual(0, answer["wrong"],
                                         process.stderr())
                    self.assertEqual(n, probe.read())
                self.unchanged(process)
                self.assertEqual(0, process.ask(last)["wrong"])
                process.quit()

    # what masks.c is told | what is said about SIGTRAP, just before calls
    MASKS = """
    b | pthread_sigmask
    p | sigprocmask, SIG_SETMASK
    f | all signals blocked
    t | all others blocked
    m | a handler's sa_mask
    n | a handler's sa_mask of all signals
    j | siglongjmp
    s | sigsuspend, with a handler
    o | handlers that run while it is blocked
    e | ppoll, with a handler
    c | setcontext and swapcontext
    w | all of that at once, and questions for the action
    a | actions that change
    r | SA_RESETHAND
    k | a child that forks
    v | posix_spawn
    d | children that SIGTRAP ends
    """

    def test_what_is_said_of_sigtrap_holds_at_once(self):
        """In four threads, from the first moment, with a handler and not."""
        for flags in ((), ("-static",), ("-specs=" + MUSL,)):
            if MUSL in "".join(flags) and not os.path.exists(MUSL):
                continue
            for how in ("caught", "not"):
                self.masked(how, flags, "bpftmnjsoecwarkvd" if not flags
                            else "btmjsw")

    def masked(self, how, flags, commands):
        with live.Target("masks", how, "7", flags=flags) as process:
            for line in self.MASKS.strip().splitlines():
                command, what = [w.strip() for w in line.split("|")]
                if command not in commands:
                    continue
                with self.subTest(what, how=how, flags=flags), \
                        ubp.attach(process.pid) as target:
                    probe = target.probe("exe:step", ubp.Count(),
                                         strategy="int3")
                    answer = process.ask(command)
                    self.assertEqual((answer["n"], 0), (
                        probe.read(), answer["wrong"]), process.stderr())
            self.unchanged(process)
            process.quit()

    # how masks.c makes the system calls | by what | as which program
    WAYS = """
    s | the C library's syscall()      |
    s | syscall() of a static program  | -static
    s | musl's syscall()               | musl
    i | an instruction of its own      |
    i | one in a static program        | -static
    i | one in a program with musl     | musl
    i | one in a program without -O    | -O0
    r | one that takes any number      |
    """

    def test_what_system_calls_of_its_own_say_of_sigtrap_holds_too(self):
        """Those that the C library's functions do not make."""
        for line in self.WAYS.strip().splitlines():
            way, what, flags = [w.strip() for w in line.split("|")]
            flags = ("-specs=" + MUSL,) if flags == "musl" else tuple(
                flags.split())
            if MUSL in "".join(flags) and not os.path.exists(MUSL):
                continue
            for how in ("caught", "not"):
                with self.subTest(what, how=how), live.Target(
                        "masks", how, "3", way, flags=flags) as process:
                    with ubp.attach(process.pid) as target:
                        self.masked_by(target, process, "btmsewa" if flags
                                       else "bftmnjsoewarkd")
                        self.assertEqual([], target.notes)
                    self.unchanged(process)
                    process.quit()

    def masked_by(self, target, process, commands):
        probe = target.probe("exe:step", ubp.Count(), strategy="int3")
        n = 0
        for command in commands:
            answer = process.ask(command)
            n += answer["n"]
            self.assertEqual((n, 0), (probe.read(), answer["wrong"]),
                             command + ": " + process.stderr())

    # what hostile.c is told | what it does with SIGTRAP, round calls
    UNUSUAL = """
    a | on an alternate stack, also blocked
    b | a handler that it enters again
    o | handlers for once, that set themselves again
    c | siglongjmp and longjmp out of handlers
    d | a signalfd
    e | sigwaitinfo in a thread
    f | sent by another process
    g | siginfo of the program's own making, as if from the kernel
    i | what is inherited by exec, behind vfork and fork
    I | the same, if they ignore it
    j | timers
    m | threads that begin with it blocked
    s | sigsuspend and ppoll that let it in
    t | faults whose handler blocks it
    u | actions changed by another thread
    """

    def test_unusual_uses_of_sigtrap_work_as_without_int3s(self):
        """Also armed when there is a handler already: that of the last."""
        with live.Target("hostile") as process:
            for turn in 1, 2:
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:step", ubp.Count(),
                                         strategy="int3")
                    n = 0
                    for line in self.UNUSUAL.strip().splitlines():
                        command, what = [w.strip() for w in line.split("|")]
                        with self.subTest(what, turn=turn):
                            answer = process.ask(command)
                            n += answer["n"]
                            self.assertEqual((n, 0), (
                                probe.read(), answer["wrong"]),
                                process.stderr())
                self.unchanged(process)
            process.quit()

    def test_what_tells_of_sigtrap_stays_and_is_not_shown(self):
        """However often it is hit; it goes with the last of the others."""
        def changed():
            return {vaddr for _, vaddr, _, _ in
                    live.changed_text(process.pid)}

        with live.Target("masks", "caught", "60") as process:
            with ubp.attach(process.pid) as target:
                first = target.probe("exe:step", ubp.Count(),
                                     strategy="int3", max_rate=20)
                rare = target.probe("libc:posix_spawn", ubp.Count(),
                                    strategy="int3")
                others = {site.vaddr for probe in (first, rare)
                          for site in probe.sites}
                own = changed() - others
                self.assertGreater(len(own), 1)
                arenas = ubp.status(process.pid)
                self.assertEqual(others, {site.vaddr for arena in arenas
                                          for site in arena.sites})
                self.assertEqual(len(own), sum(a.n_own for a in arenas))
                self.assertEqual(0, process.ask("b")["wrong"],
                                 process.stderr())
                self.assertTrue(live.settled(lambda: first.refused, 10))
                self.assertEqual(own | others - {first.refused[0].site.vaddr},
                                 changed())
                self.assertNotIn("SIGTRAP", str(target.notes))
                rare.remove()
                self.assertEqual(set(), changed())
            self.unchanged(process)
            process.quit()

    def test_a_thread_asked_to_stop_before_its_trap_has_come_stops(self):
        """An interrupt is told before any signal: it has run an int3, whose
        SIGTRAP still waits, and is to go on to that before it is asked."""
        with live.Target("pending") as process:
            at, onward = (int(process.ready[name], 16)
                          for name in ("at", "onward"))
            ward = ubp.Ward(None, process.pid)
            keeper = ubp.Keeper(process.pid, ward)
            none = ctypes.create_string_buffer(8)

            def leave_it_behind_an_int3():
                keeper.set_regs(process.pid, ubp.ubp_x86.at_entry(
                    keeper.get_regs(process.pid), at + 1))
                ubp.ptrace(ubp.PTRACE_SETSIGMASK, process.pid, 8,
                           ctypes.addressof(none))
                ubp.ptrace(ubp.PTRACE_INTERRUPT, process.pid)
                ward.sites[at] = ubp.TrapSite(onward, 1)
            try:
                keeper.pause(leave_it_behind_an_int3, 5, "look")
                keeper.pause(lambda: None, 2, "look")
                self.assertEqual((1, 1), (ward.n_hits, ward.sites[at].n_hits))
                ward.sites.clear()
                keeper.leave(5)
            finally:
                keeper.close()
            self.assertEqual({"n": 1, "wrong": 0}, process.answer())
            process.quit()

    def test_armed_while_it_is_in_handlers_that_return_to_blocked(self):
        for how in ("caught", "not"):
            with self.subTest(how), live.Target("masks", how,
                                                "50000") as process:
                process.send("s")
                for _ in range(8):
                    with ubp.attach(process.pid) as target:
                        target.probe("exe:step", ubp.Count(),
                                     strategy="int3")
                        time.sleep(0.02)
                self.assertEqual(0, process.answer(120)["wrong"],
                                 process.stderr())
                self.unchanged(process)
                process.quit()

    def test_masks_without_sigtrap_do_not_slow_it_for_long(self):
        with live.Target("masks", "not", "1") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(), strategy="int3")
                n = len(live.changed_text(process.pid))
                self.assertEqual(1, process.ask("u")["n"])
                self.assertEqual(n - 1, len(live.changed_text(process.pid)))
                self.assertEqual(1 + process.ask("a")["n"], probe.read())
            self.assertIn("called too often", str(target.notes))
            self.unchanged(process)
            process.quit()

    def test_an_int3_where_injections_took_their_code_from(self):
        """At the program's own `syscall; ret`, which comes first: what is
        pending is put back all the same."""
        with live.Target("masks", "caught", "1") as process:
            for _ in range(3):
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:step", ubp.Count(),
                                         strategy="int3")
                    answer = process.ask("z")
                    self.assertEqual((answer["n"], 0), (
                        probe.read(), answer["wrong"]), process.stderr())
            self.unchanged(process)
            process.quit()

    def test_int3s_of_ones_own_at_what_tells_of_sigtrap(self):
        """At each instruction; they count, however often that is called."""
        for way, functions in (
                ("c", ("__pthread_sigmask", "__libc_sigaction")),
                ("s", ("syscall",)), ("r", ("raw_any",))):
            with self.subTest(way), live.Target(
                    "masks", "caught", "3", way,
                    flags=("-static",)) as process:
                with ubp.attach(process.pid) as target:
                    where = self.sites_of(process.path, functions)
                    every = target.probe(where, ubp.Count(), strategy="int3")
                    self.masked_by(target, process, "bta")
                    process.ask("u")
                    self.assertLessEqual({r.rule for r in every.refused},
                                         {"unreachable"})
                    with self.assertRaises(ubp.ProbeError) as caught:
                        target.probe(where[-2], ubp.Count())
                    self.assertIn("int3", str(caught.exception))
                self.unchanged(process)
                process.quit()

    def test_ones_own_at_what_tells_of_sigtrap_is_never_too_often(self):
        """As one of ubp's is, with more than 500 calls a second."""
        with live.Target("masks", "caught", "3", "c",
                         flags=("-static",)) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe(self.sites_of(
                    process.path, "__pthread_sigmask", "syscall"),
                    ubp.Count(), strategy="int3")
                target.probe("exe:step", ubp.Count(), strategy="int3")

                def goes_on():
                    before = probe.read()
                    process.ask("u")        # two seconds
                    return probe.read() - before > 2 * 2 * 500
                self.assertTrue(live.settled(goes_on, 60))
                before = probe.read()
                process.ask("u")
                self.assertGreater(probe.read(), before)
                self.assertNotIn("called too often", str(target.notes))
            self.unchanged(process)
            process.quit()

    def test_syscall_is_not_slowed_for_long_once_it_told_of_sigtrap(self):
        """Unless it tells again before there were too many others."""
        with live.Target("masks", "caught", "60", "s") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(), strategy="int3")
                n, before = 0, live.changed_text(process.pid)
                for command, n_gone in ("b", 0), ("w", 0), ("g", 1):
                    answer = process.ask(command)
                    n += answer["n"]
                    self.assertEqual((n, 0), (probe.read(), answer["wrong"]),
                                     process.stderr())
                    self.assertEqual(len(before) - n_gone, len(
                        live.changed_text(process.pid)), command)
            self.assertIn("syscall", str(target.notes))
            self.unchanged(process)
            process.quit()

    def test_no_int3_is_written_when_its_arena_has_gone(self):
        """A front end that is killed may leave a request to arm: by the time
        the guardian reads it, a clean has taken out what the other left."""
        with live.Target("traps", "later") as process:
            target = ubp.attach(process.pid)
            target.probe("exe:step", ubp.Count(), strategy="int3")
            guardian, traps = target._guardian, target._installer.traps()
            guardian.call("rest", 5)
            ubp.clean(process.pid, all=True)
            with self.assertRaises(ubp.TraceeGone):
                guardian.call("arm", traps, 5, float("inf"))
            self.assertEqual(0, process.ask("c")["wrong"], process.stderr())
            self.unchanged(process)
            target.close()
            process.quit()

    def test_sigtrap_ignored_later_ends_the_int3s(self):
        with live.Target("traps", "later") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(), strategy="int3")
                n = process.ask("c")["n"]
                self.assertEqual(0, process.ask("k")["wrong"])
                self.assertEqual(n, probe.read())
                self.assertTrue(live.settled(lambda: probe.refused, 10))
                self.assertIn("ignores SIGTRAP", probe.refused[0].why)
            self.unchanged(process)
            process.quit()

    def test_threads_that_come_and_go_are_none_missed(self):
        with live.Target("children", "threads", seconds=240) as process:
            with ubp.attach(process.pid) as target:
                process.ask("p")
                probe = target.probe("exe:hot", ubp.Count(), strategy="int3")
                start = process.ask("r")["hot"]
                process.ask("g")
                time.sleep(0.3)
                end = process.ask("p")["hot"]
                self.assertGreater(end, start)
                self.assertEqual(end - start, probe.read())
            self.unchanged(process)
            process.ask("g")
            process.quit()

    def test_a_main_thread_that_ends_holds_no_removal_up(self):
        """Traced, it is a zombie that never stops, until the others end."""
        with live.Target("life") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(), strategy="int3")
                process.ask("x")
                self.assertEqual("Z", live.status(process.pid)["State"][0])
                n = process.ask("c")["n"] + process.ask("t")["n"]
                self.assertEqual(n, probe.read())
                begin = time.monotonic()
            self.assertLess(time.monotonic() - begin, 3)
            self.assertEqual({}, live.tracers(process.pid))
            self.assertEqual((n, 0), (process.ask("c")["n"] +
                                      process.ask("t")["n"], probe.read() - n))
            process.quit()

    # strategy | how long children of vfork sleep, in ms
    VFORKS = """
    int3 | 0
    int3 | 40
    jump | 0
    jump | 40
    """

    def test_threads_that_vfork_all_the_time_hold_no_pause_up(self):
        """There is always one that waits for its child, and cannot stop."""
        for line in self.VFORKS.strip().splitlines():
            strategy, ms = [word.strip() for word in line.split("|")]
            with self.subTest(line.strip()), live.Target(
                    "spawners", "12", ms) as process:
                for _ in range(2):
                    self.armed_and_removed(process, strategy)
                found = process.ask("p")
                self.assertGreater(found["good"], 12)
                self.assertEqual((found["tried"], 0), (
                    found["good"], found["wrong"]), process.stderr())
                self.unchanged(process)
                process.send("g")
                process.quit()

    def armed_and_removed(self, process, strategy):
        """Armed, and taken out, in their midst: in time, or UbpTimeout."""
        process.send("g")
        with ubp.attach(process.pid) as target:
            probe = target.probe("exe:step", ubp.Count(), strategy=strategy)
            found, start = process.ask("p"), probe.read()
            process.send("g")
            time.sleep(0.2)
            end = process.ask("p")["steps"] - found["steps"]
            self.assertEqual(end, probe.read() - start)
            process.send("g")
            time.sleep(0.1)
            begin = time.monotonic()
        self.assertLess(time.monotonic() - begin, 5)

    def test_a_guardian_that_is_left_alone_waits_for_a_long_vfork(self):
        """What it has to take out of the target waits for who traces it."""
        with live.Target("spawners", "1", "3000") as process:
            with live.python(
                    "t = ubp.attach(%d)\n"
                    "t.probe('exe:step', ubp.Count())\n"
                    "t.probe('exe:main', ubp.Count(), strategy='int3')\n"
                    "print('armed', flush=True)\n"
                    "time.sleep(60)\n" % process.pid) as tracer:
                self.assertEqual("armed", tracer.line())
                process.send("g")
                time.sleep(0.5)             # the second child sleeps
                tracer.kill()
            self.assertTrue(live.settled(
                lambda: not ubp.status(process.pid), 20))
            self.assertTrue(live.settled(
                lambda: not live.tracers(process.pid), 5))
            found = process.ask("p")
            self.assertEqual((found["tried"], 0), (
                found["good"], found["wrong"]), process.stderr())
            self.unchanged(process)
            process.send("g")
            process.quit()

    def test_a_clean_need_not_wait_for_a_long_vfork(self):
        """Nor for the guardian that does, with nobody left who reads."""
        with live.Target("spawners", "1", "8000") as process:
            with live.python(
                    "t = ubp.attach(%d)\n"
                    "t.probe('exe:step', ubp.Count())\n"
                    "t.probe('exe:main', ubp.Count(), strategy='int3')\n"
                    "print('armed', flush=True)\n"
                    "time.sleep(60)\n" % process.pid) as tracer:
                self.assertEqual("armed", tracer.line())
                process.send("g")
                time.sleep(0.5)             # the second child sleeps
                tracer.kill()
            begin = time.monotonic()
            ubp.clean(process.pid)
            self.assertLess(time.monotonic() - begin, 4)
            self.assertFalse(ubp.status(process.pid))
            self.unchanged(process)
            found = process.ask("p")
            self.assertGreater(time.monotonic() - begin, 6)
            self.assertEqual((found["tried"], 0), (
                found["good"], found["wrong"]), process.stderr())
            process.quit()

    def test_who_steps_aside_stops_nobody_for_long(self):
        """The leader comes out of vfork while its guardian waits for the
        ubp that asked."""
        with live.Target("spawners", "0", "2000") as process:
            with ubp.attach(process.pid) as target:
                target.probe("exe:step", ubp.Count(), strategy="int3")
                begin = time.monotonic()
                process.send("v")
                time.sleep(0.3)
                os.kill(target._guardian.process.pid, ubp.STEP_ASIDE)
                self.assertEqual(1, process.answer()["good"])
                self.assertLess(time.monotonic() - begin, 3)
            process.quit()

    def test_what_a_handler_in_vfork_returns_to_stays(self):
        """However large its frame is: to the middle of a trampoline."""
        with live.Target("spawners", "0", "1500") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:call_self+5", ubp.Count())
                process.send("h")
                self.assertTrue(live.settled(lambda: probe.read() == 1, 5))
                time.sleep(0.3)
            self.assertEqual(1, process.ask("j")["good"])
            process.quit()

    def test_children_that_come_and_go_are_none_missed(self):
        for mode in ("storm", "spawn"):
            with self.subTest(mode), live.Target(
                    "children", mode, seconds=240) as process:
                with ubp.attach(process.pid) as target:
                    process.ask("p")
                    probe = target.probe("exe:hot", ubp.Count(),
                                         strategy="int3")
                    start = process.ask("r")["hot"]
                    process.ask("g")
                    time.sleep(0.3)
                    end = process.ask("p")["hot"]
                    self.assertGreater(end, start)
                    self.assertEqual(end - start, probe.read())
                self.unchanged(process)
                process.ask("g")
                process.quit()

    def test_blocking_calls_end_as_they_would(self):
        for name, sites in (
                ("blocked", ["libc:" + name for name in (
                    "read", "write", "recv", "nanosleep", "poll", "select",
                    "epoll_wait", "clock_nanosleep")]),
                ("signals", ["libc:read", "libc:write", "exe:*"])):
            with self.subTest(name), live.Target(
                    name, seconds=240) as process:
                with ubp.attach(process.pid) as target:
                    probe = target.probe(sites, ubp.Count(),
                                         strategy="int3", timeout=20)
                    time.sleep(1)
                    self.assertGreater(probe.read(), 100)
                    if name == "blocked":
                        for op, found in process.operations().items():
                            self.assertEqual((0, 0, 0), (
                                found["eintr"], found["short"],
                                found["amiss"]), op)
                    target.close(20)
                self.assertEqual([], live.changed_text(process.pid)[:8])
                process.quit()

    def test_what_is_hit_too_often_is_taken_out(self):
        for strategy in ("int3", "hw"):
            with self.subTest(strategy), live.Target("busy", 2) as process:
                with ubp.attach(process.pid) as target:
                    hot = target.probe("exe:hot", ubp.Count(),
                                       strategy=strategy, max_rate=500)
                    rare = target.probe("libc:write", ubp.Count(),
                                        strategy=strategy)
                    process.send("g")
                    self.assertTrue(live.settled(lambda: hot.refused, 20))
                    self.assertIn("500 times a second", hot.refused[0].why)
                    process.ask("p")    # nobody is in a trampoline now
                    n, before = hot.read(), rare.read()
                    # Who was stopped there when it went is not counted.
                    self.assertGreater(n, 490)
                    process.send("g")
                    time.sleep(0.1)
                    process.ask("p")
                    self.assertEqual(n, hot.read())
                    self.assertGreater(rare.read(), before)
                self.assertEqual([], live.changed_text(process.pid)[:8])
                process.quit()

    def test_what_was_taken_out_just_before_the_end_is_told(self):
        with live.Target("busy", 2) as process, mock.patch.object(
                ubp.Target, "_check_rates"):        # had no time to look
            with ubp.attach(process.pid) as target:
                hot = target.probe("exe:hot", ubp.Count(), strategy="int3",
                                   max_rate=50)
                process.send("g")
                self.assertTrue(live.settled(
                    lambda: not live.changed_text(process.pid), 20))
                process.ask("p")
                self.assertEqual([], hot.refused)
            self.assertEqual(["max-rate"], [p.rule for p in hot.refused])
            self.assertIn("was taken out", target.notes[0])
            process.quit()

    def test_armed_and_removed_under_fire(self):
        with live.Target("busy", 4, seconds=240) as process:
            process.send("g")
            for _ in range(5):
                with ubp.attach(process.pid) as target:
                    probe = target.probe(["exe:shorty", "exe:tiny"],
                                         ubp.Count(), strategy="int3")
                    time.sleep(0.05)
                    self.assertGreater(probe.read(), 0)
            process.ask("p")
            self.unchanged(process)
            process.quit()


class Differential(unittest.TestCase):
    """Every action computes by int3 what it computes by jump."""

    # what is probed in actions.c | what | if
    ACTIONS = """
    exe:work          | Count()                                        |
    exe:work          | Count(by="arg1, arg0 % 5")                     | arg0 % 7
    exe:work          | Count(by="u8[arg2]", sum="arg0 * arg1")        |
    exe:work          | Hist("arg0 - 50", by="arg1")                   |
    exe:work          | Trace("arg0", "str(arg2)", "buf(arg2, 3)")     | arg0 % 3 == 0
    exe:work          | Trace("arg0", stack=True)                      | arg0 % 9 == 0
    exe:work+0        | Trace("rdi", "rsp % 16", "caller > 0")         | cpu >= 0
    exe:work          | Stack()                                        | arg0 % 9 == 0
    exe:work          | Stack(sum="arg0")                              | arg0 % 9 == 1
    exe:deep          | Latency()                                      |
    exe:deep          | Latency(by="arg0")                             | arg0 > 1
    exe:deep%return   | Hist("ret + arg0")                             |
    exe:deep%return   | Trace("ret", "arg0", "elapsed > 0")            |
    exe:jumper        | Latency()                                      |
    exe:jumper%return | Count(by="ret")                                |
    exe:other%return  | Trace("arg0")                                  |
    exe:tail%return   | Trace("arg0", "ret")                           |
    """

    def computed(self, strategy, where, action, when):
        action = eval("ubp." + action)
        with live.Target("actions", "2", "101") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe(where, action, when or None, strategy)
                self.assertEqual([strategy], list(probe.strategies()))
                for command in "gfr":
                    process.ask(command)
                value = probe.read()
                if isinstance(action, ubp.Trace):
                    value = sorted(repr((
                        event.values, event.kind, event.site.offset,
                        event.tid == event.pid == process.pid,
                        [frame.function for frame in event.stack]))
                        for event in target.events(0.3))
                elif isinstance(action, ubp.Stack):
                    value = {tuple(frame.function for frame in frames): n
                             for frames, n in value.items()}
                elif isinstance(action, ubp.Latency):
                    value = {key: each.count for key, each in (
                        value if action.by else {0: value}).items()}
                told = probe.reading()._replace(value=value)
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()
        return told

    def test_every_action_computes_what_a_jump_computes(self):
        for line in self.ACTIONS.strip().splitlines():
            what = [word.strip() for word in line.split("|")]
            with self.subTest(line):
                by_jump = self.computed("jump", *what)
                self.assertGreater(by_jump.recorded, 20)
                self.assertEqual(by_jump, self.computed("int3", *what))

    def test_the_command_prints_the_same_lines(self):
        for options in (["trace", "-e", "arg0, str(arg2)", "--hits", "30"],
                        ["trace", "-e", "arg0", "--until", "arg0 == 50"],
                        ["hist", "-e", "arg0"],
                        ["count", "--by", "arg0 % 3, arg1 < 9"]):
            with self.subTest(options):
                by_jump, by_int3 = (self.printed(options, strategy)
                                    for strategy in ("jump", "int3"))
                if "--until" in options:    # how much comes behind it depends
                    by_jump, by_int3 = (lines[:[
                        line.endswith("arg0=50") for line in lines].index(
                            True)] for lines in (by_jump, by_int3))
                self.assertEqual(by_jump, by_int3)
                self.assertGreater(len(by_jump), 2)

    def printed(self, options, strategy):
        with live.Target("actions", "1", "101") as process:
            with live.Process([
                    sys.executable, TOP + "/ubp.py", options[0], "-p",
                    process.pid, "exe:work", "--strategy", strategy]
                    + options[1:]) as front:
                self.assertTrue(live.settled(
                    lambda: "Ctrl-C removes" in front.stderr(), 20))
                process.ask("g")
                if not live.settled(front.has_ended, 1):
                    front.process.send_signal(signal.SIGINT)
                lines = front.process.stdout.read().decode().splitlines()
                self.assertEqual(0, front.wait())
            process.quit()
        # Without times, rates and thread numbers.
        return [re.sub(r"^[0-9:.]+ +\d+ ", "", re.sub(
            r"( *\d+) +[0-9.]+( +[0-9.]+%)", r"\1\2", line))
            for line in lines]


class Guardian(unittest.TestCase):
    """What becomes of int3s when those who set them die."""

    FRONT_END = ("t = ubp.attach(%d)\n"
                 "for each in %r:\n"
                 "    t.probe(each, ubp.Count(), strategy=%r)\n"
                 "print('armed', t._guardian.process.pid, flush=True)\n"
                 "time.sleep(60)\n")

    def front_end(self, process, strategy="int3", extra=""):
        return live.python((self.FRONT_END % (
            process.pid, ["exe:shorty"], strategy)).replace(
                "print", extra + "print"))

    def test_front_end_killed_the_text_is_put_back(self):
        for beside in ("", "t.probe('exe:hot', ubp.Count())\n"):
            with self.subTest(beside), live.Target("busy", 3) as process:
                process.send("g")
                with self.front_end(process, extra=beside) as front:
                    guardian = int(front.line().split()[1])
                    time.sleep(0.1)
                    front.process.kill()
                    began = time.monotonic()
                    self.assertTrue(live.settled(
                        lambda: not live.tracers(process.pid), 20))
                    took = time.monotonic() - began
                self.assertTrue(live.settled(
                    lambda: not os.path.exists("/proc/%d/exe" % guardian),
                    20), "the guardian stays")
                process.ask("p")
                self.assertEqual([], live.changed_text(process.pid)[:8])
                self.assertEqual([], live.arenas(process.pid))
                process.quit()
                print("int3 out %.0f ms after the kill" % (1e3 * took))

    def test_guardian_killed_before_a_hit_another_takes_over(self):
        with live.Target("traps") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(),
                                     strategy="int3")
                first = target._guardian.process.pid
                os.kill(first, signal.SIGKILL)
                self.assertTrue(live.settled(lambda: set(live.tracers(
                    process.pid).values()) - {0, first}, 20))
                self.assertIn("was killed", " ".join(target.notes))
                with target._lock:
                    pass
                self.assertEqual(process.ask("m")["n"], probe.read())
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    def test_guardian_killed_the_target_can_be_closed(self):
        with live.Target("traps") as process:
            with ubp.attach(process.pid) as target:
                target.probe("exe:step", ubp.Count(), strategy="int3")
                with target._lock:
                    os.kill(target._guardian.process.pid, signal.SIGKILL)
                    target.close()
            self.assertEqual([], live.changed_text(process.pid))
            self.assertEqual([], live.arenas(process.pid))
            process.ask("c")
            process.quit()

    def test_a_stopped_target_is_restored_and_stays_stopped(self):
        with live.Target("traps") as process:
            with ubp.attach(process.pid) as target:
                target.probe("exe:step", ubp.Count(), strategy="int3")
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(0.1)
            self.assertEqual([], live.changed_text(process.pid))
            self.assertTrue(live.settled(
                lambda: live.states(process.pid) == "T"))
            os.kill(process.pid, signal.SIGCONT)
            process.ask("c")
            process.quit()

    def test_guardian_terminated_the_int3s_are_out_and_jumps_stay(self):
        with live.Target("busy", 2) as process:
            with ubp.attach(process.pid) as target:
                jump = target.probe("exe:hot", ubp.Count())
                probe = target.probe("exe:shorty", ubp.Count(),
                                     strategy="int3")
                process.send("g")
                os.kill(target._guardian.process.pid, signal.SIGTERM)
                self.assertTrue(live.settled(lambda: probe.refused, 20))
                self.assertIn("terminated", probe.refused[0].why)
                self.assertEqual({}, live.tracers(process.pid))
                self.assertIn(len(live.changed_text(process.pid)),
                              (3, 4, 5))        # a byte may be as it was
                n = jump.read()
                self.assertTrue(live.settled(lambda: jump.read() > n))
                process.ask("p")
            self.assertEqual([], live.changed_text(process.pid)[:8])
            self.assertEqual([], live.arenas(process.pid))
            process.quit()

    def test_a_host_that_becomes_another_program_is_noticed(self):
        with live.Target("busy", 2) as process:
            process.send("g")
            code = self.FRONT_END % (process.pid, ["exe:shorty"], "int3")
            code = code.replace("time.sleep(60)",
                                "os.execl('/bin/sleep', 'sleep', '20')")
            with live.python(code) as front:
                front.line()
                self.assertTrue(live.settled(
                    lambda: not live.tracers(process.pid), 20))
                process.ask("p")
                self.assertEqual([], live.changed_text(process.pid)[:8])
                self.assertTrue(live.settled(
                    lambda: not live.arenas(process.pid), 20))
            process.quit()

    def test_the_command_names_the_guardian_and_the_danger(self):
        with live.Target("traps") as process:
            with live.Process([sys.executable, TOP + "/ubp.py", "count", "-p",
                               process.pid, "--strategy", "jump,int3",
                               "exe:step", "exe:odd_tight+11"]) as front:
                self.assertTrue(live.settled(
                    lambda: "kill -9" in front.stderr(), 20))
                n = process.ask("c")["n"]
                front.process.send_signal(signal.SIGINT)
                self.assertEqual(0, front.wait())
                text = front.stderr()
            self.assertIn("1 site by jump, 1 site by int3", text)
            self.assertIn("hits %d = recorded %d + dropped 0" % (
                2 * n, 2 * n), text)
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    def leave(self, process, *probes):
        """ubp count --leave … -> the pid of the guardian that stays"""
        done = subprocess.run(
            [sys.executable, TOP + "/ubp.py", "count", "-p", str(process.pid),
             "--strategy", "jump,int3", "--leave"] + list(probes),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=180)
        text = done.stderr.decode()
        self.assertEqual(0, done.returncode, text)
        guardian = int(re.search(r"kept by pid (\d+)", text).group(1))
        self.assertEqual({guardian}, set(live.tracers(process.pid).values()))
        return guardian

    def status_and_clean(self, verb, process, *options):
        done = subprocess.run(
            [sys.executable, TOP + "/ubp.py", verb, "-p", str(process.pid)]
            + list(options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=180)
        return done.returncode, done.stdout.decode()

    def test_left_on_purpose_the_guardian_stays_until_clean(self):
        with live.Target("traps", seconds=240) as process:
            guardian = self.leave(process, "exe:step", "exe:odd_tight+11")
            n = sum(process.ask(c)["n"] for c in "cmfbi")
            for arena in ubp.status(process.pid):
                self.assertEqual((guardian, True), (arena.guardian,
                                                    arena.left))
                self.assertEqual([n, n], [site.calls for site
                                          in arena.sites])
            code, text = self.status_and_clean("status", process)
            self.assertIn("kept by pid %d" % guardian, text)
            code, text = self.status_and_clean("status", process, "--json")
            self.assertIn('"guardian_pid": %d' % guardian,
                          text.replace('":', '": ').replace('":  ', '": '))
            with self.assertRaises(ubp.AttachError) as caught:
                ubp.attach(process.pid)
            self.assertIn("guardian", str(caught.exception))
            self.assertIn("clean", caught.exception.hint)
            code, text = self.status_and_clean("clean", process)
            self.assertEqual(0, code, text)
            self.assertIn("removed 2 sites", text)
            self.assertFalse(os.path.exists("/proc/%d/exe" % guardian))
            self.assertEqual([], live.changed_text(process.pid))
            self.assertEqual([], live.arenas(process.pid))
            self.assertEqual({}, live.tracers(process.pid))
            process.ask("c")
            process.quit()

    def test_left_by_a_host_that_lives_it_reads_on(self):
        with live.Target("traps") as process:
            target = ubp.attach(process.pid)
            probe = target.probe("exe:step", ubp.Hist("arg0"),
                                 strategy="int3")
            target.detach()
            target.detach()
            n = process.ask("c")["n"]
            self.assertEqual(n, probe.read().count)
            target.close()
            self.assertEqual(n + process.ask("m")["n"], probe.hits)
            removal = ubp.clean(process.pid)
            self.assertEqual((1, 1, 1), removal[:3])
            self.assertEqual([], live.changed_text(process.pid))
            self.assertEqual({}, live.tracers(process.pid))
            process.quit()

    def test_a_guardian_that_was_left_ends_with_its_targets(self):
        for command in "qx":
            with self.subTest(command), \
                    live.Target("children", "exec") as process:
                guardian = self.leave(process, "exe:hot", "libc:write",
                                      "--strategy", "int3")
                process.ask("c")
                process.send(command)
                process.line()
                self.assertTrue(live.settled(
                    lambda: not os.path.exists("/proc/%d/exe" % guardian),
                    10), "the guardian stays")
                if command == "x":
                    self.assertEqual({}, live.tracers(process.pid))
                    process.quit()

    def test_a_storm_of_sigterm_ends_a_guardian_and_never_hangs_it(self):
        for _ in range(3):
            with live.Target("life") as process, \
                    ubp.attach(process.pid) as target:
                target.probe("exe:step", ubp.Count(), strategy="int3")
                guardian = target._guardian.process
                deadline = time.monotonic() + 20
                while (guardian.poll() is None
                       and time.monotonic() < deadline):
                    guardian.send_signal(signal.SIGTERM)
                self.assertEqual(0, guardian.poll())
                self.assertEqual([], live.changed_text(process.pid))
                process.ask("c")
                target.close()
                process.quit()

    def test_terminated_alone_it_takes_its_int3s_out(self):
        with live.Target("busy", 2) as process:
            guardian = self.leave(process, "exe:shorty", "--strategy", "int3")
            process.send("g")
            time.sleep(0.05)
            os.kill(guardian, signal.SIGTERM)
            self.assertTrue(live.settled(
                lambda: not live.tracers(process.pid), 10))
            self.assertEqual([], live.changed_text(process.pid))
            process.ask("p")
            ubp.clean(process.pid)
            self.assertEqual([], live.arenas(process.pid))
            process.quit()

    def test_target_that_ends_or_execs_is_no_error(self):
        for command in "qx":
            with self.subTest(command), \
                    live.Target("children", "exec") as process:
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:hot", ubp.Count(),
                                         strategy="int3")
                    n = process.ask("c")["hot"]
                    process.send(command)
                    process.line()
                    self.assertEqual(n, probe.read())
                if command == "x":
                    self.assertEqual({}, live.tracers(process.pid))
                    process.quit()


class Libraries(unittest.TestCase):
    """Patterns in libraries that are loaded and unloaded meanwhile."""

    def calls_once_loaded(self, process, probe):
        """A round of calls, once the library that has just been loaded has
        its sites: those that it had before, where it is text that tells."""
        self.assertTrue(live.settled(
            lambda: live.changed_text(process.pid)
            or any(part.sites for part in probe._parts), 10), "no new site")
        with probe._target._lock:       # until all of it is done
            pass
        return process.ask("c")["calls"]

    def test_a_pattern_follows_a_library_that_comes_and_goes(self):
        library = live.build_library("shared_lib")
        for strategy in ("jump", "int3", "hw"):
            with self.subTest(strategy), live.Target(
                    "dl", library, seconds=240) as process, \
                    ubp.attach(process.pid) as target:
                probe = target.probe("shared_hot", ubp.Count(),
                                     strategy=strategy)
                process.ask("c")
                self.assertEqual(1009, probe.read())
                for round_ in range(1, 4):
                    process.ask("u")
                    time.sleep(0.3)
                    process.ask("l")
                    self.calls_once_loaded(process, probe)
                    self.assertEqual(1009 * (round_ + 1), probe.read())
                self.assertIn("was loaded", " ".join(target.notes))
                self.assertIn("was unloaded", " ".join(target.notes))
                target.close()
                self.assertEqual([], live.changed_text(process.pid)[:8])
                process.quit()

    def test_gone_and_back_at_once_it_is_probed_again(self):
        library = live.build_library("shared_lib")
        with live.Target("dl", library) as process, \
                ubp.attach(process.pid) as target:
            probe = target.probe(["*:shared_*"], ubp.Count())
            process.send("ul")
            process.answer()
            process.answer()
            self.calls_once_loaded(process, probe)
            self.assertEqual(1009, probe.read())
            target.close()
            self.assertEqual([], live.changed_text(process.pid)[:8])
            process.quit()


N_CONSTRUCTED, N_CALLED, N_ROUNDS = 53, 1009, 200     # targets/plug*.c
MUSL = "/usr/lib/x86_64-linux-musl/musl-gcc.specs"


class Hook(unittest.TestCase):
    """Libraries that are met in the loader's debug hook, before their
    constructors run."""

    def target(self, *flags):
        """The program, with a copy of the library that nobody else has."""
        self.library = live.build_library("plug", flags)
        return live.Target("plugins", self.library, str(N_ROUNDS),
                           flags=("-rdynamic",) + flags)

    def probe(self, target, action=None, **options):
        """A probe of what is in the program, and of what may come."""
        return target.probe("plug*", action or ubp.Count(), **options)

    def counted(self, probe):
        """The hits of the library's function."""
        return sum(n for site, n in probe.counts().items()
                   if site.names[0] == "plug")

    def left_as_it_was(self, process):
        self.assertEqual([], live.changed_text(process.pid)[:8])
        self.assertEqual([], live.arenas(process.pid))
        self.assertEqual({}, live.tracers(process.pid))
        process.quit()

    def test_the_first_load_is_counted_from_the_constructor_on(self):
        for strategy in ("jump", "int3", "jump,int3"):
            with self.subTest(strategy), self.target() as process:
                with ubp.attach(process.pid) as target:
                    probe = self.probe(target, strategy=strategy)
                    self.assertEqual(N_CONSTRUCTED, process.ask("o")["calls"])
                    self.assertEqual(N_CONSTRUCTED, self.counted(probe))
                    calls = process.ask("c")["calls"]
                    self.assertEqual(calls, self.counted(probe))
                    self.assertEqual(["plug_calls", "plug"], [
                        site.names[0] for site in probe.sites])
                    self.assertEqual([probe], target.probes)
                self.left_as_it_was(process)

    def test_a_tight_loop_of_loads_is_counted_and_takes_no_memory(self):
        """Load, call once, unload; then so in four threads at once."""
        with self.target() as process:
            with ubp.attach(process.pid) as target:
                probe = self.probe(target)
                before = process.ask("o")["calls"]
                process.ask("u")
                arenas = live.arenas(process.pid)
                calls = process.ask("l")["calls"]
                self.assertEqual(N_ROUNDS * (N_CONSTRUCTED + 1),
                                 calls - before)
                self.assertEqual(calls, self.counted(probe))
                # What comes back where it was takes no more memory.
                self.assertEqual(arenas, live.arenas(process.pid))
                calls = process.ask("t")["calls"]
                self.assertEqual(calls, self.counted(probe))
                self.assertEqual(0, probe.dropped)
            self.left_as_it_was(process)

    def test_what_is_unloaded_for_good_is_forgotten_and_met_again(self):
        """After many libraries; here after each."""
        most, ubp._MOST_ASLEEP_MODULES = ubp._MOST_ASLEEP_MODULES, 0
        self.addCleanup(setattr, ubp, "_MOST_ASLEEP_MODULES", most)
        with self.target() as process:
            with ubp.attach(process.pid) as target:
                probe, calls = self.probe(target), 0
                for _ in range(3):
                    process.ask("o")
                    process.ask("c")
                    process.ask("u")
                    calls += N_CONSTRUCTED + N_CALLED
                    self.assertTrue(live.settled(
                        lambda: "unloaded" in target.notes[-1], 10))
                    self.assertEqual(calls, self.counted(probe))
            self.left_as_it_was(process)

    def test_a_library_that_goes_while_it_is_planned_is_told(self):
        """As one that is closed and opened all the time."""
        library = live.build_library("shared_lib")
        find = ubp.Target._sites

        def late(target, where):
            found = find(target, where)
            process.ask("u")
            return found
        with live.Target("dl", library) as process, mock.patch.object(
                ubp.Target, "_sites", late):
            with ubp.attach(process.pid) as target:
                with self.assertRaises(ubp.ProbeError) as caught:
                    target.probe("shared_hot", ubp.Count())
            self.assertIn("a library that was closed",
                          str(caught.exception))
            self.assertEqual([], live.changed_text(process.pid))

    def test_pages_of_a_library_that_has_gone_are_not_told(self):
        """Nobody has looked since: they do not differ from their file."""
        library = live.build_library("shared_lib")
        with live.Target("dl", library) as process, mock.patch.object(
                ubp.Target, "_look_for_libraries"):
            with ubp.attach(process.pid) as target:
                target.probe(["shared_hot", "exe:main"], ubp.Count(),
                             strategy="int3")
                process.ask("u")
            self.assertGreater(target.removal.n_pages, 0)
            self.assertEqual(target.removal.n_pages, target.removal.n_equal)
            self.assertEqual([], live.changed_text(process.pid))

    def test_another_library_in_its_place_is_no_other_tool(self):
        """It came when nobody looked; its text is that of its file."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        library = os.path.join(folder, "plug.so")
        shutil.copy(live.build_library("plug"), library)
        with live.Target("plugins", library, str(N_ROUNDS),
                         flags=("-rdynamic",)) as process:
            with ubp.attach(process.pid) as target:
                probe = self.probe(target)
                process.ask("o")
                [vaddr] = [site.vaddr for site in probe.sites
                           if site.names[0] == "plug"]
                target._look_for_libraries = lambda *_, **__: None
                process.ask("u")
                os.unlink(library)
                shutil.copy(live.build_library("plug", ("-O0",)), library)
                process.ask("o")
                self.assertIn(library, [
                    m.path for m in live.maps(process.pid)
                    if m.start <= vaddr < m.end and "x" in m.permissions])
                target.close()
                self.assertEqual((), target.removal.notes)
            self.left_as_it_was(process)

    def test_a_tight_loop_under_musl(self):
        """There it is the constructors that run each time."""
        if not os.path.exists(MUSL):
            self.skipTest("no musl-gcc: apt-get install musl-tools")
        with self.target("-specs=" + MUSL) as process:
            with ubp.attach(process.pid) as target:
                probe = self.probe(target)
                for command in "olt":
                    calls = process.ask(command)["calls"]
                    self.assertEqual(calls, self.counted(probe), command)
            self.left_as_it_was(process)

    def test_a_library_in_a_namespace_of_its_own(self):
        """dlmopen: its constructor finds nobody who counts but us."""
        with self.target() as process:
            with ubp.attach(process.pid) as target:
                probe = self.probe(target)
                process.ask("n")
                self.assertEqual(N_CONSTRUCTED + N_CALLED,
                                 self.counted(probe))
                process.ask("o")
                self.assertEqual(2 * N_CONSTRUCTED + N_CALLED,
                                 self.counted(probe))
            self.left_as_it_was(process)

    def test_other_programs_of_the_target_are_as_before(self):
        """A forked child loads what it likes, and does not wait for us."""
        with self.target() as process:
            with ubp.attach(process.pid) as target:
                probe = self.probe(target)
                self.assertLess(process.ask("f")["us"], 500000)
                calls = process.ask("o")["calls"]
                self.assertEqual(calls, self.counted(probe))
            self.left_as_it_was(process)

    def armed(self, process):
        """A tracer of its own, with the probe in place."""
        tracer = live.python(
            "t = ubp.attach(%d)\n"
            "p = t.probe('plug*', ubp.Count())\n"
            "print('armed', flush=True)\n"
            "time.sleep(60)\n" % process.pid)
        self.assertEqual("armed", tracer.line())
        return tracer

    def test_a_tracer_that_is_stopped_delays_one_load_for_a_second(self):
        with self.target() as process, self.armed(process) as tracer:
            os.kill(tracer.pid, signal.SIGSTOP)
            live.settled(lambda: live.states(tracer.pid).strip("T") == "")
            first = process.ask("o")["us"]
            self.assertTrue(9e5 < first < 2e6, first)
            process.ask("u")
            self.assertLess(process.ask("o")["us"], 2e5)
            os.kill(tracer.pid, signal.SIGCONT)
            tracer.kill()
            ubp.clean(process.pid)
            self.left_as_it_was(process)

    def test_a_tracer_that_is_killed_lets_who_waits_go(self):
        with self.target() as process, self.armed(process) as tracer:
            os.kill(tracer.pid, signal.SIGSTOP)
            live.settled(lambda: live.states(tracer.pid).strip("T") == "")
            process.send("o")
            time.sleep(0.2)                 # of the second that it waits
            tracer.kill()
            self.assertLess(process.answer()["us"], 8e5)
            [name] = [site.name for arena in ubp.status(process.pid)
                      for site in arena.sites if "hook" in site.name]
            self.assertIn("the loader's debug hook", name)
            self.assertNotEqual([], live.changed_text(process.pid))
            ubp.clean(process.pid)
            self.left_as_it_was(process)

    def test_removal_while_a_thread_waits(self):
        def is_slow(target, hit):
            entered.append(hit)
            time.sleep(3)
        for how in ("remove", "close", "detach"):
            entered = []
            with self.subTest(how), self.target() as process, \
                    mock.patch.object(ubp.Target, "_meet_hook", is_slow), \
                    ubp.attach(process.pid) as target:
                probe = self.probe(target)
                process.send("o")
                self.assertTrue(live.settled(lambda: entered))
                getattr(probe if how == "remove" else target, how)()
                self.assertLess(process.answer()["us"], 9e5)
                if how == "detach":
                    self.assertEqual(
                        ["plug_calls"], [site.name for arena in
                                         ubp.status(process.pid)
                                         for site in arena.sites])
                    ubp.clean(process.pid)
                self.left_as_it_was(process)

    def test_a_slow_function_of_the_users_delays_no_load(self):
        entered = []

        def slow(hit):
            entered.append(hit)
            time.sleep(0.9)
        with self.target() as process:
            with ubp.attach(process.pid) as target:
                probe = self.probe(target)
                target.probe("exe:beat", ubp.Call(slow))
                process.ask("b")
                self.assertTrue(live.settled(lambda: entered))
                self.assertLess(process.ask("o")["us"], 7e5)
                self.assertEqual(N_CONSTRUCTED, self.counted(probe))
            self.left_as_it_was(process)

    def test_who_works_on_the_target_delays_a_load_for_a_moment(self):
        """What is not done in the hook is done soon."""
        with self.target() as process:
            with ubp.attach(process.pid) as target:
                probe = self.probe(target)
                with target._lock:
                    self.assertLess(process.ask("o")["us"], 7e5)
                self.assertTrue(live.settled(
                    lambda: len(probe.sites) == 2, 10))
                before = self.counted(probe)
                process.ask("c")
                self.assertEqual(N_CALLED, self.counted(probe) - before)
            self.left_as_it_was(process)

    def test_beside_a_debugger_no_load_is_held_up(self):
        """It is we who cannot stop the target: what is loaded then has its
        probes when the debugger has gone."""
        if shutil.which("gdb") is None:
            self.skipTest("no gdb: apt-get install gdb")
        with self.target() as process:
            with ubp.attach(process.pid) as target:
                probe = self.probe(target)
                with subprocess.Popen(
                        ["gdb", "-q", "-batch", "-p", str(process.pid), "-ex",
                         "break beat", "-ex", "echo here\\n", "-ex",
                         "continue", "-ex", "detach"], stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT) as gdb:
                    while b"here" not in gdb.stdout.readline():
                        pass
                    self.assertLess(process.ask("o")["us"], 9e5)
                    process.ask("b")
                    gdb.stdout.read()
                self.assertTrue(live.settled(
                    lambda: len(probe.sites) == 2, 20))
                process.ask("c")
                self.assertEqual(N_CALLED, self.counted(probe))
            self.left_as_it_was(process)

    def test_two_of_ubp_on_one_target(self):
        for order in ((0, 1), (1, 0)):
            with self.subTest(order), self.target() as process:
                both = [ubp.attach(process.pid) for _ in range(2)]
                probe = self.probe(both[0])
                other = both[1].probe("beat", ubp.Count())
                self.assertEqual(N_CONSTRUCTED, process.ask("o")["calls"])
                self.assertEqual(N_CONSTRUCTED, self.counted(probe))
                process.ask("b")
                self.assertTrue(live.settled(lambda: other.read() == 1))
                for n in order:
                    both[n].close()
                self.left_as_it_was(process)

    # what is probed | is the hook wanted?
    WANTED = """
    beat           | yes
    plug*          | yes
    *:beat         | yes
    exe:beat       | no
    exe:*          | no
    libc:getpid    | no
    ld-*:_dl_debug_state | yes
    """

    def test_it_is_there_only_if_a_library_could_matter(self):
        """By the text of the loader: who writes there at all."""
        for line in self.WANTED.strip().splitlines():
            pattern, is_wanted = (word.strip() for word in line.split("|"))
            with self.subTest(pattern), self.target() as process:
                with ubp.attach(process.pid) as target:
                    target.probe(pattern, ubp.Count())
                    self.assertEqual(
                        is_wanted == "yes", any(
                            "/ld-" in path for path, _, _, _
                            in live.changed_text(process.pid)))
                self.left_as_it_was(process)

    def debug_brk(self, process):
        """The vaddr of r_brk in the target, as gdb would find it: through
        DT_DEBUG (21) of the program's dynamic section, <link.h>."""
        text = subprocess.check_output(["readelf", "-SW", process.path])
        row = re.search(rb"\.dynamic\s+DYNAMIC\s+([0-9a-f]+)\s+[0-9a-f]+\s+"
                        rb"([0-9a-f]+)", text)
        low = min(m.start for m in live.maps(process.pid)
                  if m.path == os.path.realpath(process.path))
        with open("/proc/%d/mem" % process.pid, "rb") as memory:
            memory.seek(low + int(row.group(1), 16))
            data = memory.read(int(row.group(2), 16))
        for at in range(0, len(data), 16):
            if int.from_bytes(data[at:at + 8], "little") == 21:
                return int.from_bytes(data[at + 8:at + 16], "little") + 16
        self.fail("no DT_DEBUG")

    def test_a_hostile_address_is_no_hook(self):
        """What the target says of its loader may be anything."""
        def code(name):
            return lambda process: live.symbol(process.path, name)[0] + min(
                m.start for m in live.maps(process.pid)
                if m.path == os.path.realpath(process.path))
        for name, address in (
                ("nothing", lambda process: 0),
                ("no memory", lambda process: 0x10),
                ("no user memory", lambda process: (1 << 64) - 1),
                ("data", lambda process: process.brk),
                ("a function that does something", code("main")),
                ("the middle of one", lambda process:
                 code("main")(process) + 1)):
            with self.subTest(name), self.target() as process:
                process.brk = self.debug_brk(process)
                with open("/proc/%d/mem" % process.pid, "r+b", 0) as memory:
                    memory.seek(process.brk)
                    memory.write(address(process).to_bytes(8, "little"))
                with ubp.attach(process.pid) as target:
                    probe = self.probe(target)
                    self.assertEqual(1, len(
                        {at // 4096 for _, at, _, _
                         in live.changed_text(process.pid)}))
                    process.ask("o")
                    self.assertTrue(live.settled(
                        lambda: len(probe.sites) == 2, 10))
                self.left_as_it_was(process)

    def test_under_a_filter_nothing_waits(self):
        """The body's system call could be what it forbids."""
        with mock.patch.object(ubp, "seccomp_mode", lambda tid: "2"), \
                self.target() as process:
            with ubp.attach(process.pid) as target:
                self.probe(target)
                self.assertNotIn("/ld-", str(live.changed_text(process.pid)))
                process.ask("o")
            self.left_as_it_was(process)

    def test_a_filter_that_comes_later_meets_no_call_of_ours(self):
        """It kills who calls futex: nobody does, soon after it is there."""
        with self.target() as process:
            with ubp.attach(process.pid) as target:
                probe = self.probe(target)
                process.ask("s")
                time.sleep(0.5)
                process.ask("o")
                self.assertTrue(live.settled(
                    lambda: len(probe.sites) == 2, 10))
            self.left_as_it_was(process)

    def test_a_debugger_that_was_there_before_keeps_its_breakpoint(self):
        """An int3 where the hook would be: it is left alone."""
        with self.target() as process:
            at = self.debug_brk(process)
            with open("/proc/%d/mem" % process.pid, "r+b", 0) as memory:
                memory.seek(at)
                vaddr = int.from_bytes(memory.read(8), "little")
                memory.seek(vaddr)
                own = memory.read(1)
                memory.seek(vaddr)
                memory.write(b"\xcc")
                with ubp.attach(process.pid) as target:
                    probe = self.probe(target)
                    memory.seek(vaddr)
                    self.assertEqual(b"\xcc", memory.read(1))
                    memory.seek(vaddr)
                    memory.write(own)
                    process.ask("o")
                    self.assertTrue(live.settled(
                        lambda: len(probe.sites) == 2, 10))
            self.left_as_it_was(process)


class Children(unittest.TestCase):
    """Forked children: counted, told apart, and put back."""

    def strategies(self):
        try:
            ubp.check_debug_registers()
        except ubp.ProbeError:
            return "jump", "int3"
        return "jump", "int3", "hw"

    def test_events_of_a_child_that_has_ended_have_its_pid(self):
        for strategy in self.strategies():
            for values in ("nsecs", "tid"), ("str(rsp, 3)",):
                if strategy == "hw" and values != ("nsecs", "tid"):
                    continue
                with self.subTest(strategy, values=values), live.Target(
                        "traps") as process, ubp.attach(
                        process.pid) as target:
                    target.probe("exe:step", ubp.Trace(*values),
                                 strategy=strategy)
                    for command in "cff":       # it has waited for them
                        process.ask(command)
                    events = list(target.events(0.5))
                    counts = collections.Counter(
                        event.pid for event in events)
                    self.assertGreater(counts.pop(process.pid), 200)
                    self.assertEqual([7, 7, 13, 13], sorted(counts.values()))
                    self.assertTrue(all(
                        event.tid == event.pid and event.cpu < 4096
                        for event in events))

    def test_by_pid_tells_children_and_grandchildren_apart(self):
        for strategy in self.strategies():
            with self.subTest(strategy), live.Target("traps") as process, \
                    ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(by="pid"),
                                     strategy=strategy)
                for command in "cmff":
                    process.ask(command)
                counts = probe.read()
                self.assertEqual(211 + 8 * 101, counts.pop(process.pid))
                self.assertEqual([7, 7, 13, 13], sorted(counts.values()))
                self.assertNotIn(0, counts)
                target.close()
                self.assertEqual([], live.changed_text(process.pid))
                process.quit()

    def test_by_pid_over_several_processes(self):
        for strategy in self.strategies():
            with self.subTest(strategy), live.Target("traps") as one, \
                    live.Target("traps") as two:
                with live.Process([
                        sys.executable, TOP + "/ubp.py", "count", "-p",
                        "%d,%d" % (one.pid, two.pid), "--by", "pid",
                        "--strategy", strategy, "--json",
                        "exe:step"]) as front:
                    self.assertTrue(live.settled(
                        lambda: front.stderr().count("Ctrl-C") == 2, 30))
                    one.ask("c")
                    one.ask("f")
                    two.ask("m")
                    front.process.send_signal(signal.SIGINT)
                    out = front.process.stdout.read().decode()
                    self.assertEqual(0, front.wait())
                rows = {}
                for row in map(json.loads, out.splitlines()):
                    if row["kind"] == "count":
                        key, = row["key"]
                        rows[key] = rows.get(key, 0) + row["total"]
                self.assertEqual((211, 808), (rows.pop(one.pid),
                                              rows.pop(two.pid)))
                self.assertEqual([7, 13], sorted(rows.values()))
                for process in one, two:
                    self.assertEqual([], live.changed_text(process.pid))
                    process.quit()

    def test_children_that_live_on_are_put_back(self):
        for strategy in "jump", "int3":
            with self.subTest(strategy), \
                    live.Target("children", "forks") as process:
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:hot", ubp.Count(by="pid"),
                                         strategy=strategy)
                    process.ask("f")        # they stay until w
                    with open("/proc/%d/task/%d/children" % (
                            process.pid, process.pid)) as file:
                        children = [int(word) for word in file.read().split()]
                    self.assertEqual(4, len(children))
                    self.assertTrue(live.settled(lambda: {
                        pid: 1009 for pid in children}.items()
                        <= probe.read().items(), 20), probe.read())
                    for pid in children:
                        self.assertNotEqual([], live.changed_text(pid))
                        if strategy == "int3":
                            self.assertEqual(
                                {target._guardian.process.pid},
                                set(live.tracers(pid).values()))
                for pid in children:
                    self.assertEqual([], live.changed_text(pid))
                    self.assertEqual([], live.arenas(pid))
                    self.assertEqual({}, live.tracers(pid))
                process.ask("w")
                process.quit()


class Company(unittest.TestCase):
    """Other tracers in the same target: composed, or refused with the
    reason; and never a wrong result."""

    OTHER = ("t = ubp.attach(%d)\n"
             "p = t.probe(%r, ubp.Count(), strategy=%r)\n"
             "print('armed', flush=True)\n"
             "for line in sys.stdin:\n"
             "    if line[0] == 'x':\n"
             "        t.close()\n"
             "    print('n=%%d' %% p.read(), flush=True)\n")
    # the first, by another process | then ours | refused because of
    TWO = """
    jump | jump | -
    jump | int3 | -
    int3 | jump | guardian of a ubp's int3s
    int3 | int3 | guardian of a ubp's int3s
    int3 | hw   | guardian of a ubp's int3s
    hw   | int3 | -
    """

    def test_two_of_ubp_at_once_end_in_either_order(self):
        for line in self.TWO.strip().splitlines():
            first, second, why = [w.strip() for w in line.split("|")]
            for order in "first", "last":
                with self.subTest(line, ends=order):
                    self.two(first, second, why, order)

    def two(self, first, second, why, order):
        with live.Target("traps") as process:
            with live.python(self.OTHER % (process.pid, "exe:step",
                                           first)) as other:
                line = other.line()
                if "hw" in (first, second) and line != "armed":
                    self.skipTest("no debug registers here")
                if why != "-":
                    with self.assertRaises(ubp.AttachError) as caught:
                        ubp.attach(process.pid)
                    self.assertIn(why, str(caught.exception))
                    n = process.ask("c")["n"]
                    self.assertEqual(n, other.ask("x\n")["n"])
                else:
                    self.both(process, other, ubp.attach(process.pid),
                              second, order)
            self.assertEqual([], live.changed_text(process.pid))
            self.assertEqual([], live.arenas(process.pid))
            self.assertEqual({}, live.tracers(process.pid))
            process.ask("c")
            process.quit()

    def both(self, process, other, target, strategy, order):
        probe = target.probe("exe:odd_rip", ubp.Count(), strategy=strategy)
        n = process.ask("c")["n"]
        self.assertEqual((n, n), (other.ask("r\n")["n"], probe.read()))
        if order == "first":
            self.assertEqual(n, other.ask("x\n")["n"])
            self.assertTrue(live.settled(lambda: strategy != "int3" or set(
                live.tracers(process.pid).values()) == {
                    target._guardian.process.pid}))
            time.sleep(0.5)         # it has stepped aside, and is back
            self.assertEqual(2 * n, probe.read() + process.ask("c")["n"])
            self.assertEqual(2 * n, probe.read())
            target.close()
        else:
            target.close()
            process.ask("c")
            self.assertEqual(2 * n, other.ask("x\n")["n"])

    def debugger(self, *command):
        """Run a debugger to its end. -> (exit status, output)"""
        if shutil.which(command[0]) is None:
            self.skipTest("apt-get install " + command[0])
        done = subprocess.run([str(word) for word in command],
                              stdin=subprocess.DEVNULL, timeout=180,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        return done.returncode, done.stdout.decode("utf-8", "replace")

    GDB = ("gdb", "-q", "-batch", "-nx", "-iex", "set debuginfod enabled off",
           "-p")

    def test_a_debugger_cannot_come_beside_a_guardian(self):
        for command, why in ((self.GDB, "ptrace"), (("strace", "-p"),
                                                    "not permitted")):
            with self.subTest(command[0]), live.Target("traps") as process, \
                    ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(),
                                     strategy="int3")
                _, text = self.debugger(*(command + (process.pid,)))
                self.assertIn(why, text)
                self.assertEqual(process.ask("m")["n"], probe.read())
                target.close()
                self.assertEqual([], live.changed_text(process.pid))
                process.quit()

    def test_a_tracer_that_was_first_is_named(self):
        if shutil.which("strace") is None:
            self.skipTest("apt-get install strace")
        for strategy in "jump", "int3":
            with self.subTest(strategy), live.Target("traps") as process:
                with live.Process(["strace", "-q", "-o", "/dev/null", "-p",
                                   process.pid]) as strace:
                    self.assertTrue(live.settled(
                        lambda: live.tracers(process.pid), 10))
                    with self.assertRaises(ubp.AttachError) as caught:
                        ubp.attach(process.pid)
                    self.assertIn("traced by pid %d (strace)" % strace.pid,
                                  str(caught.exception))
                    os.kill(strace.pid, signal.SIGINT)
                    strace.wait()
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:step", ubp.Count(),
                                         strategy=strategy)
                    self.assertEqual(process.ask("c")["n"], probe.read())
                self.assertEqual([], live.changed_text(process.pid))
                process.quit()

    def test_strace_beside_jumps_holds_their_removal_up(self):
        if shutil.which("strace") is None:
            self.skipTest("apt-get install strace")
        with live.Target("traps") as process, \
                ubp.attach(process.pid) as target:
            probe = target.probe("exe:step", ubp.Count())
            with live.Process(["strace", "-q", "-o", "/dev/null", "-f", "-p",
                               process.pid]) as strace:
                self.assertTrue(live.settled(
                    lambda: live.tracers(process.pid), 10))
                n = sum(process.ask(c)["n"] for c in "cmf")
                self.assertEqual(n, probe.read())
                with self.assertRaises(ubp.UbpError) as caught:
                    target.close()
                self.assertIn("strace", str(caught.exception))
                self.assertEqual(2 * n, n + sum(
                    process.ask(c)["n"] for c in "cmf"))
                os.kill(strace.pid, signal.SIGINT)
                strace.wait()
            target.close()
            self.assertEqual(2 * n, probe.read())
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    @unittest.skipUnless(live.IS_ROOT, "needs root to set a kernel uprobe")
    def test_a_kernel_uprobe_before_or_after_an_int3(self):
        with live.Target("busy", 1) as process:
            offset = live.symbol(process.path, "hot")[1]
            with live.KernelUprobe(process.pid, process.path, offset):
                with ubp.attach(process.pid) as target:
                    with self.assertRaises(ubp.ProbeError) as caught:
                        target.probe("exe:hot", ubp.Count(), strategy="int3")
                    self.assertIn("differs from its file",
                                  str(caught.exception))
                self.assertEqual(0, process.ask("c")["wrong"])
            self.assertEqual([], live.changed_text(process.pid))
            with ubp.attach(process.pid) as target:
                target.probe("exe:tiny", ubp.Count(), strategy="int3")
                vaddr = live.symbol(process.path, "tiny")[1]
                with live.KernelUprobe(process.pid, process.path, vaddr):
                    self.assertEqual(0, process.ask("c")["wrong"])
                self.assertEqual(0, process.ask("c")["wrong"])
            self.assertEqual(0, process.ask("c")["wrong"])
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()


class Changes(unittest.TestCase):
    """A target that changes its own text, or ubp's memory, meanwhile."""

    # told while probed | and when they are out | a note then | text that stays
    WHAT = """
    a  | c   | unmapped                | 0
    n  | xc  | -                       | 0
    w  | xc  | -                       | 0
    wx | c   | -                       | 0
    o  | c   | changed by another tool | 4
    g  | hc  | changed by another tool | 0
    d  | hc  | -                       | 0
    m  | c   | -                       | 0
    """

    def test_what_changed_is_told_and_nothing_stale_is_written(self):
        for line in self.WHAT.strip().splitlines():
            told, then, note, n_stays = [w.strip() for w in line.split("|")]
            for strategy in ("jump", "int3"):
                with self.subTest(told, strategy=strategy):
                    self.check(strategy, told, then, note, int(n_stays))

    def check(self, strategy, told, then, note, n_stays):
        library = live.build_library("shared_lib")
        with live.Target("unmaps", library) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe(
                    ["exe:victim", "exe:bystander", "shared_hot"],
                    ubp.Count(), strategy=strategy)
                process.ask("c")
                self.assertEqual(3 * 101, probe.read())
                # Before it is seen that a library is no longer there.
                target._look_for_libraries = lambda *_, **__: None
                for command in told:
                    process.ask(command)
                target.close()
                notes = " ".join(target.removal.notes)
                if note == "-":
                    self.assertEqual("", notes)
                self.assertIn(note if note != "-" else "", notes)
            for command in then:
                self.assertEqual({"kept": 0, "wrong": 0},
                                 process.ask(command))
            self.assertEqual(n_stays, len(live.changed_text(process.pid)))
            self.assertEqual({}, live.tracers(process.pid))
            if note != "changed by another tool":
                self.assertEqual([], live.arenas(process.pid))
            process.quit()

    def test_it_is_told_while_the_probes_are_in(self):
        library = live.build_library("shared_lib")
        for command, note in (("o", "the code of victim was changed"),
                              ("a", "unmapped ubp's memory")):
            with self.subTest(command), \
                    live.Target("unmaps", library) as process, \
                    ubp.attach(process.pid) as target:
                target.probe("exe:victim", ubp.Count())
                process.ask(command)
                self.assertTrue(live.settled(
                    lambda: note in " ".join(target.notes), 10),
                    target.notes)
                target.close()
                process.ask("c")
                process.quit()


class Exec(unittest.TestCase):
    """Targets that become other programs: execs.c counts its own calls."""

    BEFORE, CALLS = 211, 1009
    # what is launched, %s the program | calls of step, over all programs
    LAUNCHED = """
    %s once                              | 1009
    %s fail                              | 1009
    %s chain 5                           | 2064
    %s thread 3                          | 1642
    /bin/sh -c 'exec %s once'            | 1009
    /bin/sh -c 'true; exec env %s chain' | 1220
    """

    def test_a_launched_program_is_followed_from_its_first_instruction(self):
        path = live.build("execs")
        for line in self.LAUNCHED.strip().splitlines():
            command, n = [w.strip() for w in line.split("|")]
            for strategy in ("jump", "int3"):
                with self.subTest(command, strategy=strategy), ubp.launch(
                        shlex.split(command % path),
                        follow_exec=True) as target:
                    probe = target.probe("exe:step", ubp.Count(),
                                         strategy=strategy)
                    trace = target.probe("exe:step", ubp.Trace("arg0"),
                                         "arg0 == 7", strategy)
                    self.assertTrue(target.wait(30))
                    self.assertEqual(int(n), probe.read(), target.notes)
                    self.assertEqual(
                        [(7,)] * trace.hits,
                        [event.values for event in target.events(0)])
                    self.assertEqual(7, target.returncode)

    def test_an_attached_one_is_followed_and_left_as_it_was(self):
        for strategy in ("jump", "int3", "jump,hw", "hw"):
            with self.subTest(strategy), live.Target(
                    "execs", "wait", "9") as process:
                before = live.Snapshot(process.pid)
                with ubp.attach(process.pid, follow_exec=True) as target:
                    if "hw" in strategy:
                        self.skip_without_registers()
                    probe = target.probe("exe:step", ubp.Count(by="arg0 < 9"),
                                         strategy=strategy)
                    watch = "hw" in strategy and target.probe(
                        "mem:counter:rw", ubp.Count(), strategy="hw")
                    for turn in range(3):
                        self.assertEqual(self.BEFORE, process.ask("c")["n"])
                        self.assertEqual(self.BEFORE, process.ask("x")["n"])
                        self.assertEqual("how=wait", process.line()[6:])
                    process.ask("c")
                    self.assertEqual({0: 7 * 202, 1: 7 * 9}, probe.read())
                    if watch:
                        self.assertEqual(7 * self.BEFORE, watch.read())
                after = live.Snapshot(process.pid)
                self.assertEqual([], after.text)
                self.assertEqual({}, after.tracers)
                self.assertEqual(before.fds, after.fds)
                self.assertEqual([], live.arenas(process.pid))
                self.assertEqual([], ubp.waiting_stubs(process.pid))
                process.quit()

    def test_stacks_of_each_program_have_the_names_of_it(self):
        for strategy, action in (("jump", ubp.Stack()), ("hw", ubp.Stack()),
                                 ("jump", ubp.Trace(stack=True)),
                                 ("hw", ubp.Trace(stack=True)),
                                 ("jump", ubp.Latency()),
                                 ("jump", ubp.Call(lambda hit: None))):
            with self.subTest(repr(action), strategy=strategy), live.Target(
                    "execs", "wait", "9") as process, ubp.attach(
                    process.pid, follow_exec=True) as target:
                if strategy == "hw":
                    self.skip_without_registers()
                probe = target.probe("exe:step", action, strategy=strategy)
                for command in "cxc":
                    process.ask(command)
                    if command == "x":
                        process.line()
                if isinstance(action, ubp.Stack):
                    [(stack, n)] = [
                        (stack[:2], n) for stack, n in self.merged(
                            probe.read(), 2).items()]
                    self.assertEqual((("step", "main"), 3 * self.BEFORE),
                                     (stack, n))
                elif isinstance(action, ubp.Trace):
                    names = [tuple(frame.function for frame in event.stack)
                             for event in target.events(0.3)]
                    self.assertEqual({("step", "main")},
                                     {name[:2] for name in names})
                    self.assertEqual(3 * self.BEFORE, len(names))
                self.assertEqual((3 * self.BEFORE, 0), (probe.hits,
                                                        probe.dropped))
                target.close()
                process.quit()

    def merged(self, stacks, depth):
        """{(name, …): n}, of so many frames each."""
        found = {}
        for stack, n in stacks.items():
            key = tuple(frame.function for frame in stack[:depth])
            found[key] = found.get(key, 0) + n
        return found

    def skip_without_registers(self):
        try:
            ubp.check_debug_registers()
        except ubp.ProbeError as refusal:
            self.skipTest(str(refusal))

    def test_all_that_is_mapped_is_the_programs_own(self):
        with live.Target("execs", "wait", "9") as process:
            with ubp.attach(process.pid, follow_exec=True) as target:
                target.probe("exe:step", ubp.Count())
                process.ask("x")
                process.line()
            self.assertEqual([], [
                m for m in live.maps(process.pid) if "x" in m.permissions
                and not m.path])
            process.quit()

    def test_unfollowed_its_sites_are_reported_as_gone(self):
        for strategy in ("jump", "int3"):
            with self.subTest(strategy), live.Target(
                    "execs", "wait", "9") as process, \
                    ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(),
                                     strategy=strategy)
                process.ask("x")
                process.line()
                self.assertTrue(live.settled(lambda: any(
                    "(exec)" in note and "1 sites are gone" in note
                    for note in target.notes)), target.notes)
                process.ask("c")
                self.assertEqual(self.BEFORE, probe.read())
                self.assertEqual([], live.changed_text(process.pid))
                with self.assertRaises(ubp.TraceeGone):
                    target.probe("exe:step", ubp.Count())
                target.close()
                process.quit()

    def test_a_program_that_is_not_for_us_is_left_alone(self):
        import test_targets
        with tempfile.TemporaryDirectory() as folder:
            program = folder + "/program"
            with open(program, "wb") as f:
                f.write(test_targets.ELF_32)
            os.chmod(program, 0o755)
            try:
                subprocess.Popen([program]).kill()
            except OSError:
                self.skipTest("this kernel runs no 32-bit programs "
                              "(CONFIG_IA32_EMULATION)")
            with live.Process(["/bin/sh", "-c", "read x; exec " + program
                               ]) as process:
                with ubp.attach(process.pid, follow_exec=True) as target:
                    target.probe("exe:nonesuch", ubp.Count())
                    process.send("\n")
                    self.assertTrue(live.settled(lambda: any(
                        "32-bit" in note for note in target.notes), 10),
                        target.notes)
                    self.assertEqual("S", live.states(process.pid))
                self.assertEqual({}, live.tracers(process.pid))
                self.assertEqual("S", live.states(process.pid))

    def test_killed_by_9_while_it_follows_the_program_goes_on(self):
        for delay in (0.0, 0.004, 0.008, 0.05):
            with self.subTest(delay), live.Target(
                    "execs", "wait", "9") as process:
                with live.python(
                        "t = ubp.attach(%d, follow_exec=True)\n"
                        "t.probe('exe:step', ubp.Count())\n"
                        "print(t._guardian.process.pid, flush=True)\n"
                        "time.sleep(60)\n" % process.pid) as tracer:
                    guardian = int(tracer.line())
                    process.send("x")
                    time.sleep(delay)
                    os.kill(guardian, signal.SIGKILL)
                    tracer.kill()
                self.assertEqual(self.BEFORE, process.answer()["n"])
                self.assertEqual("ready how=wait", process.line())
                self.assertEqual(self.BEFORE, process.ask("c")["n"])
                ubp.clean(process.pid, all=True)
                self.assertEqual([], ubp.waiting_stubs(process.pid))
                self.assertEqual([], live.changed_text(process.pid))
                process.quit()

    def test_signals_and_stops_pass_through_while_it_is_followed(self):
        with live.Target("signals", seconds=60) as process:
            with ubp.attach(process.pid, follow_exec=True) as target:
                target.probe("exe:hot", ubp.Count())
                for _ in range(5):
                    os.kill(process.pid, signal.SIGSTOP)
                    self.assertTrue(live.settled(
                        lambda: set(live.states(process.pid)) == {"t"}))
                    os.kill(process.pid, signal.SIGCONT)
                    time.sleep(0.05)
                answer = process.ask("r")
                self.assertGreater(answer["received"], 100)
            process.quit()

    def test_the_command_follows_a_shell_that_execs(self):
        path = live.build("execs")
        with live.Process([
                sys.executable, TOP + "/ubp.py", "count", "--follow-exec",
                "--json", "exe:step", "--", "/bin/sh", "-c",
                "exec %s chain 2" % path]) as command:
            self.assertEqual(7, command.wait(30))
            text = command.process.stdout.read().decode()
            said = command.stderr()
        self.assertIn("followed through exec by pid", said)
        self.assertIn("armed before its entry point", said)
        self.assertIn('"hits": %d' % (2 * self.BEFORE + self.CALLS), text)

    def test_the_command_ends_when_its_target_became_another(self):
        with live.Target("execs", "wait", "9") as process, live.Process([
                sys.executable, TOP + "/ubp.py", "count", "--json", "-p",
                process.pid, "exe:step"]) as command:
            self.assertTrue(live.settled(
                lambda: "Ctrl-C" in command.stderr(), 60))
            process.ask("x")
            self.assertEqual(0, command.wait(20))
            text = command.process.stdout.read().decode()
            self.assertIn('"reason": "exec", "hits": %d,' % self.BEFORE, text)
            self.assertIn("(exec)", command.stderr())
            process.line()
            process.quit()


class Programs(unittest.TestCase):
    """Programs that children of the target become: the sum of what each says
    that it called is what there is to be counted."""

    # $P the program, $T a folder; all but the last of a line is a command
    COMMANDS = """
    for i in 1 2 3 4 5; do $P once; done; exit 3
    $P chain 2; exit 4
    $P thread 3; echo $?
    $P fail; echo $?
    sh -c '$P once; $P chain; exit 5' & sh -c '$P once; true'; wait $!
    for i in $(seq 12); do $P once & done; wait; exit 9
    for i in $(seq 9); do /bin/true; nonesuch; $P once | cat; done
    (echo "#!$P once" > $T/s; chmod 755 $T/s; $T/s; env $T/s); true
    ($P once; kill -9 $$); true
    trap 'echo "n=0 term"' TERM; (kill -TERM $$; $P once); true
    seq 12 | xargs -P4 -n1 $P once; echo $?
    """
    PYTHON = """
    subprocess.call([P, "once"])
    subprocess.call([P, "once"], preexec_fn=os.getpid)
    os.waitpid(os.posix_spawn(P, ["P", "once"], os.environ), 0)
    os.waitpid(os.posix_spawnp("P", ["P", "once"], dict(PATH="/x:/y:" + T)), 0)
    os.system("set -e; cd /; (" + P + " once) && false; " + P + " chain 2")
    threading.Thread(target=subprocess.call, args=([P, "thread"],)).start()
    """

    def environment(self, folder):
        path = live.build("execs")
        os.symlink(path, folder + "/P")
        return dict(os.environ, P=path, T=folder, UBP_TEST_SECONDS="60")

    def run_both(self, command, folder, *options):
        """What a command says and how it ends, alone and under ubp.

        -> the JSON of ubp, what it said, and the command's output there
        """
        environment, ubp_command = self.environment(folder), [
            sys.executable, TOP + "/ubp.py", "count", "--follow-exec",
            "-o", folder + "/out.jsonl"] + list(options) + ["--"]
        found = []
        for prefix in [], ubp_command:
            done = subprocess.run(
                prefix + command, env=environment, timeout=100,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE)
            code = done.returncode
            found.append((sorted(done.stdout.splitlines()),
                          128 - code if code < 0 else code))
        said = done.stderr.decode()
        self.assertEqual(found[0], found[1], said)
        with open(folder + "/out.jsonl") as f:
            return [json.loads(line) for line in f], said, done.stdout

    def check(self, command, *options):
        with tempfile.TemporaryDirectory() as folder:
            records, said, output = self.run_both(command, folder, *options)
        n = sum(map(int, re.findall(rb"n=(\d+)", output)))
        self.assertEqual(n, records[-1]["hits"], said)
        self.assertEqual(0, records[-1]["dropped"])
        return records, said

    def test_each_call_of_every_program_is_counted(self):
        for command in self.COMMANDS.strip().splitlines():
            with self.subTest(command.strip()):
                self.check(["/bin/sh", "-c", command.strip()], "exe:step")

    def test_whatever_way_python_starts_them(self):
        for code in self.PYTHON.strip().splitlines():
            with self.subTest(code.strip()):
                self.check([sys.executable, "-c",
                            "import os, subprocess, threading\n"
                            "P, T = os.environ['P'], os.environ['T']\n"
                            + code.strip()], "exe:step")

    def test_other_strategies_follow_as_well(self):
        command = "sh -c '$P once; true' & $P chain 2; wait; exit 3"
        for strategy in "int3", "hw":
            with self.subTest(strategy):
                if strategy == "hw":
                    Exec.skip_without_registers(self)
                self.check(["/bin/sh", "-c", command], "exe:step",
                           "--strategy", strategy)

    def test_fifty_at_once(self):
        self.check(["/bin/sh", "-c", "for i in $(seq 50); do $P once & done;"
                    "wait"], "exe:step")

    def test_a_tree_of_make(self):
        self.check(["/bin/sh", "-c", "printf 'all: a b c\\na b c:\\n"
                    "\\t@$P once || true\\n\\t@$P once; true\\n' > $T/m;"
                    "make -j3 -s -f $T/m"], "exe:step")

    def test_pid_tells_them_apart(self):
        command = "$P once; $P chain; $P chain 2; true"
        records, said = self.check(["/bin/sh", "-c", command], "exe:step",
                                   "--by", "pid")
        counts = sorted(record["total"] for record in records
                        if record["kind"] == "count")
        self.assertEqual([1009, 1220, 1431], counts, said)
        self.assertIn("its children became 6 other programs, 6 of them with "
                      "probes", said)

    def test_all_that_a_probe_computes_is_of_them_too(self):
        path = live.build("execs")
        command = "for i in 1 2 3; do %s once; done; exit 3" % path
        with ubp.launch(["/bin/sh", "-c", command],
                        follow_exec=True) as target:
            probes = [target.probe("exe:step", action) for action in (
                ubp.Count(by="pid"), ubp.Hist("arg0"), ubp.Stack(),
                ubp.Latency(), ubp.Count(sum="arg0"))]
            trace = target.probe("exe:step", ubp.Trace("arg0"), "arg0 == 7")
            self.assertTrue(target.wait(30))
            by_pid, sizes, stacks, times, total = [
                probe.read() for probe in probes]
            events = list(target.events(0))
        self.assertEqual([1009] * 3, list(by_pid.values()))
        self.assertEqual((3027, 0, 1008), (sizes.count, sizes.min, sizes.max))
        self.assertEqual((3027, 3 * 1008 * 1009 // 2), (times.count, total))
        for names in [[frame.function for frame in stack]
                      for stack in stacks]:
            self.assertEqual(("step", True), (names[0], "main" in names))
        self.assertEqual(3027, sum(stacks.values()))
        self.assertEqual(sorted(by_pid), sorted(e.pid for e in events))
        self.assertEqual([(7,)] * 3, [event.values for event in events])
        self.assertEqual(sorted(e.time_ns for e in events),
                         [event.time_ns for event in events])
        self.assertEqual({id(trace)}, {id(event.probe) for event in events})
        self.assertEqual(3, target.returncode)

    def test_addresses_have_the_names_of_the_program_they_are_of(self):
        """Programs that are mapped elsewhere each time, one entered by the
        target itself."""
        command = "$P once; $P once; exec $P once"
        records, said = self.check(["/bin/sh", "-c", command], "exe:step",
                                   "--by", "caller")
        for record in records[:-1]:
            self.assertRegex(record["key"][0], r"^execs-\w+:(call|main)\+0x")
        self.assertEqual(3027, sum(r["total"] for r in records[:-1]))
        self.assertLess(len(records), 4)

    def test_static_and_foreign_programs_go_their_way(self):
        import test_targets
        program = os.path.join(tempfile.mkdtemp(), "program")
        with open(program, "wb") as f:
            f.write(test_targets.ELF_32)
        os.chmod(program, 0o755)
        self.addCleanup(shutil.rmtree, os.path.dirname(program))
        static = live.build("execs", ("-static",))
        self.check(["/bin/sh", "-c", "timeout 0.5 %s 2>/dev/null; echo $?; "
                    "%s chain; %s once; true" % (program, static, static)],
                   "exe:step")

    def test_a_setuid_program_keeps_its_privilege_if_ubp_has_any(self):
        if not live.IS_ROOT:
            self.skipTest("giving a file away takes root: sudo")
        command = ("cp $(which id) $T/id; chown 65534 $T/id; chmod 4755 $T/id;"
                   "$T/id -u; $P once; true")
        records, said = self.check(["/bin/sh", "-c", command], "exe:step")
        self.assertNotIn("privilege", said)

    def test_a_setuid_program_without_its_privilege_is_told_of(self):
        if not live.IS_ROOT:
            self.skipTest("becoming another user takes root: sudo")
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            for name in "ubp.py", "ubp_x86.py":
                shutil.copy(os.path.join(TOP, name), folder)
            shutil.copy(shutil.which("id"), folder + "/id")
            os.chmod(folder + "/id", 0o4755)
            found = []
            for prefix in [], ["/usr/bin/python3", folder + "/ubp.py",
                               "count", "--follow-exec", "libc:malloc", "--"]:
                done = subprocess.run(
                    prefix + ["/bin/sh", "-c", folder + "/id -u; exit 3"],
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    timeout=60, preexec_fn=lambda: os.setuid(65534))
                found.append(done.stdout.split(b"\n")[0])
                self.assertEqual(3, done.returncode, done.stderr)
            if found[0] != b"0":
                self.skipTest("the folder for temporary files is mounted "
                              "nosuid: TMPDIR")
            self.assertEqual(b"65534", found[1])    # as under strace
            self.assertIn("without the privilege", done.stderr.decode())

    def test_a_tracer_inside_has_its_own_children(self):
        for tool in (["strace", "-f", "-qq", "-e", "trace=none"],
                     ["gdb", "-nx", "-batch", "-ex", "run", "--args"]):
            with self.subTest(tool[0]), \
                    tempfile.TemporaryDirectory() as folder:
                if not shutil.which(tool[0]):
                    self.skipTest("%s is not installed: apt install %s"
                                  % (tool[0], tool[0]))
                records, said, output = self.run_both(
                    ["/bin/sh", "-c", " ".join(shlex.quote(w) for w in tool)
                     + " $P once | grep ^n=; true"], folder, "exe:step")
                self.assertIn(b"n=1009 wrong=0", output)
                self.assertEqual(0, records[-1]["hits"], said)
                self.assertIn("traces others", said)

    def test_the_target_is_as_it_was_when_it_is_left(self):
        """Also children that run on: closed while they wait for input."""
        path = live.build("execs")
        with live.Process(["/bin/sh", "-c", "read x; %s wait 9; exit 3" % path]
                          ) as process:
            with ubp.attach(process.pid, follow_exec=True) as target:
                probe = target.probe("exe:step", ubp.Count())
                process.send("\n")
                self.assertEqual("ready how=wait", process.line())
                child = self.child_of(process.pid)
                for turn in range(2):
                    self.assertEqual(211, process.ask("c")["n"])
                    self.assertEqual(211, process.ask("x")["n"])
                    self.assertEqual("ready how=wait", process.line())
                self.assertEqual(4 * 211, probe.read())
                other = target.probe("exe:step", ubp.Count())   # beside it
                self.assertEqual(211, process.ask("c")["n"])
                self.assertEqual((5 * 211, 211), (probe.read(), other.read()))
                probe.remove()
                self.assertEqual(211, process.ask("c")["n"])
                self.assertEqual((5 * 211, 422), (probe.read(), other.read()))
            self.assertEqual((5 * 211, 422), (probe.read(), other.read()))
            for pid in process.pid, child:
                self.assertEqual([], live.changed_text(pid))
                self.assertEqual([], live.arenas(pid))
                self.assertEqual({}, live.tracers(pid))
                self.assertEqual([], ubp.waiting_stubs(pid))
            self.assertEqual(211, process.ask("c")["n"])
            process.send("q")
            self.assertEqual(3, process.wait())

    def test_guardian_killed_another_follows_on(self):
        path = live.build("execs")
        with live.Process(["/bin/sh", "-c", "read x; %s wait 9; exit 3" % path]
                          ) as process:
            with ubp.attach(process.pid, follow_exec=True) as target:
                probe = target.probe("exe:step", ubp.Count())
                process.send("\n")
                self.assertEqual("ready how=wait", process.line())
                child = self.child_of(process.pid)
                first = target._guardian.process.pid
                os.kill(first, signal.SIGKILL)
                self.assertEqual(211, process.ask("c")["n"])
                self.assertTrue(live.settled(lambda: all(
                    set(live.tracers(pid).values()) - {0, first}
                    for pid in (process.pid, child)), 20), target.notes)
                self.assertEqual(211, process.ask("x")["n"])
                self.assertEqual("ready how=wait", process.line())
                self.assertEqual(211, process.ask("c")["n"])
                self.assertEqual(3 * 211, probe.read(), target.notes)
            for pid in process.pid, child:
                self.assertEqual([], live.changed_text(pid))
                self.assertEqual([], live.arenas(pid))
            process.send("q")
            self.assertEqual(3, process.wait())

    def test_stops_signals_and_wait_are_as_without_us(self):
        """Of a child that is followed, as its parent sees them."""
        code = (
            "import os, signal, subprocess\n"
            "P = os.environ['P']\n"
            "def stop_and_go(pid):\n"
            "    os.kill(pid, signal.SIGSTOP)\n"
            "    print(os.waitpid(pid, os.WUNTRACED)[1])\n"
            "    os.kill(pid, signal.SIGCONT)\n"
            "    print(os.waitpid(pid, os.WCONTINUED)[1])\n"
            "p = subprocess.Popen([P, 'wait'], stdin=subprocess.PIPE,\n"
            "                     stdout=subprocess.PIPE)\n"
            "p.stdout.readline()\n"
            "for n in range(3):\n"
            "    stop_and_go(p.pid)\n"
            "    p.stdin.write(b'c')\n"
            "    p.stdin.flush()\n"
            "    print(p.stdout.readline())\n"
            "os.kill(p.pid, signal.SIGTERM)\n"
            "print(p.wait())\n"
            "pid = os.fork()\n"
            "if pid == 0:\n"
            "    os.kill(os.getpid(), signal.SIGSTOP)\n"
            "    os.execv(P, ['P', 'once'])\n"
            "print(os.waitpid(pid, os.WUNTRACED)[1])\n"
            "os.kill(pid, signal.SIGCONT)\n"
            "print(os.waitpid(pid, 0)[1])\n")
        self.check([sys.executable, "-c", code], "exe:step")

    def test_what_is_refused_in_a_child_is_told(self):
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "tiny.c")
            with open(source, "w") as f:
                f.write("__asm__(\".globl tiny,next\\n"
                        ".type tiny,@function\\ntiny: ret\\n"
                        ".size tiny,1\\n.type next,@function\\n"
                        "next: ret\\n.size next,1\");\n"
                        "void tiny(void); int main(void) { tiny(); }\n")
            subprocess.check_call(["gcc", "-o", folder + "/tiny", source])
            records, said, _ = self.run_both(
                ["/bin/sh", "-c", folder + "/tiny; " + folder + "/tiny; true"],
                folder, "exe:tiny")
        refused = [r for r in records if r["kind"] == "refused"]
        self.assertEqual(["tiny"], [r["function"] for r in refused], said)
        self.assertEqual(1, records[-1]["refused"])

    def child_of(self, pid):
        with open("/proc/%d/task/%d/children" % (pid, pid)) as f:
            return int(f.read().split()[0])

    KILLED = ("t = ubp.attach(%d, follow_exec=True)\n"
              "t.probe('exe:step', ubp.Count(), strategy=%r)\n"
              "print(t._guardian.process.pid, flush=True)\n"
              "time.sleep(60)\n")

    def test_killed_by_9_every_child_goes_on(self):
        """The front end alone, or the guardian, too, at any moment."""
        path = live.build("execs")
        for victims, strategy in (("front end", "jump"), ("both", "jump"),
                                  ("front end", "int3")):
            for delay in (0.0, 0.0, 0.002, 0.004, 0.006, 0.01, 0.04):
                with self.subTest(victims, strategy=strategy,
                                  delay=delay), live.Process([
                        "/bin/sh", "-c", "read x; for i in 1 2 3; do %s once "
                        "& done; wait; echo ready; read x" % path
                        ]) as process, live.python(
                            self.KILLED % (process.pid, strategy)) as tracer:
                    guardian = int(tracer.line())
                    process.send("\n")
                    time.sleep(delay)
                    if victims == "both":
                        os.kill(guardian, signal.SIGKILL)
                    tracer.process.kill()
                    lines = [process.line(20) for _ in range(7)]
                    self.assertEqual(["n=1009 wrong=0"] * 3
                                     + ["ready"] + ["ready how=once"] * 3,
                                     sorted(lines))
                    self.assertTrue(live.settled(
                        lambda: not live.tracers(process.pid), 20))
                    process.send("\n")
                    self.assertEqual(0, process.wait())

    def test_a_front_end_that_stands_still_holds_up_nobody_for_long(self):
        path = live.build("execs")
        with live.Process(["/bin/sh", "-c", "read x; for i in 1 2 3 4 5 6; do "
                           "%s once & done; wait; echo ready" % path
                           ]) as process, live.python(
                               self.KILLED % (process.pid, "jump")) as tracer:
            tracer.line()
            os.kill(tracer.pid, signal.SIGSTOP)
            process.send("\n")
            began = time.monotonic()
            lines = [process.line(30) for _ in range(13)]
            took = time.monotonic() - began
            self.assertEqual(6, lines.count("n=1009 wrong=0"))
            self.assertEqual(0, process.wait())
            self.assertLess(took, 12)
            os.kill(tracer.pid, signal.SIGCONT)

    def test_unfollowed_they_are_told_of(self):
        path = live.build("execs")
        with live.Process(["/bin/sh", "-c", "read x; %s wait 9; exit 3" % path]
                          ) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("libc:fork", ubp.Count())
                process.send("\n")
                self.assertEqual("ready how=wait", process.line())
                self.assertTrue(live.settled(lambda: any(
                    "became another program" in note
                    for note in target.notes), 10), target.notes)
                child = self.child_of(process.pid)
                self.assertEqual([], live.changed_text(child))
                self.assertEqual({}, live.tracers(child))
                self.assertLessEqual(probe.read(), 1)
            process.send("q")
            self.assertEqual(3, process.wait())


@unittest.skipUnless(live.IS_ROOT, "suspending a filter takes root: sudo")
class Seccomp(unittest.TestCase):
    """Targets whose filter forbids what arming would inject."""

    def served(self, process, strategy="jump"):
        with ubp.attach(process.pid, suspend_seccomp=True) as target:
            try:
                probe = target.probe("exe:hot", ubp.Count(),
                                     strategy=strategy, timeout=20)
            except ubp.ProbeError as error:
                if "no filter of our own" in error.hint:
                    self.skipTest(str(error))
                raise
            process.ask("r")
            n = probe.read()
            target.close(20)
        self.assertEqual([], live.changed_text(process.pid))
        self.assertEqual([], live.arenas(process.pid))
        self.assertEqual({}, live.tracers(process.pid))
        return n

    def test_a_forbidding_filter_is_suspended_if_asked(self):
        for mode in ("memfd", "munmap", "exec"):
            with self.subTest(mode), live.Target("filtered",
                                                 mode) as process:
                with ubp.attach(process.pid) as target:
                    if mode != "memfd":
                        with self.assertRaises(ubp.ProbeError) as caught:
                            target.probe("exe:hot", ubp.Hist("arg0"))
                        self.assertIn("--suspend-seccomp",
                                      caught.exception.hint)
                self.assertEqual(10007, self.served(process))
                self.assertEqual(0, process.ask("r")["wrong"])
                status = live.status(process.pid)
                self.assertEqual("2", status["Seccomp"])
                process.quit()

    def test_sealed_targets_are_served(self):
        for mode in ("strict", "kill", "errno"):
            with self.subTest(mode), live.Target("sealed", mode) as process:
                process.ask("r")
                self.assertGreater(self.served(process), 0)
                self.assertEqual(0, process.ask("r")["wrong"])
                process.quit()

    def test_hw_never_meets_the_filter(self):
        with live.Target("sealed", "kill") as process, \
                ubp.attach(process.pid) as target:
            try:
                probe = target.probe("exe:hot", ubp.Count(), strategy="hw")
            except ubp.ProbeError as refusal:
                self.skipTest(str(refusal))
            process.ask("r")
            self.assertGreater(probe.read(), 0)
            target.close()
            process.quit()


if __name__ == "__main__":
    unittest.main()
