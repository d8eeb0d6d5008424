"""What probes compute, against the truth: the numbers the targets know.

The pure part first: results as values. Then live targets whose threads call
a probed function a known number of times with known arguments.
"""
import collections
import contextlib
import math
import random
import threading
import time
import unittest
import unittest.mock

import build
import live

ubp = live.core()
x86 = ubp.ubp_x86


def histogram_of(values, is_signed=True):
    """A Histogram as the bodies would have left it in shared memory."""
    counts = [0] * 2 * x86.N_BUCKETS
    for value in values:
        counts[x86.bucket_index(value) if value >= 0
               else x86.N_BUCKETS + x86.bucket_index(-value)] += 1
    return ubp.histogram_of_counts(
        counts, min(values, default=0), max(values, default=0), sum(values),
        is_signed)


def some_values(seed, n):
    """Numbers of all magnitudes, of both signs."""
    rng = random.Random(seed)
    return [rng.choice((1, -1)) * rng.getrandbits(rng.randrange(1, 64))
            for _ in range(n)]


class Histograms(unittest.TestCase):

    def test_numbers_are_those_of_the_values(self):
        for seed, n in ((1, 1), (2, 10), (3, 1000), (4, 20000)):
            values = some_values(seed, n)
            made = histogram_of(values)
            self.assertEqual(
                (made.count, made.sum, made.min, made.max),
                (n, sum(values), min(values), max(values)))
            self.assertEqual(made.mean, sum(values) / n)

    def test_half_of_a_sum_that_was_read_too_early_is_completed(self):
        for values in some_values(5, 100), [-1] * 3, [1 << 62] * 9:
            made = histogram_of(values)
            for wrong in (sum(values) - (1 << 64), sum(values) + (1 << 64)):
                counts = [0] * 2 * x86.N_BUCKETS
                for value in values:
                    counts[x86.bucket_index(abs(value))
                           + (value < 0) * x86.N_BUCKETS] += 1
                self.assertEqual(made, ubp.histogram_of_counts(
                    counts, min(values), max(values), wrong, True))

    def test_percentiles_are_within_a_sixteenth(self):
        for seed in range(20):
            values = sorted(some_values(seed, 500))
            made = histogram_of(values)
            for p in (0, 0.1, 1, 25, 50, 75, 90, 99, 99.9, 100):
                rank = max(1, math.ceil(len(values) * p / 100))
                exact, got = values[rank - 1], made.percentile(p)
                self.assertLessEqual(abs(got - exact), abs(exact) / 16, p)
            self.assertEqual(made.percentile(0), values[0])
            self.assertEqual(made.percentile(100), values[-1])

    def test_sum_of_two_is_that_of_all_values(self):
        for seed in range(10):
            one, other = some_values(seed, 50), some_values(seed + 100, 70)
            self.assertEqual(histogram_of(one) + histogram_of(other),
                             histogram_of(one + other))
        self.assertEqual(histogram_of(one) + ubp.Histogram(),
                         histogram_of(one))
        self.assertEqual(sum([histogram_of(one), histogram_of(other)],
                             ubp.Histogram()), histogram_of(one + other))

    def test_interval_is_what_came_since(self):
        first, later = some_values(1, 100), some_values(2, 50)
        interval = histogram_of(first + later) - histogram_of(first)
        self.assertEqual(interval.buckets, histogram_of(later).buckets)
        self.assertEqual((interval.count, interval.sum),
                         (50, sum(later)))
        self.assertLessEqual(interval.min, min(later))
        self.assertGreaterEqual(interval.max, max(later))
        self.assertEqual(interval - interval, ubp.Histogram())

    def test_nothing_recorded_has_no_mean(self):
        empty = ubp.Histogram()
        self.assertEqual((empty.count, empty.mean, empty.percentile(50)),
                         (0, None, None))

    def test_json_comes_back_as_it_was(self):
        made = histogram_of(some_values(7, 300))
        self.assertEqual(made, ubp.Histogram.from_buckets(
            [list(bucket) for bucket in made.buckets], made.sum, made.min,
            made.max))

    def test_what_is_no_histogram_is_refused(self):
        for buckets in ([[1, 0, 1]], [[0, 1, -1]], [[0, 5, 1], [5, 6, 1]],
                        [[8, 9, 1], [0, 1, 1]]):
            with self.assertRaises(ValueError):
                ubp.Histogram.from_buckets(buckets, 0, 0, 0)
        for p in (-1, 101):
            with self.assertRaises(ValueError):
                ubp.Histogram().percentile(p)

    def test_hostile_words_are_not_believed(self):
        """min, max and sum that contradict the buckets are corrected."""
        made = ubp.histogram_of_counts([0, 0, 3] + [0] * 493, 1 << 70, -5,
                                       1 << 40, False)
        self.assertEqual((made.count, made.sum, made.min, made.max),
                         (3, 6, 2, 2))


