"""Processors that map the kernel in other ways."""

from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.attach import attach_vm
from kgdbx.errors import MemoryFault
from kgdbx.probes.event import Event
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe

GuestOf = Callable[..., Any]
CALLS = 23


@pytest.mark.parametrize(("kernel", "cpu_model"), [("6.12", "Haswell"), ("6.1", "max")])
def test_page_table_isolation_and_five_levels(
    guest_of: GuestOf, kernel: str, cpu_model: str
) -> None:
    guest = guest_of(kernel, 2, cpu_model=cpu_model)
    levels = 5 if cpu_model == "max" else 4
    assert guest.kernel.memory.levels == levels
    events: list[Event] = []
    guest.session.event_listeners.append(events.append)
    guest.session.define("p do_sys_openat2 filename:ustring how->flags $comm")
    guest.session.define("p do_filp_open pathname->name:string")
    returns = guest.session.register(Kretprobe("do_sys_openat2"))
    assert guest.run(f"opener 2 {CALLS}") == f"{CALLS}\n"
    mine = [e.fields for e in events if e.task.comm.startswith("opener-")]
    paths = [next(iter(fields.values())) for fields in mine]
    assert paths == ["/etc/hostname"] * 2 * CALLS
    assert returns.hits >= CALLS


@pytest.mark.parametrize("cpu_model", ["", "Haswell"])
def test_attached_while_every_cpu_is_in_user_mode(
    clone_of: Callable[..., Any], cpu_model: str
) -> None:
    # Under page-table isolation such a vCPU maps hardly any of the kernel.
    vm = clone_of("6.1", 2, cpu_model=cpu_model)
    vm.execute("for n in 1 2; do while :; do :; done & done")
    for _ in range(3):
        with attach_vm(vm.info) as session:
            target = session.target
            modes = [target.read_registers(cpu).cs & 3 for cpu in target.cpus()]
            tasks = [session.kernel.current.task(target.read_registers(c)) for c in target.cpus()]
            assert [task.comm for task in tasks] == ["sh", "sh"] or 0 in modes
            session.kernel.memory.write(
                session.kernel.address("panic_timeout"), (41).to_bytes(4, "little")
            )
            assert session.kernel.memory.read_u32(session.kernel.address("panic_timeout")) == 41
            with pytest.raises(MemoryFault):
                session.kernel.memory.write(0xFFFF_F000_0000_0000, b"x")
            probe = session.register(Kprobe("__x64_sys_getpgid"))
            command = vm.start("caller 2 23")
            session.run(command=command, timeout_s=40)
            assert command.wait(5).status == 0
            assert probe.hits >= 23
    assert vm.execute("cat /proc/sys/kernel/panic").output == "41\n"
