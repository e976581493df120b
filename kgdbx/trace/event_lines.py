"""Events that are no records, as lines of JSON that can be turned back."""

import json
from typing import Any

from kgdbx.probes.event import Event
from kgdbx.probes.value import FieldValue, Hex, KernelStack, Unreadable
from kgdbx.symbols.tasks import Task
from kgdbx.trace.json_lines import event_json, json_line

__all__ = ("event_from_line", "event_to_line")


def event_to_line(event: Event) -> str:
    """The event as in JSON lines, and which of its fields are hex text of what kind."""
    record = event_json(event)
    kinds = {name: _kind(value) for name, value in event.fields.items()}
    record["kinds"] = {name: kind for name, kind in kinds.items() if kind}
    record["return_where"] = event.return_where
    return json_line(record)


def event_from_line(line: str) -> Event:
    """The reverse of :func:`event_to_line`; the task's address is 0.

    :raises ValueError: if it is not such a line
    """
    try:
        record = json.loads(line)
        kinds = record["kinds"]
        fields = {
            str(name): _value(value, kinds.get(name)) for name, value in record["fields"].items()
        }
        back, duration = record.get("return_address"), record.get("duration_ns")
        return Event(
            ts_ns=_integer(record["ts_ns"]),
            cpu=_integer(record["cpu"]),
            task=Task(0, _integer(record["pid"]), _integer(record["tgid"]), str(record["comm"])),
            probe=str(record["probe"]),
            kind=str(record["kind"]),
            address=int(record["address"], 16),
            where=str(record["where"]),
            fields=fields,
            return_address=None if back is None else int(back, 16),
            return_where=str(record.get("return_where", "")),
            duration_ns=None if duration is None else _integer(duration),
        )
    except (AttributeError, KeyError, RecursionError, TypeError) as e:
        raise ValueError(f"not an event: {type(e).__name__}: {e}") from e


def _kind(value: FieldValue) -> str:
    if isinstance(value, KernelStack):
        return "stack"
    if isinstance(value, list):
        return next(filter(None, map(_kind, value)), "")
    return "x" if isinstance(value, Hex) else "bytes" if isinstance(value, bytes) else ""


def _value(value: Any, kind: str | None) -> FieldValue:
    if isinstance(value, list) and kind == "stack":
        return KernelStack(_value(each, None) for each in value)
    if isinstance(value, list):
        return [_value(each, kind) for each in value]
    if isinstance(value, dict):
        address = value["address"]
        return Unreadable(None if address is None else int(address, 16), str(value["error"]))
    if isinstance(value, str):
        if kind == "x":
            return Hex(value, 16)
        return bytes.fromhex(value) if kind == "bytes" else value
    return _integer(value)


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is no integer")
    return value