class Sums(unittest.TestCase):

    def test_sums_and_dicts_add_up(self):
        both = ubp.added({1: ubp.Sum(5, 2), 2: ubp.Sum(1, 1)},
                         {1: ubp.Sum(-7, 1)})
        self.assertEqual(both, {1: -2, 2: 1})
        self.assertEqual(both[1].count, 3)
        self.assertEqual(ubp.added(3, 4), 7)


TEXTS = [b"alpha", b"beta", b"gamma", b"delta", b""]
CHILD = 1009                    # calls of a child, with n, 77, "child"
PATIENCE = 20                   # seconds; the machine may be busy


class Truth:
    """What the calls of work(n, key, text) were, as the target tells."""

    def __init__(self, threads, calls, handled=0, children=0):
        self.calls = [(n, key, TEXTS[n % 5]) for key in range(threads)
                      for n in range(calls)]
        self.calls += [(1, 99, b"signal")] * handled
        self.calls += [(n, 77, b"child") for n in range(CHILD)] * children

    def count(self, key, value=None):
        """{key(call): how many, or the sum of value(call)}"""
        found = collections.Counter()
        for call in self.calls:
            found[key(call)] += 1 if value is None else value(call)
        return dict(found)


@contextlib.contextmanager
def attached(*words):
    """(process, target) of the program actions; both end clean."""
    with live.Target("actions", *words) as process:
        before = live.Snapshot(process.pid)
        with ubp.attach(process.pid) as target:
            yield process, target
            target.close(PATIENCE)
        after = live.Snapshot(process.pid)
        after.compare(unittest.TestCase(), before, masks=False)
        process.quit()


class Reader:
    """A thread that reads all the time, and keeps the events."""

    def __init__(self, target, probes):
        self.target, self.probes, self.events = target, probes, []
        self.is_over, self.error = False, None
        self.thread = threading.Thread(target=self.run)

    def run(self):
        try:
            while not self.is_over:
                for probe in self.probes:
                    probe.read()
                    probe.by_site()
                self.events += self.target.read_events()
                time.sleep(0.001)
        except BaseException as error:          # told by __exit__
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *ignored):
        self.is_over = True
        self.thread.join()
        if self.error is not None:
            raise self.error


