"""The command line, run as a user runs it, on live processes of its own.

A row of a table is a case that anybody can add. Every process that is probed
is a child of the test, bounded in time and ended by its pid, and is compared
byte by byte with its files afterwards.
"""
import collections
import fcntl
import json
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
import ubp

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
UBP = os.path.join(TOP, "ubp.py")
# The command as `python3 -m ubp` and an installed one run it. A script is
# compiled anew at each start; a few tests below take that.
COMMAND = [sys.executable, "-c", "import sys; sys.path.insert(0, %r); "
           "sys.argv[0] = 'ubp'; import ubp; ubp.run()" % TOP]
N_THREADS, PRIME = 2, 100003            # what tests/targets/busy.c calls


def fresh_signals():
    """In a child: the usual handlers, though our parent may ignore some."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP,
                   signal.SIGQUIT):
        signal.signal(signum, signal.SIG_DFL)


def start(*words, **options):
    """Start ubp with these words. -> Popen, its pipes of bytes."""
    arguments = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE, preexec_fn=fresh_signals)
    arguments.update(options)
    command = arguments.pop("command", COMMAND)
    return subprocess.Popen(command + [str(word) for word in words],
                            **arguments)


def run(*words, **options):
    """Run ubp to its end. -> (exit status, stdout, stderr) as text."""
    process = start(*words, **options)
    try:
        out, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, (out or b"").decode(), (err or b"").decode()


def read_until(stream, text, seconds=90):
    """Read a pipe until text has come. -> all that came"""
    data, deadline = b"", time.monotonic() + seconds
    while text.encode() not in data:
        ready, _, _ = select.select([stream], [], [],
                                    max(0, deadline - time.monotonic()))
        part = os.read(stream.fileno(), 65536) if ready else b""
        if not part:
            raise AssertionError("%r did not come, but %r" % (text, data))
        data += part
    return data.decode()


class Pure(unittest.TestCase):
    """What needs no process."""

    def test_control_characters_are_escaped(self):
        for text, expected in (
                ("malloc", "malloc"), ("std::string", "std::string"),
                ("\x1b[31m", "\\x1b[31m"), ("a\nb\tc", "a\\x0ab\\x09c"),
                ("\x9b1m\x7f", "\\x9b1m\\x7f"), ("\udcff", "\\xff"),
                ("\u202e", "\\u202e"), ("gr\u00fc\u00df", "gr\u00fc\u00df"),
                ("\U000e0001", "\\U000e0001"), ("\ud800", "\\ud800")):
            with self.subTest(expected):
                self.assertEqual(ubp.escape(text), expected)

    def test_long_names_are_elided_in_the_middle(self):
        for text, size, expected in (
                ("malloc", 6, "malloc"), ("processCommand", 10, "proc...and"),
                ("processCommand", 9, "pro...and"), ("abcdef", 4, "abcd"),
                ("abcdef", 0, ""), ("abcdef", -3, ""), ("abcdef", 5, "a...f")):
            with self.subTest((text, size)):
                self.assertEqual(ubp.elide(text, size), expected)
                self.assertLessEqual(len(expected), max(size, 0))

    def test_times(self):
        for text, seconds in (("10", 10), ("500ms", 0.5), ("2m", 120),
                              (".5s", 0.5), ("1.5h", 5400)):
            self.assertEqual(ubp.parse_seconds(text), seconds)
        for text in ("", "0", "-1", "1d", "1 s", "1e3", "inf", "1e", "99999h"
                     "0"):
            with self.assertRaises(ubp.argparse.ArgumentTypeError):
                ubp.parse_seconds(text)

    def test_pids_as_pgrep_prints_them(self):
        self.assertEqual(ubp.parse_pids("1,22,333"), [1, 22, 333])
        self.assertEqual(ubp.parse_pids("1\n22\n"), [1, 22])
        for text in ("", ",", "x", "0", "-1", "1.5", "\u0661", "12345678901"):
            with self.assertRaises(ubp.argparse.ArgumentTypeError):
                ubp.parse_pids(text)

    def test_options_may_stand_anywhere(self):
        for line in ("count -p 4 a b --json", "count a -p 4 b --json",
                     "count a --json b -p4", "count --json -p 4 a b",
                     "count a b --json -p 4,4"):
            with self.subTest(line):
                options = ubp.parse_options(line.split())
                self.assertEqual((options.probes, options.pids, options.json),
                                 (["a", "b"], [4], True))

    def test_command_is_cut_off_at_the_first_two_dashes(self):
        options = ubp.parse_options("count a -- sh -c x -- --json".split())
        self.assertEqual(options.command, "sh -c x -- --json".split())
        self.assertFalse(options.json)

    def test_table_fits_every_window(self):
        rows = [ubp.Row(ubp.Where("host", 7 + n % 2, "libc.so.6", "",
                                  "function_%d_%s" % (n, "x" * n), n), (),
                        n * 10 ** (n // 5), n * 10 ** (n // 3))
                for n in range(60)]
        for columns in (1, 5, 20, 39, 40, 55, 56, 80, 132, 300):
            for n_lines in (1, 3, 4, 10, 24, 100):
                lines = ubp.table_lines(rows, 1.0, True, (columns, n_lines))
                self.assertLessEqual(max(map(len, lines)), columns)
                self.assertLess(len(lines), max(n_lines, 4))

    def test_table_is_sorted_and_tells_what_it_hides(self):
        rows = [ubp.Row(ubp.Where("host", 7, "m", "", "f%d" % n, n), (), n,
                        n) for n in range(1, 6)]
        lines = ubp.table_lines(rows, 2.0, True, None, 2)
        self.assertEqual([line.split() for line in lines], [
            ["calls", "calls/s", "share", "function"],
            ["5", "2.5", "33.3%", "m:f5"], ["4", "2.0", "26.7%", "m:f4"],
            "3 functions not shown, with 6 calls".split()])


class Misuse(unittest.TestCase):
    """Exit status 2, a clear word, and nothing done."""

    CASES = """
                                          | verb is missing
