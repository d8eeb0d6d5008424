"""Windows: which bytes a jump may overwrite, and which rule forbids it.

The judges: tables of bytes, the labels that cc itself prints for a switch,
and every branch that objdump sees in whole libraries.
"""
import bisect
import collections
import glob
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import unittest

import ubp_x86 as x86
from quiet import quiet_seconds

BASE = 0x10000
GOAL = 0.999            # of the functions of five bytes or more

# A module in hex at 0x10000. `<` begins a function, `>` ends it (padding up
# to the next `<` is its own), `@` is the site, `!` an entry of the function,
# `?` one if a word of data is a pointer; `L` behind `<`: exceptions of all of
# it are caught; =N goes on at offset N, over int3s.
# Then the window, as site+size, number of displaced instructions and slot,
# all offsets in hex, or the rule that refuses it. \ joins two lines.
CASES = r"""
five bytes in one     | <@ b801000000 c3 >                   | 0+5 1
whole instructions    | <@ 55 4889e5 4157 c3 >               | 0+6 3
an offset as site     | < 55 @ 4889e5 4157 c3 >              | 1+5 2
jump back to the site | <@ 85c0 7405 ebfa 90 90 90 90 c3 >   | 0+6 3
not an instruction    | < 55 48 @ 89e5 4157 c3 >             | no instruction
endbr64 stays         | <@ f30f1efa 55 4889e5 53 c3 >        | 4+5 3
endbr64, then a ret   | <@ f30f1efa c3 > 90 90 90 90         | 4+5 1
loop behind endbr64   | <@ f30f1efa 4883ef01 85ff 75f8 c3 > \
                      | branch behind endbr64
unknown instruction   | <@ b801000000 06 c3 > \
                      | unknown instruction
66 jump, hazard 17    | <@ b801000000 66e900000000 c3 > \
                      | unknown instruction
cut off               | <@ b801000000 e900 > \
                      | unknown instruction

call as last          | <@ 55 e800000000 5d c3 >             | 0+6 2
call before the last  | <@ ffd0 4889e5 c3 >                  | call not last
call *mem not last    | <@ ff10 85c0 85d2 c3 >               | call not last
int3 reports itself   | <@ cc b801000000 c3 >                | trap
ud2 reports itself    | <@ 0f0b b801000000 c3 >              | trap

loop into the window  | <@ 55 ffc7 85ff 75fa c3 >            | 0+7 4
 ... from behind it   | <@ 55 ffc7 488d4001 85ff 75f6 c3 >   | 0+b 5
 ... and its neighbour | <@ 55 ffc7 488d4001 85ff 75f6 c3 > < ebf3 > \
                      | branch into window
 ... in the middle    | < 31d2 @ 55 ffc7 488d4001 85ff 75f6 c3 > | 2+b 5
 ... before the site  | < eb00 @ 55 4889e5 53 75fa c3 >      | 2+7 4
 ... from before      | < 7401 90 @ 55 4889e5 4157 c3 >      | 3+6 3
 ... into it          | < 7402 90 @ 55 90 4889e5 53 c3 >     | branch into window
 ... by loop          | <@ 55 ffc7 488d4001 e2f8 c3 >        | 0+9 4
 ... call within      | <@ 55 ffc7 e800000000 85ff 75f5 c3 > | branch into window
 ... call behind      | <@ 55 ffc7 85ff 75fa e800000000 c3 > | 0+7 4
 ... an entry behind  | <@ 55 ffc7 488d4001 ! 85ff 75f6 c3 > | branch into window
 ... and a table      | <@ 55 ffc7 488d4001 85ff 75f6 ffe0 > | 0+b 5
 ... into an insn     | <@ 55 b8ffc0ffc0 75fb c3 > 90        | branch into window
 ... two of them      | <@ 55 ffc7 85ff 75fa 85f6 75f8 c3 >  | 0+b 6
 ... the other first  | <@ 55 ffc7 4883c001 85ff 75f6 85f6 75f4 c3 > | 0+f 7
 ... too long         | <@ 55 ffc7 9090 =cc 85ff 0f842dffffff c3 > | branch into window
 ... forward within   | <@ 85c0 7401 90 ffc0 c3 >            | 0+5 3
behind it is fine     | <@ 4883ec08 85ff 85ff 75fc c3 >      | 0+6 2
from a neighbour      | <@ 55 4889e5 53 c3 >    < ebf9 > \
                      | branch into window
from .cold, hazard 17 | <@ 55 4889e5 53 c3 >=40 < 85c0 74bd e9b8ffffff > \
                      | branch into window
.cold, jcc rel32      | <@ 55 4889e5 53 c3 >=40 < 0f84bbffffff c3 > \
                      | branch into window
.cold, call           | <@ 55 4889e5 53 c3 >=40 < e8bcffffff c3 > \
                      | branch into window
.cold, xbegin         | <@ 55 4889e5 53 c3 >=40 < c7f8bbffffff c3 > \
                      | branch into window
nobody's bytes        | <@ 55 4889e5 53 c3 >=40  e9bcffffff  | 0+5 3
 ... fallen into      | <@ 55 4889e5 53 > e9f7ffffff         | branch into window
 ... behind nops      | <@ 55 4889e5 53 > 9090 e9f5ffffff    | branch into window
 ... branched to      | <@ 55 4889e5 53 c3 > 06 e9f5ffffff < ebf9 > \
                      | branch into window
 ... called           | <@ 55 4889e5 53 c3 > 06 e9f5ffffff < e8f6ffffff c3 > \
                      | branch into window
 ... beside that      | <@ 55 4889e5 53 c3 > 06 e9f5ffffff < ebf8 > | 0+5 3
 ... a way leads on   | <@ 55 4889e5 53 c3 > 90 e9f5ffffff < ebf8 > \
                      | branch into window
 ... and round        | <@ 55 4889e5 53 c3 > eb02 06 e9f3ffffff 74f9 06 < ebfb > \
                      | branch into window
 ... pointed to       | <@ 55 4889e5 53 c3 > 06 ! e9f5ffffff | branch into window
 ... by a word        | <@ 55 4889e5 53 c3 > 06 ? e9f5ffffff | branch into window
 ... address taken    | <@ 55 4889e5 53 c3 > 06 e9f5ffffff < 488d05f4ffffff c3 > \
                      | branch into window
 ... of a table       | <@ 55 4889e5 53 c3 > 06 e9f5ffffff < 488d05f3ffffff c3 > \
                      | 0+5 3
 ... and jumps        | <@ 55 4889e5 53 c3 > 06 e9f5ffffff \
                        < 488d05f3ffffff 01c0 ffe0 >         | branch into window
 ... it jumps itself  | <@ 55 4889e5 53 ffe0 > 06 e9f4ffffff | branch into window
 ... unknown neighbour | <@ 55 4889e5 53 c3 > 06 e9f5ffffff \
                        < 488d05f3ffffff 06 >                | branch into window
within an immediate   | <@ 55 4889e5 53 c3 >=40 < b8e9bbffff ff c3 > | 0+5 3
                      ; refuted? the bytes e9 bb ff ff ff at 41 lead to 1
in a function unknown | <@ 55 4889e5 53 c3 >=40 < b8e9bbffff ff06 06 > \
                      | branch into window
into a lock prefix    | <@ 7401 f00fb10f c3 > 90 \
                      | branch into window
site after lock       | < 7401 @ f00fb10f 85c0 c3 > 90 \
                      | branch into window
a symbol inside       | <@ 55 ! 4889e5 53 c3 >               | entry in window
a symbol at its end   | <@ 55 4889e5 53 ! c3 >               | 0+5 3

crosses a page        | =ffd <@ 55 4889e5 53 c3 >            | crosses a page
up to the border      | =ffb <@ 55 4889e5 53 c3 >            | ffb+5 3
tail beyond it        | =ff9 <@ 55 48b80000000000000000 c3 > | ff9+b 2

ret and padding       | <@ c3 > 90 90 90 90                  | 0+5 1
long nop as padding   | <@ 31c0 c3 > 66900f1f00              | 0+5 2
int3 as padding       | <@ 31c0 c3 > cccc                    | 0+5 2
too little padding    | <@ 31c0 c3 > 90 < c3 >               | too short
padding is entered    | <@ 31c0 c3 > 9090 < ebfd c3 > \
                      | branch into window
falls into the nops   | <@ 31c0 31d2 > 0f1f00 < c3 >         | 0+7 3
falls into int3       | <@ 31c0 31d2 > cc < c3 >             | too short
other bytes behind    | <@ 31c0 c3 > 0000 < c3 >             | too short

ladder: own padding   | <@ 31c0 ! 85c0 75fc c3 > 9090909090    | 0+2 1 7
ladder: one before    | < c3 > 9090909090 <@ 31c0 c3 > <c3>  | 6+2 1 1
ladder: one after     | <@ 31c0 c3 > < c3 > 9090909090       | 0+2 1 4
ladder: page border   | =ffd <@ 31c0 c3 > < c3 > 90909090909090 | too short
ladder: not fallen in | <@ 31c0 c3 > < 85c0 > 9090909090 < c3 > | too short
ladder: one byte      | <@ 50 ! 85c0 75fc c3 > 9090909090 \
                      | entry in window
ladder: slot entered  | <@ 31c0 c3 > < c3 > 9090909090 < ebfc > | too short
ladder: far           | <@ 31c0 c3 > < c3 >=83 < c3 > 9090909090 <c3> | 0+2 1 7e
ladder: 127 on        | <@ 31c0 c3 > < 0f0b >=80 <c3> 9090909090 <c3> \
                      | 0+2 1 81
ladder: 128 on        | <@ 31c0 c3 > < 0f0b >=81 <c3> 9090909090 <c3> \
                      | too short

ladder: fallen into   | <@ 31c0 c3 > < c3 > 909090909090909090 < ebf5 > | too short
ladder: before it     | <@ 31c0 c3 > < c3 > 909090909090909090 < ebfa > \
                      | 0+2 1 4
dead nops inside      | <@ 31c0 ! 85c0 75fc eb05 9090909090 c3 > | 0+2 1 8
dead long nop, int3   | <@ 31c0 ! 85c0 75fc eb05 660f1f00 cc c3 > | 0+2 1 8
dead behind a ret     | <@ 31c0 ! 85c0 75fc c3 9090909090 c3 > | 0+2 1 7
too few dead nops     | <@ 31c0 ! 85c0 75fc eb04 90909090 c3 > \
                      | entry in window
nops fallen into      | <@ 31c0 ! 85c0 75fc 9090909090 c3 >    | entry in window
nops branched to      | <@ 31c0 ! 85c0 75fc 7402 eb05 9090909090 c3 > \
                      | entry in window
nops entered          | <@ 31c0 ! 85c0 75fc eb05 90 ! 90909090 c3 > \
                      | entry in window
nops, unknown jmp     | <@ 31c0 ! 85c0 75fc eb05 9090909090 01c0 ffe0 > \
                      | entry in window
nops of a neighbour   | <@ 31c0 c3 > < eb05 9090909090 c3 >  | 0+2 1 5
a word means nothing  | <@ 55 b8 ? 06000000 53 c3 >          | 0+6 2
a word means a branch | <@ 55 b8 ? eb020606 53 c3 >          | entry in window
 ... that goes nowhere | <@ 55 4889e5 53 b8 ? 74020606 c3 >  | 0+5 3
 ... that others take | <@ 55 b8 ! eb020606 53 c3 >          | entry in window
 ... that runs on     | <@ 55 b8 ! 74020606 53 c3 >          | unknown instruction
a word may mean code  | <@ 55 b8 ? 90909090 53 c3 >          | entry in window
a word at an insn     | <@ 55 ? 4889e5 53 c3 >               | entry in window
a symbol means it     | <@ 55 b8 ! 06000000 53 c3 >          | unknown instruction

reads its own bytes   | < 8b0502000000 eb05 @ 9090909090 c3 > | unreachable
reads what it runs    | < 8b05 00000000 @ b801000000 c3 >    | data
reads before the site | < 8b05 00000000 90 @ b801000000 c3 > | data
a neighbour reads it  | <@ b801000000 c3 > < 8b05f5ffffff c3 > | data
 ... its first byte   | <@ b801000000 c3 > < 8b05f4ffffff c3 > | data
 ... by a store       | <@ b801000000 c3 > < 8905f4ffffff c3 > | data
 ... and a constant   | <@ b801000000 c3 > < 803df3ffffff00 c3 > | data
 ... before it        | <@ b801000000 c3 > < 803debffffff00 c3 > | 0+5 1
 ... up to it         | < c3 > cccccccccccccc <@ b801000000 c3 > \
                        < 8b05ecffffff c3 >                  | 8+5 1
 ... 64 bytes         | < c3 >=38 <@ b801000000 c3 > \
                        < 62f1fe486f05b8ffffff c3 >           | data
 ... beyond it        | < c3 > cccccccccccccc <@ b801000000 c3 > \
                        < 8b05f0ffffff c3 >                  | data
 ... or may           | <@ b801000000 c3 > < 8b05f4ffffff 06 > \
                      | entry in window
 ... within a number  | <@ b801000000 c3 > < b88b05f3ff ff05 ffffffff c3 > \
                      | 0+5 1
 ... within another's | <@ b801000000 c3 > < 48b80005f2ffffff0000 c3 > | 0+5 1
a pointer to it       | <@ b801000000 c3 > < 488d05f3ffffff c3 > | 0+5 1
 ... into it          | <@ b801000000 c3 > < 488d05f4ffffff c3 > \
                      | entry in window
 ... behind it        | <@ b801000000 c3 > < 488d05f8ffffff c3 > | 0+5 1
slot that is read     | <@ 31c0 c3 > < c3 > 9090909090 < 8b05f5ffffff c3 > \
                      | too short
table behind a ret    | < 488d0501000000 c3 @ b801000000 c3 > | unreachable
 ... or code, a jump  | < 488d0502000000 ffe0 @ b801000000 c3 > | unreachable
 ... of a neighbour   | < c3 @ b801000000 c3 > < 488d05f3ffffff c3 > \
                      | unreachable
a label behind nops   | < c3 9090 @ b801000000 c3 > < ebf8 >  | 3+5 1
 ... before the nops  | < c3 9090 @ b801000000 c3 > < ebf6 >  | 3+5 1
 ... and the nops     | < c3 @ 9090 b801000000 c3 > < ebf8 >  | unreachable
 ... behind int3      | < c3 cccc ! @ b801000000 c3 >         | 3+5 1
 ... not behind data  | < c3 31c0 ! @ b801000000 c3 >         | unreachable
its own address       | <@ 488d0502000000 53 4157 c3 >       | 0+7 1
an address within     | < 488d0502000000 @ 53 4889e5 4157 c3 > | entry in window
nobody comes          | < eb05 @ 9090909090 c3 >             | unreachable
behind a ret          | < c3 @ b801000000 c3 >               | unreachable
a jcc comes           | < 7401 c3 @ b801000000 c3 >          | 3+5 1
an entry comes        | < c3 ! @ b801000000 c3 >             | 1+5 1
a neighbour comes     | < c3 @ b801000000 c3 > < ebf8 >      | 1+5 1

unknown jmp, entry    | <@ 55 4889e5 53 ffe0 >               | 0+5 3
unknown jmp, later    | < 55 @ 4889e5 4157 4801f8 ffe0 > \
                      | unresolved jump table
tail call, argument   | < 55 @ 4889e5 4157 ffe0 >            | 1+5 2
 ... of a vtable      | < 55 @ 4889e5 4157 488b07 ff6010 > | 1+5 2
 ... and a register   | < 55 @ 4889e5 4157 488b07 488b4010 ffe0 > | 1+5 2
 ... of the GOT       | < 55 @ 4889e5 4157 488b0500100000 ffe0 > | 1+5 2
 ... of a TLS word    | < 55 @ 4889e5 4157 64488b042510000000 ffe0 > | 1+5 2
 ... call's result    | < 55 @ 4889e5 4157 ff5708 ffe0 > | 1+5 2
 ... kept by a call   | < 55 @ 4889e5 4157 488b1f ff5708 ffe3 > | 1+5 2
 ... of two           | < 55 @ 4889e5 4157 488b07 480f444608 ffe0 > | 1+5 2
 ... behind a branch  | < 55 @ 4889e5 4157 488b07 7404 488b4608 ffe0 > | 1+5 2
 ... in a loop        | < 55 @ 4889e5 4157 488b07 4c8b0f ffce 75f6 ffe0 > \
                      | 1+5 2
 ... padding before   | < 55 @ 4889e5 4157 488b07 eb02 6690 ffe0 > | 1+5 2
 ... behind epilogue  | < 55 @ 4889e5 4157 488b4708 4883c408 415f 5d ffe0 > \
                      | 1+5 2
 ... tagged pointer   | < 55 @ 4889e5 4157 4883e7fe 488b07 ffe0 > | 1+5 2
 ... lost by a call   | < 55 @ 4889e5 4157 488b0f ff5708 ffe1 > \
                      | unresolved jump table
 ... one way added    | < 55 @ 4889e5 4157 488b07 7403 4801f0 ffe0 > \
                      | unresolved jump table
 ... added in a loop  | < 55 @ 4889e5 4157 488b07 4801f8 75fb ffe0 > \
                      | unresolved jump table
 ... spilled          | < 55 @ 4889e5 4157 488b442408 ffe0 > \
                      | unresolved jump table
 ... spilled, rbp     | < 55 @ 4889e5 4157 488b45f8 ffe0 > \
                      | unresolved jump table
 ... spilled, lea     | < 55 @ 4889e5 4157 488d542408 488b02 ffe0 > \
                      | unresolved jump table
 ... popped           | < 55 @ 4889e5 4157 58 ffe0 > \
                      | unresolved jump table
 ... jump of spilled  | < 55 @ 4889e5 4157 ff642408 > \
                      | unresolved jump table
 ... of 32 bits       | < 55 @ 4889e5 4157 8b07 ffe0 > \
                      | unresolved jump table
 ... of 16 bits       | < 55 @ 4889e5 4157 668b07 ffe0 > \
                      | unresolved jump table
 ... al, a constant   | < 55 @ 4889e5 4157 488b07 b001 ffe0 > \
                      | unresolved jump table
 ... ah               | < 55 @ 4889e5 4157 488b07 b401 ffe0 > \
                      | unresolved jump table
 ... al, setcc        | < 55 @ 4889e5 4157 488b07 0f94c0 ffe0 > \
                      | unresolved jump table
 ... ah, add          | < 55 @ 4889e5 4157 488b07 00cc ffe0 > \
                      | unresolved jump table
 ... lahf             | < 55 @ 4889e5 4157 488b07 9f ffe0 > \
                      | unresolved jump table
 ... fnstsw           | < 55 @ 4889e5 4157 488b07 dfe0 ffe0 > \
                      | unresolved jump table
 ... movd             | < 55 @ 4889e5 4157 488b07 660f7ec0 ffe0 > \
                      | unresolved jump table
 ... pextrd           | < 55 @ 4889e5 4157 488b07 660f3a16c000 ffe0 > \
                      | unresolved jump table
 ... cmpxchg          | < 55 @ 4889e5 4157 488b07 480fb10e ffe0 > \
                      | unresolved jump table
 ... syscall          | < 55 @ 4889e5 4157 488b07 0f05 ffe0 > \
                      | unresolved jump table
 ... loop             | < 55 @ 4889e5 4157 488b0f e2fe ffe1 > \
                      | unresolved jump table
 ... inc              | < 55 @ 4889e5 4157 488b07 48ffc0 ffe0 > \
                      | unresolved jump table
 ... with an index    | < 55 @ 4889e5 4157 488b04d7 ffe0 > \
                      | unresolved jump table
 ... jump with index  | < 55 @ 4889e5 4157 ff24d7 > \
                      | unresolved jump table
 ... an entry later   | < 55 @ 4889e5 4157 488b07 ! ffe0 > \
                      | unresolved jump table
 ... movabs           | < 55 @ 4889e5 4157 48b80700010000000000 488907 ff27 > \
                      | unresolved jump table
 ... a label, kept    | < 55 @ 4889e5 4157 488d0500000000 488907 ff27 > \
                      | unresolved jump table
 ... its own address  | < 55 @ 4889e5 4157 488d05f3ffffff 488907 ff27 > \
                      | unresolved jump table
differences, kept     | < 55 @ 4889e5 4157 488d1533000000 4863048a 4801d0 \
                        488907 ff27 > =40 c4ffffff =50             | 1+3 1 3b
 ... not into it      | < 55 @ 4889e5 4157 488d1533000000 4863048a 4801d0 \
                        488907 ff27 > =40 c6ffffff =50             | 1+5 2
a part goes on        | < 55 @ 4889e5 4157 6690 488b07 ffe0 > \
                        < 4801f8 74f4 c3 >                   | 1+5 2
 ... with a label     | < 55 @ 4889e5 4157 6690 488b07 ffe0 > \
                        < 488d05f4ffffff 74f0 c3 > \
                      | unresolved jump table
 ... with a table     | < 55 @ 4889e5 4157 6690 488b07 ffe0 > \
                        < 488d052c000000 74f0 c3 > =40 c4ffffff =50 | 1+3 1 3b
one instruction       | < 55 @ b801000000 ffe0 >             | 1+5 1
slot to the GOT       | < 55 @ 4889e5 4157 ff2500000000 >    | 1+5 2

memory under an LSDA  | <L@ 488b07 85c0 c3 >                 | may fault
rsp under an LSDA     | <L@ 488b4424 08 c3 >                 | 0+5 1
lea under an LSDA     | <L@ 488d4708 4889c2 c3 >             | 0+7 2
div under an LSDA     | <L@ 4889f8 f7f1 c3 >                 | may fault
GOT under an LSDA     | <L@ 488b0502000000 c3 > cccc =40 c3  | 0+7 1
unmapped, LSDA        | <L@ 488b0502000000 c3 > cccc         | may fault
store, LSDA           | <L@ 48890502000000 c3 > cccc =40 c3  | may fault
canary under an LSDA  | <L@ 64488b042528000000 c3 >          | 0+9 1
errno under an LSDA   | <L@ 64488b042510000000 c3 >          | may fault
load, then room       | <L@ 488b07 4889c2 4839d0 c3 >        | 3+6 2
two loads, then room  | <L@ 488b07 488b0f 4889c2 4839d0 c3 > | 6+6 2
store, then room      | <L@ 893e 4889c2 4839d0 c3 >          | 2+6 2
pop is no load        | <L@ 8f07 4889c2 4839d0 c3 >          | may fault
to behind the load    | <L@ 488b07 4889c2 4839d0 75f8 c3 >   | may fault
endbr64, load, room   | <L@ f30f1efa 488b07 4889c2 4839d0 c3 > | 7+6 2
kept before a page    | =ffe <@ 31c0 4889e5 53 90 c3 >       | 1000+5 3
behind a push, too    | =ffe <@ 4150 4889e5 53 90 c3 >       | 1000+5 3
behind sub rsp        | =ffc <@ 4883ec08 4889e5 53 90 c3 >   | 1000+5 3
not behind a pop      | =ffe <@ 4158 4889e5 53 90 c3 >       | crosses a page
not behind a jump     | =ffe <@ 7401 4889e5 53 90 c3 >       | crosses a page
load, then tail jmp   | <L@ 488b07 4889d7 ffe0 >             | 3+5 2
rseq section          | <@ 55 4889e5 53 c3 0fb93d53300553 c3 > | rseq section
rseq is registered    | <@ 55 4889e5 53 41ba53300553 c3 >    | 0+5 3
"""