class Exact(unittest.TestCase):
    """Nothing is lost: with signals, migration, a child, and a reader."""

    THREADS, CALLS = 3, 20011

    def run_all(self, process):
        """One batch and one child. -> Truth"""
        handled = process.ask("g", 60)["handled"]
        process.ask("f", 60)
        return Truth(self.THREADS, self.CALLS, handled, 1)

    def test_counts_sums_and_keys_are_the_truth(self):
        with attached(str(self.THREADS), str(self.CALLS), "signals",
                      "migrate") as (process, target):
            actions = collections.OrderedDict((
                ("all", (ubp.Count(), None)),
                ("some", (ubp.Count(), "arg0 % 7 == 3 and arg1 != 1")),
                ("sum", (ubp.Count(sum="arg0 - 5000"), None)),
                ("keys", (ubp.Count(by="arg1"), None)),
                ("texts", (ubp.Count(by="str(arg2), arg1 & 1"), None)),
                ("sums", (ubp.Count(by="arg0 % 3", sum="arg0"), "arg1 < 50")),
                ("hist", (ubp.Hist("arg0 * arg0 - 100"), None)),
                ("hists", (ubp.Hist("u64(arg0)", by="arg1"), None))))
            probes = collections.OrderedDict(
                (name, target.probe("exe:work", action, when=when,
                                    timeout=PATIENCE))
                for name, (action, when) in actions.items())
            with Reader(target, list(probes.values())):
                truth = self.run_all(process)
            self.check(truth, probes)
            order = list(probes.values())
            random.Random(1).shuffle(order)
            for probe in order:                 # each alone, others stay
                probe.remove(PATIENCE)
            self.check(truth, probes)

    def check(self, truth, probes):
        """Compare what probes read with the truth."""
        def forget_child(found):
            # A forked child makes no syscall: its texts are faults.
            return {key: n for key, n in found.items() if key[0] != b"child"}
        calls = truth.calls
        self.assertEqual(len(calls), probes["all"].read())
        self.assertEqual(sum(n % 7 == 3 and key != 1
                             for n, key, _ in calls), probes["some"].read())
        self.assertEqual((sum(n - 5000 for n, _, _ in calls), len(calls)),
                         (probes["sum"].read(), probes["sum"].read().count))
        self.assertEqual(truth.count(lambda call: call[1]),
                         probes["keys"].read())
        self.assertEqual(
            forget_child(truth.count(lambda call: (call[2], call[1] & 1))),
            probes["texts"].read())
        self.assertEqual(CHILD, probes["texts"].reading().faults)
        few = Truth.count(_Calls(c for c in calls if c[1] < 50),
                          lambda call: call[0] % 3, lambda call: call[0])
        self.assertEqual(few, probes["sums"].read())
        self.assertEqual(
            histogram_of([n * n - 100 for n, _, _ in calls]),
            probes["hist"].read())
        for key, made in probes["hists"].read().items():
            self.assertEqual(histogram_of(
                [n for n, k, _ in calls if k == key], False), made)
        for name, probe in probes.items():
            self.assertEqual(probe.hits, probe.reading().recorded
                             + probe.dropped, name)
            self.assertEqual(0, probe.reading().invalid, name)

    def test_records_and_drops_are_the_truth_for_every_policy(self):
        for policy, ring, loses in (
                ("drop", 1 << 16, True), ("overwrite", 1 << 16, True),
                ("block", 1 << 16, True), ("drop", 1 << 24, False),
                ("overwrite", 1 << 24, False), ("block", 1 << 24, False)):
            with self.subTest(policy, ring=ring), attached(
                    str(self.THREADS), str(self.CALLS), "signals",
                    "migrate") as (process, target):
                probe = target.probe("exe:work", ubp.Trace(
                    "arg0, arg1", "str(arg2)", overflow=policy,
                    ring=ring), timeout=PATIENCE)
                with Reader(target, [probe]) as reader:
                    truth = self.run_all(process)
                probe.remove(PATIENCE)
                events = reader.events + target.read_events(True)
                self.check_events(truth, probe, events)
                if not loses:
                    self.assertEqual(0, probe.dropped)

    def check_events(self, truth, probe, events):
        """Every record is of one call, every other call was dropped."""
        possible = collections.Counter(
            (n, key, text if key != 77 else None)
            for n, key, text in truth.calls)
        found = collections.Counter(event.values for event in events)
        self.assertEqual({}, {values: n for values, n in found.items()
                              if n > possible[values]})
        reading = probe.reading()
        self.assertEqual(len(events), reading.recorded)
        self.assertEqual(len(truth.calls), len(events) + probe.dropped)
        self.assertEqual((0, 0), (reading.invalid, reading.faults))
        now = time.time_ns() if hasattr(time, "time_ns") else int(
            time.time() * 1e9)
        for event in events:
            self.assertLess(abs(event.time_ns - now), 100 * 10**9)
            self.assertEqual("entry", event.kind)

    def test_a_flight_recorder_has_the_last_records(self):
        with attached("1", str(self.CALLS)) as (process, target):
            probe = target.probe("exe:work", ubp.Trace(
                "arg0", overflow="overwrite", ring=1 << 14))
            process.ask("g", 60)
            probe.remove(PATIENCE)
            values = [event.values[0] for event in target.read_events(True)]
            self.assertEqual(self.CALLS, len(values) + probe.dropped)
            per_cpu = collections.Counter(
                event for event in values if event > self.CALLS - 100)
            self.assertEqual(set(per_cpu.values()), {1})
            self.assertEqual(max(values), self.CALLS - 1)

    def test_events_end_when_the_target_does(self):
        with live.Target("actions", "2", "1009") as process:
            with ubp.attach(process.pid) as target:
                target.probe("exe:work", ubp.Trace("arg0"))
                process.ask("g")
                process.quit()
                events = list(target.events())
                self.assertEqual(2018, len(events))
                self.assertEqual(events, sorted(
                    events, key=lambda event: event.time_ns))


