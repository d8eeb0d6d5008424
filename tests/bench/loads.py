"""Rows: a server under full load, its hottest function probed.

Throughput per cycle that the server spends, in % of that without a probe:
that is what a full load is limited by, and others on the machine do not
take part in it. Variants are interleaved, A B and B A in turn.
"""
import bisect
import collections
import contextlib
import os
import statistics
import subprocess
import threading
import time

import common
import servers
import ubp
import uprobe
from common import Result, Skip, Spent, Yardstick, set_affinity


class RedisLoad:
    """redis-benchmark GET; pipelined, the server alone is what limits it."""

    def __init__(self, server, cpu, requests, pipeline=32):
        self.server, self.pid, self.requests = server, server.pid, requests
        self.options = ("-P", str(pipeline))
        set_affinity(self.pid, cpu)
        self.spent = Spent(self.pid)

    def run(self):
        """Send requests. -> (requests per cycle of the server, requests)"""
        start = self.spent.read()
        self.server.load(self.requests, 8, "get", *self.options)
        return lambda used=self.spent.read() - start: self.requests / used

    def requests_since(self, _):
        return self.requests

    def settle(self):
        """All rates are known already."""

    def close(self):
        self.spent.close()


class QuietPostgres(servers.Postgres):
    """One that does not log each statement: that would be most of its work.
    """

    def argv(self):
        return servers.Postgres.argv(self) + ["-c", "log_statement=none"]


class PgbenchLoad:
    """pgbench -S on one connection, without an end.

    It logs when each transaction ended, which tells how many of them fell
    into a window of time.
    """

    WINDOW_SECONDS, LONGEST_SECONDS = 0.4, 900

    def __init__(self, server, cpu):
        self.server = server
        server.fill()
        children = set(self._children())
        self.process = subprocess.Popen(
            [server.program("pgbench"), "-h", server.folder, "-U",
             "postgres", "-n", "-S", "-M", "prepared", "-c", "1", "-T",
             str(self.LONGEST_SECONDS), "-l", "--log-prefix",
             os.path.join(server.folder, "times"), server.database],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=server.folder, **server.options())
        self.log = os.path.join(server.folder, "times.%d" % self.process.pid)
        # The backend is the child of the postmaster that is still there.
        time.sleep(1)
        self.pid, = set(self._children()) - children
        set_affinity(self.pid, cpu)
        self.spent, self.times = Spent(self.pid), []

    def _children(self):
        path = "/proc/%d/task/%d/children" % (self.server.pid,
                                              self.server.pid)
        with open(path) as file:
            return [int(word) for word in file.read().split()]

    def run(self):
        """Look on for a while. -> a function that tells the rate later"""
        began, start = time.time(), self.spent.read()
        time.sleep(self.WINDOW_SECONDS)
        end, used = time.time(), self.spent.read() - start
        return lambda: self._between(began, end) / used

    def _between(self, began, end):
        n = (bisect.bisect(self.times, end)
             - bisect.bisect(self.times, began))
        if n < 20:
            raise Skip("pgbench made %d transactions" % n)
        return n

    def requests_since(self, began):
        end = time.time()
        self.settle()
        return self._between(began, end)

    def settle(self):
        """Read the log, when its buffer has surely been written."""
        time.sleep(1)
        with open(self.log) as file:
            rows = [line.split() for line in file if line.endswith("\n")]
        self.times = [int(row[4]) + int(row[5]) / 1e6 for row in rows]

    def close(self):
        self.spent.close()
        self.process.terminate()
        self.process.wait(10)


# ---- ways to probe ---------------------------------------------------------

@contextlib.contextmanager
def probed(pid, where, action):
    """ubp's probe; a Trace's rings are emptied meanwhile."""
    with ubp.attach(pid) as target:
        probe = target.probe(where, action)
        is_over, reader = threading.Event(), None
        if isinstance(action, ubp.Trace):
            def read():
                while not is_over.wait(0.005):
                    target._reader.records([probe])
            reader = threading.Thread(target=read)
            reader.start()
        try:
            yield
        finally:
            is_over.set()
            if reader:
                reader.join()


