"""Stacks: call frame information, walks, names of frames.

The judges: readelf, row by row; the CPU, which executes programs step by
step while each call and return is noted; gdb and glibc's backtrace().
UBP_TEST_ALL=1 compares every row of LIBRARIES and steps further;
`test_stacks.py cost` prints what a walk takes.
"""
import collections
import ctypes
import glob
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

import live
import ubp
import ubp_x86
from build import build

IS_ALL = bool(os.environ.get("UBP_TEST_ALL"))
MUSL = "/usr/lib/x86_64-linux-musl/musl-gcc.specs"
STACK = 64 << 10                # bytes of stack that are copied
N_STEPS = 1000000 if IS_ALL else 0
PTRACE_SINGLESTEP = 9           # <linux/ptrace.h>
LIBRARIES = """
/lib/x86_64-linux-gnu/libc.so.6            /lib64/libc.so.6
/lib64/ld-linux-x86-64.so.2                /lib/x86_64-linux-gnu/libgcc_s.so.1
/usr/lib/x86_64-linux-gnu/libstdc++.so.6   /usr/lib64/libstdc++.so.6
/usr/lib/x86_64-linux-gnu/libcrypto.so.3   /usr/bin/redis-server
/usr/bin/python3  /usr/bin/node  /usr/lib/gcc/x86_64-linux-gnu/*/cc1
""".split()
NAMES = ("rax rdx rcx rbx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 "
         "ra").split()


def elf_of(path):
    return ubp.Elf(ubp.FileImage(os.open(path, os.O_RDONLY)),
                   os.path.basename(path))


