"""Windows: which bytes a jump may overwrite, and which rule forbids it.

The judges: tables of bytes, the labels that cc itself prints for a switch,
and every branch that objdump sees in whole libraries.
"""
import bisect
import collections
import glob
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import unittest

import ubp_x86 as x86

BASE = 0x10000
GOAL = 0.999            # of the functions of five bytes or more

# A module in hex at 0x10000. `<` begins a function, `>` ends it (padding up
# to the next `<` is its own), `@` is the site, `!` an entry of the function,
# `L` behind `<` says it has an LSDA, =N goes on at offset N, over int3s.
# Then the window, as site+size, number of displaced instructions and slot,
# all offsets in hex, or the rule that refuses it.
CASES = """
five bytes in one     | <@ b801000000 c3 >                   | 0+5 1
whole instructions    | <@ 55 4889e5 4157 c3 >               | 0+6 3
an offset as site     | < 55 @ 4889e5 4157 c3 >              | 1+5 2
jump back to the site | <@ 85c0 7405 ebfa 90 90 90 90 c3 >   | 0+6 3
not an instruction    | < 55 48 @ 89e5 4157 c3 >             | no instruction
endbr64 stays         | <@ f30f1efa 55 4889e5 53 c3 >        | 4+5 3
endbr64, then a ret   | <@ f30f1efa c3 > 90 90 90 90         | 4+5 1
loop behind endbr64   | <@ f30f1efa 4883ef01 85ff 75f8 c3 >  | branch behind endbr64
unknown instruction   | <@ b801000000 06 c3 >                | unknown instruction
66 jump, hazard 17    | <@ b801000000 66e900000000 c3 >      | unknown instruction
cut off               | <@ b801000000 e900 >                 | unknown instruction

call as last          | <@ 55 e800000000 5d c3 >             | 0+6 2
call before the last  | <@ ffd0 4889e5 c3 >                  | call not last
call *mem not last    | <@ ff10 85c0 85d2 c3 >               | call not last
int3 reports itself   | <@ cc b801000000 c3 >                | trap
ud2 reports itself    | <@ 0f0b b801000000 c3 >              | trap

loop into the window  | <@ 55 ffc7 85ff 75fa c3 >            | branch into window
behind it is fine     | <@ 4883ec08 85ff 85ff 75fc c3 >      | 0+6 2
from a neighbour      | <@ 55 4889e5 53 c3 >    < ebf9 >     | branch into window
from .cold, hazard 17 | <@ 55 4889e5 53 c3 >=40 < 85c0 74bd e9b8ffffff > | branch into window
.cold, jcc rel32      | <@ 55 4889e5 53 c3 >=40 < 0f84bbffffff c3 > | branch into window
.cold, call           | <@ 55 4889e5 53 c3 >=40 < e8bcffffff c3 > | branch into window
.cold, xbegin         | <@ 55 4889e5 53 c3 >=40 < c7f8bbffffff c3 > | branch into window
unknown bytes' branch | <@ 55 4889e5 53 c3 >=40  e9bcffffff  | branch into window
within an immediate   | <@ 55 4889e5 53 c3 >=40 < b8e9bbffff ff c3 > | 0+5 3
                      ; refuted? the bytes e9 bb ff ff ff at 41 lead to 1
in a function unknown | <@ 55 4889e5 53 c3 >=40 < b8e9bbffff ff06 06 > | branch into window
into a lock prefix    | <@ 7401 f00fb10f c3 > 90             | branch into window
site after lock       | < 7401 @ f00fb10f 85c0 c3 > 90       | branch into window
a symbol inside       | <@ 55 ! 4889e5 53 c3 >               | entry in window
a symbol at its end   | <@ 55 4889e5 53 ! c3 >               | 0+5 3

crosses a page        | =ffd <@ 55 4889e5 53 c3 >            | crosses a page
up to the border      | =ffb <@ 55 4889e5 53 c3 >            | ffb+5 3
tail beyond it        | =ff9 <@ 55 48b80000000000000000 c3 > | ff9+b 2

ret and padding       | <@ c3 > 90 90 90 90                  | 0+5 1
long nop as padding   | <@ 31c0 c3 > 66900f1f00              | 0+5 2
int3 as padding       | <@ 31c0 c3 > cccc                    | 0+5 2
too little padding    | <@ 31c0 c3 > 90 < c3 >               | too short
padding is entered    | <@ 31c0 c3 > 9090 < ebfd c3 >        | branch into window
falls into the nops   | <@ 31c0 31d2 > 0f1f00 < c3 >         | 0+7 3
falls into int3       | <@ 31c0 31d2 > cc < c3 >             | too short
other bytes behind    | <@ 31c0 c3 > 0000 < c3 >             | too short

ladder: own padding   | <@ 31c0 85c0 75fc c3 > 9090909090    | 0+2 1 7
ladder: one before    | < c3 > 9090909090 <@ 31c0 c3 > <c3>  | 6+2 1 1
ladder: one after     | <@ 31c0 c3 > < c3 > 9090909090       | 0+2 1 4
ladder: page border   | =ffd <@ 31c0 c3 > < c3 > 90909090909090 | too short
ladder: not fallen in | <@ 31c0 c3 > < 85c0 > 9090909090 < c3 > | too short
ladder: one byte      | <@ 50 85c0 75fc c3 > 9090909090      | branch into window
ladder: slot entered  | <@ 31c0 c3 > < c3 > 9090909090 < ebfc > | too short
ladder: far           | <@ 31c0 c3 > < c3 >=83 < c3 > 9090909090 <c3> | 0+2 1 4
ladder: 127 on        | <@ 31c0 c3 > < ffe0 ff20 0f0b >=80 < c3 > 9090909090 <c3> | 0+2 1 81

unknown jmp, entry    | <@ 55 4889e5 53 ffe0 >               | 0+5 3
unknown jmp, later    | < 55 @ 4889e5 4157 ffe0 >            | unresolved jump table
one instruction       | < 55 @ b801000000 ffe0 >             | 1+5 1
slot to the GOT       | < 55 @ 4889e5 4157 ff2500000000 >    | 1+5 2

memory under an LSDA  | <L@ 488b07 85c0 c3 >                 | may fault
rsp under an LSDA     | <L@ 488b4424 08 c3 >                 | 0+5 1
lea under an LSDA     | <L@ 488d4708 4889c2 c3 >             | 0+7 2
div under an LSDA     | <L@ 4889f8 f7f1 c3 >                 | may fault
rseq section          | <@ 55 4889e5 53 c3 0fb93d53300553 c3 > | rseq section
rseq is registered    | <@ 55 4889e5 53 41ba53300553 c3 >    | 0+5 3
"""


