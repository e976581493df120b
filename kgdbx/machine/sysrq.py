"""SysRq-g on the console of a VM with the KGDB kernel, which stops it for KGDB."""

import contextlib
import socket
from collections.abc import Iterator

from kgdbx.errors import MachineError
from kgdbx.machine.info import VmInfo
from kgdbx.machine.qmp import Qmp

__all__ = ("sysrq_g",)

_CONNECT_S = 10.0
_CONSOLE = "console0"  # kgdbx/machine/config.py


@contextlib.contextmanager
def sysrq_g(info: VmInfo) -> Iterator[None]:
    """Send a break and ``g`` to the console; to be left when the kernel has stopped.

    :raises MachineError: if the VM is gone, or someone else has its console
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        console.settimeout(_CONNECT_S)
        try:
            console.connect(str(info.console_socket))
        except OSError as e:
            raise MachineError(f"cannot connect to the console of VM {info.name}: {e}") from e
        with Qmp(info.qmp_socket, _CONNECT_S) as qmp:
            qmp.execute("chardev-send-break", id=_CONSOLE)
        console.sendall(b"g")
        yield