frobnicate -p 4 x                         | no verb
hist -p 4 x                               | hist needs one expression
hist -p 4 x -e arg0,arg1                  | hist needs one expression
latency -p 4 x%return                     | probes entry and exit itself
latency -p 4 x -e arg0                    | latency has no option -e
trace -p 4 x --interval 1                 | belongs to count, hist, latency
trace -p 4 x --unwind cfi                 | --unwind needs --stack
trace -p 4 x -o x.svg                     | needs --stack
stack -p 4 x -o x.prom                    | stack has no .prom to write
show                                      | no file
show x --by tid                           | by host
count                                     | needs -p PID or -- COMMAND
count -p 4                                | no probe
count malloc                              | needs -p PID or -- COMMAND
count -p four malloc                      | 'four' is no pid
count -p 0 malloc                         | '0' is no pid
count -p -4 malloc                        | -p
count -p 4 malloc --dur 3                 | no option --dur
count -p 4 malloc --duration 3parsecs     | is no time
count -p 4 malloc --top 0                 | is no number
count -p 4 malloc --strategy int3,int3    | named twice
count -p 4 malloc --strategy magic        | no strategy
count -p 4 malloc --leave --strategy hw   | debug registers end with
count -p 4 malloc -e arg0                 | -e; it belongs to hist, trace
count -p 4 malloc +                       | no probe beside the +
count -p 4 malloc -o x.svg                | count has no .svg to write
count -p 4 malloc -o x.png                | the suffix chooses the format
count -p 4 mem:0x1234/3:w                 | watches 1, 2, 4 or 8
count -p 4 usdt:libc:setjmp               | not built yet
count -p 4 :malloc                        | column 1
count -p 4 libc:                          | column 6
list -p 4                                 | no probe
list -p 4 x --json                        | no option --json
plan x                                    | plan needs -p
clean                                     | clean needs -p
clean -p 4 malloc                         | takes no probe
status malloc                             | takes no probe
"""

    def test_misuse_is_told_and_is_2(self):
        for case in self.CASES.strip("\n").splitlines():
            line, words = [part.strip() for part in case.split(" | ")]
            with self.subTest(line):
                status, out, err = in_process(line.split())
                self.assertEqual((status, out), (2, ""), err)
                self.assertIn(words, err)
                self.assertRegex(err, r"\Aubp: .*\n(ubp: hint: .*\n)?\Z")

    def test_with_a_command_misuse_is_125(self):
        status, out, err = run("count", "--frob", "x", "--", "true")
        self.assertEqual((status, out), (125, ""))
        self.assertIn("no option --frob", err)

    def test_help_ends_with_five_commands(self):
        status, out, err = run("--help")
        self.assertEqual((status, err), (0, ""))
        self.assertEqual(len(re.findall(r"^  python3 ubp\.py ",
                                        out.rpartition("\n\n")[2], re.M)), 5)
        for line in out.splitlines():
            self.assertLess(len(line), 80)

    def test_help_and_version_of_each_verb(self):
        for verb in ("count", "list", "plan", "status", "clean"):
            status, out, err = in_process([verb, "--help"])
            self.assertEqual((status, err), (0, ""))
            self.assertIn("usage: ubp " + verb, out)
            self.assertLess(max(map(len, out.splitlines())), 80)
        self.assertEqual(in_process(["--version"]),
                         (0, "ubp %s\n" % ubp.__version__, ""))


def in_process(words):
    """Call ubp.main here, descriptors 1 and 2 caught. -> as run()."""
    files = [tempfile.TemporaryFile() for _ in range(2)]
    kept = [os.dup(1), os.dup(2)]
    try:
        for fd in 1, 2:
            os.dup2(files[fd - 1].fileno(), fd)
        status = ubp.main(words)
    finally:
        for fd in 1, 2:
            os.dup2(kept[fd - 1], fd)
            os.close(kept[fd - 1])
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode())
        file.close()
    return (status,) + tuple(texts)


class BadTargets(unittest.TestCase):
    """Exit status 1, the reason, and nobody touched."""

    def check(self, words, *expected, **options):
        status, out, err = run(*words, **options)
        self.assertEqual((status, out), (1, ""), err)
        self.assertNotIn("Traceback", err)
        for text in expected:
            self.assertRegex(err, text)

    def test_no_such_pid(self):
        with open("/proc/sys/kernel/pid_max") as file:
            pid = int(file.read()) - 1
        self.check(["count", "-p", pid, "malloc"], "pid %d" % pid)
        self.check(["count", "-p", 2 ** 31 - 1, "malloc"], "2147483647")
        self.check(["count", "-p", 9999999999, "malloc"], "9999999999")

    def test_a_thread_is_no_process(self):
        with live.Target("busy", 2) as target:
            tid = [tid for tid in live.threads(target.pid)
                   if tid != target.pid][0]
            self.check(["count", "-p", tid, "hot"], "%d" % tid,
                       "%d" % target.pid)
            target.quit()

    def test_a_zombie(self):
        child = subprocess.Popen(["true"])
        live.settled(lambda: live.states(child.pid) == "Z")
        self.check(["count", "-p", child.pid, "malloc"], "[Zz]ombie")
        child.wait()

    def test_a_kernel_thread(self):
        if live.status(2).get("VmSize") or live.status(2)["Name"] != \
                "kthreadd":
            self.skipTest("pid 2 is no kernel thread in this pid namespace")
        self.check(["count", "-p", 2, "malloc"], "kernel thread")

    def test_itself(self):
        self.check([], "itself|own", command=[
            "sh", "-c", "exec '%s' '%s' count -p $$ malloc"
            % (sys.executable, UBP)])

    def test_another_users_process(self):
        if os.geteuid() != 0:
            self.check(["count", "-p", 1, "malloc"], "EPERM|EACCES")
            return

        def become_nobody():
            fresh_signals()
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)

        folder = tempfile.mkdtemp()
        try:
            os.chmod(folder, 0o755)
            for name in "ubp.py", "ubp_x86.py":
                shutil.copy(os.path.join(TOP, name), folder)
            python = readable_python()
            self.check(["count", "-p", 1, "malloc"], "EPERM|EACCES|permi",
                       command=[python, "-B", os.path.join(folder, "ubp.py")],
                       preexec_fn=become_nobody, cwd="/")
        finally:
            shutil.rmtree(folder)

    def test_a_function_that_is_not_there(self):
        with live.Target("busy", 1) as target:
            before = live.Snapshot(target.pid)
            for verb in "count", "list", "plan":
                self.check([verb, "-p", target.pid, "exe:hott"], "hott")
            self.check(["count", "-p", target.pid, "nosuchlib:hot"],
                       "nosuchlib")
            live.Snapshot(target.pid).compare(self, before)
            target.quit()

    def test_a_pattern_that_the_shell_expanded(self):
        with live.Target("busy", 1) as target:
            folder = tempfile.mkdtemp()
            try:
                with open(os.path.join(folder, "dump.rdb"), "w"):
                    pass
                self.check(["count", "-p", target.pid, "dump.rdb"],
                           "did the shell expand", cwd=folder)
            finally:
                shutil.rmtree(folder)
            target.quit()

    def test_too_many_sites(self):
        with live.Target("busy", 1) as target:
            self.check(["count", "-p", target.pid, "libc:*", "--max-sites",
                        "100"], "more than 100", "--max-sites")
            target.quit()

    def test_a_folder_that_others_can_write_to(self):
        if os.geteuid() != 0:
            self.skipTest("concerns root only")
        folder = tempfile.mkdtemp()
        try:
            os.chmod(folder, 0o777)
            for name in "ubp.py", "ubp_x86.py":
                shutil.copy(os.path.join(TOP, name), folder)
            with open(os.path.join(folder, "bisect.py"), "w") as file:
                file.write("print('planted')\n")
            for options in [], ["-I"]:
                self.check(["--version"], "others can write", command=[
                    sys.executable] + options + [
                        os.path.join(folder, "ubp.py")])
        finally:
            shutil.rmtree(folder)


def readable_python():
    """Return a python3 that any user may run, or skip."""
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.path.exists(path):
            return path
    raise unittest.SkipTest("no python3 in /usr/bin: apt-get install python3")


def need_ptrace():
    """Skip unless a process may be traced that is not one's child."""
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope") as file:
            scope = int(file.read())
    except OSError:                     # no Yama in this kernel
        return
    if scope > 1 or (scope and os.geteuid() != 0):
        raise unittest.SkipTest("kernel.yama.ptrace_scope is %d: set it to 0, "
                                "or run the tests as root" % scope)


