"""kill -9 of ubp at random instants: the target never notices, and `clean`
restores every byte afterwards.

One forking server for each target imports ubp once; its children attach,
probe, remove and close in a loop until they are killed: at any time, or soon
after they are seen in a chosen phase. Phases and delays come from a fixed
seed. UBP_TEST_KILLS is the number of kills of all targets together.
"""
import os
import random
import signal
import threading
import time
import unittest

import live

KILLS = int(os.environ.get("UBP_TEST_KILLS", "330"))

SERVER = """
import mmap
phase = mmap.mmap(-1, 4096)             # shared with the children

def watch(owner, name, letter):
    # Show in `phase` that the function is running.
    function = getattr(owner, name, None)

    def watched(*arguments, **named):
        before = phase[0:1]
        phase[0:1] = letter
        try:
            return function(*arguments, **named)
        finally:
            phase[0:1] = before
    if function is not None:            # internals may have other names
        setattr(owner, name, watched)

for owner, name, letter in (("Tracer", "_interrupt_all", b"S"),
                            ("Injection", "call", b"I"),
                            ("Tracer", "write_text", b"T"),
                            ("Tracer", "_release", b"R")):
    watch(getattr(ubp, owner, None), name, letter)

ACTIONS = {
    "count": lambda: [ubp.Count()],
    "latency": lambda: [ubp.Latency(), ubp.Count()],
    "trace": lambda: [ubp.Trace("arg0, tid", ring=1 << 14),
                      ubp.Trace("arg0", overflow="block", ring=1 << 14)],
    "text": lambda: [ubp.Count(by="str(arg0, 16)"), ubp.Hist("u64[arg0]")],
    "hist": lambda: [ubp.Hist("arg0"), ubp.Count(by="arg0 & 7"),
                     ubp.Count(sum="arg0")],
    "stack": lambda: [ubp.Stack(), ubp.Stack(unwind="fp", depth=8)]}

def live(pid, kind, sites, seed):
    turn = seed
    while True:
        turn += 1
        try:
            phase[0:1] = b"a"
            target = ubp.attach(pid)
            phase[0:1] = b"p"
            probes = [target.probe(sites, action)
                      for action in ACTIONS[kind]()]
            phase[0:1] = b"w"
            for probe in probes:
                probe.read()
            phase[0:1] = b"r"
            if turn % 3:
                for probe in probes[turn % len(probes):]:
                    probe.remove()
                phase[0:1] = b"d"
            if turn % 2:
                target.close()
            else:
                target.detach()
        except ubp.UbpError as error:
            phase[1:200] = str(error).encode()[:199].ljust(199, b"\\0")
        if turn % 4 == 0:
            phase[0:1] = b"c"
            ubp.clean(pid, all=True)

for line in sys.stdin:
    pid, wanted, delay, seed = line.split()[:4]
    phase[0:200] = b"s".ljust(200, b"\\0")
    child = os.fork()
    if child == 0:
        live(int(pid), line.split()[4], line.split()[5:], int(seed))
    limit = time.monotonic() + 4        # a busy machine takes its time
    while phase[0:1] == b"s":           # until it has begun
        time.sleep(0.0002)
    while wanted != "-" and phase[0:1] != wanted.encode() \
            and time.monotonic() < limit:
        time.sleep(0.00002)
    if float(delay):
        time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    error = phase[1:200].rstrip(b"\\0").decode("utf-8", "replace")
    print("phase=%s killed=%d error=%s" % (
        phase[0:1].decode(), status == 9, error.replace(" ", "_")),
        flush=True)
"""

# Dies in front of the n-th syscall that it injects, and tells its number.
LAST_CALL = """
begin, n_calls = ubp.Injection._until_syscall_stop, [0]

def end(injection, tid):
    regs = injection.tracer.get_regs(tid)
    if ubp.ubp_x86.program_counter(regs) == injection._gadget:
        if n_calls[0] == int(sys.argv[2]):
            print("number=%d" % ubp.ubp_x86.syscall_result(regs), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        n_calls[0] += 1
    begin(injection, tid)

ubp.Injection._until_syscall_stop = end
with ubp.attach(int(sys.argv[1])) as target:
    target.probe("exe:hot", ubp.Latency()).remove()
print("number=-1", flush=True)
"""

HOTS = "exe:hot exe:tiny exe:keep exe:marked libc:labs"
PHASES = (("-", 0.1), ("S", 0.0005), ("I", 0.0003), ("I", 0.0003),
          ("T", 0.0002), ("T", 0.0), ("R", 0.0005), ("r", 0.03), ("d", 0.03),
          ("c", 0.02))