class _Calls(Truth):
    """Some of the calls."""

    def __init__(self, calls):
        self.calls = list(calls)


# function | entries, exits, of them by longjmp: as actions.c has them
STRANGE_FRAMES = """
thrower  | 100 | 50
through  | 100 | 50
yielder  | 100 | 100
on_alt   | 100 | 100
raiser   | 100 | 100
"""
FRAMES = """
deep     | 550 | 550
jumper   | 100 | 50
tail     | 100 | 100
far_tail | 100 | 100
sleeper  | 5   | 5
"""


class Frames(unittest.TestCase):

    def test_latency_is_measured_of_each_frame(self):
        with attached("1") as (process, target):
            rows = [[word.strip() for word in line.split("|")]
                    for line in FRAMES.strip().splitlines()]
            probes = [target.probe("exe:" + row[0], ubp.Latency())
                      for row in rows]
            by_arg = target.probe("exe:sleeper", ubp.Latency(by="arg0"))
            process.ask("r")
            for probe, (name, entries, exits) in zip(probes, rows):
                with self.subTest(name):
                    reading = probe.reading()
                    self.assertEqual(int(exits), reading.recorded)
                    self.assertEqual(int(entries), reading.entries)
                    self.assertEqual(0, reading.unmatched + reading.crowded)
            self.assertEqual({2000 * n for n in range(5)},
                             set(by_arg.read()))
            for us, times in by_arg.read().items():
                self.assertGreaterEqual(times.min, us * 1000)
            for probe in probes[::2]:
                probe.remove(PATIENCE)
            self.assertEqual(550, probes[0].read().count)

    def test_frames_that_are_left_or_resumed_in_unusual_ways(self):
        """C++ exceptions, ucontext coroutines, handlers on their own stack."""
        path = build.build("frames", ("-Wl,--no-as-needed", "-lstdc++"),
                           ".cc")
        with live.Target("frames", path=path) as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as target:
                rows = [[word.strip() for word in line.split("|")]
                        for line in STRANGE_FRAMES.strip().splitlines()]
                times = [target.probe("exe:" + row[0], ubp.Latency())
                         for row in rows]
                results = target.probe("exe:yielder%return",
                                       ubp.Count(by="ret - 2 * arg0"))
                sides = target.probe("exe:yielder", ubp.Latency(by="arg0&1"))
                self.assertEqual({"thrown": 50, "wrong": 0},
                                 process.ask("r"))
                for probe, (name, entries, exits) in zip(times, rows):
                    with self.subTest(name):
                        reading = probe.reading()
                        self.assertEqual(int(entries), reading.entries)
                        self.assertEqual(int(exits), reading.recorded)
                        self.assertEqual(0, reading.dropped
                                         + reading.unmatched)
                self.assertEqual({0: 100}, results.read())
                self.assertEqual({0: 50, 1: 50}, {
                    key: n.count for key, n in sides.read().items()})
                target.close(PATIENCE)
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_an_exit_by_a_jump_elsewhere_tells_no_result(self):
        """`jmp other` is the end of tail(n < 0): rax is anything there."""
        for strategy in "jump", "int3":
            with self.subTest(strategy), attached("1", "7") as (
                    process, target):
                known = [target.probe("exe:tail%return", action, when,
                                      strategy=strategy)
                         for action, when in (
                    (ubp.Hist("ret"), None), (ubp.Count(sum="ret"), None),
                    (ubp.Count(by="ret & 1"), None),
                    (ubp.Count(), "ret >= 0"),
                    (ubp.Count(), "arg0 >= 0 and ret >= 0"),
                    (ubp.Trace("arg0", "ret"), None))]
                self.assertEqual(1, sum(note.startswith(
                    "tail may end in a jump to another function")
                    for note in target.notes), target.notes)
                process.ask("r")
                hist, total, keys, some, both, trace = known
                self.assertEqual((50, sum(range(2, 52))), (
                    hist.read().count, hist.read().sum))
                self.assertEqual(sum(range(2, 52)), total.read())
                self.assertEqual({0: 25, 1: 25}, keys.read())
                self.assertEqual((50, 50), (some.read(), some.dropped))
                self.assertEqual((50, 0), (both.read(), both.dropped))
                for probe in hist, total, keys:
                    self.assertEqual((100, 50), (probe.hits, probe.dropped))
                trace.remove(PATIENCE)
                self.assertEqual(
                    [(n, None if n < 0 else n + 2) for n in range(-50, 50)],
                    [event.values for event in target.read_events(True)])

    def test_exits_tell_results_and_the_arguments_of_the_entry(self):
        with attached("2", "5003", "signals") as (process, target):
            results = target.probe("exe:work%return", ubp.Count(sum="ret"))
            pairs = target.probe("exe:work%return",
                                 ubp.Count(by="ret - arg0 * 3 - arg1"))
            jumps = target.probe("exe:tail%return", ubp.Count(by="arg0 < 0"))
            calls = target.probe("exe:other%return",
                                 ubp.Trace("arg0, s32(ret)"))
            handled = process.ask("g")["handled"]
            process.ask("r")
            truth = Truth(2, 5003, handled).calls
            self.assertEqual(sum(n * 3 + key + text.startswith(b"a")
                                 for n, key, text in truth), results.read())
            n_a = sum(text.startswith(b"a") for _, _, text in truth)
            self.assertEqual({1: n_a, 0: len(truth) - n_a}, pairs.read())
            self.assertEqual({0: 50, 1: 50}, jumps.read())
            calls.remove(PATIENCE)
            events = target.read_events(True)
            self.assertEqual([(n - 1, (n - 1) * 5) for n in range(-50, 0)],
                             [event.values for event in events])
            self.assertEqual({"exit"}, {event.kind for event in events})

    def test_a_condition_at_the_entry_keeps_exits_from_being_timed(self):
        with attached("1") as (process, target):
            few = target.probe("exe:deep", ubp.Latency(), when="arg0 == 3")
            slow = target.probe("exe:sleeper", ubp.Latency(),
                                when="elapsed >= 4000*us and arg0 >= 4000")
            process.ask("r")
            self.assertEqual(70, few.read().count)
            self.assertEqual(480, few.reading().skipped)
            self.assertEqual(3, slow.read().count)

    def test_what_measuring_costs_is_measured(self):
        """No time of a function that does next to nothing is far from it."""
        with attached("1", "1009") as (process, target):
            probe = target.probe("exe:other", ubp.Latency())
            process.ask("r")
            self.assertGreater(probe.overhead_ns, 0)
            self.assertLess(probe.overhead_ns, 1000)
            self.assertLess(abs(probe.read().percentile(50)
                                - probe.overhead_ns),
                            max(50, 3 * probe.overhead_ns))

    def test_frames_that_ran_before_are_told(self):
        with attached("1") as (process, target):
            outer = target.probe("exe:frames", ubp.Latency())
            process.ask("r")            # answers before it returns
            self.assertTrue(live.settled(lambda: outer.read().count == 1))


