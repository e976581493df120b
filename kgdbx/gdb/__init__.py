"""The gdb face: kgdbx's commands as gdb commands, over gdb's own connection.

Import this package before anything else of kgdbx in gdb.
"""

import os
import sys


def _load_drgn_apart() -> None:
    # gdb is linked with the system's libelf and libdw, and drgn brings newer ones of its own.
    # Under the default rules drgn's calls would end in gdb's copies, and crash there.
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_DEEPBIND)
    try:
        import drgn  # noqa: F401
    finally:
        sys.setdlopenflags(flags)


_load_drgn_apart()
