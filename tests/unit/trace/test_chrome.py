"""Chrome's JSON is valid however much was written, and its slices lie where the calls were."""

import io
import json
from collections.abc import Callable
from typing import Any

from kgdbx.probes.event import Event
from kgdbx.probes.value import Hex, Unreadable
from kgdbx.symbols.tasks import Task
from kgdbx.trace.chrome import ChromeSink

Make = Callable[..., Event]


def written(*events: Event) -> list[dict[str, Any]]:
    out = io.StringIO()
    sink = ChromeSink(out)
    sink.write(events)
    sink.close()
    sink.close()
    items: list[dict[str, Any]] = json.loads(out.getvalue())
    return items


def test_nothing() -> None:
    assert written() == []


def test_instant(event: Make) -> None:
    fields = {"p": Hex(16), "big": 1 << 63, "list": [1, 1 << 60], "bad": Unreadable(None)}
    thread, process, instant = written(event(fields=fields))
    assert thread == {
        "name": "thread_name",
        "ph": "M",
        "pid": 400,
        "tid": 412,
        "args": {"name": "cat"},
    }
    assert process == {
        "name": "process_name",
        "ph": "M",
        "pid": 400,
        "tid": 400,
        "args": {"name": "cat"},
    }
    assert instant == {
        "name": "opened",
        "cat": "opened",
        "ph": "i",
        "s": "t",
        "ts": 12_345_678_901.234,
        "pid": 400,
        "tid": 412,
        "args": {
            "cpu": 3,
            "where": "do_sys_openat2+0x0/0x2c",
            "p": "0x10",
            "big": "9223372036854775808",
            "list": [1, "1152921504606846976"],
            "bad": {"error": "fault", "address": None},
        },
    }


def test_slice(event: Make) -> None:
    call = event(kind="r", return_address=31, return_where="ksys+0x1f/0x40", duration_ns=1_234)
    slice_ = written(call)[-1]
    assert slice_["ph"] == "X"
    assert slice_["name"] == "do_sys_openat2"
    assert slice_["cat"] == "opened"
    assert slice_["ts"] == 12_345_678_900.0
    assert slice_["dur"] == 1.234
    assert slice_["args"]["return"] == "ksys+0x1f/0x40"


def test_a_field_named_as_what_is_told_anyway(event: Make) -> None:
    assert written(event(fields={"cpu": 9, "where": "here"}))[-1]["args"] == {
        "cpu": 9,
        "where": "here",
    }


def test_names_follow_the_tasks(event: Make) -> None:
    tasks = [
        Task(0, 412, 400, "worker"),
        Task(0, 412, 400, "worker"),
        Task(0, 400, 400, "main"),
        Task(0, 412, 400, "renamed"),
    ]
    items = written(*(event(task=task) for task in tasks))
    names = [(i["name"], i["tid"], i["args"]["name"]) for i in items if i["ph"] == "M"]
    assert names == [
        ("thread_name", 412, "worker"),
        ("process_name", 400, "worker"),
        ("thread_name", 400, "main"),
        ("process_name", 400, "main"),
        ("thread_name", 412, "renamed"),
    ]


def test_idle_tasks_have_tracks_of_their_own(event: Make) -> None:
    items = written(*(event(task=Task(0, 0, 0, "swapper/0"), cpu=cpu) for cpu in (0, 1, 0)))
    tracks = {i["tid"]: i["args"]["name"] for i in items if i["name"] == "thread_name"}
    assert sorted(tracks.values()) == ["swapper/0", "swapper/1"]
    assert min(tracks) >= 1 << 22
    assert [i["args"]["name"] for i in items if i["name"] == "process_name"] == ["swapper"]


def test_lost(event: Make) -> None:
    out = io.StringIO()
    sink = ChromeSink(out)
    sink.write_lost(1)
    sink.write([event()])
    sink.write_lost(5, 2)
    sink.close()
    items = json.loads(out.getvalue())
    assert items[0]["args"] == {"lost": 1, "cpu": None}
    assert items[-1]["name"] == "LOST 5 EVENTS"
    assert items[-1]["ts"] == 12_345_678_901.234


def test_each_event_is_out_before_the_next(event: Make) -> None:
    # Streamable: nothing waits for the end, and what is there is valid once it is closed.
    out = io.StringIO()
    sink = ChromeSink(out)
    for count in range(1, 4):
        sink.write([event(ts_ns=count)])
        assert len(json.loads(out.getvalue() + "]")) == 2 + count
