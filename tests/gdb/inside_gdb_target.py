"""What only the gdb transport has; run inside gdb by test_gdb_target.py."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import gdb
import pytest

from kgdbx.attach import open_ram
from kgdbx.machine.vm import Vm
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe
from kgdbx.probes.manager import ProbeManager
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import BreakpointKind, Stop, StopReason
from kgdbx.target.gdb_qemu import GdbTarget

FUNCTION = "__x64_sys_getpgid"
CALLS = 307
DEADLINE_S = 150.0
SOFTWARE = BreakpointKind.SOFTWARE


class Attached:
    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        ram = open_ram(vm.info)
        self.target = GdbTarget(str(vm.info.gdb_socket), ram=ram)
        self.kernel = Kernel.attach(self.target, vm.info.vmlinux, ram_end=sum(ram.ranges()[-1]))
        self.probes = ProbeManager(self.kernel)
        self.address = self.kernel.address(FUNCTION)

    def run_to_end(self, command: str, on_stop: Callable[[Stop], bool]) -> None:
        started = self.vm.start(command)
        end = time.monotonic() + DEADLINE_S
        while started.poll() is None:
            assert time.monotonic() < end, f"{command} does not end"
            self.target.run(on_stop, timeout_s=0.5)


@pytest.fixture
def attached(clone_of: Callable[..., Vm]) -> Iterator[Attached]:
    it = Attached(clone_of(smp=1))
    yield it
    it.target.close()


@pytest.fixture
def attached4(clone_of: Callable[..., Vm]) -> Iterator[Attached]:
    it = Attached(clone_of(smp=4))
    yield it
    it.target.close()


def console() -> Any:
    return gdb.execute("maint info breakpoints", to_string=True)


def test_no_hit_is_lost_or_seen_twice_on_4_cpus(attached4: Attached) -> None:
    probes = attached4.probes
    probe = probes.register(Kprobe(FUNCTION))
    returns = probes.register(Kretprobe(FUNCTION))
    attached4.run_to_end(f"caller 4 {CALLS}", probes.on_stop)
    assert (probe.hits, returns.hits, returns.nmissed) == (CALLS, CALLS, 0)
    probes.close()


def test_probes_run_in_the_users_own_continue(attached: Attached) -> None:
    probe = attached.probes.register(
        Kprobe(FUNCTION, lambda p, hit: hit.stop() if p.hits == 7 else None)
    )
    attached.target.on_stop = attached.probes.on_stop
    attached.vm.start(f"caller 1 {CALLS}")
    gdb.execute("continue", to_string=True)
    assert probe.hits == 7
    assert int(gdb.parse_and_eval("$pc")) == attached.address + 5


def test_breakpoints_are_made_and_deleted_during_hits(attached: Attached) -> None:
    target, hits = attached.target, {0: 0, 5: 0}
    attached.vm.start("caller 1 1000000")

    def on_stop(stop: Stop) -> bool:
        at = target.read_registers(stop.cpu).rip - attached.address
        hits[at] += 1
        target.insert_breakpoint(SOFTWARE, attached.address + (5 - at))
        target.remove_breakpoint(SOFTWARE, attached.address + at)
        return hits[5] < 503

    target.insert_breakpoint(SOFTWARE, attached.address)
    stop = target.run(on_stop, timeout_s=120)
    assert stop is not None
    assert hits == {0: 503, 5: 503}
    assert len(gdb.breakpoints()) == 1


def test_a_hit_behind_a_breakpointed_byte_stays_there(attached: Attached) -> None:
    # gdb would take the stop at +1 for one at +0 and execute the push twice.
    target = attached.target
    attached.vm.start(f"caller 1 {CALLS}")
    target.insert_breakpoint(SOFTWARE, attached.address)
    stop = target.run(timeout_s=60)
    assert stop is not None
    push = attached.kernel.address("do_syscall_64")
    assert target.read_memory(push, 1) == b"\x55"
    target.insert_breakpoint(SOFTWARE, push)
    target.insert_breakpoint(SOFTWARE, push + 1)
    registers = target.read_registers(stop.cpu)
    registers.rip = push + 1
    target.write_registers(stop.cpu, registers)
    assert target.run(timeout_s=60) is not None
    assert target.read_registers(stop.cpu).rip == push + 1
    registers.rip = attached.address
    target.write_registers(stop.cpu, registers)


def test_a_breakpoint_of_the_user_right_behind_a_probe(attached: Attached) -> None:
    probe = attached.probes.register(Kprobe(FUNCTION))
    gdb.execute(f"break *{attached.address + 5:#x}", to_string=True)
    users = next(b for b in gdb.breakpoints() if b.number > 0)
    command = attached.vm.start("caller 1 23")
    stacks: list[int] = []  # the kernel places them at random in each call
    reports = 0
    try:
        while len(stacks) < 5:
            stop = attached.target.run(attached.probes.on_stop, timeout_s=60)
            assert stop == Stop(0, StopReason.TRAP)
            reports += 1
            assert users.hit_count == reports
            stack = attached.target.read_registers(0).rsp
            if stacks and (stack, probe.hits) == (stacks[-1], len(stacks)):
                # The same call, to which a plain gdb comes back, too: QEMU has ended its step over
                # the breakpoint before it was one (cpu_tb_exec() in accel/tcg/cpu-exec.c).
                continue
            stacks.append(stack)
            assert probe.hits == len(stacks)
    finally:
        users.delete()
    end = time.monotonic() + DEADLINE_S
    while command.poll() is None:
        assert time.monotonic() < end
        attached.target.run(attached.probes.on_stop, timeout_s=0.5)
    assert probe.hits == 23


def test_a_write_of_the_same_value_is_a_hit(attached: Attached) -> None:
    target = attached.target
    attached.vm.start("caller 1 1000000")
    target.insert_breakpoint(SOFTWARE, attached.address)
    stop = target.run(timeout_s=60)
    assert stop is not None
    target.remove_breakpoint(SOFTWARE, attached.address)
    orig_ax = target.read_registers(stop.cpu).rdi + 0x78  # of struct pt_regs: always getpgid
    target.insert_breakpoint(BreakpointKind.WATCH_WRITE, orig_ax, 8)
    values = []

    def on_stop(stop: Stop) -> bool:
        values.append(int.from_bytes(target.read_memory(orig_ax, 8), "little"))
        return len(values) < 50

    assert target.run(on_stop, timeout_s=60) == Stop(0, StopReason.WATCHPOINT, orig_ax)
    assert values.count(121) >= 40


def test_an_error_in_the_users_continue_is_kept_and_the_kernel_runs(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, written, hits = attached.target, [], 0
    monkeypatch.setattr(gdb, "write", lambda text, stream=0: written.append(text))

    def on_stop(stop: Stop) -> bool:
        nonlocal hits
        hits += 1
        if hits < 4:
            raise ZeroDivisionError("planted")
        return False

    target.on_stop = on_stop
    target.insert_breakpoint(SOFTWARE, attached.address)
    attached.vm.start(f"caller 1 {CALLS}")
    gdb.execute("continue", to_string=True)
    assert [type(e) for e in target.errors] == [ZeroDivisionError] * 3
    assert len(written) == 1
    assert "planted" in written[0]
    assert hits == 4


def test_control_c_in_a_handler_stops_the_kernel(attached: Attached) -> None:
    def on_stop(stop: Stop) -> bool:
        raise KeyboardInterrupt

    attached.target.insert_breakpoint(SOFTWARE, attached.address)
    attached.vm.start(f"caller 1 {CALLS}")
    stop = attached.target.run(on_stop, timeout_s=60)
    assert stop == Stop(0, StopReason.INTERRUPT, None, 2)


def test_close_leaves_gdb_as_it_was(clone_of: Callable[..., Vm]) -> None:
    def settings() -> tuple[Any, ...]:
        names = ("remote swbreak-feature-packet", "confirm", "pagination")
        sigtrap = gdb.execute("info signals SIGTRAP", to_string=True)
        return (*(gdb.parameter(name) for name in names), sigtrap)

    before = settings()
    it = Attached(clone_of(smp=1))
    it.probes.register(Kprobe(FUNCTION))
    assert settings() != before
    it.target.close()
    assert settings() == before
    assert gdb.breakpoints() == ()
    assert gdb.selected_inferior().connection is None
    assert it.vm.execute("caller 1 3", timeout_s=20).status == 0


def test_late_requests_leave_no_event_behind(attached: Attached) -> None:
    # gdb crashes at its exit when a posted event is left over; the exit status shows it.
    target = attached.target
    for _ in range(20):
        timer = threading.Timer(0.02, target.request_stop)
        timer.start()
        target.run(timeout_s=0.02)
        timer.join()
    target.close()
    assert not target._run_control.has_posted
