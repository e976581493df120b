"""What one call of a kernel function takes: bare, with the kernel's own event, with our probe.

A cost is what a call takes with the probe minus what it takes without: both are measured by the
guest's own clock, one after the other, and each is the best of several runs, as what else the
machine does only ever adds.
"""

from kgdbx.attach import attach_vm
from kgdbx.errors import MachineError
from kgdbx.machine.vm import Vm
from kgdbx.probes.definition import parse_definition

__all__ = (
    "CALLED",
    "CALLS",
    "KERNEL",
    "RESIDENT",
    "TIMES",
    "best_ns",
    "calls_text",
    "kernel_ns",
    "ns_per_call",
    "probed_ns",
    "resident_ns",
)

CALLED = "do_getpgid"  # long do_getpgid(pid_t pid), kernel/sys.c
CALLS = 100_000
TIMES = 5

RESIDENT = {
    "entry": ("p {f} pid %si",),
    "return": ("p {f} pid %si", "r {f} $retval"),
    "filtered": ("p {f} pid %si if pid == 77",),
}
KERNEL = {
    "entry": ("p:k/e {f} pid=%di si=%si",),
    "return": ("p:k/e {f} pid=%di si=%si", "r:k/f {f} ret=$retval"),
}

_GUEST_S = 120
_TRACEFS = "/sys/kernel/tracing"


def kernel_ns(vm: Vm, smp: int, texts: tuple[str, ...]) -> float:
    """Cost of the kernel's own kprobe events, ns a call.

    :param texts: lines for ``kprobe_events``, such as those of ``KERNEL``
    :raises MachineError: if the guest refuses them
    """
    bare = ns_per_call(vm, smp)
    define = "; ".join(
        f"echo '{text.format(f=CALLED)}' >> {_TRACEFS}/kprobe_events" for text in texts
    )
    _guest(vm, f"{define}; echo 1 > {_TRACEFS}/events/k/enable")
    try:
        return ns_per_call(vm, smp) - bare
    finally:
        _guest(vm, f"echo 0 > {_TRACEFS}/events/k/enable; echo > {_TRACEFS}/kprobe_events")


def resident_ns(vm: Vm, smp: int, texts: tuple[str, ...]) -> float:
    """Cost of resident probes, ns a call.

    :param texts: definitions, such as those of ``RESIDENT``
    :raises MachineError: if a hit was missed
    """
    bare = ns_per_call(vm, smp)
    return probed_ns(vm, smp, texts) - bare


def probed_ns(vm: Vm, smp: int, texts: tuple[str, ...]) -> float:
    """What a call takes with resident probes, ns.

    :raises MachineError: if a hit was missed
    """
    with attach_vm(vm.info) as session:
        definitions = [parse_definition(text.format(f=CALLED)) for text in texts]
        probes = session.define_many(definitions, tier="resident", inlined_copies=False)
        session.resident.reader.makes_events = False  # as a recording takes them: whole batches
        command = vm.start(calls_text(smp))
        session.run(command=command)
        calls = CALLS * TIMES
        if any(probe.hits != calls for probe in probes):
            raise MachineError(f"{[probe.hits for probe in probes]} hits of {calls} calls")
        return best_ns(command.output.decode())


def ns_per_call(vm: Vm, smp: int) -> float:
    """What a call takes now, ns.

    :raises MachineError: if the workload fails
    """
    return best_ns(_guest(vm, calls_text(smp)))


def calls_text(smp: int) -> str:
    """The workload as a shell command: ``TIMES`` runs of ``CALLS`` calls over *smp* threads."""
    return "; ".join([f"caller {smp} {CALLS}"] * TIMES)


def best_ns(output: str) -> float:
    """The best run of those that the workload printed, ns a call."""
    return min(float(line.split()[1]) for line in output.splitlines())


def _guest(vm: Vm, command: str) -> str:
    done = vm.execute(command, timeout_s=_GUEST_S)
    if done.status:
        raise MachineError(f"{command!r} in the guest failed: {done.output}")
    return done.output