class Module:
    """The bytes of a case, the functions in them, and the site."""

    def __init__(self, text, shift=0):
        self.code, self.site, functions = bytearray(), None, []
        tokens = re.findall(r"=[0-9a-f]+|[0-9a-f]{2}|[<>@!?L]", text)
        for token in tokens:
            here = BASE + shift + len(self.code)
            if token == "<":
                functions.append([here, None, (), (), ()])
            elif token == ">":
                functions[-1][1] = here - functions[-1][0]
            elif token == "L":
                functions[-1][3] = ((0, 1 << 64),)
            elif token == "@":
                self.site = here
            elif token in "!?":
                functions[-1][2 if token == "!" else 4] += (here,)
            elif token[0] == "=":
                self.code += b"\xcc" * (int(token[1:], 16) - len(self.code))
            else:
                self.code.append(int(token, 16))
        self.vaddr, self.code = BASE + shift, bytes(self.code)
        self.functions = [
            x86.Function(vaddr, size, self.read(vaddr, (
                functions[place + 1][0] if place + 1 < len(functions)
                else self.vaddr + len(self.code)) - vaddr), entries, guarded,
                words)
            for place, (vaddr, size, entries, guarded, words)
            in enumerate(functions)]
    def read(self, vaddr, size):
        if vaddr < self.vaddr:
            return None
        return self.code[vaddr - self.vaddr:][:size] or None

    def function_at(self, vaddr):
        for function in self.functions:
            if 0 <= vaddr - function.vaddr < len(function.code):
                return function
        return None

    def scan(self):
        return x86.BranchScan([(self.vaddr, self.code)], self.function_at,
                              self.read)

    def plan(self, **limits):
        return x86.plan_window(self.function_at(self.site), self.site,
                               self.scan(), **limits)


