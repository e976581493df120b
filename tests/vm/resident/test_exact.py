"""Nothing lost, nothing twice: resident probes against workloads whose calls are known."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kgdbx.attach import attach_vm, connect
from kgdbx.errors import ProbeError
from kgdbx.machine.vm import Vm
from kgdbx.probes.definition import parse_definition
from kgdbx.probes.event import Event
from kgdbx.resident.journal import Journal
from kgdbx.resident.place.displacement import Displacement

GuestOf = Callable[..., Any]
CALL = "__x64_sys_getpgid"
NESTED = "ep_loop_check_proc"


def events_of(guest: Any, comm: str) -> list[Event]:
    events: list[Event] = []

    def listen(event: Event) -> None:
        if event.task.comm.startswith(comm):
            events.append(event)

    guest.session.event_listeners.append(listen)
    return events


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_each_call_once_on_four_cpus(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel, smp=4)
    before = guest.text()
    events = events_of(guest, "caller-")
    entry, back, again = guest.session.define_many(
        map(
            parse_definition,
            (f"p:in {CALL} pid=regs->di", f"r:out {CALL} $retval", f"r:out2 {CALL}"),
        )
    )
    assert {p.tier for p in (entry, back, again)} == {"resident"}
    guest.run("caller 4 10007")
    assert Counter(e.probe for e in events) == {
        "kprobes/in": 10007,
        "kprobes/out": 10007,
        "kprobes/out2": 10007,
    }
    stamps = [e.ts_ns for e in events]
    assert stamps == sorted(stamps)
    by_task: dict[int, list[Event]] = {}
    for event in events:
        by_task.setdefault(event.task.pid, []).append(event)
    assert len(by_task) == 4
    for own in by_task.values():
        # Of two return probes the one that came last is nearer to the function.
        assert [e.probe for e in own] == ["kprobes/in", "kprobes/out2", "kprobes/out"] * (
            len(own) // 3
        )
        for n in range(0, len(own), 3):
            assert own[n].ts_ns <= own[n + 1].ts_ns
            assert own[n + 1].return_where == own[n + 2].return_where
            assert (own[n + 1].duration_ns or 0) <= (own[n + 2].duration_ns or 0)
    assert (guest.session.resident.engine.lost(), back.nmissed, again.nmissed) == (0, 0, 0)
    for probe in (entry, back, again):
        probe.unregister()
    assert guest.text() == before


def test_recursion(guest: Any) -> None:
    events = events_of(guest, "nester")
    (back,) = guest.session.define(f"r20:out {NESTED} $retval")
    (entry,) = guest.session.define(f"p:in {NESTED}")
    assert guest.run("nester 4 25") == "100\n"
    calls = 4 * 5 // 2 * 25
    assert Counter(e.probe for e in events) == {"kprobes/in": calls, "kprobes/out": calls}
    assert (entry.hits, back.hits, back.nmissed) == (calls, calls, 0)
    depth = deepest = 0
    for event in events:
        depth += 1 if event.kind == "p" else -1
        deepest = max(deepest, depth)
        assert depth >= 0
        if event.kind == "r":
            # never an address of ours: the inner calls return to the function itself
            assert event.return_where.startswith("ep_" if depth else ("ep_", "do_epoll"))
    assert (depth, deepest) == (0, 4)


def test_one_slot(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    events = events_of(guest, "")
    (nested,) = guest.session.define(f"r1:nested {NESTED}")
    (slept,) = guest.session.define("r1:slept __x64_sys_clock_nanosleep $retval")
    (entry,) = guest.session.define("p:entered __x64_sys_clock_nanosleep")
    guest.run("nester 3 25; caller 8 401 500")
    assert (nested.hits, nested.nmissed) == (75, 75)
    assert slept.nmissed > 0
    assert slept.hits + slept.nmissed == entry.hits >= 401
    assert sum(e.probe == "kprobes/slept" for e in events) == slept.hits


def test_memory_of_removed_probes_serves_new_ones(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    before = guest.text()
    events = events_of(guest, "caller-")
    (kept,) = guest.session.define("r64:kept __x64_sys_clock_nanosleep $retval")
    command = guest.vm.start("caller 8 1009 20000")
    guest.session.run(count=8, timeout_s=30)
    taken = []
    for turn in range(24):  # each leaves 190 KiB of 2 MiB
        gone, entry = guest.session.define_many(
            map(
                parse_definition,
                (
                    "r2000:gone __x64_sys_clock_nanosleep $retval",
                    f"p:entry __x64_sys_clock_nanosleep if {turn} < 99",
                ),
            )
        )
        until = time.monotonic() + 30
        while not entry.hits and time.monotonic() < until:
            guest.session.run(timeout_s=0.03)
        assert entry.hits, "no call in 30 s"
        taken.append(sum(size for _, size in guest.session.resident.engine.taken))
        gone.unregister()
        entry.unregister()
        assert gone.nmissed == 0
    assert max(taken[8:]) <= taken[8] + (1 << 20), taken  # somebody was inside now and then
    guest.session.run(command=command, timeout_s=60)
    assert command.wait(5).output.startswith("1009 ")
    assert sum(e.probe == "kprobes/kept" for e in events) == kept.hits == 1009
    assert kept.nmissed == 0
    kept.unregister()
    assert guest.text() == before


def test_more_than_one_page_table_maps(guest: Any) -> None:
    before = guest.text()
    probes = guest.session.define_many(
        [parse_definition(f"r4096:n{n} {CALL} $retval") for n in range(9)]
    )
    assert len({program.slots >> 21 for probe in probes for program in probe.programs}) == 2
    guest.run("caller 2 1009")
    assert [(p.hits, p.nmissed) for p in probes] == 9 * [(1009, 0)]
    guest.session.resident.close()
    assert guest.text() == before
    assert guest.run("caller 1 3").startswith("3 ")


def test_probes_placed_while_others_are(guest_of: GuestOf, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = guest_of()
    session = guest.session
    engine = session.resident.engine
    events = events_of(guest, "caller-")
    session.define("p:first __x64_sys_getpriority", tier="resident")
    wait = engine.quiescence.wait_until_free

    def run_on(displacements: Iterable[Displacement]) -> None:
        # As a handler does, while the guest runs until the bytes to replace are free.
        monkeypatch.undo()
        session.define("p:inner __x64_sys_getpriority", tier="resident")
        wait(displacements)

    monkeypatch.setattr(engine.quiescence, "wait_until_free", run_on)
    (outer,) = session.define("r4096:outer __x64_sys_clock_nanosleep $retval")
    (other,) = session.define(f"r4096:other {CALL} $kstack $retval")
    guest.run("caller 2 101 1000; caller 2 103")
    assert Counter(e.probe for e in events) == {"kprobes/outer": 101, "kprobes/other": 103}
    assert (outer.hits, other.hits) == (101, 103)


def test_nothing_leads_to_probes_that_could_not_be_placed(
    guest_of: GuestOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    guest = guest_of()
    engine = guest.session.resident.engine
    journal = tmp_path / "journal"
    monkeypatch.setattr(engine, "_make_journal", lambda: Journal(journal))
    guest.session.define("p:first __x64_sys_getpriority", tier="resident")

    def refuse(*_: object) -> None:
        raise ProbeError("refused")

    for place in ("kgdbx.resident.build.compile_unit", "kgdbx.resident.jumps.Jumps.write"):
        with monkeypatch.context() as patched, pytest.raises(ProbeError, match="refused"):
            patched.setattr(place, refuse)
            guest.session.define(f"r100:back {CALL}", tier="resident")
        assert engine.host.read_u64(engine._holding.code.symbols["return_probes"]) == 0
        assert ('"slots"' in journal.read_text()) == place.endswith("write")


def test_unregistered_while_tasks_sleep_inside(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    before = guest.text()
    events = events_of(guest, "caller-")
    kept, gone, last = (
        guest.session.define(f"r20:{name} do_nanosleep $retval")[0]
        for name in ("kept", "gone", "last")
    )
    command = guest.vm.start("caller 8 64 200000")
    guest.session.run(timeout_s=0.3)
    (again,) = guest.session.define("r20:again do_nanosleep $retval")
    guest.session.run(timeout_s=0.3)
    gone.unregister()  # the middle one of what the sleepers return through
    guest.session.run(timeout_s=0.3)
    last.unregister()
    again.unregister()
    guest.session.run(command=command, timeout_s=30)
    done = command.wait(5)
    assert done.output.startswith("64 ")
    assert sum(e.probe == "kprobes/kept" for e in events) == 64
    assert {e.fields["$retval"] for e in events} == {0}
    kept.unregister()
    guest.session.resident.close()
    assert guest.text() == before
    guest.run("caller 4 1009")


def test_slots_of_the_dead_are_used_again(guest_of: GuestOf) -> None:
    guest = guest_of()
    (dead,) = guest.session.define("r4:dead do_exit")
    (entry,) = guest.session.define("p:dying do_exit")
    until = time.monotonic() + 60
    while entry.hits < 24 or entry.hits - dead.nmissed < 12:  # without reuse it stays at 4
        assert time.monotonic() < until, (entry.hits, dead.nmissed)
        guest.run("for n in 1 2 3 4 5 6 7 8; do true & done; wait")
        guest.session.run(timeout_s=0.3)  # the dead are looked for
    assert dead.hits == 0
    dead.unregister()
    guest.run("true")


def test_a_task_that_is_killed_inside(guest_of: GuestOf) -> None:
    guest = guest_of()
    events = events_of(guest, "caller-")
    (probe,) = guest.session.define("r2:slept do_nanosleep $retval")
    guest.run("caller 1 1 100000000 & sleep 0.2; kill -9 $!; wait $!; true", status=0)
    guest.run("caller 1 7 1000")
    assert [e.fields["$retval"] for e in events][-7:] == [0] * 7
    assert probe.nmissed == 0


def test_full_rings(guest_of: GuestOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kgdbx.resident.ring.MAX_BLOCK_BYTES", 4096)  # two chunks each
    guest = guest_of(smp=4)
    guest.session.close()
    with attach_vm(guest.vm.info) as session:
        engine = session.resident.engine
        engine.ring_bytes = 8192
        events: list[Event] = []
        session.event_listeners.append(events.append)
        (probe,) = session.define(f"p:in {CALL}")
        (back,) = session.define(f"r:out {CALL} a=$comm b=$comm c=$comm d=$comm")
        command = guest.vm.start("caller 4 40009")
        session.run(command=command, timeout_s=50)
        lost = engine.lost()
        assert lost > 0
        assert probe.hits == back.hits == 40009
        assert lost + len(events) == 2 * 40009
        assert [e.ts_ns for e in events] == sorted(e.ts_ns for e in events)


def test_runs_end_with_what_was_begun(guest_of: GuestOf, monkeypatch: pytest.MonkeyPatch) -> None:
    # What an interrupt has recorded behind a record under way would be lost with the last run.
    guest = guest_of(smp=4)
    events = events_of(guest, "caller-")
    engine = guest.session.resident.engine
    (probe,) = guest.session.define(f"p {CALL} $kstack", tier="resident")
    asked: list[Callable[[], bool]] = []
    begun = engine.begun
    monkeypatch.setattr(engine, "begun", lambda: asked.append(begun()) or asked[-1])
    flood = guest.vm.start("caller 4 30011")
    for turn in range(40):
        assert guest.session.run(timeout_s=0.002 * (1 + turn % 5)) is None
        assert not asked[-1]()
    guest.session.run(command=flood, timeout_s=120)
    assert flood.poll() == 0
    assert len(events) + engine.lost() == probe.hits == 30011


def test_both_tiers_have_one_clock(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    session = guest.session

    def uptime_ns() -> int:
        return int(float(guest.run("cat /proc/uptime").split()[0]) * 1e9)

    before = uptime_ns()
    events = events_of(guest, "opener")
    session.define("p:called __x64_sys_openat", tier="resident")
    (stopped,) = session.define("p:stopped do_sys_openat2", tier="stop")
    guest.run("opener 3 211")  # at first a breakpoint stops it, then a doorbell
    after = uptime_ns()
    stamps = [e.ts_ns for e in events]
    assert stamps == sorted(stamps)
    assert before <= stamps[0] and stamps[-1] <= after + 10**7
    by_task: dict[int, list[str]] = {}
    for event in events:
        by_task.setdefault(event.task.pid, []).append(event.probe)
    for own in by_task.values():
        assert own == ["kprobes/called", "kprobes/stopped"] * (len(own) // 2)
    assert stopped.hits >= sum(len(own) // 2 for own in by_task.values()) >= 211


def test_over_a_stub_alone(vm: Vm) -> None:
    # A QEMU that others started: its RAM cannot be mapped, and is read at stops.
    with connect(str(vm.info.gdb_socket), str(vm.info.vmlinux)) as session:
        assert not session.target.capabilities.reads_while_running
        start, end = (session.kernel.address(name) for name in ("_text", "_etext"))
        before = session.kernel.memory.read(start, end - start)
        events: list[Event] = []
        session.event_listeners.append(events.append)
        session.define(f"p:in {CALL} $comm", tier="resident")
        session.define(f"r:out {CALL} $retval", tier="resident")
        session.run(command=vm.start("caller 4 1009"), timeout_s=60)
        assert Counter(e.probe for e in events) == {"kprobes/in": 1009, "kprobes/out": 1009}
        assert {e.fields["$comm"] for e in events if e.kind == "p"} == {
            f"caller-{n}" for n in range(4)
        }
        # Nothing ends this run but the clock, and calls that are far apart are told while it lasts.
        del events[:]
        sleeper = vm.start("caller 1 7")
        session.run(count=14, timeout_s=60)
        assert len(events) == 14
        session.run(command=sleeper, timeout_s=60)
        assert sleeper.wait(5).output.startswith("7 ")
        for probe in reversed(tuple(session.probes)):
            probe.unregister()
        session.resident.close()
        assert session.kernel.memory.read(start, end - start) == before
