"""Test modules: one C file each, built with a stock kernel's headers, or what a build here left."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.cache import cache_dir, populate
from kgdbx.machine.kernels import StockKernel
from kgdbx.machine.kgdb_kernel import KGDB_KERNEL, get_kernel, kgdb_build_tree
from kgdbx.machine.packages import Package, download, extract, find_versions
from kgdbx.machine.progress import Progress, terminal_progress

__all__ = ("KMOD_DIRECTORY", "build_kmod", "fetch_build_tree")

KMOD_DIRECTORY = Path(__file__).resolve().parents[2] / "vm" / "kmod"
"""Where the test modules' sources are."""

_BUILD_S = 300.0
_FORMAT = 1
_SAID = 4000  # characters of what make says
# What is the host's business, not the package's: its compiler, and no BTF, which takes pahole.
_VARIABLES = ("CC=gcc", "HOSTCC=gcc", "CONFIG_DEBUG_INFO_BTF_MODULES=")


def build_kmod(
    kernel: StockKernel | str, source: str | Path, progress: Progress = terminal_progress
) -> Path:
    """Build a module from one C file, once per content and kernel.

    :param kernel: a kernel or the name of its flavour, such as ``6.1``, or ``kgdb``
    :param source: a C file, or the name of one in ``vm/kmod`` without ``.c``
    :return: the ``.ko`` with its debug information; ``files={"/NAME.ko": path}`` of
        :func:`~kgdbx.machine.vm.configure` puts it into a guest, and
        ``session.kernel.modules.add_debug_file(path)`` makes its symbols known
    :raises MachineError: if there is no such file, the compiler refuses it, or the kernel's
        headers cannot be had
    """
    kernel = get_kernel(kernel, progress) if isinstance(kernel, str) else kernel
    path = source if isinstance(source, Path) else KMOD_DIRECTORY / f"{source}.c"
    try:
        text = path.read_bytes()
    except OSError as e:
        raise MachineError(f"cannot read the module's source {path}: {e.strerror}") from e
    tree = fetch_build_tree(kernel, progress)
    # There may be several kernels of one release that were built here, each in its own directory.
    of = f"{_FORMAT} {kernel.release} "
    of += kernel.vmlinux.parent.name if kernel.name == KGDB_KERNEL else ""
    key = hashlib.sha256(of.encode() + text).hexdigest()[:16]
    directory = cache_dir() / "kmod" / f"{path.stem}-{key}"
    populate(directory, lambda scratch: _build(scratch, tree, path.stem, text))
    return directory / f"{path.stem}.ko"


def fetch_build_tree(kernel: StockKernel, progress: Progress = terminal_progress) -> Path:
    """The directory to build a kernel's modules in, fetched once.

    :raises MachineError: if the mirrors do not have the headers of this kernel
    """
    if kernel.name == KGDB_KERNEL:
        return kgdb_build_tree(kernel)
    root = cache_dir() / "build" / kernel.release
    populate(root, lambda scratch: _fetch(scratch, root, kernel, progress))
    return root / f"usr/src/linux-headers-{kernel.release}"


def _fetch(scratch: Path, root: Path, kernel: StockKernel, progress: Progress) -> None:
    headers = _package(f"linux-headers-{kernel.release}", None)
    parts = [
        _package(name, headers.version)
        for name in headers.depends
        if name.endswith("-common") or name.startswith("linux-kbuild-")
    ]
    with tempfile.TemporaryDirectory(prefix="debs.", dir=cache_dir()) as debs:
        for deb in download([headers, *parts], Path(debs), progress):
            extract(deb, scratch)
    makefile = scratch / f"usr/src/linux-headers-{kernel.release}/Makefile"
    # Debian's says where its other half is, if it is installed.
    makefile.write_text(makefile.read_text().replace(" /usr/src/", f" {root}/usr/src/"))


def _package(name: str, version: str | None) -> Package:
    for package in find_versions(name):
        if version in (None, package.version):
            return package
    raise MachineError(f"the Debian mirrors have no {name} {version}; check the apt sources")


def _build(scratch: Path, tree: Path, name: str, text: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="kmod.", dir=cache_dir()) as work:
        directory = Path(work)
        (directory / f"{name}.c").write_bytes(text)
        (directory / "Makefile").write_text(f"obj-m := {name}.o\n")
        argv = ["make", "-s", "-C", str(tree), f"M={directory}", *_VARIABLES, "modules"]
        done = _run(argv)
        if done.returncode != 0:
            said = (done.stderr or done.stdout)[-_SAID:]
            raise MachineError(f"module {name} does not build: {said}")
        shutil.copy(directory / f"{name}.ko", scratch)


def _run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    # What a make that we run under says to its children is not for this one.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    try:
        return subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=_BUILD_S, env=env
        )
    except FileNotFoundError as e:
        raise MachineError(f"no {argv[0]} on this machine; run: make setup") from e
    except subprocess.TimeoutExpired as e:
        raise MachineError(f"{argv[0]} did not end within {_BUILD_S:g} s") from e
