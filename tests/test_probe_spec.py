"""Probes as people write them: the grammar, module names, patterns, hints."""
import os
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import ubp                                                      # noqa: E402

# text | module | function | offset | vaddr
GOOD = """
malloc                     |           | malloc              | 0    |
  malloc                   |           | malloc              | 0    |
libc:malloc                | libc      | malloc              | 0    |
libc:malloc+4              | libc      | malloc              | 4    |
libc:malloc+0x1f           | libc      | malloc              | 31   |
exe:*Command               | exe       | *Command            | 0    |
lib*:SSL_?ead              | lib*      | SSL_?ead            | 0    |
/usr/lib/libc.so.6:malloc  | /usr/lib/libc.so.6 | malloc     | 0    |
a::b::f                    |           | a::b::f             | 0    |
libx:a::b::f               | libx      | a::b::f             | 0    |
libx:a::f(int, char)       | libx      | a::f(int, char)     | 0    |
libx:a::f(int)+12          | libx      | a::f(int)           | 12   |
a::operator+               |           | a::operator+        | 0    |
a::operator+(int)          |           | a::operator+(int)   | 0    |
a::operator++              |           | a::operator++       | 0    |
libx:operator()            | libx      | operator()          | 0    |
_ZN1a1fEi                  |           | _ZN1a1fEi           | 0    |
f.cold                     |           | f.cold              | 0    |
libc:0x1f0                 | libc      |                     | 0    | 496
0x7f0000001000             |           |                     | 0    | 139637976731648
libc:0XFF                  | libc      |                     | 0    | 255
libc:f+16777216            | libc      | f                   | 16777216 |
[vdso]:time                | [vdso]    | time                | 0    |
x:f+4+8                    | x         | f+4                 | 8    |
x+                         |           | x+                  | 0    |
"""
# text | what its message says
BAD = """
                 | column 1: it is empty
:malloc          | column 1: no module before the colon
libc:            | column 6: no function behind the colon
libc:0x10+4      | column 10: an address takes no offset
0x10+4           | column 5: an address takes no offset
123              | column 1: a number
libc:12ab        | column 6: a number
libc:0xzz        | column 6: a number
malloc+4%return  | column 9: %return belongs to a whole function
f%return%return  | column 9: %return belongs to a whole function
main.c:42        | (FILE:LINE) is planned but not built yet
/src/a/main.c:42 | (FILE:LINE) is planned but not built yet
usdt:python:gc   | (usdt:) is planned but not built yet
usdt:gc          | (usdt:) is planned but not built yet
mem:             | column 5: no address and no symbol
mem:/8:w         | column 5: no address and no symbol
mem:mem:f        | column 5: one address or one symbol
mem:coun*        | column 5: one address or one symbol
mem:counter/3    | 3 bytes: a debug register watches 1, 2, 4 or 8
mem:counter/16:w | 16 bytes: a debug register watches 1, 2, 4 or 8
mem:counter/8:x  | column 14: :x is neither :w (writes) nor :rw (reads, too)
mem:0x10/4:rwx   | column 11: :rwx is neither :w (writes) nor :rw
mem:f%return     | column 5: one address or one symbol
"""


# text | module, symbol, offset, address, bytes (0: by its size), access
WATCHES = """
mem:counter               |      | counter    | 0 |    | 0 | w
mem:counter:rw            |      | counter    | 0 |    | 0 | rw
mem:counter/8             |      | counter    | 0 |    | 8 | w
mem:a::b/2:rw             |      | a::b       | 0 |    | 2 | rw
mem:libc:environ/8:w      | libc | environ    | 0 |    | 8 | w
mem:/lib/x.so:table+16/4  | /lib/x.so | table | 16 |   | 4 | w
mem:0x10/8:w              |      |            | 0 | 16 | 8 | w
mem:exe:0x10              | exe  |            | 0 | 16 | 0 | w
mem:exe:r                 | exe  | r          | 0 |    | 0 | w
"""


def rows(table):
    return [[cell.strip() for cell in line.split("|")]
            for line in table.strip("\n").splitlines()]


