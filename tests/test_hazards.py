"""One test or more for each hazard that was seen (the numbers are those of
the list of hazards that the design keeps), each provoked on purpose.

A test passes if the target says that nothing happened to it. Where refusing
is as good as coping, both pass, but never a wrong value or a changed byte.
"""
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import live

UPROBE_EVENTS = "/sys/kernel/tracing/uprobe_events"
WINDOWS = ["exe:win_slow", "exe:win_ones", "exe:win_pause", "exe:win_call",
           "exe:win_call1", "exe:win_back", "exe:win_data", "exe:win_round",
           "exe:win_tight"]


def setUpModule():
    global ubp
    ubp = live.core()


def define_uprobe(line):
    """Write to uprobe_events; no open(…, "a"): tracefs cannot be sought."""
    fd = os.open(UPROBE_EVENTS, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, os.fsencode(line) + b"\n")
    finally:
        os.close(fd)


def by_name(probe):
    return {site.function.name: n for site, n in probe.counts().items()}


class InsideWindows(unittest.TestCase):
    """Threads, signal frames and system calls inside of the five bytes."""

    def many_rounds(self, mode, sites, n, inside=0.0):
        """n rounds against windows.c; then exact counts; then its verdict."""
        with live.Target("windows", mode, seconds=240) as process:
            before = live.Snapshot(process.pid)
            live.rounds(process.pid, sites, n, inside=inside)
            process.ask("p")
            live.Snapshot(process.pid).compare(self, before, masks=False)
            process.send("g")
            self.exact(process, sites)
            process.quit()

    def exact(self, process, sites):
        start = process.ask("p")
        with ubp.attach(process.pid) as target:
            probe = target.probe(sites, ubp.Count())
            process.send("g")
            time.sleep(0.2)
            end = process.ask("p")
            for name, n in by_name(probe).items():
                key = name.replace("win_", "")
                if key in end and key != "back":
                    self.assertEqual(end[key] - start[key], n, name)

    def test_7_threads_in_the_middle_of_a_window_go_on(self):
        self.many_rounds("loop", WINDOWS, 150)

    def test_7_signal_frames_that_point_into_a_window_go_on(self):
        self.many_rounds("signals", WINDOWS, 150)

    def test_22_signal_frames_that_point_into_a_trampoline_go_on(self):
        self.many_rounds("signals", ["exe:win_slow", "exe:win_pause"], 100,
                         inside=0.004)

    def test_21_contexts_that_a_handler_has_left_go_on(self):
        """User threads, of which all but one lie on stacks of no thread."""
        for mode in "", "guards":
            with self.subTest(mode), live.Target("preempted",
                                                 mode) as process:
                release = re.match(r"(\d+)\.(\d+)", os.uname().release)
                if mode and tuple(map(int, release.groups())) < (6, 15):
                    self.skipTest("pagemap tells no guards before Linux 6.15")
                before = live.Snapshot(process.pid)
                self.assertGreater(live.rounds(process.pid, [
                    "exe:tiny", "exe:loop+3"], 40, inside=0.004), 0)
                live.Snapshot(process.pid).compare(self, before, masks=False)
                process.quit()

    def test_22_frames_are_found_whatever_the_process_before_had(self):
        """Where code is, is remembered of files, not of one process alone."""
        def restorers(pid):
            tracer = ubp.Tracer(pid)
            tracer.maps = ubp.read_maps(pid)
            return tracer.find_gadgets().restorers

        def end(pid):                   # after its maps were read
            tracer = ubp.Tracer(pid)
            tracer.maps = ubp.read_maps(pid)
            tracer.read = lambda *_: os.pread(-1, 1, 0)
            self.assertEqual((), tracer.find_gadgets().restorers)

        def change(pid):
            vaddrs = restorers(pid)
            with open("/proc/%d/mem" % pid, "r+b", 0) as memory:
                for vaddr in vaddrs:
                    os.pwrite(memory.fileno(), b"\xcc", vaddr)
            ubp.Tracer.known_gadgets.clear()
            self.assertEqual((), restorers(pid))

        for act in (end, change):
            with self.subTest(act.__name__), live.Target(
                    "sites") as one, live.Target("sites") as two:
                ubp.Tracer.known_gadgets.clear()
                act(one.pid)
                found = restorers(two.pid)
                self.assertNotEqual((), found)
                ubp.Tracer.known_gadgets.clear()
                self.assertEqual(restorers(two.pid), found)

    def test_3_threads_behind_a_displaced_syscall_go_on(self):
        with live.Target("windows", "sleep", seconds=240) as process:
            before = live.Snapshot(process.pid)
            deadline = time.monotonic() + 5
            for turn in range(100):
                if time.monotonic() > deadline:
                    break
                with ubp.attach(process.pid) as target:
                    try:
                        probe = target.probe(["exe:nap_inside",
                                              "exe:nap_behind",
                                              "exe:nap_alone"], ubp.Count())
                    except ubp.UbpError as error:
                        self.assertNotIsInstance(error, ubp.UbpTimeout)
                        continue
                    time.sleep(turn % 4 * 0.002)
                    probe.remove()
            n = process.ask("p")
            self.assertGreater(n["nap"], 100)
            live.Snapshot(process.pid).compare(self, before, masks=False)
            process.send("g")
            process.quit()

    def test_7_no_thread_is_left_with_a_trap_flag_or_debug_register(self):
        with live.Target("windows", "loop", seconds=240) as process:
            code = """
with ubp.attach(int(sys.argv[1])) as target:
    probe = target.probe(%r, ubp.Count())
    print("armed", flush=True)
    probe.remove()
    os.kill(os.getpid(), 9)
""" % (WINDOWS,)
            for _ in range(5):
                with live.python(code, process.pid) as tracer:
                    self.assertEqual("armed", tracer.line())
                    self.assertEqual(-signal.SIGKILL, tracer.wait())
            time.sleep(0.1)
            ubp.clean(process.pid, all=True)
            process.ask("p")
            self.assertEqual([], live.changed_text(process.pid))
            process.send("g")
            process.quit()


