"""The opcode maps and the decoder, judged by objdump and by the CPU."""
import gc
import os
import random
import unittest

import judge
import oracle
import ubp_x86 as x86
from quiet import quiet_seconds

FULL = os.environ.get("UBP_ORACLE") == "full"
SAMPLE = 2000000                       # instructions, without UBP_ORACLE=full

# bytes | size | what else: flow, ->target, rip=address, disp=/imm= offset+size
CASES = """
f7 0b 00 01 08 00                   | 6  | next imm=2+4
c4 03 81 48 cf e9                   | 6  | next imm=5+1
0f ff e9                            | 3  | trap
63 26                               | 2  | next
c4 e2 89 db 4c 8e bd                | -  | vvvv must not be used
c4 e2 f9 db 4c 8e bd                | 7  | next disp=6+1
66 0f 6f 05 01 00 00 00             | 8  | next rip=0x1009 disp=4+4
64 a1 11 22 33 44 55 66 77 88       | 10 | next disp=2+8
67 a1 11 22 33 44                   | 6  | next disp=2+4
66 48 05 11 22 33 44                | 7  | next imm=3+4
66 05 11 22                         | 4  | next imm=2+2
66 e9 00 00 00 00                   | -  | 66 before a near branch
66 74 00                            | -  | 66 before a near branch
66 c3                               | -  | 66 before a near branch
66 ff 25 00 00 00 00                | -  | 66 before a near branch
66 66 48 e8 01 00 00 00             | 8  | call ->0x1009
66 48 ff 15 01 00 00 00             | 8  | call_ind rip=0x1009
f3 67 66 36 0f 92 1d 01 00 00 00    | 11 | next rip=0x100c
67 89 05 f0 ef ff ff                | 7  | next rip=0xfffffff7
0f 1f 44 00 00                      | 5  | next disp=4+1
36 65 f0 f2 41 68 01 02 03 04       | -  | lock prefix not allowed here
f0 83 00 01                         | 4  | next imm=3+1
f0 83 c0 01                         | -  | lock prefix not allowed here
8f 00                               | 2  | next
8f e6                               | -  | no such instruction
8f e8 78 c2 ec 0e                   | 6  | next imm=5+1
8f ea 78 10 c1 01 02 03 04          | 9  | next imm=5+4
62 f1 7c 48 58 c1                   | 6  | next
62 f1 7c 48 58 05 01 00 00 00       | 10 | next rip=0x100b
62 f4 7c 08 01 c3                   | -  | prefixes that do not go together
d5 00 89 c3                         | -  | no such instruction
ea 01 02 03 04 05 06                | -  | no such instruction
06                                  | -  | no such instruction
f3 43                               | -  | the bytes end within it
48 66 90                            | 3  | next
48 41 90                            | 3  | next
e8 fb 0f 00 00                      | 5  | call ->0x2000
e8 fb ef ff ff                      | 5  | call ->0x0
e8 fa ef ff ff                      | 5  | call ->0xffffffffffffffff
eb fe                               | 2  | jmp ->0x1000
3e 75 10                            | 3  | jcc ->0x1013
f2 0f 84 00 01 00 00                | 7  | jcc ->0x1107
e3 10                               | 2  | loop ->0x1012
67 e3 10                            | 3  | loop ->0x1013
c7 f8 10 00 00 00                   | 6  | xbegin ->0x1016
c6 f8 01                            | 3  | next imm=2+1
c6 f9 01                            | -  | no such instruction
ff 24 25 00 00 00 00                | 7  | jmp_ind disp=3+4
3e ff e0                            | 3  | jmp_ind
ff 54 24 08                         | 4  | call_ind disp=3+1
ff 15 00 01 00 00                   | 6  | call_ind rip=0x1106
ff d8                               | -  | no such instruction
ff 18                               | 2  | far
f3 c3                               | 2  | ret
c2 08 00                            | 3  | ret imm=1+2
c8 10 00 00                         | 4  | next imm=1+3
0f 05                               | 2  | syscall
0f 34                               | 2  | far
cd 80                               | 2  | trap imm=1+1
cc                                  | 1  | trap
0f 0b                               | 2  | trap
f4                                  | 1  | halt
f3 0f 1e fa                         | 4  | next
48 b8 11 22 33 44 55 66 77 88       | 10 | next imm=2+8
66 b8 11 22                         | 4  | next imm=2+2
66 0f 78 c1 01 02                   | 6  | next imm=4+2
0f 0f c1 bf                         | 4  | next imm=3+1
0f 0f c1 00                         | -  | no such instruction
0f 20 c0                            | 3  | next
0f 20 00                            | 3  | next
0f 01 ca                            | 3  | next
0f 01 d7                            | 3  | far
8e c8                               | -  | no such instruction
c5 f8 77                            | 3  | next
c5 f1 ef c9                         | 4  | next
48 c5 f8 77                         | -  | prefixes that do not go together
66 c5 f8 77                         | -  | prefixes that do not go together
66 0f 38 17 c1                      | 5  | next
0f 38 17 c1                         | -  | no such instruction
f2 0f 38 f1 c1                      | 5  | next
0f 38 f1 c1                         | -  | no such instruction
04 25                               | 2  | next imm=1+1
8b 04 25 01 02 03 04                | 7  | next disp=3+4
8b 44 24 08                         | 4  | next disp=3+1
2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 90    | 15 | next
2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 90 | -  | longer than 15
2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 2e 05 01 02 03 04 | -  | longer than 15
"""

