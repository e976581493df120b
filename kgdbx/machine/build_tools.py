"""What a kernel build needs of the host, unpacked into the cache and not installed."""

import os
import tempfile
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.cache import cache_dir, populate
from kgdbx.machine.packages import download_missing, extract
from kgdbx.machine.progress import Progress

__all__ = ("build_environment",)

_PACKAGES = ("bc", "bison", "flex", "libelf-dev", "m4", "xz-utils")
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_LIBELF = "libelf.so.1"


def build_environment(progress: Progress) -> dict[str, str]:
    """The environment in which ``make`` builds a kernel; fetches about 6 MB the first time.

    :raises MachineError: if the packages cannot be had
    """
    root = populate(cache_dir() / "build-tools", lambda path: _fill(path, progress))
    usr = root / "usr"
    # The kernel's makefiles pass their own variables on to tools/objtool, so the compiler's are
    # what finds libelf there. They do not reach the kernel itself: it has -nostdinc.
    return {
        **os.environ,
        "LC_ALL": "C",
        "PATH": f"{usr / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        "BISON_PKGDATADIR": str(usr / "share/bison"),
        "M4": str(usr / "bin/m4"),
        "C_INCLUDE_PATH": str(usr / "include"),
        "LIBRARY_PATH": str(root / "link"),
        "LD_RUN_PATH": str(_libelf(root).parent),
        "LD_LIBRARY_PATH": str(root / _LIBRARIES),
        # The same sources give the same kernel.
        "KBUILD_BUILD_TIMESTAMP": "@0",
        "KBUILD_BUILD_USER": "kgdbx",
        "KBUILD_BUILD_HOST": "kgdbx",
    }


def _fill(path: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="debs.", dir=cache_dir()) as debs:
        for deb in download_missing(_PACKAGES, Path(debs), progress):
            extract(deb, path)
            deb.unlink()
    # The library itself is the system's, if that has it already.
    link = path / "link"
    link.mkdir()
    found = _libelf(path)
    ours = found.is_relative_to(path)
    # The directory that is filled here gets another name when it is whole.
    target = Path("..") / _LIBRARIES / _LIBELF if ours else found
    (link / "libelf.so").symlink_to(target)


def _libelf(root: Path) -> Path:
    for path in (root / _LIBRARIES / _LIBELF, Path("/") / _LIBRARIES / _LIBELF):
        if path.exists():
            return path
    raise MachineError(f"no {_LIBELF} in {root}; remove that directory to fetch it again")