class Module:
    """The bytes of a case, the functions in them, and the site."""

    def __init__(self, text, shift=0):
        self.code, self.site, functions = bytearray(), None, []
        tokens = re.findall(r"=[0-9a-f]+|[0-9a-f]{2}|[<>@!L]", text)
        for token in tokens:
            here = BASE + shift + len(self.code)
            if token == "<":
                functions.append([here, None, (), False])
            elif token == ">":
                functions[-1][1] = here - functions[-1][0]
            elif token == "L":
                functions[-1][3] = True
            elif token == "@":
                self.site = here
            elif token == "!":
                functions[-1][2] += (here,)
            elif token[0] == "=":
                self.code += b"\xcc" * (int(token[1:], 16) - len(self.code))
            else:
                self.code.append(int(token, 16))
        self.vaddr, self.code = BASE + shift, bytes(self.code)
        self.functions = [
            x86.Function(vaddr, size, self.read(vaddr, (
                functions[place + 1][0] if place + 1 < len(functions)
                else self.vaddr + len(self.code)) - vaddr), entries, has_lsda)
            for place, (vaddr, size, entries, has_lsda)
            in enumerate(functions)]
        self.data = {}

    def read(self, vaddr, size):
        if vaddr < self.vaddr:
            return None
        return self.code[vaddr - self.vaddr:][:size] or None

    def function_at(self, vaddr):
        for function in self.functions:
            if 0 <= vaddr - function.vaddr < len(function.code):
                return function
        return None

    def scan(self):
        return x86.BranchScan([(self.vaddr, self.code)], self.function_at,
                              self.read)

    def plan(self, **limits):
        return x86.plan_window(self.function_at(self.site), self.site,
                               self.scan(), **limits)


def shown(window):
    text = "%x+%x %d" % (window.site - BASE, window.size, len(window.insns))
    return text + (" %x" % (window.slot - BASE) if window.slot else "")


def plan_text(module, **limits):
    try:
        return shown(module.plan(**limits))
    except x86.RefusalError as refusal:
        return refusal.rule


