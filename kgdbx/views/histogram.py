"""A live histogram of a number in a session's events."""

from typing import Any

from kgdbx.probes.event import Event
from kgdbx.session import Session

__all__ = ("Histogram",)


class Histogram:
    """Counts values by powers of two, from now on.

    :param probe: a part of the names of probes; empty for every one
    :param field: name of a field, or ``duration_ns``; empty for the first one that is a number
    """

    def __init__(self, session: Session, probe: str = "", field: str = "") -> None:
        self.field = field
        self._probe = probe
        self._buckets: dict[int, int] = {}
        self._count = self._total = self._skipped = 0
        session.event_listeners.append(self._add)

    def result(self) -> dict[str, Any]:
        """What was counted.

        :return: ``field``; ``buckets`` of the least value and a count: bucket n holds values from
            2**(n-1) to 2**n - 1, negative ones likewise; ``count``, ``mean``, and ``skipped``
            events without such a number
        """
        return {
            "field": self.field,
            "buckets": [[n, self._buckets[n]] for n in sorted(self._buckets)],
            "count": self._count,
            "mean": self._total / self._count if self._count else 0,
            "skipped": self._skipped,
        }

    def _add(self, event: Event) -> None:
        if self._probe not in event.probe:
            return
        if not self.field:
            self.field = _first_number(event)
        value = event.fields.get(self.field)
        if self.field == "duration_ns":
            value = event.duration_ns
        if not isinstance(value, int):
            self._skipped += 1
            return
        bucket = value.bit_length() if value >= 0 else -value.bit_length()
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self._count += 1
        self._total += value


def _first_number(event: Event) -> str:
    if event.duration_ns is not None:
        return "duration_ns"
    return next((name for name, value in event.fields.items() if isinstance(value, int)), "")
