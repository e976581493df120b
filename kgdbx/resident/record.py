"""The records of the rings, as the guest writes them; all little endian, see ``prelude.h``."""

import numpy as np

__all__ = ("ENTRY_FIELDS_AT", "HEADER", "RETURN_FIELDS_AT", "RETURN_HEADER")

HEADER = np.dtype(
    [
        ("seq", "<u8"),
        ("tsc", "<u8"),
        ("pid", "<u4"),
        ("tgid", "<u4"),
        ("probe", "<u4"),
        ("cpu", "<u2"),
        ("flags", "<u2"),
        ("comm", "S16"),
    ]
)
"""``struct record``: ``seq``, written last, is the CPU's number << 48, plus the position in its
ring, plus 1.
"""

RETURN_HEADER = np.dtype([*HEADER.descr, ("ret_addr", "<u8"), ("entry_tsc", "<u8")])
"""``struct return_record``."""

ENTRY_FIELDS_AT = HEADER.itemsize
RETURN_FIELDS_AT = RETURN_HEADER.itemsize
