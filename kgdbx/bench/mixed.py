"""Mixed work in a stock guest, and what a leak scan reports before and after it."""

import sys
from collections.abc import Iterator

from kgdbx.attach import attach_vm
from kgdbx.bench.figure import Figure, figure
from kgdbx.errors import MachineError
from kgdbx.leaks.describe import describe_block
from kgdbx.leaks.scan import Scan, scan_heap
from kgdbx.machine.config import MachineConfig
from kgdbx.machine.initramfs import GUEST_FILES
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import Vm, configure

__all__ = ("do_mixed_work", "measure", "mixed_work_machine", "rounds_of")

_KINDS = (
    *("cgroups", "disks", "files", "insides", "modules"),
    *("mounts", "namespaces", "pipes", "processes", "sockets"),
)
_MODULES = ("brd", "dummy", "loop", "overlay", "veth")
_WORK = "mixed-work"
_SETTLE_S = 30  # of the guest: what is freed later, by work queues and grace periods, is freed
# The guest may stand meanwhile, and its work has an end of its own.
_PATIENCE = 20.0
_LEAST_S = 600.0


def measure(minutes: float, kernel: str = "6.1") -> Iterator[Figure]:
    """Reports of a guest that has booted, and of the same one after the work.

    Each report goes to the standard error output, as a scan shows it.

    :param minutes: how long, by the guest's clock
    :raises MachineError: if some of the work fails, or a scan is not whole
    """
    with clone(make_template(mixed_work_machine(kernel))) as vm:
        booted = _scan(vm)
        done = do_mixed_work(vm, minutes)
        after = _scan(vm)
    yield figure("mixed.minutes", [minutes], "min")
    yield figure("mixed.reports_booted", [len(booted.leaks)], "1")
    yield figure("mixed.reports", [len(after.leaks)], "1")
    yield figure("mixed.blocks", [int((after.heap.node_flags & 1).sum())], "1")
    yield figure("mixed.kinds", [len(done)], "1")
    for what, count in done.items():
        yield figure(f"mixed.{what}", [count], "1")


def mixed_work_machine(kernel: str) -> MachineConfig:
    """The machine that the work is for.

    :param kernel: name of a stock kernel
    """
    files = {f"/bin/{_WORK}": GUEST_FILES / "workload" / _WORK}
    return configure(kernel, smp=2, modules=_MODULES, files=files)


def do_mixed_work(vm: Vm, minutes: float) -> dict[str, int]:
    """Have a guest do it, and let it come to rest.

    :param minutes: how long, by the guest's clock
    :return: how often each kind of work was done to its end
    :raises MachineError: if some of it failed, or was not done once
    """
    seconds = int(60 * minutes)
    done = vm.execute(f"{_WORK} {seconds}", timeout_s=_LEAST_S + _PATIENCE * seconds)
    if done.status != 0:
        raise MachineError(f"the guest's work failed: {done.output}")
    vm.execute(f"sleep {_SETTLE_S}", timeout_s=_LEAST_S)
    return rounds_of(done.output)


def rounds_of(output: str) -> dict[str, int]:
    """How often each kind of work was done to its end, as the guest's work says.

    :raises MachineError: if there is a kind of which it says nothing, or that was not done once
    """
    said = (line.partition(" ") for line in output.splitlines())
    rounds = {what: int(count) for what, _, count in said if what in _KINDS and count.isdecimal()}
    missing = [what for what in _KINDS if not rounds.get(what)]
    if missing:
        raise MachineError(f"the guest's work was not all done: no {', '.join(missing)}: {output}")
    return dict(sorted(rounds.items()))


def _scan(vm: Vm) -> Scan:
    with attach_vm(vm.info) as session:
        assert session.ram is not None
        registers = [session.target.read_registers(cpu) for cpu in session.target.cpus()]
        scan = scan_heap(session.kernel, session.ram, registers)
        if scan.errors:
            raise MachineError(f"the scan is not whole: {scan.errors[0]}")
        for block in scan.leaks:
            about = describe_block(scan.heap, block)
            told = " ".join((about.type_name, about.text, *about.symbols))
            print(
                f"kgdbx: {block.address:#x} {block.size_bytes} bytes of {block.cache}: {told}",
                file=sys.stderr,
            )
    return scan
