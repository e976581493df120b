"""What every output of an event stream can do."""

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

from kgdbx.probes.event import Event
from kgdbx.resident.layout import ProbeLayout

__all__ = ("Output", "RecordSink", "Records", "Sink")

Records: TypeAlias = "npt.NDArray[Any] | bytes | bytearray | memoryview"
"""Records one after the other: a structured array, an (n, size) array of bytes, or a buffer."""


class Output(Protocol):
    """Where text goes: a file, or a debugger's own streams."""

    def write(self, text: str, /) -> int:
        """Write text."""

    def flush(self) -> None:
        """Show what was written."""


class Sink(Protocol):
    """Takes events until it is closed."""

    def write(self, events: Iterable[Event]) -> None:
        """Write events, and show them.

        :raises OSError: if the file behind it cannot be written
        """

    def write_lost(self, count: int, cpu: int | None = None) -> None:
        """Say that events are missing here.

        :param count: how many
        :param cpu: vCPU that they happened on; None if that is not known
        """

    def close(self) -> None:
        """Write what ends the stream; a file that was given open stays open. Idempotent."""


class RecordSink(Sink, Protocol):
    """A sink that also takes records as they are in the guest's rings, many at a time."""

    def add_probes(self, layouts: Iterable[ProbeLayout]) -> None:
        """Describe probes, before the first of their records.

        :raises TraceError: if a probe has the number of another
        """

    def write_batch(self, records: Records, record_bytes: int | None = None) -> None:
        """Write records; they may be overwritten once this returns.

        :param record_bytes: size of each; needed for a buffer, known for an array
        :raises TraceError: if a record's probe was not described, or is longer than the record
        """