WINDOWS = ("exe:win_slow exe:win_ones exe:win_pause exe:win_call "
           "exe:win_data exe:win_tight")


class Case:
    """A target, the server that worries it, and what was seen."""

    def __init__(self, sites, name, *arguments, action="count"):
        self.sites = action + " " + sites
        # Its maps are compared: a thread's first malloc must add none.
        self.target = live.Target(name, *arguments, seconds=240,
                                  env={"MALLOC_ARENA_MAX": "1"})
        self.label = " ".join((name,) + tuple(map(str, arguments)))
        if action != "count":
            self.label += ", " + action
        self.server = live.python(SERVER, seconds=240)
        self.phases, self.errors, self.problem = {}, {}, None

    def worry(self, n):
        """Kill n times; remember the first exception for the main thread."""
        try:
            chance = random.Random(self.label)
            for turn in range(n):
                wanted, longest = chance.choice(PHASES)
                self.kill_once(wanted, chance.random() * longest, turn)
        except BaseException as error:
            self.problem = error

    def kill_once(self, wanted, delay, turn):
        self.server.send("%d %s %f %d %s\n" % (
            self.target.pid, wanted, delay, turn, self.sites))
        answer = self.server.answer(30)
        if answer["killed"] != 1:
            raise live.Wrong("the tracer died of itself: "
                             + self.server.stderr())
        self.phases[answer["phase"]] = self.phases.get(answer["phase"], 0) + 1
        if answer["error"]:
            self.errors[answer["error"]] = \
                self.errors.get(answer["error"], 0) + 1
        if self.target.process.poll() is not None:
            raise live.Wrong(self.target.account(
                "died at kill %d in phase %s" % (turn, answer["phase"])))
        if not live.settled(lambda: not live.tracers(self.target.pid)):
            raise live.Wrong("still traced after kill %d" % turn)
        if set(live.states(self.target.pid)) & set("tT"):
            time.sleep(0.05)
            if set(live.states(self.target.pid)) & set("tT"):
                raise live.Wrong("stopped after kill %d in phase %s"
                                 % (turn, answer["phase"]))

    def end(self):
        self.server.kill()
        self.target.kill()


