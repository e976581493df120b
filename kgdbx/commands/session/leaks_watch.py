"""leaks watch, report, clear, unwatch: what modules allocate and do not free, while it happens."""

import argparse
from collections.abc import Callable
from pathlib import Path

from kgdbx.commands.context import Context
from kgdbx.commands.registry import argument
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.errors import CommandError
from kgdbx.leaks.report.text import watch_text
from kgdbx.leaks.watch import LeakWatch, place_watch
from kgdbx.session import Session

__all__ = ("MODULES", "WATCH_ARGUMENTS", "begin_watch", "ended_sessions")

MODULES = argument(
    "modules", nargs="+", metavar="MODULE", help="name of a module", completes="any module"
)
"""The modules to watch."""

WATCH_ARGUMENTS = (
    argument(
        "--allocators",
        action="append",
        default=[],
        metavar="FILE",
        help="more functions that allocate and free, in the form of allocators.toml",
        completes="file",
    ),
    argument(
        "--ko",
        action="append",
        default=[],
        metavar="FILE",
        help="a module's file with debug information, if it is not the kernel's own",
        completes="file",
    ),
    argument("-v", "--verbose", action="store_true", help="say what this kernel does not have"),
)
"""Options of everything that watches."""


def begin_watch(
    session: Session, args: argparse.Namespace, modules: list[str], say: Callable[[str], object]
) -> LeakWatch:
    """Place the watch that the options ask for, and say what is not watched."""
    for file in args.ko:
        session.kernel.modules.add_debug_file(Path(file).expanduser())
    watch = place_watch(
        session.kernel,
        session.resident,
        session.probes,
        modules,
        allocators=[Path(file).expanduser() for file in args.allocators],
    )
    for group in watch.watched.missing_groups:
        say(f"this kernel has nothing of {group!r}")
    for name, reason in watch.refused.items():
        say(f"{name} is not watched: {reason}")
    if args.verbose:
        say(f"{len(watch.watched.functions)} functions are watched")
        say(f"not in this kernel: {', '.join(watch.watched.absent)}")
    return watch


def ended_sessions(watch: LeakWatch, tell: Callable[[int], None]) -> Callable[[], None]:
    """An idle hook that tells of each session of a watch when it has ended.

    They end at a stop, where nothing may take long.
    """
    ended: list[int] = []
    watch.report_listeners.append(ended.append)

    def hook() -> None:
        while ended:
            tell(ended.pop(0))

    return hook


@SESSION_COMMANDS.command(
    name="leaks watch",
    summary="Watch what modules allocate and free, from load to unload.",
    description="The report comes when the last of the modules has gone; 'kgdbx leaks report' has\n"
    "it before. Modules that are loaded already are watched from now on.",
    arguments=(*WATCH_ARGUMENTS, MODULES),
    needs_session=True,
)
def watch(context: Context, args: argparse.Namespace) -> None:
    session = context.session
    if session.leak_watch is not None:
        names = ", ".join(session.leak_watch.names)
        raise CommandError(f"{names}: watched already; end that with: kgdbx leaks unwatch")
    begun = begin_watch(session, args, args.modules, context.write)
    session.leak_watch = begun

    def tell(number: int) -> None:
        context.write(watch_text(begun.report(number), begun.frames))

    session.idle_hooks.append(ended_sessions(begun, tell))
    context.write(f"{', '.join(begun.names)}: watched at {len(begun.watched.functions)} functions")


@SESSION_COMMANDS.command(
    name="leaks report",
    aliases=("leaks flush",),
    summary="Show what watched modules have allocated and not freed.",
    description="Nothing is forgotten by it.",
    arguments=(
        argument(
            "number", nargs="?", type=int, metavar="N", help="of the session (default the last)"
        ),
    ),
    needs_session=True,
)
def report(context: Context, args: argparse.Namespace) -> None:
    watched = _watch(context)
    if args.number is not None and not 0 < args.number <= watched.sessions:
        raise CommandError(f"there is no session {args.number}; there are {watched.sessions}")
    context.session.poll()  # stacks that were met since
    context.write(watch_text(watched.report(args.number), watched.frames))


@SESSION_COMMANDS.command(
    name="leaks clear",
    summary="Forget what watched modules have allocated, and count from 0.",
    description="A later free of what was forgotten is one of what is not known to be allocated.",
    needs_session=True,
)
def clear(context: Context, args: argparse.Namespace) -> None:
    _watch(context).clear()


@SESSION_COMMANDS.command(
    name="leaks unwatch",
    summary="End the watch of modules.",
    description="What was found is shown once more.",
    needs_session=True,
)
def unwatch(context: Context, args: argparse.Namespace) -> None:
    watched = _watch(context)
    context.session.poll()
    watched.stop()
    context.session.leak_watch = None
    if watched.sessions:
        context.write(watch_text(watched.report(), watched.frames))
    else:
        context.write(f"{', '.join(watched.names)}: not loaded meanwhile")


def _watch(context: Context) -> LeakWatch:
    found = context.session.leak_watch
    if found is None:
        raise CommandError("no module is watched; begin with: kgdbx leaks watch MODULE")
    return found
