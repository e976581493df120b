"""Where views get what they show."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from kgdbx.errors import CommandError
from kgdbx.shell.kernel_session import KernelSession
from kgdbx.shell.layouts import (
    Line,
    Table,
    histogram_lines,
    probe_table,
    rows_table,
    stop_lines,
)

__all__ = ("Content", "VIEW_SUMMARIES", "View")

Content = Table | Callable[[int, int], list[Line]]
"""A table, or a function that makes lines for columns and rows of the window."""

VIEW_SUMMARIES = {
    "top": "Live table of probes: hits, rates, misses, time.",
    "hist": "Live histogram of a number in events: hist [PROBE [FIELD]].",
    "stop": "Source, instructions and stack where the kernel stands.",
    "tasks": "Live list of tasks.",
    "modules": "Live list of loaded modules.",
    "slabs": "Live list of slab caches.",
}
"""What each view is for; its name is its command."""


class View:
    """One view of a session, fetched again and again.

    :param name: of :data:`VIEW_SUMMARIES`
    :raises CommandError: if there is no such view
    """

    def __init__(self, name: str, arguments: list[str]) -> None:
        sources: dict[str, Callable[[KernelSession], Awaitable[Content]]] = {
            "top": self._top,
            "hist": self._histogram,
            "stop": self._stop,
            "tasks": self._tasks,
            "modules": self._modules,
            "slabs": self._slabs,
        }
        self.name = name
        self._arguments = arguments
        self._source = sources[name]
        self._before: tuple[float, dict[str, int]] = (0.0, {})

    async def fetch(self, session: KernelSession) -> Content:
        """The view as it is now.

        :raises CommandError: if gdb is busy, or no kernel is attached
        """
        return await self._source(session)

    async def _top(self, session: KernelSession) -> Content:
        if not session.busy:
            await session.refresh()
        now = time.monotonic()
        then, hits = self._before
        table = probe_table(session.probes, hits, now - then if then else 0.0)
        self._before = (now, {str(probe["name"]): probe["hits"] for probe in session.probes})
        return table if table.rows else table._replace(notes=("no probes",))

    async def _histogram(self, session: KernelSession) -> Content:
        probe, field = (*self._arguments, "", "")[:2]
        answer = await session.ask("histogram", probe=probe, field=field)
        return lambda columns, rows: histogram_lines(answer, columns)

    async def _stop(self, session: KernelSession) -> Content:
        if session.state != "stopped":
            raise CommandError(f"the kernel is {session.state}; stop it to look around")
        answer = await session.ask("stop")
        return lambda columns, rows: stop_lines(answer, columns, rows)

    async def _tasks(self, session: KernelSession) -> Content:
        return rows_table(await self._ask(session, "tasks"), ("task",))

    async def _modules(self, session: KernelSession) -> Content:
        table = rows_table(await self._ask(session, "modules"), ("base",))
        return table if table.rows else table._replace(notes=("no modules are loaded",))

    async def _slabs(self, session: KernelSession) -> Content:
        return rows_table(await self._ask(session, "slabs"))

    @staticmethod
    async def _ask(session: KernelSession, name: str) -> Any:
        return await session.ask(name)
