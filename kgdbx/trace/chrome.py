"""Chrome's trace event JSON, which Perfetto's and Chrome's viewers open."""

import json
from collections.abc import Iterable
from typing import Any

from kgdbx.probes.event import Event
from kgdbx.symbols.tasks import Task
from kgdbx.trace.json_lines import json_value
from kgdbx.trace.sink import Output

__all__ = ("ChromeSink",)

# PID_MAX_LIMIT, include/linux/threads.h: no task has a number this high.
_PID_LIMIT = 1 << 22
# JavaScript's numbers are exact up to here.
_EXACT_LIMIT = 1 << 53


class ChromeSink:
    """Writes the array form of the trace event format, an event at a time.

    A call whose duration is known is a slice named after its function; every other event is an
    instant named after its probe. Viewers also open a file whose end is missing.

    :param out: where to
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._separator = "[\n"
        self._threads: dict[int, str] = {}
        self._processes: dict[int, str] = {}
        self._last_us = 0.0
        self._closed = False

    def write(self, events: Iterable[Event]) -> None:
        """Write events, and the names of tasks when they are first seen."""
        for event in events:
            thread = self._thread(event)
            self._last_us = event.ts_ns / 1000
            self._item(_slice(event) | {"pid": event.task.tgid, "tid": thread})
        self._out.flush()

    def write_lost(self, count: int, cpu: int | None = None) -> None:
        """Write an instant across all tracks, at the time of the last event."""
        self._item(
            {
                "name": f"LOST {count} EVENTS",
                "ph": "i",
                "s": "g",
                "ts": self._last_us,
                "pid": 0,
                "tid": 0,
                "args": {"lost": count, "cpu": cpu},
            }
        )
        self._out.flush()

    def close(self) -> None:
        """End the array."""
        if not self._closed:
            self._closed = True
            self._out.write("[]\n" if self._separator == "[\n" else "\n]\n")
            self._out.flush()

    def _thread(self, event: Event) -> int:
        # The track of an event. Slices on a track must not overlap, and the idle tasks of all
        # vCPUs share the number 0: each gets a number of its own.
        task = event.task
        thread, comm = task.pid, task.comm
        if task.pid == 0:
            thread, comm = _PID_LIMIT + event.cpu, f"swapper/{event.cpu}"
        if self._threads.get(thread) != comm:
            self._threads[thread] = comm
            self._name("thread_name", task, thread, comm)
            # A thread lends its process its name until the process's first thread is seen.
            if task.pid == task.tgid or task.tgid not in self._processes:
                self._name_process(task)
        return thread

    def _name_process(self, task: Task) -> None:
        name = task.comm if task.pid else "swapper"
        if self._processes.get(task.tgid) != name:
            self._processes[task.tgid] = name
            self._name("process_name", task, task.tgid, name)

    def _name(self, what: str, task: Task, thread: int, name: str) -> None:
        self._item(
            {"name": what, "ph": "M", "pid": task.tgid, "tid": thread, "args": {"name": name}}
        )

    def _item(self, item: dict[str, Any]) -> None:
        self._out.write(self._separator + json.dumps(item, separators=(",", ":")))
        self._separator = ",\n"


def _slice(event: Event) -> dict[str, Any]:
    probe = event.probe.removeprefix("kprobes/")
    arguments: dict[str, Any] = {"cpu": event.cpu, "where": event.where}
    if event.return_address is not None:
        arguments["return"] = event.return_where or hex(event.return_address)
    # A field wins over what is told anyway.
    arguments |= {name: _exact(json_value(value)) for name, value in event.fields.items()}
    item = {"cat": probe, "args": arguments}
    if event.duration_ns is None:
        return item | {"name": probe, "ph": "i", "s": "t", "ts": event.ts_ns / 1000}
    return item | {
        "name": event.where.partition("+")[0],
        "ph": "X",
        "ts": (event.ts_ns - event.duration_ns) / 1000,
        "dur": event.duration_ns / 1000,
    }


def _exact(value: Any) -> Any:
    # A viewer would round it silently.
    if isinstance(value, int) and abs(value) > _EXACT_LIMIT:
        return str(value)
    if isinstance(value, list):
        return [_exact(each) for each in value]
    return value