def shown(window):
    text = "%x+%x %d" % (window.site - BASE, window.size, len(window.insns))
    return text + (" %x" % (window.slot - BASE) if window.slot else "")


def plan_text(module, **limits):
    try:
        return shown(module.plan(**limits))
    except x86.RefusalError as refusal:
        return refusal.rule


class RulesTest(unittest.TestCase):

    def test_each_case_has_its_window_or_its_rule(self):
        for line in CASES.replace("\\\n", " ").splitlines():
            line = line.split(";")[0].strip()
            if not line:
                continue
            name, code, expected = [part.strip() for part in line.split("|")]
            with self.subTest(name):
                self.assertEqual(plan_text(Module(code)), expected)

    def test_a_refusal_names_the_bytes_and_their_vaddr(self):
        with self.assertRaises(x86.RefusalError) as caught:
            Module("<@ ffd0 4889e5 c3 >").plan()
        self.assertIn("ffd0 at 0x10000", str(caught.exception))
        self.assertEqual(caught.exception.vaddr, BASE)

    def test_bytes_of_another_patch_are_not_taken(self):
        module = Module("< 55 4889e5 @ 53 31c0 31d2 c3 >")
        for low, high, expected in (
                (0, 5, "overlaps a patch"), (7, 8, "overlaps a patch"),
                (4, 5, "overlaps a patch"), (0, 4, "4+5 3"),
                (9, 14, "4+5 3")):
            taken = x86.ByteRanges([(BASE + low, BASE + high)])
            self.assertEqual(plan_text(module, taken=taken), expected)

    def test_two_sites_do_not_share_a_slot(self):
        first = Module("<@ 31c0 c3 > < 31c0 c3 > < c3 > 9090909090 90909090")
        second = Module("< 31c0 c3 > <@ 31c0 c3 > < c3 > 9090909090 90909090")
        taken = x86.ByteRanges()
        window = first.plan(taken=taken)
        self.assertEqual(shown(window), "0+2 1 b")
        for low, high in window.ranges:
            taken.add(low, high)
        self.assertEqual(plan_text(second, taken=taken), "too short")

    def test_forbidden_ranges_refuse_with_their_reason(self):
        module = Module("<@ 55 4889e5 53 c3 >")
        forbidden = [(BASE + 4, BASE + 9, "cancellation point")]
        self.assertEqual(plan_text(module, forbidden=forbidden),
                         "cancellation point")
        forbidden = [(BASE + 5, BASE + 9, "cancellation point")]
        self.assertEqual(plan_text(module, forbidden=forbidden), "0+5 3")

    def test_a_syscall_is_displaced_only_without_a_filter(self):
        module = Module("<@ 31c0 0f05 85c0 c3 >")
        self.assertEqual(plan_text(module), "0+6 3")
        self.assertEqual(plan_text(module, seccomp=True),
                         "syscall under seccomp")

    def test_where_nothing_is_relocated_a_constant_may_be_an_address(self):
        for code, expected in (
                ("<@ b801000000 c3 > < b801000100 c3 >", "entry in window"),
                ("<@ b801000000 c3 > < b800000100 c3 >", "0+5 1"),
                ("<@ b801000000 c3 > < 8b042500000100 c3 >",
                 "entry in window"),
                ("<@ b801000000 c3 > < 8d042500000100 c3 >", "0+5 1"),
                ("<@ b801000000 c3 > < 8b042501000100 c3 >",
                 "entry in window"),
                ("<@ b801000000 c3 > < 8b04c501000100 c3 >",
                 "entry in window"),
                ("<@ 55 4889e5 53 c3 > 06 e9f5ffffff < b807000100 c3 >",
                 "branch into window")):
            module = Module(code)
            scan = x86.BranchScan([(module.vaddr, module.code)],
                                  module.function_at, module.read, True)
            with self.subTest(code):
                try:
                    window = shown(x86.plan_window(
                        module.function_at(module.site), module.site, scan))
                except x86.RefusalError as refusal:
                    window = refusal.rule
                self.assertEqual(window, expected)

    def test_loads_stay_where_a_handler_may_look(self):
        module = Module("<@ 488b07 85c0 c3 >")
        self.assertEqual(plan_text(module), "0+5 2")
        self.assertEqual(plan_text(module, catches=3), "may fault")

    def test_a_loop_to_the_site_is_told(self):
        self.assertTrue(Module("<@ 4883ef01 85ff 75f8 c3 >").plan().is_loop)
        module = Module("<@ 4883ec08 85ff 85ff 75fc c3 >")
        self.assertFalse(module.plan().is_loop)
        self.assertFalse(Module("<@ 4883ef01 e8f7ffffff c3 >").plan().is_loop)

    def test_without_function_at_every_candidate_counts(self):
        module = Module("<@ 55 4889e5 53 c3 >=40 < b8e9bbffff ff c3 >")
        scan = x86.BranchScan([(module.vaddr, module.code)])
        with self.assertRaises(x86.RefusalError) as caught:
            x86.plan_window(module.functions[0], module.site, scan)
        self.assertEqual(caught.exception.rule, "branch into window")

    def test_an_rseq_descriptor_forbids_its_section_only(self):
        # lea [rip+rseq_cs]; the section; signature; abort; struct rseq_cs
        code = ("< 488d0d39000000 @ 31c0 31d2 85c0 > =20 0fb93d53300553"
                " < c3 > =40")
        module = Module(code)
        for start, size, expected in ((7, 6, "rseq section"),
                                      (0xb, 2, "7+2 1 3b"),
                                      (0xd, 2, "7+6 3")):
            module.code = module.code[:0x40] + struct.pack(
                "<IIQQQ", 0, 0, BASE + start, size, BASE + 0x27)
            self.assertEqual(plan_text(module), expected)