class Kill(unittest.TestCase):
    def setUp(self):
        self.ubp = live.core()

    def worry(self, *cases, n=None):
        """Worry all targets at once; then look, clean and compare."""
        n = n or KILLS // 3 // len(cases) + 1
        befores = [live.Snapshot(case.target.pid) for case in cases]
        for case in cases:
            if case.label.startswith("busy"):
                case.target.send("g")
        threads = [threading.Thread(target=case.worry, args=(n,))
                   for case in cases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for case, before in zip(cases, befores):
            print("%s: killed in %s; errors %s" % (case.label, case.phases,
                                                   case.errors))
            with self.subTest(case.label):
                if case.problem:
                    raise case.problem
                self.ubp.status(case.target.pid)
                self.ubp.clean(case.target.pid, all=True)
                if case.label.startswith(("busy", "windows")):
                    case.target.ask("p")
                after = live.Snapshot(case.target.pid)
                after.compare(self, before,
                              masks=case.label.startswith("busy"))
                self.assertEqual([], live.arenas(case.target.pid))

    def test_busy_targets_never_notice(self):
        cases = [Case(HOTS, "busy", 3), Case(HOTS, "busy", 1),
                 Case(WINDOWS, "windows", "loop"),
                 Case(WINDOWS, "windows", "signals")]
        try:
            self.worry(*cases)
            for case in cases:
                with self.subTest(case.label):
                    case.target.send("g")
                    time.sleep(0.05)
                    case.target.quit()
        finally:
            for case in cases:
                case.end()

    def test_whatever_a_probe_computes_the_target_never_notices(self):
        """Several bodies at a site, data that grows, hits that wait."""
        for action in ("latency", "trace", "text", "hist", "stack"):
            case = Case(HOTS, "busy", 1, action=action)
            try:
                self.worry(case, n=KILLS // 50 + 1)
                case.target.send("g")
                time.sleep(0.05)
                case.target.quit()
            finally:
                case.end()

    def test_an_arena_that_was_just_mapped_is_taken_out_whole(self):
        """Its private pages have no name: the header must tell of them."""
        with live.Target("busy", 1) as target:
            before = live.Snapshot(target.pid)
            tracer = live.python("""
ubp._adopt = lambda *ignored: os.kill(os.getpid(), signal.SIGKILL)
ubp.attach(int(sys.argv[1])).probe("exe:hot", ubp.Latency())
""", target.pid)
            self.assertEqual(-signal.SIGKILL, tracer.wait())
            tracer.kill()
            self.assertEqual(3, len(live.maps(target.pid))
                             - len(before.maps))
            self.ubp.clean(target.pid)
            live.Snapshot(target.pid).compare(self, before)
            target.quit()

    def test_what_a_stopped_thread_was_to_run_is_not_run_after_clean(self):
        """Killed before a syscall, it leaves it to a thread that is stopped:
        run after all was cleaned, it would map, unmap or close anew."""
        found = []
        for n in range(20):
            with self.subTest(n), live.Target("busy", 1) as target:
                before = live.Snapshot(target.pid)
                live.stop(target.pid)
                tracer = live.python(LAST_CALL, target.pid, n)
                found.append(tracer.answer()["number"])
                tracer.wait()
                tracer.kill()
                self.assertTrue(live.settled(
                    lambda: set(live.states(target.pid)) == {"T"}))
                self.ubp.clean(target.pid)
                os.kill(target.pid, signal.SIGCONT)
                self.assertEqual(0, target.ask("p")["wrong"])
                live.Snapshot(target.pid).compare(self, before)
                target.quit()
            if found[-1] < 0:
                break
        # prctl, memfd_create, 3 x mmap, madvise, close; and munmap at the end
        self.assertEqual([157, 319, 9, 9, 9, 28, 3, 11, -1], found)

    def test_memory_below_small_stacks_is_never_written(self):
        """Hazard 9: coroutine stacks of 2 KiB side by side, and alternate
        signal stacks that have just room for their handler."""
        cases = [Case("exe:hot", "coro", "idle"),
                 Case("exe:hot", "coro", "alone"),
                 Case(WINDOWS, "windows", "tight")]
        try:
            self.worry(*cases)
            for case in cases:
                with self.subTest(case.label):
                    if case.label != "windows tight":
                        self.assertEqual(0, case.target.ask("r")["wrong"],
                                         case.target.stderr())
                    else:
                        case.target.send("g")
                    time.sleep(0.02)
                    case.target.quit()
        finally:
            for case in cases:
                case.end()

    def test_blocked_targets_never_notice(self):
        """What lies between a stop and its repair may show at a kill there:
        for calls that Linux ends at a mere stop and for transfers. It is
        counted and bounded; for all other calls it must be nothing."""
        cases = [Case("exe:hot", "blocked", "strict"),
                 Case("exe:hot", "blocked", "loose,signal"),
                 Case("exe:hot", "blocked", "write,send,waitall"),
                 Case("exe:hot", "blocked", "nanosleep,futex,poll")]
        try:
            self.worry(*cases)
            for case in cases:
                with self.subTest(case.label):
                    self.judge(case)
        finally:
            for case in cases:
                case.end()

    def judge(self, case):
        time.sleep(0.3)
        shown = 0
        for name, found in case.target.operations().items():
            if case.label.split()[1] in ("strict", "nanosleep,futex,poll"):
                self.assertEqual((0, 0, 0, 0), (
                    found["eintr"], found["short"], found["early"],
                    found["amiss"]), case.target.stderr())
            self.assertEqual((0, 0), (found["early"], found["amiss"]),
                             case.target.stderr())
            shown += found["eintr"] + found["short"]
            self.assertGreater(found["rounds"], 3, name)
        n_kills = sum(case.phases.values())
        print("%s: %d kills, %d showed" % (case.label, n_kills, shown))
        self.assertLessEqual(shown, n_kills, case.target.stderr())
        case.target.quit(tolerant=shown > 0)

    def test_the_command_line_killed_from_its_very_start(self):
        with live.Target("busy", 2) as target:
            before = live.Snapshot(target.pid)
            target.send("g")
            code = """
while True:
    with ubp.attach(int(sys.argv[1])) as target:
        target.probe(sys.argv[2:], ubp.Count())
"""
            for turn in range(12):
                tracer = live.python(code, target.pid, *HOTS.split())
                time.sleep(0.05 + 0.025 * turn)
                os.kill(tracer.pid, signal.SIGKILL)
                tracer.kill()
                self.ubp.clean(target.pid, all=True)
                self.assertEqual([], live.changed_text(target.pid))
            target.ask("p")
            live.Snapshot(target.pid).compare(self, before)
            target.quit()


if __name__ == "__main__":
    unittest.main()
