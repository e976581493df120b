"""A session's run: events, those who listen to them, and what is done beside the guest."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kgdbx.attach import attach_vm
from kgdbx.errors import MemoryFault, TargetLost
from kgdbx.machine.vm import Vm
from kgdbx.probes.event import Event
from kgdbx.session import Session

FUNCTION = "__x64_sys_getpgid"
CALLS = 23


@pytest.fixture
def vm(clone_of: Callable[..., Vm]) -> Vm:
    return clone_of(smp=2)


@pytest.fixture
def session(vm: Vm) -> Iterator[Session]:
    with attach_vm(vm.info) as it:
        yield it


def run_to_end(session: Session, command: Any) -> None:
    session.run(command=command, timeout_s=60)
    assert command.poll() == 0


def test_a_listener_may_take_its_time(vm: Vm, session: Session) -> None:
    seen: list[Event] = []

    def slow(event: Event) -> None:
        seen.append(event)
        if len(seen) <= 3:
            time.sleep(0.6)

    session.event_listeners.append(slow)
    session.probes.handler_limit_s = 0.3
    (probe,) = session.define(f"p:e {FUNCTION} $comm", tier="stop")
    run_to_end(session, vm.start(f"caller 2 {CALLS}"))
    assert (len(seen), probe.hits, probe.nfaults) == (CALLS, CALLS, 0)


def test_listeners_hear_of_a_hit_when_it_is_dealt_with(vm: Vm, session: Session) -> None:
    names: list[str] = []

    def listener(event: Event) -> None:
        names.append(event.probe.removeprefix("kprobes/"))
        assert not session.target.running
        # The instruction under the breakpoint is behind it: no handler of this hit is left.
        assert session.target.read_registers(event.cpu).rip != event.address

    session.event_listeners.append(listener)
    session.define(f"p:a {FUNCTION}", tier="stop")
    session.define(f"r:back {FUNCTION}", tier="stop")
    session.define(f"p:b {FUNCTION}", tier="stop")
    run_to_end(session, vm.start(f"caller 1 {CALLS}"))
    assert names == ["a", "b", "back"] * CALLS


def test_a_listener_may_change_the_probes(vm: Vm, session: Session) -> None:
    seen: list[str] = []

    def listener(event: Event) -> None:
        seen.append(event.probe.removeprefix("kprobes/"))
        if len(seen) == 5:
            session.probes.find("first").unregister()
            session.define("p:second do_getpgid", tier="stop")

    session.event_listeners.append(listener)
    session.define(f"p:first {FUNCTION}", tier="stop")
    run_to_end(session, vm.start(f"caller 1 {CALLS}"))
    assert seen == ["first"] * 5 + ["second"] * (CALLS - 4)


def test_an_error_of_a_listener_comes_out_of_run(vm: Vm, session: Session) -> None:
    seen: list[Event] = []

    def listener(event: Event) -> None:
        seen.append(event)
        if len(seen) in (3, 7):
            raise ZeroDivisionError(f"planted {len(seen)}")

    session.event_listeners.append(listener)
    (probe,) = session.define(f"p:e {FUNCTION}", tier="stop")
    command = vm.start(f"caller 1 {CALLS}")
    for number in (3, 7):
        with pytest.raises(ZeroDivisionError, match=f"planted {number}"):
            session.run(timeout_s=30)
        assert len(seen) == number
        assert not session.target.running
    run_to_end(session, command)
    assert (len(seen), probe.nfaults) == (CALLS, 0)


def test_a_count_is_exact(vm: Vm, session: Session) -> None:
    seen: list[Event] = []
    session.event_listeners.append(seen.append)
    session.define(f"p:e {FUNCTION}", tier="stop")
    command = vm.start(f"caller 2 {CALLS}")
    for total in (5, 6, 13):
        session.run(count=total - len(seen), timeout_s=30)
        assert session.limit_reached
        assert len(seen) == total
    run_to_end(session, command)
    assert len(seen) == CALLS


def test_idle_hooks_run_beside_the_guest_and_once_more(vm: Vm, session: Session) -> None:
    running: list[bool] = []
    hits: list[int] = []

    def hook() -> None:
        running.append(session.target.running)
        hits.append(probe.hits)

    session.idle_hooks.append(hook)
    (probe,) = session.define(f"p:e {FUNCTION}", tier="stop")
    session.run(timeout_s=0.5)
    assert len(running) > 1
    assert running == [True] * (len(running) - 1) + [False]
    running.clear()
    run_to_end(session, vm.start(f"caller 2 {CALLS} && sleep 0.1"))
    assert running == [True] * (len(running) - 1) + [False]
    assert hits[-1] == CALLS


def test_an_error_of_an_idle_hook_comes_out_of_run(vm: Vm, session: Session) -> None:
    def hook() -> None:
        if session.target.running:
            raise MemoryFault(0x1000, 8)

    session.idle_hooks.append(hook)
    with pytest.raises(MemoryFault, match="0x1000"):
        session.run(timeout_s=30)
    assert not session.target.running
    session.idle_hooks.clear()
    run_to_end(session, vm.start(f"caller 2 {CALLS}"))


def test_idle_hooks_run_after_a_guest_that_is_lost(vm: Vm, session: Session) -> None:
    calls: list[float] = []

    def hook() -> None:
        calls.append(time.monotonic())
        if len(calls) == 3:
            vm.stop()

    session.idle_hooks.append(hook)
    with pytest.raises(TargetLost):
        session.run(timeout_s=30)
    assert len(calls) >= 4


def test_a_signal_ends_a_run_whose_listener_is_stuck(vm: Vm, session: Session) -> None:
    def stuck(event: Event) -> None:
        timer.start()
        threading.Event().wait(60)

    timer = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    session.event_listeners.append(stuck)
    session.define(f"p:e {FUNCTION}", tier="stop")
    command = vm.start(f"caller 1 {CALLS}")
    started = time.monotonic()
    assert session.run(timeout_s=60) is None
    assert time.monotonic() - started < 30
    timer.join()
    session.event_listeners.clear()
    run_to_end(session, command)
