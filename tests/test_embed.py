"""The library inside of other programs: threads, forks, signals, asyncio.

Hosts run as Python children (live.python), so that a waitpid(-1) or a SIGINT
in one of them meets nobody else. Each prints a line "ok" at its end.
"""
import os
import re
import signal
import threading
import time
import unittest
from unittest import mock

import live

HOTS = ["exe:hot", "exe:tiny", "exe:keep", "exe:marked", "libc:labs"]


def setUpModule():
    global ubp
    ubp = live.core()


class Hosts(unittest.TestCase):
    def judged(self, code, n_threads=2, seconds=120, errors=r"\A\Z"):
        """Run a host against a busy target; both must be content.

        errors   a pattern of all that the host may write to stderr
        """
        with live.Target("busy", n_threads) as process:
            before = live.Snapshot(process.pid)
            process.send("g")
            head = "pid, HOTS = int(sys.argv[1]), %r\n" % (HOTS,)
            # Python 3.12 tells every host with threads that it forks.
            head += ("import warnings\n"
                     "warnings.simplefilter('ignore', DeprecationWarning)\n")
            with live.python(head + code, process.pid,
                             seconds=seconds) as host:
                lines = []
                try:
                    while not lines or lines[-1] != "ok":
                        lines.append(host.line(seconds))
                except live.Wrong as error:
                    self.fail("%s %s" % (lines, error))
                self.assertEqual(0, host.wait(), host.stderr())
                self.assertRegex(host.stderr(), re.compile(errors, re.S))
            self.assertEqual(0, process.ask("p")["wrong"])
            live.Snapshot(process.pid).compare(self, before)
            process.quit()
        return lines

    def test_any_thread_may_use_a_target(self):
        self.judged("""
import threading
found = {}

def elsewhere(key, function):
    def run():
        found[key] = function()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[key]

for turn in range(10):
    target = elsewhere("t", lambda: ubp.attach(pid))
    probe = elsewhere("p", lambda: target.probe(HOTS, ubp.Count()))
    time.sleep(0.01)
    assert elsewhere("n", probe.read) > 0
    elsewhere("r", probe.remove)
    elsewhere("c", target.close)
assert threading.active_count() == 1, threading.enumerate()
print("ok", flush=True)
""")

    def test_a_host_without_descriptors_loses_no_probe(self):
        """What cannot be opened would be taken for a process that has ended:
        nothing is begun, and what is in is taken out once files are free."""
        self.judged("""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

def without_descriptors(function):
    held = []
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        pass
    try:
        function()
        print("done without descriptors", flush=True)
    except ubp.AttachError as error:
        assert "files may be opened" in str(error), error
    finally:
        for fd in held:
            os.close(fd)

without_descriptors(lambda: ubp.attach(pid))
target = ubp.attach(pid)
without_descriptors(lambda: target.probe(HOTS, ubp.Count()))
probe = target.probe(HOTS, ubp.Count())
without_descriptors(probe.remove)
without_descriptors(target.close)
n = probe.read()
time.sleep(0.01)
assert probe.read() > n
target.close()
print("ok", flush=True)
""")

    def test_a_death_while_the_arena_is_mapped_leaves_no_descriptor(self):
        """The memfd is opened before it is mapped."""
        map_twice = ubp._map_twice

        def dying(injection, *args):
            os.kill(process.pid, signal.SIGKILL)
            return map_twice(injection, *args)

        before = sorted(os.listdir("/proc/self/fd"))
        with live.Target("busy", 1) as process:
            with ubp.attach(process.pid) as target:
                with mock.patch.object(ubp, "_map_twice", dying):
                    with self.assertRaises(ubp.TraceeGone):
                        target.probe("exe:hot", ubp.Count())
        self.assertEqual(before, sorted(os.listdir("/proc/self/fd")))

    def test_many_threads_use_one_target_at_once(self):
        self.judged("""
import threading
problems = []
target = ubp.attach(pid)

def work(site):
    try:
        for turn in range(10):
            probe = target.probe(site, ubp.Count(), timeout=20)
            probe.read()
            probe.remove()
    except BaseException as error:
        problems.append(repr(error))

threads = [threading.Thread(target=work, args=(site,)) for site in HOTS]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
target.close()
assert not problems, problems
print("ok", flush=True)
""")

    def test_a_host_that_reaps_every_child(self):
        self.judged("""
import threading
stop = []

def reap():                     # steals the stops of our tracees as well
    while not stop:
        try:
            os.waitpid(-1, os.WNOHANG | 0x40000000)
        except ChildProcessError:
            pass
        time.sleep(0.00005)

thread = threading.Thread(target=reap)
thread.start()
try:
    for turn in range(25):
        with ubp.attach(pid) as target:
            probe = target.probe(HOTS, ubp.Count())
            probe.remove()
finally:
    stop.append(1)
thread.join()
print("ok", flush=True)
""")

    def test_a_host_that_forks(self):
        self.judged("""
target = ubp.attach(pid)
probe = target.probe(HOTS, ubp.Count())
child = os.fork()
if child == 0:
    code = 1
    try:
        assert probe.read() >= 0
        for forbidden in (probe.remove, target.detach,
                          lambda: target.probe("exe:hot", ubp.Count())):
            try:
                forbidden()
            except ubp.UbpError:
                pass
            else:
                assert False, forbidden
        target.close()
        del probe, target
        import gc
        gc.collect()
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
n = probe.read()
time.sleep(0.05)
assert probe.read() > n, "the child took our probes out"
probe.remove()
target.close()
print("ok", flush=True)
""")

    def test_a_host_that_forks_while_an_operation_runs(self):
        self.judged("""
import threading
done = []

def work():
    for turn in range(15):
        with ubp.attach(pid) as target:
            target.probe(HOTS, ubp.Count()).remove()
    done.append(1)

thread = threading.Thread(target=work)
thread.start()
while not done and thread.is_alive():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
thread.join()
assert done
print("ok", flush=True)
""")

    def test_an_asyncio_host_with_children_of_its_own(self):
        self.judged("""
import asyncio

async def children():
    for turn in range(10):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-S", "-c", "raise SystemExit(3)")
        assert await child.wait() == 3

def rounds():
    for turn in range(20):
        with ubp.attach(pid) as target:
            probe = target.probe(HOTS, ubp.Count())
            probe.remove()

async def main():
    loop = asyncio.get_event_loop()
    both = asyncio.gather(children(), loop.run_in_executor(None, rounds))
    with ubp.attach(pid) as target:             # on the loop's own thread
        probe = target.probe("exe:hot", ubp.Count())
        await asyncio.sleep(0.05)
        assert probe.read() > 0
    await both

loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
loop.run_until_complete(main())
print("ok", flush=True)
""")

    def test_keyboard_interrupts_during_operations(self):
        code = """
interrupts = rounds = 0
signal.setitimer(signal.ITIMER_REAL, 0)
signal.signal(signal.SIGALRM, signal.default_int_handler)
end = time.monotonic() + 4
turn = 0
while time.monotonic() < end:
    turn += 1
    target = None
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001 + turn * 7 % 40 / 1000)
        try:
            target = ubp.attach(pid)
            probe = target.probe(HOTS, ubp.Count())
            probe.remove()
            rounds += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if target is not None:
                target.close()
    except KeyboardInterrupt:
        interrupts += 1
    except ubp.UbpError as error:
        assert "orphan" in str(error) or "probed" in str(error), error
    if target is None:          # interrupted in attach: nothing was armed
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
ubp.clean(pid, all=True)
assert interrupts > 10, interrupts
print("interrupts", interrupts, "rounds", rounds)
print("ok", flush=True)
"""
        # One that lands in a __del__ is told on stderr by Python itself.
        self.judged(code, errors=r"\A((?!Error).)*\Z")

    def test_the_host_is_left_as_it_was(self):
        self.judged("""
import ctypes, gc, locale, logging, threading
try:    # else the C library opens it when a thread of Python 3.6 or 3.7 ends
    ctypes.CDLL("libgcc_s.so.1")
except OSError:
    pass
def links():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink("/proc/self/fd/" + name)
        except OSError:             # that of listdir
            continue
    return found
def state():
    mask = os.umask(0o22)
    os.umask(mask)
    return (mask, os.getcwd(), gc.isenabled(), gc.get_threshold(),
            locale.setlocale(locale.LC_ALL), os.nice(0),
            os.sched_getscheduler(0), os.sched_getaffinity(0),
            [signal.getsignal(n) for n in range(1, 32)],
            signal.pthread_sigmask(signal.SIG_BLOCK, []),
            links(), threading.active_count(),
            logging.getLogger("ubp").level, logging.root.handlers,
            sys.getswitchinterval(), sys.getrecursionlimit(),
            signal.getitimer(signal.ITIMER_REAL)[1])
def maps():
    with open("/proc/self/maps") as f:
        return [line for line in f if "ubp" in line and "memfd" in line]
with ubp.attach(pid) as target:         # imports what is imported late
    target.probe(HOTS, ubp.Count())
before = state()
for turn in range(5):
    with ubp.attach(pid) as target:
        probe = target.probe(HOTS, ubp.Count())
        probe.read()
after = state()
for old, new in zip(before, after):
    assert old == new, (old, new)
del probe, target
gc.collect()
assert not maps(), maps()
print("ok", flush=True)
""")

    def test_a_forgotten_target_only_warns(self):
        with live.Target("busy", 1) as process:
            with live.python("""
import warnings
warnings.simplefilter("always")
target = ubp.attach(int(sys.argv[1]))
probe = target.probe("exe:hot", ubp.Count())
del target, probe
import gc
gc.collect()
print("ok", flush=True)
""", process.pid) as host:
                self.assertEqual("ok", host.line())
                self.assertEqual(0, host.wait(), host.stderr())
                self.assertNotIn("Traceback", host.stderr())
            self.assertEqual(0, process.ask("c")["wrong"])
            self.assertEqual({}, live.tracers(process.pid))
            ubp.clean(process.pid, all=True)
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    def test_the_host_ends_in_the_middle_of_things(self):
        for ending in ("sys.exit(0)", "os._exit(0)", "raise SystemExit(0)",
                       "threading.Thread(target=os._exit, args=(0,)).start()"
                       "; time.sleep(5)"):
            with self.subTest(ending), live.Target("busy", 2) as process:
                before = live.Snapshot(process.pid)
                process.send("g")
                with live.python("""
import threading
target = ubp.attach(int(sys.argv[1]))
probe = target.probe("exe:hot", ubp.Count())
print("armed", flush=True)
threading.Thread(target=lambda: target.probe("exe:tiny", ubp.Count()),
                 daemon=True).start()
""" + ending, process.pid) as host:
                    self.assertEqual("armed", host.line())
                    host.wait()
                self.assertEqual(0, process.ask("p")["wrong"])
                ubp.clean(process.pid, all=True)
                live.Snapshot(process.pid).compare(self, before)
                process.quit()


