"""Live targets for the tests: start, talk to, look at from outside, end.

    with live.Target("busy", 3) as target:      tests/targets/busy.c
        before = live.Snapshot(target.pid)
        target.send("g")                        one-letter commands
        n = target.ask("p")["hot"]              answer: "key=value ..."
        target.quit()                           its own verdict: clean
        live.Snapshot(target.pid).compare(test, before)

Every target is bounded in time by its own alarm(), dies with its parent, and
is ended by pid. Nothing here uses ubp to judge ubp: text bytes, mappings and
descriptors are read from /proc.
"""
import collections
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
for folder in (HERE, os.path.dirname(HERE)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from build import build, build_library          # noqa: E402,F401

IS_ROOT = os.geteuid() == 0


class Wrong(AssertionError):
    """A target found an error, died, or did not answer."""


class Process:
    """A child that is spoken to through pipes, line by line."""

    def __init__(self, command, env=None, seconds=240, **options):
        self.command = [str(word) for word in command]
        self.errors = tempfile.TemporaryFile()
        environment = dict(os.environ, UBP_TEST_SECONDS=str(seconds))
        environment.update(env or {})
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, env=environment, bufsize=0, **options)
        self.pid = self.process.pid
        self.rest = b""

    def __enter__(self):
        return self

    def __exit__(self, *ignored):
        self.kill()

    def kill(self):
        """End it now, whatever its state."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for f in (self.process.stdin, self.process.stdout, self.errors):
            f.close()

    def send(self, commands):
        try:
            self.process.stdin.write(commands.encode())
        except BrokenPipeError:
            raise Wrong(self.account("has gone"))

    def line(self, timeout=60):
        """The next line of its standard output, without the newline."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self.rest:
            left = deadline - time.monotonic()
            ready = select.select([self.process.stdout], [], [],
                                  max(left, 0))[0]
            data = os.read(self.process.stdout.fileno(), 65536) \
                if ready else b""
            if not data:
                raise Wrong(self.account("ended" if ready
                                         else "does not answer"))
            self.rest += data
        line, self.rest = self.rest.split(b"\n", 1)
        return line.decode("utf-8", "replace")

    def answer(self, timeout=60):
        """The next line as a dict; numbers are ints."""
        words = (word.partition("=") for word in self.line(timeout).split())
        return {key: int(value) if re.match(r"-?\d+$", value) else value
                for key, _, value in words}

    def ask(self, command, timeout=60):
        self.send(command)
        return self.answer(timeout)

    def stderr(self):
        self.errors.seek(0)
        return self.errors.read().decode("utf-8", "replace")

    def has_ended(self):
        """Is it a zombie, or gone? Its parent is we."""
        return self.process.poll() is not None

    def account(self, what):
        """One text with all that is known of a failed child."""
        if what == "ended":
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                pass
        code = self.process.poll()
        return "%s %s; exit status %s; stderr: %s" % (
            " ".join(self.command), what, code, self.stderr() or "none")

    def wait(self, timeout=60):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Wrong(self.account("did not end"))


class Target(Process):
    """A program of tests/targets, started and ready."""

    def __init__(self, name, *arguments, flags=(), env=None, seconds=240,
                 path=None, prefix=(), **options):
        path = path or build(name, flags)
        super().__init__(list(prefix) + [path] + list(arguments), env,
                         seconds, **options)
        try:
            while True:
                line = self.line()
                if line.startswith("ready"):
                    break
        except Wrong:
            self.kill()
            raise
        self.path = path
        self.ready = dict(word.partition("=")[::2]
                          for word in line.split()[1:])

    def quit(self, tolerant=False):
        """Let it end; its last line. Raises Wrong unless it is clean."""
        self.send("q")
        answer = self.answer(30)
        status = self.wait()
        if (status or answer.get("wrong")) and not tolerant:
            raise Wrong(self.account("says %r" % answer))
        return answer

    def operations(self):
        """What blocked.c reports: {name: {rounds, eintr, short, ...}}."""
        answer, operations = self.ask("r"), collections.OrderedDict()
        while "end" not in answer:
            operations[answer["op"]] = answer
            answer = self.answer()
        return operations


# ---- what /proc says ------------------------------------------------------
Mapping = collections.namedtuple("Mapping",
                                 "start end permissions offset inode path")


