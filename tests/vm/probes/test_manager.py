"""Registering and unregistering on a real kernel, and what is refused."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.errors import ProbeError
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe
from kgdbx.probes.probe import Hit, Probe, State
from kgdbx.probes.watch import Watch
from kgdbx.symbols.tasks import Task

CALLS = 23
WHERE = "__x64_sys_getpgid"
GuestOf = Callable[..., Any]


class Counted:
    """A kprobe's handler that counts the workload's hits only."""

    def __init__(self, then: Callable[[int], None] = lambda count: None) -> None:
        self.count = 0
        self.then = then

    def __call__(self, task: Task) -> None:
        if task.comm.startswith("caller-"):
            self.count += 1
            self.then(self.count)


def test_unregistered_in_its_own_handler(guest: Any) -> None:
    handler = Counted(lambda count: probe.unregister() if count == 7 else None)
    probe = guest.session.register(Kprobe(WHERE, handler))
    guest.run(f"caller 2 {CALLS}")
    assert handler.count == 7
    assert probe.state is State.UNREGISTERED
    assert (guest.session.probes.sites, len(guest.session.probes)) == ((), 0)
    probe.unregister()
    probe.unregister()


def test_unregistered_by_another_probes_handler(guest: Any) -> None:
    # From that hit on: a probe that stands behind in the order is not called any more, nor is
    # the post_handler of one that stands before.
    posts = Counted()
    first = guest.session.register(Kprobe(WHERE, Counted(), post_handler=posts))

    def remove(count: int) -> None:
        if count == 7:
            first.unregister()
            last.unregister()

    middle = guest.session.register(Kprobe(WHERE, Counted(remove)))
    last = guest.session.register(Kprobe(WHERE, Counted()))
    guest.run(f"caller 2 {CALLS}")
    assert first.pre_handler.count == 7
    assert posts.count == 6
    assert middle.pre_handler.count == CALLS
    assert last.pre_handler.count == 6


def test_return_probe_unregistered_by_anothers_return(guest: Any) -> None:
    outer = guest.session.register(Kretprobe(WHERE, Counted()))
    inner = guest.session.register(
        Kretprobe(WHERE, Counted(lambda count: outer.unregister() if count == 7 else None))
    )
    guest.run(f"caller 2 {CALLS}")
    assert inner.handler.count == CALLS  # the newest returns first
    assert outer.handler.count == 6
    assert outer.active_instances == []


def test_registered_in_a_handler(guest: Any) -> None:
    added: list[Probe] = []

    def add(count: int) -> None:
        if count == 7:
            added.append(guest.session.register(Kprobe(WHERE, Counted())))
            added.append(guest.session.register(Kprobe("do_getpgid", Counted())))

    guest.session.register(Kprobe(WHERE, Counted(add)))
    guest.run(f"caller 1 {CALLS}")  # one thread: no other one is between the two functions
    same, called = (probe.pre_handler.count for probe in added)
    assert same == CALLS - 7
    assert called == CALLS - 6


def test_disabled_and_enabled(guest: Any) -> None:
    probe = guest.session.register(Kprobe(WHERE, Counted()))
    returns = guest.session.register(Kretprobe(WHERE, Counted()))
    for each in (probe, returns):
        each.disable()
        each.disable()
    assert guest.session.probes.sites == ()
    guest.run(f"caller 2 {CALLS}")
    assert (probe.state, probe.hits, returns.hits) == (State.DISABLED, 0, 0)
    for each in (probe, returns):
        each.enable()
        each.enable()
    guest.run(f"caller 2 {CALLS}")
    assert (probe.state, probe.pre_handler.count) == (State.ENABLED, CALLS)
    assert returns.handler.count == CALLS
    probe.disable()
    probe.unregister()
    with pytest.raises(ProbeError, match="is not registered") as caught:
        probe.enable()
    assert caught.value.errno == errno.EINVAL


def test_disabled_in_a_handler_with_a_return_pending(guest: Any) -> None:
    rp = guest.session.register(Kretprobe("do_getpgid", Counted()))
    handler = Counted(lambda count: rp.disable() if count == 7 else None)
    guest.session.register(Kprobe("find_task_by_vpid", handler))
    guest.session.register(Kprobe("pid_vnr", handler))
    guest.run(f"caller 1 {CALLS}")
    assert handler.count >= CALLS
    assert rp.handler.count == 6
    assert (rp.state, rp.active_instances) == (State.DISABLED, [])


def test_registered_again_with_counters_at_zero(guest: Any) -> None:
    probe = Kprobe(WHERE, Counted())
    guest.session.register(probe)
    with pytest.raises(ProbeError, match="is registered already") as caught:
        guest.session.register(probe)
    assert caught.value.errno == errno.EINVAL
    guest.run(f"caller 2 {CALLS}")
    probe.unregister()
    guest.session.register(probe)
    assert (probe.hits, probe.nmissed, probe.state) == (0, 0, State.ENABLED)
    guest.run(f"caller 2 {CALLS}")
    assert probe.pre_handler.count == 2 * CALLS


def test_names_are_unique(guest: Any) -> None:
    guest.session.register(Kprobe(WHERE, name="mine"))
    with pytest.raises(ProbeError) as caught:
        guest.session.register(Kprobe("do_getpgid", name="mine"))
    assert (caught.value.errno, str(caught.value)) == (
        errno.EEXIST,
        "there is a probe named 'mine'",
    )


def test_refused_places(guest: Any) -> None:
    def refused(where: str | int) -> tuple[int, str]:
        with pytest.raises(ProbeError) as caught:
            guest.session.register(Kprobe(where))
        return caught.value.errno, str(caught.value)

    start = guest.kernel.address("do_sys_openat2")
    size = guest.kernel.functions("do_sys_openat2")[0].size_bytes
    inside = (
        errno.EINVAL,
        "do_sys_openat2+0x2 is inside the instruction that starts at do_sys_openat2+0x0; "
        "probe that one",
    )
    assert refused("do_sys_openat2+2") == inside
    assert refused(start + 2) == inside
    assert refused(f"do_sys_openat2+{size}") == (
        errno.EINVAL,
        f"do_sys_openat2 is {size:#x} bytes long; offset {size:#x} is outside of it",
    )
    for address in (0x1234, guest.kernel.address("panic_timeout"), 0xFFFF_8880_0000_1000):
        number, message = refused(address)
        assert number == errno.EINVAL
        assert message.startswith(f"{address:#x} is not in the code of the kernel")
    number, message = refused("vfs_raed")
    assert number == errno.ENOENT
    assert message.startswith("cannot probe: no function 'vfs_raed'; nearest: vfs_read")
    assert refused("start_kernel") == (
        errno.ENOENT,
        "start_kernel is in .init.text, which the kernel freed when it had booted; "
        "start the VM frozen (kgdbx vm run --frozen) and probe it before",
    )
    number, message = refused("do_execveat_common")
    assert number == errno.ENOENT
    assert "the compiler made clones of it: do_execveat_common.isra.0" in message
    assert (guest.session.probes.sites, len(guest.session.probes)) == ((), 0)


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_several_functions_of_one_name(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    twins = guest.kernel.functions("default_read_file")
    assert len(twins) > 1
    with pytest.raises(ProbeError) as caught:
        guest.session.register(Kprobe("default_read_file"))
    assert caught.value.errno == errno.EADDRNOTAVAIL
    first, *lines = str(caught.value).splitlines()
    assert first == f"'default_read_file' is {len(twins)} functions; give the address of one:"
    assert len(lines) == len(twins)
    for function, line in zip(twins, lines, strict=True):
        assert line.startswith(f"  {function.address:#x} default_read_file ")
        assert ".c:" in line
    with guest.session.register(Kprobe(twins[1].address)) as probe:
        assert probe.points[0].address == twins[1].address


def test_fifth_debug_register(guest: Any) -> None:
    taken = [
        guest.session.register(Kprobe(WHERE, Counted(), hardware=True)),
        guest.session.register(Kprobe("do_nanosleep", hardware=True)),
        guest.session.register(Watch("panic_timeout", size_bytes=4)),
        guest.session.register(Watch("jiffies")),
    ]
    for probe in (Kprobe("vfs_read", hardware=True), Watch("panic_timeout", size_bytes=1)):
        with pytest.raises(ProbeError, match="all 4 debug registers are in use") as caught:
            guest.session.register(probe)
        assert caught.value.errno == errno.ENOSPC
        assert probe.state is State.NEW
    assert len(guest.session.probes) == 4
    taken[3].unregister()
    guest.session.register(Kprobe("vfs_read", hardware=True))
    guest.run(f"caller 2 {CALLS}")
    assert taken[0].pre_handler.count == CALLS


def test_hit_can_leave_the_kernel_standing(guest: Any) -> None:
    def stop(hit: Hit) -> None:
        if hit.task.comm.startswith("caller-"):
            hit.stop()

    probe = guest.session.register(Kprobe(WHERE, stop))
    command = guest.vm.start("caller 1 3")
    stops = 0
    while command.poll() is None and stops < 4:
        stops += guest.session.run(command=command, timeout_s=20) is not None
    assert stops == 3
    assert probe.hits >= 3
    assert command.wait(5).status == 0


def test_closed_newest_first_and_running_on(guest_of: GuestOf) -> None:
    guest = guest_of()
    order = []
    for name in ("a", "b", "c"):
        probe = guest.session.register(Kprobe(WHERE, name=name))
        withdraw = guest.session.probes._withdraw
    guest.session.probes._withdraw = lambda p: (order.append(p.name), withdraw(p))
    guest.session.close()
    guest.session.close()
    assert order == ["c", "b", "a"]
    assert probe.state is State.UNREGISTERED
    assert guest.vm.execute("caller 2 1009", timeout_s=10).output.startswith("1009 ")
