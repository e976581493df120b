"""The guest's root file system: busybox, the exec agent, the workloads, and what is asked for."""

import hashlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.cache import cache_dir, populate
from kgdbx.machine.guest_modules import modules_tree
from kgdbx.machine.kernels import StockKernel
from kgdbx.machine.packages import download, extract, find_versions
from kgdbx.machine.progress import Progress, terminal_progress

__all__ = ("GUEST_FILES", "build_initramfs", "compile_static", "pack_cpio")

GUEST_FILES = Path(__file__).resolve().parents[2] / "vm"
"""Where the sources of what runs in guests are."""

_CFLAGS = ("-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror")
_COMPILE_S = 120.0


def build_initramfs(
    kernel: StockKernel,
    modules: Sequence[str] = (),
    files: Mapping[str, Path] | None = None,
    progress: Progress = terminal_progress,
) -> Path:
    """Pack an initramfs; the same content gives the same file.

    :param modules: modules that ``modprobe`` shall find in the guest, their dependencies come too
    :param files: more files, path in the guest to path here
    :return: an uncompressed cpio archive, named by its SHA-256
    :raises MachineError: if a module or file is not there, or a workload does not compile
    """
    tree: dict[str, bytes | str] = dict(_busybox(progress))
    tree["init"] = _guest_file("init").read_bytes()
    tree["sbin/agent"] = compile_static(_guest_file("agent.c")).read_bytes()
    for source in sorted((GUEST_FILES / "workload").glob("*.c")):
        tree[f"bin/{source.stem}"] = compile_static(source).read_bytes()
    tree["etc/hostname"] = b"kgdbx\n"
    tree.update(modules_tree(kernel, modules))
    modes: dict[str, int] = {}
    for name, path in (files or {}).items():
        try:
            tree[name.lstrip("/")] = path.read_bytes()
            modes[name.lstrip("/")] = stat.S_IMODE(path.stat().st_mode)
        except OSError as e:
            raise MachineError(f"cannot pack {path} into the guest: {e.strerror}") from e
    archive = pack_cpio(tree, modes)
    digest = hashlib.sha256(archive).hexdigest()
    directory = cache_dir() / "initramfs" / digest[:16]
    return populate(directory, lambda p: _write(p / "initramfs.cpio", archive)) / "initramfs.cpio"


def pack_cpio(tree: Mapping[str, bytes | str], modes: Mapping[str, int] | None = None) -> bytes:
    """A cpio archive in the ``newc`` format, with every directory that the names need.

    :param tree: name to content; a ``str`` is the target of a symbolic link
    :param modes: permission bits of some names; others get 0755
    """
    parents = {str(p) for name in tree for p in Path(name).parents} - {"."}
    empty = {"dev", "proc", "sys", "tmp", "root", "run", "etc"}
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in parents | empty]
    for name, content in tree.items():
        if isinstance(content, str):
            entries.append((name, stat.S_IFLNK | 0o777, content.encode()))
        else:
            entries.append((name, stat.S_IFREG | (modes or {}).get(name, 0o755), content))
    # /init cannot open its standard streams without this node: devtmpfs is not mounted yet.
    entries.append(("dev/console", stat.S_IFCHR | 0o600, b""))
    records = [_record(i, *entry) for i, entry in enumerate(sorted(entries), 1)]
    return b"".join([*records, _record(0, "TRAILER!!!", 0, b"")])


def compile_static(source: Path) -> Path:
    """Compile one C file to a static program with the host's gcc, once per content.

    :raises MachineError: if there is no gcc or it refuses the file
    """
    key = hashlib.sha256(source.read_bytes() + " ".join(_CFLAGS).encode()).hexdigest()[:16]
    directory = cache_dir() / "workload" / f"{source.stem}-{key}"

    def build(path: Path) -> None:
        argv = ["gcc", *_CFLAGS, "-o", str(path / source.stem), str(source)]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_COMPILE_S)
        except FileNotFoundError as e:
            raise MachineError("no gcc on this machine; run: make setup") from e
        if done.returncode != 0:
            raise MachineError(f"gcc refuses {source}: {done.stderr.strip()}")

    return populate(directory, build) / source.stem


def _record(inode: int, name: str, mode: int, content: bytes) -> bytes:
    device = (5, 1) if stat.S_ISCHR(mode) else (0, 0)
    links = 2 if stat.S_ISDIR(mode) else 1
    encoded = os.fsencode(name) + b"\0"
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _pad(header + encoded) + _pad(content)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _busybox(progress: Progress) -> dict[str, bytes | str]:
    def fill(path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="debs.", dir=cache_dir()) as debs:
            newest = find_versions("busybox-static")[0]
            for deb in download([newest], Path(debs), progress):
                extract(deb, path)

    root = populate(cache_dir() / "busybox", fill)
    binary = next((p for p in (root / "bin/busybox", root / "usr/bin/busybox") if p.exists()), None)
    if binary is None:
        raise MachineError(f"no busybox in {root}; remove that directory to fetch it again")
    listed = subprocess.run(
        [str(binary), "--list"], capture_output=True, text=True, timeout=_COMPILE_S
    )
    tree: dict[str, bytes | str] = {f"bin/{name}": "busybox" for name in listed.stdout.split()}
    tree["bin/busybox"] = binary.read_bytes()
    return tree


def _guest_file(name: str) -> Path:
    path = GUEST_FILES / name
    if not path.exists():
        raise MachineError(f"no {path}; install kgdbx from its source tree: pip install -e .")
    return path


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
