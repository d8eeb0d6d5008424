"""Results as text, pictures and files for other tools: pure, on made data.

Judges are not ubp: an XML parser, a strict reader of OpenMetrics written
from its specification, the rules of the Trace Event Format, and arithmetic.
What only a browser can judge is at the end: a headless Chromium, if there.
"""
import collections
import json
import os
import re
import shutil
import subprocess
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree

import live

ubp = live.core()

HOSTILE = "\x1b[31m<b a=\"'\">&amp;]]></title><script>;\n\udcff\\\u202e"
WHERE = ubp.Where("host", 7, "libc.so.6", "ab12", "malloc", 0x1000)


def histogram(*values):
    """Return the Histogram of these values, as the issue states buckets."""
    counts = collections.Counter()
    for value in values:
        size = 1 << max(abs(value).bit_length() - 4, 0)
        low = abs(value) // size * size
        counts[(low, low + size - 1) if value >= 0
               else (-low - size + 1, -low)] += 1
    return ubp.Histogram.from_buckets(
        [bounds + (n,) for bounds, n in sorted(counts.items())], sum(values),
        min(values, default=None), max(values, default=None))


def row(total, key=(), now=None, **where):
    """Return a Row of malloc, but for what is said."""
    return ubp.Row(WHERE._replace(**where), key,
                   total if now is None else now, total)


def hit(time_ns, kind="hit", values=(), stack=(), tid=9, **where):
    """Return a TraceHit in malloc, but for what is said."""
    return ubp.TraceHit(time_ns, WHERE._replace(**where), tid, 0, kind,
                   tuple(values), tuple(stack))


class Quantities(unittest.TestCase):

    def test_numbers_have_units(self):
        for value, unit, expected in (
                (0, "", "0"), (-5, "", "-5"), (12345678, "", "12345678"),
                (0, "ns", "0 ns"), (999, "ns", "999 ns"),
                (1000, "ns", "1.00 us"), (1024, "ns", "1.02 us"),
                (9994, "ns", "9.99 us"), (9996, "ns", "10.0 us"),
                (99960, "ns", "100 us"), (123456, "ns", "123 us"),
                (5 * 10 ** 6, "ns", "5.00 ms"), (-1500, "ns", "-1.50 us"),
                (3600 * 10 ** 9, "ns", "3600 s")):
            self.assertEqual(ubp.quantity(value, unit), expected)

    def test_bounds_are_exact(self):
        for value, expected in ((0, "0"), (1023, "1023"), (1024, "1Ki"),
                                (1152, "1.125Ki"), (1025, "1025"),
                                (1 << 20, "1Mi"), (-4096, "-4Ki"),
                                (1 << 62, "4Ei"), (3 << 30, "3Gi")):
            self.assertEqual(ubp.bound(value), expected)

    def test_values_have_names_and_units(self):
        for name, value, expected in (
                ("arg0", 24, "arg0=24"), ("arg0", None, "arg0=<fault>"),
                ("elapsed", 1500, "elapsed=1.50 us"),
                ("str(arg0)", "a\"\x1b", 'str(arg0)="a\\"\\x1b"'),
                ("hex(arg1)", "0x80000", "hex(arg1)=0x80000"),
                ("caller", "libc.so.6:f+0x1", "caller=libc.so.6:f+0x1")):
            self.assertEqual(ubp.value_text(name, value), expected)


