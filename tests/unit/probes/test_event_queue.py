"""Events reach their listeners in order, whatever these do."""

import os
import signal
import threading
import time

import pytest

from kgdbx.probes import event_queue
from kgdbx.probes.event import Event
from kgdbx.probes.event_queue import EventQueue
from kgdbx.symbols.tasks import Task

TASK = Task(0xFFFF888000001000, 7, 7, "task")


def event(number: int) -> Event:
    return Event(number, 0, TASK, "kprobes/e", "p", 0x1000, "", {})


def queue_of(listeners: list, count: int) -> EventQueue:
    queue = EventQueue(listeners)
    for number in range(count):
        queue.append(event(number))
    return queue


def test_delivered_once_and_in_order() -> None:
    seen: list[tuple[str, int]] = []
    listeners = [lambda e: seen.append(("a", e.ts_ns)), lambda e: seen.append(("b", e.ts_ns))]
    queue = queue_of(listeners, 3)
    assert seen == []
    assert queue.deliver()
    assert seen == [(name, n) for n in range(3) for name in "ab"]
    assert queue.deliver()
    assert len(seen) == 6
    queue.raise_error()


def test_what_a_listener_appends_comes_last() -> None:
    seen: list[int] = []

    def listener(e: Event) -> None:
        seen.append(e.ts_ns)
        if e.ts_ns == 0:
            queue.append(event(9))

    queue = queue_of([listener], 3)
    assert queue.deliver()
    assert seen == [0, 1, 2, 9]


def test_the_first_error_is_kept_and_no_event_is_lost() -> None:
    seen: list[int] = []

    def listener(e: Event) -> None:
        seen.append(e.ts_ns)
        if e.ts_ns in (1, 2):
            raise ValueError(e.ts_ns)

    queue = queue_of([listener], 4)
    assert not queue.deliver()
    assert seen == [0, 1, 2, 3]
    queue.append(event(4))
    assert queue.deliver()  # the error was of events before
    with pytest.raises(ValueError, match="^1$"):
        queue.raise_error()
    queue.raise_error()


def test_a_slow_listener_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_queue, "_PATIENCE_S", 0.02)
    before = signal.getsignal(signal.SIGALRM)
    seen: list[int] = []

    def listener(e: Event) -> None:
        time.sleep(0.2)
        seen.append(e.ts_ns)

    assert queue_of([listener], 2).deliver()
    assert seen == [0, 1]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_one_that_is_stuck_is_left_in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_queue, "_PATIENCE_S", 0.05)
    reader, writer = os.pipe()

    def listener(e: Event) -> None:
        os.write(writer, bytes(1 << 20))  # nobody reads

    queue = queue_of([listener], 3)
    timer = threading.Timer(0.2, setattr, (queue, "hurry", True))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match="does not come back"):
        queue.deliver()
    assert 0.2 < time.monotonic() - started < 10
    timer.join()
    assert queue.deliver()  # nothing is left
    os.close(reader)
    os.close(writer)


def test_many_quick_listeners_are_not_cut_in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_queue, "_PATIENCE_S", 0.1)
    seen: list[int] = []

    def listener(e: Event) -> None:
        time.sleep(0.002)
        seen.append(e.ts_ns)

    queue = queue_of([listener], 200)
    queue.hurry = True
    assert queue.deliver()
    assert len(seen) == 200


def test_in_another_thread() -> None:
    seen: list[int] = []
    queue = queue_of([lambda e: seen.append(e.ts_ns)], 3)
    thread = threading.Thread(target=queue.deliver)
    thread.start()
    thread.join()
    assert seen == [0, 1, 2]
