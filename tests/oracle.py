"""The decoder against objdump, over whole ELF files.

    oracle.py FILE...      compare every instruction; exit 1 on a difference
    oracle.py              the same for LIBRARIES, as far as they are here

Compared are the length, the target of a direct branch and the address of a
rip-relative operand. What may differ is a row of ALLOWED with its reason.
"""
import collections
import glob
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import ubp_x86                                             # noqa: E402

LIBRARIES = """
/lib/x86_64-linux-gnu/libc.so.6       /lib64/libc.so.6
/lib/x86_64-linux-gnu/libm.so.6       /lib64/libm.so.6
/usr/lib/x86_64-linux-gnu/libstdc++.so.6  /usr/lib64/libstdc++.so.6
/usr/lib/x86_64-linux-gnu/libcrypto.so.3  /usr/lib64/libcrypto.so.3
/usr/bin/git  /usr/bin/perl  /usr/bin/node  /usr/bin/gdb
/usr/lib/gcc/x86_64-linux-gnu/*/cc1  /usr/libexec/gcc/x86_64-*/*/cc1
"""

PREFIX = (r"(?:rex(?:\.\w+)?|data16|data32|addr16|addr32|lock|repn?z?|"
          r"[c-gs]s|xacquire|xrelease|bnd|notrack)")
# who is right, the bytes, objdump's text, why. Both are regular expressions
# that must match all. Data between functions is where most of these occur.
ALLOWED = [
    ("both", r"9b.*", r"(?:" + PREFIX + r" )*f.*",
     "objdump joins fwait with the x87 instruction behind it"),
    ("ubp", r".*", PREFIX + r"(?: " + PREFIX + r")*(?: \(bad\))?",
     "objdump shows prefixes alone that another prefix cancels; the CPU "
     "takes them as part of the instruction behind"),
    ("ubp", r"(?:..)*66(?:..)*(?:7.|e[01239b]|e8|c[23]|ff|0f8.|c7f8).*",
     r".*\b(?:j|call|loop|ret|xbegin).*",
     "66 before a near branch: Intel ignores it, AMD truncates rip"),
    ("ubp", r"(?:..)*f0.*", r".*\block\b.*",
     "lock before what must not be locked raises #UD"),
    ("ubp", r"(?:..)*8[ce].*", r"(?:" + PREFIX + r" )*mov .*%(?:\?|cs).*",
     "there are six segment registers, and cs cannot be loaded"),
    ("ubp", r"(?:..)*67.*", r".*%eip.*",
     "the address is computed modulo 2**32; objdump extends its sign"),
    ("ubp", r"(?:..)*d6", r".*\b(?:salc|udb)",
     "salc is in no manual; udb raises #UD, as what is undefined does"),
    ("ubp", r"(?:..)*dbe5", r".*frstpm.*",
     "an 80287's; later ones raise #UD"),
    ("neither", r"(?:..)*0f1[ab].*", r"bnd\w+ .*\(bad\).*",
     "MPX forms of a reserved nop, which CPUs without MPX run"),
    ("ubp", r"(?:..)*(?:f[23]|66)(?:..)*0f.*",
     PREFIX + r"(?: " + PREFIX + r")* (?!\(bad\)).*",
     "a mandatory prefix that this opcode does not have raises #UD"),
    ("ubp", r"(?:..)*4.(?:62|c4|c5|8f).*", PREFIX + r" v.*",
     "REX before VEX, EVEX or XOP raises #UD"),
    ("ubp", r"(?:..)*(?:66|f[023])(?:..)*(?:62|c4|c5|8f).*", PREFIX + r" v.*",
     "66, F2, F3 or LOCK before VEX, EVEX or XOP raises #UD"),
    ("ubp", r"(?:..)*0f2[46].*", r".*%tr\d.*",
     "the test registers went after the 80486"),
    ("ubp", r"(?:62|c4|c5|8f).*", r".*",
     "VEX, EVEX or XOP fields that the manual reserves"),
]
_ALLOWED = [(re.compile(code), re.compile(text)) for _, code, text, _
            in ALLOWED]


def libraries():
    """The files of LIBRARIES that are here, and this Python's own."""
    found = []
    for pattern in LIBRARIES.split() + [
            sys.executable, os.path.join(sys.base_prefix, "lib",
                                         "libpython3*.so.1.0")]:
        for path in sorted(glob.glob(pattern)):
            path = os.path.realpath(path)
            with open(path, "rb") as file:
                is_elf = file.read(20)[:5] == b"\x7fELF\x02"
            if is_elf and path not in found:
                found.append(path)
    return found


