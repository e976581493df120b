"""Runs pytest inside gdb: ``gdb -nx -batch -x pytest_in_gdb.py``, arguments as JSON in KGDBX_ARGS.

gdb's exit status says nothing about the tests; their JUnit XML does.
"""

import json
import os
import sys

import gdb
import pytest

# gdb's streams have no file descriptor.
sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
status = pytest.main(json.loads(os.environ["KGDBX_ARGS"]))
sys.stdout.flush()
gdb.execute(f"quit {int(status)}")
