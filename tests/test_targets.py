"""Every kind of program and of need: counts are true, and no trace is left.

Each target counts its own calls (tests/targets/kinds.c): truth is what it
says, not what ubp says. Text, mappings and descriptors before and after are
read from /proc and compared byte by byte. A row of a table is a case that
anybody can add.
"""
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import live
import test_cli

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
UBP = os.path.join(TOP, "ubp.py")
COMMAND = test_cli.COMMAND
MUSL_SPECS = "/usr/lib/x86_64-linux-musl/musl-gcc.specs"
NOBODY = 65534
PATIENCE = 30                       # s; the machine may be loaded
AS_NOBODY = ("setpriv", "--reuid=%d" % NOBODY, "--regid=%d" % NOBODY,
             "--clear-groups")


def setUpModule():
    global ubp
    ubp = live.core()


needs_root = unittest.skipUnless(
    live.IS_ROOT, "needs root to change users, roots and namespaces; "
    "run the tests as root")


def need(command, package):
    """The path of a command, or a skip that says what to install."""
    path = shutil.which(command) or shutil.which(command, path="/usr/sbin")
    if not path:
        raise unittest.SkipTest("no %s: apt-get install %s"
                                % (command, package))
    return path


class Whole:
    """Text, mappings and descriptors of a process, to be found again.

    tid   of a living thread, where the leader is a zombie
    """

    def __init__(self, pid, tid=None):
        self.pid, self.tid = pid, tid or pid
        self.task = "%d/task/%d" % (pid, self.tid)
        self.maps = live.maps(self.task)
        self.fds = live.descriptors(self.task)
        self.text = self.memory(lambda m: "x" in m.permissions)

    def memory(self, is_wanted):
        """{start: bytes} of the mappings that are wanted."""
        found = {}
        with open("/proc/%s/mem" % self.task, "rb", 0) as memory:
            for m in live.maps(self.task):
                if is_wanted(m) and m.path not in ("[vsyscall]", "[vvar]"):
                    memory.seek(m.start)
                    found[m.start] = memory.read(m.end - m.start)
        return found

    def check(self, test, what=""):
        """Assert that all is again as it was."""
        now = Whole(self.pid, self.tid)
        test.assertEqual({}, live.tracers(self.pid), "still traced " + what)
        test.assertEqual([m for m in self.maps if m not in now.maps],
                         [m for m in now.maps if m not in self.maps],
                         "mappings " + what)
        test.assertEqual(self.fds, now.fds, "descriptors " + what)
        for start, text in self.text.items():
            test.assertEqual([], changes(text, now.text[start], start),
                             "text " + what)

    def changed(self):
        """[(vaddr, old, new)] of text bytes that differ now."""
        now = Whole(self.pid, self.tid).text
        return [change for start, text in self.text.items()
                for change in changes(text, now.get(start, b""), start)]


def stat_of(pid):
    """[name, pid of the parent] of a process; [] if there is none."""
    try:
        found = live.status(pid)
        return [found["Name"], found["PPid"]]
    except (OSError, KeyError):
        return []


def changes(old, new, start):
    """The first bytes that differ: [(vaddr, old, new)]."""
    if old == new:
        return []
    return [(hex(start + i), old[i], new[i])
            for i in range(min(len(old), len(new))) if old[i] != new[i]][:8]


