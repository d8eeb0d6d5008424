"""The target comes first: counts are exact, and nothing else changes.

Each target judges itself (tests/targets): it exits non-zero at a wrong value,
an EINTR, an early wake or a short transfer. What ubp leaves is read from
/proc by live.Snapshot.
"""
import os
import signal
import subprocess
import sys
import time
import unittest
from unittest import mock

import live

HOTS = ["exe:hot", "exe:tiny", "exe:keep", "exe:marked", "libc:labs"]


def setUpModule():
    global ubp
    ubp = live.core()


def by_name(probe):
    """{function name: count} of a probe."""
    return {site.function.name: n for site, n in probe.counts().items()}


class Restoration(unittest.TestCase):
    """After removal text, mappings and descriptors are those before."""

    def armed(self, process):
        """A probe on everything hot, in place and seen to be in place."""
        target = ubp.attach(process.pid)
        probe = target.probe(HOTS, ubp.Count())
        self.assertEqual(len(HOTS), len(probe.sites), probe.refused)
        self.assertNotEqual([], live.changed_text(process.pid))
        self.assertEqual({}, live.tracers(process.pid))
        return target, probe

    def judged(self, how):
        with live.Target("busy", 3) as process:
            before = live.Snapshot(process.pid)
            process.send("g")
            target, probe = self.armed(process)
            how(target, probe)
            live.Snapshot(process.pid).compare(self, before)
            self.assertEqual([], live.arenas(process.pid))
            target.close()
            process.ask("p")
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_remove_and_close_restore_everything(self):
        def how(target, probe):
            probe.remove()
            self.assertEqual([], live.changed_text(target.pid))
            target.close()
        self.judged(how)

    def test_close_alone_restores_everything(self):
        self.judged(lambda target, probe: target.close())

    def test_context_manager_restores_after_an_exception(self):
        def how(target, probe):
            with self.assertRaises(ZeroDivisionError):
                with target:
                    1 // 0
        self.judged(how)

    def test_clean_restores_what_detach_left(self):
        def how(target, probe):
            target.detach()
            time.sleep(0.02)
            self.assertNotEqual([], live.changed_text(target.pid))
            ubp.clean(target.pid, all=True)
            ubp.clean(target.pid, all=True)
        self.judged(how)

    def test_clean_by_another_process_restores_what_detach_left(self):
        def how(target, probe):
            target.detach()
            subprocess.check_call(
                [sys.executable, "-c", live.PROLOGUE
                 + "ubp.clean(int(sys.argv[1]), all=True)", str(target.pid)],
                timeout=180)
        self.judged(how)

    def test_all_orders_of_remove_close_and_detach_may_repeat(self):
        def how(target, probe):
            for _ in range(2):
                probe.remove()
                target.close()
                target.detach()
        self.judged(how)

    def test_a_hundred_rounds_leave_a_busy_target_as_it_was(self):
        with live.Target("busy", 4) as process:
            before = live.Snapshot(process.pid)
            process.send("g")
            self.assertGreater(live.rounds(process.pid, HOTS, 100), 0)
            process.ask("p")
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_two_sessions_at_once_do_not_disturb_each_other(self):
        with live.Target("busy", 2) as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as one:
                with ubp.attach(process.pid) as two:
                    first = one.probe("exe:hot", ubp.Count())
                    second = two.probe("exe:tiny", ubp.Count())
                    n = process.ask("c")
                    self.assertEqual(n["hot"], first.read())
                    self.assertEqual(n["tiny"], second.read())
                n = process.ask("c")
                self.assertEqual(n["hot"], first.read())
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_a_site_already_probed_is_refused_and_stays_right(self):
        with live.Target("busy", 1) as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as one:
                first = one.probe("exe:hot", ubp.Count())
                with ubp.attach(process.pid) as two:
                    try:
                        two.probe("exe:hot", ubp.Count()).remove()
                    except ubp.UbpError as error:
                        self.assertNotIn("Errno", str(error))
                n = process.ask("c")
                self.assertEqual(n["hot"], first.read())
            live.Snapshot(process.pid).compare(self, before)
            process.quit()


