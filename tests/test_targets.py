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
import stat
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import live

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
UBP = os.path.join(TOP, "ubp.py")
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


def run(*words, command=(sys.executable, UBP), **options):
    """Run ubp's command line. -> (exit status, stdout, stderr)"""
    process = subprocess.Popen(
        list(command) + [str(word) for word in words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options)
    try:
        out, err = process.communicate(timeout=60)
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


# name                  | flags of cc                                  | probe                | counts
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
no unwind tables        | -fno-asynchronous-unwind-tables -no-pie      | exe:counted          | counted
"""                                                              # noqa: E501


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
                with live.Target("kinds", path=path) as process:
                    at = process.ready["at"][2:]
                    sites, _ = self.counted(process, where.format(at=at),
                                            key, arena=arena)
                    self.judge_site(sites[0], key, process)
                    process.quit()

    def judge_site(self, site, key, process):
        """The site is where the target says that the function is."""
        at = process.ready.get({"counted": "at"}.get(key, key))
        if at and key != "strlen":
            self.assertEqual(int(at, 16), site.vaddr)
        elif at and "static" not in process.path:
            # glibc: the implementation that this processor takes.
            self.assertLessEqual(abs(int(at, 16) - site.vaddr), 4)

    def test_counts_are_true_with_a_shared_arena(self):
        self.judged("memfd")

    def test_counts_are_true_with_an_anonymous_arena(self):
        self.judged("anon")

    def test_counts_are_true_under_musl(self):
        self.judged("memfd", of_musl=True)
        self.judged("anon", of_musl=True)

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

    def test_ubp_inside_a_pid_namespace_and_status_from_outside(self):
        code = """
child = int(sys.argv[1])
target = ubp.attach(child)
probe = target.probe("exe:counted", ubp.Count(), timeout=30)
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
    probe = target.probe("exe:counted", ubp.Count(), timeout=30)
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
            copied(os.path.join(TOP, name), path, 0o644)
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

    def test_nobody_is_refused_pid_1(self):
        with self.session(1) as other:
            self.assertIn("uid 0, we are uid %d" % NOBODY,
                          other.line(PATIENCE))

    def test_nobody_is_refused_its_process_that_is_not_dumpable(self):
        # A program that may not be read is not dumpable, execve(2).
        os.chmod(self.program, 0o711)
        with live.Target("kinds", path=self.program,
                         prefix=AS_NOBODY) as process:
            with self.session(process.pid) as other:
                self.assertRegex(other.line(PATIENCE), "not dumpable")
            process.quit()

    def test_nobody_and_a_filter_that_only_root_can_read(self):
        sealed = copied(live.build("sealed"), self.folder + "/sealed")
        code = SESSION.replace("exe:counted", "exe:hot")
        with live.Target("sealed", "allow", path=sealed,
                         prefix=AS_NOBODY) as process:
            process.ask("r")
            before = Whole(process.pid)
            with live.Process(list(AS_NOBODY) + [
                    "/usr/bin/python3", "-B", "-c", code, self.folder,
                    process.pid], cwd="/") as other:
                self.assertRegex(other.line(PATIENCE),
                                 "refused .*seccomp.*CAP_SYS_ADMIN")
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
                self.assertTrue(error.hint)


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
        target = ubp.launch([path, "early", "9"], timeout=PATIENCE)
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

    def test_what_is_launched_runs_untraced_and_is_whole_after_removal(self):
        with live.python("""
target = ubp.launch([sys.argv[1]], timeout=30)
probe = target.probe(["exe:counted", "libc:strlen"], ubp.Count(), timeout=30)
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
