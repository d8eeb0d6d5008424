# What is made here, and how. `make` alone tells the targets.
#
#   PYTHON   the interpreter that tests run under      make test PYTHON=python3.6
#   ARGS     more words for pytest                     make test ARGS='-k cli -x'
#   PREFIX   where `make install` puts the command     /usr/local

PYTHON = python3
ARGS =
PREFIX = /usr/local
VENV = .venv
PYTEST = $(VENV)/bin/python -m pytest -q -p no:cacheprovider

help:            ## tell the targets
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' Makefile | expand -t 10

test: $(VENV)/ready  ## all tests that this machine can run, in a venv of its own
	$(VENV)/bin/python tests/suite.py $(ARGS)

check: $(VENV)/ready  ## syntax of Python 3.6, and the rules of structure
	$(PYTHON) tests/compat.py --syntax ubp.py ubp_x86.py
	$(PYTEST) tests/test_structure.py $(ARGS)

oracle:          ## the decoder against objdump; the share that takes a jump
	$(PYTHON) tests/oracle.py $(ARGS)
	$(PYTHON) tests/jumps.py

bench:           ## costs of a hit, pauses, reading speed: one table, and JSON
	$(PYTHON) tests/bench/run.py $(ARGS)

soak:            ## 10 000 attach and remove cycles: is anything leaked?
	$(PYTHON) tests/soak.py $(ARGS)

compat:          ## the pure tests and a live choice under each CPython found
	$(PYTHON) tests/compat.py $(ARGS)

dist:            ## dist/: ubp.pyz, the wheel, the sdist; needs no network
	$(PYTHON) .ci/dist.py dist

install:         ## the command ubp under PREFIX: two files and a link
	install -d $(DESTDIR)$(PREFIX)/lib/ubp $(DESTDIR)$(PREFIX)/bin
	install -m 644 ubp_x86.py $(DESTDIR)$(PREFIX)/lib/ubp/
	install -m 755 ubp.py $(DESTDIR)$(PREFIX)/lib/ubp/
	ln -sf ../lib/ubp/ubp.py $(DESTDIR)$(PREFIX)/bin/ubp

clean:           ## take out whatever was made here
	rm -rf .venv .venv-* dist tests/.build .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/ready:
	@$(PYTHON) tests/compat.py --venv $(VENV)

.PHONY: help test check oracle bench soak compat dist install clean
