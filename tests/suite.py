"""All tests: those that start no program beside those that do.

    suite.py            run all, in two processes
    suite.py WORD...    run what pytest makes of these words, in one

The first keep a processor busy, the others wait for most of their time. They
do not meet: what is built is renamed into place, and no test of the first
looks at another process.
"""
import glob
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
PURE = ("bodies decode elf expressions jumps pictures probe_spec relocate "
        "structure window").split()
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rsfE",
          "-p", "no:cacheprovider"]


def main(words):
    """Run the tests, and print what came of them. -> exit status"""
    os.chdir(os.path.dirname(HERE))
    if words or os.cpu_count() == 1:
        return subprocess.call(PYTEST + ["tests"] + words)
    paths = sorted(glob.glob("tests/test_*.py"))
    pure = ["tests/test_%s.py" % name for name in PURE]
    with tempfile.TemporaryFile() as log:
        beside = subprocess.Popen(PYTEST + pure, stdin=subprocess.DEVNULL,
                                  stdout=log, stderr=subprocess.STDOUT)
        try:
            status = subprocess.call(PYTEST + [path for path in paths
                                               if path not in pure])
            beside.wait()
        finally:
            if beside.poll() is None:
                beside.terminate()
                beside.wait()
        log.seek(0)
        sys.stdout.write(log.read().decode(errors="replace"))
    return status or beside.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
