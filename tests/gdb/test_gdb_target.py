"""The gdb transport, in a real gdb."""

from collections.abc import Callable
from pathlib import Path

import pytest

CONTRACT = Path(__file__).parent.parent / "contract" / "test_target.py"
INSIDE = Path(__file__).parent / "inside_gdb_target.py"


@pytest.mark.timeout(400)
def test_the_contract_holds_in_gdb(in_gdb: Callable) -> None:
    done = in_gdb(CONTRACT, timeout_s=360)
    assert not done.failed, "\n\n".join(f"{n}:\n{t}" for n, t in done.failed.items())
    assert len(done.passed) >= 50


@pytest.mark.timeout(400)
def test_what_only_gdb_has(in_gdb: Callable) -> None:
    done = in_gdb(INSIDE, timeout_s=360)
    assert not done.failed, "\n\n".join(f"{n}:\n{t}" for n, t in done.failed.items())
    assert len(done.passed) >= 5


def test_a_failure_in_gdb_is_seen(in_gdb: Callable, tmp_path: Path) -> None:
    path = tmp_path / "test_planted.py"
    path.write_text("def test_planted():\n    assert 1 == 2\n")
    done = in_gdb(path)
    assert list(done.failed) == ["test_planted"]
    assert done.passed == ()
