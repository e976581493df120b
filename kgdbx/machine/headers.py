"""``vmlinux.h``: a kernel's own types as C, from the BTF in its file, by bpftool."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

from kgdbx.errors import MachineError
from kgdbx.machine.cache import cache_dir, populate
from kgdbx.machine.packages import download_missing, extract
from kgdbx.machine.progress import Progress, terminal_progress

__all__ = ("kernel_header",)

_HEADER = "vmlinux.h"
_BPFTOOL_S = 120.0
_SEARCH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"


def kernel_header(
    vmlinux: Path, build_id: str, progress: Progress = terminal_progress
) -> Path | None:
    """The header with the types of a kernel, made once for each.

    :param vmlinux: its ELF file
    :param build_id: of that file, hexadecimal
    :return: None if the file has no BTF
    :raises MachineError: if there is no bpftool and none can be fetched, or it fails
    """
    path = cache_dir() / "headers" / build_id
    if not path.exists():
        with vmlinux.open("rb") as file:
            if ELFFile(file).get_section_by_name(".BTF") is None:
                return None
        populate(path, lambda scratch: _fill(scratch, vmlinux, progress))
    return path / _HEADER


def _fill(scratch: Path, vmlinux: Path, progress: Progress) -> None:
    tool, env = _bpftool(progress)
    text = _run([str(tool), "btf", "dump", "file", str(vmlinux), "format", "c"], env)
    # What gcc has to say about it is not the user's business.
    (scratch / _HEADER).write_text(f"#pragma GCC system_header\n{text}", encoding="utf-8")


def _bpftool(progress: Progress) -> tuple[Path, dict[str, str]]:
    # The system's own, unless it is the script that wants the running kernel's, or one from Debian.
    system = shutil.which("bpftool", path=_SEARCH)
    if system is not None and _runs(system):
        return Path(system), {}
    root = populate(cache_dir() / "bpftool", lambda path: _fetch(path, progress))
    libraries = [str(d) for d in root.glob("**/x86_64-linux-gnu") if any(d.glob("*.so*"))]
    env = {"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {}
    for tool in (root / "usr/sbin/bpftool", root / "usr/bin/bpftool"):
        if tool.exists():
            return tool, env
    raise MachineError(f"no bpftool in {root}; remove that directory to fetch it again")


def _runs(tool: str) -> bool:
    try:
        _run([tool, "version"], {})
    except MachineError:
        return False
    return True


def _fetch(path: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="debs.", dir=cache_dir()) as debs:
        for deb in download_missing(["bpftool"], Path(debs), progress):
            extract(deb, path)
            deb.unlink()


def _run(argv: list[str], env: dict[str, str]) -> str:
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **env},
            timeout=_BPFTOOL_S,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise MachineError(f"{argv[0]} does not run: {e}") from e
    if done.returncode != 0:
        raise MachineError(f"{argv[0]} {argv[1]} failed: {done.stderr.strip()}")
    return done.stdout