@contextlib.contextmanager
def uprobed(path, offset, has_return):
    with contextlib.ExitStack() as stack:
        for is_return in (False, True) if has_return else (False,):
            stack.enter_context(uprobe.Uprobe(path, offset, is_return))
        yield


def hottest(load):
    """Return (Site, calls per request) of the function called most.

    Every function is counted for one run; ubp finds its own worst case.
    """
    with ubp.attach(load.pid) as target:
        probe = target.probe("exe:*", ubp.Count(), timeout=30,
                             max_sites=1 << 20)
        before, began = probe.counts(), time.time()
        load.run()
        counts = probe.counts()
    hits = {site: counts[site] - before.get(site, 0) for site in counts}
    site = max(hits, key=hits.get)
    return site, hits[site] / load.requests_since(began)


def ways_of(load, site):
    """{name: (context, goal)} of all that a server is measured with."""
    where = "exe:" + site.function.name
    path, offset = common.file_offset(load.pid, site.vaddr)
    ways = collections.OrderedDict([
        ("counted", lambda: probed(load.pid, where, ubp.Count())),
        ("traced: time, cpu, tid, two arguments", lambda: probed(
            load.pid, where, ubp.Trace("arg0, arg1"))),
        ("timed: entry, exit, histogram", lambda: probed(
            load.pid, where, ubp.Latency()))])
    if not uprobe.unusable():
        ways["uprobe"] = lambda: uprobed(path, offset, False)
        ways["uprobe + uretprobe"] = lambda: uprobed(path, offset, True)
    return ways


def measure(load, ways, n_pairs, notes):
    """Return {name: [% of the bare rate]}."""
    pairs = collections.defaultdict(list)
    for n in range(n_pairs):
        for name, way in list(ways.items()):
            if name.startswith("uprobe") and n >= max(2, n_pairs // 4):
                continue
            rates = {}
            try:
                for is_probed in (False, True) if n % 2 else (True, False):
                    with way() if is_probed else contextlib.ExitStack():
                        rates[is_probed] = load.run()
            except ubp.UbpError as error:
                notes.append("%s: %s" % (name, error))
                del ways[name]
                continue
            pairs[name].append(rates)
    load.settle()
    return collections.OrderedDict(
        (name, [100 * rates[True]() / rates[False]() for rates in each])
        for name, each in pairs.items())


def server_row(row, what, make_load, n_pairs):
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise Skip("one CPU only")
    os.sched_setaffinity(0, {cpus[1]})          # the load inherits it
    notes = []
    with contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, set(cpus))
        load = stack.enter_context(make_load(cpus[0]))
        load.run()
        site, per_request = hottest(load)
        shares = measure(load, ways_of(load, site), n_pairs, notes)
        unit = load.spent.unit
    medians = {name: statistics.median(each)
               for name, each in shares.items()}
    notes.insert(0, "%s, %.1f calls per request; by %s of the server" % (
        site.function.name, per_request, unit))
    return Result(row, what, "% of bare", shares.pop("counted"), ">= 99",
                  tuple(Yardstick(name, medians[name],
                                  medians[name] / medians["counted"])
                        for name in shares), "; ".join(notes))


@contextlib.contextmanager
def running(kind, make):
    if kind.missing():
        raise Skip(kind.missing())
    with kind() as server:
        load = make(server)
        try:
            yield load
        finally:
            load.close()


def row_redis(is_quick):
    return server_row(
        "server", "redis GET -P 32, hottest function counted",
        lambda cpu: running(servers.Redis, lambda server: RedisLoad(
            server, cpu, 60000 if is_quick else 300000)),
        4 if is_quick else 16)


def row_redis_plain(is_quick):
    return server_row(
        "server-plain", "the same without pipelining",
        lambda cpu: running(servers.Redis, lambda server: RedisLoad(
            server, cpu, 10000 if is_quick else 30000, 1)),
        2 if is_quick else 8)


def row_postgres(is_quick):
    return server_row(
        "server-pgbench", "pgbench -S, hottest function counted",
        lambda cpu: running(QuietPostgres, lambda server: PgbenchLoad(
            server, cpu)),
        3 if is_quick else 12)


ROWS = collections.OrderedDict([
    ("server", row_redis), ("server-plain", row_redis_plain),
    ("server-pgbench", row_postgres)])
