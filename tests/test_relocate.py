"""Relocation: tables of bytes, and execution at both places on the CPU."""
import struct
import unittest

import judge
import ubp_x86 as x86

# from | bytes | to | bytes at the new place | what it shows
TABLE = """
1000 | 48 89 e5          | 9000 | 48 89 e5            | nothing to re-aim
1000 | f3 0f 1e fa       | 9000 | f3 0f 1e fa         | endbr64 moves
1000 | 8b 05 10 00 00 00 | 9000 | 8b 05 10 80 ff ff   | mov re-aimed
1000 | c6 05 f9 ff ff ff 01 | 9000 | c6 05 f9 7f ff ff 01 | imm behind disp
1000 | 67 8b 05 10 00 00 00 | 9000 | 67 8b 05 10 80 ff ff | eip-relative
1000 | 74 10             | 9000 | 0f 84 0c 80 ff ff   | jcc rel8 widened
1000 | 0f 8f 10 00 00 00 | 9000 | 0f 8f 10 80 ff ff   | jcc rel32 re-aimed
1000 | 2e 74 10          | 9000 | 2e 0f 84 0c 80 ff ff  | hint kept
1000 | f2 74 10          | 9000 | f2 0f 84 0c 80 ff ff  | bnd kept
1000 | eb 10             | 9000 | e9 0d 80 ff ff      | jmp rel8 widened
1000 | e9 10 00 00 00    | 9000 | e9 10 80 ff ff      | jmp rel32
1000 | e2 10             | 9000 | e2 02 eb 05 e9 09 80 ff ff | loop
1000 | 67 e3 10          | 9000 | 67 e3 02 eb 05 e9 09 80 ff ff | jecxz
1000 | c7 f8 10 00 00 00 | 9000 | c7 f8 10 80 ff ff   | xbegin
1000 | e8 fb 0f 00 00    | 9000 | 68 05 10 00 00 e9 f6 8f ff ff | call low
1000 | 66 66 48 e8 f8 0f 00 00 | 9000 | 68 08 10 00 00 e9 f6 8f ff ff | call
1000 | ff d0             | 9000 | 68 02 10 00 00 ff e0 | call rax
1000 | 3e 41 ff d3       | 9000 | 68 04 10 00 00 3e 41 ff e3 | notrack r11
1000 | ff 54 24 08       | 9000 | 68 04 10 00 00 ff a4 24 10 00 00 00 | [rsp]
1000 | ff 14 24          | 9000 | 68 03 10 00 00 ff a4 24 08 00 00 00 | [rsp]
1000 | 41 ff 14 24       | 9000 | 68 04 10 00 00 41 ff 24 24 | [r12]
1000 | ff 15 10 00 00 00 | 9000 | 68 06 10 00 00 ff 25 0b 80 ff ff | [rip]
1000 | ff 25 10 00 00 00 | 9000 | ff 25 10 80 ff ff   | jmp [rip]
1000 | 3e ff e0          | 9000 | 3e ff e0            | notrack kept
1000 | f3 c3             | 9000 | f3 c3               | rep ret
1000 | c2 08 00          | 9000 | c2 08 00            | ret imm16
1000 | 0f 05             | 9000 | 0f 05 48 b9 02 10 00 00 00 00 00 00 | rcx
"""

# The same beyond the reach of push imm32: the address lies behind the copy.
FAR_TABLE = """
e8 fb 0f 00 00 | ff 35 05 00 00 00 e9 f5 8f ff ff | 05 10 00 00 00 7a 00 00
ff d0          | ff 35 02 00 00 00 ff e0          | 02 10 00 00 00 7a 00 00
"""

# bytes | rule: what cannot move, and which rule says so
REFUSED = """
cc                | trap
cd 80             | trap
0f 0b             | trap
f4                | halt
0f 34             | far
ff 2c 24          | far
48 cf             | far
0f 01 d7          | far
ff d4             | call rsp
ff 54 24 f8       | call rsp
"""

