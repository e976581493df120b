"""The shell without its terminal: sessions, lines, output."""

import inspect
import itertools
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from kgdbx.errors import CommandError, KgdbxError
from kgdbx.shell import commands as shell_commands
from kgdbx.shell.blocks import Block
from kgdbx.shell.commands import SHELL_COMMANDS
from kgdbx.shell.kernel_session import KernelSession
from kgdbx.shell.printer import Printer
from kgdbx.shell.transcript import Transcript
from kgdbx.trace.text import PLAIN, Style

__all__ = ("Shell",)

SHELL_COMMANDS.discover(shell_commands)


class Shell:
    """Sessions by number and name, and what a line does to them.

    :param printer: where output goes
    :param transcript: a log of everything, or None
    :ivar current: the session that lines go to
    :ivar python: lines are drgn expressions
    :ivar show_view: shows a live view in a terminal; None where there is none
    """

    def __init__(
        self, printer: Printer, *, transcript: Transcript | None = None, style: Style = PLAIN
    ) -> None:
        self.printer = printer
        self.style = style
        self.sessions: dict[int, KernelSession] = {}
        self.current: KernelSession | None = None
        self.python = False
        self.ended = False
        self.on_change: Callable[[], None] = lambda: None
        self.show_view: Callable[[str, list[str]], Awaitable[None]] | None = None
        self._transcript = transcript
        self._directory = Path(tempfile.mkdtemp(prefix="kgdbx-shell-"))

    # Sessions

    async def open(
        self,
        where: str = "",
        vmlinux: str | None = None,
        name: str = "",
        *,
        sysrq: str | None = None,
    ) -> KernelSession:
        """Open a session, and make it the current one.

        :param where: VM, socket or ``host:port``, for KGDB behind ``kgdb:``; or a tty; empty for
            a gdb without a kernel
        :param sysrq: tty of the console over which KGDB's kernel can be stopped
        :raises KgdbxError: if that cannot be done
        """
        name = self._free_name(name or _short(where))

        def show(text: str, events: bool) -> None:
            self.write(text, session=session, events=events)

        session = KernelSession(name, where, vmlinux, show, sysrq=sysrq)
        session.colour = bool(self.style.bold)
        await session.open()
        session.on_change = self.on_change
        self.sessions[next(n for n in _numbers() if n not in self.sessions)] = session
        self.current = session
        self.on_change()
        return session

    async def reopen(self, session: KernelSession, where: str = "") -> list[str]:
        """Start a session again; one that was named after its VM is named after the new one.

        :param where: another VM or stub
        :return: what could not be placed again
        :raises KgdbxError: if it cannot be opened
        """
        named_after = session.name == _short(session.where)
        failed = await session.reopen(where)
        if where and named_after and session.name != _short(where):
            session.name = self._free_name(_short(where))
            self.on_change()
        return failed

    def find(self, which: str) -> tuple[int, KernelSession]:
        """A session by number or name.

        :raises CommandError: if there is none
        """
        for number, session in self.sessions.items():
            if which in (str(number), session.name):
                return number, session
        names = ", ".join(f"{n} {each.name}" for n, each in self.sessions.items()) or "none"
        raise CommandError(f"there is no session {which!r}; there are: {names}")

    async def close_session(self, number: int) -> None:
        """Close one; another one becomes the current one."""
        session = self.sessions.pop(number)
        await session.close()
        if self.current is session:
            self.current = next(iter(self.sessions.values()), None)
        self.on_change()

    async def close(self) -> None:
        """Close all sessions: probes are removed, and the kernels run on."""
        for number in reversed(tuple(self.sessions)):
            await self.close_session(number)
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._transcript is not None:
            self._transcript.close()
            self._transcript = None

    @property
    def session(self) -> KernelSession:
        """The current session.

        :raises CommandError: if there is none
        """
        if self.current is None:
            raise CommandError("there is no session; use: open VM")
        return self.current

    # Lines

    async def run(self, block: Block) -> bool:
        """Do what was typed.

        :return: whether it went well; if not, it was said why
        """
        session = self.current
        if self._transcript is not None:
            running = session is not None and session.state == "running"
            self._transcript.typed(block.text, running=running)
        try:
            return await self._run(block)
        except KgdbxError as e:
            self.say(str(e), fault=True)
            return False
        finally:
            for each in self.sessions.values():
                self.printer.flush(each.name)
            if self._transcript is not None:
                self._transcript.done()

    async def _run(self, block: Block) -> bool:
        text = block.text.strip()
        if not text or text.startswith("#"):
            return True
        if text.startswith(">>>") or self.python:
            return await self._python(text)
        line = block.command(self._directory)
        word, _, rest = line.strip().partition(" ")
        if word in ("quit", "q", "exit"):
            self.ended = True
            return True
        try:
            command = SHELL_COMMANDS.find(word)
        except CommandError:
            return not (await self.session.execute(line)).error
        result = command.run(self, command.parse(rest))
        if inspect.isawaitable(result):
            result = await result
        return not result

    async def _python(self, text: str) -> bool:
        source = "\n".join(_without_prompt(line) for line in text.splitlines()).strip("\n")
        if source.strip() in ("", "quit()", "exit()", "<<<"):
            self.python = not self.python and not source.strip()
            self.on_change()
            return True
        self.write(await self.session.ask("evaluate", source=source))
        return True

    # Output

    def say(self, text: str, *, fault: bool = False) -> None:
        """Show lines of the shell's own."""
        colour = self.style.fault if fault else ""
        self.write(f"{colour}{text}{self.style.reset if colour else ''}".rstrip("\n") + "\n")

    def write(
        self, text: str, *, session: KernelSession | None = None, events: bool = False
    ) -> None:
        """Show text of a session; lines of one that is not the current one say whose they are.

        :param events: whole lines, of which the screen may leave some out
        """
        other = session is not None and session is not self.current and self.current is not None
        prefix = f"[{session.name}] " if session is not None and other else ""
        if self._transcript is not None:
            self._transcript.shown(text)
        source = session.name if session is not None else ""
        if events:
            self.printer.write_events(text, prefix=prefix)
        else:
            self.printer.write(source, text, prefix=prefix)

    def _free_name(self, wanted: str) -> str:
        taken = {session.name for session in self.sessions.values()}
        names = (wanted if n == 1 else f"{wanted}-{n}" for n in _numbers())
        return next(name for name in names if name not in taken)


def _short(where: str) -> str:
    return where.removeprefix("kgdb:").rpartition("/")[2] or "gdb"


def _numbers() -> Iterator[int]:
    return itertools.count(1)


def _without_prompt(line: str) -> str:
    stripped = line.lstrip()
    for prompt in (">>>", "..."):
        if stripped.startswith(prompt):
            return stripped.removeprefix(prompt).removeprefix(" ")
    return line
