"""The verbs that measure: what is parsed, what is shown, and on real servers.

First what needs no process: groups, expressions, files merged by `show`.
Then the one-liners of README, each on a server of its own whose own
statistics, or whose known work, is the judge.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest

import live
import test_cli

ubp = live.core()
run, in_process = test_cli.run, test_cli.in_process


class Groups(unittest.TestCase):

    def groups(self, *words):
        """Return the Groups that a command line has."""
        return ubp.parse_options(words).groups

    def test_plus_begins_another_group(self):
        groups = self.groups(
            "trace", "-p", "4", "libc:malloc", "-e", "arg0", "+", "libc:free",
            "x", "-e", "hex(arg0), arg1", "--if", "arg0 > 5", "--json")
        self.assertEqual([group.probes for group in groups],
                         [("libc:malloc",), ("libc:free", "x")])
        self.assertEqual([group.exprs for group in groups],
                         [("arg0",), ("hex(arg0)", "arg1")])
        self.assertEqual([group.when for group in groups], ["", "arg0 > 5"])

    def test_what_belongs_to_all_may_stand_in_any_group(self):
        for words in ("--json -p 4 a + b", "a -p 4 --json + b",
                      "a + b --json -p 4", "a -p 4 + b --json"):
            options = ubp.parse_options(["count"] + words.split())
            self.assertEqual((options.json, options.pids, options.probes),
                             (True, [4], ["a", "b"]), words)

    def test_expressions_may_look_like_options(self):
        group, = self.groups("hist", "-p4", "f", "-e-arg0", "--if",
                             "-arg1 > 5", "--by", "tid, -arg2")
        self.assertEqual((group.exprs, group.when, group.keys),
                         (("-arg0",), "-arg1 > 5", ("tid", "-arg2")))

    def test_commas_inside_of_calls_do_not_part(self):
        group, = self.groups("trace", "-p", "4", "f", "-e",
                             "str(arg0, 16), arg1", "-e", "tid")
        self.assertEqual(group.exprs, ("str(arg0, 16)", "arg1", "tid"))

    CASES = """