class SameAddressSpace(unittest.TestCase):
    """Other processes in the same memory, and threads that do not stop."""

    def test_4_a_clone_vm_sibling_is_stopped_too_or_refused(self):
        with live.Target("windows", "sibling", seconds=240) as process:
            refused = 0
            for _ in range(20):
                try:
                    live.rounds(process.pid, WINDOWS[:2], 1)
                except ubp.UbpError as error:
                    refused += 1
                    self.assertIn(process.ready["sibling"], str(error))
            self.assertIn(refused, (0, 20))
            self.assertEqual({}, live.tracers(int(process.ready["sibling"])))
            process.ask("p")
            self.assertEqual([], live.changed_text(process.pid))
            process.send("g")
            process.quit()

    def test_4_attaching_to_the_sibling_is_as_safe(self):
        with live.Target("windows", "sibling", seconds=240) as process:
            try:
                live.rounds(int(process.ready["sibling"]), WINDOWS[:2], 30)
            except ubp.UbpError:
                pass
            process.ask("p")
            self.assertEqual([], live.changed_text(process.pid))
            process.send("g")
            process.quit()

    def test_4_a_sibling_that_becomes_another_program_is_let_go(self):
        """Just before it stops: what is known of the memory is not its."""
        with live.Target("windows", "sibling", seconds=240) as process:
            sibling = int(process.ready["sibling"])

            class Late(ubp.Tracer):
                def _seize_new(self):
                    if not self.threads:
                        process.send("e")
                        live.settled(lambda: "sleep" in ubp.comm(sibling))
                    return super()._seize_new()

            def look():
                stopped.update(tracer.threads)
                with ubp.Injection(tracer) as injection:
                    self.assertEqual(process.pid, injection.call(
                        39))       # getpid

            tracer, stopped = Late(process.pid), set()
            tracer.pause(look, 5, "look")
            self.assertNotIn(sibling, stopped)
            self.assertIn(process.pid, stopped)
            self.assertEqual({}, live.tracers(sibling))
            process.quit()

    def test_4_a_sibling_that_ends_is_not_the_target(self):
        """As vforked children do, between two looks at a process."""
        gone = subprocess.Popen(["true"])
        gone.wait()

        class Late(ubp.Tracer):
            n_looks = 0

            def _find_siblings(self):
                found = super()._find_siblings()
                self.n_looks += 1
                if self.n_looks == 1:
                    self.siblings += (gone.pid,)
                return found

        with live.Target("sites") as process:
            tracer = Late(process.pid)
            self.assertEqual("seen", tracer.pause(lambda: "seen", 5, "look"))
            tracer.close()
            process.quit()

    def test_5_a_parent_in_vfork_and_its_child_hold_no_pause_up(self):
        """However long it is in it; and they are held no longer than all."""
        for strategy, ms, n in (("jump", 150, 3), ("int3", 150, 3),
                                ("jump", 20000, 2), ("int3", 20000, 2)):
            with self.subTest(strategy, ms=ms), live.Target(
                    "windows", "vfork", ms, seconds=240) as process:
                begin = time.monotonic()
                for _ in range(n):
                    with ubp.attach(process.pid) as target:
                        target.probe("exe:win_ones", ubp.Count(),
                                     strategy=strategy)
                    self.assertEqual([], live.changed_text(process.pid))
                if ms > 10000:
                    self.assertLess(time.monotonic() - begin, ms / 1000 - 1)
                    continue
                report = process.ask("p")
                self.assertGreaterEqual(report["vfork"], 1)
                self.assertLess(report["late_us"], 600000)
                process.send("g")
                process.quit()

    def test_5_a_late_stop_is_released_while_the_tracer_sleeps(self):
        with live.Target("windows", "vfork", 900, seconds=240) as process:
            time.sleep(0.1)
            begun = time.monotonic()
            try:
                with ubp.attach(process.pid, timeout=0.3) as target:
                    target.probe("exe:win_ones", ubp.Count(), timeout=0.3)
            except ubp.UbpError:
                pass
            self.assertLess(time.monotonic() - begun, 2.5)
            time.sleep(2.2)         # we live on; the target must as well
            n = process.ask("r")
            self.assertGreaterEqual(n["vfork"], 2)
            self.assertLess(n["late_us"], 300000)
            self.assertEqual({}, live.tracers(process.pid))
            process.quit()


