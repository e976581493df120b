"""What the program says without a kernel: its version, wrong use, and what it frees."""

import importlib.metadata
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kgdbx.cli import main
from kgdbx.machine import cache


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def empty_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories of this test's own in the place of /dev/shm and the user's."""
    for name, folder in (("XDG_CACHE_HOME", "cache"), ("XDG_RUNTIME_DIR", "run")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setattr(cache, "_SHM", tmp_path)
    monkeypatch.setattr(cache, "_SHM_BYTES", 0)
    return tmp_path


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"kgdbx {importlib.metadata.version('kgdbx')}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["vm", "stop"], 2, "name the VMs to stop, or use --all"),
        (["vm", "stop", "a"], 3, "there is no VM a; running: none"),
        (["vm", "stop", "../a"], 3, "is no name for a VM"),
        (["vm", "exec", "a"], 2, "give a command to run"),
        (["vm", "run", "--file", "x"], 2, "--file 'x' is not GUEST=HOST"),
        (["probe", "p x"], 2, "name a kernel: --vm NAME, or --connect ADDRESS --vmlinux FILE"),
        (["probe", "--vm", "a"], 2, "give a probe definition, or a script with -s"),
        (["probe", "--vm", "a", "p x"], 3, "there is no VM a; running: none"),
        (["probe", "--connect", "/x", "p x"], 2, "give the vmlinux with debug symbols"),
        (["probe", "--connect", "/x", "--vmlinux", "/x", "p x"], 3, "cannot connect to /x"),
        (["probe", "--connect", "/x", "p x", "-e", "ls"], 2, "--exec needs a VM of ours"),
    ],
)
def test_wrong_use(
    empty_host: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    says: str,
) -> None:
    assert main(arguments) == status
    written = capsys.readouterr()
    assert written.err.startswith("kgdbx: ")
    assert says in written.err
    assert not written.out


def test_clean(empty_host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    templates = cache.ram_dir() / "templates"
    for name in ("one", "two"):
        (templates / name).mkdir(parents=True)
        (templates / name / "ram").write_bytes(b"x")
    dead = cache.runtime_dir() / "vms" / "dead"
    dead.mkdir(parents=True)
    assert main(["vm", "clean"]) == 0
    assert "removed 2 templates, and 1 dead VMs" in capsys.readouterr().err
    assert not dead.exists()
    assert not list(templates.iterdir())


def test_nohup_is_heeded(empty_host: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert main(["vm", "stop"]) == 2
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
