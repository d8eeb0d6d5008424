"""Real servers under real load, counted by ubp and judged by themselves.

Each test arms while a load runs, compares an interval of counts with what
the server's own statistics say of it, removes while a load runs, and then
wants every text byte, executable mapping and descriptor as it was, and no
request failed.
"""
import contextlib
import os
import sys
import threading
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import servers     # noqa: E402
import ubp         # noqa: E402


# ---- what must be as it was ------------------------------------------------

def executable_mappings(pid):
    """Return [(low, high, file offset, path)] of /proc/PID/maps, r-x only.

    Not the kernel's own: [vdso], and [uprobes] while others trace too.
    """
    found = []
    with open("/proc/%d/maps" % pid) as maps:
        for line in maps:
            fields = line.split(None, 5)
            if "x" in fields[1] and not fields[-1].startswith("["):
                low, high = (int(word, 16) for word in fields[0].split("-"))
                found.append((low, high, int(fields[2], 16),
                              fields[5].strip() if len(fields) > 5 else ""))
    return found


def altered(pid):
    """Return a line for each executable mapping that is not its file."""
    lines = []
    with open("/proc/%d/mem" % pid, "rb", 0) as mem:
        for low, high, offset, path in executable_mappings(pid):
            if not path.startswith("/") or "ubp" in os.path.basename(path):
                lines.append("%d: 0x%x-0x%x %s" % (pid, low, high, path))
                continue
            mem.seek(low)
            ours = mem.read(high - low)
            with open(path, "rb") as file:
                file.seek(offset)
                theirs = file.read(high - low)
            size = min(len(ours), len(theirs))
            if ours[:size] != theirs[:size]:
                at = next(i for i in range(size) if ours[i] != theirs[i])
                lines.append("%d: %s differs at 0x%x" % (pid, path, low + at))
    return lines


def descriptors(pid):
    """Return the open files of pid that are not sockets, sorted."""
    links = []
    for name in os.listdir("/proc/%d/fd" % pid):
        try:
            links.append(os.readlink("/proc/%d/fd/%s" % (pid, name)))
        except FileNotFoundError:
            pass
    return sorted(link for link in links if not link.startswith("socket:"))


class Under:
    """`with Under(load, ...)`: the load runs, again and again, meanwhile."""

    def __init__(self, load, *args):
        self.is_over, self.error, self.n_runs = False, None, 0
        self.thread = threading.Thread(target=self._run, args=(load, args))

    def _run(self, load, args):
        try:
            while not self.is_over:
                load(*args)
                self.n_runs += 1
        except BaseException as error:        # raised in the test's thread
            self.error = error

    def __enter__(self):
        self.thread.start()
        time.sleep(0.1)                       # the load has started
        return self

    def __exit__(self, *exc_info):
        self.is_over = True
        self.thread.join()
        if self.error is not None and exc_info[0] is None:
            raise self.error


class ServerTest(unittest.TestCase):
    server_class = None

    @classmethod
    def setUpClass(cls):
        reason = cls.server_class.missing()
        if reason:
            raise unittest.SkipTest(reason)
        cls.server = cls.server_class().start()

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()

    def setUp(self):
        self.before = {pid: (executable_mappings(pid), descriptors(pid))
                       for pid in self.pids()}

    def pids(self):
        """Return the processes that are probed."""
        return [self.server.pid]

    def check_unchanged(self):
        for pid, (mappings, files) in self.before.items():
            self.assertEqual(altered(pid), [])
            self.assertEqual(executable_mappings(pid), mappings)
            self.assertEqual(descriptors(pid), files)

    def interval(self, truth, counted, load):
        """Return (true, counted) events while load() ran alone.

        truth and counted are read in this order at both ends, so that
        what asking for the truth costs is in both intervals once.
        """
        true, count = -truth(), -counted()
        load()
        true += truth()
        count += counted()
        return true, count


# ---- redis -----------------------------------------------------------------

