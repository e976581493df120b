"""Probes that come and go, and runs that are interrupted, while every vCPU hits them."""

import time
from collections.abc import Callable
from typing import Any

from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe, KretprobeInstance
from kgdbx.symbols.tasks import Task

GuestOf = Callable[..., Any]
DEADLINE_S = 100.0


def test_registered_and_unregistered_under_fire(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    before = guest.text()
    hits = [0, 0]

    def entered(task: Task) -> None:
        assert task.comm.startswith(("caller", "sh"))
        hits[0] += 1

    def returned(ri: KretprobeInstance) -> None:
        hits[1] += 1

    command = guest.vm.start("until [ -e /tmp/enough ]; do caller 4 100003 || exit 1; done")
    missed = faults = rounds = 0
    end = time.monotonic() + DEADLINE_S
    while rounds < 100 or hits[0] <= 50 or hits[1] <= 10:
        assert time.monotonic() < end, f"{hits} hits in {rounds} rounds"
        assert command.poll() is None
        guest.session.run(timeout_s=0.004)
        with (
            guest.session.register(Kprobe("__x64_sys_getpgid", entered)) as probe,
            guest.session.register(Kretprobe("do_getpgid", returned)) as rp,
        ):
            guest.session.run(timeout_s=0.01)
            missed += rp.nmissed
            faults += probe.nfaults + rp.nfaults
        assert rp.active_instances == []
        rounds += 1
    assert (missed, faults) == (0, 0)
    guest.vm.start("touch /tmp/enough")
    guest.session.run(timeout_s=40, command=command)
    done = command.wait(5)
    assert done.status == 0
    assert {line.partition(" ")[0] for line in done.output.splitlines()} == {"100003"}
    assert (guest.text(), guest.session.probes.sites) == (before, ())


def test_no_hit_is_lost_by_runs_that_end_all_the_time(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    counts = {"entry": 0, "return": 0}

    def counting(what: str) -> Callable[[Task], None]:
        def handler(task: Task) -> None:
            counts[what] += task.comm.startswith("caller-")

        return handler

    guest.session.register(Kprobe("__x64_sys_getpgid", counting("entry")))
    rp = guest.session.register(Kretprobe("__x64_sys_getpgid", counting("return")))
    end = time.monotonic() + DEADLINE_S
    runs = turns = 0
    while runs <= 50:
        command = guest.vm.start("caller 4 307")
        turns += 1
        while command.poll() is None:
            guest.session.run(timeout_s=0.002 * (1 + runs % 7))
            runs += 1
            assert time.monotonic() < end, f"{counts} hits in {runs} runs"
        assert command.wait(5).output.startswith("307 ")
        assert counts == {"entry": 307 * turns, "return": 307 * turns}
    assert (rp.nmissed, rp.active_instances) == (0, [])


def test_no_hit_is_lost_while_another_probe_comes_and_goes(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    counts = [0, 0]

    def entered(task: Task) -> None:
        if task.comm.startswith("caller-"):
            counts[0] += 1
            if counts[0] % 5 == 0:
                passing.append(guest.session.register(Kprobe("do_getpgid+5")))
            elif passing:
                passing.pop().unregister()

    def returned(task: Task) -> None:
        counts[1] += task.comm.startswith("caller-")

    passing: list[Any] = []
    guest.session.register(Kprobe("__x64_sys_getpgid", entered))
    guest.session.register(Kretprobe("__x64_sys_getpgid", returned))
    assert guest.run("caller 4 211").startswith("211 ")
    assert counts == [211, 211]


def test_time_passes_under_steady_hits(guest_of: GuestOf) -> None:
    guest = guest_of(smp=1)
    workload = guest.vm.start("dd if=/dev/zero of=/dev/null bs=64M")
    probe = guest.session.register(Kprobe("__cond_resched", lambda regs: None))
    end = time.monotonic() + DEADLINE_S
    runs = 0
    while runs < 3 or probe.hits <= 10:  # hits come faster than an idle socket is waited for
        start = time.monotonic()
        assert start < end, f"{probe.hits} hits in {runs} runs"
        assert guest.session.run(timeout_s=0.5) is None
        assert time.monotonic() - start < 5
        runs += 1
    guest.session.close()
    workload.discard()
