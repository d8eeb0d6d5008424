"""Call: functions that look at hits, change them, skip them; what waits.

The judges: the results that the target computes of what it calls, an
assembler function that compares every register, and the clock.
"""
import contextlib
import logging
import os
import random
import signal
import threading
import time
import unittest
import unittest.mock

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

    @unittest.skipUnless(hasattr(time, "pthread_getcpuclockid"),
                         "needs Python 3.7 to read a thread's CPU time")
    def test_nothing_is_computed_while_nothing_is_hit(self):
        threads = []
        with attached("2", "100", test=self) as (process, target):
            target.probe("exe:add", ubp.Call(
                lambda hit: threads.append(threading.get_ident())))
            process.ask("g", PATIENCE)
            time.sleep(0.3)
            clock = time.pthread_getcpuclockid(threads[0])
            before = time.clock_gettime(clock)
            time.sleep(0.7)
            self.assertLess(time.clock_gettime(clock) - before, 0.001)

    def test_more_threads_than_slots(self):
        """Who finds none goes on at once, and is counted as dropped."""
        n, event = x86.N_CALLS + 44, threading.Event()
        with attached("%d" % n, "1", test=self) as (process, target):
            probe = target.probe("exe:add", ubp.Call(
                lambda hit: event.wait(PATIENCE), timeout=60))
            process.send("g")
            self.assertTrue(live.settled(
                lambda: probe.dropped == 44, PATIENCE))
            self.assertTrue(are_waiting(process, x86.N_CALLS))
            event.set()
            answer = process.answer(PATIENCE)
            self.assertEqual((n, 0), (answer["calls"], answer["odd"]))
            self.assertEqual((n - 44, 44), (probe.read(), probe.dropped))

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


TRACER = """
target = ubp.attach(int(sys.argv[1]))
n = 0
def look(hit):
    global n
    n += 1
    print("hit=%d" % n, flush=True)
    time.sleep(50)
target.probe(sys.argv[2], ubp.Call(look, timeout=float(sys.argv[3])),
             strategy=sys.argv[4])
print("armed=1", flush=True)
time.sleep(50)
"""


def tracer(process, where="exe:add", timeout=30, strategy="jump"):
    """A ubp whose function never returns, in a process of its own."""
    return live.python(TRACER, str(process.pid), where, str(timeout),
                       strategy)


def are_waiting(process, n):
    """Wait until n threads sleep in a futex of the arena. -> do they?"""
    low = min(m.start for m in live.arenas(process.pid))
    high = max(m.end for m in live.arenas(process.pid))

    def count():
        found = 0
        for tid in live.threads(process.pid):
            with open("/proc/%d/task/%d/syscall" % (process.pid, tid)) as f:
                words = f.read().split()
            found += words[0] == "202" and low <= int(words[1], 16) < high
        return found == n
    return live.settled(count, PATIENCE)


