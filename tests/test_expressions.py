"""Expressions: what they mean, and that compiled code agrees.

The judges: Python's own eval() on numbers that wrap at 64 bits, and the CPU
that runs the code.
"""
import random
import struct
import unittest

import bodies
import ubp_x86 as x86

# An expression, then the column (from 1; the several that versions of Python
# find) and a word of the error.
BAD = r"""
                        | 1  | nothing
1 +                     | 4  | Python
arg0 +* 2               | 7  | Python
foo + 1                 | 1  | foo is not known
1 + foo                 | 5  | foo is not known
arg0 / 2                | 1  | // rounds down
arg0 ** 2               | 1  | **
arg16                   | 1  | arg0 to arg15
ret                     | 1  | %return
1 + elapsed             | 5  | %return
u32                     | 1  | argument
u32(1, 2)               | 1  | one argument
u32()                   | 1  | one argument
u24[arg0]               | 1  | u32[address]
arg0[1]                 | 1  | u32[address]
u8[1, 2]                | 4  | comma
str(arg0) + 1           | 1  | whole
1 + str(arg0)           | 5  | whole
hex(1) + 1              | 1  | whole
hex(str(arg0))          | 5  | number
str(arg0, arg1)         | 11 | 1 to 1024
str(arg0, 0)            | 11 | 1 to 1024
buf(arg0, 1025)         | 11 | 1 to 1024
buf(arg0, 1, arg1)      | 14 | 1 to 1024
str(buf(arg0, 2))       | 5  | whole
print(1)                | 1  | no function
(1, 2)                  | 1 2 | comma
1, 2                    | 1  | comma
[1]                     | 1  | list
arg0.real               | 1  | dot
1.5                     | 1  | integer
True                    | 1  | integer
0x10000000000000000     | 1  | 64 bits
1 if 2                  | 1 7 | Python
1 in arg0               | 1  | compare
arg0 is 1               | 1  | compare
'a'                     | 1  | '
a := 1                  | 3  | :
lambda: 1               | 7  | :
{1}                     | 1  | {
arg0 = 1                | 6  | == compares
u8(x=1)                 | 5  | == compares
1)+(1                   | 2  | open
"""
VALUES = (0, 1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 4095, 65535,
          (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1,
          -(1 << 63), -(1 << 31), -2, -1)
NAMES = ("arg0 arg1 arg2 arg3 arg4 arg5 arg6 arg7 arg9 rax rbx rcx rdx rsi "
         "rdi rbp r8 r9 r10 r11 r12 r13 r14 r15 caller").split()
ARG_REGISTERS = (7, 6, 2, 1, 8, 9)
MASK = (1 << 64) - 1


class Fault(Exception):
    pass


class N(int):
    """A number of 64 bits for eval(): Python's int, wrapped, with a sign."""

    def __new__(cls, value, is_unsigned=False):
        value = int.__and__(int(value), MASK)
        if value >> 63 and not is_unsigned:
            value -= 1 << 64
        self = int.__new__(cls, value)
        self.u = is_unsigned
        return self

    @staticmethod
    def meet(method, is_compare=False, is_shift=False, can_fault=False):
        def met(a, b):
            u = a.u if is_shift else a.u or b.u
            x = int(N(a, u))
            y = int(b) if is_shift else int(N(b, u))
            if can_fault and y == 0 or is_shift and y < 0:
                raise Fault
            result = method(x, min(y, 64) if is_shift else y)
            return N(int(result), u and not is_compare)
        return met

    def __neg__(self):
        return N(-int(self), self.u)

    def __invert__(self):
        return N(~int(self), self.u)

    __hash__ = int.__hash__


for _name in "add sub mul and or xor".split():
    setattr(N, "__%s__" % _name, N.meet(getattr(int, "__%s__" % _name)))
for _name in "eq ne lt le gt ge".split():
    setattr(N, "__%s__" % _name,
            N.meet(getattr(int, "__%s__" % _name), is_compare=True))
for _name in "floordiv mod".split():
    setattr(N, "__%s__" % _name,
            N.meet(getattr(int, "__%s__" % _name), can_fault=True))
for _name in "lshift rshift".split():
    setattr(N, "__%s__" % _name,
            N.meet(getattr(int, "__%s__" % _name), is_shift=True))


def cast(bits, is_signed):
    def convert(value):
        value = int.__int__(value) & (1 << bits) - 1
        if is_signed and value >> bits - 1:
            value -= 1 << bits
        return N(value, bits == 64 and not is_signed)
    return convert


CASTS = {sign + str(bits): cast(bits, sign == "s")
         for sign in "us" for bits in (8, 16, 32, 64)}


class Grammar:
    """Random expressions, as a text for us and as one for eval()."""

    def __init__(self, seed, has_loads=False):
        self.random, self.has_loads = random.Random(seed), has_loads

    def load(self):
        """A load at MEMORY or, seldom, where nothing is."""
        name = self.random.choice(sorted(CASTS))
        a, pa, _ = self.pick(0)
        base = 0 if self.random.random() < 0.05 else MEMORY
        return ("%s[%d + (%s & 127)]" % (name, base, a),
                "load(%r, N(%d) + (%s & N(127)))" % (name, base, pa),
                name == "u64")

    def leaf(self):
        if self.has_loads and self.random.random() < 0.3:
            return self.load()
        if self.random.random() < 0.65:
            name = self.random.choice(NAMES)
            return name, name, False
        value = self.random.choice(VALUES) if self.random.random() < 0.7 \
            else self.random.getrandbits(self.random.randrange(1, 64))
        text, is_unsigned = str(abs(value)), abs(value) >> 63 == 1
        made = "N(%d, %r)" % (abs(value), is_unsigned)
        return (text, made, is_unsigned) if value >= 0 else (
            "-" + text, "(-%s)" % made, is_unsigned)

    def pick(self, depth):
        """(text, text for eval, is it unsigned), ready to be an operand."""
        choice = self.random.random()
        if depth <= 0 or choice < 0.08:
            return self.leaf()
        a, pa, ua = self.pick(depth - self.random.choice((1, 1, 2)))
        if choice < 0.16:
            op = self.random.choice("-~")
            return "(%s %s)" % (op, a), "(%s %s)" % (op, pa), ua
        if choice < 0.20:
            return "(not %s)" % a, "N(not %s)" % pa, False
        if choice < 0.32:
            name = self.random.choice(sorted(CASTS))
            return ("%s(%s)" % (name, a), "%s(%s)" % (name, pa),
                    name == "u64")
        b, pb, ub = self.pick(depth - self.random.choice((1, 1, 2, 3)))
        if choice < 0.70:
            op = self.random.choice(
                "+ - * & | ^ // % << >> + - * // %".split())
            if op in ("<<", ">>") and self.random.random() < 0.6:
                b, pb = "(%s & 63)" % b, "(%s & N(63))" % pb
            return ("(%s %s %s)" % (a, op, b), "(%s %s %s)" % (pa, op, pb),
                    ua if op in ("<<", ">>") else ua or ub)
        if choice < 0.78:
            op = self.random.choice(("and", "or"))
            return ("(%s %s %s)" % (a, op, b),
                    "N(%s %s %s, %r)" % (pa, op, pb, ua or ub), ua or ub)
        compare = self.random.choice("== != < <= > >=".split())
        if choice < 0.86:
            return ("(%s %s %s)" % (a, compare, b),
                    "N(%s %s %s)" % (pa, compare, pb), False)
        c, pc, uc = self.pick(depth - self.random.choice((1, 2, 3)))
        if choice < 0.93:
            other = self.random.choice("== != < <= > >=".split())
            return ("(%s %s %s %s %s)" % (a, compare, b, other, c),
                    "N(%s %s %s %s %s)" % (pa, compare, pb, other, pc),
                    False)
        return ("(%s if %s else %s)" % (a, b, c),
                "N(%s if %s else %s, %r)" % (pa, pb, pc, ua or uc), ua or uc)


MEMORY = bodies.DATA + 0x800
CONTENT = bytes(random.Random(5).getrandbits(8) for _ in range(256))


def read_content(vaddr, size):
    """What the child has at MEMORY; less where it has nothing."""
    offset = vaddr - MEMORY
    if not 0 <= offset <= offset + size <= len(CONTENT):
        raise OSError
    return CONTENT[offset:offset + size]


def load(name, address):
    try:
        raw = read_content(int(address), int(name[1:]) // 8)
    except OSError:
        raise Fault
    return CASTS[name](N(int.from_bytes(raw, "little")))


def judged(text, values, is_unsigned):
    """Python's own value of a text or code, or None for a fault."""
    scope = dict(CASTS, N=N, load=load)
    scope.update((name, N(value)) for name, value in values.items())
    try:
        return int(N(eval(text, scope), is_unsigned))
    except Fault:
        return None


def site_values(regs, stack):
    """{name: value} of what a body sees at an entry."""
    values = {name: regs[n] for n, name in enumerate(x86.REGISTERS)}
    values.update(("arg%d" % n, regs[reg])
                  for n, reg in enumerate(ARG_REGISTERS))
    values.update(("arg%d" % n, stack[n - 5]) for n in range(6, 16))
    values["caller"] = stack[0]
    return values


def stack_words():
    """What the child writes above rsp, a byte by its address."""
    data = bytes(at * 37 & 0xff for at in range(bodies.SP, bodies.SP + 128))
    return struct.unpack("<16Q", data)


class Meaning(unittest.TestCase):

    def test_an_error_points_at_its_column(self):
        for line in BAD.strip("\n").splitlines():
            text, column, word = line.rsplit("|", 2)
            with self.subTest(line):
                with self.assertRaises(x86.ExpressionError) as caught:
                    x86.parse_expression(text.rstrip())
                self.assertIn(word.strip(), str(caught.exception))
                self.assertIn(caught.exception.column + 1,
                              [int(word) for word in column.split()])

    def test_columns_count_from_the_start_of_a_list(self):
        with self.assertRaises(x86.ExpressionError) as caught:
            x86.parse_expressions("arg0, u8(2), foo")
        self.assertEqual(caught.exception.column, 13)
        parsed = x86.parse_expressions(" str(arg0, 8), u8[arg1]")
        self.assertEqual([e.text for e in parsed],
                         ["str(arg0, 8)", "u8[arg1]"])

    def test_nothing_is_too_deep_or_too_long_for_an_error(self):
        for text in ("(" * 400 + "1" + ")" * 400, "-" * 900 + "1",
                     "1+" * 480 + "1", "not " * 200 + "1", "1" * 1001,
                     "arg0 and " * 100 + "1", "(" * 999, "1<" * 300 + "1",
                     "u8[" * 300, "9" * 900, "\0", "a\x1bb", "\u0661"):
            with self.subTest(text[:20]):
                try:
                    x86.parse_expression(text)
                except x86.ExpressionError as error:
                    self.assertLessEqual(error.column, len(text))

    def test_what_a_c_int_hides_is_warned_of(self):
        for text, n in (("ret < 0", 1), ("ret == -2", 1), ("0 > ret", 1),
                        ("s32(ret) < 0", 0), ("ret == 5", 0),
                        ("ret > 0", 0), ("ret >= 0", 1)):
            with self.subTest(text):
                parsed = x86.parse_expression(text, True)
                self.assertEqual(len(parsed.warnings), n)

    def test_what_an_expression_is(self):
        for text, kind, size, is_unsigned, form, memory in (
                ("arg0", "int", 8, False, "", False),
                ("u64(arg0) + 1", "int", 8, True, "", False),
                ("hex(arg0)", "int", 8, False, "hex", False),
                ("sym(caller)", "int", 8, False, "sym", False),
                ("str(arg0)", "str", 64, False, "", True),
                ("buf(arg0, 100)", "buf", 100, False, "", True),
                ("buf(arg0, arg1)", "buf", 256, False, "", True),
                ("buf(arg0, arg1, 512)", "buf", 512, False, "", True),
                ("u8[arg0] >> 1", "int", 8, False, "", True),
                ("0 and u8[arg0]", "int", 8, False, "", False)):
            with self.subTest(text):
                e = x86.parse_expression(text)
                self.assertEqual((e.kind, e.size, e.is_unsigned, e.form,
                                  e.reads_memory),
                                 (kind, size, is_unsigned, form, memory))

    def test_evaluate_follows_pointers_and_reports_faults(self):
        memory = bytes(range(1, 256)) + b"\0" + b"x" * 3840

        def read(vaddr, size):
            if not 4096 <= vaddr <= vaddr + size <= 8192:
                raise OSError
            return memory[vaddr - 4096:vaddr - 4096 + size]
        for text, value in (
                ("u16[4096]", 0x201), ("s8[4096 + 254]", -1),
                ("u64[4095]", None), ("u8[8192] if 0 else 3", 3),
                ("u8[8192] if arg0 else 3", None), ("1 // (arg0 - 1)", None),
                ("str(4096 + 250)", bytes(range(251, 256))),
                ("str(8190)", b"xx"), ("str(8192)", None),
                ("buf(4096, 3)", b"\1\2\3"), ("buf(8190, 3)", None),
                ("buf(0, arg0 - 1)", b""), ("buf(0, 0 - arg0)", b"")):
            with self.subTest(text):
                self.assertEqual(x86.evaluate(x86.parse_expression(text),
                                              {"arg0": 1}, read), value)


class Compiled(unittest.TestCase):
    """Random expressions, compiled, run, and compared with eval()."""

    N_EACH = 1000               # to a page
    N_PAGES = 20

    def made(self, grammar):
        """(Expression, what eval() gets), one that we take."""
        while True:
            text, python, _ = grammar.pick(grammar.random.randrange(1, 7))
            if len(text) > x86.MAX_TEXT:
                continue
            return x86.parse_expression(text), python

    def window(self, pick):
        """All live, nothing live, or something."""
        kind = pick.randrange(4)
        if kind == 0:
            return bodies.WINDOW
        if kind == 1:
            return bodies.WINDOW._replace(dead_regs=0xffef, flags_dead=True)
        return bodies.WINDOW._replace(
            dead_regs=pick.getrandbits(16) & 0xffef,
            flags_dead=pick.random() < 0.5)

    def check_page(self, seed, has_loads=False):
        grammar = Grammar(seed, has_loads)
        pick, page = grammar.random, bodies.Page(1 << 18)
        page.data[0x800:0x900] = CONTENT
        cases, facts, stack = [], [], stack_words()
        while len(cases) < self.N_EACH:
            expression, python = self.made(grammar)
            window = self.window(pick)
            is_condition = pick.random() < 0.4
            spec = x86.Spec("count", when=expression) if is_condition else \
                x86.Spec("sum", values=(expression,))
            place = page.place(spec)
            regs = [pick.choice(VALUES) & MASK if pick.random() < 0.5 else
                    pick.getrandbits(64) >> pick.choice((0, 0, 32, 56))
                    for _ in range(16)]
            regs[4] = bodies.SP
            try:
                vaddr = page.add(spec, place, window)
            except x86.UbpError as error:
                self.assertIn("bytes of code", str(error))
                continue
            values = site_values(regs, stack)
            cases.append(bodies.Case(vaddr, tuple(regs), window,
                                     0x202 | pick.getrandbits(12) & 0x8d5))
            facts.append((expression, python, spec, place, values, window))
        results, data = page.run(cases)
        for case, fact, result in zip(cases, facts, results):
            self.check(case, result, data, *fact)
        return page

    def check(self, case, result, data, expression, python, spec, place,
              values, window):
        shown = "%s (%s, dead %x, flags %s)" % (
            expression.text, spec.action, window.dead_regs,
            window.flags_dead)
        self.assertEqual(result, (0,) * 5, shown)
        wanted = judged(python, values, expression.is_unsigned)
        ours = x86.evaluate(expression, values, read_content)
        self.assertEqual(ours, wanted, shown)
        if spec.action == "count":
            layout = x86.block_layout(spec)
            count, = bodies.words(data, place, layout.start, 1)
            self.assertEqual(count, int(bool(wanted)), shown)
        else:
            count, low, high = bodies.words(data, place, x86.HEAD_SIZE, 3)
            self.assertEqual(count, int(wanted is not None), shown)
            total = 0 if wanted is None else wanted & (1 << 128) - 1
            self.assertEqual(low | high << 64, total, shown)
        if x86.block_layout(spec).kind != "word":
            faults, = bodies.words(data, place, x86.HEAD_FAULTS, 1)
            self.assertEqual(faults, int(wanted is None), shown)

    def test_the_edges_of_every_operator(self):
        """Each pair of VALUES, signed and unsigned, in one ring each."""
        page, pick = bodies.Page(1 << 22), random.Random(3)
        forms = [(a + " %s " + b, pa + " %s " + pb)
                 for a, pa in (("arg0", "arg0"), ("u64(arg0)", "u64(arg0)"))
                 for b, pb in (("arg3", "arg3"), ("u64(arg3)", "u64(arg3)"))]
        cases, facts = [], []
        for op in ("+ - * & | ^ // % << >> == != < <= > >= and or").split():
            for text, python in forms:
                is_unsigned = "u64" in python
                expression = x86.parse_expression(text % op)
                spec = x86.Spec("trace", values=(expression,), n_slots=1024)
                place, window = page.place(spec), self.window(pick)
                vaddr = page.add(spec, place, window)
                code = compile("N(%s, %r)" % (python % op, is_unsigned),
                               text % op, "eval")
                facts.append((spec, place, code, expression.is_unsigned))
                for a in VALUES:
                    for b in VALUES:
                        regs = [pick.getrandbits(64) for _ in range(16)]
                        regs[7], regs[1], regs[4] = (a & MASK, b & MASK,
                                                     bodies.SP)
                        cases.append(bodies.Case(vaddr, tuple(regs), window))
        results, data = page.run(cases)
        self.assertEqual(set(results), {(0,) * 5})
        for spec, place, code, is_unsigned in facts:
            layout, n = x86.block_layout(spec), 0
            for a in VALUES:
                for b in VALUES:
                    at = layout.start + x86.RING_SLOTS + n * layout.entry_size
                    row, n = bodies.words(data, place, at, 5), n + 1
                    wanted = judged(code, {"arg0": a, "arg3": b},
                                    is_unsigned)
                    self.assertEqual(
                        (row[0], row[3] >> 32, row[4]),
                        (2 * n, wanted is None, (wanted or 0) & MASK),
                        (code.co_filename, a, b))

    def combined(self, grammar, page):
        """(Case, what check_combined() takes) of several expressions: of a
        record, or of the keys and the value of a sum; perhaps with when."""
        pick = grammar.random
        made = [self.made(grammar) for _ in range(pick.randrange(2, 7))]
        when = self.made(grammar) if pick.random() < 0.5 else None
        parts = tuple(expression for expression, _ in made)
        spec = x86.Spec("trace", values=parts, n_slots=2) \
            if pick.random() < 0.6 else \
            x86.Spec("sum", keys=parts[1:], values=parts[:1], n_entries=2)
        spec = spec._replace(when=when and when[0])
        place, window = page.place(spec), self.window(pick)
        vaddr = page.add(spec, place, window)
        regs = [pick.choice(VALUES) & MASK if pick.random() < 0.5 else
                pick.getrandbits(64) >> pick.choice((0, 32, 56))
                for _ in range(16)]
        regs[4] = bodies.SP
        return bodies.Case(vaddr, tuple(regs), window), (
            spec, place, made, when)

    def check_combined(self, case, data, spec, place, made, when):
        values = site_values(case.regs, stack_words())
        wanted = [judged(python, values, expression.is_unsigned)
                  for expression, python in made]
        is_wanted = judged(when[1], values, when[0].is_unsigned) \
            if when else 1
        layout = x86.block_layout(spec)
        faults, = bodies.words(data, place, x86.HEAD_FAULTS, 1)
        shown = [expression.text for expression, _ in made], when and when[0]
        if spec.action == "trace":
            row = bodies.words(data, place, layout.start + x86.RING_SLOTS,
                               4 + len(made))
            self.assertEqual(faults, is_wanted is None, shown)
            self.assertEqual(row[0], 2 * bool(is_wanted), shown)
            if is_wanted:
                self.assertEqual(row[3] >> 32, sum(
                    1 << n for n, value in enumerate(wanted)
                    if value is None), shown)
                self.assertEqual(row[4:], tuple(
                    (value or 0) & MASK for value in wanted), shown)
            return
        is_fault = is_wanted is None or bool(is_wanted) and None in wanted
        self.assertEqual(faults, is_fault, shown)
        rows = [bodies.words(data, place, layout.start + n
                             * layout.entry_size, layout.entry_size // 8)
                for n in range(layout.n_entries)]
        rows = [row for row in rows if row[0]]
        self.assertEqual(len(rows), bool(is_wanted and not is_fault), shown)
        for row in rows:
            n = len(made) - 1
            self.assertEqual(row[1:1 + n], tuple(
                value & MASK for value in wanted[1:]), shown)
            self.assertEqual(row[1 + n], 1, shown)
            self.assertEqual(row[2 + n] | row[3 + n] << 64,
                             wanted[0] & (1 << 128) - 1, shown)

    def test_several_random_expressions_in_one_body(self):
        for seed in range(2):
            grammar = Grammar(2000 + seed, has_loads=seed == 1)
            page = bodies.Page(1 << 19)
            page.data[0x800:0x900] = CONTENT
            made = []
            while len(made) < 300:
                try:
                    made.append(self.combined(grammar, page))
                except x86.UbpError as error:
                    self.assertRegex(str(error), "bytes of code|50 deep")
            results, data = page.run([case for case, _ in made])
            for (case, fact), result in zip(made, results):
                self.assertEqual(result, (0,) * 5, fact[0])
                self.check_combined(case, data, *fact)

    def test_20000_random_expressions_compute_what_python_does(self):
        for seed in range(self.N_PAGES):
            with self.subTest(seed):
                self.check_page(seed)

    def test_random_expressions_that_follow_pointers_do_too(self):
        self.check_page(1000, has_loads=True)


if __name__ == "__main__":
    unittest.main()