hist -p 4 f -e                | arg0 + foo          | 7
hist -p 4 f -e                | arg0 +              | 6
trace -p 4 f -e               | arg0, 5 / 2         | 6
count -p 4 f --if             | ret == 0            | 0
count -p 4 f --by             | tid, elapsed        | 5
count -p 4 f --sum            | str(arg0)           | 0
trace -p 4 f --until          | open('x')           | 5
latency -p 4 f --if           | import os           | 0
"""

    def test_wrong_expressions_are_pointed_at(self):
        for case in self.CASES.strip("\n").splitlines():
            line, text, column = [part.strip() for part in case.split("|")]
            with self.subTest(text):
                status, out, err = in_process(line.split() + [text])
                self.assertEqual((status, out), (2, ""), err)
                lines = err.splitlines()
                self.assertIn("ubp:   " + text, lines[:-1])
                self.assertRegex(lines[-1], r"\Aubp:   +\^\Z")
                self.assertEqual(
                    lines[-1].index("^") - len("ubp:   "), int(column), err)

    def test_caret_stays_below_what_it_means_in_long_texts(self):
        text = "arg0 + " * 40 + "foo"
        status, out, err = in_process(["hist", "-p", "4", "f", "-e", text])
        lines = err.splitlines()
        self.assertEqual(lines[-2][lines[-1].index("^"):], "foo")
        self.assertLess(max(map(len, lines[-2:])), 80)

    def test_each_verb_has_examples_that_parse(self):
        for verb, text in ubp.EXAMPLES.items():
            for line in text.replace("\\\n", " ").strip().splitlines():
                words = shlex.split(line.partition("ubp ")[2])
                if words[0] == "|" or "| ubp" in line:
                    words = shlex.split(line.partition("| ubp ")[2])
                words = ["4" if word == "PID" else word for word in words]
                with self.subTest(line):
                    try:
                        options = ubp.parse_options(words)
                    except ubp.Misuse as error:     # planned, and says so
                        self.assertIn("not built yet", str(error))
                        continue
                    self.assertEqual(options.verb, verb)


def record(kind, total=None, host="a", pid=1, time_ns=1, **fields):
    """Return a line of JSON as ubp on some host would have written it."""
    made = {"v": 1, "kind": kind, "time_ns": time_ns, "host": host,
            "pid": pid, "module": "libc.so.6", "build_id": "ab12",
            "function": "malloc"}
    if kind == "end":
        made.update(module=None, build_id=None, function=None, reason="exit",
                    hits=0, recorded=0, dropped=0, refused=0, pause_us=1.0)
    if total is not None:
        made.update(address="0x1000", calls=total, total=total)
    made.update(fields)
    return json.dumps(made) + "\n"


def buckets(*values):
    """Return what the JSON of a histogram of small values has."""
    return {"count": len(values), "sum": sum(values), "min": min(values),
            "max": max(values), "expression": "arg0",
            "buckets": [[value, value, values.count(value)]
                        for value in sorted(set(values))]}


class Show(unittest.TestCase):

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def show(self, *texts, words=(), status=0):
        """Run `show` over files that hold these texts. -> its lines"""
        paths = []
        for n, text in enumerate(texts):
            paths.append(os.path.join(self.folder, "%d.jsonl" % n))
            with open(paths[-1], "w") as file:
                file.write(text)
        got, out, err = in_process(["show"] + paths + list(words))
        self.assertEqual(got, status, err)
        self.err = err
        return out.splitlines()

    def test_hosts_are_added_up_by_build_id_and_function(self):
        lines = self.show(
            record("count", 5) + record("end", hits=5, recorded=5),
            record("count", 7, "b", 2) + record("count", 1, "b", 2,
                                                function="free")
            + record("end", host="b", pid=2, hits=9, recorded=8, dropped=1,
                     refused=3))
        self.assertEqual([line.split() for line in lines[:3]], [
            "calls share function".split(),
            "12 92.3% libc.so.6:malloc".split(),
            "1 7.7% libc.so.6:free".split()])
        self.assertEqual(lines[-1], "2 hosts, 2 processes; hits 14 = recorded"
                         " 13 + dropped 1; refused 3")

    def test_files_of_one_name_but_other_builds_are_told_apart(self):
        lines = self.show(record("count", 5) + record(
            "count", 7, build_id="cd34" * 10))
        self.assertEqual({line.split()[-1] for line in lines[1:3]}, {
            "libc.so.6[ab12]:malloc", "libc.so.6[cd34cd34]:malloc"})

    def test_by_host(self):
        lines = self.show(record("count", 5), record("count", 7, "b"),
                          words=["--by", "host"])
        self.assertEqual([line.split() for line in lines[:3]], [
            "calls share host function".split(),
            "7 58.3% b libc.so.6:malloc".split(),
            "5 41.7% a libc.so.6:malloc".split()])

    def test_the_last_of_cumulative_lines_counts(self):
        lines = self.show(record("count", 5) + record("count", 9)
                          + record("count", 9, calls=0) + record("end"))
        self.assertEqual(lines[1].split()[0], "9")

    def test_runs_of_one_process_are_added_up(self):
        """One that ended, one that was killed, and one after it."""
        lines = self.show(record("count", 5) + record("end")
                          + record("count", 7) + record("count", 2))
        self.assertEqual(lines[1].split()[0], "14")
        self.assertIn("no end line from a pid 1: its loss is not "
                      "known", lines[-1])

    def test_keys_are_added_up_and_loss_is_not_hidden(self):
        by = {"by": ["str(arg0)", "tid"]}
        lines = self.show(
            record("count", 3, key=["x", 1], **by)
            + record("count", 4, key=[None, 1], **by),
            record("count", 5, "b", key=["x", 1], **by) + "{broken\n"
            + record("count", "6") + record("count", 1, v=2)
            + record("count", 1, key=["x"], **by) + record("later", 1)
            + "[" * 100000 + "\n" + record("end", host="b", dropped=2,
                                           hits=7, recorded=5)[:-1])
        self.assertEqual([line.split() for line in lines[:3]], [
            "calls share str(arg0) tid function".split(),
            "8 66.7% x 1 libc.so.6:malloc".split(),
            "4 33.3% <fault> 1 libc.so.6:malloc".split()])
        self.assertEqual(
            lines[-1], "2 hosts, 2 processes; hits 7 = recorded 5 + dropped "
            "2; refused 0; no end line from a pid 1: its loss is not known; "
            "5 lines are no JSON of ubp; 1 line of a kind not known here")

    def test_histograms_are_added_up(self):
        lines = self.show(record("hist", 3, **buckets(1, 1, 2)),
                          record("hist", 1, "b", **buckets(7)))
        self.assertEqual(lines[0], "libc.so.6:malloc: arg0, 4 hits, mean 2.8")
        self.assertIn("  min 1  p50 1  p90 7  p99 7  p99.9 7  max 7", lines)

    def test_stacks_become_one_flame_graph(self):
        path = os.path.join(self.folder, "all.folded")
        texts = [record("stack", 3, host, stack=["m:main", "m:f"])
                 for host in "ab"]
        self.assertEqual(self.show(*texts, words=["-o", path]), [])
        with open(path) as file:
            self.assertEqual(file.read(), "main;f 6\n")
        self.assertIn("2 hosts", self.err)
        lines = self.show(*texts)
        self.assertEqual(lines[0].split(), "100.0% 6 m:main".split())
        self.show(*texts, words=["-o", path[:-6] + "svg"])
        with open(path[:-6] + "svg") as file:
            self.assertIn("<title>f\nm\n6 hits, 100.00 %</title>",
                          file.read())

    def test_traces_come_in_the_order_of_time(self):
        def hit(time_ns, host):
            return record("trace", host=host, time_ns=time_ns, tid=9, cpu=0,
                          event="hit", values={"arg0": time_ns})
        lines = self.show(hit(1, "a") + hit(4, "a") + hit(5, "a"),
                          hit(2, "b") + hit(3, "b"))
        self.assertEqual([line.split()[-1] for line in lines[:5]],
                         ["arg0=%d" % n for n in range(1, 6)])
        self.assertIn("  b      1/9  libc.so.6:malloc  ", lines[1])

    def test_json_of_all_can_be_shown_again(self):
        texts = (record("count", 5) + record("hist", 3, **buckets(1, 2, 2)),
                 record("stack", 2, "b", stack=["m:main"])
                 + record("end", host="b", hits=2, recorded=2))
        once = self.show(*texts, words=["--json"])
        last = json.loads(once[-1])
        self.assertEqual((last["kind"], last["unended"], last["hits"]),
                         ("end", ["a pid 1"], 2))
        again = self.show("\n".join(once) + "\n")
        self.assertEqual(again[:-1], self.show(*texts)[:-1])

    def test_nothing_to_show_is_an_error(self):
        self.show("", "x\n", status=1)
        self.assertIn("no line of it is JSON of ubp", self.err)
        self.show(record("count", 5), words=["/no/such/file"], status=1)
        self.assertIn("/no/such/file: ENOENT", self.err)

    def test_standard_input(self):
        done = subprocess.run(
            [sys.executable, test_cli.UBP, "show", "-"],
            input=record("count", 5).encode(), stdout=subprocess.PIPE)
        self.assertRegex(done.stdout.decode(),
                         r"\n +5 +100\.0%  libc\.so\.6:malloc\n")


if __name__ == "__main__":
    unittest.main()
