"""Programs with all of themselves probed, that must not notice it.

The judge is the program: what targets/exact.c finds in its registers and on
its stacks, and what real programs print, unprobed and probed.
"""
import collections
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest

import ubp
import ubp_x86 as x86
from build import build
from test_structure import TOP

# argv: patterns "--" command. Its own words are on stderr, the last line;
# stdout and the exit status are the command's.
RUN = r"""
import signal, sys, time
signal.alarm(%d)
sys.path.insert(0, %r)
import ubp
at = sys.argv.index("--")
target = ubp.launch(sys.argv[at + 1:], timeout=60)
try:
    began = time.monotonic()
    probe = target.probe(sys.argv[1:at], ubp.Count(), max_sites=10**6,
                         timeout=180)
    seconds = time.monotonic() - began
    target.wait()
    sys.stderr.write("\n%%d %%d %%d %%d %%d\n" %% (
        len(probe.sites), len(probe.refused), probe.hits, target.pause_us,
        1000 * seconds))
    status = target.returncode
finally:
    target.close(timeout=30)
sys.exit(status if status >= 0 else 128 - status)
"""


class Told(collections.namedtuple(
        "Told", "sites refused hits pause_us ms")):
    """What a run under RUN says of its probe."""


def probed(patterns, command, seconds=300, **options):
    """Run a command under probes. -> (exit status, stdout, Told)"""
    done = subprocess.run(
        [sys.executable, "-c", RUN % (seconds, TOP)] + list(patterns)
        + ["--"] + list(command), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options)
    text = done.stderr.decode("utf-8", "replace")
    try:
        return done.returncode, done.stdout, Told(*map(
            int, text.strip().splitlines()[-1].split()))
    except (ValueError, TypeError, IndexError):
        raise AssertionError("status %d: %s" % (done.returncode,
                                                text[-3000:]))


def plain(command, **options):
    """Run a command. -> (exit status, stdout)"""
    done = subprocess.run(command, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, **options)
    return done.returncode, done.stdout


class EveryRegister(unittest.TestCase):
    """Functions that begin with whatever a jump displaces."""

    @classmethod
    def setUpClass(cls):
        cls.path = build("exact", ("-no-pie",))
        cls.wanted = plain([cls.path, "2", "3", "0"])

    def cases(self):
        """{name: [offsets of its instructions]} of its functions."""
        elf = ubp.Elf(ubp.FileImage(os.open(self.path, os.O_RDONLY)), "exact")
        symbols, found = subprocess.check_output(
            ["nm", "-S", self.path]).decode(), {}
        for line in symbols.splitlines():
            words = line.split()
            if len(words) == 4 and words[3].startswith("case_"):
                vaddr, size = int(words[0], 16), int(words[1], 16)
                code = elf.read_vaddr(vaddr, size)
                try:
                    found[words[3]] = [at for at, _ in x86.sweep(code, vaddr)]
                except x86.DecodeError:
                    found[words[3]] = [0]           # data within
        return found

    def test_two_runs_leave_the_same(self):
        self.assertEqual(self.wanted[0], 0)
        self.assertNotIn(b"differs", self.wanted[1])
        self.assertGreater(self.wanted[1].count(b"\n"), 100)
        self.assertEqual(plain([self.path, "2", "3", "0"]), self.wanted)

    def test_entries_probed(self):
        status, out, told = probed(["exe:case_*"],
                                   [self.path, "2", "3", "0"])
        self.assertEqual((status, out), self.wanted)
        n_avx = 3 * (b"\navx " not in out)
        recursions = 3 * 6              # case_recurse, three deep
        self.assertEqual(told.hits, 6 * (told.sites - n_avx) + recursions)
        self.assertLessEqual(told.refused, 2)

    def test_every_instruction_probed(self):
        cases = self.cases()
        sites = ["exe:%s+0x%x" % (name, at) if at else "exe:" + name
                 for name, places in sorted(cases.items()) for at in places]
        status, out, told = probed(sites, [self.path, "2", "3", "0"])
        self.assertEqual((status, out), self.wanted)
        self.assertGreater(told.sites, 0.8 * len(sites))

    def test_under_thousands_of_signals_in_many_threads(self):
        sites = ["exe:%s+0x%x" % (name, at) if at else "exe:" + name
                 for name, places in sorted(self.cases().items())
                 for at in places[:4]]
        status, out, told = probed(sites, [self.path, "300", "3", "70"])
        self.assertEqual((status, out), self.wanted)
        self.assertGreater(told.hits, 300 * 3 * len(self.cases()))



