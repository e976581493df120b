"""The size of the rings that events wait in, as an option."""

import argparse
import sys

from kgdbx.commands.registry import argument
from kgdbx.resident.memory import PAGE_BYTES
from kgdbx.session import Session

__all__ = ("BUFFER_ARGUMENT", "buffer_bytes", "tell_buffer", "use_buffer")

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LARGEST_BYTES = 1 << 30


def buffer_bytes(text: str) -> int:
    """A size such as ``16M``, in bytes; the next power of two.

    :raises argparse.ArgumentTypeError: if it is none, or out of range
    """
    unit = _UNITS.get(text[-1:].upper())
    if unit is not None and text[:-1].isdecimal():
        size_bytes = int(text[:-1]) * unit
        if PAGE_BYTES <= size_bytes <= _LARGEST_BYTES:
            return 1 << (size_bytes - 1).bit_length()
    raise argparse.ArgumentTypeError(f"{text!r} is no size from 4K to 1G, such as 16M")


BUFFER_ARGUMENT = argument(
    "-b",
    "--buffer",
    type=buffer_bytes,
    metavar="SIZE",
    help="memory of the guest's for events of each CPU: 64K, 16M, ...",
)
"""For commands that record."""


def use_buffer(
    session: Session, args: argparse.Namespace, default_bytes: int | None = None
) -> None:
    """Have rings that are still to be made be of the size that the option says.

    :param default_bytes: without it; None for the session's own
    """
    session.resident.engine.ring_bytes = (
        args.buffer or default_bytes or session.resident.engine.ring_bytes
    )


def tell_buffer(session: Session, args: argparse.Namespace, lost: int) -> None:
    """Say what the rings have in fact, if it is less than was asked for, or events were lost.

    :param lost: how many
    """
    size_bytes = session.resident.engine.buffer_bytes
    if size_bytes is None:
        return
    shown = f"{size_bytes >> 20} MiB" if size_bytes >> 20 else f"{size_bytes >> 10} KiB"
    if args.buffer is not None and size_bytes < args.buffer:
        print(
            f"kgdbx: the buffers have {shown} a CPU: the guest has no more to spare",
            file=sys.stderr,
        )
    elif lost:
        print(
            f"kgdbx: the buffers of {shown} a CPU were full at times; see --buffer, or record "
            "less with a filter",
            file=sys.stderr,
        )
