"""JSON lines: one object an event, for programs."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from kgdbx.probes.event import Event
from kgdbx.probes.value import FieldValue, Hex, Unreadable
from kgdbx.trace.sink import Output

__all__ = ("JsonLinesSink", "SCHEMA", "event_json", "json_line", "json_value")

SCHEMA = "kgdbx.event.1"
"""Version of the JSON lines: the first line of a stream names it."""


def event_json(event: Event) -> dict[str, Any]:
    """An event as a JSON object: stable snake_case keys, times in ns, addresses as hex text."""
    record: dict[str, Any] = {
        "ts_ns": event.ts_ns,
        "cpu": event.cpu,
        "comm": event.task.comm,
        "pid": event.task.pid,
        "tgid": event.task.tgid,
        "probe": event.probe,
        "kind": event.kind,
        "address": hex(event.address),
        "where": event.where,
        "fields": {name: json_value(value) for name, value in event.fields.items()},
    }
    if event.return_address is not None:
        record["return_address"] = hex(event.return_address)
    if event.duration_ns is not None:
        record["duration_ns"] = event.duration_ns
    return record


def json_line(record: Mapping[str, Any]) -> str:
    """One JSON object on one line."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def json_value(value: FieldValue) -> Any:
    """A field's value in JSON: addresses and bytes as hex text, unreadable ones as an object."""
    if isinstance(value, Unreadable):
        return {
            "error": value.reason,
            "address": None if value.address is None else hex(value.address),
        }
    if isinstance(value, Hex):
        return hex(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [json_value(each) for each in value]
    return value


class JsonLinesSink:
    """Writes the schema, then one line an event and ``{"lost":N,"cpu":C}`` where some are missing.

    :param out: where to
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._out.write(json_line({"schema": SCHEMA}) + "\n")

    def write(self, events: Iterable[Event]) -> None:
        """Write events, one a line."""
        self._out.write("".join(json_line(event_json(event)) + "\n" for event in events))
        self._out.flush()

    def write_lost(self, count: int, cpu: int | None = None) -> None:
        """Say that events are missing here."""
        self._out.write(json_line({"lost": count, "cpu": cpu}) + "\n")
        self._out.flush()

    def close(self) -> None:
        """Flush."""
        self._out.flush()