class TestRedis(ServerTest):
    server_class = servers.Redis

    def stat(self, name):
        return lambda: int(self.server.info("stats")[name])

    def check(self, where, statistic):
        server = self.server
        with ubp.attach(server.pid) as target:
            with Under(server.load, 10000):
                probe = target.probe(where, ubp.Count())
            true, counted = self.interval(self.stat(statistic), probe.read,
                                          lambda: server.load(30000))
            self.assertEqual(counted, true)
            self.assertGreater(counted, 60000)
            with Under(server.load, 10000):
                probe.remove()
        self.check_unchanged()
        self.assertEqual(self.stat("total_error_replies")(), 0)
        self.assertEqual(self.stat("rejected_connections")(), 0)

    def test_processCommand_runs_once_per_command(self):
        self.check("exe:processCommand", "total_commands_processed")

    def test_libc_write_runs_once_per_reply(self):
        self.check("libc:write", "total_writes_processed")

    def test_an_address_without_a_name_counts_the_same(self):
        with ubp.attach(self.server.pid) as target:
            site, = target.find("exe:processCommand")
        self.check("0x%x" % site.vaddr, "total_commands_processed")

    def test_every_command_function_agrees_with_commandstats(self):
        server = self.server
        tests = "set,get,incr,lpush,rpush,lpop,rpop,sadd,hset,spop"
        with ubp.attach(server.pid) as target:
            with Under(server.load, 2000, 20, tests):
                probe = target.probe("exe:*Command", ubp.Count())
            self.assertGreater(len(probe.sites), 200)

            def counts():
                return {site.function.name: n
                        for site, n in probe.counts().items()}
            true, count = server.calls(), counts()
            server.load(5000, 20, tests)
            true_end, count_end = server.calls(), counts()
            for command in tests.split(","):
                function = command + "Command"
                with self.subTest(command=command):
                    self.assertEqual(
                        count_end[function] - count[function],
                        true_end[command] - true[command])
            with Under(server.load, 2000, 20, tests):
                probe.remove()
        self.check_unchanged()

    def test_every_function_of_libc_at_once(self):
        server = self.server
        with ubp.attach(server.pid) as target:
            with Under(server.load, 5000):
                probe = target.probe("libc:*", ubp.Count(), timeout=120)
                self.assertGreater(len(probe.sites), 1000)
            before = probe.counts()
            server.load(5000)
            after = probe.counts()
            most = max(after[site] - before[site] for site in after)
            self.assertGreaterEqual(most, 10000)
            with Under(server.load, 5000):
                probe.remove(timeout=30)
        self.check_unchanged()

    def test_every_function_of_redis_at_once(self):
        """All of them count, and what commands do is what it was."""
        server, tests = self.server, "set,get,lpush,hset,zadd,xadd"
        with ubp.attach(server.pid) as target:
            with Under(server.load, 2000):
                probe = target.probe("exe:*", ubp.Count(), timeout=60)
            self.assertGreater(len(probe.sites), 3000)
            self.assertLess(len(probe.refused), 0.01 * len(probe.sites))
            calls = {site.function.name: site for site in probe.sites}[
                "processCommand"]
            true, counted = self.interval(
                self.stat("total_commands_processed"),
                lambda: probe.counts()[calls],
                lambda: server.load(3000, 20, tests))
            self.assertEqual(counted, true)
            with Under(server.load, 2000):
                probe.remove(timeout=60)
        self.check_unchanged()
        self.assertEqual(self.stat("total_error_replies")(), 0)

    def test_armed_and_removed_10_times_under_load(self):
        with Under(self.server.load, 10000):
            for _ in range(10):
                with ubp.attach(self.server.pid) as target:
                    probe = target.probe(
                        ["exe:processCommand", "exe:call",
                         "exe:lookupCommand"], ubp.Count())
                    servers.until(probe.read, "a command is counted")
        self.check_unchanged()


# ---- nginx -----------------------------------------------------------------

