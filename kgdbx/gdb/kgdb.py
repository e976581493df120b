"""Attach over KGDB's serial line, by gdb's own connection."""

import os
import shlex
import sys
from functools import partial
from pathlib import Path

import gdb

from kgdbx.attach import attach
from kgdbx.errors import CommandError, TargetError
from kgdbx.gdb.python import python_of_gdb
from kgdbx.machine.info import VmInfo
from kgdbx.machine.sysrq import sysrq_g
from kgdbx.machine.vm import find_vm
from kgdbx.session import Session
from kgdbx.target.break_in import BreakIn, sysrq_over_console
from kgdbx.target.gdb_kgdb import GdbKgdbTarget
from kgdbx.target.kgdb import KgdbTarget

__all__ = ("attach_connected", "attach_line")

_NO_WAY_IN = (
    "kgdbx: ^C does not stop this kernel, as KGDB does not listen while it runs; stop it there: "
    "echo g > /proc/sysrq-trigger\n"
)


def attach_line(
    line: str, vmlinux: str | None, sysrq: str | None
) -> tuple[Session, GdbKgdbTarget, Path]:
    """Stop a kernel over its console, and connect gdb to its KGDB.

    :param line: VM name, tty, socket or ``host:port``
    :param vmlinux: the kernel's file; a VM of ours knows its own
    :param sysrq: tty of the console; a VM of ours knows its own
    :raises CommandError: if something is missing
    :raises TargetError: if KGDB does not answer
    """
    info = find_vm(line).info if "/" not in line and ":" not in line else None
    break_in: BreakIn | None = None
    if info is not None:
        if not info.kgdb_socket.exists():
            raise CommandError(
                f"the kernel of VM {info.name} has no KGDB; run one: kgdbx vm run --kernel kgdb"
            )
        break_in = partial(sysrq_g, info)
        address, path, way = str(info.kgdb_socket), info.vmlinux, ["--vm", info.name]
    else:
        given = vmlinux or gdb.current_progspace().filename
        if given is None:
            raise CommandError(f"give the vmlinux with debug symbols of the kernel at {line}")
        address, path, way = line, Path(given).expanduser(), []
        if sysrq is not None:
            break_in, way = sysrq_over_console(sysrq), ["--sysrq", sysrq]
    # gdb is to find a kernel that stands, and a line with nothing on it.
    KgdbTarget(address, break_in=break_in).close(resume=False)
    carrier = [python_of_gdb(), "-m", "kgdbx.machine.kgdb_line", address, *way]
    paths = os.pathsep.join(filter(None, sys.path))
    command = shlex.join(["env", f"PYTHONPATH={paths}", *carrier])
    _set_architecture()
    try:
        gdb.execute(f"target remote | {command}", to_string=True)
    except gdb.error as e:
        raise TargetError(f"cannot connect gdb to {address}: {e}") from e
    return _attach(f"kgdb:{line}", path, info, breaks_in=break_in is not None)


def attach_connected(path: Path) -> tuple[Session, GdbKgdbTarget, Path]:
    """Attach over the connection that gdb has."""
    details = str(gdb.selected_inferior().connection.details)
    return _attach(f"kgdb:{details}", path, None, breaks_in=False)


def _attach(
    name: str, path: Path, info: VmInfo | None, *, breaks_in: bool
) -> tuple[Session, GdbKgdbTarget, Path]:
    target = GdbKgdbTarget(name)
    modules = info.debug_modules if info is not None else None
    session = attach(target, path, debug_modules=modules)
    if not breaks_in:
        gdb.write(_NO_WAY_IN)
    return session, target, path


def _set_architecture() -> None:
    # KGDB does not tell it, and no vmlinux need be loaded yet.
    if gdb.selected_inferior().architecture().name() != "i386:x86-64":
        gdb.execute("set architecture i386:x86-64", to_string=True)
