"""A session command as a gdb command."""

import traceback

import gdb

from kgdbx.commands.context import Context
from kgdbx.commands.registry import Command
from kgdbx.errors import KgdbxError
from kgdbx.gdb.completion import complete

__all__ = ("GdbCommand", "Prefix")


class Prefix(gdb.Command):
    """Probe a Linux kernel: kprobes, jprobes, kretprobes and data watches in Python.

    Start with 'kgdbx attach VM', then 'kgdbx kprobe FUNCTION' and 'continue'."""

    def __init__(self) -> None:
        super().__init__("kgdbx", gdb.COMMAND_BREAKPOINTS, gdb.COMPLETE_NONE, True)


class GdbCommand(gdb.Command):
    """One subcommand of ``kgdbx``.

    :param is_group: other commands begin with its name
    """

    def __init__(
        self,
        name: str,
        command: Command,
        context: Context,
        debug: gdb.Parameter,
        *,
        is_group: bool = False,
    ) -> None:
        usage = command.parser("kgdbx ").format_usage().partition("usage: ")[2].strip()
        self.__doc__ = "\n\n".join(
            part for part in (command.summary, f"Usage: {usage}", command.description) if part
        )
        if is_group:  # gdb completes its words, and passes on what is none of them
            super().__init__(
                f"kgdbx {name}", gdb.COMMAND_BREAKPOINTS, gdb.COMPLETE_NONE, prefix=True
            )
        else:
            super().__init__(f"kgdbx {name}", gdb.COMMAND_BREAKPOINTS)
        self._command = command
        self._context = context
        self._debug = debug

    def invoke(self, argument: str, from_tty: bool) -> None:
        """Run the command; an error is one line, without a traceback."""
        self.dont_repeat()
        try:
            if self._command.needs_session:
                _ = self._context.session
            args = self._command.parse(argument, "kgdbx ")
            self._command.run(self._context, args)
        except KgdbxError as e:
            if self._debug.value:
                traceback.print_exc()
            raise gdb.GdbError(str(e)) from None

    def complete(self, text: str, word: str) -> list[str] | int:
        """What may follow."""
        return complete(self._command, self._context, text, word)
