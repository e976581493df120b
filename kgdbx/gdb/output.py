"""Output through gdb's own streams."""

import io
import sys

import gdb

from kgdbx.render import pick_style
from kgdbx.trace.text import Style

__all__ = ("GdbOutput", "gdb_style")


class GdbOutput(io.TextIOBase):
    """A text stream that gdb logs, captures and pages like its own output."""

    def write(self, text: str) -> int:
        gdb.write(text)
        return len(text)

    def flush(self) -> None:
        gdb.flush()


def gdb_style() -> Style:
    """Colour where gdb itself shows colour: ``set style enabled``, and ``NO_COLOR``."""
    enabled = bool(gdb.parameter("style enabled"))
    return pick_style(sys.__stdout__, "auto" if enabled else "never")
