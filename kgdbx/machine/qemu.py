"""Find a QEMU that is new enough: the system's own, or one unpacked in the cache."""

import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.cache import cache_dir, populate
from kgdbx.machine.packages import download_missing, extract
from kgdbx.machine.progress import Progress, terminal_progress

__all__ = ("Qemu", "find_qemu")

_BINARY = "qemu-system-x86_64"
# The first with migration to `file:`, which snapshots use.
_OLDEST = (8, 2)
_PROBE_S = 20.0


@dataclasses.dataclass(frozen=True)
class Qemu:
    """One QEMU and what it needs to run.

    :ivar version: such as (10, 0, 2)
    :ivar env: environment variables to add
    :ivar data_dirs: directories of firmware, for ``-L``
    """

    path: Path
    version: tuple[int, ...]
    env: tuple[tuple[str, str], ...] = ()
    data_dirs: tuple[Path, ...] = ()

    def argv(self) -> list[str]:
        """The start of a command line."""
        return [str(self.path), *(word for d in self.data_dirs for word in ("-L", str(d)))]

    def environment(self) -> dict[str, str]:
        """The whole environment to run it with."""
        return {**os.environ, **dict(self.env)}

    def tool(self, name: str) -> Path:
        """A program that belongs to this QEMU, such as ``qemu-img``.

        :raises MachineError: if it is not installed beside it
        """
        path = self.path.parent / name
        if not path.exists():
            raise MachineError(f"no {name} beside {self.path}; install the package qemu-utils")
        return path


def find_qemu(progress: Progress = terminal_progress) -> Qemu:
    """The system's QEMU if it is new enough, otherwise one from Debian's backports in the cache.

    :raises MachineError: if neither is there and none can be fetched
    """
    system = shutil.which(_BINARY)
    if system is not None:
        qemu = Qemu(Path(system), _version(Path(system), ()))
        if qemu.version >= _OLDEST:
            return qemu
    root = populate(cache_dir() / "qemu", lambda path: _fill(path, progress))
    return _unpacked(root)


def _fill(path: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="debs.", dir=cache_dir()) as debs:
        for deb in download_missing(["qemu-system-x86", "qemu-utils"], Path(debs), progress):
            extract(deb, path)
            deb.unlink()
    _unpacked(path)


def _unpacked(root: Path) -> Qemu:
    libraries = [d for d in root.glob("**/x86_64-linux-gnu") if d.is_dir() and any(d.glob("*.so*"))]
    system_libraries = os.environ.get("LD_LIBRARY_PATH", "")
    search = [*map(str, libraries), *filter(None, system_libraries.split(":"))]
    env = (
        ("LD_LIBRARY_PATH", ":".join(search)),
        ("QEMU_MODULE_DIR", str(root / "usr/lib/x86_64-linux-gnu/qemu")),
    )
    share = root / "usr/share"
    # Not /usr/lib/ipxe: without a network card no boot ROM is needed.
    data_dirs = (share / "qemu", share / "seabios")
    path = root / "usr/bin" / _BINARY
    if not path.exists():
        raise MachineError(f"no {_BINARY} in {root}; remove that directory to fetch it again")
    return Qemu(path, _version(path, env), env, data_dirs)


# Running it also shows that every library is there.
def _version(path: Path, env: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
    done = subprocess.run(
        [str(path), "--version"],
        capture_output=True,
        text=True,
        env={**os.environ, **dict(env)},
        timeout=_PROBE_S,
    )
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", done.stdout)
    if done.returncode != 0 or match is None:
        raise MachineError(
            f"{path} does not run; install it again, or remove it from the cache: "
            f"{done.stderr.strip()}"
        )
    return tuple(int(part) for part in match.groups())
