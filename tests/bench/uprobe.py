"""The kernel's own uprobes, the yardstick beside ubp: by tracefs, bpftrace."""
import os
import select
import shutil
import subprocess
import time

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
    """One uprobe (or uretprobe) at a file offset; a context manager.

    args    what it records, as uprobetracer.rst has it: "a=%di:u64"
    filter  a condition on these: "a == 0"
    """

    n_made = 0

    def __init__(self, path, offset, is_return=False, args="",
                 filter=""):
        Uprobe.n_made += 1
        self.name = "p%d_%d" % (os.getpid(), Uprobe.n_made)
        self.line = "%s:%s/%s %s:0x%x %s" % (
            "r" if is_return else "p", GROUP, self.name, path, offset, args)
        self.filter = filter

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
        if self.filter:
            self._write("events/%s/%s/filter" % (GROUP, self.name),
                        self.filter)
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


class Bpftrace:
    """A bpftrace script in force while the context lasts.

    OSError where there is none, or it cannot work here.
    """

    START_SECONDS = 20

    def __init__(self, script, pid):
        self.argv = ["bpftrace", "-p", str(pid), "-e", script]

    @staticmethod
    def unusable():
        """Return "" if there is one and we are root, else the reason."""
        if os.getuid():
            return "not root"
        return "" if shutil.which("bpftrace") else "no bpftrace here"

    def __enter__(self):
        self.process = subprocess.Popen(
            self.argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        fd, text = self.process.stdout.fileno(), b""
        limit = time.monotonic() + self.START_SECONDS
        while b"Attaching" not in text and time.monotonic() < limit:
            if select.select([fd], [], [], 0.1)[0]:
                data = os.read(fd, 4096)
                text += data
                if not data:
                    break
        if b"Attaching" not in text:
            self.__exit__()
            raise OSError("bpftrace: " + text.decode(errors="replace")[-200:])
        time.sleep(1)               # it says so before it has done it
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(2)
        try:
            self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
