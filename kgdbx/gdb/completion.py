"""Completion of arguments in gdb."""

import itertools
from collections.abc import Iterable

import gdb

from kgdbx.commands.context import Context
from kgdbx.commands.registry import Command
from kgdbx.errors import KgdbxError
from kgdbx.machine.vm import list_vms
from kgdbx.session import Session

__all__ = ("complete",)

_MOST = 500


def complete(command: Command, context: Context, text: str, word: str) -> list[str] | int:
    """Candidates for the last word of a command's arguments.

    :param text: everything behind the command's name
    :param word: its last word as gdb splits words
    """
    words = text.split(" ")
    piece = words[-1]
    candidates = _candidates(command, context, words)
    if isinstance(candidates, int):
        return candidates
    # gdb's word begins behind the last - or : of ours, and it wants the rest of it only.
    cut = len(piece) - len(word)
    matching = (name[cut:] for name in candidates if name.startswith(piece))
    return list(itertools.islice(matching, _MOST))


def _candidates(command: Command, context: Context, words: list[str]) -> Iterable[str] | int:
    if words[-1].startswith("-"):
        return [n for a in command.arguments for n in a.names if n.startswith("--")]
    argument, given = command.expected(words)
    if argument is None:
        return int(gdb.COMPLETE_NONE)
    if argument.completes == "file":
        return int(gdb.COMPLETE_FILENAME)
    if argument.completes == "vm":
        return [vm.name for vm in list_vms()]
    if context.attached:
        try:
            return _kernel_names(context.session, argument.completes, given, words[-1])
        except KgdbxError:
            pass  # half a word need not mean anything
    return int(gdb.COMPLETE_NONE)


def _kernel_names(session: Session, what: str, given: list[str], piece: str) -> Iterable[str]:
    if what == "probe":
        return [probe.name for probe in session.probes]
    if what == "module":
        return [module.name for module in session.kernel.modules]
    if what == "any module":
        return session.kernel.modules.known_names()
    if what == "variable":
        return session.kernel.vmlinux.names()
    if what != "function":
        return ()
    if given:
        return session.parameter_names(given[0])
    module, colon, _ = piece.rpartition(":")
    return (f"{module}{colon}{name}" for name in session.function_names(module or None))