class Bars(unittest.TestCase):

    def test_bars_are_proportional_and_fit(self):
        for glyphs in ubp.UNICODE, ubp.ASCII:
            full = glyphs.bar[-1]
            self.assertEqual(ubp.bar(5, 5, 10, glyphs), full * 10)
            self.assertEqual(ubp.bar(1, 2, 10, glyphs), full * 5)
            self.assertEqual(ubp.bar(0, 5, 10, glyphs), "")
            self.assertEqual(ubp.bar(1, 0, 10, glyphs)[1:], "")
            self.assertEqual(len(ubp.bar(1, 10 ** 9, 10, glyphs)), 1)
            for width in (-1, 0, 1, 7):
                self.assertLessEqual(len(ubp.bar(9, 5, width, glyphs)),
                                     max(width, 0))

    def test_histogram_rows_hold_every_value_once(self):
        for values in ([0], [1, 1, 2], [5, 1 << 40], [-1, 0, 1], [-300, 7],
                       [200, 256, 299], [1 << 62] * 3, range(-40, 999)):
            made = histogram(*values)
            rows = [each for each in ubp.histogram_rows(made) if each]
            self.assertEqual(sum(n for _, _, n in rows), made.count)
            for low, high, n in rows:
                inside = sum(low <= value <= high for value in values)
                self.assertEqual(n, inside, (low, high, list(values)))
            for one, other in zip(rows, rows[1:]):
                self.assertLess(one[1], other[0])

    def test_long_gaps_are_one_row(self):
        rows = ubp.histogram_rows(histogram(1, 1 << 30))
        self.assertEqual(rows, [(1, 1, 1), None, (1 << 30, (2 << 30) - 1, 1)])

    def test_histogram_as_lines(self):
        self.assertEqual(ubp.histogram_lines(
            histogram(0, 1, 2, 3, 3, 2048), "", 60), [
                "  [  0]          1  16.7%  " + "#" * 11,
                "  [  1]          1  16.7%  " + "#" * 11,
                "  [  2,   4)     3  50.0%  " + "#" * 33,
                "  ...",
                "  [2Ki, 4Ki)     1  16.7%  " + "#" * 11,
                "  min 0  p50 2  p90 2048  p99 2048  p99.9 2048  max 2048"])

    def test_histograms_fit_every_window(self):
        rows = [row(histogram(*range(n, n * n)), ("k%d" % n,))
                for n in range(2, 20)] + [row(ubp.Histogram())]
        for columns in (1, 5, 20, 40, 79, 132, 300):
            for n_lines in (0, 1, 5, 24, 100):
                lines = ubp.histograms_lines(
                    rows, "elapsed", ("tid",), (columns, n_lines), 3,
                    ubp.UNICODE)
                self.assertLessEqual(max(map(len, lines)), columns)
                if n_lines:
                    self.assertLess(len(lines), max(n_lines, 3))

    def test_what_is_not_shown_is_told(self):
        rows = [row(histogram(1, 2)), row(histogram(1), function="free"),
                row(histogram(3), function="calloc")]
        lines = ubp.histograms_lines(rows, "arg0", (), None, 1)
        self.assertEqual(lines[0], "libc.so.6:malloc: arg0, 2 hits, mean 1.5")
        self.assertEqual(lines[-1], "2 functions not shown, with 2 hits")


class Tables(unittest.TestCase):

    def test_keys_are_columns(self):
        rows = [row(3, ("main", 5)), row(10, (None, -1)), row(2, ("", 7))]
        lines = ubp.table_lines(rows, 2.0, True, head=ubp.TableHead(
            "sum", ("str(arg0)", "arg1")))
        self.assertEqual([line.split() for line in lines], [
            "sum sum/s share str(arg0) arg1 function".split(),
            "10 5.0 66.7% <fault> -1 libc.so.6:malloc".split(),
            "3 1.5 20.0% main 5 libc.so.6:malloc".split(),
            '2 1.0 13.3% "" 7 libc.so.6:malloc'.split()])

    def test_keyed_tables_fit_every_window(self):
        rows = [row(n * 9 ** n, ("k" * n * 3, n), pid=n % 3,
                    host="h%d" % (n % 2)) for n in range(40)]
        for columns in (1, 5, 20, 40, 79, 132, 300):
            for n_lines in (1, 4, 24):
                lines = ubp.table_lines(
                    rows, 1.0, False, (columns, n_lines), None, ubp.UNICODE,
                    ubp.TableHead("calls", ("str(arg0)", "tid")))
                self.assertLessEqual(max(map(len, lines)), columns)
                self.assertLess(len(lines), max(n_lines, 4))

    def test_hostile_names_are_escaped(self):
        rows = [row(1, (HOSTILE,), function=HOSTILE, module=HOSTILE)]
        for text in (ubp.table_lines(rows, 1, True, head=ubp.TableHead(
                "calls", (HOSTILE,)))
                + ubp.histograms_lines([rows[0]._replace(
                    total=histogram(1))], HOSTILE, (HOSTILE,))
                + ubp.hit_lines(hit(1, values=[(HOSTILE, HOSTILE)],
                                    stack=[HOSTILE], function=HOSTILE))
                + ubp.tree_lines({(HOSTILE,): 1})
                + ubp.folded_lines({(HOSTILE, HOSTILE): 1})):
            self.assertTrue(text.isprintable(), text)


