"""Attaching: from a name, an address or a file to a session."""

import functools
from pathlib import Path

from kgdbx.errors import CommandError
from kgdbx.machine.info import VmInfo
from kgdbx.machine.sysrq import sysrq_g
from kgdbx.machine.vm import find_vm
from kgdbx.session import Session
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.kgdb import kgdb_ram, kgdb_symbols
from kgdbx.target.base import Target
from kgdbx.target.break_in import BreakIn, sysrq_over_console
from kgdbx.target.core import CoreTarget
from kgdbx.target.kgdb import KgdbTarget
from kgdbx.target.kgdb_access import KgdbAccess
from kgdbx.target.ram import GuestRam
from kgdbx.target.rsp import RspTarget
from kgdbx.target.serial_line import is_tty

__all__ = ("attach", "attach_kgdb", "attach_vm", "connect", "open_core", "open_ram")


def connect(
    where: str,
    vmlinux: str | None = None,
    *,
    sysrq: str | None = None,
    leave_standing: bool = False,
) -> Session:
    """Attach without gdb to a VM by its name, or to any stub.

    :param where: name of a VM of ours, path of a Unix socket, or ``host:port``; for KGDB a
        tty (``/dev/ttyS0,115200``), or one of the others behind ``kgdb:``
    :param vmlinux: the kernel's file; a VM of ours knows its own
    :param sysrq: line of the console over which KGDB's kernel can be stopped
    :param leave_standing: of a VM of ours; see :func:`attach_vm`
    :raises CommandError: if *vmlinux* is needed and missing
    """
    line = where.removeprefix("kgdb:")
    if line != where or is_tty(where):
        return _connect_kgdb(line, vmlinux, sysrq)
    if sysrq is not None:
        raise CommandError(f"{where} is stopped by its stub; --sysrq is for KGDB: kgdb:{where}")
    if "/" not in where and ":" not in where:
        return attach_vm(find_vm(where).info, leave_standing=leave_standing)
    if vmlinux is None:
        raise CommandError(f"give the vmlinux with debug symbols of the kernel at {where}")
    return attach(RspTarget(where), Path(vmlinux).expanduser())


def _connect_kgdb(line: str, vmlinux: str | None, sysrq: str | None) -> Session:
    if "/" not in line and ":" not in line:
        return attach_kgdb(find_vm(line).info)
    if vmlinux is None:
        raise CommandError(f"give the vmlinux with debug symbols of the kernel at {line}")
    break_in = sysrq_over_console(sysrq) if sysrq is not None else None
    return attach(KgdbTarget(line, break_in=break_in), Path(vmlinux).expanduser())


def attach_kgdb(info: VmInfo) -> Session:
    """Attach without gdb to the KGDB of a VM of ours, as to that of any machine: over its
    serial line. It is stopped by SysRq-g on its console.

    :raises CommandError: if the VM's kernel has no KGDB
    """
    if not info.kgdb_socket.exists():
        raise CommandError(
            f"the kernel of VM {info.name} has no KGDB; run one: kgdbx vm run --kernel kgdb"
        )
    break_in: BreakIn = functools.partial(sysrq_g, info)
    target = KgdbTarget(str(info.kgdb_socket), break_in=break_in)
    return attach(target, info.vmlinux, debug_modules=info.debug_modules)


def open_core(core: Path, vmlinux: Path) -> Session:
    """Look at a kernel in a core file of QEMU's ``dump-guest-memory``; it never runs.

    :raises TargetError: if the file cannot be used
    :raises BuildIdMismatch: if *vmlinux* is of another kernel
    """
    target = CoreTarget(core)
    try:
        ram_end = sum(target.ram.ranges()[-1])
        session = Session(target, Kernel.attach(target, vmlinux, ram_end=ram_end))
    except BaseException:
        target.close()
        raise
    session.ram = target.ram
    return session


def attach_vm(info: VmInfo, *, leave_standing: bool = False) -> Session:
    """Attach without gdb to a VM of ours, and put right what a killed session left in it.

    :param leave_standing: the VM stands: leave it so, now and when the session is closed, unless
        there is something to put right
    :raises CommandError: if the journal of that session cannot be used
    """
    ram = open_ram(info)
    session = attach(
        RspTarget(str(info.gdb_socket), ram=ram, stands=leave_standing),
        info.vmlinux,
        debug_modules=info.debug_modules,
        ram=ram,
        journal=info.journal,
    )
    session.leaves_standing = leave_standing
    try:
        session.recovery = session.resident.recover()
    except BaseException:
        session.close()
        raise
    return session


def attach(
    target: Target,
    vmlinux: Path,
    *,
    debug_modules: Path | None = None,
    ram: GuestRam | None = None,
    journal: Path | None = None,
) -> Session:
    """Find the kernel in a target; the target is closed if that fails.

    :param debug_modules: directory with the debug files of its modules
    :param ram: the guest's RAM, if the target has it
    :param journal: file to note changes of the guest in while there are any
    :raises BuildIdMismatch: if *vmlinux* is of another kernel
    """
    try:
        ram_end = sum(ram.ranges()[-1]) if ram is not None else 0
        kernel = Kernel.attach(target, vmlinux, debug_modules=debug_modules, ram_end=ram_end)
        if isinstance(target, KgdbAccess):
            target.read_ahead_in(*kgdb_ram(kernel))
            target.use_symbols(kgdb_symbols(kernel))
        return Session(target, kernel, ram=ram, journal=journal)
    except BaseException:
        target.close()
        raise


def open_ram(info: VmInfo) -> GuestRam:
    """The RAM of a VM of ours."""
    return GuestRam(info.ram_file, info.memory_bytes, None if info.ram_shared else info.pid)
