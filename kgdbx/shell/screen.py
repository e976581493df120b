"""A live view on the whole screen."""

import asyncio
import shutil

from prompt_toolkit.application import Application
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import Layout, Window
from prompt_toolkit.layout.controls import FormattedTextControl
from prompt_toolkit.styles import Style

from kgdbx.errors import KgdbxError
from kgdbx.shell.layouts import Line, Table
from kgdbx.shell.shell import Shell
from kgdbx.shell.sources import Content, View

__all__ = ("Screen",)

_PERIOD_S = 1.0
_KEYS = "q quit  arrows scroll  < > sort by  r reverse  space pause"


class Screen:
    """Shows a view until ``q``, and fetches it once a second.

    :param arguments: of the view's command
    :ivar left: set when it was left
    """

    def __init__(self, shell: Shell, name: str, arguments: list[str], style: Style) -> None:
        self._shell = shell
        self._view = View(name, arguments)
        self._content: Content = lambda columns, rows: []
        self._error = ""
        self.left = asyncio.Event()
        self._top = 0
        self._sort: int | None = None
        self._descending = True
        self._paused = False
        control = FormattedTextControl(self._text, show_cursor=False)
        self._app: Application[None] = Application(
            Layout(Window(control, always_hide_cursor=True)),
            full_screen=True,
            key_bindings=self._bindings(),
            style=style,
        )

    async def run(self) -> None:
        """Show it, until a key ends it."""
        fetcher = asyncio.get_running_loop().create_task(self._fetch())
        try:
            await self._app.run_async(set_exception_handler=False)
        finally:
            fetcher.cancel()
            self.left.set()

    def end(self) -> None:
        """Leave it, as a key does."""
        if self._app.is_running and not self._app.is_done:
            self._app.exit()

    async def _fetch(self) -> None:
        while True:
            session = self._shell.current
            if session is not None and not self._paused:
                try:
                    self._content = await self._view.fetch(session)
                    self._error = ""
                except KgdbxError as e:
                    self._error = str(e).partition("\n")[0]
                self._app.invalidate()
            await asyncio.sleep(_PERIOD_S)

    def _text(self) -> StyleAndTextTuples:
        size = self._app.output.get_size()
        columns, rows = size.columns, size.rows
        head: list[Line] = [self._title(columns)]
        if isinstance(self._content, Table):
            table = self._content
            if self._sort is not None and table.columns:
                table = table.sorted_by(self._sort % len(table.columns), self._descending)
            names, body = table.lines(columns)
            head.append(names)
        else:
            body = self._content(columns, rows - 2)
        if self._error:
            head.append([("class:fault", self._error[:columns])])
        room = max(1, rows - len(head))
        self._top = max(0, min(self._top, len(body) - room))
        text: StyleAndTextTuples = []
        for line in (*head, *body[self._top : self._top + room]):
            text += [*line, ("", "\n")]
        return text[:-1]

    def _title(self, columns: int) -> Line:
        session = self._shell.current
        name = f" {session.name} {session.state}" if session is not None else ""
        state = "paused" if self._paused else ""
        text = f"{self._view.name}{name} {state}  {_KEYS}"
        return [("reverse", text[:columns].ljust(columns))]

    def _bindings(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("q")
        @keys.add("c-c")
        @keys.add("c-d")
        @keys.add("escape", eager=True)
        def end(event: KeyPressEvent) -> None:
            self.end()

        page = max(1, shutil.get_terminal_size().lines - 3)
        for key, by in (("up", -1), ("down", 1), ("pageup", -page), ("pagedown", page)):

            @keys.add(key)
            def scroll(event: KeyPressEvent, by: int = by) -> None:
                self._top = max(0, self._top + by)

        @keys.add("home")
        def first(event: KeyPressEvent) -> None:
            self._top = 0

        for key, by in (("<", -1), (">", 1)):

            @keys.add(key)
            def sort(event: KeyPressEvent, by: int = by) -> None:
                self._sort = by if self._sort is None else self._sort + by

        @keys.add("r")
        def reverse(event: KeyPressEvent) -> None:
            self._descending = not self._descending

        @keys.add(" ")
        def pause(event: KeyPressEvent) -> None:
            self._paused = not self._paused

        return keys