def brute_force(segments):
    """Yield (source, target) of the rel32 branches at each offset."""
    for vaddr, code in segments:
        for at in range(len(code) - 4):
            if code[at] in (0xe8, 0xe9):
                size = 1
            elif code[at:at + 2] == b"\xc7\xf8" or (
                    code[at] == 0x0f and code[at + 1] & 0xf0 == 0x80):
                size = 2
            else:
                continue
            end = at + size + 4
            if end <= len(code):
                yield vaddr + at, vaddr + end + int.from_bytes(
                    code[end - 4:end], "little", signed=True)


class BranchScanTest(unittest.TestCase):

    def test_table_and_stream_find_the_same(self):
        code = b""
        for place in range(3000):           # no two alike, over four blocks
            code += struct.pack("<Q", place * 0x9e3779b97f4a7c15 % 2**64)
            code += (b"\xe8", b"\xe9", b"\x0f\x8f", b"\xc7\xf8")[place % 4]
            code += struct.pack("<i", (place * 7919) % 200000 - 100000)
            code += b"\xcc" * 70
        segments = [(0x400000, code), (0x600000, code[:1000])]
        every = sorted(brute_force(segments), key=lambda pair: pair[1])
        table = x86.BranchScan(segments)
        table._table, table._operands = table._build()
        n_found = 0
        for low, size in ((0, 4), (0x8000, 0x400), (0xfff0, 0x20),
                          (0x20000, 0x1000), (len(code) - 9, 99)):
            low, high = 0x400000 + low, 0x400000 + low + size
            judged = sorted(pair for pair in every if low <= pair[1] < high)
            fresh = x86.BranchScan(segments)
            self.assertEqual(sorted(fresh.far(low, high)), judged)
            self.assertEqual(sorted(table.far(low, high)), judged)
            n_found += len(judged)
        self.assertGreater(n_found, 20)

    def test_into_finds_every_form_at_every_distance(self):
        target = 0x500000
        for code, size in ((b"\xe8", 4), (b"\xe9", 4), (b"\x0f\x80", 4),
                           (b"\x0f\x8f", 4), (b"\xc7\xf8", 4), (b"\xeb", 1),
                           (b"\x70", 1), (b"\x7f", 1), (b"\xe0", 1),
                           (b"\xe3", 1)):
            for distance in (-128, -127, -4, 0, 4, 126, 127) + (
                    (-0x12345, 0x23456, 0x700000, -0x400000)
                    if size == 4 else ()):
                end = target - distance
                start = end - size - len(code)
                text = code + distance.to_bytes(size, "little", signed=True)
                segments = [(start, text), (0x10000000, b"\x90")]
                self.assertEqual(
                    x86.BranchScan(segments).into(target, target + 1),
                    [(start, target)], (text.hex(), distance))

    def test_ranges_merge_and_answer(self):
        ranges = x86.ByteRanges([(10, 15), (20, 25), (0, 5)])
        self.assertEqual(list(ranges), [(0, 5), (10, 15), (20, 25)])
        self.assertIsNone(ranges.overlap(5, 10))
        self.assertEqual(ranges.overlap(4, 6), (0, 5))
        self.assertEqual(ranges.overlap(24, 99), (20, 25))
        ranges.add(14, 21)
        self.assertEqual(list(ranges), [(0, 5), (10, 25)])