class TestNginx(ServerTest):
    server_class = servers.Nginx

    def pids(self):
        return self.server.worker_pids()

    def load(self, seconds=1):
        requests, errors = self.server.load(seconds)
        self.assertEqual(errors, [])
        self.assertGreater(requests, 100)

    def check(self, where):
        server = self.server
        with contextlib.ExitStack() as stack:
            targets = [stack.enter_context(ubp.attach(pid))
                       for pid in self.pids()]
            with Under(self.load):
                probes = [target.probe(where, ubp.Count())
                          for target in targets]
            true, counted = self.interval(
                server.requests, lambda: sum(p.read() for p in probes),
                self.load)
            self.assertEqual(counted, true)
            with Under(self.load):
                for probe in probes:
                    probe.remove()
        self.check_unchanged()

    def test_create_request_runs_once_per_request(self):
        self.check("exe:ngx_http_create_request")

    def test_libc_writev_runs_once_per_response(self):
        self.check("libc:writev")

    def test_every_function_of_nginx_at_once(self):
        """Under wrk, one worker's libc too: no request fails, and each is
        counted."""
        server, pids = self.server, self.pids()
        with contextlib.ExitStack() as stack:
            targets = [stack.enter_context(ubp.attach(pid)) for pid in pids]
            probes = [targets[0].probe("libc:*", ubp.Count(), timeout=60)]
            with Under(self.load):
                probes += [target.probe("exe:*", ubp.Count(), timeout=60)
                           for target in targets]
            self.assertGreater(len(probes[0].sites + probes[1].sites), 4000)

            def requests():
                return sum(n for probe in probes
                           for site, n in probe.counts().items()
                           if site.function.name == "ngx_http_create_request")
            true, counted = self.interval(server.requests, requests,
                                          self.load)
            self.assertEqual(counted, true)
            with Under(self.load):
                for probe in probes:
                    probe.remove(timeout=60)
        self.check_unchanged()


# ---- PostgreSQL ------------------------------------------------------------

class TestPostgres(ServerTest):
    server_class = servers.Postgres

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        try:
            cls.server.fill()
        except BaseException:
            cls.server.stop()
            raise

    def load(self, *args):
        done, failed = self.server.load(*args)
        self.assertEqual(failed, 0)
        self.assertGreater(done, 0)
        return done

    def backends(self):
        path = "/proc/%d/task/%d/children" % (self.server.pid,
                                              self.server.pid)
        with open(path) as file:
            return [int(word) for word in file.read().split()]

    def test_backends_forked_later_are_counted_too(self):
        server = self.server
        target = ubp.attach(server.pid)
        with target:
            probe = target.probe("exe:PortalRun", ubp.Count())
            before = server.transactions()
            true, counted = self.interval(
                server.statements, probe.read, lambda: self.load(200))
            self.assertEqual(counted, true)
            self.assertGreaterEqual(counted, 4 * 200 * 7)
            self.assertGreaterEqual(server.transactions() - before, 4 * 200)
            true, counted = self.interval(
                server.statements, probe.read,
                lambda: self.load(1000, 4, "-S"))
            self.assertEqual(counted, true)
            with Under(self.load, 500, 4, "-S"):
                before = probe.read()
                servers.until(lambda: probe.read() > before + 100,
                              "statements are counted")
                probe.remove()
                for pid in self.backends():
                    with contextlib.suppress(FileNotFoundError,
                                             ProcessLookupError):
                        self.assertEqual(altered(pid), [])   # or it went
        self.check_unchanged()

    def test_a_running_backend_is_counted_alone(self):
        server = self.server
        with server.session() as session:
            pid = session.pid
            with ubp.attach(pid) as target:
                probe = target.probe("exe:PortalRun", ubp.Count())
                with Under(self.load, 200, 4, "-S"):   # other backends
                    for _ in range(500):
                        session.query("select 1")
                self.assertEqual(probe.read(), 500)
                probe.remove()
                self.assertEqual(altered(pid), [])
        self.check_unchanged()


# ---- CPython ---------------------------------------------------------------

class TestPython(ServerTest):
    server_class = servers.Python

    def check(self, where, expression, times=20000):
        server = self.server
        with ubp.attach(server.pid) as target:
            with Under(self.call, expression, times):
                probe = target.probe(where, ubp.Count())
            before = probe.read()
            self.call(expression, times)
            self.assertEqual(probe.read() - before, times)
            with Under(self.call, expression, times):
                probe.remove()
        self.check_unchanged()

    def call(self, expression, times):
        self.assertTrue(self.server.call(expression, times))

    def test_a_function_of_libc(self):
        self.check("libc:getppid", "__import__('os').getppid()")

    def test_a_function_of_the_interpreter(self):
        self.check("PyFloat_FromString", "float('1.5')")


if __name__ == "__main__":
    unittest.main()