# The same for 32-bit code.
CASES_32 = """
06                                  | 1  | next
62 00                               | 2  | next
62 f1 7c 48 58 c1                   | 6  | next
c4 00                               | 2  | next
c5 00                               | 2  | next
c5 f8 77                            | 3  | next
ea 01 02 03 04 05 06                | 7  | far imm=1+6
66 ea 01 02 03 04                   | 6  | far imm=2+4
40                                  | 1  | next
a1 11 22 33 44                      | 5  | next disp=1+4
67 a1 11 22                         | 4  | next disp=2+2
67 8b 46 01                         | 4  | next disp=3+1
67 8b 06 01 02                      | 5  | next disp=3+2
8b 05 01 02 03 04                   | 6  | next disp=2+4
66 e9 01 02                         | 4  | jmp ->0x1205
e8 fb ef ff ff                      | 5  | call ->0x0
e8 fa ef ff ff                      | 5  | call ->0xffffffff
82 c0 01                            | 3  | next imm=2+1
d4 0a                               | 2  | next imm=1+1
"""

# bytes | reads | writes | flags read | flags written
REGISTER = ("rax rcx rdx rbx rsp rbp rsi rdi "
            "r8 r9 r10 r11 r12 r13 r14 r15").split()
FLAG = {"c": 0x001, "p": 0x004, "a": 0x010, "z": 0x040, "s": 0x080,
        "o": 0x800}
EFFECTS = """
31 c0               |             | rax     |     | cpazso
48 89 e5            | rsp         | rbp     |     |
55                  | rsp rbp     | rsp     |     |
41 5c               | rsp         | rsp r12 |     |
f3 0f 1e fa         |             |         |     |
0f 1f 44 00 00      |             |         |     |
90                  |             |         |     |
41 90               | rax r8      | rax r8  |     |
4c 8b 5c 24 08      | rsp         | r11     |     |
4a 8d 04 a3         | rbx r12     | rax     |     |
48 8d 05 00 00 00 00|             | rax     |     |
c1 e0 05            | rax         | rax     |     | cpazso
c1 e0 20            | rax         | rax     |     |
d3 e0               | rax rcx     | rax     |     |
84 e4               | rax rsp     |         |     | cpazso
0f b6 c4            | rax rsp     | rax     |     |
66 b8 01 00         |             |         |     |
11 d8               | rax rbx     | rax     | c   | cpazso
74 05               |             |         | z   |
7f 05               |             |         | zso |
0f 44 c3            | rax rbx     | rax     | z   |
c4 e2 f0 f2 c3      | rcx rbx     | rax     |     | czso
f2 0f 2c c0         |             | rax     |     |
c3                  | *           |         | *   |
ff e0               | *           |         | *   |
0f 05               | *           |         | *   |
"""


