"""drgn: Python on a kernel, with drgn's own prompt."""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any, TextIO

from drgn.cli import run_interactive

from kgdbx.attach import open_core
from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.program.probe import TARGET_ARGUMENTS, open_session
from kgdbx.commands.registry import argument
from kgdbx.errors import CommandError, KgdbxError, Unsupported
from kgdbx.session import Session
from kgdbx.target.core import CoreTarget
from kgdbx.views.evaluate import Evaluator

_NAMES = """
>>> session, kernel    # of kgdbx
>>> leaks()    # all blocks of the heap that nothing points to
>>> leak(N, type="")    # one of them as a pointer; leak(ADDRESS): any block of the heap"""


@PROGRAM_COMMANDS.command(
    name="drgn",
    summary="Python on a kernel that runs or that was dumped: drgn's prompt.",
    description="""\
prog is the kernel, and drgn's helpers are there as in drgn itself. leaks() are all blocks of the
heap that nothing points to, leak(N) is one of them with the type that goes by its cache, and
leak(ADDRESS) any block. The guest stands meanwhile, unless with --live.

  kgdbx drgn --vm a
  kgdbx drgn --vm a -e 'leak(0xffff8eac41155b80)'
  kgdbx drgn --core FILE --vmlinux FILE SCRIPT ARGUMENT...
""",
    arguments=(
        *TARGET_ARGUMENTS,
        argument("--core", metavar="FILE", help="a core file of QEMU's dump-guest-memory"),
        argument("--live", action="store_true", help="let the guest run"),
        argument(
            "--ko",
            action="append",
            default=[],
            metavar="FILE",
            help="a module's file with debug information, if it is not the kernel's own",
            completes="file",
        ),
        argument("-e", dest="code", metavar="CODE", help="run this; the last value is printed"),
        argument(
            "script",
            nargs=argparse.REMAINDER,
            metavar="SCRIPT ...",
            help="a script with its arguments, in place of the prompt",
        ),
    ),
)
def drgn(out: TextIO, args: argparse.Namespace) -> None:
    with _open(args) as session:
        _load_modules(session, args)
        evaluator = Evaluator(session, {}, standing=not args.live)
        if args.live:
            if session.ram is None or isinstance(session.target, CoreTarget):
                raise Unsupported("--live needs the memory of a VM of ours")
            session.target.resume()
        try:
            _run(out, args, session, evaluator)
        finally:
            if args.live:
                session.target.interrupt()


def _load_modules(session: Session, args: argparse.Namespace) -> None:
    modules = session.kernel.modules
    for file in args.ko:
        modules.add_debug_file(Path(file))
    for module in modules:
        try:
            modules.load_debug_info(module)
        except KgdbxError as e:
            print(f"kgdbx: no types of module {module.name}: {e}", file=sys.stderr)


def _run(out: TextIO, args: argparse.Namespace, session: Session, evaluator: Evaluator) -> None:
    if args.code is not None:
        out.write(evaluator.run(args.code))
    elif args.script:
        _run_script(args.script, evaluator.names)
    elif sys.stdin.isatty():
        run_interactive(
            session.kernel.program,
            banner_func=lambda text: text + _NAMES,
            globals_func=lambda names: {**names, **evaluator.own_names},
        )
    else:
        out.write(evaluator.run(sys.stdin.read()))


def _run_script(argv: list[str], names: dict[str, Any]) -> None:
    path = Path(argv[0])
    if not path.is_file():
        raise CommandError(f"there is no script {path}")
    old_argv, old_path = sys.argv, list(sys.path)
    sys.argv = argv
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        runpy.run_path(str(path), init_globals=names, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = old_argv, old_path


def _open(args: argparse.Namespace) -> Session:
    if not args.core:
        return open_session(args)
    if not args.vmlinux or args.vm or args.connect:
        raise CommandError("--core FILE needs --vmlinux FILE, and no other kernel")
    return open_core(Path(args.core), Path(args.vmlinux).expanduser())
