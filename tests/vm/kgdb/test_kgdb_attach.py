"""Attaching to KGDB in whatever state its line and its kernel are, and letting go again."""

import os
import pty
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from drgn.helpers.linux.pid import for_each_task

from kgdbx.attach import attach, attach_kgdb, connect
from kgdbx.errors import CommandError, TargetError, TargetTimeout, Unsupported
from kgdbx.machine.vm import Vm
from kgdbx.session import Session
from kgdbx.target.base import BreakpointKind
from kgdbx.target.kgdb import KgdbTarget
from kgdbx.target.serial_line import SerialLine

BREAK_IN = "echo g > /proc/sysrq-trigger"


def still_runs(vm: Vm) -> bool:
    return vm.execute("caller 1 3", timeout_s=60).output.startswith("3 ")


def test_tasks_are_listed_with_few_packets(kgdb_vm: Vm, attached: Session) -> None:
    connection = attached.target.connection
    attach_packets, attach_bytes = connection.packets_sent, connection.line.bytes_received
    assert attach_packets < 60
    names = {task.comm.string_() for task in for_each_task(attached.kernel.program)}
    assert {b"agent", b"kthreadd"} <= names
    # Two seconds at 115200 bits a second.
    assert connection.line.bytes_received - attach_bytes < 23_000
    assert not connection.errors


def test_a_debugger_that_died_leaves_nothing(kgdb_vm: Vm) -> None:
    session = attach_kgdb(kgdb_vm.info)
    target, kernel = session.target, session.kernel
    probed = kernel.address("__x64_sys_getpgid")
    target.insert_breakpoint(BreakpointKind.SOFTWARE, probed)
    target.insert_breakpoint(BreakpointKind.HARDWARE, probed + 5)
    target.insert_breakpoint(BreakpointKind.WATCH_WRITE, kernel.address("panic_timeout"), 4)
    command = kgdb_vm.start("caller 1 5")
    target.resume()
    line = target.connection.line
    assert select.select([line], [], [], 60)[0], "no stop reply"
    line.close()  # as if it was killed: the kernel stands, and waits for the rest of its life
    with attach_kgdb(kgdb_vm.info) as again:
        assert again.target.read_registers(again.target.interrupt().cpu).rip == probed
    assert command.wait(60).output.startswith("5 ")
    assert still_runs(kgdb_vm)


def test_a_kernel_that_runs_needs_a_way_in(kgdb_vm: Vm) -> None:
    line = str(kgdb_vm.info.kgdb_socket)
    with pytest.raises(TargetTimeout, match="sysrq"):
        KgdbTarget(line, answer_s=1.0)
    started = kgdb_vm.start(BREAK_IN)
    with KgdbTarget(line, answer_s=30.0) as target:
        target.resume()
        with pytest.raises(Unsupported, match="--sysrq"):
            target.interrupt()
    assert started.wait(60).status == 0
    with pytest.raises(CommandError, match="give the vmlinux"):
        connect(f"kgdb:{line}")
    with pytest.raises(CommandError, match="--sysrq is for KGDB"):
        connect(f"{line}", sysrq="/dev/ttyS0")
    assert still_runs(kgdb_vm)


def test_a_break_over_telnet_stops_the_kernel(kgdb_vm: Vm, tmp_path: Path) -> None:
    # What QEMU's console is to this test, a console server is to a machine.
    console, line = tmp_path / "console", str(kgdb_vm.info.kgdb_socket)
    backend = {
        "type": "socket",
        "data": {
            "addr": {"type": "unix", "data": {"path": str(console)}},
            "server": True,
            "wait": False,
            "telnet": True,
        },
    }
    with kgdb_vm.qmp() as qmp:
        qmp.execute("chardev-change", id="console0", backend=backend)
    vmlinux = str(kgdb_vm.info.vmlinux)
    with pytest.raises(TargetError, match=f"telnet:{console}"):
        connect(f"kgdb:{line}", vmlinux, sysrq=str(console))
    with connect(f"kgdb:{line}", vmlinux, sysrq=f"telnet:{console}") as session:
        (probe,) = session.define("p __x64_sys_getpgid+5")
        command = kgdb_vm.start("caller 1 7")
        session.run(command=command, timeout_s=60)
        assert probe.hits == 7
        assert session.run(timeout_s=1) is None  # the time is up: a break ends it
    assert command.wait(5).output.startswith("7 ")
    assert still_runs(kgdb_vm)


@pytest.fixture
def tty(kgdb_vm: Vm) -> Iterator[str]:
    """The VM's serial line as a tty of this machine."""
    ours, theirs = pty.openpty()
    upstream = socket.socket(socket.AF_UNIX)
    upstream.connect(str(kgdb_vm.info.kgdb_socket))
    ended = threading.Event()

    def carry() -> None:
        while not ended.is_set():
            for source in select.select([ours, upstream], [], [], 0.05)[0]:
                if source is upstream:
                    os.write(ours, upstream.recv(4096))
                else:
                    upstream.sendall(os.read(ours, 4096))

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield os.ttyname(theirs)
    finally:
        ended.set()
        thread.join(10)
        for descriptor in (ours, theirs):
            os.close(descriptor)
        upstream.close()


def test_a_tty(kgdb_vm: Vm, tty: str) -> None:
    started = kgdb_vm.start(BREAK_IN)
    vmlinux = str(kgdb_vm.info.vmlinux)
    with pytest.raises(TargetError, match="no speed"):
        SerialLine(f"{tty},12345", 1.0)
    target = KgdbTarget(f"{tty},115200", answer_s=30.0)
    with attach(target, Path(vmlinux)) as session:
        banner = session.kernel.memory.read_string(session.kernel.address("linux_banner"))
        assert kgdb_vm.info.release.encode() in banner
    assert started.wait(60).status == 0


def test_a_tty_that_is_not_there() -> None:
    with pytest.raises(TargetError, match="cannot open /dev/nonesuch"):
        SerialLine("/dev/nonesuch,115200", 1.0)
