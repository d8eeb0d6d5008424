"""Row: how many records a second are read, kept and printed."""
import os
import statistics
import subprocess
import sys
import tempfile
import time

import ubp
from actions import DRAINED
from common import ROOT, Leaf, Result, Yardstick, Skip, timed

RECORDS = 200000


def filled(leaf, target):
    """A Trace probe whose rings hold RECORDS and some records."""
    probe = target.probe("exe:leaf", ubp.Trace("arg0, arg1", ring=32 << 20))
    leaf.cycles("leaf", RECORDS, 1)
    return probe


def library_rates(rounds):
    """Return k events per CPU second: records to a file, and as Events."""
    raw, events = [], []
    with Leaf() as leaf, tempfile.TemporaryFile() as file:
        for is_raw in [True, False] * rounds:
            with ubp.attach(leaf.pid) as target:
                probe = filled(leaf, target)
                want = RECORDS + RECORDS // 20 + 1

                def write():
                    for _, form, data in target._reader.records([probe]):
                        file.write(data)
                        n_bytes.append(len(data) // form.records.size)
                    file.flush()
                n_bytes = []
                seconds, found = timed(write if is_raw else
                                       lambda: target.read_events(True))
                n = sum(n_bytes) if is_raw else len(found)
                if n != want:
                    raise RuntimeError("%d records are not %d" % (n, want))
                (raw if is_raw else events).append(n / seconds / 1000)
    return raw, events


def command_rate(suffix, n_bursts):
    """k events per CPU second of the command, from ring to file."""
    with Leaf() as leaf, tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "hits" + suffix)
        text = os.path.join(folder, "text")
        argv = [sys.executable, os.path.join(ROOT, "ubp.py"), "trace", "-p",
                str(leaf.pid), "exe:leaf", "-e", "arg0, arg1"]
        with open(text, "w") as out:
            process = subprocess.Popen(
                argv + (["-o", path] if suffix else []), stdout=out,
                stderr=subprocess.DEVNULL)
        try:
            limit = time.monotonic() + 20
            while leaf.cycles("leaf", DRAINED, 1) < 25:     # not armed yet
                if time.monotonic() > limit:
                    raise Skip("the command did not arm its probe")
                time.sleep(0.1)
            time.sleep(0.5)
            start = cpu_seconds(process.pid)
            for _ in range(n_bursts):
                leaf.cycles("leaf", DRAINED, 1)
                time.sleep(0.005)
            time.sleep(0.5)
            used = cpu_seconds(process.pid) - start
        finally:
            process.send_signal(2)
            process.wait(20)
        with open(path if suffix else text) as file:
            n = sum(1 for line in file if "leaf" in line)
    return n / used / 1000


def cpu_seconds(pid):
    """Return the CPU time that a process has used so far."""
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def row_reader(is_quick):
    """Per second of the reader's CPU time: others share the machine."""
    raw, events = library_rates(2 if is_quick else 5)
    marks = [("as Events, in time order", statistics.median(events), "")]
    n_bursts = 50 if is_quick else 300
    for text, suffix in (("the command, as text", ""),
                         ("the command, as .jsonl", ".jsonl")):
        marks.append((text, command_rate(suffix, n_bursts), ">= 300"))
    return Result("reader", "records from the rings to disk, as they are",
                  "k/s CPU", raw, ">= 1000", tuple(
                      Yardstick(name, rate, rate, goal)
                      for name, rate, goal in marks),
                  "CPython %s; a record: time, tid, cpu, two arguments"
                  % sys.version.split()[0])


ROWS = {"reader": row_reader}
