"""Builds the C programs under tests/targets, once per source and flags.

build("busy") -> path of the program. The result lies in tests/.build/ under
a name that holds a hash of the source, the shared header and the flags, so a
changed source is built anew and an unchanged one never.
"""
import hashlib
import os
import subprocess
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES = os.path.join(HERE, "targets")
BUILT = os.path.join(HERE, ".build")
COMMON = ("-O2", "-g0", "-Wall", "-Wno-unused-function", "-pthread",
          "-Wl,-z,now")             # no lazy binding on small stacks


def build(name, flags=(), suffix=".c", output_suffix=""):
    """Compile tests/targets/NAME.c; return the program's path.

    Raises SkipTest with the remedy where there is no C compiler or where
    a flag (-static, say) needs a library that is not installed.
    """
    source = os.path.join(SOURCES, name + suffix)
    command = ["cc"] + list(COMMON) + list(flags)
    key = hashlib.sha256(repr(command).encode())
    for path in (source, os.path.join(SOURCES, "target.h")):
        with open(path, "rb") as f:
            key.update(f.read())
    path = os.path.join(BUILT, "%s-%s%s" % (name, key.hexdigest()[:12],
                                            output_suffix))
    if os.path.exists(path):
        return path
    os.makedirs(BUILT, exist_ok=True)
    with open(os.path.join(BUILT, ".gitignore"), "w") as f:
        f.write("*\n")
    partial = "%s.%d" % (path, os.getpid())
    try:
        done = subprocess.run(
            command + ["-o", partial, source, "-lrt", "-lm", "-ldl"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except FileNotFoundError:
        raise unittest.SkipTest("no C compiler; apt-get install gcc libc-dev")
    if done.returncode:
        text = done.stdout.decode("utf-8", "replace")
        if "cc1plus" in text or "-lstdc++" in text:
            raise unittest.SkipTest("no C++ compiler; apt-get install g++")
        if "-static" in flags or "-static-pie" in flags:
            raise unittest.SkipTest("cannot link statically: %s" % text)
        raise RuntimeError("cc %s: %s" % (source, text))
    os.rename(partial, path)
    return path


def build_library(name, flags=()):
    """Compile tests/targets/NAME.c to a shared object; return its path."""
    return build(name, ("-shared", "-fPIC") + tuple(flags),
                 output_suffix=".so")
