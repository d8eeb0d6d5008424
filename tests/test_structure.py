"""Rules of structure that a machine can hold: see the module docstrings.

A file's docstring is its map, and its banners are the streets; what is
public is what __all__ says; the pure file stays pure.
"""
import ast
import functools
import io
import os
import re
import sys
import tokenize
import unittest

import ubp
import ubp_x86

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = ("ubp.py", "ubp_x86.py")
PURE_MODULES = {"array", "ast", "bisect", "collections", "functools",
                "itertools", "operator", "re", "struct", "typing"}


def read(name):
    """Return a file of the project as text."""
    with open(os.path.join(TOP, name), encoding="utf-8") as file:
        return file.read()


@functools.lru_cache()
def trees():
    """Return (name, text, syntax tree) of both files."""
    return [(name, read(name), ast.parse(read(name))) for name in FILES]


def table_lines(text):
    """Return the numbers of lines inside strings of several lines."""
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING:
            numbers.update(range(token.start[0] + 1, token.end[0] + 1))
    return numbers


def last_line(node):
    """Return the last line of a node; end_lineno came with Python 3.8."""
    return max(getattr(child, "lineno", 0) for child in ast.walk(node))


def python_files():
    """Yield the paths of all Python files of the project, relative to it."""
    for folder, folders, files in os.walk(TOP):
        folders[:] = [name for name in folders if name == ".ci" or not (
            name.startswith(".") or name == "__pycache__" or name == "dist")]
        for name in files:
            if name.endswith(".py"):
                yield os.path.relpath(os.path.join(folder, name), TOP)


class Structure(unittest.TestCase):

    def test_readme_tells_how_long_the_files_are(self):
        """To a twentieth: a reader decides by it whether to begin."""
        readme = read("README.md")
        for name in FILES:
            told, = re.findall(r"`%s` \(([0-9 ]+) lines\)" % name, readme)
            n_lines = len(read(name).splitlines())
            self.assertLess(abs(int(told.replace(" ", "")) - n_lines),
                            n_lines / 20, (name, n_lines))

    def test_docstring_is_the_map_of_the_banners(self):
        for name, text, tree in trees():
            with self.subTest(name):
                mapped = re.findall(r"^ {4,5}(\d+)  (.+?)(?:  .*)?$",
                                    ast.get_docstring(tree, False), re.M)
                banners = re.findall(r"^# ---- (\d+)  (.+?) -+$", text, re.M)
                self.assertEqual(mapped, banners)
                self.assertEqual([int(n) for n, _ in mapped],
                                 list(range(1, len(mapped) + 1)))

    def test_banners_end_in_one_column(self):
        for name, text, _ in trees():
            for banner in re.findall(r"^# ---- \d.*$", text, re.M):
                with self.subTest(banner):
                    self.assertEqual(len(banner), 77)

    def test_each_section_opens_with_a_paragraph(self):
        for name, text, _ in trees():
            for match in re.finditer(r"^# ---- \d+  (.+?) -+\n(.*\n.*)$",
                                     text, re.M):
                if match.group(1) != "Errors":
                    with self.subTest(name + ": " + match.group(1)):
                        self.assertRegex(match.group(2), r"^#\n# \S")

    def test_lines_fit_79_columns(self):
        for name in python_files():
            text = read(name)
            # A row of a test's table is as long as its case.
            tables = table_lines(text) if name.startswith("tests") else ()
            for n, line in enumerate(text.splitlines(), 1):
                if n not in tables:
                    self.assertLessEqual(len(line), 79, "%s:%d" % (name, n))

    def test_functions_fit_one_screen(self):
        for name, text, tree in trees():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    size = last_line(node) - node.lineno + 1
                    self.assertLessEqual(size, 60, "%s: %s" % (
                        name, node.name))

    def test_public_functions_and_classes_have_docstrings(self):
        for name, text, tree in trees():
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    if not node.name.startswith("_"):
                        self.assertTrue(ast.get_docstring(node), "%s: %s" % (
                            name, node.name))

    def test_no_name_is_defined_twice(self):
        """A second class of a name would hide the first one's tests."""
        for name in python_files():
            if name.endswith(".py"):
                tree = ast.parse(read(name))
                for part in [tree] + [node for node in tree.body
                                      if isinstance(node, ast.ClassDef)]:
                    names = [
                        node.name for node in part.body
                        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                        and not node.decorator_list]
                    self.assertEqual(sorted(set(names)), sorted(names), name)

    def test_no_exception_is_swallowed_whole(self):
        for name, text, tree in trees():
            for node in ast.walk(tree):
                if isinstance(node, ast.ExceptHandler):
                    is_broad = node.type is None or getattr(
                        node.type, "id", "") in ("Exception", "BaseException")
                    is_silent = all(isinstance(part, ast.Pass)
                                    for part in node.body)
                    self.assertFalse(is_broad and is_silent, "%s:%d" % (
                        name, node.lineno))

    def test_pure_file_imports_pure_modules_only(self):
        for node in ast.walk(ast.parse(read("ubp_x86.py"))):
            names = ([alias.name for alias in node.names]
                     if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom)
                     else [])
            self.assertLessEqual(set(names), PURE_MODULES)

    def test_pure_file_opens_nothing(self):
        for node in ast.walk(ast.parse(read("ubp_x86.py"))):
            if isinstance(node, ast.Call):
                self.assertNotIn(getattr(node.func, "id", ""), (
                    "open", "print", "input", "eval", "exec", "__import__"))

    def test_only_ctypes_and_the_standard_library_are_imported(self):
        known = getattr(sys, "stdlib_module_names", None)
        if known is None:
            self.skipTest("needs Python 3.10 or later to know the names")
        for node in ast.walk(ast.parse(read("ubp.py"))):
            names = ([alias.name for alias in node.names]
                     if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom)
                     else [])
            self.assertLessEqual(set(names) - {"ubp_x86"}, set(known))

    def test_what_is_public_is_what_is_documented(self):
        self.assertEqual(sorted(ubp.__all__), sorted((
            "attach launch status clean Target Probe Count Hist Trace "
            "Latency Stack Call Hit Histogram Event UbpError "
            "AttachError TraceeGone SymbolError ProbeError UbpTimeout "
            "__version__").split()))
        for name in ubp.__all__:
            self.assertTrue(hasattr(ubp, name), name)

    def test_both_files_share_one_root_of_errors(self):
        self.assertIs(ubp.UbpError, ubp_x86.UbpError)
        for name in ubp.__all__:
            thing = getattr(ubp, name)
            if isinstance(thing, type) and name.endswith("Error"):
                self.assertTrue(issubclass(thing, ubp_x86.UbpError), name)

    def test_ctypes_structures_are_never_packed(self):
        for name, text, _ in trees():       # Python 3.14 warns of it
            self.assertNotIn("_pack_ ", text)

    def test_syntax_is_that_of_python_3_6(self):
        if sys.version_info < (3, 8):
            for name in python_files():
                compile(read(name), name, "exec")
            return
        for name in python_files():
            ast.parse(read(name), name, feature_version=(3, 6))


if __name__ == "__main__":
    unittest.main()