def rows(table):
    """Yield the stripped cells of each line of a table."""
    for line in table.strip().splitlines():
        yield [cell.strip() for cell in line.split("|")]


def describe(insn):
    """An Insn in the words of CASES, as a set."""
    words = {insn.flow}
    if insn.target is not None:
        words.add("->0x%x" % insn.target)
    if insn.rip_relative is not None:
        words.add("rip=0x%x" % insn.rip_relative)
    elif insn.disp_size:
        words.add("disp=%d+%d" % (insn.disp_offset, insn.disp_size))
    if insn.imm_size and insn.target is None:
        words.add("imm=%d+%d" % (insn.imm_offset, insn.imm_size))
    return words


def encodings(n_modrm, seed=1):
    """Yield 15 bytes for each opcode x mandatory prefix x some modrm."""
    rng = random.Random(seed)
    heads = [prefix + rex + escape for prefix in
             (b"", b"\x66", b"\xf3", b"\xf2") for rex in (b"", b"\x48")
             for escape in (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")]
    heads += [bytes((0xc4, 0xe0 | page, w | v << 3 | length << 2 | pp))
              for page in (1, 2, 3) for w in (0, 0x80) for v in (15, 14)
              for length in (0, 1) for pp in range(4)]
    tail = bytes.fromhex("24112233441122334455667788")
    for head in heads:
        for opcode in range(256):
            for _ in range(n_modrm):
                modrm = rng.choice((rng.randrange(0xc0, 0x100),
                                    rng.randrange(0xc0)))
                yield (head + bytes((opcode, modrm)) + tail)[:15]


def error_of(code, bits=64):
    """The text of the DecodeError that code raises, or None."""
    try:
        x86.decode(code, 0x1000, bits)
    except x86.DecodeError as error:
        return str(error)
    return None


class Cases(unittest.TestCase):

    def check(self, table, bits):
        for code, size, rest in rows(table):
            with self.subTest(code, bits=bits):
                code = bytes.fromhex(code)
                if size == "-":
                    self.assertIn(rest, str(error_of(code, bits)))
                    continue
                insn = x86.decode(code + b"\xcc", 0x1000, bits)
                self.assertEqual((insn.size, insn.code), (int(size), code))
                said = describe(insn)
                if "rip=" in rest and "disp=" in rest:
                    said.add("disp=%d+%d" % (insn.disp_offset,
                                             insn.disp_size))
                self.assertEqual(said, set(rest.split()))

    def test_64_bit_instructions_decode_as_the_manual_says(self):
        self.check(CASES, 64)

    def test_32_bit_instructions_decode_as_the_manual_says(self):
        self.check(CASES_32, 32)

    def test_every_truncation_raises_decode_error(self):
        for table, bits in ((CASES, 64), (CASES_32, 32)):
            for code, size, _ in rows(table):
                code = bytes.fromhex(code)
                for end in range(len(code) if size != "-" else 0):
                    with self.subTest(code[:end].hex(), bits=bits):
                        self.assertRegex(str(error_of(code[:end], bits)),
                                         "the bytes end within it|no bytes")

    def test_opcode_names_its_map(self):
        for code, opcode in (("89c3", 0x089), ("0fa2", 0x1a2),
                             ("660f3817c1", 0x217), ("c5f877", 0x1177),
                             ("62f17c4858c1", 0x2158),
                             ("8fe878c2ec0e", 0x38c2)):
            insn = x86.decode(bytes.fromhex(code), 0)
            self.assertEqual(insn.opcode, opcode, code)

    def test_decode_all_reads_on_to_the_end(self):
        code = bytes.fromhex("554889e5e8fbffffffc3")
        insns = x86.decode_all(code, 0x1000)
        self.assertEqual([insn.vaddr for insn in insns],
                         [0x1000, 0x1001, 0x1004, 0x1009])
        self.assertEqual(insns[2].target, 0x1004)
        self.assertEqual(b"".join(insn.code for insn in insns), code)
        with self.assertRaises(x86.DecodeError) as caught:
            x86.decode_all(code + b"\x06", 0x1000)
        self.assertEqual(caught.exception.vaddr, 0x100a)

    def test_effects_on_registers_and_flags(self):
        for code, *cells in rows(EFFECTS):
            with self.subTest(code):
                insn = x86.decode(bytes.fromhex(code), 0x1000)
                reads, writes = (
                    0xffff if cell == "*" else sum(
                        1 << REGISTER.index(name) for name in cell.split())
                    for cell in cells[:2])
                flags = [0x8d5 if cell == "*" else sum(
                    FLAG[letter] for letter in cell) for cell in cells[2:]]
                self.assertEqual(tuple(x86.effects(insn)),
                                 (reads, writes, flags[0], flags[1]))


class Tables(unittest.TestCase):

    def test_a_bad_row_is_named(self):
        for text, said in (("0 " + "E " * 15, "row 0 has 15 cells"),
                           ("1 " + "E " * 16, "row 1 has 16 cells"),
                           ("0-e " + "E " * 16, "240 cells, not 256")):
            with self.assertRaisesRegex(ValueError, said):
                x86.opcode_page(text)

    def test_every_page_has_256_cells_of_known_letters(self):
        known = set(". -- E M U S R Ib Iw Iz Iv Jb Jz O Ap Ibb Iwb EIb EIz "
                    "UIb UIz rex seg o16 a32 lck rep esc 3dn evx vx2 vx3 "
                    "xop".split())
        for name, text in x86.PAGES.items():
            cells = x86.opcode_page(text)
            self.assertEqual(len(cells), 256)
            self.assertLessEqual(set(cells), known, name)

    def test_every_row_belongs_to_a_map_and_is_checked(self):
        for text in (x86.PREFIXED, x86.GROUPS, x86.REGISTER_FORMS, x86.LIMITS,
                     x86.LOCKABLE, x86.FLOWS, x86.EFFECTS):
            for name in {row[0] for row in x86._lines(text)}:
                self.assertIn(name, x86.PAGES)
        for name in x86.PAGES:          # raises ValueError at a bad row
            for parse in (x86._parse_prefixed, x86._parse_groups,
                          x86._parse_register_forms, x86._parse_limits,
                          x86._parse_lockable, x86._parse_flows,
                          x86._parse_effects):
                parse(name)

    def test_the_trie_only_remembers(self):
        codes = list(encodings(1, seed=7))[::5]
        warm = [error_of(code) or x86.decode(code, 0x1000) for code in codes]
        for trie in x86._TRIES.values():
            trie.clear()
        for code, before in zip(codes[::-1], warm[::-1]):
            self.assertEqual(error_of(code) or x86.decode(code, 0x1000),
                             before)

    def test_heads_that_are_alike_have_the_forms_of_the_tables(self):
        """Each stem with some that differ in modrm.rm and sib only."""
        def read(how, code, *bits):
            try:
                return how(code, 0x1000, *bits)
            except x86.DecodeError as error:
                return str(error)
            except IndexError:
                return None             # the bytes end within the head

        rng = random.Random(9)
        stems = [prefix + rex + escape + bytes((opcode,)) for prefix in
                 (b"", b"\x66", b"\xf3", b"\xf2") for rex in (b"", b"\x48")
                 for escape in (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
                 for opcode in range(256)]
        stems += [bytes.fromhex(text) + bytes((rng.randrange(256),)) for text
                  in ("48 66", "66 2e", "f3 66 0f", "c5 f8", "62 f1 7c 48",
                      "c4 e2 79", "8f", "8f e9 78", "67 41", "f0 4c",
                      "64 48 0f") for _ in range(20)]
        split = {row[1][:2] for row in x86._lines(x86.REGISTER_FORMS)}
        x86._ALIKE.clear()
        n_alike = 0
        for stem in stems:
            modrm = rng.choice((rng.randrange(0xc0), rng.randrange(256)))
            modrms = [modrm & 0xf8 | rng.randrange(8) for _ in range(4)]
            if stem[-1:].hex() in split:
                modrms += rng.sample(range(0xc0, 0x100), 64)
            for modrm in modrms:
                code = (stem + bytes((modrm, rng.randrange(256)))
                        + bytes(12))[:rng.choice((15, 15, 4, 3, 2))]
                before = len(x86._ALIKE)
                found = read(x86._read_alike, code)
                n_alike += len(x86._ALIKE) == before and type(found) is tuple
                wanted = read(x86._read_form, code, 64)
                if wanted is None and type(found) is tuple:
                    self.assertGreater(found[0].size, len(code), code.hex())
                else:
                    self.assertEqual(found, wanted, code.hex())
        self.assertGreater(n_alike, 4000)

    def test_hostile_code_does_not_fill_memory(self):
        rng = random.Random(3)
        segments = bytes.fromhex("26 2e 36 3e 64 65")
        try:
            old, x86._MAX_FORMS = x86._MAX_FORMS, 500
            for _ in range(3000):
                x86.decode(bytes(rng.choice(segments) for _ in range(9))
                           + b"\x90", 0)
                self.assertLessEqual(x86._N_FORMS[64], 500)
        finally:
            x86._MAX_FORMS = old


class Fuzz(unittest.TestCase):

    def test_random_bytes_raise_nothing_but_decode_error(self):
        rng = random.Random(2)
        n_good = 0
        for n in range(60000):
            code = rng.getrandbits(8 * 16).to_bytes(16, "little")
            code = code[:rng.randrange(17)]
            for bits in (64, 32):
                try:
                    insn = x86.decode(code, n, bits)
                except x86.DecodeError:
                    continue
                n_good += 1
                self.assertEqual(insn.code, code[:insn.size])
        self.assertGreater(n_good, 30000)

    def test_a_decode_reads_nothing_behind_the_instruction(self):
        rng = random.Random(4)
        for code in list(encodings(1, seed=4))[::3]:
            try:
                insn = x86.decode(code, 0x1000)
            except x86.DecodeError:
                continue
            self.assertEqual(x86.decode(insn.code, 0x1000), insn)
            self.assertIn("the bytes end within it",
                          str(error_of(insn.code[:rng.randrange(
                              1, insn.size)])) if insn.size > 1 else
                          "the bytes end within it")


class Oracle(unittest.TestCase):

    def test_oracle_objdump_agrees_on_every_instruction(self):
        n = 0
        for path in oracle.libraries():
            most = None if FULL else min(SAMPLE - n, SAMPLE // 4)
            if most == 0:
                break
            n_here, _, found = oracle.compare(path, most)
            n += n_here
            self.assertEqual(found[:20], [], path)
        self.assertGreaterEqual(n, 100000)

    def test_32_bit_code_as_objdump_reads_it(self):
        """Code of 64 bits, taken for 32: all there is, by chance."""
        for path in oracle.libraries()[:2]:
            n, _, found = oracle.compare_32(path, 60000)
            self.assertGreater(n, 50000)
            self.assertEqual(found[:9], [], path)
        for byte in range(0x40, 0x50):          # inc and dec, to the end
            self.assertEqual(x86.decode(bytes([byte]), 0, 32).size, 1)
        with self.assertRaises(x86.DecodeError):        # ymm16 and more
            x86.decode(bytes.fromhex("62e1fd20dbc4"), 0, 32)

    def test_oracle_allowed_differences_tell_who_is_right_and_why(self):
        for who, code, text, why in oracle.ALLOWED:
            self.assertIn(who, ("ubp", "objdump", "both", "neither"))
            self.assertGreater(len(why), 20)


# What a CPU runs though the manual does not define it: we refuse. (Besides,
# AMD ignores VEX.W where Intel's manual wants one value.)
UNDOCUMENTED = """
1b  d9 dc dd de df      aliases of x87 instructions
1b  70-7f c2-c3 e0-e3 e8-e9 eb ff c7  66 before a near branch
0f  80-8f               66 before a near branch
"""
# Not to be run: they leave the judge's hands, wait, or are emulated by the
# kernel (sldt, smsw under UMIP), or 0f 01 speaks to a hypervisor.
NOT_RUN = """
1b  8e cc cd ce cf f1
0f  00 01 05 07 34 35
"""
# Opcodes that every x86-64 CPU has, whatever its features.
BASELINE_LACKS = """
1b  c4-c6 c7 62 8f
0f  01 0b 0e-0f 1a-1b 37 78-79 a6-a7 aa ae b8-b9 c7 ff 05 20 22 f0
0f  7c-7d d0
"""


def opcode_set(table):
    """Parse `page numbers... reason` rows into a set of opcodes."""
    found = set()
    for line in table.strip().splitlines():
        page, *words = line.split()
        for word in words:
            try:
                found.update(x86.MAP_NUMBERS[page] << 8 | byte
                             for byte in x86._numbers(word))
            except ValueError:
                break
    return found


def opcode_of(code):
    """The opcode at the head of one of encodings(), defined or not."""
    at = 0
    while code[at] in x86._PREFIX_BITS or code[at] >> 4 == 4:
        at += 1
    if code[at] == 0xc4:
        return 0x1000 | (code[at + 1] & 31) << 8 | code[at + 3]
    if code[at] != 0x0f:
        return code[at]
    if code[at + 1] in (0x38, 0x3a):
        return (2 if code[at + 1] == 0x38 else 3) << 8 | code[at + 2]
    return 0x100 | code[at + 1]


class Cpu(unittest.TestCase):
    """Single steps at the end of a page that is followed by none."""

    def step(self, codes):
        """Reply for each of codes, placed to end where memory ends."""
        regs = dict.fromkeys(judge.GPRS, 0x10000)
        regs.update(rsp=judge.STACK_MIDDLE, rcx=1)
        return judge.run([
            judge.request([(judge.LOW_END - len(code), code)],
                          judge.LOW_END - len(code), regs, True)
            for code in codes])

    def test_the_cpu_takes_as_many_bytes_and_refuses_what_we_refuse(self):
        not_run, baseline = opcode_set(NOT_RUN), opcode_set(BASELINE_LACKS)
        undocumented = opcode_set(UNDOCUMENTED)
        codes, sizes = [], []
        for code in list(encodings(1))[::1 if FULL else 3]:
            if opcode_of(code) not in not_run:
                codes.append(code)
                sizes.append(0 if error_of(code) else
                             x86.decode(code, 0).size)
        whole = self.step(codes)
        exact = self.step([code[:size] for code, size in zip(codes, sizes)
                           if size])
        short = self.step([code[:size - 1] for code, size
                           in zip(codes, sizes) if size])
        pairs = zip(exact, short)
        for code, size, reply in zip(codes, sizes, whole):
            opcode = opcode_of(code)
            pair = next(pairs) if size else ()
            if reply.signal == judge.SIGILL:
                if size and opcode not in baseline and opcode < 0x200:
                    self.fail("%s: #UD, we decode it" % code.hex())
                continue
            if not size:
                self.assertTrue(opcode in undocumented or "W must be"
                                in error_of(code), "%s runs" % code.hex())
                continue
            # A fetch beyond the page's end: the byte was needed.
            needs_more = [r.signal == judge.SIGSEGV and
                          r.address == judge.LOW_END for r in pair]
            self.assertEqual(needs_more, [False, True], "%s is not %d bytes"
                             % (code.hex(), size))

    def test_the_cpu_reads_and_writes_what_effects_say(self):
        rng = random.Random(6)
        base = {name: rng.getrandbits(63) for name in judge.GPRS}
        base.update(rsp=judge.STACK_MIDDLE, rdx=3, rcx=2, rax=5,
                    rsi=judge.DATA_MIDDLE, rdi=judge.DATA_MIDDLE + 64)
        insns = [insn for insn in map(self.plain, encodings(1, seed=5))
                 if insn]
        insns = insns if FULL else rng.sample(insns, min(400, len(insns)))
        requests, plan = [], []
        for insn in insns:
            for change in self.changes(x86.effects(insn), base):
                regs = dict(base, eflags=0x202)
                regs.update(change)
                plan.append((insn, change))
                requests.append(judge.request(
                    [(judge.LOW, insn.code)], judge.LOW, regs, True))
        first = None
        for (insn, change), reply in zip(plan, judge.run(requests)):
            if not change:
                first = reply
            elif first.signal == reply.signal == judge.SIGTRAP:
                self.compare(insn, change, first, reply)

    def plain(self, code):
        """The Insn of code if effects() know it and it touches no memory."""
        if error_of(code) or opcode_of(code) in opcode_set(NOT_RUN):
            return None
        insn = x86.decode(code, judge.LOW)
        if (insn.flow != x86.NEXT or 0 <= insn.modrm < 0xc0
                or x86.effects(insn).reads == 0xffff
                or insn.opcode == 0x131):          # rdtsc: never the same
            return None
        return insn

    def changes(self, effects, base):
        """Yield the registers to change: none, each unread one, flags."""
        yield {}
        for number, name in enumerate(judge.GPRS):
            if not effects.reads >> number & 1 and name != "rsp":
                yield {name: base[name] ^ 0x5a5a5a5a5a5a5a5a}
        for bit in FLAG.values():
            if not effects.flags_read & bit:
                yield {"eflags": 0x202 | bit}

    def compare(self, insn, change, first, reply):
        """An unread register must not matter; a written one must vanish."""
        (name, value), = change.items()
        effects = x86.effects(insn)
        text = "%s with %s=0x%x" % (insn.code.hex(), name, value)
        for other in judge.GPRS:
            if other != name:
                self.assertEqual(reply.regs[other], first.regs[other], text)
        was, now = first.regs["eflags"], reply.regs["eflags"]
        if name == "eflags":
            bit = value & x86.ALL_FLAGS
            self.assertEqual((was ^ now) & ~bit, 0, text)
            if effects.flags_written & bit:
                self.assertEqual((was ^ now) & bit, 0, text)
        else:
            self.assertEqual(was, now, text)
            if effects.writes >> judge.GPRS.index(name) & 1:
                self.assertEqual(reply.regs[name], first.regs[name], text)


class Speed(unittest.TestCase):

    def test_libc_decodes_at_250_000_instructions_a_second(self):
        if not oracle.libraries():
            self.skipTest("no library in the places that oracle.py knows")
        vaddr, code = oracle.text_section(oracle.libraries()[0])
        gc.disable()
        try:
            seconds, insns = quiet_seconds(
                lambda: x86.decode_all(code, vaddr), 5)
        finally:
            gc.enable()
        print("%d instructions a second" % (len(insns) / seconds))
        self.assertGreater(len(insns) / seconds, 250000)


if __name__ == "__main__":
    unittest.main()
