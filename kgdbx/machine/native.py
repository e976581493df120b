"""C files of kgdbx's own, compiled once by the host's gcc."""

import ctypes
import functools
import hashlib
import subprocess
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.cache import cache_dir, populate

__all__ = ("load_library",)

_CFLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
_COMPILE_S = 120.0


def load_library(source: Path) -> ctypes.CDLL:
    """The compiled functions of a C file; the library is kept in the cache.

    :raises MachineError: if there is no gcc, or it refuses the file
    """
    text = source.read_bytes()
    key = hashlib.sha256(text + " ".join(_CFLAGS).encode()).hexdigest()[:16]
    directory = cache_dir() / "native" / f"{source.stem}-{key}"
    built = populate(directory, functools.partial(_build, source))
    return ctypes.CDLL(str(built / f"{source.stem}.so"))


def _build(source: Path, scratch: Path) -> None:
    argv = ["gcc", *_CFLAGS, "-o", str(scratch / f"{source.stem}.so"), str(source)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_COMPILE_S)
    except FileNotFoundError as e:
        raise MachineError("no gcc on this machine; run: make setup") from e
    if done.returncode != 0:
        raise MachineError(f"gcc refuses {source.name}: {done.stderr.strip()}")
