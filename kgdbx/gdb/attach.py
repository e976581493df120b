"""Attach over gdb's own connection."""

from pathlib import Path

import gdb

from kgdbx.attach import attach, open_ram
from kgdbx.errors import CommandError, TargetError
from kgdbx.gdb.kgdb import attach_connected, attach_line
from kgdbx.gdb.poll import Poller
from kgdbx.machine.info import VmInfo
from kgdbx.machine.vm import find_vm
from kgdbx.session import Session
from kgdbx.target.gdb_inferior import GdbInferior
from kgdbx.target.gdb_kgdb import GdbKgdbTarget, is_kgdb
from kgdbx.target.gdb_qemu import GdbTarget
from kgdbx.target.rsp import release_stub
from kgdbx.target.serial_line import is_tty

__all__ = ("connect",)


def connect(
    where: str, vmlinux: str | None, sysrq: str | None = None, *, keys: bool = True
) -> Session:
    """Attach gdb, and kgdbx through it.

    :param where: VM name, socket or ``host:port``, for KGDB behind ``kgdb:``; or a tty; empty for
        the connection that gdb has
    :param sysrq: tty of the console over which KGDB's kernel can be stopped
    :param keys: whether ^C comes to gdb, and means the kernel
    :raises CommandError: if it is not clear what to attach to
    """
    session, target, path = _attach(where, vmlinux, sysrq)
    target.on_stop = session.probes.on_stop
    if session.ram is None:  # and here the kernel runs until the user stops it
        session.resident.unread = (
            "a stub gives no memory while the kernel runs; attach to a VM of ours by its name"
        )
    try:
        if not isinstance(target, GdbKgdbTarget):
            session.recovery = session.resident.recover()
        _relocate(path, session.kernel.slide)
    except BaseException:
        session.close()
        raise
    Poller(session, target, keys=keys)
    return session


def _attach(
    where: str, vmlinux: str | None, sysrq: str | None
) -> tuple[Session, GdbInferior, Path]:
    if where and gdb.selected_inferior().pid:
        # gdb would end the other connection by killing its VM.
        raise CommandError("gdb is connected; detach first, or use 'kgdbx attach' alone")
    line = where.removeprefix("kgdb:")
    if line != where or (where and is_tty(where)):
        return attach_line(line, vmlinux, sysrq)
    if sysrq is not None:
        raise CommandError("--sysrq is for a line of KGDB: kgdb:LINE")
    if not where and is_kgdb():
        return attach_connected(_vmlinux(vmlinux, None))
    info = find_vm(where).info if where and "/" not in where and ":" not in where else None
    path = _vmlinux(vmlinux, info)
    if where:
        address = str(info.gdb_socket) if info is not None else where
        release_stub(address)  # gdb would wait for minutes where another debugger is attached
        try:
            gdb.execute(f"target remote {address}", to_string=True)
        except gdb.error as e:
            raise TargetError(f"cannot connect gdb to {address}: {e}") from e
    elif gdb.selected_inferior().connection is None:
        raise CommandError("gdb is not connected; name a VM, a socket or host:port")
    ram = open_ram(info) if info is not None else None
    modules = info.debug_modules if info is not None else None
    target = GdbTarget(ram=ram)
    journal = info.journal if info is not None else None
    session = attach(target, path, debug_modules=modules, ram=ram, journal=journal)
    return session, target, path


def _vmlinux(given: str | None, info: VmInfo | None) -> Path:
    if given:
        return Path(given).expanduser()
    if info is not None:
        return info.vmlinux
    loaded = gdb.current_progspace().filename
    if loaded is None:
        raise CommandError("give the vmlinux with debug symbols of this kernel")
    return Path(loaded)


def _relocate(path: Path, slide: int) -> None:
    # gdb keeps what it has read of the file, so that this takes no second reading.
    try:
        gdb.execute(f"symbol-file -o {slide:#x} {path}", to_string=True)
    except gdb.error as e:
        raise TargetError(f"gdb cannot relocate {path}: {e}") from e
