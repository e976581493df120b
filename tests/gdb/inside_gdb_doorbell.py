"""Doorbells beside what only gdb has; run inside gdb by test_gdb_target.py."""

from collections.abc import Callable, Iterator
from typing import Any

import gdb
import pytest

from kgdbx.gdb.attach import connect
from kgdbx.machine.vm import Vm
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.probe import Hit, Probe
from kgdbx.session import Session

FUNCTION = "__x64_sys_getpgid"
CALLS = 149
STOPS = (7, 130, 131, CALLS)  # none while the breakpoint gives way: there may be more hits


class Attached:
    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.session: Session = connect(vm.name, None, keys=False)
        self.address = self.session.kernel.address(FUNCTION)

    def rings(self, probe: Probe) -> bool:
        """Whether a probe's place has a doorbell."""
        (site,) = (s for s in self.session.probes.sites if s.address == probe.points[0].address)
        return site.resume is not None

    def run(self, command: str) -> None:
        started = self.vm.start(command)
        self.session.run(command=started, timeout_s=60)
        assert started.wait(5).output.split()[0] == command.split()[2]


@pytest.fixture
def attached(clone_of: Callable[..., Vm]) -> Iterator[Attached]:
    it = Attached(clone_of(smp=4))
    yield it
    for each in gdb.breakpoints():
        if each.number > 0:
            each.delete()
    it.session.close()


def users_breakpoint(place: str) -> Any:
    gdb.execute(f"break {place}", to_string=True)
    return next(b for b in gdb.breakpoints() if b.number > 0)


def test_in_the_users_own_continue(attached: Attached) -> None:
    places = []

    def handler(p: Probe, hit: Hit) -> None:
        if p.hits in STOPS:
            hit.stop()

    probe = attached.session.register(Kprobe(FUNCTION, handler))
    command = attached.vm.start(f"caller 1 {CALLS}")
    for hits in STOPS:
        gdb.execute("continue", to_string=True)
        assert probe.hits >= hits
        pc = int(gdb.parse_and_eval("$pc"))
        places.append(attached.session.kernel.symbolize(pc).partition("+")[0])
    assert attached.rings(probe)
    assert places == [FUNCTION] * 4
    attached.session.run(command=command, timeout_s=30)
    assert command.wait(5).output.startswith(f"{CALLS} ")
    assert probe.hits == CALLS
    assert attached.session.target.errors == []  # type: ignore[attr-defined]


def test_the_user_looks_at_the_vcpu_that_stopped(attached: Attached) -> None:
    # Several may ring at once, and QEMU reports any of them.
    stopped: list[int] = []

    def handler(p: Probe, hit: Hit) -> None:
        if p.hits > STOPS[1] and p.hits % 20 == 0:
            stopped.append(hit.cpu)
            hit.stop()

    attached.session.register(Kprobe(FUNCTION, handler))
    command = attached.vm.start("caller 4 1000000")
    for n in range(1, 11):
        gdb.execute("continue", to_string=True)
        assert gdb.selected_thread().num == stopped[-1] + 1
        assert len(stopped) == n
        pc = int(gdb.parse_and_eval("$pc"))
        assert attached.session.kernel.symbolize(pc).startswith(FUNCTION)
    command.discard()


def test_a_breakpoint_of_the_user_elsewhere_keeps_ours_one(attached: Attached) -> None:
    # The kernel cannot run on during a hit without hits of the user's getting lost.
    users = users_breakpoint("*__x64_sys_getsid")
    for rings in (False, True):
        probe = attached.session.register(Kprobe(FUNCTION, lambda regs: None))
        attached.run(f"caller 4 {CALLS}")
        assert (probe.hits, attached.rings(probe)) == (CALLS, rings)
        probe.unregister()
        users.enabled = False


def test_a_breakpoint_of_the_user_behind_a_doorbell(attached: Attached) -> None:
    probe = attached.session.register(Kprobe(FUNCTION, lambda regs: None))
    attached.run(f"caller 4 {CALLS}")
    assert attached.rings(probe)
    users = users_breakpoint(f"*{attached.address + 5:#x}")
    users.condition = "0"
    attached.run(f"caller 4 {CALLS}")
    assert (probe.hits, users.hit_count) == (2 * CALLS, 0)  # gdb counts true conditions only
    users.condition = None
    users.silent = True
    command = attached.vm.start("caller 1 7")
    for n in range(1, 8):
        gdb.execute("continue", to_string=True)
        assert (probe.hits, users.hit_count) == (2 * CALLS + n, n)
    users.delete()
    attached.session.run(command=command, timeout_s=30)
    assert command.wait(5).output.startswith("7 ")


def test_a_handler_places_a_resident_probe(attached: Attached) -> None:
    inner: list[Probe] = []

    def handler(p: Probe, hit: Hit) -> None:
        if p.hits == 11:
            inner.extend(attached.session.define("p vfs_read count", tier="resident"))

    probe = attached.session.register(Kprobe(FUNCTION, handler))
    attached.run(f"caller 4 {CALLS}")
    assert (probe.hits, probe.nfaults) == (CALLS, 0)
    assert [p.tier for p in inner] == ["resident"]
    attached.run("caller 1 3")
    attached.session.poll(None)
    assert inner[0].hits > 0


def test_a_handler_cannot_place_one_beside_breakpoints_of_the_user(attached: Attached) -> None:
    users = users_breakpoint("*__x64_sys_getsid")

    def handler(p: Probe, hit: Hit) -> None:
        if p.hits == 11:
            attached.session.define("p vfs_read count", tier="resident")

    probe = attached.session.register(Kprobe(FUNCTION, handler))
    attached.run(f"caller 4 {CALLS}")  # the registers of the call that was hit are what they were
    assert (probe.hits, probe.nfaults) == (CALLS, 1)
    assert "breakpoints of yours" in str(probe.faults[0].error)
    users.enabled = False
    attached.run(f"caller 4 {CALLS}")
    assert probe.hits == 2 * CALLS


def test_steps_from_a_doorbell(attached: Attached) -> None:
    probe = attached.session.register(
        Kprobe(FUNCTION, lambda p, hit: hit.stop() if p.hits == STOPS[1] else None)
    )
    command = attached.vm.start(f"caller 1 {CALLS}")
    gdb.execute("continue", to_string=True)
    assert attached.rings(probe)
    hits = probe.hits
    for _ in range(3):
        gdb.execute("stepi", to_string=True)
    gdb.execute("finish", to_string=True)
    assert probe.hits == hits
    attached.session.run(command=command, timeout_s=30)
    assert command.wait(5).output.startswith(f"{CALLS} ")
    assert probe.hits == CALLS
