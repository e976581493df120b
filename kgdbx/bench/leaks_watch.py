"""What watching a module costs the module: file systems that are kept busy, watched and not.

Time is the guest's own, of the same work with the watch, and in a guest that nobody is attached to.
Each round is unwatched, watched, watched, unwatched: a machine that becomes slower meanwhile does
not count. Before each change's first run goes one that does not count: QEMU has dropped all code.
"""

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kgdbx.attach import attach_vm
from kgdbx.bench.figure import Figure, figure, ratio
from kgdbx.errors import MachineError
from kgdbx.leaks.watch import place_watch
from kgdbx.machine.cache import cache_dir, populate
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import Vm, configure
from kgdbx.session import Session

__all__ = ("measure_watch",)

_THREADS = 2
_GUEST_S = 300.0
_IMAGE_MIB = 16
_MKFS_S = 60.0


@dataclasses.dataclass(frozen=True)
class _Load:
    # others: modules that are needed, and not watched. image: where in the guest an empty file
    # system is to be. mount: ends with a file system on /m. least_blocks: of allocations.
    name: str
    modules: tuple[str, ...]
    others: tuple[str, ...]
    image: str
    mount: str
    program: str
    rounds: int
    least_blocks: int


# What fio calls randrw, with fsync(), of files on FAT on a loop device in memory: no disk is waited
# for, so that what the watch costs is not hidden. What carries the load is watched altogether.
_RANDRW = _Load(
    "load",
    ("vfat", "fat", "loop"),
    ("nls_cp437", "nls_ascii", "nls_utf8"),
    "/fat.img",
    "modprobe -a nls_cp437 nls_ascii nls_utf8 loop vfat && mkdir /m &&"
    " losetup /dev/loop0 /fat.img && mount -t vfat /dev/loop0 /m",
    "filer randrw",
    20_000,
    5000,
)
# The worst of loads: nothing but files that come and go, with 12 allocations each.
_FILES = _Load(
    "files",
    ("overlay",),
    (),
    "",
    "modprobe overlay && mkdir /o /m && mount -t tmpfs none /o && mkdir /o/l /o/u /o/w &&"
    " mount -t overlay none -o lowerdir=/o/l,upperdir=/o/u,workdir=/o/w /m",
    "filer create",
    1500,
    10 * _THREADS * 1500,
)


def measure_watch(rounds: int) -> Iterator[Figure]:
    """Time of the same work on files, watched and not.

    :raises MachineError: if the work fails, or what is counted cannot be all
    """
    for load in (_RANDRW, _FILES):
        yield from _measure(load, rounds)


def _measure(load: _Load, rounds: int) -> Iterator[Figure]:
    plain: list[float] = []
    watched: list[float] = []
    blocks: list[float] = []
    files = {load.image: _image()} if load.image else {}
    modules = load.modules + load.others
    template = make_template(configure("6.1", smp=_THREADS, modules=modules, files=files))
    with clone(template) as vm:
        done = vm.execute(f"{load.mount} && {_command(load)}", timeout_s=_GUEST_S)
        if done.status:
            raise MachineError(f"the guest cannot do the work: {done.output}")
        for _ in range(rounds):
            first = _alone(vm, load)
            with attach_vm(vm.info) as session:
                watch = place_watch(session.kernel, session.resident, session.probes, load.modules)
                _work(vm, session, load)
                watched.append(_work(vm, session, load) + _work(vm, session, load))
                report = watch.report()
                watch.stop()
            plain.append(first + _alone(vm, load))
            # That it was there before is told; nothing else may be.
            count = report.totals[0]
            if count < 3 * load.least_blocks or len(report.notes) != 1:
                raise MachineError(f"{count} allocations were seen; {'; '.join(report.notes)}")
            blocks.append(count / watched[-1] * 2 / 3)
    yield ratio(f"leaks.watch.{load.name}_ratio", watched, plain)
    yield figure(f"leaks.watch.{load.name}_blocks", blocks, "1/s")


def _command(load: _Load) -> str:
    return f"{load.program} /m {_THREADS} {load.rounds}"


def _alone(vm: Vm, load: _Load) -> float:
    command = _command(load)
    done = vm.execute(f"{command} && {command}", timeout_s=2 * _GUEST_S)
    if done.status:
        raise MachineError(f"the guest's work failed: {done.output}")
    return int(done.output.split()[-1]) / 1e9


def _work(vm: Vm, session: Session, load: _Load) -> float:
    command = vm.start(_command(load))
    session.run(command=command, timeout_s=_GUEST_S)
    if command.poll() is None:
        raise MachineError(f"the guest's work has not ended after {_GUEST_S:g} s")
    done = command.wait(1)
    if done.status:
        raise MachineError(f"the guest's work failed: {done.output}")
    return int(done.output) / 1e9


# An empty file system, the same each time: guests are snapshots by what is in them.
def _image() -> Path:
    directory = cache_dir() / "images" / f"fat-{_IMAGE_MIB}"
    populate(directory, lambda scratch: _make_image(scratch / "fat.img"))
    return directory / "fat.img"


def _make_image(path: Path) -> None:
    search = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    mkfs = shutil.which("mkfs.fat", path=search)
    if mkfs is None:
        raise MachineError("there is no mkfs.fat to make a file system with; install dosfstools")
    done = subprocess.run(
        [mkfs, "-C", str(path), str(_IMAGE_MIB << 10)],
        capture_output=True,
        text=True,
        timeout=_MKFS_S,
    )
    if done.returncode:
        raise MachineError(f"mkfs.fat cannot make {path}: {done.stderr.strip()}")
