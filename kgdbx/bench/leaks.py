"""The leak scan: beside drgn's slab helpers, and how long it takes on small and large guests."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from drgn.helpers.linux.slab import for_each_slab_cache, slab_cache_for_each_allocated_object

from kgdbx.attach import attach_vm
from kgdbx.bench.figure import Figure, figure
from kgdbx.errors import MachineError
from kgdbx.leaks.heap import read_heap
from kgdbx.leaks.scan import scan_heap
from kgdbx.machine.kmod import build_kmod
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import Vm, configure

__all__ = ("measure", "measure_enumeration", "measure_scan")

_OBJECTS = 2_000_000
_MODULE_S = 300.0
_SAMPLE_S = 0.005


def measure(rounds: int) -> Iterator[Figure]:
    """All figures of the leak scan.

    :param rounds: how often each scan is measured
    """
    yield from measure_enumeration("6.1", 1, rounds)
    yield from measure_enumeration("6.12", 4, rounds, ".6.12.4cpus")
    yield from measure_scan("leaks.scan_512m", 512 << 20, 0, rounds)
    yield from measure_scan("leaks.scan_4g", 4 << 30, _OBJECTS, rounds)


def measure_enumeration(name: str, smp: int, rounds: int, suffix: str = "") -> Iterator[Figure]:
    """Every allocated slab object of every cache: here, and by drgn's helpers, cache by cache.

    drgn looks at all pages for each cache, so its time grows with memory: the guest is small.

    :param name: of the kernel
    :param smp: number of vCPUs
    :param suffix: of the figures' names
    :raises MachineError: if the two do not find the same objects
    """
    with (
        clone(make_template(configure(name, smp=smp, memory_bytes=256 << 20))) as vm,
        attach_vm(vm.info) as session,
    ):
        assert session.ram is not None
        kernel, ram = session.kernel, session.ram
        heap = read_heap(kernel, ram)
        ours = []
        for _ in range(rounds):
            started = time.perf_counter()
            read_heap(kernel, ram)
            ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        total = 0
        for cache in for_each_slab_cache(kernel.program):
            found = {o.value_() for o in slab_cache_for_each_allocated_object(cache, "void")}
            total += len(found)
            of = cache.name.string_().decode()
            if found != set(heap.allocated_objects(of).tolist()):
                raise MachineError(f"cache {of}: drgn finds other objects")
        theirs = time.perf_counter() - started
    yield figure(f"leaks.enumerate.vs_drgn{suffix}", (theirs / own for own in ours), "x")
    yield figure(f"leaks.enumerate_s{suffix}", ours, "s")
    yield figure(f"leaks.enumerate.drgn_s{suffix}", [theirs], "s")
    yield figure(f"leaks.enumerate.objects{suffix}", [total], "")


def measure_scan(name: str, memory_bytes: int, objects: int, rounds: int) -> Iterator[Figure]:
    """A whole scan of a guest that stands: seconds, and the most memory that the process had of
    its own, which the guest's RAM is not.

    :param objects: how many live objects a module makes first
    """
    module = build_kmod("6.1", "many_objects")
    config = configure("6.1", smp=2, memory_bytes=memory_bytes, files={"/many_objects.ko": module})
    with clone(make_template(config)) as vm:
        if objects:
            _load(vm, objects)
        with attach_vm(vm.info) as session:
            assert session.ram is not None
            registers = [session.target.read_registers(cpu) for cpu in session.target.cpus()]
            times = []
            peaks: list[float] = []
            for turn in range(rounds + 1):
                started = time.perf_counter()
                scan = scan_heap(session.kernel, session.ram, registers)
                if turn:  # the first one reads debug information and compiles
                    times.append(time.perf_counter() - started)
                with _peak_memory(peaks):
                    scan = scan_heap(session.kernel, session.ram, registers)
            if scan.heap.nnodes < objects:
                raise MachineError(f"the scan saw {scan.heap.nnodes} objects of {objects}")
            if scan.errors:
                raise MachineError(f"the scan is not whole: {scan.errors[0]}")
    yield figure(f"{name}_s", times, "s")
    yield figure(f"{name}_mib", peaks, "MiB")


@contextlib.contextmanager
def _peak_memory(peaks: list[float]) -> Iterator[None]:
    # Adds the most that the process had meanwhile, in MiB.
    samples = [_own_mib()]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_S):
            samples.append(_own_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        peaks.append(max(samples))


def _own_mib() -> float:
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, "proc(5)"
    return int(found[1]) / 1024


def _load(vm: Vm, objects: int) -> None:
    done = vm.execute(f"insmod /many_objects.ko objects={objects}", timeout_s=_MODULE_S)
    if done.status != 0:
        raise MachineError(f"the module that makes {objects} objects failed: {done.output}")
