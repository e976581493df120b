"""top, hist, stop, tasks, modules, slabs: what people look at rather than read."""

import argparse
import shutil
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from kgdbx.commands.registry import argument
from kgdbx.errors import CommandError
from kgdbx.shell.commands import SHELL_COMMANDS
from kgdbx.shell.layouts import Line, Table
from kgdbx.shell.sources import VIEW_SUMMARIES, View

if TYPE_CHECKING:
    from kgdbx.shell.shell import Shell

_Run = Callable[["Shell", argparse.Namespace], Coroutine[Any, Any, None]]


def _make(name: str) -> _Run:
    async def run(shell: "Shell", args: argparse.Namespace) -> None:
        if shell.session.state == "lost":
            raise CommandError(f"{shell.session.name} is lost; use: reopen")
        if shell.show_view is not None:
            await shell.show_view(name, args.arguments)
            return
        content = await View(name, args.arguments).fetch(shell.session)
        columns, rows = shutil.get_terminal_size((1000, 200))
        if isinstance(content, Table):
            head, body = content.lines(columns)
            lines = [head, *body]
        else:
            lines = content(columns, rows)
        shell.say("\n".join(_text(line) for line in lines))

    return run


def _text(line: Line) -> str:
    return "".join(text for _, text in line)


for _name, _summary in VIEW_SUMMARIES.items():
    SHELL_COMMANDS.command(
        name=_name,
        summary=_summary,
        description="In a terminal it is live, and q ends it; otherwise it is shown once.",
        arguments=(
            argument(
                "arguments",
                nargs="*",
                metavar="ARGUMENT",
                help="see above",
                completes="probe" if _name == "hist" else "",
            ),
        ),
    )(_make(_name))