class Grammar(unittest.TestCase):

    def test_good_probes(self):
        for text, module, function, offset, *vaddr in rows(GOOD):
            with self.subTest(text):
                vaddr = int(vaddr[0]) if vaddr and vaddr[0] else None
                self.assertEqual(
                    ubp.parse_probe(text),
                    ubp.Spec(text, module, function, int(offset), False,
                             vaddr))

    def test_memory_is_named_with_its_size_and_access(self):
        for text, module, function, offset, vaddr, *watch in rows(WATCHES):
            with self.subTest(text):
                self.assertEqual(ubp.parse_probe(text), ubp.Spec(
                    text, module, function, int(offset), False,
                    int(vaddr) if vaddr else None,
                    (int(watch[0]), watch[1])))

    def test_bad_probes_say_why_and_where(self):
        for text, why in rows(BAD):
            with self.subTest(text):
                with self.assertRaises(ubp.ProbeError) as caught:
                    ubp.parse_probe(text)
                self.assertIn(why, str(caught.exception))
                self.assertTrue(caught.exception.hint)

    def test_any_text_is_a_spec_or_a_probe_error(self):
        pieces = ["", ":", "::", "+", "%", "0x", "7", "f", "*", "\0", "é",
                  "\udcff", "return", "mem:", "\n", "(", "/", "operator"]
        for a in pieces:
            for b in pieces:
                for c in pieces:
                    try:
                        ubp.parse_probe(a + b + c)
                    except ubp.ProbeError as error:
                        str(error)
        with self.assertRaises(ubp.ProbeError):
            ubp.parse_probe("f" * 5000)


class Patterns(unittest.TestCase):

    def test_star_and_question_mark_and_nothing_else(self):
        for pattern, text, wanted in (
                ("*", "", True), ("*", "x", True), ("a*", "abc", True),
                ("a*", "ba", False), ("*c", "abc", True), ("*c", "cb", False),
                ("a?c", "abc", True), ("a?c", "ac", False),
                ("a*b*c", "axxbyyc", True), ("a*b*c", "acb", False),
                ("a**c", "abc", True), ("*ab", "aab", True),
                ("*b*b", "ab", False), ("[ab]", "a", False),
                ("[ab]", "[ab]", True), ("a.c", "abc", False),
                ("*a*b*", "xxaxxbxx", True), ("a*a", "a", False),
                ("?", "\n", True), ("a", "a\n", False)):
            with self.subTest(pattern, text=text):
                self.assertEqual(bool(ubp._glob(pattern).match(text)),
                                 wanted)

    def test_no_pattern_explodes(self):
        started = time.process_time()
        self.assertFalse(ubp._glob("*a" * 60 + "*b").match("a" * 4000))
        self.assertLess(time.process_time() - started, 2)


SOURCE = r"""
#include <stdio.h>
#include <unistd.h>
volatile int x;
__attribute__((noinline, noclone)) int process(int n)
{ return n * 77 + x; }
int process_cold(int n) __asm__("process.cold");
int process_part(int n) __asm__("process.part.0");
int process_odd(int n) __asm__("process.partly");
int process_cold(int n) { return n + x; }
int process_part(int n) { return n + 2 * x; }
int process_odd(int n) { return n + 3 * x; }
int namely(int n) __asm__("_ZN4spam4eggs6namelyEi");
int namely(int n) { return n + x; }
int namelyc(int n) __asm__("_ZN4spam4eggs6namelyEc");
int namelyc(int n) { return n + 4 * x; }
int literal(int n) __asm__("\"odd*name\"");
int literal(int n) { return n + 9 * x; }
int main(void)
{ alarm(240); puts("ready"); fflush(stdout); for (;;) pause(); }
"""


