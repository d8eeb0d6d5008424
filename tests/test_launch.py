"""A COMMAND that ubp starts behaves as one that env(1) starts.

The judge is the command itself, run by env on a terminal of its own; its
shell is here, so that jobs stop and go on.
"""
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unittest

import live

UBP = os.path.join(os.path.dirname(live.HERE), "ubp.py")

# Says what it sees of its terminal and which signals come. A signal also
# writes to a pipe that is waited for: one that came just before a blocking
# read would only be told after it, by env too.
PROGRAM = r"""
import os, select, signal, sys
def told(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())
def note(signo, frame):
    told("signal", signal.Signals(signo).name)
told("terminals", *[os.isatty(n) for n in range(3)])
told("foreground", os.tcgetpgrp(0) == os.getpgrp())
told("has its own group", os.getpgrp() != os.getsid(0))
told("ignored", sorted(n for n in range(1, 32)
                       if signal.getsignal(n) == signal.SIG_IGN))
told("blocked", sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
told("open", sorted(n for n in range(3, 64)
                    if os.path.exists("/proc/self/fd/%d" % n)))
told("nice", os.nice(0), "umask", os.umask(0), "folder", os.getcwd())
told("environment", sorted(os.environ))
for name in ("SIGCONT", "SIGWINCH", "SIGINT", "SIGQUIT", "SIGUSR1"):
    signal.signal(getattr(signal, name), note)
came, comes = os.pipe()
for fd in came, comes:
    os.set_blocking(fd, False)
signal.set_wakeup_fd(comes)
told("up")
while True:
    if came in select.select([0, came], [], [])[0]:
        os.read(came, 64)
        continue
    line = os.read(0, 4096).decode()
    if not line:
        break
    told("got", line.strip())
    if line == "stop\n":
        os.kill(os.getpid(), signal.SIGTSTP)
        told("went on")
    elif line == "default\n":
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        told("set")
    elif line == "end\n":
        sys.exit(7)
"""


