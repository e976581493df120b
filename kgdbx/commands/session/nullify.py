"""nullify, replace: functions that return at once, and functions in place of others."""

import argparse
from pathlib import Path

from kgdbx.commands.context import Context
from kgdbx.commands.registry import argument
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.commands.session.probe import describe
from kgdbx.resident.verdict import VerdictProbe
from kgdbx.session import Session

CALL_ARGUMENTS = (
    argument("--if", dest="condition", metavar="EXPR", help="only if this holds: 'count > 100'"),
    argument(
        "--from",
        dest="module",
        metavar="MODULE",
        help="only calls from this module",
        completes="module",
    ),
    argument("--name", help="name in listings"),
)
"""Options that say which calls, of both commands."""

NULLIFY_ARGUMENTS = (
    argument("-E", dest="error", metavar="NAME", help="an error: -ENOMEM returns that"),
    argument("function", metavar="[MODULE:]FUNC", help="the function", completes="function"),
    argument("retval", nargs="?", help="what it returns: number, NULL, -ENOMEM... (default 0)"),
)
"""Arguments of nullify besides those."""

REPLACE_ARGUMENTS = (
    argument("--any-type", action="store_true", help="do not compare the functions' types"),
    argument("function", metavar="[MODULE:]FUNC", help="the function", completes="function"),
    argument("other", metavar="FUNC|FILE.c", help="what runs instead", completes="function"),
)
"""Arguments of replace besides those."""

NULLIFY_HELP = """\
The function's code does not run; its callers get RETVAL. Conditions are C expressions over its
parameters, as those of probes: --if 'count > 100 && $comm == "dd"'. A call is from a module if its
return address is in it."""

REPLACE_HELP = """\
FUNC must have the same type. FILE.c is compiled with the kernel's types (vmlinux.h) and may call
functions of the kernel that it declares. It defines one of these:
  replacement(), or a function of FUNC's name: runs instead; it may sleep if FUNC may, and call
      the function itself as kgdbx_original()
  int handler(struct pt_regs *regs): is asked at each call, with interrupts off; it may change
      regs, and ends with 'return 0' (go on), 'return kgdbx_return(regs, value)' or
      'return kgdbx_jump(regs, address)'"""


def register_nullify(session: Session, args: argparse.Namespace) -> VerdictProbe:
    """Do what the arguments of nullify say."""
    retval = f"-E{args.error}" if args.error else args.retval or "0"
    return session.nullify(
        args.function, retval, condition=args.condition, module=args.module, name=args.name
    )


def register_replace(session: Session, args: argparse.Namespace) -> VerdictProbe:
    """Do what the arguments of replace say."""
    is_file = args.other.endswith(".c")
    return session.replace(
        args.function,
        Path(args.other).expanduser() if is_file else args.other,
        condition=args.condition,
        module=args.module,
        name=args.name,
        any_type=args.any_type,
    )


@SESSION_COMMANDS.command(
    name="nullify",
    summary="Have a function return at once.",
    description=NULLIFY_HELP,
    arguments=(*CALL_ARGUMENTS, *NULLIFY_ARGUMENTS),
    needs_session=True,
)
def nullify(context: Context, args: argparse.Namespace) -> None:
    context.write(describe(register_nullify(context.session, args)))


@SESSION_COMMANDS.command(
    name="replace",
    summary="Have another function, or C code of yours, run in place of a function.",
    description=REPLACE_HELP,
    arguments=(*CALL_ARGUMENTS, *REPLACE_ARGUMENTS),
    needs_session=True,
)
def replace(context: Context, args: argparse.Namespace) -> None:
    context.write(describe(register_replace(context.session, args)))
