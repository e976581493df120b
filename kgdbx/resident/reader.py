"""From records in the guest's rings to events, in the order in which they happened."""

import collections
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kgdbx.probes.event import Event
from kgdbx.resident.clock import Clock
from kgdbx.resident.compile.codegen import Body, decode_fields
from kgdbx.resident.layout import ProbeLayout
from kgdbx.resident.record import HEADER
from kgdbx.resident.ring import Batch
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.tasks import Task

__all__ = ("EventReader", "Recorded")

_HEADER = struct.Struct("<QQIIIHH16s")  # struct record, prelude.h
_TSC_AT = 8
_RETURN = struct.Struct("<QQ")  # what struct return_record adds


@dataclass(frozen=True)
class Recorded:
    """What is known of the records with one number.

    :ivar name: ``group/name`` of the probe
    :ivar address: guest-virtual address of the probe point
    """

    name: str
    kind: str
    address: int
    where: str
    body: Body

    def layout(self, number: int) -> ProbeLayout:
        """What the records hold, as data.

        :param number: theirs
        """
        body = self.body
        return ProbeLayout(
            number,
            self.name,
            self.kind,
            self.address,
            self.where,
            body.record_bytes,
            tuple(field.layout for field in body.fields),
            body.mask_offset_bytes,
        )


class EventReader:
    """Turns batches into events.

    The records of a CPU are in order, those of several are put in order here by their time
    stamps. A record is held back until every ring was read once more after it was seen: whatever
    came before it, on another CPU, has been seen by then.

    :param drain: gives the whole records of all rings
    :param in_flight: whether one was being written meanwhile: its time stamp may be older than
        those of others that are whole
    :ivar layout_listeners: called with the description of records before the first of them, as a
        probe is placed
    :ivar batch_listeners: called with each batch as it comes out of a ring, before its events
    :ivar makes_events: whether :meth:`read` gives any; without, records cost nothing each
    :ivar latest_tsc: the largest time stamp that came out of a ring
    """

    def __init__(
        self,
        kernel: Kernel,
        drain: Callable[[], Iterator[Batch]],
        in_flight: Callable[[], bool] = lambda: False,
    ) -> None:
        self._kernel = kernel
        self._drain = drain
        self._in_flight = in_flight
        self._known: dict[int, Recorded] = {}
        self._held: list[tuple[int, int, bytes]] = []
        self._ready: collections.deque[bytes] = collections.deque()
        self._symbols: dict[int, str] = {}
        self.layout_listeners: list[Callable[[ProbeLayout], None]] = []
        self.batch_listeners: list[Callable[[Batch], None]] = []
        self.makes_events = True
        self.latest_tsc = 0

    def layouts(self) -> Iterator[ProbeLayout]:
        """Descriptions of all records that are known."""
        for number, recorded in self._known.items():
            yield recorded.layout(number)

    def add(self, number: int, recorded: Recorded) -> None:
        """Know the records with a number. They are known for good: they may still be held."""
        self._known[number] = recorded
        for listener in self.layout_listeners:
            listener(recorded.layout(number))

    def read(self, clock: Clock, *, final: bool = False) -> Iterator[Event]:
        """Events that happened before all that are still to come.

        :param final: the guest stands: give what is held back too
        """
        if final or not self._ready:  # else what comes meanwhile waits in the rings
            self._gather(final=final)
        while self._ready:  # what the caller does not take now comes next time
            event = self._event(self._ready.popleft(), clock)
            if event is not None:
                yield event

    def _gather(self, *, final: bool) -> None:
        held = self._held
        horizon = self.latest_tsc
        for batch in self._drain():
            for listener in self.batch_listeners:
                listener(batch)
            if not len(batch.records):
                continue
            last = batch.records[-1, _TSC_AT : _TSC_AT + 8]
            self.latest_tsc = max(self.latest_tsc, int.from_bytes(last.tobytes(), "little"))
            if not self.makes_events:
                continue
            headers = batch.records[:, : HEADER.itemsize].copy().view(HEADER).ravel()
            stamps = headers["tsc"].tolist()
            width = batch.records.shape[1]
            data = batch.records.tobytes()
            held.extend(
                (tsc, batch.cpu, data[n * width : (n + 1) * width]) for n, tsc in enumerate(stamps)
            )
        # Stable: what one CPU wrote with one time stamp stays in its order.
        held.sort(key=lambda record: record[0])
        count = len(held)
        if not final and self._in_flight():
            count = 0
        elif not final:
            count = next((n for n, record in enumerate(held) if record[0] > horizon), count)
        self._ready.extend(data for _, _, data in held[:count])
        self._held = held[count:]

    def _event(self, data: bytes, clock: Clock) -> Event | None:
        _, tsc, pid, tgid, number, cpu, _, comm = _HEADER.unpack_from(data)
        recorded = self._known.get(number)
        if recorded is None:
            return None
        ret_addr = duration_ns = None
        if recorded.kind == "r":
            ret_addr, entry_tsc = _RETURN.unpack_from(data, HEADER.itemsize)
            duration_ns = clock.duration_ns(tsc - entry_tsc)
        return Event(
            clock.ns(tsc),
            cpu,
            Task(0, pid, tgid, comm.split(b"\0")[0].decode("utf-8", "replace")),
            recorded.name,
            recorded.kind,
            recorded.address,
            recorded.where,
            decode_fields(recorded.body, data),
            ret_addr,
            self._symbolize(ret_addr) if ret_addr is not None else "",
            duration_ns,
        )

    def _symbolize(self, address: int) -> str:
        if address not in self._symbols:
            self._symbols[address] = self._kernel.symbolize(address)
        return self._symbols[address]
