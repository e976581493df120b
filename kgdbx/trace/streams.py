"""The outputs of one trace: events to some, records as they come out of the rings to others."""

import collections
import contextlib
from collections.abc import Callable, Iterable

from kgdbx.probes.event import Event
from kgdbx.resident.layout import ProbeLayout
from kgdbx.resident.ring import Batch
from kgdbx.trace.sink import RecordSink, Sink

__all__ = ("Outputs",)

# Events are held back until all rings were read once more, and then written after the idle hooks.
_DELAY = 2


class Outputs:
    """Gives what a trace sees to its outputs.

    :param sinks: take events
    :param record_sinks: take batches of records; and events that no record was made for
    :param lost: how many events were lost so far, because nobody took them out of the rings
    :param limit: how many records to write; None for all
    :ivar lost: how many events were said to be lost
    :ivar records: how many were written
    """

    def __init__(
        self,
        sinks: Iterable[Sink],
        record_sinks: Iterable[RecordSink],
        lost: Callable[[], int],
        limit: int | None = None,
    ) -> None:
        self._sinks = list(sinks)
        self._record_sinks = list(record_sinks)
        self._count_lost = lost
        self._limit = limit
        self._recorded: set[str] = set()
        self._noted = collections.deque([0] * _DELAY)
        self.lost = 0
        self.records = 0

    def describe(self, layouts: Iterable[ProbeLayout]) -> None:
        """Describe records before the first of them.

        :raises TraceError: if a probe has the number of another
        """
        layouts = list(layouts)
        self._recorded.update(layout.name for layout in layouts)
        for sink in self._record_sinks:
            sink.add_probes(layouts)

    def batch(self, batch: Batch) -> None:
        """Write the records of a batch.

        :raises TraceError: if an output cannot be written
        """
        records = batch.records
        if self._limit is not None:
            records = records[: self._limit - self.records]
        self.records += len(records)
        for sink in self._record_sinks:
            sink.write_batch(records)

    def event(self, event: Event) -> None:
        """Write an event.

        :raises OSError: if an output cannot be written
        :raises TraceError: the same
        """
        for sink in self._sinks:
            sink.write((event,))
        if event.probe not in self._recorded:
            for record_sink in self._record_sinks:
                record_sink.write((event,))

    def idle(self) -> None:
        """Say what was lost some calls ago: the events before it have been written since."""
        self._noted.append(self._count_lost())
        self._tell_lost(self._noted.popleft())

    def tell_lost(self) -> None:
        """Say to all how many events were lost since it was last said."""
        self._tell_lost(self._count_lost())

    def close(self) -> None:
        """End all outputs; the first error is raised after all were tried."""
        with contextlib.ExitStack() as stack:
            for sink in (*self._sinks, *self._record_sinks):
                stack.callback(sink.close)

    def _tell_lost(self, total: int) -> None:
        count = total - self.lost
        if count > 0:
            self.lost += count
            for sink in (*self._sinks, *self._record_sinks):
                sink.write_lost(count)