# -- Liveness: code | dead registers among the sixteen | flags dead.

LIVENESS = """
everything at a ret  | c3                                |         | no
add kills flags      | 4801c8 c3                         |         | yes
cmp then jcc         | 39c8 7400 c3                      |         | yes
jcc reads flags      | 7400 39c8 c3                      |         | no
inc keeps CF         | ffc0 c3                           |         | no
mov kills its target | b801000000 c3                     | 0       | no
32 bits kill 64      | 89c8 c3                           | 0       | no
8 bits do not        | 88c8 c3                           |         | no
16 bits do not       | 6689c8 c3                         |         | no
xor is no read       | 31c0 c3                           | 0       | yes
read before written  | 4889c1 b801000000 c3              | 1       | no
both ways kill       | 85c0 7408 31c9 ba00000000 c3 31c9 c3 | 1    | yes
one way reads        | 85c0 7403 31c9 c3 89c8 c3         |         | yes
a call reads all     | e800000000 31c0 c3                |         | no
cmov may not write   | 0f44c1 c3                         |         | no
push reads           | 50 31c0 c3                        |         | yes
a loop               | 31c9 ffc1 81f900010000 75f6 31d2 c3 | 1 2     | yes
rsp never            | 4889ec c3                         |         | no
jmp out              | 31c0 e900010000                   | 0       | yes
jmp reg reads all    | ffe0                              |         | no
"""


