"""Names, directories and the state of VMs, with this process in the place of QEMU."""

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kgdbx.errors import MachineError
from kgdbx.machine import info
from kgdbx.machine.process import start_time


@pytest.fixture(autouse=True)
def _own_runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def _write(name: str, **changes: Any) -> info.VmInfo:
    directory, lock = info.claim_directory(name)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(info.VmInfo):
        values[field.name] = {int: 1, bool: True, str: "x", Path: directory / field.name}[
            field.type
        ]
    pid = os.getpid()
    values |= {"name": name, "directory": directory, "pid": pid, "started": start_time(pid)}
    values |= {"owner_pid": pid, "owner_started": start_time(pid), **changes}
    written = info.VmInfo(**values)
    info.write_info(written)
    os.close(lock)
    return written


def _dead_process() -> dict[str, int]:
    process = subprocess.Popen(["true"])
    process.wait()
    return {"pid": process.pid, "started": 12345}


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "..."])
def test_good_names(name: str) -> None:
    info.validate_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "ä", "a\n"])
def test_bad_names(name: str) -> None:
    with pytest.raises(MachineError, match="is no name for a VM"):
        info.validate_name(name)


def test_state_is_read_back() -> None:
    written = _write("one")
    assert info.read_info("one") == written
    assert info.list_infos() == [written]


def test_unknown_vm_names_those_that_run() -> None:
    _write("one")
    with pytest.raises(MachineError, match="there is no VM two; running: one"):
        info.read_info("two")


def test_name_in_use() -> None:
    _write("one")
    with pytest.raises(MachineError, match="there is a VM one already; take another name"):
        info.claim_directory("one")


def test_dead_vm_is_stale_and_its_name_free() -> None:
    dead = _write("one", **_dead_process())
    assert info.list_infos() == []
    assert _write("one").pid == os.getpid() != dead.pid


def test_same_pid_other_start_time_is_stale() -> None:
    written = _write("one", started=1)
    assert info.list_infos() == []
    assert info.remove_stale() == ["one"]
    assert not written.directory.exists()


def test_a_live_owner_keeps_the_console_of_a_dead_vm() -> None:
    dead = _write("one", **_dead_process())
    _write("two")
    assert dead.directory.exists()
    assert info.remove_stale() == ["one"]


def test_vm_under_construction_is_not_stale() -> None:
    directory, lock = info.claim_directory("one")
    assert info.remove_stale() == []
    os.close(lock)
    assert info.remove_stale() == ["one"]
    assert not directory.exists()


def test_orphan_is_killed_and_removed() -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        orphan = _write("one", pid=process.pid, started=start_time(process.pid), owner_started=1)
        assert orphan.alive
        assert info.remove_stale() == ["one"]
        assert process.wait(5) == -9


def test_long_socket_path() -> None:
    with pytest.raises(MachineError, match=r"Unix allows 107; take a shorter name or set"):
        info.claim_directory("x" * 107)


def test_ram_files_of_two_runtime_directories_differ() -> None:
    assert info.ram_file(Path("/a/one")) != info.ram_file(Path("/b/one"))
