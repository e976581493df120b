"""Put the commands into a running gdb."""

import contextlib
import functools

import gdb

from kgdbx.commands import session as session_commands
from kgdbx.commands.context import Context
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.gdb.answers import Answers
from kgdbx.gdb.attach import connect
from kgdbx.gdb.channel import open_channel
from kgdbx.gdb.command import GdbCommand, Prefix
from kgdbx.gdb.leave import leave
from kgdbx.gdb.output import GdbOutput, gdb_style
from kgdbx.gdb.parameters import DebugParameter

__all__ = ("load",)

_OLDEST_GDB = 12  # gdb.RemoteTargetConnection.send_packet
_loaded: list[Context] = []


def load() -> None:
    """Register all commands; does nothing the second time.

    :raises gdb.GdbError: if gdb is too old
    """
    if _loaded:
        return
    major = int(gdb.VERSION.split(".")[0])
    if major < _OLDEST_GDB:
        raise gdb.GdbError(f"kgdbx needs gdb {_OLDEST_GDB} or newer, this is {gdb.VERSION}")
    channel = open_channel()
    # A program that runs this gdb takes the keys, and asks for what it wants.
    attach = functools.partial(connect, keys=channel is None)
    context = Context(GdbOutput(), attach, gdb_style(), channel)
    _loaded.append(context)
    Answers(context, channel)
    Prefix()
    debug = DebugParameter()
    commands = tuple(SESSION_COMMANDS.discover(session_commands))
    groups = {command.name.partition(" ")[0] for command in commands if " " in command.name}
    for command in commands:  # by name: a group before what is in it
        for name in (command.name, *command.aliases):
            GdbCommand(name, command, context, debug, is_group=name in groups)
    with contextlib.suppress(gdb.error):  # taken: the long name is always there
        gdb.execute("alias -- kx = kgdbx", to_string=True)
    gdb.events.gdb_exiting.connect(lambda event: leave(context))