class LivenessTest(unittest.TestCase):

    def test_table(self):
        for line in filter(None, LIVENESS.splitlines()):
            name, code, dead, flags = [p.strip() for p in line.split("|")]
            code = bytes.fromhex(code.replace(" ", ""))
            analysis = x86.analyse(x86.Function(BASE, len(code), code))
            with self.subTest(name):
                mask, flags_dead = x86.liveness(analysis, BASE)
                self.assertEqual(
                    [reg for reg in range(16) if mask >> reg & 1],
                    [int(reg) for reg in dead.split()])
                self.assertEqual(flags_dead, flags == "yes")

    def test_work_is_bounded(self):
        code = b"\x85\xc0\x0f\x84\x00\x00\x00\x00" * 20000 + b"\xc3"
        analysis = x86.analyse(x86.Function(BASE, len(code), code))
        start = time.process_time()
        for _ in range(50):
            x86.liveness(analysis, BASE)
        self.assertLess(time.process_time() - start, 1)


# -- Syscalls that tell what is to become of signals.

# The last syscall of a function | found, with its number by what is right in
# front of it, else by the whole function, if any may be wanted
TELLS = r"""
mov eax, 14            | b80e000000 4c89c2 0f05 c3                   | 14 14
mov rax, 13            | 48c7c00d000000 0f05 c3                      | 13 13
push 14, pop rax       | 6a0e58 4889f7 0f05 c3                       | 14 -1
another number         | b8ca000000 4889f7 0f05 c3                   | -  202
none, by xor           | 31c0 4889f7 0f05 c3                         | -  0
mov eax, 14, too far   | b80e000000 4889d2 4889d2 4889d2 4889d2 \
                         4889d2 4889d2 4889d2 4889d2 4889d2 4889d2 0f05 c3 | -1 14
its own argument       | 4889f8 4889f7 0f05 c3                       | -1 -1
out of memory          | 8b4708 4889f7 0f05 c3                       | -1 -1
by way of a register   | bdca000000 4889f7 89e8 4889f7 0f05 c3       | -1 202
no use of its result   | 4889f8 4889f7 0f05 06                       | -  -
no argument moved      | 4889f8 90 0f05 c3                           | -  -1
in a displacement      | 8d87 0f050000 c3                            | -  -
"""


class TellingSyscalls(unittest.TestCase):

    def test_table(self):
        for line in filter(None, TELLS.replace("\\\n", "").splitlines()):
            name, code, wanted = [part.strip() for part in line.split("|")]
            plain, whole = wanted.split()
            code = bytes.fromhex(code.replace(" ", ""))
            at = code.rfind(b"\x0f\x05")
            with self.subTest(name):
                found = [] if plain == "-" else [(BASE + at, int(plain))]
                self.assertEqual(found, x86.signal_syscalls(code, BASE, True))
                self.assertEqual([each for each in found if each[1] > 0],
                                 x86.signal_syscalls(code, BASE))
                if name != "no use of its result":
                    self.assertEqual(
                        None if whole == "-" else int(whole),
                        x86.syscall_number(x86.analyse(x86.Function(
                            BASE, len(code), code)), BASE + at))

    def test_numbers_are_what_objdump_tells_of_libc(self):
        """mov of 13 or 14 to eax, and the next syscall without a branch."""
        path = next(iter(glob.glob("/lib/x86_64-linux-gnu/libc.so.6")
                         + glob.glob("/lib64/libc.so.6")), None)
        if not path or not shutil.which("objdump"):
            self.skipTest("no libc.so.6, or no objdump: install binutils")
        wanted, number = set(), None
        for line in subprocess.check_output(
                ["objdump", "-d", "--no-show-raw-insn", path],
                universal_newlines=True).splitlines():
            match = re.match(r" *([0-9a-f]+):\t(\S+) *(\S*)", line)
            if match is None:
                number = None
                continue
            vaddr, name, operands = match.groups()
            loads = re.match(r"\$0x([0-9a-f]+),%[er]ax$", operands)
            if name == "mov" and loads:
                number = int(loads.group(1), 16), int(vaddr, 16)
            elif name == "syscall" and number:
                if number[0] in (13, 14) and int(vaddr, 16) - number[1] < 30:
                    wanted.add((int(vaddr, 16), number[0]))
                number = None
            elif name[0] == "j" or name in ("call", "ret", "syscall"):
                number = None
        self.assertGreater(len(wanted), 3)
        with open(path, "rb") as f:
            code = f.read()
        text = subprocess.check_output(
            ["objdump", "-h", "-j", ".text", path], universal_newlines=True)
        size, vaddr, _, offset = [int(word, 16) for word in re.search(
            r"\.text +(\S+) +(\S+) +(\S+) +(\S+)", text).groups()]
        self.assertEqual(wanted, set(x86.signal_syscalls(
            code[offset:offset + size], vaddr)))


# -- Jump tables: the labels in cc's assembly are the judge.