class Live(unittest.TestCase):
    """A busy target, which is whole again after each test."""

    def setUp(self):
        need_ptrace()
        self.target = live.Target("busy", N_THREADS)
        self.addCleanup(self.target.kill)
        self.pid = self.target.pid
        self.before = live.Snapshot(self.pid)

    def assert_whole(self):
        """The target is as it was, and has computed what it should."""
        live.Snapshot(self.pid).compare(self, self.before)
        self.target.quit()

    def armed(self, *words, **options):
        """Start a count, and wait until it is armed."""
        process = start("count", "-p", self.pid, *words, **options)
        self.addCleanup(self.end, process)
        self.err = read_until(process.stderr, "Ctrl-C removes")
        return process

    def end(self, process):
        if process.poll() is None:
            process.kill()
            process.wait()
        for stream in process.stdout, process.stderr:
            if stream:
                stream.close()

    def finish(self, process):
        """Wait for the end. -> (exit status, stdout, all of stderr)"""
        out, err = process.communicate(timeout=180)
        return (process.returncode, (out or b"").decode(),
                self.err + err.decode())

    def objects(self, out):
        return [json.loads(line) for line in out.splitlines()]


class Counts(Live):

    def test_each_call_is_counted_once(self):
        process = self.armed("exe:hot", "exe:tiny", "--json")
        self.target.ask("c")
        process.send_signal(signal.SIGINT)
        status, out, err = self.finish(process)
        self.assertEqual(status, 0, err)
        totals = {line["function"]: line["total"]
                  for line in self.objects(out) if line["kind"] == "count"}
        self.assertEqual(totals["hot"], N_THREADS * PRIME)
        self.assertIn("hits %d = recorded %d + dropped 0" % (
            (sum(totals.values()),) * 2), err)
        self.assert_whole()

    def test_json_schema(self):
        process = self.armed("exe:*", "--json", "--interval", "100ms",
                             "--duration", "500ms")
        self.target.send("g")
        status, out, err = self.finish(process)
        self.assertEqual(status, 0, err)
        lines = self.objects(out)
        common = "v kind time_ns host pid module build_id function".split()
        own = {"count": "address calls total".split(),
               "refused": "address rule why".split(),
               "end": "reason hits recorded dropped refused pause_us".split()}
        totals = collections.Counter()
        for line in lines:
            self.assertEqual(list(line), common + own[line["kind"]])
            self.assertEqual((line["v"], line["pid"]), (1, self.pid))
            self.assertEqual(line["host"], os.uname().nodename)
            self.assertLess(abs(line["time_ns"] / 1e9 - time.time()), 60)
            if line["kind"] == "count":
                self.assertRegex(line["address"], r"\A0x[0-9a-f]+\Z")
                self.assertTrue(line["module"].startswith("busy"))
                totals[line["address"]] += line["calls"]
                self.assertEqual(line["total"], totals[line["address"]])
        total = sum(totals.values())
        self.assertGreater(total, 0)
        self.assertEqual([line["kind"] for line in lines].count("end"), 1)
        last = lines[-1]
        self.assertEqual(last["refused"], [
            line["kind"] for line in lines].count("refused"))
        self.assertEqual((last["kind"], last["reason"]), ("end", "duration"))
        self.assertEqual(last["hits"], total)
        self.assertEqual(last["hits"], last["recorded"] + last["dropped"])
        self.assertGreater(last["pause_us"], 0)
        self.target.ask("p")
        self.assert_whole()

    def test_signals_are_normal_ends(self):
        for signum, reason in ((signal.SIGINT, "interrupt"),
                               (signal.SIGTERM, "terminate"),
                               (signal.SIGHUP, "hangup")):
            process = self.armed("exe:hot", "--json")
            process.send_signal(signum)
            status, out, err = self.finish(process)
            self.assertEqual(status, 0, err)
            self.assertEqual(self.objects(out)[-1]["reason"], reason)
            self.assertIn("ubp: removed, 1 page equals its file; hits 0 = "
                          "recorded 0 + dropped 0\n", err)
        self.assert_whole()

    def test_a_table_is_printed_at_the_end(self):
        status, out, err = run("count", "-p", self.pid, "exe:hot", "exe:tiny",
                               "--duration", "100ms")
        self.assertEqual(status, 0, err)
        lines = out.splitlines()
        self.assertEqual(lines[0].split(),
                         ["calls", "calls/s", "share", "function"])
        self.assertEqual(len(lines), 3)
        self.assertRegex(err, r"\Aubp: pid %d \(busy[^)]*\): 2 sites by "
                         r"jump; stopped \d+\.\d\d ms; Ctrl-C removes\n"
                         r"ubp: removed, (1 page equals its file|"
                         r"2 pages equal their files); hits 0 = recorded "
                         r"0 \+ dropped 0\n\Z" % self.pid)
        self.assert_whole()

    def test_the_targets_exit_is_a_normal_end(self):
        process = self.armed("exe:hot", "--json")
        self.target.ask("c")
        self.target.quit()
        status, out, err = self.finish(process)
        self.assertEqual(status, 0, err)
        lines = self.objects(out)
        self.assertEqual(lines[-1]["reason"], "exit")
        self.assertGreaterEqual(lines[0]["total"], N_THREADS * PRIME)
        self.assertIn("exited; hits", err)

    def test_a_reader_that_goes_away_is_a_normal_end(self):
        for words in ((), ("--json", "--interval", "50ms")):
            process = self.armed("exe:hot", *words)
            process.stdout.close()
            process.stdout = None
            status, out, err = self.finish(process)
            self.assertEqual(status, 0, err)
            self.assertIn("ubp: removed", err)
            self.assertNotIn("Error", err)
        self.assert_whole()

    def test_a_reader_that_stands_still_does_not_keep_probes_in(self):
        self.target.send("g")
        process = self.armed("exe:*", "--json", "--interval", "1ms")
        time.sleep(1.0)                  # the pipe is full by now
        process.send_signal(signal.SIGINT)
        self.assertTrue(live.settled(lambda: not live.arenas(self.pid), 10))
        process.send_signal(signal.SIGINT)      # do not wait for the reader
        self.err += read_until(process.stderr, "removed")
        status, out, err = self.finish(process)
        self.assertEqual(status, 0, err)
        self.assertIn("the reader stood still", err)
        self.target.ask("p")
        self.assert_whole()

    def test_duration_holds_though_the_reader_stands_still(self):
        self.target.send("g")
        process = self.armed("exe:*", "--json", "--interval", "1ms",
                             "--duration", "1500ms")
        self.assertTrue(live.settled(lambda: not live.arenas(self.pid), 10))
        status, out, err = self.finish(process)     # reads all of it
        self.assertEqual(status, 0, err)
        self.assertEqual(self.objects(out)[-1]["reason"], "duration")
        self.target.ask("p")
        self.assert_whole()

    def test_closed_stdout_is_told_before_anything_is_done(self):
        status, out, err = run(
            command=["sh", "-c", "exec '%s' '%s' count -p %d exe:hot >&-" % (
                sys.executable, UBP, self.pid)])
        self.assertEqual(status, 1)
        self.assertEqual(err, "ubp: cannot write to stdout: EBADF: it is "
                         "closed\n")
        self.assert_whole()

    def test_a_full_disk(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        path = os.path.join(folder, "full.txt")
        os.symlink("/dev/full", path)
        with open("/dev/full", "w") as full:
            for words, options, name in ((["-o", path], {}, path),
                                         ([], {"stdout": full}, "stdout")):
                status, out, err = run("count", "-p", self.pid, "exe:hot",
                                       "--duration", "50ms", *words,
                                       **options)
                self.assertEqual(status, 1)
                self.assertIn("ubp: removed", err)
                self.assertIn("cannot write to %s: ENOSPC" % name, err)
                self.assertNotIn("Traceback", err)
            for words in ["--help"], ["count", "--help"]:
                self.assertEqual(run(*words, stdout=full)[::2], (
                    1, "ubp: cannot write to stdout: ENOSPC: No space left "
                    "on device\n"))
        self.assert_whole()

    def test_an_output_that_cannot_be_opened(self):
        status, out, err = run("count", "-p", self.pid, "exe:hot", "-o",
                               "/no/such/folder/x.jsonl")
        self.assertEqual((status, out), (1, ""))
        self.assertIn("/no/such/folder/x.jsonl: ENOENT", err)
        self.assert_whole()

    def test_output_file_has_the_format_of_its_suffix(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        for suffix, first in (("jsonl", '{"v": 1, "kind": "count"'),
                              ("txt", "     calls")):
            path = os.path.join(folder, "out." + suffix)
            status, out, err = run("count", "-p", self.pid, "exe:hot", "-o",
                                   path, "--duration", "50ms")
            self.assertEqual((status, out), (0, ""), err)
            with open(path) as file:
                self.assertTrue(file.read().startswith(first))
        self.assert_whole()

    def test_intervals_arrive_while_counting(self):
        process = self.armed("exe:hot", "--interval", "100ms", "--top", "1")
        self.target.send("g")
        text = read_until(process.stdout, "hot\n\n")
        self.assertIsNone(process.poll())
        self.assertRegex(text, r"\d\d:\d\d:\d\d, 0\.\d s\n")
        process.send_signal(signal.SIGINT)
        self.assertEqual(self.finish(process)[0], 0)
        self.target.ask("p")
        self.assert_whole()

    def test_several_processes_share_one_table(self):
        with live.Target("busy", 1) as other:
            process = start("count", "-p", self.pid, "-p", other.pid,
                            "exe:hot", "--json")
            self.addCleanup(self.end, process)
            self.err = read_until(process.stderr, "pid %d" % other.pid)
            self.target.ask("c")
            other.ask("c")
            process.send_signal(signal.SIGINT)
            status, out, err = self.finish(process)
            self.assertEqual(status, 0, err)
            totals = {line["pid"]: line["total"] for line
                      in self.objects(out) if line["kind"] == "count"}
            self.assertEqual(totals, {self.pid: N_THREADS * PRIME,
                                      other.pid: PRIME})
            other.quit()
        self.assert_whole()

    def test_a_pid_that_fails_does_not_keep_others_from_being_counted(self):
        status, out, err = run("count", "-p", "%d,2147483647" % self.pid,
                               "exe:hot", "--duration", "50ms")
        self.assertEqual(status, 0, err)
        self.assertIn("2147483647", err)
        self.assert_whole()

    def test_running_children_are_named(self):
        script = "import os, time\npid = os.fork()\n" \
                 "os.write(1, b'up')\ntime.sleep(30)"
        parent = subprocess.Popen([sys.executable, "-c", script],
                                  stdout=subprocess.PIPE)
        try:
            read_until(parent.stdout, "upup")
            child = child_of(parent.pid)
            status, out, err = run("count", "-p", parent.pid, "libc:abort",
                                   "--duration", "50ms")
            self.assertIn("hint: %d has 1 running child of the same program "
                          "that is not probed" % parent.pid, err)
            status, out, err = run("count", "-p", "%d,%d" % (
                parent.pid, child), "libc:abort", "--duration", "50ms")
            self.assertNotIn("running child", err)
            os.kill(child, signal.SIGKILL)
        finally:
            parent.kill()
            parent.communicate()


class Leaving(Live):

    def test_leave_status_clean(self):
        status, out, err = run("count", "-p", self.pid, "exe:hot", "--leave")
        self.assertEqual(status, 0, err)
        self.assertRegex(out, r"\A%d  0x[0-9a-f]+  busy\S*:hot\n\Z"
                         % self.pid)
        self.target.ask("c")
        status, out, err = run("status", "-p", self.pid, "--json")
        self.assertEqual(status, 0, err)
        first, last = [json.loads(line) for line in out.splitlines()]
        self.assertEqual((first["kind"], first["function"], first["total"]),
                         ("count", "hot", N_THREADS * PRIME))
        self.assertEqual((last["kind"], last["hits"]),
                         ("end", N_THREADS * PRIME))
        status, out, err = run("status")
        self.assertEqual(status, 0, err)
        self.assertIn("pid %d" % self.pid, out)
        self.assertIn(":hot", out)
        status, out, err = run("clean", "-p", self.pid, "--dry-run")
        self.assertEqual(status, 0, err)
        self.assertTrue(live.arenas(self.pid))
        for words in ("removed 1 site, 1 page", "no probes of ubp"):
            status, out, err = run("clean", "-p", self.pid)
            self.assertEqual((status, out), (0, ""), err)
            self.assertIn(words, err)
        self.assert_whole()

    def test_nothing_to_clean_is_no_error(self):
        for verb in "status", "clean":
            status, out, err = run(verb, "-p", self.pid)
            self.assertEqual((status, out), (0, ""))
            self.assertIn("no probes of ubp are in it", err)
        self.assert_whole()


class Looking(Live):

    def test_list(self):
        status, out, err = run("list", "-p", self.pid, "exe:hot", "exe:tin?")
        self.assertEqual(status, 0, err)
        names = sorted(line.split()[2].split(":")[1]
                       for line in out.splitlines())
        self.assertEqual(names, ["hot", "tiny"])
        for line in out.splitlines():
            self.assertRegex(line, r"\A0x[0-9a-f]{12} +\d+  busy")
        self.assert_whole()

    def test_plan_shows_bytes_and_reasons_and_changes_nothing(self):
        with live.Target("traps") as process:
            status, out, err = run("plan", "-p", process.pid, "exe:step",
                                   "exe:odd_tight+11")
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()
        self.assertEqual(status, 0, err)
        self.assertRegex(out, r"(?m)^    jump over \d+ bytes: [0-9a-f ]+ "
                         r"\([0-9+]+\).*; trampoline \d+ bytes$")
        self.assertRegex(out, r"(?m)^    refused, .+: .+$")
        self.assertRegex(out, r"(?m)^2 sites: 1 jump, 1 refused \(.+: 1\)$")

    def test_dry_run_prints_the_plan(self):
        plan = run("plan", "-p", self.pid, "exe:hot")
        self.assertEqual(run("count", "-p", self.pid, "exe:hot", "--dry-run"),
                         plan)
        self.assertEqual(plan[0], 0)
        self.assert_whole()

    def test_a_reader_of_one_line_is_no_error(self):
        status, out, err = run(command=[
            "sh", "-c", "'%s' '%s' list -p %d 'libc:*' | head -n 1" % (
                sys.executable, UBP, self.pid)])
        self.assertEqual(status, 0)
        self.assertNotIn("rror", err)
        self.assertEqual(len(out.splitlines()), 1)
        self.assert_whole()


class Commands(unittest.TestCase):
    """ubp count PROBE -- COMMAND"""

    def test_exit_status_is_the_commands(self):
        for command, expected in (
                (["sh", "-c", "exit 0"], 0), (["sh", "-c", "exit 7"], 7),
                (["sh", "-c", "kill -KILL $$"], 137),
                (["sh", "-c", "kill -TERM $$"], 143),
                (["/etc/passwd"], 126), (["/"], 126),
                (["no-such-command"], 127), ([""], 127)):
            with self.subTest(command):
                status, out, err = run("count", "libc:malloc", "--", *command)
                self.assertEqual(status, expected, err)

    def test_a_failure_before_the_start_is_125_and_nothing_ran(self):
        status, out, err = run("count", "libc:no_such_function", "--", "sh",
                               "-c", "echo ran")
        self.assertEqual((status, out), (125, ""))
        self.assertIn("not run", err)

    def test_stdin_and_stdout_are_the_commands(self):
        status, out, err = run(command=[
            "sh", "-c", "echo in | '%s' '%s' count libc:malloc -- cat" % (
                sys.executable, UBP)])
        self.assertEqual(status, 0, err)
        self.assertTrue(out.startswith("in\n     calls"), out)

    def test_calls_from_the_first_instruction_of_main_on(self):
        path = live.build("busy")
        process = start("count", "exe:main", "--json", "--", path, "1",
                        stdin=subprocess.PIPE)
        out, err = process.communicate(b"q", timeout=180)
        self.assertEqual(process.returncode, 0, err)
        lines = [json.loads(line) for line in out.decode().splitlines()
                 if line.startswith("{")]
        self.assertEqual([line["total"] for line in lines
                          if line["kind"] == "count"], [1])

    def test_signals_reach_the_command_unharmed(self):
        command = ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]
        expected = subprocess.check_output(
            command, preexec_fn=fresh_signals).decode()
        status, out, err = run("count", "libc:malloc", "--", *command)
        self.assertEqual(status, 0, err)
        self.assertEqual(out.splitlines()[:2], expected.splitlines())

    def test_terminate_is_passed_on(self):
        process = start("count", "libc:malloc", "--", "sleep", "30")
        read_until(process.stderr, "its end removes")
        process.terminate()
        process.communicate(timeout=180)
        self.assertEqual(process.returncode, 143)

    def test_interrupt_is_the_commands_own_affair(self):
        process = start("count", "libc:malloc", "--", "sh", "-c",
                        "trap 'echo got it; exit 3' INT; echo up; "
                        "while :; do sleep 0.05; done",
                        preexec_fn=new_session)
        read_until(process.stdout, "up")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=180)
        self.assertEqual(process.returncode, 3, err)
        self.assertIn(b"got it", out)


