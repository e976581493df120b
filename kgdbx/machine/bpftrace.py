"""Debian's bpftrace for a guest: the program and the libraries that it is linked with.

What the system lacks comes from Debian packages, the rest is the system's own.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.cache import cache_dir, populate
from kgdbx.machine.packages import download_missing, extract
from kgdbx.machine.progress import Progress, terminal_progress

__all__ = ("bpftrace_files", "linked_files")

_LDD_S = 60.0
_LOADER = "lib64/ld-linux-x86-64.so.2"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"  # the loader looks there without being told


def bpftrace_files(progress: Progress = terminal_progress) -> dict[str, Path]:
    """All files that bpftrace needs in a guest, about 200 MiB; fetched once.

    :return: path in the guest to path here, for :func:`~kgdbx.machine.vm.configure`
    :raises MachineError: if the package cannot be fetched, or a library of it is not there
    """
    root = populate(cache_dir() / "bpftrace", lambda path: _fetch(path, progress))
    program = root / "usr/bin/bpftrace"
    if not program.exists():
        raise MachineError(f"no bpftrace in {root}; remove that directory to fetch it again")
    return {"bin/bpftrace": program, **linked_files(program, root)}


def linked_files(program: Path, root: Path) -> dict[str, Path]:
    """The loader and all shared libraries of a program, as the host's ldd(1) finds them.

    :param root: directory of unpacked packages, looked at before the system
    :return: path in the guest to path here
    :raises MachineError: if one is not there, or the program is not a dynamic one
    """
    directories = [str(path) for path in root.glob("**/x86_64-linux-gnu") if path.is_dir()]
    env = {**os.environ, "LC_ALL": "C", "LD_LIBRARY_PATH": ":".join(directories)}
    try:
        done = subprocess.run(
            ["ldd", str(program)], capture_output=True, text=True, env=env, timeout=_LDD_S
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise MachineError(f"ldd does not run: {e}") from e
    if done.returncode != 0:
        raise MachineError(f"ldd {program} failed: {done.stdout.strip()} {done.stderr.strip()}")
    missing = re.findall(r"^\s*(\S+) => not found", done.stdout, re.MULTILINE)
    if missing:
        raise MachineError(f"{program} needs {', '.join(missing)}; remove {root} to fetch it again")
    paths = [Path(path) for path in re.findall(r"(/\S+) \(0x", done.stdout)]
    return {
        _LOADER if path.name == Path(_LOADER).name else f"{_LIBRARIES}/{path.name}": path
        for path in paths
    }


def _fetch(path: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="debs.", dir=cache_dir()) as debs:
        for deb in download_missing(["bpftrace"], Path(debs), progress):
            extract(deb, path)
            deb.unlink()
