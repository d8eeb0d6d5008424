"""Where nothing may be mapped: code and counters in the slack of pages.

The targets run under seccomp filters (targets/sealed.c) that forbid what an
arena would need; or UBP_ARENA=slack asks for it. What they computed they say
themselves; what is changed and what is zero again is read from /proc.
"""
import os
import subprocess
import sys
import time
import unittest

import live

TOP = os.path.dirname(live.HERE)
PAGE = 4096
MUSL = "/usr/lib/x86_64-linux-musl/musl-gcc.specs"


def setUpModule():
    global ubp
    ubp = live.core()


def last_pages(pid):
    """{vaddr: bytes} of the last page of each file-backed mapping."""
    found = {}
    with open("/proc/%d/mem" % pid, "rb", 0) as memory:
        for m in live.maps(pid):
            if m.inode and m.permissions == "r-xp":
                memory.seek(m.end - PAGE)
                found[m.end - PAGE] = memory.read(PAGE)
    return found


class Case(unittest.TestCase):

    def kind(self, name):
        """Have arenas made of that kind until the end of this test."""
        before = os.environ.get("UBP_ARENA")
        os.environ["UBP_ARENA"] = name

        def back():
            del os.environ["UBP_ARENA"]
            if before is not None:
                os.environ["UBP_ARENA"] = before
        self.addCleanup(back)


class Records(Case):

    def test_a_record_of_any_window_is_read_back(self):
        """Or what was there before could not be put back."""
        x86 = ubp.ubp_x86
        base, site = 0x10000f00, 0x10000400
        header = ubp.SlackHeader(ubp.SLACK_MAGIC, ubp.VERSION, 0, 1,
                                 0x10000800, 0, 0, 0, 0, 0, 0, 0x20000800,
                                 256, base)
        for n in range(1, x86.MAX_LOOPED + 1):
            window = x86.Window(site, max(n, 5), ())
            record = ubp.Record(
                site, 0, 0x10000800, 200, 3, window.size,
                tuple((vaddr, bytes(range(len(new))), new) for vaddr, new
                      in x86.window_patches(window, 0x10000800)),
                tuple(x86.Copy(8 * at, 2, 40 + 19 * at, 2 + 10 * at,
                               2 * (at % 3 == 0)) for at in range(n)),
                "", "", "", "count")
            data = bytes(8) + ubp._pack_slack_record(record, base, 0)
            with self.subTest(n):
                self.assertEqual((record, 0, 8), ubp._unpack_slack_record(
                    data, len(data), header))