class Exactness(unittest.TestCase):
    """counted == the program's own number."""

    def judged(self, n_threads, env=None):
        with live.Target("busy", n_threads, env=env) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe(HOTS, ubp.Count())
                for turn in (1, 2):
                    n = process.ask("c")
                    counts = by_name(probe)
                    self.assertEqual(
                        {name: n[name] for name in
                         ("hot", "tiny", "labs", "keep", "marked")},
                        {name: counts.get(name) for name in
                         ("hot", "tiny", "labs", "keep", "marked")})
                    self.assertEqual(sum(counts.values()), probe.read())
                    self.assertEqual((probe.read(), 0),
                                     (probe.hits, probe.dropped))
                process.send("g")
                time.sleep(0.1)
                n = process.ask("p")
                self.assertEqual(n["hot"], by_name(probe)["hot"])
                probe.remove()
                self.assertEqual(n["hot"], by_name(probe)["hot"])
                self.assertEqual(0, process.ask("c")["wrong"])
                self.assertEqual(n["hot"], by_name(probe)["hot"])
            process.quit()

    def test_one_thread(self):
        self.judged(1)

    def test_four_threads(self):
        self.judged(4)

    def test_a_hundred_threads(self):
        with live.Target("busy", 100) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                process.send("g")
                time.sleep(0.2)
                n = process.ask("p", 30)
                self.assertEqual(n["hot"], probe.read())
            process.quit()

    def test_a_function_too_short_is_refused_and_stays_right(self):
        with live.Target("busy", 1) as process:
            with ubp.attach(process.pid) as target:
                plans = target.plan("exe:shorty")
                if plans[0].strategy != "jump":
                    self.assertTrue(plans[0].rule)
                    with self.assertRaises(ubp.UbpError):
                        target.probe("exe:shorty", ubp.Count())
                n = process.ask("c")
                self.assertEqual(0, n["wrong"])
            process.quit()

    def test_counts_up_to_the_last_instruction_outlive_the_target(self):
        with live.Target("busy", 2) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                n = process.ask("c")
                process.quit()
                self.assertTrue(target.wait(5))
                self.assertFalse(target.alive)
                self.assertEqual(n["hot"], probe.read())
                probe.remove()
            self.assertEqual(n["hot"], probe.read())


