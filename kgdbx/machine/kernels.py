"""Debian's stock cloud kernels with their debug symbols, as data."""

import dataclasses
import json
import re
import tempfile
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.cache import cache_dir, populate
from kgdbx.machine.packages import Package, download, extract, find_versions
from kgdbx.machine.progress import Progress, terminal_progress

__all__ = ("FLAVOURS", "Flavour", "StockKernel", "fetch_kernel", "find_kernel")


@dataclasses.dataclass(frozen=True)
class Flavour:
    """A kernel series that can be fetched by name.

    :ivar name: what it is called here, and how its versions start
    :ivar package: the meta package that depends on the current build of it
    """

    name: str
    package: str = "linux-image-cloud-amd64"


FLAVOURS = (
    Flavour("6.1"),  # Debian 12
    Flavour("6.12"),  # Debian 13, and the backports of Debian 12
)


@dataclasses.dataclass(frozen=True)
class StockKernel:
    """One fetched kernel.

    :ivar name: name of its flavour
    :ivar release: what ``uname -r`` says
    :ivar vmlinuz: image to boot
    :ivar vmlinux: ELF file with symbols and DWARF
    :ivar modules: directory of its modules, ``.ko`` or ``.ko.xz``
    :ivar debug_modules: directory of the same modules' debug symbols, ``.ko``
    """

    name: str
    release: str
    vmlinuz: Path
    vmlinux: Path
    modules: Path
    debug_modules: Path


def find_kernel(name: str) -> StockKernel:
    """A kernel that was fetched before.

    :param name: name of a flavour, such as ``6.1``
    :raises MachineError: if there is no such flavour, or it was not fetched
    """
    _flavour(name)
    record = _directory(name) / "kernel.json"
    if not record.exists():
        raise MachineError(f"kernel {name} is not here yet; run: kgdbx vm fetch {name}")
    return _kernel(name, json.loads(record.read_text())["release"])


def fetch_kernel(name: str, progress: Progress = terminal_progress) -> StockKernel:
    """Download a kernel and its debug symbols, about 310 MB, unless that was done before.

    :param name: name of a flavour, such as ``6.1``
    :raises MachineError: if there is no such flavour, or the mirrors cannot be reached
    """
    flavour = _flavour(name)
    populate(_directory(name), lambda path: _fill(path, flavour, progress))
    return find_kernel(name)


def _fill(path: Path, flavour: Flavour, progress: Progress) -> None:
    image = _resolve(flavour)
    release = image.name.removeprefix("linux-image-")
    debug = dataclasses.replace(image, name=f"{image.name}-dbg")
    with tempfile.TemporaryDirectory(prefix="debs.", dir=cache_dir()) as debs:
        for deb in download([image, debug], Path(debs), progress):
            extract(deb, path)
            deb.unlink()
    (path / "kernel.json").write_text(json.dumps({"release": release, "version": image.version}))
    kernel = _kernel(flavour.name, release, path)
    for file in (kernel.vmlinuz, kernel.vmlinux, kernel.modules, kernel.debug_modules):
        if not file.exists():
            raise MachineError(f"package {image.name} {image.version} has no {file.name}")


# The number in an image's name moves with security updates: the meta package knows it.
def _resolve(flavour: Flavour) -> Package:
    for meta in find_versions(flavour.package):
        if meta.version.startswith(f"{flavour.name}."):
            for name in meta.depends:
                if re.fullmatch(r"linux-image-\d.*", name):
                    return next(p for p in find_versions(name) if p.version == meta.version)
    raise MachineError(
        f"the Debian mirrors have no {flavour.package} {flavour.name}; check the apt sources"
    )


def _kernel(name: str, release: str, root: Path | None = None) -> StockKernel:
    root = root or _directory(name)
    debug = root / "usr/lib/debug"
    return StockKernel(
        name=name,
        release=release,
        vmlinuz=root / f"boot/vmlinuz-{release}",
        vmlinux=debug / f"boot/vmlinux-{release}",
        modules=_modules(root, release),
        debug_modules=_modules(debug, release),
    )


# Debian 13 has them under /usr.
def _modules(root: Path, release: str) -> Path:
    merged = root / "usr/lib/modules" / release
    return merged if merged.exists() else root / "lib/modules" / release


def _directory(name: str) -> Path:
    return cache_dir() / "kernels" / name


def _flavour(name: str) -> Flavour:
    for flavour in FLAVOURS:
        if flavour.name == name:
            return flavour
    known = ", ".join(flavour.name for flavour in FLAVOURS)
    raise MachineError(f"there is no kernel {name}; there are {known}")
