"""Rows: a server under full load, its hottest function probed."""
import collections
import os
import statistics

import servers
import ubp
from common import (Result, Skip, Spent, Yardstick, armed, set_affinity)

class Load:
    """redis-benchmark GET; pipelined, the server alone is what limits it."""

    def __init__(self, server, spent, requests, pipeline):
        self.server, self.spent, self.requests = server, spent, requests
        self.options = ("-P", str(pipeline))

    def run(self):
        """Return (requests per cycle of the server, requests/s)."""
        start = self.spent.read()
        rate = self.server.load(self.requests, 8, "get", *self.options)
        return self.requests / (self.spent.read() - start), rate["GET"]


def hottest(server, load):
    """Return the name of the redis function called most under load.

    Every function is counted for one run; ubp finds its own worst case.
    """
    with ubp.attach(server.pid) as target:
        probe = target.probe("exe:*", ubp.Count(), timeout=30)
        load.run()
        counts = probe.counts()
    site = max(counts, key=counts.get)
    return site.function.name, counts[site] / load.requests


def row_server(is_quick):
    """redis with its hottest function counted, A B B A.

    Throughput per cycle that the server spends: that is what a full load
    is limited by, and others on the machine do not take part in it.
    """
    if servers.Redis.missing():
        raise Skip(servers.Redis.missing())
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise Skip("one CPU only")
    with servers.Redis() as server:
        set_affinity(server.pid, cpus[0])
        os.sched_setaffinity(0, {cpus[1]})      # the load inherits it
        spent = Spent(server.pid)
        try:
            full = Load(server, spent, 100000 if is_quick else 300000, 32)
            full.run()
            name, per_request = hottest(server, full)
            shares, walls = server_pairs(server, full, "exe:" + name,
                                         6 if is_quick else 20)
            plain, _ = server_pairs(
                server, Load(server, spent, 30000, 1), "exe:" + name,
                2 if is_quick else 8)
        finally:
            spent.close()
            os.sched_setaffinity(0, set(cpus))
    marks = (("wall clock throughput, % of unprobed", walls),
             ("without pipelining, % of unprobed", plain))
    return Result("server", "redis GET -P 32, hottest function counted",
                  "% of bare", shares, ">= 99", tuple(
                      Yardstick(text, statistics.median(samples),
                                statistics.median(samples)
                                / statistics.median(shares))
                      for text, samples in marks),
                  "%s, %.1f calls per request; by %s of the server"
                  % (name, per_request, spent.unit))


def server_pairs(server, load, where, n_pairs):
    """Return the % of unprobed (requests per cycle, requests/s)."""
    per_cycle, per_second = [], []
    for i in range(n_pairs):
        results = {}
        for is_probed in (False, True) if i % 2 else (True, False):
            if is_probed:
                with armed(server.pid, where):
                    results[True] = load.run()
            else:
                results[False] = load.run()
        per_cycle.append(100 * results[True][0] / results[False][0])
        per_second.append(100 * results[True][1] / results[False][1])
    return per_cycle, per_second


ROWS = collections.OrderedDict([("server", row_server)])