# bytes | registers | what it shows. Run at home and as a copy: rax ... r15,
# flags, x87 and SSE state, 256 bytes above and below rsp and the data must be
# equal. {data} is memory; a target is where the run ends, in an int3.
RUN = """
90                         |                    | nop
48 89 e5                   |                    | mov rbp, rsp
55                         | rbp=7              | push rbp
54                         |                    | push rsp
5c                         |                    | pop rsp
58                         |                    | pop rax
c9                         | rbp=stack+16       | leave
c8 10 00 00                | rbp=stack+64       | enter
c8 10 00 02                | rbp=stack+64       | enter with two levels
9c                         | eflags=0x2d7       | pushf
48 83 ec 18                |                    | sub rsp
48 89 44 24 80             | rax=5              | mov [rsp-128], red zone
8b 05 10 00 00 00          |                    | mov eax, [rip+16]
48 8d 05 10 00 00 00       |                    | lea rax, [rip+16]
48 8d 05 f9 ff ff ff       |                    | lea rax, itself
67 8d 05 10 00 00 00       |                    | lea eax, [eip+16]
f3 0f 10 05 10 00 00 00    |                    | movss xmm0, [rip+16]
66 0f 6f 05 38 00 00 00    |                    | movdqa xmm0, [rip+56]
80 3d 10 00 00 00 cc       |                    | cmp byte [rip+16], imm
48 81 3d 10 00 00 00 01 02 03 04 |              | cmp qword [rip+16], imm32
74 10                      | eflags=0x242       | je, taken
74 10                      | eflags=0x202       | je, not taken
0f 84 10 00 00 00          | eflags=0x242       | je rel32, taken
7f e0                      | eflags=0x202       | jg back, taken
2e 75 10                   | eflags=0x202       | jne with a hint
f2 75 10                   | eflags=0x202       | bnd jne
eb 10                      |                    | jmp
e9 10 00 00 00             |                    | jmp rel32
e2 10                      | rcx=2              | loop, taken
e2 10                      | rcx=1              | loop, not taken
e2 10                      | rcx=0              | loop from zero
e1 10                      | rcx=5 eflags=0x242 | loope, taken
e0 10                      | rcx=5 eflags=0x242 | loopne, not taken
e3 10                      | rcx=0              | jrcxz, taken
e3 10                      | rcx=1              | jrcxz, not taken
67 e3 10                   | rcx=0x100000000    | jecxz, taken
67 e2 10                   | rcx=0x100000001    | loop on ecx
e8 10 00 00 00             |                    | call
e8 00 00 00 00             |                    | call to get the pc
66 66 48 e8 10 00 00 00    |                    | padded call
f2 e8 10 00 00 00          |                    | bnd call
ff d0                      | rax=code+64        | call rax
41 ff d7                   | r15=code+64        | call r15
3e ff d0                   | rax=code+64        | notrack call rax
ff 17                      | rdi=data           | call [rdi]
ff 57 08                   | rdi=data-8         | call [rdi+8]
ff 14 24                   |                    | call [rsp]
ff 54 24 08                |                    | call [rsp+8]
ff 54 24 78                |                    | call [rsp+0x78]
ff 94 24 80 00 00 00       |                    | call [rsp+0x80]
ff 14 cc                   | rcx=2              | call [rsp+rcx*8]
41 ff 14 24                | r12=data           | call [r12]
ff 15 1a 00 00 00          |                    | call [rip+26]
ff e0                      | rax=code+64        | jmp rax
ff 24 24                   |                    | jmp [rsp]
ff 25 1a 00 00 00          |                    | jmp [rip+26]
c3                         |                    | ret
f3 c3                      |                    | rep ret
c2 08 00                   |                    | ret imm16
f3 a4                      | rcx=9 rsi=data rdi=data+64 | rep movsb
f3 48 ab                   | rcx=4 rdi=data rax=3 | rep stosq
f3 a6                      | rcx=9 rsi=data rdi=data+64 | repe cmpsb
f0 48 0f c1 07             | rdi=data rax=3     | lock xadd
f0 ff 0c 24                |                    | lock dec [rsp]
0f a2                      | rax=0              | cpuid
d9 e8                      |                    | fld1
0f c8                      | rax=0x12345678     | bswap
c5 f8 77                   |                    | vzeroupper
0f 05                      | rax=186            | syscall: gettid
0f 05                      | rax=0xffff         | syscall: ENOSYS
"""
SPOTS = ((judge.LOW, judge.LOW_COPY), (judge.HIGH, judge.HIGH_COPY))


def rows(table):
    """Yield the stripped cells of each line of a table."""
    for line in table.strip().splitlines():
        yield [cell.strip() for cell in line.split("|")]


def registers(text, code):
    """Parse `rax=5 rdi=data+8` into {name: value}."""
    bases = {"stack": judge.STACK_MIDDLE, "data": judge.DATA_MIDDLE,
             "code": code}
    regs = {name: 0x1111 * number + 0x10000
            for number, name in enumerate(judge.GPRS)}
    regs["rsp"] = judge.STACK_MIDDLE
    for word in text.split():
        name, value = word.split("=")
        for base, vaddr in bases.items():
            value = value.replace(base, "%d" % vaddr)
        regs[name] = sum(int(part, 0) for part
                         in value.replace("-", "+-").split("+"))
    return regs