class Pause(unittest.TestCase):
    """How long the target stands still, as ubp says and as it sees itself
    (less the time that it waited for a processor).

    The tracer waits for a processor at times as well: the best of several
    rounds speaks of ubp, the others of what else this machine does.
    """

    def rounds(self, n_busy):
        """The least of (pause_us, the target's longest gap, and such a gap
        in the same time without ubp)."""
        stop, pauses, gaps, quiet = [], [], [], []

        def spin():
            while not stop:
                sum(range(100))
        threads = [threading.Thread(target=spin) for _ in range(n_busy)]
        with live.Target("busy", 1) as process:
            process.send("g")
            ubp.attach(process.pid).close()
            for thread in threads:
                thread.start()
            try:
                for turn in range(25):
                    if turn >= 5 and min(pauses) < 5000:
                        break           # else: more tries on a busy machine
                    process.ask("m")
                    begun = time.monotonic()
                    with ubp.attach(process.pid, timeout=20) as target:
                        probe = target.probe("exe:hot", ubp.Count(),
                                             timeout=20)
                        probe.remove()
                        pauses.append(target.pause_us)
                    gaps.append(process.ask("m")["gap_us"])
                    time.sleep(min(1, time.monotonic() - begun))
                    quiet.append(process.ask("m")["gap_us"])
            finally:
                stop.append(1)
                for thread in threads:
                    thread.join()
            process.quit()
        print("pause %.0f us, gap %d us, without us %d us"
              % (min(pauses), min(gaps), min(quiet)))
        return min(pauses), min(gaps), min(quiet)

    def test_beside_four_busy_python_threads_it_is_below_5_ms(self):
        pause, gap, quiet = self.rounds(4)
        self.assertLess(pause, 5000)
        self.assertLess(gap, 5000 + 3 * quiet)

    def test_alone_it_is_what_the_target_sees(self):
        """The number that users are told is no less than the truth."""
        pause, gap, quiet = self.rounds(0)
        self.assertLess(pause, 5000)
        self.assertLess(gap, pause * 1.5 + 500 + 3 * quiet)


