"""Fifty probes in a guest that does all at once what is hard for them, and what is exact after it.

Four vCPUs in system calls, threads that hop between them, processes that come and go, a module that
is loaded and unloaded: the counts are then those of the programs themselves, and those of kprobe
events of the kernel's own, one instruction behind ours.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from drgn.helpers.linux.list import list_for_each_entry

from kgdbx.attach import attach_vm
from kgdbx.bench.figure import Figure, figure
from kgdbx.errors import MachineError
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import Vm, configure
from kgdbx.probes.definition import parse_definition
from kgdbx.probes.probe import Probe
from kgdbx.resident.probe import ResidentProbe
from kgdbx.session import Session

__all__ = ("measure",)

_TRACEFS = "/sys/kernel/tracing"
_MASK = (1 << 64) - 1
_END_S = 120
_SETTLE_S = 60
_WORK = """\
rm -f /tmp/end
again() {
	what=$1 each=$2 n=0; shift 2
	while [ ! -e /tmp/end ]; do "$@" > /dev/null; n=$((n + each)); done
	echo $what $n
}
load() { modprobe dummy; rmmod dummy; }
again calls 10007 caller 4 10007 & again opens 1009 opener -m 4 1009 &
again processes 1 sh -c 'exec true' & again modules 1 load & wait
"""
_CALLED, _OPENED = "__x64_sys_getpgid", "do_sys_openat2"
# Counted by the kernel, too. None of these waits long: their calls are over when the work is.
_SHORT = (
    "vfs_open",
    "vfs_statx",
    "do_filp_open",
    "do_dentry_open",
    "path_openat",
    "kernel_clone",
    "copy_process",
    "begin_new_exec",
    "mmput",
    "vm_mmap_pgoff",
    "do_mprotect_pkey",
    "find_vma",
    "fput",
    "filp_close",
    "exit_fs",
    "setup_arg_pages",
    "wake_up_new_task",
    "exit_files",
    "sched_setaffinity",
    "__alloc_pages",
)
_BUSY = ("__kmalloc", "kfree", "try_to_wake_up", "update_process_times", "dummy:dummy_setup")


@dataclass(frozen=True)
class _Counted:
    # What one probe counted, and what somebody else did.
    what: str
    ours: int
    theirs: int


def measure(minutes: float) -> Iterator[Figure]:
    """Run it, and give what was counted.

    :param minutes: how long
    :raises MachineError: if a count is wrong, the kernel complains, or something of ours stays
    """
    with clone(make_template(configure("6.1", smp=4, modules=("dummy",)))) as vm:
        with attach_vm(vm.info) as session:
            session.resident.reader.makes_events = False
            placed = _place(vm, session)
            before = _kernel_counts(session)
            first = {probe: probe.hits for probe in placed.values()}
            done = _work(vm, session, minutes)
            _settle(session, placed.values())
            counts = list(_counted(session, placed, first, before, done))
            wrong = [f"{c.what}: {c.ours} of {c.theirs}" for c in counts if c.ours != c.theirs]
            hits = sum(probe.hits for probe in session.probes)
            missed = sum(probe.nmissed for probe in session.probes)
            lost = session.resident.engine.lost()
            number = len(session.probes)
            _kernel_events(vm, session, "")
            sites = [
                program.displacement
                for probe in placed.values()
                if isinstance(probe, ResidentProbe)
                for program in probe.programs
            ]
            session.probes.close()
            wrong += [
                f"{session.kernel.symbolize(each.address)} is not what it was"
                for each in sites
                if session.kernel.read_code(each.address, len(each.original)) != each.original
            ]
        wrong += _complaints(vm)
    if wrong:
        raise MachineError("; ".join(wrong))
    yield figure("stress.minutes", [minutes], "min")
    yield figure("stress.probes", [number], "1")
    yield figure("stress.hits", [hits], "1")
    yield figure("stress.missed", [missed], "1")
    yield figure("stress.records_lost", [lost], "1")
    yield figure("stress.counts_exact", [len(counts)], "1")
    for what, count in done.items():
        yield figure(f"stress.{what}", [count], "1")


def _place(vm: Vm, session: Session) -> dict[str, Probe]:
    # The kernel's kprobe events come first: they go one instruction behind our jumps.
    kernel = session.kernel
    events = []
    for name in _SHORT:
        function = kernel.functions(name)[0]
        behind = session.resident.engine.displacement(function, function.address).resume
        events.append(f"p:k/{name.strip('_')} {name}+{behind - function.address}")
    _kernel_events(vm, session, "\\n".join(events))
    texts = {
        "call": f"p:call {_CALLED} pid=%si $comm",
        "called": f"r64:called {_CALLED} $retval $kstack:4",
        "by_name": f'p:by_name {_OPENED} @opens = count() if $comm ~ "opener-*"',
        "opened": f"r64:opened {_OPENED} filename:ustring $retval $duration_ns",
    }
    texts |= {name: f"p:{name.strip('_')} {name} @calls[$func,$comm] = count()" for name in _SHORT}
    texts |= {f"r {name}": f"r256:{name.strip('_')}_r {name} $duration_ns" for name in _SHORT}
    texts |= {
        name: f"p:busy_{name.strip('_').replace(':', '_')} {name} @busy[$kstack:6] = count()"
        for name in _BUSY
    }
    texts["freed"] = "r256:freed kfree @ns = hist($duration_ns)"
    definitions = map(parse_definition, texts.values())
    probes = session.define_many(definitions, tier="resident", inlined_copies=False)
    return dict(zip(texts, probes, strict=True))


def _kernel_events(vm: Vm, session: Session, definitions: str) -> None:
    enable = f"{_TRACEFS}/events/k/enable"
    if definitions:
        define = f"echo -e '{definitions}' > {_TRACEFS}/kprobe_events; echo 1 > {enable}"
        _guest(vm, session, f"{define}; cat {enable}")
    else:
        _guest(vm, session, f"echo 0 > {enable}; echo > {_TRACEFS}/kprobe_events")


def _kernel_counts(session: Session) -> dict[str, int]:
    # struct trace_kprobe's counters, while the kernel stands: those of kprobe_profile.
    kernel, program = session.kernel, session.kernel.program
    cpus = kernel.memory.read_u32(kernel.address("nr_cpu_ids"))
    table = kernel.address("__per_cpu_offset")
    offsets = [kernel.memory.read_u64(table + 8 * cpu) for cpu in range(cpus)]
    found = {}
    head = program["dyn_event_list"].address_of_()
    for event in list_for_each_entry("struct trace_kprobe", head, "devent.list"):
        counter = int(event.nhit)
        hits = sum(kernel.memory.read_u64((counter + offset) & _MASK) for offset in offsets)
        name = event.tp.event.call.name.string_().decode()
        found[name] = hits + int(event.rp.kp.nmissed)
    return found


def _work(vm: Vm, session: Session, minutes: float) -> dict[str, int]:
    work = vm.start(_WORK)
    session.run(timeout_s=60 * minutes, command=work)
    _guest(vm, session, "touch /tmp/end")
    session.run(timeout_s=_END_S, command=work)
    if work.poll() != 0:
        raise MachineError(f"the guest's work did not end: {work.output.decode()!r}")
    pairs = (line.split() for line in work.output.decode().splitlines())
    done = {what: int(count) for what, count in pairs}
    work.discard()
    return done


def _settle(session: Session, probes: Iterable[Probe]) -> None:
    # The last processes are still on their way out.
    deadline = time.monotonic() + _SETTLE_S
    while used := _slots_in_use(session, probes):
        if time.monotonic() > deadline:
            raise MachineError(f"return slots are still in use: {used}")
        session.run(timeout_s=0.5)


def _slots_in_use(session: Session, probes: Iterable[Probe]) -> dict[str, int]:
    engine = session.resident.engine
    used = {
        probe.name: sum(len(engine.returns.pending(program)) for program in probe.programs)
        for probe in probes
        if isinstance(probe, ResidentProbe)
    }
    return {name: count for name, count in used.items() if count}


def _counted(
    session: Session,
    placed: dict[str, Probe],
    first: dict[Probe, int],
    before: dict[str, int],
    done: dict[str, int],
) -> Iterator[_Counted]:
    def hits(key: str) -> int:
        return placed[key].hits - first[placed[key]]

    yield _Counted(f"calls of {_CALLED}", hits("call"), done["calls"])
    back = hits("called") + placed["called"].nmissed
    yield _Counted(f"returns of {_CALLED}", back, done["calls"])
    maps = {each.name: each for each in session.resident.maps.read()}
    opens = sum(row.value for row in maps["opens"].rows) + maps["opens"].lost
    yield _Counted(f"opens of {_OPENED}", opens, done["opens"])
    back = hits("opened") + placed["opened"].nmissed
    yield _Counted(f"returns of {_OPENED}", back, hits("by_name"))
    after = _kernel_counts(session)
    for name in _SHORT:
        key = name.strip("_")
        yield _Counted(f"calls of {name}", hits(name), after[key] - before[key])
        back = hits(f"r {name}") + placed[f"r {name}"].nmissed
        yield _Counted(f"returns of {name}", back, hits(name))


def _complaints(vm: Vm) -> list[str]:
    text = _output(vm, "dmesg")
    words = ("WARNING:", "BUG:", "Oops", "general protection", "refcount_t")
    return [line for line in text.splitlines() if any(word in line for word in words)]


def _guest(vm: Vm, session: Session, command: str) -> None:
    started = vm.start(command)
    session.run(timeout_s=_END_S, command=started)
    if started.poll() is None:
        raise MachineError(f"{command!r} did not end in {_END_S} s")
    started.discard()


def _output(vm: Vm, command: str) -> str:
    return vm.execute(command, timeout_s=_END_S).output
