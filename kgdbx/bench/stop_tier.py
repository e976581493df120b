"""Probes on the stop tier, beside gdb's breakpoints and the kernel's own kprobe events.

QEMU drops all translated code at each stop, so what runs between two hits decides what a hit
costs. The ratios are taken where that is least, in a loop inside the kernel; the kprobes guide's
columns at a system call in a loop, which is what a user would look at.
"""

import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kgdbx.attach import attach_vm
from kgdbx.bench.figure import Figure, figure, ratio
from kgdbx.errors import MachineError
from kgdbx.gdb_launch import gdb_argv
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import Vm, configure
from kgdbx.probes.jprobe import Jprobe
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe
from kgdbx.probes.probe import Probe
from kgdbx.session import Session
from kgdbx.target.base import BreakpointKind, Stop

__all__ = ("COLUMNS", "column_probes", "hits_per_second", "hits_per_second_in_gdb", "measure")

COLUMNS = ("k", "j", "r", "kr", "jr")
"""The kprobes guide's columns: kprobe, jprobe, kretprobe, and both at one function."""

_CALLED = "do_getpgid"  # long do_getpgid(pid_t pid), kernel/sys.c
_CALLING = "caller 1 1000000000000"
_LOOPED = "__cond_resched"  # called by read_zero() in drivers/char/mem.c for each page
_LOOPING = "dd if=/dev/zero of=/dev/null bs=64M"
_HITS = 400
_CALLS = 20000
_GDB_S = 120
_WARM_UP = 200
_NOP_BYTES = 5  # ftrace's, at the start of both functions
# The kernel has no jprobes any more: a kprobe event that fetches the argument does their work.
_KERNEL_EVENTS = {
    "k": ("p:k/e {f}",),
    "j": ("p:k/e {f} pid=%di",),
    "r": ("r:k/e {f}",),
    "kr": ("p:k/e {f}", "r:k/f {f}"),
    "jr": ("p:k/e {f} pid=%di", "r:k/f {f}"),
}


def measure(rounds: int) -> Iterator[Figure]:
    """All figures of the stop tier.

    :param rounds: how often everything is measured, in turn, on one VM
    """
    with clone(make_template(configure("6.1", smp=1))) as vm:
        loop = _samples(vm, _LOOPING, rounds, _LOOPED, ("k",), roundtrips=True)
        yield ratio("probes.stop.vs_gdb", loop["stop.k"], loop["gdb.plain"])
        yield ratio("probes.stop.vs_roundtrip", loop["stop.k"], loop["roundtrip"])
        yield ratio("probes.gdb.vs_gdb", loop["gdb.k"], loop["gdb.plain"])
        yield figure("probes.stop.hits_per_s", loop["stop.k"], "1/s")
        yield figure("probes.gdb.hits_per_s", loop["gdb.k"], "1/s")
        yield figure("probes.gdb.plain_hits_per_s", loop["gdb.plain"], "1/s")
        yield figure("probes.roundtrips_per_s", loop["roundtrip"], "1/s")
        calls = _samples(vm, _CALLING, rounds, _CALLED, COLUMNS, roundtrips=False)
        for face in ("stop", "gdb"):
            for column in COLUMNS:
                # A call takes nothing beside its stops, however many they are.
                costs = (1e6 / rate for rate in calls[f"{face}.{column}"])
                yield figure(f"probes.{face}.{column}_us", costs, "us")
        for column in COLUMNS:
            events = _kernel_cost_us(vm, column, rounds)
            yield figure(f"probes.kernel.{column}_us", events, "us")


def column_probes(column: str, function: str) -> tuple[list[Probe], Probe]:
    """The probes of a column, and the one whose hits count the calls."""
    probes: list[Probe] = []
    if "k" in column:
        probes.append(Kprobe(function, lambda p, regs: None))
    if "j" in column:
        probes.append(Jprobe(function, lambda pid: None))
    if "r" in column:
        probes.append(Kretprobe(function, lambda ri, regs: None))
    return probes, probes[-1]


def hits_per_second(session: Session, column: str, function: str, hits: int = _HITS) -> float:
    """Calls a second of a function with the probes of a column on it."""
    probes, counted = column_probes(column, function)
    for probe in probes:
        session.register(probe)
    try:
        return _rate(session, lambda: counted.hits, hits)
    finally:
        for probe in reversed(probes):
            probe.unregister()


