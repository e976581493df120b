"""kprobes on a real kernel: their three handlers and what these may change."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.arch.registers import Registers
from kgdbx.errors import HandlerTimeout, MemoryFault
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.tasks import Task

CALLS = 23
GuestOf = Callable[..., Any]


def is_caller(task: Task) -> bool:
    return task.comm.startswith("caller-")


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_handlers_run_in_order_around_the_instruction(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    log: list[tuple[str, int]] = []
    flags_seen = set()

    def pre(p: Kprobe, regs: Registers, task: Task) -> int:
        if is_caller(task):
            log.append((f"pre {p.name}", regs.ip))
        return 0

    def post(p: Kprobe, regs: Registers, flags: int, task: Task) -> None:
        flags_seen.add(flags)
        if is_caller(task):
            log.append((f"post {p.name}", regs.ip))

    one = Kprobe("__x64_sys_getpgid", pre, post_handler=post, name="one")
    two = Kprobe("__x64_sys_getpgid", pre, post_handler=post, name="two")
    for probe in (one, two):
        guest.session.register(probe)
    guest.run(f"caller 2 {CALLS}")
    start = one.points[0].address
    length = guest.offset_of("__x64_sys_getpgid", "(%rdi),%edi")
    after = start + (4 if length == 9 else length)  # endbr64, or the nop of ftrace
    once = [("pre one", start), ("pre two", start), ("post one", after), ("post two", after)]
    assert sorted(log) == sorted(once * CALLS)
    assert all(log[n : n + 4] == once for n in range(0, len(log), 4))
    assert flags_seen == {0}
    assert (one.hits, one.nmissed, one.nfaults) == (two.hits, 0, 0)


@pytest.mark.parametrize(
    ("function", "instruction", "emulated"),
    [
        ("__x64_sys_getpgid", "mov 0x70(%rdi),%edi", True),
        ("do_getpgid", "mov %gs:", False),
    ],
)
def test_registers_before_and_after_in_mid_function(
    guest: Any, function: str, instruction: str, emulated: bool
) -> None:
    before: list[Registers] = []
    after: list[tuple[Registers, int]] = []

    def pre(regs: Registers, task: Task) -> None:
        if is_caller(task):
            before.append(regs.copy())

    def post(regs: Registers, task: Task) -> None:
        if is_caller(task):
            after.append((regs.copy(), task.address))

    offset = guest.offset_of(function, instruction)
    assert offset > 0
    probe = Kprobe(f"{function}+{offset:#x}", pre, post_handler=post)
    guest.session.register(probe)
    assert probe.points[0].offset_bytes == offset
    (site,) = guest.session.probes.sites
    assert site.is_boosted is emulated
    guest.run(f"caller 2 {CALLS}")
    assert len(before) == len(after) == CALLS
    for old, (new, task) in zip(before, after, strict=True):
        assert old.ip == probe.points[0].address < new.ip
        if emulated:
            assert (old.di != 0, new.di) == (True, 0)  # pt_regs->di: getpgid(0)
            assert new.si == old.si
        else:
            assert new.ax == task
    counted = site.boosted if emulated else site.stepped
    assert counted == probe.hits


def test_pre_handler_returns_in_the_functions_place(guest: Any) -> None:
    def refuse(regs: Registers, task: Task, kernel: Kernel) -> bool:
        if not task.comm.startswith("opener-"):
            return False
        regs.ax = -errno.EACCES
        regs.ip = kernel.memory.read_u64(regs.sp)
        regs.sp += 8
        return True

    with guest.session.register(Kprobe("do_sys_openat2", refuse)) as probe:
        assert guest.run(f"opener 2 {CALLS}") == "0\n"
        assert probe.hits >= CALLS
    assert guest.run(f"opener 2 {CALLS}") == f"{CALLS}\n"


def test_pre_handler_skips_the_instruction(guest: Any) -> None:
    # mov 0x70(%rdi),%edi loads the argument; without it the pid is what the handler left there.
    returned = []

    def skip(regs: Registers, task: Task) -> bool:
        if is_caller(task):
            regs.di = 999_983
            return True
        return False

    def result(retval: Any, task: Task) -> None:
        if is_caller(task):
            returned.append(retval.value_())

    offset = guest.offset_of("__x64_sys_getpgid", "mov 0x70(%rdi),%edi")
    guest.session.register(Kprobe(f"__x64_sys_getpgid+{offset}", skip))
    guest.session.register(Kretprobe("do_getpgid", result))
    guest.run(f"caller 2 {CALLS}")
    assert returned == [-errno.ESRCH] * CALLS


def test_post_handler_changes_registers(guest: Any) -> None:
    returned = []

    def other_pid(regs: Registers, task: Task) -> None:
        if is_caller(task):
            regs.di = 1

    def result(retval: Any, task: Task) -> None:
        if is_caller(task):
            returned.append(retval.value_())

    offset = guest.offset_of("__x64_sys_getpgid", "mov 0x70(%rdi),%edi")
    guest.session.register(Kprobe(f"__x64_sys_getpgid+{offset}", post_handler=other_pid))
    guest.session.register(Kretprobe("do_getpgid", result))
    guest.run(f"caller 2 {CALLS}")
    assert returned == [0] * CALLS  # init's group


def test_handler_changes_memory(guest: Any) -> None:
    # open() of a file that is not there, with O_RDONLY, is made to create it.
    o_creat = 0o100

    def create(how: Any, task: Task, kernel: Kernel) -> None:
        if task.comm.startswith("opener-"):
            value = how.flags.value_() | o_creat
            kernel.memory.write(how.flags.address_of_().value_(), value.to_bytes(8, "little"))
            kernel.memory.write(how.mode.address_of_().value_(), (0o640).to_bytes(8, "little"))

    with guest.session.register(Kprobe("do_sys_openat2", create)):
        assert guest.run(f"opener 2 {CALLS} /tmp/made") == f"{CALLS}\n"
    assert guest.run("stat -c %a /tmp/made") == "640\n"


def test_handler_changes_a_variable(guest: Any) -> None:
    def change(kernel: Kernel) -> None:
        kernel.memory.write(kernel.address("panic_timeout"), (37).to_bytes(4, "little"))

    guest.session.register(Kprobe("__x64_sys_getpgid", change))
    assert guest.run("caller 1 1 >/dev/null; cat /proc/sys/kernel/panic") == "37\n"


def faulting_place(guest: Any) -> str:
    return f"__get_user_4+{guest.offset_of('__get_user_4', 'mov (%rax),%edx')}"


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_fault_of_the_instruction_handled(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    traps = []

    def fault(p: Kprobe, regs: Registers, trapnr: int, task: Task) -> bool:
        if task.comm != "faulter":
            return False
        traps.append((trapnr, regs.ip == p.points[0].address, regs.ax))
        regs.dx = 1
        return True

    after: list[int] = []

    def post(regs: Registers, task: Task) -> None:
        if task.comm == "faulter":
            after.append(regs.dx)

    place = faulting_place(guest)
    guest.session.register(Kprobe(place, fault_handler=fault, post_handler=post))
    assert guest.run(f"faulter {CALLS}") == f"{CALLS} 0\n"
    assert traps == [(14, True, 4096)] * CALLS
    assert after == [1] * CALLS


def test_fault_of_the_instruction_not_handled(guest: Any) -> None:
    # The kernel's own fixup runs, as without the probe; there is no "after" of the instruction.
    traps = []
    posts = []

    def fault(regs: Registers, trapnr: int, task: Task) -> bool:
        if task.comm == "faulter":
            traps.append(trapnr)
            regs.dx = 1  # means nothing without True
        return False

    def post(task: Task) -> None:
        if task.comm == "faulter":
            posts.append(task)

    place = faulting_place(guest)
    guest.session.register(Kprobe(place, fault_handler=fault, post_handler=post))
    assert guest.run(f"faulter {CALLS}") == f"0 {CALLS}\n"
    assert (traps, posts) == ([14] * CALLS, [])


def test_handler_reads_memory_that_is_not_there(guest: Any) -> None:
    traps = []

    def bad(kernel: Kernel, task: Task) -> None:
        if is_caller(task):
            kernel.memory.read_u64(0xFFFF_F000_0000_0000)

    def fault(trapnr: int) -> bool:
        traps.append(trapnr)
        return False

    handled = guest.session.register(Kprobe("__x64_sys_getpgid", bad, fault_handler=fault))
    recorded = guest.session.register(Kprobe("__x64_sys_getpgid", bad))
    guest.run(f"caller 2 {CALLS}")
    assert traps == [14] * CALLS
    assert recorded.nfaults == handled.nfaults == CALLS
    fault_record = recorded.faults[-1]
    assert fault_record.handler == "pre_handler"
    assert isinstance(fault_record.error, MemoryFault)
    assert str(fault_record.error) == ("cannot read 8 bytes at virtual address 0xfffff00000000000")
    assert "kernel.memory.read_u64" in fault_record.trace


def test_handler_that_raises_never_stops_the_guest(guest: Any) -> None:
    told = []
    guest.session.probes.fault_listeners.append(lambda p, fault: told.append((p.name, fault)))

    def bad(task: Task) -> None:
        if is_caller(task):
            raise ValueError("a bug of the user's")

    probe = guest.session.register(Kprobe("__x64_sys_getpgid", bad, post_handler=bad, name="buggy"))
    guest.run(f"caller 2 {CALLS}")
    assert probe.nfaults == len(told) == 2 * CALLS
    assert {name for name, _ in told} == {"buggy"}
    assert {f.handler for _, f in told} == {"pre_handler", "post_handler"}
    assert len(probe.faults) == 16
    assert "ValueError: a bug of the user's" in probe.faults[0].trace


def test_slow_handler_is_ended(guest: Any) -> None:
    def endless(task: Task) -> None:
        while is_caller(task):
            pass

    # Long enough for a handler that has nothing to do, on a host that is busy with others.
    guest.session.probes.handler_limit_s = 0.5
    probe = guest.session.register(Kprobe("__x64_sys_getpgid", endless))
    guest.run("caller 2 5")
    assert probe.nfaults == 5
    assert {type(f.error) for f in probe.faults} == {HandlerTimeout}
    assert str(probe.faults[0].error) == (
        "handlers ran longer than 0.5 s with the guest stopped; do the work after the hit, or "
        "set session.probes.handler_limit_s in start(session) of the script"
    )


def test_slow_handler_is_ended_between_packets(guest: Any) -> None:
    # Interrupted between a packet and its answer, every later answer would be one too late.
    def endless(task: Task, kernel: Kernel) -> None:
        while is_caller(task):
            kernel.target.read_memory(kernel.address("linux_banner"), 16)

    guest.session.probes.handler_limit_s = 0.5
    probe = guest.session.register(Kprobe("__x64_sys_getpgid", endless))
    guest.run("caller 2 7")
    assert {type(f.error) for f in probe.faults} == {HandlerTimeout}
    assert probe.nfaults == 7


def test_nothing_is_left_in_the_kernel(guest: Any) -> None:
    before = guest.text()
    probes = [
        guest.session.register(Kprobe("__x64_sys_getpgid")),
        guest.session.register(Kprobe("do_getpgid+5", hardware=True)),
        guest.session.register(Kretprobe("do_getpgid")),
    ]
    guest.run(f"caller 2 {CALLS}")
    assert all(probe.hits >= CALLS for probe in probes)
    for probe in probes:
        probe.unregister()
    assert guest.session.probes.sites == ()
    assert guest.text() == before
    packets = guest.session.target.connection.packets_sent
    guest.run("caller 2 10007")
    # Without a stop the stub hears of the start and the end only.
    assert guest.session.target.connection.packets_sent - packets <= 4
    assert guest.session.probes.stray_stops == 0
