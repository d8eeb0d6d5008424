"""x86-64 for ubp: decode, relocate, plan and assemble machine code. Pure.

No I/O, no syscall, no process: bytes in, values out. Usable alone.

     1  Errors             what this file raises
     2  Opcode maps        what bytes follow each opcode
     3  Decoder            bytes -> Insn
     4  Relocation         Insn at one address -> bytes at another
     5  Windows            which bytes of a function a jump may overwrite
     6  Assembler          one function per instruction form
     7  Expressions        what a probe may compute, parsed, checked, evaluated
     8  Bodies             expressions and actions as machine code
     9  Trampolines        what a jump leads to, listed byte by byte
    10  Register images    regsets and signal frames, in the kernel's layout

Sources: Intel SDM, order number 325462 ("SDM A-2" is its Table A-2); AMD64
Architecture Programmer's Manual, volume 3 (24594, "APM"). Vocabulary:

    vaddr    where an instruction is, in the target
    site     where a probe wants to be
    window   the bytes that a patch overwrites
    slot     five dead bytes that hold a jump: padding, or of a window
    copy     a displaced instruction relocated, in a trampoline
"""
import array
import bisect
import collections
import itertools
import operator
import re
import struct
from typing import NamedTuple, Optional, Tuple

# ---- 1  Errors ------------------------------------------------------------


class UbpError(Exception):
    """A thing ubp could not or would not do. hint: what the user can do."""

    def __init__(self, what, whom, why, hint=""):
        super().__init__("cannot %s %s: %s" % (what, whom, why))
        self.what, self.whom, self.why, self.hint = what, whom, why, hint


class DecodeError(UbpError):
    """Bytes that are no instruction, or none that the tables know."""

    def __init__(self, why, vaddr):
        super().__init__("decode", "0x%x" % vaddr, why)
        self.vaddr = vaddr


class RelocationError(UbpError):
    """An instruction that cannot run elsewhere. rule: a key for summaries."""

    def __init__(self, why, vaddr, rule="cannot move"):
        super().__init__("relocate", "0x%x" % vaddr, why)
        self.vaddr, self.rule = vaddr, rule


class RefusalError(UbpError):
    """A site that must not be patched. rule: a key for summaries."""

    def __init__(self, rule, why, vaddr):
        super().__init__("probe", "0x%x" % vaddr, why)
        self.rule, self.vaddr = rule, vaddr


# ---- 2  Opcode maps -------------------------------------------------------
#
# Problem: an x86 instruction's length hides in tables that fill half a
# manual. One idea: keep them as the manual's pages, high nibble down and low
# nibble across, and let a cell say only *which bytes follow the opcode*:
#
#     .  nothing            E  modrm with its sib and displacement
#     -- undefined          M  the same, memory only      U  registers only
#     Ib Iw  immediate      S  memory with a sib byte (vector index, tiles)
#     Iz 4 bytes, 2 by 66   R  modrm alone, mod is ignored
#     Iv 8 under REX.W too  O  absolute offset, as wide as an address
#     Ibb Iwb  two of them  Jb Jz  branch displacement    Ap  far pointer
#
# A cell in lower case is a prefix or leads to another page. What the
# mandatory prefix, modrm.reg and modrm.rm add, each its own table answers.
# Invariant: what no table defines is undefined; nothing is a default.

PAGES = {
    # The names of pages: 1b one byte, 0f 38 3a after 0f, 0f 38 and 0f 3a,
    # v1 VEX map 1, e1 EVEX map 1, x8 XOP map 8, 3d suffixes of 3DNow!.
    # A row's label may be a range of rows.
    "1b": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   SDM A-2
0   E   E   E   E   Ib  Iz  --  --   E   E   E   E   Ib  Iz  --  esc
1   E   E   E   E   Ib  Iz  --  --   E   E   E   E   Ib  Iz  --  --
2   E   E   E   E   Ib  Iz  seg --   E   E   E   E   Ib  Iz  seg --
3   E   E   E   E   Ib  Iz  seg --   E   E   E   E   Ib  Iz  seg --
4   rex rex rex rex rex rex rex rex  rex rex rex rex rex rex rex rex
5   .   .   .   .   .   .   .   .    .   .   .   .   .   .   .   .
6   --  --  evx E   seg seg o16 a32  Iz  EIz Ib  EIb .   .   .   .
7   Jb  Jb  Jb  Jb  Jb  Jb  Jb  Jb   Jb  Jb  Jb  Jb  Jb  Jb  Jb  Jb
8   EIb EIz --  EIb E   E   E   E    E   E   E   E   E   M   E   xop
9   .   .   .   .   .   .   .   .    .   .   --  .   .   .   .   .
a   O   O   O   O   .   .   .   .    Ib  Iz  .   .   .   .   .   .
b   Ib  Ib  Ib  Ib  Ib  Ib  Ib  Ib   Iv  Iv  Iv  Iv  Iv  Iv  Iv  Iv
c   EIb EIb Iw  .   vx3 vx2 EIb EIz  Iwb .   Iw  .   .   Ib  --  .
d   E   E   E   E   --  --  --  .    E   E   E   E   E   E   E   E
e   Jb  Jb  Jb  Jb  Ib  Ib  Ib  Ib   Jz  Jz  --  Jb  .   .   .   .
f   lck .   rep rep .   .   E   E    .   .   .   .   .   .   E   E
""",
    "0f": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   SDM A-3
0   E   E   E   E   --  .   .   .    .   .   --  .   --  M   .   3dn
1   E   E   E   M   E   E   E   M    E   E   E   E   E   E   E   E
2   R   R   R   R   --  --  --  --   E   E   E   M   E   E   E   E
3   .   .   .   .   .   .   --  .    esc --  esc --  --  --  --  --
4   E   E   E   E   E   E   E   E    E   E   E   E   E   E   E   E
5   U   E   E   E   E   E   E   E    E   E   E   E   E   E   E   E
6   E   E   E   E   E   E   E   E    E   E   E   E   E   E   E   E
7   EIb UIb UIb UIb E   E   E   .    E   E   --  --  E   E   E   E
8   Jz  Jz  Jz  Jz  Jz  Jz  Jz  Jz   Jz  Jz  Jz  Jz  Jz  Jz  Jz  Jz
9   E   E   E   E   E   E   E   E    E   E   E   E   E   E   E   E
a   .   .   .   E   EIb E   U   U    .   .   .   E   EIb E   E   E
b   E   E   M   E   M   M   E   E    E   E   EIb E   E   E   E   E
c   E   E   EIb M   EIb UIb EIb E    .   .   .   .   .   .   .   .
d   E   E   E   E   E   E   E   U    E   E   E   E   E   E   E   E
e   E   E   E   E   E   E   E   M    E   E   E   E   E   E   E   E
f   M   E   E   E   E   E   E   U    E   E   E   E   E   E   E   E
""",
    "38": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   SDM A-4
0   E   E   E   E   E   E   E   E    E   E   E   E   --  --  --  --
1   E   --  --  --  E   E   --  E    --  --  --  --  E   E   E   --
2   E   E   E   E   E   E   --  --   E   E   M   E   --  --  --  --
3   E   E   E   E   E   E   --  E    E   E   E   E   E   E   E   E
4   E   E   --  --  --  --  --  --   --  --  --  --  --  --  --  --
5-7 --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
8   M   M   M   --  --  --  --  --   --  --  M   M   --  --  --  --
9-b --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
c   --  --  --  --  --  --  --  --   E   E   E   E   E   E   --  E
d   --  --  --  --  --  --  --  --   M   --  --  E   E   E   E   E
e   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
f   E   E   --  --  --  M   E   --   E   M   U   U   M   --  --  --
""",
    "3a": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   SDM A-5
0   --  --  --  --  --  --  --  --   EIb EIb EIb EIb EIb EIb EIb EIb
1   --  --  --  --  EIb EIb EIb EIb  --  --  --  --  --  --  --  --
2   EIb EIb EIb --  --  --  --  --   --  --  --  --  --  --  --  --
3   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
4   EIb EIb EIb --  EIb --  --  --   --  --  --  --  --  --  --  --
5   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
6   EIb EIb EIb EIb --  --  --  --   --  --  --  --  --  --  --  --
7-b --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
c   --  --  --  --  --  --  --  --   --  --  --  --  EIb --  EIb EIb
d   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  EIb
e   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
f   UIb --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
""",
    "3d": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   APM A-13
0   --  --  --  --  --  --  --  --   --  --  --  --  .   .   --  --
1   --  --  --  --  --  --  --  --   --  --  --  --  .   .   --  --
2-7 --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
8   --  --  --  --  --  --  --  --   --  --  .   --  --  --  .   --
9   .   --  --  --  .   --  .   .    --  --  .   --  --  --  .   --
a   .   --  --  --  .   --  .   .    --  --  .   --  --  --  .   --
b   .   --  --  --  .   --  .   .    --  --  --  .   --  --  --  .
c-f --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
""",
    "v1": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   SDM A-3
0   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
1   E   E   E   M   E   E   E   M    --  --  --  --  --  --  --  --
2   --  --  --  --  --  --  --  --   E   E   E   M   E   E   E   E
3   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
4   --  U   U   --  U   U   U   U    --  --  U   U   --  --  --  --
5   U   E   E   E   E   E   E   E    E   E   E   E   E   E   E   E
6   E   E   E   E   E   E   E   E    E   E   E   E   E   E   E   E
7   EIb UIb UIb UIb E   E   E   .    --  --  --  --  E   E   E   E
8   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
9   E   M   U   U   --  --  --  --   U   U   --  --  --  --  --  --
a   --  --  --  --  --  --  --  --   --  --  --  --  --  --  M   --
b   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
c   --  --  EIb --  EIb UIb EIb --   --  --  --  --  --  --  --  --
d   E   E   E   E   E   E   E   U    E   E   E   E   E   E   E   E
e   E   E   E   E   E   E   E   M    E   E   E   E   E   E   E   E
f   M   E   E   E   E   E   E   U    E   E   E   E   E   E   E   --
""",
    "v2": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   SDM A-4
0   E   E   E   E   E   E   E   E    E   E   E   E   E   E   E   E
1   --  --  --  E   --  --  E   E    E   E   M   --  E   E   E   --
2   E   E   E   E   E   E   --  --   E   E   M   E   M   M   M   M
3   E   E   E   E   E   E   E   E    E   E   E   E   E   E   E   E
4   E   E   --  --  --  E   E   E    U   E   S   S   --  --  --  --
5   E   E   E   E   --  --  --  --   E   E   M   --  U   --  U   --
6   --  --  --  --  --  --  --  --   --  --  --  --  U   --  --  --
7   --  --  E   --  --  --  --  --   E   E   --  --  --  --  --  --
8   --  --  --  --  --  --  --  --   --  --  --  --  M   --  M   --
9   S   S   S   S   --  --  E   E    E   E   E   E   E   E   E   E
a   --  --  --  --  --  --  E   E    E   E   E   E   E   E   E   E
b   M   M   --  --  E   E   E   E    E   E   E   E   E   E   E   E
c   --  --  --  --  --  --  --  --   --  --  --  U   U   U   --  E
d   --  --  E   E   --  --  --  --   --  --  E   E   E   E   E   E
e   M   M   M   M   M   M   M   M    M   M   M   M   M   M   M   M
f   --  --  E   E   --  E   E   E    --  --  --  --  --  --  --  --
""",
    "v3": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   SDM A-5
0   EIb EIb EIb --  EIb EIb EIb --   EIb EIb EIb EIb EIb EIb EIb EIb
1   --  --  --  --  EIb EIb EIb EIb  EIb EIb --  --  --  EIb --  --
2   EIb EIb EIb --  --  --  --  --   --  --  --  --  --  --  --  --
3   UIb UIb UIb UIb --  --  --  --   EIb EIb --  --  --  --  --  --
4   EIb EIb EIb --  EIb --  EIb --   EIb EIb EIb EIb EIb --  --  --
5   --  --  --  --  --  --  --  --   --  --  --  --  EIb EIb EIb EIb
6   EIb EIb EIb EIb --  --  --  --   EIb EIb EIb EIb EIb EIb EIb EIb
7   --  --  --  --  --  --  --  --   EIb EIb EIb EIb EIb EIb EIb EIb
8-b --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
c-d --  --  --  --  --  --  --  --   --  --  --  --  --  --  EIb EIb
e   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
f   EIb --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
""",
    "v5": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   AMX-FP8
0-e --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
f   --  --  --  --  --  --  --  --   --  --  --  --  --  U   --  --
""",
    "v7": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   USER_MSR
0-e --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
f   --  --  --  --  --  --  UIz --   UIz --  --  --  --  --  --  --
""",
    "e1": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   AVX-512
0   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
1   E   E   E   M   E   E   E   M    --  --  --  --  --  --  --  --
2   --  --  --  --  --  --  --  --   E   E   E   M   E   E   E   E
3-4 --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
5   --  E   --  --  E   E   E   E    E   E   E   E   E   E   E   E
6   E   E   E   E   E   E   E   E    E   E   E   E   E   E   E   E
7   EIb EIb EIb EIb E   E   E   --   E   E   E   E   --  --  E   E
8-b --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
c   --  --  EIb --  EIb UIb EIb --   --  --  --  --  --  --  --  --
d   --  E   E   E   E   E   E   --   E   E   E   E   E   E   E   E
e   E   E   E   E   E   E   E   M    E   E   E   E   E   E   E   E
f   --  E   E   E   E   E   E   --   E   E   E   E   E   E   E   --
""",
    "e2": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   AVX-512
0   E   --  --  --  E   --  --  --   --  --  --  E   E   E   --  --
1   E   E   E   E   E   E   E   --   E   E   M   M   E   E   E   E
2   E   E   E   E   E   E   E   E    E   E   E   E   E   E   --  --
3   E   E   E   E   E   E   E   E    E   E   E   E   E   E   E   E
4   E   --  E   E   E   E   E   E    --  --  U   --  E   E   E   E
5   E   E   E   E   E   E   --  --   E   E   M   M   --  --  --  --
6   --  --  E   E   E   E   E   E    E   --  --  --  --  U   --  --
7   E   E   E   E   E   E   E   E    E   E   U   U   U   E   E   E
8   --  --  --  E   --  --  --  --   E   E   E   E   --  E   --  E
9-a S   S   S   S   --  --  E   E    E   E   E   E   E   E   E   E
b   --  --  --  --  E   E   E   E    E   E   E   E   E   E   E   E
c   --  --  --  --  E   --  S   S    E   --  E   E   E   E   --  E
d   --  --  E   E   --  --  --  --   --  --  E   --  E   E   E   E
e-f --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
""",
    "e3": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   AVX-512
0   EIb EIb --  EIb EIb EIb --  UIb  EIb EIb EIb EIb --  --  --  EIb
1   --  --  --  --  EIb EIb EIb EIb  EIb EIb EIb EIb --  EIb EIb EIb
2   EIb EIb EIb EIb --  EIb EIb EIb  --  --  --  --  --  --  --  --
3   --  --  --  --  --  --  --  --   EIb EIb EIb EIb --  --  EIb EIb
4   --  --  EIb EIb EIb --  --  --   --  --  --  --  --  --  --  --
5   EIb EIb EIb EIb EIb EIb EIb EIb  --  --  --  --  --  --  --  --
6   --  --  --  --  --  --  EIb EIb  --  --  --  --  --  --  --  --
7   EIb EIb EIb EIb --  --  --  UIb  --  --  --  --  --  --  --  --
8-b --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
c   --  --  EIb --  --  --  --  --   --  --  --  --  --  --  EIb EIb
d-f --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
""",
    "e5": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   FP16
0   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
1   E   E   --  --  --  --  --  --   E   --  --  E   --  E   E   --
2   --  --  --  --  --  --  --  --   --  --  E   --  E   E   E   E
3-4 --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
5   --  E   --  --  --  --  --  --   E   E   E   E   E   E   E   E
6   --  --  --  --  --  --  --  --   E   E   E   E   E   E   E   M
7   --  --  --  --  E   --  --  --   E   E   E   E   E   E   E   --
8-f --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
""",
    "e6": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   FP16
0   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
1   --  --  --  E   --  --  --  --   --  --  --  --  --  --  --  --
2   --  --  --  --  --  --  --  --   --  --  --  --  E   E   --  --
3   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
4   --  --  E   E   --  --  --  --   --  --  --  --  E   E   E   E
5   --  --  --  --  --  --  E   E    --  --  --  --  --  --  --  --
6-8 --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
9-b --  --  --  --  --  --  E   E    E   E   E   E   E   E   E   E
c   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
d   --  --  --  --  --  --  E   E    --  --  --  --  --  --  --  --
e-f --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
""",
    "x8": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   APM A-8
0-7 --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
8-9 --  --  --  --  --  EIb EIb EIb  --  --  --  --  --  --  EIb EIb
a   --  --  EIb EIb --  --  EIb --   --  --  --  --  --  --  --  --
b   --  --  --  --  --  --  EIb --   --  --  --  --  --  --  --  --
c   EIb EIb EIb EIb --  --  --  --   --  --  --  --  EIb EIb EIb EIb
d   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
e   --  --  --  --  --  --  --  --   --  --  --  --  EIb EIb EIb EIb
f   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
""",
    "x9": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   APM A-9
0   --  E   E   --  --  --  --  --   --  --  --  --  --  --  --  --
1   --  --  U   --  --  --  --  --   --  --  --  --  --  --  --  --
2-7 --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
8   E   E   E   E   --  --  --  --   --  --  --  --  --  --  --  --
9   E   E   E   E   E   E   E   E    E   E   E   E   --  --  --  --
a-b --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
c-d --  E   E   E   --  --  E   E    --  --  --  E   --  --  --  --
e   --  E   E   E   --  --  --  --   --  --  --  --  --  --  --  --
f   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
""",
    "xa": """
; x0  x1  x2  x3  x4  x5  x6  x7   x8  x9  xa  xb  xc  xd  xe  xf   APM A-10
0   --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
1   EIz --  EIz --  --  --  --  --   --  --  --  --  --  --  --  --
2-f --  --  --  --  --  --  --  --   --  --  --  --  --  --  --  --
""",
}

# 32-bit code reads the same pages but for these cells (SDM A-2, i64 o64).
IN_32_BIT = """
06,07,0e,16,17,1e,1f    .
27,2f,37,3f,40-4f       .
60,61,ce                .
62,c4,c5                M
82                      EIb
9a,ea                   Ap
d4,d5                   Ib
"""

# Which mandatory prefix an opcode takes, where it is choosy. `=` is the
# page's cell; `*` stands for all that the page defines and no row names.
PREFIXED = """
; page opcodes                        none  66   f3   f2
0f  12                                E     M    E    E
0f  13,17                             M     M    --   --
0f  14-15,28-29,2e-2f,54-57           E     E    --   --
0f  16                                E     M    E    --
0f  50,d7,f7                          U     U    --   --
0f  52-53                             E     --   E    --
0f  5b,6f,7e-7f                       E     E    E    --
0f  60-6b,6e,74-76                    E     E    --   --
0f  6c-6d                             --    E    --   --
0f  71-73,c5                          UIb   UIb  --   --
0f  77                                .     --   --   --
0f  78                                E     UIbb --   UIbb
0f  79                                E     U    --   U
0f  7c-7d,d0                          --    E    --   E
0f  b8                                --    --   E    --
0f  c3                                M     --   --   --
0f  c4,c6                             EIb   EIb  --   --
0f  d1-d5,d8-df,e0-e5,e8-ef           E     E    --   --
0f  f1-f6,f8-fe                       E     E    --   --
0f  d6                                --    E    U    U
0f  e6                                --    E    E    E
0f  e7                                M     M    --   --
0f  f0                                --    --   --   M
38  00-0b,1c-1e                       E     E    --   --
38  8a-8b                             M     M    --   --
38  c8-cd                             E     --   --   --
38  d8                                --    --   M    --
38  dc                                --    E    E    --
38  dd-df                             --    E    M    --
38  f0-f1                             M     M    --   E
38  f6                                M     E    E    --
38  f8                                --    M    E    E
38  f9                                M     --   --   --
38  fa-fb                             --    --   U    --
38  fc                                M     M    M    M
38  *                                 --    =    --   --
3a  0f                                EIb   EIb  --   --
3a  cc                                EIb   --   --   --
3a  f0                                --    --   UIb  --
3a  *                                 --    =    --   --
v1  10-11,51,58-5a,5c-5f              E     E    E    E
v1  12                                E     M    E    E
v1  13,17,2b,91                       M     M    --   --
v1  14-15,28-29,2e-2f,54-57,90        E     E    --   --
v1  16                                E     M    E    --
v1  2a,2c-2d                          --    --   E    E
v1  41-42,44-47,4a-4b,50,98-99        U     U    --   --
v1  52-53                             E     --   E    --
v1  5b                                E     E    E    --
v1  6f,7e-7f                          --    E    E    --
v1  70                                --    EIb  EIb  EIb
v1  77                                .     --   --   --
v1  7c-7d,d0                          --    E    --   E
v1  92-93                             U     U    --   U
v1  ae                                M     --   --   --
v1  c2                                EIb   EIb  EIb  EIb
v1  c6                                EIb   EIb  --   --
v1  e6                                --    E    E    E
v1  f0                                --    --   --   M
v1  *                                 --    =    --   --
v2  49                                E     M    --   U
v2  4a                                --    S    --   S
v2  4b                                --    S    S    S
v2  50-51,da                          E     E    E    E
v2  5c                                --    --   U    U
v2  5e                                U     U    U    U
v2  6c                                U     U    --   --
v2  72                                --    --   E    --
v2  b0                                M     M    M    M
v2  b1                                --    M    M    --
v2  cb-cd                             --    --   --   U
v2  d2-d3                             E     E    E    --
v2  f2-f3                             E     --   --   --
v2  f5                                E     --   E    E
v2  f6                                --    --   --   E
v2  f7                                E     E    E    E
v2  *                                 --    =    --   --
v3  f0                                --    --   --   EIb
v3  *                                 --    =    --   --
v7  f6,f8                             --    --   UIz  UIz
x8  *                                 =     --   --   --
x9  *                                 =     --   --   --
xa  *                                 =     --   --   --
e1  10-11,2e-2f,51,58-5a,5c-5f,78-79  E     E    E    E
e1  12                                E     M    E    E
e1  13,17,2b                          M     M    --   --
e1  14-15,28-29,54-57                 E     E    --   --
e1  16                                E     M    E    --
e1  2a,2c-2d                          --    --   E    E
e1  5b                                E     E    E    --
e1  6f,7a-7b,7f,e6                    --    E    E    E
e1  70                                --    EIb  EIb  EIb
e1  7e                                --    E    E    --
e1  c2                                EIb   EIb  EIb  EIb
e1  c6                                EIb   EIb  --   --
e1  *                                 --    =    --   --
e2  10-15,20-27,30-35                 --    E    E    --
e2  28-29,38-3a                       --    E    U    --
e2  2a                                --    M    U    --
e2  50-51                             E     E    E    E
e2  4a                                --    U    U    --
e2  52                                E     E    E    M
e2  53,9a-9b,aa-ab                    --    E    --   M
e2  6d                                U     U    U    U
e2  68                                --    --   --   E
e2  72                                --    E    E    E
e2  74                                E     --   E    E
e2  d2-d3                             E     E    E    --
e2  da                                --    --   E    E
e2  *                                 --    =    --   --
e3  07                                UIb   UIb  UIb  UIb
e3  08,26,52,56,66                    EIb   EIb  --   EIb
e3  0a,27,53,57,67                    EIb   EIb  --   --
e3  42                                --    EIb  EIb  --
e3  77                                --    --   UIb  UIb
e3  c2                                EIb   --   EIb  EIb
e3  *                                 --    =    --   --
e5  10-11,2a,2c-2d                    --    --   E    --
e5  18,1b,74                          E     --   E    E
e5  1d,7c                             E     E    --   --
e5  1e                                --    --   --   E
e5  2e                                E     --   E    --
e5  2f,51,58-59,5b-5f,78-79           E     E    E    --
e5  5a,6c-6d,7d                       E     E    E    E
e5  68-6b                             E     E    --   E
e5  6e,7b,7e                          --    E    E    --
e5  6f                                --    --   M    M
e5  7a                                --    E    --   E
e6  13,2c,42,4c,4e                    E     E    --   --
e6  98,9a,9c,9e,a8,aa,ac,ae           E     E    --   --
e6  b8,ba,bc,be                       E     E    --   --
e6  56-57,d6-d7                       --    --   E    E
e6  *                                 --    =    --   --
"""

# Groups: the cell by modrm.reg. A prefix behind the opcode narrows the row.
GROUPS = """
; page opcode   /0   /1   /2   /3   /4   /5   /6   /7     SDM A-6, APM A-7
1b  8c          E    E    E    E    E    E    --   --
1b  8e          E    --   E    E    E    E    --   --
1b  8f          E    --   --   --   --   --   --   --
1b  c6          EIb  --   --   --   --   --   --   UIb
1b  c7          EIz  --   --   --   --   --   --   UJz
1b  d9          E    U    E    M    E    E    E    E
1b  dc          E    E    M    M    E    E    E    E
1b  db          E    E    E    E    U    E    U    M
1b  dd          E    M    E    E    E    U    M    M
1b  de          E    E    M    E    E    E    E    E
1b  df          E    M    M    M    E    E    E    M
1b  f6          EIb  EIb  E    E    E    E    E    E
1b  f7          EIz  EIz  E    E    E    E    E    E
1b  fe          E    E    --   --   --   --   --   --
1b  ff          E    E    E    M    E    M    E    --
0f  00          E    E    E    E    E    E    --   --
0f  00:f2       E    E    E    E    E    E    E    --
0f  01          E    E    E    E    E    U    E    E
0f  01:f3       E    E    E    E    E    E    E    E
0f  20,22       R    --   R    R    R    --   --   --
0f  71          --   --   UIb  --   UIb  --   UIb  --
0f  72          --   --   UIb  --   UIb  --   UIb  --
0f  73          --   --   UIb  --   --   --   UIb  --
0f  73:66       --   --   UIb  UIb  --   --   UIb  UIb
0f  78:66       UIbb --   --   --   --   --   --   --
0f  a6          U    U    U    --   --   --   --   --
0f  a7          U    U    U    U    U    U    --   --
0f  ae          M    M    M    M    M    E    E    E
0f  ae:66       --   --   --   --   --   --   E    M
0f  ae:f3       U    U    U    U    E    U    E    --
0f  ae:f2       --   --   --   --   --   --   U    --
0f  ba          --   --   --   --   EIb  EIb  EIb  EIb
0f  c7          --   M    --   M    M    M    E    E
0f  c7:f3       --   M    --   --   --   --   E    U
38  d8          M    M    M    M    --   --   --   --
3a  f0          UIb  --   --   --   --   --   --   --
v1  71          --   --   UIb  --   UIb  --   UIb  --
v1  72          --   --   UIb  --   UIb  --   UIb  --
v1  73          --   --   UIb  UIb  --   --   UIb  UIb
v1  ae          --   --   M    M    --   --   --   --
v2  49          E    --   --   --   --   --   --   --
v2  49:66       M    --   --   --   --   --   --   --
v2  49:f2       U    U    U    U    U    U    U    U
v2  f3          --   E    E    E    --   --   --   --
v7  f6          UIz  --   --   --   --   --   --   --
v7  f8          UIz  --   --   --   --   --   --   --
x9  01          --   E    E    E    E    E    E    E
x9  02          --   E    --   --   --   --   E    --
x9  12          U    U    --   --   --   --   --   --
xa  12          EIz  EIz  --   --   --   --   --   --
e1  71          --   --   EIb  --   EIb  --   EIb  --
e1  72          EIb  EIb  EIb  --   EIb  --   EIb  --
e1  73          --   --   EIb  EIb  --   --   EIb  EIb
e2  c6          --   S    S    --   --   S    S    --
e2  c7          --   S    S    --   --   S    S    --
"""

# Register forms (mod = 3) that modrm.rm splits further, by /reg.
REGISTER_FORMS = """
; page opcode /reg   0   1   2   3   4   5   6   7
1b  c6 /7            .   --  --  --  --  --  --  --   xabort
1b  c7 /7            .   --  --  --  --  --  --  --   xbegin
1b  d9 /2            .   --  --  --  --  --  --  --   fnop
1b  d9 /4            .   .   --  --  .   .   --  --   fchs fabs ftst fxam
1b  d9 /5            .   .   .   .   .   .   .   --   fld1 ... fldz
1b  da /4            --  --  --  --  --  --  --  --
1b  da /5            --  .   --  --  --  --  --  --   fucompp
1b  da /6            --  --  --  --  --  --  --  --
1b  da /7            --  --  --  --  --  --  --  --
1b  db /4            .   .   .   .   .   --  --  --   fnclex fninit
1b  de /3            --  .   --  --  --  --  --  --   fcompp
1b  df /4            .   --  --  --  --  --  --  --   fnstsw
0f  01 /0            .   .   .   .   .   .   .   .    vmcall ...
0f  01 /1            .   .   .   .   --  --  --  .    monitor mwait ...
0f  01:66 /1         .   .   .   .   .   .   .   .    tdcall seamcall
0f  01 /2            .   .   --  --  .   .   .   .    xgetbv xsetbv ...
0f  01 /5            .   .   .   --  .   .   .   .    serialize rdpkru ...
0f  01 /7            .   .   .   .   .   .   .   .    swapgs rdtscp ...
0f  a6 /0            .   --  --  --  --  --  --  --   montmul
0f  a6 /1            .   --  --  --  --  --  --  --   xsha1
0f  a6 /2            .   --  --  --  --  --  --  --   xsha256
0f  a7 /0            .   --  --  --  --  --  --  --   xstore
0f  a7 /1            .   --  --  --  --  --  --  --   xcryptecb
0f  a7 /2            .   --  --  --  --  --  --  --   xcryptcbc
0f  a7 /3            .   --  --  --  --  --  --  --   xcryptctr
0f  a7 /4            .   --  --  --  --  --  --  --   xcryptcfb
0f  a7 /5            .   --  --  --  --  --  --  --   xcryptofb
3a  f0 /0            .   --  --  --  --  --  --  --   hreset
v2  49 /0            .   --  --  --  --  --  --  --   tilerelease
"""

# What a vector instruction demands of VEX, EVEX and XOP fields: W, L (more
# digits: one of these), v: vvvv must be unused. A suffix narrows the row to
# a mandatory prefix. A static rounding mode (EVEX.b, registers) takes L's
# place.
LIMITS = """
; page limits  opcodes
v1  L0       12:np,16:np,12:66,16:66,c4
v1  L0,v     13,17,44,6e,7e,90-91,98-99,ae,c5,d6,f7,92-93:f2
v1  L1       41-42,45-47,4a,4b:np
v1  W0,L0,v  92-93:np,92-93:66
v1  W0,L1    4b:66
v1  v        10-11:np,51-53:np,5a:np,10-11:66,51:66,5a:66,12:f3,16:f3,12:f2
v1  v        28-29,2b-2f,50,5b,6f-70,77,7f,d7,e6-e7,f0
v2  L0       6c:np,e0-ef,f2-f3,f5-f7
v2  L0,v     41,db
v2  W0       0c-0d,2c-2f,46,50-53,cf,d2-d3,da:f3,da:f2
v2  W0,L0    48,5c,5e,6c:66,da:66,da:np
v2  W0,L0,v  49-4b
v2  W0,L1    16,36,cb
v2  W0,L1,v  19-1a,5a,cc-cd
v2  W0,v     0e-0f,13,18,58-59,72,78-79,b0-b1
v2  W1       b4-b5
v2  v        17,1c-1e,20-25,2a,30-35
v3  L0       20-22,41
v3  L0,v     14-17,30-33,60-63,df,f0
v3  W0       02,4a-4c
v3  W0,L0    de
v3  W0,L1    06,18,38,46
v3  W0,L1,v  19,39
v3  W0,v     04-05,1d
v3  W1       ce-cf
v3  W1,L1,v  00-01
v3  v        08-09
v5  W0,L0    fd
v7  W0,L0,v  f6,f8
e1  L0       c4
e1  L0,v     6e,7e,c5,d6
e1  W0       10-11:f3,51:f3,58-5a:f3,5c-5f:f3,c2:f3,14-15:np,54-59:np,5c-5f:np
e1  W0       c2:np,c6:np,62,66,6a-6b,76,d1-d2,e1,f1-f2,fa,fe
e1  W0,L0    12:np,16:np
e1  W0,L0,v  13:np,17:np
e1  W0,v     10-11:np,28-29:np,2b:np,2e-2f:np,51:np,5a:np,12:f3,16:f3,2e-2f:f3
e1  W0,v     5b:f3,70:66,e7
e1  W1       10-11:f2,51:f2,58-5a:f2,5c-5f:f2,c2:f2,14-15:66,54-59:66,5c-5f:66
e1  W1       c2:66,c6:66,6c-6d,d3-d4,f3-f4,fb
e1  W1,L0    12:66,16:66
e1  W1,L0,v  13:66,17:66
e1  W1,v     10-11:66,28-29:66,2b:66,2e-2f:66,51:66,5a:66,e6:66,12:f2,2e-2f:f2
e1  W1,v     e6:f2
e1  v        2c-2d,6f,78-7a,7f,5b:np,5b:66,7b:66,70:f3,e6:f3,70:f2
e2  L12      16,36
e2  L12,v    19-1a,5a
e2  L2,v     1b,5b,c6-c8,ca,cc
e2  W0       0c,2b,50-51,67,8f,cf,d2-d3,da,52:np,74:np,52-53:66,52:f3,72:f2
e2  W0       74:f2,9b:f2,ab:f2
e2  W0,L2    4a,6d,52-53:f2,9a:f2,aa:f2
e2  W0,v     10-12:f3,14-15:f3,20-24:f3,30-34:f3,3a:f3,72:f3,74:f3,13,18,1e,25
e2  W0,v     35,58,78-7b,2a:66
e2  W1       0d,37,70,83,b4-b5,10-12:66,28-29:66,72:66
e2  W1,v     1f,2a:f3
e2  v        1c-1d,42,44,4c,4e,54-55,59,62-63,7c,88-8b,90-93,a0-a3,c4,20-24:66
e2  v        30-34:66,28-29:f3,38-39:f3
e3  L0       20,22
e3  L0,v     14-17
e3  L12      18,23,38,43
e3  L12,v    19,39
e3  L2       1a,3a
e3  L2,v     1b,3b
e3  W0       0a:66,0f,42,c2,27:np,52-53:np,57:np,52:f2
e3  W0,L0    0a:np,21
e3  W0,L0,v  67:np
e3  W0,L2,v  07
e3  W0,v     04,08,1d,26:np,56:np,66:np,26:f2,56:f2,66:f2
e3  W1       0b,70,72,ce-cf
e3  W1,L12,v 00-01
e3  W1,v     05,09
e3  v        26:66,56:66,66-67:66
e5  L0,v     6e:66,7e:66
e5  W0       10-11,58-59,5c-5f,18:np,1b:np,1d:np,74:np,18:f2,1b:f2,74:f2,51:f3
e5  W0       5a:f3
e5  W0,L0,v  2e-2f:f3,6e:f3,7e:f3
e5  W0,v     18:f3,1b:f3,5b:f3,74:f3,1d:66,2f:66,51:66,78-7b:66,1e,68-6b,7c-7d
e5  W0,v     2e-2f:np,51:np,5a:np,78-79:np
e5  W1       5a:f2
e5  W1,v     5a:66
e5  v        2c-2d,6c-6d,6f,5b:np,5b:66,78-79:f3,7a:f2
e6  W0       13:np,2c,4d,4f,56,96-9f,a6-af,b6-bf,d6-d7
e6  W0,L0    2d,43,57
e6  W0,v     13:66,42,4c,4e
x8  L0       a3
x8  W0,L0    85-87,8e-8f,95-97,9e-9f,a6,b6,cc-cf,ec-ef
x8  W0,L0,v  c0-c3
x9  L0       01-02,90-9b
x9  L0,v     12
x9  W0,L0,v  82-83,c1-c3,c6-c7,cb,d1-d3,d6-d7,db,e1-e3
x9  W0,v     80-81
xa  L0       12
xa  L0,v     10
"""

# A lock prefix is allowed only here, on a memory operand (SDM 2A, LOCK).
LOCKABLE = """
1b  00-01,08-09,10-11,18-19,20-21,28-29,30-31,86-87  /0-7
1b  80-81,83                                         /0-6
1b  f6-f7                                            /2-3
1b  fe-ff                                            /0-1
0f  ab,b0-b1,b3,bb,c0-c1                             /0-7
0f  ba                                               /5-7
0f  c7                                               /1
"""

# Where control goes next. Whatever is not here falls through: `next`.
# trap: raises a signal that names its own address. far: leaves for another
# segment, privilege or mode, or saves its own address.
FLOWS = """
; page opcodes        flow
1b  70-7f             jcc
0f  80-8f             jcc
1b  e0-e3             loop       loopne loope loop jrcxz
1b  e9,eb             jmp
1b  e8                call
1b  c2-c3             ret
1b  ff/2              call_ind
1b  ff/4              jmp_ind
1b  c7/7              xbegin
0f  05                syscall
1b  cc-ce,f1          trap       int3 int into int1
0f  0b,b9,ff          trap       ud2 ud1 ud0
1b  f4                halt
1b  9a,ea,ca-cb,cf    far        callf jmpf retf iret
1b  ff/3,ff/5         far        callf jmpf
0f  07,34-35,aa       far        sysret sysenter sysexit rsm
0f  01=d7             far        enclu saves where to come back to
0f  01=ca:f3,01=ca:f2 far        eretu erets
0f  01=ec:f3          far        uiret
"""

# What an instruction does to general registers and flags, for liveness. The
# registers of a memory operand are read besides. An instruction without a
# row reads everything. Letters, SDM 3.1.1.3:
#     E G  modrm.rm if a register, modrm.reg   B H  the same as byte registers
#     O V  register in the opcode, VEX.vvvv    a c d b s p S D  rax ... rdi
#     !    the operand is not accessed, nor its address computed
#     flags c p a z s o; cc those of the condition; all; all? unless the
#     shift count is zero. A flag left undefined by and, or, xor, test and
#     shifts counts as written.
EFFECTS = """
; page opcodes               reads writes flags read, written
1b  00,02,08,0a,20,22,28,2a  BH    -      -     all
1b  30,32,38,3a,84           BH    -      -     all
1b  01,09,21,29,31           EG    E      -     all
1b  03,0b,23,2b,33           EG    G      -     all
1b  04,0c,24,2c,34,3c-3d     a     -      -     all
1b  05,0d,25,2d,35           a     a      -     all
1b  a8-a9                    a     -      -     all
1b  10,12,18,1a              BH    -      c     all
1b  11,19                    EG    E      c     all
1b  13,1b                    EG    G      c     all
1b  14,1c                    a     -      c     all
1b  15,1d                    a     a      c     all
1b  39,3b,85                 EG    -      -     all
1b  50-57                    Os    s      -     -      push
1b  58-5f                    s     Os     -     -      pop
1b  63                       E     G      -     -      movsxd
1b  68,6a                    s     s      -     -      push
1b  69,6b                    E     G      -     co     imul
1b  70-7f                    -     -      cc    -      jcc
1b  80/0-1,80/4-7            B     -      -     all
1b  80/2-3                   B     -      c     all
1b  81/0-1,81/4-6            E     E      -     all
1b  83/0-1,83/4-6            E     E      -     all
1b  81/2-3,83/2-3            E     E      c     all
1b  81/7,83/7                E     -      -     all    cmp
1b  86                       BH    -      -     -      xchg
1b  87                       EG    EG     -     -
1b  88                       H     -      -     -      mov
1b  89                       G     E      -     -
1b  8a                       B     -      -     -
1b  8b                       E     G      -     -
1b  8c                       -     -      -     -
1b  8d                       -     G      -     -      lea
1b  8f                       s     Es     -     -      pop
1b  90                       -     -      -     -      nop pause
1b  91-97                    Oa    Oa     -     -      xchg
1b  98                       a     a      -     -      cwde cdqe
1b  99                       a     d      -     -      cdq cqo
1b  9b                       -     -      -     -      fwait
1b  9c                       s     s      all   -      pushf
1b  9d                       s     s      -     all    popf
1b  9e                       a     -      -     cpazs  sahf
1b  9f                       -     -      cpazs -      lahf
1b  a0                       -     -      -     -
1b  a1                       -     a      -     -
1b  a2-a3                    a     -      -     -
1b  a4-a7                    cSD   -      -     -      movs cmps
1b  aa-ab,ae-af              acD   -      -     -      stos scas
1b  ac-ad                    acS   -      -     -      lods
1b  b0-b7                    -     -      -     -
1b  b8-bf                    -     O      -     -
1b  c0/0-1                   B     -      -     -      rol ror
1b  c0/4-7                   B     -      -     all?   shl shr sar
1b  c1/0-1                   E     E      -     -
1b  c1/2-3                   E     E      c     -      rcl rcr
1b  c1/4-7                   E     E      -     all?
1b  c6/0                     -     -      -     -
1b  c7/0                     -     E      -     -
1b  c9                       p     sp     -     -      leave
1b  d0/0-1                   B     -      -     -
1b  d0/4-7                   B     -      -     all
1b  d1/0-1                   E     E      -     -
1b  d1/2-3                   E     E      c     -
1b  d1/4-7                   E     E      -     all
1b  d2/0-1,d2/4-7            Bc    -      -     -
1b  d3/0-1,d3/4-7            Ec    E      -     -
1b  d3/2-3                   Ec    E      c     -
1b  d8-d9,dc-df              -     -      -     -      x87
1b  da-db                    -     -      cpz   -      fcmov
1b  e0-e1                    c     -      z     -      loopcc
1b  e2-e3                    c     -      -     -      loop jrcxz
1b  e9,eb                    -     -      -     -      jmp
1b  f5                       -     -      c     c      cmc
1b  f8-f9                    -     -      -     c      clc stc
1b  fc-fd                    -     -      -     -      cld std
1b  f6/0-1,f6/3              B     -      -     all    test neg
1b  f6/2                     B     -      -     -      not
1b  f6/4-7                   aB    -      -     -      mul div
1b  f7/0-1                   E     -      -     all
1b  f7/2                     E     E      -     -
1b  f7/3                     E     E      -     all
1b  f7/4-5                   aE    ad     -     co
1b  f7/6-7                   adE   ad     -     -
1b  fe/0-1                   B     -      -     pazso  inc dec
1b  ff/0-1                   E     E      -     pazso
1b  ff/6                     Es    s      -     -      push
0f  0d,18                    -     -      -     -      prefetch
0f  19-1f                    !     -      -     -      endbr nop
0f  10-17,28-29,2b,51-6d     -     -      -     -      sse
0f  2a,6e,c4                 E     -      -     -      cvtsi2ss movd
0f  2c,2d                    -     -      -     -      cvtss2si
0f  2c:f3,2c:f2              -     G      -     -
0f  2d:f3,2d:f2              -     G      -     -
0f  2e-2f                    -     -      -     all    ucomiss
0f  31                       -     ad     -     -      rdtsc
0f  40-4f                    EG    G      cc    -      cmov
0f  50,c5,d7                 -     G      -     -      movmskps pextrw
0f  6f-77,7c-7f              -     -      -     -
0f  80-8f                    -     -      cc    -      jcc
0f  90-9f                    -     -      cc    -      setcc
0f  a2                       ac    acdb   -     -      cpuid
0f  a3                       EG    -      -     c      bt
0f  ab,b3,bb                 EG    E      -     c      bts btr btc
0f  a4,ac                    EG    E      -     all?   shld shrd
0f  a5,ad                    EGc   E      -     -
0f  ae                       Ead   -      -     -      fences xsave
0f  af                       EG    G      -     co     imul
0f  b0                       aBH   -      -     all    cmpxchg
0f  b1                       aEG   -      -     all
0f  b6,be                    B     G      -     -      movzx movsx
0f  b7,bf                    E     G      -     -
0f  b8                       E     G      -     all    popcnt
0f  ba/4                     E     -      -     c
0f  ba/5-7                   E     E      -     c
0f  bc-bd                    EG    -      -     z      bsf bsr
0f  c0                       BH    -      -     all    xadd
0f  c1                       EG    EG     -     all
0f  c2,c6,d0-d6,d8-f6,f8-fe  -     -      -     -      sse
0f  f7                       D     -      -     -      maskmovq
0f  c3                       G     -      -     -      movnti
0f  c7/1                     acdb  -      -     z      cmpxchg16b
0f  c8-cf                    O     O      -     -      bswap
38  00-15,1c-41,c8-df        -     -      -     -
38  17                       -     -      -     all    ptest
38  f0                       BEG   -      -     -      movbe crc32
38  f1                       EG    -      -     -
38  f6                       EG    -      co    -      adcx adox
3a  08-17,21,40-44,cc-df     -     -      -     -
3a  20,22                    E     -      -     -      pinsr
3a  60                       ad    -      -     all    pcmpestrm
3a  61                       ad    c      -     all    pcmpestri
3a  62                       -     -      -     all    pcmpistrm
3a  63                       -     c      -     all    pcmpistri
v1  10-17,28-29,2b,41-4b     -     -      -     -
v1  2a,6e,92,c4              E     -      -     -
v1  2c-2d,50,93,c5,d7        -     G      -     -
v1  2e-2f,98-99              -     -      -     all
v1  51-6d,6f-91,ae,c2,c6     -     -      -     -
v1  d0-d6,d8-f6,f8-fe        -     -      -     -
v1  f7                       D     -      -     -
v2  00-0d,13,16,18-41        -     -      -     -
v2  0e-0f,17                 -     -      -     all    vtestps vptest
v2  45-47,50-5b,72-df        -     -      -     -
v2  f2                       EV    G      -     czso   andn
v2  f3                       E     V      -     czso   blsr
v2  f5,f7                    EV    G      -     -      bzhi pdep sarx
v2  f6                       dE    GV     -     -      mulx
v3  00-1d,21,30-5f,68-df     -     -      -     -
v3  20,22                    E     -      -     -
v3  60                       ad    -      -     all
v3  61                       ad    c      -     all
v3  62                       -     -      -     all
v3  63                       -     c      -     all
v3  f0                       E     G      -     -      rorx
e1  10-17,28-29,2b-2d,51-6d  -     -      -     -
e1  2a,6e,7b,c4              E     -      -     -
e1  2e-2f                    -     -      -     all
e1  6f-7a,7e-7f,c2,c5-fe     -     -      -     -
e2  00-79,7d-df              -     -      -     -
e2  7a-7c                    E     -      -     -      vpbroadcastb
e3  00-1f,21,23-cf           -     -      -     -
e3  20,22                    E     -      -     -
e5  10-1e,2c-2d,51-6d,6f-7a  -     -      -     -
e5  2a,6e,7b                 E     -      -     -
e5  2e-2f                    -     -      -     all
e5  7c-7e                    -     -      -     -
e6  13-d7                    -     -      -     -
x8  85-ef                    -     -      -     -
x9  80-e3                    -     -      -     -
"""

NEXT, JCC, LOOP, JMP, CALL, RET = "next", "jcc", "loop", "jmp", "call", "ret"
JMP_IND, CALL_IND, XBEGIN = "jmp_ind", "call_ind", "xbegin"
SYSCALL, TRAP, HALT, FAR = "syscall", "trap", "halt", "far"

# A map's number, the high byte of Insn.opcode: legacy 0x00-0x03, VEX 0x10 +
# map, EVEX 0x20 + map, XOP 0x30 + map.
MAP_NUMBERS = {"1b": 0x00, "0f": 0x01, "38": 0x02, "3a": 0x03,
               "v1": 0x11, "v2": 0x12, "v3": 0x13, "v5": 0x15, "v7": 0x17,
               "e1": 0x21, "e2": 0x22, "e3": 0x23, "e5": 0x25, "e6": 0x26,
               "x8": 0x38, "x9": 0x39, "xa": 0x3a, "3d": 0x0f}
MAP_NAMES = {number: name for name, number in MAP_NUMBERS.items()}
MANDATORY = {"np": 0, "66": 1, "f3": 2, "f2": 3}       # VEX.pp, SDM 2.3.6.1


def _lines(text):
    """The rows of a table: lists of words, comments and blanks left out."""
    rows = (line.split(";")[0].split() for line in text.splitlines())
    return [row for row in rows if row]


def _numbers(text, base=16):
    """`10-12,14` -> [0x10, 0x11, 0x12, 0x14]."""
    numbers = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        numbers.extend(range(int(first, base), int(last or first, base) + 1))
    return numbers


def opcode_page(text):
    """Parse a page into 256 cells. Raises ValueError naming a bad row."""
    cells = []
    for label, *row in _lines(text):
        rows = _numbers(label)
        if len(row) != 16 or rows[0] * 16 != len(cells):
            raise ValueError("opcode map row %s has %d cells, not 16, or is "
                             "out of order" % (label, len(row)))
        cells += row * len(rows)
    if len(cells) != 256:
        raise ValueError("opcode map has %d cells, not 256" % len(cells))
    return tuple(cells)


class _ByMap(dict):
    """{map number: its part of a table}, each parsed when first asked for.

    Most programs need two maps of the eighteen, and every command waits for
    what is parsed. Two threads may parse a part at once: both get the same.
    """

    def __init__(self, parse):
        super().__init__()
        self.parse = parse

    def __missing__(self, number):
        part = self[number] = self.parse(MAP_NAMES[number])
        return part


def _rows(text, name):
    """(256 * its number, its rows) of the map of that name, in a table."""
    return MAP_NUMBERS[name] << 8, [
        row[1:] for row in _lines(text) if row[0] == name]


_PAGES = _ByMap(lambda name: opcode_page(PAGES[name]))


def _parse_prefixed(name):
    """{opcode: cells for no prefix, 66, f3, f2} for opcodes with a row."""
    table, cell_of = {}, _PAGES[MAP_NUMBERS[name]]
    number, rows = _rows(PREFIXED, name)
    for opcodes, *cells in rows:
        if len(cells) != 4:
            raise ValueError("prefix row %s %s" % (name, opcodes))
        every = opcodes == "*"
        for byte in range(256) if every else _numbers(opcodes):
            if cell_of[byte] == "--" and not every:
                raise ValueError("%s %02x is undefined" % (name, byte))
            if cell_of[byte] == "--" or (every and number | byte in table):
                continue
            if number | byte in table:
                raise ValueError("%s %02x has two rows" % (name, byte))
            table[number | byte] = tuple(cell_of[byte] if cell == "=" else
                                         cell for cell in cells)
    return table


def _parse_groups(name):
    """{opcode, or (opcode, pp): cells by modrm.reg}."""
    table, cell_of = {}, _PAGES[MAP_NUMBERS[name]]
    number, rows = _rows(GROUPS, name)
    for opcode, *cells in rows:
        opcode, _, prefix = opcode.partition(":")
        for byte in _numbers(opcode):
            if len(cells) != 8 or cell_of[byte] == "--":
                raise ValueError("group %s %s" % (name, opcode))
            table[(number | byte, MANDATORY[prefix]) if prefix else
                  number | byte] = cells
    return table


def _parse_register_forms(name):
    """{(opcode, pp, reg): which rm are defined where mod = 3}."""
    table = {}
    number, rows = _rows(REGISTER_FORMS, name)
    for opcode, reg, *cells in rows:
        byte, _, prefix = opcode.partition(":")
        if len(cells) < 8 or set(cells[:8]) - {".", "--"}:
            raise ValueError("register forms %s %s %s" % (name, opcode, reg))
        for pp in [MANDATORY[prefix]] if prefix else range(4):
            table[number | int(byte, 16), pp, int(reg[1:])] = tuple(
                cell == "." for cell in cells[:8])
    return table


def _parse_limits(name):
    """{(opcode, pp): (W or None, the L allowed, is vvvv unused)}."""
    table, cell_of = {}, _PAGES[MAP_NUMBERS[name]]
    number, rows = _rows(LIMITS, name)
    for limits, opcodes in rows:
        fields = limits.split(",")
        w = {"W0": 0, "W1": 8}.get(fields[0])
        lengths = [int(digit) for field in fields if field[0] == "L"
                   for digit in field[1:]]
        value = w, lengths or (0, 1, 2), "v" in fields
        for item in opcodes.split(","):
            numbers, _, prefix = item.partition(":")
            for byte in _numbers(numbers):
                if cell_of[byte] == "--":
                    raise ValueError("limits %s %02x" % (name, byte))
                for pp in [MANDATORY[prefix]] if prefix else range(4):
                    table[number | byte, pp] = value
    return table


def _parse_lockable(name):
    """The set of (opcode, reg) that a lock prefix may precede."""
    number, rows = _rows(LOCKABLE, name)
    return {(number | byte, reg) for opcodes, regs in rows
            for byte in _numbers(opcodes) for reg in _numbers(regs[1:])}


def _parse_flows(name):
    """{opcode, (opcode, "/", reg) or (opcode, "=", modrm, pp): flow}."""
    table = {}
    number, rows = _rows(FLOWS, name)
    for opcodes, flow, *_ in rows:
        for item in opcodes.split(","):
            if "/" in item:
                byte, reg = item.split("/")
                table[number | int(byte, 16), "/", int(reg)] = flow
            elif "=" in item:
                byte, _, form = item.partition("=")
                modrm, _, prefix = form.partition(":")
                table[number | int(byte, 16), "=", int(modrm, 16),
                      MANDATORY.get(prefix, 0)] = flow
            else:
                table.update((number | byte, flow) for byte in _numbers(item))
    return table


def _parse_effects(name):
    """{opcode, (opcode, "/", reg) or (opcode, pp): its four words}."""
    table = {}
    number, rows = _rows(EFFECTS, name)
    for opcodes, *words in rows:
        row = tuple(words[:4])
        for item in opcodes.split(","):
            bytes_, _, regs = item.partition("/")
            bytes_, _, prefix = bytes_.partition(":")
            for byte in _numbers(bytes_):
                if regs:
                    table.update(((number | byte, "/", reg), row)
                                 for reg in _numbers(regs))
                elif prefix:
                    table[number | byte, MANDATORY[prefix]] = row
                else:
                    table[number | byte] = row
    return table


def _parse_told_by_rm(name):
    """The set of opcodes of which modrm.rm tells register forms apart."""
    number = MAP_NUMBERS[name]
    return {key[0] for key in [*_REGISTER_FORMS[number], *(
        key for key in _FLOWS[number]
        if isinstance(key, tuple) and key[1] == "=")]}


_PREFIXED = _ByMap(_parse_prefixed)
_GROUPS = _ByMap(_parse_groups)
_REGISTER_FORMS = _ByMap(_parse_register_forms)
_LIMITS = _ByMap(_parse_limits)
_LOCKABLE = _ByMap(_parse_lockable)
_FLOWS = _ByMap(_parse_flows)
_TOLD_BY_RM = _ByMap(_parse_told_by_rm)
_EFFECTS = _ByMap(_parse_effects)
_IN_32_BIT = {byte: cell for opcodes, cell in _lines(IN_32_BIT)
              for byte in _numbers(opcodes)}


# ---- 3  Decoder -----------------------------------------------------------
#
# Problem: whole libraries are decoded before a byte of one is patched, in
# pure Python. One idea: an instruction's *head* (prefixes, opcode, modrm,
# sib) settles all but the values of its displacement and immediate, and few
# heads make up a program. A head is decoded once, by the tables above, into a
# Form; Forms hang in a trie of dicts, keyed by the first two bytes, then by
# one byte each, and an Insn is a Form at a vaddr. What begins with its size
# is a Form; (0, dict) leads on. Invariant: the trie only remembers; it never
# decides.

# Form.prefixes: which prefixes stand before the opcode.
O16, A32, LOCK, REPZ, REPNZ, CS, SEGMENT = 1, 2, 4, 8, 16, 32, 64
_PREFIX_BITS = {0x66: O16, 0x67: A32, 0xf0: LOCK, 0xf3: REPZ, 0xf2: REPNZ,
                0x2e: CS, 0x26: SEGMENT, 0x36: SEGMENT, 0x3e: SEGMENT,
                0x64: SEGMENT, 0x65: SEGMENT}
_TARGET, _RIP = 1, 2                          # Form.aim
_INT32 = struct.Struct("<i").unpack_from
_INT64 = struct.Struct("<q").unpack_from
_UINT32 = struct.Struct("<I").unpack_from
_MAX_FORMS = 1 << 16                          # or hostile code fills memory
_SIZE_OF = operator.itemgetter(0)             # of a Form
_new = tuple.__new__                          # of one: half of its own time

# What follows modrm under 32- or 64-bit addressing, SDM table 2-2: whether a
# sib byte, and the size of the displacement but for sib.base = 5.
_MODRM = [(modrm < 0xc0 and modrm & 7 == 4,
           (4 if modrm & 7 == 5 else 0, 1, 4, 0)[modrm >> 6])
          for modrm in range(256)]
# The same under 16-bit addressing, SDM table 2-1.
_MODRM_16 = [(False, (2 if modrm & 7 == 6 else 0, 1, 2, 0)[modrm >> 6])
             for modrm in range(256)]


class Form(NamedTuple):
    """All that an instruction's head settles. Offsets count from its start."""
    size: int            # bytes
    flow: str            # one of NEXT JCC ... FAR
    aim: int             # 0, or which of target, rip_relative follows from
    aim_offset: int      # the signed displacement here,
    aim_size: int        # of so many bytes
    opcode: int          # map number << 8 | byte
    opcode_offset: int   # of the first byte behind the legacy and REX prefixes
    prefixes: int        # O16 | A32 | LOCK | REPZ | REPNZ | CS | SEGMENT
    pp: int              # mandatory prefix: 0 none, 1 66, 2 f3, 3 f2
    rex: int             # W R X B in bits 3-0, of VEX, EVEX and XOP too
    vvvv: int            # VEX.vvvv as a register number
    modrm: int           # or -1
    sib: int             # or -1
    disp_offset: int
    disp_size: int       # 0: none
    imm_offset: int
    imm_size: int        # 0: none
    bits: int            # 64 or 32
    mark: tuple          # what an Analysis looks at, or (): see _mark_of


class Insn(NamedTuple):
    """One instruction. Fields of its Form can be read from it as well."""
    vaddr: int
    size: int
    code: bytes
    flow: str
    target: Optional[int]            # vaddr a direct branch goes to
    rip_relative: Optional[int]      # vaddr of a rip-relative operand
    form: Form

    def __getattr__(self, name):
        return getattr(self.form, name)


def _undefined(code, size, vaddr, why="no such instruction in the tables"):
    return DecodeError("%s: %s" % (code[:size].hex(), why), vaddr)


def _read_prefixes(code, bits):
    """(offset behind the prefixes, prefix bits, REX, last of f2 and f3)."""
    at, prefixes, rex, rep = 0, 0, 0, 0
    while True:
        byte = code[at]
        bit = _PREFIX_BITS.get(byte)
        if bit:
            prefixes, rex = prefixes | bit, 0
            if bit in (REPZ, REPNZ):
                rep = bit
        elif bits == 64 and byte >> 4 == 4:
            rex = byte                        # only the last REX counts
        else:
            return at, prefixes, rex, rep
        at += 1


class _Opcode(NamedTuple):
    """What stands before modrm."""
    number: int          # opcode: map number << 8 | byte
    start: int           # offset behind the legacy and REX prefixes
    end: int             # offset behind the opcode
    prefixes: int
    pp: int
    rex: int
    vvvv: int = 0
    length: int = 0      # VEX.L, EVEX.L'L
    is_static: bool = False                   # EVEX.b: L'L may be a rounding


def _read_vector_prefix(code, at, cell):
    """VEX, EVEX and XOP: (map, size, pp, WRXB, vvvv, L, EVEX.b).

    SDM 2.3.5 (VEX), 2.7.1 (EVEX), APM 1.8 (XOP). Fields are stored inverted.
    Returns None where a reserved bit is set, as APX does.
    """
    first, second = code[at + 1], code[at + 2]
    if cell == "vx2":
        return (0x11, 2, first & 3, ~first >> 5 & 4, ~first >> 3 & 15,
                first >> 2 & 1, 0)
    rex = second >> 4 & 8 | ~first >> 5 & 7
    vvvv = ~second >> 3 & 15
    if cell == "evx":
        third = code[at + 3]
        if first & 8 or not second & 4 or third & 0x87 == 0x80:
            return None                       # APX, or zeroing by no mask
        return (0x20 | first & 7, 4, second & 3, rex, vvvv,
                third >> 5 & 3, third >> 4 & 1)
    number = {"vx3": 0x10, "xop": 0x30}[cell] + (first & 0x1f)
    return number, 3, second & 3, rex, vvvv, second >> 2 & 1, 0


_VECTOR_PREFIXES = frozenset(("evx", "vx3", "vx2", "xop"))


def _is_vector_prefix(cell, after, bits):
    """Does a cell of the one-byte page begin VEX, EVEX or XOP here?"""
    if cell == "xop":
        return after & 0x1f >= 8
    return cell in ("evx", "vx2", "vx3") and (bits == 64 or after >= 0xc0)


def _read_opcode(code, bits):
    """All up to the opcode. -> _Opcode, or None if prefixes do not agree."""
    start, prefixes, rex, rep = _read_prefixes(code, bits)
    cell, at, number = _PAGES[0][code[start]], start, 0
    if cell == "esc":
        at, number = start + 1, 1
        if _PAGES[1][code[at]] == "esc":
            number = 2 if code[at] == 0x38 else 3
            at += 1
    elif cell in _VECTOR_PREFIXES and _is_vector_prefix(
            cell, code[start + 1], bits):
        vector = _read_vector_prefix(code, start, cell)
        if (rex or prefixes & (O16 | LOCK | REPZ | REPNZ) or vector is None
                or vector[0] not in MAP_NAMES):
            return None
        number, size, pp, rex, vvvv, length, static = vector
        if bits == 32:                        # there are eight registers
            if cell == "evx" and not code[start + 3] & 8:
                return None
            rex, vvvv = rex & 8, vvvv & 7
        at = start + size
        return _Opcode(number << 8 | code[at], start, at + 1, prefixes, pp,
                       rex, vvvv, length, static == 1)
    pp = 2 if rep == REPZ else 3 if rep else 1 if prefixes & O16 else 0
    return _Opcode(number << 8 | code[at], start, at + 1, prefixes, pp,
                   rex & 15)


def _cell_of(opcode, pp, modrm, bits):
    """What follows an opcode, asked of every table. `--`: undefined."""
    number = opcode >> 8
    cell = _PAGES[number][opcode & 0xff]
    if not number:
        if bits == 32:
            cell = _IN_32_BIT.get(opcode, cell)
        if cell == "xop":
            cell = "E"
    row = _PREFIXED[number].get(opcode)
    cell = row[pp] if row else cell
    if cell[0] not in "EMUSR" or modrm < 0:
        return cell
    reg = modrm >> 3 & 7
    groups = _GROUPS[number]
    group = groups.get((opcode, pp)) or groups.get(opcode)
    cell = group[reg] if group else cell
    if modrm >= 0xc0:
        forms = _REGISTER_FORMS[number].get((opcode, pp, reg))
        if cell[0] in "MS" or forms and not forms[modrm & 7]:
            return "--"
    elif cell[0] == "U" or cell[0] == "S" and modrm & 7 != 4:
        return "--"
    return cell


_VALUE_SIZES = {"": 0, ".": 0, "Ib": 1, "Jb": 1, "Iw": 2, "Ibb": 2, "Iwb": 3,
                "3dn": 1}


def _value_size(kind, opcode, prefixes, rex, bits):
    """Bytes of the immediate, branch displacement or offset of a cell."""
    if kind in ("Iz", "Jz", "Iv"):
        if rex & 8:
            return 8 if kind == "Iv" else 4
        return 2 if prefixes & O16 and opcode < 0x400 else 4
    if kind == "O":
        return bits // 8 if not prefixes & A32 else bits // 16
    if kind == "Ap":
        return 4 if prefixes & O16 else 6
    return _VALUE_SIZES[kind]


def _flow_of(opcode, modrm, pp):
    flows = _FLOWS[opcode >> 8]
    return (flows.get(opcode)
            or modrm >= 0 and (flows.get((opcode, "/", modrm >> 3 & 7))
                               or flows.get((opcode, "=", modrm, pp)))
            or NEXT)


def _read_operand(code, at, is_16_bit):
    """modrm at code[at]: (sib or -1, displacement's offset and size)."""
    modrm = code[at]
    has_sib, disp_size = (_MODRM_16 if is_16_bit else _MODRM)[modrm]
    if not has_sib:
        return -1, at + 1, disp_size
    sib = code[at + 1]
    if modrm < 0x40 and sib & 7 == 5:
        disp_size = 4
    return sib, at + 2, disp_size


def _read_form(code, vaddr, bits):
    """(Form, size of the head) of the instruction that code starts with.

    Raises DecodeError, or IndexError where code ends before the head does.
    """
    head = _read_opcode(code, bits)
    if head is None:
        raise _undefined(code, 4, vaddr, "prefixes that do not go together")
    opcode, start, at, prefixes, pp, rex, vvvv = head[:7]
    cell = _cell_of(opcode, pp, -1, bits)
    modrm, sib, disp_size, has_modrm = -1, -1, 0, cell[0] in "EMUSR3"
    disp_offset = at
    if has_modrm:
        modrm, disp_offset = code[at], at + 1
        cell = _cell_of(opcode, pp, modrm, bits)
        if cell[0] != "R":
            sib, disp_offset, disp_size = _read_operand(
                code, at, bits == 32 and prefixes & A32)
    kind = cell[1:] if has_modrm and cell != "3dn" else cell
    if cell == "--" or kind[:1].islower() and kind != "3dn":
        raise _undefined(code, disp_offset, vaddr)
    size, head_size = _value_size(kind, opcode, prefixes, rex,
                                  bits), disp_offset
    if kind == "O":
        disp_size, size = size, 0
    flow = _flow_of(opcode, modrm, pp)
    why = _disagreement(head, modrm, flow, bits)
    if why:
        raise _undefined(code, disp_offset, vaddr, why)
    imm_offset = disp_offset + disp_size
    aim = aim_offset = aim_size = 0
    if kind[:1] == "J":
        aim, aim_offset, aim_size = _TARGET, imm_offset, size
    elif bits == 64 and modrm & 0xc7 == 5 and cell[0] != "R":
        aim, aim_offset, aim_size = _RIP, disp_offset, 4
    return _new(Form, (
        imm_offset + size, flow, aim, aim_offset, aim_size, opcode, start,
        prefixes, pp, rex, vvvv, modrm, sib, disp_offset if disp_size else 0,
        disp_size, imm_offset if size else 0, size, bits, _mark_of(
            imm_offset + size, flow, aim, aim_offset, aim_size, opcode)
    )), head_size


_JUMPS, _CALLS, _READS, _TAKES = range(4)     # what a mark says is done


def _mark_of(size, flow, aim, offset, width, opcode):
    """(width of the displacement or 0 for an indirect jump, its offset, the
    size of all, what is done) of what has an aim or jumps indirectly."""
    if flow == JMP_IND:
        return 0, offset, size, _READS
    what = (_READS + (opcode == 0x8d) if aim == _RIP       # lea
            else _CALLS if flow == CALL else _JUMPS)
    return (width, offset, size, what) if aim else ()


def _disagreement(head, modrm, flow, bits):
    """Why these prefixes cannot stand before this opcode, or None."""
    if head.prefixes & LOCK and (modrm >= 0xc0 or (
            head.number, modrm >> 3 & 7) not in _LOCKABLE[head.number >> 8]):
        return "lock prefix not allowed here"
    if bits != 64:
        return None
    if (head.prefixes & O16 and not head.rex & 8
            and flow in (JCC, LOOP, JMP, CALL, RET, JMP_IND, CALL_IND,
                         XBEGIN)):
        return ("66 before a near branch: Intel ignores it, AMD truncates "
                "rip to 16 bits")
    if head.number >= 0x1000:
        w, lengths, is_vvvv_unused = _LIMITS[head.number >> 8].get(
            (head.number, head.pp), (None, (0, 1, 2), False))
        if w not in (None, head.rex & 8):
            return "W must be %d" % (w >> 3)
        if is_vvvv_unused and head.vvvv:
            return "vvvv must not be used"
        if head.length not in lengths and not (head.is_static
                                                 and modrm >= 0xc0):
            return "no such vector length"
    return None


_TRIES = {64: {}, 32: {}}
_N_FORMS = collections.Counter()

# All in front of modrm is the *stem*. Heads of one stem that differ only in
# which registers modrm.rm and sib name have Forms that differ in no more:
# {(stem, mod and reg, is there a sib, size of the displacement): what
# _read_form returned for the first of them}.
_ALIKE = {}
_STEM = re.compile(rb"[%s]*[\x40-\x4f]?(?:\x0f[\x38\x3a]?)?." % b"".join(
    re.escape(bytes((byte,))) for byte in sorted(_PREFIX_BITS)), re.DOTALL)
_MODRM_AT = Form._fields.index("modrm")
assert Form._fields[_MODRM_AT + 1] == "sib"
assert Form._fields[18] == "mark"             # as a literal in _walk


def _read_alike(code, vaddr):
    """Return what _read_form does for 64 bits, but by the tables only for
    the first of those that are alike.

    What the bytes look like is not trusted: a Form is kept if the tables
    found modrm and sib of a legacy opcode where they were looked for here,
    and nothing of it hangs on modrm.rm itself.
    """
    padded = code + b"\0\0"          # one that ends within it is told by size
    stem = _STEM.match(padded).group()
    head, modrm = len(stem) + 1, padded[len(stem)]
    has_sib, disp_size = _MODRM[modrm]
    sib = padded[head] if has_sib else -1
    if has_sib:
        head, disp_size = head + 1, (
            4 if modrm < 0x40 and sib & 7 == 5 else disp_size)
    key = stem, modrm >> 3, has_sib, disp_size
    known = _ALIKE.get(key)
    if known is None:
        form, size = known = _read_form(code, vaddr, 64)
        number = form.opcode >> 8
        if ((size, modrm, sib) == (head, form.modrm, form.sib)
                and number < 4 and (modrm < 0xc0 or form.opcode
                                    not in _TOLD_BY_RM[number])):
            _ALIKE[key] = known
        return known
    form = known[0]
    return _new(Form, form[:_MODRM_AT] + (modrm, sib)
                + form[_MODRM_AT + 2:]), head


def _learn(code, pos, vaddr, bits):
    """Decode the head at pos by the tables and remember its Form."""
    code = code[pos:pos + 15]
    try:
        form, head = (_read_alike(code, vaddr) if bits == 64
                      else _read_form(code, vaddr, bits))
    except IndexError:
        form, head = None, 0
    if form is None or form.size > len(code):
        raise _undefined(code, 15, vaddr, "longer than 15 bytes"
                         if len(code) == 15 else "the bytes end within it")
    if form.opcode == 0x10f:                  # its suffix is behind the head
        if _PAGES[0x0f][code[form.imm_offset]] == "--":
            raise _undefined(code, form.size, vaddr)
        return form
    trie = _TRIES[bits]
    if _N_FORMS[bits] >= _MAX_FORMS:
        trie.clear()
        _ALIKE.clear()
        _N_FORMS[bits] = 0
    _N_FORMS[bits] += 1
    first = code[0]
    if head == 1:                             # whatever is behind it
        trie.update(dict.fromkeys(range(first, first + 0x10000, 0x100),
                                  form))
    elif head == 2:
        trie[first | code[1] << 8] = form
    else:
        node = trie.setdefault(first | code[1] << 8, (0, {}))[1]
        for byte in code[2:head - 1]:
            node = node.setdefault(byte, (0, {}))[1]
        node[code[head - 1]] = form
    return form


def _pairs(code):
    """Return an array of each byte of code with the next one, or with 0."""
    pairs = bytearray(2 * len(code))
    pairs[::2], pairs[1::2] = code, code[1:] + b"\0"[:len(code)]
    return array.array("H", bytes(pairs))


def _walk(code, vaddr, bits=64):
    """Return the Forms of all instructions of code, from end to end, and
    [(offset, mark)] of those that have a mark.

    Raises DecodeError at the first byte that begins none.
    """
    forms, marks, pos, end, trie = [], [], 0, len(code), _TRIES[bits]
    add, note, pairs = forms.append, marks.append, _pairs(code)
    while pos < end:                # each name that is local here saves time
        try:
            form = trie[pairs[pos]]
            size = form[0]
            if not size:            # its size shows a Form
                form = form[1][code[pos + 2]]
                size, at = form[0], pos + 3
                while not size:
                    form = form[1][code[at]]
                    size = form[0]
                    at += 1
        except (KeyError, IndexError):
            form = _learn(code, pos, vaddr + pos, bits)
            size = form[0]
        add(form)
        if form[18]:
            note((pos, form[18]))
        pos += size
    if pos > end:
        pos -= size
        raise _undefined(code[pos:], 15, vaddr + pos,
                         "the bytes end within it")
    return forms, marks


def _starts(forms, vaddr):
    """Yield where each of forms begins, and where the last one ends, if
    the first is at vaddr."""
    return itertools.accumulate(itertools.chain(
        (vaddr,), map(_SIZE_OF, forms)))


def sweep(code, vaddr, bits=64):
    """Yield (offset, Form) of each instruction, one behind the other.

    Raises DecodeError if there is a byte that begins none.
    """
    forms, _ = _walk(code, vaddr, bits)
    return zip(_starts(forms, 0), forms)


def aim(form, code, pos, vaddr):
    """(target, rip_relative) of the form that stands at code[pos], vaddr."""
    kind, start, width = form[2], pos + form[3], form[4]
    if not kind:
        return None, None
    value = vaddr + form[0] + (
        _INT32(code, start)[0] if width == 4 else int.from_bytes(
            code[start:start + width], "little", signed=True))
    narrow = form.bits == 32 or kind == _RIP and form.prefixes & A32
    value &= 0xffffffff if narrow else 0xffffffffffffffff
    return (value, None) if kind == _TARGET else (None, value)


def decode(code, vaddr, bits=64):
    """Return the Insn that code starts with; more bytes may follow.

    code   bytes; 15 always suffice (SDM 2.3.11)
    bits   64, or 32 for compatibility and protected mode
    Raises DecodeError for what the tables do not define, and where code ends.
    """
    code, at = bytes(code[:15]), 2
    if not code:
        raise DecodeError("no bytes", vaddr)
    try:
        form = _TRIES[bits][int.from_bytes(code[:2], "little")]
        while not form[0]:
            form = form[1][code[at]]
            at += 1
    except (KeyError, IndexError):
        form = _learn(code, 0, vaddr, bits)
    if form.size > len(code):
        raise _undefined(code, 15, vaddr, "the bytes end within it")
    return Insn(vaddr, form.size, code[:form.size], form.flow,
                *aim(form, code, 0, vaddr), form)


def decode_all(code, vaddr, bits=64):
    """Return the Insns of code, to its end. Raises DecodeError."""
    code, insns = bytes(code), []
    add, new = insns.append, _new
    for pos, form in sweep(code, vaddr, bits):
        size, here = form[0], vaddr + pos
        target, rip_relative = (aim(form, code, pos, here) if form[2]
                                else (None, None))
        add(new(Insn, (here, size, code[pos:pos + size], form[1], target,
                       rip_relative, form)))
    return insns


class Effects(NamedTuple):
    """What an instruction does. Register masks: bit n is register n."""
    reads: int           # GPRs that it may read, also as part of an address
    writes: int          # GPRs that it surely overwrites, all 64 bits
    flags_read: int      # of CF PF AF ZF SF OF, at their places in rflags
    flags_written: int   # surely overwritten


ALL_GPRS, ALL_FLAGS = 0xffff, 0x8d5
_FLAG_BITS = {"c": 0x001, "p": 0x004, "a": 0x010, "z": 0x040, "s": 0x080,
              "o": 0x800}
_CONDITION_FLAGS = [sum(_FLAG_BITS[flag] for flag in flags)   # SDM B.1.4.7
                    for flags in ("o", "c", "z", "cz", "s", "p", "so", "zso")]
_IMPLICIT = {"a": 0, "c": 1, "d": 2, "b": 3, "s": 4, "p": 5, "S": 6, "D": 7}
_UNKNOWN = Effects(ALL_GPRS, 0, ALL_FLAGS, 0)


def _effects_row(form):
    """The row of EFFECTS for a form, or None."""
    opcode, pp = form.opcode, form.pp
    if opcode == 0x90 and form.rex & 1:
        opcode = 0x91                         # REX.B 90 is xchg r8, rax
    rows = _EFFECTS[opcode >> 8]
    row = rows.get((opcode, pp)) or rows.get(opcode)
    if form.modrm >= 0:
        row = rows.get((opcode, "/", form.modrm >> 3 & 7)) or row
    return row


def _address_gprs(form):
    """Mask of the GPRs that the memory operand's address is made of."""
    if form.modrm < 0 or form.modrm >= 0xc0 or form.aim == _RIP:
        return 0
    if form.sib < 0:
        return 1 << (form.modrm & 7 | form.rex << 3 & 8)
    mask, index = 0, form.sib >> 3 & 7 | form.rex << 2 & 8
    if form.modrm >= 0x40 or form.sib & 7 != 5:
        mask = 1 << (form.sib & 7 | form.rex << 3 & 8)
    return mask | 1 << index if index != 4 else mask


def _gprs(letters, form):
    """Mask of the registers that letters of EFFECTS name in this form."""
    mask, rex = 0, form.rex
    rm = form.modrm & 7 | rex << 3 & 8
    reg = form.modrm >> 3 & 7 | rex << 1 & 8
    for letter in letters:
        if letter in "EB":
            number = rm if form.modrm >= 0xc0 else -1
        elif letter in "GH":
            number = reg
        elif letter == "O":
            number = form.opcode & 7 | rex << 3 & 8
        elif letter == "V":
            number = form.vvvv
        else:
            number = _IMPLICIT.get(letter, -1)
        if number >= 0:
            mask |= 1 << number
        if letter in "BH" and number & ~3 == 4 and not rex:
            mask |= 1 << number - 4           # ah ch dh bh, or spl ... dil
    return mask


_flag_masks = {"all": ALL_FLAGS}


def _flags(word, form):
    """Mask of the flags that a word of EFFECTS names."""
    if word == "cc":
        return _CONDITION_FLAGS[form.opcode >> 1 & 7]
    if word not in _flag_masks:
        _flag_masks[word] = sum(_FLAG_BITS[letter] for letter in word
                                if letter != "-")
    return _flag_masks[word]


def effects(insn):
    """Return the Effects of insn on general registers and flags.

    Conservative: reads may be too many, writes too few. What is not in the
    table, and each call, ret and indirect jump, reads everything.
    """
    form = insn.form
    row = _effects_row(form)
    if row is None or form.bits != 64:
        return _UNKNOWN
    reads, writes, flags_read, flags_written = row
    if flags_written == "all?":
        count = insn.code[form.imm_offset] & (63 if form.rex & 8 else 31)
        flags_written = "all" if count else "-"
    read = _gprs(reads, form)
    if not reads.startswith("!"):
        read |= _address_gprs(form)
    written = _gprs(writes, form)
    if form.prefixes & O16 and not form.rex & 8:
        written = 0                           # 16 bits do not kill the rest
    if form.opcode in (0x29, 0x2b, 0x31, 0x33) and form.modrm >= 0xc0 and (
            read == written):
        read = 0                              # xor r, r: whatever r was
    return Effects(read, written, _flags(flags_read, form),
                   _flags(flags_written, form))


# ---- 4  Relocation --------------------------------------------------------
#
# Problem: an instruction that made room for a jump must do elsewhere exactly
# what it did at home. One idea: only what reads rip can tell where it runs,
# so the flow class alone chooses how it moves, a rule a line below.
# Invariant: a copy changes no register, flag or byte of memory that the
# original does not; in particular a return address is the original one.

def _fits(value, size):
    return -1 << 8 * size - 1 <= value < 1 << 8 * size - 1


def _signed(value):
    """A vaddr as the sign-extended 64-bit number that it is."""
    return value - (1 << 64) if value >> 63 else value


def _rel32(insn, target, end):
    """Four bytes that lead from end to target. Raises RelocationError."""
    distance = _signed((target - end) & 0xffffffffffffffff)
    if insn.rip_relative is not None and insn.form.prefixes & A32:
        # The address is computed modulo 2**32: anything is within reach.
        distance = _signed_32(distance)
    if not _fits(distance, 4):
        raise RelocationError(
            "%s refers to 0x%x, out of reach from 0x%x"
            % (insn.code.hex(), target, end), insn.vaddr, "out of reach")
    return struct.pack("<i", distance)


def _signed_32(value):
    return ((value & 0xffffffff) ^ 0x80000000) - 0x80000000


def _prefix_bytes(insn):
    return insn.code[:insn.form.opcode_offset]


def _move_same(insn, new_vaddr):
    """The same bytes; a rip-relative operand is aimed where it was."""
    if insn.rip_relative is None:
        return insn.code
    start = insn.form.disp_offset
    return (insn.code[:start]
            + _rel32(insn, insn.rip_relative, new_vaddr + insn.size)
            + insn.code[start + 4:])


def _widen(insn, new_vaddr, opcode):
    """prefixes, opcode, rel32 to the target."""
    head = _prefix_bytes(insn) + opcode
    return head + _rel32(insn, insn.target, new_vaddr + len(head) + 4)


def _move_jcc(insn, new_vaddr):
    return _widen(insn, new_vaddr,
                  bytes([0x0f, 0x80 | insn.form.opcode & 15]))


def _move_jmp(insn, new_vaddr):
    return _widen(insn, new_vaddr, b"\xe9")


def _move_xbegin(insn, new_vaddr):
    return _widen(insn, new_vaddr, b"\xc7\xf8")


def _move_loop(insn, new_vaddr):
    """loop +2; jmp +5; jmp rel32: the short hop reaches only the long one."""
    head = (_prefix_bytes(insn) + bytes([insn.form.opcode])
            + b"\x02\xeb\x05\xe9")
    return head + _rel32(insn, insn.target, new_vaddr + len(head) + 4)


def _push_return(insn, size_behind):
    """(instruction, data): push the original return address, in one go.

    push imm32 where that sign-extends to it, else push [rip + size_behind]:
    the address then lies behind the size_behind bytes that follow the push.
    No instruction's end shows a half-written stack.
    """
    value = _signed(insn.vaddr + insn.size)
    if _fits(value, 4):
        return b"\x68" + struct.pack("<i", value), b""
    return (b"\xff\x35" + struct.pack("<i", size_behind),
            struct.pack("<q", value))


def _move_call(insn, new_vaddr):
    """push the original return address; jmp rel32."""
    push, data = _push_return(insn, 5)
    end = new_vaddr + len(push) + 5
    return push + b"\xe9" + _rel32(insn, insn.target, end) + data


def _move_call_ind(insn, new_vaddr):
    """push the original return address; jmp to what the call names.

    The push moves rsp before the jump reads its operand, so an rsp-based
    one is taken 8 bytes higher.
    """
    form, code = insn.form, bytearray(insn.code)
    at = form.opcode_offset + 1
    code[at] = form.modrm & 0xc7 | 4 << 3                     # /2 -> /4
    if form.modrm & 0xc7 == 0xc4 and not form.rex & 1:
        raise RelocationError("%s reads rsp itself" % insn.code.hex(),
                              insn.vaddr, "call rsp")
    if form.modrm < 0xc0 and form.modrm & 7 == 4 and (
            form.sib & 7 == 4 and not form.rex & 1):
        disp = int.from_bytes(insn.code[at + 2:], "little", signed=True)
        if form.sib >> 3 & 7 == 4 and not form.rex & 2 and -16 < disp < 0:
            raise RelocationError("%s reads where it pushes"
                                  % insn.code.hex(), insn.vaddr, "call rsp")
        code[at] = 0x80 | 4 << 3 | 4                          # disp32
        code[at + 2:] = struct.pack("<i", disp + 8)
    push, data = _push_return(insn, len(code))
    if insn.rip_relative is not None:
        end = new_vaddr + len(push) + len(code)
        code[-4:] = _rel32(insn, insn.rip_relative, end)
    return push + bytes(code) + data


def _move_syscall(insn, new_vaddr):
    """syscall; mov rcx, vaddr behind it: syscall itself leaves that there."""
    return insn.code + b"\x48\xb9" + struct.pack(
        "<Q", insn.vaddr + insn.size & 0xffffffffffffffff)


def _stay(insn, new_vaddr):
    raise RelocationError("%s %s" % (insn.code.hex(), _STAYS[insn.flow]),
                          insn.vaddr, insn.flow)


_STAYS = {TRAP: "tells a signal handler where it is",
          HALT: "tells a signal handler where it is",
          FAR: "leaves for another segment, privilege or mode, or saves its "
               "own address"}

# How each flow moves.
RELOCATIONS = {
    NEXT: _move_same,          # same bytes, rip-relative operand re-aimed
    RET: _move_same,
    JMP_IND: _move_same,
    JCC: _move_jcc,            # 70-7f, 0f 80-8f  ->  0f 8x rel32
    JMP: _move_jmp,            # eb, e9           ->  e9 rel32
    LOOP: _move_loop,          # e0-e3            ->  a short hop to e9 rel32
    XBEGIN: _move_xbegin,      # c7 f8            ->  c7 f8 rel32
    CALL: _move_call,          # e8       ->  push original return; e9 rel32
    CALL_IND: _move_call_ind,  # ff /2    ->  push original return; ff /4
    SYSCALL: _move_syscall,    # 0f 05    ->  0f 05; rcx as it was
    TRAP: _stay,
    HALT: _stay,
    FAR: _stay,
}


def relocate(insn, new_vaddr):
    """Return bytes that do at new_vaddr what insn does where it is.

    A copy of a call never comes back: the callee returns to the original
    address behind the call. It therefore must be the last one of a window.
    Raises RelocationError for what cannot be moved exactly.
    """
    if insn.form.bits != 64:
        raise RelocationError("32-bit code", insn.vaddr, "32-bit code")
    return RELOCATIONS[insn.flow](insn, new_vaddr)


# Far returns and jumps: what they read tells where they go, not where they
# are. (opcode, modrm.reg, or None for any.)
_FAR_MOVES = {(0xca, None), (0xcb, None), (0xcf, None), (0xff, 5)}
# They fault in user mode: sysret, sysexit, rsm.
_FAR_FAULTS = {0x107, 0x135, 0x1aa}


def relocate_trapped(insn, new_vaddr):
    """As relocate(), for a copy that runs in a thread with a tracer.

    What reports its own address by a signal is moved as it is: the tracer
    sees the signal first, and brings it home (home_of). A call that reads
    what its own push moves becomes an int3 that the tracer emulates, before
    the call itself: see emulate(). Raises RelocationError.
    """
    form = insn.form
    if insn.flow in (TRAP, HALT) or form.opcode in _FAR_FAULTS:
        return insn.code
    if insn.flow == FAR and not _FAR_MOVES.isdisjoint((
            (form.opcode, None), (form.opcode, form.modrm >> 3 & 7))):
        return _move_same(insn, new_vaddr)
    if needs_emulation(insn):
        return BREAKPOINT + insn.code
    return relocate(insn, new_vaddr)


def needs_emulation(insn):
    """Can the tracer alone do what this instruction does?"""
    if insn.flow != CALL_IND or {0x64, 0x65} & set(_prefix_bytes(insn)):
        return False
    try:
        _move_call_ind(insn, insn.vaddr)
    except RelocationError as error:
        return error.rule == "call rsp"
    return False


BREAKPOINT = b"\xcc"            # CC: int3


# ---- 5  Windows -----------------------------------------------------------
#
# A jump takes five bytes, an instruction may have one. So a patch overwrites
# a *window*: whole instructions, which from then on run elsewhere. Nothing
# may ever arrive behind the first byte of a window, where it would find half
# a displacement. That is a statement about all other code, so the one idea
# here is to assume every branch that the bytes of a module could be, at any
# offset, and to drop one only by proof that it is no instruction. Invariant:
# plan_window returns a Window or raises RefusalError, and it never weighs
# how likely something is.
#
#     site                     site + 5           site + size
#      | e9 | rel32 to trampoline | left as it was |      five-byte window
#      | eb | rel8 | left as it was |                     two-byte window ...
#      | e9 | rel32 to trampoline |                       ... and its slot:
#      | e9 | rel32 to its own | slot of another |        padding, or behind
#                                                         a lender's jump

PAGE_SIZE = 4096
MAX_DISPLACED = 12                           # instructions of a window
MAX_LOOPED, _LONGEST_LOOP = 27, 200          # of one round a loop; bytes
JUMP_SIZE, SHORT_JUMP_SIZE = 5, 2            # e9 rel32, eb rel8
ENDBR64 = b"\xf3\x0f\x1e\xfa"                # SDM 2B, ENDBR64
RSEQ_SIGNATURE = b"\x53\x30\x05\x53"         # <sys/rseq.h>, RSEQ_SIG

_SP = 4                                      # register number of rsp
_LONGEST_READ = 64                           # bytes of a zmm register
_MOST_READ = 128                             # of frstor; the operand of
# fxrstor and xrstor is longer, but is what fxsave and xsave have written
_MOST_IMMEDIATE = 4                          # behind a rip-relative operand

# The nops that assemblers pad with (SDM 2B, NOP, table 4-12), and int3.
_PADDING = re.compile(
    rb"(?:\xcc|[\x66\x2e]*(?:\x90|\x0f\x1f(?:\x00|\x40.|\x44..|\x80....|"
    rb"\x84.....)))*", re.DOTALL)
_NOP_OPCODES = (0x90, 0x11f, 0xcc)
_NOP = re.compile(
    rb"[\x66\x2e]*(?:\x90|\x0f\x1f(?:\x00|\x40.|\x44..|\x80....|\x84.....))"
    rb"\Z", re.DOTALL)


class Function(NamedTuple):
    """What is known of the code round a site. Every vaddr in one space."""
    vaddr: int
    size: int                       # bytes, without trailing padding
    code: bytes                     # the function and its trailing padding
    entries: Tuple[int, ...] = ()   # vaddrs inside that others may go to
    guarded: Tuple = ()             # ((low, high), ...): a fault there may
    #                                 become an exception (its LSDA says)
    words: Tuple[int, ...] = ()     # the same, if a word of data that
    #                                 happens to look so is a pointer

    @property
    def own(self):
        """Return the range of its vaddrs that no other function can hold:
        one that begins within it has an entry there."""
        return range(self.vaddr, min([self.vaddr + self.size,
                                      *self.entries]))


class Window(NamedTuple):
    """Bytes that a patch may overwrite, and what they hold."""
    site: int               # where the jump goes; behind an endbr64
    size: int               # bytes displaced or overwritten at site
    insns: tuple            # the displaced Insns, in order
    slot: int = 0           # vaddr of its five-byte jump elsewhere, or 0
    dead_regs: int = 0      # general registers nobody reads, bit = number
    flags_dead: bool = False
    is_loop: bool = False   # a branch of the function leads back to site:
    #                         hits count passes, not only calls
    is_trap: bool = False   # an int3, not a jump, is written to site
    kept: tuple = ()        # Insns in front of site that stay in place, from
    #                         the first probed one on: bodies run behind them
    lender: Optional["Window"] = None   # the slot is in bytes that this one
    #                         displaces: neither may be armed without it

    @property
    def last(self):
        """Return the vaddr of the last displaced instruction."""
        return self.insns[-1].vaddr

    @property
    def has_inner(self):
        """Tell whether a displaced branch leads to another displaced one."""
        return bool(_inner_branches(self.insns))

    @property
    def ranges(self):
        """Return the ((low, high), ...) that no other patch may touch.

        A slot in a lender's bytes is in that one's.
        """
        own = (self.site, self.site + self.size)
        if not self.slot or self.lender:
            return (own,)
        return own, (self.slot, self.slot + JUMP_SIZE)


class ByteRanges:
    """A set of bytes, kept as sorted disjoint [low, high)."""

    def __init__(self, ranges=()):
        self._lows, self._highs = [], []
        for low, high in ranges:
            self.add(low, high)

    def __iter__(self):
        return zip(self._lows, self._highs)

    def add(self, low, high):
        """Add the bytes of [low, high)."""
        first = bisect.bisect_right(self._highs, low)
        last = bisect.bisect_left(self._lows, high)
        if first < last:
            low = min(low, self._lows[first])
            high = max(high, self._highs[last - 1])
        self._lows[first:last] = [low]
        self._highs[first:last] = [high]

    def remove(self, low, high):
        """Take away the bytes of [low, high)."""
        first = bisect.bisect_right(self._highs, low)
        last = bisect.bisect_left(self._lows, high)
        if first >= last:
            return
        rest = [(start, end) for start, end in (
            (self._lows[first], low), (high, self._highs[last - 1]))
            if start < end]
        self._lows[first:last] = [start for start, _ in rest]
        self._highs[first:last] = [end for _, end in rest]

    def copy(self):
        """Return another set of the same bytes."""
        other = ByteRanges()
        other._lows, other._highs = self._lows[:], self._highs[:]
        return other

    def overlap(self, low, high):
        """Return the kept (low, high) that shares a byte, or None."""
        index = bisect.bisect_left(self._lows, high) - 1
        if index >= 0 and self._highs[index] > low:
            return self._lows[index], self._highs[index]
        return None


# -- Branches: every rel32 and rel8 that the bytes of a module could be.

_REL32 = ((rb"\xe8", 1), (rb"\xe9", 1), (rb"\x0f[\x80-\x8f]", 2),
          (rb"\xc7\xf8", 2))
_RIP_MODRM = b"\x05\x0d\x15\x1d\x25\x2d\x35\x3d"     # SDM table 2-7
_IS_REL8 = bytes(byte >> 4 == 7 or byte >> 2 == 0x38 or byte == 0xeb
                 for byte in range(256))      # jcc; loop, jrcxz; jmp
_BLOCK = 0x10000
_INDIRECT = re.compile(rb"\xff[\xe0-\xe7\x20-\x27\x60-\x67\xa0-\xa7]")
_N_STREAMS = 6      # passes that cost less than the sorted table


def _byte_class(low, high, shift):
    """Return a regex class of the byte at shift of any int in [low, high]."""
    first, last = low >> shift, high >> shift
    if last - first >= 255:
        return b"."
    return b"[%s]" % b"".join(b"\\x%02x" % (value & 255)
                              for value in range(first, last + 1))


def _halves(keys):
    """Return the lower and the upper halves of 64-bit keys, as arrays."""
    halves = array.array("I", array.array("Q", keys).tobytes())
    return halves[::2], halves[1::2]    # x86 has the lower one first


class BranchScan:
    """All direct branches that a module's executable bytes could hold.

    segments     [(vaddr, bytes)] of everything executable in the module
    function_at  vaddr -> Function that holds it (padding included), or None;
                 lets a branch be refuted: it lies inside a function that
                 decodes, and is no instruction of it
    read         vaddr, size -> bytes or None; for jump tables
    is_absolute  it is not relocated: constants in code may be addresses
    is_for_many  more than a few sites will be planned

    Call, jmp, jcc (rel32) and xbegin are found in the whole module, and so
    is what could be a rip-relative operand; the first few questions are
    answered by a pass over the bytes, later ones (and of many sites all)
    from sorted tables. Short branches are looked for around the window.
    """

    def __init__(self, segments, function_at=None, read=None,
                 is_absolute=False, is_for_many=False):
        self.is_absolute = is_absolute
        self.segments = sorted(segments, key=lambda segment: segment[0])
        self.function_at = function_at or (lambda vaddr: None)
        self.read = read or (lambda vaddr, size: None)
        self._base = self.segments[0][0] if self.segments else 0
        self._ranges = [(vaddr, vaddr + len(code))
                        for vaddr, code in self.segments]
        self._table, self._operands, self._streamed = None, None, []
        self._n_streams = 0 if is_for_many else _N_STREAMS
        # By Function.vaddr:
        self._analyses, self._proofs, self._behind = {}, {}, {}
        self._may_jump = {}
        self.has_rseq = any(_has_rseq(code) for _, code in self.segments)

    def forget(self):
        """Let go of the functions' analyses; the table of branches stays."""
        self._analyses.clear()
        self._proofs.clear()
        self._behind.clear()
        self._may_jump.clear()

    def is_executable(self, vaddr):
        """Tell whether vaddr is in one of the segments."""
        for low, high in self._ranges:
            if low <= vaddr < high:
                return True
        return False

    def into(self, low, high):
        """Return [(source, target)] of all that may branch to [low, high)."""
        return self._short(low, high) + self.far(low, high)

    def entering(self, low, high):
        """Return into(low, high) without what is proven no instruction."""
        return [(source, target) for source, target in self.into(low, high)
                if not self.is_refuted(source)]

    def far(self, low, high, own=range(0)):
        """Return [(source, target)] of the rel32 branches only; without
        those whose source is one of own."""
        found = self._streams(low, high, 0)
        return self._between(self._table, low, high, own) if (
            found is None) else [
                branch for branch in found if low <= branch[1] < high
                and branch[0] not in own]

    def operands(self, low, high):
        """Return [(vaddr of a displacement, what it leads to)] of all that
        could be rip-relative operands in [low, high), if no immediate
        stands behind the displacement; and of _words()."""
        found = self._streams(low, high, 1)
        return self._between(self._operands, low, high) if found is None \
            else [each for each in found if low <= each[1] < high]

    def _streams(self, low, high, which):
        """Return the branches (0) or operands (1) of a pass over the bytes
        that has [low, high); None if the sorted tables have them."""
        if self._table is None:
            for first, last, found in self._streamed:
                if first <= low and high <= last:
                    return found[which]
            if len(self._streamed) < self._n_streams:
                first = low - _MOST_READ - _MOST_IMMEDIATE
                self._streamed.append((first, high,
                                       self._stream(first, high)))
                return self._streamed[-1][2][which]
            self._table, self._operands = self._build()
        return None

    @property
    def text(self):
        """The segments, relative to the first: what the tables are made of,
        unless is_absolute."""
        return tuple((vaddr - self._base, code)
                     for vaddr, code in self.segments)

    def make_tables(self):
        """Return the sorted tables, for scans of the same text elsewhere."""
        return self._build() if self.segments else (_halves(()),) * 2

    def take_tables(self, tables):
        """Use what make_tables() of a scan of an equal text has returned."""
        self._table, self._operands = tables

    def _between(self, table, low, high, own=range(0)):
        """Return [(source, target)] of a sorted table, without own."""
        (sources, targets), base = table, self._base
        first = bisect.bisect_left(targets, low - base)
        if first == len(targets) or targets[first] >= high - base:
            return []
        last = bisect.bisect_left(targets, high - base, first)
        found, start, stop = (sources[first:last], own.start - base,
                              own.stop - base)
        if start <= min(found) and max(found) < stop:
            return []
        return [(source + base, target + base)
                for source, target in zip(found, targets[first:last])
                if not start <= source < stop]

    def _build(self):
        """Return the sorted tables, of branches and of operands: an array
        of sources and one of targets, relative to the first segment."""
        last, code = self.segments[-1]
        span = last + len(code) - self._base
        if span >= 1 << 31:
            raise UbpError("scan", "0x%x" % self._base, "2 GiB of code")
        tail = b"(?=..%s%s)" % (_byte_class(-span, span, 16),
                                _byte_class(-span, span, 24))
        words = [(value - self._base << 32) + place - self._base
                 for place, value in self._words(self._base,
                                                 self._base + span)]
        return (self._sorted(_REL32, tail, span),
                self._sorted([(re.escape(_RIP_MODRM[n:n + 1]), 1)
                              for n in range(8)], tail, span, words))

    def _sorted(self, kinds, tail, span, keys=()):
        """Return the table of all that _REL32's like of kinds lead to, and
        of other keys: each is target << 32 | source."""
        keys = list(keys)
        for vaddr, code in self.segments:
            here = vaddr - self._base
            for opcode, size in kinds:
                pattern = re.compile(opcode + tail, re.DOTALL)
                starts = [m.start() for m in pattern.finditer(code)]
                after = here + size + 4
                # An operand is told by its displacement's place.
                source = here + (kinds is not _REL32)
                keys += [(_INT32(code, start + size)[0] + start + after << 32)
                         + start + source for start in starts]
        keys.sort()
        first = bisect.bisect_left(keys, 0)
        return _halves(keys[first:bisect.bisect_left(keys, span << 32)])

    def _words(self, low, high):
        """Return [(vaddr, value)] of the 32-bit words at any offset that are
        vaddrs in [low, high), if a constant or an absolute operand may be
        one."""
        found = []
        if not self.is_absolute:
            return found
        third, fourth = (_byte_class(low, high, shift) for shift in (16, 24))
        # First the one that is rarer: of a wide range, the fourth.
        pattern, skip = (b"%s(?=%s)" % (third, fourth), 2) if (
            high - low < 1 << 19) else (b"%s(?<=%s.)" % (fourth, third), 3)
        pattern = re.compile(pattern, re.DOTALL)
        for base, code in self.segments:
            places = [m.start() - skip for m in pattern.finditer(code, skip)]
            found += [(base + place, value) for place, value in zip(
                places, [_UINT32(code, place)[0] for place in places])
                if low <= value < high]
        return found

    def _stream(self, low, high):
        """Return (branches, operands) in [low, high), without a table.

        Within 64 KiB of sources the upper half of a displacement that
        leads to the range takes a few values: bytes.find looks for those.
        """
        found = [], []
        for base, code in self.segments:
            for start in range(0, len(code), _BLOCK):
                stop = min(len(code), start + _BLOCK)
                first = low - base - stop - 2 >> 16
                last = high - base - start >> 16
                for half in range(max(first, -0x8000),
                                  min(last, 0x7fff) + 1):
                    word = struct.pack("<H", half & 0xffff)
                    _find_rel32(found, base, code, word, start, stop)
        found[1].extend(self._words(low, high))
        return tuple([each for each in kind if low <= each[1] < high]
                     for kind in found)

    def _short(self, low, high, own=range(0)):
        """Return [(source, target)] of the rel8 branches, without own."""
        found, width = [], high - low
        first, last = low - 129, high + 127     # sources are within these
        for first, last in ((first, min(last, own.start)), (
                max(first, own.stop), last)) if own else ((first, last),):
            for base, code in self.segments if first < last else ():
                start = max(first - base, 0)
                near = code[start:max(last + 1 - base, 0)]
                skip = low - base - start - 2 + 128
                for at in itertools.compress(range(len(near) - 1),
                                             near.translate(_IS_REL8)):
                    to = at + (near[at + 1] ^ 128) - skip
                    if 0 <= to < width:
                        found.append((base + start + at, low + to))
        return found

    # -- Proofs: what the functions round a candidate say of it.

    def analysis(self, function):
        """Return analyse(function), made once. Raises RefusalError."""
        known = self._analyses.get(function.vaddr)
        if known is None or known.function != function:
            known = analyse(function)
            self._analyses[function.vaddr] = known
        return known

    def links(self, analysis):
        """Return far() of a function and its padding, but of the branches
        to its first byte only the jccs, which begin with 0f: no calls."""
        if analysis.links is None:
            low = analysis.function.vaddr
            found = self.far(low, analysis.padding_end, analysis.own)
            to_low = [source for source, target in found if target == low]
            analysis.links = [
                (source, low) for base, code in self.segments
                for source in to_low if base <= source < base + len(code)
                and code[source - base] == 0x0f] + [
                    branch for branch in found if branch[1] != low]
        return analysis.links

    def may_jump(self, function):
        """Tell whether the bytes of a function hold an indirect jump, at
        any offset."""
        known = self._may_jump.get(function.vaddr)
        if known is None:
            known = self._may_jump[function.vaddr] = bool(
                _INDIRECT.search(function.code))
        return known

    def arriving(self, analysis, low, high):
        """Return entering(low, high), which is within a function and behind
        its first byte. What it has itself is known, if it is entered nowhere
        else: only bytes outside of it need be looked at."""
        covered, strays = self._proved(analysis.function)
        own = analysis.own
        if (not covered or strays or not own
                or not analysis.inside.isdisjoint(range(low, high))):
            return self.entering(low, high)
        return [(source, target) for source, target in
                self._short(low, high, own) + self.links(analysis)
                if low <= target < high and not self.is_refuted(source)]

    def is_refuted(self, source):
        """Tell whether the bytes at source are proven to be no branch.

        They are if a known function covers them, decodes, and has no direct
        branch there, on any way that control could take in it. Or if they
        lie behind one, and no way leads to them: see _reached_behind().
        """
        function = self.function_at(source)
        if function is None:
            return False
        covered, strays = self._proved(function)
        if source < covered:
            return not self.analysis(function).has_branch(source, strays)
        reached = self._behind_it(function, covered, source)
        return reached is not None and not _is_branch(reached, source)

    def _behind_it(self, function, covered, vaddr):
        """Return _reached_behind(function), made once; None if unknown, or
        if vaddr is not among these bytes."""
        if (not covered
                or vaddr >= function.vaddr + len(function.code)):
            return None
        if function.vaddr not in self._behind:
            self._behind[function.vaddr] = None     # till it is known
            self._behind[function.vaddr] = self._reached_behind(function)
        return self._behind[function.vaddr]

    def _proved(self, function):
        """Return _proof(function), made once."""
        proof = self._proofs.get(function.vaddr)
        if proof is None:
            proof = self._proofs[function.vaddr] = self._proof(function)
        return proof

    def _proof(self, function):
        """Return (end of what is known, Insns on ways that enter it in the
        middle of an instruction)."""
        try:
            analysis = self.analysis(function)
            insns = analysis.follow([
                target for source, target in self.links(analysis)
                if analysis.is_middle(target)
                and self._is_branch_of_another(function, source)])
        except RefusalError:
            return 0, ()
        return analysis.padding_end, analysis.strays + insns

    def _reached_behind(self, function):
        """Return [Insn] of all behind a function, up to the end of its
        code, that control could come to, or None if unknown.

        These bytes belong to no function: hand-written code keeps its
        tables and texts there. Control comes to them from the function in
        front, by a branch, or to where an entry, a relocation or an operand
        points. From there each way is followed until it leads to no
        instruction. Nothing is known if the function in front, or one that
        takes such an address, jumps to what it has computed.
        """
        analysis = self.analysis(function)
        low, end = analysis.end, function.vaddr + len(function.code)
        starts = [vaddr for vaddr in analysis.function.entries
                  + analysis.function.words if low <= vaddr]
        if analysis.last_flow not in _ENDS:
            starts.append(low)
        for source, target in self.into(low, end):
            if not low <= source < end and not self.is_refuted(source):
                starts.append(target)
        namers = [function]
        for place, target in self.operands(low - _MOST_IMMEDIATE, end):
            if low <= place < end:
                starts += range(target, target + _MOST_IMMEDIATE + 1)
                continue
            operand = self.operand(place, target)
            namer = self.function_at(place)
            if operand is None:
                continue
            if namer is None or operand.is_unknown:
                return None
            if operand.is_address:
                starts.append(operand.vaddr)
                namers.append(namer)
        for namer in namers:
            jumps = resolve_jumps(self.analysis(namer), self.read,
                                  self.is_executable)
            if jumps.unresolved or jumps.stored:
                return None
        return _ways_from(starts, low, end, self.read)

    def operand(self, place, target):
        """Return the _Named of the operand or constant whose four bytes are
        at place, or None if it is proven that there is none."""
        function = self.function_at(place)
        if function is not None:
            covered, strays = self._proved(function)
            if place < covered:
                analysis = self.analysis(function)
                at = bisect.bisect_right(analysis.starts, place) - 1
                insns = (analysis.insn(at),) + strays
            else:
                insns = self._behind_it(function, covered, place)
            if insns is not None:
                return next(filter(None, [
                    _named_at(insn, place - insn.vaddr)
                    for insn in insns]), None)
        return _Named(target, _MOST_IMMEDIATE + _LONGEST_READ, True, True)

    def _ends_before(self, place, target, low):
        """Tell by the bytes in front of a displacement whether what it
        leads to, in front of low, cannot be read up to there: as it is far,
        and no x87 state, or the operand of a lea."""
        code = self.read(place - 6, 5)
        if not code:
            return False
        if target + _MOST_IMMEDIATE + _LONGEST_READ <= low:
            return code[4] >> 3 != 0x1b
        return (code[4] == 0x8d and code[3] & 0xf8 == 0x48
                and code[0] != 0x62)    # no EVEX prefix, whose last it were

    def use(self, first, high, own=None, low=0):
        """Return the _Named of what the function own has no part in, and
        that may read [low, high) or take an address in [first, high);
        None if there is nothing.

        An address of a function's first byte is taken to be called. One
        within code may be jumped to.
        """
        low = low or first
        for place, target in self.operands(
                low - _MOST_READ - _MOST_IMMEDIATE, high):
            if own is not None and 0 <= place - own.vaddr < own.size:
                continue
            if target < first and self._ends_before(place, target, low):
                continue                # most do: pointers to functions
            named = self.operand(place, target)
            if named is not None and named.vaddr < high and (
                    named.is_address and first <= named.vaddr
                    or low < named.vaddr + named.size):
                return named
        return None

    def _is_branch_of_another(self, function, source):
        """Tell whether code outside function has this branch.

        Asked of branches into the middle of an instruction, which would
        show that function is entered out of step with its decoding.
        """
        other = self.function_at(source)
        if other is None:
            return True
        if other.vaddr == function.vaddr:
            return False
        try:
            analysis = self.analysis(other)
            return analysis.has_branch(source, analysis.strays)
        except RefusalError:
            return True


class _Named(NamedTuple):
    """What an operand leads to."""
    vaddr: int
    size: int               # bytes that may be read there, at most
    is_address: bool        # it may be kept, as that of a lea is
    is_unknown: bool = False    # it may be any operand, or none


def _named_at(insn, offset):
    """Return the _Named of insn whose four bytes are at offset, or None."""
    form = insn.form
    if form.imm_offset == offset and form.imm_size == 4:
        return _Named(_UINT32(insn.code, offset)[0], 0, True)
    if form.disp_offset != offset or form.disp_size != 4:
        return None
    if insn.rip_relative is not None:
        return _Named(insn.rip_relative, _read_size(insn),
                      insn.opcode == 0x8d)
    # Whatever it is added to: the base of a table, too.
    return _Named(_UINT32(insn.code, offset)[0], _read_size(insn), True)


def _read_size(insn):
    """Return how many bytes a memory operand of insn has, at most."""
    page, opcode = insn.opcode >> 8, insn.opcode & 255
    if opcode == 0x8d and not page:                         # lea
        return 0
    if page == 0:                       # far pointers; x87: its whole state
        return (_MOST_READ if 0xd8 <= opcode <= 0xdf
                else 10 if opcode == 0xff else 8)
    if page == 2 and insn.pp != 1 and opcode >= 0xd8:       # key locker, ...
        return 64
    return 64 if 0x20 <= page < 0x30 else 32 if page >= 0x10 else 16


def _ways_from(starts, low, end, read):
    """Return [Insn] on all ways from starts, as far as they lead within
    [low, end). What does not decode ends a way."""
    found, pending = {}, list(starts)
    while pending:
        vaddr = pending.pop()
        while low <= vaddr < end and vaddr not in found:
            try:
                insn = decode(_up_to(read, vaddr, 15), vaddr)
            except DecodeError:
                break
            found[vaddr] = insn
            if insn.target is not None:
                pending.append(insn.target)
            if insn.flow in _ENDS:
                break
            vaddr += insn.size
    return list(found.values())


def _up_to(read, vaddr, size):
    """Return size bytes at vaddr, or as many as there are."""
    while size and not read(vaddr, size):
        size -= 1
    return (read(vaddr, size) if size else None) or b""


def _is_branch(insns, vaddr):
    """Tell whether the opcode of a direct branch of insns is at vaddr."""
    return any(insn.target is not None
               and insn.vaddr + insn.opcode_offset == vaddr for insn in insns)


def _has(vaddrs, vaddr):
    """Tell whether the sorted array holds vaddr."""
    index = bisect.bisect_left(vaddrs, vaddr)
    return index < len(vaddrs) and vaddrs[index] == vaddr


def _find_rel32(found, base, code, word, start, stop):
    """Append the branches, and operands, whose displacement's upper half is
    word.

    The two bytes are looked for in code[start:stop + 1], the opcode before
    them: e8, e9, 0f 80-8f, c7 f8; or the modrm of a rip-relative operand.
    """
    branches, operands = found
    at = code.find(word, max(start, 3), stop + 1)
    while at >= 0:
        byte, target = code[at - 3], base + at + 2 + _INT32(code, at - 2)[0]
        if byte in b"\xe8\xe9":
            branches.append((base + at - 3, target))
        elif byte & 0xc7 == 0x05:
            operands.append((base + at - 2, target))
        elif (byte & 0xf0 == 0x80 and code[at - 4] == 0x0f
              or byte == 0xf8 and code[at - 4] == 0xc7) and at > 3:
            branches.append((base + at - 4, target))
        at = code.find(word, at + 1, stop + 1)


def _has_rseq(code):
    """Tell whether RSEQ_SIG stands in code other than as mov r32, imm32.

    The immediate is the registration with the kernel (B8+rd id).
    """
    at = code.find(RSEQ_SIGNATURE)
    while at >= 0:
        if at < 1 or code[at - 1] & 0xf8 != 0xb8:
            return True
        at = code.find(RSEQ_SIGNATURE, at + 1)
    return False


# -- Analysis: one function, decoded once for all its sites.

_ENDS = frozenset((RET, JMP, JMP_IND))       # control does not go on
_MARK_OF = operator.itemgetter(Form._fields.index("mark"))
_WORDS_OF = operator.itemgetter(slice(13, 17))
assert _SIZE_OF(Form._fields) == "size" and _WORDS_OF(Form._fields) == (
    "disp_offset", "disp_size", "imm_offset", "imm_size")


class Analysis:
    """A function, decoded. Made by analyse().

    starts       sorted vaddrs of its instructions
    forms        the Form of each; Insns are made when asked for
    indirect     vaddrs of its indirect jumps
    known        {one of them: its targets}, and
    tables       {one of them: its _Table}, and
    stored       those through a stored pointer: filled by resolve_jumps
    is_guessed   some of tables were found with jumps taken to lead nowhere
    strays       Insns on ways that enter one of them behind its first byte
                 (glibc jumps over a lock prefix)
    entries      where others may go to, and whose address it takes itself
    data         what it reads of its own bytes
    own          vaddrs that no other function can hold
    targets      vaddrs inside that its own direct branches lead to
    inside       the same, those of its calls too, but not of strays
    padding_end  end of the function and of the padding behind it

    There are as many as functions, so what is empty is a constant: each
    list would be one more thing for Python's collector to look at.
    """

    __slots__ = (
        "function end forms starts padding_end indirect data entries own "
        "strays targets inside last_flow jumps family rseq known "
        "tables stored parts links is_guessed references _ways _named").split()

    def __init__(self, function, forms, marks):
        low, end = function.vaddr, function.vaddr + function.size
        self.function, self.end, self.forms = function, end, forms
        starts = list(_starts(forms, low))          # and the end
        self.padding_end = low + _PADDING.match(
            function.code, function.size).end()
        targets, astray, data, taken = self._aims(starts, marks)
        starts.pop()
        self.starts = array.array("L", starts)      # twice as fast as of "Q"
        words = [word for word in function.words
                 if not self._is_nothing(word)]
        entries = {*taken, *function.entries}
        firm = astray + sorted(entries)
        self.data = tuple(sorted(set(data))) if data else ()
        self.entries = tuple(sorted(
            vaddr for vaddr in entries.union(words)
            if low < vaddr < self.padding_end)) if entries or words else ()
        self.own = function.own
        self.strays = self.follow(firm, words)
        for insn in self.strays:
            if (insn.target is not None and insn.flow != CALL
                    and low <= insn.target < end):
                targets.append(insn.target)
        self.targets = frozenset(targets)
        if self.targets == self.inside:
            self.inside = self.targets
        self.last_flow = forms[-1].flow if forms else NEXT
        # When asked for:
        self.family = self.rseq = self.parts = self.links = None
        self.jumps = self.references = self._ways = self._named = None
        self.known = self.tables = self.stored = ()
        self.is_guessed = False
        if self.indirect:
            self.known, self.tables = {}, collections.OrderedDict()
            self.stored = set()

    def _aims(self, starts, marks):
        """Look at the instructions that have an aim or jump indirectly.

        starts  of all, and the end
        marks   [(offset, mark)] of these
        -> (targets of direct branches within the function, those of them
        and of calls that are no instruction, what is read, and what has its
        address taken, also in its padding)
        """
        code, low = self.function.code, self.function.vaddr
        n_padded, indirect, int32 = self.padding_end - low, [], _INT32
        found = jumps, calls, reads, taken = [], [], [], []
        for pos, (width, offset, size, what) in marks:
            if width == 4:
                to = pos + size + int32(code, pos + offset)[0]
            elif width == 1:
                to = pos + size + (code[pos + offset] ^ 128) - 128
            else:
                indirect.append(low + pos)
                if not offset:
                    continue
                to = pos + size + int32(code, pos + offset)[0]
            if 0 <= to < n_padded:
                found[what].append(low + to)
        end = self.end
        targets = [to for to in jumps if to < end]
        self.inside = frozenset(targets + [to for to in calls if to < end])
        self.indirect, find = tuple(indirect), bisect.bisect_left
        return targets, sorted([
            to for to in self.inside if starts[find(starts, to)] != to
        ]), reads, taken

    def has_branch(self, vaddr, strays):
        """Tell whether a direct branch of the function, or one of strays,
        has its opcode at vaddr."""
        place = bisect.bisect_right(self.starts, vaddr) - 1
        form = self.forms[place]
        return (form.aim == _TARGET and vaddr == self.starts[place]
                + form.opcode_offset or _is_branch(strays, vaddr))

    def place(self, vaddr):
        """Return the place in starts of vaddr, -1 if none starts there."""
        starts = self.starts
        place = bisect.bisect_left(starts, vaddr)
        return place if place < len(starts) and starts[place] == vaddr else -1

    def at(self, vaddr):
        """Return the Insn that starts at vaddr, None if none does."""
        place = self.place(vaddr)
        return self.insn(place) if place >= 0 else None

    def before(self, vaddr):
        """Return the Insn in front of the one at vaddr, or None."""
        place = bisect.bisect_left(self.starts, vaddr)
        return self.insn(place - 1) if place else None

    def aim(self, form, vaddr):
        """Return (target, rip_relative) of the form at vaddr."""
        return aim(form, self.function.code, vaddr - self.function.vaddr,
                   vaddr)

    def insn(self, place):
        """Return the Insn at a place in starts."""
        form, vaddr, function = (self.forms[place], self.starts[place],
                                 self.function)
        size, code, at = form[0], function.code, vaddr - function.vaddr
        target, rip_relative = (aim(form, code, at, vaddr) if form[2]
                                else (None, None))
        return _new(Insn, (vaddr, size, code[at:at + size], form[1],
                           target, rip_relative, form))

    def names(self):
        """Return the vaddrs that instructions of the function name, as a
        rip-relative operand or a 32-bit constant."""
        code, low, found = self.function.code, self.function.vaddr, set()
        for form, vaddr, (disp_offset, disp_size, imm_offset, imm_size) in zip(
                self.forms, self.starts, map(_WORDS_OF, self.forms)):
            if disp_size == 4:
                found.add(_UINT32(code, vaddr - low + disp_offset)[0])
                found.add(aim(form, code, vaddr - low, vaddr)[1])
            if imm_size == 4:
                found.add(_UINT32(code, vaddr - low + imm_offset)[0])
        return found - {None}

    def can_name(self, low, end):
        """Tell whether one of names() is in [low, end), or may be: a 64-bit
        constant that 32 bits had held is one that the linker has put in, an
        address or the distance to one, as in the large code model."""
        if self._named is None:
            code, first = self.function.code, self.function.vaddr
            is_large = any(
                form.imm_size == 8 and -1 << 31 <= _INT64(
                    code, vaddr - first + form.imm_offset)[0] < 1 << 32
                for form, vaddr in zip(self.forms, self.starts))
            self._named = is_large, sorted(self.names())
        is_large, names = self._named
        at = bisect.bisect_left(names, low)
        return is_large or at < len(names) and names[at] < end

    def ways_to(self, vaddr):
        """Return the vaddrs of the instructions that may lead to vaddr;
        None among them for a way from outside. An unknown jump leads where
        nothing else does, or if is_guessed nowhere."""
        is_aim = vaddr in self.inside or self.strays
        if is_aim and self._ways is None:
            self._ways = collections.defaultdict(list)
            for form, source in itertools.compress(
                    zip(self.forms, self.starts), map(_MARK_OF, self.forms)):
                target = self.aim(form, source)[0]
                if target is not None:
                    self._ways[target].append(source)
        ways = list(self._ways.get(vaddr, ())) if is_aim else []
        before = self.before(vaddr)
        if before is not None and before.flow not in _ENDS:
            ways.append(before.vaddr)
        if (vaddr == self.function.vaddr or self.strays
                or _has(self.entries, vaddr)):
            ways.append(None)
        unknown = () if ways or self.is_guessed else (vaddr,)
        return ways + [jump for jump in self.indirect
                       if vaddr in self.known.get(jump, unknown)]

    def is_middle(self, vaddr):
        """Tell whether vaddr is inside the function but no instruction."""
        if not self.function.vaddr < vaddr < self.end:
            return False
        starts = self.starts
        return starts[bisect.bisect_right(starts, vaddr) - 1] != vaddr

    def _is_nothing(self, vaddr):
        """Tell whether control that came to vaddr would surely fault.

        True if it is in the middle of an instruction, and the bytes from
        there on lead straight to what is no instruction.
        """
        while self.is_middle(vaddr):
            at = vaddr - self.function.vaddr
            try:
                insn = decode(self.function.code[at:at + 15], vaddr)
            except DecodeError:
                return True
            if insn.flow != NEXT:
                break
            vaddr += insn.size
        return False

    def follow(self, targets, words=()):
        """Return the Insns from targets till they fall in with the others.

        Only targets in the middle of an instruction have any. Raises
        RefusalError where bytes on the way do not decode; not on one from a
        word of data, as control that came there would fault.
        """
        if not targets and not words:
            return ()
        strays = {}
        for starts, is_word in (targets, False), (words, True):
            pending = [vaddr for vaddr in starts if self.is_middle(vaddr)]
            while pending:
                vaddr = pending.pop()
                while self.is_middle(vaddr) and vaddr not in strays:
                    at = vaddr - self.function.vaddr
                    try:
                        insn = decode(self.function.code[at:at + 15], vaddr)
                    except DecodeError as error:
                        if is_word:
                            break
                        raise _unknown(self.function, error) from error
                    strays[vaddr] = insn
                    if insn.target is not None and self.is_middle(
                            insn.target):
                        pending.append(insn.target)
                    if insn.flow in _ENDS:
                        break
                    vaddr += insn.size
        return tuple(strays.values())


def analyse(function):
    """Return the Analysis of a Function.

    Raises RefusalError ("unknown instruction") unless all of it decodes.
    """
    try:
        forms, marks = _walk(function.code[:function.size], function.vaddr)
    except DecodeError as error:
        raise _unknown(function, error) from error
    return Analysis(function, forms, marks)


def _unknown(function, error):
    at = error.vaddr - function.vaddr
    return RefusalError(
        "unknown instruction",
        "the function at 0x%x does not decode: %s at 0x%x" % (
            function.vaddr, function.code[at:at + 8].hex() or "end",
            error.vaddr), error.vaddr)


def _shown(insn):
    """Return an instruction as refusals print it."""
    return "%s at 0x%x" % (insn.code.hex(), insn.vaddr)


# -- Operands of the legacy forms that compilers use for jump tables.

class _Operands(NamedTuple):
    reg: int                    # modrm.reg
    rm: int                     # register of mod 3, or -1: memory
    base: int = -1              # or -1: none, or rip
    index: int = -1
    scale: int = 1
    disp: int = 0


def _operands(insn):
    """Return the _Operands that modrm and sib encode (SDM 2.1.5).

    None for an instruction without modrm.
    """
    form = insn.form
    modrm, sib, rex = form.modrm, form.sib, form.rex
    if modrm < 0:
        return None
    mod, low = modrm >> 6, modrm & 7
    reg = modrm >> 3 & 7 | rex << 1 & 8
    if mod == 3:
        return _Operands(reg, low | rex << 3 & 8)
    base, index, scale = low | rex << 3 & 8, -1, 1
    if sib >= 0:
        index, scale = sib >> 3 & 7 | rex << 2 & 8, 1 << (sib >> 6)
        index = -1 if index == 4 else index
        base, low = sib & 7 | rex << 3 & 8, sib & 7
    if mod == 0 and low == 5:
        base = -1
    disp = int.from_bytes(
        insn.code[form.disp_offset:form.disp_offset + form.disp_size],
        "little", signed=True)
    return _Operands(reg, -1, base, index, scale, disp)


# -- Indirect jumps: which of them go through a table, and where to.

class IndirectJumps(NamedTuple):
    """Where the indirect jumps of a function may lead inside it."""
    targets: tuple          # sorted entries of the tables
    unresolved: tuple       # vaddrs of jumps that no idiom explains
    stored: tuple = ()      # of those through a pointer that was stored


_NO_JUMPS = IndirectJumps((), ())


class _Table(NamedTuple):
    vaddr: int
    entry_size: int         # 8: absolute words, 4: relative to vaddr
    place: int              # vaddr of the load
    index: int              # register that counts entries, or -1


_KNOWN_WAYS = frozenset((NEXT, JCC, JMP, LOOP, JMP_IND))
_CALLEE_SAVED = 0xf028      # rbx, rbp, r12-r15 (System V ABI, figure 3.4)
_N_SEARCHED = 4096  # instructions between a jump and the lea of its table
_N_BACK = 16        # instructions between the parts of an idiom
_N_ENTRIES = 4096   # of a table without a known bound
_COPIES = {                 # opcode -> the register it copies or extends
    0x63: lambda operands: operands.rm, 0x8b: lambda operands: operands.rm,
    0x1b6: lambda operands: operands.rm, 0x1b7: lambda operands: operands.rm,
    0x89: lambda operands: operands.reg}


def resolve_jumps(analysis, read, is_executable):
    """Return the IndirectJumps of a function, resolved once.

    The idioms of gcc and clang, notrack or not (N bounds the index):
        jmp [table + index*8]             mov r, [table + index*8]; jmp r
        lea b, [rip + table]; movsxd r, [b + index*4]; add r, b; jmp r
    A table whose bound is not seen is read as far as its words lead to
    code: more entries than it has can only refuse more windows.

    While some are unknown, they are taken to lead only where nothing else
    does, and if that explains no more, nowhere: of two switches, each in a
    loop, the cases of each would be reached by the other's jump. If any
    stays unknown that does no harm: a window of several instructions is
    then refused, but for an entry that no table and no name in the function
    leads into. If none does, what was found before is looked at again with
    what is known now, and must be the same. Then no jump can be the first
    that leads elsewhere than it is known to.

    What is left are mostly tail calls. One is proven by where its target
    comes from (_is_stored), as a table's jump has the height of the entry's
    stack, too, in a function that has no frame.
    """
    if not analysis.indirect:
        return _NO_JUMPS
    if analysis.jumps is None:
        bases, n_known = [], -1
        while n_known < len(analysis.known) < len(analysis.indirect):
            n_known = len(analysis.known)       # each may explain others
            for vaddr in analysis.indirect:
                if vaddr not in analysis.known:
                    _resolve(analysis, vaddr, bases, read, is_executable)
            if (n_known == len(analysis.known) < len(analysis.indirect) - 1
                    and not analysis.is_guessed):
                analysis.is_guessed, n_known = True, -1
        _confirm(analysis)
        targets = set().union(*analysis.known.values())
        analysis.jumps = IndirectJumps(tuple(sorted(targets)), tuple(
            vaddr for vaddr in analysis.indirect
            if vaddr not in analysis.known), tuple(sorted(analysis.stored)))
    return analysis.jumps


def _confirm(analysis):
    """Forget the tables found with jumps unknown that are not the same with
    all of them known; and stored pointers, to which tables add ways."""
    if len(analysis.known) < len(analysis.indirect):
        return
    tables = list(analysis.tables.items())
    for vaddr, table in tables if analysis.is_guessed else tables[:-1]:
        if _table_of(analysis, analysis.at(vaddr)) != table:
            del analysis.known[vaddr]
    for vaddr in list(analysis.stored if tables else ()):
        if not _is_stored(analysis, analysis.at(vaddr)):
            analysis.stored.remove(vaddr)
            del analysis.known[vaddr]


def _resolve(analysis, vaddr, bases, read, is_executable):
    """Put the targets of the jump at vaddr into analysis.known, if found.

    bases   sorted vaddrs of the tables found so far: each ends the one
            before it
    """
    insn = analysis.at(vaddr)
    table = _table_of(analysis, insn)
    if table is None:
        if insn.rip_relative is not None:   # a PLT's, or a tail call through
            analysis.known[vaddr] = ()      # a pointer that has a name
        elif _is_stored(analysis, insn):
            analysis.known[vaddr] = ()
            analysis.stored.add(vaddr)
        return
    place = bisect.bisect_right(bases, table.vaddr)
    limit = bases[place] if place < len(bases) else table.vaddr + (1 << 32)
    found = _table_targets(analysis, table, limit, read, is_executable)
    if found is not None:
        analysis.known[vaddr] = found
        analysis.tables[vaddr] = table
        if table.vaddr not in bases:
            bisect.insort(bases, table.vaddr)
            _cut_before(analysis, table)


def _cut_before(analysis, table):
    """End the tables at table whose bound is not seen and which were read
    before it was found."""
    for vaddr, other in analysis.tables.items():
        n_entries = (table.vaddr - other.vaddr) // other.entry_size
        if 0 < n_entries < len(analysis.known[vaddr]) and not _bound(
                analysis, other):
            analysis.known[vaddr] = analysis.known[vaddr][:n_entries]


def _writer(analysis, vaddr, reg):
    """Return the Insn that set reg before vaddr on a straight way, or None.

    A branch that leads in between, and whatever is not understood, end it.
    """
    for _ in range(_N_BACK):
        if vaddr in analysis.targets:
            return None
        insn = analysis.before(vaddr)
        if insn is None or insn.flow not in (NEXT, JCC):
            return None
        if _effects_of(insn)[1] >> reg & 1:
            return insn
        vaddr = insn.vaddr
    return None


def _table_of(analysis, jump):
    """Return the _Table that an indirect jump goes through, or None."""
    operands = _operands(jump)
    if operands.rm < 0:
        return _word_table(analysis, jump, operands)
    writer = _writer(analysis, jump.vaddr, operands.rm)
    source = _operands(writer) if writer is not None else None
    if source is None:
        return None
    if writer.opcode == 0x8b and source.rm < 0 and writer.rex & 8:
        return _word_table(analysis, writer, source)
    if writer.opcode in (0x01, 0x03) and source.rm >= 0:
        for base, load in ((source.reg, source.rm), (source.rm, source.reg)):
            table = _relative_table(analysis, writer, base, load)
            if table is not None:
                return table
    return None


def _word_table(analysis, insn, operands):
    """Return the _Table of an operand [table + index*8], or None."""
    if operands.index < 0 or operands.scale != 8:
        return None
    vaddr = operands.disp
    if operands.base >= 0:
        base = _lea_of(analysis, insn.vaddr, operands.base)
        if base is None:
            return None
        vaddr += base
    return _Table(vaddr, 8, insn.vaddr, operands.index) if vaddr > 0 else None


def _relative_table(analysis, add, base, load):
    """Return the _Table of `add`, whose operands are the registers base
    (the table's address) and load (an entry of it), or None."""
    table = _lea_of(analysis, add.vaddr, base)
    entry = _writer(analysis, add.vaddr, load)
    if table is None or entry is None:
        return None
    if entry.code == b"\x48\x98":                   # cdqe, gcc -O0
        entry = _writer(analysis, entry.vaddr, 0)
        if entry is None or entry.opcode != 0x8b:
            return None
    elif entry.opcode != 0x63:                       # movsxd
        return None
    memory = _operands(entry)
    if memory.rm >= 0 or memory.index < 0 or memory.disp:
        return None
    for reg in (memory.base, memory.index):
        if reg >= 0 and _lea_of(analysis, entry.vaddr, reg) == table:
            index = memory.index if memory.scale == 4 else -1
            return _Table(table, 4, entry.vaddr, index)
    return None


def _lea_of(analysis, vaddr, reg):
    """Return what `lea reg, [rip + x]` has left in reg at vaddr, or None.

    The same one on every way that leads there: compilers hoist it out of
    loops. Calls keep the registers that the System V ABI says they keep.
    """
    seen, pending, found = set(), [vaddr], set()
    while pending:
        for before in analysis.ways_to(pending.pop()):
            insn = None if before is None else analysis.at(before)
            if insn is None or len(seen) > _N_SEARCHED:
                return None
            if _effects_of(insn)[1] >> reg & 1:
                if insn.opcode != 0x8d or insn.rip_relative is None:
                    return None
                found.add(insn.rip_relative)
            elif insn.flow == NEXT and _effects_row(insn.form) is None:
                return None             # who knows what it writes
            elif (insn.flow not in _KNOWN_WAYS
                  and not _CALLEE_SAVED >> reg & 1):
                return None
            elif before not in seen:
                seen.add(before)
                pending.append(before)
    return found.pop() if len(found) == 1 else None


# -- Stored pointers: what is not computed where it is jumped to.

_PASSED_ON = {              # opcode -> registers that a result is one of
    0x8b: lambda operands: (operands.rm,),              # mov r, r/m
    0x89: lambda operands: (operands.reg,)}             # mov r/m, r
_PASSED_ON.update(                                      # cmov r, r/m
    (opcode, lambda operands: (operands.reg, operands.rm))
    for opcode in range(0x140, 0x150))
_NO_RESULT = frozenset((                # cmp, test, push
    *range(0x38, 0x3e), 0x84, 0x85, 0xa8, 0xa9, *range(0x50, 0x58)))
_COMPARES = frozenset((                 # (opcode, modrm.reg): cmp, test, push
    (0x80, 7), (0x81, 7), (0x83, 7), (0xf6, 0), (0xf6, 1), (0xf7, 0),
    (0xf7, 1), (0xff, 6)))
_TO_E = frozenset((                     # modrm.rm alone is written
    *range(0x00, 0x40, 8), *range(0x01, 0x40, 8), 0x80, 0x81, 0x83, 0x88,
    0x89, 0x8f, 0xc0, 0xc1, 0xc6, 0xc7, *range(0xd0, 0xd4), 0xf6, 0xf7, 0xfe,
    0xff, *range(0x190, 0x1a0)))
_TO_G = frozenset((                     # modrm.reg alone
    *range(0x02, 0x40, 8), *range(0x03, 0x40, 8), 0x63, 0x69, 0x6b, 0x8a,
    0x8b, 0x8d, *range(0x140, 0x150), 0x1af, 0x1b6, 0x1b7, 0x1b8, 0x1bc,
    0x1bd, 0x1be, 0x1bf))
_VECTORS = frozenset((                  # modrm names no general register,
    *range(0x110, 0x118), 0x128, 0x129, 0x12b, 0x12e, 0x12f,    # or reads it
    *range(0x151, 0x178), 0x17c, 0x17d, 0x17f, 0x1c2, 0x1c6,
    *range(0x1d0, 0x1d7), *range(0x1d8, 0x1ff)))


def _may_change(insn, reg):
    """Tell whether insn may write a part of reg: unless it is known to have
    no result, or names it neither in its modrm or opcode nor implicitly."""
    form, opcode, modrm = insn.form, insn.opcode, insn.modrm
    row = _effects_row(form)
    if row is None or (opcode, modrm) == (0xdf, 0xe0):      # fnstsw ax
        return True
    if opcode in _NO_RESULT or (opcode, modrm >> 3 & 7) in _COMPARES:
        return reg == _SP
    if any(_IMPLICIT.get(letter, -1) == reg for letter in row[0] + row[1]):
        return True
    if modrm < 0:
        named = [opcode & 7 | form.rex << 3 & 8]
        if opcode in (0x9f, 0xa0):                          # lahf, mov al
            named = [0]
        elif (0x70 <= opcode < 0x90 or 0x98 <= opcode < 0xb0
              or 0xc0 <= opcode < 0x100 or opcode == 0x90 and named == [0]):
            named = []
    elif opcode in _VECTORS:
        named = []
    else:
        operands = _operands(insn)
        named = ([operands.rm] if opcode in _TO_E else [operands.reg]
                 if opcode in _TO_G else [operands.rm, operands.reg])
    is_byte = (opcode >= 0x100 or modrm >= 0 and opcode & 1 == 0
               or 0xb0 <= opcode < 0xb8)
    return reg in named or (                                # ah ch dh bh
        is_byte and reg < 4 and reg + 4 in named and not form.rex & 8)


def _is_stored(analysis, jump):
    """Tell whether an indirect jump goes to a pointer that was stored whole.

    It is if, on every way within the function, its target is loaded as one
    word from outside of the frame and without an index, was in a register
    when the function was entered, is what a call returned, or a constant.
    Then somebody had the address of the place before. If that is within a
    function, it is an entry of it by a symbol, a relocation, a word of data
    (where there are no relocations) or a lea or constant in code, which are
    all known; or it was added up from a table of differences, which takes
    the table's address, or that of a label within: see _may_lead_on.
    """
    operands = _operands(jump)
    if operands.rm < 0:
        return _is_outside(analysis, jump, operands)
    return _all_ways(analysis, jump.vaddr, operands.rm, _as_target)


def _is_outside(analysis, insn, operands):
    """Tell whether a memory operand has no index and is surely no word that
    the function has put into its frame by rsp or rbp."""
    return operands.index < 0 and (operands.base < 0 or _all_ways(
        analysis, insn.vaddr, operands.base, _as_base))


def _as_target(analysis, insn, operands):
    """Return the registers of which one's value insn sets a target to; None
    unless it is one of theirs, a constant, or loaded from _is_outside."""
    opcode = insn.opcode
    if 0xb8 <= opcode < 0xc0 and insn.form.imm_size == 4:
        return ()
    if opcode in (0x8b, 0x89) or 0x140 <= opcode < 0x150:
        if not insn.rex & 8:
            return None
        kept = (operands.reg,) if opcode >= 0x140 else ()       # cmov
        if operands.rm >= 0:
            return kept + ((operands.reg,) if opcode == 0x89
                           else (operands.rm,))
        return kept if _is_outside(analysis, insn, operands) else None
    return () if opcode == 0x8d and insn.rip_relative is not None and (
        insn.rex & 8) else None


def _as_base(analysis, insn, operands):
    """Return the registers that insn makes an address of; None unless it
    moves them only by a constant, or loads it."""
    opcode = insn.opcode
    if opcode == 0x8b and insn.rex & 8 and operands.rm < 0:
        return ()
    if opcode == 0x8d and insn.rex & 8 and operands.index < 0:  # lea
        return () if operands.base < 0 else (operands.base,)
    if opcode in (0x81, 0x83) and insn.rex & 8 and operands.rm >= 0 and (
            insn.modrm >> 3 & 7 in (0, 4, 5)):              # add, and, sub
        return (operands.rm,)
    return _as_target(analysis, insn, operands)


def _all_ways(analysis, vaddr, reg, sources_of):
    """Tell whether all that sets reg, on each way to vaddr, is understood:
    the function's entry, a call's result, or an instruction of which
    sources_of(analysis, insn, operands) returns the registers it copies."""
    seen, pending = set(), [(vaddr, reg)]
    while pending:
        here, reg = pending.pop()
        if reg == _SP or len(seen) > _N_SEARCHED:
            return False
        for before in analysis.ways_to(here):
            insn = None if before is None else analysis.at(before)
            regs = _sources(analysis, here, insn, reg, sources_of)
            if regs is None:
                return False
            for each in regs:
                if (before, each) not in seen:
                    seen.add((before, each))
                    pending.append((before, each))
    return True


def _sources(analysis, here, insn, reg, sources_of):
    """Return the registers in front of insn that reg behind it, at here, has
    its value of; None if that is not known. Without insn here is entered."""
    if insn is None:
        return () if (here == analysis.function.vaddr
                      and not analysis.strays) else None
    flow = insn.flow
    if flow in (CALL, CALL_IND):
        return () if reg == 0 else (reg,) if _CALLEE_SAVED >> reg & 1 else None
    if flow == LOOP and reg == 1 or flow != NEXT and flow not in _KNOWN_WAYS:
        return None
    if flow == NEXT and _effects_of(insn)[1] >> reg & 1:
        return sources_of(analysis, insn, _operands(insn))
    return None if flow == NEXT and _may_change(insn, reg) else (reg,)


def _bound(analysis, table):
    """Return how many entries a check in front of the load allows, or 0.

    cmp index, N; ja: N + 1. The index may be copied or extended between.
    """
    reg, vaddr, following = table.index, table.place, None
    for _ in range(_N_BACK):
        insn = analysis.before(vaddr) if reg >= 0 else None
        if insn is None or insn.flow not in (NEXT, JCC):
            return 0
        operands, opcode = _operands(insn), insn.opcode
        if (opcode in (0x80, 0x81, 0x83) and operands.rm == reg
                and insn.modrm >> 3 & 7 == 7
                or opcode in (0x3c, 0x3d) and reg == 0):         # cmp
            value = insn.code[insn.imm_offset:]
            return (int.from_bytes(value, "little") + 1
                    if following is not None and value[-1] < 128
                    and following.opcode in (0x77, 0x187) else 0)    # ja
        if _effects_of(insn)[1] >> reg & 1:
            reg = (_COPIES[opcode](operands) if opcode in _COPIES
                   and operands.rm >= 0 else -1)
        vaddr, following = insn.vaddr, insn
    return 0


def _table_targets(analysis, table, limit, read, is_executable):
    """Return the vaddrs in a table, or None if it is not understood."""
    known = _bound(analysis, table)
    room = max(limit - table.vaddr, 0) // table.entry_size
    if known > min(room, _N_ENTRIES):
        return None
    found = _run_of_code(table.vaddr, table.entry_size,
                         known or min(room, _N_ENTRIES), read, is_executable)
    if known and (len(found) < known
                  or any(analysis.is_middle(target) for target in found)):
        return None
    return found or None


def _run_of_code(vaddr, entry_size, count, read, is_executable, first=()):
    """Return the targets of the words at vaddr, up to count of them, as
    far as they are vaddrs of code: 8-byte words, or 4 relative to vaddr.

    first   those known to begin the run
    """
    found = list(first)
    while len(found) < count:           # most words lead nowhere: look at
        n_more = min(count - len(found), 64 if found else 1)    # one first
        here = vaddr + len(found) * entry_size
        data = read(here, n_more * entry_size)
        while not data and n_more > 1:      # up to the end of what is there
            n_more //= 2
            data = read(here, n_more * entry_size)
        n_read = len(data or b"") // entry_size
        for word in struct.unpack_from(
                "<%d%s" % (n_read, "q" if entry_size == 8 else "i"),
                data or b""):
            target = word if entry_size == 8 else vaddr + word
            if not is_executable(target):
                return found
            found.append(target)
        if not n_read:
            break
    return found


def _first_entries(vaddr, read, is_executable):
    """Return [(size, targets)] of what may be a run of code at vaddr, by its
    first word: the targets are that one's."""
    word = read(vaddr, 8)
    if not word:
        return [(8, ()), (4, ())]               # four there may be
    targets = (8, _INT64(word)[0]), (4, vaddr + _INT32(word)[0])
    return [(size, (target,)) for size, target in targets
            if is_executable(target)]


def _refers_into(analysis, low, high, read, is_executable,
                 but_known=False):
    """Return whether the function names [low, high), or a table that leads
    there, perhaps but_known tables of its jumps.

    A table is a run of words that are vaddrs of code, or 4-byte ones that
    are relative to its start.
    """
    if analysis.references is None:
        analysis.references = {}
    references = analysis.references.get(but_known)
    if references is None:
        names = analysis.names()
        if but_known and analysis.tables:
            names -= {table.vaddr for table in analysis.tables.values()}
        references = analysis.references[but_known] = names.union(
            target for name in names for size, first in _first_entries(
                name, read, is_executable)
            for target in _run_of_code(name, size, _N_ENTRIES, read,
                                       is_executable, first))
    return any(vaddr in references for vaddr in range(low, high))


# -- Exits: where a frame of a function ends.

class Exit(NamedTuple):
    """An instruction that leaves a function for good."""
    vaddr: int
    function: Function      # itself, or the part that the exit is in
    is_conditional: bool    # a tail jump that is not always taken
    is_shared: bool = False     # other functions may leave by it, too
    is_ret: bool = False        # else what is returned is not known yet


def find_exits(function, branches, is_part=lambda vaddr: False):
    """Where a function is left: every ret and tail jump. -> (Exit, ...)

    is_part   does a part of this function (gcc's .cold) begin at a vaddr?
    What comes back is a part without a name, too, and what is entered in
    the middle may be one: a frame is left where it ends. Raises
    RefusalError for what may or may not be an exit, as times would be
    wrong without it.
    """
    found, family = [], [function]
    for each in family:
        analysis = branches.analysis(each)
        for form, vaddr in zip(analysis.forms, analysis.starts):
            if form.flow in _LEAVES:
                found += _exits_at(analysis, analysis.at(vaddr), family,
                                   branches, is_part)
        if any(insn.flow in _LEAVES for insn in analysis.strays):
            raise RefusalError("exit", "0x%x is entered in the middle of an "
                               "instruction" % each.vaddr, each.vaddr)
        if analysis.last_flow in (NEXT, JCC, LOOP, XBEGIN, SYSCALL):
            raise RefusalError("exit", "it runs on into what is behind it, "
                               "at 0x%x" % analysis.end, analysis.end)
    if not found:
        raise RefusalError("exit", "it has no exit", function.vaddr)
    own = {function.vaddr} | {
        each.vaddr for each in family if is_part(each.vaddr)
        or _comes_back(each, family[:1], branches)}
    return tuple(leave._replace(is_shared=leave.function.vaddr not in own)
                 for leave in sorted(found))


_MOST_PARTS = 8
_LEAVES = frozenset((RET, JMP, JCC, LOOP, XBEGIN, JMP_IND, FAR))


def _exits_at(analysis, insn, family, branches, is_part):
    """[Exit] of one instruction that may leave; parts found join family."""
    flow, vaddr, target = insn.flow, insn.vaddr, insn.target
    if flow == RET:
        return [Exit(vaddr, analysis.function, False, is_ret=True)]
    if flow == FAR:
        raise RefusalError("exit", "0x%x leaves it by a far transfer" % vaddr,
                           vaddr)
    if flow == JMP_IND:
        return _indirect_exit(analysis, vaddr, family, branches)
    if target == family[0].vaddr:       # begins anew, at the same rsp
        return [Exit(vaddr, analysis.function, flow != JMP)]
    if any(f.vaddr <= target < f.vaddr + f.size for f in family):
        return []
    part = branches.function_at and branches.function_at(target)
    if part and _is_stub(part, target):
        part = None                     # of a PLT: somewhere else
    if part and (target != part.vaddr or is_part(part.vaddr)
                 or _comes_back(part, family, branches)):
        if len(family) >= _MOST_PARTS:
            raise RefusalError("exit", "it has more than %d parts"
                               % _MOST_PARTS, vaddr)
        family.append(part)
        return []
    if flow in (LOOP, XBEGIN):
        raise RefusalError("exit", "0x%x may leave it, by %s" % (
            vaddr, flow), vaddr)
    return [Exit(vaddr, analysis.function, flow == JCC)]


def _is_stub(function, vaddr):
    """Does code at vaddr do nothing but jump through a word, as a PLT's?"""
    at = vaddr - function.vaddr
    code = function.code[at:at + 24]
    code = code[len(ENDBR64):] if code.startswith(ENDBR64) else code
    try:
        insn = decode(code, vaddr)
    except DecodeError:
        return False
    return insn.flow == JMP_IND and insn.rip_relative is not None


def _comes_back(part, family, branches):
    """Does it jump behind the first byte of a function of the family?"""
    try:
        targets = [insn.target for insn in (
            branches.analysis(part).insn(place) for place, form in enumerate(
                branches.analysis(part).forms) if form.flow in (JMP, JCC))]
    except RefusalError:
        return False
    return any(f.vaddr < target < f.vaddr + f.size
               for f in family for target in targets)


def _indirect_exit(analysis, vaddr, family, branches):
    """[Exit] if an indirect jump can lead nowhere inside, [] if always."""
    jumps = resolve_jumps(analysis, branches.read, branches.is_executable)
    targets = analysis.known.get(vaddr)
    if targets and vaddr not in jumps.stored:
        if all(any(f.vaddr <= target < f.vaddr + f.size for f in family)
               for target in targets):
            return []
        raise RefusalError("exit", "the jump table of 0x%x leads out of it"
                           % vaddr, vaddr)
    for each in family:
        other = branches.analysis(each)
        low, end = each.vaddr + 1, each.vaddr + each.size
        if (other.entries or any(low <= name < end for name in other.names())
                or any(low <= name < end for name in analysis.names())
                or _refers_into(analysis, low, end, branches.read,
                                branches.is_executable)):
            raise RefusalError("exit", "0x%x may be a tail jump or one within "
                               "it" % vaddr, vaddr)
    return [Exit(vaddr, analysis.function, False)]


# -- Liveness: what a body at a site need not save.

_FLAGS_AT = 16                  # flags share a mask with the registers
_ALL = ALL_FLAGS << _FLAGS_AT | ALL_GPRS
_N_LIVENESS = 128               # instructions looked at per site
_masks = {}     # id of a Form, or -id of one whose flags hang on its count
#                 -> (reads, leaves, does it branch, Form)
_known_effects = {}             # Form -> Effects


def _depends_on_count(form):
    """Tell whether what a Form does to the flags hangs on its immediate."""
    row = _effects_row(form)
    return row is not None and row[3] == "all?"


def _effects_of(insn):
    """Return effects(insn). They depend on its Form alone, but for a shift
    by a constant, and code has few Forms, so they are kept."""
    known = _known_effects.get(insn.form)
    if known is None:
        known = effects(insn)
        if not _depends_on_count(insn.form):
            if len(_known_effects) > 50000:
                _known_effects.clear()
            _known_effects[insn.form] = known
    return known


def _reads_and_leaves(insn):
    """Return what insn reads and what it neither reads nor overwrites, as
    two masks; whether it branches; and its Form, which keeps the id from
    another."""
    form, key = insn.form, id(insn.form)
    if form.flow not in (NEXT, JCC, JMP):
        known = _ALL, 0, False, form
    else:
        known = _masks.get(-key)
        if known and insn.code[form.imm_offset] & 31:
            return known                # a count that is not zero
        reads, writes, flags_read, flags_written = effects(insn)
        known = (reads | flags_read << _FLAGS_AT,
                 _ALL & ~(reads | writes
                          | (flags_read | flags_written) << _FLAGS_AT),
                 form.flow in (JCC, JMP), form)
        if _depends_on_count(form):
            if not insn.code[form.imm_offset] & 31:
                return known
            key = -key
    if len(_masks) > 50000:
        _masks.clear()
    _masks[key] = known
    return known


def liveness(analysis, site):
    """Return (mask of dead registers, are all flags dead) at site.

    Dead is what every way from site writes in full before it reads it.
    Where a way leaves what is known (ret, call, indirect jump, another
    function, too far) everything is live there. rsp is never dead.
    """
    live, n_left, seen = 1 << _SP, _N_LIVENESS, {}
    forms, n_forms, known = analysis.forms, len(analysis.forms), _masks
    pending = [(analysis.place(site), _ALL, False)]
    while pending:
        place, open_, is_branch = pending.pop()
        open_ &= _ALL ^ live            # masks are no negative numbers: those
        if is_branch and open_:         # take their time in Python
            place = analysis.place(analysis.insn(place).target)
        while open_:
            if place in seen:
                open_ &= _ALL ^ seen[place]
                if not open_:
                    break
                seen[place] |= open_
            else:
                seen[place] = open_
            n_left -= 1
            if n_left < 0 or not 0 <= place < n_forms:
                live |= open_
                break
            try:
                reads, leaves, is_branch, form = known[id(forms[place])]
            except KeyError:
                reads, leaves, is_branch, form = _reads_and_leaves(
                    analysis.insn(place))
            live |= open_ & reads
            open_ &= leaves
            if is_branch:
                if form.flow == JMP:
                    place = analysis.place(analysis.insn(place).target)
                    continue
                pending.append((place, open_, True))    # it may not matter
            place += 1
    dead = _ALL ^ live
    return dead & ALL_GPRS, dead >> _FLAGS_AT == ALL_FLAGS


# -- Addresses that somebody looks at.

_CRITICAL_SECTION = struct.Struct("<IIQQQ")     # struct rseq_cs, <sys/rseq.h>
# Opcodes that never fault without a memory operand; f6 and f7 divide too.
CALM = """
00-05 08-0d 10-15 18-1d 20-25 28-2d 30-35 38-3d 50-5f 63 68-6b 70-7f
80 81 83-8b 8d 90-99 a8 a9 b0-bf c0-c3 c6 c7 d0-d3 e8 e9 eb f6 f7 fe ff
110 111 11e 11f 128 129 140-14f 157 16e 16f 17e 17f 180-18f 190-19f 1a3 1ab
1af 1b3 1b6 1b7 1ba-1bf 1c8-1cf 1d6 1ef
"""


def _opcodes(text):
    """Return the set of opcodes in rows like CALM's."""
    found = set()
    for word in text.split():
        first, _, last = word.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(found)


# Those that read memory and never write it; and groups that do for a /reg.
LOADS = """
03 0b 13 1b 23 2b 33 38-3b 63 84 85 8a 8b 110 128 16e 16f 1b6 1b7 1be 1bf 1af
140-14f
"""
# Those whose modrm.reg is no general register, or one that they only read.
REG_IS_SOURCE = """
00 01 08 09 10 11 18 19 20 21 28 29 30 31 38-3b 80 81 83-85 88 89 c0 c1 c6 c7
d0-d3 f6 f7 fe ff 110 111 11e 11f 128 129 157 16f 17f 1a3 1ba 1ef
"""
_CALM, _LOADS = _opcodes(CALM), _opcodes(LOADS)
_SSE = _opcodes("110-117 128 129 12e 12f 151-16f 1d6")  # no GPR is written
_REG_IS_SOURCE = _opcodes(REG_IS_SOURCE) | _SSE
_NO_ACCESS = frozenset((0x8d, 0x11e, 0x11f))    # lea, endbr64, nop
_LOADS_BY_REG = {(0x80, 7), (0x81, 7), (0x83, 7), (0xf6, 0), (0xf7, 0),
                 (0xff, 2), (0xff, 4), (0xff, 6)}
_CANARY = re.compile(rb"\x64\x48[\x2b\x33\x3b\x8b].\x25\x28\0\0\0\Z",
                     re.DOTALL)      # fs:0x28, in every thread's TCB


# What a signal handler may be told of, as a mask.
FAULTS_OF_MEMORY, FAULTS_OF_NUMBERS = 1, 2      # SIGSEGV, SIGBUS; SIGFPE
_ANY_FAULT = FAULTS_OF_MEMORY | FAULTS_OF_NUMBERS


def _only_loads(insn):
    """Tell whether insn surely writes no memory, if it has such an operand.
    """
    return (insn.opcode in _LOADS
            or (insn.opcode, insn.modrm >> 3 & 7) in _LOADS_BY_REG)


def _faults(insn, read):
    """Return the mask of what insn may raise: #PF and #GP, #DE and #MF.

    Memory at rsp is taken to be there, and what read() can read in the
    module to stay readable.
    """
    if insn.opcode not in _CALM:
        return _ANY_FAULT
    if insn.opcode in (0xf6, 0xf7) and insn.modrm >> 3 & 7 > 5:
        return _ANY_FAULT               # div, idiv
    if insn.modrm < 0 or insn.opcode in _NO_ACCESS:
        return 0
    if insn.rip_relative is not None or _CANARY.match(insn.code):
        is_there = (insn.rip_relative is None
                    or len(read(insn.rip_relative, 16) or b"") == 16)
        return (0 if _only_loads(insn) and is_there else FAULTS_OF_MEMORY)
    operands = _operands(insn)
    return (0 if operands.rm >= 0 or operands.base == _SP
            and operands.index < 0 else FAULTS_OF_MEMORY)


def _may_write(insn):
    """Return the mask of registers that one of CALM may write, if in part.
    """
    form = insn.form
    letters = "".join((_effects_row(form) or ("acdbspSD", ""))[:2])
    numbers = [] if form.modrm >= 0 else [form.opcode & 7
                                          | form.rex << 3 & 8]
    operands = _operands(insn)
    if operands is None:
        mask = _gprs(letters.strip("!-") + "a", form)
    else:
        mask = _gprs("".join(each for each in letters
                             if each in "acdbspSD"), form)
        numbers += [operands.rm] * (operands.rm >= 0)
        numbers += [operands.reg] * (insn.opcode not in _REG_IS_SOURCE)
    for number in numbers:
        mask |= 1 << number | (1 << number - 4 if 4 <= number < 8 else 0)
    return mask


def _rseq_ranges(analysis, limits):
    """Return ((low, high, reason), ...) that rseq looks at in a function.

    The kernel sends a thread that it preempts in [start, start + size) of
    a struct rseq_cs to its abort vaddr, behind four bytes of signature
    (rseq(2)). A signature without its rseq_cs refuses the function.
    """
    if analysis.rseq is not None or not limits.branches.has_rseq:
        return analysis.rseq or ()
    reason, ranges = "rseq section", []
    for name in analysis.names():
        data = limits.read(name, _CRITICAL_SECTION.size) or b""
        if len(data) < _CRITICAL_SECTION.size:
            continue
        version, _, start, size, abort = _CRITICAL_SECTION.unpack(data)
        if (not version and 0 < size < 1 << 20 and abort >= 4
                and limits.read(abort - 4, 4) == RSEQ_SIGNATURE):
            ranges += [(start, start + size, reason),
                       (abort - 4, abort, reason)]
    function = analysis.function
    at = function.code.find(RSEQ_SIGNATURE)
    while at >= 0:
        vaddr = function.vaddr + at
        place = bisect.bisect_right(analysis.starts, vaddr) - 1
        insn = analysis.at(analysis.starts[place])
        if (not any(low == vaddr for low, _, _ in ranges)
                and (insn.imm_size != 4
                     or insn.vaddr + insn.imm_offset != vaddr)):
            ranges.append((function.vaddr, analysis.padding_end, reason))
        at = function.code.find(RSEQ_SIGNATURE, at + 1)
    analysis.rseq = tuple(ranges)
    return analysis.rseq


# -- Planning: the rules, each with its refusal.

class _Limits(NamedTuple):
    """What plan_window was told of the process."""
    branches: BranchScan
    read: object
    is_executable: object
    forbidden: tuple
    seccomp: bool
    catches: int            # mask of the faults that a handler is told of
    taken: ByteRanges
    through: int = 0        # an instruction that must be displaced too
    first: int = 0          # of those that stay in front of the window, or 0
    is_go: bool = False     # Go's runtime stops its threads at any place
    may_borrow: bool = False    # a slot of a window that is planned for it


def plan_window(function, site, branches, read=None, is_executable=None,
                forbidden=(), seccomp=False, catches=0, taken=None,
                through=0, is_go=False, may_borrow=False):
    """Return the Window for a jump at site, an instruction of function.

    branches        BranchScan of the module, best with function_at
    read            vaddr, size -> bytes or None: the module's memory
    is_executable   vaddr -> bool; default: a segment of branches holds it
    forbidden       ((low, high, reason), ...) where nothing may be displaced
    seccomp         a filter may look at the address of a syscall
    catches         mask of the faults whose address a handler may look at
    taken           ByteRanges of other patches; Window.ranges is to be added
    through         the vaddr of an instruction to be displaced with the rest
    is_go           the module is Go's
    may_borrow      a Window with a lender will do, if there is no other
    Raises RefusalError. Whether rip-relative operands reach is not known
    here: relocate() tells at the real address.
    """
    limits = _Limits(branches, read or branches.read,
                     is_executable or branches.is_executable,
                     tuple(forbidden), seccomp, catches,
                     ByteRanges() if taken is None else taken, through, 0,
                     is_go, may_borrow and not is_go)
    return _plan_window(branches.analysis(function), site, limits)


def _plan_window(analysis, site, limits):
    """plan_window(), where limits are known."""
    branches, place = limits.branches, analysis.place(site)
    if place < 0:
        raise RefusalError("no instruction", "0x%x is not the start of an "
                           "instruction of its function" % site, site)
    if place:
        _refuse_unreachable(analysis, place, limits)
    if analysis.function.code.startswith(ENDBR64,
                                         site - analysis.function.vaddr):
        site = _behind_endbr64(analysis, site, branches)
    limits = _without_rseq(analysis, limits)
    try:
        window = _best_window(analysis, site, limits)
    except RefusalError as refusal:
        window = _behind_kept(analysis, site, limits, refusal)
    dead_regs, flags_dead = liveness(analysis, window.site)
    return window._replace(dead_regs=dead_regs, flags_dead=flags_dead,
                           is_loop=site in analysis.targets)


def _without_rseq(analysis, limits):
    """Return limits that forbid the function's rseq sections, too."""
    critical = _rseq_ranges(analysis, limits)
    return limits._replace(forbidden=limits.forbidden + critical
                           ) if critical else limits


def other_slot(function, window, branches, read=None, is_executable=None,
               forbidden=(), taken=None):
    """Return the vaddr of a slot for a Window with a two-byte jump, or 0.

    function is the one that holds it, and the others are those of
    plan_window: where its present slot is, if that is not taken any more.
    """
    limits = _Limits(branches, read or branches.read,
                     is_executable or branches.is_executable,
                     tuple(forbidden), False, 0,
                     ByteRanges() if taken is None else taken)
    analysis = branches.analysis(function)
    return _slot(analysis, window.site, window.size,
                 _without_rseq(analysis, limits))


def _best_window(analysis, site, limits):
    """Return the Window whose jump is at site: of five bytes, or of two."""
    try:
        window = _window(analysis, site, JUMP_SIZE, limits)
        if len(window.insns) > 1 and window.insns[-1].flow in (CALL,
                                                               CALL_IND):
            window = _without_call(analysis, window, limits)
        return window
    except RefusalError as refusal:
        try:
            return _ladder(analysis, site, limits, refusal)
        except RefusalError:
            return _looped_window(analysis, site, limits, refusal)


def _looped_window(analysis, site, limits, refusal):
    """Return a Window that has the branches that lead into it.

    Each is displaced as well, and its copy leads to the copy of what it
    leads to: no branch arrives any more, if all are of the function and
    behind the site. Then a loop runs in the trampoline. refusal is raised
    if there is no such window.
    """
    end, through = site + JUMP_SIZE, limits.through
    while True:
        sources = [source for source, _ in limits.branches.entering(
            site + 1, max(end, through + 1))]
        last = max(sources, default=0)
        if (not sources or min(sources) < site
                or last >= min(site + _LONGEST_LOOP, analysis.end)):
            raise refusal
        place = bisect.bisect_right(analysis.starts, last) - 1
        if end >= analysis.starts[place] + analysis.forms[place].size:
            break
        through = max(through, analysis.starts[place])
        end = analysis.starts[place] + analysis.forms[place].size
    try:
        return _window(analysis, site, JUMP_SIZE,
                       limits._replace(through=through))
    except RefusalError:
        raise refusal


_MOST_KEPT = 12


def _behind_kept(analysis, site, limits, refusal):
    """Return a Window behind site's instruction, which stays in place.

    What only that instruction leads to runs as often as it does, unless it
    faults. So loads that must not be displaced take a probe, and what lies
    across a page. The body finds what the kept instructions have computed:
    kept_changes() tells. refusal is raised if there is none.
    """
    kept, vaddr, limits = [], site, limits._replace(first=site)
    while len(kept) < _MOST_KEPT:
        insn = analysis.at(vaddr)
        if (insn is None or insn.flow != NEXT or not _can_keep(insn)
                or vaddr == limits.through      # it must be displaced
                or limits.taken.overlap(vaddr, vaddr + insn.size)):
            break
        kept.append(insn)
        vaddr += insn.size
        try:
            _refuse_arrivals(analysis, site, vaddr + 1, 2, limits)
        except RefusalError:
            break
        try:
            return _best_window(analysis, vaddr, limits)._replace(
                kept=tuple(kept))
        except RefusalError:
            continue
    raise refusal


def _can_keep(insn):
    """Tell whether it is known what insn writes, and rsp stays a stack's.
    """
    if insn.opcode not in _CALM and insn.opcode not in _SSE:
        return False
    return (not _may_write(insn) >> _SP & 1 or insn.opcode & ~7 == 0x50
            or insn.opcode in (0x81, 0x83) and insn.modrm == 0xec)  # push, sub


def kept_changes(window, site):
    """Return (mask of registers, whether memory) that instructions which
    a Window keeps may change between site and its jump."""
    registers, is_written = 0, False
    for insn in window.kept:
        if insn.vaddr < site:
            continue
        registers |= _may_write(insn)
        operands = _operands(insn)
        is_written |= insn.opcode & ~7 == 0x50 or not (
            operands is None or operands.rm >= 0
            or insn.opcode in _NO_ACCESS or _only_loads(insn))
    return registers, is_written


_INT_0X80 = b"\xcd\x80"          # the system call of 32-bit programs


def plan_trap(site, function, branches, forbidden=(), seccomp=False,
              taken=None):
    """Return the Window for an int3 at site: any one instruction.

    function    the Function that holds it, or None
    The others are those of plan_window. One byte changes, and it begins an
    instruction, so nothing can arrive in the middle. What remains is code
    that is looked at by its address. Raises RefusalError, DecodeError,
    and RelocationError for what runs nowhere else.
    """
    limits = _Limits(branches, branches.read, branches.is_executable,
                     tuple(forbidden), seccomp, 0, taken or ByteRanges())
    insn = decode(branches.read(site, 15) or b"", site)
    relocate_trapped(insn, site)        # raises for what stays
    if branches.has_rseq:
        if function is None:
            raise RefusalError("rseq section", "its module has rseq sections,"
                               " and no function is known here", site)
        limits = limits._replace(forbidden=limits.forbidden + _rseq_ranges(
            branches.analysis(function), limits))
    for low, high, reason in limits.forbidden:
        if low < site + insn.size and site < high:
            raise RefusalError(reason, "%s at 0x%x is looked at by its "
                               "address" % (reason, low), site)
    _refuse_data(site, function, limits)
    if seccomp and (insn.flow == SYSCALL or insn.code == _INT_0X80):
        raise RefusalError("syscall", "a seccomp filter may look at where "
                           "the syscall at 0x%x is" % site, site)
    if limits.taken.overlap(site, site + insn.size):
        raise RefusalError("overlap", "another patch overlaps 0x%x" % site,
                           site)
    return Window(site, insn.size, (insn,), is_trap=True)


def _refuse_data(site, function, limits):
    """Refuse an int3 in what is, or may be, data in a function."""
    try:
        analysis = function and limits.branches.analysis(function)
    except RefusalError:
        return                          # it does not decode: nobody knows
    if analysis and analysis.at(site):
        _refuse_unreachable(analysis, analysis.place(site), limits)
        if (_data_in(analysis, site, site + 1) or limits.branches.use(
                site + 1, site + 1, analysis.function, site)):
            raise RefusalError("data", "0x%x is read as data" % site, site)


def _refuse_unreachable(analysis, place, limits):
    """Refuse a site that no way leads to: bytes behind a jump or ret that
    decode may be data of the function, which a patch would change."""
    branches, starts = limits.branches, analysis.starts
    site = starts[place]
    while place > 0 and analysis.forms[place - 1].flow not in _ENDS:
        if starts[place] in analysis.targets:
            return
        place -= 1
    vaddr, last = starts[place], place
    while starts[last] < site and _is_nop(analysis, last):
        last += 1               # where a label is aligned, it is behind them
    labels = set(starts[place:last + 1])
    if place <= 0 or not (labels.isdisjoint(analysis.targets)
                          and labels.isdisjoint(analysis.function.entries)
                          and labels.isdisjoint(analysis.function.words)):
        return
    is_unknown = bool(analysis.strays)
    for owner in _family(analysis, branches):
        jumps = resolve_jumps(owner, limits.read, limits.is_executable)
        if not labels.isdisjoint(jumps.targets):
            return
        is_unknown |= bool(jumps.unresolved)
    if any(branches.entering(label, label + 1) for label in labels):
        return
    # What a jump to an unknown place might lead to is code, unless somebody
    # takes its address or reads it: it may be a table just as well.
    if (not is_unknown or any(vaddr <= name <= site for name in itertools
                              .chain(analysis.entries, analysis.data))
            or branches.use(vaddr, site + 1, analysis.function)):
        raise RefusalError("unreachable", "no way leads to 0x%x: is it data?"
                           % vaddr, site)


def _behind_endbr64(analysis, endbr64, branches):
    """Return where the jump goes if an endbr64 stays where it is.

    A branch to there alone would be counted too, though it is no call.
    """
    site = endbr64 + len(ENDBR64)
    for source, _ in branches.entering(site, site + 1):
        raise RefusalError("branch behind endbr64", "the branch at 0x%x "
                           "leads behind the endbr64" % source, endbr64)
    if site in analysis.entries or analysis.at(site) is None:
        raise RefusalError("branch behind endbr64", "an entry of the "
                           "function is behind the endbr64", endbr64)
    return site


def _without_call(analysis, window, limits):
    """Return a Window that leaves the call at the end of this one in place,
    if there is one: a displaced call pushes a return address that the
    processor's return stack does not know, at 40 cycles or more.
    """
    try:
        other = _ladder(analysis, window.site, limits,
                        RefusalError("too short", "", window.site))
    except RefusalError:
        return window
    return window if other.insns[-1].flow in (CALL, CALL_IND) else other


def _ladder(analysis, site, limits, refusal):
    """Return a Window of a two-byte jump to a slot in dead bytes.

    refusal says why a five-byte jump does not fit; it is raised if this
    does not fit either.
    """
    try:
        window = _window(analysis, site, SHORT_JUMP_SIZE, limits)
    except RefusalError:
        raise refusal
    slot, lender = _slot(analysis, site, window.size, limits), None
    if not slot and limits.may_borrow:
        slot, lender = _borrowed_slot(analysis, window, limits)
    if not slot:
        raise refusal
    return window._replace(slot=slot, lender=lender)


def slot_range(site):
    """Return the [low, high) in which a slot may lie that `eb` at site
    reaches: on its page, so that one write never tears the two jumps apart.
    """
    page = site & -PAGE_SIZE
    return (max(site + SHORT_JUMP_SIZE - 128, page),
            min(site + SHORT_JUMP_SIZE + 127 + JUMP_SIZE, page + PAGE_SIZE))


def _slot(analysis, site, size, limits):
    """Return the vaddr of five dead bytes that `eb` at site reaches, or 0.

    At the end of a padding, as a jump at the ret in front needs its begin.
    """
    low, high = slot_range(site)
    for first, last in _dead_bytes(analysis, low, high, limits):
        # Behind a nop that control arrives at, none is dead.
        last = min([high, last] + [target for _, target in
                                   limits.branches.entering(first, last)])
        first, slot = max(first, low), last - JUMP_SIZE
        while first <= slot:
            end = slot + JUMP_SIZE
            blocks = [start for start, other, _ in limits.forbidden
                      if start < end and slot < other]
            blocks += (limits.taken.overlap(slot, end) or ())[:1]
            if not blocks and limits.branches.use(slot, end):
                blocks.append(slot)
            if slot < site + size and site < end:
                blocks.append(site)
            if not blocks:
                return slot
            slot = min(blocks) - JUMP_SIZE
    return 0


_MOST_LENDERS = 16              # that are tried for a slot
_LENDER_SIZE, _LARGEST_LENDER = 2 * JUMP_SIZE, 20       # bytes
_FROM_ENTRY = 16                # of a lender: who probes, probes there


def _borrowed_slot(analysis, window, limits):
    """Return (vaddr of five bytes of another window behind its jump, that
    Window) for one with a two-byte jump; (0, None) if there is none.

    What the lender displaces runs elsewhere for no probe of its own, so it
    is straight code that costs two jumps more, and not where functions
    begin. No instruction begins at the slot: a thread that stands there is
    on its way to the trampoline.
    """
    limits = limits._replace(may_borrow=False, first=0)
    found = sorted(_lenders(analysis, window, limits),
                   key=lambda found: abs(found[1] - window.site))
    for known, vaddr, last, slot in found[:_MOST_LENDERS]:
        try:
            lender = _plan_window(known, vaddr, limits._replace(through=last))
        except RefusalError:
            continue
        if (lender.site == vaddr and lender.last == last
                and not lender.slot):
            return slot, lender
    return 0, None


def _lenders(analysis, window, limits):
    """Yield (Analysis, vaddr, last instruction, slot) of what could be
    displaced for a slot; whether it may is another question."""
    low, high = slot_range(window.site)
    first = max(low - JUMP_SIZE, window.site & -PAGE_SIZE)
    for known in _neighbours(analysis, first, high, limits.branches):
        place = bisect.bisect_left(known.starts, max(
            first, known.function.vaddr + _FROM_ENTRY))
        for place in range(place, len(known.starts)):
            vaddr = known.starts[place]
            if vaddr >= high - _LENDER_SIZE:
                break
            last, slot = _room_behind_jump(known, place, low, high)
            if (slot and not window.site - _LARGEST_LENDER < vaddr
                    < window.site + window.size
                    and not limits.taken.overlap(vaddr, slot + JUMP_SIZE)):
                yield known, vaddr, last, slot


def _room_behind_jump(analysis, place, low, high):
    """Return (the last of the instructions from the place-th on that give
    a slot in [low, high), that slot), or (0, 0)."""
    vaddr, starts = analysis.starts[place], set()
    for place in range(place, len(analysis.starts)):
        last, form = analysis.starts[place], analysis.forms[place]
        end = last + form.size
        if (form.flow != NEXT or last in analysis.targets
                or end > vaddr + _LARGEST_LENDER
                or starts and analysis.starts[place - 1]
                + analysis.forms[place - 1].size != last):
            break
        starts.add(last)
        for slot in range(max(vaddr + JUMP_SIZE, low),
                          min(end, high) - JUMP_SIZE + 1):
            if slot not in starts:
                return last, slot
    return 0, 0


def _dead_bytes(analysis, low, high, limits):
    """Yield the (first, last) of paddings that touch [low, high) and that
    no instruction in front falls into: those behind functions, and within.
    Nearest to the site's function first.
    """
    for known in _neighbours(analysis, low, high, limits.branches):
        last = min([vaddr for vaddr in known.entries if vaddr >= known.end]
                   + [known.padding_end])
        if (known.last_flow in _ENDS and last - known.end >= JUMP_SIZE
                and not _data_in(known, known.end, last)):
            yield known.end, last
        for first, last in _nops_within(known, low, high):
            if not _may_arrive(known, first, last, limits):
                yield first, last


def _neighbours(analysis, low, high, branches):
    """Yield the Analyses of the functions that touch [low, high), as far as
    they follow each other; nearest to the site's function first."""
    functions = [analysis.function]
    vaddr = analysis.function.vaddr - 1
    while vaddr >= low:
        function = branches.function_at(vaddr)
        if function is None or function.vaddr > vaddr:
            break
        functions.append(function)
        vaddr = function.vaddr - 1
    vaddr = analysis.function.vaddr + len(analysis.function.code)
    while vaddr < high:
        function = branches.function_at(vaddr)
        if function is None or function.vaddr != vaddr or not function.code:
            break
        functions.append(function)
        vaddr += len(function.code)
    for function in functions:
        try:
            yield branches.analysis(function)
        except RefusalError:
            continue


def _is_nop(analysis, place):
    """Tell whether an instruction is one that assemblers pad with."""
    form, at = analysis.forms[place], (analysis.starts[place]
                                       - analysis.function.vaddr)
    return form.opcode in _NOP_OPCODES and _PADDING.fullmatch(
        analysis.function.code, at, at + form.size) is not None


def _nops_within(analysis, low, high):
    """Yield the (first, last) of nops and int3s in a function that touch
    [low, high), that a jump or ret stands before, with room for a jump."""
    first, flow = 0, NEXT
    place = bisect.bisect_left(analysis.starts, low - PAGE_SIZE // 16)
    for place in range(place, len(analysis.starts)):
        form, vaddr = analysis.forms[place], analysis.starts[place]
        if _is_nop(analysis, place):
            if not first and flow in _ENDS:
                first = vaddr
        else:
            if first and low < vaddr and vaddr - first >= JUMP_SIZE:
                yield first, vaddr
            if vaddr >= high:
                break
            first = 0
        flow = form.flow


def _may_arrive(analysis, first, last, limits):
    """Tell whether other than a direct branch may lead to [first, last)."""
    if (any(first <= vaddr < last for vaddr in analysis.entries)
            or any(insn.vaddr < last and first < insn.vaddr + insn.size
                   for insn in analysis.strays)
            or _data_in(analysis, first, last)):
        return True
    for owner in _family(analysis, limits.branches):
        jumps = resolve_jumps(owner, limits.read, limits.is_executable)
        if (jumps.unresolved
                or any(first <= target < last for target in jumps.targets)
                or jumps.stored
                and _may_lead_on(analysis, owner, first, last, limits)):
            return True
    return False


def _window(analysis, site, jump_size, limits):
    """Return the Window for a jump of jump_size bytes at site, no slot."""
    insns, end, place = [], site, analysis.place(site)
    while end < site + jump_size or end <= limits.through:
        if end >= analysis.end:
            end = _into_padding(analysis, insns, site, jump_size)
            break
        insn = analysis.insn(place + len(insns))
        insns.append(insn)
        end += insn.size
        if insn.flow in _ENDS and end == analysis.end:
            end = _into_padding(analysis, insns, site, jump_size)
            break
    end = max(end, site + jump_size)
    _refuse_place(analysis, site, jump_size, end, limits)
    inner = _inner_branches(insns)
    _refuse_insns(analysis, insns, limits,
                  MAX_LOOPED if inner else MAX_DISPLACED)
    _refuse_arrivals(analysis, site, end, len(insns), limits, inner)
    if limits.is_go and len(insns) > 1:
        _refuse_in_go(analysis.function, insns)
    return Window(site, end - site, tuple(insns))


# What Go's compiler begins a function with (cmd/internal/obj/x86, stacksplit):
# cmp rsp, [r14 + 16], where r14 is the goroutine; before Go 1.17, and in
# assembly, mov rcx, fs:[-8] gets it first. Neither ever faults.
_GO_STACK_CHECK = b"\x49\x3b\x66\x10"
_GO_GET_G = b"\x64\x48\x8b\x0c\x25\xf8\xff\xff\xff"


def _refuse_in_go(function, insns):
    """A preempted goroutine's pc lies on a stack that no thread owns, so it
    cannot be moved: it must not lie in the window, where Go preempts
    anywhere but in the stack check that a function begins with. Its runtime
    makes such addresses up, too: a goroutine returns to goexit + 1.
    """
    first, *rest = insns
    if not (first.vaddr == function.vaddr and len(rest) == 1
            and rest[0].flow == JCC and first.code == _GO_STACK_CHECK):
        raise RefusalError("Go", "a goroutine may be preempted between the "
                           "instructions at 0x%x" % first.vaddr, first.vaddr)


_INNER = frozenset((JCC, JMP, LOOP))     # flows that may lead within a window


def _inner_branches(insns):
    """Return {(vaddr of its opcode, target)} of the branches from one of
    the displaced insns to one behind the first."""
    branches = [insn for insn in insns if insn.flow in _INNER]
    starts = {insn.vaddr for insn in insns[1:]} if branches else ()
    return {(insn.vaddr + insn.opcode_offset, insn.target)
            for insn in branches if insn.target in starts}


def _data_in(analysis, low, high):
    """Return the vaddr of data that may reach into [low, high), or 0."""
    place = bisect.bisect_left(analysis.data, low - _LONGEST_READ + 1)
    found = analysis.data[place:place + 1]
    return found[0] if found and found[0] < high else 0


def _into_padding(analysis, insns, site, jump_size):
    """Return the end of a window that takes in trailing padding.

    Where control falls into the padding, its nops are displaced too and
    appended to insns; else it is dead and only overwritten.
    """
    function = analysis.function
    if analysis.padding_end < site + jump_size:
        raise RefusalError(
            "too short", "%d bytes to the end of the function and %d of "
            "padding; a jump takes %d" % (
                analysis.end - site, analysis.padding_end - analysis.end,
                jump_size), site)
    end = insns[-1].vaddr + insns[-1].size if insns else site
    if insns and insns[-1].flow in _ENDS:
        return max(end, site + jump_size)
    while end < site + jump_size:
        at = end - function.vaddr
        insn = decode(function.code[at:at + 15], end)
        if not _NOP.match(insn.code):
            raise RefusalError("too short", "control would fall into %s"
                               % _shown(insn), site)
        insns.append(insn)
        end += insn.size
    return end


def _refuse_place(analysis, site, jump_size, end, limits):
    """Refuse bytes that are another's or that one write may tear."""
    data = _data_in(analysis, site, end)
    if data:
        raise RefusalError("data", "0x%x is data that the function reads"
                           % data, site)
    if site // PAGE_SIZE != (site + jump_size - 1) // PAGE_SIZE:
        raise RefusalError("crosses a page", "the jump would cross the page "
                           "border at 0x%x" % (site + jump_size
                                               & -PAGE_SIZE), site)
    other = limits.taken.overlap(site, end)
    if other:
        raise RefusalError("overlaps a patch", "bytes 0x%x..0x%x are patched "
                           "already" % other, site)
    for low, high, reason in limits.forbidden:
        if low < end and site < high:
            raise RefusalError(reason, "0x%x..0x%x is within %s, 0x%x..0x%x"
                               % (site, end, reason, low, high), site)


def _refuse_insns(analysis, insns, limits, most):
    """Refuse instructions that must run where they are."""
    if len(insns) > most:
        raise RefusalError("too many", "a window of %d instructions"
                           % len(insns), insns[0].vaddr)
    is_watched = limits.catches or analysis.function.guarded
    for insn in insns:
        if insn.flow in (CALL, CALL_IND) and insn is not insns[-1]:
            raise RefusalError("call not last", "%s would return into the "
                               "window" % _shown(insn), insn.vaddr)
        if insn.flow in (TRAP, HALT):
            raise RefusalError("trap", "%s reports its own address"
                               % _shown(insn), insn.vaddr)
        if insn.flow == SYSCALL and limits.seccomp:
            raise RefusalError("syscall under seccomp", "%s: the filter may "
                               "look at its address" % _shown(insn),
                               insn.vaddr)
        if is_watched and _is_watched(analysis, insn, limits):
            raise RefusalError("may fault", "%s may fault, and a handler "
                               "look at its address" % _shown(insn),
                               insn.vaddr)
        try:
            relocate(insn, insn.vaddr)
        except RelocationError as error:
            raise RefusalError(error.rule, "%s: %s" % (
                _shown(insn), error), insn.vaddr) from error


def _is_watched(analysis, insn, limits):
    """Tell whether insn may fault and somebody look at where."""
    if (limits.is_go and insn.vaddr == analysis.function.vaddr
            and insn.code in (_GO_STACK_CHECK, _GO_GET_G)):
        return False
    watched = limits.catches
    if any(low < insn.vaddr + insn.size and insn.vaddr < high
           for low, high in analysis.function.guarded):
        watched = _ANY_FAULT
    return bool(watched and _faults(insn, limits.read) & watched)


def _refuse_arrivals(analysis, site, end, n_insns, limits, inner=()):
    """Refuse a window behind whose first byte control could arrive.

    inner   {(source, target)} of branches that are displaced themselves
    """
    for vaddr in analysis.entries:
        if site < vaddr < end:
            raise RefusalError("entry in window", "0x%x, an entry of the "
                               "function, is in the window" % vaddr, site)
    for insn in analysis.strays:
        if insn.vaddr < end and site < insn.vaddr + insn.size:
            raise RefusalError("branch into window", "a branch of the "
                               "function leads to 0x%x, in the middle of an "
                               "instruction" % insn.vaddr, site)
    family = _family(analysis, limits.branches)
    for source, target in limits.branches.arriving(analysis, site + 1, end):
        if (source, target) not in inner:
            raise RefusalError(
                "branch into window", "the branch at 0x%x leads to 0x%x in "
                "the window" % (source, target), site)
    for owner in family:
        jumps = resolve_jumps(owner, limits.read, limits.is_executable)
        for target in jumps.targets:
            if site < target < end:
                raise RefusalError("jump table entry in window",
                                   "a jump table leads to 0x%x in the window"
                                   % target, site)
        if n_insns > 1 and (jumps.unresolved or jumps.stored and _may_lead_on(
                analysis, owner, site + 1, end, limits)):
            _refuse_unresolved(analysis, owner, site, end, limits)
    used = limits.branches.use(site + 1, end, analysis.function, site)
    if used:
        raise RefusalError("entry in window" if used.is_address else "data",
                           "another function %s 0x%x" % (
                               "takes the address of" if used.is_address
                               else "reads", used.vaddr), site)


def _family(analysis, branches):
    """Return the Analyses of all functions whose jump tables may lead into
    this one: itself, and what it was split from or into (gcc's .cold).

    Parts are told by a branch behind the function's first byte, or by a
    conditional one to it, that is not refuted. Calls of it are neither.
    """
    if analysis.family is None:
        analysis.family = _kin(analysis, branches, branches.links(analysis),
                               branches.may_jump)
    return analysis.family


def _parts(analysis, branches):
    """Return _family(), with those that have no indirect jumps or whose
    branches are short ones."""
    if analysis.parts is None:
        low, end = analysis.function.vaddr, analysis.padding_end
        analysis.parts = _kin(
            analysis, branches, branches.into(low + 1, min(low + 128, end))
            + branches.into(max(low + 1, end - 128), end)
            + branches.links(analysis), bool)
    return analysis.parts


def _kin(analysis, branches, candidates, is_wanted):
    """Return [analysis] and the Analyses of those parts of it that branch
    into it by one of candidates and is_wanted: Function -> bool."""
    family, seen = [analysis], {analysis.function.vaddr}
    own = analysis.own
    for source, _ in candidates:
        if source in own:
            continue
        other = branches.function_at(source)
        if other is None:
            continue
        if other.vaddr in seen or not is_wanted(other):
            own = other.own         # most branches of a part lie close
            continue
        if branches.is_refuted(source):
            continue
        seen.add(other.vaddr)
        try:
            family.append(branches.analysis(other))
        except RefusalError:
            continue                    # then its branch was not refuted
    return family


def _may_lead_on(analysis, owner, first, last, limits):
    """Tell whether stored pointers that owner jumps through may lead to
    [first, last) of the function of analysis, and it is no known entry.

    Nobody has such an address without a label in the function to add to, or
    a table whose entries lead there. Only code of the function itself, and
    what it was split from or into, can have these. The tables of known jumps
    lead to known targets only.
    """
    low, end = analysis.function.vaddr, analysis.padding_end
    for part in _parts(owner, limits.branches):
        if (part.can_name(low, end)
                or _refers_into(part, first, last, limits.read,
                                limits.is_executable, part is owner)):
            return True
    return False


def _refuse_unresolved(analysis, owner, site, end, limits):
    """Refuse a window of several instructions unless it is at the entry
    and no table that the jump's function names leads into it."""
    jumps = resolve_jumps(owner, limits.read, limits.is_executable)
    vaddr = (jumps.unresolved or jumps.stored)[0]
    low = analysis.function.vaddr
    site = limits.first or site         # all from there on is entered there
    if site not in (low, low + len(ENDBR64)) or site != low and \
            analysis.at(low).code != ENDBR64:
        raise RefusalError("unresolved jump table", "where the jump at 0x%x "
                           "leads is not known" % vaddr, site)
    if _refers_into(owner, site + 1, end, limits.read,
                    limits.is_executable):
        raise RefusalError("unresolved jump table", "a word of a table of "
                           "the jump at 0x%x points into the window" % vaddr,
                           site)
# ---- 6  Assembler ---------------------------------------------------------
#
# What bodies are made of: one function per instruction form, named by
# mnemonic and operands, each returning bytes; its docstring is the SDM's
# encoding. Registers are numbers as in modrm and REX: rax is 0, r15 is 15.
# Invariant: a form has one length, whatever its operands' values, so that
# a trampoline has its final size before it has an address.

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
_S32 = struct.Struct("<i")
_U64 = struct.Struct("<Q")


def rel32(value, vaddr):
    """Four bytes of displacement. RelocationError beyond +-2 GiB."""
    if not -1 << 31 <= value < 1 << 31:
        raise RelocationError("more than 2 GiB to its target", vaddr,
                              "out of reach")
    return _S32.pack(value)


def jmp_rel32(vaddr, target):
    """E9 cd"""
    return b"\xe9" + rel32(target - (vaddr + 5), vaddr)


def jmp_rel8(vaddr, target):
    """EB cb"""
    distance = target - (vaddr + 2)
    if not -128 <= distance < 128:
        raise RelocationError("no slot within 127 bytes", vaddr,
                              "out of reach")
    return b"\xeb" + struct.pack("<b", distance)


def push_r64(reg):
    """50+rd, REX.B for r8-r15"""
    return (b"\x41" if reg > 7 else b"") + bytes([0x50 | reg & 7])


def pop_r64(reg):
    """58+rd, REX.B for r8-r15"""
    return (b"\x41" if reg > 7 else b"") + bytes([0x58 | reg & 7])


def lea_rsp_disp(disp):
    """REX.W 8D /r, [rsp + disp8 or disp32]: leaves the flags alone"""
    if -128 <= disp < 128:
        return b"\x48\x8d\x64\x24" + struct.pack("<b", disp)
    return b"\x48\x8d\xa4\x24" + _S32.pack(disp)


def mov_r32_imm32(reg, imm):
    """B8+rd id, REX.B for r8-r15"""
    return ((b"\x41" if reg > 7 else b"") + bytes([0xb8 | reg & 7])
            + struct.pack("<I", imm))


def mov_r32_fs_disp32(reg, disp):
    """64 8B /r, absolute disp32"""
    rex = b"\x44" if reg > 7 else b""
    return b"\x64" + rex + bytes([0x8b, 4 | (reg & 7) << 3, 0x25]) \
        + _S32.pack(disp)


def rdpid_r64(reg):
    """F3 0F C7 /7"""
    return b"\xf3" + (b"\x41" if reg > 7 else b"") + bytes(
        [0x0f, 0xc7, 0xf8 | reg & 7])


def lsl_r32_r32(reg, selector):
    """0F 03 /r: the segment limit of selector, flags clobbered"""
    rex = 0x40 | (reg > 7) << 2 | (selector > 7)
    return (bytes([rex]) if rex != 0x40 else b"") + bytes(
        [0x0f, 0x03, 0xc0 | (reg & 7) << 3 | selector & 7])


def and_r32_imm(reg, imm):
    """83 /4 ib, or 81 /4 id where imm does not fit seven bits"""
    rex = b"\x41" if reg > 7 else b""
    if imm < 128:
        return rex + bytes([0x83, 0xe0 | reg & 7, imm])
    return rex + bytes([0x81, 0xe0 | reg & 7]) + struct.pack("<I", imm)


def shl_r32_imm8(reg, imm):
    """C1 /4 ib"""
    return (b"\x41" if reg > 7 else b"") + bytes(
        [0xc1, 0xe0 | reg & 7, imm])


def add_r64_m64_rip(reg, vaddr, pointer):
    """REX.W 03 /r, rip-relative"""
    return bytes([0x48 | (reg > 7) << 2, 0x03, 5 | (reg & 7) << 3]) \
        + rel32(pointer - (vaddr + 7), vaddr)


def lock_inc_m64(reg, disp):
    """F0 REX.W FF /0, [reg + disp32]"""
    sib = b"\x24" if reg & 7 == RSP else b""
    return bytes([0xf0, 0x48 | (reg > 7), 0xff, 0x80 | reg & 7]) \
        + sib + _S32.pack(disp)


def lock_inc_m64_rip(vaddr, target):
    """F0 REX.W FF /0, [rip + disp32]"""
    return b"\xf0\x48\xff\x05" + rel32(target - (vaddr + 8), vaddr)


def add_rsp_128():
    """REX.W 83 /5 ib: sub rsp, -128, shorter than lea; clobbers the flags"""
    return b"\x48\x83\xec\x80"


# -- Any form with a modrm, and code whose jumps find their own length.

RIP, FS = 16, 17                # as the base of a Mem: no register
(ADD, OR, AND, SUB, XOR, CMP) = (0, 1, 4, 5, 6, 7)      # SDM A-6, group 1
(SHL, SHR, SAR) = (4, 5, 7)                             # SDM A-6, group 2
(_O, _B, _AE, _E, _NE, _BE, _A, _S, _NS, _L, _GE, _LE, _G) = (
    0, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15)          # SDM B.1.4.7


class Mem(NamedTuple):
    """A memory operand: [base + (index << shift) + disp]."""
    base: int               # a register; RIP: disp is a vaddr; FS
    disp: int = 0
    index: int = -1         # a register, or none
    shift: int = 0
    is_wide: bool = False   # disp32 whatever disp is: it differs by place


def _modrm(reg, rm):
    """modrm, sib and displacement of an operand, but of none with RIP."""
    reg = (reg & 7) << 3
    if isinstance(rm, int):
        return bytes([0xc0 | reg | rm & 7])
    if rm.base == RIP:
        return bytes([0x05 | reg])
    if rm.base == FS:
        return bytes([0x04 | reg, 0x25]) + _S32.pack(rm.disp)
    if rm.is_wide or not -128 <= rm.disp < 128:
        mod, disp = 0x80, _S32.pack(rm.disp)
    elif rm.disp or rm.base & 7 == RBP:
        mod, disp = 0x40, struct.pack("<b", rm.disp)
    else:
        mod, disp = 0, b""
    if rm.index < 0 and rm.base & 7 != RSP:
        return bytes([mod | reg | rm.base & 7]) + disp
    index = RSP if rm.index < 0 else rm.index
    return bytes([mod | reg | 4,
                  rm.shift << 6 | (index & 7) << 3 | rm.base & 7]) + disp


def with_modrm(opcode, reg, rm, size=8, imm=b"", prefix=b""):
    """prefix [66] [REX] opcode /r imm -> bytes up to the disp32 of RIP, imm

    size  of the operand, in bytes;   rm  a register or a Mem
    """
    rex = 0x48 if size == 8 else 0x40
    rex |= (reg > 7) << 2
    is_byte_register = size == 1 and 4 <= reg < 8
    if isinstance(rm, int):
        rex |= rm > 7
        is_byte_register |= size == 1 and 4 <= rm < 8
    else:
        rex |= (7 < rm.base < 16) | (rm.index > 7) << 1
        prefix += b"\x64" if rm.base == FS else b""
    if size == 2:
        prefix += b"\x66"
    return (prefix + (bytes([rex]) if rex > 0x40 or is_byte_register else b"")
            + opcode + _modrm(reg, rm)), imm


class _Jump(NamedTuple):
    """jmp, or jcc by the condition's number."""
    condition: Optional[int]
    label: int


class _Field(NamedTuple):
    """An instruction with four bytes that depend on where things are."""
    head: bytes             # what precedes the four
    kind: str               # "rip": value is a vaddr; "block": an offset
    value: int              # into the owner's block; "site": its index
    imm: bytes              # what follows
    owner: int = 0          # whose block or site


class Template(NamedTuple):
    """Finished code but for what its address and its places decide."""
    code: bytes
    labels: dict            # label -> offset
    fields: tuple           # (offset, end of the instruction, _Field), ...

    def at(self, vaddr, places):
        """The code for an address, and for the places of its owners.

        Raises RelocationError where data is out of reach.
        """
        code = bytearray(self.code)
        for offset, end, (_, kind, value, _, owner) in self.fields:
            if kind == "rip":
                field = rel32(value - (vaddr + end), vaddr)
            elif kind == "block":
                field = _S32.pack(value + places[owner].block)
            else:
                field = _S32.pack(places[owner].site_index)
            code[offset:offset + 4] = field
        return bytes(code)


class Code:
    """Instructions and labels, before they have an address."""

    def __init__(self):
        self.parts, self.cold, self.outer = [], [], []
        self.n_labels, self.jumped = 0, set()

    def put(self, code):
        """Bytes that run anywhere."""
        if self.parts and type(self.parts[-1]) is bytes:
            self.parts[-1] += code
        else:
            self.parts.append(code)

    def op(self, opcode, reg, rm, size=8, imm=b"", prefix=b""):
        """An instruction with a modrm: see with_modrm."""
        head, imm = with_modrm(opcode, reg, rm, size, imm, prefix)
        if type(rm) is not Mem:
            self.put(head + imm)
        elif rm.base == RIP:
            self.parts.append(_Field(head, "rip", rm.disp, imm))
        elif rm.is_wide:
            self.parts.append(_Field(head[:-4], "block", rm.disp, imm))
        else:
            self.put(head + imm)

    def label(self):
        """A place to jump to, not known yet."""
        self.n_labels += 1
        return self.n_labels

    def mark(self, label):
        """The place of a label is here."""
        self.parts.append(label)

    def jump(self, label, condition=None):
        """jmp, or jcc by the condition's number."""
        self.jumped.add(label)
        self.parts.append(_Jump(condition, label))

    def aside(self):
        """What follows is rare: until back(), it goes behind the rest."""
        self.outer.append(self.parts)
        self.parts = []

    def back(self):
        """The end of what aside() began, which does not fall through."""
        self.cold += self.parts
        self.parts = self.outer.pop()

    # -- The instructions that bodies use, by mnemonic.

    def mov(self, reg, rm, size=8):
        """mov reg, rm; nothing if they are the same."""
        if reg != rm:
            self.op(b"\x8b", reg, rm, size)

    def store(self, mem, reg, size=8):
        """mov mem, reg"""
        self.op(b"\x88" if size == 1 else b"\x89", reg, mem, size)

    def store_imm(self, mem, value, size=8):
        """mov mem, imm32 (sign-extended)"""
        self.op(b"\xc7", 0, mem, size, struct.pack("<i", value))

    def store_site(self, mem):
        """mov mem, imm32: the index of the site, faults behind it none"""
        head, _ = with_modrm(b"\xc7", 0, mem)
        if mem.is_wide:
            self.parts.append(_Field(head[:-4], "block", mem.disp, b""))
            head = b""
        self.parts.append(_Field(head, "site", 0, b""))

    def set(self, reg, value):
        """reg = value, flags untouched."""
        value &= (1 << 64) - 1
        if value < 1 << 32:
            self.put(mov_r32_imm32(reg, value))
        elif value >= (1 << 64) - (1 << 31):
            self.op(b"\xc7", 0, reg, 8, _S32.pack(value - (1 << 64)))
        else:
            self.set_wide(reg, value)

    def clear(self, reg):
        """xor reg, reg"""
        self.op(b"\x31", reg, reg, 4)

    def set_wide(self, reg, value):
        """mov reg, imm64: as long for any value"""
        self.put(bytes([0x48 | (reg > 7), 0xb8 | reg & 7])
                 + _U64.pack(value & (1 << 64) - 1))

    def join(self):
        """Put what is rare behind the rest, which jumps over it."""
        if self.cold:
            end = self.label()
            self.jump(end)
            self.parts += self.cold + [end]
            self.cold = []

    def alu(self, number, reg, operand, size=8):
        """add, or, and, sub, xor, cmp reg, operand (register or Mem)"""
        self.op(bytes([number << 3 | (2 if size == 1 else 3)]), reg, operand,
                size)

    def alu_imm(self, number, rm, value, size=8, is_wide=False):
        """add, or, and, sub, xor, cmp rm, value: imm8 where it fits"""
        if size == 1:
            self.op(b"\x80", number, rm, 1, struct.pack("<b", value))
        elif -128 <= value < 128 and not is_wide:
            self.op(b"\x83", number, rm, size, struct.pack("<b", value))
        else:
            self.op(b"\x81", number, rm, size, _S32.pack(value))

    def shift(self, number, reg, count=None):
        """shl, shr, sar reg by a constant, or by cl"""
        if count is None:
            self.op(b"\xd3", number, reg)
        else:
            self.op(b"\xc1", number, reg, 8, bytes([count]))

    def test(self, reg):
        """test reg, reg"""
        self.op(b"\x85", reg, reg)

    def lea(self, reg, mem):
        """lea reg, mem: flags untouched"""
        self.op(b"\x8d", reg, mem)

    def lock_inc(self, mem):
        """lock inc mem"""
        self.op(b"\xff", 0, mem, 8, b"", b"\xf0")

    def lock_dec(self, mem):
        """lock dec mem"""
        self.op(b"\xff", 1, mem, 8, b"", b"\xf0")

    def lock_add(self, mem, reg):
        """lock add mem, reg"""
        self.op(b"\x01", reg, mem, 8, b"", b"\xf0")

    def lock_cmpxchg(self, mem, reg):
        """lock cmpxchg mem, reg: if mem == rax, mem = reg, else rax = mem"""
        self.op(b"\x0f\xb1", reg, mem, 8, b"", b"\xf0")

    def lock_xadd(self, mem, reg):
        """lock xadd mem, reg"""
        self.op(b"\x0f\xc1", reg, mem, 8, b"", b"\xf0")

    def include(self, other, owner):
        """Append the code of another, whose labels become ours."""
        def moved(parts):
            for part in parts:
                kind = type(part)
                if kind is int:
                    part += self.n_labels
                elif kind is _Jump:
                    part = _Jump(part.condition, part.label + self.n_labels)
                elif kind is _Field:
                    part = part._replace(owner=owner)
                yield part
        self.parts += moved(other.parts)
        self.cold += moved(other.cold)
        self.n_labels += other.n_labels

    def sized(self, is_short):
        """([size of each part], {label: offset}) of a choice of jumps."""
        sizes, labels, at = [], {}, 0
        for part, short in zip(self.parts, is_short):
            kind = type(part)
            if kind is bytes:
                size = len(part)
            elif kind is int:
                labels[part], size = at, 0
            elif kind is _Jump:
                size = 2 if short else 5 + (part.condition is not None)
            else:
                size = len(part.head) + 4 + len(part.imm)
            sizes.append(size)
            at += size
        return sizes, labels

    def finish(self):
        """Choose the length of each jump. -> Template

        What is rare comes last. All begin short; one that does not reach is
        made long, which never makes another one shorter, so this ends.
        """
        self.parts += self.cold
        is_short, grows = [True] * len(self.parts), True
        while grows:
            sizes, labels = self.sized(is_short)
            at, grows = 0, False
            for index, part in enumerate(self.parts):
                at += sizes[index]
                if type(part) is _Jump and is_short[index] \
                        and not -128 <= labels[part.label] - at < 128:
                    is_short[index], grows = False, True
        return self.template(sizes, labels)

    def template(self, sizes, labels):
        """The Template of parts with these sizes."""
        code, fields, end = [], [], 0
        for part, size in zip(self.parts, sizes):
            end += size
            kind = type(part)
            if kind is bytes:
                code.append(part)
            elif kind is _Field:
                fields.append((end - 4 - len(part.imm), end, part))
                code += part.head, b"\0\0\0\0", part.imm
            elif kind is _Jump:
                away = labels[part.label] - end
                if size == 2:
                    code.append(bytes([0xeb if part.condition is None else
                                       0x70 | part.condition, away & 0xff]))
                else:
                    code += (b"\xe9" if part.condition is None else bytes(
                        [0x0f, 0x80 | part.condition])), _S32.pack(away)
        return Template(b"".join(code), labels, tuple(fields))


# ---- 7  Expressions -------------------------------------------------------
#
# A Python expression over 64-bit integers, parsed with ast into a tree that
# can be printed, evaluated, and compiled. The one idea: Python's meaning
# within 64 bits, so // and % round down and nothing overflows but by
# wrapping. Every value is signed, until u64() or u64[] or a literal beyond
# 2**63 makes it unsigned; as in C, unsigned wins where the two meet.
# Invariant: it always terminates, and its size is bounded.
#
#     (op, is_unsigned, argument, ...)      an inner node of the tree
#     ("const", is_unsigned, value)         ("name", False, name)
#     ("cast" or "load", u, type, tree)     ("chain", False, (op, ...), trees)
#     ("and" "or" "if" "not", u, tree, …)   as in Python; not yields 0 or 1
#     ("str", False, address, size)         ("buf", False, address, n, size)

MAX_TEXT = 1000                 # characters of an expression
MAX_DEPTH = 50                  # of its tree, and of its brackets
MAX_STR = 1024                  # bytes of a str or buf
STR_SIZE, BUF_SIZE = 64, 256    # bytes at most, where nothing else is said

CONSTANTS = {"us": 1000, "ms": 10**6, "sec": 10**9, "KiB": 1 << 10,
             "MiB": 1 << 20}
REGISTERS = ("rax rcx rdx rbx rsp rbp rsi rdi "
             "r8 r9 r10 r11 r12 r13 r14 r15").split()
MAX_ARGS = 16                   # arg0 to arg15
EXIT_NAMES = ("ret", "elapsed")
WATCH_NAMES = ("old", "new")    # of memory that is watched
INPUTS = frozenset(REGISTERS + list(EXIT_NAMES) + list(WATCH_NAMES)
                   + ["nsecs", "tid", "pid", "cpu", "caller"]
                   + ["arg%d" % n for n in range(MAX_ARGS)])
TYPES = {sign + str(bits): (bits // 8, sign == "s")
         for sign in "us" for bits in (8, 16, 32, 64)}
_OPERATORS = {
    "Add": "+", "Sub": "-", "Mult": "*", "FloorDiv": "//", "Mod": "%",
    "LShift": "<<", "RShift": ">>", "BitAnd": "&", "BitOr": "|",
    "BitXor": "^", "Eq": "==", "NotEq": "!=", "Lt": "<", "LtE": "<=",
    "Gt": ">", "GtE": ">="}
_UNARY = {"USub": "neg", "Invert": "~", "Not": "not"}
_UNSIGNED_END, _SIGNED_END = 1 << 64, 1 << 63
_STRANGE = re.compile(r"[^A-Za-z0-9_ ()\[\]+\-*/%<>=!&|^~,.]"
                      r"|(?<![=!<>])=(?!=)")


class ExpressionError(UbpError):
    """An expression that cannot be used. column counts from 0."""

    def __init__(self, text, column, why):
        super().__init__("use", text, "%s (column %d)" % (why, column + 1))
        self.text, self.column, self.why = text, column, why


class Expression(NamedTuple):
    """What parse_expression understood. tree: as drawn above."""
    text: str
    tree: tuple
    kind: str               # "int", "str" or "buf"
    size: int               # bytes at most of a str or buf; 8 of an int
    is_unsigned: bool
    form: str               # "hex", "sym" or "": how it wants to be printed
    names: frozenset        # the inputs that it reads
    reads_memory: bool      # through pointers: by a syscall, with faults
    warnings: tuple = ()    # what the user probably did not mean


def _nodes(tree):
    """Yield a tree and every tree in it."""
    pending = [tree]
    while pending:
        tree = pending.pop()
        yield tree
        pending += [part for part in (
            tree[3] if tree[0] == "chain" else tree[2:])
            if isinstance(part, tuple)]


class _Fault(Exception):
    """A division by zero, a negative shift, or memory that is not there."""


def _wrapped(value, is_unsigned):
    value &= _UNSIGNED_END - 1
    return value - _UNSIGNED_END if (
        value >= _SIGNED_END and not is_unsigned) else value


def _converted(value, type_):
    size, is_signed = TYPES[type_]
    value &= (1 << 8 * size) - 1
    return value - (1 << 8 * size) if (
        is_signed and value >> 8 * size - 1) else value


def _shifted(op, value, count):
    if count < 0:
        raise _Fault
    return value << min(count, 64) if op == "<<" else value >> min(count, 64)


def _divided(op, a, b):
    if b == 0:
        raise _Fault
    return a // b if op == "//" else a % b


_ARITHMETIC = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b,
    "*": lambda a, b: a * b, "&": lambda a, b: a & b,
    "|": lambda a, b: a | b, "^": lambda a, b: a ^ b,
    "//": lambda a, b: _divided("//", a, b),
    "%": lambda a, b: _divided("%", a, b),
    "<<": lambda a, b: _shifted("<<", a, b),
    ">>": lambda a, b: _shifted(">>", a, b)}
_COMPARISON = {
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b, "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}


def _load(read, vaddr, size):
    try:
        data = read(vaddr & _UNSIGNED_END - 1, size)
    except OSError:
        raise _Fault
    if len(data) != size:
        raise _Fault
    return data


def _computed(tree, values, read):
    """The int that a tree stands for. Raises _Fault."""
    op, is_unsigned = tree[:2]
    if op == "const":
        return tree[2]
    if op == "name":
        return _wrapped(values[tree[2]], False)
    if op in ("and", "or", "if", "not", "chain"):
        return _wrapped(_decided(tree, values, read), is_unsigned)
    if op == "load":
        vaddr = _computed(tree[3], values, read)
        return _converted(int.from_bytes(
            _load(read, vaddr, TYPES[tree[2]][0]), "little"), tree[2])
    if op == "cast":
        return _converted(_computed(tree[3], values, read), tree[2])
    operand = _wrapped(_computed(tree[2], values, read), is_unsigned)
    if op in ("neg", "~"):
        return _wrapped(-operand if op == "neg" else ~operand, is_unsigned)
    other = _computed(tree[3], values, read)
    if op not in ("<<", ">>"):          # a shift's count keeps its own sign
        other = _wrapped(other, is_unsigned)
    return _wrapped(_ARITHMETIC[op](operand, other), is_unsigned)


def _decided(tree, values, read):
    """The value of a tree that chooses which of its parts to compute."""
    op = tree[0]
    if op == "chain":
        left = tree[3][0]
        a = _computed(left, values, read)
        for sign, right in zip(tree[2], tree[3][1:]):
            b = _computed(right, values, read)
            is_unsigned = left[1] or right[1]
            if not _COMPARISON[sign](_wrapped(a, is_unsigned),
                                     _wrapped(b, is_unsigned)):
                return 0
            left, a = right, b
        return 1
    first = _computed(tree[2], values, read)
    if op == "not":
        return int(not first)
    if op == "if":
        return _computed(tree[3] if first else tree[4], values, read)
    if bool(first) == (op == "or"):
        return first
    return _computed(tree[3], values, read)


def _str_at(read, vaddr, size):
    """At most size bytes up to a NUL. Raises _Fault if not one is there."""
    data, end = b"", vaddr + size
    while vaddr < end and b"\0" not in data:
        step = min(end, (vaddr | PAGE_SIZE - 1) + 1) - vaddr
        try:
            data += _load(read, vaddr, step)
        except _Fault:
            if not data:
                raise
            break
        vaddr += step
    return data.split(b"\0")[0]


def evaluate(expression, values, read):
    """What a hit would compute. -> int, bytes, or None for a fault

    values  {name: int} of expression.names
    read    read(vaddr, size) -> bytes; raises OSError
    """
    tree = expression.tree
    try:
        if expression.kind == "int":
            return _computed(tree, values, read)
        vaddr = _computed(tree[2], values, read) & _UNSIGNED_END - 1
        if expression.kind == "str":
            return _str_at(read, vaddr, tree[3])
        size = min(max(_computed(tree[3], values, read), 0), tree[4])
        return _load(read, vaddr, size) if size else b""
    except _Fault:
        return None


class _Parser:
    """One expression on its way from ast to a tree."""

    def __init__(self, text, is_exit, shown=None, column=0):
        self.text, self.is_exit = text, is_exit
        self.shown, self.column = shown or text, column
        self.warnings = []

    def fail(self, why, node=None, column=0):
        """The error that points at a node, or at a column."""
        if node is not None:
            column = max(node.col_offset - 1, 0)    # syntax()'s bracket
        return ExpressionError(self.shown, self.column + column, why)

    def check(self):
        """Refuse what is no single line of brackets that match."""
        text, depth = self.text, 0
        if len(text) > MAX_TEXT:
            raise self.fail("more than %d characters" % MAX_TEXT)
        if not text.strip():
            raise self.fail("nothing to compute")
        strange = _STRANGE.search(text)
        if strange:
            why = "%r has no meaning here" % strange.group()
            if strange.group() == "=":
                why = "nothing can be set; == compares"
            raise self.fail(why, column=strange.start())
        for column, char in enumerate(text):
            depth += (char in "([") - (char in ")]")
            if depth < 0:
                raise self.fail("no bracket is open", column=column)
            if depth > MAX_DEPTH:
                raise self.fail("nested more than %d deep" % MAX_DEPTH,
                                column=column)

    def syntax(self):
        """The ast of the text. Raises ExpressionError."""
        import ast          # a tenth of the start, and only expressions pay
        self.check()
        try:
            return ast.parse("(" + self.text + "\n)", mode="eval").body
        except SyntaxError as error:
            column = (error.offset or 1) - 2
            if (error.lineno or 1) > 1:
                column = len(self.text)
            raise self.fail("no Python expression: " + error.msg, None,
                            min(max(column, 0), len(self.text)))
        except (MemoryError, RecursionError, ValueError, OverflowError):
            raise self.fail("too complicated")

    def expression(self):
        """The Expression of the text."""
        node, form, size, kind = self.syntax(), "", 8, "int"
        call = self.call_of(node)
        if call in ("hex", "sym"):
            form, node = call, self.arguments(node, 1, 1)[0]
            call = self.call_of(node)
        if call in ("str", "buf"):
            if form:
                raise self.fail("%s() takes a number" % form, node)
            kind, tree = call, self.memory(node, call)
            size = tree[-1]
        else:
            tree = self.tree(node, 1)
        ops = list(_nodes(tree))
        return Expression(
            self.text.strip(), tree, kind, size,
            kind == "int" and tree[1], form,
            frozenset(each[2] for each in ops if each[0] == "name"),
            any(each[0] in ("load", "str", "buf") for each in ops),
            tuple(self.warnings))

    @staticmethod
    def call_of(node):
        """The name that a node calls, or None."""
        if type(node).__name__ == "Call":
            return getattr(node.func, "id", None)
        return None

    def arguments(self, node, least, most):
        """The arguments of a call, which must be least to most."""
        if node.keywords or not least <= len(node.args) <= most:
            raise self.fail("%s() takes %s" % (
                node.func.id, "one argument" if most == 1 else
                "%d or %d arguments" % (least, most)), node)
        return node.args

    def memory(self, node, call):
        """The tree of str(address[, size]) or buf(address, n[, size])."""
        args = self.arguments(node, *((1, 2) if call == "str" else (2, 3)))
        trees = [self.tree(arg, 2) for arg in args]
        size = STR_SIZE if call == "str" else BUF_SIZE
        if call == "str" and len(args) == 2 or len(args) == 3:
            size = self.size(args[-1], trees[-1])
        elif call == "buf" and trees[1][0] == "const":
            size = self.size(args[1], trees[1])
        if call == "str":
            return "str", False, trees[0], size
        return "buf", False, trees[0], trees[1], size

    def size(self, node, tree):
        """The constant number of bytes that a tree must be."""
        if tree[0] != "const" or not 1 <= tree[2] <= MAX_STR:
            raise self.fail("the size must be a number from 1 to %d"
                            % MAX_STR, node)
        return tree[2]

    def tree(self, node, depth):
        """The tree of a node whose value is an integer."""
        if depth > MAX_DEPTH:
            raise self.fail("nested more than %d deep" % MAX_DEPTH, node)
        kind = type(node).__name__
        make = getattr(self, "make_" + kind.lower(), None)
        if make is None:
            raise self.fail("%s has no meaning here" % {
                "Tuple": "a comma", "Attribute": "a dot",
                "List": "a list"}.get(kind, kind), node)
        return _simpler(make(node, depth + 1))

    def make_constant(self, node, depth):
        """A literal, since Python 3.8."""
        return self.literal(node, node.value)

    def make_num(self, node, depth):
        """A literal, before Python 3.8."""
        return self.literal(node, node.n)

    make_nameconstant = make_constant       # True and None, before 3.8

    def literal(self, node, value):
        """A number that fits 64 bits."""
        if type(value) is not int:
            raise self.fail("%r is no integer" % (value,), node)
        if value >= _UNSIGNED_END:
            raise self.fail("more than 64 bits", node)
        return "const", value >= _SIGNED_END, value

    def make_name(self, node, depth):
        """A constant or an input."""
        name = node.id
        if name in CONSTANTS:
            return "const", False, CONSTANTS[name]
        if name in EXIT_NAMES and not self.is_exit:
            raise self.fail("%s is known at an exit only, where %%return or "
                            "latency probes" % name, node)
        if name not in INPUTS:
            raise self.fail("%s is not known here: %s" % (
                name, self.likely(name)), node)
        return "name", False, name

    @staticmethod
    def likely(name):
        """What to write instead of a name."""
        if name in TYPES or name in ("str", "buf", "hex", "sym"):
            return "it takes an argument, as in %s(arg0)" % name
        if re.match(r"arg\d", name):
            return "arguments are arg0 to arg%d" % (MAX_ARGS - 1)
        return ("names are arg0…, ret, elapsed, nsecs, tid, pid, cpu, "
                "caller, old, new, registers such as rdi, us, ms, sec, KiB, "
                "MiB")

    def make_unaryop(self, node, depth):
        """- ~ not; a + changes nothing."""
        operand = self.tree(node.operand, depth)
        op = _UNARY.get(type(node.op).__name__)
        if op is None:
            return operand
        return op, op != "not" and operand[1], operand

    def make_binop(self, node, depth):
        """Arithmetic: unsigned if either operand is, a shift if its left."""
        op = _OPERATORS.get(type(node.op).__name__)
        if op is None:
            raise self.fail({"Div": "/ makes fractions; // rounds down",
                             "Pow": "** is not computed here"}.get(
                type(node.op).__name__, "no such operator here"), node)
        left = self.tree(node.left, depth)
        right = self.tree(node.right, depth)
        if op in ("//", "%") and right[:1] + right[2:] == ("const", 0):
            self.warnings.append("%s by 0 is always a fault" % op)
        return (op, left[1] or right[1] and op not in ("<<", ">>"), left,
                right)

    def make_boolop(self, node, depth):
        """and, or: the value that decides, as in Python."""
        op = type(node.op).__name__.lower()
        if depth + len(node.values) > MAX_DEPTH + 2:
            raise self.fail("more than %d parts" % (MAX_DEPTH // 2), node)
        trees = [self.tree(value, depth) for value in node.values]
        made = trees.pop()
        while trees:
            made = _simpler((op, trees[-1][1] or made[1], trees.pop(), made))
        return made

    def make_compare(self, node, depth):
        """A chain of comparisons: each operand is computed once at most."""
        signs = [_OPERATORS.get(type(op).__name__) for op in node.ops]
        if None in signs:
            raise self.fail("only == != < <= > >= compare", node)
        trees = [self.tree(each, depth)
                 for each in [node.left] + node.comparators]
        for a, sign, b in zip(trees, signs, trees[1:]):
            self.warn_of_int(a, sign, b)
            self.warn_of_int(b, sign.translate(_SWAPPED), a)
        return "chain", False, tuple(signs), tuple(trees)

    def warn_of_int(self, a, sign, b):
        """ret < 0 and ret == -5 are never true of a C int: see the ABI."""
        if a == ("name", False, "ret") and b[0] == "const" and (
                b[2] < 0 or b[2] == 0 and sign in ("<", ">=")):
            self.warnings.append("ret has 64 bits: a function that returns "
                                 "int needs s32(ret)")

    def make_ifexp(self, node, depth):
        """a if c else b."""
        condition, a, b = [self.tree(each, depth) for each in (
            node.test, node.body, node.orelse)]
        return "if", a[1] or b[1], condition, a, b

    def make_call(self, node, depth):
        """A cast."""
        call = self.call_of(node)
        if call in TYPES:
            operand = self.tree(self.arguments(node, 1, 1)[0], depth)
            return "cast", call == "u64", call, operand
        if call in ("str", "buf", "hex", "sym"):
            raise self.fail("%s() can only be the whole of an expression"
                            % call, node)
        raise self.fail("no function but %s, str, buf, hex, sym"
                        % ", ".join(sorted(TYPES)), node)

    def make_subscript(self, node, depth):
        """A load through a pointer."""
        name = getattr(node.value, "id", None)
        if name not in TYPES:
            raise self.fail("loads are written as in u32[address]", node)
        inner = node.slice
        if type(inner).__name__ == "Index":             # before Python 3.9
            inner = inner.value
        address = self.tree(inner, depth)
        return "load", name == "u64", name, address


_SWAPPED = str.maketrans("<>", "><")


def _simpler(tree):
    """A tree of the same meaning, without what is known beforehand."""
    op, is_unsigned = tree[:2]
    if op in ("and", "or", "if") and tree[2][0] == "const":
        if op == "if":
            chosen = tree[3] if tree[2][2] else tree[4]
        else:
            chosen = tree[2] if bool(tree[2][2]) == (op == "or") else tree[3]
        if chosen[1] == is_unsigned:
            return chosen
        tree = "cast", is_unsigned, "u64", chosen
    parts = tree[3] if tree[0] == "chain" else tree[2:]
    parts = [part for part in parts if isinstance(part, tuple)]
    if not parts or op == "load" or any(p[0] != "const" for p in parts):
        return tree
    try:
        return "const", is_unsigned, _computed(tree, {}, None)
    except _Fault:
        return tree                     # it faults whenever it is reached


def parse_expression(text, is_exit=False):
    """Understand one expression. -> Expression

    is_exit  may it use what only an exit knows: ret, elapsed
    Raises ExpressionError, which points at the column.
    """
    text = text.replace("\n", " ").replace("\t", " ")
    return _Parser(text, is_exit).expression()


def parse_expressions(text, is_exit=False):
    """Understand "a, b, ...". -> (Expression, ...)"""
    text = text.replace("\n", " ").replace("\t", " ")
    start, depth, parts = 0, 0, []
    for column, char in enumerate(text + ","):
        depth += (char in "([") - (char in ")]")
        if char == "," and (depth == 0 or column == len(text)):
            parts.append((start, text[start:column]))
            start = column + 1
    return tuple(_Parser(part, is_exit, text, column).expression()
                 for column, part in parts)


# ---- 8  Bodies ------------------------------------------------------------
#
# What a probe does at a hit, as machine code: an action's updates of the
# shared memory, around the values of its expressions. A *block* is an
# action's memory: the same bytes at the same offset of each processor's
# shard, all zero at first, every number in it 64 bits wide. A hit counts
# once: recorded, or in one of the words of the head. Invariant: behind a
# body every register and flag is as before, or was proven dead.
#
#     word    +0   count           a count that cannot fault, by no key
#
#     head    +0   faults          hits whose expressions could not be had
#             +8   dropped         hits for which there was no room
#             +16  unmatched       exits without a frame: it ran when armed,
#                                  or its entry was skipped, crowded, faulty
#             +24  abandoned       frames never left: longjmp, exceptions
#             +32  crowded         entries that found no free frame
#             +40  skipped         entries whose condition was false
#             +64  a payload, or a table, or a ring
#
#     count   +0   count
#     sum     +0   count  +8 sum   +16 sum's upper 64 bits
#     hist    +0   sum    +8 sum's upper 64 bits   +16 least  +24 most
#             +32  496 buckets for values >= 0, then 496 for values < 0 if
#                  the expression is signed: by bucket_index(abs(value))
#             least and most are kept such that zero is "none yet":
#             most = value ^ bias, least = ~(value ^ bias), where bias is
#             2**63 of a signed value and 0 of an unsigned one
#
#     table   n_entries entries:
#             +0   state           0 free, 1 to 15 being written, else
#                                  table_tag() of the keys
#             +8   the keys        a word each; a str or buf as bytes, filled
#                                  up with zeros to whole words
#             +k   payload         count, sum or hist
#
#     ring    +0   reserved        tickets given out
#             +8   full            hits that found no room and got none
#             +64  consumed        tickets that the reader is done with
#             +128 n_slots slots:
#                  +0   sequence   0 never used, 2 * ticket + 1 being written,
#                                  2 * ticket + 2 complete
#                  +8   tsc
#                  +16  tid (32 bits), cpu (32 bits)
#                  +24  site index (32 bits), mask of values that faulted
#                  +32  a word for each value: an int, or the number of
#                       bytes of a str or buf
#                  then the bytes of each str and buf, in whole words; then
#                  the stack: a word of how many bytes, the registers of
#                  STACK_REGISTERS, the bytes
#
# A record is whole if its sequence is 2 * ticket + 2 before and after it was
# copied. One that is not may never be, if its thread was killed: a reader
# passes on, and looks at it again later. hits = reserved + full + faults;
# what of reserved is not accepted was dropped. Where the policy is "block",
# a reader that has moved `consumed` on calls futex(FUTEX_WAKE) on the word
# of Place.tracer, which holds its tid like a robust futex: a body waits only
# while a tid is there, and never for more than 100 ms.
#
# A "call" has the tracer's function look at the hit, and waits. It counts as
# a count does; where it waits is the same for all of them in a process:
#
#     calls   +0   owner           the tid of a thread of the tracer, like a
#                                  robust futex; 0: nobody answers
#             +8   idle            1: the tracer sleeps on it; a futex
#             +16  late            1: a hit was not answered in time, and
#                                  the tracer has not been back since
#             +24  spins           how often a thread looks at its word,
#                                  before it sleeps; the tracer learns
#             +64  asked           a bit for each slot: look at it
#             +256 N_CALLS slots of CALL_SIZE bytes:
#                  +0   word       its state (32 bits), a futex; see below
#                  +4   answer     what the word will be when it is answered
#                  +8   site index, tid (32 bits each)
#                  +16  outcome    CALL_SKIP …; written by the tracer
#                  +20  sleeps     1: to be woken, not only answered
#                  +24  flags      in ah as lahf has them, overflow in al
#                  +32  caller     what is at rsp
#                  +40  registers  in the order of REGISTERS
#                  +168 arguments  arg0 to arg5 at the entry, of an exit
#
# The word of a slot says whose it is: a kind of CALL_KINDS in bits 26 to 29
# and a number that changes with each use below them; or, while a thread
# waits, the owner's tid and FUTEX_WAITERS, as a robust futex has it. No tid
# is that large. Each word is on the owner's robust list: when the owner
# dies, in whatever way, the kernel marks them all and wakes each waiter.
#
#     free -> filling -> TID|WAITERS -> answered -> collecting -> free
#      by the thread      by it   |   by the tracer    by the thread
#                                 +-> gave up ----------------------> free
#                                   by the thread       by the tracer
#
# A thread whose answer never comes, or that is killed, or leaves by a
# longjmp from a signal handler, so never leaves a slot that another is
# mistaken about: whoever comes back late finds another number.

ACTIONS = ("count", "sum", "hist", "trace", "enter", "stack", "call")
POLICIES = ("drop", "overwrite", "block")
HEAD_FAULTS, HEAD_DROPPED, HEAD_UNMATCHED = 0, 8, 16
HEAD_ABANDONED, HEAD_CROWDED, HEAD_SKIPPED = 24, 32, 40
HEAD_SIZE = 64
SUM_COUNT, SUM_LOW, SUM_HIGH, SUM_SIZE = 0, 8, 16, 24
HIST_LOW, HIST_HIGH, HIST_LEAST, HIST_MOST, HIST_BUCKETS = 0, 8, 16, 24, 32
N_BUCKETS = 496
ENTRY_STATE, ENTRY_KEYS = 0, 8
STATE_FREE, STATE_READY = 0, 16
N_PROBED = 8                    # entries of a table that a lookup tries
RING_RESERVED, RING_FULL, RING_CONSUMED, RING_SLOTS = 0, 8, 64, 128
SLOT_SEQUENCE, SLOT_TSC, SLOT_TID, SLOT_CPU = 0, 8, 16, 20
SLOT_SITE, SLOT_FAULTS, SLOT_VALUES = 24, 28, 32
FORKED = 1 << 31                # in a record's cpu: by a forked child
# What a record with a copy of the stack begins it with; rip is the site's.
STACK_REGISTERS = ("rsp", "rbp", "rbx", "r12", "r13", "r14", "r15")
FRAME_SP, FRAME_TSC, FRAME_ARGS = 0, 8, 16
N_NEIGHBOURS = 4                # frames that a lookup tries
MAX_KEY_BYTES = 128
MAX_VALUES = 16                 # of a record
MAX_DEPTH_WALKED = 64           # frames of a stack walked in the body
MAX_CODE = 4096                 # bytes of a body
N_CALLS, CALL_SIZE = 256, 256   # slots, and bytes of each and of the head
CALLS_SIZE = CALL_SIZE * (1 + N_CALLS)
CALLS_OWNER, CALLS_IDLE, CALLS_LATE, CALLS_SPINS = 0, 8, 16, 24
CALLS_ASKED = 64
CALL_WORD, CALL_ANSWER, CALL_SITE, CALL_TID = 0, 4, 8, 12
CALL_OUTCOME, CALL_SLEEPS, CALL_FLAGS, CALL_CALLER = 16, 20, 24, 32
CALL_REGISTERS, CALL_ARGS = 40, 168
CALL_SKIP, CALL_FAULT, CALL_DROP = 1, 2, 4      # bits of an outcome
(CALL_FREE, CALL_FILLING, CALL_ANSWERED, CALL_COLLECTING,
 CALL_GAVE_UP) = CALL_KINDS = tuple(kind << 26 for kind in range(1, 6))
CALL_NUMBER = (1 << 26) - 1     # the other bits of such a word
N_CALL_ARGS = 6


class Spec(NamedTuple):
    """What a probe does at one kind of site.

    "count" "sum" "hist" "trace" as they are named; "stack" is a count (sum
    with a value) by the frames found by frame pointers; "enter" is what the
    entries of a probe do whose exits need a frame: see entry_spec.
    """
    action: str
    when: Optional[Expression] = None
    keys: Tuple[Expression, ...] = ()
    values: Tuple[Expression, ...] = ()     # summed, binned or recorded
    policy: str = "drop"    # of a ring
    n_slots: int = 4096     # of a ring; a power of two
    n_entries: int = 1024   # of a table; a power of two
    n_frames: int = 4096    # of a frame table; a power of two
    depth: int = 0          # frames to walk by frame pointers
    stack_size: int = 0     # bytes of the stack's top in each record
    is_exit: bool = False   # the site is an exit of its function
    is_inside: bool = False     # the site is behind its prologue: rbp is
    #                             its own frame, [rsp] no return address
    kept: Tuple[str, ...] = ()              # arguments stored in a frame
    is_timed: bool = True   # a frame's time is needed
    timeout_ns: int = 10**9     # that a call waits at most
    is_quiet: bool = False  # a call that makes no syscall but futex: it
    #                         tells no tid, and a signal shortens its wait


class Place(NamedTuple):
    """Where a body's data is, in the target."""
    shards: "Shards"
    block: int              # offset of the block in every shard
    site_index: int = 0     # of this site among its probe's
    private: int = 0        # vaddr of the word that fork wipes: the pid
    frames: int = 0         # vaddr of the probe's frame table; 0: none
    tid_offset: Optional[int] = None        # of a thread's tid from fs base
    tsc: Optional[Tuple[int, int]] = None   # (mult, base): ns = base +
    #                         (tsc * mult >> 32). None: rdtsc is not allowed
    tracer: int = 0         # vaddr of the word (32 bits) of the tracer's tid
    direct: Tuple[Tuple[int, int], ...] = ()    # [low, high) that stay
    can_stack: bool = True  # may a body use more than the red zone?
    at: int = 0             # the displaced instruction that the body comes
    #                         before; 0: the first
    dead: Tuple[int, bool] = (0, False)     # registers and flags dead there
    is_taken: bool = False  # only where that instruction, a jcc, is taken
    calls: int = 0          # vaddr of the slots of calls, however far


class Layout(NamedTuple):
    """Where things are in a block; offsets as drawn above."""
    kind: str               # "word", "count", "sum", "hist", "table", "ring"
    size: int               # bytes in each shard
    start: int              # of the payload, the entries or the ring
    payload: str = ""       # of a table's entry: "count", "sum" or "hist"
    payload_offset: int = 0             # from the entry
    is_unsigned: bool = False           # of what is summed or binned
    n_entries: int = 0      # or slots
    entry_size: int = 0     # or of a slot
    fields: Tuple[Tuple[str, int, int], ...] = ()   # (kind, offset, size) of
    #                         each key, or of each value's bytes in a slot
    stack_offset: int = 0   # of a slot's stack; 0: none


def can_fault(expression):
    """May its value be impossible to have at a hit?"""
    for tree in _nodes(expression.tree):
        op, right = tree[0], tree[3] if len(tree) > 3 else None
        if op in ("load", "str", "buf"):
            return True
        if op in ("//", "%") and (right[0] != "const" or right[2] == 0):
            return True
        if op in ("<<", ">>") and (right[0] != "const" or right[2] < 0):
            return True
    return False


def uses_ret(spec):
    """Does a hit look at what the function returns?"""
    return any(each and "ret" in each.names
               for each in (spec.when,) + spec.keys + spec.values)


_ALWAYS_FAULTS = "//", False, ("const", False, 1), ("const", False, 0)


def without_ret(spec):
    """A Spec for an exit that is a jump to another function: that has not
    run yet, so what would be returned is a fault wherever it is asked for.
    """
    def replaced(tree):
        if tree == ("name", False, "ret"):
            return _ALWAYS_FAULTS
        return tuple(replaced(part) if isinstance(part, tuple) else part
                     for part in tree)

    def changed(each):
        return each and each._replace(tree=replaced(each.tree),
                                      names=each.names - {"ret"})
    return spec._replace(when=changed(spec.when),
                         keys=tuple(map(changed, spec.keys)),
                         values=tuple(map(changed, spec.values)))


def entry_spec(spec):
    """What the entries must do for an exit's spec. -> Spec or None"""
    names = set()
    for each in (spec.when,) + spec.keys + spec.values:
        names |= each.names if each else frozenset()
    if spec.action == "call":       # the function may ask for any
        names |= {"arg%d" % n for n in range(N_CALL_ARGS)}
    kept = tuple(sorted((n for n in names if n.startswith("arg")),
                        key=lambda name: int(name[3:])))
    if not spec.is_exit or not (kept or "elapsed" in names):
        return None
    return Spec("enter", n_frames=spec.n_frames, kept=kept,
                is_timed="elapsed" in names)


def frames_layout(spec):
    """(bytes of a frame, bytes of the table) for an "enter" spec.

    A frame is rsp (0: free), tsc, then the kept arguments; all zero first.
    """
    size = 1 << (FRAME_ARGS + 8 * len(spec.kept) - 1).bit_length()
    return size, size * (spec.n_frames + N_NEIGHBOURS - 1)


def bucket_index(value):
    """The bucket of a value >= 0: eight to each power of two."""
    if value < 8:
        return value
    e = value.bit_length() - 1
    return 8 * (e - 2) + (value >> e - 3 & 7)


def bucket_range(index):
    """The (lowest, highest) value of a bucket."""
    if index < 8:
        return index, index
    e = index // 8 + 2
    low = (8 + index % 8) << e - 3
    return low, low + (1 << e - 3) - 1


def _payload(spec):
    """(kind, bytes, is it unsigned) of what a hit adds to."""
    if spec.action == "hist":
        is_unsigned = spec.values[0].is_unsigned
        halves = 1 if is_unsigned else 2
        return "hist", HIST_BUCKETS + 8 * N_BUCKETS * halves, is_unsigned
    if spec.values:
        return "sum", SUM_SIZE, spec.values[0].is_unsigned
    return "count", 8, False


def _rounded(size, unit=64):        # a cache line, so that no two share one
    return (size + unit - 1) // unit * unit


def _words(size):
    return _rounded(size, 8)


def block_layout(spec):
    """What a spec's block looks like. -> Layout

    A site's own, but that all sites of a trace probe share one ring. Raises
    UbpError where a spec asks for more than a body does.
    """
    _check(spec)
    if spec.action == "trace":
        return _ring_layout(spec)
    payload, size, is_unsigned = _payload(spec)
    if spec.keys or spec.action == "stack":
        return _table_layout(spec, payload, size, is_unsigned)
    if payload == "count" and not spec.is_exit and not (
            spec.when and can_fault(spec.when)) and spec.action != "call":
        return Layout("word", 8, 0)
    return Layout(payload, _rounded(HEAD_SIZE + size), HEAD_SIZE,
                  is_unsigned=is_unsigned)


def _table_layout(spec, payload, size, is_unsigned):
    at, fields = ENTRY_KEYS, []
    for key in spec.keys:
        fields.append((key.kind, at, key.size))
        at += _words(key.size)
    if spec.action == "stack":
        fields.append(("stack", at, 8 * spec.depth))
        at += 8 * spec.depth
    entry_size = at + size
    if entry_size <= CACHE_LINE:        # none straddles a line
        entry_size = 1 << (entry_size - 1).bit_length()
    n_entries = spec.n_entries + N_PROBED - 1       # a lookup never wraps
    return Layout("table", _rounded(HEAD_SIZE + entry_size * n_entries),
                  HEAD_SIZE, payload, at, is_unsigned, n_entries, entry_size,
                  tuple(fields))


def _ring_layout(spec):
    at, fields = SLOT_VALUES + 8 * len(spec.values), []
    for value in spec.values:
        fields.append((value.kind, at, value.size))
        if value.kind != "int":
            at += _words(value.size)
    stack_offset = at if spec.stack_size else 0
    if spec.stack_size:
        at += 8 + 8 * len(STACK_REGISTERS) + _words(spec.stack_size)
    size = HEAD_SIZE + RING_SLOTS + at * spec.n_slots
    return Layout("ring", _rounded(size), HEAD_SIZE, n_entries=spec.n_slots,
                  entry_size=at, fields=tuple(fields),
                  stack_offset=stack_offset)


def _check(spec):
    """Raise UbpError where a spec asks for more than a body does."""
    def refuse(why):
        raise UbpError("make", "a body for %s" % spec.action, why)
    if spec.action not in ACTIONS or spec.policy not in POLICIES:
        refuse("no such action, or no policy %r" % spec.policy)
    n_values = {"sum": 1, "hist": 1, "count": 0, "enter": 0, "call": 0}
    if len(spec.values) != n_values.get(spec.action, len(spec.values)):
        refuse("%d values" % len(spec.values))
    if len(spec.values) > MAX_VALUES:
        refuse("more than %d values" % MAX_VALUES)
    if spec.action != "trace" and any(v.kind != "int" for v in spec.values):
        refuse("a str or buf has no size to add up")
    if spec.when and spec.when.kind != "int":
        refuse("a str or buf is no condition")
    if sum(_words(key.size) for key in spec.keys) > MAX_KEY_BYTES:
        refuse("more than %d bytes of keys" % MAX_KEY_BYTES)
    if spec.action == "stack" and not 1 <= spec.depth <= MAX_DEPTH_WALKED:
        refuse("1 to %d frames" % MAX_DEPTH_WALKED)
    for n in spec.n_slots, spec.n_entries, spec.n_frames:
        if n < 2 or n & n - 1 or n > 1 << 24:
            refuse("%d is no power of two up to 2**24" % n)


_ARG_REGISTERS = (RDI, RSI, RDX, RCX, 8, 9)     # System V ABI, 3.2.3
ARG_NAMES = tuple(REGISTERS[reg] for reg in _ARG_REGISTERS)
RET_NAME, SP_NAME = REGISTERS[RAX], REGISTERS[RSP]


def input_registers(spec):
    """The mask of registers whose values at the site a body reads."""
    if spec.action == "call":
        return (1 << 16) - 1
    names = set(STACK_REGISTERS) if spec.stack_size or spec.depth else set()
    if spec.action == "enter" or spec.is_exit:
        names.add("rsp")                # frames are known by it
    for each in (spec.when,) + spec.keys + spec.values:
        names |= each.names if each else frozenset()
    mask = 0
    for name in names | set(spec.kept):
        if name in REGISTERS:
            mask |= 1 << REGISTERS.index(name)
        elif name == "ret":
            mask |= 1 << RAX
        elif name == "caller":
            mask |= 1 << RSP
        elif name.startswith("arg") and not spec.is_exit \
                and int(name[3:]) < len(_ARG_REGISTERS):
            mask |= 1 << _ARG_REGISTERS[int(name[3:])]
        elif name.startswith("arg"):
            mask |= 1 << RSP
    return mask


# -- Registers: what a body may use, and where the site's values are.

_POOL = (RDX, RCX, RSI, RDI, 8, 9, 10, 11, RAX, RBX, 12, 13, 14, 15, RBP)
_SYSCALL_USES = frozenset((RAX, RCX, RDX, RSI, RDI, 8, 9, 10, 11))
_N_REGISTERS = 10               # enough for what 1000 characters can nest
_MIRRORED = {_L: _G, _G: _L, _LE: _GE, _GE: _LE, _B: _A, _A: _B, _BE: _AE,
             _AE: _BE, _E: _E, _NE: _NE}
_SIGNED_CONDITIONS = {"==": _E, "!=": _NE, "<": _L, "<=": _LE, ">": _G,
                      ">=": _GE}
_UNSIGNED_CONDITIONS = {"==": _E, "!=": _NE, "<": _B, "<=": _BE, ">": _A,
                        ">=": _AE}


class _Imm(int):
    """An operand that is a constant of 32 bits, sign-extended."""


class _Machine:
    """The registers of a body: which are free, saved, or still the site's.

    A body has one or two stages. Each saves what it uses: the first what a
    condition needs, often nothing, the second the rest. What is saved is
    known only afterwards, so a body is made again until nothing is missing:
    plan is what the last try found out.
    """

    def __init__(self, spec, place, window, plan):
        self.spec, self.place, self.window = spec, place, window
        self.code, self.plan = Code(), plan
        self.dead = window.dead_regs & ~(1 << RSP)
        self.inputs = input_registers(spec)
        self.depth = 0              # bytes pushed below the site's rsp,
        self.deepest = 0            # and at most
        self.slots = {}             # register -> depth where it was pushed
        self.touched = set()        # registers that no longer hold ...
        self.stage = 0
        self.used = (set(), set())  # ... by stage
        self.wanted = set()         # of those, read after all
        self.stacks = set()         # stages that need the stack
        self.free = []
        self.pinned, self.held = {}, set()  # name -> operand; registers
        self.flags_at = 0           # the depth where the flags were pushed
        self.is_flags_saved = window.flags_dead

    def begin(self, stage, reserved, volatile):
        """Begin a stage.

        reserved   registers for touch(), never for take()
        volatile   those of them that expressions may change at any time
        An input in one that may change is read from where it was pushed.
        """
        self.stage = stage
        pool = [reg for reg in _POOL
                if reg not in reserved | volatile | self.held
                and not (reg == RAX and not self.window.flags_dead)]
        # First what costs nothing, last what an expression still reads.
        pool.sort(key=lambda reg: (self.inputs >> reg & 1,
                                   not self.dead >> reg & 1))
        n_others = sum(not self.inputs >> reg & 1 for reg in pool)
        self.free = pool[:max(n_others, _N_REGISTERS)]
        for reg in volatile | set(self.free):
            if self.inputs >> reg & 1:
                self.touch(reg)

    def touch(self, *regs):
        """Registers that get another value: save them in this stage."""
        self.touched.update(regs)
        self.used[self.stage].update(
            reg for reg in regs if reg not in self.used[0])

    def take(self):
        """A free register."""
        if not self.free:
            raise UbpError("compile", self.spec.action,
                           "it needs more registers than there are")
        reg = self.free.pop(0)
        self.touch(reg)
        return reg

    def give(self, operand):
        """Let go of an operand that take() made; others stay."""
        if type(operand) is _Owned:
            self.free.insert(0, int(operand))

    def claim(self, reg):
        """Take a certain register, which give() has let go of."""
        self.free.remove(reg)

    def site_value(self, reg):
        """The operand that holds what a register held at the site."""
        if reg not in self.touched:
            return reg
        if reg in self.slots:
            return self.stack(self.slots[reg])
        self.wanted.add(reg)
        return self.stack(0)        # this try is thrown away

    def stack(self, depth):
        """What was pushed when so many bytes lay below the site's rsp."""
        return Mem(RSP, self.depth - depth)

    def grow(self, size):
        """size more bytes of stack; negative ones go back."""
        self.stacks.add(self.stage)
        self.code.lea(RSP, Mem(RSP, -size))
        self.depth += size
        self.deepest = max(self.deepest, self.depth)

    def push(self, reg):
        """push reg"""
        self.code.put(push_r64(reg))
        self.depth += 8
        self.deepest = max(self.deepest, self.depth)

    def saved(self, stage):
        """The registers that a stage must save, in order."""
        earlier = self.plan.used[0] if stage else ()
        return [reg for reg in _POOL
                if reg in self.plan.used[stage] and reg not in earlier
                and (not self.dead >> reg & 1 or reg in self.plan.wanted)]

    def save(self, stage):
        """Save what a stage uses. -> what restore() needs

        The red zone below rsp is stepped over before anything is pushed
        (System V ABI, 3.2.2). Flags travel in ax: lahf takes all but OF,
        seto takes OF, and adding 0x7f to al overflows where OF was set.
        """
        flags = not self.is_flags_saved
        is_ax_used = RAX in self.plan.used[0] | self.plan.used[1]
        regs = [reg for reg in self.saved(stage) if reg != RAX]
        with_rax = RAX in self.saved(stage) if self.window.flags_dead else \
            flags and (not self.dead >> RAX & 1 or RAX in self.plan.wanted)
        pushes = ([RAX] if with_rax else []) + regs
        before = self.depth
        if not before and (pushes or flags and is_ax_used
                           or stage in self.plan.stacks):
            self.code.put(lea_rsp_disp(-_RED_ZONE_SIZE)
                          if self.place.can_stack else b"")
            self.depth += _RED_ZONE_SIZE * self.place.can_stack
        for reg in pushes:
            self.push(reg)
            self.slots[reg] = self.depth
        if flags:
            self.code.put(_SAVE_FLAGS)
            self.touched.add(RAX)
            self.is_flags_saved = True
            if is_ax_used:
                self.push(RAX)
                self.flags_at = self.depth
        return before, pushes, flags, is_ax_used

    def restore(self, saved):
        """Undo a save()."""
        before, pushes, flags, is_ax_used = saved
        if flags and is_ax_used:
            self.code.put(pop_r64(RAX))
        self.code.put(_LOAD_FLAGS if flags else b"")
        for reg in reversed(pushes):
            self.code.put(pop_r64(reg))
        if not before and self.depth and self.place.can_stack:
            self.code.put(add_rsp_128() if self.window.flags_dead
                          else lea_rsp_disp(_RED_ZONE_SIZE))
        self.depth = before


_RED_ZONE_SIZE = 128


class _Owned(int):
    """A register that take() gave: whoever holds it may change it."""


class _Plan(NamedTuple):
    """What a try found out: registers used by stage, those read from where
    they were pushed, and the stages that need the stack."""
    used: tuple = (set(), set())
    wanted: frozenset = frozenset()
    stacks: frozenset = frozenset()


# -- Expressions as code. An operand is where a value is: a constant (_Imm),
#    a register of the site's (int) or of ours (_Owned), or memory (Mem).


class _Values(_Machine):
    """Code that computes expressions. fault: the label of the one at hand."""

    fault = None

    def take_owned(self):
        """A free register, as an operand."""
        return _Owned(self.take())

    def need(self, tree):
        """How many registers a tree takes (Sethi and Ullman)."""
        op = tree[0]
        if op == "name":
            return int(tree[2] in ("rsp", "pid", "tid", "cpu"))
        if op == "const":
            return 0
        if op in ("neg", "~", "not", "load", "cast"):
            return max(1, self.need(tree[-1]))
        if op in ("if", "and", "or"):
            return max(1, *map(self.need, tree[2:]))
        parts = tree[3] if op == "chain" else tree[2:]
        left, right = self.need(parts[0]), self.need(parts[-1])
        if len(parts) > 2:
            return 2 + max(map(self.need, parts))
        return max(1, left, right, left + 1 if left == right else 0)

    def operand(self, tree):
        """A tree's value, wherever it may be read."""
        op = tree[0]
        if op == "const":
            value = _wrapped(tree[2], False)
            if -1 << 31 <= value < 1 << 31:
                return _Imm(value)
        elif op == "name":
            return self.name(tree[2])
        elif op == "cast" and TYPES[tree[2]][0] == 8:
            return self.operand(tree[3])
        return self.owned(tree)

    def name(self, name):
        """The operand of an input."""
        if name in self.pinned:
            return self.pinned[name]
        if name == "rsp":
            reg = self.take_owned()
            self.code.lea(reg, Mem(RSP, self.depth))
            return reg
        if name in REGISTERS:
            return self.site_value(REGISTERS.index(name))
        if name == "ret":
            return self.site_value(RAX)
        if name == "caller":
            return Mem(RSP, self.depth)
        if name.startswith("arg"):
            n = int(name[3:])
            if n < len(_ARG_REGISTERS):
                return self.site_value(_ARG_REGISTERS[n])
            n -= len(_ARG_REGISTERS)            # above the return address
            return Mem(RSP, self.depth + 8 + 8 * n)
        return self.computed_name(name)

    def computed_name(self, name):
        """pid, tid, cpu: inputs that are no register of the site's."""
        place, code = self.place, self.code
        if name == "pid":
            self.require(place.private, name)
            return self._pid()
        if name == "tid":
            self.require(place.tid_offset is not None, name)
            reg = self.take_owned()
            code.mov(reg, Mem(FS, place.tid_offset), 4)
            return reg
        if name == "cpu":
            reg = self.take_owned()
            code.put(cpu_number(reg, place.shards))
            return reg
        raise UbpError("compile", name, "it is not known at this site")

    def _pid(self):
        """The target's pid. A forked child is told by the tid of the first
        thread of it that comes here: as a rule the one that was forked,
        whose tid is the pid. The next word is for that: fork wipes it, too.
        """
        place, code, done = self.place, self.code, self.code.label()
        reg, own = self.take_owned(), Mem(RIP, place.private + 8)
        for word in Mem(RIP, place.private), own:
            code.mov(reg, word)
            code.test(reg)
            code.jump(done, _NE)
        if place.tid_offset is not None:
            code.mov(reg, Mem(FS, place.tid_offset), 4)
            code.store(own, reg)
            code.mov(reg, own)          # of two at once, the last
        code.mark(done)
        return reg

    def require(self, is_there, name):
        """Refuse a name that this target does not offer."""
        if not is_there:
            raise UbpError("compile", name, "it is not known in this target")

    def owned(self, tree, operand=None):
        """A tree's value in a register that may be changed."""
        if operand is None:
            made = getattr(self, "_" + _MAKERS.get(tree[0], "arithmetic"))
            operand = made(tree)
        if type(operand) is _Owned:
            return operand
        reg = self.take_owned()
        if type(operand) is _Imm:
            self.code.set(reg, int(operand))
        else:
            self.code.mov(reg, operand)
        return reg

    def in_register(self, tree):
        """A tree's value in a register, ours or the site's."""
        operand = self.operand(tree)
        if type(operand) in (int, _Owned):
            return operand
        return self.owned(tree, operand)

    def _const(self, tree):
        reg = self.take_owned()
        self.code.set(reg, tree[2])
        return reg

    def _name(self, tree):
        return self.name(tree[2])

    def _unary(self, tree):
        reg = self.owned(tree[2])
        self.code.op(b"\xf7", 3 if tree[0] == "neg" else 2, reg)
        return reg

    def _cast(self, tree):
        size, is_signed = TYPES[tree[2]]
        source = self.operand(tree[3])
        if type(source) is _Imm or size == 8:
            source = self.owned(tree[3], source)
        self.give(source)
        if size < 8:
            reg = self.take_owned()
            self.extend(reg, source, size, is_signed)
            return reg
        if type(source) is _Owned:
            self.claim(int(source))
        return source

    def extend(self, reg, source, size, is_signed):
        """reg = the low size bytes of source, sign- or zero-extended."""
        if size == 4:
            self.code.op(b"\x63" if is_signed else b"\x8b", reg, source,
                         8 if is_signed else 4)
        else:
            opcode = 0xb6 | (size == 2) | is_signed << 3
            # A byte of sil or dil needs a REX, which the wide form has.
            self.code.op(bytes([0x0f, opcode]), reg, source, 8)

    def both(self, left, right):
        """(owned left, operand right), the larger one computed first."""
        if self.need(right) > self.need(left):
            second = self.operand(right)
            return self.owned(left), second
        first = self.owned(left)
        return first, self.operand(right)

    def _arithmetic(self, tree):
        op, is_unsigned, left, right = tree
        if op in ("//", "%"):
            return self.division(op, is_unsigned, left, right)
        if op in ("<<", ">>"):
            return self.shifted(op, is_unsigned, left, right)
        if left[0] == "const" and op != "-":
            left, right = right, left
        reg, other = self.both(left, right)
        number = {"+": ADD, "-": SUB, "&": AND, "|": OR, "^": XOR}.get(op)
        if type(other) is _Imm:
            if op == "*":
                self.multiply(reg, int(other))
            else:
                self.code.alu_imm(number, reg, int(other))
        elif op == "*":
            self.code.op(b"\x0f\xaf", reg, other)
        else:
            self.code.alu(number, reg, other)
        self.give(other)
        return reg

    def multiply(self, reg, value):
        """reg *= value"""
        if value > 0 and value & value - 1 == 0:
            self.code.shift(SHL, reg, value.bit_length() - 1)
        else:
            self.code.op(b"\x69", reg, reg, 8, _S32.pack(value))

    def shifted(self, op, is_unsigned, left, right):
        """left << right, left >> right, as Python would within 64 bits."""
        number = SHL if op == "<<" else SHR if is_unsigned else SAR
        if right[0] == "const":
            reg, count = self.owned(left), right[2]
            if count < 0:
                self.code.jump(self.fault)
            elif count > 63 and number != SAR:
                self.code.clear(reg)
            else:
                self.code.shift(number, reg, min(count, 63))
            return reg
        reg, count = self.both(left, right)
        self.touch(RCX)
        if type(count) is _Imm:
            self.code.set(RCX, int(count))
        else:
            self.code.mov(RCX, count)
        self.give(count)
        fits = self.code.label()
        self.code.alu_imm(CMP, RCX, 63)
        self.code.jump(fits, _BE)
        if not right[1]:
            self.code.test(RCX)
            self.code.jump(self.fault, _S)
        if number == SAR:
            self.code.set(RCX, 63)
        else:
            self.code.clear(reg)
        self.code.mark(fits)
        self.code.shift(number, reg)
        return reg

    def division(self, op, is_unsigned, left, right):
        """left // right, left % right, rounded down."""
        divisor = right[2] if right[0] == "const" else None
        if divisor is not None and is_unsigned:
            divisor &= (1 << 64) - 1
        if divisor and divisor > 0 and divisor & divisor - 1 == 0:
            reg, bits = self.owned(left), divisor.bit_length() - 1
            if op == "//":
                self.code.shift(SHR if is_unsigned else SAR, reg, bits)
            elif bits < 32:
                self.code.alu_imm(AND, reg, divisor - 1)
            else:
                self.mask(reg, divisor - 1)
            return reg
        reg, other = self.both(left, right)
        if type(other) not in (int, _Owned):
            other = self.owned(None, other)
        self.divide(op, is_unsigned, reg, other, divisor)
        self.give(other)
        return reg

    def mask(self, reg, value):
        """reg &= value, where value may have more than 31 bits."""
        other = self.take()
        self.code.set(other, value)
        self.code.alu(AND, reg, other)
        self.give(_Owned(other))

    def divide(self, op, is_unsigned, reg, other, divisor):
        """reg = reg // other, or the rest; idiv itself rounds to zero."""
        code, end = self.code, self.code.label()
        self.touch(RAX, RDX)
        if not divisor:
            code.test(other)
            code.jump(self.fault, _E)
        if not is_unsigned and divisor in (None, -1):
            minus_1 = code.label()              # -2**63 // -1 would trap
            code.alu_imm(CMP, other, -1)
            code.jump(minus_1, _E)
            code.aside()
            code.mark(minus_1)
            if op == "//":
                code.op(b"\xf7", 3, reg)
            else:
                code.clear(reg)
            code.jump(end)
            code.back()
        code.mov(RAX, reg)
        if is_unsigned:
            code.clear(RDX)
            code.op(b"\xf7", 6, other)          # div
        else:
            exact = code.label()
            code.put(b"\x48\x99")               # cqo
            code.op(b"\xf7", 7, other)          # idiv
            code.test(RDX)
            code.jump(exact, _E)
            code.mov(reg, RDX)
            code.alu(XOR, reg, other)
            code.jump(exact, _NS)
            if op == "//":
                code.alu_imm(SUB, RAX, 1)
            else:
                code.alu(ADD, RDX, other)
            code.mark(exact)
        code.mov(reg, RAX if op == "//" else RDX)
        code.mark(end)

    def _load(self, tree):
        """u32[address], through the syscall or where it cannot fault."""
        size, is_signed = TYPES[tree[2]]
        reg = self.owned(tree[3])
        source = Mem(reg)
        if tree[3][0] != "const" or not any(
                low <= tree[3][2] & (1 << 64) - 1 <= high - size
                for low, high in self.place.direct):
            self.fetch(reg, _Imm(size), None, 2)
            self.code.alu_imm(CMP, RAX, size)
            self.code.jump(self.fault, _NE)
            source = Mem(RSP, -16)      # below rsp, where signals keep off
        if size == 8:
            self.code.mov(reg, source)
        else:
            self.extend(reg, source, size, is_signed)
        return reg

    def fetch(self, address, size, dest, n_pages):
        """rax = how many bytes process_vm_readv copies, or negative.

        address  a register;   size  a register or _Imm, but no zero
        dest     makes the operand that is the destination; None: [rsp - 16]
        A part for each page: what lies before an unmapped one is copied.
        """
        code = self.code
        frame = 32 + 16 * n_pages      # local iovec, remote ones, 16 bytes
        self.touch(*_SYSCALL_USES)
        self.require(self.place.private, "memory")
        self.grow(frame)
        code.lea(RDI, dest() if dest else Mem(RSP, frame - 16))
        code.store(Mem(RSP), RDI)
        if type(size) is _Imm:
            code.set(RDX, int(size))
        else:
            code.mov(RDX, size)
        code.store(Mem(RSP, 8), RDX)
        code.mov(RCX, address)
        code.lea(RDI, Mem(RSP, 16))
        more, none = code.label(), code.label()
        code.mark(more)
        code.set(8, PAGE_SIZE - 1)              # r8 = rest of the page
        code.alu(AND, 8, RCX)
        code.alu_imm(SUB, 8, PAGE_SIZE)
        code.op(b"\xf7", 3, 8)
        code.alu(CMP, 8, RDX)
        code.op(b"\x0f\x47", 8, RDX)            # cmova
        code.store(Mem(RDI), RCX)
        code.store(Mem(RDI, 8), 8)
        code.alu_imm(ADD, RDI, 16)
        code.alu(ADD, RCX, 8)
        code.alu(SUB, RDX, 8)
        code.jump(more, _NE)
        code.mov(8, RDI)
        code.lea(10, Mem(RSP, 16))
        code.alu(SUB, 8, 10)
        code.shift(SHR, 8, 4)
        code.mov(RSI, RSP)
        code.set(RDX, 1)
        code.clear(9)
        code.clear(RAX)
        code.mov(RDI, Mem(RIP, self.place.private))
        code.test(RDI)
        code.jump(none, _E)                     # a forked child: no syscall
        code.set(RAX, NR_PROCESS_VM_READV)
        code.put(b"\x0f\x05")
        code.mark(none)
        self.grow(-frame)

    # -- What chooses: jumps where they decide, values where they are used.

    def _truth(self, tree):
        """0 or 1 of a comparison or a not."""
        code, no, end = self.code, self.code.label(), self.code.label()
        if tree[0] == "chain" and len(tree[2]) == 1:
            (left, right), (sign,) = tree[3], tree[2]
            condition = self.comparison(left, sign, right)
            reg = self.take_owned()
            code.op(bytes([0x0f, 0x90 | condition]), 0, reg, 1)     # setcc
            code.op(b"\x0f\xb6", reg, reg, 8)
            return reg
        self.unless(tree, no)
        reg = self.take_owned()
        code.set(reg, 1)
        code.jump(end)
        code.mark(no)
        code.clear(reg)
        code.mark(end)
        return reg

    def same_register(self, reg, tree):
        """Compute a tree into a register that give() has let go of."""
        made = self.owned(tree)
        if made != reg:
            self.code.mov(reg, made)
            self.give(made)
            self.claim(int(reg))

    def _if(self, tree):
        code, no, end = self.code, self.code.label(), self.code.label()
        self.unless(tree[2], no)
        reg = self.owned(tree[3])
        code.jump(end)
        self.give(reg)
        code.mark(no)
        self.same_register(reg, tree[4])
        code.mark(end)
        return reg

    def _either(self, tree):
        end, reg = self.code.label(), self.owned(tree[2])
        self.code.test(reg)
        self.code.jump(end, _E if tree[0] == "and" else _NE)
        self.give(reg)
        self.same_register(reg, tree[3])
        self.code.mark(end)
        return reg

    def unless(self, tree, label):
        """Jump to label if a tree is 0."""
        self.branch(tree, False, label)

    def branch(self, tree, wanted, label):
        """Jump to label if the truth of a tree is as wanted."""
        op = tree[0]
        if op == "chain":
            self.compare(tree, wanted, label)
        elif op == "not":
            self.branch(tree[2], not wanted, label)
        elif op in ("and", "or") and wanted == (op == "or"):
            self.branch(tree[2], wanted, label)
            self.branch(tree[3], wanted, label)
        elif op in ("and", "or"):
            over = self.code.label()
            self.branch(tree[2], not wanted, over)
            self.branch(tree[3], wanted, label)
            self.code.mark(over)
        elif op == "const":
            if bool(tree[2]) == wanted:
                self.code.jump(label)
        else:
            operand = self.operand(tree)
            if type(operand) is Mem:
                self.code.alu_imm(CMP, operand, 0)
            else:
                self.code.test(operand)
            self.give(operand)
            self.code.jump(label, _NE if wanted else _E)

    def compare(self, tree, wanted, label):
        """Jump to label if a chain of comparisons is, or is not, true."""
        signs, trees = tree[2:]
        if len(signs) == 1:
            condition = self.comparison(trees[0], signs[0], trees[1])
            self.code.jump(label, condition if wanted else condition ^ 1)
            return
        no = self.code.label() if wanted else label
        left = self.operand(trees[0])
        for n, sign in enumerate(signs):
            right = self.operand(trees[n + 1])
            is_unsigned = trees[n][1] or trees[n + 1][1]
            condition = self.cmp(left, right, sign, is_unsigned)
            self.give(left)
            self.code.jump(no, condition ^ 1)
            left = right
        self.give(left)
        if wanted:
            self.code.jump(label)
            self.code.mark(no)

    def comparison(self, left, sign, right):
        """cmp left, right -> the condition that holds if it is true."""
        is_unsigned = left[1] or right[1]
        narrow = self.narrow_comparison(left, sign, right)
        if narrow is not None:
            return narrow
        if self.need(right) > self.need(left):
            b = self.operand(right)
            a = self.operand(left)
        else:
            a = self.operand(left)
            b = self.operand(right)
        condition = self.cmp(a, b, sign, is_unsigned)
        self.give(a)
        self.give(b)
        return condition

    def narrow_comparison(self, left, sign, right):
        """s32(arg0) < 5 compares 32 bits where they are. -> condition, None
        """
        if left[0] != "cast" or left[3][0] != "name" or right[0] != "const":
            return None
        size, is_signed = TYPES[left[2]]
        half = 1 << 8 * size - 1
        limits = (-half, half) if is_signed else (0, 2 * half)
        if size not in (1, 4) or not limits[0] <= right[2] < limits[1]:
            return None
        operand = self.operand(left[3])
        value = right[2] - 2 * half if right[2] >= half else right[2]
        if value or not type(operand) in (int, _Owned) or size == 1:
            self.code.alu_imm(CMP, operand, value, size)
        else:
            self.code.op(b"\x85", operand, operand, 4)
        self.give(operand)
        return (_SIGNED_CONDITIONS if is_signed
                else _UNSIGNED_CONDITIONS)[sign]

    def cmp(self, a, b, sign, is_unsigned):
        """cmp a, b, whatever they are -> the condition of sign."""
        condition = (_UNSIGNED_CONDITIONS if is_unsigned
                     else _SIGNED_CONDITIONS)[sign]
        if type(a) is _Imm and type(b) is not _Imm:
            a, b, condition = b, a, _MIRRORED[condition]
        spare = None
        if type(a) is _Imm or type(a) is Mem and type(b) is Mem:
            spare = self.owned(None, a)
            a = spare
        if type(b) is _Imm and b == 0 and type(a) is not Mem:
            self.code.test(a)
        elif type(b) is _Imm:
            self.code.alu_imm(CMP, a, int(b))
        elif type(a) is Mem:
            self.code.op(b"\x39", b, a)
        else:
            self.code.alu(CMP, a, b)
        self.give(spare)
        return condition


NR_PROCESS_VM_READV = 310       # asm/unistd_64.h
_MAKERS = {"const": "const", "name": "name", "neg": "unary", "~": "unary",
           "cast": "cast", "load": "load", "not": "truth", "chain": "truth",
           "if": "if", "and": "either", "or": "either"}


# -- Actions: what a hit leaves behind.

_GOLDEN = 0x9e3779b97f4a7c15    # 2**64 / golden ratio: spreads keys
_GOLDEN_32 = 0x1e3779b1         # positive as imm32, odd


def _volatile(expressions):
    """Registers that computing expressions may change at any time."""
    regs = set()
    for expression in expressions:
        for tree in _nodes(expression.tree):
            op = tree[0]
            if op in ("load", "str", "buf"):
                regs |= _SYSCALL_USES
            elif op in ("//", "%"):
                regs |= {RAX, RDX}
            elif op in ("<<", ">>") and tree[3][0] != "const":
                regs.add(RCX)
            elif tree == ("name", False, "nsecs"):
                regs |= {RAX, RDX}
    return regs


class _Body(_Values):
    """The code of one action at one site."""

    def make(self):
        """Emit all of it. done: where a hit ends, whatever came of it."""
        spec, code = self.spec, self.code
        self.layout = None if spec.action == "enter" else block_layout(spec)
        self.frames = spec if spec.action == "enter" else entry_spec(spec)
        self.done, missed, first = code.label(), code.label(), None
        self.leave = code.label()       # where a call returns from
        if spec.when and not self.frames:
            self.begin(0, set(), _volatile([spec.when]))
            first = self.save(0)
            self.prepare([spec.when])
            self.fault = code.label()
            self.unless(spec.when.tree, missed)
            self.count_aside(self.fault, HEAD_FAULTS, missed)
        self.parts = spec.keys + spec.values
        if spec.when and self.frames:
            self.parts += (spec.when,)
        self.begin(1, self.reserved(), self.volatile())
        second = self.save(1)
        self.fault = code.label()
        if spec.action == "enter":
            self.enter()
        else:
            self.act()
        code.mark(self.done)
        if spec.action == "call":
            depth = self.depth
            code.aside()
            code.mark(self.leave)
            self.restore(second)
            if first:
                self.restore(first)
            code.put(b"\xc3")                           # ret
            code.back()
            self.depth = depth
        self.restore(second)
        code.mark(missed)
        if first:
            self.restore(first)

    def volatile(self):
        """Registers that the action's expressions may change at any time."""
        spec = self.spec
        regs = _volatile(self.parts)
        if spec.stack_size or spec.action == "stack":
            regs |= _SYSCALL_USES
        return regs

    def reserved(self):
        """Registers that an action itself needs."""
        spec = self.spec
        regs = {RAX, RDX} if spec.action == "trace" or self.frames else set()
        if spec.action == "hist" or spec.keys or spec.action == "stack":
            regs |= {RAX, RCX}
        if spec.action == "call":
            regs |= _SYSCALL_USES
        return regs

    def steady(self, tree):
        """A tree's value in a register that the action leaves alone."""
        reg = self.in_register(tree)
        if type(reg) is int and reg in self.reserved():
            return self.owned(None, reg)
        return reg

    def unused_volatile(self):
        """Registers that only expressions keep from being taken."""
        return sorted(self.volatile() - self.reserved() - self.held)

    def end_of_expressions(self):
        """From here on nothing is computed: more registers are free."""
        self.free += self.unused_volatile()

    def act(self):
        """Emit the action, behind what a stage saves."""
        spec, end = self.spec, self.code.label()
        if self.frames:
            frame = self.find_frame()
        self.prepare(self.parts)
        if spec.when and self.frames:
            self.unless(spec.when.tree, end)
            self.count_aside(self.fault, HEAD_FAULTS, end)
            self.fault = self.code.label()
        if spec.action == "call":
            self.call(frame if self.frames else None)
        elif spec.action == "trace":
            self.trace(end)
        elif spec.keys or spec.action == "stack":
            self.keyed()
        else:
            self.unkeyed(end)
        self.code.mark(end)
        if self.frames:
            self.code.store_imm(Mem(frame, FRAME_SP), 0)

    def unkeyed(self, end):
        """Add to the only payload."""
        value = self.steady(self.spec.values[0].tree) \
            if self.spec.values else None
        self.end_of_expressions()
        base = self.shard()
        self.add(base, self.place.block + self.layout.start, value)
        self.count_aside(self.fault, HEAD_FAULTS, end)

    # -- Parts that actions share.

    def shard(self):
        """A register that points to this processor's shard."""
        reg, code = self.take(), self.code
        code.put(shard_index(reg, self.place.shards))
        code.alu(ADD, reg, Mem(RIP, self.place.shards.base))
        return reg

    def count_head(self, offset):
        """Add one to a word of the head."""
        base = self.shard()
        self.code.lock_inc(Mem(base, self.place.block + offset,
                               is_wide=True))
        self.give(_Owned(base))

    def count_aside(self, label, offset, then):
        """At label: add one to a word of the head, and go to `then`."""
        if label not in self.code.jumped:
            return
        self.code.aside()
        self.code.mark(label)
        self.count_head(offset)
        self.code.jump(then)
        self.code.back()

    def prepare(self, expressions):
        """Compute the inputs that have to be computed once."""
        names = frozenset().union(*(each.names for each in expressions))
        if "nsecs" in names and "nsecs" not in self.pinned:
            self.require(self.place.tsc, "nsecs")
            self.touch(RAX, RDX)
            self.read_tsc()
            self.scale()
            reg = self.take()
            self.code.set_wide(reg, self.place.tsc[1])
            self.code.alu(ADD, reg, RAX)
            self.pin("nsecs", reg)

    def pin(self, name, reg):
        """A register holds a name's value to the end."""
        self.pinned[name] = reg
        self.held.add(reg)

    def read_tsc(self):
        """rax = the time stamp counter; rdx is lost."""
        self.code.put(b"\x0f\x31")                      # rdtsc
        self.code.shift(SHL, RDX, 32)
        self.code.alu(OR, RAX, RDX)

    def scale(self):
        """rax = rax * mult >> 32: ticks to ns; rdx is lost.

        Ticks shorter than a ns: it is the upper half of the product with
        mult << 32, and a shrd is spared. Both forms have one size.
        """
        mult, code = self.place.tsc[0], self.code
        is_half = mult < 1 << 32
        code.set_wide(RDX, mult << 32 if is_half else mult)
        code.op(b"\xf7", 4, RDX)                        # mul
        if is_half:
            code.put(b"\x48\x89\xd0\x66\x90")           # mov rax,rdx; nop
        else:
            code.op(b"\x0f\xac", RDX, RAX, 8, b"\x20")     # shrd $32

    def add(self, base, disp, value):
        """Add a value, in a register, to the payload at [base + disp]."""
        payload, _, is_unsigned = _payload(self.spec)
        if payload == "count":
            self.code.lock_inc(Mem(base, disp, is_wide=True))
        elif payload == "sum":
            self.code.lock_inc(Mem(base, disp + SUM_COUNT, is_wide=True))
            self.add_wide(base, disp + SUM_LOW, value, is_unsigned)
        else:
            self.bin(base, disp, value, is_unsigned)

    def add_wide(self, base, disp, value, is_unsigned):
        """Add a value to a sum of 128 bits: its upper half changes where a
        carry does not say what the value's sign does."""
        code, high = self.code, Mem(base, disp + 8, is_wide=True)
        low, back = Mem(base, disp, is_wide=True), code.label()
        if not is_unsigned:
            below = code.label()
            code.test(value)
            code.jump(below, _S)
            code.aside()
            code.mark(below)
            code.lock_add(low, value)
            code.jump(back, _B)
            code.lock_dec(high)
            code.jump(back)
            code.back()
        self.add_not_negative(low, high, value)
        code.mark(back)

    def add_not_negative(self, low, high, value):
        """lock add; a carry is rare."""
        code, carry, back = self.code, self.code.label(), self.code.label()
        code.lock_add(low, value)
        code.jump(carry, _B)
        code.mark(back)
        code.aside()
        code.mark(carry)
        code.lock_inc(high)
        code.jump(back)
        code.back()

    def bin(self, base, disp, value, is_unsigned):
        """Add a value to a histogram."""
        code = self.code
        low = Mem(base, disp + HIST_LOW, is_wide=True)
        high = Mem(base, disp + HIST_HIGH, is_wide=True)
        if is_unsigned:
            self.add_not_negative(low, high, value)
            self.bin_half(base, disp, value, is_unsigned, False)
            return
        below, end, borrowed = code.label(), code.label(), code.label()
        code.test(value)
        code.jump(below, _S)
        self.add_not_negative(low, high, value)
        self.bin_half(base, disp, value, is_unsigned, False)
        code.mark(end)
        code.aside()
        code.mark(below)
        code.lock_add(low, value)
        code.jump(borrowed, _B)
        code.lock_dec(high)
        code.mark(borrowed)
        self.bin_half(base, disp, value, is_unsigned, True)
        code.jump(end)
        code.back()

    def bin_half(self, base, disp, value, is_unsigned, is_negative):
        """Least and most, then the bucket: 8 * s + (v >> s), where s is
        what leaves v the four highest of its bits."""
        code, reg = self.code, self.take()
        code.mov(reg, value)
        if not is_unsigned:
            code.op(b"\x0f\xba", 7, reg, 8, b"\x3f")    # btc $63
        self.raise_to(base, disp + HIST_MOST, reg)
        code.op(b"\xf7", 2, reg)                        # not
        self.raise_to(base, disp + HIST_LEAST, reg)
        self.touch(RCX)
        code.mov(reg, value)
        if is_negative:
            code.op(b"\xf7", 3, reg)                    # neg
        code.mov(RCX, reg)
        code.alu_imm(OR, RCX, 8)
        code.op(b"\x0f\xbd", RCX, RCX)                  # bsr
        code.alu_imm(SUB, RCX, 3, 4)
        code.shift(SHR, reg)
        code.lea(reg, Mem(reg, 0, RCX, 3))
        code.lock_inc(Mem(base, disp + HIST_BUCKETS
                          + 8 * N_BUCKETS * is_negative, reg, 3, True))
        self.give(_Owned(reg))

    def raise_to(self, base, disp, reg):
        """[base + disp] = max(it, reg), unsigned: seldom a change."""
        code, mem = self.code, Mem(base, disp, is_wide=True)
        more, again, back = code.label(), code.label(), code.label()
        code.alu(CMP, reg, mem)
        code.jump(more, _A)
        code.mark(back)
        code.aside()
        code.mark(more)
        self.touch(RAX)
        code.mov(RAX, mem)
        code.mark(again)
        code.alu(CMP, reg, RAX)
        code.jump(back, _BE)
        code.lock_cmpxchg(mem, reg)
        code.jump(again, _NE)
        code.jump(back)
        code.back()

    # -- Tables: see the drawing above. tag holds the hash, then the state.

    def keyed(self):
        """Find or make the entry of the keys, and add to it."""
        spec, code, layout = self.spec, self.code, self.layout
        out, lost, found = code.label(), code.label(), code.label()
        keys = self.keys()
        value = self.steady(spec.values[0].tree) if spec.values else None
        self.end_of_expressions()
        tag, entry, index = self.take(), self.shard(), self.take()
        at = self.place.block + layout.start
        self.hash(tag, index, keys)
        code.mov(index, tag)
        code.shift(SHR, index, 65 - spec.n_entries.bit_length())
        self.scale_index(index, layout.entry_size)
        code.alu(ADD, entry, index)
        code.alu_imm(OR, tag, STATE_READY)
        code.op(b"\x39", tag, Mem(entry, at, is_wide=True))     # cmp
        code.jump(lost, _NE)
        self.compare_keys(entry, at, keys, lost)
        code.mark(found)
        self.search(lost, found, out, (tag, entry, index, at), keys)
        self.give(_Owned(tag))
        self.give(_Owned(index))
        self.add(entry, at + layout.payload_offset, value)
        self.give(_Owned(entry))
        self.count_aside(self.fault, HEAD_FAULTS, out)
        code.mark(out)
        if isinstance(keys, _KeyWords):
            self.grow(-8 * keys.n)

    def scale_index(self, index, size):
        """index *= size"""
        if size & size - 1:
            self.code.op(b"\x69", index, index, 8, _S32.pack(size))
        else:
            self.code.shift(SHL, index, size.bit_length() - 1)

    def keys(self):
        """Compute the keys: one integer into a register, more into words
        on the stack. -> that register, or _KeyWords"""
        spec, code = self.spec, self.code
        if not self.are_keys_words():
            return self.steady(spec.keys[0].tree)
        n = (self.layout.payload_offset - ENTRY_KEYS) // 8
        self.grow(8 * n)
        keys = _KeyWords(n, self.depth)
        for key, (_, offset, _) in zip(spec.keys, self.layout.fields):
            at = offset - ENTRY_KEYS
            if key.kind == "int":
                reg = self.in_register(key.tree)
                code.store(self.key_word(keys, at), reg)
                self.give(reg)
            else:
                self.text(key, lambda at=at: self.key_word(keys, at))
                self.fill(keys, at, key.size)
        if spec.action == "stack":
            self.walk(keys, self.layout.fields[-1][1] - ENTRY_KEYS)
        return keys

    def are_keys_words(self):
        """Are the keys more than an integer?"""
        spec = self.spec
        return (spec.action == "stack" or len(spec.keys) > 1
                or bool(spec.keys) and spec.keys[0].kind != "int")

    def key_word(self, keys, offset=0, index=-1):
        """Where a word of the keys is; index counts words."""
        return Mem(RSP, self.depth - keys.depth + offset, index, 3)

    def fill(self, keys, at, size):
        """Zeros from byte rcx of a key to its last word's end."""
        code, more, end = self.code, self.code.label(), self.code.label()
        code.mark(more)
        code.alu_imm(CMP, RCX, _words(size))
        code.jump(end, _AE)
        code.op(b"\xc6", 0, self.key_word(keys, at)._replace(
            index=RCX, shift=0), 1, b"\0")                       # movb $0
        code.alu_imm(ADD, RCX, 1)
        code.jump(more)
        code.mark(end)

    def hash(self, tag, spare, keys):
        """tag = table_hash() of the keys."""
        code = self.code
        code.set(tag, _GOLDEN)
        if not isinstance(keys, _KeyWords):
            code.op(b"\x0f\xaf", tag, keys)                     # imul
            return
        code.mov(spare, tag)
        code.clear(tag)
        self.each_word(keys, lambda word, index: (
            code.alu(XOR, tag, self.key_word(keys, word, index)),
            code.op(b"\xc1", 1, tag, 8, b"\x20"),               # ror $32
            code.op(b"\x0f\xaf", tag, spare)))                  # imul

    def compare_keys(self, entry, at, keys, other):
        """Go to other if the entry holds other keys."""
        code, key = self.code, Mem(entry, at + ENTRY_KEYS, is_wide=True)
        if not isinstance(keys, _KeyWords):
            code.op(b"\x39", keys, key)                         # cmp
            code.jump(other, _NE)
            return
        self.each_word(keys, lambda word, index: (
            code.mov(RAX, self.key_word(keys, word, index)),
            code.alu(CMP, RAX, key._replace(
                disp=key.disp + word, index=index, shift=3)),
            code.jump(other, _NE)))

    def each_word(self, keys, emit):
        """emit(offset, index) for each word: one by one, or in a loop."""
        if keys.n <= _N_UNROLLED:
            for n in range(keys.n):
                emit(8 * n, -1)
            return
        code, more = self.code, self.code.label()
        self.touch(RCX)
        code.clear(RCX)
        code.mark(more)
        emit(0, RCX)
        code.alu_imm(ADD, RCX, 1)
        code.alu_imm(CMP, RCX, keys.n)
        code.jump(more, _NE)

    def search(self, lost, found, out, where, keys):
        """Aside: try the entries in turn; claim a free one.

        One that another is writing is passed by, never waited for: it may
        be this very thread's, below a signal handler.
        """
        code, (tag, entry, count, at) = self.code, where
        state = Mem(entry, at + ENTRY_STATE, is_wide=True)
        key = Mem(entry, at + ENTRY_KEYS, is_wide=True)
        again, check, claim, other = [code.label() for _ in range(4)]
        self.touch(RAX)
        code.aside()
        code.mark(lost)
        code.set(count, N_PROBED)
        code.mark(again)
        code.mov(RAX, state)
        code.alu(CMP, RAX, tag)
        code.jump(check, _E)
        code.test(RAX)
        code.jump(claim, _E)
        code.mark(other)
        code.alu_imm(ADD, entry, self.layout.entry_size)
        code.alu_imm(SUB, count, 1)
        code.jump(again, _NE)
        self.count_head(HEAD_DROPPED)
        code.jump(out)
        code.mark(check)
        self.compare_keys(entry, at, keys, other)
        code.jump(found)
        code.mark(claim)                # count, 1 to 8, says "being written"
        code.lock_cmpxchg(state, count)
        code.jump(again, _NE)
        if isinstance(keys, _KeyWords):
            self.each_word(keys, lambda word, index: (
                code.mov(RAX, self.key_word(keys, word, index)),
                code.store(key._replace(disp=key.disp + word, index=index,
                                        shift=3), RAX)))
        else:
            code.store(key, keys)
        code.store(state, tag)
        code.jump(found)
        code.back()

    # -- Stacks: return addresses by frame pointers.

    def walk(self, keys, at):
        """Store return addresses into the keys, zeros behind the last.

        The page of rsp is mapped, as the site itself pushes there; what is
        beyond is read by the syscall. Each frame must lie above the last.
        """
        code, spec = self.code, self.spec
        frame, count = self.owned(("name", False, "rbp")), self.take()
        more, far, got, end = [code.label() for _ in range(4)]
        code.clear(RAX)
        for n in range(spec.depth):
            code.store(self.key_word(keys, at + 8 * n), RAX)
        code.clear(count)
        if not spec.is_inside:
            code.mov(RAX, Mem(RSP, self.depth))
            code.store(self.key_word(keys, at), RAX)
            code.set(count, 1)
        code.mark(more)
        code.alu_imm(CMP, count, spec.depth)
        code.jump(end, _AE)
        code.op(b"\xf7", 0, frame, 4, struct.pack("<I", 7))     # test $7
        code.jump(end, _NE)
        code.lea(RAX, Mem(RSP, self.depth))
        code.alu(CMP, RAX, frame)
        code.jump(end, _A)
        code.lea(RCX, Mem(frame, 8))
        code.alu(XOR, RCX, RAX)
        code.shift(SHR, RCX, 12)
        code.jump(far, _NE)
        code.mov(RAX, Mem(frame, 8))
        code.mov(RCX, Mem(frame))
        code.mark(got)
        code.test(RAX)
        code.jump(end, _E)
        code.store(self.key_word(keys, at, count), RAX)
        code.alu_imm(ADD, count, 1)
        code.alu(CMP, RCX, frame)
        code.mov(frame, RCX)
        code.jump(more, _A)
        code.jump(end)
        code.mark(far)
        self.fetch(frame, _Imm(16), None, 2)
        code.alu_imm(CMP, RAX, 16)
        code.jump(end, _NE)
        code.mov(RAX, Mem(RSP, -8))
        code.mov(RCX, Mem(RSP, -16))
        code.jump(got)
        code.mark(end)
        self.give(_Owned(count))
        self.give(frame)

    # -- Memory: strings and buffers, by the syscall.

    def text(self, value, dest):
        """Copy a str or buf to dest(). rcx = its bytes; may fault."""
        code, tree = self.code, value.tree
        address, end = self.owned(tree[2]), code.label()
        if value.kind == "str":
            self.fetch(address, _Imm(tree[3]), dest, 2)
            self.give(address)
            code.test(RAX)
            code.jump(self.fault, _LE)
            code.clear(RCX)
            more = code.label()
            code.mark(more)
            place = dest()
            code.alu_imm(CMP, place._replace(index=RCX, shift=0), 0, 1)
            code.jump(end, _E)
            code.alu_imm(ADD, RCX, 1)
            code.alu(CMP, RCX, RAX)
            code.jump(more, _NE)
            code.mark(end)
            return
        size = self.owned(tree[3])
        fits = code.label()
        self.touch(RCX)
        code.clear(RCX)
        code.test(size)
        code.jump(end, _LE)
        code.alu_imm(CMP, size, tree[4])
        code.jump(fits, _LE)
        code.set(size, tree[4])
        code.mark(fits)
        self.fetch(address, size, dest, 2)
        code.alu(CMP, RAX, size)
        code.jump(self.fault, _NE)
        code.mov(RCX, RAX)
        code.mark(end)
        self.give(size)
        self.give(address)

    # -- Records: see the drawing of a ring.

    def trace(self, end):
        """Reserve a ticket, claim its slot, fill it, publish it."""
        code, layout = self.code, self.layout
        at = self.place.block + layout.start
        slot, usual = self.take(), self.free
        # Until a value is computed, what that may change is free as well.
        self.free = self.unused_volatile() + usual
        base = self.shard()
        ticket = self.ticket(base, at, end)
        code.mov(slot, RAX)
        code.alu_imm(AND, slot, layout.n_entries - 1)
        code.op(b"\x69", slot, slot, 8, _S32.pack(layout.entry_size))
        code.alu(ADD, slot, base)

        def field(offset):
            return Mem(slot, at + RING_SLOTS + offset, is_wide=True)
        sequence = field(SLOT_SEQUENCE)
        code.lea(ticket, Mem(RAX, 1, RAX, 0))
        code.mov(RAX, sequence)
        code.alu(CMP, RAX, ticket)              # a later one was faster
        code.jump(end, _A)
        code.put(b"\xa8\x01")                   # test $1, %al
        code.jump(end, _NE)                     # another is still at it
        code.lock_cmpxchg(sequence, ticket)
        code.jump(end, _NE)
        self.stamp(field, base)
        self.free = [reg for reg in usual if reg != slot]
        for n, value in enumerate(self.spec.values):
            self.record(n, value, field)
        if layout.stack_offset:
            self.copy_stack(field)
        code.alu_imm(ADD, sequence, 1)
        self.give(_Owned(slot))

    def ticket(self, base, at, end):
        """rax = a ticket. -> a register that was used for it"""
        code, spare = self.code, self.take()
        reserved = Mem(base, at + RING_RESERVED, is_wide=True)
        self.touch(RAX)
        if self.spec.policy == "overwrite":
            code.set(RAX, 1)
            code.lock_xadd(reserved, RAX)
            return spare
        again, full = code.label(), code.label()
        tries = None
        if self.spec.policy == "block":
            tries = self.take()
            code.set(tries, _N_WAITS)
        code.mov(RAX, reserved)
        code.mark(again)
        code.mov(spare, RAX)
        code.alu(SUB, spare, Mem(base, at + RING_CONSUMED, is_wide=True))
        code.alu_imm(CMP, spare, self.layout.n_entries, 8, True)
        code.jump(full, _AE)
        code.lea(spare, Mem(RAX, 1))
        code.lock_cmpxchg(reserved, spare)
        code.jump(again, _NE)
        code.aside()
        code.mark(full)
        if tries is not None:
            self.wait(tries, spare, reserved, again)
        code.lock_inc(Mem(base, at + RING_FULL, is_wide=True))
        code.jump(end)
        code.back()
        return spare

    def stamp(self, field, base):
        """The time, who, where."""
        code, place = self.code, self.place
        if place.tsc is not None:
            self.touch(RAX, RDX)
            self.read_tsc()
            code.store(field(SLOT_TSC), RAX)
        else:
            code.store_imm(field(SLOT_TSC), 0)
        reg = self.take()
        if place.tid_offset is not None:
            code.mov(reg, Mem(FS, place.tid_offset), 4)
            code.store(field(SLOT_TID), reg, 4)
        else:
            code.store_imm(field(SLOT_TID), 0, 4)
        code.mov(reg, base)
        code.alu(SUB, reg, Mem(RIP, place.shards.base))
        if place.private:
            code.shift(SHR, reg, place.shards.shift - 1)
            code.alu_imm(CMP, Mem(RIP, place.private), 1)   # below: forked
            code.op(b"\xd1", 3, reg, 4)                     # rcr reg, 1
        else:
            code.shift(SHR, reg, place.shards.shift)
        code.store(field(SLOT_CPU), reg, 4)
        code.store_site(field(SLOT_SITE))
        self.give(_Owned(reg))

    def record(self, n, value, field):
        """Store one value; or, if it faults, its bit and zero."""
        code, word = self.code, field(SLOT_VALUES + 8 * n)
        self.fault, after = code.label(), code.label()
        if value.kind == "int":
            operand = self.operand(value.tree)
            if type(operand) is Mem:
                operand = self.owned(None, operand)
            if type(operand) is _Imm:
                code.store_imm(word, int(operand))
            else:
                code.store(word, operand)
            self.give(operand)
        else:
            at = self.layout.fields[n][1]
            self.text(value, lambda: field(at))
            code.store(word, RCX)
        code.mark(after)
        if self.fault in code.jumped:
            code.aside()
            code.mark(self.fault)
            code.alu_imm(OR, field(SLOT_FAULTS), 1 << n, 4, True)
            code.store_imm(word, 0)
            code.jump(after)
            code.back()

    def copy_stack(self, field):
        """The registers that unwinding begins with, and the stack's top."""
        code, at = self.code, self.layout.stack_offset
        size = self.spec.stack_size
        for n, name in enumerate(STACK_REGISTERS):
            operand = self.name(name)
            if type(operand) is Mem:
                operand = self.owned(None, operand)
            code.store(field(at + 8 + 8 * n), operand)
            self.give(operand)
        reg = self.name("rsp")
        copied = code.label()
        self.fetch(reg, _Imm(size),
                   lambda: field(at + 8 + 8 * len(STACK_REGISTERS)),
                   size // PAGE_SIZE + 2)
        code.test(RAX)
        code.jump(copied, _NS)
        code.clear(RAX)
        code.mark(copied)
        code.store(field(at), RAX)
        self.give(reg)

    def wait(self, tries, spare, reserved, again):
        """A full ring: sleep until the reader wakes us or 10 ms are over,
        _N_WAITS times at most, and never without a living tracer."""
        code, place = self.code, self.place
        self.require(place.tracer, "overflow=block")
        self.require(place.private, "overflow=block")
        give_up = code.label()
        tracer = Mem(RIP, place.tracer)
        code.alu_imm(SUB, tries, 1)
        code.jump(give_up, _S)
        code.mov(spare, Mem(RIP, place.private))
        code.test(spare)
        code.jump(give_up, _E)                  # a forked child
        code.mov(spare, tracer, 4)
        code.op(b"\xf7", 0, spare, 4, struct.pack("<I", _FUTEX_TID_MASK))
        code.jump(give_up, _E)                  # nobody will wake us
        code.op(b"\xf7", 0, spare, 4, struct.pack("<I", _FUTEX_OWNER_DIED))
        code.jump(give_up, _NE)
        code.op(b"\x0f\xba", 5, tracer, 4, b"\x1f", b"\xf0")    # lock bts
        code.op(b"\x0f\xba", 5, spare, 4, b"\x1f")
        before = self.depth
        self.grow(_RED_ZONE_SIZE)
        kept = (RCX, RDX, RSI, RDI, 8, 9, 10, 11)
        for reg in kept:
            self.push(reg)
        code.put(b"\x68" + struct.pack("<i", _WAIT_NS))         # push imm32
        code.put(b"\x6a\0")                     # struct timespec: 0 s
        code.mov(RDX, spare)
        code.lea(RDI, tracer)
        code.clear(RSI)                         # FUTEX_WAIT, not private
        code.mov(10, RSP)
        code.set(RAX, NR_FUTEX)
        code.put(b"\x0f\x05")
        code.lea(RSP, Mem(RSP, 16))
        for reg in reversed(kept):
            code.put(pop_r64(reg))
        code.lea(RSP, Mem(RSP, _RED_ZONE_SIZE))
        self.depth = before
        code.mov(RAX, reserved)
        code.jump(again)
        code.mark(give_up)

    # -- Frames: entries leave one under their rsp, exits take it.
    #
    # Measured on Zen 3, a loop of calls of an empty function: 2 rdtsc are 64
    # cycles, latency is 100, but 66 with a sum in place of the histogram. An
    # rdtsc waits for the loads before it, and a bucket's address is known
    # only 25 cycles behind the rdtsc that it comes from: a bucket for
    # nothing (and $255) still makes 94. Neither plain in place of locked
    # additions, nor lzcnt, nor an earlier rdtsc at the entry, nor the sum
    # behind the bucket was faster by more than 2 cycles.

    def frame_slot(self, key, frame):
        """key = the site's rsp; frame = where its search begins."""
        size, _ = frames_layout(self.frames)
        code, n, spare = self.code, self.frames.n_frames, self.take()
        code.lea(key, Mem(RSP, self.depth))
        code.op(b"\x69", frame, key, 8, _S32.pack(_GOLDEN_32))  # imul
        code.shift(SHR, frame, 32 - (size.bit_length() - 1))
        code.alu_imm(AND, frame, (n - 1) * size, 8, True)
        code.lea(spare, Mem(RIP, self.place.frames))
        code.alu(ADD, frame, spare)
        self.give(_Owned(spare))
        return size

    def find_frame(self):
        """Pin what the frame of this exit knows. -> its register"""
        self.require(self.place.frames, "elapsed")
        code = self.code
        names = frozenset().union(*(part.names for part in self.parts))
        key, frame = self.take(), self.take()
        if "elapsed" in names:
            self.require(self.place.tsc, "elapsed")
            self.touch(RAX, RDX)
            now = self.take()
            self.read_tsc()
            code.mov(now, RAX)
        size = self.frame_slot(key, frame)
        other, found = code.label(), code.label()
        code.op(b"\x39", key, Mem(frame))                       # cmp
        code.jump(other, _NE)
        code.mark(found)
        code.aside()
        code.mark(other)
        for _ in range(N_NEIGHBOURS - 1):
            code.alu_imm(ADD, frame, size)
            code.op(b"\x39", key, Mem(frame))
            code.jump(found, _E)
        self.count_head(HEAD_UNMATCHED)
        code.jump(self.done)
        code.back()
        self.give(_Owned(key))
        if "elapsed" in names:
            self.elapsed(now, frame)
            self.pin("elapsed", now)
        for n, name in enumerate(self.frames.kept):
            self.pinned[name] = Mem(frame, FRAME_ARGS + 8 * n)
        self.held.add(frame)
        return frame

    def elapsed(self, now, frame):
        """now = ns since the frame's entry, none if the clocks disagree."""
        code, early, on = self.code, self.code.label(), self.code.label()
        code.alu(SUB, now, Mem(frame, FRAME_TSC))
        code.jump(early, _B)
        code.mark(on)
        code.aside()
        code.mark(early)
        code.clear(now)
        code.jump(on)
        code.back()
        code.mov(RAX, now)
        self.scale()
        code.mov(now, RAX)

    def enter(self):
        """Leave a frame for the exit, or none if the condition is false."""
        code, spec = self.code, self.spec
        self.require(self.place.frames, "elapsed")
        skip = code.label()
        if spec.when:
            self.prepare([spec.when])
            self.unless(spec.when.tree, skip)
            self.skip_aside(skip)
        key, frame = self.take(), self.take()
        size = self.frame_slot(key, frame)
        same, filled, crowded = [code.label() for _ in range(3)]
        near = [same] + [code.label() for _ in range(N_NEIGHBOURS - 1)]
        self.touch(RAX)
        for n, label in enumerate(near):
            code.op(b"\x39", key, Mem(frame, n * size))         # cmp
            code.jump(label, _E)
        code.clear(RAX)
        code.lock_cmpxchg(Mem(frame), key)
        code.jump(crowded, _NE)
        code.mark(filled)
        code.aside()
        for n in range(1, N_NEIGHBOURS):
            code.mark(near[n])
            code.alu_imm(ADD, frame, n * size)
            code.jump(same)
        code.mark(same)
        self.count_head(HEAD_ABANDONED)
        code.jump(filled)
        code.mark(crowded)
        for _ in range(N_NEIGHBOURS - 1):
            code.alu_imm(ADD, frame, size)
            code.clear(RAX)
            code.lock_cmpxchg(Mem(frame), key)
            code.jump(filled, _E)
        self.count_head(HEAD_CROWDED)
        code.jump(self.done)
        code.back()
        self.fill_frame(frame)

    def skip_aside(self, skip):
        """The condition is false, or faults: no frame must be found at the
        exit, not even one that was left there by a longjmp."""
        code, clear, found = self.code, self.code.label(), self.code.label()
        code.aside()
        if self.fault in code.jumped:
            code.mark(self.fault)
            self.count_head(HEAD_FAULTS)
            code.jump(clear)
        code.mark(skip)
        self.count_head(HEAD_SKIPPED)
        code.mark(clear)
        key, frame = self.take(), self.take()
        size = self.frame_slot(key, frame)
        for n in range(N_NEIGHBOURS):
            code.op(b"\x39", key, Mem(frame))                   # cmp
            code.jump(found, _E)
            code.alu_imm(ADD, frame, size)
        code.jump(self.done)
        code.mark(found)
        code.store_imm(Mem(frame), 0)
        self.count_head(HEAD_ABANDONED)
        code.jump(self.done)
        code.back()
        self.give(_Owned(key))
        self.give(_Owned(frame))

    def fill_frame(self, frame):
        """The arguments, then the time: as late as can be."""
        code = self.code
        for n, name in enumerate(self.spec.kept):
            reg = self.in_register(("name", False, name))
            code.store(Mem(frame, FRAME_ARGS + 8 * n), reg)
            self.give(reg)
        if self.place.tsc is not None and self.spec.is_timed:
            self.touch(RAX, RDX)
            self.read_tsc()
            code.store(Mem(frame, FRAME_TSC), RAX)

    # -- Calls: the tracer's function looks, and the thread waits. See the
    #    drawing. rdi to r11 are for syscalls, and for whatever is short.

    def call(self, frame):
        """Ask, wait, and go on with the registers that were answered."""
        code, count = self.code, self.place.block + self.layout.start
        self.touch(*[reg for reg in range(16) if reg != RSP])
        self.grow(_CALL_LOCALS)
        if frame is not None:
            self.keep_arguments(frame)
        no, out, faulty = [code.label() for _ in range(3)]
        base, slot, answer, asked = [self.take() for _ in range(4)]
        self.claim_call(base, slot, answer, asked, no)
        self.fill_call(slot, answer, frame is not None)
        self.wait_for_answer(base, slot, answer, asked, no)
        self.collect(slot, answer, no)
        self.give(_Owned(asked))
        code.op(b"\xf7", 0, RSI, 4, _S32.pack(CALL_FAULT | CALL_DROP))
        code.jump(faulty, _NE)                          # test $6, %esi
        shard = self.shard()
        code.lock_inc(Mem(shard, count, is_wide=True))
        self.give(_Owned(shard))
        code.mark(out)
        self.grow(-_CALL_LOCALS)
        if not (self.spec.is_exit or self.spec.is_inside):
            code.op(b"\xf7", 0, RSI, 4, _S32.pack(CALL_SKIP))
            code.jump(self.leave, _NE)
        if frame is not None:
            code.jump(self.done)
        self.depth += _CALL_LOCALS
        code.aside()
        code.mark(no)
        code.set(RSI, CALL_DROP)
        code.mark(faulty)
        fault = code.label()
        code.op(b"\xf7", 0, RSI, 4, _S32.pack(CALL_FAULT))
        code.jump(fault, _NE)
        self.count_head(HEAD_DROPPED)
        code.jump(out)
        code.mark(fault)
        self.count_head(HEAD_FAULTS)
        code.jump(out)
        code.back()
        self.depth -= _CALL_LOCALS

    def keep_arguments(self, frame):
        """Take what the entry left, and free the frame: not while waiting.
        """
        code = self.code
        for n in range(N_CALL_ARGS):
            name = "arg%d" % n
            code.mov(RAX, self.pinned[name])
            code.store(Mem(RSP, 16 + 8 * n), RAX)
        code.store_imm(Mem(frame, FRAME_SP), 0)
        self.held.discard(frame)
        self.free.append(frame)

    def claim_call(self, base, slot, answer, asked, no):
        """Find a free slot, if there is one, and somebody to answer."""
        code, place = self.code, self.place
        self.require(place.calls, "a handler")
        self.require(place.private, "a handler")
        again, other, found = [code.label() for _ in range(3)]
        self.leave_if_forked(no)
        code.set_wide(base, place.calls)
        code.mov(asked, Mem(base, CALLS_OWNER), 4)
        code.lea(RCX, Mem(asked, -1))
        code.alu_imm(CMP, RCX, CALL_FREE)       # nobody, or dead
        code.jump(no, _AE)
        code.alu_imm(CMP, Mem(base, CALLS_LATE), 0, 4)
        code.jump(no, _NE)
        code.op(b"\x0f\xba", 5, asked, 4, b"\x1f")      # bts $31
        code.mov(RDX, RSP)
        code.op(b"\x69", 8, RDX, 4, _S32.pack(_GOLDEN_32))      # imul
        code.op(b"\xc1", SHR, 8, 4, b"\x18")            # its 8 highest bits
        code.set(9, N_CALLS)
        code.mark(again)
        code.mov(slot, 8)
        code.shift(SHL, slot, 8)
        code.lea(slot, Mem(base, CALL_SIZE, slot))
        code.mov(RAX, Mem(slot), 4)
        code.mov(RCX, RAX)
        code.alu_imm(AND, RCX, ~CALL_NUMBER, 4)
        code.alu_imm(CMP, RCX, CALL_FREE, 4)
        code.jump(other, _NE)
        code.lea(answer, Mem(RAX, 1))
        code.alu_imm(AND, answer, CALL_NUMBER, 4)
        code.mov(RCX, answer)
        code.alu_imm(OR, RCX, CALL_FILLING, 4)
        self.swap(slot, RCX)
        code.jump(found, _E)
        code.mark(other)
        code.alu_imm(ADD, 8, 1)
        code.alu_imm(AND, 8, N_CALLS - 1)
        code.alu_imm(SUB, 9, 1)
        code.jump(again, _NE)
        code.jump(no)
        code.mark(found)
        code.alu_imm(OR, answer, CALL_ANSWERED, 4)

    def leave_if_forked(self, no):
        """A forked child never waits. If a signal handler forked while we
        did, the slot is the parent's alone. rcx is lost."""
        self.code.mov(RCX, Mem(RIP, self.place.private))
        self.code.test(RCX)
        self.code.jump(no, _E)

    def swap(self, slot, reg):
        """lock cmpxchg of a slot's word: if it is eax, it will be reg."""
        self.code.op(b"\x0f\xb1", reg, Mem(slot), 4, b"", b"\xf0")

    def fill_call(self, slot, answer, has_args):
        """Tell what the function may want to know."""
        code = self.code
        for reg in range(16):
            if reg == RSP:
                code.lea(RAX, Mem(RSP, self.depth))
            else:
                code.mov(RAX, self.site_value(reg))
            code.store(Mem(slot, CALL_REGISTERS + 8 * reg), RAX)
        words = [(CALL_FLAGS, self.stack(self.flags_at)),
                 (CALL_CALLER, Mem(RSP, self.depth))]
        words += [(CALL_ARGS + 8 * n, Mem(RSP, 16 + 8 * n))
                  for n in range(N_CALL_ARGS if has_args else 0)]
        for at, word in words:
            code.mov(RAX, word)
            code.store(Mem(slot, at), RAX)
        code.store(Mem(slot, CALL_ANSWER), answer, 4)
        code.store_imm(Mem(slot, CALL_OUTCOME), 0)
        code.store_site(Mem(slot, CALL_SITE))
        if self.spec.is_quiet:
            code.clear(RAX)
        else:
            code.set(RAX, NR_GETTID)
            code.put(b"\x0f\x05")
        code.store(Mem(slot, CALL_TID), RAX, 4)

    def wait_for_answer(self, base, slot, answer, asked, no):
        """Ask, and wait: awake for a little while. eax = the word."""
        code = self.code
        wait, answered, give_up, gone, spin = [
            code.label() for _ in range(5)]
        self.leave_if_forked(no)
        self.ask(base, slot, asked, gone)
        code.mov(RCX, Mem(base, CALLS_SPINS), 4)
        code.mark(spin)
        code.mov(RAX, Mem(slot), 4)
        code.alu(CMP, RAX, asked, 4)
        code.jump(answered, _NE)
        code.put(b"\xf3\x90")                           # pause
        code.alu_imm(SUB, RCX, 1)
        code.jump(spin, _G)
        code.set(RAX, 1)
        code.op(b"\x87", RAX, Mem(slot, CALL_SLEEPS), 4)        # xchg
        is_quiet, results = self.spec.is_quiet, (0, -_EAGAIN, -_EINTR_ERRNO)
        if is_quiet:
            results += (-_ETIMEDOUT,)
            self.turns()
        else:
            self.deadline(give_up)
        code.mark(wait)
        self.leave_if_forked(no)
        code.mov(RAX, Mem(slot), 4)
        code.alu(CMP, RAX, asked, 4)
        code.jump(answered, _NE)
        if is_quiet:
            code.alu_imm(SUB, Mem(RSP, 16), 1)
            code.jump(give_up, _B)
        code.mov(10, RSP)
        code.clear(8)
        code.set(9, (1 << 32) - 1)
        self.futex(Mem(slot), _FUTEX_WAIT if is_quiet else
                   _FUTEX_WAIT_BITSET, lambda: code.mov(RDX, asked, 4))
        for result in results:
            code.alu_imm(CMP, RAX, result)
            code.jump(wait, _E)
        # Late is said first: whoever sees that we gave up takes it back.
        code.mark(give_up)
        self.leave_if_forked(no)
        code.store_imm(Mem(base, CALLS_LATE), 1, 4)
        self.withdraw(slot, answer, asked, CALL_GAVE_UP)
        code.jump(no, _E)
        code.store_imm(Mem(base, CALLS_LATE), 0, 4)
        code.jump(answered)
        code.mark(gone)
        self.withdraw(slot, answer, asked, CALL_FREE)
        code.jump(no, _E)
        code.mark(answered)

    def ask(self, base, slot, asked, gone):
        """The word and the bit of a slot; wake the tracer if it sleeps.

        The owner is looked at once more when the word is there: it may
        have died in between, and then nobody wakes us.
        """
        code, awake = self.code, self.code.label()
        code.mov(RAX, asked)
        code.op(b"\x87", RAX, Mem(slot), 4)             # xchg: a fence
        code.mov(RAX, Mem(base, CALLS_OWNER), 4)
        code.op(b"\x0f\xba", 5, RAX, 4, b"\x1f")        # bts $31
        code.alu(CMP, RAX, asked, 4)
        code.jump(gone, _NE)
        code.mov(RCX, slot)
        code.alu(SUB, RCX, base)
        code.shift(SHR, RCX, 8)
        code.alu_imm(SUB, RCX, 1)
        code.op(b"\x0f\xab", RCX, Mem(base, CALLS_ASKED), 8, b"", b"\xf0")
        code.alu_imm(CMP, Mem(base, CALLS_IDLE), 0, 4)  # lock bts, above
        code.jump(awake, _E)
        code.clear(RAX)
        code.op(b"\x87", RAX, Mem(base, CALLS_IDLE), 4)
        code.test(RAX)
        code.jump(awake, _E)
        self.futex(Mem(base, CALLS_IDLE), _FUTEX_WAKE, lambda: code.set(
            RDX, 1))
        code.mark(awake)

    def withdraw(self, slot, answer, asked, kind):
        """From asked to another kind of word, or eax is what it is."""
        code = self.code
        code.mov(RAX, asked)
        code.mov(RCX, answer)
        code.alu_imm(XOR, RCX, CALL_ANSWERED ^ kind, 4)
        self.swap(slot, RCX)

    def futex(self, word, op, value):
        """futex(word, op, …): shared by processes, so not PRIVATE."""
        code = self.code
        code.lea(RDI, word)
        code.set(RSI, op)
        value()
        code.set(RAX, NR_FUTEX)
        code.put(b"\x0f\x05")

    def turns(self):
        """[rsp] = a part of the time to wait, a struct timespec; [rsp + 16]
        = how many parts there are. One that a signal cuts short is one."""
        code = self.code
        seconds, rest = divmod(self.spec.timeout_ns // _N_TURNS, 10**9)
        code.store_imm(Mem(RSP), seconds)
        code.store_imm(Mem(RSP, 8), rest)
        code.store_imm(Mem(RSP, 16), _N_TURNS)

    def deadline(self, give_up):
        """[rsp] = when to wait no longer, a struct timespec: a signal that
        is handled meanwhile does not begin the time anew."""
        code, fits = self.code, self.code.label()
        seconds, rest = divmod(self.spec.timeout_ns, 10**9)
        code.set(RDI, _CLOCK_MONOTONIC)
        code.mov(RSI, RSP)
        code.set(RAX, NR_CLOCK_GETTIME)
        code.put(b"\x0f\x05")
        code.test(RAX)
        code.jump(give_up, _NE)
        code.mov(RAX, Mem(RSP, 8))
        code.alu_imm(ADD, RAX, rest)
        code.alu_imm(ADD, Mem(RSP), seconds)
        code.alu_imm(CMP, RAX, 10**9)
        code.jump(fits, _B)
        code.alu_imm(SUB, RAX, 10**9)
        code.alu_imm(ADD, Mem(RSP), 1)
        code.mark(fits)
        code.store(Mem(RSP, 8), RAX)

    def collect(self, slot, answer, no):
        """The answer's registers to where ours were pushed; rsi = outcome.
        """
        code = self.code
        self.leave_if_forked(no)
        code.alu(CMP, RAX, answer, 4)
        code.jump(no, _NE)
        code.mov(RCX, answer)
        code.alu_imm(XOR, RCX, CALL_ANSWERED ^ CALL_COLLECTING, 4)
        self.swap(slot, RCX)
        code.jump(no, _NE)
        for reg in range(16):
            if reg != RSP:
                code.mov(RAX, Mem(slot, CALL_REGISTERS + 8 * reg))
                code.store(self.site_value(reg), RAX)
        code.mov(RAX, Mem(slot, CALL_FLAGS))
        code.store(self.stack(self.flags_at), RAX)
        code.mov(RSI, Mem(slot, CALL_OUTCOME), 4)
        code.mov(RCX, answer)
        code.alu_imm(XOR, RCX, CALL_ANSWERED ^ CALL_FREE, 4)
        code.store(Mem(slot), RCX, 4)


class _KeyWords(NamedTuple):
    """Keys on the stack: how many words, pushed at which depth."""
    n: int
    depth: int


_N_UNROLLED = 4                 # words of keys; more take a loop


def eflags_of(word):
    """The arithmetic flags that lahf; seto al; left: as in rflags."""
    return word >> 8 & _LAHF_FLAGS | (word & 1) << _OVERFLOW_BIT


def flags_word(eflags):
    """What add 0x7f,al; sahf makes of it: the inverse of eflags_of."""
    return (eflags & _LAHF_FLAGS | 2) << 8 | eflags >> _OVERFLOW_BIT & 1


_LAHF_FLAGS, _OVERFLOW_BIT = 0xd5, 11   # SDM 3.4.3: CF PF AF ZF SF; OF
_N_WAITS, _WAIT_NS = 10, 10000000       # of 10 ms: 100 ms for each hit
_FUTEX_TID_MASK, _FUTEX_OWNER_DIED = 0x3fffffff, 0x40000000  # linux/futex.h
NR_FUTEX, NR_GETTID, NR_CLOCK_GETTIME = 202, 186, 228    # asm/unistd_64.h
_FUTEX_WAIT, _FUTEX_WAKE, _FUTEX_WAIT_BITSET, _CLOCK_MONOTONIC = 0, 1, 9, 1
_EAGAIN, _EINTR_ERRNO = 11, 4   # asm-generic/errno-base.h
_ETIMEDOUT = 110                # asm-generic/errno.h
_N_TURNS = 20                   # parts of the time that a quiet call waits
_CALL_LOCALS = 16 + 8 * N_CALL_ARGS     # a struct timespec, arguments kept


def table_hash(words, is_one_int):
    """The hash of an entry's key words, as bodies compute it.

    is_one_int  the key is a single integer
    """
    mask, h = (1 << 64) - 1, 0
    if is_one_int:
        return words[0] * _GOLDEN & mask
    for word in words:
        h ^= word
        h = (h >> 32 | h << 32 & mask) * _GOLDEN & mask
    return h


def table_tag(words, is_one_int):
    """The state of a ready entry with these key words: never below 16."""
    return table_hash(words, is_one_int) | STATE_READY


def table_index(words, is_one_int, n_entries):
    """Where the search for these key words begins; n_entries: of the Spec.
    """
    return table_hash(words, is_one_int) >> 65 - n_entries.bit_length()


_plans = {}                     # (spec, what is dead) -> _Plan


def compiled(spec, place, window):
    """The Code of an action at a window: it can be put at any place that
    differs by its block and its site's index.

    Raises UbpError where the place lacks what an expression reads, or the
    body would be longer than MAX_CODE.
    """
    block_layout(spec)
    if spec.action == "call":           # a function may look at all of it
        window = window._replace(dead_regs=0, flags_dead=False)
    key = (spec, window.dead_regs, window.flags_dead)
    plan, dead = _plans.get(key, _Plan()), window.dead_regs
    for _ in range(_N_TRIES):
        machine = _Body(spec, place._replace(block=0, site_index=0), window,
                        plan)
        machine.make()
        wanted = plan.wanted | machine.wanted
        # Dead registers that nobody reads make no difference.
        matter = wanted | {reg for reg in _POOL if not dead >> reg & 1
                           or reg == RAX and not window.flags_dead}
        found = _Plan(tuple(used & matter for used in machine.used),
                      wanted, frozenset(machine.stacks))
        if found == plan:
            break
        plan = found
    else:
        raise UbpError("compile", spec.action, "registers run in circles")
    if not place.can_stack and machine.deepest > _RED_ZONE_SIZE:
        raise UbpError("compile", spec.action,
                       "more stack than a goroutine is sure to have")
    if sum(len(part) if type(part) is bytes else 8
           for part in machine.code.parts + machine.code.cold) > MAX_CODE:
        raise UbpError("compile", spec.action,
                       "more than %d bytes of code" % MAX_CODE)
    if len(_plans) > 1000:
        _plans.clear()
    _plans[key] = plan
    return machine.code


_N_TRIES = 8


def body(spec, place, window, vaddr):
    """The machine code of an action at a window. -> bytes

    Its size does not depend on vaddr or on numbers in place. Raises as
    compiled() does, and RelocationError where data is out of reach.
    """
    code = compiled(spec, place, window)
    code.join()
    return code.finish().at(vaddr, [place])


# ---- 9  Trampolines -------------------------------------------------------
#
# What a jump leads to: a body, the displaced instructions moved, a jump
# back. The body of a count is one locked increment of a counter that
# belongs to the processor it runs on, so two cores never share a line.
# Invariant: behind the body every register and flag is as it was before,
# or was proven dead at the site by the window's liveness.
#
#     +0   body             only what the probe asks for
#     +b   copies           the displaced instructions, each at a new address
#     +c   jmp rel32        to the first instruction behind the window
#
# Measured on Zen 3: two taken jumps are the whole cost (2 cycles) and hide
# the body, as long as all of it lies in one cache line: crossing one costs
# a cycle, and a trampoline of two lines three. So line_start packs them
# densely and skips to the next line only where one would straddle.

CPU_FROM_RSEQ, CPU_FROM_RDPID, CPU_FROM_LSL = "rseq", "rdpid", "lsl"
CPU_NONE = "none"               # there is one shard for all of them
_CPU_SELECTOR = 0x7b            # __CPUNODE_SEG, <asm/segment.h>
_CPU_BITS = 0xfff               # VDSO_CPUNODE_MASK, <asm/segment.h>
_SCRATCH_ORDER = (RAX, RCX, RDX, RSI, RDI, 8, 9, 10, 11, RBX, 12, 13, 14, 15,
                  RBP)
_SAVE_FLAGS = b"\x9f\x0f\x90\xc0"       # lahf; seto al
_LOAD_FLAGS = b"\x04\x7f\x9e"           # add al,0x7f; sahf


class Shards(NamedTuple):
    """Where the counter of each processor is, and how a body learns it."""
    source: str         # CPU_FROM_RSEQ, CPU_FROM_RDPID, CPU_FROM_LSL, CPU_NONE
    rseq_offset: int    # of rseq.cpu_id from the fs base, for CPU_FROM_RSEQ;
    #                     for CPU_NONE the vaddr of the only shard
    mask: int           # number of shards - 1; a power of two, less one
    shift: int          # a shard is 1 << shift bytes
    base: int           # vaddr of a word that holds the vaddr of shard 0


class Copy(NamedTuple):
    """One displaced instruction: where it was, and where its copy runs."""
    offset: int         # from the site
    size: int
    moved: int          # from the trampoline's start
    moved_size: int
    back: int           # where its syscall comes back to, within the copy; 0


class Trampoline(NamedTuple):
    """Finished code, and where the displaced instructions went."""
    vaddr: int
    code: bytes
    copies: Tuple[Copy, ...]


def cpu_number(reg, shards):
    """Code that loads reg with this processor's number, at most mask.

    Whatever the source holds, a thread without rseq included (-1, -2), the
    mask keeps the index inside; the locked increment keeps the sum exact.
    """
    if shards.source == CPU_FROM_RSEQ:
        code = mov_r32_fs_disp32(reg, shards.rseq_offset)
    elif shards.source == CPU_FROM_RDPID:
        code = rdpid_r64(reg)
    elif shards.source == CPU_NONE:
        code = mov_r32_imm32(reg, 0)
    else:
        code = mov_r32_imm32(reg, _CPU_SELECTOR) + lsl_r32_r32(reg, reg)
    return code + and_r32_imm(reg, shards.mask & _CPU_BITS)


def shard_index(reg, shards):
    """Code that loads reg with the offset of this processor's shard."""
    return cpu_number(reg, shards) + shl_r32_imm8(reg, shards.shift)


def scratch_registers(n, dead_regs):
    """n registers for a body -> ([numbers], [those that must be saved]).

    dead_regs   mask of registers that liveness proved dead at the site
    """
    chosen = sorted(_SCRATCH_ORDER, key=lambda reg: not dead_regs >> reg & 1)
    chosen = chosen[:n]
    return chosen, [reg for reg in chosen if not dead_regs >> reg & 1]


def count_body(window, vaddr, index, shards):
    """Code that adds one to this processor's counter. -> bytes

    vaddr  where the body runs;   index  of the counter within a shard
    The red zone below rsp is stepped over before anything is pushed (System
    V ABI, 3.2.2). Flags travel in ax: lahf takes all but OF, seto takes OF,
    and adding 0x7f to al overflows exactly where OF was set.
    """
    if shards.source == CPU_NONE:
        return _count_in_one_word(window, vaddr,
                                  shards.rseq_offset + 8 * index)
    key = window.dead_regs, window.flags_dead, shards[:4]
    if key not in _count_bodies:
        if len(_count_bodies) > 1000:
            _count_bodies.clear()
        _count_bodies[key] = _count_parts(window, shards)
    head, middle, tail = _count_bodies[key]
    return (head + rel32(shards.base - vaddr - len(head) - 4, vaddr) + middle
            + _S32.pack(8 * index) + tail)


_count_bodies = {}


def _count_parts(window, shards):
    """count_body in three parts: between them are the displacement of the
    shards' address and that of the counter, the ends of their forms."""
    flags_live = not window.flags_dead
    # With live flags rax holds them, and is no register to count with.
    usable = window.dead_regs & ~(1 << RSP | flags_live << RAX)
    (reg,), saved = scratch_registers(1, usable)
    if flags_live and reg == RAX:
        reg, saved = RCX, [RCX]
    if flags_live and not window.dead_regs >> RAX & 1:
        saved = [RAX] + saved
    head = lea_rsp_disp(-128) if saved else b""
    head += b"".join(push_r64(each) for each in saved)
    head += _SAVE_FLAGS if flags_live else b""
    head += shard_index(reg, shards)
    head += add_r64_m64_rip(reg, 0, 0)[:-4]
    tail = b"".join(pop_r64(each) for each in reversed(saved))
    if RAX in saved:                    # it holds the flags till the end
        tail = (_LOAD_FLAGS + tail + lea_rsp_disp(128) if flags_live
                else tail + add_rsp_128())
    else:
        tail += add_rsp_128() if saved else b""
        tail += _LOAD_FLAGS if flags_live else b""
    return head, lock_inc_m64(reg, 0)[:-4], tail


def _count_in_one_word(window, vaddr, counter):
    """count_body where all processors share a counter. -> bytes"""
    saves = not (window.flags_dead or window.dead_regs >> RAX & 1)
    code = lea_rsp_disp(-128) + push_r64(RAX) if saves else b""
    code += b"" if window.flags_dead else _SAVE_FLAGS
    code += lock_inc_m64_rip(vaddr + len(code), counter)
    code += b"" if window.flags_dead else _LOAD_FLAGS
    return code + (pop_r64(RAX) + lea_rsp_disp(128) if saves else b"")


def count_trampoline(window, vaddr, index, shards):
    """The whole trampoline of a count. -> Trampoline

    window  Window: the displaced instructions and what is dead there
    vaddr   where the trampoline will be
    index   of this site's counter within a shard
    Its size does not depend on vaddr or index. Raises RelocationError.
    """
    return _with_copies(window, vaddr,
                        count_body(window, vaddr, index, shards))


def count_size(window, vaddr, shards):
    """Return the size of count_trampoline(). Raises RelocationError."""
    move = relocate_trapped if window.is_trap else relocate
    return sum([len(move(insn, vaddr)) for insn in window.insns],
               len(count_body(window, vaddr, 0, shards)) + JUMP_SIZE)


def _with_copies(window, vaddr, code):
    """A Trampoline of a body, the displaced instructions, the way back."""
    copies = []
    move = relocate_trapped if window.is_trap else relocate
    for insn in _led_within(window, lambda: itertools.accumulate(
            [vaddr + len(code)] + [len(move(insn, vaddr))
                                   for insn in window.insns])):
        moved = move(insn, vaddr + len(code))
        copies.append(Copy(insn.vaddr - window.site, insn.size, len(code),
                           len(moved), insn.size * (insn.flow == SYSCALL)))
        code += moved
    code += jmp_rel32(vaddr + len(code), window.site + window.size)
    return Trampoline(vaddr, code, tuple(copies))


def _led_within(window, places):
    """The displaced Insns; a branch from one to another leads to that one's
    place in the trampoline. One to the site does not: it is hit again.

    places  () -> where each begins there, with the bodies before it
    """
    if not _inner_branches(window.insns):
        return window.insns
    there = dict(zip([insn.vaddr for insn in window.insns], places()))
    del there[window.insns[0].vaddr]
    return [insn._replace(target=there.get(insn.target, insn.target))
            if insn.flow in _INNER else insn for insn in window.insns]


_templates = {}


def _template(window, parts, sizes):
    """(Template, [(start, copy) labels of each displaced instruction],
    label of the way back); sizes: of the relocated instructions.

    Sites are many and differ little: what depends on the block, the site's
    index and the address is filled in afterwards.
    """
    key = (tuple((spec, place._replace(
        block=0, site_index=0, at=place.at and place.at - window.site))
        for spec, place in parts), window.dead_regs, window.flags_dead,
        tuple(zip((insn.vaddr - window.site for insn in window.insns),
                  (insn.form.opcode for insn in window.insns), sizes)))
    made = _templates.get(key)
    if made is not None:
        return made
    code, labels, named = Code(), [], 0
    for spec, _ in parts:
        named |= input_registers(spec)
    for insn, size in zip(window.insns, sizes):
        here = [(n, part) for n, part in enumerate(parts)
                if part[1].at == insn.vaddr
                or not part[1].at and insn is window.insns[0]]
        labels.append((code.label(), code.label()))
        code.mark(labels[-1][0])
        _add_bodies(code, window, insn, here, named)
        code.mark(labels[-1][1])
        code.put(bytes(size))                           # to be filled in
    back = code.label()
    code.mark(back)
    code.put(bytes(JUMP_SIZE))
    if len(_templates) > 1000:
        _templates.clear()
    made = _templates[key] = code.finish(), labels, back
    return made


def trampoline(window, vaddr, parts):
    """Several bodies, in order of arming, and the window. -> Trampoline

    parts   [(Spec, Place), ...]; Place.at tells which displaced instruction
            a body comes before, if not the first
    What is rare lies behind the jump back. What a body reads, all leave
    alone even where it is dead: one behind it or the next round of a loop
    would see what they left there. Raises as body() does.
    """
    move = relocate_trapped if window.is_trap else relocate
    template, labels, back = _template(window, parts, [
        len(move(insn, vaddr)) for insn in window.insns])
    text = bytearray(template.at(vaddr, [place for _, place in parts]))
    offsets, made = template.labels, []
    insns = _led_within(window, lambda: [vaddr + offsets[start]
                                         for start, _ in labels])
    for insn, (start, copy) in zip(insns, labels):
        start, at = offsets[start], offsets[copy]
        moved = move(insn, vaddr + at)
        text[at:at + len(moved)] = moved
        # Only a body between two instructions belongs to a copy; the way
        # back of a syscall is counted from itself.
        if insn.flow == SYSCALL or insn.vaddr == window.site:
            start = at
        made.append(Copy(insn.vaddr - window.site, insn.size, start,
                         at + len(moved) - start,
                         insn.size * (insn.flow == SYSCALL)))
    at = offsets[back]
    text[at:at + JUMP_SIZE] = jmp_rel32(vaddr + at,
                                        window.site + window.size)
    return Trampoline(vaddr, bytes(text), tuple(made))


def _add_bodies(code, window, insn, parts, named):
    """Put the bodies that come before a displaced instruction.

    parts   [(n, (Spec, Place)), ...], the n-th of the trampoline's
    named   mask of registers that none of them may change
    Those for a conditional jump that is taken are jumped over by its
    opposite; behind them it is executed again, with the same flags.
    """
    if any(place.at for _, (_, place) in parts):
        dead = next(place.dead for _, (_, place) in parts if place.at)
        window = window._replace(dead_regs=dead[0], flags_dead=dead[1])
    for is_taken in False, True:
        these = [part for part in parts if part[1][1].is_taken == is_taken]
        over = code.label()
        if is_taken and these:
            code.jump(over, insn.form.opcode & 15 ^ 1)
        for n, (spec, place) in these:
            code.include(compiled(spec, place, window._replace(
                dead_regs=window.dead_regs & ~named)), n)
        code.mark(over)


# -- The way back: what undoes a trampoline that a thread is in the middle of.
#
# A body changes a register only while its value lies on the stack or nobody
# wants it, and the flags only while they lie in ax or on the stack. So what
# has to be undone at an instruction follows from the pushes before it, and
# any later ubp can read it from the code alone. What it cannot follow has no
# Undo: a thread there is waited for.
#
# The body of a call takes registers from an answer, one after the other, to
# where they were pushed, and may then return from the function. It can be
# undone before the first is taken, and behind the last if it returns not.
# As the thread is about to go on by itself, that is for one that is stopped.

FLAGS_IN_PLACE, FLAGS_IN_AX, FLAGS_IN_AH = 0, -1, -2    # AH: of stays in place
_LAHF, _SETO_AL, _SAHF = b"\x9f", b"\x0f\x90\xc0", b"\x9e"
_ADD_AL_7F = b"\x04\x7f"
_LEA_RSP = re.compile(rb"\x48\x8d(?:\x64\x24(.)|\xa4\x24(....))\Z", re.DOTALL)
_STORE_RSP = re.compile(        # mov [rsp + displacement], r64: SDM table 2-3
    rb"[\x48\x4c]\x89(?:[\x04\x0c\x14\x1c\x24\x2c\x34\x3c]\x24|"
    rb"[\x44\x4c\x54\x5c\x64\x6c\x74\x7c]\x24(.)|"
    rb"[\x84\x8c\x94\x9c\xa4\xac\xb4\xbc]\x24(....))\Z", re.DOTALL)


class Undo(NamedTuple):
    """How a thread that stands inside a trampoline gets out of it."""
    vaddr: int              # of the instruction that it runs instead
    depth: int = 0          # bytes by which rsp is lower than there
    saved: tuple = ()       # ((register, depth where its value lies), ...)
    flags: int = FLAGS_IN_PLACE     # or in ax, or the depth where ax lies
    is_asking: bool = False     # it waits for an answer, or has it


def ways_back(trampoline, text, site):
    """What undoes a trampoline at each instruction. -> {vaddr: Undo}

    trampoline  Trampoline: its vaddr, its code to the end, its copies
    text        what the window held before it was patched
    {} if the code is not made of bodies and of copies of that text.
    """
    vaddr, code, copies = trampoline
    found, start = {}, 0
    try:
        for copy in copies:
            home, end = site + copy.offset, copy.moved + copy.moved_size
            insn = decode(text[copy.offset:], home)
            at = end - len(relocate(insn, vaddr))
            _undo_body(code, vaddr, (start, at), home, found)
            _undo_copy(code[:end], vaddr, at, insn, found)
            start = end
    except (DecodeError, RelocationError):
        return {}
    return found


def _undo_copy(code, vaddr, at, insn, found):
    """A call's copy pushes before it jumps; a loop's is two jumps more."""
    home, depth = insn.vaddr, 0
    if insn.flow == LOOP:
        short, end = len(code) - 7, len(code) - 5       # eb 05; e9 rel32
        found[vaddr + short] = Undo(home + insn.size)
        found[vaddr + end] = Undo(insn.target)
    while insn.flow in (CALL, CALL_IND) and depth < 8:
        push = decode(code[at:], vaddr + at)
        at, depth = at + push.size, depth + 8
        found[vaddr + at] = Undo(home, depth)


def _undo_body(code, vaddr, region, home, found):
    """Follow the ways from the start of a region to its end."""
    (start, end), seen, ways, taken = region, {}, {}, []
    pending = [(start, Undo(home))]
    while pending:
        at, undo = pending.pop()
        if not 0 <= at < len(code):
            raise DecodeError("a way leads out of the trampoline", vaddr + at)
        if at in seen:
            if seen[at] != undo:
                raise DecodeError("two ways leave two stacks", vaddr + at)
            continue
        seen[at], ways[at] = undo, []
        if at == end:
            continue
        insn = decode(code[at:], vaddr + at)
        after = _undo_after(undo, insn, code[:at])
        if insn.flow in (JMP, JCC):
            ways[at].append(insn.target - vaddr)
        if insn.flow in (NEXT, JCC, SYSCALL):
            ways[at].append(at + insn.size)
        elif insn.flow == RET and not (undo.depth or undo.saved
                                       or undo.flags):
            taken.append(at)
        elif insn.flow != JMP:
            raise DecodeError("%s is of no body" % insn.code.hex(),
                              insn.vaddr)
        if _takes_answer(undo, insn):
            taken.append(at)
        pending += [(way, after) for way in ways[at]]
    half = _half_answered(ways, taken)
    found.update((vaddr + at, undo._replace(is_asking=bool(taken)))
                 for at, undo in seen.items() if at not in half)


def _takes_answer(undo, insn):
    """Does it store to where a register, or the flags, of the program lie?
    """
    stored = _STORE_RSP.match(insn.code)
    if not stored:
        return False
    at = int.from_bytes(stored.group(1) or stored.group(2) or b"", "little",
                        signed=True)
    return undo.depth - at in {depth for _, depth in undo.saved} | {
        undo.flags}


def _half_answered(ways, taken):
    """Where some of an answer is taken, and the rest still to come.

    ways    {at: where it leads};   taken   where a part of it is taken: a
            register, or the return from the function
    """
    back = {}
    for at, goals in ways.items():
        for goal in goals:
            back.setdefault(goal, []).append(at)
    behind = _reached(ways, [way for at in taken for way in ways[at]])
    ahead = _reached(back, taken)
    return behind & ahead | {at for at in taken if not ways[at]}


def _reached(ways, pending):
    """The places that ways lead to from some, those too. -> set"""
    found = set()
    while pending:
        at = pending.pop()
        if at not in found:
            found.add(at)
            pending = pending + list(ways.get(at, ()))
    return found


def _undo_after(undo, insn, before):
    """The Undo behind an instruction."""
    _, depth, saved, flags, _ = undo
    opcode, code = insn.form.opcode, insn.code
    reg = opcode & 7 | insn.form.rex << 3 & 8
    moved = _LEA_RSP.match(code)
    if 0x50 <= opcode < 0x58:                               # push
        depth += 8
        if reg == RAX and flags == FLAGS_IN_AX:
            flags = depth
        elif reg not in dict(saved):
            saved += ((reg, depth),)
    elif opcode in (0x68, 0x6a):                            # push imm
        depth += 8
    elif 0x58 <= opcode < 0x60:                             # pop
        if flags == depth:
            flags = FLAGS_IN_AX if reg == RAX else depth
        depth -= 8
    elif moved:
        depth -= int.from_bytes(moved.group(1) or moved.group(2), "little",
                                signed=True)
    elif code == add_rsp_128():
        depth -= 128
    elif code == _SETO_AL and before.endswith(_LAHF):
        flags = FLAGS_IN_AX
    elif code == _ADD_AL_7F and flags == FLAGS_IN_AX:
        flags = FLAGS_IN_AH
    elif code == _SAHF and flags == FLAGS_IN_AH:
        flags = FLAGS_IN_PLACE
    elif effects(insn).writes >> RSP & 1:
        depth = -1
    if depth < 0 or flags > depth:
        raise DecodeError("%s leaves no stack" % code.hex(), insn.vaddr)
    return Undo(undo.vaddr, depth, tuple(
        each for each in saved if each[1] <= depth), flags)


CACHE_LINE = 64


def line_start(vaddr, size):
    """Where a trampoline of size bytes may start, at or behind vaddr."""
    into_line = vaddr % CACHE_LINE
    if into_line and into_line + size > CACHE_LINE:
        return vaddr - into_line + CACHE_LINE
    return vaddr


def window_patches(window, trampoline_vaddr):
    """What must be written to arm a window. -> ((vaddr, bytes), …)

    In the order of arming: the slot, which nothing executes yet, precedes
    the two-byte jump that leads to it. Removal is the reverse.
    """
    if window.is_trap:
        return ((window.site, BREAKPOINT),)
    if not window.slot:
        return ((window.site, jmp_rel32(window.site, trampoline_vaddr)),)
    return ((window.slot, jmp_rel32(window.slot, trampoline_vaddr)),
            (window.site, jmp_rel8(window.site, window.slot)))


def is_jump(code):
    """Does code begin with the jump that arms a site?"""
    return code[:1] in (b"\xe9", b"\xeb")


def jump_target(code, vaddr):
    """Where the jump at the start of code leads. -> vaddr, or None"""
    if code[:1] == b"\xeb" and len(code) >= 2:
        return vaddr + 2 + struct.unpack_from("<b", code, 1)[0]
    if code[:1] == b"\xe9" and len(code) >= 5:
        return vaddr + 5 + _S32.unpack_from(code, 1)[0]
    return None


def reach(low, high):
    """Where an arena may lie that code in [low, high) can jump to and from.

    -> (lowest, highest) vaddr of any byte of the arena. Jumps and operands
    reach +-2 GiB; a MiB is kept for what displaced instructions add.
    """
    span = (1 << 31) - (1 << 20)
    return max(0, high - span), low + span


# ---- 10  Register images --------------------------------------------------
#
# To ubp.py a regset is opaque bytes; here are its meaning and the signal
# frame that restores it. The one idea: a thread that runs an injected
# syscall finds, when it returns, a frame that makes the kernel put every
# register back (rt_sigreturn), so it survives the death of its tracer at
# any instant. Sources: <sys/user.h>, <asm/sigcontext.h>, <asm/ucontext.h>,
# arch/x86/kernel/fpu/signal.c; the measured order is in the README.
#
#     frame +0    pretcode: the restorer           8 bytes    Q
#           +8    uc_flags, uc_link                2 x 8      QQ
#           +24   uc_stack: sp, flags, size        8, 4, 8    QI4xQ
#           +48   sigcontext: r8 to eflags         18 x 8     18Q
#           +192  cs, gs, fs, ss                   4 x 2      H4xH
#           +200  err, trapno, oldmask, cr2        4 x 8      32x
#           +232  fpstate: its vaddr, behind       8          Q
#           +240  reserved                         8 x 8      64x
#           +304  uc_sigmask                       8          8s
#
#     fpstate, 64-byte aligned: what XSAVE writes, and in it
#           +464  magic1, size with magic2         4, 4       II
#           +472  features, size without           8, 4       QI
#           +484  reserved                         28         28x
#           end   magic2                           4          I

_REGS = struct.Struct("<27Q")    # struct user_regs_struct
(_R15, _R14, _R13, _R12, _RBP, _RBX, _R11, _R10, _R9, _R8, _RAX, _RCX, _RDX,
 _RSI, _RDI, _ORIG_RAX, _PC, _CS, _EFLAGS, _RSP, _SS, _FS_BASE,
 _GS_BASE) = range(23)
REGS_SIZE = _REGS.size
_SIGCONTEXT_ORDER = (_R8, _R9, _R10, _R11, _R12, _R13, _R14, _R15, _RDI,
                     _RSI, _RBP, _RBX, _RDX, _RAX, _RCX, _RSP, _PC, _EFLAGS)
_DWARF_ORDER = (_RAX, _RDX, _RCX, _RBX, _RSI, _RDI, _RBP, _RSP, _R8, _R9,
                _R10, _R11, _R12, _R13, _R14, _R15, _PC)
SIGNAL_CONTEXT = 40              # from a frame's +8, where the restorer finds
SIGNAL_CONTEXT_SIZE = 18 * 8     # it on top of the stack: what is read of it
SIGNAL_CONTEXT_RIP = 16 * 8      # where in it rip is
_FRAME_SETUP = re.compile(       # push rbp; mov rbp,rsp. Or: mov [rsp+N],rbp;
    rb"\x55\x48(?:\x89\xe5|\x8b\xec)"              # lea rbp,[rsp+N]
    rb"|\x48\x89(?:\x6c\x24(.)\x48\x8d\x6c\x24\1"
    rb"|\xac\x24(....)\x48\x8d\xac\x24\2)", re.S)
_N_SETUP = 48        # instructions of a function that may come before it
_N_EPILOGUE = 32     # instructions that may come between the pop and the end
_SYSCALL_ARGS = (_RDI, _RSI, _RDX, _R10, _R8, _R9)
_U64_MAX = (1 << 64) - 1
_RED_ZONE = 128
_FRAME = struct.Struct("<QQQQI4xQ18QH4xH32xQ64x8s")
_SOFTWARE_BYTES, _MAGIC2 = struct.Struct("<IIQI28x"), struct.Struct("<I")
_POP_RAX = struct.Struct("<QQ")         # a POP_RAX_RET, and what it pops
FRAME_HEAD = _FRAME.size + _POP_RAX.size    # bytes that is_injected looks at
_SOFTWARE_AT, _FXSAVE_SIZE = 464, 512   # SDM 13.4.1: bytes that XSAVE leaves
_XSTATE_BV_AT, _XSAVE_HEADER = 512, 64  # SDM 13.4.2
_FPSTATE_ALIGN = 64
_SIGCONTEXT_RIP = 48 + 8 * 16    # from the frame's start: 0xb0
_SIGCONTEXT_RSP = 48 + 8 * 15
SIGNAL_MASK_PAST_RIP = 304 - _SIGCONTEXT_RIP    # from the saved rip
FP_XSTATE_MAGIC1, FP_XSTATE_MAGIC2 = 0x46505853, 0x46505845
_UC_FLAGS = 7                    # UC_FP_XSTATE, SIGCONTEXT_SS, STRICT_RESTORE
_SS_REJECTED = 0x7ffffff0        # sigaltstack(2) refuses it: nothing changes
_XFEATURE_TILE_DATA = 1 << 18    # AMX; SDM 13.1
# Where the tiles' data begin, behind their configuration (CPUID 0xd, leaf
# 18, EBX; 64 bytes at 2752): arch_prctl(2) ARCH_REQ_XCOMP_PERM allows the
# rest, and sigreturn takes no more from a thread that never asked.
_XSTATE_WITHOUT_TILES = 2816
_USER_CS_32 = 0x23               # <asm/segment.h>

NR_RT_SIGRETURN = 15
# Stands for the registers of a thread in 32-bit code: nothing to be moved.
REGS_32BIT = _REGS.pack(*[{_CS: _USER_CS_32, _ORIG_RAX: _U64_MAX}.get(n, 0)
                          for n in range(27)])
SYSCALL_RET = b"\x0f\x05\xc3"                       # syscall; ret
POP_RAX_RET = b"\x58\xc3"                           # pop %rax; ret
RESTORERS = (b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05",     # mov $15,%rax; syscall
             b"\xb8\x0f\0\0\0\x0f\x05")             # mov $15,%eax; syscall

# The kernel's restart codes, <linux/errno.h>; never seen by a program.
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = (
    512, 513, 514, 516)
_RESTARTS = tuple(-code & _U64_MAX for code in (512, 513, 514, 516))
_EINTR = -4 & _U64_MAX
# man 7 signal: these fail with EINTR after a mere stop, even where no
# handler ran. By number, <asm/unistd_64.h>.
_EINTR_ON_STOP = {
    232: "epoll_wait", 281: "epoll_pwait", 441: "epoll_pwait2",
    128: "rt_sigtimedwait", 65: "semop", 220: "semtimedop",
    208: "io_getevents", 333: "io_pgetevents", 426: "io_uring_enter",
    45: "recvfrom", 47: "recvmsg", 299: "recvmmsg", 44: "sendto",
    46: "sendmsg", 307: "sendmmsg", 43: "accept", 288: "accept4",
    0: "read", 1: "write", 19: "readv", 20: "writev"}
# Syscalls whose transfer an interrupt cuts short: number -> the arguments
# that hold buffer (None: the kernel keeps count) and length; None where the
# rest is not re-issued by changing two registers: most of those are waited
# for before the stop, not repaired after it.
_TRANSFERS = {1: (1, 2), 18: (1, 2), 44: (1, 2), 45: (1, 2), 318: (0, 1),
              40: (None, 3), 326: (None, 4), 20: None, 46: None, 47: None,
              275: None, 276: None, 278: None, 296: None, 307: None}
_MSG_PEEK, _MSG_WAITALL = 2, 0x100       # <linux/socket.h>
_NR_RECVFROM, _NR_RECVMSG, _NR_PWRITE64, _NR_WRITEV = 45, 47, 18, 20
_NR_CLONE, _NR_VFORK, _NR_CLONE3 = 56, 58, 435
_CLONE_VFORK = 0x4000                    # <sched.h>
# What moves one struct iovec of a vector: writev by write, sendmsg by
# sendto, recvmsg by recvfrom.
_VECTORED = {20: 1, 46: 44, 47: 45}
# A frame cannot resume these exactly: they hold a temporary signal mask or
# the rest of a time-out. Threads in them are the last choice.
_INEXACT = {34, 130, 270, 271, 23, 7, 35, 230, 202, 219}


PROGRAM_COUNTER_OFFSET = 8 * _PC     # in struct user, for PTRACE_POKEUSER
DEBUG_OFFSET = 848              # of DR0 there: u_debugreg, <sys/user.h>
DEBUG_STATUS, DEBUG_CONTROL = DEBUG_OFFSET + 8 * 6, DEBUG_OFFSET + 8 * 7
_DEBUG_KINDS = {"x": 0, "w": 1, "rw": 3}    # R/W0 to R/W3, SDM 17.2.4
_DEBUG_SIZES = {1: 0, 2: 1, 4: 3, 8: 2}     # LEN0 to LEN3


def debug_control(watches):
    """DR7 for up to four (vaddr, "x" or "w" or "rw", size). SDM 17.2.4"""
    control = 0
    for n, (_, kind, size) in enumerate(watches):
        field = _DEBUG_KINDS[kind] | (
            0 if kind == "x" else _DEBUG_SIZES[size] << 2)
        control |= 1 << 2 * n | field << 16 + 4 * n
    return control


def program_counter(regs):
    """rip of a regset."""
    return _U64.unpack_from(regs, 8 * _PC)[0]


def stack_pointer(regs):
    """rsp of a regset."""
    return _U64.unpack_from(regs, 8 * _RSP)[0]


def thread_pointer(regs):
    """The fs base of a regset: the thread's control block."""
    return _U64.unpack_from(regs, 8 * _FS_BASE)[0]


def is_32bit(regs):
    """Does the thread run 32-bit code at the moment?"""
    return _U64.unpack_from(regs, 8 * _CS)[0] & 0xffff == _USER_CS_32


# What perf_event_open(2) is asked for, PERF_SAMPLE_REGS_USER, and the order
# in which it comes: <asm/perf_regs.h>, without ds to gs.
PERF_REGS = 0xff0fff
_PERF_ORDER = (_RAX, _RBX, _RCX, _RDX, _RSI, _RDI, _RBP, _RSP, _PC, _EFLAGS,
               _CS, _SS, _R8, _R9, _R10, _R11, _R12, _R13, _R14, _R15)
_PERF_IMAGE = struct.Struct("<%dQ" % len(_PERF_ORDER))
PERF_REGS_SIZE = _PERF_IMAGE.size


def regs_of_sample(data):
    """The regset that the registers of a perf sample make; fs base: 0."""
    values = dict(zip(_PERF_ORDER, _PERF_IMAGE.unpack(data)))
    values[_ORIG_RAX] = _U64_MAX
    return _REGS.pack(*[values.get(n, 0) for n in range(27)])


_NAMED = dict(zip(REGISTERS, (
    _RAX, _RCX, _RDX, _RBX, _RSP, _RBP, _RSI, _RDI,
    _R8, _R9, _R10, _R11, _R12, _R13, _R14, _R15)))
_NAMED.update(("arg%d" % n, index) for n, index in enumerate(
    (_RDI, _RSI, _RDX, _RCX, _R8, _R9)))        # psABI 3.2.3


def register_inputs(regs, names):
    """{name: value} of those names of an Expression that registers hold."""
    values = _REGS.unpack(regs)
    return {name: values[_NAMED[name]] for name in names if name in _NAMED}


def stack_inputs(regs, names):
    """{name: vaddr} of those names that are on the stack at an entry.

    The return address is at rsp; arg6 and on lie above it, psABI 3.2.3.
    """
    top = stack_pointer(regs)
    return {name: top if name == "caller" else top + 8 * int(name[3:]) - 40
            for name in names if name == "caller"
            or name.startswith("arg") and int(name[3:]) > 5}


def _general(regs):
    """The 16 general registers of a regset, in their numbers' order."""
    values = _REGS.unpack(regs)
    return [values[_NAMED[name]] for name in REGISTERS]


def operand_vaddr(insn, regs):
    """Where the memory operand of a modrm is, by a regset. SDM 2A 2.1.5"""
    form, general = insn.form, _general(regs)
    at = form.disp_offset
    vaddr = int.from_bytes(insn.code[at:at + form.disp_size], "little",
                           signed=True)
    mod, low = form.modrm >> 6, form.modrm & 7
    if insn.rip_relative is not None:
        vaddr = insn.rip_relative
    elif low == 4:
        index = form.sib >> 3 & 7 | form.rex << 2 & 8
        if mod or form.sib & 7 != 5:
            vaddr += general[form.sib & 7 | form.rex << 3 & 8]
        vaddr += general[index] << (form.sib >> 6) if index != 4 else 0
    else:
        vaddr += general[low | form.rex << 3 & 8]
    return vaddr & (0xffffffff if form.prefixes & A32 else _U64_MAX)


def stored_value(insn, regs):
    """What a mov to memory wrote. -> (vaddr, bytes), or None for others

    regs   behind it: a mov changes none. Source: SDM 2B, MOV; 2A 2.1.5.
    """
    form, kind = insn.form, insn.form.opcode
    if (kind not in (0x88, 0x89, 0xc6, 0xc7) or form.modrm < 0
            or form.modrm >> 6 == 3 or form.prefixes & ~O16
            or kind > 0x89 and form.modrm >> 3 & 7):
        return None
    size = (1 if not kind & 1 else 8 if form.rex & 8 else
            2 if form.prefixes & O16 else 4)
    general, vaddr = _general(regs), operand_vaddr(insn, regs)
    number = form.modrm >> 3 & 7 | form.rex << 1 & 8
    if kind > 0x89:
        at = form.imm_offset
        value = int.from_bytes(insn.code[at:at + form.imm_size], "little",
                               signed=True)
    elif size == 1 and 4 <= number < 8 and (
            not form.opcode_offset
            or insn.code[form.opcode_offset - 1] & 0xf0 != 0x40):   # no REX
        value = general[number - 4] >> 8        # ah, ch, dh, bh
    else:
        value = general[number]
    return vaddr, (value & (1 << 8 * size) - 1).to_bytes(size, "little")


# -- What the tracer does for a thread that an int3 has stopped.

def emulate(insn, regs, read):
    """Do what a call does whose operand its own push would move.

    read(vaddr, size) -> bytes of the thread's memory; raises OSError
    -> (regset behind it, vaddr of the return address, its bytes): the
    operand is read first, then the push is made. Source: SDM 2A, CALL.
    """
    form, values = insn.form, _REGS.unpack(regs)
    if form.modrm >> 6 == 3:
        target = _general(regs)[form.modrm & 7 | form.rex << 3 & 8]
    else:
        target = int.from_bytes(read(operand_vaddr(insn, regs), 8), "little")
    top = values[_RSP] - 8 & _U64_MAX
    return (_replaced(regs, {_RSP: top, _PC: target}), top,
            _U64.pack(insn.vaddr + insn.size & _U64_MAX))


def home_of(insn, copy_vaddr, copy_size, regs):
    """Where a thread is that was stopped by a fault or trap in a copy.

    insn   the original;  copy_vaddr, copy_size   of what it was moved to
    -> the regset as it would be if the original had run, or None if it is
    somewhere else. The push of a moved call is undone.
    """
    at, changes = program_counter(regs) - copy_vaddr, {}
    if insn.flow == TRAP and at == len(insn.code):      # behind its int3
        return _replaced(regs, {_PC: insn.vaddr + at})
    if not 0 <= at < copy_size:
        return None
    if insn.flow in (CALL, CALL_IND) and at and not needs_emulation(insn):
        changes[_RSP] = stack_pointer(regs) + 8
    changes[_PC] = insn.vaddr
    return _replaced(regs, changes)


def _replaced(regs, changes):
    """A regset with {index: value} put in."""
    image = bytearray(regs)
    for index, value in changes.items():
        _U64.pack_into(image, 8 * index, value & _U64_MAX)
    return bytes(image)


def with_program_counter(regs, vaddr):
    """The regset with another rip; behind a syscall rcx is rip too."""
    values = _REGS.unpack(regs)
    if is_in_syscall(regs) and values[_RCX] == values[_PC]:
        return _replaced(regs, {_PC: vaddr, _RCX: vaddr})
    return _replaced(regs, {_PC: vaddr})


def at_entry(regs, vaddr):
    """The regset of a thread that starts at vaddr, in no syscall."""
    return _replaced(regs, {_PC: vaddr, _ORIG_RAX: -1})


_OVERFLOW = 0x800


def undone(regs, undo, read):
    """The regset of a thread in a trampoline, as an Undo says.

    read(vaddr, size) -> bytes. Raises what that raises.
    """
    values = _REGS.unpack(regs)
    rsp = values[_RSP] + undo.depth
    changes = {_PC: undo.vaddr, _RSP: rsp, _ORIG_RAX: -1}
    for reg, depth in undo.saved:
        changes[_NAMED[REGISTERS[reg]]], = _U64.unpack(read(rsp - depth, 8))
    if undo.flags != FLAGS_IN_PLACE:
        ax, here = values[_RAX], values[_EFLAGS]
        if undo.flags > 0:
            ax, = _U64.unpack(read(rsp - undo.flags, 8))
        flags = here & ~ALL_FLAGS | ax >> 8 & ALL_FLAGS & 0xff
        changes[_EFLAGS] = flags | (
            here & _OVERFLOW if undo.flags == FLAGS_IN_AH
            else _OVERFLOW * (ax & 1))
    return _replaced(regs, changes)


def undone_context(context, undo, read):
    """The same for the sigcontext of a signal frame, SIGNAL_CONTEXT_SIZE
    bytes. -> as many"""
    values = dict(zip(_SIGCONTEXT_ORDER,
                      struct.unpack("<%dQ" % len(_SIGCONTEXT_ORDER), context)))
    regs = _REGS.unpack(undone(_REGS.pack(
        *[values.get(n, 0) for n in range(27)]), undo, read))
    return struct.pack("<%dQ" % len(_SIGCONTEXT_ORDER),
                       *[regs[n] for n in _SIGCONTEXT_ORDER])


# The syscalls by which a program says what is to become of its signals, and
# what sets their numbers; <asm/unistd_64.h>, SDM 2B. In front of one that
# may have any number an argument is moved, behind it its result is looked
# at: what is such an instruction is decided where its function is known.
RT_SIGACTION, RT_SIGPROCMASK, ANY_SYSCALL = 13, 14, -1
_SYSCALL_CODE = re.compile(rb"\x0f\x05")
_SETS_NUMBER = re.compile(
    rb"(?:\xb8|\x48\xc7\xc0)(..)\0\0|"    # mov eax, imm32; mov rax, imm32
    rb"\x6a(.)\x58|"                       # push imm8; pop rax
    rb"[\x31\x33]\xc0", re.DOTALL)         # xor eax, eax
_ASK_INSNS, _ASK_BYTES = 10, 60         # at most, from there to the syscall
_MOVES_ARGUMENT = re.compile(             # mov, movsxd, xor, lea, SDM 2B
    rb"[\x40-\x4f]?[\x31\x33\x63\x89\x8b\x8d]")
_USES_RESULT = re.compile(
    rb"[\x3d\x41\x50-\x5f\x72\x73\x83\x85\x89\x8b\x90\xc3\xc9\xe9\xeb\xf7]|"
    rb"[\x48\x4c][\x01-\x3f\x63\x81-\x8d\x98\xc7\xf7]|"
    rb"\x0f[\x1f\x80-\x8f]|\x66\x90")


def signal_syscalls(code, vaddr, takes_any=False):
    """The syscall instructions in code at vaddr whose number is set in front
    of them, to one of these. -> [(vaddr, number)]

    takes_any   also what may be one with a number from elsewhere:
                (vaddr, ANY_SYSCALL)
    """
    found = []
    for match in _SYSCALL_CODE.finditer(code):
        at, number = match.start(), None
        for setter in _SETS_NUMBER.finditer(code, max(0, at - _ASK_BYTES),
                                            at):
            data = setter.group(1) or setter.group(2) or b"\0"
            this = int.from_bytes(data, "little")
            if (this in (RT_SIGACTION, RT_SIGPROCMASK) or takes_any
                    ) and _leads_to(code, setter.start(), at):
                number = this
        if (number is None and takes_any
                and _USES_RESULT.match(code, at + 2) and any(
                    _MOVES_ARGUMENT.match(code, start)
                    and _leads_to(code, start, at, 1)
                    for start in range(max(0, at - 8), at - 1))):
            number = ANY_SYSCALL
        if number in (RT_SIGACTION, RT_SIGPROCMASK, ANY_SYSCALL):
            found.append((vaddr + at, number))
    return found


def _leads_to(code, start, end, most=_ASK_INSNS):
    """Do instructions lead straight from one place in code to another?"""
    for _ in range(most):
        try:
            insn = decode(code[start:start + 15], start)
        except DecodeError:
            return False
        start += insn.size
        if insn.flow != NEXT or start >= end:
            return start == end
    return False


def syscall_number(analysis, vaddr):
    """The number that a syscall instruction has by what is in front of it
    in its function, ANY_SYSCALL if that does not tell; None if no
    instruction begins there. A guess: branches are not followed."""
    wanted, place = RAX, analysis.place(vaddr)
    if place < 0:
        return None
    while place > 0:
        place -= 1
        insn = analysis.insn(place)
        form = insn.form
        if not effects(insn).writes >> wanted & 1:
            continue
        rm = form.modrm & 7 | form.rex << 3 & 8
        reg = form.modrm >> 3 & 7 | form.rex << 1 & 8
        if form.opcode & ~7 == 0xb8 or form.opcode == 0xc7:     # mov imm32
            return int.from_bytes(insn.code[form.imm_offset:][:4], "little")
        if form.opcode in (0x31, 0x33):                         # xor
            return 0
        if form.opcode not in (0x89, 0x8b) or form.modrm < 0xc0:
            break
        wanted = reg if form.opcode == 0x89 else rm             # mov
    return ANY_SYSCALL


def asked(regs):
    """(number, its first three arguments) of a thread that is at a syscall
    instruction. psABI A.2.1"""
    values = _REGS.unpack(regs)
    return values[_RAX], (values[_RDI], values[_RSI], values[_RDX])


# Syscalls with a mask of their own, in which a signal's handler begins with
# that: rt_sigsuspend, pselect6, ppoll, epoll_pwait, io_pgetevents and
# epoll_pwait2; <asm/unistd_64.h>.
_MASKING_CALLS = frozenset((130, 270, 271, 281, 333, 441))


def has_own_mask(regs):
    """Has a signal interrupted a syscall that had a mask of its own?"""
    return _U64.unpack_from(regs, 8 * _ORIG_RAX)[0] in _MASKING_CALLS


def is_in_syscall(regs):
    """Was the thread stopped on its way out of a syscall?"""
    return _U64.unpack_from(regs, 8 * _ORIG_RAX)[0] < 1 << 63


def will_restart(regs):
    """Will the kernel go back two bytes to run the syscall again?"""
    return (is_in_syscall(regs)
            and _U64.unpack_from(regs, 8 * _RAX)[0] in _RESTARTS)


def injection_rank(regs):
    """How well a thread suits an injection; the lowest is the best."""
    if not is_in_syscall(regs):
        return 0
    if not will_restart(regs):
        return 1
    number = _U64.unpack_from(regs, 8 * _ORIG_RAX)[0]
    restart = -_U64.unpack_from(regs, 8 * _RAX)[0] & _U64_MAX
    return 2 + (restart == ERESTARTSYS) + 2 * (
        number in _INEXACT or restart == ERESTART_RESTARTBLOCK)


def without_spurious_eintr(regs, read):
    """The regset that cures an EINTR which the program must not see.

    read(vaddr, size) -> bytes of the thread's memory
    Returns None where there is nothing to cure. The kernel then decides:
    EINTR if a handler runs, a restart otherwise (arch/x86/kernel/signal.c).
    """
    values = _REGS.unpack(regs)
    if (values[_RAX] != _EINTR or values[_ORIG_RAX] not in _EINTR_ON_STOP
            or read(values[_PC] - 2, 2) != SYSCALL_RET[:2]):
        return None
    return _replaced(regs, {_RAX: -ERESTARTNOHAND})


def is_transfer(number, args):
    """Would an interrupt cut this syscall short? args: its six arguments."""
    if number in (_NR_RECVFROM, _NR_RECVMSG):
        flags = args[3] if number == _NR_RECVFROM else args[2]
        return flags & (_MSG_WAITALL | _MSG_PEEK) == _MSG_WAITALL
    return number in _TRANSFERS


def reissued_transfer(before, rest, gadget, frame_parts):
    """A re-issue that completes by itself if its tracer dies meanwhile.

    before       the regset at the stop; rax is what has been done so far
    rest         from rest_of_transfer
    frame_parts  what signal_frame takes behind its regset
    -> (vaddr of the frame, its bytes, regset to run). The frame takes it
    that the rest is done in full, as it is unless a signal or the other end
    stops it; a tracer that lives puts the true count in its place.
    """
    values = _REGS.unpack(rest)
    number, args = values[_RAX], [values[i] for i in _SYSCALL_ARGS]
    done, = _U64.unpack_from(before, 8 * _RAX)
    total = done + args[_TRANSFERS[number][1]]
    vaddr, image = signal_frame(_replaced(
        before, {_RAX: total, _ORIG_RAX: -1}), *frame_parts)
    return vaddr, image, syscall_regs(rest, gadget, vaddr, number, args)


def is_clone(number):
    """Does this syscall make a process or a thread, perhaps by vfork?"""
    return number in (_NR_CLONE, _NR_VFORK, _NR_CLONE3)


def is_vfork(number, args, read):
    """Does its caller wait until its child has execed, or has ended?

    args              its six arguments
    read(vaddr, size) -> bytes of the thread's memory, or b""
    """
    flags = args[0]                 # man 2 clone
    if number == _NR_CLONE3:
        flags = int.from_bytes(read(flags, 8), "little")
    return number == _NR_VFORK or bool(
        is_clone(number) and flags & _CLONE_VFORK)


def regs_in_syscall(number, rsp, rip):
    """The regset of a thread that sleeps in a syscall, of which no more is
    known."""
    known = {_ORIG_RAX: number, _RSP: rsp, _PC: rip}
    return _REGS.pack(*[known.get(n, 0) for n in range(27)])


def rest_of_transfer(regs, read):
    """The regset that re-issues the next part of an interrupted transfer.

    regs   at the exit of the syscall; rax is what has been done so far
    read(vaddr, size) -> bytes of the thread's memory
    Returns None where nothing was cut short.
    """
    values = _REGS.unpack(regs)
    number, done = values[_ORIG_RAX], values[_RAX]
    args = [values[index] for index in _SYSCALL_ARGS]
    if (number not in _TRANSFERS or not 0 < done < 1 << 47
            or not is_transfer(number, args)
            or read(values[_PC] - 2, 2) != SYSCALL_RET[:2]):
        return None
    changes = _rest_arguments(number, args, done, read)
    if changes is None:
        return None
    changes.setdefault(_RAX, number)
    changes.update({_ORIG_RAX: -1, _PC: values[_PC] - 2})
    return _replaced(regs, changes)


def _rest_arguments(number, args, done, read):
    """Registers that make a syscall do what done bytes left undone."""
    if number in _VECTORED:
        return _rest_of_vector(number, args, done, read)
    places = _TRANSFERS[number]
    if places is None or done >= args[places[1]]:
        return None
    changes = {_SYSCALL_ARGS[places[1]]: args[places[1]] - done}
    if places[0] is not None:
        changes[_SYSCALL_ARGS[places[0]]] = args[places[0]] + done
    if number == _NR_PWRITE64:
        changes[_R10] = args[3] + done
    return changes


def _rest_of_vector(number, args, done, read):
    """As _rest_arguments: the rest of the struct iovec that done ends in."""
    vector, count = args[1], args[2]
    if number != _NR_WRITEV:                # struct msghdr, recvmsg(2)
        vector, count = struct.unpack("<QQ", read(args[1] + 16, 16))
    pairs = struct.iter_unpack("<QQ", read(vector, 16 * min(count, 1024)))
    for base, size in pairs:
        if done < size:
            changes = {_RAX: _VECTORED[number], _RSI: base + done,
                       _RDX: size - done}
            if number != _NR_WRITEV:
                changes.update({_R10: args[2], _R8: 0, _R9: 0})
            return changes
        done -= size
    return None


def finished_transfer(before, after):
    """The regset of a transfer whose rest was re-issued.

    before   the regset at the stop that cut it short, rax: bytes done
    after    the regset at the exit of the re-issued part
    """
    result = max(0, syscall_result(after))
    done, = _U64.unpack_from(before, 8 * _RAX)
    return _replaced(before, {_RAX: done + result})


def has_ended(regs):
    """Did the re-issued rest of a transfer end it, by an error or nothing?"""
    result = syscall_result(regs)
    return result <= 0 and -result not in (
        4, ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND,
        ERESTART_RESTARTBLOCK)


def syscall_result(regs):
    """The signed result of a finished syscall."""
    value = _U64.unpack_from(regs, 8 * _RAX)[0]
    return value - (1 << 64) if value >> 63 else value


def syscall_regs(regs, gadget, frame, number, args):
    """The regset that runs one syscall at gadget with its frame below.

    gadget   vaddr of SYSCALL_RET;  frame   vaddr of a signal_frame
    """
    changes = {_PC: gadget, _RSP: frame, _RAX: number, _ORIG_RAX: -1}
    changes.update(zip(_SYSCALL_ARGS, tuple(args) + (0,) * (6 - len(args))))
    return _replaced(regs, changes)


def frame_size(xstate):
    """Bytes that a signal frame takes, its alignment included."""
    return (_FRAME.size + 16 + len(xstate) + _FPSTATE_ALIGN
            + _MAGIC2.size + _POP_RAX.size)


def own_stack_top(regs):
    """The highest vaddr that a frame on the thread's own stack may touch."""
    return stack_pointer(regs) - _RED_ZONE


def usable_xstate(xstate):
    """The part of an NT_X86_XSTATE image that rt_sigreturn will accept.

    None if the thread's AMX tiles are in use: their image is longer than
    an ordinary frame. Source: arch/x86/kernel/fpu/signal.c,
    check_xstate_in_sigframe; XCR0 is in the software bytes at 464.
    """
    if len(xstate) < _FXSAVE_SIZE + _XSAVE_HEADER:
        return xstate[:_FXSAVE_SIZE]
    features = _U64.unpack_from(xstate, _SOFTWARE_AT)[0]
    in_use = _U64.unpack_from(xstate, _XSTATE_BV_AT)[0]
    if in_use & _XFEATURE_TILE_DATA:
        return None
    if features & _XFEATURE_TILE_DATA:
        return xstate[:_XSTATE_WITHOUT_TILES]
    return xstate


def signal_frame(regs, xstate, sigmask, restorer, top, pop_rax=0):
    """A frame whose rt_sigreturn restores a thread. -> (vaddr, bytes)

    regs      the regset to restore; a syscall that was to be restarted is
              re-issued by the frame itself, since sigreturn cancels restarts
    xstate    from usable_xstate;   sigmask   8 bytes, PTRACE_GETSIGMASK
    restorer  vaddr of one of RESTORERS; or, with the vaddr of a
              POP_RAX_RET too, of SYSCALL_RET: together they are one
    top       the highest vaddr that may be written, exclusive
    """
    image = _frame_image(xstate)
    fpstate = (top - len(image)) & -_FPSTATE_ALIGN
    vaddr = ((fpstate - _FRAME.size) & -16) - 8
    values = list(_REGS.unpack(regs))
    if will_restart(regs):
        values[_PC] -= 2
        values[_RAX] = values[_ORIG_RAX]
    frame = _FRAME.pack(
        restorer,
        _UC_FLAGS, 0,
        0, _SS_REJECTED, 0,
        *([values[i] for i in _SIGCONTEXT_ORDER] + [
            values[_CS] & 0xffff, values[_SS] & 0xffff,
            fpstate,
            sigmask]))
    frame = frame.ljust(fpstate - vaddr, b"\0") + image
    if pop_rax:
        return (vaddr - _POP_RAX.size,
                _POP_RAX.pack(pop_rax, NR_RT_SIGRETURN) + frame)
    return vaddr, frame


def _frame_image(xstate):
    """An XSAVE image as a signal frame has it; an FXSAVE one has no size."""
    image = bytearray(xstate)
    if len(image) == _FXSAVE_SIZE:
        image[_SOFTWARE_AT:] = bytes(_SOFTWARE_BYTES.size)
        return bytes(image)
    features = _U64.unpack_from(image, _SOFTWARE_AT)[0]
    _SOFTWARE_BYTES.pack_into(
        image, _SOFTWARE_AT, FP_XSTATE_MAGIC1, len(image) + _MAGIC2.size,
        features & ~_XFEATURE_TILE_DATA, len(image))
    return bytes(image) + _MAGIC2.pack(FP_XSTATE_MAGIC2)


def may_run_a_syscall(regs, numbers):
    """May a thread be about to run one of these syscalls for syscall_regs?

    Cheap, for each thread of a pause; is_injected tells for sure.
    """
    return (_U64.unpack_from(regs, 8 * _ORIG_RAX)[0] == _U64_MAX
            and _U64.unpack_from(regs, 8 * _RAX)[0] in numbers)


def is_injected(code, memory):
    """Is a thread in front of the syscall that syscall_regs led it to?

    code   bytes at its rip;   memory   FRAME_HEAD bytes at its rsp
    """
    return (code.startswith(SYSCALL_RET) and len(memory) == FRAME_HEAD
            and _frame_words(memory)[1:6] == (_UC_FLAGS, 0, 0, _SS_REJECTED,
                                              0))


def _frame_words(memory):
    """The fields of a signal_frame, with or without what pops its rax."""
    has_pop = memory[8:_POP_RAX.size] == _U64.pack(NR_RT_SIGRETURN)
    return _FRAME.unpack_from(memory, has_pop * _POP_RAX.size)


def regs_before_injection(regs, memory):
    """What rt_sigreturn would put back where is_injected. -> (regset, mask)
    """
    words = _frame_words(memory)
    changes = dict(zip(_SIGCONTEXT_ORDER, words[6:24]))
    changes[_ORIG_RAX] = -1
    return _replaced(regs, changes), words[-1]


def frames_on_stack(memory, vaddr, restorers):
    """Signal frames in a piece of stack.

    memory      bytes read at vaddr;   restorers   8-byte words to look for
    -> [(vaddr of the saved rip, saved rip, saved rsp)]
    """
    found = []
    for word in restorers:
        at = memory.find(word)
        while at >= 0:
            if at + _SIGCONTEXT_RIP + 8 <= len(memory):
                rip, = _U64.unpack_from(memory, at + _SIGCONTEXT_RIP)
                rsp, = _U64.unpack_from(memory, at + _SIGCONTEXT_RSP)
                found.append((vaddr + at + _SIGCONTEXT_RIP, rip, rsp))
            at = memory.find(word, at + 1)
    return found


def dwarf_registers(regs):
    """{DWARF number: value} of a regset; 16 is rip. psABI, figure 3.36."""
    values = _REGS.unpack(regs)
    return {n: values[index] for n, index in enumerate(_DWARF_ORDER)}


def interrupted_registers(memory):
    """{DWARF number: value} of the thread that a signal interrupted.

    memory   what rsp points to when a restorer begins: the frame from +8 on
    """
    values = dict(zip(_SIGCONTEXT_ORDER, struct.unpack_from(
        "<18Q", memory, SIGNAL_CONTEXT)))
    return {n: values[index] for n, index in enumerate(_DWARF_ORDER)}


def ends_in_call(code):
    """Do these bytes, those before a return address, end in a call?"""
    for size in (5, 2, 3, 6, 7, 4, 8):
        try:
            insn = decode(code[-size:], 0)
        except DecodeError:
            continue
        if insn.size == size <= len(code) and insn.flow in (CALL, CALL_IND):
            return True
    return False


def return_place(code, offset, is_return):
    """Where the return address is in a function that no CFI describes.

    code       the function's first bytes, some behind offset included
    offset     of an instruction; is_return: of a return address
    -> "top" (of the stack), "frame" (behind what rbp points to), or "" if
    the function's own code does not prove either.
    """
    try:
        start = 4 if code.startswith(ENDBR64) else 0
        if not is_return and offset in (0, start):
            return "top"
        if not is_return and decode(code[offset:], 0).flow == RET:
            return "top"
        behind = _frame_pointer_setup(code, start)
        if not 0 < behind <= offset:
            return ""
        return "frame" if is_return or _is_frame_up(code, offset) else ""
    except DecodeError:
        return ""


def _frame_pointer_setup(code, at):
    """The offset behind what makes rbp the frame pointer, or 0.

    push rbp; mov rbp,rsp as compilers write it, or as Go did up to 1.20.
    """
    for _ in range(_N_SETUP):
        match = _FRAME_SETUP.match(code, at)
        if match:
            return match.end()
        insn = decode(code[at:], 0)
        if insn.flow not in (NEXT, JCC):
            return 0
        at += insn.size
    return 0


def _is_frame_up(code, offset):
    """Does rbp still point to the frame? Else it was popped just before.

    What a compiler puts behind the pop is a few instructions that end in a
    ret or a jump; so the frame is up if a pop, a call or a branch comes.
    """
    for _ in range(_N_EPILOGUE):
        insn = decode(code[offset:], 0)
        if insn.code in (b"\xc9", b"\x5d") or insn.flow in (CALL, CALL_IND,
                                                           JCC):
            return True
        if insn.flow != NEXT:
            return False
        offset += insn.size
    return True


def empty_function(vaddr, entry, leave, place):
    """The trampoline of a function that does nothing but return. -> bytes

    entry, leave   Specs of its entry and its exit;   place   of both
    To be called itself: what it measures is what measuring costs.
    """
    insns = tuple(decode_all(b"\x90\xc3", vaddr))      # nop; ret
    window = Window(vaddr, JUMP_SIZE, insns)
    return trampoline(window, vaddr, [
        (entry, place), (leave, place._replace(at=vaddr + 1))]).code


# A function that returns the time stamp counter: rdtsc; shl $32,%rdx;
# or %rdx,%rax; ret
READ_TSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"
# Functions (vaddr, value) and (vaddr, old, new), to be called themselves: the
# word of 64 bits that was exchanged, mov %rsi,%rax; xchg %rax,(%rdi); ret;
# the one of 32 bits that was compared, mov %esi,%eax; lock cmpxchg
# %edx,(%rdi); ret
EXCHANGE = b"\x48\x89\xf0\x48\x87\x07\xc3"
# And one (vaddr, n) that looks, n times at most, until a bit is set in the
# 32 bytes there:   1: mov (%rdi),%rax; or 8(%rdi),%rax; or 16(%rdi),%rax;
# or 24(%rdi),%rax; jne 2f; pause; dec %rsi; jne 1b;   2: ret
LOOK = (b"\x48\x8b\x07\x48\x0b\x47\x08\x48\x0b\x47\x10\x48\x0b\x47\x18"
        b"\x75\x07\xf3\x90\x48\xff\xce\x75\xe8\xc3")
assert N_CALLS == 8 * 32
COMPARE_EXCHANGE = b"\x89\xf0\xf0\x0f\xb1\x17\xc3"


def entry_stub(entry):
    """Code for a launched program: one harmless syscall, then its entry.

    The tracer stops it at that syscall, when the loader is done. Without a
    tracer it goes on to the entry by itself.   mov $39,%eax (getpid);
    syscall; jmp *[rip+0]
    """
    return (mov_r32_imm32(RAX, 39) + SYSCALL_RET[:2]
            + b"\xff\x25\0\0\0\0" + _U64.pack(entry))


# mov $35,%eax (nanosleep); lea 18(%rip),%rdi; xor %esi,%esi; syscall;
# jmp *[rip+0]: of a waiting_stub, behind what it writes.
_WAIT_AND_GO = (b"\xb8\x23\0\0\0\x48\x8d\x3d\x12\0\0\0\x31\xf6\x0f\x05"
                b"\xff\x25\0\0\0\0")
_WAIT_AT = 23


def waiting_stub(entry, word, seconds):
    """Code for a program that was just executed: wait, then enter it.

    entry    where it goes on;   seconds   that it waits, at most
    word     the vaddr that led here and is to hold entry again, or 0
    A tracer that comes in time ends the wait by at_entry(). Without one it
    ends by itself.   mov $entry,%rax; mov $word,%rcx; mov %rax,(%rcx)
    """
    return (b"\x48\xb8" + _U64.pack(entry) + b"\x48\xb9" + _U64.pack(word)
            + (b"\x48\x89\x01" if word else b"\x0f\x1f\x00")
            + _WAIT_AND_GO + struct.pack("<QQQ", entry, seconds, 0))


def waiting_stub_entry(code):
    """Where a waiting_stub leads to, or None if code is none."""
    at = _WAIT_AT + len(_WAIT_AND_GO)
    if code[_WAIT_AT:at] != _WAIT_AND_GO or len(code) < at + 8:
        return None
    return _U64.unpack_from(code, at)[0]


def waiting_stub_word(code):
    """The vaddr that a waiting_stub writes its entry to when it is reached;
    0 if what led there is no loader."""
    return _U64.unpack_from(code, 12)[0]


def has_begun_waiting(regs, vaddr):
    """Is a thread in the waiting_stub at vaddr, and done with its write?"""
    return _WAIT_AT <= program_counter(regs) - vaddr < 4096
