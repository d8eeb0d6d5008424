"""Runs many bodies on the CPU, in one child: see targets/bodies.c.

    page = Page(n_shards=1)
    vaddr = page.add(spec, place, window)          # the body, assembled
    results, data = page.run([Case(vaddr, regs, ...)])
"""
import os
import struct
import subprocess
import tempfile
from typing import NamedTuple

import ubp_x86 as x86
from build import build

CODE, DATA, STACK_TOP = 0x10000000, 0x20000000, 0x30040000
LANDING, PID, BASE = DATA, DATA + 8, DATA + 16
SHARDS = DATA + 0x1000
SP = STACK_TOP - 8192 + 256
REQUEST, RESULT = struct.Struct("<20Q"), struct.Struct("<5Q")
STEP_STACK = 1024
STEP = struct.Struct("<19Q%ds" % STEP_STACK)
WINDOW = x86.Window(0x1000, 5, ())


class Case(NamedTuple):
    """One run of a body."""
    vaddr: int
    regs: tuple                 # 16 values, by number; rsp is SP
    window: x86.Window          # what is dead
    flags: int = 0x202


class Result(NamedTuple):
    """What went wrong: all zero if nothing did."""
    signal: int
    address: int
    wrong_regs: int
    wrong_flags: int
    wrong_stack: int


def offsets():
    """Of rseq.cpu_id and a thread's tid, from the child's fs base."""
    out = subprocess.run([build("bodies"), "info"], stdout=subprocess.PIPE,
                         check=True).stdout
    return [int(word) for word in out.split()]


class Page:
    """Code and data that grow while bodies are added."""

    def __init__(self, size=1 << 20, n_shards=1):
        self.code, self.size, self.next = bytearray(), size, 0
        shift = (size - 1).bit_length()
        self.data = bytearray(0x1000 + (n_shards << shift))
        self.shards = x86.Shards(x86.CPU_FROM_LSL, 0, n_shards - 1, shift,
                                 BASE)
        struct.pack_into("<Q", self.data, 16, SHARDS)

    def place(self, spec, **more):
        """A Place with a block of its own in every shard."""
        block, size = self.next, x86.block_layout(spec).size
        self.next += size
        assert self.next <= self.size, "the page is full"
        return x86.Place(self.shards, block, private=PID)._replace(**more)

    def add(self, spec, place, window):
        """Assemble a body, and a jump to where the child goes on."""
        vaddr = CODE + len(self.code)
        code = x86.body(spec, place, window, vaddr)
        end = vaddr + len(code)
        self.code += code + b"\xff\x25" + struct.pack(
            "<i", LANDING - (end + 6))
        return vaddr

    def add_function(self, parts, window, between=b""):
        """Bodies one after another, then a ret. parts: (spec, place), or
        code that is put between them."""
        self.code += b"\x90" * (-len(self.code) % 64)
        vaddr = CODE + len(self.code)
        for part in parts:
            self.code += part if isinstance(part, bytes) else x86.body(
                part[0], part[1], window, CODE + len(self.code))
        self.code += b"\xc3"
        return vaddr

    def storm(self, *words):
        """Run targets/storm.c on this page. -> ([its numbers], the data)"""
        with tempfile.TemporaryDirectory(prefix="ubp-bodies-") as folder:
            paths = [os.path.join(folder, name) for name in ("code", "data")]
            for path, data in zip(paths, (self.code, self.data)):
                with open(path, "wb") as file:
                    file.write(data)
            done = subprocess.run(
                [build("storm")] + paths + [str(word) for word in words],
                stdout=subprocess.PIPE, timeout=300)
            with open(paths[1], "rb") as file:
                data = file.read()
        if done.returncode:
            raise RuntimeError("the storm ended with %d" % done.returncode)
        return [int(word) for word in done.stdout.split()], data

    def run(self, cases, how="run"):
        """Run the cases in order. -> ([Result], the data behind)

        how  "forbid": under a filter that kills at a body's syscalls
        """
        out, data = self._run(cases, how)
        results = [Result(*each) for each in RESULT.iter_unpack(out)]
        if len(results) != len(cases):
            raise RuntimeError("the child left after %d of %d cases" % (
                len(results), len(cases)))
        return results, data

    def step(self, cases):
        """What the registers are before each instruction of the code.

        -> [(case, 16 registers, rip, flags, the STEP_STACK bytes below the
        case's rsp)]
        """
        return [(cases[step[0]], step[1:17], step[17], step[18], step[19])
                for step in STEP.iter_unpack(self._run(cases, "step")[0])]

    def _run(self, cases, how):
        folder = tempfile.mkdtemp(prefix="ubp-bodies-")
        paths = [os.path.join(folder, name) for name in
                 ("code", "data", "cases", "out")]
        try:
            requests = b"".join(
                REQUEST.pack(case.vaddr, case.flags,
                             not case.window.flags_dead,
                             0xffff & ~case.window.dead_regs | 1 << 4,
                             *case.regs) for case in cases)
            for path, data in zip(paths, (self.code, self.data, requests)):
                with open(path, "wb") as file:
                    file.write(data)
            done = subprocess.run([build("bodies"), how] + paths,
                                  timeout=300)
            with open(paths[3], "rb") as file:
                out = file.read()
            with open(paths[1], "rb") as file:
                data = file.read()
        finally:
            for path in paths:
                if os.path.exists(path):
                    os.remove(path)
            os.rmdir(folder)
        if done.returncode:
            raise RuntimeError("the child left with %d" % done.returncode)
        return out, data


def words(data, place, offset, n, shard=0, is_signed=False):
    """n numbers of a block, offset into it."""
    at = SHARDS - DATA + (shard << place.shards.shift) + place.block + offset
    return struct.unpack_from("<%d%s" % (n, "q" if is_signed else "Q"), data,
                              at)