def text_section(path):
    """(vaddr, bytes) of an ELF file's section .text, or (0, b"")."""
    with open(path, "rb") as file:
        data = file.read()
    table, = struct.unpack_from("<Q", data, 0x28)
    size, n, names = struct.unpack_from("<HHH", data, 0x3a)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size)
               for i in range(n)]
    for name, _, _, vaddr, offset, length, *_ in headers:
        start = headers[names][4] + name
        if data[start:start + 6] == b".text\0":
            return vaddr, data[offset:offset + length]
    return 0, b""


def disassemble(path, options=("-d", "-M", "intel64")):
    """Yield (vaddr, hex bytes, text) of each instruction objdump finds."""
    command = ["objdump", "-w", "--insn-width=16"] + list(options) + [path]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE,
                                   universal_newlines=True, errors="replace")
    except FileNotFoundError:
        raise unittest.SkipTest("no objdump; apt-get install binutils")
    with process:
        try:
            for line in process.stdout:
                words = line.rstrip("\n").split("\t")
                if len(words) > 2:
                    yield (int(words[0].rstrip(": "), 16),
                           words[1].replace(" ", ""), words[2].strip())
        finally:
            process.kill()


def difference(vaddr, digits, text, bits=64):
    """What ubp and objdump say differently of one instruction, or None."""
    try:
        insn = ubp_x86.decode(bytes.fromhex(digits), vaddr, bits)
    except ubp_x86.DecodeError as error:
        return None if "(bad)" in text or text.startswith(".byte") else str(
            error)
    if "(bad)" in text:
        return "ubp accepts it"
    if insn.size != len(digits) // 2:
        return "ubp says %d bytes" % insn.size
    wanted, pattern = insn.target, " "
    if wanted is None:
        wanted, pattern = insn.rip_relative, "# "
    if wanted is not None:
        place = text.partition(pattern)[2] if pattern == "# " else re.sub(
            "^(?:" + PREFIX + " )*[a-z,]+ +", "", text)
        if int(place.split(" ")[0], 16) != wanted:
            return "ubp says 0x%x" % wanted
    elif "# " in text and "ip)" in text:
        return "ubp sees no rip-relative operand"
    return None


def is_allowed(digits, text):
    """Is there a row of ALLOWED for it?"""
    return any(code.fullmatch(digits) and said.fullmatch(text)
               for code, said in _ALLOWED)


def compare_32(path, most=None):
    """compare(), of a file's code taken for 32-bit code: all bytes are
    some instruction there, and none of them was ever one."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(text_section(path)[1][:4 * most if most else None])
        file.flush()
        return compare(file.name, most, 32, (
            "-D", "-b", "binary", "-m", "i386"))


def compare(path, most=None, bits=64, options=("-d", "-M", "intel64")):
    """(number compared, number allowed, [unexplained difference]).

    most   stop after so many instructions
    """
    n, n_allowed, found = 0, 0, []
    for vaddr, digits, text in disassemble(path, options):
        said = difference(vaddr, digits, text, bits)
        n += 1
        if said and is_allowed(digits, text):
            n_allowed += 1
        elif said:
            found.append("%s 0x%x: %s | %s | %s" % (
                os.path.basename(path), vaddr, digits, text, said))
        if n == most:
            break
    return n, n_allowed, found


def main(paths):
    """Compare files, print a line each. -> exit status."""
    totals = collections.Counter()
    for path in paths or libraries():
        began = time.monotonic()
        n, n_allowed, found = compare(path)
        print("%-60s %9d instructions  %4d s  %6d allowed  %4d differ" % (
            path[-60:], n, time.monotonic() - began, n_allowed, len(found)))
        print("".join("    %s\n" % line for line in found[:10]), end="",
              flush=True)
        totals.update(n=n, found=len(found))
    for path in (paths or libraries())[:3]:
        n, n_allowed, found = compare_32(path, 1000000)
        print("%-60s %9d as 32-bit code     %6d allowed  %4d differ" % (
            path[-60:], n, n_allowed, len(found)))
        print("".join("    %s\n" % line for line in found[:10]), end="",
              flush=True)
        totals.update(n=n, found=len(found))
    print("%d instructions, %d unexplained differences" % (
        totals["n"], totals["found"]))
    return 1 if totals["found"] or not totals["n"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
