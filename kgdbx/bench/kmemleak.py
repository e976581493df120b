"""The leak scan and the kernel's own kmemleak, on the same leaks in the same guest."""

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping

from kgdbx.attach import attach_vm
from kgdbx.bench.figure import Figure, figure
from kgdbx.errors import MachineError
from kgdbx.leaks.scan import scan_heap
from kgdbx.machine.config import MachineConfig
from kgdbx.machine.kgdb_kernel import KGDB_KERNEL
from kgdbx.machine.kmod import build_kmod
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import Vm, configure

__all__ = ("Comparison", "Side", "compare", "kmemleak_machine", "measure")

# The first one spins with a pointer in a register and holds up all grace periods.
_MODULES = ("hidden_references", "planted_leaks")
_MEMORY_BYTES = 256 << 20
_GUEST_S = 300.0
# A block is not reported before it is 5 s old (MSECS_MIN_AGE, mm/kmemleak.c), nor before a second
# scan has found the same in it.
_AGE_S = 6
_FILE = "/sys/kernel/debug/kmemleak"
_REPORTED = re.compile(r"^unreferenced object 0x([0-9a-f]+) ", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Side:
    """What one of them reported.

    :ivar missed: kinds of planted leaks that it did not, with how many
    :ivar false: kinds of blocks that somebody holds and that it did
    :ivar others: reports of what is not of the modules: leaks of the kernel, and false ones
    :ivar seconds: that it took: with the kernel at a stand, or in it
    """

    found: int
    missed: Mapping[str, int]
    false: Mapping[str, int]
    others: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both on the same guest.

    :ivar planted: how many leaks there are
    :ivar kept: how many blocks there are that only look lost
    """

    planted: int
    kept: int
    kgdbx: Side
    kmemleak: Side


def measure(rounds: int) -> Iterator[Figure]:
    """Both, each time in a fresh guest.

    :raises MachineError: if the guest fails
    """
    template = make_template(kmemleak_machine())
    runs = []
    for _ in range(rounds):
        with clone(template) as vm:
            runs.append(compare(vm))
    yield figure("kmemleak.planted", [run.planted for run in runs], "1")
    yield figure("kmemleak.kept", [run.kept for run in runs], "1")
    for name in ("kgdbx", "kmemleak"):
        sides: list[Side] = [getattr(run, name) for run in runs]
        yield figure(f"kmemleak.{name}.found", [side.found for side in sides], "1")
        yield figure(f"kmemleak.{name}.false", [sum(s.false.values()) for s in sides], "1")
        yield figure(f"kmemleak.{name}.others", [side.others for side in sides], "1")
        yield figure(f"kmemleak.{name}_s", [side.seconds for side in sides], "s")
        for what in ("missed", "false"):
            kinds = {kind for side in sides for kind in getattr(side, what)}
            for kind in sorted(kinds):
                counts = [getattr(side, what).get(kind, 0) for side in sides]
                yield figure(f"kmemleak.{name}.{what}.{kind}", counts, "1")


def kmemleak_machine() -> MachineConfig:
    """A machine whose kernel was built with kmemleak, and that has the modules."""
    files = {f"/{name}.ko": build_kmod(KGDB_KERNEL, name) for name in _MODULES}
    return configure(KGDB_KERNEL, smp=2, memory_bytes=_MEMORY_BYTES, files=files)


def compare(vm: Vm) -> Comparison:
    """Plant leaks, and what only looks like leaks, and have both look for them.

    :param vm: one of :func:`kmemleak_machine`, just booted
    :raises MachineError: if the guest fails
    """
    # It scans by itself every ten minutes, which would be counted to ours or to its own.
    _run(vm, f"echo scan=off > {_FILE}")
    for name in _MODULES:
        _run(vm, f"insmod /{name}.ko")
    log = _run(vm, "dmesg")
    lost, kept = (_told(log, verdict) for verdict in ("lost", "kept"))
    ours, seconds = _scan(vm)
    kgdbx = _side(ours, lost, kept, seconds)
    _run(vm, f"sleep {_AGE_S}")
    times = [float(_run(vm, _TIMED)) for _ in range(2)]
    reported = {int(each, 16) for each in _REPORTED.findall(_run(vm, f"cat {_FILE}"))}
    return Comparison(len(lost), len(kept), kgdbx, _side(reported, lost, kept, sum(times)))


_TIMED = (
    "read a b < /proc/uptime; "
    f"echo scan > {_FILE}; "
    "read c b < /proc/uptime; "
    "echo $a $c | awk '{ print $2 - $1 }'"
)


def _scan(vm: Vm) -> tuple[set[int], float]:
    times = []
    with attach_vm(vm.info) as session:
        assert session.ram is not None
        registers = [session.target.read_registers(cpu) for cpu in session.target.cpus()]
        for _ in range(2):  # the first one reads debug information
            started = time.perf_counter()
            scan = scan_heap(session.kernel, session.ram, registers)
            times.append(time.perf_counter() - started)
        if scan.errors:
            raise MachineError(f"the scan is not whole: {scan.errors[0]}")
    return {block.address for block in scan.leaks}, times[-1]


def _side(found: set[int], lost: dict[int, str], kept: dict[int, str], seconds: float) -> Side:
    return Side(
        len(found & lost.keys()),
        Counter(lost[address] for address in lost.keys() - found),
        Counter(kept[address] for address in kept.keys() & found),
        len(found - lost.keys() - kept.keys()),
        seconds,
    )


def _told(log: str, verdict: str) -> dict[int, str]:
    found = re.findall(rf" {verdict}: (\w+) ([0-9a-f]+)", log)
    return {int(address, 16): kind for kind, address in found}


def _run(vm: Vm, command: str) -> str:
    done = vm.execute(command, timeout_s=_GUEST_S)
    if done.status != 0:
        raise MachineError(f"{command!r} failed in the guest: {done.output}")
    return done.output
