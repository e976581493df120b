"""Probes in the guest, beside the kernel's own kprobe events."""

import tempfile
import time
from collections.abc import Iterator

from kgdbx.bench.calls import (
    CALLED,
    CALLS,
    KERNEL,
    RESIDENT,
    kernel_ns,
    probed_ns,
    resident_ns,
)
from kgdbx.bench.figure import Figure, figure, ratio
from kgdbx.bench.native import entry_cost
from kgdbx.bench.stop_tier import hits_per_second_in_gdb
from kgdbx.errors import MachineError
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import configure
from kgdbx.probes.definition import parse_definition
from kgdbx.session import Refused, Session

__all__ = ("measure",)

_RING_EVENTS = 10_000_000
_RING_BYTES = 4 << 20  # the host shares its two cores with the guest's vCPUs
_TRACED = 1000


def measure(rounds: int) -> Iterator[Figure]:
    """All figures of the resident tier.

    :param rounds: how often everything is measured, in turn
    """
    for smp in (1, 4):
        yield from _costs(smp, rounds)
    yield from entry_cost(rounds)
    yield from _beside_gdb(rounds)
    yield from _ring()
    yield from _many(rounds)


def _costs(smp: int, rounds: int) -> Iterator[Figure]:
    cpus = "" if smp == 1 else f".{smp}cpus"
    samples: dict[str, list[float]] = {}
    with clone(make_template(configure("6.1", smp=smp))) as vm:
        for _ in range(rounds):
            for name, texts in KERNEL.items():
                samples.setdefault(f"kernel.{name}", []).append(kernel_ns(vm, smp, texts))
            for name, texts in RESIDENT.items():
                samples.setdefault(f"resident.{name}", []).append(resident_ns(vm, smp, texts))
    kernel, entry = samples["kernel.entry"], samples["resident.entry"]
    both = samples["kernel.return"]
    filtered = samples["resident.filtered"]
    yield ratio(f"probes.resident.entry.vs_kprobe{cpus}", entry, kernel)
    yield ratio(f"probes.resident.return.vs_kretprobe{cpus}", samples["resident.return"], both)
    yield ratio(f"probes.resident.filtered.vs_kprobe{cpus}", filtered, kernel)
    for name, values in samples.items():
        yield figure(f"probes.{name}_ns{cpus}", values, "ns")


def _beside_gdb(rounds: int) -> Iterator[Figure]:
    # Hits a second of one function that system calls reach in a loop, in turn on one VM.
    ours, gdbs = [], []
    with clone(make_template(configure("6.1", smp=1))) as vm:
        for _ in range(rounds):
            calling = vm.start(f"caller 1 {CALLS * CALLS}")
            try:
                gdbs.append(hits_per_second_in_gdb(vm, "plain", CALLED))
            finally:
                calling.discard()
            ours.append(1e9 / probed_ns(vm, 1, RESIDENT["entry"]))
    yield ratio("probes.resident.vs_gdb", ours, gdbs)
    yield figure("probes.resident.hits_per_s", ours, "1/s")


def _ring() -> Iterator[Figure]:
    # Once, from the guest to a file: what the host keeps up with, and that nothing is missing.
    with (
        clone(make_template(configure("6.1", smp=2))) as vm,
        Session.attach_vm(vm.info) as session,
        tempfile.TemporaryFile() as file,
    ):
        definition = parse_definition(f"p {CALLED} pid")
        engine = session.resident.engine
        engine.ring_bytes = _RING_BYTES
        session.define_many([definition], tier="resident", inlined_copies=False)
        spent, taken = 0.0, 0

        def take() -> None:
            nonlocal spent, taken
            start = time.perf_counter()
            before = taken
            for batch in engine.drain():
                file.write(batch.records.data)
                taken += len(batch.records)
            if taken > before:  # looking in vain is not draining
                spent += time.perf_counter() - start

        command = vm.start(f"caller 2 {_RING_EVENTS}")
        start = time.perf_counter()
        while command.poll() is None:
            session.target.run(session.probes.on_stop, 0.5, take)
        take()
        elapsed = time.perf_counter() - start
        lost = engine.lost()
        if taken != _RING_EVENTS or lost:
            raise MachineError(f"{taken} received and {lost} lost of {_RING_EVENTS}")
    yield figure("ring.events_per_s", [taken / spent], "1/s")
    yield figure("ring.guest_events_per_s", [taken / elapsed], "1/s")


def _many(rounds: int) -> Iterator[Figure]:
    attach, detach = [], []
    with clone(make_template(configure("6.1", smp=2))) as vm:
        for _ in range(rounds):
            with Session.attach_vm(vm.info) as session:
                names = [
                    name
                    for name in session.kernel.vmlinux.function_names
                    if name.startswith(("vfs_", "ext4_", "do_sys", "__x64_sys_", "tcp_"))
                ]
                definitions = [parse_definition(f"p {name}") for name in names[: _TRACED + 200]]
                start = time.perf_counter()
                try:
                    placed = session.define_many(definitions, tier="resident", inlined_copies=False)
                except Refused as e:
                    placed = e.placed
                attach.append((time.perf_counter() - start) * _TRACED / len(placed))
                start = time.perf_counter()
                session.probes.close()
                detach.append((time.perf_counter() - start) * _TRACED / len(placed))
    yield figure("trace.attach_1000_s", attach, "s")
    yield figure("trace.detach_1000_s", detach, "s")
