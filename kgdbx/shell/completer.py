"""What may be typed next."""

import contextlib
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Any

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from kgdbx.commands.registry import Command
from kgdbx.errors import KgdbxError
from kgdbx.machine.vm import list_vms
from kgdbx.shell.commands import SHELL_COMMANDS
from kgdbx.shell.knowledge import Knowledge
from kgdbx.shell.records import quote
from kgdbx.shell.shell import Shell
from kgdbx.shell.words import (
    find_session_command,
    kgdbx_command,
    session_arguments,
    short_names,
)

__all__ = ("ShellCompleter",)

_WORD = re.compile(r"[\w.$%@:/~-]*$")
_PLACE = re.compile(r"(?:\S+:)?([\w.]+)")
_PATH = re.compile(r"([A-Za-z_]\w*(?:(?:->|\.)\w+)*)(?:->|\.)(\w*)$")
_NAMES_FUNCTIONS = frozenset(
    [
        "advance",
        "b",
        "br",
        "break",
        "disas",
        "disassemble",
        "hbreak",
        "info-symbol",
        "l",
        "list",
        "tb",
        "tbreak",
        "thbreak",
        "until",
    ]
)
_VARIABLES = ("$comm", "$pid", "$tgid", "$cpu", "$task", "$params", "$vars", "$stack", "$stack0")
_MOST = 200