class Bytes(unittest.TestCase):

    def test_copies_are_as_the_table_says(self):
        for vaddr, code, new_vaddr, wanted, why in rows(TABLE):
            with self.subTest(why, code=code):
                insn = x86.decode(bytes.fromhex(code), int(vaddr, 16))
                self.assertEqual(x86.relocate(insn, int(new_vaddr, 16)),
                                 bytes.fromhex(wanted))

    def test_a_far_return_address_is_pushed_from_behind_the_copy(self):
        for code, wanted, data in rows(FAR_TABLE):
            with self.subTest(code):
                insn = x86.decode(bytes.fromhex(code), 0x7a0000001000)
                self.assertEqual(x86.relocate(insn, 0x7a0000009000),
                                 bytes.fromhex(wanted + data))

    def test_what_cannot_move_names_its_rule(self):
        for code, rule in rows(REFUSED):
            with self.subTest(code):
                insn = x86.decode(bytes.fromhex(code), 0x1000)
                with self.assertRaises(x86.RelocationError) as caught:
                    x86.relocate(insn, 0x9000)
                self.assertEqual(caught.exception.rule, rule)
                self.assertEqual(caught.exception.vaddr, 0x1000)

    def test_reach_ends_at_2_gib(self):
        insn = x86.decode(bytes.fromhex("8b0500000000"), 0x100000000)
        for new_vaddr in (0x180000000, 0x80000001):
            self.assertEqual(len(x86.relocate(insn, new_vaddr)), 6)
        for new_vaddr in (0x180000001, 0x80000000):
            with self.assertRaises(x86.RelocationError) as caught:
                x86.relocate(insn, new_vaddr)
            self.assertEqual(caught.exception.rule, "out of reach")

    def test_32_bit_code_is_not_moved(self):
        insn = x86.decode(b"\x90", 0x1000, 32)
        with self.assertRaises(x86.RelocationError):
            x86.relocate(insn, 0x9000)

    def test_a_copy_decodes_to_the_same_operand(self):
        for vaddr, code, new_vaddr, _, why in rows(TABLE):
            insn = x86.decode(bytes.fromhex(code), int(vaddr, 16))
            if insn.flow in (x86.NEXT, x86.JCC, x86.JMP, x86.XBEGIN):
                copy = x86.relocate(insn, int(new_vaddr, 16))
                again = x86.decode(copy, int(new_vaddr, 16))
                self.assertEqual(
                    (again.target, again.rip_relative, again.flow),
                    (insn.target, insn.rip_relative, insn.flow), why)


class Execution(unittest.TestCase):

    def requests(self, code, regs, spots):
        """The same run, in place and by a copy that jumps back."""
        home, away = (spot + 0x1000 for spot in spots)
        insn = x86.decode(code, home)
        copy = x86.relocate(insn, away)
        if insn.flow not in (x86.CALL, x86.CALL_IND):
            end = away + len(copy) + 5
            copy += b"\xe9" + struct.pack("<i", home + insn.size - end)
        target = struct.pack("<Q", home + 64)
        shared = [(home + 32, target)]
        stack = judge.STACK_MIDDLE
        if insn.flow in (x86.CALL_IND, x86.JMP_IND, x86.RET):
            shared += [(stack + n, target) for n in (0, 8, 16, 0x78, 0x80)]
            shared.append((judge.DATA_MIDDLE, target))
        regs = registers(regs, home)
        # Each area is int3 but for what is placed: the home run of a copy
        # has its first bytes overwritten, as a probe would.
        return (judge.request(shared + [(home, code)], home, regs),
                judge.request(shared + [(away, copy)], away, regs))

    def test_a_copy_does_exactly_what_the_original_does(self):
        cases, requests = [], []
        for code, regs, why in rows(RUN):
            for spots in SPOTS:
                cases.append((code, why, spots))
                requests += self.requests(bytes.fromhex(code), regs, spots)
        replies = iter(judge.run(requests))
        for code, why, spots in cases:
            home, away = next(replies), next(replies)
            with self.subTest(why, code=code, at=hex(spots[0])):
                self.assertEqual(home.signal, judge.SIGTRAP)
                self.assertEqual(away.signal, judge.SIGTRAP)
                self.assertEqual(away.regs, home.regs)
                # but for the last x87 instruction's address
                self.assertEqual(away.fpu[:8], home.fpu[:8])
                self.assertEqual(away.fpu[24:], home.fpu[24:])
                self.assertEqual(away.stack, home.stack)
                self.assertEqual(away.data, home.data)

    def test_the_comparison_notices_a_wrong_return_address(self):
        home, away = SPOTS[0]
        insn = x86.decode(bytes.fromhex("e810000000"), home)
        copy = x86.relocate(insn._replace(vaddr=home + 1), away)
        regs = registers("", home)
        first, second = judge.run([
            judge.request([(home, insn.code)], home, regs),
            judge.request([(away, copy)], away, regs)])
        self.assertEqual(first.regs, second.regs)
        self.assertNotEqual(first.stack, second.stack)


if __name__ == "__main__":
    unittest.main()
