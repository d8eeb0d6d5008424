"""Virtual environments with pytest, and the tests under every CPython found.

    compat.py                   run a choice under each CPython 3.6 to 3.14
    compat.py WORD...           the same with these words for pytest instead
    compat.py --venv FOLDER     make FOLDER a venv of this Python with pytest
    compat.py --venvs           make those of all, so that tests need not wait
    compat.py --syntax FILE...  compile files with the oldest CPython found

Interpreters are looked for on PATH and under `pyenv root`, one per version.
"""
import concurrent.futures
import glob
import os
import re
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
VERSIONS = ["3.%d" % minor for minor in range(6, 15)]
# What takes minutes says nothing more under a second version; of these,
# LIVE is what depends most on the interpreter.
LONG = ("actions bodies cli embed exact expressions handlers hazards jumps "
        "kill launch life safety servers sites slack stacks structure "
        "targets verbs").split()
SHORT = ("not racle and not mutations and not Libraries and not Deadlines "
         "and not busy_python and not 500_000 and not Speed and not Browser "
         "and not Cpu")
LIVE = ["tests/test_cli.py::" + name
        for name in ("Pure", "Misuse", "Counts", "Leaving", "Commands")] + [
    "tests/test_embed.py::Hosts::" + name for name in (
        "test_the_host_is_left_as_it_was", "test_any_thread_may_use_a_target",
        "test_an_asyncio_host_with_children_of_its_own")] + [
    "tests/test_actions.py::Exact", "tests/test_expressions.py::Meaning",
    "tests/test_bodies.py::Histograms", "tests/test_handlers.py::What",
    "tests/test_life.py::Hardware", "tests/test_stacks.py::Hostile",
    "tests/test_stacks.py::Names", "tests/test_verbs.py::Groups",
    "tests/test_verbs.py::Lines"]


def run_text(*command):
    """Return a command's stdout, or "" if it cannot be run."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL,
                              universal_newlines=True).stdout.strip()
    except OSError:
        return ""


def is_version(path, version):
    """Does an interpreter start, is it CPython of that version, has ctypes?"""
    return run_text(path, "-c", "import sys, ctypes; print(sys.implementation"
                    ".name, '%d.%d' % sys.version_info[:2])"
                    ) == "cpython " + version


def interpreters():
    """Return {version: path} of the CPythons found, oldest first."""
    found = {}
    root = run_text("pyenv", "root")
    for version in VERSIONS:
        paths = [shutil.which("python" + version)]
        if root:
            paths += sorted(glob.glob(os.path.join(
                root, "versions", version + ".*", "bin", "python" + version)))
        for path in paths:
            if path and is_version(path, version):
                found[version] = path
                break
    return found


def folder_of(version):
    return os.path.join(TOP, ".venv-" + version)


def make_venv(python, folder):
    """Make folder a venv of python that has pytest. Exits with the remedy."""
    ready = os.path.join(folder, "ready")
    if os.path.exists(ready):
        return
    if run_text(python, "-c", "import pytest; print(1)") == "1":
        steps = [[python, "-m", "venv", "--clear", "--without-pip",
                  "--system-site-packages", folder]]
    else:
        pip = [os.path.join(folder, "bin", "python"), "-m", "pip", "install",
               "-q", "--disable-pip-version-check"]
        # The pip that comes with Python 3.6 takes packages that are too new
        # for it; 21 is the last that runs there, and knows better.
        steps = [[python, "-m", "venv", "--clear", folder],
                 pip + ["pip>=21"], pip + ["pytest"]]
        if is_version(python, "3.6"):
            steps[1][-1] = "pip>=21,<22"
    for step in steps:
        done = subprocess.run(step, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT,
                              universal_newlines=True)
        if done.returncode:
            sys.stderr.write(
                "%s\n%s: failed.\nRemedy: apt-get install python3-venv "
                "python3-pytest (or your system's packages of these names), "
                "or a way to PyPI for pip.\n" % (done.stdout, " ".join(step)))
            sys.exit(1)
    with open(ready, "w"):
        return


def check_syntax(files):
    """Compile files with the oldest CPython found. -> exit status."""
    found = interpreters() or {"%d.%d" % sys.version_info[:2]: sys.executable}
    version, python = next(iter(found.items()))
    print("syntax: CPython %s" % version)
    return subprocess.run([python, "-c", "import sys\nfor name in sys.argv[1:]"
                           ":\n    compile(open(name).read(), name, 'exec')"]
                          + files).returncode


def choice():
    """Return pytest's words for the tests that every version runs."""
    names = [os.path.basename(path)
             for path in glob.glob(os.path.join(HERE, "test_*.py"))]
    return ["-q", "-k", SHORT] + ["tests/" + name for name in sorted(names)
                     if name[5:-3] not in LONG] + LIVE


def run_one(version, python, words):
    """Run pytest under a CPython, and print what came of it. -> exit status
    """
    folder = folder_of(version)
    make_venv(python, folder)
    began = time.monotonic()
    done = subprocess.run(
        [os.path.join(folder, "bin", "python"), "-m", "pytest",
         "-p", "no:cacheprovider"] + (words or choice()),
        cwd=TOP, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, universal_newlines=True)
    lines = done.stdout.strip().splitlines()
    told = "\n".join(lines) + "\n" if done.returncode else ""
    print("%sCPython %-5s %3d s  %s" % (
        told, version, time.monotonic() - began,
        re.sub("=+", "", lines[-1] if lines else "no output").strip()),
        flush=True)
    return done.returncode


def run_all(words):
    """Run pytest under each CPython, two at a time. -> exit status.

    The choice is no news under the one that has run all tests.
    """
    found = interpreters()
    if os.path.exists(os.path.join(TOP, ".venv", "ready")) and not words:
        found.pop(run_text(os.path.join(TOP, ".venv", "bin", "python"), "-c",
                           "import sys; print('%d.%d' % sys.version_info[:2])"
                           ), None)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        done = {version: pool.submit(run_one, version, python, words)
                for version, python in found.items()}
    failed = [version for version in found if done[version].result()]
    if failed:
        print("failed under CPython %s" % ", ".join(failed))
    return 1 if failed else 0


def main(argv):
    """Do what the words say. -> exit status."""
    if argv[:1] == ["--venv"]:
        return make_venv(sys.executable, argv[1])
    if argv[:1] == ["--venvs"]:
        for version, python in interpreters().items():
            make_venv(python, folder_of(version))
        return 0
    if argv[:1] == ["--syntax"]:
        return check_syntax(argv[1:])
    return run_all(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
