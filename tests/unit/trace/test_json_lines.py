"""JSON lines, and the lines that can be turned back into events."""

import io
import json
from collections.abc import Callable

import pytest

from kgdbx.probes.event import Event
from kgdbx.probes.value import FieldValue, Hex, Unreadable
from kgdbx.trace.event_lines import event_from_line, event_to_line
from kgdbx.trace.json_lines import JsonLinesSink, event_json
from kgdbx.trace.text import event_line

Make = Callable[..., Event]

FIELDS: dict[str, FieldValue] = {
    "n": -100,
    "big": (1 << 64) - 1,
    "text": "0x10",
    "p": Hex(16),
    "bytes": b"\x00\xff",
    "list": [1, 2],
    "pointers": [Hex(1), Unreadable(8), Hex(2)],
    "faulty": [Unreadable(8), Hex(2)],
    "none": [],
    "bad": Unreadable(0xFFFF888000000000),
    "why": Unreadable(None, "optimized out"),
}


def test_keys(event: Make) -> None:
    assert event_json(event()) == {
        "ts_ns": 12_345_678_901_234,
        "cpu": 3,
        "comm": "cat",
        "pid": 412,
        "tgid": 400,
        "probe": "kprobes/opened",
        "kind": "p",
        "address": "0xffffffff81200000",
        "where": "do_sys_openat2+0x0/0x2c",
        "fields": {"dfd": -100},
    }
    back = event_json(event(kind="r", return_address=16, duration_ns=0))
    assert back["return_address"] == "0x10"
    assert back["duration_ns"] == 0


def test_stream(event: Make) -> None:
    out = io.StringIO()
    sink = JsonLinesSink(out)
    sink.write([event(), event(fields=FIELDS)])
    sink.write_lost(3, 1)
    sink.write_lost(4)
    sink.close()
    schema, first, second, *lost = map(json.loads, out.getvalue().splitlines())
    assert schema == {"schema": "kgdbx.event.1"}
    assert first == event_json(event())
    assert second["fields"]["bad"] == {"error": "fault", "address": "0xffff888000000000"}
    assert second["fields"]["bytes"] == "00ff"
    assert lost == [{"lost": 3, "cpu": 1}, {"lost": 4, "cpu": None}]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fields": FIELDS},
        {"kind": "r", "return_address": 1 << 63, "return_where": "f+0x1/0x2", "duration_ns": 7},
    ],
)
def test_there_and_back(event: Make, changes: dict[str, object]) -> None:
    original = event(**changes)
    back = event_from_line(event_to_line(original))
    assert back == original
    assert event_line(back) == event_line(original)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "1",
        "{}",
        '{"kinds":[]}',
        '{"kinds":{},"fields":[]}',
        '{"kinds":{},"fields":{"a":{"error":1}}}',
        '{"kinds":{},"fields":{"a":1.5}}',
        '{"kinds":{"a":"x"},"fields":{"a":"zz"}}',
        '{"kinds":{},"fields":{},"ts_ns":true}',
        "[" * 100_000,
    ],
)
def test_not_an_event(line: str) -> None:
    with pytest.raises(ValueError):
        event_from_line(line)
