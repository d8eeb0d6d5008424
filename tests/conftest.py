"""Lets tests say `import ubp` from wherever pytest was started.

They start hundreds of Pythons that import it: from kept bytecode, wherever
that is forbidden too, or starting them takes more time than all else.

What is ignored here would be in every program that a test starts: a command
that a shell puts into the background ignores the signals of its terminal, as
does one under nohup. A handler that does nothing is the same for us only.
"""
import glob
import os
import signal
import sys
import time

import pytest

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
for signum in signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM:
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, lambda signum, frame: None)


def children():
    """{pid: its command} of this process's children."""
    found = {}
    for path in glob.glob("/proc/self/task/*/children"):
        for pid in content(path).split():
            found[pid] = content("/proc/%s/comm" % pid).strip()
    return found


def content(path):
    """A file of /proc, "" if what it tells of has ended."""
    try:
        with open(path) as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.fixture(autouse=True, scope="class")
def no_child_is_left():
    """A test leaves no process, neither running nor dead."""
    before = set(children())
    yield
    deadline = time.monotonic() + 5
    while set(children()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    left = children()
    assert not set(left) - before, "left behind: %r" % left
