"""Probes in the guest, beside the kernel's own kprobe events.

A cost is what a call takes with the probe minus what it takes without: both are measured by the
guest's own clock, one after the other, and each is the best of several runs, as what else the
machine does only ever adds.
"""

import tempfile
import time
from collections.abc import Iterator

from kgdbx.bench.figure import Figure, figure, ratio
from kgdbx.bench.native import entry_cost
from kgdbx.bench.stop_tier import hits_per_second_in_gdb
from kgdbx.errors import MachineError
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import Vm, configure
from kgdbx.probes.definition import parse_definition
from kgdbx.session import Refused, Session

__all__ = ("measure",)

_CALLED = "do_getpgid"  # long do_getpgid(pid_t pid), kernel/sys.c
_CALLS = 100_000
_TIMES = 5
_GUEST_S = 120
_RING_EVENTS = 10_000_000
_RING_BYTES = 4 << 20  # the host shares its two cores with the guest's vCPUs
_TRACED = 1000
_TRACEFS = "/sys/kernel/tracing"

_RESIDENT = {
    "entry": ("p {f} pid %si",),
    "return": ("p {f} pid %si", "r {f} $retval"),
    "filtered": ("p {f} pid %si if pid == 77",),
}
_KERNEL = {
    "entry": ("p:k/e {f} pid=%di si=%si",),
    "return": ("p:k/e {f} pid=%di si=%si", "r:k/f {f} ret=$retval"),
}


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
            for name, texts in _KERNEL.items():
                samples.setdefault(f"kernel.{name}", []).append(_kernel_ns(vm, smp, texts))
            for name, texts in _RESIDENT.items():
                samples.setdefault(f"resident.{name}", []).append(_resident_ns(vm, smp, texts))
    kernel, entry = samples["kernel.entry"], samples["resident.entry"]
    both = samples["kernel.return"]
    filtered = samples["resident.filtered"]
    yield ratio(f"probes.resident.entry.vs_kprobe{cpus}", entry, kernel)
    yield ratio(f"probes.resident.return.vs_kretprobe{cpus}", samples["resident.return"], both)
    yield ratio(f"probes.resident.filtered.vs_kprobe{cpus}", filtered, kernel)
    for name, values in samples.items():
        yield figure(f"probes.{name}_ns{cpus}", values, "ns")


def _kernel_ns(vm: Vm, smp: int, texts: tuple[str, ...]) -> float:
    bare = _ns_per_call(vm, smp)
    define = "; ".join(
        f"echo '{text.format(f=_CALLED)}' >> {_TRACEFS}/kprobe_events" for text in texts
    )
    _guest(vm, f"{define}; echo 1 > {_TRACEFS}/events/k/enable")
    try:
        return _ns_per_call(vm, smp) - bare
    finally:
        _guest(vm, f"echo 0 > {_TRACEFS}/events/k/enable; echo > {_TRACEFS}/kprobe_events")


def _resident_ns(vm: Vm, smp: int, texts: tuple[str, ...]) -> float:
    bare = _ns_per_call(vm, smp)
    return _probed_ns(vm, smp, texts) - bare


def _probed_ns(vm: Vm, smp: int, texts: tuple[str, ...]) -> float:
    with Session.attach_vm(vm.info) as session:
        definitions = [parse_definition(text.format(f=_CALLED)) for text in texts]
        probes = session.define_many(definitions, tier="resident", inlined_copies=False)
        session.resident.reader.makes_events = False  # as a recording takes them: whole batches
        command = vm.start(_calls(smp))
        session.run(command=command)
        calls = _CALLS * _TIMES
        if any(probe.hits != calls for probe in probes):
            raise MachineError(f"{[probe.hits for probe in probes]} hits of {calls} calls")
        return _best(command.output.decode())


def _beside_gdb(rounds: int) -> Iterator[Figure]:
    # Hits a second of one function that system calls reach in a loop, in turn on one VM.
    ours, gdbs = [], []
    with clone(make_template(configure("6.1", smp=1))) as vm:
        for _ in range(rounds):
            calling = vm.start(f"caller 1 {_CALLS * _CALLS}")
            try:
                gdbs.append(hits_per_second_in_gdb(vm, "plain", _CALLED))
            finally:
                calling.discard()
            ours.append(1e9 / _probed_ns(vm, 1, _RESIDENT["entry"]))
    yield ratio("probes.resident.vs_gdb", ours, gdbs)
    yield figure("probes.resident.hits_per_s", ours, "1/s")


def _ring() -> Iterator[Figure]:
    # Once, from the guest to a file: what the host keeps up with, and that nothing is missing.
    with (
        clone(make_template(configure("6.1", smp=2))) as vm,
        Session.attach_vm(vm.info) as session,
        tempfile.TemporaryFile() as file,
    ):
        definition = parse_definition(f"p {_CALLED} pid")
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


def _ns_per_call(vm: Vm, smp: int) -> float:
    return _best(_guest(vm, _calls(smp)))


def _calls(smp: int) -> str:
    return "; ".join([f"caller {smp} {_CALLS}"] * _TIMES)


def _best(output: str) -> float:
    return min(float(line.split()[1]) for line in output.splitlines())


def _guest(vm: Vm, command: str) -> str:
    done = vm.execute(command, timeout_s=_GUEST_S)
    if done.status:
        raise MachineError(f"{command!r} in the guest failed: {done.output}")
    return done.output
