"""What every target promises."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from kgdbx.errors import MemoryFault, ProbeError, TargetError, TargetLost, Unsupported
from kgdbx.target.base import BreakpointKind, Stop, StopReason, Target

if TYPE_CHECKING:
    from conftest import Guest

CALLS = 23
SOFTWARE, HARDWARE = BreakpointKind.SOFTWARE, BreakpointKind.HARDWARE
DEADLINE_S = 60.0
MANY = 1009


def run_to_end(guest: Guest, on_stop: Callable[[Stop], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not guest.done():
        assert time.monotonic() < end, "the guest does not come to its end"
        guest.target.run(on_stop, timeout_s=0.3)


def run_to_probed(guest: Guest, kind: BreakpointKind = SOFTWARE) -> Stop:
    guest.begin(CALLS)
    guest.target.insert_breakpoint(kind, guest.probed)
    stop = guest.target.run(timeout_s=DEADLINE_S)
    assert stop is not None
    return stop


# Memory


def test_memory_is_written_and_read(guest: Guest, target: Target) -> None:
    before = target.read_memory(guest.data, 4)
    target.write_memory(guest.data, b"\x12\x34\x56\x78")
    assert target.read_memory(guest.data, 4) == b"\x12\x34\x56\x78"
    target.write_memory(guest.data, before)
    assert target.read_memory(guest.data, 4) == before


def test_code_is_written(guest: Guest, target: Target) -> None:
    before = target.read_memory(guest.probed, 5)
    if not target.capabilities.writes_code:
        with pytest.raises(MemoryFault, match="cannot write"):
            target.write_memory(guest.probed, b"\x90" * 5)
        assert target.read_memory(guest.probed, 5) == before
        return
    target.write_memory(guest.probed, b"\x90" * 5)
    assert target.read_memory(guest.probed, 5) == b"\x90" * 5
    target.write_memory(guest.probed, before)
    assert target.read_memory(guest.probed, 5) == before


def test_memory_larger_than_a_packet(guest: Guest, target: Target) -> None:
    size = 0x100 if target.name == "fake" else 0x3001
    at = guest.probed & ~0xFFF
    whole = target.read_memory(at, size)
    assert len(whole) == size
    assert whole[0x80:0x90] == target.read_memory(at + 0x80, 16)


def test_unmapped_memory_is_a_fault_with_its_address(guest: Guest, target: Target) -> None:
    with pytest.raises(MemoryFault) as read:
        target.read_memory(guest.unmapped, 8)
    assert read.value.address == guest.unmapped
    assert read.value.size_bytes == 8
    with pytest.raises(MemoryFault) as write:
        target.write_memory(guest.unmapped, b"12345678")
    assert write.value.address == guest.unmapped
    assert "cannot write" in str(write.value)


def test_physical_memory_is_the_same_memory(guest: Guest, target: Target) -> None:
    before = target.read_physical(guest.physical, 4)
    assert before == target.read_memory(guest.data, 4)
    target.write_physical(guest.physical, b"\x01\x02\x03\x04")
    assert target.read_memory(guest.data, 4) == b"\x01\x02\x03\x04"
    target.write_memory(guest.data, before)
    assert target.read_physical(guest.physical, 4) == before


def test_physical_memory_that_is_no_ram(target: Target) -> None:
    if type(target).__name__ in ("RspTarget", "GdbTarget") and (
        not target.capabilities.reads_while_running
    ):
        assert target.read_physical(1 << 46, 8) == bytes(8)  # QEMU's stub cannot tell
        return
    with pytest.raises(MemoryFault) as fault:
        target.read_physical(1 << 46, 8)
    assert fault.value.address == 1 << 46
    assert fault.value.physical


def test_physical_memory_while_the_kernel_runs(guest: Guest, target: Target) -> None:
    before = target.read_memory(guest.data, 4)
    read: list[bytes] = []

    def on_idle() -> None:
        target.write_physical(guest.physical, bytes((0, 1, 2, len(read))))
        read.append(target.read_physical(guest.physical, 4))
        with pytest.raises(MemoryFault):
            target.write_physical(1 << 46, b"12345678")
        if len(read) == 5:
            target.request_stop()

    if target.capabilities.writes_while_running:
        assert target.run(None, DEADLINE_S, on_idle) is None
        assert read == [bytes((0, 1, 2, n)) for n in range(5)]
        assert target.read_memory(guest.data, 4) == read[-1]
    else:
        with pytest.raises(Unsupported):
            target.run(None, DEADLINE_S, on_idle)
    target.write_memory(guest.data, before)


# Registers


def test_registers_are_kept_for_each_cpu(target: Target) -> None:
    assert target.cpus() == (0, 1)
    before = [target.read_registers(cpu) for cpu in target.cpus()]
    for cpu in target.cpus():
        registers = target.read_registers(cpu)
        registers.r12 = 0x1234_0000 + cpu
        registers.rbx = (1 << 64) - 1 - cpu
        target.write_registers(cpu, registers)
    for cpu in target.cpus():
        registers = target.read_registers(cpu)
        assert registers.r12 == 0x1234_0000 + cpu
        assert registers.rbx == (1 << 64) - 1 - cpu
        assert registers.rip == before[cpu].rip
        registers.r12, registers.rbx = before[cpu].r12, before[cpu].rbx
        target.write_registers(cpu, registers)


# Breakpoints


@pytest.mark.parametrize("kind", [SOFTWARE, HARDWARE])
def test_each_pass_is_one_hit(guest: Guest, target: Target, kind: BreakpointKind) -> None:
    pcs = []

    def on_stop(stop: Stop) -> bool:
        assert stop.reason is StopReason.TRAP
        pcs.append(target.read_registers(stop.cpu).rip)
        registers = target.read_registers(stop.cpu)
        registers.rip = guest.following
        target.write_registers(stop.cpu, registers)
        return True

    guest.begin(CALLS)
    target.insert_breakpoint(kind, guest.probed)
    run_to_end(guest, on_stop)
    assert pcs == [guest.probed] * CALLS


def test_a_hit_steps_past_its_breakpoint(guest: Guest, target: Target) -> None:
    hits = 0

    def on_stop(stop: Stop) -> bool:
        nonlocal hits
        hits += 1
        target.step(stop.cpu)
        assert target.read_registers(stop.cpu).rip == guest.following
        return True

    guest.begin(CALLS)
    target.insert_breakpoint(SOFTWARE, guest.probed)
    run_to_end(guest, on_stop)
    assert hits == CALLS


def test_a_removed_breakpoint_is_not_hit(guest: Guest, target: Target) -> None:
    hits = 0

    def on_stop(stop: Stop) -> bool:
        nonlocal hits
        hits += 1
        target.step(stop.cpu)
        return hits < 5

    guest.begin(CALLS)
    target.insert_breakpoint(SOFTWARE, guest.probed)
    assert target.run(on_stop, timeout_s=DEADLINE_S) is not None
    target.remove_breakpoint(SOFTWARE, guest.probed)
    target.remove_breakpoint(SOFTWARE, guest.probed)
    run_to_end(guest, on_stop)
    assert hits == 5


def test_breakpoints_come_and_go_during_a_hit(guest: Guest, target: Target) -> None:
    hits = {guest.probed: 0, guest.following: 0}

    def on_stop(stop: Stop) -> bool:
        pc = target.read_registers(stop.cpu).rip
        other = guest.following if pc == guest.probed else guest.probed
        hits[pc] += 1
        target.insert_breakpoint(SOFTWARE, other)
        target.remove_breakpoint(SOFTWARE, pc)
        return True

    guest.begin(CALLS)
    target.insert_breakpoint(SOFTWARE, guest.probed)
    run_to_end(guest, on_stop)
    assert hits == {guest.probed: CALLS, guest.following: CALLS}


def test_a_breakpoint_is_inserted_once(guest: Guest, target: Target) -> None:
    target.insert_breakpoint(SOFTWARE, guest.probed)
    with pytest.raises(ProbeError) as error:
        target.insert_breakpoint(SOFTWARE, guest.probed)
    assert error.value.errno == errno.EBUSY


def test_there_are_four_debug_registers(guest: Guest, target: Target) -> None:
    for n in range(3):
        target.insert_breakpoint(HARDWARE, guest.probed + n)
    target.insert_breakpoint(BreakpointKind.WATCH_WRITE, guest.written, 8)
    for kind, size in ((HARDWARE, 1), (BreakpointKind.WATCH_ACCESS, 8)):
        with pytest.raises(ProbeError) as error:
            target.insert_breakpoint(kind, guest.data, size)
        assert error.value.errno == errno.ENOSPC
    target.remove_breakpoint(HARDWARE, guest.probed)
    target.insert_breakpoint(HARDWARE, guest.probed + 3)


def test_as_many_software_breakpoints_as_it_says(guest: Guest, target: Target) -> None:
    most = target.capabilities.software_breakpoints
    for n in range(most or MANY):
        target.insert_breakpoint(SOFTWARE, guest.probed + n)
    if most is not None:
        with pytest.raises(ProbeError) as error:
            target.insert_breakpoint(SOFTWARE, guest.probed + most)
        assert error.value.errno == errno.ENOSPC
        target.remove_breakpoint(SOFTWARE, guest.probed)
        target.insert_breakpoint(SOFTWARE, guest.probed)


@pytest.mark.parametrize("kind", [BreakpointKind.WATCH_WRITE, BreakpointKind.WATCH_ACCESS])
def test_a_watchpoint_reports_its_address(
    guest: Guest, target: Target, kind: BreakpointKind
) -> None:
    stops: list[Stop] = []

    def on_stop(stop: Stop) -> bool:
        stops.append(stop)
        return len(stops) < 3

    guest.begin(1000)
    target.insert_breakpoint(kind, guest.written, 8)
    assert target.run(on_stop, timeout_s=DEADLINE_S) is stops[-1]
    assert len(stops) == 3
    assert {stop.reason for stop in stops} == {StopReason.WATCHPOINT}
    assert {stop.address for stop in stops} == {guest.written}


@pytest.mark.parametrize("kind", [BreakpointKind.WATCH_WRITE, BreakpointKind.WATCH_ACCESS])
def test_a_watchpoint_stops_at_accesses_alone(
    guest: Guest, target: Target, kind: BreakpointKind
) -> None:
    reasons: list[StopReason] = []

    def on_stop(stop: Stop) -> bool:
        reasons.append(stop.reason)
        return len(reasons) < CALLS

    guest.begin(1000)
    target.insert_breakpoint(kind, guest.data, 4)
    target.insert_breakpoint(SOFTWARE, guest.probed)
    assert target.run(on_stop, timeout_s=DEADLINE_S) is not None
    assert reasons == [StopReason.TRAP] * CALLS


# Run control


def test_a_step_moves_one_cpu(guest: Guest, target: Target) -> None:
    stop = run_to_probed(guest)
    other = 1 - stop.cpu
    before = target.read_registers(other).rip
    assert target.read_registers(stop.cpu).rip == guest.probed
    stepped = target.step(stop.cpu)
    assert stepped.cpu == stop.cpu
    assert stepped.reason is StopReason.TRAP
    assert target.read_registers(stop.cpu).rip == guest.following
    assert target.read_registers(other).rip == before


def test_a_breakpoint_under_the_pc_is_hit_again(guest: Guest, target: Target) -> None:
    run_to_probed(guest)
    stop = target.run(timeout_s=DEADLINE_S)
    assert stop is not None
    assert target.read_registers(stop.cpu).rip == guest.probed


def test_a_run_ends_with_its_time_and_the_kernel_stands(guest: Guest, target: Target) -> None:
    started = time.monotonic()
    assert target.run(timeout_s=0.3) is None
    assert 0.25 < time.monotonic() - started < 10
    assert not target.running
    first = [target.read_registers(cpu).rip for cpu in target.cpus()]
    time.sleep(0.1)
    assert [target.read_registers(cpu).rip for cpu in target.cpus()] == first


def test_a_run_ends_on_request(target: Target) -> None:
    timer = threading.Timer(0.2, target.request_stop)
    timer.start()
    started = time.monotonic()
    assert target.run(timeout_s=30) is None
    assert time.monotonic() - started < 10
    timer.join()
    assert target.run(timeout_s=0.1) is None


def test_a_request_before_a_run_ends_it(target: Target) -> None:
    target.request_stop()
    started = time.monotonic()
    assert target.run(timeout_s=30) is None
    assert time.monotonic() - started < 10


def test_interrupt_of_a_standing_kernel_is_its_last_stop(guest: Guest, target: Target) -> None:
    stop = run_to_probed(guest)
    assert target.interrupt() == stop


def test_resume_and_interrupt(guest: Guest, target: Target) -> None:
    if target.name != "fake" and type(target).__name__ == "GdbTarget":
        pytest.skip("gdb cannot wait for a stop inside of a command")
    guest.begin(3)
    target.resume()
    assert target.running
    assert target.interrupt().reason is StopReason.INTERRUPT
    assert not target.running


def test_an_error_of_on_stop_comes_out_of_run(guest: Guest, target: Target) -> None:
    def on_stop(stop: Stop) -> bool:
        raise ZeroDivisionError("planted")

    guest.begin(CALLS)
    target.insert_breakpoint(SOFTWARE, guest.probed)
    with pytest.raises(ZeroDivisionError, match="planted"):
        target.run(on_stop, timeout_s=DEADLINE_S)
    assert not target.running
    assert target.read_registers(target.interrupt().cpu).rip == guest.probed


# Idle


def test_on_idle_is_called_while_nothing_stops(guest: Guest, target: Target) -> None:
    calls: list[tuple[float, float]] = []

    def on_idle() -> None:
        began = time.monotonic()
        assert threading.current_thread() is threading.main_thread()
        assert target.running
        time.sleep(0.005)
        calls.append((began, time.monotonic()))
        if len(calls) == 10:
            target.request_stop()

    started = time.monotonic()
    assert target.run(None, DEADLINE_S, on_idle, 0.02) is None
    assert not target.running
    assert len(calls) == 10
    ends = [started, *(end for _, end in calls)]
    pauses = [began - end for (began, _), end in zip(calls, ends, strict=False)]
    assert min(pauses) > 0.019
    assert sorted(pauses)[len(pauses) // 2] < 0.5
    assert target.run(None, 0.1) is None
    assert len(calls) == 10


def test_on_idle_does_not_wait_for_a_pause_between_stops(guest: Guest, target: Target) -> None:
    hits, seen = 0, []
    standing = False

    def on_stop(stop: Stop) -> bool:
        nonlocal hits, standing
        standing = True
        hits += 1
        target.step(stop.cpu)
        standing = False
        return True

    def on_idle() -> None:
        assert target.running
        assert not standing
        if hits:  # the guest has begun
            seen.append(hits)
        if len(seen) == 5:
            target.request_stop()

    guest.begin(1_000_000)
    target.insert_breakpoint(SOFTWARE, guest.probed)
    assert target.run(on_stop, DEADLINE_S, on_idle, 0.1) is None
    assert len(seen) == 5
    assert seen[0] < seen[-1] <= hits


def test_a_run_ends_in_time_whatever_on_idle_takes(target: Target) -> None:
    started = time.monotonic()
    assert target.run(None, 0.3, lambda: time.sleep(0.02), 0.0) is None
    assert 0.25 < time.monotonic() - started < 10


def test_an_error_of_on_idle_comes_out_of_run(guest: Guest, target: Target) -> None:
    def on_idle() -> None:
        raise ZeroDivisionError("planted")

    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="planted"):
            target.run(None, DEADLINE_S, on_idle)
        assert not target.running
    run_to_probed(guest)


def test_no_hit_is_lost_when_on_idle_fails(guest: Guest, target: Target) -> None:
    hits = 0

    def on_stop(stop: Stop) -> bool:
        nonlocal hits
        hits += 1
        target.step(stop.cpu)
        return True

    def on_idle() -> None:
        raise ZeroDivisionError("planted")

    guest.begin(CALLS)
    target.insert_breakpoint(SOFTWARE, guest.probed)
    end = time.monotonic() + DEADLINE_S
    while not guest.done():
        assert time.monotonic() < end, "the guest does not come to its end"
        with pytest.raises(ZeroDivisionError, match="planted"):
            target.run(on_stop, DEADLINE_S, on_idle, 0.002)
    assert hits == CALLS


# Leaving


def test_close_removes_breakpoints_and_lets_the_kernel_run(guest: Guest, target: Target) -> None:
    run_to_probed(guest)
    target.insert_breakpoint(BreakpointKind.WATCH_WRITE, guest.written, 8)
    target.close()
    target.close()
    assert guest.runs_freely()
    with pytest.raises(TargetLost):
        target.read_memory(guest.data, 4)


def test_a_guest_killed_during_a_run_is_lost(guest: Guest, target: Target) -> None:
    target.insert_breakpoint(SOFTWARE, guest.probed)
    timer = threading.Timer(0.3, guest.kill)
    timer.start()
    started = time.monotonic()
    with pytest.raises(TargetLost):
        target.run(timeout_s=30)
    assert time.monotonic() - started < 10
    timer.join()
    with pytest.raises(TargetLost):
        target.read_memory(guest.data, 4)
    target.close()


def test_nothing_to_connect_to(guest: Guest) -> None:
    with pytest.raises(TargetError, match="/nonexistent/gdb.sock"):
        guest.connect_to_nothing()