SWITCHES = """
extern int g(int);
int dense(int x, int y)
{
    switch (x) {
    case 0: return g(y + 3);
    case 1: return g(1) * y;
    case 2: return y ^ 77;
    case 3: g(5); return 3;
    case 4: return g(9) + g(y);
    case 5: return g(g(y));
    case 7: return -y;
    default: return 4;
    }
}
long two(unsigned char *p, long n)
{
    long sum = 0;
    for (; n; n--, p++)
        switch (*p) {
        case 10: sum += g(1); break;
        case 11: sum -= g(2); break;
        case 12: sum ^= g(3); break;
        case 13: sum *= g(4); break;
        case 14: sum |= g(5); break;
        case 15: sum &= g(6); /* fall through */
        case 16: sum += g(7); break;
        }
    switch (sum) {
    case 1: return g(8); case 2: return g(10) + 1; case 3: return g(11) + 2;
    case 4: return g(12) + 3; case 5: return 9; case 6: return g(13) - 1;
    }
    return sum;
}
long both(unsigned char *p, long n, long m)
{
    long sum = n;
    for (; n; n--, p++)
        switch (*p & 7) {
        case 0: sum += g(p[1]); break;
        case 1: sum -= g(p[3]); break;
        case 2: sum ^= g(p[5]); break;
        case 3: sum *= g(p[7]); break;
        case 4: sum |= g(p[9]); break;
        }
    do
        switch (g(m) & 7) {
        case 0: sum += g(p[2]); break;
        case 1: sum -= g(p[4]); break;
        case 2: sum ^= g(p[6]); break;
        case 3: sum *= g(p[8]); break;
        case 5: sum |= g(p[9]); break;
        }
    while (--m);
    return sum;
}
int g(int x) { return x * 3; }
int main(int argc, char **argv)
{
    return dense(argc, 2) + two((unsigned char *)argv[0], argc)
        + both((unsigned char *)argv[0], argc, 2);
}
"""
SWITCH_FLAGS = (
    ("-O2", "-fPIC", "-pie"), ("-O2", "-fno-pic", "-no-pie"),
    ("-O0", "-fPIC", "-pie"), ("-O1", "-fno-pic", "-no-pie"),
    ("-Os", "-fPIC", "-pie"), ("-O3", "-fPIC", "-pie", "-fcf-protection"),
    ("-O3", "-fno-pic", "-no-pie", "-fcf-protection"))


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        raise RuntimeError("%s: %s" % (" ".join(command), text))
    return text


def need(*programs):
    for program in programs:
        if not shutil.which(program):
            raise unittest.SkipTest("no %s: apt-get install gcc binutils"
                                    % program)


def table_labels(assembly):
    """Return the labels of code that tables in cc's assembly name."""
    return set(re.findall(r"^\t\.(?:long|quad)\t(\.L\w+)(?:-\.L\w+)?$",
                          assembly.split(".debug")[0], re.MULTILINE))


class JumpTableTest(unittest.TestCase):

    def check(self, compiler, flags, folder):
        """Compile SWITCHES; its tables' targets are those of its labels."""
        source, listing, program = (os.path.join(folder, name) for name in
                                    ("t.c", "t.s", "t"))
        with open(source, "w") as f:
            f.write(SWITCHES)
        flags = list(flags) + ["-fno-inline", "-fno-asynchronous-unwind-"
                               "tables"]
        run(compiler, "-S", "-o", listing, source, *flags)
        run(compiler, "-Wa,-L", "-o", program, listing, *flags)
        labels, names = {}, {}
        for line in run("nm", program).splitlines():
            words = line.split()
            if len(words) == 3:
                into = labels if words[2].startswith(".L") else names
                into[words[2]] = int(words[0], 16)
        with open(listing) as f:
            expected = {labels[name] for name in table_labels(f.read())}
        elf = Elf(program)
        scan = elf.scan()
        found, unresolved, within = set(), [], set()
        for name in sorted(names):      # gcc may clone: both.constprop.0
            if name.split(".")[0] not in ("dense", "two", "both"):
                continue
            function = elf.function_at(names[name])
            analysis = x86.analyse(function)
            jumps = x86.resolve_jumps(analysis, elf.read, scan.is_executable)
            found.update(jumps.targets)
            unresolved += jumps.unresolved
            within.update(target for target in expected
                          if 0 <= target - function.vaddr < function.size)
        if "-O0" not in flags:
            self.assertGreater(len(expected), 12)
        self.assertEqual(found & within, within)
        self.assertEqual(unresolved, [])
        # A table whose bound is not seen (-O0 compares memory) is read on.
        if "-O0" not in flags:
            self.assertEqual(found, expected)

    def test_a_table_is_found_again_when_all_other_jumps_are_known(self):
        """The second jump leads behind the first one's lea, with the same
        table in rdx, or with another one."""
        for second, unresolved in (("0a", ()), ("1a", (BASE + 0xe,))):
            module = Module(
                "<@ 488d1521000000 4863048a 4801d0 ffe0"
                " 4c8d0519000000 488d15" + second + "000000"
                " 49630488 4c01c0 ffe0 c3 >"
                " e8ffffff ffffffff d7ffffff f7ffffff efffffff efffffff")
            analysis = x86.analyse(module.functions[0])
            jumps = x86.resolve_jumps(analysis, module.read,
                                      module.scan().is_executable)
            with self.subTest(second):
                self.assertEqual(jumps.unresolved, unresolved)
                self.assertIn(BASE + 7, jumps.targets)

    def test_targets_are_the_labels_of_the_assembly(self):
        need("cc", "nm")
        compilers = ["cc"] + (["clang"] if shutil.which("clang") else [])
        for compiler in compilers:
            for flags in SWITCH_FLAGS:
                with self.subTest(" ".join((compiler,) + flags)), \
                        tempfile.TemporaryDirectory() as folder:
                    self.check(compiler, flags, folder)


# -- Whole libraries.

