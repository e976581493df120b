"""Leaving gdb: no probe stays behind, however gdb ends."""

import os
import shutil
import subprocess
import sys

from kgdbx.commands.context import Context
from kgdbx.errors import KgdbxError

__all__ = ("leave",)

# Connects when gdb has let go of the stub. Connecting removes every breakpoint of a debugger that
# is gone, and closing lets the kernel run on.
# Attaching to a VM of ours puts back what its journal says.
_RELEASE = """
import sys
from kgdbx.machine.info import list_infos
from kgdbx.session import Session
from kgdbx.target.rsp import RspTarget
vm = next((i for i in list_infos() if str(i.gdb_socket) == sys.argv[1]), None)
(RspTarget(sys.argv[1]) if vm is None else Session.attach_vm(vm)).close()
"""


def leave(context: Context) -> None:
    """Detach while gdb exits.

    When gdb's terminal is closed while the kernel runs, gdb exits at once and takes no commands
    any more; then a process of our own does it after gdb.
    """
    if not context.attached:
        return
    address = context.session.target.name
    try:
        context.detach()
    except KgdbxError:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.Popen(
            [_python(), "-c", _RELEASE, address],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def _python() -> str:
    # gdb's sys.executable is a guess that need not exist.
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return shutil.which(name, path=os.path.join(sys.exec_prefix, "bin")) or name