class Finding(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory(prefix="ubp-spec-")
        cls.path = os.path.join(cls.folder.name, "spammer")
        try:
            subprocess.run(["cc", "-O1", "-x", "c", "-", "-o", cls.path],
                           input=SOURCE.encode(), check=True)
        except FileNotFoundError:
            cls.folder.cleanup()
            raise unittest.SkipTest("needs cc: install gcc")
        cls.process = subprocess.Popen([cls.path], stdout=subprocess.PIPE)
        cls.process.stdout.readline()
        cls.modules = ubp.modules(cls.process.pid)

    @classmethod
    def tearDownClass(cls):
        cls.process.kill()
        cls.process.wait()
        cls.process.stdout.close()
        cls.folder.cleanup()

    def find(self, text, notes=None):
        return ubp.find(self.modules, ubp.parse_probe(text), None, notes)

    def names(self, text, notes=None):
        return sorted(site.names[0] for site in self.find(text, notes))

    def error(self, text):
        with self.assertRaises(ubp.SymbolError) as caught:
            self.find(text)
        return "%s / %s" % (caught.exception, caught.exception.hint)

    def test_module_names(self):
        libc = next(m for m in self.modules if m.soname.startswith("libc"))
        for text in ("libc", libc.name, libc.soname, "libc*", "l?bc",
                     libc.path, "*/" + libc.name):
            with self.subTest(text):
                self.assertEqual({site.module for site in self.find(
                    text + ":strdup")}, {libc})
        for text in ("exe", "spammer", self.path, "spam*"):
            with self.subTest(text):
                self.assertEqual(self.names(text + ":process"), ["process"])
        link = os.path.join(self.folder.name, "link")
        os.symlink("spammer", link)
        self.assertEqual(self.names(link + ":process"), ["process"])

    def test_a_wrong_module_is_named_with_what_is_near(self):
        self.assertIn("no module \"libcc\"", self.error("libcc:malloc"))
        self.assertIn("spammer", self.error("spamer:process"))
        self.error("/nowhere/libc.so.6:malloc")
        self.error("lib:malloc")

    def test_parts_are_not_the_function_but_are_told(self):
        notes = []
        self.assertEqual(self.names("exe:process", notes), ["process"])
        text = "\n".join(notes)
        self.assertIn("process.cold", text)
        self.assertIn("process.part.0", text)
        self.assertNotIn("partly", text)
        self.assertEqual(self.names("exe:process.cold"), ["process.cold"])
        self.assertEqual(self.names("exe:proc*"), [
            "process", "process.part.0", "process.partly"])

    def test_mangled_and_demangled_names(self):
        both = ["spam::eggs::namely"] * 2
        for text, wanted in (
                ("exe:spam::eggs::namely", both),
                ("exe:spam::eggs::namely(int)", both[:1]),
                ("exe:spam::eggs::namely( int )", both[:1]),
                ("exe:spam::*::namely", both), ("exe:spam::*", both),
                ("exe:*namely(char)", both[:1]),
                ("exe:_ZN4spam4eggs6namelyEc", ["_ZN4spam4eggs6namelyEc"])):
            with self.subTest(text):
                self.assertEqual(self.names(text), wanted)
        self.error("exe:eggs::namely")
        self.error("exe:spam::eggs::namely(long)")

    def test_a_symbol_comes_before_a_pattern(self):
        self.assertEqual(self.names("exe:odd*name"), ["odd*name"])

    def test_offsets_and_instructions(self):
        start = self.find("exe:process")[0]
        size = ubp.ubp_x86.decode(
            start.module.read_file(start.vaddr, 15), start.vaddr).size
        site = self.find("exe:process+%d" % size)[0]
        self.assertEqual((site.vaddr, site.offset),
                         (start.vaddr + size, size))
        same = self.find("0x%x" % site.vaddr)[0]
        self.assertEqual((same.names, same.offset), (("process",), size))
        for text in ("exe:process+1", "0x%x" % (start.vaddr + 1)):
            error = self.error(text)
            self.assertIn("inside an instruction", error)
            self.assertIn("process+0x0 and +0x%x" % size, error)
        self.assertIn("has only %d bytes" % start.function.size,
                      self.error("exe:process+1000"))

    def test_addresses_without_code(self):
        self.assertIn("no module has code at 0x10", self.error("0x10"))
        self.error("exe:0x0")
        self.error("exe:0xffffffffffffffff")
        self.assertIn("an address needs one module", self.error("*:0x1000"))

    def test_three_closest_names(self):
        self.assertIn("did you mean process", self.error("exe:proces"))
        self.assertIn("namely", self.error("exe:_ZN4spam4eggs6namelEi"))
        self.assertIn("exe:qqqq", self.error("exe:qqqq"))
        self.assertIn("suffix is %return", self.error("exe:process%retrun"))

    def test_a_file_name_hints_at_the_shell(self):
        before = os.getcwd()
        os.chdir(self.folder.name)
        try:
            open("dump.rdb", "w").close()
            error = self.error("dump.rdb")
        finally:
            os.chdir(before)
        self.assertIn("dump.rdb", error)
        self.assertIn("did the shell expand *? quote the probe", error)

    def test_no_module_means_every_module(self):
        self.assertGreater(len({site.module for site in self.find("*e*")}),
                           2)

    def test_a_limit_ends_the_search_early(self):
        with self.assertRaisesRegex(ubp.SymbolError, "more than 100"):
            ubp.find(self.modules, ubp.parse_probe("libc:*"), None, None,
                     100)


if __name__ == "__main__":
    unittest.main()