class Job:
    """A command as the foreground job of a shell on a new terminal."""

    def __init__(self, command):
        self.master, self.slave = pty.openpty()
        self.resize(20, 60)
        self.events, self.told = os.pipe()
        self.pid_read, self.pid_write = os.pipe()
        self.text = ""
        self.shell = os.fork()
        if self.shell == 0:
            try:
                self._be_shell(command)
            finally:
                os._exit(1)
        os.close(self.slave)
        os.close(self.told)
        self.pid = int(os.read(self.pid_read, 20))

    def _be_shell(self, command):
        signal.alarm(60)
        os.setsid()
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.tcsetpgrp(self.slave, os.getpid())
            for signo in (signal.SIGTTOU, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(signo, signal.SIG_DFL)
            for n in range(3):
                os.dup2(self.slave, n)
            os.execvp(command[0], command)
        os.write(self.pid_write, b"%d" % child)
        while True:
            _, status = os.waitpid(child, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                code = (128 + os.WTERMSIG(status) if os.WIFSIGNALED(status)
                        else os.WEXITSTATUS(status))
                os.write(self.told, b"ended %d\n" % code)
                os._exit(0)
            os.tcsetpgrp(self.slave, os.getpgrp())
            os.write(self.told, b"stopped %d\n" % os.WSTOPSIG(status))
            time.sleep(0.2)
            os.tcsetpgrp(self.slave, child)
            os.killpg(child, signal.SIGCONT)

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ,
                    struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self.master, text.encode())

    def read(self, until, fd=None, seconds=20):
        """Read the terminal, or the shell, until a text has come."""
        fd = self.master if fd is None else fd
        data, limit = "", time.monotonic() + seconds
        while until not in data and time.monotonic() < limit:
            if select.select([fd], [], [], 0.1)[0]:
                try:
                    part = os.read(fd, 65536).decode()
                except OSError:             # EIO: the terminal has closed
                    part = ""
                if not part:
                    break
                data += part
        self.text += data.replace("\r", "")
        return until in data

    def close(self):
        try:
            os.killpg(self.pid, signal.SIGKILL)     # if it has not ended
        except ProcessLookupError:
            pass
        os.kill(self.shell, signal.SIGKILL)
        os.waitpid(self.shell, 0)
        for fd in (self.master, self.events, self.pid_read, self.pid_write):
            os.close(fd)


class Terminal(unittest.TestCase):

    # what is done | what must be read then
    TALK = r"""
    -            | up
    hello\n      | got hello
    \x03         | SIGINT
    \x1c         | SIGQUIT
    \x1a         | shell: stopped 20
    -            | SIGCONT
    resize       | SIGWINCH
    stop\n       | shell: stopped 20
    -            | went on
    usr1         | SIGUSR1
    """
    ENDS = {"end": [("end\n", "shell: ended 7")],
            "quit": [("default\n", "set"), ("\x1c", "shell: ended 131")],
            "eof": [("\x04", "shell: ended 0")]}

    def talk(self, prefix, end):
        """All that came from the terminal, in order, but ubp's own lines."""
        job = Job(list(prefix) + [sys.executable, "-c", PROGRAM])
        try:
            for line in self.TALK.strip().splitlines():
                what, answer = [w.strip() for w in line.split("|")]
                self.step(job, what.encode().decode("unicode_escape"), answer)
            for what, answer in self.ENDS[end]:
                self.step(job, what, answer)
        finally:
            job.close()
        return [line for line in job.text.splitlines()
                if re.match("signal|terminals|foreground|has its|ignored|"
                            "blocked|open|nice|environment|got|went|stopped|"
                            "ended", line)]

    def step(self, job, what, answer):
        if what == "resize":
            job.resize(22, 70)
        elif what == "usr1":
            os.kill(job.pid, signal.SIGUSR1)
        elif what != "-":
            job.type(what)
        is_shell = answer.startswith("shell: ")
        self.assertTrue(job.read(
            answer.replace("shell: ", ""), job.events if is_shell else None),
            "%r: no %r in %s" % (what, answer, job.text))

    def test_a_job_is_as_under_env(self):
        for end in sorted(self.ENDS):
            unprobed = self.talk(["env"], end)
            self.assertIn("foreground True", unprobed)
            for strategy, probe in (("jump", "libc:malloc"),
                                    ("int3", "libc:open64"), ("hw", "libc:"
                                                              "malloc")):
                if strategy == "hw" and not (live.IS_ROOT and end == "end"):
                    continue
                with self.subTest(end, strategy=strategy):
                    self.assertEqual(unprobed, self.talk(
                        [sys.executable, UBP, "count", "--strategy",
                         strategy, probe, "--"], end))


class Pipes(unittest.TestCase):

    def run_both(self, command, data=b"", **options):
        """[(exit status, stdout, stderr)] by env, and by ubp: jump, int3."""
        found = []
        for strategy in None, "jump", "int3":
            with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
                prefix = ["env"] if strategy is None else [
                    sys.executable, UBP, "count", "--strategy", strategy,
                    "-o", out.name, "libc:write", "libc:read", "--"]
                done = subprocess.run(
                    prefix + command, input=data, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, timeout=60, **options)
                errors = b"".join(
                    line for line in done.stderr.splitlines(True)
                    if not line.startswith(b"ubp: "))
                found.append((done.returncode if done.returncode >= 0
                              else 128 - done.returncode, done.stdout,
                              errors))
                if strategy:
                    with open(out.name) as file:
                        self.assertIn('"kind":"end"',
                                      file.read().replace(" ", ""))
        return found

    def test_bytes_pass_unchanged(self):
        data = bytes(range(256)) * 4096
        unprobed, jump, int3 = self.run_both(["cat"], data)
        self.assertEqual((0, data, b""), unprobed)
        self.assertEqual(unprobed, jump)
        self.assertEqual(unprobed, int3)

    def test_the_two_outputs_stay_apart_and_the_end_is_the_commands(self):
        for script in ("echo out; echo err >&2; exit 42",
                       "echo out; kill -SEGV $$", "echo err >&2; kill -9 $$",
                       "exec 1>&-; echo lost; exit 3", "yes | head -3"):
            with self.subTest(script):
                unprobed, jump, int3 = self.run_both(["sh", "-c", script])
                self.assertEqual(unprobed, jump)
                self.assertEqual(unprobed, int3)

    def test_closed_descriptors_stay_closed(self):
        if shutil.which("bash") is None:
            self.skipTest("apt-get install bash")
        program = "ls /proc/self/fd | grep -c ."
        unprobed, jump, int3 = self.run_both(["bash", "-c", program])
        self.assertEqual(unprobed, jump)
        self.assertEqual(unprobed, int3)

    @unittest.skipUnless(shutil.which("strace"), "install strace")
    def test_under_a_tracer_that_follows_forks_it_is_refused(self):
        """A process has one tracer: the command is not run, nor left."""
        done = subprocess.run(
            ["strace", "-f", "-o", os.devnull, sys.executable, UBP, "count",
             "libc:malloc", "--", "sh", "-c", "echo ran"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
            stdin=subprocess.DEVNULL)
        self.assertEqual((125, b""), (done.returncode, done.stdout))
        self.assertRegex(done.stderr.decode(), r"\Aubp: cannot attach to pid "
                         r"\d+ .*: EPERM: traced by pid \d+ \(strace\)\n"
                         r"ubp: hint: .*\n\Z")

    def test_killed_before_the_command_runs_nothing_is_left(self):
        code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import ubp\n"
                "child = ubp._Child(['/bin/echo', 'ran'])\n"
                "os.write(1, b'%d' % child.pid); os.kill(os.getpid(), 9)\n")
        done = subprocess.run([sys.executable, "-c", code,
                               os.path.dirname(UBP)], timeout=60,
                              stdout=subprocess.PIPE)
        self.assertEqual(-signal.SIGKILL, done.returncode)
        pid = int(done.stdout)          # the pipe is closed: it has ended
        self.assertTrue(live.settled(
            lambda: not os.path.exists("/proc/%d/exe" % pid), 10))


if __name__ == "__main__":
    unittest.main()
