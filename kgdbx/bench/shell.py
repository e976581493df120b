"""The shell's prompt while events stream: how long after a key its letter is on the screen."""

import functools
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kgdbx.bench.figure import Figure, figure
from kgdbx.errors import MachineError
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import Vm, configure

if TYPE_CHECKING:
    from kgdbx.bench.terminal import Terminal

__all__ = ("measure",)

_SIZES = ((80, 24), (200, 50))
_FUNCTION = "__x64_sys_getpgid"
_LINE = "kprobe vfs_read file->f_inode->i_ino"
# As a person types: seconds between an answer and the next key.
_PAUSE_S = (0.05, 0.2)
# 10,000 calls a second or more; fewer where other work has the CPUs.
_STREAM = "while true; do caller 1 2000; usleep 100000; done"
_START_S = 120.0


def measure(rounds: int) -> Iterator[Figure]:
    """Keys at a prompt above which some 10,000 events a second come.

    A line is typed letter by letter, with candidates for completion shown meanwhile, and taken
    back. ``key_ms`` is the time from pressing a key to the arrival of its letter at the
    terminal; ``key_own_ms`` is without the time for which the shell could have run and another
    process had its CPU.

    :param rounds: how often the line is typed
    :raises MachineError: if pyte is not installed
    """
    try:
        import pyte  # noqa: F401
    except ImportError as e:
        raise MachineError("the terminal of this benchmark is pyte; install kgdbx[test]") from e
    template = make_template(configure("6.1", smp=2))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # the times that are noted do not wait for pyte
    try:
        for columns, rows in _SIZES:
            with clone(template) as vm:
                yield from _measure(vm, columns, rows, rounds)
    finally:
        sys.setswitchinterval(interval)


def _measure(vm: Vm, columns: int, rows: int, rounds: int) -> Iterator[Figure]:
    from kgdbx.bench.terminal import Terminal

    argv = [sys.executable, "-m", "kgdbx", "shell", "--vm", vm.name]
    with tempfile.TemporaryDirectory() as scratch:
        environment = {"KGDBX_HISTORY": str(Path(scratch) / "history")}
        with Terminal(argv, columns=columns, rows=rows, environment=environment) as terminal:
            terminal.wait("cpu 0>", _START_S)
            terminal.line(f"probe p {_FUNCTION}")
            terminal.wait("Probe 1")
            terminal.line("continue")
            terminal.wait("running>")
            stream = vm.start(_STREAM)
            terminal.wait("lines not shown")
            yield from _figures(terminal, f"{columns}x{rows}", rounds)
            terminal.type("\x03")
            terminal.wait("stopped")
            stream.discard()
            terminal.line("quit")
            terminal.end()


def _figures(terminal: "Terminal", size: str, rounds: int) -> Iterator[Figure]:
    main = _children(terminal.process.pid)
    shell = f"/proc/{terminal.process.pid}"
    terminal.stamp = lambda: (time.monotonic(), _waited_s(shell))
    start, cpu_start, hits_start = time.monotonic(), [_cpu_s(p) for p in main], _hits(terminal)
    clock, own = [], []
    make = random.Random(1)
    for _ in range(rounds):
        for key, wanted in _keys():
            total, waited = terminal.answer(key, functools.partial(_has, wanted))
            clock.append(1000 * total)
            own.append(1000 * max(0.0, total - waited))
            time.sleep(make.uniform(*_PAUSE_S))
    elapsed = time.monotonic() - start
    events = _hits(terminal) - hits_start
    cpu = [_cpu_s(p) - before for p, before in zip(main, cpu_start, strict=True)]
    for name, samples in (("key_ms", clock), ("key_own_ms", own)):
        yield figure(f"shell.{name}.{size}", samples, "ms")
        yield figure(f"shell.{name}.p90.{size}", [sorted(samples)[len(samples) * 9 // 10]], "ms")
    yield figure(f"shell.events_per_s.{size}", [events / elapsed], "1/s")
    yield figure(f"shell.cpu.{size}", [cpu[0] / elapsed], "1")
    yield figure(f"shell.gdb_cpu.{size}", [sum(cpu[1:]) / elapsed], "1")


def _keys() -> Iterator[tuple[str, str]]:
    # A blank comes with the letter behind it: it cannot be seen.
    typed = ""
    for key in re.findall(r" ?\S", _LINE):
        typed += key
        yield key, typed
    yield "\x15", ""


def _has(typed: str, lines: Sequence[str]) -> bool:
    # The prompt's line, with nothing but blanks behind what was typed.
    return any(line.partition("> ")[2].rstrip() == typed for line in lines if "> " in line)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [pid, *map(int, text.split())]


def _waited_s(process: str) -> float:
    # Of its main thread: ready to run, and not running (Documentation/scheduler/sched-stats.rst).
    try:
        return int(Path(f"{process}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100  # utime, stime; USER_HZ


def _hits(terminal: "Terminal") -> int:
    for line in terminal.display():
        words = line.split()
        if "hits," in words or "hits" in words:
            at = words.index("hits," if "hits," in words else "hits")
            return int(words[at - 1].replace(",", ""))
    return 0
