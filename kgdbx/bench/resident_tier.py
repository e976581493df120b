"""Probes in the guest, beside the kernel's own kprobe events."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kgdbx.attach import attach_vm
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
from kgdbx.definitions import Refused
from kgdbx.errors import MachineError
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import configure
from kgdbx.probes.definition import parse_definition
from kgdbx.trace.binary import FILE_HEADER, FRAME_HEADER, FrameType
from kgdbx.trace.recording_writer import RecordingWriter

__all__ = ("measure",)

_RING_EVENTS = 10_000_000
_RING_BYTES = 16 << 20  # what 'kgdbx trace' has
_RING_S = 300.0
_TRACED = 1000
_COUNTING = ("-icount", "shift=0")  # a nanosecond of the guest's is one instruction


def measure(rounds: int) -> Iterator[Figure]:
    """All figures of the resident tier.

    :param rounds: how often everything is measured, in turn
    """
    for smp in (1, 4):
        yield from _costs(smp, rounds)
    yield from _instructions()
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


def _instructions() -> Iterator[Figure]:
    # What a call costs in instructions of the guest's: its clock counts them, and nothing else.
    with clone(make_template(configure("6.1", extra_args=_COUNTING))) as vm:
        kernel = {name: kernel_ns(vm, 1, texts) for name, texts in KERNEL.items()}
        ours = {name: resident_ns(vm, 1, texts) for name, texts in RESIDENT.items()}
    for name, value in ours.items():
        beside = "return" if name == "return" else "entry"
        vs = "kretprobe" if name == "return" else "kprobe"
        yield ratio(f"probes.resident.{name}.insns_vs_{vs}", [value], [kernel[beside]])
    for name, value in kernel.items():
        yield figure(f"probes.kernel.{name}_insns", [value], "1")
    for name, value in ours.items():
        yield figure(f"probes.resident.{name}_insns", [value], "1")


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
    # Once, from the guest to a file, as 'kgdbx trace --raw' does it.
    with (
        clone(make_template(configure("6.1", smp=2))) as vm,
        tempfile.TemporaryDirectory(prefix="kgdbx-bench-") as directory,
        attach_vm(vm.info) as session,
    ):
        path = Path(directory) / "events"
        engine, reader = session.resident.engine, session.resident.reader
        engine.ring_bytes = _RING_BYTES
        definition = parse_definition(f"p {CALLED} pid")
        (probe,) = session.define_many([definition], tier="resident", inlined_copies=False)
        writer = RecordingWriter(path, engine.clock)
        writer.add_probes(reader.layouts())
        command = vm.start(f"caller 2 {_RING_EVENTS}")
        spent, taken = 0.0, 0

        def take() -> None:
            nonlocal spent, taken
            start = time.perf_counter()
            before = taken
            for batch in engine.drain():
                writer.write_batch(batch.records)
                taken += len(batch.records)
            if taken > before:  # looking in vain is not draining
                spent += time.perf_counter() - start
            if command.poll() is not None:
                session.target.request_stop()

        start = time.perf_counter()
        session.target.run(session.probes.on_stop, _RING_S, take)
        take()
        session.target.forget_stop_request()
        elapsed = time.perf_counter() - start
        writer.close()
        lost, hits = engine.lost(), probe.hits
        recorded = _count_records(path)
        if recorded != taken or taken + lost != hits or hits != _RING_EVENTS:
            raise MachineError(f"{recorded} recorded, {taken} taken, {lost} lost of {hits} hits")
    yield figure("ring.events_per_s", [taken / spent], "1/s")
    yield figure("ring.guest_events_per_s", [hits / elapsed], "1/s")
    yield figure("ring.lost", [lost], "1")


def _count_records(path: Path) -> int:
    # How many different records a recording has.
    total, numbers = 0, []
    with path.open("rb") as file:
        file.seek(FILE_HEADER.size)
        while header := file.read(FRAME_HEADER.size):
            size, kind, _, record_bytes, items = FRAME_HEADER.unpack(header)
            data = np.frombuffer(file.read(size), np.uint8)
            if kind == FrameType.RECORDS:
                records = data.reshape(items, record_bytes)
                numbers.append(records[:, :8].copy().view("<u8").ravel())
                total += items
    found = len(np.unique(np.concatenate(numbers)))
    if found != total:
        raise MachineError(f"{total - found} records twice in {path}")
    return found


def _many(rounds: int) -> Iterator[Figure]:
    attach, detach = [], []
    with clone(make_template(configure("6.1", smp=2))) as vm:
        for _ in range(rounds):
            with attach_vm(vm.info) as session:
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
