"""How many functions take a jump: some of each program that jumps.py knows.

`make oracle` looks at all of them, and holds them to their goals. Here no
function of which every instruction is a site is longer than 1000 bytes: one
that is would be half of the sample.
"""
import subprocess
import sys
import unittest

import jumps


class Coverage(unittest.TestCase):

    def test_nearly_all_functions_and_instructions_take_a_jump(self):
        lines = []
        for name in jumps.PROGRAMS:
            with self.subTest(name):
                reason = jumps.missing(name)
                if reason:
                    self.skipTest(reason)
                try:
                    functions, instructions = jumps.look(name, 420, 1500, 1000)
                except OSError as error:
                    self.skipTest("%s: %s" % (name, error))
                lines += [jumps.row(functions, 99), jumps.row(
                    instructions._replace(name="  at each"), 85)]
                self.assertGreater(functions.n, 100)
                self.assertGreaterEqual(functions.percent, 99, lines[-2])
                self.assertGreaterEqual(instructions.percent, 85, lines[-1])
        print("\n" + "\n".join(lines))

    def test_an_unknown_program_is_answered_with_the_known_ones(self):
        for arguments in (["libz"], ["--every", "0", "libc"], ["--none"]):
            ended = subprocess.Popen(
                [sys.executable, jumps.__file__] + arguments,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                universal_newlines=True)
            out, talk = ended.communicate(timeout=60)
            self.assertEqual((2, ""), (ended.returncode, out), talk)
            if arguments == ["libz"]:
                self.assertIn(", ".join(jumps.PROGRAMS), talk)


if __name__ == "__main__":
    unittest.main()