STACKS = {("a:main", "a:run", "c:malloc"): 60,
          ("a:main", "a:run", "a:load", "c:malloc"): 30,
          ("a:main", "a:exit"): 9, ("j:start",): 1}


class Stacks(unittest.TestCase):

    def test_tree(self):
        self.assertEqual(ubp.tree_lines(STACKS, glyphs=ubp.UNICODE), [
            "  99.0%     99  a:main",
            "  90.0%     90  ├─ a:run",
            "  60.0%     60  │  ├─ c:malloc",
            "  30.0%     30  │  └─ a:load",
            "  30.0%     30  │     c:malloc",
            "   9.0%      9  └─ a:exit",
            "   1.0%      1  j:start"])
        self.assertEqual(ubp.tree_lines(STACKS, (30, 0), least=0.1)[-3:], [
            "  30.0%     30  |  `- a:load",
            "  30.0%     30  |     c:malloc",
            "2 smaller branches not shown"])

    def test_the_largest_stacks_of_a_tree(self):
        self.assertEqual(ubp.tree_lines(STACKS, n_top=1), [
            "  60.0%     60  a:main", "  60.0%     60  a:run",
            "  60.0%     60  c:malloc",
            "3 smaller stacks not shown, with 40"])

    def test_trees_fit_every_window(self):
        deep = {tuple("m:%s" % ("f" * n) for n in range(d)): d
                for d in range(1, 80, 7)}
        for columns in (1, 20, 79):
            for n_lines in (3, 10, 50):
                for n_top in (None, 3):
                    lines = ubp.tree_lines(deep, (columns, n_lines), n_top)
                    self.assertLessEqual(max(map(len, lines)), columns)
                    self.assertLess(len(lines), n_lines)

    def test_folded(self):
        self.assertEqual(ubp.folded_lines(STACKS), [
            "main;exit 9", "main;run;load;malloc 30", "main;run;malloc 60",
            "start 1"])
        self.assertEqual(ubp.folded_lines({("m:a;b",): 1, (): 2}),
                         ["[no stack] 2", "a:b 1"])
        self.assertEqual(ubp.folded_lines({("m:f",): 1, ("n:f",): 2}),
                         ["f 3"])


SVG = "{http://www.w3.org/2000/svg}"


def frames_of(svg):
    """Parse a flame graph. -> [(name, module, x, width, y, about)]"""
    found = []
    for group in ElementTree.fromstring(svg).iter(SVG + "g"):
        name, module, about = group.find(SVG + "title").text.split("\n")
        box = group.find(SVG + "rect")
        found.append((name, module, float(box.get("x")[:-1]),
                      float(box.get("width")[:-1]), int(box.get("y")),
                      about))
    return found


