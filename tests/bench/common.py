"""What all rows of the benchmark share: results, programs, counters."""
import contextlib
import ctypes
import hashlib
import os
import resource
import select
import statistics
import struct
import subprocess
import sys
import time
import typing

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
ROOT = os.path.dirname(TESTS)
BUILT = os.path.join(TESTS, ".build")
sys.path[:0] = [ROOT, TESTS, HERE]

import ubp             # noqa: E402

ANSWER_SECONDS = 60
CALLS, LOOPS = 10000, 60    # of what takes a few cycles: 100 us or less each


class Skip(Exception):
    """A row or a yardstick cannot be had here; the text says why."""


class Yardstick(typing.NamedTuple):
    name: str
    median: float
    ratio: float               # of the row's median to this, or its inverse
    goal: str = ""             # "<= 1.0", ">= 300" or ""


class Result(typing.NamedTuple):
    name: str
    what: str
    unit: str
    samples: list
    goal: str = ""             # "<= 5", ">= 1.9" or ""
    yardsticks: tuple = ()
    note: str = ""

    @property
    def median(self):
        return statistics.median(self.samples)


def is_met(value, goal):
    """Return True, False, or None where there is no goal."""
    if not goal:
        return None
    sign, limit = goal.split()
    return (value <= float(limit) if sign == "<=" else
            value >= float(limit))


# ---- programs --------------------------------------------------------------

def compiled(name):
    """Return the path of tests/bench/NAME.c, compiled if it changed."""
    source = os.path.join(HERE, name + ".c")
    with open(source, "rb") as file:
        key = hashlib.sha256(file.read()).hexdigest()[:12]
    path = os.path.join(BUILT, "bench-%s-%s" % (name, key))
    if not os.path.exists(path):
        compile_to(path, [source])
    return path


def compile_to(path, arguments):
    os.makedirs(BUILT, exist_ok=True)
    partial = "%s.%d" % (path, os.getpid())
    try:
        subprocess.run(["cc", "-O2", "-pthread", "-o", partial] + arguments,
                       check=True)
    except FileNotFoundError:
        raise Skip("no C compiler: apt-get install gcc libc-dev")
    os.rename(partial, path)


def many_symbols(n):
    """Return the path of a program with n function symbols."""
    path = os.path.join(BUILT, "bench-symbols-%d" % n)
    if os.path.exists(path):
        return path
    os.makedirs(BUILT, exist_ok=True)
    source = path + ".s"
    with open(source, "w") as file:
        file.write('.section .note.GNU-stack,"",@progbits\n.text\n'
                   ".globl main\nmain: sub $8,%rsp\ncall getchar@plt\n"
                   "add $8,%rsp\nret\n")
        for i in range(n):
            name = "module%02d_of_a_large_program_function_%06d" % (i % 97, i)
            file.write(".type %s,@function\n%s: push %%rax\npop %%rax\n"
                       "xor %%eax,%%eax\nret\n.size %s,.-%s\n"
                       % (name, name, name, name))
    compile_to(path, [source])
    os.remove(source)
    return path


class Child:
    """A program of ours that answers each line on its stdin with one."""

    def __init__(self, *argv):
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            universal_newlines=True, bufsize=1)

    @property
    def pid(self):
        return self.process.pid

    def ask(self, text=None):
        if text is not None:
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()
        ready = select.select([self.process.stdout], [], [], ANSWER_SECONDS)
        line = self.process.stdout.readline() if ready[0] else ""
        if not line:
            raise RuntimeError("%s: no answer to %r; status %r" % (
                self.process.args[0], text, self.process.poll()))
        return line.strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def file_offset(pid, vaddr):
    """Return (path, offset in the file) of a vaddr in a process."""
    with open("/proc/%d/maps" % pid) as maps:
        for line in maps:
            fields = line.split(None, 5)
            low, high = (int(word, 16) for word in fields[0].split("-"))
            if low <= vaddr < high:
                return fields[5].strip(), vaddr - low + int(fields[2], 16)
    raise Skip("0x%x is not mapped" % vaddr)


@contextlib.contextmanager
def armed(pid, where, action=None, when=None):
    """Probe `where` in pid, by default a count; taken out at the end."""
    with ubp.attach(pid) as target:
        probe = target.probe(where, action or ubp.Count(), when)
        if not probe.sites:
            raise Skip("no site of %s could be armed" % where)
        yield probe


def timed(function, *args):
    """Return (CPU seconds of all our threads and children, result) of a call.

    For what only computes: on a busy machine its CPU time stays the same.
    """
    def spent():
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (time.process_time() + children.ru_utime + children.ru_stime)
    start = spent()
    result = function(*args)
    return spent() - start, result


class Leaf(Child):
    """leaf.c: loops of calls."""

    def __init__(self):
        Child.__init__(self, compiled("leaf"))
        self.method = self.ask().split()[1]

    def cycles(self, name, n=CALLS, loops=LOOPS):
        """Return the cycles per call: of `loops` loops the fastest."""
        return float(self.ask("cycles %s %d %d" % (name, n, loops)))

    def rates(self, n_threads, name, ms):
        """Return each thread's calls per second of its CPU time."""
        return [float(word) for word in
                self.ask("threads %d %s %d" % (n_threads, name, ms)).split()]


def set_affinity(pid, cpu):
    for tid in os.listdir("/proc/%d/task" % pid):
        os.sched_setaffinity(int(tid), {cpu})


class Spent:
    """What a process uses: core cycles of its main thread, or CPU ns."""

    def __init__(self, pid):
        self.pid = pid
        self.libc = ctypes.CDLL(None, use_errno=True)
        # struct perf_event_attr, <linux/perf_event.h>: type 0 hardware,
        # size 112 (version 5), config 0 CPU cycles
        attr = struct.pack("<IIQ", 0, 112, 0).ljust(112, b"\0")
        self.fd = self.libc.syscall(
            298, ctypes.c_char_p(attr), ctypes.c_int(pid), ctypes.c_int(-1),
            ctypes.c_int(-1), ctypes.c_long(8))     # perf_event_open, CLOEXEC
        self.unit = "cycles" if self.fd >= 0 else "CPU ns"

    def read(self):
        if self.fd >= 0:
            return struct.unpack("<q", os.read(self.fd, 8))[0]
        total = 0
        for tid in os.listdir("/proc/%d/task" % self.pid):
            with open("/proc/%d/task/%s/schedstat" % (self.pid, tid)) as f:
                total += int(f.read().split()[0])
        return total

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
