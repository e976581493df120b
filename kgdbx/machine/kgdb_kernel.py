"""The KGDB kernel: Debian's source with ``vm/kgdb.config``, as no stock kernel has KGDB."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.build_tools import build_environment
from kgdbx.machine.build_tree import keep_build_tree
from kgdbx.machine.cache import cache_dir, populate, wait_until
from kgdbx.machine.kernels import StockKernel, fetch_kernel
from kgdbx.machine.packages import Package, download, extract, find_versions
from kgdbx.machine.progress import Progress, terminal_count, terminal_progress

__all__ = ("KGDB_KERNEL", "build_kgdb_kernel", "get_kernel", "get_kgdb_kernel", "kgdb_build_tree")

KGDB_KERNEL = "kgdb"
"""What the kernel is called among those of ``kgdbx vm run --kernel``."""

_SOURCE = "linux-source-6.1"
_CONFIG = Path(__file__).resolve().parents[2] / "vm" / "kgdb.config"
_RECIPE = "2"  # counts changes of how it is built
_BUILD_S = 3600.0
_BUILD_TREE = "build"


def get_kernel(name: str, progress: Progress = terminal_progress) -> StockKernel:
    """A stock kernel or the KGDB kernel, fetched or built if it is not here.

    :param name: name of a flavour, such as ``6.1``, or :data:`KGDB_KERNEL`
    :raises MachineError: if there is no such kernel, or it cannot be had
    """
    return get_kgdb_kernel(progress) if name == KGDB_KERNEL else fetch_kernel(name, progress)


def get_kgdb_kernel(progress: Progress = terminal_progress) -> StockKernel:
    """The newest KGDB kernel that was built with this configuration, or else a fresh one.

    :raises MachineError: if it has to be built and that fails
    """
    built = sorted(_root().glob(f"{_prefix()}*"), key=lambda path: path.stat().st_mtime)
    return _kernel(built[-1]) if built else build_kgdb_kernel(progress)


def build_kgdb_kernel(progress: Progress = terminal_progress) -> StockKernel:
    """Build the KGDB kernel of the newest source that the mirrors have, unless that was done.

    :raises MachineError: if the source cannot be had or does not build
    """
    source = find_versions(_SOURCE)[0]
    directory = _root() / f"{_prefix()}{source.version.replace(':', '_')}"
    return _kernel(populate(directory, lambda path: _fill(path, source, progress)))


def kgdb_build_tree(kernel: StockKernel) -> Path:
    """The directory to build modules of a KGDB kernel in."""
    return kernel.vmlinux.parent / _BUILD_TREE


def _fill(path: Path, source: Package, progress: Progress) -> None:
    environment = build_environment(progress)
    with tempfile.TemporaryDirectory(prefix="kernel.", dir=cache_dir()) as scratch:
        tree = _unpack(source, Path(scratch), environment, progress)
        _configure(tree, environment)
        _make(tree, environment)
        _keep(tree, path, source.version)


def _keep(tree: Path, path: Path, version: str) -> None:
    release = (tree / "include/config/kernel.release").read_text().strip()
    (path / "modules").mkdir()
    keep_build_tree(tree, path / _BUILD_TREE)
    shutil.move(tree / "arch/x86/boot/bzImage", path / "vmlinuz")
    for name in ("vmlinux", ".config"):
        shutil.move(tree / name, path / name.lstrip("."))
    record = {"release": release, "version": version}
    (path / "kernel.json").write_text(json.dumps(record))


def _unpack(
    source: Package, scratch: Path, environment: dict[str, str], progress: Progress
) -> Path:
    for deb in download([source], scratch / "debs", progress):
        extract(deb, scratch)
        deb.unlink()
    archive = scratch / "usr/src" / f"{_SOURCE}.tar.xz"
    if not archive.exists():
        raise MachineError(f"package {source.name} {source.version} has no {archive.name}")
    _run(["tar", "--extract", f"--file={archive}", f"--directory={scratch}"], scratch, environment)
    archive.unlink()
    return scratch / _SOURCE


def _configure(tree: Path, environment: dict[str, str]) -> None:
    _run(["make", "tinyconfig"], tree, environment)
    with (tree / ".config").open("a") as config:
        config.write(_CONFIG.read_text())
    _run(["make", "olddefconfig"], tree, environment)
    have = (tree / ".config").read_text().splitlines()
    missing = [line for line in _wanted() if line not in have]
    if missing:
        raise MachineError(f"the kernel's configuration lacks {', '.join(missing)}; see {_CONFIG}")


def _make(tree: Path, environment: dict[str, str]) -> None:
    log = tree / "build.log"
    jobs = len(os.sched_getaffinity(0))
    with (
        log.open("wb") as output,
        subprocess.Popen(
            ["make", f"-j{jobs}", "bzImage", "modules"],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        ) as process,
    ):

        def ended() -> bool:
            status = process.poll()
            done = log.read_bytes().count(b"\n")  # make says a line a file
            terminal_count("steps of building the kernel", done, ended=status is not None)
            return status is not None

        try:
            in_time = wait_until(ended, _BUILD_S, longest_pause_s=0.5)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the compilers
    if not in_time or process.returncode:
        raise MachineError(f"the kernel does not build: {_tail(log)}")


def _kernel(path: Path) -> StockKernel:
    return StockKernel(
        name=KGDB_KERNEL,
        release=json.loads((path / "kernel.json").read_text())["release"],
        vmlinuz=path / "vmlinuz",
        vmlinux=path / "vmlinux",
        modules=path / "modules",
        debug_modules=path / "modules",
    )


def _wanted() -> list[str]:
    lines = (line.strip() for line in _CONFIG.read_text().splitlines())
    return [line for line in lines if line.startswith("CONFIG_") and not line.endswith("=n")]


# Comments of the configuration make no other kernel.
def _prefix() -> str:
    key = "\n".join([_RECIPE, *(s for s in _CONFIG.read_text().split("\n") if s[:1] != "#")])
    return f"{KGDB_KERNEL}-{hashlib.sha256(key.encode()).hexdigest()[:12]}-"


def _root() -> Path:
    root = cache_dir() / "kernels"
    root.mkdir(exist_ok=True)
    return root


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "error:" in line.lower() or "***" in line]
    return "\n".join(errors[:8] or lines[-8:])


def _run(argv: list[str], directory: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        argv,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_BUILD_S,
    )
    if done.returncode != 0:
        raise MachineError(f"{' '.join(argv[:2])} failed: {done.stderr.strip()[-800:]}")
