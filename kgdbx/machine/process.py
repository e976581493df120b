"""Processes that end with their owner, and telling one from a later one with its number."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.cache import wait_until

__all__ = ("is_alive", "kill_process", "spawn", "start_time")

_SPAWN_S = 10.0


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    # The name before the last ")" may hold anything; state is the first field after it.
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Whether the process that started at *started* (clock ticks since boot) still runs."""
    return started != 0 and start_time(pid) == started


def kill_process(pid: int, started: int, timeout_s: float = 5.0) -> None:
    """Kill a process and wait until it is gone; does nothing if it is gone already.

    :raises MachineError: if it does not end
    """
    if not is_alive(pid, started):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if not wait_until(lambda: not is_alive(pid, started), timeout_s):
        raise MachineError(f"process {pid} does not end within {timeout_s:g} s after SIGKILL")


def spawn(argv: Sequence[str], env: Mapping[str, str], log: Path, *, keep: bool) -> int:
    """Start a process in its own session, so that Ctrl-C in the terminal does not reach it.

    :param log: file for its standard output and error
    :param keep: let it outlive this process; otherwise the kernel kills it when this process
        ends, however that happens
    :return: process ID
    :raises MachineError: if it cannot be started
    """
    command = list(argv) if keep else ["setpriv", "--pdeathsig", "KILL", "--", *argv]
    outcome: list[int | OSError] = []
    started = threading.Event()

    # The death signal comes when the *thread* that forked ends, so that thread stays until then.
    def start_and_wait() -> None:
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    env=dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as e:
            outcome.append(e)
            started.set()
            return
        outcome.append(process.pid)
        started.set()
        process.wait()

    threading.Thread(target=start_and_wait, name="kgdbx-vm", daemon=True).start()
    if not started.wait(_SPAWN_S):
        raise MachineError(f"{command[0]} did not start within {_SPAWN_S:g} s")
    result = outcome[0]
    if isinstance(result, OSError):
        raise MachineError(f"cannot start {command[0]}: {result.strerror}") from result
    return result