class Injection(unittest.TestCase):
    """Frames, stacks, registers, descriptors and the heap."""

    def test_9_coroutine_stacks_of_2_KiB_keep_every_byte(self):
        for mode in ("idle", "alone"):
            with self.subTest(mode), live.Target("coro", mode) as process:
                before = live.Snapshot(process.pid)
                for _ in range(40 if mode == "idle" else 5):
                    try:
                        live.rounds(process.pid, "exe:hot", 1)
                    except ubp.UbpError:
                        if mode == "idle":
                            raise
                        ubp.clean(process.pid, all=True)
                self.assertEqual(0, process.ask("r")["wrong"])
                live.Snapshot(process.pid).compare(self, before)
                process.quit()

    def test_10_upper_halves_of_ymm_survive(self):
        """busy checks all sixteen ymm, also live over long stretches."""
        with live.Target("busy", 1) as process:
            process.send("g")
            live.rounds(process.pid, ["exe:keep"], 60)
            process.ask("p")
            process.quit()

    def test_11_alternate_stacks_stay_what_they_were(self):
        """windows.c compares sigaltstack with what it set, all the time."""
        with live.Target("windows", "signals", seconds=240) as process:
            live.rounds(process.pid, ["exe:win_ones"], 60)
            self.assertGreater(process.ask("p")["handled"], 100)
            process.send("g")
            process.quit()

    def test_12_descriptor_numbers_of_other_threads_do_not_change(self):
        with live.Target("growth", "fds") as process:
            before = process.ask("r")["opens"]
            live.rounds(process.pid, "exe:hot", 60)
            answer = process.ask("r")
            self.assertGreater(answer["opens"], before)
            self.assertEqual(0, answer["bad"])
            process.quit()

    def test_13_the_heap_grows_by_64_MiB_under_an_arena(self):
        for flags in ((), ("-no-pie",), ("-static",), ("-static-pie",)):
            for prefix in ((), ("setarch", "-R")):
                with self.subTest(flags=flags, prefix=prefix):
                    if prefix and not shutil.which("setarch"):
                        continue
                    self.grow(flags, prefix)

    def grow(self, flags, prefix):
        with live.Target("growth", "brk", flags=flags,
                         prefix=prefix) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                self.assertEqual(0, process.ask("b")["wrong"])
                self.assertTrue(live.settled(probe.read))
                self.assertEqual(0, process.ask("s")["wrong"])
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    def test_14_a_target_that_locks_all_its_memory(self):
        with live.Target("growth", "lock") as process:
            before = live.Snapshot(process.pid)
            live.rounds(process.pid, "exe:hot", 10)
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    @unittest.skipUnless(live.IS_ROOT, "needs root to make a memory cgroup")
    def test_14_a_memory_cgroup_at_its_limit(self):
        group = "/sys/fs/cgroup/memory/ubp-test-%d" % os.getpid()
        try:
            os.mkdir(group)
        except OSError as error:
            self.skipTest("no memory cgroup (v1) to write to: %s" % error)
        try:
            with live.Target("busy", 2) as process:
                with open(group + "/cgroup.procs", "w") as f:
                    f.write(str(process.pid))
                # Below what each processor holds ready, 256 KiB, the
                # kernel kills it at an open() of its own.
                with open(group + "/memory.limit_in_bytes", "w") as f:
                    f.write("%dK" % (256 * (os.cpu_count() + 1)))
                process.send("g")
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:hot", ubp.Count())
                    self.assertTrue(live.settled(probe.read))
                process.ask("p")
                self.assertEqual([], live.changed_text(process.pid))
                process.quit()
        finally:
            for _ in range(50):
                try:
                    os.rmdir(group)
                    break
                except OSError:
                    time.sleep(0.02)