class FlameGraphs(unittest.TestCase):

    def test_each_frame_is_as_wide_as_its_share_and_above_its_parent(self):
        found = {each[0]: each for each in frames_of(
            ubp.flame_graph({stack: n for stack, n in STACKS.items()
                             if "c:malloc" not in stack}, "t"))}
        self.assertEqual(set(found), {"all", "main", "exit", "start"})
        self.assertEqual(found["main"][3], 90)
        self.assertEqual(found["main"][5], "9 hits, 90.00 %")
        self.assertEqual(found["exit"][4] + ubp.FLAME_ROW, found["main"][4])
        self.assertEqual(found["start"][2], 90)

    def test_children_are_inside_their_parents_side_by_side(self):
        found = frames_of(ubp.flame_graph(STACKS, "t"))
        rows = collections.defaultdict(list)
        for name, _, x, width, y, _ in found:
            rows[y].append((x, x + width))
        for y, spans in rows.items():
            spans.sort()
            for one, other in zip(spans, spans[1:]):
                self.assertLessEqual(one[1], other[0] + 1e-4)
            for low, high in spans:
                self.assertTrue(y + ubp.FLAME_ROW not in rows or any(
                    a - 1e-4 <= low and high <= b + 1e-4
                    for a, b in rows[y + ubp.FLAME_ROW]))

    def test_it_is_one_file_without_addresses_to_elsewhere(self):
        svg = ubp.flame_graph(STACKS, "t")
        for word in ("href", "src=", "@import", "url(", "fetch(", "eval(",
                     "innerHTML", "document.write"):
            self.assertNotIn(word, svg)
        self.assertEqual(set(re.findall(r"https?://[^\"' ]+", svg)),
                         {"http://www.w3.org/2000/svg",
                          "http://www.w3.org/1999/xhtml"})

    def test_hostile_names_are_text(self):
        svg = ubp.flame_graph({(HOSTILE + ":" + HOSTILE,): 1}, HOSTILE,
                              HOSTILE)
        tree = ElementTree.fromstring(svg)
        self.assertEqual(len(list(tree.iter(SVG + "script"))), 1)
        self.assertEqual(frames_of(svg)[1][0].count("<script>"), 1)
        svg.encode("ascii", "xmlcharrefreplace")

    def test_many_frames_are_cut_down_to_the_largest_and_told(self):
        stacks = {("m:f%d" % n, "m:g"): 1 + n // 20000
                  for n in range(30000)}
        svg = ubp.flame_graph(stacks, "t")
        self.assertLessEqual(len(frames_of(svg)), ubp.FLAME_FRAMES + 1)
        self.assertRegex(svg, r", \d+ frames too small to draw;")

    def test_nothing_recorded_is_a_picture_too(self):
        self.assertEqual(len(frames_of(ubp.flame_graph({}, "t"))), 1)
        self.assertEqual(len(frames_of(ubp.flame_graph({("m:f",): -3},
                                                       "t"))), 1)


class Traces(unittest.TestCase):

    def test_a_line_a_hit(self):
        lines = ubp.hit_lines(hit(
            1234567, values=[("arg0", 24)], stack=["m:main", "m:f"]))
        self.assertRegex(lines[0], r"\A\d\d:\d\d:00\.001234        9  "
                         r"libc\.so\.6:malloc  arg0=24\Z")
        self.assertEqual(lines[1:], ["    m:f", "    m:main"])
        lines = ubp.hit_lines(hit(1, "exit"), "web1", True)
        self.assertIn("  web1      7/9  libc.so.6:malloc%return", lines[0])

    def nest(self, hits, **options):
        """Return what a CallTree makes of hits, without the times."""
        tree = ubp.CallTree(**options)
        lines = [line for each in hits for line in tree.feed(each)]
        return [line[17:] for line in lines + tree.flush()]

    def test_entries_and_exits_nest(self):
        self.assertEqual(self.nest([
            hit(1000, "entry", [("arg0", 1)], function="f"),
            hit(2000, "entry", function="g"),
            hit(2500, "exit", [("ret", 5), ("elapsed", 400)], function="g"),
            hit(2600, "entry", function="other", tid=10),
            hit(3000, "exit", [("arg0", 1), ("ret", 0)], function="f"),
            hit(3100, "exit", function="h"),
            hit(4000, "entry", function="f")]), [
                "      9             libc.so.6:f(arg0=1) {",
                "      9     500 ns    libc.so.6:g() ret=5",
                "      9    2.00 us  } libc.so.6:f arg0=1 ret=0",
                "      9             } libc.so.6:h",
                "     10             libc.so.6:other() {",
                "      9             libc.so.6:f() {"])

    def test_what_an_exception_left_is_closed_by_its_caller(self):
        self.assertEqual(self.nest([
            hit(1, "entry", function="f"), hit(2, "entry", function="g"),
            hit(3, "exit", function="f"), hit(4, "entry", function="h"),
            hit(5, "exit", function="h")])[-1],
            "      9       1 ns  libc.so.6:h()")

    def test_exits_alone_nest_by_the_time_they_took(self):
        def leave(time_ns, elapsed, function):
            return hit(time_ns, "exit", [("elapsed", elapsed)],
                       function=function)
        self.assertEqual(self.nest(
            [leave(20, 5, "c"), leave(40, 10, "b"), leave(50, 40, "a"),
             leave(70, 9, "z")], is_exits_only=True), [
                 "      9      40 ns  libc.so.6:a()",
                 "      9       5 ns    libc.so.6:c()",
                 "      9      10 ns    libc.so.6:b()",
                 "      9       9 ns  libc.so.6:z()"])

    def test_exits_wait_until_their_thread_is_quiet(self):
        tree = ubp.CallTree(is_exits_only=True)
        tree.feed(hit(5000, "exit", [("elapsed", 1000)]))
        self.assertEqual(tree.flush(6000), [])
        self.assertEqual(len(tree.flush(6000 + tree.QUIET_NS)), 1)
        self.assertEqual(tree.flush(), [])