def maps(pid):
    """The mappings of a process as a list of Mapping."""
    result = []
    with open("/proc/%s/maps" % pid, errors="surrogateescape") as f:
        for line in f:
            words = line.rstrip("\n").split(None, 5)
            start, end = words[0].split("-")
            result.append(Mapping(int(start, 16), int(end, 16), words[1],
                                  int(words[2], 16), int(words[4]),
                                  words[5] if len(words) > 5 else ""))
    return result


def status(pid, tid=None):
    """/proc/PID/status as a dict of strings."""
    path = "/proc/%s/status" % pid if tid is None \
        else "/proc/%d/task/%d/status" % (pid, tid)
    with open(path, errors="replace") as f:
        return dict(line.rstrip("\n").split(":\t", 1) if ":\t" in line
                    else (line.strip(), "") for line in f)


def threads(pid):
    return sorted(int(tid) for tid in os.listdir("/proc/%s/task" % pid))


def tracers(pid):
    """{tid: tracer} of the traced threads."""
    found = {}
    for tid in threads(pid):
        try:
            tracer = int(status(pid, tid)["TracerPid"])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if tracer:
            found[tid] = tracer
    return found


def states(pid):
    """The state letters of all threads, sorted and joined."""
    letters = []
    for tid in threads(pid):
        try:
            letters.append(status(pid, tid)["State"][0])
        except (FileNotFoundError, ProcessLookupError):
            pass
    return "".join(sorted(letters))


def descriptors(pid):
    """{number: what it refers to}."""
    found, folder = {}, "/proc/%s/fd" % pid
    for name in os.listdir(folder):
        try:
            found[int(name)] = os.readlink(os.path.join(folder, name))
        except FileNotFoundError:
            pass
    return found


def changed_text(pid):
    """[(path, vaddr, old, new)] of text bytes that differ from their file."""
    changes = []
    with open("/proc/%d/mem" % pid, "rb", 0) as memory:
        for m in maps(pid):
            if "x" not in m.permissions or not m.path.startswith("/") \
                    or m.path.startswith("/memfd:"):
                continue
            path = m.path.replace(" (deleted)", "")
            with open(path, "rb") as f:
                f.seek(m.offset)
                old = f.read(m.end - m.start)
            memory.seek(m.start)
            new = memory.read(m.end - m.start)[:len(old)]
            if old == new:
                continue
            changes += [(path, m.start + i, old[i], new[i])
                        for i in range(len(old)) if old[i] != new[i]]
    return changes


def arenas(pid):
    """The mappings that ubp added, as their name tells."""
    return [m for m in maps(pid) if m.path.startswith("/memfd:ubp")]


ALL_BLOCKED = "fffffffffffbfeff"


class Snapshot:
    """Mappings, descriptors, changed text and tracer of a process."""

    def __init__(self, pid):
        self.pid = pid
        self.maps = maps(pid)
        # Less what busy opens for a moment while it runs.
        self.fds = {n: name for n, name in descriptors(pid).items()
                    if not name.endswith("/schedstat")}
        self.text = changed_text(pid)
        self.tracers = tracers(pid)
        self.masks = {tid: self._mask(tid) for tid in threads(pid)}

    def _mask(self, tid):
        # The C library starts a thread with every signal blocked.
        settled(lambda: status(self.pid, tid)["SigBlk"] != ALL_BLOCKED, 5)
        found = status(self.pid, tid)
        return tuple(found[key] for key in ("SigBlk", "SigIgn", "SigCgt"))

    def compare(self, test, before, masks=True):
        """Assert that all is as it was before.

        masks   compare signal masks too: not where the target changes them
        """
        test.assertEqual([], self.text[:8], "text differs from its file")
        test.assertEqual({}, self.tracers, "still traced")
        test.assertEqual(before.fds, self.fds, "descriptors")
        test.assertEqual([m for m in before.maps if m not in self.maps],
                         [m for m in self.maps if m not in before.maps],
                         "mappings")
        for tid in set(before.masks) & set(self.masks) if masks else ():
            test.assertEqual(before.masks[tid], self.masks[tid],
                             "signal masks of %d" % tid)