class ShellCompleter(Completer):
    """Completes commands, options, functions, parameters, members, probes, VMs and files.

    Names of functions come from the kernel's file at once; what gdb has to be asked for comes if
    gdb is free.
    """

    def __init__(self, shell: Shell, knowledge: Knowledge) -> None:
        self._shell = shell
        self._knowledge = knowledge
        self._files = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """Nothing: see :meth:`get_completions_async`."""
        return ()

    async def get_completions_async(
        self, document: Document, complete_event: CompleteEvent
    ) -> AsyncGenerator[Completion, None]:
        """Candidates, the best first."""
        line = document.current_line_before_cursor
        if self._shell.python or line.lstrip().startswith(">>>"):
            async for each in self._python(line.lstrip().removeprefix(">>>")):
                yield each
            return
        words = line.split(" ")
        if len(words) == 1:
            for each in self._first_words(words[0]):
                yield each
            return
        known = kgdbx_command(line)
        if known.split(" ")[:1] == ["kgdbx"] and len(known.split(" ")) == 2:
            for each in _commands(_session_names(), words[-1]):
                yield each
            return
        command = find_session_command(line)
        arguments = session_arguments(line) if command is not None else line.partition(" ")[2]
        for each in _in_group(command, arguments):
            yield each
        if command is None:
            with contextlib.suppress(KgdbxError):
                command = SHELL_COMMANDS.find(words[0])
        if command is None:
            async for each in self._gdbs(line, words, complete_event):
                yield each
            return
        async for each in self._arguments(command, arguments, document, complete_event):
            yield each

    def _first_words(self, piece: str) -> Iterator[Completion]:
        if not piece:
            return
        yield from _commands({c.name: c for c in SHELL_COMMANDS} | short_names(), piece)
        yield from _commands({"kgdbx": None}, piece)
        for name in self._knowledge.gdb_commands:
            if name.startswith(piece):
                yield Completion(name, -len(piece), display_meta="gdb")

    async def _arguments(
        self, command: Command, arguments: str, document: Document, event: CompleteEvent
    ) -> AsyncGenerator[Completion, None]:
        words = arguments.split(" ")
        piece = words[-1]
        if piece.startswith("-"):
            for each in _options(command, piece):
                yield each
            return
        argument, given = command.expected(words)
        if argument is None:
            return
        what = argument.completes
        if what == "function" and argument.rest and given:
            if command.name == "probe" and len(given) < 2:
                given = []
            else:
                place = given[1] if command.name == "probe" else given[0]
                async for each in self._fields(place, piece):
                    yield each
                return
        if command.name == "probe" and not words[:-1]:
            for text, meta in (("p", "at a place"), ("r", "at a return"), ("w", "at an access")):
                yield Completion(text, -len(piece), display_meta=meta)
            return
        if what in ("function", "variable"):
            await self._knowledge.loaded()
        if what == "function":
            async for each in self._functions(piece):
                yield each
            return
        if what == "any module":
            for name in await self._ask("module_names"):
                if str(name).startswith(piece):
                    yield Completion(str(name), -len(piece), display_meta="module")
            return
        for each in self._names(what, piece, document, event):
            yield each

    def _names(
        self, what: str, piece: str, document: Document, event: CompleteEvent
    ) -> Iterator[Completion]:
        if what == "module":
            yield from self._modules(piece, "")
        elif what == "command":
            yield from self._first_words(piece)
        elif what == "variable":
            yield from (Completion(n, -len(piece)) for n in self._knowledge.variables(piece, _MOST))
        elif what == "probe":
            for probe in self._shell.current.probes if self._shell.current else ():
                name = str(probe["name"]).removeprefix("kprobes/")
                if piece in name:
                    yield Completion(name, -len(piece), display_meta=str(probe["what"]))
        elif what == "vm":
            for vm in list_vms():
                if vm.name.startswith(piece):
                    yield Completion(vm.name, -len(piece), display_meta=vm.info.release)
        elif what == "session":
            for number, session in self._shell.sessions.items():
                if session.name.startswith(piece) or str(number) == piece:
                    yield Completion(session.name, -len(piece), display_meta=session.state)
        elif what == "file":
            rest = Document(piece, len(piece))
            yield from self._files.get_completions(rest, event)

    async def _functions(self, piece: str) -> AsyncGenerator[Completion, None]:
        module, colon, name = piece.rpartition(":")
        if colon:
            names = [str(each) for each in await self._ask("module_functions", module=module)]
            found = [each for each in names if name in each][:_MOST]
        else:
            for module_name in self._modules(name, ":"):
                yield module_name
            found = self._knowledge.functions(name, _MOST)
        for each in found:
            yield Completion(each, -len(name), display_meta=self._signature(each))
        self._knowledge.want_signatures(found[:16])

    def _modules(self, piece: str, behind: str) -> Iterator[Completion]:
        for name in self._knowledge.modules():
            if name.startswith(piece) and (piece or not behind):  # functions, if nothing is typed
                yield Completion(f"{name}{behind}", -len(piece), display_meta="module")

    def _signature(self, name: str) -> Any:
        return lambda: self._knowledge.signature(name)

    async def _fields(self, place: str, piece: str) -> AsyncGenerator[Completion, None]:
        path = _PATH.search(piece)
        if path is not None:
            for name, type_ in await self._ask("members", place=_bare(place), path=path[1]):
                if name.startswith(path[2]):
                    yield Completion(name, -len(path[2]), display_meta=type_)
            return
        word = _WORD.search(piece)
        start = word[0] if word else ""
        for name, type_ in await self._ask("parameters", place=_bare(place)):
            if name.startswith(start):
                yield Completion(name, -len(start), display_meta=type_)
        for name in (*_VARIABLES, "$retval"):
            if start and name.startswith(start):
                yield Completion(name, -len(start))

    async def _python(self, source: str) -> AsyncGenerator[Completion, None]:
        word = re.search(r"\w*$", source)
        start = len(word[0]) if word else 0
        for name, about in await self._ask("candidates", keep=False, source=source):
            yield Completion(name, -start, display_meta=about)

    async def _ask(self, name: str, *, keep: bool = True, **arguments: Any) -> list[list[str]]:
        session = self._shell.current
        if session is None:
            return []
        try:
            return list(await self._knowledge.ask(session, name, keep=keep, **arguments))
        except (KgdbxError, TimeoutError):
            return []

    async def _gdbs(
        self, line: str, words: list[str], event: CompleteEvent
    ) -> AsyncGenerator[Completion, None]:
        piece = words[-1].lstrip("*&(")
        if words[0] in _NAMES_FUNCTIONS:
            await self._knowledge.loaded()
            async for each in self._functions(piece):
                yield each
            return
        session = self._shell.current
        if session is None or not event.completion_requested:
            return  # gdb may take seconds: only when asked for
        with contextlib.suppress(KgdbxError):
            reply = await session.request(f"-complete {quote(line)}")
            for match in reply.results.get("matches", ())[:_MOST]:
                yield Completion(match[len(line) - len(words[-1]) :], -len(words[-1]))


def _session_names() -> dict[str, Command]:
    from kgdbx.commands.session import SESSION_COMMANDS

    return {name: c for c in SESSION_COMMANDS for name in (c.name, *c.aliases)}


def _commands(commands: "dict[str, Command] | dict[str, None]", piece: str) -> Iterator[Completion]:
    for name, command in sorted(commands.items()):
        if name.startswith(piece):
            meta = command.summary if command is not None else "kgdbx's commands in gdb"
            yield Completion(name, -len(piece), display_meta=meta)


def _in_group(command: Command | None, piece: str) -> Iterator[Completion]:
    # The words that make another command of "leaks".
    for name, each in _session_names().items():
        group, _, word = name.partition(" ")
        if command is not None and word and group == command.name and word.startswith(piece):
            yield Completion(word, -len(piece), display_meta=each.summary)


def _options(command: Command, piece: str) -> Iterator[Completion]:
    for argument in command.arguments:
        for name in argument.names:
            if name.startswith("--") and name.startswith(piece):
                yield Completion(name, -len(piece), display_meta=argument.options.get("help", ""))


def _bare(place: str) -> str:
    match = _PLACE.match(place)
    return match[0] if match else place
