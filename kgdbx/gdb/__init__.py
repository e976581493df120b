"""The gdb face: kgdbx's commands as gdb commands, over gdb's own connection.

Import this package before anything else of kgdbx in gdb.
"""

import os
import sys
import types


def _load_drgn_apart() -> None:
    # gdb is linked with the system's libelf and libdw, and drgn brings newer ones of its own.
    # Under the default rules drgn's calls would end in gdb's copies, and crash there.
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_DEEPBIND)
    try:
        import drgn  # noqa: F401
    finally:
        sys.setdlopenflags(flags)


def _load_helpers_without_readline() -> None:
    # drgn's helpers import what drgn has for its own prompt, and with it Python's readline, which
    # takes TAB away from gdb's prompt. They need no more of it than its name.
    before = sys.modules.get("readline")
    sys.modules["readline"] = types.ModuleType("readline")
    try:
        import drgn.helpers.linux  # noqa: F401
    finally:
        del sys.modules["readline"]
        if before is not None:
            sys.modules["readline"] = before


_load_drgn_apart()
_load_helpers_without_readline()
