"""How gdb is started with kgdbx in it."""

import os
import sys
from pathlib import Path

import kgdbx

__all__ = ("gdb_argv",)


def gdb_argv(*, load: bool = False) -> list[str]:
    """The start of a gdb command line, with this Python's packages on gdb's ``sys.path``.

    gdb's Python must be of the same minor version as this one; see ``kgdbx doctor``. gdb keeps its
    index of a vmlinux in its own cache, so that it is read in a second from the second time on.

    :param load: register kgdbx's commands too
    """
    here = Path(kgdbx.__file__).resolve().parent.parent
    # The environment's own packages only: gdb's Python has a standard library of its own.
    paths = [str(here), *(p for p in sys.path if p.endswith(("site-packages", "dist-packages")))]
    code = f"import sys; sys.path += [p for p in {paths!r} if p not in sys.path]"
    code += "; import kgdbx.gdb"
    if load:
        code += ", kgdbx.gdb.load; kgdbx.gdb.load.load()"
    index = ["-iex", "set index-cache enabled on"]
    return [os.environ.get("KGDBX_GDB", "gdb"), "-nx", "-q", *index, "-iex", f"python {code}"]