class Deadlines(unittest.TestCase):
    def test_a_thread_that_does_not_stop_gives_UbpTimeout(self):
        """It waits in the kernel for a child, of which we cannot know that
        it is there: it shares no memory."""
        with live.Target("windows", "vfork", 1500, "apart",
                         seconds=240) as process:
            time.sleep(0.1)
            begun = time.monotonic()
            with self.assertRaises(ubp.UbpTimeout) as caught:
                with ubp.attach(process.pid, timeout=0.3) as target:
                    target.probe("exe:win_ones", ubp.Count(), timeout=0.3)
            self.assertLess(time.monotonic() - begun, 2)
            self.assertTrue(caught.exception.hint)
            time.sleep(0.05)
            busy = [tid for tid in live.threads(process.pid)
                    if live.status(process.pid, tid)["State"][0] in "tT"]
            self.assertEqual([], busy)
            time.sleep(2)
            self.assertEqual({}, live.tracers(process.pid))
            process.ask("p")
            self.assertEqual([], live.changed_text(process.pid))
            process.send("g")
            process.quit()

    def test_a_transfer_that_lasts_is_never_cut_short(self):
        with live.Target("blocked", "stuck", seconds=240) as process:
            done = 0
            for _ in range(5):
                try:
                    with ubp.attach(process.pid, timeout=0.5) as target:
                        target.probe("exe:hot", ubp.Count(), timeout=0.5)
                        done += 1
                except ubp.UbpError:        # a time-out, or still at it
                    pass
                time.sleep(0.3)
            self.assertTrue(live.settled(
                lambda: process.operations()["stuck"]["rounds"] > 1, 12))
            found = process.operations()["stuck"]
            self.assertEqual((0, 0, 0), (found["eintr"], found["short"],
                                         found["amiss"]), process.stderr())
            print("armed in %d of 5 attempts" % done)
            ubp.clean(process.pid, all=True)
            self.assertEqual([], live.changed_text(process.pid))
            process.kill()