class ChromeTraces(unittest.TestCase):
    """The rules of the Trace Event Format."""

    def events(self, hits):
        """Return the events, each checked against what its phase needs."""
        trace = ubp.ChromeTrace()
        events = json.loads(json.dumps([event for each in hits
                                        for event in trace.feed(each)]))
        for event in events:
            need = {"M": {"name", "pid", "args"},
                    "B": {"name", "ts", "pid", "tid"},
                    "E": {"ts", "pid", "tid"},
                    "X": {"name", "ts", "dur", "pid", "tid"},
                    "i": {"name", "ts", "pid", "tid", "s"}}[event["ph"]]
            self.assertLessEqual(need, set(event))
            self.assertLessEqual(set(event), need | {
                "ph", "name", "cat", "args", "tid"})
            for field, kinds in (("ts", (int, float)), ("pid", int),
                                 ("dur", (int, float)), ("tid", int),
                                 ("name", str), ("args", dict)):
                if field in event:
                    self.assertIsInstance(event[field], kinds)
        return events

    def test_phases(self):
        start = 1763856000 * 10 ** 9
        events = self.events([
            hit(start, "entry", [("arg0", 1)]), hit(start + 1500, "exit"),
            hit(start + 9001, "exit", [("elapsed", 2001)], function="f"),
            hit(start + 9002, stack=["m:main"], host="other"),
            hit(start + 9003, "exit", function="g")])
        self.assertEqual(
            [(each["ph"], each["ts"], each.get("dur"), each["pid"])
             for each in events if each["ph"] != "M"],
            [("B", 0.0, None, 7), ("E", 1.5, None, 7),
             ("X", 7.0, 2.001, 7), ("i", 9.002, None, 8),
             ("i", 9.003, None, 7)])
        self.assertEqual([each["args"]["name"] for each in events
                          if each["ph"] == "M"],
                         ["host pid 7", "other pid 7"])


# ---- a strict reader of OpenMetrics 1.0 ------------------------------------
SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)'
                    r'(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|'
                    r'\\[\\n"])*",?)*)\})? (\S+)\Z')
SUFFIXES = {"counter": {"_total"}, "gauge": {""},
            "histogram": {"_bucket", "_sum", "_count"}}


def read_metrics(text):
    """Return {family: (type, [(suffix, labels, value)])}; raise ValueError.

    As strict as the specification: order, escapes, units, "# EOF" at the
    end, no sample twice, buckets cumulative and closed by +Inf.
    """
    if not text.endswith("\n# EOF\n") and text != "# EOF\n":
        raise ValueError("no EOF")
    families, name = collections.OrderedDict(), None
    for line in text.split("\n")[:-2]:
        words = line.split(" ", 3)
        if words[0] == "#":
            if words[1] == "TYPE":
                name = words[2]
                if name in families:
                    raise ValueError("family twice: " + line)
                families[name] = (words[3], [])
            elif words[1] not in ("UNIT", "HELP") or words[2] != name:
                raise ValueError("stray: " + line)
            elif words[1] == "UNIT" and not name.endswith("_" + words[3]):
                raise ValueError("unit: " + line)
            elif families[name][1]:
                raise ValueError("late: " + line)
            continue
        match = SAMPLE.match(line)
        if not match or not match.group(1).startswith(name):
            raise ValueError("sample: %r" % line)
        kind, samples = families[name]
        suffix = match.group(1)[len(name):]
        pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match.group(2) or "")
        labels = dict(pairs)
        if suffix not in SUFFIXES[kind] or len(labels) != len(pairs):
            raise ValueError("sample: %r" % line)
        if (suffix, labels) in [each[:2] for each in samples]:
            raise ValueError("twice: %r" % line)
        samples.append((suffix, labels, float(match.group(3))))
    for name, (kind, samples) in families.items():
        if kind == "histogram":
            check_buckets(samples)
        for suffix, _, value in samples:
            if kind == "counter" and value < 0:
                raise ValueError("counter %s" % value)
    return families