def new_session():
    """In a child: a process group of its own, signals fresh."""
    os.setsid()
    fresh_signals()


class EntryPoints(unittest.TestCase):

    def check(self, command, **options):
        status, out, err = run("--version", command=command, **options)
        self.assertEqual((status, out), (0, "ubp %s\n" % ubp.__version__),
                         err)

    def test_script_module_archive_and_link(self):
        self.check([sys.executable, UBP])
        self.check([sys.executable, "-m", "ubp"], cwd=TOP)
        self.check([sys.executable, "-c",
                    "import ubp; ubp.run()"], cwd=TOP)
        with tempfile.TemporaryDirectory() as folder:
            made = subprocess.run(
                [sys.executable, os.path.join(TOP, ".ci", "dist.py"), folder],
                stdout=subprocess.PIPE)
            self.assertEqual(made.returncode, 0)
            self.check([sys.executable, os.path.join(folder, "ubp.pyz")])
            self.assertEqual(len(os.listdir(folder)), 3)
            link = os.path.join(folder, "ubp")
            os.symlink(UBP, link)
            self.check([sys.executable, link])
            self.check([sys.executable, "-I", link])    # nor -P: no folder


class Signals(unittest.TestCase):

    def test_a_second_interrupt_is_answered_not_obeyed(self):
        read_fd, write_fd = os.pipe()
        kept, handler = os.dup(2), signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(write_fd, 2)
        try:
            with ubp.Signals() as signals:
                with signals.uninterrupted("removing 3 sites"):
                    os.kill(os.getpid(), signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.01)
                    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            self.assertEqual(signals.reason(), "interrupt")
            self.assertEqual(len(signals.seen), 2)
            self.assertIn(signal.SIGTSTP, blocked)
            self.assertIs(signal.getsignal(signal.SIGINT),
                          signal.default_int_handler)
        finally:
            os.dup2(kept, 2)
            signal.signal(signal.SIGINT, handler)
            os.close(write_fd)
        self.assertIn(b"still removing 3 sites", os.read(read_fd, 4096))
        os.close(read_fd)
        os.close(kept)

    def test_ignored_signals_stay_ignored(self):
        old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with ubp.Signals() as signals:
                os.kill(os.getpid(), signal.SIGHUP)
                self.assertEqual(signals.seen, [])
        finally:
            signal.signal(signal.SIGHUP, old)


