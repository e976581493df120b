"""What is known of a session's kernel for completion, fetched once and kept."""

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kgdbx.errors import KgdbxError
from kgdbx.shell.kernel_session import KernelSession
from kgdbx.shell.name_index import NameIndex
from kgdbx.shell.shell import Shell
from kgdbx.symbols.elf import read_symbols

__all__ = ("Knowledge",)

_ASK_S = 0.3
_MODULES_S = 5.0


class Knowledge:
    """Names by kernel file, and answers of gdb by session.

    :param on_news: called when something came that was asked for before
    :param on_late: called when candidates came for which nobody had waited
    """

    def __init__(
        self, shell: Shell, on_news: Callable[[], None], on_late: Callable[[], None]
    ) -> None:
        self.gdb_commands: tuple[str, ...] = ()
        self._shell = shell
        self._on_news = on_news
        self._on_late = on_late
        self._asked: dict[tuple[str, str, str], asyncio.Task[Any]] = {}
        self._indexes: dict[Path, tuple[NameIndex, NameIndex]] = {}
        self._loading: dict[Path, asyncio.Future[None]] = {}
        self._answers: dict[tuple[str, str, str], Any] = {}
        self._signatures: dict[str, str] = {}
        self._modules: dict[str, tuple[float, list[str]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def prepare(self) -> None:
        """Begin to read the kernel's names, and gdb's commands, without waiting for them."""
        path = self._vmlinux()
        if path is not None and path not in self._loading:
            self._loading[path] = asyncio.get_running_loop().create_future()
            self._start(self._load(path))
        if not self.gdb_commands and self._shell.current is not None:
            self._start(self._load_commands(self._shell.current))
        if self._shell.current is not None and self._shell.current.name not in self._modules:
            self.modules()

    async def loaded(self) -> None:
        """Wait for the names of the current kernel, if they are being read."""
        self.prepare()
        path = self._vmlinux()
        if path is not None:
            await asyncio.shield(self._loading[path])

    def functions(self, piece: str, most: int) -> list[str]:
        """Functions that match, the best first."""
        return self._index(0).search(piece, most)

    def variables(self, piece: str, most: int) -> list[str]:
        """Symbols that match, the best first."""
        return self._index(1).search(piece, most)

    def is_function(self, name: str) -> bool:
        """Whether the current kernel has such a function."""
        return name in self._index(0)

    def modules(self) -> list[str]:
        """Names of the loaded modules, as they were some seconds ago at most; empty until gdb has
        told."""
        session = self._shell.current
        if session is None:
            return []
        at, names = self._modules.get(session.name, (-math.inf, []))
        if time.monotonic() - at > _MODULES_S and session.status and not session.busy:
            self._modules[session.name] = (time.monotonic(), names)
            self._start(self._fetch_modules(session))
        return names

    def signature(self, function: str) -> str:
        """C declaration of a function; empty until gdb has told."""
        return self._signatures.get(function, "")

    def want_signatures(self, functions: Iterable[str]) -> None:
        """Ask gdb for declarations, if it is free."""
        missing = [name for name in functions if name not in self._signatures]
        session = self._shell.current
        if missing and session is not None and session.status and not session.busy:
            self._signatures |= dict.fromkeys(missing, "")
            self._start(self._fetch_signatures(session, missing))

    async def ask(
        self, session: KernelSession, name: str, *, keep: bool = True, **arguments: Any
    ) -> Any:
        """An answer of gdb, waited for only as long as somebody who types would.

        :param keep: it is always the same: do not ask again
        :raises CommandError: if gdb is busy or refuses
        :raises TimeoutError: if it takes longer; there is news when it has come
        """
        key = (session.name, name, json.dumps(arguments))
        if key in self._answers:
            return self._answers[key]
        asked = self._asked.get(key)
        if asked is None:
            loop = asyncio.get_running_loop()
            asked = self._asked[key] = loop.create_task(session.ask(name, **arguments))
        try:
            async with asyncio.timeout(_ASK_S):
                answer = await asyncio.shield(asked)
        except TimeoutError:
            asked.add_done_callback(self._late_answer)
            raise
        finally:
            if asked.done():
                self._asked.pop(key, None)
        if keep:
            self._answers[key] = answer
        return answer

    def _late_answer(self, asked: "asyncio.Task[Any]") -> None:
        if not asked.cancelled() and asked.exception() is None:
            self._on_late()

    def _index(self, which: int) -> NameIndex:
        path = self._vmlinux()
        return self._indexes[path][which] if path in self._indexes else NameIndex(())

    def _vmlinux(self) -> Path | None:
        session = self._shell.current
        if session is None:
            return None
        if session.info is not None:
            return session.info.vmlinux
        return Path(session.vmlinux).expanduser() if session.vmlinux else None

    async def _load(self, path: Path) -> None:
        try:
            self._indexes[path] = await asyncio.to_thread(_read_names, path)
        finally:
            self._loading[path].set_result(None)
        self._on_news()

    async def _load_commands(self, session: KernelSession) -> None:
        reply = await session.request('-complete ""')
        words = {match.split(" ")[0] for match in reply.results.get("matches", ())}
        self.gdb_commands = tuple(sorted(words))

    async def _fetch_modules(self, session: KernelSession) -> None:
        _, before = self._modules[session.name]
        found = await session.ask("modules")
        names = [str(row["module"]) for row in found["rows"]]
        self._modules[session.name] = (time.monotonic(), names)
        if names != before:
            self._on_late()

    async def _fetch_signatures(self, session: KernelSession, functions: list[str]) -> None:
        self._signatures |= await session.ask("signatures", functions=functions)
        self._on_news()

    def _start(self, work: Any) -> None:
        async def run() -> None:
            try:
                await work
            except KgdbxError:
                self._on_news()  # it is asked again with the next key

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _read_names(path: Path) -> tuple[NameIndex, NameIndex]:
    symbols = read_symbols(path)
    functions = [name for name in symbols.function_names if not name.startswith("__pfx_")]
    return NameIndex(functions), NameIndex(symbols.names())
