"""Runs instructions on the CPU, one request at a time: see targets/judge.c.

    reply, = run([Request({CODE: code}, CODE, rsi=DATA_MIDDLE, is_step=True)])
"""
import struct
import subprocess
from typing import NamedTuple

from build import build

AREA = 0x4000
LOW, LOW_COPY = 0x30000000, 0x30800000
HIGH, HIGH_COPY = 0x7a0000000000, 0x7a0008000000
STACK_MIDDLE, DATA_MIDDLE = 0x50000000 + AREA // 2, 0x60000000 + AREA // 2
LOW_END = LOW + AREA                   # the first byte that cannot be read
MAX_PLACES = 8
SIGILL, SIGTRAP, SIGFPE, SIGSEGV = 4, 5, 8, 11

# struct user_regs_struct, <sys/user.h>
REGS = ("r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax "
        "rip cs eflags rsp ss fs_base gs_base ds es fs gs").split()
GPRS = ("rax rcx rdx rbx rsp rbp rsi rdi "
        "r8 r9 r10 r11 r12 r13 r14 r15").split()
PLACE = struct.Struct("<QI44s")
HEAD = struct.Struct("<II27Q")
REPLY = struct.Struct("<IIQ27Q512s512s256s")
_NO_PLACE = PLACE.pack(0, 0, b"")


class Reply(NamedTuple):
    """How it ended. stack and data are the bytes around their middles."""
    signal: int
    address: int
    regs: dict
    fpu: bytes
    stack: bytes
    data: bytes


def request(places, rip, regs, is_step=False):
    """Pack a struct request.

    places  [(vaddr, bytes)]: what to write; all other code is int3
    regs    {name: value}; what is not named is zero
    """
    values = dict(dict.fromkeys(REGS, 0), rip=rip, eflags=0x202)
    values.update(regs)
    return (HEAD.pack(is_step, len(places), *[values[r] for r in REGS])
            + b"".join(PLACE.pack(vaddr, len(code), code)
                       for vaddr, code in places)
            + _NO_PLACE * (MAX_PLACES - len(places)))


def run(requests):
    """Run packed requests, in order, in one child. -> [Reply]"""
    done = subprocess.run([build("judge")], input=b"".join(requests),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    n = len(done.stdout) // REPLY.size
    if n != len(requests) or done.returncode:
        raise RuntimeError("the judge left after %d of %d requests: %s" % (
            n, len(requests), done.stderr.decode()))
    replies = []
    for values in REPLY.iter_unpack(done.stdout):
        replies.append(Reply(values[0], values[2],
                             dict(zip(REGS, values[3:30])), *values[30:]))
    return replies