class Screen:
    """As much of a terminal as the live view uses: lines and a cursor."""

    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows
        self.lines, self.x, self.y = [""] * rows, 0, 0
        self.wraps, self.n_cut = True, 0

    def feed(self, text):
        for part in re.findall(r"\x1b\[\??\d*[A-Za-z]|[^\x1b]", text):
            if part == "\r":
                self.x = 0
            elif part == "\n":
                self.newline()
            elif part.startswith("\x1b"):
                self.obey(part)
            elif self.x < self.columns or self.wraps:
                if self.x == self.columns:
                    self.newline()
                    self.x = 0
                line = self.lines[self.y].ljust(self.x)
                self.lines[self.y] = line[:self.x] + part + line[self.x + 1:]
                self.x += 1
            else:
                self.n_cut += 1

    def newline(self):
        self.y += 1
        if self.y == self.rows:
            self.lines = self.lines[1:] + [""]
            self.y -= 1

    def obey(self, part):
        if part.endswith("A"):
            self.y = max(0, self.y - int(part[2:-1] or 1))
        elif part in ("\x1b[K", "\x1b[J"):
            self.lines[self.y] = self.lines[self.y][:self.x]
            if part.endswith("J"):
                self.lines[self.y + 1:] = [""] * (self.rows - self.y - 1)
        elif part in ("\x1b[?7l", "\x1b[?7h"):
            self.wraps = part.endswith("h")
        else:
            raise AssertionError("unknown sequence %r" % part)