class Sealed(Case):
    """Filters that kill, refuse or trap, and the strict mode."""

    MODES = "strict", "kill", "errno", "trap"

    def test_counts_and_leaves_every_byte_as_it_was(self):
        for mode in self.MODES:
            with self.subTest(mode), live.Target("sealed", mode) as process:
                process.ask("r")
                before = live.Snapshot(process.pid)
                pages = last_pages(process.pid)
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:hot", ubp.Count())
                    process.ask("r")
                    self.assertEqual((10007, 0), (probe.read(),
                                                  probe.dropped))
                    now = live.Snapshot(process.pid)
                    self.assertEqual(before.maps, now.maps)
                    self.assertEqual({}, now.tracers)
                    self.assertNotEqual(pages, last_pages(process.pid))
                    self.assertIn("not counted", " ".join(target.notes))
                live.Snapshot(process.pid).compare(self, before)
                self.assertEqual(pages, last_pages(process.pid))
                self.assertEqual(0, process.ask("r")["wrong"])
                self.assertEqual(10007, probe.read())
                process.quit()

    def test_as_many_as_fit_and_the_rest_with_its_reason(self):
        with live.Target("sealed", "kill") as process:
            process.ask("r")
            before = live.Snapshot(process.pid)
            pages = last_pages(process.pid)
            with ubp.attach(process.pid) as target:
                probe = target.probe("libc:str*", ubp.Count())
                own = target.probe("exe:hot", ubp.Count())
                self.assertGreater(len(probe.sites), 8)
                self.assertGreater(len(probe.refused), 8)
                for plan in probe.refused:
                    if plan.rule == "slack":
                        self.assertRegex(plan.why, "seccomp.*no room")
                process.ask("r")
                self.assertEqual(10007, own.read())
                [libc, exe] = sorted(ubp.status(process.pid),
                                     key=lambda each: -len(each.sites))
                self.assertEqual({site.vaddr for site in probe.sites},
                                 {site.vaddr for site in libc.sites})
                self.assertEqual([("hot", "armed", 10007)], [
                    (site.name, site.state, site.calls)
                    for site in exe.sites])
                probe.remove()
                process.ask("r")
                self.assertEqual(20014, own.read())
            live.Snapshot(process.pid).compare(self, before)
            self.assertEqual(pages, last_pages(process.pid))
            process.quit()

    def test_what_needs_more_than_counters_is_refused_with_the_reason(self):
        with live.Target("sealed", "kill") as process, \
                ubp.attach(process.pid) as target:
            process.ask("r")
            for action in (ubp.Hist("arg0"), ubp.Trace("arg0"),
                           ubp.Latency(), ubp.Count(by="arg0")):
                with self.subTest(repr(action)):
                    with self.assertRaises(ubp.ProbeError) as caught:
                        target.probe("exe:hot", action)
                    self.assertIn("seccomp", str(caught.exception))
            few = target.probe("exe:hot", ubp.Count(), "arg0 < 5000")
            total = target.probe("exe:hot", ubp.Count(sum="arg0"))
            every = target.probe("exe:hot", ubp.Count())
            process.ask("r")
            self.assertEqual((5000, 10007), (few.read(), every.read()))
            self.assertEqual(sum(range(10007)), total.read())
            few.remove()
            process.ask("r")
            self.assertEqual(20014, every.read())
            target.close()
            self.assertEqual(0, process.ask("r")["wrong"])
            process.quit()

    def test_left_behind_it_is_found_read_and_cleaned(self):
        with live.Target("sealed", "kill") as process:
            process.ask("r")
            before = live.Snapshot(process.pid)
            pages = last_pages(process.pid)
            run = lambda *words: subprocess.run(            # noqa: E731
                [sys.executable, TOP + "/ubp.py"] + [str(w) for w in words],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
                universal_newlines=True)
            done = run("count", "-p", process.pid, "exe:hot", "--leave")
            self.assertEqual(0, done.returncode, done.stderr)
            self.assertIn("unused bytes", done.stderr)
            process.ask("r")
            done = run("status", "-p", process.pid)
            self.assertRegex(done.stdout, "10007 .*hot")
            with ubp.attach(process.pid) as target:
                with self.assertRaises(ubp.ProbeError) as caught:
                    target.probe("exe:hot", ubp.Count())
                self.assertIn("ubp", str(caught.exception))
            self.assertEqual(0, run("clean", "-p",
                                    process.pid).returncode)
            live.Snapshot(process.pid).compare(self, before)
            self.assertEqual(pages, last_pages(process.pid))
            self.assertEqual(0, process.ask("r")["wrong"])
            process.quit()

    def test_killed_at_any_instant_it_lives_and_can_be_cleaned(self):
        code = """
for turn in range(1000):
    with ubp.attach(int(sys.argv[1])) as target:
        target.probe("exe:hot", ubp.Count())
        if turn == 0:
            print("once", flush=True)
"""
        with live.Target("sealed", "kill") as process:
            process.ask("r")
            before = live.Snapshot(process.pid)
            pages = last_pages(process.pid)
            for turn in range(12):
                with live.python(code, process.pid) as tracer:
                    tracer.line()
                    time.sleep(0.017 * turn)
                    tracer.kill()
                process.ask("r")
                ubp.clean(process.pid)
                live.Snapshot(process.pid).compare(self, before)
                self.assertEqual(pages, last_pages(process.pid))
            self.assertEqual(0, process.ask("r")["wrong"])
            process.quit()


