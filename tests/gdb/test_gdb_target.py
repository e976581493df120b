"""The gdb transport, in a real gdb."""

from collections.abc import Callable
from pathlib import Path

import pytest

CONTRACT = Path(__file__).parent.parent / "contract" / "test_target.py"
VM_TESTS = Path(__file__).parent.parent / "vm"
INSIDE_DOORBELL = Path(__file__).parent / "inside_gdb_doorbell.py"
INSIDE = Path(__file__).parent / "inside_gdb_target.py"


def test_the_contract_holds_in_gdb(in_gdb: Callable) -> None:
    done = in_gdb(CONTRACT, timeout_s=360)
    assert not done.failed, "\n\n".join(f"{n}:\n{t}" for n, t in done.failed.items())
    assert len(done.passed) >= 50


def test_what_only_gdb_has(in_gdb: Callable) -> None:
    done = in_gdb(INSIDE, timeout_s=360)
    assert not done.failed, "\n\n".join(f"{n}:\n{t}" for n, t in done.failed.items())
    assert len(done.passed) >= 5


@pytest.mark.timeout(620)
def test_doorbells_and_watches_in_gdb(in_gdb: Callable) -> None:
    # The whole of these files passes; here is what has most to do with how gdb goes on.
    names = (
        "resident/test_doorbell.py::test_each_hit_once[6.12]",
        "probes/test_watch.py::test_access_by_the_instruction_under_a_breakpoint[True]",
    )
    for wanted in ([f"{VM_TESTS}/{name}" for name in names], [INSIDE_DOORBELL]):
        done = in_gdb(*wanted, timeout_s=300)
        assert not done.failed, "\n\n".join(f"{n}:\n{t}" for n, t in done.failed.items())
        assert len(done.passed) >= 2


def test_a_failure_in_gdb_is_seen(in_gdb: Callable, tmp_path: Path) -> None:
    path = tmp_path / "test_planted.py"
    path.write_text("def test_planted():\n    assert 1 == 2\n")
    done = in_gdb(path)
    assert list(done.failed) == ["test_planted"]
    assert done.passed == ()
