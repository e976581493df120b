"""ftrace's text form, as ``/sys/kernel/tracing/trace`` shows it."""

import dataclasses
import fcntl
import io
import json
import os
import stat
from collections.abc import Iterable
from typing import TypeGuard

from kgdbx.probes.event import Event
from kgdbx.probes.value import FieldValue, KernelStack, Unreadable
from kgdbx.trace.sink import Output

__all__ = ("PLAIN", "Style", "TextSink", "event_line")

# As wide as the counts can get, so that the line can be written again at the end.
_COUNTS_WIDTH = 56


@dataclasses.dataclass(frozen=True)
class Style:
    """ANSI colours, or nothing."""

    bold: str = ""
    name: str = ""
    value: str = ""
    fault: str = ""
    reset: str = ""


PLAIN = Style()
"""No colours."""


def event_line(event: Event, style: Style = PLAIN, *, tgid: bool = False) -> str:
    """An event in ftrace's text form (Documentation/trace/kprobetrace.rst), with its stack.

    :param tgid: with the column that ftrace's option ``record-tgid`` gives
    """
    # The guest chooses its names: none may break the line or reach the terminal as a control.
    comm = event.task.comm[:16]
    if not comm.isprintable():
        comm = comm.encode("unicode_escape").decode()
    group = f"({event.task.tgid:>7}) " if tgid else ""
    seconds = f"{event.ts_ns // 10**9}.{event.ts_ns // 1000 % 10**6:06d}"
    where = event.where
    if event.kind == "r" and event.return_address is not None:
        where = f"{event.return_where or hex(event.return_address)} <- {where.partition('+')[0]}"
    fields = "".join(
        f" {name}={_coloured(value, style)}"
        for name, value in event.fields.items()
        if not isinstance(value, KernelStack)
    )
    if event.duration_ns is not None:
        fields += f" duration_ns={_coloured(event.duration_ns, style)}"
    name = event.probe.removeprefix("kprobes/")
    head = f"{comm:>16}-{event.task.pid:<7} {group}[{event.cpu:03d}] {seconds:>13}: "
    lines = [f"{head}{style.name}{name}{style.reset}: ({where}){fields}"]
    for value in event.fields.values():
        if isinstance(value, KernelStack):
            # An event of its own, as trace_stack_print() in kernel/trace/trace_output.c has it.
            lines.append(f"{head}<stack trace>")
            lines += (f" => {style.value}{frame!s}{style.reset}" for frame in value)
    return "\n".join(lines)


class TextSink:
    """Writes ftrace text, which Perfetto and others import.

    :param out: where to; a regular file gets the number of events in its header at the end
    :param header: write the lines that start with ``#``
    :param cpus: number of vCPUs, for the header
    :param tgid: write the column that ftrace's option ``record-tgid`` gives; Perfetto groups
        threads by it
    """

    def __init__(
        self,
        out: Output,
        style: Style = PLAIN,
        *,
        header: bool = True,
        cpus: int = 1,
        tgid: bool = False,
    ) -> None:
        self._out = out
        self._style = style
        self._cpus = cpus
        self._tgid = tgid
        self._events = 0
        self._lost = 0
        self._counts_at: int | None = None
        if header:
            self._write_header()

    def write(self, events: Iterable[Event]) -> None:
        """Write events, one a line, and their stacks."""
        lines = [event_line(event, self._style, tgid=self._tgid) for event in events]
        if lines:
            self._events += len(lines)
            self._out.write("\n".join(lines) + "\n")
            self._out.flush()

    def write_lost(self, count: int, cpu: int | None = None) -> None:
        """Say that events are missing here, in the words of ftrace."""
        self._lost += count
        mark = "#" if cpu is None else f"CPU:{cpu}"
        self._out.write(f"{mark} [LOST {count} EVENTS]\n")
        self._out.flush()

    def close(self) -> None:
        """Write the final numbers into the header, if the output can be written twice."""
        at, self._counts_at = self._counts_at, None
        if at is not None and isinstance(self._out, io.TextIOBase):
            end = self._out.tell()
            self._out.seek(at)
            self._out.write(self._counts())
            self._out.seek(end)
        self._out.flush()

    def _write_header(self) -> None:
        # As print_event_info() and print_func_help_header() in kernel/trace/trace.c; the second
        # is what a kernel shows without the option irq-info, whose column is not known here.
        self._out.write("# tracer: nop\n#\n")
        if _is_rewritable(self._out):
            self._counts_at = self._out.tell()
        group, bar = ("   TGID   ", "     |    ") if self._tgid else ("", "")
        self._out.write(
            f"{self._counts()}#\n"
            f"#           TASK-PID    {group} CPU#     TIMESTAMP  FUNCTION\n"
            f"#              | |      {bar}   |         |         |\n"
        )
        self._out.flush()

    def _counts(self) -> str:
        # 0/0 in a stream: its header is written when its buffer is still empty.
        counts = f"{self._events}/{self._events + self._lost}   #P:{self._cpus}"
        width = _COUNTS_WIDTH if self._counts_at is not None else 0
        return f"# entries-in-buffer/entries-written: {counts:<{width}}\n"


def _is_rewritable(out: Output) -> TypeGuard[io.TextIOBase]:
    if not isinstance(out, io.TextIOWrapper):
        return False
    try:
        number = out.fileno()
    except OSError:  # a file in memory
        return False
    appends = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_APPEND
    return stat.S_ISREG(os.fstat(number).st_mode) and not appends


def _coloured(value: FieldValue, style: Style) -> str:
    colour = style.fault if isinstance(value, Unreadable) else style.value
    return f"{colour}{_text(value)}{style.reset if colour else ''}"


def _text(value: FieldValue) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, bytes):
        return value.hex(" ")
    if isinstance(value, list):
        return "{" + ",".join(_text(each) for each in value) + "}"
    return str(value)
