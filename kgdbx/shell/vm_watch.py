"""The end of a VM, noticed at once."""

import asyncio
import os
from collections.abc import Callable

from kgdbx.machine.info import VmInfo

__all__ = ("VmWatch",)


class VmWatch:
    """Tells once when a VM's process has ended, whatever its debugger does.

    :param on_end: called in the event loop
    :raises ProcessLookupError: if it has ended already
    """

    def __init__(self, info: VmInfo, on_end: Callable[[], None]) -> None:
        self._descriptor = os.pidfd_open(info.pid)
        self._on_end = on_end
        asyncio.get_running_loop().add_reader(self._descriptor, self._end)

    def stop(self) -> None:
        """Watch no more; does nothing the second time."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _end(self) -> None:
        self.stop()
        self._on_end()
