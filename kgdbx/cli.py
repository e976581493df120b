"""The ``kgdbx`` program.

Exit status: 0 all is well, 1 findings (a guest command failed, a handler raised, a check failed),
2 wrong use or what cannot be
probed, 3 the kernel, VM or stub cannot be had, 4 no findings but not all was looked at, 130
ended by ^C.
"""

import argparse
import importlib.metadata
import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import kgdbx
import kgdbx.shell.program
from kgdbx.commands import program
from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.registry import add_arguments
from kgdbx.definitions import Refused
from kgdbx.errors import CommandError, KgdbxError, ProbeError

__all__ = ("main",)

_GROUPS = {
    "leaks": "Find memory that the kernel has lost.",
    "vm": "Fetch kernels; run, clone and stop VMs.",
}


def main(argv: list[str] | None = None) -> int:
    """Run the program.

    :param argv: arguments; by default those of the process
    :return: exit status
    """
    args = _parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _end)  # so that sessions are closed and VMs are stopped
    at_interrupt = signal.getsignal(signal.SIGINT)
    try:
        if at_interrupt is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return args.run(sys.stdout, args) or 0
    except (CommandError, ProbeError, Refused) as e:
        return _fail(e, 2)
    except KgdbxError as e:
        return _fail(e, 3)
    except BrokenPipeError:
        # The reader of our output has gone; nothing is lost that anyone wants.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:  # such as a full disk under a file of the user's
        return _fail(e, 3)
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGINT, at_interrupt)


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _fail(error: Exception, status: int) -> int:
    if os.environ.get("KGDBX_DEBUG"):
        traceback.print_exc()
    print(f"kgdbx: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kgdbx", description=f"{kgdbx.__doc__}", epilog="kgdbx COMMAND --help tells more."
    )
    version = f"kgdbx {importlib.metadata.version('kgdbx')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for command in PROGRAM_COMMANDS.discover(program):
        group, _, name = command.name.rpartition(" ")
        if group and group not in groups:
            group_parser = commands.add_parser(group, help=_GROUPS[group])
            groups[group] = group_parser.add_subparsers(metavar="COMMAND", required=True)
        subparser = groups.get(group, commands).add_parser(
            name,
            help=command.summary,
            description=f"{command.summary}\n\n{command.description}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(subparser, command)
        subparser.set_defaults(run=command.run)
    return parser
