"""All tests, in two processes.

    suite.py            run all
    suite.py WORD...    run what pytest makes of these words, in one process

They take about as long as each other, and do not meet: what is built is
renamed into place, no test looks at processes of others, and those that set
uprobes, which are the kernel's for a file, or use gdb are not in BESIDE.
"""
import glob
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BESIDE = ("actions bodies decode elf exact expressions handlers jumps kill "
          "pictures probe_spec relocate servers sites slack structure verbs "
          "window").split()
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rsfE",
          "-p", "no:cacheprovider"]


def main(words):
    """Run the tests, and print what came of them. -> exit status"""
    os.chdir(os.path.dirname(HERE))
    if words or os.cpu_count() == 1:
        return subprocess.call(PYTEST + ["tests"] + words)
    paths = sorted(glob.glob("tests/test_*.py"))
    beside = ["tests/test_%s.py" % name for name in BESIDE]
    with tempfile.TemporaryFile() as log:
        other = subprocess.Popen(PYTEST + beside, stdin=subprocess.DEVNULL,
                                 stdout=log, stderr=subprocess.STDOUT)
        try:
            status = subprocess.call(PYTEST + [path for path in paths
                                               if path not in beside])
            other.wait()
        finally:
            if other.poll() is None:
                other.terminate()
                other.wait()
        log.seek(0)
        sys.stdout.write(log.read().decode(errors="replace"))
    return status or other.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
