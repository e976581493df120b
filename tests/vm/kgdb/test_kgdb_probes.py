"""Probes over KGDB: the same handlers see the same as on the stop tier of QEMU's stub."""

import errno
from collections import Counter
from typing import Any

import pytest

from kgdbx.arch.instruction import decode_all
from kgdbx.arch.registers import Registers
from kgdbx.errors import ProbeError, Unsupported
from kgdbx.machine.vm import Vm
from kgdbx.probes.jprobe import Jprobe
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe, KretprobeInstance
from kgdbx.probes.watch import Watch
from kgdbx.resident.compile.codegen import NotResident
from kgdbx.session import Session
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.tasks import Task

CALLS, MANY_CALLS = 7, 23
RUN_S = 100


def run(vm: Vm, session: Session, command: str) -> str:
    started = vm.start(command)
    session.run(command=started, timeout_s=RUN_S)
    assert started.poll() is not None, f"{command!r} did not end"
    return started.wait(5).output


def test_every_kind_counts_every_call(kgdb_vm: Vm, attached: Session) -> None:
    order: dict[int, list[str]] = {}
    values: set[int] = set()
    opened: Counter[tuple[str, int]] = Counter()

    def note(what: str, task: Task) -> None:
        if task.comm.startswith("caller-"):
            order.setdefault(task.pid, []).append(what)

    def before(task: Task) -> None:
        note("pre", task)

    def after(task: Task) -> None:
        note("post", task)

    def returned(ri: KretprobeInstance, retval: Any, task: Task) -> None:
        assert ri.task == task
        note("return", task)
        values.add(retval.value_())

    def jumped(filename: Any, how: Any, task: Task, kernel: Kernel, regs: Registers) -> None:
        if task.comm.startswith("opener-"):
            name = kernel.memory.read_user(filename.value_(), 6, regs.cr3)
            opened[name.decode(), how.flags.value_()] += 1

    session = attached
    kp = session.register(Kprobe("__x64_sys_getpgid", before, post_handler=after, name="k"))
    # KGDB refuses software breakpoints in do_syscall_64(), where it returns to, and of hardware
    # breakpoints that several CPUs reach at once the kernel loses some.
    rp = session.register(Kretprobe("__x64_sys_getpgid", returned, hardware=True))
    jp = session.register(Jprobe("do_sys_openat2", jumped))
    assert run(kgdb_vm, session, f"caller 1 {CALLS}").startswith(f"{CALLS} ")
    assert list(order.values()) == [["pre", "post", "return"] * CALLS]
    assert len(values) == 1
    assert (rp.nmissed, rp.nfaults, rp.abandoned, rp.active_instances) == (0, 0, 0, [])
    assert run(kgdb_vm, session, f"opener 1 {CALLS} /nope!") == "0\n"
    assert not jp.faults, jp.faults[0].trace
    assert [name for name, _ in opened] == ["/nope!"]
    assert opened.total() == CALLS
    assert kp.nfaults == 0


def test_what_handlers_change_is_what_the_kernel_does(kgdb_vm: Vm, attached: Session) -> None:
    session = attached

    def refuse(regs: Registers, kernel: Kernel, task: Task) -> bool:
        if not task.comm.startswith("opener-"):
            return False
        regs.ax = -errno.EACCES
        regs.ip = kernel.memory.read_u64(regs.sp)
        regs.sp += 8  # a register that KGDB's own packets do not write
        return True

    def fail(ri: KretprobeInstance, regs: Registers) -> None:
        if ri.task.comm.startswith("opener-"):
            regs.ax = -errno.EMFILE

    with session.register(Kprobe("do_sys_openat2", refuse)) as kp:
        assert run(kgdb_vm, session, f"opener 2 {CALLS}") == "0\n"
        assert kp.nfaults == 0
    with session.register(Kretprobe("do_sys_openat2", fail)) as rp:
        assert run(kgdb_vm, session, f"opener 2 {CALLS}") == "0\n"
        assert rp.hits >= CALLS
        assert rp.nfaults == 0
    assert run(kgdb_vm, session, f"opener 2 {CALLS}") == f"{CALLS}\n"