@contextlib.contextmanager
def folder():
    """A folder that everybody may enter."""
    path = tempfile.mkdtemp(prefix="ubp-test-")
    os.chmod(path, 0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def copied(source, target, mode=0o755):
    shutil.copy(source, target)
    os.chmod(target, mode)
    return target


def kinds(*flags):
    """tests/targets/kinds.c built with these flags."""
    return live.build("kinds", flags)


def run(*words, command=COMMAND, **options):
    """Run ubp's command line. -> (exit status, stdout, stderr)"""
    process = subprocess.Popen(
        list(command) + [str(word) for word in words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options)
    try:
        out, err = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.returncode, out.decode(), err.decode()


def only_child(pid):
    """The pid of a process's one child."""
    def child():
        with open("/proc/%d/task/%d/children" % (pid, pid)) as f:
            return f.read().split()
    return int(live.settled(child)[0])


class Case(unittest.TestCase):
    """What all kinds of target are put through."""

    def counted(self, process, where="exe:counted", key="counted", pid=None,
                tid=None, arena="auto", n_sites=1):
        """Count twice, compare with the truth, restore, compare again.

        -> (sites, notes)
        """
        pid = pid or process.pid
        process.ask("c", PATIENCE)
        before = Whole(pid, tid)
        with mock.patch.dict(os.environ, UBP_ARENA=arena):
            target = ubp.attach(pid)
        try:
            probe = target.probe(where, ubp.Count(), timeout=PATIENCE)
            self.assertEqual(n_sites, len(probe.sites), probe.refused)
            self.assertNotEqual([], before.changed(), "nothing is patched")
            self.assertEqual({}, live.tracers(pid), "traced while it counts")
            truth = 0
            for _ in range(2):
                truth += process.ask("c", PATIENCE)[key]
                self.assertEqual(truth, probe.read())
        finally:
            target.close(PATIENCE)
        before.check(self)
        self.assertEqual(0, process.ask("c", PATIENCE)["wrong"])
        self.assertEqual(truth, probe.read(), "it still counts")
        return probe.sites, target.notes

    def refused(self, process, error, words, where="exe:counted", pid=None,
                tid=None):
        """Attach and probe, and be refused for a reason, without a trace."""
        pid = pid or process.pid
        before = Whole(pid, tid)
        with self.assertRaises(error) as caught:
            with ubp.attach(pid) as target:
                target.probe(where, ubp.Count(), timeout=PATIENCE)
        self.assertRegex(str(caught.exception), words)
        before.check(self)
        return caught.exception


# name | flags of cc | probe | what is counted
BUILDS = """
PIE                     | -pie -fPIE                                   | exe:counted          | counted
another name            |                                              | exe:same_as_counted  | counted
at its own address      | -no-pie                                      | exe:0x{counted}      | counted
no PIE                  | -no-pie                                      | exe:counted          | counted
no room below           | -no-pie -Wl,-Ttext-segment=0x10000           | exe:counted          | counted
static                  | -static                                      | exe:counted          | counted
static PIE              | -static-pie                                  | exe:counted          | counted
static, IFUNC           | -static                                      | exe:strlen           | strlen
musl                    | {musl}                                       | exe:counted          | counted
musl, its libc          | {musl}                                       | libc:strlen          | strlen
musl static             | {musl} -static                               | exe:counted          | counted
musl static, its libc   | {musl} -static                               | exe:strlen           | strlen
musl static PIE         | {musl} -static-pie                           | exe:counted          | counted
stripped, by address    | -Wl,-s                                       | exe:0x{counted}      | counted
stripped, exported      | -rdynamic -Wl,-s                             | exe:counted          | counted
stripped, no PIE        | -no-pie -Wl,-s                               | exe:0x{counted}      | counted
endbr64                 | -fcf-protection=full                         | exe:counted          | counted
not optimised           | -O0                                          | exe:counted          | counted
big code model          | -mcmodel=large -fno-pie -no-pie              | exe:counted          | counted
IFUNC of libc           |                                              | libc:strlen          | strlen
vdso                    |                                              | vdso:*clock_gettime  | clock
by run-time address     |                                              | 0x{at}               | counted
lld or gold's layout    | -Wl,-z,noseparate-code                       | exe:counted          | counted
packed relocations      | -Wl,-z,pack-relative-relocs                  | exe:counted          | counted
no hash, no build-id    | -Wl,--build-id=none -Wl,--hash-style=sysv    | exe:counted          | counted
profiled by gprof       | -pg -no-pie                                  | exe:counted          | counted
sections of their own   | -ffunction-sections -Wl,--gc-sections        | exe:counted          | counted
instrumented entries    | -pg -mfentry -no-pie                         | exe:counted          | counted
room for patches        | -fpatchable-function-entry=5                 | exe:counted          | counted
small                   | -Os                                          | exe:counted          | counted
fast                    | -O3 -march=native                            | exe:counted          | counted
guarded stacks          | -fstack-protector-all -fstack-clash-protection | exe:counted        | counted
checked addresses       | -fsanitize=address -static-libasan           | exe:counted          | counted
no unwind tables        | -fno-asynchronous-unwind-tables -no-pie      | exe:counted          | counted
"""


class Builds(Case):
    """However it was built."""

    def rows(self):
        for line in BUILDS.strip().splitlines():
            name, flags, where, key = (word.strip()
                                       for word in line.split("|"))
            yield (name, flags.replace("{musl}", "-specs=" + MUSL_SPECS)
                   .split(), where, key)

    def vaddr(self, flags):
        """Where nm says that counted is, in the twin that is not stripped.
        """
        twin = kinds(*[flag for flag in flags if flag != "-Wl,-s"])
        return live.symbol(twin, "counted")[0]

    def judged(self, arena, of_musl=False):
        if of_musl and not os.path.exists(MUSL_SPECS):
            self.skipTest("no musl: apt-get install musl-tools")
        for name, flags, where, key in self.rows():
            if ("musl" in name) != of_musl:
                continue
            with self.subTest(name, arena=arena):
                path = kinds(*flags)
                if "{counted}" in where:
                    where = where.format(counted="%x" % self.vaddr(flags))
                # cwd: a profiled program leaves a file there.
                with folder() as cwd, live.Target(
                        "kinds", path=path, cwd=cwd) as process:
                    at = process.ready["at"][2:]
                    sites, _ = self.counted(process, where.format(at=at),
                                            key, arena=arena)
                    self.judge_site(sites[0], key, process, flags)
                    process.quit()

    def judge_site(self, site, key, process, flags):
        """The site is where the target says that the function is."""
        at = process.ready.get({"counted": "at"}.get(key, key))
        # In a static program strlen's address is that of a PLT entry.
        if at and not (key == "strlen" and "-static" in flags):
            self.assertEqual(int(at, 16), site.vaddr)

    def test_counts_are_true_with_a_shared_arena(self):
        self.judged("memfd")

    def test_counts_are_true_with_an_anonymous_arena(self):
        self.judged("anon")

    def test_counts_are_true_under_musl(self):
        self.judged("memfd", of_musl=True)
        self.judged("anon", of_musl=True)

    def test_kills_where_no_restorer_is_linked(self):
        """rt_sigreturn comes out of gadgets there, also without a tracer."""
        if not os.path.exists(MUSL_SPECS):
            self.skipTest("no musl: apt-get install musl-tools")
        path = kinds("-specs=" + MUSL_SPECS, "-static")
        code = """
print("go", flush=True)
while True:
    with ubp.attach(int(sys.argv[1])) as target:
        target.probe("exe:counted", ubp.Count(), timeout=120).remove(30)
"""
        rnd, deadline = random.Random(5), time.monotonic() + 8
        with live.Target("kinds", path=path) as process:
            process.ask("c")
            before = Whole(process.pid)
            for n in range(24):
                with live.python(code, process.pid) as session:
                    session.line(PATIENCE)
                    if n % 2:
                        process.send("c")
                    time.sleep(rnd.random() * 0.06)
                    session.kill()
                if n % 2:
                    self.assertEqual(0, process.answer(PATIENCE)["wrong"])
                self.assertEqual(0, process.ask("c", PATIENCE)["wrong"])
                ubp.clean(process.pid, all=True, timeout=PATIENCE)
                before.check(self)
                if time.monotonic() > deadline:
                    break
            process.quit()

    def test_endbr64_stays_in_place(self):
        with live.Target("kinds", path=kinds("-fcf-protection=full")) as p:
            with ubp.attach(p.pid) as target:
                probe = target.probe("exe:counted", ubp.Count(),
                                     timeout=PATIENCE)
                at = int(p.ready["at"], 16)
                with open("/proc/%d/mem" % p.pid, "rb", 0) as memory:
                    memory.seek(at)
                    code = memory.read(5)
                self.assertEqual("f30f1efae9", code.hex())
                self.assertEqual(at, probe.sites[0].vaddr)
            p.quit()

    def test_aliases_are_one_site_with_all_names(self):
        with live.Target("kinds") as process:
            sites, _ = self.counted(
                process, ["exe:counted", "exe:same_as_counted", "exe:*count*"])
            self.assertEqual({"counted", "same_as_counted"},
                             set(sites[0].function.names))
            process.quit()

    def test_all_functions_of_a_big_program_below_2_GiB(self):
        # More trampolines than fit between 64 KiB and 4 MiB.
        path = kinds("-no-pie", "-DMANY=4200")
        with live.Target("kinds", path=path) as process:
            for arena in "memfd", "anon":
                with self.subTest(arena=arena):
                    self.counted(process, "exe:many_*", "many", arena=arena,
                                 n_sites=4200)
            process.quit()


class Files(Case):
    """Whatever became of the file on disk."""

    def test_a_deleted_program(self):
        with folder() as path:
            program = copied(kinds(), path + "/program")
            with live.Target("kinds", path=program) as process:
                os.unlink(program)
                self.counted(process)
                process.quit()

    def test_an_upgraded_program(self):
        with folder() as path:
            program = copied(kinds(), path + "/program")
            with live.Target("kinds", path=program) as process:
                # Another build, in which counted lies elsewhere.
                copied(kinds("-O0"), path + "/new")
                os.rename(path + "/new", program)
                sites, _ = self.counted(process)
                self.assertEqual(int(process.ready["at"], 16),
                                 sites[0].vaddr)
                process.quit()

    NAMES = (b"with a space", b"is (deleted)", "f\u00fc\u03bb".encode(),
             b"a:b%c*d?", b"[vdso]", b"memfd:ubp (deleted)", b"x" * 255,
             b"back\\slash", b"new\nline", b"\xff\xfe", b"\x1b[31mred\x07")

    def test_programs_with_any_name(self):
        for name in self.NAMES:
            with self.subTest(name), folder() as path:
                program = copied(kinds(), path + "/" + os.fsdecode(name))
                with live.Target("kinds", path=program) as process:
                    self.counted(process)
                    if name in self.NAMES[-3:]:
                        self.say_nothing_wild(process.pid)
                    os.unlink(program)
                    self.counted(process)
                    process.quit()

    def say_nothing_wild(self, pid):
        """No byte of a name reaches the terminal as a control character."""
        for words in (["list", "exe:counted"], ["plan", "exe:counted"],
                      ["count", "--leave", "exe:counted"], ["status"],
                      ["clean"]):
            status, out, err = run(*words + ["-p", pid])
            self.assertEqual(0, status, err)
            self.assertNotRegex(out + err, "[\x00-\x08\x0b-\x1f\x7f-\x9f]")

    def test_a_library_upgraded_or_deleted_or_loaded_by_dlopen(self):
        old = live.build_library("shared_lib")
        new = live.build_library("shared_lib", ("-O0", "-falign-functions=64"))
        for fate in "stays", "deleted", "upgraded":
            with self.subTest(fate), folder() as path:
                library = copied(old, path + "/libplug.so")
                with live.Target("dl", library) as process:
                    if fate == "deleted":
                        os.unlink(library)
                    elif fate == "upgraded":
                        copied(new, path + "/new")
                        os.rename(path + "/new", library)
                    self.count_library(process)
                    process.quit()

    def count_library(self, process):
        first = process.ask("c")["calls"]
        before = Whole(process.pid)
        with ubp.attach(process.pid) as target:
            probe = target.probe("libplug.so:shared_hot", ubp.Count(),
                                 timeout=PATIENCE)
            last = process.ask("c")
            self.assertEqual(last["calls"] - first, probe.read())
            self.assertEqual(0, last["wrong"])
        before.check(self)


@needs_root
class Containers(Case):
    """Another root, another mount or pid namespace."""

    def jail(self, path, program):
        """A root folder in which `program` is /bin/ls: not the host's."""
        os.makedirs(path + "/bin")
        os.makedirs(path + "/old")
        os.makedirs(path + "/lib")
        copied(program, path + "/bin/ls")
        for library in re.findall(r"(/\S+) \(0x", subprocess.run(
                ["ldd", program], stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL).stdout.decode()):
            os.makedirs(path + os.path.dirname(library), exist_ok=True)
            copied(library, path + library)
        return path

    # How to get there; {} is the folder. The shell's pid becomes the target.
    WAYS = (
        ("chroot", "exec chroot {} /bin/ls"),
        ("chroot in a mount namespace",
         "exec unshare -m chroot {} /bin/ls"),
        ("pivot_root", "exec unshare -m sh -c 'mount --bind {0} {0} && "
         "cd {0} && pivot_root . old && exec /bin/ls'"),
        ("pivot_root, old root gone", "exec unshare -m sh -c 'mount --bind "
         "{0} {0} && mount -t tmpfs none {0}/old && mkdir {0}/old/old "
         "&& cp -a {0}/bin {0}/lib* {0}/old && cd {0}/old && "
         "pivot_root . old && umount -l old 2>/dev/null; exec /bin/ls'"),
    )

    def test_another_root(self):
        need("unshare", "util-linux")
        for flags in ((), ("-static",)):
            for name, way in self.WAYS:
                with self.subTest(name, flags=flags), folder() as path:
                    self.jail(path, kinds(*flags))
                    with live.Target("kinds", path="/bin/sh", prefix=(),
                                     *["-c", way.format(path)]) as process:
                        self.counted(process)
                        if not flags:
                            self.counted(process, "libc:strlen", "strlen")
                        process.quit()

    def test_another_pid_namespace(self):
        for arena in "memfd", "anon":
            with self.subTest(arena=arena):
                with live.Target("kinds", prefix=(
                        need("unshare", "util-linux"), "-m", "-p", "-f",
                        "--kill-child", "--mount-proc")) as process:
                    self.assertEqual("1", process.ready["pid"])
                    self.counted(process, pid=only_child(process.pid),
                                 arena=arena)
                    process.quit()

    def test_executable_memfds_are_forbidden(self):
        for setting in "1", "2":            # sysctl vm.memfd_noexec
            with self.subTest(setting):
                script = "echo %s > /proc/sys/vm/memfd_noexec && exec %s" % (
                    setting, kinds())
                try:
                    process = live.Target("kinds", "-c", script, prefix=(
                        need("unshare", "util-linux"), "-m", "-p", "-f",
                        "--kill-child", "--mount-proc"), path="/bin/sh")
                except live.Wrong as error:
                    self.skipTest("no vm.memfd_noexec (Linux 6.3): %s"
                                  % error)
                with process:
                    pid = only_child(process.pid)
                    for arena in "auto", "memfd", "anon":
                        self.counted(process, pid=pid, arena=arena)
                    process.quit()

    def test_another_user_namespace(self):
        for prefix in ((), AS_NOBODY):
            for arena in "memfd", "anon":
                with self.subTest(prefix=prefix, arena=arena):
                    with live.Target("kinds", prefix=tuple(prefix) + (
                            need("unshare", "util-linux"), "-Ur")) as p:
                        self.counted(p, arena=arena)
                        p.quit()

    def test_ubp_inside_a_pid_namespace_and_status_from_outside(self):
        code = """
child = int(sys.argv[1])
target = ubp.attach(child)
probe = target.probe("exe:counted", ubp.Count(), timeout=120)
print("armed", flush=True)
for line in sys.stdin:
    print("n=%d" % probe.read(), flush=True)
    target.close(30)
"""
        script = ("mkfifo {0}/in; exec 3<>{0}/in; {1} <&3 >{0}/out & "
                  "until grep -q ready {0}/out; do sleep 0.02; done; "
                  "exec {2} -c '{3}' $!")
        with folder() as path:
            script = script.format(path, kinds(), sys.executable,
                                   (live.PROLOGUE + code).replace(
                                       "'", "'\\''"))
            with live.Process([need("unshare", "util-linux"), "-m", "-p",
                               "-f", "--kill-child", "--mount-proc", "sh",
                               "-c", script]) as process:
                self.assertEqual("armed", process.line(PATIENCE))
                inner = only_child(process.pid)
                pid = only_child(inner)
                arenas = ubp.status(pid)
                self.assertEqual(["counted"],
                                 [s.name for a in arenas for s in a.sites])
                # The owner's pid means nothing here: it counts as alive.
                self.assertEqual(0, ubp.clean(pid).n_sites)
                with open(path + "/in", "w") as f:
                    f.write("c")
                with open(path + "/out") as f:
                    self.assertTrue(live.settled(
                        lambda: "counted=" in f.read(), PATIENCE))
                process.send("n\n")
                self.assertEqual(1512, process.answer(PATIENCE)["n"])
                self.assertTrue(live.settled(
                    lambda: not live.arenas(pid), PATIENCE))
                self.assertEqual([], live.changed_text(pid))


# Run by nobody: attach, say so, count at each line.
SESSION = """
import signal, sys
sys.path.insert(0, sys.argv[1])
signal.alarm(60)
import ubp
try:
    target = ubp.attach(int(sys.argv[2]))
    probe = target.probe("exe:counted", ubp.Count(), timeout=120)
except ubp.UbpError as error:
    print("refused " + str(error) + " | " + error.hint, flush=True)
    sys.exit(1)
print("armed", flush=True)
for line in sys.stdin:
    print("n=%d" % probe.read(), flush=True)
target.close(30)
print("closed", flush=True)
sys.stdin.close()
"""


@needs_root
class Users(Case):
    """Root and others, both ways."""

    def setUp(self):
        need("setpriv", "util-linux")
        path = self.enterContext_(folder())
        for name in "ubp.py", "ubp_x86.py":
            copied(os.path.join(TOP, name), path + "/" + name, 0o644)
        self.folder = path
        self.program = copied(kinds(), path + "/program")

    def enterContext_(self, context):       # enterContext is 3.11's
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def session(self, pid, prefix=AS_NOBODY, env=None):
        python = "/usr/bin/python3"         # root's own may be in /root
        if not os.path.exists(python):
            self.skipTest("no /usr/bin/python3: apt-get install python3")
        return live.Process(list(prefix) + [python, "-B", "-c", SESSION,
                                            self.folder, pid],
                            env, cwd="/")

    def test_root_counts_in_the_process_of_another(self):
        for arena in "memfd", "anon":
            with self.subTest(arena=arena):
                with live.Target("kinds", path=self.program,
                                 prefix=AS_NOBODY) as process:
                    self.counted(process, arena=arena)
                    process.quit()

    def test_nobody_counts_in_its_own_process(self):
        for arena in "memfd", "anon":
            with self.subTest(arena=arena):
                with live.Target("kinds", path=self.program,
                                 prefix=AS_NOBODY) as process:
                    process.ask("c")
                    before = Whole(process.pid)
                    with self.session(process.pid, env={
                            "UBP_ARENA": arena}) as other:
                        self.assertEqual("armed", other.line(PATIENCE))
                        truth = process.ask("c")["counted"]
                        self.assertEqual(truth,
                                         other.ask("n\n", PATIENCE)["n"])
                        other.process.stdin.close()
                        self.assertEqual("closed", other.line(PATIENCE))
                        self.assertEqual(0, other.wait(PATIENCE))
                    before.check(self)
                    process.quit()

    def test_nobody_is_refused_the_process_of_root(self):
        with live.Target("kinds", path=self.program) as process:
            before = Whole(process.pid)
            with self.session(process.pid) as other:
                line = other.line(PATIENCE)
                self.assertRegex(line, r"refused cannot attach to pid %d "
                                 r"\(program\): .*EACCES|EPERM" % process.pid)
                self.assertIn("belongs to uid 0, we are uid %d" % NOBODY,
                              line)
                self.assertIn("sudo", line)
            before.check(self)
            process.quit()

    def test_root_of_a_user_namespace(self):
        """As in a rootless container: uid 0 there, nobody outside."""
        inside = AS_NOBODY + (need("unshare", "util-linux"), "-Ur")
        with live.Target("kinds", path=self.program,
                         prefix=AS_NOBODY) as process:
            with self.session(process.pid, inside) as other:
                self.assertRegex(other.line(PATIENCE),
                                 "refused .*user namespace")
            process.quit()
        script = ("import subprocess, sys; p = subprocess.Popen([%r], "
                  "stdin=-1, stdout=-1); p.stdout.readline(); "
                  "sys.argv.append(str(p.pid))\n" % self.program)
        code = script + SESSION.replace(
            "    print(", "    p.stdin.write(b'c'); p.stdin.flush(); "
            "p.stdout.readline(); print(")
        with live.Process(list(inside) + [
                "/usr/bin/python3", "-B", "-c", code, self.folder],
                cwd="/") as other:
            self.assertEqual("armed", other.line(PATIENCE))
            self.assertEqual(1512, other.ask("n\n", PATIENCE)["n"])

    def test_nobody_sees_what_it_may(self):
        ubp_nobody = AS_NOBODY + ("/usr/bin/python3", "-B",
                                  self.folder + "/ubp.py")
        with live.Target("kinds", path=self.program) as process:
            target = ubp.attach(process.pid)
            target.probe("exe:counted", ubp.Count(), timeout=PATIENCE)
            before = Whole(process.pid)
            status, out, err = run("status", command=ubp_nobody, cwd="/")
            self.assertEqual((0, ""), (status, out), err)
            for words in (["status"], ["clean"], ["clean", "--all"],
                          ["plan", "exe:counted"], ["list", "exe:*"]):
                status, out, err = run(*words + ["-p", process.pid],
                                       command=ubp_nobody, cwd="/")
                self.assertEqual((1, ""), (status, out), str(words) + err)
                self.assertRegex(err, "belongs to uid 0, we are uid")
                self.assertNotIn("Traceback", err)
            before.check(self)
            target.close(PATIENCE)
            process.quit()

    def test_nobody_is_refused_pid_1(self):
        with self.session(1) as other:
            self.assertIn("uid 0, we are uid %d" % NOBODY,
                          other.line(PATIENCE))

    def test_nobody_is_refused_its_process_that_is_not_dumpable(self):
        # A program that may not be read is not dumpable, execve(2).
        for mode, permissions in (("closed", 0o755), ("plain", 0o711)):
            os.chmod(self.program, permissions)
            with self.subTest(mode), live.Target(
                    "kinds", mode, path=self.program,
                    prefix=AS_NOBODY) as process:
                with self.session(process.pid) as other:
                    self.assertRegex(other.line(PATIENCE), "not dumpable")
                process.quit()

    def test_nobody_uses_slack_where_only_root_can_read_a_filter(self):
        sealed = copied(live.build("sealed"), self.folder + "/sealed")
        code = SESSION.replace("exe:counted", "exe:hot")
        with live.Target("sealed", "allow", path=sealed,
                         prefix=AS_NOBODY) as process:
            process.ask("r")
            before = Whole(process.pid)
            with live.Process(list(AS_NOBODY) + [
                    "/usr/bin/python3", "-B", "-c", code, self.folder,
                    process.pid], cwd="/") as other:
                self.assertEqual("armed", other.line(PATIENCE))
                self.assertEqual([], live.arenas(process.pid))
                process.ask("r")
                self.assertEqual(10007, other.ask("n\n", PATIENCE)["n"])
                other.process.stdin.close()
                self.assertEqual("closed", other.line(PATIENCE))
            before.check(self)
            process.quit()

    def test_root_cleans_what_a_killed_nobody_left(self):
        with live.Target("kinds", path=self.program,
                         prefix=AS_NOBODY) as process:
            process.ask("c")
            before = Whole(process.pid)
            with self.session(process.pid) as other:
                self.assertEqual("armed", other.line(PATIENCE))
                other.kill()
            self.assertEqual(1512, process.ask("c")["counted"])
            self.assertEqual([1512], [
                site.calls for arena in ubp.status(process.pid)
                for site in arena.sites])
            status, _, err = run("clean", "-p", process.pid)
            self.assertEqual(0, status, err)
            before.check(self)
            process.quit()


class Scope(unittest.TestCase):
    """The words where the kernel's ptrace_scope stands in the way."""

    #  ptrace_scope, capabilities, uid of the target | words
    ROWS = """
    1 0 {own}   | ptrace_scope is 1 and 4242 is not our child
    2 0 {own}   | ptrace_scope is 2
    3 0 {own}   | ptrace_scope is 3
    0 0 {own}   | not dumpable
    1 0 {other} | belongs to uid {other}, we are uid {own}
    3 80000 {own} | ptrace_scope is 3
    """

    def test_the_reason_is_named(self):
        own = os.geteuid()
        for line in self.ROWS.format(own=own, other=own + 1)\
                .strip().splitlines():
            setting, words = (part.strip() for part in line.split("|"))
            scope, capabilities, uid = setting.split()

            def read_status(pid):
                return {"CapEff": capabilities} if pid == "self" else {
                    "Uid": "\t".join([uid] * 4), "TracerPid": "0"}
            with self.subTest(setting), \
                    mock.patch.object(ubp, "read_status", read_status), \
                    mock.patch.object(ubp, "comm", lambda pid: "nginx"), \
                    mock.patch.object(ubp, "read_proc",
                                      lambda path: scope.encode() + b"\n"):
                error = ubp._refusal_to_attach(
                    4242, "PTRACE_SEIZE", PermissionError(1, "Operation "
                                                          "not permitted"))
                self.assertIn("EPERM", str(error))
                self.assertIn(words, str(error))
                self.assertTrue(error.hint or scope == "3")


class Threads(Case):
    """Few, many, and a leader that has ended."""

    def test_a_zombie_leader_with_living_threads(self):
        for arena in "memfd", "anon":
            with self.subTest(arena=arena):
                with live.Target("kinds", "leader") as process:
                    tid = int(process.ready["tid"])
                    self.assertTrue(live.settled(
                        lambda: live.status(process.pid)["State"][0] == "Z"))
                    self.counted(process, tid=tid, arena=arena)
                    self.counted(process, "libc:strlen", "strlen", tid=tid,
                                 arena=arena)
                    process.quit()

    def test_the_command_line_on_a_zombie_leader(self):
        with live.Target("kinds", "leader") as process:
            before = Whole(process.pid, int(process.ready["tid"]))
            for verb in "plan", "list":
                status, out, err = run(verb, "-p", process.pid,
                                       "exe:counted")
                self.assertEqual(0, status, err)
                self.assertIn("counted", out)
            status, out, err = run("count", "-p", process.pid,
                                   "exe:counted", "--leave")
            self.assertEqual(0, status, err)
            process.ask("c")
            status, out, err = run("status", "-p", process.pid, "--json")
            self.assertIn(1512, [json.loads(line).get("total", json.loads(
                line).get("calls")) for line in out.splitlines()], out + err)
            status, out, err = run("clean", "-p", process.pid)
            self.assertEqual(0, status, err)
            before.check(self)
            process.quit()

    def test_1000_threads(self):
        for arena in "memfd", "anon":
            with self.subTest(arena=arena):
                with live.Target("kinds", "threads", "1000") as process:
                    self.assertEqual(1001, len(live.threads(process.pid)))
                    self.counted(process, arena=arena)
                    process.quit()


#  how the program is built | how it ends | the library's code | the shell's
ENDINGS = """
                    | exit 0     | 0    | 0
                    | exit 7     | 7    | 7
                    | exit 255   | 255  | 255
                    | kill 15    | -15  | 143
                    | kill 9     | -9   | 137
                    | kill 11    | -11  | 139
-no-pie             | exit 3     | 3    | 3
-static             | exit 7     | 7    | 7
-static             | kill 6     | -6   | 134
-static-pie         | exit 7     | 7    | 7
{musl}              | exit 7     | 7    | 7
{musl} -static      | exit 7     | 7    | 7
"""
CALLS = 13 + 1009 + 499             # the constructor, main, in its two loops


class Launched(unittest.TestCase):
    """Programs that ubp starts: probes are in place before main."""

    def programs(self):
        for line in ENDINGS.strip("\n").splitlines():
            flags, how, code, status = (w.strip() for w in line.split("|"))
            flags = flags.replace("{musl}", "-specs=" + MUSL_SPECS).split()
            if any("musl" in flag for flag in flags) and \
                    not os.path.exists(MUSL_SPECS):
                continue
            try:
                yield (live.build("launched", flags), how.split(),
                       int(code), int(status))
            except unittest.SkipTest:
                continue

    def test_all_calls_and_the_exit_code(self):
        for path, how, code, _ in self.programs():
            for arena in "memfd", "anon":
                with self.subTest(path=path, how=how, arena=arena):
                    with mock.patch.dict(os.environ, UBP_ARENA=arena):
                        target = ubp.launch([path] + how, timeout=PATIENCE)
                    probe = target.probe("exe:counted", ubp.Count(),
                                         timeout=PATIENCE)
                    self.assertTrue(target.wait(PATIENCE))
                    self.assertEqual(code, target.returncode)
                    # Private memory goes with the process: what is read is
                    # a lower bound then.
                    if arena == "memfd":
                        self.assertEqual(CALLS, probe.read())
                    self.assertLessEqual(probe.read(), CALLS)
                    target.close()

    def test_the_command_line_has_the_exit_status_of_the_command(self):
        for path, how, _, code in self.programs():
            with self.subTest(path=path, how=how):
                status, out, err = run("count", "exe:counted", "--json",
                                       "--", path, *how)
                self.assertEqual(code, status, err)
                last = json.loads(out.splitlines()[-1])
                self.assertEqual(("end", CALLS), (last["kind"],
                                                  last["hits"]), out)

    def test_a_program_that_ends_before_main(self):
        path = live.build("launched")
        with mock.patch.dict(os.environ, UBP_TEST_EARLY="9"):
            target = ubp.launch([path], timeout=PATIENCE)
        probe = target.probe("exe:counted", ubp.Count(), timeout=PATIENCE)
        self.assertTrue(target.wait(PATIENCE))
        self.assertEqual((9, 13), (target.returncode, probe.read()))
        target.close()

    def test_constructors_of_the_program_and_calls_into_libraries(self):
        with folder() as path:
            program = self.with_library(path)
            target = ubp.launch([program, "exit", "5"], timeout=PATIENCE)
            own = target.probe("exe:counted", ubp.Count(), timeout=PATIENCE)
            library = target.probe("liblaunched.so:library_counted",
                                   ubp.Count(), timeout=PATIENCE)
            self.assertTrue(target.wait(PATIENCE))
            self.assertEqual(5, target.returncode)
            self.assertEqual(13 + 1009, own.read())
            # Constructors of libraries run before the program's entry
            # point: 17 calls that nobody can have counted.
            self.assertEqual(499, library.read())
            target.close()

    def with_library(self, path):
        """A program whose library lies beside it."""
        copied(live.build_library("launched_lib"), path + "/liblaunched.so")
        program = path + "/program"
        done = subprocess.run(
            ["cc", "-O2", "-pthread", "-DLIBRARY", "-o", program,
             os.path.join(live.HERE, "targets", "launched.c"),
             path + "/liblaunched.so", "-Wl,-rpath,$ORIGIN"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(0, done.returncode, done.stdout)
        return program

    def test_what_cannot_be_run(self):
        with folder() as path:
            def file(name, text, mode):
                with open(path + "/" + name, "w") as f:
                    f.write(text)
                os.chmod(path + "/" + name, mode)
            file("plain", "text", 0o644)
            file("garbage", "\x7fELF garbage", 0o755)
            file("no-interpreter", "#!/nonexistent/sh\n", 0o755)
            shutil.copy(live.build("launched", (
                "-Wl,--dynamic-linker=/nonexistent/ld.so",)),
                path + "/no-loader")
            rows = (("missing", 127), ("plain", 126), ("garbage", 126),
                    ("no-interpreter", 127), ("no-loader", 127))
            for name, code in rows:
                with self.subTest(name):
                    with self.assertRaises(ubp.UbpError) as caught:
                        ubp.launch([path + "/" + name], timeout=PATIENCE)
                    self.assertIn(name, str(caught.exception))
                    status, out, err = run("count", "exe:main", "--",
                                           path + "/" + name)
                    self.assertEqual(code, status, err)
                    self.assertNotIn("Traceback", err)
            self.assertEqual([], children(), "a child was left")

    def test_a_loader_that_fails(self):
        with folder() as path:
            program = self.with_library(path)
            os.unlink(path + "/liblaunched.so")
            status, out, err = run("count", "exe:counted", "--", program,
                                   "exit", "0")
            self.assertEqual(127, status, err)
            self.assertIn("liblaunched.so", err)
            self.assertNotIn("Traceback", err)
            try:
                target = ubp.launch([program], timeout=PATIENCE)
            except ubp.UbpError as error:
                self.assertIn("program", str(error))
            else:
                self.assertTrue(target.wait(PATIENCE))
                self.assertEqual(127, target.returncode)
                target.close()
            self.assertEqual([], children(), "a child was left")

    def test_a_script_is_its_interpreter(self):
        with folder() as path:
            program = live.build("launched")
            with open(path + "/script", "w") as f:
                f.write("#!%s exit\n" % program)
            os.chmod(path + "/script", 0o755)
            # #! gives: program "exit" path "6"
            target = ubp.launch([path + "/script", "6"], timeout=PATIENCE)
            probe = target.probe("exe:counted", ubp.Count(),
                                 timeout=PATIENCE)
            self.assertTrue(target.wait(PATIENCE))
            self.assertEqual((6, CALLS), (target.returncode, probe.read()))
            target.close()

    def test_a_held_program_goes_on_if_its_tracer_is_killed(self):
        for moment in "launched", "probed":
            with self.subTest(moment), live.python("""
target = ubp.launch(["cat"], timeout=120)
if sys.argv[1] == "probed":
    target.probe("libc:read", ubp.Count(), timeout=120)
os.write(2, b"held")
time.sleep(60)
""", moment) as process:
                self.assertTrue(live.settled(
                    lambda: "held" in process.stderr(), PATIENCE))
                pid = only_child(process.pid)
                process.process.kill()
                process.process.wait()
                # It inherited the pipes; it ends at the end of its input.
                for word in "one", "two":
                    process.send(word + "\n")
                    self.assertEqual(word, process.line(PATIENCE))
                    ubp.clean(pid, timeout=PATIENCE)
                    self.assertEqual([], live.changed_text(pid))
                    self.assertEqual([], live.arenas(pid))
                process.process.stdin.close()
                self.assertEqual(b"", process.process.stdout.read())

    def test_what_is_launched_runs_untraced_and_is_whole_after_removal(self):
        with live.python("""
target = ubp.launch([sys.argv[1]], timeout=120)
probe = target.probe(["exe:counted", "libc:strlen"], ubp.Count(), timeout=120)
target.run()
os.write(2, ("pid=%d\\n" % target.pid).encode())
target.wait(30)
os.write(2, ("n=%d\\n" % probe.read()).encode())
""", kinds()) as process:
            self.assertTrue(process.line(PATIENCE).startswith("ready"))
            pid = only_child(process.pid)
            self.assertTrue(live.settled(lambda: not live.tracers(pid)))
            self.assertEqual(1512, process.ask("c")["counted"])
            whole = live.maps(pid)
            self.assertEqual(0, ubp.clean(pid, all=True).notes != ())
            self.assertEqual([], live.changed_text(pid))
            self.assertEqual([], live.arenas(pid))
            self.assertLess(len(live.maps(pid)), len(whole))
            self.assertEqual(1512, process.ask("c")["counted"])
            process.send("q")
            self.assertEqual("wrong=0", process.line(PATIENCE))
            self.assertEqual(0, process.wait(PATIENCE))
            self.assertIn("n=", process.stderr())


def children():
    """The pids of this process's children."""
    found = []
    for tid in live.threads(os.getpid()):
        with open("/proc/self/task/%d/children" % tid) as f:
            found += f.read().split()
    return [int(pid) for pid in found]


class Needs(Case):
    """Targets that can spare nothing, or forbid something."""

    def test_text_may_not_become_executable(self):
        for arena in "memfd", "anon":
            with self.subTest(arena=arena):
                with live.Target("kinds", "mdwe") as process:
                    if process.ready["mdwe"] != "1":
                        self.skipTest("no PR_SET_MDWE: it takes Linux 6.3")
                    self.counted(process, arena=arena)
                    process.quit()

    # A confined target | what /proc/PID/status, or else the target, says
    CONFINED = """
    mdwe   | -
    closed | -
    privs  | NoNewPrivs 1
    """

    @needs_root
    def test_confined_targets_are_served_by_every_strategy(self):
        for line in self.CONFINED.strip().splitlines():
            mode, said = [w.strip() for w in line.split("|")]
            for arena in "memfd", "anon", "slack":
                with self.subTest(mode, arena=arena), \
                        live.Target("kinds", mode) as process:
                    if process.ready["mdwe"] != "1" and mode == "mdwe":
                        self.skipTest("no PR_SET_MDWE: it takes Linux 6.3")
                    if said != "-":
                        key, value = said.split()
                        self.assertEqual(value,
                                         live.status(process.pid)[key])
                    self.counted(process, arena=arena)
                    process.quit()
            for strategy in "int3", "hw", "hw-ptrace":
                with self.subTest(mode, strategy=strategy), \
                        live.Target("kinds", mode) as process, \
                        ubp.attach(process.pid) as target:
                    try:
                        probe = target.probe("exe:counted", ubp.Count(),
                                             strategy=strategy)
                    except ubp.ProbeError as error:
                        self.assertRegex(str(error), "hardware breakpoints|"
                                         "perf_event_open|debug registers")
                        continue
                    self.assertEqual(process.ask("c")["counted"],
                                     probe.read())
                    target.close(PATIENCE)
                    self.assertEqual(0, process.ask("c")["wrong"])
                    process.quit()

    def test_a_shadow_stack_is_refused_before_anything_is_touched(self):
        read_status = ubp.read_status

        def with_shadow_stack(pid):
            return dict(read_status(pid), x86_Thread_features="shstk wrss")
        with live.Target("kinds") as process:
            before = Whole(process.pid)
            with mock.patch.object(ubp, "read_status", with_shadow_stack):
                for call in ubp.attach, ubp.clean:
                    with self.assertRaises(ubp.AttachError) as caught:
                        call(process.pid)
                    self.assertIn("shadow stack", str(caught.exception))
                    self.assertIn("GLIBC_TUNABLES", caught.exception.hint)
            before.check(self)
            process.quit()

    def test_no_descriptor_is_left_so_memory_is_anonymous(self):
        with live.Target("kinds") as process:
            n = len(live.descriptors(process.pid))
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (n, n))
            _, notes = self.counted(process)
            self.assertIn("private", " ".join(notes))
            process.ask("f")
            with mock.patch.dict(os.environ, UBP_ARENA="memfd"):
                self.refused(process, ubp.ProbeError,
                             "cannot map .*Too many open files")
            process.quit()

    def test_no_address_space_is_left(self):
        for arena in "auto", "memfd", "anon":
            with self.subTest(arena=arena), \
                    mock.patch.dict(os.environ, UBP_ARENA=arena):
                with live.Target("kinds") as process:
                    process.ask("c")
                    with open("/proc/%d/statm" % process.pid) as f:
                        size = int(f.read().split()[0]) * 4096
                    resource.prlimit(process.pid, resource.RLIMIT_AS,
                                     (size, size))
                    self.refused(process, ubp.ProbeError,
                                 "cannot map .*Cannot allocate memory")
                    self.assertEqual(0, process.ask("c")["wrong"])
                    process.quit()

    def test_no_address_within_2_GiB(self):
        for flags in ((), ("-no-pie",), ("-static-pie",)):
            with self.subTest(flags=flags):
                with live.Target("kinds", "around", flags=flags) as process:
                    process.ask("c")
                    error = self.refused(
                        process, ubp.ProbeError,
                        r"cannot place an arena in pid %d .*free KiB within "
                        "2 GiB of 0x" % process.pid)
                    self.assertIn("%d" % process.pid, str(error))
                    status, out, err = run("count", "-p", process.pid,
                                           "exe:counted", "--leave")
                    self.assertEqual((1, ""), (status, out))
                    self.assertIn("within 2 GiB", err)
                    self.assertEqual(0, process.ask("c")["wrong"])
                    process.quit()

    @needs_root
    def test_seccomp_what_a_filter_allows_is_served(self):
        for arena in "memfd", "anon":
            with self.subTest(arena=arena):
                with live.Target("sealed", "allow") as process:
                    process.ask("r")
                    before = Whole(process.pid)
                    with mock.patch.dict(os.environ, UBP_ARENA=arena):
                        target = ubp.attach(process.pid)
                    probe = target.probe("exe:hot", ubp.Count(),
                                         timeout=PATIENCE)
                    process.ask("r")
                    self.assertEqual(10007, probe.read())
                    target.close(PATIENCE)
                    before.check(self)
                    self.assertEqual(0, process.ask("r")["wrong"])
                    process.quit()

    def test_seccomp_what_a_filter_forbids_is_refused(self):
        for mode in "strict", "kill", "errno":
            with self.subTest(mode):
                with live.Target("sealed", mode) as process:
                    process.ask("r")
                    before = Whole(process.pid)
                    status, out, err = run("hist", "-p", process.pid,
                                           "exe:hot", "-e", "arg0")
                    self.assertEqual((1, ""), (status, out))
                    self.assertIn("seccomp", err)
                    before.check(self)
                    self.assertEqual(0, process.ask("r")["wrong"])
                    process.quit()

    ENVIRONMENTS = (
        ("setarch", "-R"),                      # no randomised addresses
        ("prlimit", "--stack=unlimited"),       # mappings grow upwards
        ("prlimit", "--stack=65536"), ("prlimit", "--memlock=0"),
        ("prlimit", "--fsize=0"), ("prlimit", "--rttime=100000"),
        ("taskset", "1"), ("nice", "-n", "19"), ("env", "-i"),
        ("env", "GLIBC_TUNABLES=glibc.pthread.rseq=0"),
        ("env", "LD_BIND_NOW=1"), ("env", "MALLOC_PERTURB_=85"),
    )

    def test_environments_of_the_target(self):
        for words in self.ENVIRONMENTS:
            with self.subTest(words):
                need(words[0], "util-linux")
                with live.Target("kinds", prefix=words) as process:
                    self.counted(process)
                    self.counted(process, "libc:strlen", "strlen")
                    process.quit()

    def test_a_limit_that_is_reached_while_modules_are_opened(self):
        """A program with many: each takes a descriptor before it is armed."""
        prlimit = need("prlimit", "util-linux")
        program = ("import bz2, ctypes, decimal, json, lzma, select, socket, "
                   "ssl, time, zlib; print('on', flush=True); "
                   "[time.sleep(0.01) for _ in range(12000)]")
        with live.Process([sys.executable, "-c", program]) as process:
            process.line()
            before, seen = live.Snapshot(process.pid), set()
            for limit in range(18, 60, 4):
                status, out, err = run(
                    "count", "-p", process.pid, "libc:getppid", "--duration",
                    "0.1", command=(prlimit, "--nofile=%d" % limit,
                                    sys.executable, UBP))
                seen.add(status)
                self.assertNotIn("Traceback", err)
                if status:
                    self.assertIn("more files may be opened", err)
                live.Snapshot(process.pid).compare(self, before)
            self.assertEqual({0, 1}, seen)

    def test_limits_of_ubp_itself(self):
        prlimit = need("prlimit", "util-linux")
        with live.Target("kinds", "threads", "200") as process:
            process.ask("c", PATIENCE)
            before = Whole(process.pid)
            for limit in ("nofile=24", "fsize=0", "memlock=0", "nproc=1",
                          "stack=1000000", "core=0"):
                with self.subTest(limit):
                    command = (prlimit, "--" + limit, sys.executable, UBP)
                    status, out, err = run(
                        "count", "-p", process.pid, "exe:counted",
                        "--duration", "0.1", command=command)
                    self.assertNotIn("Traceback", err)
                    self.assertEqual(0, status, err)
                    before.check(self, limit)
            self.assertEqual(0, process.ask("c", PATIENCE)["wrong"])
            process.quit()

    # mode    | with a shared arena | anonymous | of the user's choice
    FILTERS = """
    memfd     | forbids             | served    | served
    wx        | served              | served    | served
    exec      | forbids             | forbids   | served
    munmap    | forbids             | forbids   | served
    """

    @needs_root
    def test_seccomp_rows(self):
        for line in self.FILTERS.strip().splitlines():
            mode, *expected = (word.strip() for word in line.split("|"))
            for arena, words in zip(("memfd", "anon", "auto"), expected):
                with self.subTest(mode, arena=arena), \
                        live.Target("filtered", mode) as process:
                    process.ask("r")
                    before = Whole(process.pid)
                    with mock.patch.dict(os.environ, UBP_ARENA=arena):
                        if words == "forbids":
                            self.refused(process, ubp.ProbeError,
                                         "seccomp filter forbids", "exe:hot")
                        else:
                            self.served(process)
                    before.check(self)
                    self.assertEqual(0, process.ask("r")["wrong"])
                    process.quit()

    def served(self, process):
        with ubp.attach(process.pid) as target:
            probe = target.probe("exe:hot", ubp.Count(), timeout=PATIENCE)
            process.ask("r")
            self.assertEqual(10007, probe.read())
            target.close(PATIENCE)

    @needs_root
    def test_seccomp_without_the_call_that_follows_pointers(self):
        """Refused beforehand; what follows no pointer is served."""
        with live.Target("filtered", "readv") as process:
            process.ask("r")
            before = Whole(process.pid)
            with ubp.attach(process.pid) as target:
                for action in (ubp.Hist("u64[arg0]"), ubp.Trace("str(arg0)"),
                               ubp.Count(by="buf(arg0, 8)")):
                    with self.assertRaises(ubp.ProbeError) as caught:
                        target.probe("exe:hot", action, timeout=PATIENCE)
                    self.assertIn("seccomp filter forbids",
                                  str(caught.exception))
                probe = target.probe("exe:hot", ubp.Hist("arg0"),
                                     timeout=PATIENCE)
                self.assertEqual(0, process.ask("r")["wrong"])
                self.assertEqual((10007, 10006), (probe.read().count,
                                                  probe.read().max))
                target.close(PATIENCE)
            before.check(self)
            self.assertEqual(0, process.ask("r")["wrong"])
            process.quit()

    # strategy | command to the target | what comes to forbid munmap
    LATE = """
    jump | l | a filter
    int3 | l | a filter
    jump | t | strict mode
    """

    @needs_root
    def test_seccomp_a_filter_that_comes_later(self):
        """The text is put back; what cannot be unmapped is told."""
        for line in self.LATE.strip().splitlines():
            strategy, command, what = [w.strip() for w in line.split("|")]
            with self.subTest(what, strategy=strategy), live.Target(
                    "filtered", "late") as process:
                process.ask("r")
                before = Whole(process.pid)
                with self.assertRaises(ubp.UbpError) as caught:
                    with ubp.attach(process.pid) as target:
                        target.probe("exe:hot", ubp.Count(),
                                     strategy=strategy, timeout=PATIENCE)
                        process.ask(command)
                self.assertIn("seccomp", str(caught.exception))
                self.assertIn("probes are out", str(caught.exception))
                self.assertEqual([], before.changed())
                self.assertEqual({}, live.tracers(process.pid))
                self.assertEqual(0, process.ask("r")["wrong"])
                ubp.clean(process.pid, True, suspend_seccomp=True)
                before.check(self, "after clean")
                self.assertEqual(0, process.ask("r")["wrong"])

    @needs_root
    def test_seccomp_that_comes_later_is_told_in_the_last_line(self):
        """Its probes are out: it does not keep them, and status agrees."""
        with live.Target("filtered", "late") as process:
            process.ask("r")
            before = Whole(process.pid)
            command = test_cli.start("count", "-p", process.pid, "exe:hot",
                                     "--interval", "0.1")
            test_cli.read_until(command.stderr, "Ctrl-C removes")
            process.ask("t")
            command.send_signal(signal.SIGINT)
            _, err = command.communicate(timeout=PATIENCE)
            self.assertEqual((1, []), (command.returncode, before.changed()))
            self.assertIn("is rid of its probes, but ubp's memory is still "
                          "mapped; hits ", err.decode())
            self.assertNotIn("keeps", err.decode())
            self.assertRegex(err.decode(), "seccomp filter, .*munmap")
            _, out, _ = test_cli.run("status", "-p", process.pid)
            self.assertIn("removed", out)
            self.assertEqual(0, process.ask("r")["wrong"])

    def test_what_cannot_be_taken_out_is_counted_in_the_last_line(self):
        """Another tracer came, which the pause cannot pass."""
        need("strace", "strace")
        with live.Target("filtered", "none") as process:
            command = test_cli.start("count", "-p", process.pid, "exe:hot")
            test_cli.read_until(command.stderr, "Ctrl-C removes")
            with live.Process(["strace", "-qq", "-o", "/dev/null", "-p",
                               process.pid]):
                self.assertTrue(live.settled(
                    lambda: live.tracers(process.pid)))
                command.send_signal(signal.SIGINT)
                _, err = command.communicate(timeout=PATIENCE)
                self.assertIn("keeps its probes at 1 site; hits ",
                              err.decode())
            self.assertEqual(0, process.ask("r")["wrong"])
            self.assertEqual(0, test_cli.run("clean", "-p", process.pid)[0])
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    def test_syscall_user_dispatch(self):
        with live.Target("filtered", "none") as process:
            process.ask("r")
            before = Whole(process.pid)
            process.send("s")
            self.assertEqual("spins", process.line(PATIENCE))
            try:
                with ubp.attach(process.pid) as target:
                    target.probe("exe:hot", ubp.Count(), timeout=10)
            except ubp.UbpError as error:
                self.assertIn("Dispatch", str(error))
            self.assertEqual(0, process.answer(PATIENCE)["wrong"])
            before.check(self)
            self.served(process)
            before.check(self)
            process.quit()

    @needs_root
    def test_a_frozen_process(self):
        """It does not stop: refused in time, and let go when it thaws."""
        group = "/sys/fs/cgroup/freezer/ubp-test-%d" % os.getpid()
        state, frozen, thawed = "freezer.state", "FROZEN", "THAWED"
        if not os.path.isdir("/sys/fs/cgroup/freezer"):
            group = "/sys/fs/cgroup/ubp-test-%d" % os.getpid()
            state, frozen, thawed = "cgroup.freeze", "1", "0"

        def write(name, text):
            with open(os.path.join(group, name), "w") as f:
                f.write(text)
        try:
            os.mkdir(group)
        except OSError as error:
            self.skipTest("no cgroup to write to: %s" % error)
        try:
            with live.Target("kinds", "threads", "3") as process:
                process.ask("c")
                before = Whole(process.pid)
                write("cgroup.procs", str(process.pid))
                write(state, frozen)
                try:
                    target = ubp.attach(process.pid)
                    try:
                        target.probe("exe:counted", ubp.Count(), timeout=1)
                    except ubp.UbpTimeout as error:
                        self.assertIn("does not stop", str(error))
                finally:
                    write(state, thawed)
                self.assertEqual(0, process.ask("c", PATIENCE)["wrong"])
                self.assertTrue(live.settled(
                    lambda: not live.tracers(process.pid), PATIENCE))
                target.close(PATIENCE)
                before.check(self)
                self.counted(process)
                process.quit()
        finally:
            live.settled(lambda: not self.removed(group))

    def removed(self, group):
        try:
            os.rmdir(group)
        except OSError:
            return True         # its last process has not left yet
        return False


# A program of 32 bits: alarm(60); for (;;) pause(). ELF32, EM_386, one LOAD.
CODE_32 = bytes.fromhex("b81b000000 bb3c000000 cd80 b81d000000 cd80 ebf7"
                        .replace(" ", ""))
ELF_32 = (b"\x7fELF\1\1\1" + bytes(9) + struct.pack(
    "<HHIIIIIHHHHHH", 2, 3, 1, 0x8048054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    + struct.pack("<8I", 1, 0, 0x8048000, 0x8048000, 84 + len(CODE_32),
                  84 + len(CODE_32), 5, 4096) + CODE_32)


class Refusals(Case):
    """What cannot be a target says why, in the library and the command."""

    def told(self, pid, words, verbs=("count", "plan", "list", "clean")):
        with self.assertRaises(ubp.AttachError) as caught:
            ubp.attach(pid)
        self.assertRegex(str(caught.exception), words)
        self.assertIn(str(pid), str(caught.exception))
        with self.assertRaises(ubp.UbpError) as caught:
            ubp.clean(pid)
        self.assertRegex(str(caught.exception), words)
        for verb in verbs:
            more = [] if verb == "clean" else ["exe:counted"]
            status, out, err = run(verb, "-p", pid, *more)
            self.assertEqual((1, ""), (status, out), verb + err)
            self.assertRegex(err, words)
            self.assertNotIn("Traceback", err)

    def test_a_32_bit_program(self):
        with folder() as path:
            program = path + "/program"
            with open(program, "wb") as f:
                f.write(ELF_32)
            os.chmod(program, 0o755)
            try:
                process = subprocess.Popen([program])
            except OSError:
                self.skipTest("this kernel runs no 32-bit programs "
                              "(CONFIG_IA32_EMULATION)")
            try:
                self.assertTrue(live.settled(
                    lambda: live.states(process.pid) == "S"))
                self.told(process.pid, "32-bit")
                self.assertEqual("S", live.states(process.pid))
            finally:
                process.kill()
                process.wait()
            for options in (), ("--follow-exec", "--strategy", "int3"):
                status, out, err = run("count", *options + (
                    "exe:*", "--", program))
                self.assertEqual((125, ""), (status, out), err)
                self.assertIn("32-bit", err)
            with self.assertRaises(ubp.AttachError):
                ubp.launch([program])
            self.assertEqual([], [         # none of ours runs, or is left
                pid for pid in map(int, filter(str.isdigit, os.listdir(
                    "/proc"))) if stat_of(pid)[:2] == ["program",
                                                       str(os.getpid())]])

    def test_a_kernel_thread(self):
        try:
            if live.status(2)["Name"] != "kthreadd":
                raise FileNotFoundError
        except (OSError, KeyError):
            self.skipTest("no kernel thread in this pid namespace")
        self.told(2, "kernel thread")

    def test_a_thread(self):
        with live.Target("kinds", "threads", "2") as process:
            for tid in live.threads(process.pid):
                if tid != process.pid:
                    self.told(tid, "thread of pid %d" % process.pid)
            process.quit()

    def test_a_zombie(self):
        process = subprocess.Popen(["true"])
        live.settled(lambda: live.states(process.pid) == "Z")
        self.told(process.pid, r"zombie.*parent \(pid %d\)" % os.getpid())
        process.wait()

    def test_no_process(self):
        process = subprocess.Popen(["true"])
        process.wait()
        self.told(process.pid, "no such process")

    def test_itself(self):
        for function in ubp.attach, ubp.clean:
            with self.assertRaises(ubp.AttachError) as caught:
                function(os.getpid())
            self.assertIn("itself", str(caught.exception))

    def test_a_process_that_strace_holds(self):
        strace = need("strace", "strace")
        with live.Target("kinds") as process:
            tracer = subprocess.Popen([strace, "-qqo", "/dev/null", "-p",
                                       str(process.pid)])
            try:
                self.assertTrue(live.settled(
                    lambda: live.tracers(process.pid), PATIENCE))
                self.told(process.pid, r"traced by pid %d \(strace\)"
                          % tracer.pid, ("count", "clean"))
            finally:
                tracer.send_signal(signal.SIGTERM)
                tracer.wait()
            self.counted(process)
            process.quit()

    def test_strace_may_come_while_probes_count(self):
        strace = need("strace", "strace")
        with live.Target("kinds") as process:
            process.ask("c")
            before = Whole(process.pid)
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:counted", ubp.Count(),
                                     timeout=PATIENCE)
                tracer = subprocess.Popen([
                    strace, "-qqo", "/dev/null", "-p", str(process.pid)])
                try:
                    self.assertTrue(live.settled(
                        lambda: live.tracers(process.pid), PATIENCE))
                    truth = process.ask("c", PATIENCE)["counted"]
                    self.assertEqual(truth, probe.read())
                    with self.assertRaises(ubp.UbpError) as caught:
                        target.close(1)
                    self.assertIn("strace", str(caught.exception))
                finally:
                    tracer.send_signal(signal.SIGTERM)
                    tracer.wait()
                target.close(PATIENCE)
            before.check(self)
            process.quit()


class Looking(Case):
    """plan, list, status and --dry-run stop nothing and change nothing."""

    def test_nothing_is_stopped_or_changed(self):
        with live.Target("kinds", "threads", "3") as process:
            process.ask("c")
            before = Whole(process.pid)
            pid = process.pid
            for words in (["plan", "-p", pid, "exe:*"],
                          ["list", "-p", pid, "libc:str*"],
                          ["count", "-p", pid, "exe:*", "--dry-run"],
                          ["status", "-p", pid], ["status"],
                          ["clean", "-p", pid, "--dry-run"]):
                with self.subTest(words):
                    n, seen = self.sampled(words, process.pid)
                    self.assertGreater(n, 20)
                    self.assertEqual(set(), seen)
                    before.check(self, str(words))
            process.quit()

    def sampled(self, words, pid):
        """Run ubp; look at all threads all the while.

        -> (how often, {(state, TracerPid)} of what was stopped or traced)
        """
        files = [open("/proc/%d/task/%d/status" % (pid, tid), "rb", 0)
                 for tid in live.threads(pid)]
        pattern = re.compile(rb"^State:\t(.).*^TracerPid:\t(\d+)",
                             re.M | re.S)
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [sys.executable, UBP] + [str(word) for word in words],
                stdout=output, stderr=subprocess.STDOUT)
            n, seen = 0, set()
            try:
                while process.poll() is None:
                    for f in files:
                        f.seek(0)
                        state, tracer = pattern.search(f.read()).groups()
                        if state in b"tT" or tracer != b"0":
                            seen.add((state, tracer))
                    n += 1
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                for f in files:
                    f.close()
            output.seek(0)
            self.assertEqual(0, process.returncode, output.read())
        return n, seen


# Another ubp: argv[2] is the probe. Answers to "r" read, "x" remove.
OTHER = """
target = ubp.attach(int(sys.argv[1]))
try:
    probe = target.probe(sys.argv[2], ubp.Count(), timeout=120)
except ubp.UbpError as error:
    print("refused " + str(error), flush=True)
    sys.exit(1)
print("armed", flush=True)
for line in sys.stdin:
    if line[0] == "x":
        target.close(30)
    print("n=%d" % probe.read() if line[0] != "n" else target.notes,
          flush=True)
os._exit(0)
"""


class Several(Case):
    """Two at once, one after a dead one, children, status and clean."""

    @contextlib.contextmanager
    def other(self, process, where="exe:counted", arena="auto"):
        with live.python(OTHER, process.pid, where,
                         env={"UBP_ARENA": arena}) as session:
            self.assertEqual("armed", session.line(PATIENCE))
            yield session

    def calls(self, pid):
        """{name: calls} as status says."""
        return {site.name: site.calls for arena in ubp.status(pid)
                for site in arena.sites if site.state == "armed"}

    def test_the_second_on_one_function_is_refused(self):
        for arena in "memfd", "anon":
            with self.subTest(arena=arena), live.Target("kinds") as process:
                process.ask("c")
                before = Whole(process.pid)
                with self.other(process, arena=arena) as first:
                    with live.python(OTHER, process.pid,
                                     "exe:counted") as second:
                        self.assertRegex(
                            second.line(PATIENCE),
                            r"refused .*probed by ubp \(pid %d\)" % first.pid)
                    truth = process.ask("c")["counted"]
                    self.assertEqual(truth, first.ask("r\n", PATIENCE)["n"])
                    first.ask("x\n", PATIENCE)
                    before.check(self)
                process.quit()

    def test_two_on_two_functions_end_in_either_order(self):
        for order in (0, 1), (1, 0):
            for arenas in (("memfd", "memfd"), ("anon", "anon"),
                           ("anon", "memfd")):
                with self.subTest(order=order, arenas=arenas), \
                        live.Target("kinds", path=kinds("-DMANY=5")) as p:
                    self.two(p, order, arenas)

    def two(self, process, order, arenas):
        process.ask("c")
        before = Whole(process.pid)
        with self.other(process, "exe:counted", arenas[0]) as one, \
                self.other(process, "exe:many_3", arenas[1]) as two:
            sessions, truths = (one, two), (1512, 1)
            process.ask("c")
            for session, truth in zip(sessions, truths):
                self.assertEqual(truth, session.ask("r\n", PATIENCE)["n"])
            first, last = order
            sessions[first].ask("x\n", PATIENCE)
            process.ask("c")
            self.assertEqual(truths[first],
                             sessions[first].ask("r\n", PATIENCE)["n"])
            self.assertEqual(2 * truths[last],
                             sessions[last].ask("r\n", PATIENCE)["n"])
            sessions[last].ask("x\n", PATIENCE)
            before.check(self)
        self.assertEqual(0, process.ask("c")["wrong"])
        process.quit()

    def test_status_and_clean_after_the_tracer_was_killed(self):
        for arena in "memfd", "anon":
            with self.subTest(arena=arena), live.Target("kinds") as process:
                process.ask("c")
                before = Whole(process.pid)
                with self.other(process, arena=arena) as session:
                    owner = session.pid
                    session.kill()
                process.ask("c")
                status, out, err = run("status", "-p", process.pid, "--json")
                self.assertEqual(0, status, err)
                self.assertIn(1512, json.loads(
                    out.splitlines()[0]).values(), out)
                status, out, err = run("status", "-p", process.pid)
                self.assertRegex(out, str(owner))
                self.assertIn("counted", out)
                found = ubp.status(process.pid)[0]
                self.assertEqual((owner, False, False), (
                    found.owner_pid, found.owner_alive, found.left))
                for n_sites in 1, 0:
                    self.assertEqual(n_sites, ubp.clean(
                        process.pid, timeout=PATIENCE).n_sites)
                    before.check(self)
                status, out, err = run("clean", "-p", process.pid)
                self.assertEqual(0, status, err)
                self.assertEqual(0, process.ask("c")["wrong"])
                process.quit()

    def test_probe_again_where_a_dead_tracer_left_its_jump(self):
        with live.Target("kinds") as process:
            process.ask("c")
            before = Whole(process.pid)
            with self.other(process) as session:
                session.kill()
            with ubp.attach(process.pid) as target:
                try:
                    target.probe("exe:counted", ubp.Count(), timeout=PATIENCE)
                except ubp.UbpError as error:
                    self.assertIn("ubp", str(error))
                    self.assertRegex(str(error) + error.hint, "clean|status")
            ubp.clean(process.pid, timeout=PATIENCE)
            before.check(self)
            process.quit()

    def test_a_live_owner_keeps_its_probes_unless_all_is_said(self):
        with live.Target("kinds") as process:
            process.ask("c")
            before = Whole(process.pid)
            with self.other(process) as session:
                status, out, err = run("clean", "-p", process.pid)
                self.assertIn(str(session.pid), out + err)
                self.assertIn("--all", out + err)
                truth = process.ask("c")["counted"]
                self.assertEqual(truth, session.ask("r\n", PATIENCE)["n"])
                status, out, err = run("clean", "-p", process.pid, "--all")
                self.assertEqual(0, status, err)
                before.check(self)
                self.assertEqual(0, process.ask("c")["wrong"])
                # The owner does not take it for a library that was loaded
                # again, reads on, and finds nothing to take out.
                time.sleep(1.5)
                before.check(self)
                session.send("n\n")
                self.assertRegex(session.line(PATIENCE), r"^\['another ubp "
                                 r"\(clean --all\), [^']*'\]$")
                self.assertEqual(truth, session.ask("r\n", PATIENCE)["n"])
                session.ask("x\n", PATIENCE)
                before.check(self)
            process.quit()

    def test_left_probes_are_read_and_cleaned_by_anybody(self):
        for arena in "memfd", "anon":
            with self.subTest(arena=arena), live.Target("kinds") as process:
                process.ask("c")
                before = Whole(process.pid)
                status, _, err = run(
                    "count", "-p", process.pid, "exe:counted", "--leave",
                    env=dict(os.environ, UBP_ARENA=arena))
                self.assertEqual(0, status, err)
                process.ask("c")
                self.assertEqual({"counted": 1512}, self.calls(process.pid))
                self.assertTrue(ubp.status(process.pid)[0].left)
                status, _, err = run("clean", "-p", process.pid)
                self.assertEqual(0, status, err)
                before.check(self)
                process.quit()

    def test_children_are_named_counted_and_cleaned(self):
        with live.Target("children", "forks") as process:
            before = Whole(process.pid)
            target = ubp.attach(process.pid)
            target.probe("exe:hot", ubp.Count(), timeout=PATIENCE)
            target.detach()
            pids = [int(pid) for pid in str(
                process.ask("f")["children"]).split(",")]
            self.assertEqual(set(pids), set(ubp.status(
                process.pid)[0].children))
            self.assertEqual({"hot": 4 * 1009}, self.calls(process.pid))
            for pid in pids:
                self.assertNotEqual([], live.changed_text(pid))
            # Asked of one child: all of the family are cleaned.
            removal = ubp.clean(pids[0], timeout=PATIENCE)
            self.assertEqual(set(pids + [process.pid]), set(removal.pids))
            for pid in pids:
                self.assertEqual([], live.changed_text(pid))
                self.assertEqual([], live.arenas(pid))
            self.assertEqual(0, process.ask("w")["wrong"])
            before.check(self)
            process.quit()

    def test_one_of_two_probes_is_removed_from_children_too(self):
        """What leads to their common trampoline leads to another then."""
        n = 4 * 1009
        for ends_first in False, True:
            with self.subTest(ends_first), live.Target(
                    "children", "forks") as process:
                before = Whole(process.pid)
                with ubp.attach(process.pid) as target:
                    one = target.probe("exe:hot", ubp.Count())
                    two = target.probe("exe:hot", ubp.Count(by="pid"))
                    pids = [int(pid) for pid in str(
                        process.ask("f")["children"]).split(",")]
                    one.remove(PATIENCE)
                    if not ends_first:
                        self.assertEqual(0, process.ask("w")["wrong"])
                        self.assertEqual({pid: 1019 for pid in pids},
                                         two.read())
                    self.assertEqual((n, []), (one.read(), target.notes))
                    target.close(PATIENCE)
                    if ends_first:
                        for pid in pids:
                            self.assertEqual([], live.changed_text(pid))
                            self.assertEqual([], live.arenas(pid))
                        self.assertEqual(0, process.ask("w")["wrong"])
                before.check(self)
                process.quit()

    def test_children_of_a_private_arena_are_found_and_cleaned(self):
        with live.Target("children", "forks") as process:
            before = Whole(process.pid)
            with mock.patch.dict(os.environ, UBP_ARENA="anon"):
                target = ubp.attach(process.pid)
            target.probe("exe:hot", ubp.Count(), timeout=PATIENCE)
            self.assertRegex(" ".join(target.notes), "fork.*not counted")
            pids = [int(pid) for pid in str(
                process.ask("f")["children"]).split(",")]
            self.assertNotEqual([], live.changed_text(pids[0]))
            ubp.clean(pids[0], all=True, timeout=PATIENCE)
            self.assertEqual([], live.changed_text(pids[0]))
            target.close(PATIENCE)
            for pid in pids:
                self.assertEqual([], live.changed_text(pid))
                self.assertEqual([], live.arenas(pid))
            self.assertEqual(0, process.ask("w")["wrong"])
            before.check(self)
            process.quit()


def genuine():
    """(Header, its page, first record, code size) of a true arena."""
    with live.Target("kinds") as process:
        target = ubp.attach(process.pid)
        target.probe("exe:counted", ubp.Count(), timeout=PATIENCE)
        arena, = live.arenas(process.pid)[:1]
        with open("/proc/%d/mem" % process.pid, "rb", 0) as memory:
            memory.seek(arena.start)
            data = memory.read(arena.end - arena.start)
        target.close(PATIENCE)
        process.quit()
    return data


class Forged(unittest.TestCase):
    """A memfd "ubp" that lies: looked at in bounds, and never believed."""

    CODE = 256 << 10

    @classmethod
    def setUpClass(cls):
        cls.data = genuine()
        cls.header = ubp.unpack_header(cls.data)
        assert cls.header is not None

    @contextlib.contextmanager
    def process(self, make, size=512 << 10, code=CODE, words=()):
        """A target whose arena begins with make(ready) -> bytes."""
        with folder() as path:
            name = path + "/image"
            with live.Target("forged", name, str(size), str(code),
                             *words) as p:
                ready = {k: int(v, 16) for k, v in p.ready.items()}
                with open(name, "wb") as f:
                    f.write(make(ready))
                self.assertEqual(0, p.ask("m")["wrong"])
                yield p

    def image(self, ready, size=512 << 10, code=CODE, records=(),
              **fields):
        """A valid header for this target, but for these fields."""
        fields = dict(dict(
            base=ready["base"], size=size, code_size=code, n_records=0,
            owner_pid=1, owner_birth=0), **fields)
        fields.setdefault("n_records", len(records))
        if records:
            fields["n_records"] = fields["n_records"] or len(records)
        head = ubp.HEADER.pack(*self.header._replace(**fields))
        return (head.ljust(4096, b"\0") + b"".join(records)).ljust(
            64 << 10, b"\0")

    def record(self, ready, site, old):
        """A record whose jump leads from site to the arena, packed."""
        window = ubp.collections.namedtuple("W", "site slot is_trap")(
            site, 0, False)
        trampoline = ready["base"] + self.CODE - 64
        patch, = ubp.ubp_x86.window_patches(window, trampoline)
        genuine_record = ubp.unpack_record(
            self.data[4096:4096 + ubp._RECORD_SIZE], self.header)
        return genuine_record._replace(
            site=site, slot=0, trampoline=trampoline, size=32,
            patches=((site, old, patch[1]),)).pack()

    def untouched(self, process, by_command=True):
        """Let status and clean look at it, in bounded time.

        -> (Whole before, {start: bytes} of data before, what clean said)
        """
        pid, told = process.pid, ""
        before = Whole(pid)
        # Not the stack or a thread's block: the kernel writes rseq there.
        data = before.memory(
            lambda m: "w" in m.permissions and m.path.startswith("/"))
        start = time.monotonic()
        if by_command:
            for words in ["status"], ["clean", "--all"]:
                status, out, err = run(*words + ["-p", pid])
                self.assertNotIn("Traceback", err)
                told = out + err
        else:
            ubp.status(pid)
            try:
                told = ubp.clean(pid, all=True)
            except ubp.UbpError as error:
                told = str(error)
        self.assertLess(time.monotonic() - start, 10, "takes too long")
        return before, data, told

    def test_any_bytes_at_all(self):
        rnd = random.Random(1)
        noise = bytes(rnd.getrandbits(8) for _ in range(64 << 10))
        rows = (
            ("noise", lambda ready: noise),
            ("magic and noise", lambda ready: ubp.MAGIC + noise[8:]),
            ("head and noise", lambda ready: self.data[:16] + noise[16:]),
            ("somebody else's text", lambda ready: b"hello, world" * 9),
        )
        for name, make in rows:
            with self.subTest(name), self.process(make) as process:
                before, writable, _ = self.untouched(process)
                before.check(self, name)
                self.assertEqual(writable, before.memory(
                    lambda m: m.start in writable))
                self.assertEqual(0, process.ask("c")["wrong"])
                process.quit()

    def test_a_header_of_lies(self):
        rows = (
            ("no record", {}),
            ("too many records", dict(n_records=400, max_records=400)),
            ("another base", dict(base=0x10000)),
            ("all of memory", dict(size=1 << 32)),
            ("more than is mapped", dict(size=1 << 30, code_size=1 << 29)),
            ("a shift of 28", dict(shard_shift=28, shard_mask=0)),
            ("a shift of 0", dict(shard_shift=0)),
            ("a mask of ones", dict(shard_mask=0xffffffff)),
            ("our pid as owner", dict(owner_pid=os.getpid())),
            ("owner 0", dict(owner_pid=0)),
            ("owner below zero", dict(owner_pid=0xffffffff)),
            ("anonymous", dict(is_anonymous=1)),
            ("a scratch page", dict(scratch=1 << 46)),
            ("the future", dict(time_ns=(1 << 64) - 1)),
        )
        for name, fields in rows:
            with self.subTest(name):
                with self.process(lambda ready: self.image(
                        dict(ready), **fields)) as process:
                    before, writable, _ = self.untouched(process, False)
                    # Its arena may be taken out or left; all else stays.
                    self.unharmed(process, before, writable)

    def test_a_private_arena_that_claims_other_memory(self):
        """What it says of its size is not what is unmapped."""
        rows = (
            ("up to the program", dict(size=(1 << 30) + (64 << 20))),
            ("all that it may", dict(size=1 << 32)),
            ("a little more", dict(size=(512 << 10) + 4096)),
            ("a little less", dict(size=(512 << 10) - 4096)),
        )
        for name, fields in rows:
            with self.subTest(name), self.process(
                    lambda ready: self.image(ready, is_anonymous=1, **fields),
                    words=("private",)) as process:
                before, writable, _ = self.untouched(process)
                self.unharmed(process, before, writable,
                              int(process.ready["base"], 16))

    def unharmed(self, process, before, writable, base=0):
        mapped = [m for m in before.maps if "/memfd:ubp" not in m.path
                  and not base <= m.start < base + (512 << 10)]
        now = live.maps(process.pid)
        self.assertEqual([], [m for m in mapped if m not in now])
        self.assertEqual([], [m for m in now if m not in before.maps and
                              not base <= m.start < base + (512 << 10)])
        arena = [m.start for m in before.maps if m not in mapped]
        text = before.memory(lambda m: "x" in m.permissions)
        for start, old in before.text.items():
            if start not in arena:
                self.assertEqual([], changes(old, text[start], start))
        data = before.memory(lambda m: m.start in writable)
        for start, old in writable.items():
            if start not in arena:
                self.assertEqual([], changes(old, data[start], start))
        self.assertEqual(0, process.ask("c")["wrong"])
        process.quit()

    def test_a_record_about_data_is_not_believed(self):
        def make(ready):
            return self.image(ready, records=[
                self.record(ready, ready["data"], b"\xcc" * 5)])
        with self.process(make) as process:
            process.ask("j")            # the jump that the record tells of
            before, writable, told = self.untouched(process)
            self.unharmed(process, before, writable)

    def test_a_record_about_text_that_differs_from_its_file(self):
        """The jump is there, but `old` is not what the file holds."""
        def make(ready):
            return self.image(ready, records=[
                self.record(ready, ready["at"], b"\xcc" * 5)])
        with self.process(make) as process:
            at = int(process.ready["at"], 16)
            base = int(process.ready["base"], 16)
            with open("/proc/%d/mem" % process.pid, "r+b", 0) as memory:
                memory.seek(at)
                kept = memory.read(5)
                memory.seek(at)
                memory.write(b"\xe9" + struct.pack(
                    "<i", base + self.CODE - 64 - at - 5))
                _, _, told = self.untouched(process)
                memory.seek(at)
                now = memory.read(5)
                self.assertNotEqual(b"\xcc" * 5, now, told)
                memory.seek(at)
                memory.write(kept)
            self.assertEqual(0, process.ask("c")["wrong"])
            process.quit()

    def test_names_with_control_characters_are_escaped(self):
        def make(ready):
            record = bytearray(self.record(ready, ready["at"], b"\x90" * 5))
            at = record.index(b"counted")
            record[at:at + 7] = b"\x1b[2J\r\n\x07"
            return self.image(ready, records=[bytes(record)])
        with self.process(make) as process:
            for words in (["status"], ["status", "--json"],
                          ["status", "-p", process.pid],
                          ["clean", "-p", process.pid, "--dry-run"],
                          ["clean", "-p", process.pid]):
                status, out, err = run(*words)
                for text in out, err:
                    self.assertNotIn("\x1b", text)
                    self.assertNotIn("\r", text)
                    self.assertNotIn("\x07", text)
            process.quit()

    def test_huge_sparse_arenas_take_bounded_time_and_memory(self):
        rows = (
            # A record for every 512 bytes of 512 MiB.
            ("records", 1 << 30, 1 << 29, dict(
                n_records=(1 << 20) - 8, max_records=(1 << 20) - 8)),
            # A shard for every eight bytes of 512 MiB.
            ("shards", 1 << 30, 1 << 29, dict(
                shard_shift=3, shard_mask=(1 << 26) - 1)),
        )
        for name, size, code, fields in rows:
            def make(ready):
                return self.image(ready, size, code, [self.record(
                    ready, ready["at"], b"\x90" * 5)], **fields)
            with self.subTest(name), \
                    self.process(make, size, code) as process:
                start = time.monotonic()
                child = subprocess.Popen(
                    [sys.executable, UBP, "status", "-p", str(process.pid)],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                try:
                    child.wait(10)
                    self.assertLess(time.monotonic() - start, 10)
                    with open("/proc/%d/status" % process.pid) as f:
                        shared = int(re.search(r"RssShmem:\s*(\d+)",
                                               f.read()).group(1))
                    self.assertLess(shared, 64 << 10, "KiB touched")
                except subprocess.TimeoutExpired:
                    self.fail("status takes more than 10 s")
                finally:
                    child.kill()
                    child.wait()

    def test_random_changes_of_a_true_arena(self):
        """Hundreds of damaged arenas, looked at by status."""
        rnd = random.Random(2)

        def make(ready):
            return self.image(ready, records=[
                self.record(ready, ready["at"] + 8 * n, b"\x90" * 5)
                for n in range(4)])
        with self.process(make) as process:
            before = Whole(process.pid)
            fd = [fd for fd, name in live.descriptors(process.pid).items()
                  if name.startswith("/memfd:ubp")][0]
            ready = {k: int(v, 16) for k, v in process.ready.items()}
            true = make(ready)
            deadline = time.monotonic() + 8
            with open("/proc/%d/fd/%d" % (process.pid, fd), "r+b", 0) as f:
                for _ in range(300):
                    data = bytearray(true)
                    for _ in range(rnd.randrange(1, 6)):
                        at = rnd.choice((rnd.randrange(136),
                                         4096 + rnd.randrange(2048)))
                        data[at] = rnd.choice((0, 0xff, rnd.randrange(256)))
                    f.seek(0)
                    f.write(data[:8192])
                    start = time.monotonic()
                    try:
                        ubp.status(process.pid)
                    except ubp.UbpError:
                        pass
                    self.assertLess(time.monotonic() - start, 5, data[:160])
                    if time.monotonic() > deadline:
                        break
            now = Whole(process.pid)
            self.assertEqual(before.maps, now.maps)
            self.assertEqual(0, process.ask("c")["wrong"])
            process.quit()
