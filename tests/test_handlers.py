"""Call: functions that look at hits, change them, skip them; what waits.

The judges: the results that the target computes of what it calls, an
assembler function that compares every register, and the clock.
"""
import contextlib
import logging
import os
import signal
import threading
import time
import unittest

import live

ubp = live.core()
x86 = ubp.ubp_x86
PATIENCE = 20
ENOMEM = -12


@contextlib.contextmanager
def attached(*arguments, **options):
    """targets/handlers.c and a Target; then all is as it was before."""
    test = options.pop("test")
    with live.Target("handlers", *arguments, **options) as process:
        before = live.Snapshot(process.pid)
        with ubp.attach(process.pid) as target:
            yield process, target
            target.close(PATIENCE)
        live.Snapshot(process.pid).compare(test, before)
        process.quit()


class What(unittest.TestCase):
    """What a Hit tells, and what its changes do."""

    def test_entry_tells_arguments_and_takes_others(self):
        def look(hit):
            seen.append([hit.arg(n) for n in range(8)] + [hit.arg3, hit.rsi])
            hit.arg0, hit.rsi = 100, 200
            hit.arg5 = -6
            hit.write(hit.rsp + 8, (70).to_bytes(8, "little"))     # arg6
        seen = []
        with attached("1", "1", test=self) as (process, target):
            probe = target.probe("exe:many", ubp.Call(look))
            result = process.ask("m")["result"]
        self.assertEqual([[1, 2, 3, 4, 5, 6, 7, 8, 4, 2]], seen)
        self.assertEqual(100 + 400 + 9 + 16 + 25 - 36 + 490 + 64, result)
        self.assertEqual((1, 1, 0), (probe.read(), probe.hits,
                                     probe.dropped))

    def test_exit_tells_the_arguments_at_entry_and_takes_another_result(self):
        def look(hit):
            seen.append((hit.kind, hit.arg0, hit.arg1, hit.ret, hit.rax))
            hit.ret = hit.arg0 * 2 - 1
        seen = []
        with attached("1", "1", test=self) as (process, target):
            probe = target.probe("exe:add%return", ubp.Call(look))
            answer = process.ask("w")
            process.ask("w")
        self.assertEqual([("exit", 40, 2, 42, 42)] * 2, seen)
        self.assertEqual((79, 1), (answer["sum"], answer["odd"]))
        self.assertEqual(2, probe.read())

    def test_a_function_is_skipped(self):
        """Every third call fails as if memory had run out."""
        def fail(hit):
            if hit.arg0 % 3 == 0:
                hit.skip(ENOMEM)
        with attached("2", "300", test=self) as (process, target):
            probe = target.probe("exe:add", ubp.Call(fail))
            answer = process.ask("g", PATIENCE)
            self.assertEqual((600, 200, 0), (
                answer["calls"], answer["failed"], answer["odd"]))
            self.assertEqual(600, probe.read())
            probe.remove()
            self.assertEqual(0, process.ask("g")["failed"])

    def test_a_result_is_replaced_by_an_error(self):
        def fail(hit):
            if hit.arg0 % 3 == 0:
                hit.ret = ENOMEM
        with attached("2", "300", test=self) as (process, target):
            target.probe("exe:add%return", ubp.Call(fail))
            answer = process.ask("g", PATIENCE)
        self.assertEqual((200, 0), (answer["failed"], answer["odd"]))

    def test_memory_text_caller_and_stack(self):
        def look(hit):
            seen.append((hit.str(hit.arg0), hit.read(hit.arg0, 3)))
            hit.write(hit.arg0, b"zz")
            names = [frame.function for frame in hit.stack()]
            stacks.append((names[:2], main < hit.caller < main + 0x1000))
        seen, stacks = [], []
        with attached("1", "1", test=self) as (process, target):
            main = target.find("exe:main")[0].vaddr
            target.probe("exe:text", ubp.Call(look))
            answer = process.ask("k")
            self.assertEqual(ord("z") * 257, answer["text"])
            process.ask("k")
        self.assertEqual([("alpha", b"alp"), ("zzpha", b"zzp")], seen)
        self.assertEqual([(["text", "main"], True)] * 2, stacks)

    def test_deep_stacks_are_walked(self):
        stacks = []
        with attached("1", "1", test=self) as (process, target):
            target.probe("exe:inner", ubp.Call(
                lambda hit: stacks.append(hit.stack())))
            process.ask("k")
        self.assertEqual(["inner"] + ["deep"] * 6 + ["main"],
                         [frame.function for frame in stacks[0]][:8])

    def test_a_condition_spares_the_function(self):
        rows = (("exe:add", "arg0 % 100 == 7", 6),
                ("exe:add%return", "ret == 50", 2),
                ("exe:add%return", "arg1 == 1 and ret > 290", 10))
        for where, when, n in rows:
            with self.subTest(where=where, when=when):
                seen = []
                with attached("2", "300", test=self) as (process, target):
                    probe = target.probe(where, ubp.Call(seen.append), when)
                    process.ask("g", PATIENCE)
                self.assertEqual((n, n), (len(seen), probe.hits))

    def test_threads_are_told_apart(self):
        tids = set()
        with attached("4", "50", test=self) as (process, target):
            target.probe("exe:add", ubp.Call(lambda hit: tids.add(hit.tid)))
            process.ask("g", PATIENCE)
            self.assertEqual(set(live.threads(process.pid)) - {process.pid},
                             tids)

    def test_what_makes_no_sense_is_refused(self):
        def tries(hit):
            for name, value in (("rsp", 1), ("rip", 1), ("nothing", 1),
                                ("rdi", 1 << 64), ("arg7", 1)):
                try:
                    setattr(hit, name, value)
                except (AttributeError, ubp.ProbeError):
                    refused.append(name)
            for function, argument in ((hit.read, 8), (hit.write, b"x")):
                try:
                    function(8, argument)
                except ubp.ProbeError as error:
                    refused.append(str(error))
            try:
                hit.skip() if hit.kind != "entry" else hit.arg(99)
            except ubp.ProbeError:
                refused.append("last")
        for where in "exe:add", "exe:add%return":
            refused = []
            with attached("1", "1", test=self) as (process, target):
                target.probe(where, ubp.Call(tries))
                self.assertEqual(42, process.ask("w")["sum"])
                self.assertEqual([], target.notes)
            self.assertEqual(8, len(refused), refused)
            self.assertIn("Bad address", refused[5])

    def test_an_exit_that_jumps_has_no_result_yet(self):
        """A function that asks for it is told so, and the probe removed."""
        with attached("1", "1", test=self) as (process, target):
            probe = target.probe("exe:tail%return",
                                 ubp.Call(lambda hit: hit.ret))
            self.assertEqual(20, process.ask("k")["tail"])
            self.assertTrue(live.settled(lambda: not target.probes))
            self.assertIn("jump to another function", str(probe.error))