class RulesTest(unittest.TestCase):

    def test_each_case_has_its_window_or_its_rule(self):
        for line in CASES.splitlines():
            line = line.split(";")[0].strip()
            if not line:
                continue
            name, code, expected = [part.strip() for part in line.split("|")]
            with self.subTest(name):
                self.assertEqual(plan_text(Module(code)), expected)

    def test_a_refusal_names_the_bytes_and_their_vaddr(self):
        with self.assertRaises(x86.RefusalError) as caught:
            Module("<@ ffd0 4889e5 c3 >").plan()
        self.assertIn("ffd0 at 0x10000", str(caught.exception))
        self.assertEqual(caught.exception.vaddr, BASE)

    def test_bytes_of_another_patch_are_not_taken(self):
        module = Module("< 55 4889e5 @ 53 31c0 31d2 c3 >")
        for low, high, expected in (
                (0, 5, "overlaps a patch"), (7, 8, "overlaps a patch"),
                (4, 5, "overlaps a patch"), (0, 4, "4+5 3"),
                (9, 14, "4+5 3")):
            taken = x86.ByteRanges([(BASE + low, BASE + high)])
            self.assertEqual(plan_text(module, taken=taken), expected)

    def test_two_sites_do_not_share_a_slot(self):
        first = Module("<@ 31c0 c3 > < 31c0 c3 > < c3 > 9090909090 90909090")
        second = Module("< 31c0 c3 > <@ 31c0 c3 > < c3 > 9090909090 90909090")
        taken = x86.ByteRanges()
        window = first.plan(taken=taken)
        self.assertEqual(shown(window), "0+2 1 7")
        for low, high in window.ranges:
            taken.add(low, high)
        self.assertEqual(plan_text(second, taken=taken), "too short")

    def test_forbidden_ranges_refuse_with_their_reason(self):
        module = Module("<@ 55 4889e5 53 c3 >")
        forbidden = [(BASE + 4, BASE + 9, "cancellation point")]
        self.assertEqual(plan_text(module, forbidden=forbidden),
                         "cancellation point")
        forbidden = [(BASE + 5, BASE + 9, "cancellation point")]
        self.assertEqual(plan_text(module, forbidden=forbidden), "0+5 3")

    def test_a_syscall_is_displaced_only_without_a_filter(self):
        module = Module("<@ 31c0 0f05 85c0 c3 >")
        self.assertEqual(plan_text(module), "0+6 3")
        self.assertEqual(plan_text(module, seccomp=True),
                         "syscall under seccomp")

    def test_loads_stay_where_a_handler_may_look(self):
        module = Module("<@ 488b07 85c0 c3 >")
        self.assertEqual(plan_text(module), "0+5 2")
        self.assertEqual(plan_text(module, catches_faults=True), "may fault")

    def test_a_loop_to_the_site_is_told(self):
        self.assertTrue(Module("<@ 4883ef01 85ff 75f8 c3 >").plan().is_loop)
        module = Module("<@ 4883ec08 85ff 85ff 75fc c3 >")
        self.assertFalse(module.plan().is_loop)
        self.assertFalse(Module("<@ 4883ef01 e8f7ffffff c3 >").plan().is_loop)

    def test_without_function_at_every_candidate_counts(self):
        module = Module("<@ 55 4889e5 53 c3 >=40 < b8e9bbffff ff c3 >")
        scan = x86.BranchScan([(module.vaddr, module.code)])
        with self.assertRaises(x86.RefusalError) as caught:
            x86.plan_window(module.functions[0], module.site, scan)
        self.assertEqual(caught.exception.rule, "branch into window")

    def test_an_rseq_descriptor_forbids_its_section_only(self):
        # lea [rip+rseq_cs]; the section; signature; abort; struct rseq_cs
        code = ("< 488d0d39000000 @ 31c0 31d2 85c0 > =20 0fb93d53300553"
                " < c3 > =40")
        module = Module(code)
        for start, size, expected in ((7, 6, "rseq section"),
                                      (0xb, 2, "7+2 1 28"),
                                      (0xd, 2, "7+6 3")):
            module.code = module.code[:0x40] + struct.pack(
                "<IIQQQ", 0, 0, BASE + start, size, BASE + 0x27)
            self.assertEqual(plan_text(module), expected)


def brute_force(segments):
    """Yield (source, target) of the rel32 branches at each offset."""
    for vaddr, code in segments:
        for at in range(len(code) - 4):
            if code[at] in (0xe8, 0xe9):
                size = 1
            elif code[at:at + 2] == b"\xc7\xf8" or (
                    code[at] == 0x0f and code[at + 1] & 0xf0 == 0x80):
                size = 2
            else:
                continue
            end = at + size + 4
            if end <= len(code):
                yield vaddr + at, vaddr + end + int.from_bytes(
                    code[end - 4:end], "little", signed=True)