def readelf_rows(path):
    """Yield (low, high, {vaddr: (cfa, {register: rule})}) of each FDE."""
    process = subprocess.Popen(
        ["readelf", "--debug-dump=frames-interp", "-W", path],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    low, high, rows, columns = 0, 0, None, []
    for line in process.stdout:
        words = line.decode().split()
        bounds = re.search(rb" FDE .*pc=([0-9a-f]+)\.\.([0-9a-f]+)", line)
        if bounds or b" CIE " in line:
            if rows is not None:
                yield low, high, rows
            rows = {} if bounds else None
            if bounds:
                low, high = (int(text, 16) for text in bounds.groups())
        elif words[:1] == ["LOC"]:
            columns = words[2:]
        elif rows is not None and re.match(rb"[0-9a-f]{16} ", line):
            cells = [word for word in words[2:] if word[0] != "("]
            rows[int(words[0], 16)] = words[1], {
                name: cell for name, cell in zip(columns, cells)
                if name in NAMES and cell not in ("u", "s")}
    if rows is not None:
        yield low, high, rows
    process.stdout.close()
    process.wait()


def shown_rule(kind, value):
    """A rule as readelf prints it."""
    return {"offset": "c%+d", "val_offset": "v%+d", "register": "r%d"}.get(
        kind, {"expression": "exp%.0s", "val_expression": "vexp%.0s"}.get(
            kind)) % value


def own_rows(frame):
    """The rows of a CallFrame in readelf's words."""
    return {row.vaddr: (
        "exp" if row.cfa[0] is None else
        "%s%+d" % (NAMES[row.cfa[0]], row.cfa[1]),
        {NAMES[register]: shown_rule(*rule)
         for register, rule in row.rules.items() if rule[0] != "undefined"})
        for row in ubp.cfa_rows(frame)}


class Rows(unittest.TestCase):
    """The rows of .eh_frame against readelf's."""

    def test_rows_are_those_that_readelf_prints(self):
        paths = [path for text in LIBRARIES for path in glob.glob(text)]
        if not paths:
            self.skipTest("none of LIBRARIES is here")
        for path in sorted(set(map(os.path.realpath, paths))):
            if not IS_ALL and os.path.getsize(path) > 3 << 20:
                continue
            with self.subTest(path):
                self.compare(path, 1 if IS_ALL else 16)

    def test_rows_in_memory_are_those_of_the_file(self):
        """What is left of a file that can no longer be opened."""
        file = next(m for m in ubp.modules(os.getpid())
                    if "libc" in m.name and m.unwind.starts)
        maps = [m for m in ubp.read_maps(os.getpid())
                if file.is_mapped_from(m.path)]
        unwind = ubp.Unwind(ubp.Elf(ubp.MemoryImage(os.getpid(), maps), "x"))
        self.assertEqual(file.unwind.starts, unwind.starts)
        for start in unwind.starts[::50]:
            self.assertEqual(file.unwind.call_frame(start),
                             unwind.call_frame(start))

    def compare(self, path, stride):
        unwind = ubp.Unwind(elf_of(path))
        n_rows = 0
        for index, (low, high, rows) in enumerate(readelf_rows(path)):
            if index % stride and low % 7:
                continue
            frame = unwind.call_frame(low)
            self.assertIsNotNone(frame, "no frame at 0x%x" % low)
            self.assertEqual((low, high), (
                frame.fde.vaddr, frame.fde.vaddr + frame.fde.size))
            found = own_rows(frame)
            if rows:                    # readelf leaves single rows out
                self.assertEqual(rows, found, "at 0x%x" % low)
            n_rows += len(found)
        self.assertGreater(n_rows, 10)


# ---- a judge that steps ---------------------------------------------------
def registers_of(tid):
    data = ctypes.create_string_buffer(ubp_x86.REGS_SIZE)
    iov = ubp.Iovec(ctypes.addressof(data), ubp_x86.REGS_SIZE)
    ubp.ptrace(ubp.PTRACE_GETREGSET, tid, ubp.NT_PRSTATUS,
               ctypes.addressof(iov))
    return data.raw


def read_stack(pid, rsp, size=STACK):
    """The copy that a trampoline would make: up to the stack's end."""
    end = next((m.end for m in ubp.read_maps(pid)
                if m.start <= rsp < m.end), rsp)
    return ubp.read_beginning(pid, rsp, min(size, end - rsp))


class Stepper:
    """Executes a target instruction by instruction and keeps its truth.

    truth   [(rsp that ends it, address, is interrupted)]: return addresses
            as calls pushed them, taken off when rsp rises above them
    """

    def __init__(self, target):
        self.pid, self.truth, self.code = target.pid, [], {}
        ubp.ptrace(ubp.PTRACE_SEIZE, self.pid)
        ubp.ptrace(ubp.PTRACE_INTERRUPT, self.pid)
        self._wait()
        self.code_map = ubp.CodeMap(self.pid, ubp.modules(self.pid))
        self.unwinder = ubp.Unwinder(self.pid, self.code_map)
        self._read_registers()
        self.stack_end = next(m.end for m in ubp.read_maps(self.pid)
                              if m.path == "[stack]")

    def _wait(self):
        """The status of the next stop, or None when it has exited."""
        pid, status = os.waitpid(self.pid, 0x40000000)
        return None if os.WIFEXITED(status) or os.WIFSIGNALED(
            status) else status

    def _read_registers(self):
        self.regs = registers_of(self.pid)
        self.rip = ubp_x86.program_counter(self.regs)
        self.rsp = ubp_x86.stack_pointer(self.regs)

    def _flow(self):
        if self.rip not in self.code:
            data = ubp.read_memory(self.pid, self.rip, 15)
            insn = ubp_x86.decode(data, self.rip)
            self.code[self.rip] = insn.flow, insn.size
        return self.code[self.rip]

    def is_on_main(self):
        return 0 <= self.stack_end - self.rsp < 1 << 23

    def is_in(self, path, vaddr):
        """Is rip at that vaddr, the file's?"""
        module = self.code_map.at(self.rip)
        return module.path == path and self.rip - module.bias == vaddr

    def named(self, addresses):
        symbols = ubp.Symbols(self.pid, self.code_map)
        return " < ".join("%x %s" % (vaddr, symbols.name(vaddr, n > 0).text)
                          for n, vaddr in enumerate(addresses))

    def step(self):
        """One instruction, or the entry of a signal handler. -> is alive."""
        flow, size = self._flow()
        rip, rsp, number = self.rip, self.rsp, 0
        while True:
            ubp.ptrace(PTRACE_SINGLESTEP, self.pid, 0, number)
            status = self._wait()
            if status is None:
                return False
            number = os.WSTOPSIG(status)
            self._read_registers()
            if number == signal.SIGTRAP:
                break
            rip, rsp, flow = self.rip, self.rsp, "signal"
        if flow == "signal":
            # The kernel has pushed a frame: restorer, then the context.
            restorer = struct.unpack("<Q", ubp.read_memory(
                self.pid, self.rsp, 8))[0]
            self.truth += [(self.rsp, rip, True),
                           (self.rsp, restorer, False)]
            self.other = rsp
            return True
        if flow in ("call", "call_ind"):
            self.truth.append((self.rsp, rip + size, False))
        self._drop()
        return True

    def _drop(self):
        """Frames whose place rsp has left: ret, longjmp, throw."""
        high = 0 <= self.stack_end - self.rsp < 1 << 23
        truth = self.truth
        while truth:
            slot = truth[-1][0]
            on_main = 0 <= self.stack_end - slot < 1 << 23
            interrupted = truth[-1][2]
            limit = slot + 8 if interrupted else slot
            if on_main == high:
                if limit < self.rsp:
                    truth.pop()
                    continue
            elif high:                  # it left the signal's own stack
                truth.pop()
                continue
            break

    def walk(self, size=STACK):
        """(Walk, the true addresses but for those of before)"""
        span = self.stack_end - self.rsp
        if not 0 <= span < 1 << 23:
            span = 4096
        stack = ubp.read_memory(self.pid, self.rsp, min(size, span))
        found = self.unwinder.walk(
            self.rip, ubp_x86.dwarf_registers(self.regs), self.rsp, stack)
        return found, (self.rip,) + tuple(
            address for _, address, _ in self.truth[::-1])


class Steps(unittest.TestCase):
    """Walks from every instruction that a program executes."""

    def follow(self, path, n_most, has_end=True):
        """Step through work(); -> (how many steps, {why: how many})."""
        ends, n, self.n_installing = {}, 0, 0
        with live.Target("", path=path, seconds=600) as target:
            stepper = Stepper(target)
            target.send("w")
            entry = live.symbol(path, "work")[0]
            while (stepper.rip ^ entry) & 0xfff or not stepper.is_in(
                    path, entry):
                self.assertTrue(stepper.step())
            stepper.truth, top = [], stepper.rsp
            base = stepper.walk()[0].addresses[1:]
            seen = collections.Counter()
            while n < n_most and (stepper.rsp <= top
                                  or not stepper.is_on_main()):
                seen[stepper.rip] += 1
                if IS_ALL or seen[stepper.rip] < 3:
                    walk, truth = stepper.walk()
                    ends[walk.why] = ends.get(walk.why, 0) + 1
                    self.check(stepper, walk, truth, base, has_end, n)
                self.assertTrue(stepper.step())
                n += 1
        self.assertGreater(n, 500)
        self.assertLess(self.n_installing, n / 100)
        return n, ends

    def check(self, stepper, walk, truth, base, has_end, n):
        """A walk that ended is all of the truth; any other begins it."""
        truth = whole = truth + base
        if has_end and self.is_installing(stepper, walk, truth):
            self.n_installing += 1
            return
        if has_end and stepper.is_on_main():
            if walk.why != ubp.END:
                self.fail(self.where(stepper, walk, n))
        if walk.why != ubp.END:
            truth = truth[:len(walk.addresses)]
        if truth != walk.addresses and self.is_jumping(stepper, walk, whole):
            return
        if truth != walk.addresses:
            self.fail("%s\nthe truth is %s" % (
                self.where(stepper, walk, n), stepper.named(truth)))

    def is_jumping(self, stepper, walk, whole):
        """Is it in glibc's __longjmp, which a stripped one does not name? It
        ends in jmp *%rdx. CFI there tells where that goes, not who called: a
        frame that called setjmp, and those below it."""
        name, rest = stepper.named(whole[:1]), walk.addresses[2:]
        return any(whole[n:n + len(rest)] == rest
                   for n in range(len(whole))) and (
            name.endswith(" __longjmp") or re.search(" 0x[0-9a-f]+$", name)
            and b"\xff\xe2" in ubp.read_memory(stepper.pid, whole[0], 64))

    def is_installing(self, stepper, walk, truth):
        """Is libgcc writing the catcher's registers over those that
        _Unwind_RaiseException has saved? Nobody can walk from there."""
        if walk.addresses == truth or "libgcc" not in stepper.code_map.at(
                stepper.rip).path:
            return False
        return "_Unwind_R" in stepper.named(truth[:2])

    def where(self, stepper, walk, n):
        return "step %d: %s %s" % (n, stepper.named(walk.addresses),
                                   walk.why)

    def test_code_without_frame_pointers(self):
        path = build("stacks", ("-fomit-frame-pointer",))
        n, ends = self.follow(path, N_STEPS or 20000)
        self.assertGreater(n, 5000)     # all of it
        # On another stack only the handler's frames are in the copy.
        self.assertLessEqual(set(ends), {ubp.END, ubp.TRUNCATED})

    def test_code_with_frame_pointers(self):
        path = build("stacks", ("-fno-omit-frame-pointer", "-O1"))
        self.follow(path, N_STEPS or 2500)

    def test_the_loader_binding_lazily(self):
        path = build("stacks", ("-Wl,-z,lazy", "-fomit-frame-pointer"))
        self.follow(path, N_STEPS or 2500)

    def test_cxx_exceptions(self):
        path = build("stacks_cxx", ("-Wl,--no-as-needed", "-lstdc++"), ".cc")
        self.follow(path, N_STEPS or 2500)

    def test_a_c_library_without_cfi(self):
        if not os.path.exists(MUSL):
            self.skipTest("no musl; apt-get install musl-tools")
        path = build("stacks", ("-specs=" + MUSL, "-static"))
        _, ends = self.follow(path, N_STEPS or 4000, has_end=False)
        self.assertIn(ubp.NO_UNWIND_INFO, ends)
        self.assertNotIn(ubp.UNKNOWN_CODE, ends)

    def test_code_without_cfi_but_with_frame_pointers(self):
        path = build("stacks", ("-fno-omit-frame-pointer", "-static",
                                "-fno-asynchronous-unwind-tables"))
        self.follow(path, N_STEPS or 2500, has_end=False)


# ---- pure parts -----------------------------------------------------------
EXPRESSIONS = """
breg7 + 8                             | 77 08                | 0x1008
a register                            | 53                   | 0x3333
what the PLT's CFI says, in slot 11   | 77 08 80 00 3f 1a 3b 2a 33 24 22 | 0x1010
a word of the stack                   | 77 08 06             | 0x22
one byte of it                        | 77 08 94 01          | 0x22
signed constants                      | 09 fe 11 7f 22       | 0xfffffffffffffffd
unsigned ones                         | 08 fe 0a 01 02 22    | 0x2ff
u64                                   | 0e 01 02 03 04 05 06 07 08 | 0x807060504030201
dup drop over pick swap               | 31 32 12 13 14 15 01 16 13 | 0x2
rot: third is the former top          | 31 32 33 17 13 13    | 0x3
rot: top is the former second         | 31 32 33 17          | 0x2
-7 / 2 truncates                      | 09 f9 32 1b          | 0xfffffffffffffffd
7 mod 4                               | 37 34 1d             | 0x3
2 - 3                                 | 32 33 1c             | 0xffffffffffffffff
abs neg not                           | 35 1f 19 20          | 0xfffffffffffffffa
shifts                                | 09 80 34 26 32 25    | 0x3ffffffffffffffe
a shift by 64                         | 31 08 40 24          | 0x0
or xor mul                            | 35 3a 21 33 27 32 1e | 0x18
-1 < 1                                | 09 ff 31 2d          | 0x1
-1 > 1                                | 09 ff 31 2b          | 0x0
le eq ne                              | 31 31 2c 31 29 30 2e | 0x1
a branch taken                        | 35 31 28 02 00 23 02 | 0x5
a branch not taken                    | 35 30 28 02 00 23 02 | 0x7
skip                                  | 31 2f 01 00 20       | 0x1
regx, bregx                           | 90 03 92 07 78 22    | 0x432b
nop                                   | 31 96                | 0x1
an endless loop                       | 2f fd ff             | damaged unwind info
a stack without end                   | 31 2f fc ff          | damaged unwind info
division by zero                      | 31 30 1b             | damaged unwind info
an empty stack                        | 22                   | damaged unwind info
nothing                               |                      | damaged unwind info
cut short                             | 0e 01                | damaged unwind info
a jump out of it                      | 31 2f 7f 00          | damaged unwind info
no such operation                     | 31 ff                | damaged unwind info
deref of five bytes                   | 77 00 94 05          | damaged unwind info
above the copy                        | 77 80 10 06          | truncated
below the copy                        | 77 78 06             | truncated
an unknown register                   | 50                   | unknown register
a register that is none               | 90 40                | unknown register
"""
PLACES = """
the entry                       | 53 c3                          | 0  | no  | top
behind the endbr64 of an entry  | f3 0f 1e fa 53 5b c3           | 4  | no  | top
a ret                           | 53 5b c3                       | 2  | no  | top
push rbp; mov rbp,rsp           | 55 48 89 e5 e8 0 0 0 0 5d c3   | 9  | yes | frame
the same as some assemblers do  | 55 48 8b ec e8 0 0 0 0 5d c3   | 9  | yes | frame
behind an endbr64               | f3 0f 1e fa 55 48 89 e5 e8 0 0 0 0 c9 c3 | d | yes | frame
Go up to 1.20                   | 48 83 ec 18 48 89 6c 24 10 48 8d 6c 24 10 e8 0 0 0 0 | 13 | yes | frame
before rbp is set               | 55 48 89 e5 5d c3              | 1  | no  |
between push and mov, returned  | 55 48 89 e5 5d c3              | 1  | yes |
a site in the middle            | 55 48 89 e5 90 5d c3           | 4  | no  | frame
behind the pop: a tail jump     | 55 48 89 e5 5d e9 0 0 0 0      | 5  | no  |
before a branch                 | 55 48 89 e5 90 74 00 5d c3     | 4  | no  | frame
no frame pointer                | 53 e8 0 0 0 0 5b c3            | 6  | yes |
rbp as any register             | 55 48 89 fd e8 0 0 0 0 5d c3   | 9  | yes |
code that is none               | 55 06 06 06 06 06              | 3  | yes |
"""
CALLS = """
e8 rel32            | e8 1 2 3 4          | yes
call *rax           | 90 90 90 ff d0      | yes
call *8(%rbx)       | 90 90 ff 53 08      | yes
call *rip           | ff 15 1 2 3 4       | yes
call *r12           | 90 90 41 ff d4      | yes
call *(r12,rax,8)   | 90 41 ff 14 c4      | yes
a jump              | e9 1 2 3 4          | no
nops                | 90 90 90 90 90 90   | no
too few bytes       | 1 2 3 4             | no
nothing             |                     | no
"""


def rows_of(table):
    for line in table.strip().splitlines():
        yield [cell.strip() for cell in line.split("|")]


def code_of(text):
    return bytes(int(byte, 16) for byte in text.split())


class Expressions(unittest.TestCase):

    def test_each_operation(self):
        registers = [None] * ubp.N_REGISTERS
        registers[3], registers[7], registers[16] = 0x3333, 0x1000, 0x102b
        stack = struct.pack("<4Q", 0x11, 0x22, 0x33, 0x44)
        for what, code, wanted in rows_of(EXPRESSIONS):
            position = ubp._Position(0, {}, 0x1000, stack)
            machine = ubp._StackMachine(registers, position.read)
            with self.subTest(what):
                try:
                    found = hex(machine.evaluate(code_of(code)))
                except ubp._Ended as ended:
                    found = ended.args[0]
                self.assertEqual(wanted, found)


class MachineCode(unittest.TestCase):

    def test_where_the_return_address_is_without_cfi(self):
        for what, code, offset, is_return, wanted in rows_of(PLACES):
            with self.subTest(what):
                self.assertEqual(wanted, ubp_x86.return_place(
                    code_of(code) + b"\x90" * 99, int(offset, 16),
                    is_return == "yes"))

    def test_calls_end_before_a_return_address(self):
        for what, code, wanted in rows_of(CALLS):
            with self.subTest(what):
                self.assertEqual(wanted == "yes",
                                 ubp_x86.ends_in_call(code_of(code)))

    def test_registers_of_a_signal_frame_are_those_it_was_made_from(self):
        regs = struct.pack("<27Q", *range(1000, 1027))
        _, frame = ubp_x86.signal_frame(regs, bytes(512), bytes(8), 0x1234,
                                        0x7fff0000)
        self.assertEqual(ubp_x86.dwarf_registers(regs),
                         ubp_x86.interrupted_registers(frame[8:]))


class Hostile(unittest.TestCase):
    """Random and twisted input: a walk ends, with a reason, in time."""
    REASONS = {ubp.END, ubp.DEPTH, ubp.TRUNCATED, ubp.NO_UNWIND_INFO,
               ubp.UNKNOWN_CODE, ubp.UNKNOWN_REGISTER, ubp.DAMAGED}

    def setUp(self):
        self.random = random.Random(1)
        self.modules = [module for module in ubp.modules(os.getpid())
                        if module.unwind.starts][:4]

    def walk(self, unwinder, pc, stack):
        draw = self.random
        base = draw.choice((0, 0x7ffc00001000, (1 << 64) - 64))
        registers = {n: draw.choice((
            base, base + draw.randrange(4096), draw.getrandbits(64), 0))
            for n in range(17) if draw.random() < 0.9}
        walk = unwinder.walk(pc, registers, base, stack)
        self.assertIn(walk.why, self.REASONS)
        self.assertLessEqual(len(walk.addresses), 64)
        return walk

    def addresses(self, n):
        for _ in range(n):
            module = self.random.choice(self.modules)
            vaddr, size, _ = self.random.choice(module.text)
            yield vaddr + self.random.randrange(size)

    def test_random_stacks_and_registers(self):
        unwinder = ubp.Unwinder(os.getpid(), self.modules)
        ends = collections.Counter()
        for pc in self.addresses(1500):
            words = list(self.addresses(self.random.randrange(60)))
            words += [self.random.getrandbits(64) for _ in words]
            self.random.shuffle(words)
            stack = struct.pack("<%dQ" % len(words), *words)
            ends[self.walk(unwinder, pc, stack[self.random.randrange(9):]).why
                 ] += 1
        self.assertGreater(len(ends), 3)

    def test_random_programs(self):
        """Any bytes as CFI: rows, or one SymbolError, and in time."""
        fde = ubp.Fde(0x1000, 0x1000, 0)
        n_rows = n_errors = 0
        began = time.process_time()
        for n in range(4000):
            size = self.random.choice((3, 10, 40, 200))
            program = bytearray(self.random.getrandbits(8)
                                for _ in range(size))
            if n % 2:                   # mostly opcodes that exist
                for at in range(0, size, 2):
                    program[at] = self.random.choice(list(ubp._CFA))
            cie = ubp.Cie(0x1b, 0xff, True, 1, -8, 16, False,
                          b"\x0c\x07\x08\x90\x01", 0)
            try:
                for row in ubp.cfa_rows(ubp.CallFrame(fde, cie,
                                                      bytes(program), 0)):
                    n_rows += 1
                    self.step(row)
            except ubp.SymbolError:
                n_errors += 1
        self.assertGreater(n_rows, 1000)
        self.assertGreater(n_errors, 1000)
        self.assertLess(time.process_time() - began, 20)

    def step(self, row):
        stack = bytes(self.random.getrandbits(8) for _ in range(64))
        position = ubp._Position(0x1234, dict(enumerate(
            [0x7000] * 17)), 0x7000, stack)
        try:
            ubp._AnyRow(row, 16, False).take(position)
        except ubp._Ended as ended:
            self.assertIn(ended.args[0], self.REASONS)
        if ubp._SavedRegisters.is_fit(row, 16):
            try:
                ubp._SavedRegisters(row, 16).take(position)
            except ubp._Ended as ended:
                self.assertIn(ended.args[0], self.REASONS)

    def test_damaged_files(self):
        """.eh_frame with changed bytes, whole and cut."""
        path = build("stacks")
        with open(path, "rb") as f:
            data = bytearray(f.read())
        sections = {s.name: s for s in elf_of(path).sections}
        maps = [ubp.Mapping(0x400000, 0x400000 + len(data), "r-xp", 0,
                            "00:00", 1, "/x")]
        for _ in range(150):
            twisted = bytearray(data)
            for name in (b".eh_frame", b".eh_frame_hdr"):
                section = sections[name]
                for _ in range(self.random.randrange(40)):
                    twisted[section.offset + self.random.randrange(
                        section.size)] = self.random.getrandbits(8)
            elf = ubp.Elf(ubp.BytesImage(bytes(twisted)), "x")
            module = ubp.Module(os.getpid(), elf, 0x400000, maps, True)
            unwinder = ubp.Unwinder(os.getpid(), [module])
            vaddr, size, _ = module.text[0]
            for _ in range(10):
                pc = vaddr + self.random.randrange(size)
                words = [vaddr + self.random.randrange(size)
                         for _ in range(40)]
                self.walk(unwinder, pc, struct.pack("<40Q", *words))
            self.assertIn(ubp.has_frame_pointers(module),
                          (True, False, None))

    def test_a_program_as_long_as_may_be_is_quick_to_refuse(self):
        fde = ubp.Fde(0x1000, 1 << 30, 0)
        cie = ubp.Cie(0x1b, 0xff, True, 1, -8, 16, False,
                      b"\x0c\x07\x08\x90\x01", 0)
        for byte in (b"\x41", b"\x0a", b"\x00", b"\x86\x02", b"\x2e\x00"):
            program = byte * (ubp.MAX_FRAME_ENTRY // len(byte))
            began = time.process_time()
            try:
                ubp.row_at(ubp.CallFrame(fde, cie, program, 0), 1 << 30)
            except ubp.SymbolError:
                pass
            self.assertLess(time.process_time() - began, 3)


# ---- names ----------------------------------------------------------------
JIT_TARGET = """
import ctypes, mmap, os, sys
code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
vaddr = ctypes.addressof(ctypes.c_char.from_buffer(code))
print("%x" % vaddr, flush=True)
sys.stdin.read()
"""


class Names(unittest.TestCase):

    def jit(self):
        child = live.Process([sys.executable, "-S", "-c", JIT_TARGET])
        self.addCleanup(child.kill)
        path = "/tmp/perf-%d.map" % child.pid
        vaddr = int(child.line(), 16)
        self.addCleanup(lambda: os.path.lexists(path) and os.unlink(path))
        symbols = ubp.Symbols(child.pid, ubp.modules(child.pid))
        return path, vaddr, symbols

    def look(self, symbols, vaddr):
        symbols._looked = None          # as a second later
        return symbols.name(vaddr, False)

    def test_functions_of_a_jit(self):
        path, vaddr, symbols = self.jit()
        self.assertEqual(("", "", vaddr), symbols.name(vaddr, False))
        with open(path, "w") as f:
            f.write("%x 40 one(int)\n%x 20 two three\n" % (vaddr, vaddr + 64))
            f.flush()
            self.assertEqual(("[jit]", "one(int)", 63),
                             self.look(symbols, vaddr + 63))
            self.assertEqual(("[jit]", "two three", 0),
                             self.look(symbols, vaddr + 64))
            self.assertEqual("one(int)", symbols.name(vaddr + 64).function)
            self.assertEqual("", self.look(symbols, vaddr + 96).function)
            f.write("garbage\n-1 5 x\n%x 0 empty\n%x zz y\n\n12\n"
                    % (vaddr, vaddr))
            f.write("%x 8 newer \x1b[2J\n%x 100 unfinished" % (
                vaddr + 4, vaddr + 100))
            f.flush()
            self.assertEqual("newer \x1b[2J",
                             self.look(symbols, vaddr + 5).function)
            self.assertEqual("one(int)",
                             self.look(symbols, vaddr + 3).function)
            self.assertEqual("", self.look(symbols, vaddr + 100).function)

    @unittest.skipUnless(live.IS_ROOT, "only root can give files away")
    def test_a_map_of_another_user_is_not_believed(self):
        path, vaddr, symbols = self.jit()
        with open(path, "w") as f:
            f.write("%x 40 forged\n" % vaddr)
        os.chown(path, 65534, 65534)
        self.assertEqual("", self.look(symbols, vaddr).function)
        os.unlink(path)
        os.mkfifo(path)                 # would wait for ever
        self.assertEqual("", self.look(symbols, vaddr).function)

    def test_code_that_appears_later_is_not_unknown_for_ever(self):
        _, vaddr, symbols = self.jit()
        unwinder = ubp.Unwinder(symbols.code.pid, symbols.code)
        code = symbols.code
        self.assertIsNotNone(code.at(vaddr))
        mapping, code._mappings, code._starts = code._mappings, [], []
        self.assertEqual(ubp.UNKNOWN_CODE,
                         unwinder.walk(vaddr, {}, 0x1000, b"").why)
        code._looked = None             # as a second later
        self.assertEqual(ubp.NO_UNWIND_INFO,
                         unwinder.walk(vaddr, {}, 0x1000, b"").why)
        self.assertEqual(mapping, code._mappings)

    @unittest.skipUnless(live.IS_ROOT, "only root makes pid namespaces")
    def test_a_jit_in_a_container_knows_another_pid(self):
        with live.Process(["unshare", "-pf", "--kill-child", sys.executable,
                           "-S", "-c", "import os\n" + JIT_TARGET.replace(
                               "print(", "print(os.getpid(), ")]) as child:
            inner, vaddr = child.line().split()
            with open("/proc/%d/task/%d/children" % (child.pid, child.pid)) \
                    as f:
                pid = int(f.read())
            self.assertNotEqual(pid, int(inner))
            path = "/tmp/perf-%s.map" % inner
            if os.path.lexists(path):
                self.skipTest("%s exists: remove it" % path)
            try:
                with open(path, "w") as f:
                    f.write("%s 40 inside\n" % vaddr)
                symbols = ubp.Symbols(pid, ubp.modules(pid))
                self.assertEqual("inside", symbols.name(
                    int(vaddr, 16), False).function)
            finally:
                os.unlink(path)

    def test_functions_and_offsets(self):
        with live.Target("", path=build("stacks")) as target:
            symbols = ubp.Symbols(target.pid, ubp.modules(target.pid))
            exe = symbols.code.modules[0]
            sorted_at = live.symbol(exe.path, "sorted")[0] + exe.bias
            frame = symbols.name(sorted_at + 5)
            self.assertEqual((exe.name, "sorted", 5), frame)
            self.assertEqual("sorted", frame.text)
            # A return address behind a call that ends a function.
            self.assertNotEqual("sorted", symbols.name(sorted_at).function)
            self.assertEqual(("", "", 0x1000), symbols.name(0x1000))
            self.assertEqual("0x1000", symbols.name(0x1000).text)
            vdso = next((m for m in symbols.code.modules
                         if m.name == "[vdso]"), None)
            if vdso:
                function = vdso.named("__vdso_clock_gettime")[0]
                self.assertEqual("[vdso]", symbols.name(
                    function.vaddr + 1).module)

    def test_a_library_loaded_later_is_found(self):
        code = ("import sys\nprint('ready', flush=True)\n"
                "sys.stdin.readline()\nimport ctypes, ctypes.util\n"
                "m = ctypes.CDLL('libm.so.6')\n"
                "print('%x' % ctypes.cast(m.cbrt, ctypes.c_void_p).value,"
                " flush=True)\nsys.stdin.read()")
        with live.Process([sys.executable, "-S", "-c", code]) as child:
            child.line()
            code = ubp.CodeMap(child.pid, [
                module for module in ubp.modules(child.pid)
                if not module.name.startswith(("libm.", "_ctypes"))])
            before = {id(module) for module in code.modules}
            child.send("\n")
            vaddr = int(child.line(), 16)
            frame = ubp.Symbols(child.pid, code).name(vaddr, False)
            self.assertIn("cbrt", frame.function)
            self.assertLess(before, {id(m) for m in code.modules})


class FramePointers(unittest.TestCase):

    def test_a_module_tells_whether_it_keeps_them(self):
        for flags, wanted in (
                (("-fomit-frame-pointer",), False),
                (("-O0", "-fomit-frame-pointer"), False),
                (("-fno-omit-frame-pointer",), True),
                (("-fno-omit-frame-pointer", "-O1"), True)):
            path = build("stacks", flags)
            with self.subTest(flags), live.Target("", path=path) as target:
                modules = ubp.modules(target.pid)
                self.assertEqual(wanted, ubp.has_frame_pointers(modules[0]))


# ---- stopped threads ------------------------------------------------------
GDB = r"""
import gdb
gdb.execute("set backtrace past-main on")
frame = gdb.newest_frame()
while frame is not None:
    if frame.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME):
        pc, is_signal = frame.pc(), frame.type() == gdb.SIGTRAMP_FRAME
        newer = frame.newer()
        is_return = newer is not None and newer.type() != gdb.SIGTRAMP_FRAME
        name = gdb.execute("info symbol %d" % (pc - is_return), False, True)
        print("frame", hex(pc), int(is_signal), int(is_return), name.strip())
    frame = frame.older()
"""
GDB_LINE = (r"^frame (0x\w+) ([01]) ([01]) "
            r"(?:(.*?)(?: \+ (\d+))? in section|No symbol).*$")


def gdb_frames(pid):
    """[(pc, is a signal trampoline, name or "", offset)] by gdb."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(GDB)
        script.flush()
        text = subprocess.run(
            ["gdb", "-nx", "-batch", "-iex", "set debuginfod enabled off",
             "-iex", "set auto-load off",
             "-p", str(pid), "-x", script.name], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode()
    return [(int(pc, 16), is_signal == "1", name,
             int(offset or 0) + (is_return == "1"))
            for pc, is_signal, is_return, name, offset
            in re.findall(GDB_LINE, text, re.M)]


# mov eax, clone or clone3; syscall: in a C library without symbols.
CLONE = re.compile(rb"\xb8(\x38\0|\xb3\x01)\0\0\x0f\x05")


def walk_of(pid, size=STACK, code=None):
    """The Walk and Frames of a stopped thread. code: a CodeMap to reuse."""
    ubp.ptrace(ubp.PTRACE_SEIZE, pid)
    try:
        ubp.ptrace(ubp.PTRACE_INTERRUPT, pid)
        os.waitpid(pid, 0x40000000)
        regs = registers_of(pid)
        rsp = ubp_x86.stack_pointer(regs)
        stack = read_stack(pid, rsp, size)
    finally:
        ubp.ptrace(ubp.PTRACE_DETACH, pid)
    code = code or ubp.CodeMap(pid, ubp.modules(pid))
    walk = ubp.Unwinder(pid, code).walk(
        ubp_x86.program_counter(regs), ubp_x86.dwarf_registers(regs), rsp,
        stack, 1000)
    return walk, ubp.Symbols(pid, code).frames(walk)


PYTHON = """
import time
print("ready", flush=True)
def f(n): return sorted([n], key=g)
def g(n): return f(n - 1) if n else time.sleep(60)
f(3)
"""


class Stopped(unittest.TestCase):
    """Stacks of stopped programs against gdb's and glibc's."""

    def setUp(self):
        if subprocess.call(["which", "gdb"], stdout=subprocess.DEVNULL):
            self.skipTest("no gdb; apt-get install gdb")

    def compare(self, pid, n_least):
        live.stop(pid)
        walk, frames = walk_of(pid)
        judge = gdb_frames(pid)
        os.kill(pid, signal.SIGCONT)
        self.assertGreaterEqual(len(judge), n_least)
        self.assertEqual([row[0] for row in judge], list(walk.addresses),
                         (judge, frames))
        self.assertEqual(ubp.END, walk.why)
        self.assertEqual([0] + [n + 1 for n, row in enumerate(judge)
                                if row[1]], list(walk.interrupted))
        for (_, is_signal, name, offset), frame in zip(judge, frames):
            if is_signal:
                self.assertEqual("[signal]", frame.function)
            elif name:                  # one of several, perhaps
                self.assertEqual(offset, frame.offset, (name, frame))
        return walk, frames

    def test_signal_handler_in_a_callback_in_recursion(self):
        path = build("stacks", ("-fomit-frame-pointer",))
        with live.Target("", path=path) as target:
            target.send("n")
            found = target.answer()["backtrace"]
            walk, frames = self.compare(target.pid, 14)
            self.assertIn("settle", [frame.function for frame in frames])
            self.assertIn("qsort_r", [frame.function for frame in frames])
            self.assertEqual(4, [frame.function
                                 for frame in frames].count("nested"))
            glibc = [int(word, 16) for word in found.split(",")]
            at = [f.function for f in frames].index("settle")
            self.assertEqual(glibc[1:], list(walk.addresses[at + 1:]))

    def test_a_caught_exception(self):
        path = build("stacks_cxx", ("-Wl,--no-as-needed", "-lstdc++"), ".cc")
        with live.Target("", path=path) as target:
            target.send("n")
            self.assertEqual("deep", target.line())
            self.compare(target.pid, 8)

    def test_malloc(self):
        with live.Target("", path=build("stacks")) as target:
            target.send("m")
            for _ in range(3):
                time.sleep(0.01)
                self.compare(target.pid, 3)

    def test_python(self):
        for python in sorted({os.path.realpath("/usr/bin/python3"),
                              os.path.realpath(sys.executable)}):
            with self.subTest(python), live.Process(
                    [python, "-S", "-c", PYTHON]) as child:
                child.line()
                live.settled(lambda: live.states(child.pid) == "S")
                self.compare(child.pid, 10)

    def test_threads_end_where_they_began(self):
        with live.Target("busy", 3) as target:
            live.stop(target.pid)
            for tid in live.threads(target.pid):
                walk, frames = walk_of(tid)
                self.assertEqual(ubp.END, walk.why, frames)
                if not re.search("clone|^_start$", frames[-1].function):
                    self.assertRegex(ubp.read_memory(
                        tid, walk.addresses[-1] - 32, 32), CLONE)

    def test_a_jit_between_frames_of_c(self):
        if subprocess.call(["which", "node"], stdout=subprocess.DEVNULL):
            self.skipTest("no node; apt-get install nodejs")
        with live.Process(["node", "--perf-basic-prof", "-e", """
                function busy(x, y) {
                    for (let i = 0; i < 2000; i++) x += Math.sin(i);
                    return x - y; }
                function outer() { [5, 3, 1, 9].sort(busy); }
                const end = Date.now() + 20000;
                for (let i = 0; Date.now() < end; i++)
                    { outer(); if (i == 3000) console.log("ready"); }
                """]) as child:
            self.addCleanup(os.unlink, "/tmp/perf-%d.map" % child.pid)
            child.line()
            texts, code = [], ubp.CodeMap(child.pid, ubp.modules(child.pid))

            def is_whole():
                live.stop(child.pid)
                walk, frames = walk_of(child.pid, code=code)
                os.kill(child.pid, signal.SIGCONT)
                text = " < ".join(frame.text for frame in frames)
                texts.append(text)
                return walk.why == ubp.END and re.search(
                    r"busy .* < .*Sort.* < .* \[eval\]:1:1 < .*node::Start"
                    " < .*main.* < _start$", text)
            self.assertTrue(live.settled(is_whole), texts)

    def test_redis(self):
        if subprocess.call(["which", "redis-server"],
                           stdout=subprocess.DEVNULL):
            self.skipTest("no redis; apt-get install redis-server")
        with tempfile.TemporaryDirectory() as folder, live.Process(
                ["redis-server", "--port", "0", "--unixsocket",
                 folder + "/s", "--dir", folder, "--save", ""]) as server:
            live.settled(lambda: os.path.exists(folder + "/s"))
            time.sleep(0.1)
            _, frames = self.compare(server.pid, 4)
            self.assertIn("main", [frame.function for frame in frames])

    def test_a_short_copy_gives_the_first_frames_and_says_so(self):
        path = build("stacks", ("-fomit-frame-pointer",))
        with live.Target("", path=path) as target:
            target.send("n")
            target.line()
            live.stop(target.pid)
            whole, _ = walk_of(target.pid)
            last = 0
            for size in range(0, 16385, 1024):
                walk, _ = walk_of(target.pid, size)
                n = len(walk.addresses)
                self.assertEqual(whole.addresses[:n], walk.addresses)
                self.assertGreaterEqual(n, last)
                self.assertEqual(n < len(whole.addresses),
                                 walk.why == ubp.TRUNCATED)
                last = n
            self.assertEqual(whole, walk)


def print_cost(pid):
    """What a walk and its names take: the first, and the median."""
    live.stop(pid)
    ubp.ptrace(ubp.PTRACE_SEIZE, pid)
    ubp.ptrace(ubp.PTRACE_INTERRUPT, pid)
    os.waitpid(pid, 0x40000000)
    regs = registers_of(pid)
    rsp = ubp_x86.stack_pointer(regs)
    stack = read_stack(pid, rsp)
    ubp.ptrace(ubp.PTRACE_DETACH, pid)
    code = ubp.CodeMap(pid, ubp.modules(pid))
    unwinder, symbols = ubp.Unwinder(pid, code), ubp.Symbols(pid, code)
    registers = ubp_x86.dwarf_registers(regs)
    costs, names = [], []
    for _ in range(1001):
        began = time.perf_counter()
        walk = unwinder.walk(ubp_x86.program_counter(regs), registers, rsp,
                             stack)
        between = time.perf_counter()
        symbols.frames(walk)
        costs.append((between - began) * 1e6)
        names.append((time.perf_counter() - between) * 1e6)
    median, n = sorted(costs)[500], len(walk.addresses)
    print("%s: %d frames, %s; walk %.0f us at first, then %.1f (%.2f a frame)"
          "; names %.0f us at first, then %.1f" % (
              ubp.comm(pid), n, walk.why, costs[0], median, median / n,
              names[0], sorted(names)[500]))


def print_costs():
    with live.Target("", path=build("stacks")) as target:
        target.send("n")
        target.line()
        print_cost(target.pid)
    with live.Process([sys.executable, "-S", "-c", PYTHON]) as child:
        child.line()
        time.sleep(0.1)
        print_cost(child.pid)


if __name__ == "__main__":
    if sys.argv[1:] == ["cost"]:
        print_costs()
    else:
        unittest.main()
