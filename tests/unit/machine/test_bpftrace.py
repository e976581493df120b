"""What a program is linked with, found for a guest that has nothing."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kgdbx.errors import MachineError
from kgdbx.machine.bpftrace import linked_files

_LOADER = "lib64/ld-linux-x86-64.so.2"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


def _gcc(*arguments: str) -> None:
    subprocess.run(["gcc", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that needs libplanted.so, of an unpacked package, and the system's libc."""
    directory = tmp_path / "root" / _LIBRARIES
    directory.mkdir(parents=True)
    (tmp_path / "planted.c").write_text("int planted(void) { return 0; }\n")
    (tmp_path / "main.c").write_text("int planted(void); int main(void) { return planted(); }\n")
    library = directory / "libplanted.so"
    _gcc("-shared", "-fPIC", "-o", str(library), str(tmp_path / "planted.c"))
    # By its name alone, as programs of packages are linked.
    _gcc("-o", str(tmp_path / "main"), str(tmp_path / "main.c"), f"-L{directory}", "-lplanted")
    return tmp_path / "main"


def test_all_that_it_needs_runs_it(program: Path, tmp_path: Path) -> None:
    files = linked_files(program, tmp_path / "root")
    assert set(files) == {_LOADER, f"{_LIBRARIES}/libplanted.so", f"{_LIBRARIES}/libc.so.6"}
    assert files[f"{_LIBRARIES}/libplanted.so"] == tmp_path / "root" / _LIBRARIES / "libplanted.so"
    guest = tmp_path / "guest"
    for name, path in files.items():
        (guest / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, guest / name)
    (guest / _LOADER).chmod(0o755)
    loader = [str(guest / _LOADER), "--library-path", str(guest / _LIBRARIES), str(program)]
    subprocess.run(loader, check=True, timeout=60)


def test_what_is_missing_is_named(program: Path, tmp_path: Path) -> None:
    (tmp_path / "root" / _LIBRARIES / "libplanted.so").unlink()
    with pytest.raises(MachineError, match=r"main needs libplanted\.so; remove .*root to fetch"):
        linked_files(program, tmp_path / "root")