class Seccomp(unittest.TestCase):
    """A call that the filter forbids is never made."""

    def judged(self, mode):
        with live.Target("sealed", mode) as process:
            process.ask("r")
            before = live.Snapshot(process.pid)
            armed = False
            try:
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:hot", ubp.Count())
                    armed = True
                    start = probe.read()
                    process.ask("r")
                    self.assertEqual(start + 10007, probe.read())
            except ubp.UbpError as error:
                self.assertIn("seccomp", str(error).lower())
            self.assertEqual(0, process.ask("r")["wrong"])
            live.Snapshot(process.pid).compare(self, before)
            process.quit()
        return armed

    def test_15_strict_mode_is_refused_or_served_untouched(self):
        self.judged("strict")

    def test_15_a_killing_filter_is_refused_or_served_untouched(self):
        self.judged("kill")

    def test_15_a_refusing_filter_is_refused_or_served_untouched(self):
        self.judged("errno")

    def test_15_a_filter_that_allows_all_is_refused_or_served(self):
        self.judged("allow")

    def test_15_killed_while_it_looks_at_a_filtered_target(self):
        with live.Target("sealed", "kill") as process:
            process.ask("r")
            code = """
for turn in range(1000):
    try:
        ubp.attach(int(sys.argv[1])).probe("exe:hot", ubp.Count()).remove()
    except ubp.UbpError:
        pass
    if turn == 0:
        print("once", flush=True)
"""
            for turn in range(5):
                with live.python(code, process.pid) as tracer:
                    tracer.line()
                    time.sleep(0.01 * turn)
                    tracer.kill()
            self.assertEqual(0, process.ask("r")["wrong"])
            process.quit()