PROGRAM_SQL = """
create table t(a integer primary key, b text, c real);
with recursive n(i) as (select 1 union all select i + 1 from n
    where i < 5000)
insert into t select i, 'row' || i || hex(i * 7919), i * 0.5 from n;
create index ti on t(b);
select count(*), sum(a), avg(c), max(b) from t where b like '%7%';
select substr(b, 5, 2), count(*) from t group by 1 order by 2 desc, 1;
select json_object('a', a, 'b', b) from t order by b desc limit 9;
"""
PROGRAM_C = """
#include <stdio.h>
struct s { int a; double b; char c[20]; };
int f(struct s *t, int n) {
    int sum = 0;
    for (int i = 0; i < n; i++) switch (t[i].a % 7) {
    case 0: sum += t[i].b * 3; break; case 1: sum ^= i; break;
    case 2: sum -= t[i].c[i % 20]; break; case 3: sum <<= 1; break;
    case 4: sum /= 3; break; default: sum += printf("%d", sum); }
    return sum;
}
"""
# package | program and arguments; {} is a folder with data, t.sql, t.i
PROGRAMS = """
xz-utils | xz -k -c -T2 {}/data
sqlite3  | sqlite3 :memory: ".read {}/t.sql"
openssl  | openssl speed -seconds 1 -bytes 1024 sha256 aes-128-cbc
gcc      | @cc1 -quiet -O2 -fpreprocessed {}/t.i -o -
python3  | @python -m test -q --randseed 1 test_json test_struct test_math
"""
# The same in the full run: UBP_TEST_ALL=1.
LONG_PROGRAMS = """
openssl  | openssl dgst -sha512 -hex {}/data
openssl  | openssl enc -aes-256-ctr -K 11 -iv 22 -in {}/data
openssl  | openssl speed -seconds 1 -bytes 1024 sha256 aes-128-cbc rsa2048
python3  | @python -m test -q --randseed 1 test_re test_bytes test_generators \
test_coroutines test_decimal test_pickle test_zlib test_hashlib test_signal \
test_sys_settrace
"""
IS_ALL = bool(os.environ.get("UBP_TEST_ALL"))


def program_path(name):
    """Where a program of PROGRAMS is, or "" """
    if name == "@python":
        return os.path.realpath(sys.executable)
    if name == "@cc1":
        try:
            name = subprocess.check_output(
                ["gcc", "-print-prog-name=cc1"]).decode().strip()
        except OSError:
            return ""
    return shutil.which(name) or ""


class RealPrograms(unittest.TestCase):
    """Every function of a program and of its libraries, all at once."""

    def fill(self, folder):
        with open(sys.executable, "rb") as source, \
                open(os.path.join(folder, "data"), "wb") as data:
            data.write(source.read(1 << 20))
        with open(os.path.join(folder, "t.sql"), "w") as f:
            f.write(PROGRAM_SQL)
        source = os.path.join(folder, "t.c")
        with open(source, "w") as f:
            f.write(PROGRAM_C)
        if shutil.which("gcc"):
            subprocess.check_call(["gcc", "-E", source, "-o",
                                   os.path.join(folder, "t.i")])

    def check(self, command, is_output_equal=True):
        wanted, wanted_out = plain(command)
        status, out, told = probed(["*"], command)
        self.assertEqual(status, wanted)
        if is_output_equal:
            self.assertEqual(out, wanted_out)
        self.assertGreater(told.hits, 10000)
        self.assertLess(told.refused, 0.02 * told.sites + 10)
        print("\n%-10s %6d functions armed, %4d refused, %10d hits, pause "
              "%.1f ms" % (os.path.basename(command[0]), told.sites,
                           told.refused, told.hits, told.pause_us / 1e3))

    def test_results_are_those_of_the_unprobed_program(self):
        rows = PROGRAMS + (LONG_PROGRAMS if IS_ALL else "")
        with tempfile.TemporaryDirectory() as folder:
            self.fill(folder)
            for row in filter(None, rows.splitlines()):
                package, text = [part.strip() for part in row.split("|")]
                command = shlex.split(text.format(folder))
                path = program_path(command[0])
                with self.subTest(text):
                    if not path:
                        self.skipTest("no %s: apt-get install %s"
                                      % (command[0], package))
                    self.check([path] + command[1:], is_output_equal="speed"
                               not in command and "test" not in command)


if __name__ == "__main__":
    unittest.main()
