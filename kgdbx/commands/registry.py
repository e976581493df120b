"""What a command is, and how it is found, parsed and run."""

import argparse
import dataclasses
import importlib
import pkgutil
import shlex
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

from kgdbx.errors import CommandError

__all__ = ("Argument", "Command", "CommandNamespace", "add_arguments", "argument")

Run = Callable[[Any, argparse.Namespace], Any]
# An exit status, nothing, or for the shell something to wait for.


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of a command, in argparse's words.

    :ivar names: one name for a positional argument, option strings otherwise
    :ivar options: keywords of ``ArgumentParser.add_argument()``
    :ivar completes: what it is completed with: command, file, function, module, any module (that
        is not loaded, too), probe, session, variable or vm
    :ivar rest: takes the rest of the line as it stands, quotes included
    """

    names: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    completes: str = ""
    rest: bool = False

    @property
    def is_option(self) -> bool:
        """Whether it is given by name."""
        return self.names[0].startswith("-")

    @property
    def takes_value(self) -> bool:
        """Whether a word follows the name of this option."""
        return self.is_option and "action" not in self.options


def argument(*names: str, completes: str = "", rest: bool = False, **options: Any) -> Argument:
    """Make an :class:`Argument`."""
    return Argument(names, options, completes, rest)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command.

    :ivar name: what is typed
    :ivar summary: one line of at most 70 columns
    :ivar description: the rest of its help
    :ivar needs_session: refused without an attached kernel
    """

    name: str
    summary: str
    description: str
    arguments: tuple[Argument, ...]
    aliases: tuple[str, ...]
    needs_session: bool
    run: Run

    def parser(self, prefix: str) -> argparse.ArgumentParser:
        """An argument parser that raises instead of leaving the process."""
        parser = _Parser(
            prog=f"{prefix}{self.name}",
            description=f"{self.summary}\n\n{self.description}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_arguments(parser, self)
        return parser

    def expected(self, words: Sequence[str]) -> tuple[Argument | None, list[str]]:
        """Which argument the last of some words is, for completion.

        :param words: what follows the command's name
        :return: the argument, None if there is none; and the positional words before it
        """
        with_value = {name: a for a in self.arguments if a.takes_value for name in a.names}
        given: list[str] = []
        option: Argument | None = None
        for word in words[:-1]:
            if option is not None:
                option = None
            elif word in with_value:
                option = with_value[word]
            elif word and (given or not word.startswith("-")):
                given.append(word)
        positional = [a for a in self.arguments if not a.is_option]
        if option is None and positional:
            option = positional[min(len(given), len(positional) - 1)]
        return option, given

    def parse(self, line: str, prefix: str = "") -> argparse.Namespace:
        """Parse the text behind a command's name.

        :raises CommandError: if it does not fit, with the usage
        """
        rest = next((a for a in self.arguments if a.rest), None)
        if rest is None:
            return self.parser(prefix).parse_args(_split(line))
        options, text = _split_options(line, self.arguments)
        return self.parser(prefix).parse_args([*options, "--", text] if text else options)


class CommandNamespace:
    """Commands by name. Registering one name twice is an error."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}

    def command(
        self,
        *,
        name: str,
        summary: str,
        description: str = "",
        arguments: Sequence[Argument] = (),
        aliases: Sequence[str] = (),
        needs_session: bool = False,
    ) -> Callable[[Run], Run]:
        """Register the decorated function."""

        def register(run: Run) -> Run:
            command = Command(
                name, summary, description, tuple(arguments), tuple(aliases), needs_session, run
            )
            for each in (name, *aliases):
                if each in self._commands:
                    raise ValueError(f"there is a command {each!r} already")
                self._commands[each] = command
            return run

        return register

    def discover(self, package: ModuleType) -> "CommandNamespace":
        """Import every module of a package, so that its commands are registered."""
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
        return self

    def __iter__(self) -> Iterator[Command]:
        return iter(
            [command for name, command in sorted(self._commands.items()) if name == command.name]
        )

    def find(self, name: str) -> Command:
        """A command by name or alias.

        :raises CommandError: if there is none
        """
        try:
            return self._commands[name]
        except KeyError:
            names = ", ".join(command.name for command in self)
            raise CommandError(f"there is no command {name!r}; there are: {names}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}\n{self.format_usage().strip()}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise CommandError(message or "")

    def print_help(self, file: Any = None) -> NoReturn:
        raise CommandError(self.format_help())


def add_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    """Give a parser the arguments of a command."""
    for each in command.arguments:
        parser.add_argument(*each.names, **each.options)


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as e:
        raise CommandError(f"cannot read {line!r}: {e}") from e


def _split_options(line: str, arguments: Sequence[Argument]) -> tuple[list[str], str]:
    # Options come first; what follows them is text, in which quotes and < mean something else.
    options: list[str] = []
    values = {name: a.takes_value for a in arguments if a.is_option for name in a.names}
    text = line.strip()
    while text.startswith("-"):
        word, _, tail = text.partition(" ")
        name, equals, _ = word.partition("=")
        if word not in ("--", "-h", "--help") and name not in values:
            break  # -:name deletes a probe
        text = tail.strip()
        if word == "--":
            break
        options.append(word)
        if values.get(name) and not equals:
            word, _, tail = text.partition(" ")
            options.append(word)
            text = tail.strip()
    return options, text