class ForeignCode(unittest.TestCase):
    """Branches from elsewhere, pages, shared text, later tools."""

    INSIDE = ("entered_rel32", "entered_rel8", "entered_call", "entered_jcc")

    def test_17_windows_with_a_foreign_branch_inside_are_refused(self):
        with live.Target("foreign") as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as target:
                for name in self.INSIDE:
                    plan = target.plan("exe:" + name)[0]
                    if plan.strategy:
                        # Only a short jump that ends before the entry.
                        self.assertLessEqual(plan.window.size, 3, name)
                    else:
                        self.assertIn("branch", plan.rule, plan.why)
                self.assertEqual("jump",
                                 target.plan("exe:plain")[0].strategy)
                target.probe(["exe:*entered*", "exe:jumper*", "exe:plain",
                              "exe:caller", "exe:looping"], ubp.Count())
                self.assertEqual(0, process.ask("r")["wrong"])
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_17_every_function_of_a_program_probed_at_once(self):
        for name, arguments, command in (("foreign", (), "r"),
                                         ("busy", (2,), "c"),
                                         ("windows", ("loop",), "r")):
            with self.subTest(name), \
                    live.Target(name, *arguments) as process:
                before = live.Snapshot(process.pid)
                with ubp.attach(process.pid) as target:
                    target.probe("exe:*", ubp.Count())
                    time.sleep(0.05)
                    self.assertEqual(0, process.ask(command)["wrong"])
                if name != "windows":
                    live.Snapshot(process.pid).compare(self, before)
                process.quit()

    def test_17_every_function_of_libc_probed_at_once(self):
        with live.Target("busy", 2) as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid, timeout=120) as target:
                target.probe("libc:*", ubp.Count(), timeout=120)
                self.assertEqual(0, process.ask("c")["wrong"])
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_19_a_window_that_crosses_a_page_is_refused(self):
        with live.Target("foreign") as process:
            with ubp.attach(process.pid) as target:
                plan = target.plan("exe:crossing")[0]
                if plan.strategy:
                    start = plan.window.site
                    self.assertEqual(start // 4096,
                                     (start + plan.window.size - 1) // 4096)
                else:
                    self.assertIn("page", plan.rule)
                try:
                    target.probe("exe:crossing", ubp.Count())
                except ubp.UbpError:
                    pass
                self.assertEqual(0, process.ask("r")["wrong"])
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    def test_16_text_mapped_shared_is_refused_and_the_file_unchanged(self):
        library = live.build("shared_lib", (
            "-nostdlib", "-shared", "-fPIC", "-Wl,-z,noseparate-code"),
            output_suffix=".so")
        vaddr = live.symbol(library, "shared_hot")[0]

        def digest():
            with open(library, "rb") as f:
                return hashlib.sha256(f.read()).hexdigest()
        old = digest()
        with live.Target("foreign", library, hex(vaddr)) as process:
            before = live.Snapshot(process.pid)
            site = os.path.basename(library) + ":shared_hot"
            with ubp.attach(process.pid) as target:
                with self.assertRaises(ubp.UbpError) as caught:
                    target.probe(site, ubp.Count())
                self.assertIn("shared", str(caught.exception))
                plans = target.plan(site)
                self.assertEqual("", plans[0].strategy)
                self.assertIn("shared", plans[0].rule + plans[0].why)
            self.assertEqual(0, process.ask("r")["wrong"])
            live.Snapshot(process.pid).compare(self, before)
            process.quit()
        self.assertEqual(old, digest())

    @unittest.skipUnless(live.IS_ROOT, "needs root to set a kernel uprobe")
    def test_18_a_kernel_uprobe_set_later_leaves_endbr_functions_right(self):
        with live.Target("busy", 1) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:marked", ubp.Count())
                with live.KernelUprobe(
                        process.pid, process.path,
                        live.symbol(process.path, "marked")[1]):
                    n = process.ask("c")
                self.assertEqual(0, n["wrong"])
                self.assertEqual(n["marked"], probe.read())
                probe.remove()
                self.assertEqual(0, process.ask("c")["wrong"])
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    @unittest.skipUnless(live.IS_ROOT, "needs root to set a kernel uprobe")
    def test_18_removal_mends_a_jump_that_a_uprobe_was_set_on(self):
        for is_gone_first in (False, True):
            with self.subTest(is_gone_first), \
                    live.Target("busy", 1) as process:
                vaddr, offset = live.symbol(process.path, "hot")
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:hot", ubp.Count())
                    site = probe.sites[0].vaddr
                    uprobe = live.KernelUprobe(process.pid, process.path,
                                               offset)
                    self.assertEqual(b"\xcc", ubp.read_memory(
                        process.pid, site, 1))
                    if is_gone_first:   # the kernel puts one byte back
                        uprobe.__exit__()
                    probe.remove()
                    self.assertEqual((), target.removal.notes)
                    if not is_gone_first:
                        process.ask("c")
                        n_hits = uprobe.count()
                        uprobe.__exit__()
                    n = process.ask("c")
                    self.assertEqual(0, n["wrong"])
                    if not is_gone_first:
                        self.assertEqual(n["hot"] // 2, n_hits)
                self.assertEqual([], live.changed_text(process.pid))
                process.quit()

    @unittest.skipUnless(os.access(UPROBE_EVENTS, os.W_OK),
                         "mount -t tracefs nodev /sys/kernel/tracing")
    def test_18_a_uprobe_defined_while_attached_ends_the_session(self):
        with live.Target("busy", 1) as process:
            path = os.path.realpath(process.path)
            name = "ubp_test/t%d" % os.getpid()
            command = subprocess.Popen(
                [sys.executable, ubp.__file__, "count", "-p",
                 str(process.pid), "exe:hot",
                 "--duration", "30"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            self.assertIn(b"by jump", command.stderr.readline())
            try:
                define_uprobe("p:%s %s:0x%x" % (
                    name, path, live.symbol(process.path, "hot")[1]))
                words = command.communicate(timeout=180)[1]
            finally:
                define_uprobe("-:" + name)
            self.assertIn(b"a kernel uprobe was set on top of it", words)
            self.assertEqual(1, command.returncode)
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    @unittest.skipUnless(live.IS_ROOT, "needs root to set a kernel uprobe")
    def test_18_a_site_with_a_kernel_uprobe_is_refused(self):
        with live.Target("busy", 1) as process:
            with live.KernelUprobe(
                    process.pid, process.path,
                    live.symbol(process.path, "hot")[1]) as uprobe:
                process.ask("c")
                with ubp.attach(process.pid) as target:
                    with self.assertRaises(ubp.UbpError):
                        target.probe("exe:hot", ubp.Count())
                    probe = target.probe("exe:tiny", ubp.Count())
                    n = process.ask("c")
                    self.assertEqual(0, n["wrong"])
                    self.assertEqual(n["tiny"] // 2, probe.read())
                self.assertEqual(n["hot"], uprobe.count())
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    @unittest.skipUnless(live.IS_ROOT, "needs root to set a kernel uprobe")
    def test_18_a_uprobe_elsewhere_on_the_page_survives_our_round(self):
        with live.Target("busy", 1) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:tiny", ubp.Count())
                with live.KernelUprobe(
                        process.pid, process.path,
                        live.symbol(process.path, "hot")[1]) as uprobe:
                    n = process.ask("c")
                    self.assertEqual(n["hot"], uprobe.count())
                    self.assertEqual(n["tiny"], probe.read())
                    probe.remove()
                    again = process.ask("c")
                    self.assertEqual(0, again["wrong"])
                    self.assertEqual(again["hot"], uprobe.count())
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    @unittest.skipUnless(shutil.which("gdb"), "apt-get install gdb")
    def test_18_gdb_breaks_later_and_goes_away(self):
        with live.Target("busy", 1) as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as target:
                probe = target.probe(["exe:hot", "exe:marked"], ubp.Count())
                process.send("g")
                done = subprocess.run(
                    ["gdb", "-q", "-batch", "-nx", "-iex",
                     "set debuginfod enabled off", "-p", str(process.pid),
                     "-ex", "break *hot", "-ex", "continue",
                     "-ex", "continue", "-ex", "delete", "-ex", "detach"],
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, timeout=180)
                text = done.stdout.decode("utf-8", "replace")
                self.assertIn("Breakpoint 1, ", text)
                n = process.ask("p")
                self.assertEqual(0, n["wrong"])
                self.assertEqual(n["hot"] + n["marked"], probe.read())
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    @unittest.skipUnless(shutil.which("gdb"), "apt-get install gdb")
    def test_18_a_target_held_by_gdb_is_refused_naming_gdb(self):
        with live.Target("busy", 1) as process:
            with live.Process(["gdb", "-q", "-nx", "-iex",
                               "set debuginfod enabled off", "-p",
                               str(process.pid)]) as gdb:
                self.assertTrue(live.settled(
                    lambda: live.tracers(process.pid), 20))
                with self.assertRaises(ubp.UbpError) as caught:
                    with ubp.attach(process.pid) as target:
                        target.probe("exe:hot", ubp.Count())
                self.assertIn(str(gdb.pid), str(caught.exception))
                gdb.send("detach\nquit\n")
                gdb.wait()
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()


GO_PROGRAM = """
package main
import ("fmt"; "os"; "sync"; "time")
type node struct { left, right *node; value int }
//go:noinline
func tree(depth int) *node {
    if depth == 0 { return &node{value: 1} }
    return &node{tree(depth - 1), tree(depth - 1), depth}
}
//go:noinline
func sum(n *node) int {
    if n == nil { return 0 }
    return n.value + sum(n.left) + sum(n.right)
}
//go:noinline
func grow(n int) int {
    var a [64]int
    a[n % 64] = n
    if n == 0 { return 0 }
    return grow(n - 1) + a[n % 64]
}
//go:noinline
func spin(n int) int {
    x := n
    for i := 0; i < 3000000; i++ { x = x * 3 ^ i }
    return x
}
func main() {
    var wait sync.WaitGroup
    begin := time.Now()
    must := spin(7)
    is_over := false
    go func() { os.Stdin.Read(make([]byte, 1)); is_over = true }()
    fmt.Println("ready")
    for g := 0; g < 4; g++ {
        wait.Add(1)
        go func(g int) {
            defer wait.Done()
            for !is_over && time.Since(begin) < 4 * time.Minute {
                c := make(chan int)
                go func() { c <- grow(500) }()
                if sum(tree(7)) != 375 || <-c != 125250 || spin(7) != must {
                    fmt.Println("wrong")
                    os.Exit(1)
                }
            }
        }(g)
    }
    wait.Wait()
    fmt.Println("right")
}
"""


class Go(unittest.TestCase):
    """Code that goes on at addresses which no thread holds."""

    def test_21_goroutines_go_on_inside_no_window(self):
        """The program knows how often each function was entered; also where
        it goes on in the middle of a function, or at goexit + 1."""
        with live.Target("golike") as process:
            before = live.Snapshot(process.pid)
            for names in (["leaf"], ["checked", "large"], ["exit"],
                          ["leaf", "checked", "large", "exit"]) * 5:
                with ubp.attach(process.pid) as target:
                    probe = target.probe(["exe:go_" + name for name in names],
                                         ubp.Count())
                    self.assertEqual(probe.refused, [])
                    process.ask("r")
            with ubp.attach(process.pid) as target:
                # `exit` is entered behind its first instruction only.
                probe = target.probe("exe:go_exit", ubp.Count())
                n_exits = process.ask("r")["exit"]
                self.assertTrue(0 < probe.hits <= n_exits)
                with self.assertRaises(ubp.ProbeError):
                    target.probe("exe:go_checked%return", ubp.Latency())
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_21_windows_of_go_code(self):
        """Of one instruction, or of the stack check; the rest is refused."""
        with live.Target("golike") as process:
            with ubp.attach(process.pid) as target:
                found = {plan.site.function.name: [
                    insn.code.hex() for insn in plan.window.insns]
                    for plan in target.plan("exe:go_*")}
            self.assertEqual(found["go_leaf"], ["4889d8"])
            self.assertEqual([code[:2] for code in found["go_checked"]],
                             ["49", "76"])
            self.assertEqual([code[:6] for code in found["go_large"]],
                             ["4c8da4"])
            self.assertEqual([code[:2] for code in found["go_exit"]], ["e8"])
            process.quit()

    @unittest.skipUnless(shutil.which("go"), "no Go compiler: golang-go")
    def test_21_every_function_of_a_go_program(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        source = os.path.join(folder, "main.go")
        with open(source, "w") as file:
            file.write(GO_PROGRAM)
        path = os.path.join(folder, "program")
        subprocess.run(["go", "build", "-o", path, source], check=True,
                       timeout=240, env=dict(os.environ, GO111MODULE="off",
                                             GOCACHE=folder, GOFLAGS=""))
        with subprocess.Popen([path], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as process:
            self.assertEqual(process.stdout.readline(), b"ready\n")
            try:
                for _ in range(4):
                    with ubp.attach(process.pid) as target:
                        probe = target.probe("exe:*", ubp.Count())
                        time.sleep(0.7)
                        self.assertGreater(probe.hits, 1000)
                        self.assertLess(len(probe.refused),
                                        len(probe.sites) // 20)
                out = process.communicate(timeout=30)[0]
            finally:
                process.kill()
        self.assertEqual((out, process.returncode), (b"right\n", 0))


class ThreadLocalStorage(unittest.TestCase):
    """The CPU number comes from rseq only where that is safe."""

    def test_23_rseq_switched_off(self):
        with live.Target("busy", 3, env={
                "GLIBC_TUNABLES": "glibc.pthread.rseq=0"}) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                self.assertEqual(process.ask("c")["hot"], probe.read())
            process.quit()

    def raw_threads(self, mode):
        with live.Target("tls", mode) as process:
            start = process.ask("p")
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                process.send("g")
                if mode == "after":
                    process.ask("c")
                time.sleep(0.05)
                end = process.ask("p")
                self.assertGreater(end["raw"], start["raw"])
                self.assertEqual(end["hot"] - start["hot"], probe.read())
                process.send("g")
            process.ask("p")
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    def test_23_raw_threads_with_a_few_bytes_of_tls(self):
        self.raw_threads("before")

    def test_23_raw_threads_created_after_arming(self):
        self.raw_threads("after")

    def test_23_a_static_program(self):
        with live.Target("busy", 2, flags=("-static",)) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                self.assertEqual(process.ask("c")["hot"], probe.read())
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    def test_23_pinned_to_each_cpu_in_turn(self):
        with live.Target("busy", 2) as process:
            cpus = sorted(os.sched_getaffinity(0))
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                for cpu in cpus:
                    for tid in live.threads(process.pid):
                        os.sched_setaffinity(tid, {cpu})
                    n = process.ask("c")
                    self.assertEqual(n["hot"], probe.read())
            process.quit()


class Journal(unittest.TestCase):
    """24: children share the journal, each text is its own."""

    def test_24_a_probe_removed_in_the_parent_only_once_children_are_too(self):
        with live.Target("children") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                answer = process.ask("f")
                children = [int(pid) for pid in
                            answer["children"].split(",")]
                # One child is cleaned by hand first: the others stay.
                ubp.clean(children[0], all=True)
                self.assertEqual(answer["hot"], probe.read())
                probe.remove()
            for pid in children + [process.pid]:
                self.assertEqual([], live.changed_text(pid))
                self.assertEqual([], live.arenas(pid))
            process.ask("w")
            process.quit()

    def test_24_status_names_the_children(self):
        with live.Target("children") as process:
            with ubp.attach(process.pid) as target:
                target.probe("exe:hot", ubp.Count())
                answer = process.ask("f")
                children = {int(pid) for pid in
                            answer["children"].split(",")}
                found = ubp.status(process.pid)
                self.assertEqual(1, len(found))
                self.assertEqual(children, set(found[0].children))
                self.assertEqual([answer["hot"]],
                                 [s.calls for s in found[0].sites])
            process.ask("w")
            process.quit()

    def test_24_arm_again_while_an_old_child_lives(self):
        with live.Target("children") as process:
            with ubp.attach(process.pid) as target:
                target.probe("exe:hot", ubp.Count())
                process.ask("f")
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                process.ask("c")
                self.assertEqual(1009, probe.read())
            self.assertEqual(0, process.ask("w")["wrong"])
            process.quit()


if __name__ == "__main__":
    unittest.main()
