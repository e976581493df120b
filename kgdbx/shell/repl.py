"""The prompt in a terminal, with output above it as it comes."""

import asyncio
import contextlib
import os
import signal
import traceback
from collections import deque
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import set_app
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.document import Document
from prompt_toolkit.enums import EditingMode
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.output import ColorDepth

from kgdbx.errors import KgdbxError
from kgdbx.machine.cache import cache_dir
from kgdbx.shell.above import print_above
from kgdbx.shell.bindings import bindings
from kgdbx.shell.blocks import Block, split_commands
from kgdbx.shell.commands import SHELL_COMMANDS
from kgdbx.shell.completer import ShellCompleter
from kgdbx.shell.knowledge import Knowledge
from kgdbx.shell.lexer import ShellLexer, style
from kgdbx.shell.screen import Screen
from kgdbx.shell.shell import Shell
from kgdbx.shell.toolbar import prompt, toolbar
from kgdbx.shell.words import short_names

__all__ = ("run_repl",)

_FRAME_S = 0.05
_REFRESH_S = 1.0
_FOR_VIEW = "(a view)"  # in place of a line: the prompt makes room
_OWN_WORDS = frozenset(("kgdbx", "kx", "quit", "exit", "q"))


async def run_repl(shell: Shell, *, vi: bool = False) -> int:
    """Read lines until the end, while output is shown above the prompt.

    :param vi: vi's keys instead of Emacs'
    :return: exit status
    """
    repl = _Repl(shell, vi)
    try:
        # Also between two prompts: the terminal is not to echo keys, nor to make signals of them.
        with repl.raw_mode():
            await repl.run()
    finally:
        await shell.close()
        print(shell.printer.frame(), end="", flush=True)
    return 0


