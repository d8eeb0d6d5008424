"""The kernel's own uprobes through tracefs: the yardstick beside ubp."""
import os
import subprocess

TRACEFS = "/sys/kernel/tracing"
GROUP = "ubp_bench"


def unusable():
    """Return "" if uprobes can be set here, else the reason.

    Mounts tracefs if we are root and nobody has.
    """
    if os.getuid():
        return "not root"
    if not os.path.exists(TRACEFS + "/uprobe_events"):
        mounted = subprocess.run(["mount", "-t", "tracefs", "nodev", TRACEFS],
                                 stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        if mounted.returncode:
            return "tracefs cannot be mounted"
    if not os.access(TRACEFS + "/uprobe_events", os.W_OK):
        return "this kernel has no uprobe_events"
    return ""


class Uprobe:
    """One uprobe (or uretprobe) at a file offset; a context manager."""

    n_made = 0

    def __init__(self, path, offset, is_return=False):
        Uprobe.n_made += 1
        self.name = "p%d_%d" % (os.getpid(), Uprobe.n_made)
        self.line = "%s:%s/%s %s:0x%x" % ("r" if is_return else "p", GROUP,
                                          self.name, path, offset)

    def _write(self, name, text, flags=os.O_WRONLY):
        # Not open(…, "a"): that seeks, which tracefs refuses.
        fd = os.open(os.path.join(TRACEFS, name), flags)
        try:
            os.write(fd, text.encode() + b"\n")
        finally:
            os.close(fd)

    def __enter__(self):
        self._write("uprobe_events", self.line,
                    os.O_WRONLY | os.O_APPEND)
        self._enable("1")
        return self

    def _enable(self, value):
        self._write("events/%s/%s/enable" % (GROUP, self.name), value)

    def __exit__(self, *_):
        self._enable("0")
        self._write("uprobe_events", "-:%s/%s" % (GROUP, self.name),
                    os.O_WRONLY | os.O_APPEND)

    def hits(self):
        with open(TRACEFS + "/uprobe_profile") as file:
            for line in file:
                fields = line.split()
                if self.name in fields:
                    return int(fields[fields.index(self.name) + 1])
        return 0
