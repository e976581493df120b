"""The cache fills whole or not at all; private directories are private."""

import threading
from pathlib import Path

import pytest

from kgdbx.errors import MachineError
from kgdbx.machine.cache import cache_dir, locked, populate, runtime_dir, wait_until


def test_cache_dir_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "kgdbx"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache/kgdbx"


def test_populate_once_by_many(tmp_path: Path) -> None:
    calls = []

    def fill(path: Path) -> None:
        calls.append(path)
        (path / "file").write_text("whole")

    threads = [threading.Thread(target=populate, args=(tmp_path / "x", fill)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (tmp_path / "x/file").read_text() == "whole"


def test_populate_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        (path / "half").touch()
        raise MachineError("no network")

    with pytest.raises(MachineError, match="no network"):
        populate(tmp_path / "x", fill)
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


def test_populate_on_a_full_disk(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        (path / "half").touch()
        Path("/dev/full").write_text("no room")

    with pytest.raises(MachineError, match=r"cannot make /.*/x: .*No space left on device"):
        populate(tmp_path / "x", fill)
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


def test_cache_dir_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(MachineError, match=r"cannot make .*: Not a directory; set XDG_CACHE_HOME"):
        cache_dir()


def test_populate_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / ".x.abcd1234").mkdir()
    populate(tmp_path / "x", lambda path: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.lock", "x"]


def test_lock_has_a_deadline(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock"),
        pytest.raises(MachineError, match=r"cannot lock .*lock within 0\.05 s"),
        locked(tmp_path / "lock", timeout_s=0.05),
    ):
        pass


def test_runtime_dir_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = runtime_dir()
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o755)
    with pytest.raises(MachineError, match=r"open to other users; run: chmod 700 "):
        runtime_dir()


def test_runtime_dir_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "kgdbx").symlink_to(tmp_path)
    with pytest.raises(MachineError, match="is not a directory of this user; remove it"):
        runtime_dir()


def test_wait_until() -> None:
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), 5)
    assert not wait_until(lambda: False, 0.01)