class Work(unittest.TestCase):
    """What the thread that has ptrace is given to do."""

    def test_long_work_is_waited_for_but_not_a_thread_that_is_stuck(self):
        ubp = live.core()
        worker = ubp.Worker(mock.Mock(tgid=1, finish_late=lambda: False))
        over = threading.Event()

        def compute():
            started = time.process_time()
            while time.process_time() - started < 1.5:
                pass
            return "done"
        with mock.patch.object(ubp, "_MARGIN_S", 0.4):
            self.assertEqual(worker.call(compute, 0.1), "done")
            with self.assertRaisesRegex(ubp.UbpTimeout, "stuck"):
                worker.call(over.wait, 0.1)
            over.set()
            worker.stop()


class OtherProcess(unittest.TestCase):
    """A pid is compared with what was attached before any write."""

    @unittest.skipUnless(live.IS_ROOT, "needs root to choose the next pid")
    def test_a_reused_pid_is_not_written_to(self):
        for follows in False, True:
            with self.subTest(follows=follows):
                self.reused(follows)

    def reused(self, follows):
        with live.Target("busy", 1) as process:
            target = ubp.attach(process.pid, follow_exec=follows)
            probe = target.probe("exe:hot", ubp.Count())
            n = process.ask("c")["hot"]
            process.quit()
            path = process.path
        successor = None
        for _ in range(50):
            try:
                with open("/proc/sys/kernel/ns_last_pid", "w") as f:
                    f.write(str(process.pid - 1))
            except OSError as error:
                self.skipTest("cannot write ns_last_pid: %s" % error)
            successor = live.Target("busy", 1, path=path)
            if successor.pid == process.pid:
                break
            successor.kill()
        else:
            self.skipTest("the pid could not be had again")
        with successor:
            before = live.Snapshot(successor.pid)
            time.sleep(0.3)     # it is no exec, to who looks what became
            self.assertFalse(target.alive)
            self.assertNotIn("exec", str(target.notes))
            self.assertEqual(n, probe.read())
            if follows:     # it may have children still
                self.assertFalse(target.probe("exe:tiny", ubp.Count()).sites)
            else:
                with self.assertRaises(ubp.UbpError):
                    target.probe("exe:tiny", ubp.Count())
            probe.remove()
            target.close()
            live.Snapshot(successor.pid).compare(self, before)
            successor.ask("c")
            self.assertEqual(n, probe.read())
            successor.quit()

    def test_nothing_public_but_what_all_names(self):
        for name in ubp.__all__:
            self.assertTrue(hasattr(ubp, name), name)
        for name in ("attach", "launch", "Count", "status", "clean",
                     "UbpError", "UbpTimeout"):
            self.assertIn(name, ubp.__all__)

    def test_bad_pids_are_told_and_no_traceback(self):
        zombie = os.fork()
        if zombie == 0:
            os._exit(0)
        os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
        try:
            for pid in (0, -1, os.getpid(), 2, 1 << 22, 1 << 40, zombie):
                with self.subTest(pid):
                    with self.assertRaises(ubp.UbpError) as caught:
                        ubp.attach(pid)
                    self.assertIn("cannot", str(caught.exception))
        finally:
            os.waitpid(zombie, 0)

    def test_a_thread_id_is_refused_naming_the_process(self):
        with live.Target("busy", 1) as process:
            tid = live.threads(process.pid)[-1]
            with self.assertRaises(ubp.UbpError) as caught:
                ubp.attach(tid)
            self.assertIn(str(process.pid), str(caught.exception)
                          + caught.exception.hint)
            process.quit()

    def test_a_traced_target_is_refused_naming_the_tracer(self):
        with live.Target("busy", 1) as process:
            code = """
import ctypes
libc = ctypes.CDLL(None)
libc.ptrace.argtypes = [ctypes.c_long] + [ctypes.c_void_p] * 3
assert libc.ptrace(0x4206, int(sys.argv[1]), 0, 0) == 0     # PTRACE_SEIZE
print("seized", flush=True)
time.sleep(20)
"""
            with live.python(code, process.pid) as tracer:
                self.assertEqual("seized", tracer.line())
                with self.assertRaises(ubp.UbpError) as caught:
                    with ubp.attach(process.pid) as target:
                        target.probe("exe:hot", ubp.Count())
                self.assertIn(str(tracer.pid), str(caught.exception))
            process.ask("c")
            process.quit()


if __name__ == "__main__":
    unittest.main()