class Registers(unittest.TestCase):
    """An assembler function compares all there is, before and behind."""

    def test_all_is_unchanged_and_told_as_it_is(self):
        seen = []
        with attached("1", "1", test=self) as (process, target):
            target.probe("exe:judged_site", ubp.Call(
                lambda hit: seen.append((hit.rdi, hit.eflags))))
            for n in range(100):
                answer = process.ask("j")
                self.assertEqual(
                    (0, 0, 0, 0, answer["flags_in"]),
                    tuple(answer[key] for key in (
                        "registers", "red", "vectors", "fpu", "flags")))
                self.assertEqual((answer["rdi_in"], answer["flags_in"]),
                                 seen[n])

    def test_each_register_changes_alone(self):
        name = None

        def change(hit):
            setattr(hit, name, (getattr(hit, name) ^ 1) & (1 << 64) - 1)
        with attached("1", "1", test=self) as (process, target):
            target.probe("exe:judged_site", ubp.Call(change))
            for number, name in enumerate(x86.REGISTERS):
                if name == x86.SP_NAME:
                    continue
                answer = process.ask("j")
                self.assertEqual(1 << number, answer["registers"], name)
                self.assertEqual(answer["flags_in"], answer["flags"])

    def test_flags_change(self):
        def change(hit):
            hit.eflags = ~hit.eflags
        with attached("1", "1", test=self) as (process, target):
            target.probe("exe:judged_site", ubp.Call(change))
            for _ in range(20):
                answer = process.ask("j")
                self.assertEqual(answer["flags_in"] ^ 0x8d5, answer["flags"])
                self.assertEqual(0, answer["registers"])

    def test_a_condition_and_other_probes_at_the_site(self):
        """What a body before it leaves to the function, and behind it."""
        with attached("1", "1", test=self) as (process, target):
            counts = [target.probe("exe:judged_site", ubp.Count(by="r12"))]
            probe = target.probe("exe:judged_site", ubp.Call(
                lambda hit: setattr(hit, "r12", 5)),
                "u64(rdi) % 2 == 0 or rsi > 3 or 1")
            counts.append(target.probe("exe:judged_site",
                                       ubp.Count(by="r12")))
            for _ in range(20):
                answer = process.ask("j")
                self.assertEqual((1 << 12, 0), (answer["registers"],
                                                answer["red"]))
                self.assertEqual(answer["flags_in"], answer["flags"])
            self.assertEqual({5: 20}, counts[1].read())
            self.assertEqual(20, len(counts[0].read()))
            self.assertEqual(20, probe.read())


class Threads(unittest.TestCase):

    def test_eight_threads_are_all_answered(self):
        total = []
        with attached("8", "500", test=self) as (process, target):
            probe = target.probe("exe:add", ubp.Call(
                lambda hit: total.append(hit.arg0 + hit.arg1)))
            answer = process.ask("g", 60)
            self.assertEqual((4000, 0), (answer["calls"], answer["odd"]))
        self.assertEqual(answer["sum"], sum(total))
        self.assertEqual((4000, 0), (probe.read(), probe.dropped))

    def test_signal_handlers_run_while_their_thread_waits(self):
        """And hit the probe themselves, which the function sees first."""
        with attached("1", "300", test=self) as (process, target):
            n = []
            probe = target.probe("exe:add", ubp.Call(
                lambda hit: (n.append(1), time.sleep(0.001))))
            answer = process.ask("s", 60)
            self.assertGreater(answer["handled"], 50)
            self.assertEqual((300 + answer["handled"], 0), (
                answer["calls"], answer["odd"]))
            self.assertEqual(answer["calls"], probe.hits)
            self.assertEqual((answer["calls"], 0), (len(n), probe.dropped))
            self.assertEqual([], target.notes)


if __name__ == "__main__":
    unittest.main()
