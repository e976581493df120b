"""The scan's inner loops, compiled once by the host's gcc."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from kgdbx.machine.native import load_library

__all__ = ("Tables", "load_native", "pointer")

_SOURCE = Path(__file__).with_name("heap_walk.c")


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
    library = load_library(_SOURCE)
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