class Asked(Case):
    """Without a filter, by UBP_ARENA=slack: threads, forks, signals."""

    def setUp(self):
        self.kind("slack")

    def test_counts_under_fire_and_is_taken_out_of_running_code(self):
        with live.Target("busy", 4) as process:
            before = live.Snapshot(process.pid)
            pages = last_pages(process.pid)
            process.send("g")
            for turn in range(15):
                with ubp.attach(process.pid) as target:
                    probe = target.probe(["exe:hot", "exe:tiny", "exe:keep",
                                          "exe:marked"], ubp.Count())
                    self.assertEqual(4, len(probe.sites))
                    time.sleep(0.01)
                self.assertGreater(probe.read(), 0)
            start = process.ask("p")["hot"]
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                n = process.ask("c")["hot"]
                self.assertEqual(n - start, probe.read())
            live.Snapshot(process.pid).compare(self, before)
            self.assertEqual(pages, last_pages(process.pid))
            process.quit()

    def test_children_count_for_themselves_and_are_cleaned(self):
        with live.Target("children") as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                own = process.ask("c")["hot"]
                answer = process.ask("f")
                children = [int(pid) for pid in
                            str(answer["children"]).split(",")]
                self.assertEqual(own, probe.read())
                for pid in children:
                    [arena] = ubp.status(pid)
                    self.assertEqual([own + 1009], [
                        site.calls for site in arena.sites])
                probe.remove()
            for pid in children + [process.pid]:
                self.assertEqual([], live.changed_text(pid))
                self.assertEqual([], ubp.status(pid))
            process.ask("w")
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_signal_storms_and_int3_in_slack(self):
        for strategy in "jump", "int3":
            with self.subTest(strategy), live.Target("traps") as process, \
                    ubp.attach(process.pid) as target:
                probe = target.probe("exe:step", ubp.Count(),
                                     strategy=strategy)
                n = process.ask("h")["n"]
                self.assertEqual(n, probe.read())
                target.close()
                self.assertEqual([], live.changed_text(process.pid))
                process.quit()

    def test_a_forged_header_writes_nothing(self):
        """What it claims must be slack, of the very module that it is in."""
        with live.Target("sealed", "allow") as process:
            process.ask("r")
            with ubp.attach(process.pid) as target:
                target.probe("exe:hot", ubp.Count())
                target.detach()
            [view] = ubp.find_arenas(process.pid)
            header, base = view.header, view.header.base
            stack = next(m for m in live.maps(process.pid)
                         if m.path == "[stack]")
            heap = next(m for m in live.maps(process.pid)
                        if m.permissions == "rw-p")
            for lie in (dict(data=stack.end - 64, data_size=64),
                        dict(data=heap.start, data_size=64),
                        dict(low=header.low - 64), dict(n_records=4000),
                        dict(data_size=PAGE * 2)):
                with self.subTest(lie):
                    forged = header._replace(**lie)
                    os.pwrite(self.memory(process.pid), ubp.SLACK.pack(
                        *forged[:-1]), base)
                    self.assertEqual([], [
                        v for v in ubp.find_arenas(process.pid)
                        if v.slack and v.slack[1][0] != header.data])
                    self.assertTrue(all(
                        v.ranges[0][0] == header.low
                        for v in ubp.find_arenas(process.pid)))
            os.pwrite(self.memory(process.pid), ubp.SLACK.pack(*header[:-1]),
                      base)
            ubp.clean(process.pid, all=True)
            self.assertEqual([], live.changed_text(process.pid))
            self.assertEqual(0, process.ask("r")["wrong"])
            process.quit()

    def memory(self, pid):
        fd = os.open("/proc/%d/mem" % pid, os.O_RDWR)
        self.addCleanup(os.close, fd)
        return fd

    def test_never_in_the_data_of_musl_or_of_a_loader(self):
        if not os.path.exists(MUSL):
            self.skipTest("no musl-gcc: apt-get install musl-tools")
        with live.Target("busy", 1) as process:
            every = ubp.modules(process.pid)
            maps = ubp.read_maps(process.pid)
            self.assertTrue(ubp.data_slacks(process.pid, every, every, maps))
            loader = [m for m in every if m.name.startswith("ld-")]
            self.assertEqual(1, len(loader))
            self.assertEqual([], ubp.data_slacks(process.pid, loader, every,
                                                 maps))
            for each in every:
                each.close()
            process.quit()
        path = live.build("kinds", ("-specs=" + MUSL,))
        with live.Target("kinds", path=path) as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as target:
                with self.assertRaises(ubp.ProbeError) as caught:
                    target.probe("exe:counted", ubp.Count())
            self.assertIn("behind the data", str(caught.exception))
            live.Snapshot(process.pid).compare(self, before)
            process.quit()


if __name__ == "__main__":
    unittest.main()
