"""Leaving gdb: no probe stays behind, however gdb ends."""

import os
import subprocess
import sys

from kgdbx.commands.context import Context
from kgdbx.errors import KgdbxError
from kgdbx.gdb.python import python_of_gdb

__all__ = ("leave",)

# Connects when gdb has let go of the stub, which may take it a moment. Connecting removes every
# breakpoint of a debugger that is gone, and closing lets the kernel run on.
# Attaching to a VM of ours puts back what its journal says.
_RELEASE = """
import sys
import time
from kgdbx.attach import attach_vm, connect
from kgdbx.errors import KgdbxError
from kgdbx.machine.info import list_infos
from kgdbx.target.rsp import RspTarget
where, vmlinux = sys.argv[1:]
for _ in range(5):
    try:
        vm = next((i for i in list_infos() if str(i.gdb_socket) == where), None)
        if where.startswith("kgdb:"):
            connect(where, vmlinux).close()
        else:
            (RspTarget(where) if vm is None else attach_vm(vm)).close()
        break
    except KgdbxError:
        time.sleep(1)
"""


def leave(context: Context) -> None:
    """Detach while gdb exits.

    When gdb's terminal is closed while the kernel runs, gdb exits at once and takes no commands
    any more; then a process of our own does it after gdb.
    """
    if not context.attached:
        return
    address = context.session.target.name
    vmlinux = str(context.session.kernel.vmlinux.path)
    try:
        context.detach()
    except KgdbxError:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.Popen(
            [python_of_gdb(), "-c", _RELEASE, address, vmlinux],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
