"""Tests that run inside a real gdb."""

import dataclasses
import json
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from kgdbx.gdb_launch import gdb_argv

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclasses.dataclass(frozen=True)
class InGdb:
    """What a pytest in gdb did.

    :ivar passed: names of the tests that passed
    :ivar failed: text by name of those that did not
    """

    passed: tuple[str, ...]
    failed: dict[str, str]


@pytest.fixture
def in_gdb(tmp_path: Path) -> Callable[..., InGdb]:
    """Function that runs tests inside gdb: ``in_gdb(*arguments, timeout_s=120)``."""

    def run(*arguments: str | Path, timeout_s: float = 120) -> InGdb:
        junit = tmp_path / "junit.xml"
        junit.unlink(missing_ok=True)
        options = ["-q", "-p", "no:cacheprovider", "-o", "timeout_method=thread"]
        options += ["-W", "ignore:GdbRemoveReadlineFinder:ImportWarning"]  # gdb's own
        args = [*map(str, arguments), *options, f"--junit-xml={junit}", f"--rootdir={ROOT}"]
        done = subprocess.run(
            [*gdb_argv(), "-batch", "-x", str(HERE / "pytest_in_gdb.py")],
            env=os.environ | {"KGDBX_ARGS": json.dumps(args)},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert junit.exists(), f"gdb left no results, status {done.returncode}:\n{done.stdout}"
        assert done.returncode in (0, 1), f"gdb crashed:\n{done.stdout}"
        return _read(junit)

    return run


def _read(junit: Path) -> InGdb:
    passed, failed = [], {}
    for case in ElementTree.parse(junit).iter("testcase"):
        name = case.get("name", "")
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            failed[name] = "\n".join(child.text or child.get("message", "") for child in bad)
        elif case.find("skipped") is None:
            passed.append(name)
    return InGdb(tuple(passed), failed)
