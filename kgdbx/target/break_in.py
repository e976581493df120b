"""Ways to stop a kernel that runs: KGDB does not listen to its line meanwhile."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeAlias

from kgdbx.target.packet import connect_stream
from kgdbx.target.serial_line import SerialLine

__all__ = ("BreakIn", "sysrq_over_console")

BreakIn: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Asks for a stop when entered, and is left when the kernel has stopped."""

_CONNECT_S = 5.0
_TELNET = "telnet:"
_TELNET_BREAK = b"\xff\xf3"  # IAC BRK, RFC 854


def sysrq_over_console(console: str) -> BreakIn:
    """SysRq-g on a serial console: a break, then ``g`` (Documentation/admin-guide/sysrq.rst).

    :param console: the line of the kernel's console, as in ``/dev/ttyS0,115200``, or
        ``telnet:host:port`` of a console server, which turns a break of telnet's into one
    :return: raises :class:`~kgdbx.errors.TargetError` if the line cannot be opened, or is another
        socket: those carry no break
    """

    @contextlib.contextmanager
    def break_in() -> Iterator[None]:
        if console.startswith(_TELNET):
            with connect_stream(console.removeprefix(_TELNET), _CONNECT_S) as stream:
                stream.sendall(_TELNET_BREAK + b"g")
                yield
            return
        line = SerialLine(console, _CONNECT_S)
        try:
            line.send_break()
            line.write(b"g")
            yield
        finally:
            line.close()

    return break_in