class BranchScanTest(unittest.TestCase):

    def test_table_and_stream_find_the_same(self):
        code = b""
        for place in range(3000):           # no two alike, over four blocks
            code += struct.pack("<Q", place * 0x9e3779b97f4a7c15 % 2**64)
            code += (b"\xe8", b"\xe9", b"\x0f\x8f", b"\xc7\xf8")[place % 4]
            code += struct.pack("<i", (place * 7919) % 200000 - 100000)
            code += b"\xcc" * 70
        segments = [(0x400000, code), (0x600000, code[:1000])]
        every = sorted(brute_force(segments), key=lambda pair: pair[1])
        table = x86.BranchScan(segments)
        table._table = table._build()
        n_found = 0
        for low, size in ((0, 4), (0x8000, 0x400), (0xfff0, 0x20),
                          (0x20000, 0x1000), (len(code) - 9, 99)):
            low, high = 0x400000 + low, 0x400000 + low + size
            judged = sorted(pair for pair in every if low <= pair[1] < high)
            fresh = x86.BranchScan(segments)
            self.assertEqual(sorted(fresh.far(low, high)), judged)
            self.assertEqual(sorted(table.far(low, high)), judged)
            n_found += len(judged)
        self.assertGreater(n_found, 20)

    def test_into_finds_every_form_at_every_distance(self):
        target = 0x500000
        for code, size in ((b"\xe8", 4), (b"\xe9", 4), (b"\x0f\x80", 4),
                           (b"\x0f\x8f", 4), (b"\xc7\xf8", 4), (b"\xeb", 1),
                           (b"\x70", 1), (b"\x7f", 1), (b"\xe0", 1),
                           (b"\xe3", 1)):
            for distance in (-128, -127, -4, 0, 4, 126, 127) + (
                    (-0x12345, 0x23456, 0x700000, -0x400000)
                    if size == 4 else ()):
                end = target - distance
                start = end - size - len(code)
                text = code + distance.to_bytes(size, "little", signed=True)
                segments = [(start, text), (0x10000000, b"\x90")]
                self.assertEqual(
                    x86.BranchScan(segments).into(target, target + 1),
                    [(start, target)], (text.hex(), distance))

    def test_ranges_merge_and_answer(self):
        ranges = x86.ByteRanges([(10, 15), (20, 25), (0, 5)])
        self.assertEqual(list(ranges), [(0, 5), (10, 15), (20, 25)])
        self.assertIsNone(ranges.overlap(5, 10))
        self.assertEqual(ranges.overlap(4, 6), (0, 5))
        self.assertEqual(ranges.overlap(24, 99), (20, 25))
        ranges.add(14, 21)
        self.assertEqual(list(ranges), [(0, 5), (10, 25)])


# -- Liveness: code | dead registers among the sixteen | flags dead.

LIVENESS = """
everything at a ret  | c3                                |         | no
add kills flags      | 4801c8 c3                         |         | yes
cmp then jcc         | 39c8 7400 c3                      |         | yes
jcc reads flags      | 7400 39c8 c3                      |         | no
inc keeps CF         | ffc0 c3                           |         | no
mov kills its target | b801000000 c3                     | 0       | no
32 bits kill 64      | 89c8 c3                           | 0       | no
8 bits do not        | 88c8 c3                           |         | no
16 bits do not       | 6689c8 c3                         |         | no
xor is no read       | 31c0 c3                           | 0       | yes
read before written  | 4889c1 b801000000 c3              | 1       | no
both ways kill       | 85c0 7408 31c9 ba00000000 c3 31c9 c3 | 1    | yes
one way reads        | 85c0 7403 31c9 c3 89c8 c3         |         | yes
a call reads all     | e800000000 31c0 c3                |         | no
cmov may not write   | 0f44c1 c3                         |         | no
push reads           | 50 31c0 c3                        |         | yes
a loop               | 31c9 ffc1 81f900010000 75f6 31d2 c3 | 1 2     | yes
rsp never            | 4889ec c3                         |         | no
jmp out              | 31c0 e900010000                   | 0       | yes
jmp reg reads all    | ffe0                              |         | no
"""


class LivenessTest(unittest.TestCase):

    def test_table(self):
        for line in filter(None, LIVENESS.splitlines()):
            name, code, dead, flags = [p.strip() for p in line.split("|")]
            code = bytes.fromhex(code.replace(" ", ""))
            analysis = x86.analyse(x86.Function(BASE, len(code), code))
            with self.subTest(name):
                mask, flags_dead = x86.liveness(analysis, BASE)
                self.assertEqual(
                    [reg for reg in range(16) if mask >> reg & 1],
                    [int(reg) for reg in dead.split()])
                self.assertEqual(flags_dead, flags == "yes")

    def test_work_is_bounded(self):
        code = b"\x85\xc0\x0f\x84\x00\x00\x00\x00" * 20000 + b"\xc3"
        analysis = x86.analyse(x86.Function(BASE, len(code), code))
        start = time.process_time()
        for _ in range(50):
            x86.liveness(analysis, BASE)
        self.assertLess(time.process_time() - start, 1)
