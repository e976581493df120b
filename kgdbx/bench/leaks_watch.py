"""What watching a module costs the module: a file system that is kept busy, watched and not."""

from collections.abc import Iterator

from kgdbx.bench.figure import Figure, figure, ratio
from kgdbx.errors import MachineError
from kgdbx.leaks.watch import place_watch
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import Vm, configure
from kgdbx.session import Session

__all__ = ("measure_watch",)

_MODULE = "overlay"  # most of what it does is done in its own functions' frames
_MOUNT = (
    "modprobe overlay && mkdir /o && mount -t tmpfs none /o && mkdir /o/l /o/u /o/w /o/m &&"
    " mount -t overlay none -o lowerdir=/o/l,upperdir=/o/u,workdir=/o/w /o/m"
)
_THREADS = 2
_ROUNDS = 1500
_LEAST_BLOCKS = 10 * _THREADS * _ROUNDS  # that the module allocates for so many files
_GUEST_S = 120.0


def measure_watch(rounds: int) -> Iterator[Figure]:
    """Time of the same work on files, watched and not, one after the other.

    :raises MachineError: if the work fails, or what is counted cannot be all
    """
    plain: list[float] = []
    watched: list[float] = []
    blocks: list[float] = []
    template = make_template(configure("6.1", smp=_THREADS, modules=(_MODULE,)))
    with clone(template) as vm:
        done = vm.execute(f"{_MOUNT} && filer /o/m {_THREADS} 200", timeout_s=_GUEST_S)
        if done.status:
            raise MachineError(f"the overlay cannot be mounted in the guest: {done.output}")
        for _ in range(rounds):
            with Session.attach_vm(vm.info) as session:
                plain.append(_work(vm, session))
                watch = place_watch(session.kernel, session.resident, session.probes, [_MODULE])
                watched.append(_work(vm, session))
                report = watch.report()
            # That it was there before is told; nothing else may be.
            count = report.totals[0]
            if count < _LEAST_BLOCKS or len(report.notes) != 1:
                raise MachineError(f"{count} allocations were seen; {'; '.join(report.notes)}")
            blocks.append(count / watched[-1])
    yield ratio("leaks.watch.load_ratio", watched, plain)
    yield figure("leaks.watch.blocks", blocks, "1/s")


def _work(vm: Vm, session: Session) -> float:
    command = vm.start(f"filer /o/m {_THREADS} {_ROUNDS}")
    session.run(command=command, timeout_s=_GUEST_S)
    if command.poll() is None:
        raise MachineError(f"the guest's work has not ended after {_GUEST_S:g} s")
    done = command.wait(1)
    if done.status:
        raise MachineError(f"the guest's work failed: {done.output}")
    return int(done.output) / 1e9
