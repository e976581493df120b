"""The shell as a script: lines of ``-c`` or of a file, plain output, an exit status."""

import asyncio
import contextlib
import signal
from collections.abc import Iterable
from typing import TextIO

from kgdbx.shell.blocks import split_commands
from kgdbx.shell.shell import Shell

__all__ = ("run_lines",)

_FRAME_S = 0.05


async def run_lines(shell: Shell, lines: Iterable[str], out: TextIO) -> int:
    """Run commands until one fails. A kernel that runs after the last one does so until it stops.

    :return: 0, 1 if a command failed, 130 after ``^C``
    """
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        if shell.current is not None and shell.current.busy:
            shell.current.press_interrupt()
        else:
            main.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGTERM, interrupt)
    shower = loop.create_task(_show(shell, out))
    status = 0
    try:
        with contextlib.suppress(asyncio.CancelledError):
            status = await _run(shell, lines)
    finally:
        shower.cancel()
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)
        if main.cancelling():
            main.uncancel()
        await shell.close()
        out.write(shell.printer.frame())
        out.flush()
    return 130 if interrupted else status


async def _run(shell: Shell, lines: Iterable[str]) -> int:
    blocks, complete = split_commands(lines)
    if not complete:
        shell.say(f"the last command is not complete: {blocks[-1].text!r}", fault=True)
        return 1
    for block in blocks:
        if not await shell.run(block):
            return 1
        if shell.ended:
            return 0
    if shell.current is not None and shell.current.state == "running":
        await shell.current.wait_stopped()
    return 0


async def _show(shell: Shell, out: TextIO) -> None:
    while True:
        await asyncio.sleep(_FRAME_S)
        out.write(shell.printer.frame())
        out.flush()
