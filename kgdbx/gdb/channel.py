"""The way past gdb's own output to a program that runs this gdb.

Under the machine interface gdb writes character by character: 80 us a line of an event (gdb 13).
"""

import os
from typing import TextIO

__all__ = ("CHANNEL_VARIABLE", "MARK", "open_channel")

CHANNEL_VARIABLE = "KGDBX_CHANNEL"
"""Environment variable with the number of a file that gdb inherits, for events and answers."""

MARK = "\x1e"
"""Begins a line that is an answer; the others are events."""


def open_channel() -> TextIO | None:
    """The channel, if there is one. What gdb starts does not inherit it."""
    number = os.environ.pop(CHANNEL_VARIABLE, None)
    if number is None:
        return None
    os.set_inheritable(int(number), False)
    return open(int(number), "w", encoding="utf-8", errors="backslashreplace")
