"""Lets tests say `import ubp` from wherever pytest was started.

They start hundreds of Pythons that import it: from kept bytecode, wherever
that is forbidden too, or starting them takes more time than all else.
"""
import os
import sys

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