def _rate(session: Session, hits: Callable[[], int], wanted: int) -> float:
    marks: list[tuple[float, int]] = []

    def on_stop(stop: Stop) -> bool:
        going = session.probes.on_stop(stop)
        done = hits()
        if not marks and done >= _WARM_UP:
            marks.append((time.perf_counter(), done))
        return going and done < wanted + _WARM_UP

    if session.target.run(on_stop, _GDB_S) is None:
        raise MachineError(f"fewer than {wanted} hits in {_GDB_S} s")
    start, first = marks[0]
    return (hits() - first) / (time.perf_counter() - start)


def _samples(
    vm: Vm, command: str, rounds: int, function: str, columns: tuple[str, ...], *, roundtrips: bool
) -> dict[str, list[float]]:
    # Everything in turn, so that a machine that gets slower does so for all.
    variants: dict[str, Callable[[], float]] = {}
    if roundtrips:
        variants["gdb.plain"] = functools.partial(hits_per_second_in_gdb, vm, "plain", function)
        variants["roundtrip"] = functools.partial(_roundtrips, vm, function)
    for column in columns:
        variants[f"stop.{column}"] = functools.partial(_headless, vm, column, function)
        variants[f"gdb.{column}"] = functools.partial(hits_per_second_in_gdb, vm, column, function)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    workload = vm.start(command)
    try:
        for _ in range(rounds):
            for name, run in variants.items():
                samples[name].append(run())
    finally:
        workload.discard()
    return samples


def _headless(vm: Vm, column: str, function: str) -> float:
    with attach_vm(vm.info) as session:
        return hits_per_second(session, column, function)


def _roundtrips(vm: Vm, function: str) -> float:
    # The least that a stop can cost on this stub: note it, move past the breakpoint, go on.
    with attach_vm(vm.info) as session:
        target = session.target
        address = session.kernel.functions(function)[0].address
        target.insert_breakpoint(BreakpointKind.SOFTWARE, address)
        registers = target.read_registers(target.cpus()[0])
        done, start = 0, 0.0

        def on_stop(stop: Stop) -> bool:
            nonlocal done, start
            registers.rip = address + _NOP_BYTES
            target.write_registers(stop.cpu, registers)
            done += 1
            if done == _WARM_UP:
                start = time.perf_counter()
            return done < _HITS + _WARM_UP

        if target.run(on_stop, _GDB_S) is None:
            raise MachineError(f"fewer than {_HITS} stops in {_GDB_S} s")
        return _HITS / (time.perf_counter() - start)


def hits_per_second_in_gdb(vm: Vm, what: str, function: str) -> float:
    """Hits a second of a function inside a gdb of its own.

    :param what: ``plain`` for a bare gdb breakpoint, or a column
    :raises MachineError: if gdb measures nothing
    """
    with tempfile.TemporaryDirectory(prefix="kgdbx-bench-") as directory:
        result = Path(directory) / "result.json"
        code = (
            "import kgdbx.bench.in_gdb as b; "
            f"b.main({vm.name!r}, {what!r}, {function!r}, {_HITS}, {str(result)!r})"
        )
        done = subprocess.run(
            [*gdb_argv(), "-batch", "-ex", f"python {code}"],
            capture_output=True,
            text=True,
            timeout=_GDB_S,
            check=False,
        )
        if not result.exists():
            raise MachineError(f"gdb measured nothing: {done.stdout}{done.stderr}")
        return float(json.loads(result.read_text())["hits_per_s"])


def _kernel_cost_us(vm: Vm, column: str, rounds: int) -> list[float]:
    # The guest's own clock, as no one stops it: with the events and without, in turn.
    trace = "/sys/kernel/tracing"
    define = "; ".join(
        f"echo '{text.format(f=_CALLED)}' >> {trace}/kprobe_events"
        for text in _KERNEL_EVENTS[column]
    )
    costs = []
    for _ in range(rounds):
        bare = _ns_per_call(vm)
        _guest(vm, f"{define}; echo 1 > {trace}/events/k/enable")
        try:
            costs.append((_ns_per_call(vm) - bare) / 1000)
        finally:
            _guest(vm, f"echo 0 > {trace}/events/k/enable; echo > {trace}/kprobe_events")
    return costs


def _ns_per_call(vm: Vm) -> int:
    return int(_guest(vm, f"caller 1 {_CALLS}").split()[1])


def _guest(vm: Vm, command: str) -> str:
    done = vm.execute(command, timeout_s=_GDB_S)
    if done.status:
        raise MachineError(f"{command!r} in the guest failed: {done.output}")
    return done.output