class Death(unittest.TestCase):
    """A tracer that dies, hangs or is stopped lets each thread go on."""

    def test_kill_9_wakes_every_waiter(self):
        """At once, though they would wait for 30 s."""
        for where in "exe:add", "exe:add%return":
            with self.subTest(where), live.Target(
                    "handlers", "8", "100") as process:
                before = live.Snapshot(process.pid)
                with tracer(process, where) as other:
                    self.assertEqual(1, other.answer(PATIENCE)["armed"])
                    process.send("g")
                    self.assertEqual(1, other.answer(PATIENCE)["hit"])
                    self.assertTrue(are_waiting(process, 8))
                    start = time.monotonic()
                    other.kill()
                answer = process.answer(PATIENCE)
                self.assertLess(time.monotonic() - start, 5)
                self.assertEqual((800, 0), (answer["calls"], answer["odd"]))
                process.ask("g")                # and nobody waits any more
                status = ubp.status(process.pid)[0].sites
                self.assertEqual({1600}, {site.calls for site in status}
                                 - {0})
                ubp.clean(process.pid, timeout=PATIENCE)
                live.Snapshot(process.pid).compare(self, before)
                process.quit()

    def test_kill_9_at_any_moment(self):
        """While it arms, answers, changes registers, or takes out."""
        code = """
target = ubp.attach(int(sys.argv[1]))
print("armed=1", flush=True)
while True:
    for where, function in (("exe:add", lambda hit: hit.skip(-12)),
                            ("exe:add%return",
                             lambda hit: setattr(hit, "ret", -12))):
        probe = target.probe(where, ubp.Call(function, timeout=30))
        while probe.read() < 20:
            time.sleep(0.0001)
        probe.remove()
"""
        rng = random.Random(9)
        with live.Target("handlers", "4", "100", seconds=180) as process:
            before = live.Snapshot(process.pid)
            process.ask("b")
            for _ in range(6):
                with live.python(code, str(process.pid)) as other:
                    self.assertEqual(1, other.answer(PATIENCE)["armed"])
                    time.sleep(rng.uniform(0, 0.15))
                    other.kill()
                start = time.monotonic()
                self.assertEqual((), ubp.clean(
                    process.pid, timeout=PATIENCE).notes)
                self.assertLess(time.monotonic() - start, 5)
            process.send("x")
            live.Snapshot(process.pid).compare(self, before)
            answer = process.ask("g", PATIENCE)
            self.assertEqual(0, answer["odd"])
            process.quit()

    def test_exec_and_exit_of_the_tracer_do_the_same(self):
        endings = ("import os; os.execv('/bin/true', ['true'])",
                   "import os; os._exit(0)",
                   "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
        for ending in endings:
            with self.subTest(ending), live.Target(
                    "handlers", "6", "100") as process:
                code = TRACER[:TRACER.rindex("time.sleep")] + (
                    "time.sleep(1)\n" + ending + "\n")
                with live.python(code, str(process.pid), "exe:add", "30",
                                 "jump") as other:
                    self.assertEqual(1, other.answer(PATIENCE)["armed"])
                    process.send("g")
                    answer = process.answer(PATIENCE)
                self.assertEqual((600, 0), (answer["calls"], answer["odd"]))
                ubp.clean(process.pid, timeout=PATIENCE)
                process.quit()

    def test_a_stopped_target_is_taken_out_of_its_call(self):
        """Whatever was answered, it calls the function, and stays stopped."""
        for where, changes in ("exe:add", True), ("exe:add%return", False):
            with self.subTest(where):
                reached, go = threading.Event(), threading.Event()

                def look(hit):
                    if changes:
                        hit.skip(-1)
                    else:
                        hit.ret = -1
                    reached.set()
                    go.wait(PATIENCE)
                with attached("1", "1", test=self) as (process, target):
                    probe = target.probe(where, ubp.Call(look, timeout=60))
                    process.send("w")
                    self.assertTrue(reached.wait(PATIENCE))
                    os.kill(process.pid, signal.SIGSTOP)
                    self.assertTrue(live.settled(lambda: {"T"} == set(
                        live.states(process.pid))))
                    go.set()
                    probe.remove(PATIENCE)
                    self.assertEqual([], live.changed_text(process.pid))
                    self.assertTrue(live.settled(lambda: {"T"} == set(
                        live.states(process.pid))))
                    target.close(PATIENCE)
                    self.assertEqual([], live.arenas(process.pid))
                    os.kill(process.pid, signal.SIGCONT)
                    answer = process.answer()
                    self.assertEqual((42, 0), (answer["sum"], answer["odd"]))
                    self.assertEqual(0, process.ask("g")["failed"])

    def test_a_stopped_tracer_costs_one_time_out(self):
        """Then no hit waits until it is back; all are counted."""
        with live.Target("handlers", "4", "200") as process:
            before = live.Snapshot(process.pid)
            with live.python("""
target = ubp.attach(int(sys.argv[1]))
probe = target.probe("exe:add", ubp.Call(lambda hit: None, timeout=0.5))
print("armed=1", flush=True)
for line in sys.stdin:
    if line == "q\\n":
        target.close()
    print("recorded=%d dropped=%d notes=%d" % (
        probe.read(), probe.dropped, len(target.notes)), flush=True)
""", str(process.pid)) as other:
                self.assertEqual(1, other.answer(PATIENCE)["armed"])
                live.stop(other.pid)
                answer = process.ask("g", PATIENCE)
                self.assertEqual((800, 0), (answer["calls"], answer["odd"]))
                self.assertGreater(answer["us"], 450000)
                self.assertLess(answer["us"], 2000000)
                os.kill(other.pid, signal.SIGCONT)
                counts = other.ask("r\n")
                self.assertEqual((0, 800, 0), tuple(counts.values()))

                def is_back():
                    process.ask("w")
                    return other.ask("r\n")["recorded"]
                self.assertEqual(1, live.settled(is_back))
                dropped = other.ask("r\n")["dropped"]
                process.ask("g", PATIENCE)
                counts = other.ask("q\n", PATIENCE)
                self.assertEqual((801, dropped, 0), tuple(counts.values()))
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_a_slow_function_lets_its_thread_go_on(self):
        """What it changes comes too late, and it is told so."""
        def look(hit):
            time.sleep(0.4)
            try:
                hit.arg0 = 7
            except ubp.UbpTimeout as error:
                errors.append(str(error))
                hit.write(hit.rsp, b"x")
        errors = []
        with attached("1", "1", test=self) as (process, target):
            probe = target.probe("exe:add", ubp.Call(look, timeout=0.1))
            answer = process.ask("w")
            self.assertEqual(42, answer["sum"])
            self.assertGreater(answer["us"], 100000)
            self.assertLess(answer["us"], 390000)
            self.assertTrue(live.settled(lambda: errors))
            self.assertEqual(42, process.ask("w")["sum"])
            self.assertIn("waits 0.1 s at most", errors[0])
            self.assertTrue(live.settled(lambda: len(errors) == 2))
            self.assertEqual(([probe], None), (target.probes, probe.error))
            self.assertEqual((0, 2), (probe.read(), probe.dropped))

    def test_a_function_that_raises_is_told_and_taken_out(self):
        def fail(hit):
            hit.arg0 = 1000
            raise ValueError("seven")
        with attached("4", "100", test=self) as (process, target):
            probe = target.probe("exe:add", ubp.Call(fail))
            other = target.probe("exe:many", ubp.Call(lambda hit: None))
            with self.assertLogs("ubp", logging.ERROR) as logs:
                answer = process.ask("g", PATIENCE)
                self.assertEqual((400, 0), (answer["calls"], answer["odd"]))
                self.assertTrue(live.settled(
                    lambda: target.probes == [other]))
            self.assertIn('ValueError: seven', logs.output[0])
            self.assertIn('raise ValueError("seven")', target.notes[0])
            self.assertEqual("seven", str(probe.error))
            self.assertEqual((0, 1), (probe.read(), probe.reading().faults))
            self.assertEqual([], [change for change in live.changed_text(
                process.pid) if change[1] == probe.sites[0].vaddr])
            process.ask("m")
            self.assertEqual(1, other.read())


class Removal(unittest.TestCase):

    def test_threads_that_wait_go_on_first(self):
        """Also while a function runs that takes its time."""
        for where in "exe:add", "exe:add%return":
            event = threading.Event()
            with attached("6", "10", test=self) as (process, target):
                probe = target.probe(where, ubp.Call(
                    lambda hit: event.wait(20), timeout=30))
                process.send("g")
                self.assertTrue(are_waiting(process, 6))
                start = time.monotonic()
                probe.remove()
                self.assertLess(time.monotonic() - start, 5)
                answer = process.answer(PATIENCE)
                self.assertEqual((60, 0), (answer["calls"], answer["odd"]))
                self.assertGreaterEqual(probe.dropped, 6)
                self.assertEqual(0, probe.read())
                event.set()

    def test_the_function_removes_its_own_probe(self):
        """And asks about probes; the hit that it does so in is answered."""
        def look(hit):
            seen.append((probe.read(), probe.hits, target.alive))
            hit.skip(ENOMEM)
            action(target, hit)
        for action in (lambda target, hit: hit.probe.remove(),
                       lambda target, hit: target.close()):
            seen = []
            with attached("2", "50", test=self) as (process, target):
                probe = target.probe("exe:add", ubp.Call(look))
                answer = process.ask("g", PATIENCE)
                self.assertEqual((100, 1, 0), tuple(
                    answer[key] for key in ("calls", "failed", "odd")))
                self.assertTrue(live.settled(lambda: not target.probes))
            self.assertEqual(([(0, 0, True)], None), (seen, probe.error))
            self.assertEqual(1, probe.read())

    def test_others_come_and_go_while_threads_wait(self):
        with attached("4", "300", test=self) as (process, target):
            probe = target.probe("exe:add", ubp.Call(
                lambda hit: time.sleep(0.001)))
            process.send("g")
            for n in range(8):
                other = target.probe("exe:add", ubp.Count()
                                     if n % 2 else ubp.Call(repr))
                time.sleep(0.03)
                other.remove(PATIENCE)
            answer = process.answer(60)
            self.assertEqual((1200, 0), (answer["calls"], answer["odd"]))
            self.assertEqual(1200, probe.hits)
            self.assertEqual([], target.notes)

    def test_a_function_arms_another_probe(self):
        def look(hit):
            if not counts:
                counts.append(target.probe("exe:add", ubp.Count()))
        counts = []
        with attached("2", "50", test=self) as (process, target):
            probe = target.probe("exe:add%return", ubp.Call(
                look, timeout=30), "arg0 > 9")
            process.ask("g", 60)
            process.ask("g", 60)
            self.assertEqual((160, 0), (probe.read(), probe.dropped))
            self.assertGreaterEqual(counts[0].read(), 100)

    def test_a_launched_program_is_answered_from_its_first_call(self):
        with ubp.launch(["/bin/sh", "-c", "exec /bin/sleep 0 2>&-"]) as (
                target):
            seen = []
            target.probe("libc:execve", ubp.Call(
                lambda hit: seen.append((hit.str(hit.arg0)[-5:],
                                         hit.skip(0)))))
            self.assertTrue(target.wait(PATIENCE))
            self.assertEqual([("sleep", None)], seen)
            self.assertIn(target.returncode, (2, 126, 127))

    def test_again_and_again(self):
        with attached("2", "50", test=self) as (process, target):
            process.ask("b")
            for n in range(20):
                probe = target.probe("exe:add%return" if n % 2 else
                                     "exe:add", ubp.Call(lambda hit: None))
                self.assertTrue(live.settled(lambda: probe.read() > 5))
                probe.remove(PATIENCE)
                self.assertEqual(0, probe.reading().faults)
            process.send("x")

    def test_sites_far_apart_share_a_thread(self):
        """The program's and the C library's arenas, and one handler."""
        names = set()
        with attached("2", "50", test=self) as (process, target):
            one = target.probe("exe:add", ubp.Call(
                lambda hit: names.add(threading.current_thread().name)))
            other = target.probe("libc:write", ubp.Call(
                lambda hit: names.add(threading.current_thread().name)))
            process.ask("g", PATIENCE)
            process.ask("g", PATIENCE)
            self.assertEqual((200, 2), (one.read(), other.read()))
            one.remove()
            process.ask("g", PATIENCE)
            self.assertEqual(3, other.read())
        self.assertEqual(1, len(names))


class Processes(unittest.TestCase):

    def test_forked_children_never_wait(self):
        with attached("2", "100", test=self) as (process, target):
            probe = target.probe("exe:add", ubp.Call(lambda hit: None))
            start = time.monotonic()
            self.assertEqual(0, process.ask("f")["status"])
            self.assertLess(time.monotonic() - start, 5)
            self.assertEqual((0, 1009), (probe.read(), probe.dropped))

    def test_fork_while_others_wait(self):
        with attached("4", "100", test=self) as (process, target):
            probe = target.probe("exe:add", ubp.Call(
                lambda hit: time.sleep(0.002)))
            process.ask("b")
            time.sleep(0.02)
            process.send("f")               # the busy ones end first
            self.assertEqual(0, process.answer(PATIENCE)["status"])
            self.assertEqual(1009, probe.dropped)

    def test_a_signal_handler_forks_while_its_thread_waits(self):
        """The parent gets the answer; the child goes on as if unprobed."""
        with attached("1", "300", test=self) as (process, target):
            probe = target.probe("exe:add", ubp.Call(
                lambda hit: (time.sleep(0.003), hit.skip(ENOMEM))))
            answer = process.ask("o", 60)
            self.assertGreater(answer["children"], 20)
            self.assertEqual((0, 300, 300), tuple(
                answer[key] for key in ("wrong", "calls", "failed")))
            self.assertEqual((300, answer["children"]),
                             (probe.read(), probe.dropped))

    def test_a_vforked_child_is_answered(self):
        with attached("1", "1", test=self) as (process, target):
            tids = []
            target.probe("exe:add", ubp.Call(
                lambda hit: (tids.append(hit.tid), hit.skip(7))))
            self.assertEqual(7 << 8, process.ask("v")["status"])
            self.assertNotEqual([process.pid], tids)

    def test_longjmp_out_of_the_wait(self):
        """A slot that was left so is not given to anybody too early."""
        with attached("4", "600", test=self) as (process, target):
            probe = target.probe("exe:add", ubp.Call(
                lambda hit: time.sleep(0.001)))
            answer = process.ask("l", 60)       # more often than slots are
            self.assertGreater(answer["handled"], 500)
            self.assertEqual(0, answer["odd"])
            self.assertEqual(0, probe.dropped)
            self.assertEqual(0, process.ask("g", PATIENCE)["odd"])

    def test_the_target_ends_while_it_waits(self):
        with live.Target("handlers", "4", "100") as process:
            with ubp.attach(process.pid) as target:
                def look(hit):
                    seen.append(hit)
                    process.process.kill()
                    process.process.wait()
                    hit.read(hit.rsp, 8)
                seen = []
                probe = target.probe("exe:add", ubp.Call(look))
                process.send("g")
                self.assertTrue(live.settled(lambda: seen))
                self.assertTrue(target.wait(PATIENCE))
                self.assertEqual((0, None), (probe.read(), probe.error))


    def test_another_program_is_not_written_to(self):
        """An exec while its function runs; a write comes too late."""
        def look(hit):
            if done:
                return                  # of another thread that was ended
            process.send("e")           # the main thread does, others wait
            self.assertTrue(live.settled(
                lambda: not live.arenas(process.pid), PATIENCE))
            with self.assertRaises(ubp.TraceeGone):
                hit.write(hit.rsp, b"x")
            done.append(hit)
            hit.write(hit.rsp, b"x")
        done = []
        with live.Target("handlers", "2", "10") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:add", ubp.Call(look, timeout=20))
                process.ask("b")
                self.assertTrue(live.settled(lambda: done, PATIENCE))
                self.assertTrue(process.line().startswith("ready"))
                self.assertIsNone(probe.error)
            self.assertEqual(0, process.ask("g")["odd"])
            process.quit()

    def test_the_program_that_it_becomes_is_answered_too(self):
        with live.Target("handlers", "2", "50") as process:
            with ubp.attach(process.pid, follow_exec=True) as target:
                probe = target.probe("exe:add", ubp.Call(
                    lambda hit: hit.arg0 or hit.skip(ENOMEM)))
                self.assertEqual(2, process.ask("g")["failed"])
                process.send("e")
                self.assertTrue(process.line().startswith("ready"))
                self.assertTrue(live.settled(lambda: live.arenas(
                    process.pid)))
                self.assertTrue(live.settled(lambda: process.ask("g")[
                    "failed"]))
                self.assertGreater(probe.read(), 100)
            self.assertEqual(0, process.ask("g")["failed"])
            process.quit()

    def test_an_asynchronous_cancellation(self):
        with live.Target("handlers", "1", "1") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:add", ubp.Call(lambda hit: None))
                for _ in range(5):
                    self.assertEqual(1, process.ask("c", PATIENCE)[
                        "cancelled"])
                self.assertGreater(probe.read(), 10)
                self.assertEqual(42, process.ask("w")["sum"])
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()


class Refusals(unittest.TestCase):

    def test_plan_tells_what_it_costs(self):
        with attached("1", "1", test=self) as (process, target):
            for pattern, parts in (("exe:add", 1), ("exe:add%return", 2)):
                plan, = target.plan(pattern, action=ubp.Call(repr, 0.25))
                self.assertIn("waits, at most 0.25 s", plan.cost)
                self.assertEqual(parts, len(plan.all_parts))
                self.assertNotIn("waits", target.plan(pattern)[0].cost)
            plan, = target.plan("exe:add", "hw", ubp.Call(repr))
            self.assertEqual("refused", plan.cost)
            self.assertEqual([], live.arenas(process.pid))

    def test_what_cannot_wait(self):
        why = "cannot be waited for at a debug register"
        rows = (("exe:add", "hw", why), ("exe:add%return", "hw", why),
                ("exe:add", "hw-ptrace", why), ("mem:n_calls:w", "hw", why))
        with attached("1", "1", test=self) as (process, target):
            for where, strategy, why in rows:
                with self.assertRaises(ubp.UbpError) as raised:
                    target.probe(where, ubp.Call(repr), strategy=strategy)
                self.assertIn(why, str(raised.exception))
            target.probe("exe:add", ubp.Call(repr))
            with self.assertRaises(ubp.ProbeError) as raised:
                target.detach()
            self.assertIn("in this process", str(raised.exception))
        for function, timeout in ((None, 1), (repr, 0), (repr, 61)):
            with self.assertRaises(ubp.ProbeError):
                ubp.Call(function, timeout=timeout)

    def test_filters_that_forbid_what_a_body_does(self):
        """By number: futex, gettid, clock_gettime. Nothing is patched."""
        for number in 202, 186, 228:
            with self.subTest(number), live.Target(
                    "handlers", "1", "10", str(number)) as process:
                with ubp.attach(process.pid) as target:
                    with self.assertRaises(ubp.ProbeError) as raised:
                        target.probe("exe:add", ubp.Call(repr))
                    self.assertIn("syscall %d" % number,
                                  str(raised.exception))
                self.assertEqual([], live.changed_text(process.pid))
                self.assertEqual(42, process.ask("w")["sum"])

    def test_a_tracer_whose_death_nobody_would_tell(self):
        """In a sandbox of its own, say: set_robust_list is forbidden."""
        def syscall(number, *args):
            if number == ubp.SYS_set_robust_list:
                raise OSError(1, "forbidden")
            return real(number, *args)
        real = ubp.syscall
        with attached("1", "1", test=self) as (process, target):
            with unittest.mock.patch.object(ubp, "syscall", syscall):
                with self.assertRaises(ubp.ProbeError) as raised:
                    target.probe("exe:add", ubp.Call(repr))
            self.assertIn("set_robust_list", str(raised.exception))
            probe = target.probe("exe:add", ubp.Call(repr))
            self.assertEqual((42, 1), (process.ask("w")["sum"],
                                       probe.read()))

    def test_anonymous_memory_is_refused(self):
        os.environ["UBP_ARENA"] = "anon"
        try:
            with live.Target("handlers", "1", "10") as process:
                before = live.Snapshot(process.pid)
                with ubp.attach(process.pid) as target:
                    with self.assertRaises(ubp.ProbeError) as raised:
                        target.probe("exe:add", ubp.Call(repr))
                    self.assertIn("not shared", str(raised.exception))
                live.Snapshot(process.pid).compare(self, before)
                process.quit()
        finally:
            del os.environ["UBP_ARENA"]


class Traps(unittest.TestCase):
    """Sites that take an int3 lead to the same body."""

    def test_the_same_by_int3(self):
        def look(hit):
            if hit.arg0 % 3 == 0:
                hit.skip(ENOMEM)
        with attached("2", "60", test=self) as (process, target):
            probe = target.probe("exe:add", ubp.Call(look), strategy="int3")
            answer = process.ask("g", 60)
            self.assertEqual((120, 40, 0), tuple(
                answer[key] for key in ("calls", "failed", "odd")))
            self.assertEqual((120, 0), (probe.read(), probe.dropped))
            probe.remove(PATIENCE)
            process.ask("g")

    def test_kill_9_of_the_tracer(self):
        """The guardian puts the text back; who waits goes on."""
        with live.Target("handlers", "4", "50") as process:
            with tracer(process, strategy="int3") as other:
                self.assertEqual(1, other.answer(PATIENCE)["armed"])
                process.send("g")
                self.assertEqual(1, other.answer(PATIENCE)["hit"])
                time.sleep(0.1)
                other.kill()
            answer = process.answer(PATIENCE)
            self.assertEqual((200, 0), (answer["calls"], answer["odd"]))
            self.assertTrue(live.settled(
                lambda: not live.arenas(process.pid), PATIENCE))
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()


if __name__ == "__main__":
    unittest.main()