class Blocked(unittest.TestCase):
    """No EINTR, no early wake, no short transfer, through many rounds."""

    def judged(self, group, n, between=0.004, late_us=3000000, progress=True):
        with live.Target("blocked", group, seconds=240) as process:
            before = live.Snapshot(process.pid)
            live.rounds(process.pid, "exe:hot", n, between)
            time.sleep(0.25)
            operations = process.operations()
            for name, found in operations.items():
                with self.subTest(name):
                    self.assertEqual((0, 0, 0, 0), (
                        found["eintr"], found["short"], found["early"],
                        found["amiss"]), process.stderr())
                    self.assertLess(found["late_us"], late_us)
                    if progress:
                        self.assertGreater(found["rounds"], n // 20)
            process.quit()
            self.assertEqual([], [m for m in before.maps
                                  if "ubp" in m.path])

    def test_timed_waits_and_waits_for_others(self):
        self.judged("strict", 200)

    def test_calls_that_linux_ends_at_a_mere_stop(self):
        self.judged("loose", 200, between=0.03, late_us=30000000)

    def test_large_pipe_write(self):
        self.judged("write,writev", 60, between=0.01)

    def test_large_socket_send(self):
        self.judged("send,sendfile", 60, between=0.01)

    def test_a_transfer_that_is_asked_to_stop_before_it_goes_on(self):
        """As if the tracer always had the processor first: it did, in real
        time class, and asked for ever."""
        resume = ubp.Tracer._resume

        def asked_first(tracer, tid, request, signo=0):
            thread = tracer.threads.get(tid)
            if request == ubp.PTRACE_SYSCALL and thread.is_wanted:
                resume(tracer, tid, ubp.PTRACE_INTERRUPT)
            resume(tracer, tid, request, signo)

        with mock.patch.object(ubp.Tracer, "_resume", asked_first):
            self.judged("send", 60, between=0.01)

    def test_receive_of_all(self):
        self.judged("waitall", 60, between=0.01)

    def test_a_signal_pending_at_the_stop_still_interrupts(self):
        self.judged("signal", 250)

    def test_sigterm_during_a_round_still_interrupts_epoll_wait(self):
        with live.Target("epoll_term", seconds=240) as process:
            for turn in range(20):
                begun = process.ask("w")["waits"]
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:hot", ubp.Count())

                    def send():
                        time.sleep(turn % 20 * 0.0002)
                        os.kill(process.pid, signal.SIGTERM)
                    with live.Aside(send):  # so that it may hit the pause
                        probe.remove()
                answer = process.answer(10)
                self.assertEqual("EINTR", answer["ended"], begun)
                self.assertLess(answer["after_ms"], 2000)
            process.quit()

    def test_restart_syscall_after_stop_and_continue(self):
        with live.Target("blocked", "strict", seconds=240) as process:
            for turn in range(30):
                live.stop(process.pid)
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:hot", ubp.Count())
                    if turn % 2:
                        probe.remove()
                    os.kill(process.pid, signal.SIGCONT)
                    time.sleep(0.002 * (turn % 5))
            time.sleep(0.1)
            for name, found in process.operations().items():
                with self.subTest(name):
                    self.assertEqual((0, 0, 0), (
                        found["eintr"], found["early"], found["amiss"]),
                        process.stderr())
            process.quit()

    def test_a_target_asleep_for_long_is_armed_and_left_asleep(self):
        with live.Target("busy", 8) as process:
            before = live.Snapshot(process.pid)
            with ubp.attach(process.pid) as target:
                target.probe(HOTS, ubp.Count())
                live.settled(lambda: live.states(process.pid) == "S" * 9)
                self.assertEqual("S" * 9, live.states(process.pid))
            live.Snapshot(process.pid).compare(self, before)
            process.quit()


class Signals(unittest.TestCase):
    """No signal is lost, doubled, reordered or stripped of its siginfo."""

    def test_queued_and_timer_signals_through_many_rounds(self):
        with live.Target("signals", seconds=240) as process:
            live.rounds(process.pid, "exe:hot", 150)
            answer = process.ask("r")
            self.assertGreater(answer["received"], 1000)
            self.assertGreater(answer["ticks"], 100)
            process.quit()


class Stopped(unittest.TestCase):
    """A stopped target stays stopped, and its parent hears nothing new."""

    def test_a_stopped_target_is_armed_and_stays_stopped(self):
        with live.Target("busy", 3) as process:
            before = live.Snapshot(process.pid)
            process.send("g")
            live.stop(process.pid)
            os.waitpid(process.pid, os.WUNTRACED)
            with ubp.attach(process.pid) as target:
                probe = target.probe(HOTS, ubp.Count())
                self.assertEqual("TTTT", live.states(process.pid))
                time.sleep(0.02)
                self.assertEqual(0, probe.read())
                self.assertEqual(
                    (0, 0), os.waitpid(process.pid, os.WNOHANG
                                       | os.WUNTRACED | os.WCONTINUED))
                os.kill(process.pid, signal.SIGCONT)
                self.assertTrue(live.settled(probe.read))
                live.stop(process.pid)
                probe.remove()
                self.assertEqual("TTTT", live.states(process.pid))
            self.assertEqual("TTTT", live.states(process.pid))
            os.kill(process.pid, signal.SIGCONT)
            process.ask("p")
            live.Snapshot(process.pid).compare(self, before)
            process.quit()

    def test_a_target_stopped_in_the_middle_of_a_body_is_left_at_once(self):
        """Its threads cannot get on: they are put back to their sites."""
        actions = (ubp.Count(), ubp.Hist("arg0"), ubp.Count(by="arg0 & 7"),
                   ubp.Trace("arg0, arg1"), ubp.Latency())
        n_inside = 0
        with live.Target("busy", 3) as process:
            before = live.Snapshot(process.pid)
            process.send("g")
            for turn in range(20):
                with ubp.attach(process.pid) as target:
                    probe = target.probe(HOTS, actions[turn % len(actions)])
                    time.sleep(0.002 * (turn % 3))
                    live.stop(process.pid)
                    os.waitpid(process.pid, os.WUNTRACED)
                    n_inside += self.threads_in_an_arena(process.pid)
                    probe.remove()
                    self.assertEqual("TTTT", live.states(process.pid))
                os.kill(process.pid, signal.SIGCONT)
            self.assertEqual(0, process.ask("p")["wrong"])
            live.Snapshot(process.pid).compare(self, before)
            process.quit()
        self.assertGreater(n_inside, 0)

    @staticmethod
    def threads_in_an_arena(pid):
        """How many threads the kernel says are there: syscall, proc(5)."""
        with open("/proc/%d/maps" % pid) as file:
            ranges = [[int(vaddr, 16) for vaddr in line.split()[0].split("-")]
                      for line in file if "memfd:ubp" in line]
        n = 0
        for tid in os.listdir("/proc/%d/task" % pid):
            with open("/proc/%d/task/%s/syscall" % (pid, tid)) as file:
                rip = int(file.read().split()[-1], 16)
            n += any(low <= rip < high for low, high in ranges)
        return n

    def test_stop_and_continue_at_any_instant(self):
        with live.Target("busy", 2) as process:
            process.send("g")

            def toggle():
                for turn in range(300):
                    os.kill(process.pid, signal.SIGSTOP)
                    time.sleep(0.0003 * (turn % 7))
                    os.kill(process.pid, signal.SIGCONT)
                    time.sleep(0.0007 * (turn % 5))
            with live.Aside(toggle) as aside:
                while aside.is_running():
                    try:
                        live.rounds(process.pid, HOTS, 1)
                    except ubp.UbpTimeout:
                        pass
            os.kill(process.pid, signal.SIGCONT)
            self.assertEqual(0, process.ask("p")["wrong"])
            ubp.clean(process.pid, all=True)
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()


class ComeAndGo(unittest.TestCase):
    """Threads and processes that are created and end all the time."""

    def storm(self, mode, n):
        with live.Target("children", mode, seconds=240) as process:
            live.rounds(process.pid, "exe:hot", n)
            start = process.ask("p")
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                process.ask("g")
                time.sleep(0.2)
                end = process.ask("p")
                self.assertEqual(end["hot"] - start["hot"], probe.read())
                process.ask("g")
                probe.remove()
            process.ask("p")
            self.assertEqual([], live.changed_text(process.pid))
            self.assertEqual([], live.arenas(process.pid))
            process.quit()

    def test_a_storm_of_threads(self):
        self.storm("threads", 60)

    def test_a_storm_of_forks(self):
        self.storm("storm", 60)

    def test_a_storm_of_fork_and_exec(self):
        self.storm("spawn", 60)

    def test_children_count_too_and_are_cleaned(self):
        for command in "fk":
            with self.subTest(command), live.Target("children") as process:
                before = live.Snapshot(process.pid)
                with ubp.attach(process.pid) as target:
                    probe = target.probe("exe:hot", ubp.Count())
                    answer = process.ask(command)
                    children = [int(pid) for pid in
                                str(answer["children"]).split(",")]
                    self.assertEqual(answer["hot"], probe.read())
                    for pid in children:
                        self.assertNotEqual([], live.changed_text(pid))
                    probe.remove()
                for pid in children:
                    self.assertEqual([], live.changed_text(pid))
                    self.assertEqual([], live.arenas(pid))
                    self.assertEqual({}, live.tracers(pid))
                process.ask("w")
                live.Snapshot(process.pid).compare(self, before)
                process.quit()

    def test_clean_restores_the_children_of_a_dead_session(self):
        with live.Target("children") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                answer = process.ask("k")
                children = [int(pid) for pid in
                            str(answer["children"]).split(",")]
                target.detach()
                self.assertEqual(answer["hot"], probe.read())
            result = ubp.clean(process.pid, all=True)
            self.assertEqual(sorted(children + [process.pid]),
                             sorted(result.pids))
            for pid in children + [process.pid]:
                self.assertEqual([], live.changed_text(pid))
                self.assertEqual([], live.arenas(pid))
            process.ask("w")
            process.quit()

    def test_an_exec_ends_the_probe_and_the_new_image_is_not_written(self):
        with live.Target("children", "exec") as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                n = process.ask("c")["hot"]
                process.send("x")
                self.assertIn("again=1", process.line())
                probe.remove()
                self.assertEqual(n, probe.read())
                self.assertEqual([], live.changed_text(process.pid))
                self.assertEqual(1009, process.ask("c")["hot"])
                self.assertEqual(n, probe.read())
                with self.assertRaises(ubp.UbpError):
                    target.probe("exe:hot", ubp.Count())
            self.assertEqual([], live.changed_text(process.pid))
            process.quit()

    def test_a_library_reloaded_behind_our_back_is_left_alone(self):
        library = live.build_library("shared_lib")
        with live.Target("dl", library, seconds=30) as process:
            with ubp.attach(process.pid) as target:
                name = os.path.basename(library)
                probe = target.probe(name + ":shared_hot", ubp.Count())
                self.assertEqual(process.ask("c")["calls"], probe.read())
                process.ask("u")
                process.ask("l")
                process.ask("c")
                probe.remove()
                process.ask("c")
            self.assertEqual([], live.changed_text(process.pid))
            self.assertEqual([], live.arenas(process.pid))
            process.quit()

    def test_a_target_that_is_killed_is_an_event_and_no_traceback(self):
        for delay in (0.0, 0.001, 0.003, 0.01, 0.03):
            with self.subTest(delay), live.Target("busy", 2) as process:
                process.send("g")

                def end():
                    time.sleep(0.02 + delay)
                    os.kill(process.pid, signal.SIGKILL)
                with live.Aside(end):
                    with self.assertRaises(ubp.UbpError):
                        for _ in range(1000):
                            live.rounds(process.pid, HOTS, 1)

    def test_one_that_ends_while_it_is_looked_at_spoils_no_other(self):
        """What is known of a file is kept for all who map it: what could
        not be read is not known to be without `syscall; ret`."""
        ubp.Tracer.known_gadgets.clear()
        with live.Target("busy", 1) as process:
            tracer = ubp.Tracer(process.pid)
            tracer.maps = ubp.read_maps(process.pid)
        self.assertEqual(0, tracer.find_gadgets().syscall_ret)
        with live.Target("busy", 1) as process:
            with ubp.attach(process.pid) as target:
                probe = target.probe("exe:hot", ubp.Count())
                self.assertEqual(1, len(probe.sites))


if __name__ == "__main__":
    unittest.main()