class Stacks(unittest.TestCase):

    def test_stacks_are_told_apart_by_their_depth(self):
        """deep(m) is called ten times for each m below 10."""
        truth = {depth: 10 * (11 - depth) for depth in range(1, 11)}
        with attached("1") as (process, target):
            counts = target.probe("exe:deep", ubp.Stack())
            sums = target.probe("exe:deep", ubp.Stack(sum="arg0"))
            events = target.probe("exe:deep", ubp.Trace("arg0", stack=True))
            process.ask("r")
            for probe in (counts, sums, events):
                probe.remove(PATIENCE)
            found = collections.Counter()
            for frames, n in counts.read().items():
                names = [frame.function for frame in frames]
                depth = names.count("deep")
                self.assertEqual(names[:depth + 2],
                                 ["deep"] * depth + ["frames", "main"])
                found[depth] += n
            self.assertEqual(truth, found)
            self.assertEqual(550, counts.hits)
            self.assertEqual(sum(m * (m + 1) // 2 for m in range(10)) * 10,
                             sum(sums.read().values()))
            found = collections.Counter(
                len([f for f in event.stack if f.function == "deep"])
                for event in target.read_events(True))
            self.assertEqual(truth, found)

    def test_frame_pointers_are_followed_in_the_target(self):
        with live.Target("actions", "1", flags=(
                "-fno-omit-frame-pointer",
                "-mno-omit-leaf-frame-pointer")) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:deep", ubp.Stack(unwind="fp"))
                process.ask("r")
                found = collections.Counter()
                for frames, n in probe.read().items():
                    names = [frame.function for frame in frames]
                    found[names.count("deep")] += n
                    self.assertIn("frames", names)
                self.assertEqual({d: 10 * (11 - d) for d in range(1, 11)},
                                 found)
            process.quit()


class Together(unittest.TestCase):
    """Several probes at one site, and what others make of them."""

    def test_each_is_taken_out_alone_while_threads_run(self):
        with attached("2", "1009", "signals") as (process, target):
            process.send("b")
            rng = random.Random(3)
            actions = [ubp.Count(), ubp.Hist("arg0"), ubp.Count(by="arg1"),
                       ubp.Trace("arg0"), ubp.Latency(),
                       ubp.Count(sum="arg0")]
            armed = []
            for _ in range(30):
                if armed and rng.random() < 0.5:
                    probe = armed.pop(rng.randrange(len(armed)))
                    probe.remove(PATIENCE)
                    self.assertGreater(probe.hits, 0)
                else:
                    armed.append(target.probe(
                        "exe:work", rng.choice(actions), timeout=PATIENCE))
                time.sleep(0.01)
            process.send("x")
            process.answer(PATIENCE)

    def test_entry_and_exit_in_one_window_are_taken_out_as_one(self):
        """tiny is five bytes: one window has its entry and its exit."""
        with live.Target("busy", "1") as process:
            with ubp.attach(process.pid) as target:
                times = target.probe("exe:tiny", ubp.Latency())
                calls = target.probe("exe:tiny", ubp.Count())
                process.send("g")
                live.settled(lambda: times.hits)
                times.remove(PATIENCE)
                n = calls.read()
                self.assertTrue(live.settled(lambda: calls.read() > n))
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    def test_a_removal_that_came_too_late_can_be_repeated(self):
        with attached("1", "1009") as (process, target):
            hist = target.probe("exe:work", ubp.Hist("arg0"))
            calls = target.probe("exe:work", ubp.Count())
            late = ubp.UbpTimeout("stop", "it", "it does not stop")
            with unittest.mock.patch("ubp.arm", side_effect=late):
                with self.assertRaises(ubp.UbpTimeout):
                    hist.remove()
            process.ask("g")
            self.assertEqual((1009, 1009), (hist.hits, calls.hits))
            hist.remove(PATIENCE)
            process.ask("g")
            self.assertEqual((1009, 2018), (hist.hits, calls.hits))

    def test_data_of_one_site_lie_in_reach_of_each_other(self):
        """Where brk begins right behind a program at a low address, little
        fits below it, and the rest goes 2 GiB above."""
        with live.Target("actions", "1", "1009", flags=("-no-pie",),
                         prefix=("setarch", "-R")) as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as target:
                probes = [target.probe("exe:work", action, timeout=PATIENCE)
                          for action in (
                              ubp.Count(), ubp.Trace("arg0", ring=1 << 20),
                              ubp.Trace("str(arg2)", ring=1 << 24),
                              ubp.Latency(), ubp.Count(by="arg1"),
                              ubp.Stack(unwind="fp"))]
                lowest = min(m.start for m in live.arenas(process.pid))
                highest = max(m.end for m in live.arenas(process.pid))
                self.assertLess(lowest, 0x400000)
                self.assertGreater(highest, 0x40000000)
                process.ask("g")
                for probe in probes:
                    self.assertEqual(1009, probe.hits)
                for probe in probes:
                    probe.remove(PATIENCE)
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_status_tells_the_hits_of_each_and_clean_takes_all_out(self):
        with live.Target("actions", "2", "1009") as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as target:
                for action in (ubp.Count(), ubp.Hist("arg0"),
                               ubp.Count(by="arg1"), ubp.Latency(),
                               ubp.Trace("arg0"), ubp.Count(sum="arg0"),
                               ubp.Hist("u64(arg0)", by="arg1")):
                    target.probe("exe:work", action)
                n = process.ask("g")["calls"]
                sites = [site for arena in ubp.status(process.pid)
                         for site in arena.sites]
                self.assertEqual({"armed"}, {site.state for site in sites})
                self.assertEqual({n}, {site.calls for site in sites
                                       if site.name == "work"})
                target.detach()
            removal = ubp.clean(process.pid, timeout=PATIENCE)
            self.assertEqual((), removal.notes)
            live.Snapshot(process.pid).compare(self, before)
            process.ask("g")
            process.quit()

    def test_another_ubp_is_refused_with_the_reason(self):
        with attached("1", "1009") as (process, target):
            target.probe("exe:work", ubp.Hist("arg0"))
            with live.python("""
with ubp.attach(int(sys.argv[1])) as target:
    try:
        target.probe("exe:work", ubp.Count())
    except ubp.UbpError as error:
        print("why=" + str(error).replace(" ", "_"), flush=True)
""", str(process.pid)) as other:
                self.assertIn("probed_by_ubp", other.answer()["why"])

    def test_what_cannot_be_computed_is_refused_before_anything_is_done(self):
        rows = (("arg0 +", ubp.Count()), ("ret > 1", ubp.Count()),
                ("nothing", ubp.Count()), (None, ubp.Hist("elapsed")),
                (None, ubp.Hist("str(arg0)")), (None, ubp.Count(by="")),
                (None, ubp.Trace("arg99")))
        with attached("1", "1009") as (process, target):
            for when, action in rows:
                with self.subTest(when=when, action=action):
                    with self.assertRaises(ubp.UbpError):
                        target.probe("exe:work", action, when=when)
            self.assertEqual(0, target.pause_us)
            self.assertEqual([], live.arenas(process.pid))

    def test_data_of_the_program_is_read_without_a_syscall(self):
        """Also by a forked child, which makes none."""
        with attached("1", "1009") as (process, target):
            vaddr, _ = live.symbol(process.path, "n_calls")
            bias = min(m.start for m in live.maps(process.pid)
                       if m.path == process.path)
            data = target.probe("exe:work", ubp.Count(
                by="u64[0x%x]" % (bias + vaddr)))
            pointer = target.probe("exe:work", ubp.Count(
                by="u64[arg0 * 0 + 0x%x]" % (bias + vaddr)))
            process.ask("g")
            process.ask("f")
            self.assertEqual({1009: 1009 + CHILD}, data.read())
            self.assertEqual({1009: 1009}, pointer.read())
            self.assertEqual(CHILD, pointer.reading().faults)

    def test_sites_of_a_pattern_are_told_apart(self):
        with attached("1", "1009") as (process, target):
            where = ["exe:deep", "exe:tail", "exe:other"]
            probes = [target.probe(where, action) for action in (
                ubp.Count(), ubp.Count(by="arg0 & 1"), ubp.Hist("arg0"))]
            process.ask("r")
            for probe in probes:
                found = {site.function.name: reading.recorded
                         for site, reading in probe.readings().items()}
                self.assertEqual({"deep": 550, "tail": 100, "other": 50},
                                 found)


class Killed(unittest.TestCase):
    """kill -9 of a ubp whose ring is full, and whose hits wait for it."""

    ARMED = """
target = ubp.attach(int(sys.argv[1]))
target.probe("exe:work", ubp.Trace("arg0", overflow="block", ring=4096))
target.probe("exe:work", ubp.Latency())
print("armed=1", flush=True)
time.sleep(60)
"""

    def test_who_waits_goes_on(self):
        with live.Target("actions", "2", "1009") as process:
            before = live.Snapshot(process.pid)
            with live.python(self.ARMED, str(process.pid)) as tracer:
                self.assertEqual(1, tracer.answer(PATIENCE)["armed"])
                process.send("b")
                time.sleep(0.3)             # now both threads wait
                tracer.kill()
            start = time.monotonic()
            process.send("x")
            process.answer(PATIENCE)
            process.ask("g", PATIENCE)      # 2018 hits, 100 ms each if not
            self.assertLess(time.monotonic() - start, PATIENCE)
            removal = ubp.clean(process.pid, timeout=PATIENCE)
            self.assertEqual((), removal.notes)
            live.Snapshot(process.pid).compare(self, before)
            process.ask("g")
            process.quit()


class Hostile(unittest.TestCase):
    """Random bytes in the shared memory, while all runs."""

    def test_reader_and_target_survive_random_bytes(self):
        rng = random.Random(5)
        with attached("2", "1009", "signals") as (process, target):
            probes = [target.probe("exe:work", action, timeout=PATIENCE)
                      for action in (
                          ubp.Trace("arg0, arg1", "str(arg2)"),
                          ubp.Trace("arg0", overflow="overwrite"),
                          ubp.Trace("arg0", overflow="block"),
                          ubp.Hist("arg0"), ubp.Count(by="str(arg2)"),
                          ubp.Hist("arg0", by="arg1"))]
            process.send("b")
            ranges = [(m.start, m.end) for m in live.arenas(process.pid)
                      if "w" in m.permissions]
            deadline, n = time.monotonic() + 3, 0
            with Reader(target, probes) as reader, open(
                    "/proc/%d/mem" % process.pid, "r+b", 0) as memory:
                while time.monotonic() < deadline:
                    low, high = rng.choice(ranges)
                    memory.seek(rng.randrange(low, high - 64))
                    memory.write(bytes(rng.getrandbits(8) for _ in range(
                        rng.choice((1, 8, 64)))))
                    n += 1
                process.send("x")       # while hits that wait find a reader
                process.answer(PATIENCE)
            for event in reader.events:
                self.assertEqual("work", event.site.function.name)
            for probe in probes:
                probe.reading()
            self.assertGreater(n, 100)
            self.assertGreater(sum(probe.reading().invalid + probe.dropped
                                   for probe in probes), 0)


class Clocks(unittest.TestCase):

    def test_a_counter_that_is_no_clock_is_refused(self):
        for flags in ([], ["fpu tsc"], ["constant_tsc nonstop_tsc", "tsc"],
                      ["tsc constant_tsc"]):
            with self.assertRaises(ubp.ProbeError) as caught:
                ubp.Clock(flags)
            self.assertIn("_tsc", str(caught.exception))

    def test_a_target_that_may_not_read_it_is_refused(self):
        with attached("2", "1009", "notsc") as (process, target):
            for action, when in ((ubp.Trace("arg0"), None),
                                 (ubp.Latency(), None),
                                 (ubp.Count(), "nsecs > 0")):
                with self.assertRaises(ubp.ProbeError) as caught:
                    target.probe("exe:work", action, when=when)
                self.assertIn("PR_SET_TSC", str(caught.exception))
            probe = target.probe("exe:work", ubp.Count())
            process.ask("g")
            self.assertEqual(2018, probe.read())

    def test_time_is_that_of_the_system(self):
        clock = ubp.Clock()
        clock.check()
        for _ in range(5):
            time.sleep(0.02)
            tsc, now = clock.read()
            self.assertLess(abs(clock.ns(tsc) - now), 100000)
            mult, base = clock.scale
            self.assertLess(abs(base + (tsc * mult >> 32) - now), 100000)
        self.assertEqual(0, clock.n_steps)


if __name__ == "__main__":
    unittest.main()
