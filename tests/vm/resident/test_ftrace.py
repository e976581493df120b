"""The guest's own tracers and probes beside resident probes: ftrace finds what it expects."""

from collections.abc import Callable
from typing import Any

from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.probe import HandlerFault, Probe

FUNCTION = "__x64_sys_getpgid"
CALLS = 53
TRACE = "/sys/kernel/tracing"
WORK = f"caller 2 {CALLS} > /dev/null"
# ftrace may have no time to note a task's name.
LINES = f"grep -cE '(caller|<[.]+>)-.*{FUNCTION}' {TRACE}/trace; true"


def test_ftrace_may_trace_what_we_probe(guest: Any) -> None:
    faults: list[tuple[Probe, HandlerFault]] = []
    guest.session.probes.fault_listeners.append(lambda *fault: faults.append(fault))
    text = guest.text()
    (entry,) = guest.session.define(f"p {FUNCTION}", tier="resident")
    (back,) = guest.session.define(f"r {FUNCTION}", tier="resident")
    (other,) = guest.session.define("p __x64_sys_getpriority", tier="resident")
    assert list(guest.session.probes) == [entry, back, other]
    guest.run(WORK)
    assert (entry.hits, back.hits) == (CALLS, CALLS)
    guest.run(
        f"echo {FUNCTION} > {TRACE}/set_ftrace_filter; echo function > {TRACE}/current_tracer"
    )
    assert [probe for probe, _ in faults] == [entry, back]
    assert "lifted as long as the guest's own ftrace traces the function" in str(faults[0][1].error)
    assert entry.tier_reason.startswith("lifted") and not other.tier_reason
    assert guest.run(f"{WORK}; {LINES}").split() == [str(CALLS)]
    assert (entry.hits, back.hits) == (CALLS, CALLS)
    # A probe taken out meanwhile leaves ftrace's call alone.
    back.unregister()
    assert guest.run(f"{WORK}; {LINES}").split() == [str(2 * CALLS)]
    guest.run(f"echo nop > {TRACE}/current_tracer; {WORK}")
    assert not entry.tier_reason
    assert entry.hits == 2 * CALLS
    # The kernel's own kprobes come by way of ftrace, too.
    event = f"echo 'p:k/e {FUNCTION}' > {TRACE}/kprobe_events; echo 1 > {TRACE}/events/k/enable"
    assert guest.run(f"{event}; {WORK}; grep -c 'e: ({FUNCTION}' {TRACE}/trace").split() == [
        str(CALLS)
    ]
    assert entry.tier_reason
    guest.run(f"echo 0 > {TRACE}/events/k/enable; echo > {TRACE}/kprobe_events; {WORK}")
    assert entry.hits == 3 * CALLS
    assert "WARNING" not in guest.run("dmesg")
    entry.unregister()
    other.unregister()
    assert guest.text() == text


def test_ftrace_may_trace_where_a_doorbell_is(guest: Any) -> None:
    tasks: list[str] = []
    probe = guest.session.register(Kprobe(FUNCTION, lambda task: tasks.append(task.comm)))
    guest.run("caller 2 100")
    (site,) = (s for s in guest.session.probes.sites if s.address == probe.points[0].address)
    assert site.resume is not None
    guest.run(
        f"echo {FUNCTION} > {TRACE}/set_ftrace_filter; echo function > {TRACE}/current_tracer"
    )
    assert site.resume is None
    assert guest.run(f"{WORK}; {LINES}").split() == [str(CALLS)]
    assert probe.hits == len(tasks) == 100 + CALLS


def test_no_hit_is_lost_where_ftrace_begins_to_trace(guest_of: Callable[..., Any]) -> None:
    # Some wait at the doorbell, or are on their way to it, when the breakpoint takes its place.
    guest = guest_of(smp=4)
    guest.run(f"echo {FUNCTION} > {TRACE}/set_ftrace_filter")
    for turn in range(4):
        probe = guest.session.register(Kprobe(FUNCTION, lambda task: None, name=f"p{turn}"))
        (site,) = (s for s in guest.session.probes.sites if s.address == probe.points[0].address)
        command = guest.vm.start("caller 4 211")
        while site.resume is None:
            guest.session.run(timeout_s=0.1)
        on = guest.vm.start(f"echo function > {TRACE}/current_tracer")
        guest.session.run(command=on, timeout_s=60)
        assert site.resume is None
        guest.session.run(command=command, timeout_s=60)
        assert command.wait(5).output.startswith("211 ")
        assert (probe.hits, probe.nmissed, probe.nfaults) == (211, 0, 0)
        probe.unregister()
        guest.run(f"echo nop > {TRACE}/current_tracer")


def test_a_probe_where_a_resident_one_is_lifted(guest: Any) -> None:
    guest.session.define(f"p {FUNCTION}", tier="resident")
    guest.run(
        f"echo {FUNCTION} > {TRACE}/set_ftrace_filter; echo function > {TRACE}/current_tracer"
    )
    probe = guest.session.register(Kprobe(FUNCTION, lambda task: None))
    guest.run("caller 2 101")
    assert probe.hits == 101


def test_calls_that_a_kretprobe_of_the_guests_own_has_taken_over(guest: Any) -> None:
    # __x64_sys_read() jumps to ksys_read(): the kernel's kretprobe there finds our address on the
    # stack and keeps it, with its own in the place.
    event = f"echo 'r:k/r ksys_read' > {TRACE}/kprobe_events; echo 1 > {TRACE}/events/k/enable"
    guest.run(event)
    (gone,) = guest.session.define("r4096:gone __x64_sys_read $retval", tier="resident")
    guest.session.define(f"p {FUNCTION}", tier="resident")
    reader = guest.vm.start("(sleep 1; echo one; sleep 1; echo two) | cat")
    guest.session.run(timeout_s=0.5)
    gone.unregister()
    for n in range(4):
        guest.session.define(f"r1000 __x64_sys_getpriority $retval n={n}", tier="resident")
    guest.session.run(command=reader, timeout_s=30)
    assert reader.wait(5).output == "one\ntwo\n"
    assert "BUG" not in guest.run("dmesg")


def test_leaving_waits_for_such_calls(guest: Any) -> None:
    guest.run(f"echo 'r:k/r ksys_read' > {TRACE}/kprobe_events; echo 1 > {TRACE}/events/k/enable")
    guest.session.define("r:gone __x64_sys_read $retval", tier="resident")
    reader = guest.vm.start("(sleep 3; echo one) | cat")
    guest.session.run(timeout_s=1)
    guest.session.resident.close()
    assert not guest.session.resident.engine.is_open
    guest.session.run(command=reader, timeout_s=30)
    assert reader.wait(5).output == "one\n"
    assert "BUG" not in guest.run("dmesg")
