"""Data watches on a real kernel."""

import errno
import time
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.arch.registers import Registers
from kgdbx.errors import ProbeError
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.watch import Watch
from kgdbx.symbols.tasks import Task

GuestOf = Callable[..., Any]


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_writes_with_old_and_new_value(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    seen = []

    def written(old: int, new: int, task: Task) -> None:
        seen.append((old, new, task.comm))

    guest.session.register(Watch("panic_timeout", written, size_bytes=4))
    guest.run("cd /proc/sys/kernel; for n in 2 3 5 7; do echo $n > panic; cat panic; done")
    minus_one = (1 << 32) - 1  # panic=-1 on the command line
    assert seen == [(minus_one, 2, "sh"), (2, 3, "sh"), (3, 5, "sh"), (5, 7, "sh")]


@pytest.mark.parametrize(("access", "writes", "reads"), [("w", 1, 0), ("r", 0, 1), ("rw", 1, 1)])
def test_kinds_of_access(guest: Any, access: str, writes: int, reads: int) -> None:
    def hits(command: str) -> int:
        before = watch.hits
        guest.run(command)
        return int(watch.hits > before)

    watch = guest.session.register(Watch("panic_timeout", size_bytes=4, access=access))
    assert hits("echo 11 > /proc/sys/kernel/panic") == writes
    assert hits("cat /proc/sys/kernel/panic") == reads


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_size(guest: Any, size: int) -> None:
    # jiffies_64 is written whole, by more than one where the kernel slept; the watch takes the
    # bytes that it covers.
    values = []

    def written(old: int, new: int) -> None:
        values.append((old, new))
        if len(values) == 5:
            watch.unregister()

    watch = guest.session.register(Watch("jiffies_64", written, size_bytes=size))
    end = time.monotonic() + 60
    while len(values) < 5 and time.monotonic() < end:
        guest.run("usleep 200000")
    assert len(values) == 5
    assert all(old != new < 1 << 8 * size for old, new in values)
    assert [new for _, new in values[:-1]] == [old for old, _ in values[1:]]


def test_watches_of_one_place_share_a_register(guest: Any) -> None:
    seen: list[tuple[int, int]] = []
    watches = [
        guest.session.register(
            Watch("panic_timeout", lambda new, n=n: seen.append((n, new)), size_bytes=4)
        )
        for n in range(5)
    ]
    guest.run("echo 7 > /proc/sys/kernel/panic")
    assert seen == [(n, 7) for n in range(5)]
    for watch in watches[:4]:
        watch.unregister()
    guest.run("echo 11 > /proc/sys/kernel/panic")
    assert seen[5:] == [(4, 11)]
    watches[4].unregister()
    guest.run("echo 13 > /proc/sys/kernel/panic")
    assert len(seen) == 6


def test_refused(guest: Any) -> None:
    address = guest.kernel.address("jiffies_64")
    with pytest.raises(ProbeError) as caught:
        guest.session.register(Watch(address + 2, size_bytes=4))
    assert caught.value.errno == errno.EINVAL
    assert str(caught.value) == (
        f"{address + 2:#x} is not a multiple of 4; a debug register watches aligned memory: "
        "use a smaller size"
    )
    with pytest.raises(ProbeError, match="a debug register watches 1, 2, 4 or 8 bytes, not 3"):
        Watch("jiffies_64", size_bytes=3)
    with pytest.raises(ProbeError, match="access 'x' is not one of w, r, rw"):
        Watch("jiffies_64", access="x")
    with pytest.raises(ProbeError, match="there is no variable 'jiffy'") as caught:
        guest.session.register(Watch("jiffy"))
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("at_entry", [True, False])
def test_access_by_the_instruction_under_a_breakpoint(guest: Any, at_entry: bool) -> None:
    # The instruction is stepped then, not emulated: the debug register sees what it does.
    accesses: list[tuple[str, int]] = []
    function, text = "__x64_sys_getpgid", "mov 0x70(%rdi),%edi"
    offset = guest.offset_of(function, text)
    watches: list[Watch] = []

    def arm(regs: Registers, task: Task) -> None:
        # pt_regs->di of this very call, in a debug register for as long as the call takes.
        if task.comm.startswith("caller-"):
            watches.append(guest.session.register(Watch(regs.di + 0x70, accessed, access="rw")))

    def accessed(regs: Registers) -> None:
        accesses.append((guest.kernel.symbolize(regs.ip).partition("+")[0], regs.di))

    def disarm(task: Task) -> None:
        if task.comm.startswith("caller-"):
            watches.pop().unregister()

    where = function if at_entry else f"{function}+{offset}"
    guest.session.register(Kprobe(where, arm))
    guest.session.register(Kprobe(f"{function}+{offset}"))
    guest.session.register(Kprobe("do_getpgid", disarm))
    guest.run("caller 1 23")
    assert accesses == [(function, 0)] * 23
