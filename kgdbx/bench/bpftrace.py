"""Debian's bpftrace in the guest, beside probes of ours at the same function of the same VM.

bpftrace makes BPF programs of its one-liners; printed events go through a perf buffer to its
process in the guest, which has a vCPU to share with the workload, and those that find the buffer
full are lost.
"""

import sys
from collections.abc import Iterator

from kgdbx.bench.calls import (
    CALLED,
    CALLS,
    KERNEL,
    RESIDENT,
    TIMES,
    best_ns,
    calls_text,
    kernel_ns,
    ns_per_call,
    resident_ns,
)
from kgdbx.bench.figure import Figure, figure, ratio
from kgdbx.errors import MachineError
from kgdbx.machine.bpftrace import bpftrace_files
from kgdbx.machine.vm import Vm, configure, launch

__all__ = ("measure",)

_MEMORY_BYTES = 1 << 30  # the root file system is RAM, 200 MiB of it libraries
_GUEST_S = 240
_SMP = 1
_EVENTS = CALLS * TIMES
# In this order: ours at the entry runs between `entry` and `count`.
_PROGRAMS = {
    "entry": r'kprobe:{f} {{ printf("%d %d\n", arg0, arg1); }}',
    "count": "kprobe:{f} {{ @ = count(); }}",
    "return": r'kprobe:{f} {{ printf("%d %d\n", arg0, arg1); }} '
    r'kretprobe:{f} {{ printf("%d\n", retval); }}',
    "filtered": r'kprobe:{f} /arg0 == 77/ {{ printf("%d %d\n", arg0, arg1); }}',
}
_PRINTED = {"entry": _EVENTS, "return": 2 * _EVENTS, "filtered": 0}
# It waits for events, in epoll_wait(2), once all probes are attached; SIGINT ends it.
_RUN = """
bpftrace -B full -e '{program}' > /tmp/bpftrace 2>&1 &
until grep -q '^232 ' /proc/$!/syscall; do
    kill -0 $! || {{ cat /tmp/bpftrace; exit 1; }}
    usleep 100000
done
{calls}
kill -INT $!
wait $! || {{ cat /tmp/bpftrace; exit 1; }}
awk '/^[0-9]/ {{ n++ }} /^@: / {{ n = $2 }} END {{ print n + 0 }}' /tmp/bpftrace
"""


def measure(rounds: int) -> Iterator[Figure]:
    """Costs of bpftrace's probes, and ours over them; nothing but a word if it cannot be had.

    :param rounds: how often everything is measured, in turn
    :raises MachineError: if bpftrace fails in the guest, or does not count what was called
    """
    try:
        files = bpftrace_files()
    except MachineError as e:
        print(f"kgdbx: bpftrace is left out: {' '.join(str(e).split())}", file=sys.stderr)
        return
    samples: dict[str, list[float]] = {}
    # Not a clone: a template with these libraries would keep some 500 MB of the host's RAM.
    with launch(configure("6.1", smp=_SMP, memory_bytes=_MEMORY_BYTES, files=files)) as vm:
        vm.wait_booted()
        for _ in range(rounds):
            for name, value in _round(vm):
                samples.setdefault(name, []).append(value)
    for name in ("entry", "filtered"):
        ours, theirs = samples[f"resident.{name}"], samples[f"bpftrace.{name}_ns"]
        yield ratio(f"probes.resident.{name}.vs_bpftrace", ours, theirs)
    ours, counted = samples["resident.entry"], samples["bpftrace.count_ns"]
    yield ratio("probes.resident.entry.vs_bpftrace_count", ours, counted)
    entry = samples["bpftrace.entry_ns"]
    yield ratio("probes.bpftrace.entry.vs_kprobe", entry, samples["kernel.entry"])
    for name in _PROGRAMS:
        yield figure(f"probes.bpftrace.{name}_ns", samples[f"bpftrace.{name}_ns"], "ns")
    for name in ("entry", "return"):
        yield figure(f"probes.bpftrace.{name}_lost", samples[f"bpftrace.{name}_lost"], "%")


def _round(vm: Vm) -> Iterator[tuple[str, float]]:
    yield "kernel.entry", kernel_ns(vm, _SMP, KERNEL["entry"])
    for name in _PROGRAMS:
        cost, seen = _bpftrace_ns(vm, name)
        yield f"bpftrace.{name}_ns", cost
        wanted = _PRINTED.get(name, _EVENTS)
        if name in ("entry", "return") and 0 < seen <= wanted:
            yield f"bpftrace.{name}_lost", 100 * (1 - seen / wanted)
        elif seen != wanted:
            raise MachineError(f"bpftrace's {name} program saw {seen} events of {wanted}")
        if name in ("entry", "filtered"):
            yield f"resident.{name}", resident_ns(vm, _SMP, RESIDENT[name])


# The cost of a call in ns, and the events that bpftrace printed or counted.
def _bpftrace_ns(vm: Vm, name: str) -> tuple[float, int]:
    bare = ns_per_call(vm, _SMP)
    program = _PROGRAMS[name].format(f=CALLED)
    done = vm.execute(_RUN.format(program=program, calls=calls_text(_SMP)), _GUEST_S)
    if done.status:
        raise MachineError(f"bpftrace -e '{program}' in the guest failed: {done.output}")
    calls, _, seen = done.output.strip().rpartition("\n")
    return best_ns(calls) - bare, int(seen)
