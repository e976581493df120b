"""The scan's inner loops, compiled once by the host's gcc."""

import ctypes
import hashlib
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from kgdbx.errors import MachineError
from kgdbx.machine.cache import cache_dir, populate

__all__ = ("Tables", "load_native", "pointer")

_SOURCE = Path(__file__).with_name("heap_walk.c")
_CFLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
_COMPILE_S = 120.0


class Tables(ctypes.Structure):
    """``struct tables`` of heap_walk.c."""

    _fields_ = (
        ("direct_map", ctypes.c_uint64),
        ("nframes", ctypes.c_uint64),
        ("frame_group", ctypes.c_void_p),
        ("group_base", ctypes.c_void_p),
        ("group_size", ctypes.c_void_p),
        ("group_count", ctypes.c_void_p),
        ("group_first", ctypes.c_void_p),
        ("group_flags", ctypes.c_void_p),
        ("node_flags", ctypes.c_void_p),
        ("vmemmap", ctypes.c_uint64),
        ("page_struct_bytes", ctypes.c_uint64),
        ("nareas", ctypes.c_uint64),
        ("area_start", ctypes.c_void_p),
        ("area_end", ctypes.c_void_p),
        ("area_node", ctypes.c_void_p),
        ("npercpu", ctypes.c_uint64),
        ("percpu_exact_below", ctypes.c_uint64),
        ("percpu_start", ctypes.c_void_p),
        ("percpu_end", ctypes.c_void_p),
        ("percpu_node", ctypes.c_void_p),
        ("va_start", ctypes.c_uint64),
        ("va_end", ctypes.c_uint64),
        ("vm", ctypes.c_uint64),
    )


def load_native() -> ctypes.CDLL:
    """The compiled functions of heap_walk.c.

    :raises MachineError: if there is no gcc
    """
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(source + " ".join(_CFLAGS).encode()).hexdigest()[:16]
    directory = cache_dir() / "native" / f"heap_walk-{key}"
    library = ctypes.CDLL(str(populate(directory, _build) / "heap_walk.so"))
    word, address, signed = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int64
    library.edges_of_records.argtypes = [address, address, word, word, *[address] * 4]
    library.edges_of_records.restype = signed
    library.edges_of_slabs.argtypes = [address, address, word, *[address] * 3]
    library.edges_of_slabs.restype = signed
    library.walk_freelists.argtypes = [address, word, *[address] * 7, ctypes.c_int, *[address] * 3]
    library.walk_freelists.restype = None
    library.reach.argtypes = [word, word, *[address] * 3]
    library.reach.restype = ctypes.c_int
    library.find_words.argtypes = [address, word, word, *[address] * 3, word]
    library.find_words.restype = word
    return library


def pointer(array: "np.ndarray[Any, Any]") -> int:
    """Where the items of a contiguous array are; the caller keeps the array."""
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def _build(scratch: Path) -> None:
    argv = ["gcc", *_CFLAGS, "-o", str(scratch / "heap_walk.so"), str(_SOURCE)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_COMPILE_S)
    except FileNotFoundError as e:
        raise MachineError("no gcc on this machine; run: make setup") from e
    if done.returncode != 0:
        raise MachineError(f"gcc refuses {_SOURCE.name}: {done.stderr.strip()}")
