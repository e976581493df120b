"""jprobes on a real kernel: the function's own signature, and nothing changed."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.arch.registers import Registers
from kgdbx.errors import ProbeError
from kgdbx.probes.jprobe import Jprobe, jprobe_return
from kgdbx.probes.kprobe import Kprobe
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.tasks import Task

CALLS = 23
AT_FDCWD = -100
GuestOf = Callable[..., Any]


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_parameters_by_name(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    seen: list[tuple[Any, ...]] = []

    def all_of_them(dfd: Any, filename: Any, how: Any, task: Task) -> None:
        if task.comm.startswith("opener-"):
            types = tuple(str(each.type_.type_name()) for each in (dfd, filename, how))
            seen.append((dfd.value_(), types, how.flags.value_(), task.comm))

    def in_another_order(how: Any, dfd: Any, task: Task) -> None:
        if task.comm.startswith("opener-"):
            seen.append((dfd.value_(), how.mode.value_()))

    guest.session.register(Jprobe("do_sys_openat2", all_of_them))
    guest.session.register(Jprobe("do_sys_openat2", in_another_order))
    assert guest.run(f"opener 2 {CALLS}") == f"{CALLS}\n"
    types = ("int", "const char *", "struct open_how *")
    # O_LARGEFILE is added by the kernel
    first = [(AT_FDCWD, types, 0o100000, f"opener-{n}") for n in (0, 1)]
    assert seen[1::2] == [(AT_FDCWD, 0)] * CALLS
    assert sorted(seen[0::2]) == sorted(first * (CALLS // 2) + first[:1])


def test_nothing_is_changed(guest: Any) -> None:
    # The handler's own registers are restored when it returns, and the stack is never used.
    stacks: list[bytes] = []
    entered: list[dict[str, int]] = []

    def look(regs: Registers, kernel: Kernel, task: Task) -> None:
        if task.comm.startswith("opener-"):
            stacks.append(kernel.memory.read(regs.sp - 256, 384))  # pt_regs lie above
            entered.append({name: regs[name] for name in ("di", "si", "dx", "sp", "ip")})

    def change(regs: Registers) -> None:
        regs.di = regs.si = regs.dx = 0
        regs.ip += 1

    guest.session.register(Kprobe("do_sys_openat2", look))
    guest.session.register(Jprobe("do_sys_openat2", change))
    guest.session.register(Kprobe("do_sys_openat2", look))
    assert guest.run(f"opener 2 {CALLS}") == f"{CALLS}\n"
    assert len(stacks) == 2 * CALLS
    assert stacks[0::2] == stacks[1::2]
    assert entered[0::2] == entered[1::2]


def test_jprobe_return_from_any_depth(guest: Any) -> None:
    reached = []

    def deep(level: int) -> None:
        if not level:
            jprobe_return()
        deep(level - 1)

    def handler(task: Task) -> None:
        deep(5)
        reached.append(task)

    probe = guest.session.register(Jprobe("__x64_sys_getpgid", handler))
    guest.run(f"caller 2 {CALLS}")
    assert probe.hits >= CALLS
    assert (reached, probe.nfaults) == ([], 0)


def test_signature_is_checked_when_registered(guest: Any) -> None:
    def wrong(dfd: Any, name: Any) -> None: ...

    def anything(*values: Any) -> None: ...

    with pytest.raises(ProbeError) as caught:
        guest.session.register(Jprobe("do_sys_openat2", wrong))
    assert caught.value.errno == errno.EINVAL
    assert str(caught.value) == (
        "wrong() has a parameter 'name', which do_sys_openat2 does not; "
        "there are: p, regs, hit, task, cpu, kernel, dfd, filename, how"
    )
    with pytest.raises(ProbeError, match=r"^anything\(\) takes \*values; name the values it"):
        guest.session.register(Jprobe("do_sys_openat2", anything))
    assert (len(guest.session.probes), guest.session.probes.sites) == (0, ())


def test_place_is_checked_when_registered(guest: Any) -> None:
    def handler() -> None: ...

    with pytest.raises(ProbeError) as caught:
        guest.session.register(Jprobe("do_sys_openat2+5", handler))
    assert caught.value.errno == errno.EINVAL
    assert str(caught.value) == (
        "a jprobe goes to the entry of a function, not to 'do_sys_openat2+5'; use a kprobe there"
    )
    with pytest.raises(ProbeError) as caught:
        guest.session.register(Jprobe("__get_user_4", handler))
    assert str(caught.value) == (
        "__get_user_4 has no debug information, so its arguments are not known; "
        "use a kprobe and regs.argument(n)"
    )


def test_the_functions_own_names_win(guest: Any) -> None:
    # pid_vnr(struct pid *pid) and, with a parameter that handlers have too, task_pid... p
    seen = []

    def handler(p: Any) -> None:
        seen.append(p.type_.type_name())

    guest.session.register(Jprobe("wake_up_new_task", handler))
    guest.run("/bin/true")
    assert set(seen) == {"struct task_struct *"}