def test_instructions_that_have_to_be_stepped(kgdb_vm: Vm, attached: Session) -> None:
    # Each place in a function, on both CPUs: what is not emulated is stepped with the other held.
    session = attached
    (function,) = session.kernel.functions("__x64_sys_getpgid")
    code = session.kernel.read_code(function.address, function.size_bytes)
    offsets = [each.ip - function.address for each in decode_all(code, function.address)]
    probes = [session.register(Kprobe(f"__x64_sys_getpgid+{n}")) for n in offsets]
    assert run(kgdb_vm, session, f"caller 2 {CALLS}").startswith(f"{CALLS} ")
    hits = [probe.hits for probe in probes]
    assert hits[0] == CALLS
    assert set(hits) <= {0, CALLS}
    assert any(site.stepped for site in session.probes.sites)


def test_steps_lose_no_hits_of_another_cpu(kgdb_vm: Vm, attached: Session) -> None:
    # With a watch armed what writes memory is stepped, and both CPUs come here again and again, but
    # not to the hardware breakpoint, see above.
    attached.register(Watch("panic_timeout", size_bytes=4))
    for hardware, cpus in ((False, 2), (True, 1)):
        place = Kprobe("__x64_sys_getpgid+5", hardware=hardware)
        with attached.register(place) as probe:
            calls = run(kgdb_vm, attached, f"caller {cpus} {MANY_CALLS}")
            assert calls.startswith(f"{MANY_CALLS} ")
            assert [site.stepped for site in attached.probes.sites] == [MANY_CALLS]
        assert probe.hits == MANY_CALLS


def test_hardware_breakpoints_inserted_together(kgdb_vm: Vm, attached: Session) -> None:
    attached.register(Watch("panic_timeout", size_bytes=4))
    places = ("__x64_sys_getpgid+5", "__x64_sys_getppid")
    probes = [attached.register(Kprobe(place, hardware=True)) for place in places]
    assert run(kgdb_vm, attached, f"caller 1 {CALLS}").startswith(f"{CALLS} ")
    assert probes[0].hits == CALLS


def test_a_watch_tells_old_and_new(kgdb_vm: Vm, attached: Session) -> None:
    seen, places = [], set()

    def written(old: int, new: int, task: Task, regs: Registers) -> None:
        seen.append((old, new, task.comm))
        places.add(regs.ip)

    watch = attached.register(Watch("panic_timeout", written, size_bytes=4))
    run(kgdb_vm, attached, "cd /proc/sys/kernel; for n in 2 3 5 7; do echo $n > panic; done")
    minus_one = (1 << 32) - 1  # panic=-1 on the command line
    assert seen == [(minus_one, 2, "sh"), (2, 3, "sh"), (3, 5, "sh"), (5, 7, "sh")]
    # An instruction that is stepped reaches the watch, too.
    (behind,) = places
    function = attached.kernel.function_at(behind)
    assert function is not None
    code = attached.kernel.read_code(function.address, function.size_bytes)
    writes = next(i.ip for i in decode_all(code, function.address) if i.next_ip == behind)
    probe = attached.register(Kprobe(f"{function.name}+{writes - function.address}"))
    run(kgdb_vm, attached, "echo 11 > /proc/sys/kernel/panic")
    assert seen[4:] == [(7, 11, "sh")]
    assert probe.hits
    with pytest.raises(ProbeError, match="which of several watchpoints"):
        attached.register(Watch("jiffies"))
    watch.unregister()
    with pytest.raises(Unsupported, match="reads alone"):
        attached.register(Watch("panic_timeout", size_bytes=4, access="r"))


def test_what_cannot_be_is_refused(attached: Session) -> None:
    (probe,) = attached.define("p do_sys_openat2 filename:string")
    assert probe.tier == "stop"
    assert "kernel text" in probe.tier_reason
    with pytest.raises(NotResident, match="kernel text"):
        attached.define("p vfs_read", tier="resident")
    with pytest.raises(NotResident, match="kernel text"):
        attached.nullify("do_sys_openat2", "-ENOMEM")
    stopped = attached.target.interrupt().cpu
    with pytest.raises(Unsupported, match="steps the CPU that stopped"):
        attached.target.step(1 - stopped)


def test_a_sleeping_task_has_few_registers_and_no_zeros(attached: Session) -> None:
    registers = attached.target.read_thread(2)  # kthreadd
    assert set(registers) == {"rsp", "rbp"}
    assert registers.rsp > 1 << 63
    with pytest.raises(AttributeError, match="not available"):
        _ = registers.rip
    with pytest.raises(AttributeError, match="not available"):
        _ = registers.rax
    running = attached.target.read_registers(attached.target.interrupt().cpu)
    assert "ds" not in running  # KGDB sends whatever its buffer held
