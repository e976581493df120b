"""script: register the probes of a Python file."""

import argparse
from pathlib import Path

from kgdbx.commands.context import Context
from kgdbx.commands.registry import argument
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.commands.session.probe import describe


@SESSION_COMMANDS.command(
    name="script",
    summary="Register the probes of a probe script, a plain Python file.",
    description='Handlers are marked with @kprobe("func"), @jprobe, @kretprobe or @watch from\n'
    "kgdbx.probes.script; the same file runs headless: kgdbx probe --script FILE.",
    arguments=(argument("file", help="the script", completes="file"),),
    needs_session=True,
)
def script(context: Context, args: argparse.Namespace) -> None:
    for probe in context.session.load_script(Path(args.file).expanduser()):
        context.write(describe(probe))