def settled(predicate, timeout=20):
    """Wait until predicate() is true; its last value."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value or time.monotonic() > deadline:
            return value
        time.sleep(0.005)


def stop(pid):
    """SIGSTOP, and wait until every thread is stopped."""
    os.kill(pid, signal.SIGSTOP)
    if not settled(lambda: set(states(pid)) == {"T"}):
        raise Wrong("pid %d does not stop: %s" % (pid, states(pid)))


# ---- helpers for what some tests need -------------------------------------
def symbol(path, name):
    """(vaddr, file offset) of a symbol of an ELF file, by nm and readelf."""
    text = subprocess.check_output(["nm", path]).decode()
    vaddr = next(int(line.split()[0], 16) for line in text.splitlines()
                 if line.split()[-1] == name)
    text = subprocess.check_output(["readelf", "-lW", path]).decode()
    for line in text.splitlines():
        words = line.split()
        if words and words[0] == "LOAD":
            offset, low, size = (int(words[i], 16) for i in (1, 2, 4))
            if low <= vaddr < low + size:
                return vaddr, vaddr - low + offset
    raise ValueError(name)


class KernelUprobe:
    """A uprobe through perf_event_open in each thread of a process: gone
    when its descriptors close.

    An event per processor would miscount: each is a probe of its own, asked
    in turn at every hit, and a thread that migrates in between counts twice
    or not at all.
    """

    def __init__(self, pid, path, offset):
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            with open("/sys/bus/event_source/devices/uprobe/type") as f:
                kind = int(f.read())
        except OSError:
            raise unittest.SkipTest("this kernel has no uprobes "
                                    "(CONFIG_UPROBE_EVENTS)")
        self.name = ctypes.create_string_buffer(os.fsencode(path))
        attribute = bytearray(128)              # struct perf_event_attr
        attribute[0:4] = kind.to_bytes(4, "little")
        attribute[4:8] = (128).to_bytes(4, "little")
        attribute[56:64] = ctypes.addressof(self.name).to_bytes(8, "little")
        attribute[64:72] = offset.to_bytes(8, "little")
        data = (ctypes.c_char * 128).from_buffer(attribute)
        self.fds = []
        for tid in threads(pid):
            fd = libc.syscall(298, data, tid, -1, -1, 8)
            if fd >= 0:
                self.fds.append(fd)
        if not self.fds:
            raise unittest.SkipTest(
                "perf_event_open of a uprobe: %s; run as root"
                % os.strerror(ctypes.get_errno()))

    def count(self):
        return sum(int.from_bytes(os.read(fd, 8), "little")
                   for fd in self.fds)

    def __enter__(self):
        return self

    def __exit__(self, *ignored):
        for fd in self.fds:
            os.close(fd)


def rounds(pid, sites, n, between=0.0, inside=0.0, seconds=5):
    """Attach, probe, remove and close up to n times; the sum of the counts.

    On a loaded machine fewer times: no longer than the seconds.
    """
    ubp, total = core(), 0
    deadline = time.monotonic() + seconds
    for _ in range(n):
        if time.monotonic() > deadline:
            break
        with ubp.attach(pid) as target:
            probe = target.probe(sites, ubp.Count())
            if inside:
                time.sleep(inside)
            probe.remove()
            total += probe.read()
        if between:
            time.sleep(between)
    return total


class Aside:
    """function() in a forked child, ended and reaped at the end of `with`."""

    def __init__(self, function):
        self.pid, self.status = os.fork(), None
        if self.pid == 0:
            code = 1
            try:
                signal.alarm(240)
                function()
                code = 0
            finally:
                os._exit(code)

    def is_running(self):
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is None

    def __enter__(self):
        return self

    def __exit__(self, *ignored):
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        if self.status and not ignored[0]:
            raise Wrong("the process aside ended with %x" % self.status)


def core():
    """The library, or a skip that says why there is none."""
    try:
        import ubp
    except ImportError as error:
        raise unittest.SkipTest("no ubp.py to test: %s" % error)
    return ubp


PROLOGUE = """
import os, sys, time
sys.path.insert(0, %r)
import ubp
""" % os.path.dirname(HERE)


def python(code, *arguments, env=None, seconds=240, **options):
    """A Python child that has imported ubp; see Process."""
    prologue = PROLOGUE + "import signal; signal.alarm(%d)\n" % seconds
    return Process([sys.executable, "-c", prologue + code]
                   + list(arguments), env, seconds, **options)
