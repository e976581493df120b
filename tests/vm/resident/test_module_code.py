"""Resident probes in modules that come and go, and in a guest that is gone."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.probes.event import Event
from kgdbx.probes.probe import State
from kgdbx.resident import guest_call

GuestOf = Callable[..., Any]


@pytest.mark.parametrize("kernel", ["6.12"])
def test_modules_come_and_go(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    events: list[Event] = []
    guest.session.event_listeners.append(events.append)
    init, setup, returned, device = (
        guest.session.define(text, tier="resident")[0]
        for text in (
            "p:init dummy:dummy_init_module $comm",
            "p:setup dummy:dummy_setup mtu=dev->mtu",
            "r:ret dummy:dummy_init_module $retval",
            "r:dev dummy:dummy_dev_init $retval name=dev->name:string",
        )
    )
    assert {p.state for p in (init, setup, returned, device)} == {State.PENDING}
    for turn in (1, 2, 3):
        guest.run("modprobe dummy numdummies=2")
        faults = [f.trace for p in (init, setup, returned, device) for f in p.faults]
        assert not faults, faults[0]
        assert (init.hits, setup.hits, returned.hits, device.hits) == (
            turn,
            2 * turn,
            turn,
            2 * turn,
        )
        assert (init.state, setup.state) == (State.GONE, State.ENABLED)
        guest.run("rmmod dummy")
        assert (setup.state, device.state) == (State.GONE, State.GONE)
        # something else takes the place where it was
        guest.run("modprobe loop" if turn == 1 else "true")
    names = [e.fields["name"] for e in events if e.probe == "kprobes/dev"]
    assert names == ["dummy0", "dummy1"] * 3
    assert [e.fields["$retval"] for e in events if e.probe == "kprobes/ret"] == [0] * 3
    assert {e.where.partition("+")[0] for e in events if e.probe == "kprobes/init"} == {
        "dummy_init_module"
    }
    guest.session.resident.close()
    assert guest.run("modprobe dummy && rmmod dummy && echo well") == "well\n"


def test_what_cannot_be_compiled_for_a_module_stops_there(guest_of: GuestOf) -> None:
    guest = guest_of("6.1")
    events: list[Event] = []
    guest.session.event_listeners.append(events.append)
    text = "dev->flags ? dev->name : dev->name"  # no single value for code in the guest
    called, returned = (
        guest.session.define(f"{kind} dummy:dummy_dev_init name=({text}) mtu=dev->mtu")[0]
        for kind in ("p:dev", "r:ret")
    )
    for turn in (1, 2):
        guest.run("modprobe dummy numdummies=3")
        for probe in (called, returned):
            assert not probe.faults, probe.faults[0].trace
            assert (probe.hits, probe.nmissed) == (3 * turn, 0)
            assert probe.tier_reason.startswith("stops at 1 of 1 places: dummy:dummy_dev_init")
        guest.run("rmmod dummy")
    shown = [(event.probe, event.fields["name"]) for event in events]
    each = [(name, f"dummy{n}") for n in range(3) for name in ("kprobes/dev", "kprobes/ret")]
    assert shown == 2 * each
    assert guest.session.probes.returns.is_empty


def test_records_outlive_a_panic(guest_of: GuestOf, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = guest_of()
    engine = guest.session.resident.engine
    engine.overwrite = True
    engine.ring_bytes = 8192
    for text in ("p:call __x64_sys_getpgid $comm", "p:open do_sys_openat2 filename:ustring"):
        guest.session.define(text, tier="resident")
    # Nobody takes any records until it is over: the newest ones are still there.
    guest.session.target.resume()
    last = guest.vm.start(
        "echo 0 > /proc/sys/kernel/panic; caller 1 3001; echo c > /proc/sysrq-trigger"
    )
    deadline = time.monotonic() + 30
    while "end Kernel panic" not in guest.vm.info.console.read_text(errors="replace"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    guest.session.target.interrupt()
    events = list(guest.session.resident.events(final=True))
    calls = [e for e in events if e.probe == "kprobes/call"]
    assert 50 < len(calls) < 3001
    assert {e.fields["$comm"] for e in calls} == {"caller-0"}
    assert events[-1].fields["filename"] == "/proc/sysrq-trigger"
    assert engine.lost() == 3001 - len(calls)
    last.discard()
    monkeypatch.setattr(guest_call, "_CAPTURE_S", 0.5)
    guest.session.close()  # no one is left there to take memory back
