"""recover: put a guest right whose kgdbx was killed."""

import argparse
from typing import TextIO

from kgdbx.attach import attach_vm
from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.registry import argument
from kgdbx.machine.vm import find_vm


@PROGRAM_COMMANDS.command(
    name="recover",
    summary="Undo what a kgdbx that was killed left in a VM; exit 1 if not all.",
    description="Whatever attaches to a VM does this first. Code is put back as it was, calls in\n"
    "progress return where they came from, and the guest gets its memory back.",
    arguments=(argument("vm", metavar="NAME", completes="vm"),),
)
def recover(out: TextIO, args: argparse.Namespace) -> int:
    with attach_vm(find_vm(args.vm).info) as session:
        done = session.recovery
    print(done.text if done is not None else "there is nothing to undo", file=out)
    return 1 if done is not None and done.conflicts else 0
