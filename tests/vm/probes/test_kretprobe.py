"""kretprobes on a real kernel: every return, by whatever way a call ends."""

import errno
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.arch.registers import Registers
from kgdbx.probes.jprobe import Jprobe
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe, KretprobeInstance
from kgdbx.probes.probe import Hit
from kgdbx.symbols.tasks import Task

CALLS = 23
GuestOf = Callable[..., Any]


def is_caller(task: Task) -> bool:
    return task.comm.startswith("caller-")


@pytest.mark.parametrize(
    ("kernel", "smp", "calls"), [("6.1", 4, 1009), ("6.12", 4, 211), ("6.1", 1, 101)]
)
def test_exactly_as_many_entries_and_returns_as_calls(
    guest_of: GuestOf, kernel: str, smp: int, calls: int
) -> None:
    guest = guest_of(kernel, smp)
    order: dict[int, list[str]] = {}

    def entered(task: Task) -> None:
        if is_caller(task):
            order.setdefault(task.pid, []).append("entry")

    def returned(ri: KretprobeInstance, task: Task) -> None:
        assert ri.task == task
        if is_caller(task):
            order.setdefault(task.pid, []).append("return")

    guest.session.register(Kprobe("__x64_sys_getpgid", entered))
    rp = guest.session.register(Kretprobe("__x64_sys_getpgid", returned))
    assert guest.run(f"caller 4 {calls}").startswith(f"{calls} ")
    shares = [calls // 4 + (thread < calls % 4) for thread in range(4)]
    assert sorted(len(each) for each in order.values()) == sorted(2 * n for n in shares)
    for each in order.values():
        assert each == ["entry", "return"] * (len(each) // 2)
    assert (rp.nmissed, rp.nfaults, rp.abandoned, rp.active_instances) == (0, 0, 0, [])


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_return_value_and_instance(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    seen: list[tuple[Any, ...]] = []

    def returned(ri: KretprobeInstance, retval: Any, regs: Registers, task: Task) -> None:
        if task.comm == "opener-0":
            where = guest.kernel.symbolize(ri.ret_addr)
            seen.append((retval.value_(), retval.type_.type_name(), where.partition("+")[0]))
            assert (ri.rp, ri.task, regs.ip) == (rp, task, ri.ret_addr)

    rp = guest.session.register(Kretprobe("do_sys_openat2", returned))
    guest.run(f"opener 1 {CALLS} /nope")
    (caller,) = {where for _, _, where in seen}
    assert caller in ("__x64_sys_openat", "do_sys_open")
    kind = seen[0][1]
    assert kind in ("long", "int")  # Linux kernel commit in v6.12 stable made it int
    assert seen == [(-errno.ENOENT, kind, caller)] * CALLS


def test_return_value_changed(guest: Any) -> None:
    def fail(ri: KretprobeInstance, regs: Registers) -> None:
        if ri.task.comm.startswith("opener-"):
            regs.ax = -errno.EMFILE

    with guest.session.register(Kretprobe("do_sys_openat2", fail)):
        assert guest.run(f"opener 2 {CALLS}") == "0\n"
    assert guest.run(f"opener 2 {CALLS}") == f"{CALLS}\n"


def test_entry_handler_keeps_data_and_declines(guest: Any) -> None:
    entries, returns = [], []

    def entered(ri: KretprobeInstance, dfd: Any, task: Task) -> bool:
        if not task.comm.startswith("opener-"):
            return True
        entries.append(task.pid)
        ri.data = (len(entries), dfd.value_())
        return len(entries) % 2 == 0

    def returned(ri: KretprobeInstance) -> None:
        returns.append(ri.data)

    rp = guest.session.register(Kretprobe("do_sys_openat2", returned, entry_handler=entered))
    guest.run(f"opener 1 {CALLS}")
    assert returns == [(n, -100) for n in range(1, CALLS + 1, 2)]
    assert (rp.hits, rp.nmissed, rp.active_instances) == (len(returns), 0, [])


@pytest.mark.parametrize("smp", [2, 4])
def test_default_maxactive(guest_of: GuestOf, smp: int) -> None:
    # With CONFIG_PREEMPT, which may be chosen at boot on these kernels: max(10, 2 * CPUs).
    guest = guest_of("6.12" if smp == 2 else "6.1", smp)
    rp = guest.session.register(Kretprobe("do_nanosleep"))
    assert rp.maxactive == 10
    assert guest.session.register(Kretprobe("do_nanosleep", maxactive=3)).maxactive == 3


def test_calls_without_a_free_instance_are_counted(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    returned = []

    def handler(ri: KretprobeInstance) -> None:
        returned.append(ri.task.comm)

    def sleeping(task: Task) -> bool:
        return not is_caller(task)

    rp = guest.session.register(
        Kretprobe("do_nanosleep", handler, entry_handler=sleeping, maxactive=1)
    )
    entry = guest.session.register(Kprobe("do_nanosleep"))
    guest.run("caller 4 61 100000")
    assert rp.hits == len(returned) > 0
    assert rp.nmissed > 0
    assert len(returned) + rp.nmissed == entry.hits == 61
    assert rp.active_instances == []


def test_recursion(guest: Any) -> None:
    depths = []
    depth = 0

    def entered(task: Task) -> None:
        nonlocal depth
        depth += 1

    def returned(ri: KretprobeInstance) -> None:
        nonlocal depth
        depths.append((depth, len(rp.active_instances)))
        depth -= 1

    rp = guest.session.register(Kretprobe("ep_loop_check_proc", returned, entry_handler=entered))
    assert guest.run("nester 4 3") == "12\n"
    once = [(1, 0), (2, 1), (1, 0), (3, 2), (2, 1), (1, 0), (4, 3), (3, 2), (2, 1), (1, 0)]
    assert depths == once * 3
    assert (rp.hits, rp.nmissed, rp.abandoned) == (30, 0, 0)


def test_recursion_deeper_than_maxactive(guest: Any) -> None:
    rp = guest.session.register(Kretprobe("ep_loop_check_proc", maxactive=2))
    assert guest.run("nester 4 3") == "12\n"
    assert (rp.hits, rp.nmissed, rp.active_instances) == (3 * 7, 3 * 3, [])


def test_task_moves_to_another_cpu_inside(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    cpus: Counter[bool] = Counter()

    def entered(ri: KretprobeInstance, cpu: int) -> None:
        ri.data = cpu

    def returned(ri: KretprobeInstance, cpu: int) -> None:
        cpus[ri.data != cpu] += 1

    # sched_setaffinity() returns on a CPU that it has just made the only one.
    where = "__x64_sys_sched_setaffinity"
    rp = guest.session.register(Kretprobe(where, returned, entry_handler=entered))
    assert guest.run("opener -m 2 31") == "31\n"
    assert cpus.total() == rp.hits == 31
    assert cpus[True] > 15
    assert (rp.nmissed, rp.abandoned) == (0, 0)


def test_function_that_never_returns(guest: Any) -> None:
    rp = guest.session.register(Kretprobe("do_exit", maxactive=2))
    entry = guest.session.register(Kprobe("do_exit"))
    guest.run("i=0; while [ $i -lt 23 ]; do /bin/true; i=$((i+1)); done")
    assert entry.hits >= 23
    assert (rp.hits, rp.nmissed) == (0, 0)
    assert rp.abandoned >= 21
    assert len(rp.active_instances) == entry.hits - rp.abandoned <= 2


@pytest.mark.parametrize("kernel", ["6.12"])
def test_exec_returns_in_another_address_space(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    seen = []

    def entered(ri: KretprobeInstance, task: Task) -> None:
        ri.data = task.comm

    def returned(ri: KretprobeInstance, retval: Any, task: Task) -> None:
        seen.append((ri.data, task.comm, retval.value_()))

    rp = guest.session.register(Kretprobe("__x64_sys_execve", returned, entry_handler=entered))
    guest.run(
        "i=0; while [ $i -lt 3 ]; do /bin/caller 1 1; i=$((i+1)); done >/dev/null; exec /nope",
        status=127,
    )
    assert seen.count(("sh", "caller", 0)) == 3
    assert (rp.nmissed, rp.active_instances) == (0, [])


def test_several_probes_of_all_kinds_at_one_function(guest: Any) -> None:
    log: list[str] = []

    def noting(name: str) -> Callable[[Task], None]:
        def handler(task: Task) -> None:
            if is_caller(task):
                log.append(name)

        return handler

    where = "__x64_sys_getpgid"
    for probe in (
        Kretprobe(where, noting("r1 return"), entry_handler=noting("r1 entry")),
        Kprobe(where, noting("k pre"), post_handler=noting("k post")),
        Jprobe(where, noting("j")),
        Kretprobe(where, noting("r2 return"), entry_handler=noting("r2 entry")),
    ):
        guest.session.register(probe)
    before = guest.session.target.connection.packets_sent
    guest.run(f"caller 1 {CALLS}")
    packets = guest.session.target.connection.packets_sent - before
    # Returns newest first, as the kernel runs a task's instances.
    once = ["r1 entry", "k pre", "j", "r2 entry", "k post", "r2 return", "r1 return"]
    assert log == once * CALLS
    assert len(guest.session.probes.sites) <= 2 + 1  # entry, return of the system call's caller
    # Two stops a call, however many probes: registers read, one written, resumed.
    assert packets < 2 * CALLS * 6 + 40


def test_stack_shows_the_true_callers_while_a_return_is_pending(guest: Any) -> None:
    stacks: list[list[str]] = []
    pending = []

    def at_depth(hit: Hit, task: Task) -> None:
        if is_caller(task):
            pending.append(len(rp.active_instances))
            stacks.append([frame.name for frame in hit.stack_trace()])

    rp = guest.session.register(Kretprobe("hrtimer_nanosleep"))
    guest.session.register(Kretprobe("do_nanosleep"))
    guest.session.register(Kprobe("do_nanosleep", at_depth))
    guest.run("caller 1 5 1000")
    assert len(stacks) == 5
    assert all(pending)
    for stack in stacks:
        assert stack[0] == "do_nanosleep"
        assert "hrtimer_nanosleep" in stack[1:3]
        assert "do_syscall_64" in stack
        assert stack[-1] == "entry_SYSCALL_64_after_hwframe" or "entry_SYSCALL_64" in stack


def test_unregistered_while_returns_are_pending(guest_of: GuestOf) -> None:
    # Sleeps of 0.2 s last longer than it takes to start four of them, however slow the host is.
    guest = guest_of(smp=4)
    returned = []
    rp = guest.session.register(Kretprobe("do_nanosleep", lambda ri: returned.append(ri)))
    then: list[tuple[int, int]] = []

    def enough() -> None:
        pending = len(rp.active_instances)
        if pending >= 3 and not then:
            then.append((pending, rp.hits))
            rp.unregister()
            trigger.unregister()

    trigger = guest.session.register(Kprobe("hrtimer_start_range_ns", enough))
    output = guest.run("caller 4 41 200000", timeout_s=100)
    assert output.startswith("41 ")
    ((pending, hits),) = then
    assert pending >= 3
    assert (rp.active_instances, rp.state.value) == ([], "UNREGISTERED")
    assert len(returned) == rp.hits == hits  # none of those that were pending, and none later
    waiting = [site for site in guest.session.probes.sites if site.watches_returns]
    assert waiting == []


def test_no_return_site_stays_when_the_probe_has_gone(guest_of: GuestOf) -> None:
    # Return sites stay for the next call; those of a probe that has gone would only cost time.
    guest = guest_of()
    pending = guest.session.register(Kprobe("dummy:dummy_setup"))
    assert pending.state.value == "PENDING"
    with guest.session.register(Kretprobe("do_getpgid")) as rp:
        guest.run(f"caller 2 {CALLS}")
        assert rp.hits >= CALLS
    assert not any(site.watches_returns for site in guest.session.probes.sites)
