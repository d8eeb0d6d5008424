"""Bodies: what a hit leaves in shared memory, and what it leaves alone.

The judges: the CPU that runs them, models in plain Python, and objdump.
"""
import collections
import os
import random
import re
import struct
import subprocess
import tempfile
import unittest

import bodies
import judge
import ubp_x86 as x86
from bodies import Case, Page, SP, WINDOW, words

MASK = (1 << 64) - 1
ALL_DEAD = WINDOW._replace(dead_regs=0xffef, flags_dead=True)
TSC = (10 * (1 << 32) // 25, 1000)          # 2.5 GHz, more or less


def parse(text, is_exit=False):
    return x86.parse_expressions(text, is_exit)


def a_window(pick):
    """All live, nothing live, or something."""
    kind = pick.randrange(4)
    if kind < 2:
        return ALL_DEAD if kind else WINDOW
    return WINDOW._replace(dead_regs=pick.getrandbits(16) & 0xffef,
                           flags_dead=pick.random() < 0.5)


def registers(pick, **named):
    """16 values; named: by the names of arguments or registers."""
    regs = [pick.getrandbits(64) for _ in range(16)]
    regs[4] = SP
    order = dict(zip(x86.REGISTERS, range(16)))
    order.update(arg0=7, arg1=6, arg2=2, arg3=1, arg4=8, arg5=9)
    for name, value in named.items():
        regs[order[name]] = value & MASK
    return tuple(regs)


def table(data, place, spec):
    """{key words: payload words} of a table, summed; checks each entry."""
    layout, found = x86.block_layout(spec), collections.Counter()
    payloads = {}
    n_keys = (layout.payload_offset - x86.ENTRY_KEYS) // 8
    is_one = len(spec.keys) == 1 and spec.keys[0].kind == "int"
    for n in range(layout.n_entries):
        at = layout.start + n * layout.entry_size
        state, = words(data, place, at, 1)
        if state == x86.STATE_FREE:
            continue
        keys = words(data, place, at + x86.ENTRY_KEYS, n_keys)
        assert state == x86.table_tag(keys, is_one), "a wrong tag"
        first = x86.table_index(keys, is_one, spec.n_entries)
        assert first <= n < first + x86.N_PROBED, "a wrong place"
        assert keys not in payloads, "a key twice, with one thread"
        count = (layout.entry_size - layout.payload_offset) // 8
        payloads[keys] = words(data, place, at + layout.payload_offset,
                               min(count, 8))
        found[keys] += payloads[keys][0]
    return found, payloads


def histogram(data, place, at, is_unsigned):
    """(sum, least, most, {bucket: n}) of a hist; negative ones as ~n."""
    low, high, least, most = words(data, place, at, 4)
    bias = 0 if is_unsigned else 1 << 63

    def value(word):
        return (word ^ bias) - (0 if is_unsigned else
                                (word ^ bias) >> 63 << 64)
    total = low | high << 64
    total -= total >> 127 << 128
    n = x86.N_BUCKETS * (1 if is_unsigned else 2)
    buckets = words(data, place, at + x86.HIST_BUCKETS, n)
    return (total, value(~least & MASK), value(most),
            {n if n < x86.N_BUCKETS else ~(n - x86.N_BUCKETS): count
             for n, count in enumerate(buckets) if count})


class Runs(unittest.TestCase):
    """Base: run cases, and demand that nothing else has changed."""

    def setUp(self):
        self.pick = random.Random(self.id())
        self.page = Page(1 << 22)

    def run_cases(self, cases, how="run"):
        results, data = self.page.run(cases, how)
        for case, result in zip(cases, results):
            self.assertEqual(result, (0,) * 5, (case, hex(result.address)))
        return data

    def at_windows(self, spec, place, n=6):
        """[(vaddr, window)] of a body under several windows."""
        windows = [WINDOW, ALL_DEAD] + [a_window(self.pick)
                                        for _ in range(n - 2)]
        return [(self.page.add(spec, place, window), window)
                for window in windows]


class Histograms(Runs):

    def test_buckets_cover_every_number_once_within_an_eighth(self):
        end = 0
        for n in range(x86.N_BUCKETS):
            low, high = x86.bucket_range(n)
            self.assertEqual(low, end)
            self.assertLessEqual((high - low) * 8, low)
            for value in low, high:
                self.assertEqual(x86.bucket_index(value), n)
            end = high + 1
        self.assertEqual(end, 1 << 64)

    def values(self):
        pick = self.pick
        edges = [v for e in range(64) for v in
                 ((1 << e) - 1, 1 << e, (1 << e) + 1, -(1 << e), 1 - (1 << e))]
        return edges + [pick.getrandbits(pick.randrange(1, 65))
                        for _ in range(300)] + [0, 0, 5]

    def check(self, text):
        expression, = parse(text)
        spec = x86.Spec("hist", values=(expression,))
        place = self.page.place(spec)
        bodies_ = self.at_windows(spec, place, 12)
        cases, wanted = [], collections.Counter()
        numbers = []
        for value in self.values():
            vaddr, window = self.pick.choice(bodies_)
            cases.append(Case(vaddr, registers(self.pick, rcx=value),
                              window))
            value &= MASK
            if not expression.is_unsigned and value >> 63:
                value -= 1 << 64
            numbers.append(value)
            n = next(n for n in range(x86.N_BUCKETS)
                     if x86.bucket_range(n)[1] >= abs(value))
            wanted[~n if value < 0 else n] += 1
        data = self.run_cases(cases)
        self.assertEqual(
            histogram(data, place, x86.HEAD_SIZE, expression.is_unsigned),
            (sum(numbers), min(numbers), max(numbers), dict(wanted)))

    def test_signed_values_have_exact_sums_limits_and_buckets(self):
        self.check("arg3")

    def test_unsigned_values_have_exact_sums_limits_and_buckets(self):
        self.check("u64(arg3)")


class Tables(Runs):

    def check(self, spec, make, n=400):
        """Hits with keys of make() -> (registers by name, key words)."""
        place = self.page.place(spec)
        bodies_ = self.at_windows(spec, place)
        wanted, cases, sums = collections.Counter(), [], {}
        for _ in range(n):
            named, key = make()
            vaddr, window = self.pick.choice(bodies_)
            regs = registers(self.pick, **named)
            cases.append(Case(vaddr, regs, window))
            wanted[key] += 1
            sums[key] = sums.get(key, 0) + regs[6]
        data = self.run_cases(cases)
        found, payloads = table(data, place, spec)
        dropped, = words(data, place, x86.HEAD_DROPPED, 1)
        self.assertEqual(sum(found.values()) + dropped, n)
        return wanted, found, dropped, payloads, sums

    def test_one_key(self):
        spec = x86.Spec("count", keys=parse("arg3"))
        wanted, found, dropped, _, _ = self.check(
            spec, lambda: (lambda k: ({"rcx": k}, (k,)))(
                self.pick.randrange(60) * 64))
        self.assertEqual((dict(wanted), 0), (dict(found), dropped))

    def test_ret_and_registers_that_the_body_needs_are_keys(self):
        for text, name in (("ret", "rax"), ("rcx", "rcx"), ("rdx", "rdx")):
            with self.subTest(text):
                spec = x86.Spec("sum", keys=parse(text, True),
                                values=parse("arg1"))
                wanted, found, dropped, _, _ = self.check(
                    spec, lambda: (lambda k: ({name: k}, (k,)))(
                        self.pick.randrange(30)), 60)
                self.assertEqual((dict(wanted), 0), (dict(found), dropped))

    def test_two_keys_with_a_sum(self):
        spec = x86.Spec("sum", keys=parse("arg3, s8(arg4)"),
                        values=parse("u64(arg1)"))

        def make():
            a, b = self.pick.randrange(9), self.pick.randrange(256)
            return {"rcx": a, "r8": b}, (a, (b - (b >> 7 << 8)) & MASK)
        wanted, found, dropped, payloads, sums = self.check(spec, make)
        self.assertEqual((dict(wanted), 0), (dict(found), dropped))
        for key, total in sums.items():
            self.assertEqual(payloads[key][1] | payloads[key][2] << 64,
                             total)

    def test_six_keys_take_a_loop(self):
        spec = x86.Spec("count", keys=parse(
            "arg3, arg2, rax, rbx, rbp, arg3 + arg2"))

        def make():
            a, b = self.pick.randrange(3), self.pick.randrange(3)
            return (dict(rcx=a, rdx=b, rax=7, rbx=8, rbp=9),
                    (a, b, 7, 8, 9, a + b))
        wanted, found, dropped, _, _ = self.check(spec, make)
        self.assertEqual((dict(wanted), 0), (dict(found), dropped))

    def test_keys_whose_hashes_agree_are_told_apart(self):
        golden = x86.table_hash((1,), True)
        inverse = 1
        for _ in range(6):                  # Newton: bits double each time
            inverse = inverse * (2 - golden * inverse) & MASK
        keys = [12345, ((12345 * golden ^ x86.STATE_READY) * inverse) & MASK]
        self.assertEqual(x86.table_tag(keys[:1], True),
                         x86.table_tag(keys[1:], True))
        spec = x86.Spec("count", keys=parse("arg3"))
        wanted, found, _, _, _ = self.check(
            spec, lambda: (lambda k: ({"rcx": k}, (k,)))(
                self.pick.choice(keys)), 40)
        self.assertEqual(dict(wanted), dict(found))

    def test_a_full_table_counts_what_it_drops(self):
        spec = x86.Spec("count", keys=parse("arg3"), n_entries=16)
        wanted, found, dropped, _, _ = self.check(
            spec, lambda: (lambda k: ({"rcx": k}, (k,)))(
                self.pick.randrange(100)))
        self.assertGreater(dropped, 0)
        for key, n in found.items():
            self.assertLessEqual(n, wanted[key])

    def test_a_histogram_by_key(self):
        spec = x86.Spec("hist", keys=parse("arg0"), values=parse("arg3"),
                        n_entries=8)
        place = self.page.place(spec)
        bodies_ = self.at_windows(spec, place)
        cases, numbers = [], collections.defaultdict(list)
        for _ in range(300):
            key, value = self.pick.randrange(3), self.pick.randrange(-99, 999)
            vaddr, window = self.pick.choice(bodies_)
            cases.append(Case(vaddr, registers(
                self.pick, rdi=key, rcx=value), window))
            numbers[key].append(value)
        data = self.run_cases(cases)
        layout = x86.block_layout(spec)
        seen = 0
        for n in range(layout.n_entries):
            at = layout.start + n * layout.entry_size
            state, key = words(data, place, at, 2)
            if not state:
                continue
            total, least, most, buckets = histogram(
                data, place, at + layout.payload_offset, False)
            self.assertEqual((total, least, most, sum(buckets.values())), (
                sum(numbers[key]), min(numbers[key]), max(numbers[key]),
                len(numbers[key])))
            seen += 1
        self.assertEqual(seen, 3)

    def test_a_str_as_key_and_one_that_cannot_be_read(self):
        names = [b"", b"a", b"get", b"set-a-longer-one", b"x" * 40]
        at = 0x800
        places = []
        for name in names:
            self.page.data[at:at + len(name) + 1] = name + b"\0"
            places.append(bodies.DATA + at)
            at += 64
        spec = x86.Spec("count", keys=parse("arg3, str(arg0, 20)"))
        place = self.page.place(spec)
        bodies_ = self.at_windows(spec, place)
        cases, wanted = [], collections.Counter()
        for _ in range(100):
            n, key = self.pick.randrange(6), self.pick.randrange(2)
            vaddr, window = self.pick.choice(bodies_)
            vaddr_of = places[n] if n < 5 else 0x1234
            cases.append(Case(vaddr, registers(
                self.pick, rdi=vaddr_of, rcx=key), window))
            wanted[n < 5 and (key, names[n][:20])] += 1
        data = self.run_cases(cases)
        found, _ = table(data, place, spec)
        faults, = words(data, place, x86.HEAD_FAULTS, 1)
        shown = {(key[0], struct.pack("<3Q", *key[1:]).rstrip(b"\0")): n
                 for key, n in found.items()}
        self.assertEqual(faults, wanted.pop(False))
        self.assertEqual(shown, dict(wanted))


class Memory(Runs):

    def test_loads_read_what_is_there_and_count_faults(self):
        """u64[...] up to the last byte before an unmapped page."""
        end = bodies.DATA + len(self.page.data)
        self.page.data[-8:] = bytes(range(0x81, 0x89))
        for text, vaddr, value in (
                ("u64[arg0]", end - 8, 0x8887868584838281),
                ("u32[arg0]", end - 4, 0x88878685),
                ("s32[arg0]", end - 4, 0x88878685 - (1 << 32)),
                ("s16[arg0]", end - 2, 0x8887 - (1 << 16)),
                ("u8[arg0 + arg1]", end - 2, 0x88),
                ("u64[arg0]", end - 7, None), ("u8[arg0]", end, None),
                ("u8[arg0]", 0, None), ("u8[arg0]", 1 << 63, None),
                ("u8[arg0]", 0xffffffffffffffff, None),
                ("u8[u64[arg1 + %d]] + arg3" % (end - 0x11), end, None)):
            with self.subTest(text):
                expression, = parse(text)
                spec = x86.Spec("sum", values=(expression,))
                self.page = Page(1 << 20)
                self.page.data[-8:] = bytes(range(0x81, 0x89))
                at = vaddr - end + bodies.DATA + len(self.page.data) \
                    if abs(vaddr - end) < 4096 else vaddr
                place = self.page.place(spec)
                cases = [Case(code, registers(self.pick, rdi=at, rsi=1), w)
                         for code, w in self.at_windows(spec, place)]
                data = self.run_cases(cases)
                count, low, high = words(data, place, x86.HEAD_SIZE, 3)
                faults, = words(data, place, x86.HEAD_FAULTS, 1)
                n = len(cases)
                if value is None:
                    self.assertEqual((faults, count), (n, 0))
                else:
                    total = (n * value) & (1 << 128) - 1
                    self.assertEqual((faults, count, low | high << 64),
                                     (0, n, total))

    def test_a_forked_child_reads_no_memory(self):
        """The word that fork wipes is zero: no syscall, which a filter of
        the child's could kill it for; a fault, or a drop, instead."""
        spec = x86.Spec("sum", values=parse("u8[arg0]"))
        full = x86.Spec("trace", values=parse("str(arg0)"), policy="block",
                        n_slots=2)
        here = {"private": bodies.DATA + 0x700, "tracer": bodies.DATA + 0x60}
        self.page.data[0x60] = 99       # a tracer that lives
        place = self.page.place(spec, **here)
        place_full = self.page.place(full, **here)
        cases = [Case(code, registers(self.pick, rdi=bodies.DATA), w)
                 for code, w in self.at_windows(spec, place)
                 + self.at_windows(full, place_full)]
        data = self.run_cases(cases, "forbid")
        self.assertEqual(words(data, place, 0, 1), (6,))
        self.assertEqual(words(data, place_full, x86.HEAD_SIZE, 2), (2, 4))
        allowed = self.page.add(spec, place._replace(private=bodies.PID),
                                WINDOW)
        with self.assertRaisesRegex(RuntimeError, "-31"):       # SIGSYS
            self.page.run([Case(allowed, cases[0].regs, WINDOW)], "forbid")

    def test_nobody_waits_for_a_tracer_that_does_not_answer(self):
        """A call makes no syscall where none lives, or it was late, or in
        a forked child; nor does it touch a register."""
        at, tid = bodies.DATA + 0x800, 4242
        rows = (("nobody", bodies.PID, 0, 0),
                ("dead", bodies.PID, 0x40000000, 0),
                ("dead, and somebody waited", bodies.PID, 0xc0000000, 0),
                ("late", bodies.PID, tid, 1),
                ("forked", bodies.DATA + 0x700, tid, 0))
        for what, private, owner, late in rows:
            self.setUp()
            self.page.data[0x800:0x804] = owner.to_bytes(4, "little")
            self.page.data[0x800 + x86.CALLS_LATE] = late
            for spec in (x86.Spec("call"), x86.Spec("call", parse(
                    "arg0 != 1")[0])):
                with self.subTest(what, when=spec.when):
                    place = self.page.place(spec, private=private, calls=at)
                    cases = [Case(code, registers(self.pick), w)
                             for code, w in self.at_windows(spec, place)]
                    data = self.run_cases(cases, "forbid")
                    self.assertEqual((0, len(cases)), words(
                        data, place, x86.HEAD_FAULTS, 2))
                    self.assertEqual((0,), words(
                        data, place, x86.HEAD_SIZE, 1))

    def test_a_proven_range_is_read_without_a_syscall(self):
        text = "u32[%d]" % (bodies.DATA + 0x700)
        spec = x86.Spec("sum", values=parse(text))
        self.page.data[0x700:0x704] = b"\1\2\3\4"
        place = self.page.place(spec, private=0, direct=(
            (bodies.DATA, bodies.DATA + 0x1000),))
        cases = [Case(code, registers(self.pick), w)
                 for code, w in self.at_windows(spec, place)]
        data = self.run_cases(cases)
        self.assertEqual(words(data, place, x86.HEAD_SIZE, 2),
                         (len(cases), len(cases) * 0x04030201))
        outside = place._replace(direct=((bodies.DATA, bodies.DATA + 0x703),))
        with self.assertRaises(x86.UbpError):
            x86.body(spec, outside, WINDOW, 0x1000)


def records(data, place, spec, shard=0):
    """[(ticket, tsc, tid, cpu, site, faults, values)] of a ring."""
    layout, found = x86.block_layout(spec), []
    for n in range(layout.n_entries):
        at = layout.start + x86.RING_SLOTS + n * layout.entry_size
        head = words(data, place, at, layout.entry_size // 8, shard)
        if head[0] == 0:
            continue
        raw = struct.pack("<%dQ" % len(head), *head)
        values = []
        for n, (kind, offset, size) in enumerate(layout.fields):
            value = head[4 + n]
            values.append(value if kind == "int" else
                          raw[offset:offset + value])
        found.append((head[0], head[1], head[2] & 0xffffffff, head[2] >> 32,
                      head[3] & 0xffffffff, head[3] >> 32, tuple(values)))
    return sorted(found)


class Records(Runs):

    def test_a_record_holds_what_the_site_saw(self):
        end = bodies.DATA + len(self.page.data)
        self.page.data[-5:] = b"hello"
        self.page.data[0x800:0x804] = b"abc\0"
        spec = x86.Spec("trace", values=parse(
            "arg0, str(arg1, 16), buf(arg1, arg2, 24), caller, 7, rsp, "
            "100 // arg3, u64(arg5) >> 60, cpu"), n_slots=64)
        place = self.page.place(spec, site_index=77, tsc=TSC)
        cases, wanted = [], []
        for vaddr, window in self.at_windows(spec, place, 20):
            pointer, text = self.pick.choice((
                (end - 5, b"hello"), (bodies.DATA + 0x800, b"abc"),
                (end, None), (0, None)))
            size, divisor = self.pick.randrange(-3, 5), self.pick.choice(
                (0, 3, -7))
            regs = registers(self.pick, rsi=pointer, rdx=size, rcx=divisor)
            cases.append(Case(vaddr, regs, window))
            copy = b"" if size <= 0 else None if text is None else {
                b"hello": b"hello", b"abc": b"abc\0"}[text][:size]
            fault = (2 * (text is None) | 4 * (copy is None)
                     | 64 * (divisor == 0))
            caller = bytes(a * 37 & 255 for a in range(SP, SP + 8))
            wanted.append((fault, (
                regs[7], text or b"", copy or b"",
                int.from_bytes(caller, "little"), 7, SP,
                100 // divisor & MASK if divisor else 0,
                regs[9] >> 60, 0)))
        data = self.run_cases(cases)
        found = records(data, place, spec)
        self.assertEqual([each[0] for each in found],
                         [2 * n + 2 for n in range(len(cases))])
        self.assertEqual([each[5:] for each in found], wanted)
        times = [each[1] for each in found]
        self.assertEqual(times, sorted(times))
        self.assertGreater(times[0], 0)
        for each in found:
            self.assertEqual(each[2:5], (0, 0, 77))
        self.assertEqual(words(data, place, x86.HEAD_SIZE, 2),
                         (len(cases), 0))

    def test_who_where_and_when_by_each_source_of_the_processor(self):
        rseq, tid = bodies.offsets()
        sources = [(x86.CPU_FROM_LSL, 0)]
        with open("/proc/cpuinfo") as file:
            if "rdpid" in file.read():
                sources.append((x86.CPU_FROM_RDPID, 0))
        if rseq:
            sources.append((x86.CPU_FROM_RSEQ, rseq))
        self.assertTrue(tid, "no tid near the fs base; is this glibc?")
        for source, offset in sources:
            with self.subTest(source):
                self.page = Page(1 << 14, 64)
                self.page.shards = self.page.shards._replace(
                    source=source, rseq_offset=offset)
                spec = x86.Spec("trace", n_slots=8, values=parse(
                    "tid, pid, cpu, nsecs, nsecs"))
                place = self.page.place(spec, tid_offset=tid, tsc=TSC)
                data = self.run_cases([
                    Case(vaddr, registers(self.pick), window)
                    for vaddr, window in self.at_windows(spec, place)])
                pid, = struct.unpack_from("<Q", data, 8)
                found = [(shard, record) for shard in range(64)
                         for record in records(data, place, spec, shard)]
                self.assertEqual(len(found), 6)
                for shard, (_, tsc, tid_, cpu, _, _, values) in found:
                    self.assertEqual((tid_, cpu), (pid, shard))
                    self.assertEqual(values[:3], (pid, pid, shard))
                    self.assertEqual(values[3], values[4])
                    late = TSC[1] + (tsc * TSC[0] >> 32) - values[3]
                    self.assertLess(abs(late), 10**6)

    def fill(self, policy, n_slots, n, **more):
        spec = x86.Spec("trace", values=parse("arg0"), policy=policy,
                        n_slots=n_slots)
        place = self.page.place(spec)._replace(**more)
        bodies_ = self.at_windows(spec, place)
        cases = []
        for number in range(n):
            vaddr, window = self.pick.choice(bodies_)
            cases.append(Case(vaddr, registers(self.pick, rdi=number),
                              window))
        data = self.run_cases(cases)
        found = [each[6][0] for each in records(data, place, spec)]
        return found, words(data, place, x86.HEAD_SIZE, 2)

    def test_drop_keeps_the_first_and_counts_the_others(self):
        self.assertEqual(self.fill("drop", 16, 50),
                         (list(range(16)), (16, 34)))

    def test_overwrite_keeps_the_last(self):
        self.assertEqual(self.fill("overwrite", 16, 50),
                         (list(range(34, 50)), (50, 0)))

    def test_block_drops_at_once_where_no_tracer_lives(self):
        self.assertEqual(self.fill("block", 16, 20,
                                   tracer=bodies.DATA + 0x700),
                         (list(range(16)), (16, 4)))

    def test_a_slot_that_another_writes_is_given_up(self):
        spec = x86.Spec("trace", values=parse("arg0"), n_slots=4)
        for policy in "drop", "overwrite":
            for state, is_taken in ((1, False), (3, False), (2, False),
                                    (1 << 40, False), (0, True)):
                with self.subTest((policy, state)):
                    self.page = Page(1 << 20)
                    spec = spec._replace(policy=policy)
                    place = self.page.place(spec)
                    struct.pack_into(
                        "<Q", self.page.data, 0x1000 + place.block
                        + x86.HEAD_SIZE + x86.RING_SLOTS, state)
                    vaddr = self.page.add(spec, place, WINDOW)
                    data = self.run_cases([Case(
                        vaddr, registers(self.pick), WINDOW)])
                    after, = words(data, place, x86.HEAD_SIZE
                                   + x86.RING_SLOTS, 1)
                    self.assertEqual(after, 2 if is_taken else state)

    def test_the_stack_is_copied_with_the_registers_that_unwinding_needs(
            self):
        spec = x86.Spec("trace", values=parse("arg0"), n_slots=8,
                        stack_size=8192)
        place, layout = self.page.place(spec), x86.block_layout(spec)
        cases = []
        for vaddr, window in self.at_windows(spec, place, 6):
            cases.append(Case(vaddr, registers(self.pick), window))
        data = self.run_cases(cases)
        size = bodies.STACK_TOP - SP
        stack = bytes(a * 37 & 255 for a in range(SP, bodies.STACK_TOP))
        for n, case in enumerate(cases):
            at = layout.start + x86.RING_SLOTS + n * layout.entry_size \
                + layout.stack_offset
            copied, = words(data, place, at, 1)
            regs = words(data, place, at + 8, 7)
            self.assertEqual(regs, tuple(
                case.regs[x86.REGISTERS.index(name)]
                for name in x86.STACK_REGISTERS))
            self.assertEqual(copied, size)
            raw = words(data, place, at + 64, copied // 8)
            self.assertEqual(struct.pack("<%dQ" % len(raw), *raw), stack)


class Frames(Runs):

    def model(self, n_steps, when=None, n_frames=64, n_stacks=6):
        """Random entries and exits against a dict by rsp."""
        spec = x86.Spec("sum", values=parse("arg0 * 3 + ret", True),
                        keys=parse("arg3 & 3", True), is_exit=True,
                        n_frames=n_frames)
        entry = x86.entry_spec(spec)._replace(
            when=when and x86.parse_expression(when))
        place = self.page.place(spec)
        at = 0x200000
        place = place._replace(frames=bodies.SHARDS + at)
        entries = self.at_windows(entry, place)
        exits = self.at_windows(spec, place)
        frames, cases = {}, []
        counts, sums, calls = (collections.Counter(), collections.Counter(),
                               collections.Counter())
        for _ in range(n_steps):
            sp = SP - 16 * self.pick.randrange(n_stacks)
            if self.pick.random() < 0.5:
                vaddr, window = self.pick.choice(entries)
                a, c = self.pick.getrandbits(20), self.pick.getrandbits(20)
                cases.append(Case(vaddr, registers(
                    self.pick, rdi=a, rcx=c, rsp=sp), window))
                counts["abandoned"] += sp in frames
                frames.pop(sp, None)
                if when and "//" in when and not c & 1:
                    counts["faults"] += 1
                elif when and not a > 1 << 19:
                    counts["skipped"] += 1
                else:
                    frames[sp] = a, c
            else:
                vaddr, window = self.pick.choice(exits)
                ret = self.pick.getrandbits(30)
                cases.append(Case(vaddr, registers(
                    self.pick, rax=ret, rsp=sp), window))
                if sp in frames:
                    a, c = frames.pop(sp)
                    sums[c & 3] += a * 3 + ret
                    calls[c & 3] += 1
                else:
                    counts["unmatched"] += 1
        data = self.run_cases(cases)
        found, payloads = table(data, place, spec)
        left = sum(1 for n in range(n_frames + 3) if struct.unpack_from(
            "<Q", data, 0x1000 + at + n * x86.frames_layout(entry)[0])[0])
        return spec, place, data, counts, sums, calls, payloads, left, frames

    def test_exits_find_the_arguments_of_their_own_entry(self):
        for when in (None, "arg0 > 1 << 19",
                     "100 // (arg3 & 1) and arg0 > 1 << 19"):
            with self.subTest(when):
                self.setUp()
                (spec, place, data, counts, sums, calls, payloads, left,
                 frames) = self.model(400, when)
                self.assertEqual({key[0]: payload[:2] for key, payload
                                  in payloads.items()},
                                 {key: (calls[key], sums[key])
                                  for key in calls})
                self.assertEqual(words(data, place, 0, 6), (
                    counts["faults"], 0, counts["unmatched"],
                    counts["abandoned"], 0, counts["skipped"]))
                self.assertEqual(left, len(frames))

    def test_entries_equal_timed_plus_lost_plus_unfinished(self):
        """A table far too small for so many stacks."""
        (spec, place, data, counts, sums, calls, payloads, left,
         _) = self.model(600, None, n_frames=2, n_stacks=40)
        timed = sum(payload[0] for payload in payloads.values())
        _, _, unmatched, abandoned, crowded, _ = words(data, place, 0, 6)
        n_entries = 600 - unmatched - timed
        self.assertGreater(crowded, 0)
        self.assertEqual(n_entries, timed + abandoned + crowded + left)

    def test_elapsed_is_the_time_between(self):
        spec = x86.Spec("hist", values=parse("elapsed", True), is_exit=True,
                        when=parse("elapsed >= 0 and ret != 1", True)[0])
        entry = x86.entry_spec(spec)
        self.assertEqual(entry.kept, ())
        place = self.page.place(spec, tsc=TSC)._replace(
            frames=bodies.SHARDS + 0x200000)
        cases = []
        for (a, wa), (b, wb) in zip(self.at_windows(entry, place, 20),
                                    self.at_windows(spec, place, 20)):
            cases.append(Case(a, registers(self.pick), wa))
            cases.append(Case(b, registers(self.pick, rax=len(cases) % 3),
                              wb))
        data = self.run_cases(cases)
        total, least, most, buckets = histogram(data, place, x86.HEAD_SIZE,
                                                False)
        n = sum(case.regs[0] != 1 for case in cases[1::2])
        self.assertEqual(sum(buckets.values()), n)
        self.assertGreater(least, 10)
        self.assertLess(total, 10**9)


    def test_an_exit_records_what_the_entry_was_given(self):
        """Strings and stack arguments of the entry, under a condition and
        a policy that take all the registers there are."""
        self.page.data[0x800:0x808] = b"entered\0"
        spec = x86.Spec("trace", values=parse(
            "str(arg0, 16), arg3, s32(ret), elapsed, arg7, nsecs, "
            "u8[arg0 + 1] // arg5", True), is_exit=True, n_slots=64,
            when=parse("ret != 5 and u8[arg0] != 0x7a", True)[0],
            policy="block")
        entry = x86.entry_spec(spec)
        self.assertEqual(entry.kept, ("arg0", "arg3", "arg5", "arg7"))
        place = self.page.place(spec, tsc=TSC, frames=bodies.SHARDS
                                + 0x200000, tracer=bodies.DATA + 0x60)
        cases, wanted = [], []
        arg7 = int.from_bytes(bytes(
            a * 37 & 255 for a in range(SP + 16, SP + 24)), "little")
        for (a, wa), (b, wb) in zip(self.at_windows(entry, place, 40),
                                    self.at_windows(spec, place, 40)):
            pointer = self.pick.choice((bodies.DATA + 0x800, 0))
            c, divisor = self.pick.getrandbits(40), self.pick.randrange(2)
            ret = self.pick.choice((5, 7, 0xfffffffe))
            cases.append(Case(a, registers(
                self.pick, rdi=pointer, rcx=c, r9=divisor), wa))
            cases.append(Case(b, registers(self.pick, rax=ret), wb))
            if ret != 5 and pointer:
                wanted.append((64 * (not divisor), b"entered", c,
                               {7: 7, 0xfffffffe: MASK - 1}[ret], arg7,
                               ord("n") * divisor))
        data = self.run_cases(cases)
        found = [(record[5],) + record[6][:3] + (record[6][4],
                                                 record[6][6])
                 for record in records(data, place, spec)]
        self.assertEqual(found, wanted)
        faults = sum(1 for a, b in zip(cases[::2], cases[1::2])
                     if not a.regs[7] and b.regs[0] != 5)
        self.assertEqual(words(data, place, 0, 3), (faults, 0, 0))


class Stacks(Runs):

    # Offsets of frames from rsp, as each points to the next; then how many
    # of the return addresses are found.
    CHAINS = """
        40 80 c0 100 140 180 1c0 0 | 6 | no more than the depth
        40 f00 1000 1f00 5f00 0    | 5 | through other pages
        40 38 80 0                 | 1 | downwards
        40 40 0                    | 1 | to itself
        40 85 0                    | 1 | not aligned
        f78 1078 0                 | 2 | from the last word of a page
        -40 0                      | 0 | below rsp
        40 7000000000000000 0      | 1 | to what is not mapped
        7fffffffffffffc0 0         | 0 | bad from the start
    """

    def test_frames_are_walked_upwards_and_only_where_they_can_be_read(self):
        page, caller = self.page, 0xca11e4
        spec = x86.Spec("stack", depth=7, n_entries=64)
        inside = spec._replace(is_inside=True, depth=6)
        places = page.place(spec), page.place(inside)
        bodies_ = [self.at_windows(each, place, 3)
                   for each, place in zip((spec, inside), places)]
        wanted, wanted_inside = (collections.Counter(),
                                 collections.Counter())
        cases, at = [], 0x200000
        for line in self.CHAINS.strip().splitlines():
            chain, n, _ = line.split("|")
            sp = bodies.SHARDS + at + 0x80
            frames = [sp + int(word, 16) for word in chain.split()]
            struct.pack_into("<Q", page.data, at + 0x1080, caller)
            for frame, after in zip(frames, frames[1:]):
                if sp - 0x80 <= frame < sp + 0x8000:
                    struct.pack_into("<QQ", page.data,
                                     frame - bodies.DATA,
                                     after * (after != sp), frame + 1)
            returns = [frame + 1 for frame in frames[:int(n)]]
            wanted[tuple((([caller] + returns) + [0] * 7)[:7])] += 3
            wanted_inside[tuple((returns + [0] * 6)[:6])] += 3
            for vaddr, window in bodies_[0] + bodies_[1]:
                cases.append(Case(vaddr, registers(
                    self.pick, rbp=frames[0], rsp=sp), window))
            at += 0x10000
        data = self.run_cases(cases)
        self.assertEqual(table(data, places[0], spec)[0], wanted)
        self.assertEqual(table(data, places[1], inside)[0], wanted_inside)


def value_of(i, thread):
    """As in targets/storm.c."""
    value = i * 2654435761 + thread * 40503
    return value % 5000 - 2000


class Hostile(Runs):

    def test_random_bytes_in_a_block_never_fault_or_hang_a_body(self):
        """What another process wrote there is only ever data."""
        specs = [
            x86.Spec("hist", values=parse("arg0")),
            x86.Spec("sum", keys=parse("arg0"), values=parse("arg1")),
            x86.Spec("count", keys=parse("arg0, arg1, str(arg2)")),
            x86.Spec("trace", values=parse("arg0, str(arg1)"), n_slots=8),
            x86.Spec("trace", values=parse("arg0"), n_slots=8,
                     policy="overwrite"),
            x86.Spec("hist", values=parse("elapsed", True), is_exit=True,
                     n_frames=8)]
        specs.append(x86.entry_spec(specs[-1]))
        cases = []
        for spec in specs:
            for _ in range(4):
                place = self.page.place(spec, tsc=TSC)._replace(
                    frames=bodies.SHARDS + 0x300000)
                size = x86.block_layout(spec).size
                for at in range(0x1000 + place.block,
                                0x1000 + place.block + size, 8):
                    struct.pack_into("<Q", self.page.data, at,
                                     self.pick.choice((
                                         0, 1, MASK, SP, 16, self.pick.
                                         getrandbits(64))))
                for vaddr, window in self.at_windows(spec, place, 3):
                    cases += [Case(vaddr, registers(self.pick), window)] * 4
        for at in range(0x301000, 0x302000, 8):
            struct.pack_into("<Q", self.page.data, at,
                             self.pick.choice((0, 1, SP, MASK)))
        self.run_cases(cases)


class WaysBack(unittest.TestCase):
    """A thread in the middle of a trampoline can be put back to its site.

    The judge: the CPU, stepped through each body in a process of ours.
    """

    SITE_NOP = bytes.fromhex("0f1f440000")

    def specs(self):
        """(spec, what its place needs)"""
        late = x86.Spec("hist", values=parse("elapsed", True), is_exit=True,
                        keys=parse("str(arg5), arg2", True), n_entries=16)
        for spec in (
                x86.Spec("count"),
                x86.Spec("count", when=parse("arg0 > 3 and s32(arg1) < 0")[0]),
                x86.Spec("sum", values=parse("arg0 * 3 // (arg1 & 7)")),
                x86.Spec("hist", values=parse("arg2")),
                x86.Spec("hist", keys=parse("arg0 & 3, str(arg5)"),
                         values=parse("u32[arg5]"), n_entries=16),
                x86.Spec("count", keys=parse("str(arg5, 64)"), n_entries=16,
                         when=parse("arg0 % 3")[0]),
                x86.Spec("trace", values=parse("arg0, str(arg5), nsecs"),
                         n_slots=8),
                x86.Spec("trace", values=parse("arg0"), n_slots=2,
                         policy="block"),
                x86.Spec("trace", stack_size=512, policy="overwrite",
                         n_slots=8),
                x86.Spec("stack", depth=5, n_entries=16), late,
                x86.entry_spec(late), x86.Spec("call", timeout_ns=10**6),
                x86.Spec("call", is_exit=True, timeout_ns=10**6),
                x86.Spec("call", when=parse("arg0 % 3")[0],
                         timeout_ns=10**6)):
            yield spec

    def calls(self, page):
        """Slots of calls, all free, with an owner who does not answer."""
        at = 0x341000 + page.n_calls * 0x11000
        page.n_calls += 1
        struct.pack_into("<I", page.data, at, 4242)
        for n in range(x86.N_CALLS):
            struct.pack_into("<I", page.data, at + x86.CALL_SIZE * (1 + n),
                             x86.CALL_FREE)
        return bodies.DATA + at

    def trampoline(self, page, spec, window):
        """(vaddr, code, copies) of a trampoline, put into the page."""
        place = page.place(spec, tsc=TSC, frames=bodies.SHARDS + 0x300000,
                           tracer=bodies.DATA + 0x60,
                           calls=spec.action == "call" and self.calls(page))
        insns = x86.decode_all(self.SITE_NOP, bodies.CODE + len(page.code))
        page.code += self.SITE_NOP + b"\xff\x25" + struct.pack(
            "<i", bodies.LANDING - (bodies.CODE + len(page.code) + 11))
        window = window._replace(site=insns[0].vaddr, insns=tuple(insns))
        made = x86.trampoline(window, bodies.CODE + len(page.code),
                              [(spec, place)])
        page.code += made.code
        return window, made

    def test_at_each_instruction_the_site_s_state_can_be_had(self):
        page, pick, made, cases = Page(1 << 22), random.Random(5), {}, []
        struct.pack_into("<I", page.data, 0x60, 1)      # somebody who waits
        page.n_calls = 0
        for spec in self.specs():
            for window in WINDOW, ALL_DEAD, a_window(pick):
                window, code = self.trampoline(page, spec, window)
                made[code.vaddr] = spec, window, code, x86.ways_back(
                    code, self.SITE_NOP, window.site)
                cases += [Case(code.vaddr, registers(
                    pick, arg5=pick.choice((bodies.CODE, 0)), rbp=SP + 64),
                    window, 0x202 | pick.getrandbits(12) & x86.ALL_FLAGS)
                    for _ in range(3)]
        seen = collections.Counter()
        for case, regs, rip, flags, stack in page.step(cases):
            spec, window, code, ways = made[case.vaddr]
            if not code.vaddr <= rip < code.vaddr + len(code.code):
                continue
            if spec.action == "call" and rip not in ways:
                seen["half answered"] += 1  # there a thread is awaited
                continue
            self.check(case, window, code, ways, regs, rip, flags, stack)
            self.assertEqual(spec.action == "call" and rip in ways,
                             rip in ways and ways[rip].is_asking)
            seen[spec.action] += 1
        few = seen.pop("half answered")
        self.assertEqual(set(seen), set(x86.ACTIONS))
        self.assertGreater(min(seen.values()), 200)
        self.assertLess(few, seen["call"] // 4)

    def check(self, case, window, code, ways, regs, rip, flags, stack):
        copy, = code.copies
        if rip - code.vaddr == copy.moved + copy.moved_size:
            return              # the way back: nothing to undo

        def read(vaddr, size):
            at = vaddr - (SP - bodies.STEP_STACK)
            self.assertLessEqual(0, at)
            return stack[at:at + size]
        back = x86.undone(self.regset(regs, rip, flags), ways[rip], read)
        names = dict(zip(judge.REGS, struct.unpack("<27Q", back)))
        self.assertEqual(names["rip"], window.site)
        for n, name in enumerate(judge.GPRS):
            if not window.dead_regs >> n & 1:
                self.assertEqual(names[name], case.regs[n], name)
        mask = 0x400 | (0 if window.flags_dead else x86.ALL_FLAGS)
        self.assertEqual(names["eflags"] & mask, case.flags & mask)

    def regset(self, regs, rip, flags):
        named = dict(zip(judge.GPRS, regs), rip=rip, eflags=flags)
        return struct.pack("<27Q", *[named.get(name, 0)
                                     for name in judge.REGS])


class Storms(unittest.TestCase):
    """Threads, signals, migrations, fork and a reader, all at once."""

    N_THREADS, N_CALLS, N_SLOTS = 6, 20000, 512
    CALLER_SAVED = WINDOW._replace(dead_regs=0x0f03, flags_dead=True)

    def storm(self, policy, window, n_shards):
        page = Page(1 << 20, n_shards)
        specs = [
            x86.Spec("count"), x86.Spec("hist", values=parse("arg0")),
            x86.Spec("sum", keys=parse("arg0 % 97"), values=parse("arg1")),
            x86.Spec("count", keys=parse("arg0 & 7, arg2"), n_entries=4096),
            x86.Spec("trace", values=parse(
                "arg0, arg1, arg2, arg0 * 31 + arg1 * 7 + arg2"),
                policy=policy, n_slots=self.N_SLOTS),
            x86.Spec("count", when=parse("arg0 > 17 and arg1 % 3 == 0")[0])]
        parts = [(spec, page.place(spec, tracer=bodies.DATA + 0x60))
                 for spec in specs]
        vaddr = page.add_function(parts, window)
        layout = x86.block_layout(specs[4])
        ring = parts[4][1].block + layout.start
        numbers, data = page.storm(
            vaddr, 0, self.N_THREADS, self.N_CALLS, ring, layout.entry_size,
            self.N_SLOTS, n_shards, page.shards.shift, policy)
        hits = collections.Counter()
        for thread in list(range(self.N_THREADS)) + [99]:
            for i in range(self.N_CALLS):
                hits[value_of(i, thread), i, thread] += 1
        for i in range(numbers[0]):
            hits[value_of(i, 98), i, 98] += 1
        self.assertGreater(numbers[0], 50)
        return hits, numbers, data, parts, n_shards

    def totals(self, data, parts, n, offset, n_shards, count=1):
        return [sum(column) for column in zip(*[
            words(data, parts[n][1], offset, count, shard)
            for shard in range(n_shards)])]

    def check(self, policy, window, n_shards=1):
        """One storm, judged. -> (hits, those that found the ring full)"""
        hits, numbers, data, parts, n_shards = self.storm(policy, window,
                                                          n_shards)
        total = sum(hits.values())
        self.assertEqual(self.totals(data, parts, 0, 0, n_shards), [total])
        self.assertEqual(
            self.totals(data, parts, 5, 0, n_shards),
            [sum(n for (value, i, _), n in hits.items()
                 if value > 17 and i % 3 == 0)])
        sums, least, most, buckets = 0, [], [], collections.Counter()
        for shard in range(n_shards):
            place = parts[1][1]._replace(
                block=parts[1][1].block + (shard << parts[1][1].shards.shift))
            if sum(histogram(data, place, x86.HEAD_SIZE, False)[3].values()):
                one = histogram(data, place, x86.HEAD_SIZE, False)
                sums, least = sums + one[0], least + [one[1]]
                most.append(one[2])
                buckets.update(one[3])
        self.assertEqual(sums, sum(v * n for (v, _, _), n in hits.items()))
        self.assertEqual((min(least), max(most)), (
            min(v for v, _, _ in hits), max(v for v, _, _ in hits)))
        wanted = collections.Counter()
        for (value, _, _), n in hits.items():
            b = x86.bucket_index(abs(value))
            wanted[~b if value < 0 else b] += n
        self.assertEqual(buckets, wanted)
        self.check_tables(hits, data, parts, n_shards)
        _, accepted, torn, twice = numbers[:4]
        reserved, full = self.totals(data, parts, 4, x86.HEAD_SIZE, n_shards,
                                     2)
        self.assertEqual((torn, twice), (0, 0))
        self.assertEqual(reserved + full, total)
        self.assertLessEqual(accepted, reserved)
        self.assertGreater(accepted, 1000)
        if policy != "overwrite":       # nobody was killed in mid-record
            self.assertGreaterEqual(accepted, reserved * 0.98)
        return total, full

    def check_tables(self, hits, data, parts, n_shards):
        for n, key in ((2, lambda v, i, t: (v % 97,)),
                       (3, lambda v, i, t: (v & 7, t))):
            wanted, sums = collections.Counter(), collections.Counter()
            for (value, i, thread), count in hits.items():
                wanted[key(value, i, thread)] += count
                sums[key(value, i, thread)] += i * count
            spec, place = parts[n]
            layout = x86.block_layout(spec)
            found, seen = collections.Counter(), collections.Counter()
            n_keys = (layout.payload_offset - x86.ENTRY_KEYS) // 8
            for shard in range(n_shards):
                for entry in range(layout.n_entries):
                    at = layout.start + entry * layout.entry_size
                    row = words(data, place, at, layout.entry_size // 8,
                                shard)
                    if row[0]:
                        self.assertEqual(row[0], x86.table_tag(
                            row[1:1 + n_keys], n_keys == 1))
                        found[row[1:1 + n_keys]] += row[1 + n_keys]
                        if n == 2:
                            seen[row[1:2]] += row[3]
            self.assertEqual(found, wanted)
            self.assertEqual(n == 2 and seen or sums, sums)
            self.assertEqual(self.totals(
                data, parts, n, x86.HEAD_DROPPED, n_shards), [0])

    # With one shard for all processors each hit is as if its thread had
    # been moved to another between two instructions.

    def test_nothing_is_lost_or_torn_where_a_full_ring_drops(self):
        self.check("drop", self.CALLER_SAVED)

    def test_nothing_is_lost_or_torn_where_a_full_ring_is_overwritten(self):
        self.check("overwrite", WINDOW)

    def test_nothing_is_lost_or_torn_where_a_full_ring_waits(self):
        for _ in range(5):      # a hit waits 100 ms; the reader, for a CPU
            total, full = self.check("block", self.CALLER_SAVED)
            if full < total // 50:
                break
        self.assertLess(full, total // 50)

    def test_nothing_is_lost_or_torn_with_a_shard_for_each_processor(self):
        n_cpus = max(2, os.sysconf("SC_NPROCESSORS_CONF"))
        self.check("drop", WINDOW, 1 << (n_cpus - 1).bit_length())

    def test_frames_are_told_apart_by_recursion_longjmp_and_signals(self):
        page = Page(1 << 20, 2)
        spec = x86.Spec("sum", values=parse("arg0 * 1000 + ret", True),
                        keys=parse("arg2", True), is_exit=True,
                        n_frames=1024)
        entry = x86.entry_spec(spec)
        at = bodies.SHARDS + (2 << page.shards.shift)
        page.data += bytes(x86.frames_layout(entry)[1] + 4096)
        place = page.place(spec, frames=at)
        hit = page.add_function([(x86.Spec("count"), page.place(
            x86.Spec("count")))], WINDOW)
        call = page.add_function([
            (entry, place), b"\x48\x83\xec\x08",      # sub $8, %rsp
            b"\xff\x14\x25" + struct.pack("<i", bodies.DATA + 0x40),
            b"\x48\x83\xc4\x08", (spec, place)], WINDOW)
        numbers, data = page.storm(hit, call, 6, 8000, 0, 0, 0, 2, 0,
                                   "drop")
        _, _, _, _, called, returned, jumped = numbers
        self.assertGreater(jumped, 100)
        heads = self.totals(data, [(spec, place)], 0, 0, 2, 6)
        self.assertEqual(heads[0:3] + heads[4:6], [0] * 5)
        left = sum(struct.unpack_from("<Q", data, at - bodies.DATA + n * 32)
                   [0] != 0 for n in range(1024 + 3))
        timed, total = 0, 0
        for shard in range(2):
            _, payloads = table(data, place._replace(
                block=place.block + (shard << page.shards.shift)), spec)
            timed += sum(row[0] for row in payloads.values())
            total += sum(row[1] for row in payloads.values())
        self.assertEqual(timed, returned)
        self.assertEqual(called, timed + heads[3] + left)
        wanted = 0
        for thread in range(6):
            for i in range(0, 8000, 8):
                is_jump = thread & 1 and i % 7 == 3 and i % 5 >= 2
                for depth in range(i % 5 + 1):
                    wanted += 0 if is_jump else depth * 1010
        self.assertEqual(total, wanted)


class Code(unittest.TestCase):

    SPECS = """
        count  | | |                    | arg0 > 5 and u8[arg1] == 2
        count  | arg0, str(arg1) | |    | arg0 // arg1
        sum    | caller | arg0 * arg2   |
        hist   | | arg0 << arg1         |
        hist   | tid, pid, cpu | nsecs  |
        trace  | | arg0, str(arg1), buf(arg2, arg3), arg6, nsecs | arg1 % 7
    """

    def specs(self):
        for line in self.SPECS.strip().splitlines():
            parts = [part.strip() for part in line.split("|")]
            action, keys, values, when = (parts + [""])[:4] \
                if len(parts) == 4 else (parts[0], parts[1], parts[2],
                                         parts[-1])
            yield x86.Spec(action, when=parse(when)[0] if when else None,
                           keys=parse(keys) if keys else (),
                           values=parse(values) if values else ())
        late = x86.Spec("hist", values=parse("elapsed", True),
                        keys=parse("str(arg1), arg2", True), is_exit=True)
        yield late
        yield x86.entry_spec(late)
        yield x86.Spec("stack", depth=20)
        yield x86.Spec("trace", stack_size=4096, policy="overwrite")

    PLACE = x86.Place(x86.Shards(x86.CPU_FROM_RSEQ, -64, 7, 16, 0x20000000),
                      0, 3, 0x20000008, 0x20001000, 0x2d0, TSC, 0x20000100)

    def test_objdump_reads_every_byte_of_a_body(self):
        for spec in self.specs():
            for window in WINDOW, ALL_DEAD:
                code = x86.body(spec, self.PLACE, window, 0x10000000)
                with self.subTest((spec.action, len(code))):
                    self.check_listing(code)

    def check_listing(self, code):
        """Whole instructions; jumps to their beginnings; no x87, SSE, AVX,
        pushf or popf; no write but to our data and below rsp."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(code)
            file.flush()
            listing = subprocess.run(
                ["objdump", "-D", "-bbinary", "-mi386:x86-64", "-w",
                 "--adjust-vma=0x10000000", file.name],
                stdout=subprocess.PIPE, check=True).stdout.decode()
        starts, targets, size = set(), set(), 0
        for line in listing.splitlines():
            match = re.match(r"\s*([0-9a-f]+):\t([0-9a-f ]+)\t(.*)", line)
            if not match:
                continue
            at, raw, text = match.groups()
            starts.add(int(at, 16))
            size += len(raw.split())
            self.assertNotRegex(text, r"\(bad\)|xmm|ymm|\bst\b|pushf|popf")
            jump = re.match(r"j\w+ +0x([0-9a-f]+)", text)
            if jump:
                targets.add(int(jump.group(1), 16))
        self.assertEqual(size, len(code))
        self.assertLessEqual(targets - {0x10000000 + len(code)}, starts)

    def test_a_body_has_one_size_at_every_address_and_place(self):
        other = self.PLACE._replace(
            block=0x7f0000, site_index=0x123456, private=0x30000008,
            frames=0x30001000, tid_offset=-8, tsc=((1 << 40) + 1, 1 << 63),
            tracer=0x2f000000)
        for spec in self.specs():
            for window in WINDOW, ALL_DEAD:
                sizes = {len(x86.body(spec, place, window, vaddr))
                         for place in (self.PLACE, other)
                         for vaddr in (0x10000000, 0x10000013, 0x40000000)}
                with self.subTest(spec.action):
                    self.assertEqual(len(sizes), 1)

    def test_several_bodies_share_a_site(self):
        """Each sees the site's registers, whatever those before it use."""
        page, pick = Page(1 << 16), random.Random(1)
        specs = [x86.Spec("hist", values=parse("arg0")),
                 x86.Spec("sum", values=parse("arg3"),
                          when=parse("arg2 > 5")[0]),
                 x86.Spec("count", keys=parse("arg1, ret", True)),
                 x86.Spec("trace", values=parse("arg0, arg1, arg2, arg3"))]
        parts = [(spec, page.place(spec)) for spec in specs[:3]]
        cases, vaddr = [], bodies.CODE
        for window in [a_window(pick) for _ in range(8)]:
            made = x86.trampoline(window._replace(insns=(
                x86.decode(b"\x90", 0x1000),)), vaddr, parts)
            copy, = made.copies
            self.assertEqual(made.code[copy.moved], 0x90)
            code = bytearray(made.code)
            # Instead of the jump back: to where the child goes on.
            code[copy.moved:copy.moved + 6] = b"\xff\x25" + struct.pack(
                "<i", bodies.LANDING - (vaddr + copy.moved + 6))
            cases += [Case(vaddr, registers(
                pick, rdi=n, rsi=n % 3, rdx=n, rcx=n * n, rax=n), window)
                for n in range(20)]
            page.code += code
            vaddr += len(code)
        results, data = page.run(cases)
        self.assertEqual(set(results), {(0,) * 5})
        n = len(cases) // 20
        self.assertEqual(histogram(data, parts[0][1], x86.HEAD_SIZE,
                                   False)[0], 190 * n)
        self.assertEqual(words(data, parts[1][1], x86.HEAD_SIZE, 2), (
            14 * n, n * sum(i * i for i in range(6, 20))))
        self.assertEqual(dict(table(data, parts[2][1], specs[2])[0]),
                         {(i % 3, i): n for i in range(20)})

    def test_go_code_gets_no_stack_beyond_the_red_zone(self):
        place = self.PLACE._replace(can_stack=False)
        simple = x86.Spec("hist", values=parse("arg0"))
        code = x86.body(simple, place, WINDOW, 0x10000000)
        self.assertNotIn(x86.lea_rsp_disp(-128), code)
        with self.assertRaises(x86.UbpError):
            x86.body(x86.Spec("sum", values=parse("u8[arg0]")), place,
                     WINDOW, 0x10000000)

    def test_a_spec_that_asks_for_too_much_is_refused(self):
        one, = parse("arg0")
        for spec in (
                x86.Spec("sums"), x86.Spec("trace", policy="wait"),
                x86.Spec("hist"), x86.Spec("count", values=(one,)),
                x86.Spec("trace", values=(one,) * 17),
                x86.Spec("hist", values=parse("str(arg0)")),
                x86.Spec("count", when=parse("str(arg0)")[0]),
                x86.Spec("count", keys=parse("str(arg0, 64), str(arg1, 80)")),
                x86.Spec("stack"), x86.Spec("stack", depth=65),
                x86.Spec("trace", n_slots=1000),
                x86.Spec("count", keys=(one,), n_entries=1)):
            with self.subTest(spec):
                with self.assertRaises(x86.UbpError):
                    x86.block_layout(spec)

    def test_a_body_that_is_too_long_is_refused(self):
        text = "+".join("(arg0 // (arg1 + %d))" % n for n in range(40))
        spec = x86.Spec("trace", values=parse(text) * 4)
        with self.assertRaisesRegex(x86.UbpError, "bytes of code"):
            x86.body(spec, self.PLACE, WINDOW, 0x10000000)

    def test_what_a_place_lacks_is_refused_by_name(self):
        for text, lacks, word in (
                ("tid", {"tid_offset": None}, "tid"),
                ("nsecs", {"tsc": None}, "nsecs"),
                ("pid", {"private": 0}, "pid"),
                ("u8[arg0]", {"private": 0}, "memory")):
            spec = x86.Spec("sum", values=parse(text))
            with self.subTest(text):
                with self.assertRaises(x86.UbpError) as caught:
                    x86.body(spec, self.PLACE._replace(**lacks), WINDOW, 0)
                self.assertIn(word, str(caught.exception))


if __name__ == "__main__":
    unittest.main()