class Elf:
    """The functions of an ELF64 file: symbols and .eh_frame_hdr."""

    def __init__(self, path):
        with open(path, "rb") as f:
            self.data = f.read()
        unpack = struct.unpack_from
        (phoff, shoff), (n_segments, ) = unpack("<QQ", self.data, 32), \
            unpack("<H", self.data, 56)
        n_sections, names = unpack("<HH", self.data, 60)
        self.loads = []
        for place in range(n_segments):
            kind, flags, offset, vaddr, _, size = unpack(
                "<IIQQQQ", self.data, phoff + 56 * place)
            if kind == 1:
                self.loads.append((vaddr, size, offset, flags))
        self.sections = [unpack("<IIQQQQIIQQ", self.data, shoff + 64 * place)
                         for place in range(n_sections)]
        self.by_name = {self.text(self.sections[names][4] + section[0]):
                        section for section in self.sections}
        self.sizes = dict(self.fdes())
        for vaddr, size in self.symbols():
            self.sizes[vaddr] = size or self.sizes.get(vaddr, 0)
        self.functions = list(self.split())
        self.vaddrs = [function.vaddr for function in self.functions]

    def text(self, offset):
        return self.data[offset:self.data.index(b"\0", offset)].decode()

    def code_sections(self):
        return [(section[3], section[3] + section[5]) for section
                in self.sections if section[2] & 4 and section[1] == 1]

    def symbols(self):
        for name in (".symtab", ".dynsym"):
            section = self.by_name.get(name)
            if section is None:
                continue
            for fields in struct.iter_unpack(
                    "<IBBHQQ", self.data[section[4]:section[4]
                                         + section[5]]):
                _, info, _, index, vaddr, size = fields
                if info & 15 in (2, 10) and index:
                    yield vaddr, size

    def fdes(self):
        """Yield (vaddr, size) by the table of .eh_frame_hdr."""
        header, frames = (self.by_name.get(name) for name in
                          (".eh_frame_hdr", ".eh_frame"))
        if not header or self.data[header[4] + 3] != 0x3b:
            return
        count, = struct.unpack_from("<I", self.data, header[4] + 8)
        for place in range(count):
            vaddr, fde = struct.unpack_from("<ii", self.data,
                                            header[4] + 12 + 8 * place)
            offset = header[3] + fde - frames[3] + frames[4]
            yield header[3] + vaddr, struct.unpack_from(
                "<I", self.data, offset + 12)[0]

    def pointers(self):
        """Yield the targets of relative and IRELATIVE relocations."""
        section = self.by_name.get(".rela.dyn")
        if section:
            for _, info, addend in struct.iter_unpack(
                    "<QQq", self.data[section[4]:section[4] + section[5]]):
                if info & 0xffffffff in (8, 37):
                    yield addend

    def split(self):
        """Yield the Functions; one inside another is an entry of that."""
        sections, reach, tops, inner = self.code_sections(), 0, [], set()
        for vaddr in sorted(self.sizes):
            if not any(low <= vaddr < high for low, high in sections):
                continue
            if vaddr < reach:
                inner.add(vaddr)
            else:
                tops.append(vaddr)
                reach = vaddr + self.sizes[vaddr]
        inner = sorted(inner.union(self.pointers()))
        for vaddr, following in zip(tops, tops[1:] + [1 << 63]):
            end = min([following] + [high for low, high in sections
                                     if low <= vaddr < high])
            size = min(self.sizes[vaddr] or end - vaddr, end - vaddr)
            yield x86.Function(
                vaddr, size, self.read(vaddr, end - vaddr), tuple(
                    inner[bisect.bisect_right(inner, vaddr):
                          bisect.bisect_left(inner, end)]))

    def read(self, vaddr, size):
        for low, length, offset, _ in self.loads:
            if low <= vaddr < low + length:
                return self.data[offset + vaddr - low:
                                 offset + min(vaddr - low + size, length)]
        return None

    def function_at(self, vaddr):
        place = bisect.bisect_right(self.vaddrs, vaddr) - 1
        function = self.functions[place] if place >= 0 else None
        if function and vaddr < function.vaddr + len(function.code):
            return function
        return None

    def scan(self):
        segments = [(vaddr, self.data[offset:offset + size])
                    for vaddr, size, offset, flags in self.loads if flags & 1]
        return x86.BranchScan(segments, self.function_at, self.read)


def libraries():
    """Return {name: path} of what coverage is wanted for, where found."""
    folder = sysconfig.get_config_var("LIBDIR") or ""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    python = os.path.join(folder, name)
    if not name.count(".so") or not os.path.exists(python):
        python = os.path.realpath(sys.executable)
    found = {"python": python}
    for name in ("libc.so.6", "libstdc++.so.6"):
        for path in (glob.glob("/lib/*-linux-gnu/" + name)
                     + glob.glob("/*/lib64/" + name)
                     + glob.glob("/usr/lib/" + name))[:1]:
            found[name] = path
    return found


def plan_all(elf):
    """Return (Windows, {rule: n}, n functions of five bytes or more)."""
    scan, windows, rules, count = elf.scan(), [], collections.Counter(), 0
    for function in elf.functions:
        if not function.size:
            continue
        count += function.size >= 5
        try:
            windows.append(x86.plan_window(function, function.vaddr, scan))
        except x86.RefusalError as refusal:
            if function.size >= 5:
                rules[refusal.rule] += 1
    return windows, rules, count


class LibrariesTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.planned = {}
        for name, path in sorted(libraries().items()):
            elf = Elf(path)
            seconds, planned = quiet_seconds(lambda: plan_all(elf), 1)
            cls.planned[name] = (path, elf) + planned + (seconds,)

    def test_nearly_every_entry_takes_a_jump(self):
        print("\n%-16s %9s %8s %7s %6s  refused" % (
            "library", "functions", "jump", "slots", "s"))
        for name, (_, elf, windows, rules, count, seconds) in sorted(
                self.planned.items()):
            share = 1 - sum(rules.values()) / max(count, 1)
            print("%-16s %9d %7.3f%% %7d %6.2f  %s" % (
                name, count, 100 * share, sum(1 for window in windows
                                              if window.slot), seconds,
                ", ".join("%s %d" % item for item in rules.items()) or "-"))
            with self.subTest(name):
                self.assertGreater(count, 100)
                self.assertGreaterEqual(share, GOAL)
                self.assertLess(seconds, 5)

    def test_no_branch_that_objdump_sees_enters_a_window(self):
        need("objdump")
        branch = re.compile(r"^ +([0-9a-f]+):\t(?:[a-z]+ )*"
                            r"(?:j[a-z]+|call|loop[a-z]*|xbegin)[lq]?"
                            r"(?:,p[nt])? +([0-9a-f]+)\b")
        for name, (path, _, windows, _, _, _) in sorted(
                self.planned.items()):
            with self.subTest(name):
                interior, slots = {}, set()
                for window in windows:
                    for vaddr in range(window.site + 1,
                                       window.site + window.size):
                        interior[vaddr] = window
                    if window.slot:
                        slots.update(range(window.slot, window.slot + 5))
                process = subprocess.Popen(
                    ["objdump", "-d", "-w", "--no-show-raw-insn", path],
                    stdout=subprocess.PIPE)
                n_branches = 0
                for line in process.stdout:
                    match = branch.match(line.decode("ascii", "replace"))
                    if match:
                        n_branches += 1
                        target = int(match.group(2), 16)
                        self.assertNotIn(target, interior, line)
                        self.assertNotIn(target, slots, line)
                process.stdout.close()
                self.assertEqual(process.wait(), 0)
                self.assertGreater(n_branches, 1000)

    def test_scans_are_quick(self):
        for name, (_, elf, _, _, _, _) in sorted(self.planned.items()):
            scan = elf.scan()
            size = sum(len(code) for _, code in scan.segments)
            seconds, _ = quiet_seconds(scan._build, 3)
            self.assertLess(seconds, 0.05 + size / 8e6, name)