# As much of a shell as Ctrl-Z, bg and fg need: a job of its own, and the
# terminal back when it stops. SIGUSR1 is fg.
JOB_CONTROL = """
import os, signal, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.argv[1], sys.argv[1:])
def foreground(*ignored):
    os.tcsetpgrp(0, pid)
    os.kill(pid, signal.SIGCONT)
signal.signal(signal.SIGUSR1, foreground)
while True:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        sys.exit(status >> 8)
    os.tcsetpgrp(0, os.getpgrp())
"""


def child_of(pid):
    """Return the pid of a process's only child."""
    with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        return int(file.read())


class Terminal(Live):
    """The live view, on a pseudo-terminal."""

    def open(self, *words, **options):
        """Start a count, or verb=, on a terminal of 60 columns, 12 rows."""
        self.master, slave = pty.openpty()
        self.resize(60, 12)

        def prepare():
            new_session()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        environment = dict(os.environ, TERM=options.get("term", "xterm"),
                           PYTHONIOENCODING="utf-8")
        process = start(
            options.get("verb", "count"), "-p", self.pid, *words,
            stdin=slave, stdout=slave, stderr=slave, preexec_fn=prepare,
            env=environment, command=options.get(
                "command", COMMAND))
        os.close(slave)
        self.addCleanup(os.close, self.master)
        self.addCleanup(self.end, process)
        return process

    def resize(self, columns, rows):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ,
                    struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, seconds, until=None):
        """Return what the terminal got within some time, or until text."""
        data, deadline = b"", time.monotonic() + seconds
        while time.monotonic() < deadline and not (
                until and until.encode() in data):
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    data += os.read(self.master, 65536)
                except OSError:         # EIO: the other side is closed
                    break
        return data.decode()

    def test_live_view_is_redrawn_in_place(self):
        process = self.open("exe:hot", "exe:tin*", "--interval", "100ms")
        self.target.send("g")
        screen = Screen(60, 12)
        text = self.read(10, "\x1b[?7h") + self.read(0.8)
        screen.feed(text)
        self.assertGreaterEqual(text.count("calls/s"), 5)
        self.assertEqual(sum("calls/s" in line for line in screen.lines), 1)
        self.assertEqual(screen.n_cut, 0)
        self.assertTrue(any(":hot" in line for line in screen.lines))
        os.write(self.master, b"\x03")
        screen.feed(self.read(10, "dropped 0\r\n"))
        self.assertEqual(process.wait(10), 0)
        self.assertEqual(sum("calls/s" in line for line in screen.lines), 1)
        self.assertIn("removed, ", "\n".join(screen.lines))
        self.target.ask("p")
        self.assert_whole()

    def test_a_long_plan_shows_how_far_it_is(self):
        self.open("libc:*", "libc:*%return", verb="plan")
        text = self.read(60, "sites: ")
        shares = [int(n) for n in re.findall(r"\[#* *\] +(\d+) %", text)]
        self.assertGreater(len(shares), 1, text[:300])
        self.assertEqual(shares, sorted(shares))
        self.assertLess(shares[0], 100)
        before = text[:text.index("0x")]
        self.assertTrue(before.endswith("\r\x1b[K"), before)
        for line in before.split("\r\x1b[K"):
            self.assertLess(len(line), 60)
        done = subprocess.run(COMMAND + ["plan", "-p", str(self.pid),
                                         "libc:*"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, 0)
        self.assertNotIn(b"planning", done.stderr)

    def test_bars_are_redrawn_in_place_in_the_terminals_characters(self):
        for term, full in (("xterm", "\u2588"), ("linux", "#")):
            process = self.open("exe:hot", "-e", "arg0 & 7", "--interval",
                                "100ms", verb="hist", term=term)
            self.target.send("g")
            screen = Screen(60, 12)
            screen.feed(self.read(10, "\x1b[?7h") + self.read(0.6))
            self.assertEqual(sum("exe" in line or "hot: arg0" in line
                                 for line in screen.lines), 1, screen.lines)
            self.assertTrue(any(full in line for line in screen.lines),
                            screen.lines)
            self.assertEqual(screen.n_cut, 0)
            os.write(self.master, b"\x03")
            screen.feed(self.read(10, "dropped 0\r\n"))
            self.assertEqual(process.wait(10), 0)
            self.target.ask("p")
        self.assert_whole()

    def test_live_view_follows_the_window(self):
        process = self.open("libc:str*", "--interval", "100ms")
        self.read(10, "\x1b[?7h")
        for columns, rows in ((40, 6), (100, 30), (20, 4), (10, 2)):
            self.resize(columns, rows)
            self.read(0.4)
            frames = re.findall("\x1b\\[\\?7l(.*?)\x1b\\[\\?7h",
                                self.read(0.5), re.S)
            self.assertTrue(frames)
            lines = re.sub("\x1b\\[[0-9]*[A-Z]|\r", "",
                           frames[-1]).splitlines()
            self.assertLessEqual(len(lines), max(rows, 4) - 1)
            self.assertLessEqual(max(len(line) for line in lines), columns)
        os.kill(process.pid, signal.SIGINT)
        self.read(10, "dropped 0")
        self.assertEqual(process.wait(10), 0)
        self.assert_whole()

    def test_no_escape_codes_on_a_dumb_terminal(self):
        process = self.open("exe:hot", "--duration", "300ms", term="dumb")
        text = self.read(10, "dropped 0")
        self.assertEqual(process.wait(10), 0)
        self.assertNotIn("\x1b", text)
        self.assertIn("calls/s", text)
        self.assert_whole()

    def test_a_terminal_that_stands_still_does_not_keep_probes_in(self):
        process = self.open("exe:*", "--interval", "50ms", "--duration", "2")
        self.read(10, "\x1b[?7h")
        os.write(self.master, b"\x13")          # Ctrl-S
        self.read(0.3)
        self.assertTrue(live.arenas(self.pid))
        self.assertTrue(live.settled(lambda: not live.arenas(self.pid), 10))
        os.write(self.master, b"\x11")          # Ctrl-Q
        self.read(10, "dropped 0")
        self.assertEqual(process.wait(10), 0)
        self.assert_whole()

    def test_a_terminal_that_hangs_up_is_a_normal_end(self):
        process = self.open("exe:hot", "--interval", "50ms")
        self.read(10, "\x1b[?7h")
        devnull = os.open(os.devnull, os.O_RDONLY)
        os.dup2(devnull, self.master)           # the last of it is closed
        os.close(devnull)
        self.assertEqual(process.wait(20), 0)
        self.assert_whole()

    def test_no_view_while_the_terminal_is_somebody_elses(self):
        shell = self.open("exe:hot", "--interval", "50ms", command=[
            sys.executable, "-c", JOB_CONTROL, sys.executable, UBP])
        self.read(10, "\x1b[?7h")
        pid = child_of(shell.pid)
        os.write(self.master, b"\x1a")          # Ctrl-Z
        self.assertTrue(live.settled(lambda: live.states(pid) == "TT"
                                     or set(live.states(pid)) == {"T"}))
        self.assertEqual(live.tracers(self.pid), {})
        self.target.ask("c")                    # the target goes on
        self.read(0.2)
        os.kill(pid, signal.SIGCONT)            # bg
        self.assertNotIn("\x1b", self.read(0.5))
        os.kill(shell.pid, signal.SIGUSR1)      # fg
        self.assertIn("hot", self.read(10, "\x1b[?7h"))
        os.kill(pid, signal.SIGTERM)
        self.read(10, "dropped 0")
        self.assertEqual(shell.wait(10), 0)
        self.assert_whole()

    def test_no_hit_yet_is_told_with_namesakes(self):
        process = self.open("exe:hot")
        text = self.read(12, "no hit yet")
        self.assertIn("no hit yet at busy", text)
        os.write(self.master, b"\x03")
        self.read(10, "dropped 0")
        self.assertEqual(process.wait(10), 0)
        self.assert_whole()


if __name__ == "__main__":
    unittest.main()