def check_buckets(samples):
    """Raise ValueError unless each histogram is whole."""
    points = collections.OrderedDict()
    for suffix, labels, value in samples:
        key = tuple(sorted(item for item in labels.items()
                           if item[0] != "le"))
        point = points.setdefault(key, {"buckets": []})
        if suffix == "_bucket":
            point["buckets"].append((float(labels["le"]), value))
        else:
            point[suffix] = value
    for point in points.values():
        buckets = point["buckets"]
        if (buckets != sorted(buckets) or not buckets
                or buckets[-1][0] != float("inf")
                or [n for _, n in buckets] != sorted(n for _, n in buckets)):
            raise ValueError("buckets %r" % (buckets,))
        if ("_sum" in point) != ("_count" in point):
            raise ValueError("a sum without a count")
        if "_count" in point and point["_count"] != buckets[-1][1]:
            raise ValueError("count is not the last bucket")
        if "_sum" in point and buckets[0][0] < 0:
            raise ValueError("a sum of negative values")


class Metrics(unittest.TestCase):

    LOSS = [ubp.Loss("host", 7, 12, 2, 3)]

    def read(self, kind, rows, expression="", keys=()):
        """Return what the strict reader makes of one result."""
        return read_metrics(ubp.open_metrics(
            [(kind, rows, expression, keys)], self.LOSS))

    def test_counts(self):
        found = self.read("count", [
            row(10, ("main", 5)), row(0, ("x\\\n\"y", None))], "",
            ("str(arg0)", "arg1"))
        kind, samples = found["ubp_calls"]
        self.assertEqual(kind, "counter")
        self.assertEqual([value for _, _, value in samples], [10, 0])
        self.assertEqual(samples[0][1], {
            "host": "host", "pid": "7", "module": "libc.so.6",
            "build_id": "ab12", "function": "malloc", "by0": "str(arg0)",
            "key0": "main", "by1": "arg1", "key1": "5"})
        self.assertEqual(found["ubp_dropped"], ("counter", [
            ("_total", {"host": "host", "pid": "7"}, 2)]))
        self.assertEqual(found["ubp_refused_sites"][1][0][2], 3)

    def test_groups_share_families(self):
        found = read_metrics(ubp.open_metrics(
            [("count", [row(1)], "", ()), ("count", [row(2)], "", ())],
            self.LOSS))
        self.assertEqual([labels["group"] for _, labels, _
                          in found["ubp_calls"][1]], ["0", "1"])

    def test_histogram_buckets_end_before_powers_of_two(self):
        found = self.read("hist", [row(histogram(
            0, 1, 3, 1000, 1023, 1024))], "arg0")
        kind, samples = found["ubp_value"]
        self.assertEqual(
            [(labels["le"], value) for suffix, labels, value in samples
             if suffix == "_bucket"],
            [("0.0", 1), ("1.0", 2), ("3.0", 3), ("1023.0", 5),
             ("2047.0", 6), ("+Inf", 6)])
        self.assertEqual([each[2] for each in samples[-2:]], [3051, 6])

    def test_times_are_seconds(self):
        for kind, name in (("latency", "ubp_latency_seconds"),
                           ("hist", "ubp_value_seconds")):
            text = ubp.open_metrics([(kind, [row(histogram(
                1000, 2000))], "elapsed", ())], self.LOSS)
            samples = read_metrics(text)[name][1]
            self.assertEqual([labels["le"] for suffix, labels, _ in samples
                              if suffix == "_bucket"],
                             ["1.023e-06", "2.047e-06", "+Inf"])
            self.assertEqual(samples[-2][2], 3e-06)
            self.assertIn("# UNIT %s seconds\n" % name, text)

    def test_negative_values_have_no_sum(self):
        found = self.read("hist", [row(histogram(-300, -1, 0, 5))], "ret")
        self.assertEqual(
            [(suffix, labels.get("le"), value) for suffix, labels, value
             in found["ubp_value"][1]],
            [("_bucket", "-256.0", 1), ("_bucket", "-1.0", 2),
             ("_bucket", "0.0", 3), ("_bucket", "7.0", 4),
             ("_bucket", "+Inf", 4)])

    def test_hostile_names_and_sums(self):
        self.read("sum", [row(-5, (HOSTILE,), function=HOSTILE)], HOSTILE,
                  (HOSTILE,))
        for bad in ("x", "# TYPE a counter\na 1\n# EOF\n",
                    "# TYPE a counter\na_total 1\na_total 1\n# EOF\n",
                    "# TYPE a gauge\na{b=\"\\x\"} 1\n# EOF\n"):
            with self.assertRaises((ValueError, TypeError)):
                read_metrics(bad)


