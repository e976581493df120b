"""QEMU's machine protocol, synchronous and with deadlines."""

import asyncio
from pathlib import Path
from typing import Any, Self

from qemu.qmp import ExecuteError, QMPClient, QMPError

from kgdbx.errors import MachineError
from kgdbx.machine.cache import wait_until

__all__ = ("Qmp",)


class Qmp:
    """One connection to a QMP socket; a context manager.

    :param path: the Unix socket
    :param timeout_s: seconds for connecting and for each command
    :raises MachineError: if QEMU does not answer in that time
    """

    def __init__(self, path: Path, timeout_s: float = 10.0) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("kgdbx")
        self._client.logger.disabled = True
        try:
            self._sync(self._client.connect(str(path)))
        except BaseException:
            self._loop.close()
            raise

    def execute(self, command: str, **arguments: object) -> Any:
        """Execute one command and return its result.

        :param arguments: its arguments; ``_`` in a name stands for ``-``
        :raises MachineError: if QEMU refuses it or does not answer in time
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._sync(self._client.execute(command, named or None))

    def wait_status(self, command: str, wanted: tuple[str, ...], timeout_s: float) -> str:
        """Poll a ``query-*`` command until its ``status`` is one of *wanted*; return that.

        :raises MachineError: if that did not come within *timeout_s* seconds
        """
        seen = ""

        def reached() -> bool:
            nonlocal seen
            seen = self.execute(command).get("status", "")
            return seen in wanted

        if not wait_until(reached, timeout_s):
            raise MachineError(
                f"{command} says '{seen}' after {timeout_s:g} s, not {' or '.join(wanted)}"
            )
        return seen

    def close(self) -> None:
        """Disconnect; does nothing the second time."""
        if self._loop.is_closed():
            return
        try:
            self._sync(self._client.disconnect())
        except MachineError:
            pass  # QEMU went first
        finally:
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _sync(self, awaitable: Any) -> Any:
        try:
            return self._loop.run_until_complete(asyncio.wait_for(awaitable, self._timeout_s))
        except ExecuteError as e:
            raise MachineError(f"QEMU refuses: {e}") from e
        except TimeoutError as e:
            raise MachineError(f"no QMP answer on {self._path} in {self._timeout_s:g} s") from e
        except (QMPError, OSError, EOFError) as e:
            raise MachineError(f"no QMP connection to {self._path}: {e}") from e