class _Repl:
    def __init__(self, shell: Shell, vi: bool) -> None:
        self._shell = shell
        self._lines: deque[Block] = deque()
        self._something = asyncio.Event()
        self._view: Screen | None = None
        self._typed = Document()
        self._knowledge = Knowledge(shell, self._changed, self._complete_again)
        colour = bool(shell.style.bold)
        self._session: PromptSession[str] = PromptSession(
            lambda: prompt(shell),
            completer=ShellCompleter(shell, self._knowledge),
            complete_while_typing=True,
            lexer=ShellLexer(self._is_command, self._knowledge.is_function, lambda: shell.python),
            history=_history(),
            auto_suggest=AutoSuggestFromHistory(),
            enable_history_search=False,
            editing_mode=EditingMode.VI if vi else EditingMode.EMACS,
            key_bindings=bindings(shell, self._run_line),
            bottom_toolbar=self._toolbar,
            multiline=False,
            prompt_continuation="... ",
            enable_open_in_editor=True,
            style=style(colour),
            color_depth=None if colour else ColorDepth.DEPTH_1_BIT,
            reserve_space_for_menu=6,
        )
        self._session.app.max_render_postpone_time = None  # a key is shown before all else
        shell.on_change = self._changed
        for session in shell.sessions.values():
            session.on_change = self._changed
        shell.show_view = self._open_view

    def raw_mode(self) -> contextlib.AbstractContextManager[None]:
        return self._session.input.raw_mode()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        loop.set_exception_handler(self._mistake)
        helpers = [
            loop.create_task(self._show()),
            loop.create_task(self._refresh()),
            loop.create_task(self._execute()),
        ]
        try:
            while not self._shell.ended:
                if self._view is not None:
                    await self._show_view(self._view)
                    continue
                # A search that was under way when the prompt went would keep the focus.
                self._session.layout.focus(self._session.default_buffer)
                try:
                    text = await self._session.prompt_async(
                        default=self._typed, set_exception_handler=False
                    )
                except EOFError:
                    if self._shell.python:
                        self._shell.python = False
                        continue
                    break
                except KeyboardInterrupt:
                    continue
                if text is _FOR_VIEW:
                    continue
                self._typed = Document()
                self._queue(text)
                if any(block.text.strip() in ("quit", "q", "exit") for block in self._lines):
                    await self._drained()
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    def _mistake(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # Of ours, in a task that nobody waits for: it is said, and the prompt stays.
        error = context.get("exception")
        text = "".join(traceback.format_exception(error)) if error is not None else ""
        self._shell.say(f"kgdbx: {context['message']}\n{text}", fault=True)

    def _end(self) -> None:
        # Asked to by a signal: probes are removed on the way out.
        self._shell.ended = True
        if self._view is not None:
            self._view.end()
        self._leave_prompt()

    def _interrupt(self) -> None:
        # Somebody's kill -INT; the key comes as a key.
        if self._shell.current is not None:
            self._shell.current.press_interrupt()

    def _leave_prompt(self) -> None:
        app = self._session.app
        if app.is_running and not app.is_done:
            app.exit(result="")

    # Views

    async def _open_view(self, name: str, arguments: list[str]) -> None:
        # The prompt goes, with what was typed kept, and comes back when the view was left.
        self._view = Screen(self._shell, name, arguments, style(bool(self._shell.style.bold)))
        app = self._session.app
        if app.is_running and not app.is_done:
            self._typed = app.current_buffer.document
            app.erase_when_done = True
            app.exit(result=_FOR_VIEW)
        await self._view.left.wait()

    async def _show_view(self, view: Screen) -> None:
        self._session.app.erase_when_done = False
        try:
            await view.run()
        finally:
            self._view = None

    # Lines

    def _queue(self, text: str) -> None:
        lines = [text] if self._shell.python else text.split("\n")
        blocks, _ = split_commands(lines)
        self._lines.extend(blocks)
        self._something.set()

    def _run_line(self, line: str) -> None:
        # Of a key: one that is pressed again and again is not to be worked off for minutes.
        if all(block.text != line for block in self._lines):
            self._lines.append(Block(line))
            self._something.set()

    async def _execute(self) -> None:
        # One command after another, while the prompt takes more.
        while True:
            await self._something.wait()
            while self._lines:
                try:
                    await self._shell.run(self._lines[0])
                except Exception:  # a mistake of ours: the prompt stays
                    self._shell.say(traceback.format_exc(), fault=True)
                self._lines.popleft()
                self._changed()
            self._something.clear()
            if self._shell.ended:
                self._leave_prompt()

    async def _drained(self) -> None:
        while self._lines and not self._shell.ended:
            await asyncio.sleep(_FRAME_S)

    # Output

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(_FRAME_S)
            if self._view is None and (text := self._shell.printer.frame()):
                print_above(self._session.app, text)

    async def _refresh(self) -> None:
        while True:
            self._knowledge.prepare()
            await asyncio.sleep(_REFRESH_S)
            session = self._shell.current
            if session is not None and session.state == "running" and not session.busy:
                await session.refresh()

    def _toolbar(self) -> StyleAndTextTuples:
        app = self._session.app
        line = app.current_buffer.document.current_line
        return toolbar(self._shell, self._knowledge, line, app.output.get_size().columns)

    def _changed(self) -> None:
        session = self._shell.current
        if self._view is not None and session is not None and session.state == "lost":
            self._view.end()  # what is said of it is at the prompt
        self._session.app.invalidate()

    def _complete_again(self) -> None:
        # Candidates came later than the key that asked for them.
        app, buffer = self._session.app, self._session.default_buffer
        if app.is_running and buffer.text and buffer.complete_state is None:
            with set_app(app):
                buffer.start_completion()

    def _is_command(self, word: str) -> bool:
        if word in _OWN_WORDS or word in short_names() or word in self._knowledge.gdb_commands:
            return True
        with contextlib.suppress(KgdbxError):
            return bool(SHELL_COMMANDS.find(word))
        return False


def _history() -> History:
    path = Path(os.environ.get("KGDBX_HISTORY", cache_dir() / "shell_history"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