BROWSERS = "chromium chromium-browser google-chrome chrome".split()
# In a page of its own: do what a person does, and write down what is seen.
PERSON = """<script><![CDATA[
(function () {
  const out = [], of = name => Array.from(document.querySelectorAll(".f"))
    .find(g => g.querySelector("title").textContent.startsWith(name + "\\n"));
  const width = g => g.style.display === "none" ? 0 :
    parseFloat(g.querySelector("rect").getAttribute("width"));
  const key = k => (document.activeElement || document.documentElement)
    .dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true}));
  const see = () => out.push(["all", "main", "run", "exit", "start"].map(
    name => Math.round(width(of(name)))).join(" "));
  see();
  of("run").querySelector("rect").dispatchEvent(
    new MouseEvent("click", {bubbles: true}));
  see();
  out.push(document.getElementById("info").textContent);
  key("Escape"); see();
  of("exit").focus(); key("Enter"); see();
  document.getElementById("reset").click(); see();
  key("ArrowUp");
  out.push(document.activeElement.querySelector("text").textContent);
  const input = document.getElementById("search");
  input.value = "c:MALLOC";
  input.dispatchEvent(new Event("input"));
  setTimeout(() => {
    out.push(document.getElementById("found").textContent);
    out.push(document.querySelectorAll(".match").length + " matches");
    document.querySelector("style").textContent = "";
    document.getElementById("title").textContent = "SEEN " + out.join(" | ");
  }, 200);
})();
]]></script></svg>
"""


class Browser(unittest.TestCase):

    def setUp(self):
        path = next(filter(None, map(shutil.which, BROWSERS)), None)
        if not path:
            self.skipTest("no browser: apt-get install chromium")
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder, True)
        self.command = [path, "--headless", "--no-sandbox", "--disable-gpu",
                        "--user-data-dir=" + self.folder,
                        "--window-size=1200,400"]

    def test_zoom_search_and_keys_work_from_a_file(self):
        path = os.path.join(self.folder, "flame.svg")
        with open(path, "w", encoding="utf-8") as file:
            file.write(ubp.flame_graph(STACKS, "t").replace(
                "</svg>\n", PERSON))
        dom = subprocess.run(
            self.command + ["--virtual-time-budget=3000", "--dump-dom",
                            "file://" + path], timeout=60,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode()
        seen = re.search(r"SEEN ([^<]*)<", dom)
        self.assertTrue(seen, dom[-2000:])
        self.assertEqual(seen.group(1).split(" | "), [
            "100 99 90 9 1",            # as it opens
            "100 100 100 0 0",          # zoomed into run: parents are whole
            "run, a, 90 hits, 90.00 %",
            "100 99 90 9 1",            # Escape
            "100 100 0 100 0",          # Enter on exit
            "100 99 90 9 1",            # the button
            "main",                     # the arrow up from the root
            "matched 90.00 %", "2 matches"])


if __name__ == "__main__":
    unittest.main()
