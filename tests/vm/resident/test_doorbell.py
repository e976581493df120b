"""Python handlers on busy functions: the same before, across and after the change of means."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.probes.event import Event
from kgdbx.probes.jprobe import Jprobe
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe
from kgdbx.probes.probe import Hit, Probe
from kgdbx.resident import guest_call
from kgdbx.symbols.tasks import Task

GuestOf = Callable[..., Any]
CALL = "__x64_sys_getpgid"
BUSY = 32  # hits before the first breakpoint gives way
CALLS = 1009


def rings(guest: Any, probe: Any) -> bool:
    """Whether a probe's place has a doorbell."""
    (site,) = (s for s in guest.session.probes.sites if s.address == probe.points[0].address)
    assert site.unpromoted == ""
    return site.resume is not None


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_each_hit_once(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel, smp=4)
    before = guest.text()
    tasks: Counter[str] = Counter()
    order: list[str] = []

    def entered(task: Task) -> None:
        tasks[task.comm] += 1
        order.append("p")

    first = guest.session.register(Kprobe(CALL, entered))
    guest.run(f"caller 4 {BUSY // 2}")
    assert (first.hits, rings(guest, first)) == (BUSY // 2, False)
    guest.run(f"caller 4 {CALLS}")  # across the change
    assert (first.hits, rings(guest, first)) == (BUSY // 2 + CALLS, True)
    second = guest.session.register(Kprobe(CALL, lambda regs: order.append(f"q{regs.di != 0}")))
    guest.run(f"caller 4 {CALLS}")  # a second probe at the same place
    assert (first.hits, second.hits) == (BUSY // 2 + 2 * CALLS, CALLS)
    assert {comm: n for comm, n in tasks.items() if comm.startswith("caller")} == {
        f"caller-{n}": BUSY // 8 + 2 * (CALLS // 4 + (n < CALLS % 4)) for n in range(4)
    }
    assert order == ["p"] * (BUSY // 2 + CALLS) + ["p", "qTrue"] * CALLS
    assert not (first.nmissed or first.nfaults or second.nfaults)
    first.unregister()
    second.unregister()
    guest.session.resident.close()
    assert guest.text() == before
    assert guest.run("caller 4 1009").startswith("1009 ")


def test_entry_and_return(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    by_task: dict[int, list[str]] = {}

    def note(what: str) -> Callable[[Task], None]:
        return lambda task: by_task.setdefault(task.pid, []).append(what)

    guest.session.register(Kprobe(CALL, note("in")))
    back = guest.session.register(Kretprobe(CALL, note("out"), maxactive=20))
    guest.run("caller 4 101")
    assert (back.hits, back.nmissed, back.nfaults) == (101, 0, 0)
    for own in by_task.values():
        assert own == ["in", "out"] * (len(own) // 2)


def test_handler_changes_registers(guest: Any) -> None:
    # getpgid() of a process that is not there, whatever is asked for; then at once another result.
    function = "do_getpgid"
    results: Counter[int] = Counter()

    def other(regs: Any) -> None:
        regs.di = 0x3FFFFFFF

    changing = guest.session.register(Kprobe(function, other))
    guest.session.register(
        Kretprobe(CALL, lambda retval: results.update((retval.value_(),)), maxactive=20)
    )
    guest.run("caller 2 150")
    assert rings(guest, changing)
    assert results == {-3: 150}  # -ESRCH
    changing.unregister()
    results.clear()

    def at_once(hit: Hit) -> bool:
        regs = hit.regs
        regs.rax = 4711
        regs.rip = hit.kernel.memory.read_u64(regs.rsp)
        regs.rsp += 8
        return True

    returning = guest.session.register(Kprobe(function, at_once))
    guest.run("caller 2 150")
    assert rings(guest, returning)
    assert results == {4711: 150}
    returning.unregister()
    guest.run("caller 2 10")
    assert 0 <= results.total() - results[4711] == 10


def test_stop_asked_for(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    hits, stopped, counts = 0, [], (10, 200, 250, 300, 350, 400, 450)

    def handler(hit: Hit) -> None:
        nonlocal hits
        hits += 1
        if hits in counts:
            stopped.append(hit.cpu)
            hit.stop()

    probe = guest.session.register(Kprobe(CALL, handler))
    command = guest.vm.start("caller 4 500")
    for count in counts:
        stop = guest.session.run(timeout_s=30)
        assert stop is not None
        assert (hits >= count, stop.cpu) == (True, stopped[-1])
        # It stands at the probe, or behind its displaced instruction, and nowhere of ours.
        where = guest.kernel.target.read_registers(stop.cpu).rip
        assert guest.kernel.symbolize(where).startswith(CALL)
    guest.session.run(command=command, timeout_s=30)
    assert command.wait(5).output.startswith("500 ")
    assert hits == probe.hits == 500


def test_stop_asked_for_in_a_call_that_another_handler_has_made(guest: Any) -> None:
    asked = []

    def places(p: Kprobe) -> None:
        if p.hits == 1:
            guest.session.define("p vfs_read count", tier="resident")

    def asks(hit: Hit) -> None:
        asked.append(hit.cpu)
        hit.stop()

    guest.session.register(Kprobe(CALL, places))
    asker = guest.session.register(Kprobe("alloc_pages_exact", asks))  # which placing calls
    command = guest.vm.start("caller 2 7")
    stop = guest.session.run(timeout_s=30)
    assert stop is not None and {stop.cpu} == set(asked)
    asker.unregister()
    guest.session.run(command=command, timeout_s=30)
    assert command.wait(5).output.startswith("7 ")


@pytest.mark.parametrize("first", ["bell", "resident"])
def test_resident_probes_at_the_same_place(guest: Any, first: str) -> None:
    # They see what a handler has made of the call, whichever was there first, and returns go
    # through both.
    before = guest.text()
    events: list[Event] = []
    guest.session.event_listeners.append(events.append)
    asked = []

    def other(regs: Any, p: Kprobe, hit: Hit) -> None:
        regs.di = 0x3FFFFFFF
        if p.hits == 200:
            asked.append(p.hits)
            hit.stop()

    def place() -> list[Any]:
        text = ("p:res/in do_getpgid pid=%di:s32", "r64:res/out do_getpgid $retval:s32")
        return [p for t in text for p in guest.session.define(t, tier="resident")]

    probes = place() if first == "resident" else []
    changing = guest.session.register(Kprobe("do_getpgid", other))
    guest.run("caller 2 100")
    assert rings(guest, changing)
    probes = probes or place()
    events.clear()
    results: Counter[int] = Counter()
    back = guest.session.register(
        Kretprobe("do_getpgid", lambda retval: results.update((retval.value_(),)), maxactive=20)
    )
    hits = [p.hits for p in probes]
    command = guest.vm.start("caller 2 150")
    assert guest.session.run(timeout_s=30) is not None
    guest.session.run(command=command, timeout_s=60)
    assert command.wait(5).output.startswith("150 ")
    assert rings(guest, changing) and asked == [200]
    assert [p.hits - n for p, n in zip(probes, hits, strict=True)] == [150, 150]
    assert results == {-3: 150} and (back.hits, changing.hits) == (150, 250)  # -ESRCH
    values = Counter(str(value) for e in events for value in e.fields.values())
    assert values == {str(0x3FFFFFFF): 150, "-3": 150}
    for probe in (*probes, changing, back):
        probe.unregister()
    guest.session.resident.close()
    assert guest.text() == before


def test_busy_while_the_guest_makes_calls(
    guest_of: GuestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is being placed is not disturbed: the breakpoint gives way later.
    monkeypatch.setattr(guest_call, "_CAPTURE_S", 100.0)
    guest = guest_of(smp=4)
    command = guest.vm.start("caller 4 100000000")
    for turn in range(12):
        probe = guest.session.register(Kprobe(CALL, lambda task: None))
        (site,) = (s for s in guest.session.probes.sites if s.address == probe.points[0].address)
        while not site.hits:
            guest.session.run(timeout_s=0.01)
        site.hits = BUSY - 1  # the next one is enough
        started = time.monotonic()
        guest.session.define(f"p vfs_read n={turn}", tier="resident")
        assert time.monotonic() - started < 60
        until = time.monotonic() + 30
        while not rings(guest, probe):
            assert time.monotonic() < until
            guest.session.run(timeout_s=0.02)
        probe.unregister()
    command.discard()


def test_a_probe_where_the_guest_is_taken_for_calls(guest: Any) -> None:
    seen: list[int] = []
    probe = guest.session.register(Kprobe("irq_enter_rcu", lambda hit: seen.append(hit.cpu)))
    for n in range(3):
        before = len(seen)
        guest.session.define(f"p vfs_read n={n}", tier="resident")
        guest.run("caller 1 3")
        assert len(seen) > before + 1
    assert probe.hits == len(seen) and not probe.nfaults


def test_interrupted_while_a_handler_has_the_guest_make_calls(guest: Any) -> None:
    placed: list[Probe] = []

    def handler(p: Kprobe) -> None:
        if p.hits == 3:
            signal.raise_signal(signal.SIGINT)
            placed.extend(guest.session.define("p vfs_read count", tier="resident"))

    probe = guest.session.register(Kprobe(CALL, handler))
    command = guest.vm.start("caller 1 100000000")
    started = time.monotonic()
    assert guest.session.run(timeout_s=60) is None
    assert time.monotonic() - started < 30
    assert [p.tier for p in placed] == ["resident"] and not probe.nfaults
    command.discard()


def test_unregistered_from_the_handler(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    before = guest.text()

    def handler(hit: Hit) -> None:
        if probe.hits == 300:
            probe.unregister()
            other.append(guest.session.register(Kprobe(CALL, lambda task: None)))

    other: list[Kprobe] = []
    probe = guest.session.register(Kprobe(CALL, handler))
    guest.run(f"caller 4 {CALLS}")
    assert probe.hits == 300
    assert CALLS - 300 <= other[0].hits + 1 <= CALLS - 300 + 1
    other[0].unregister()
    guest.session.resident.close()
    assert guest.text() == before


def test_handler_that_raises(guest: Any) -> None:
    def handler(hit: Hit) -> None:
        raise ValueError("no")

    probe = guest.session.register(Kprobe(CALL, handler))
    assert guest.run("caller 2 300").startswith("300 ")
    assert (probe.hits, probe.nfaults) == (300, 300)
    assert rings(guest, probe)


def test_arguments_of_a_jprobe(guest: Any) -> None:
    names: Counter[str] = Counter()

    def opened(dfd: Any, filename: Any, hit: Hit) -> None:
        cr3 = hit.regs.cr3
        name = hit.kernel.memory.read_string(filename.value_(), cr3=cr3)
        names[name.decode()] += dfd.value_() == -100

    probe = guest.session.register(Jprobe("do_sys_openat2", opened))
    guest.run("opener 2 300 /no/such/file")
    assert rings(guest, probe)
    assert names["/no/such/file"] == 300


def test_runs_that_end_all_the_time(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    counts: Counter[str] = Counter()
    guest.session.register(Kprobe(CALL, lambda task: counts.update((task.comm[:7],))))
    guest.run("caller 4 100")
    command = guest.vm.start("caller 4 503")
    turns = 0
    while command.poll() is None:
        guest.session.run(timeout_s=0.002 * (1 + turns % 7))
        turns += 1
        assert turns < 5000
    assert counts["caller-"] == 603


def test_stops_of_the_user_between(guest_of: GuestOf) -> None:
    guest = guest_of(smp=4)
    probe = guest.session.register(Kprobe(CALL, lambda regs: None))
    back = guest.session.define(f"r30:out {CALL} $retval")[0]
    assert back.tier == "resident"
    guest.run("caller 4 200")
    stops: list[object] = []

    def interrupt() -> None:
        guest.session.target.request_stop()

    command = guest.vm.start("caller 4 1009")
    for _ in range(3):
        timer = threading.Timer(0.05, interrupt)
        timer.start()
        stops.append(guest.session.run(timeout_s=10))
        timer.join()
    guest.session.run(command=command, timeout_s=30)
    assert command.wait(5).output.startswith("1009 ")
    assert probe.hits == back.hits == 1209


def test_a_function_that_ftrace_does_not_patch_keeps_its_breakpoint(guest: Any) -> None:
    # A doorbell would do the first instruction, mov $512,%ecx, after both handlers, or never.
    counts: Counter[int] = Counter()

    def before(regs: Any) -> None:
        regs.cx = 7

    def after(regs: Any) -> None:
        counts[regs.cx] += 1

    probe = guest.session.register(Kprobe("clear_page_rep", before, post_handler=after))
    while probe.hits < 2 * BUSY:
        guest.run("caller 1 7")  # a program's pages
    assert counts == {512: probe.hits}


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_our_own_probes_leave_no_breakpoint_beside_resident_ones(
    guest_of: GuestOf, kernel: str
) -> None:
    guest = guest_of(kernel)
    before = guest.text()
    (init,) = guest.session.define("p dummy:dummy_init_module")
    assert any(site.resume is None for site in guest.session.probes.sites)
    guest.session.define(f"p {CALL}", tier="resident")
    sites = guest.session.probes.sites
    assert len(sites) == 5  # the loader's three, ftrace's two
    assert [site.unpromoted for site in sites if site.resume is None] == []
    guest.run("modprobe dummy")
    assert (init.hits, init.tier) == (1, "resident")
    # Somebody else's handler may change registers there.
    (found,) = guest.kernel.functions("ftrace_module_enable")
    loading = guest.session.register(Kprobe("ftrace_module_enable", lambda regs: None))
    (site,) = (s for s in guest.session.probes.sites if s.address == found.address)
    assert site.resume is None
    for turn in (2, 3):
        guest.run("rmmod dummy && modprobe dummy")
        assert (init.hits, loading.hits) == (turn, turn - 1)
    assert not guest.session.probes.stray_stops
    guest.session.probes.close()
    guest.session.resident.close()
    assert guest.text() == before


def test_taken_out_while_it_rings(guest_of: GuestOf) -> None:
    # A vCPU that is on its way to the bell rings when the probe has gone: nobody is to wait then.
    guest = guest_of(smp=4)
    before = guest.text()
    kept = guest.session.register(Kprobe("do_getpgid", lambda regs: None))
    guest.run("caller 4 150")
    assert rings(guest, kept)
    kept.unregister()
    command = guest.vm.start("caller 4 100000000")
    late = 0
    for _ in range(6):
        probe = guest.session.register(Kprobe(CALL, lambda regs: None))
        while probe.hits <= 2 * BUSY:
            guest.session.run(timeout_s=0.05)
        assert rings(guest, probe)
        probe.unregister()
        guest.session.run(timeout_s=0.05)
        late += len(guest.session.resident.engine.waiting())
    assert late == 0
    command.discard()
    guest.session.resident.close()
    assert guest.text() == before


def test_nobody_answers(guest: Any) -> None:
    # As when kgdbx was killed: the guest must not stand still for a second at each call.
    probe = guest.session.register(Kprobe(CALL, lambda regs: None))
    guest.run("caller 1 100")
    assert rings(guest, probe)
    guest.session.resident.doorbell.close()
    ns_per_call = int(guest.run("caller 1 31").split()[1])
    assert 50e6 < ns_per_call < 200e6  # 1 s, 1/2, 1/4, 1/8, 1/16, and 26 times 1/32
    guest.session.resident.doorbell.watch()
    hits = probe.hits
    guest.run("caller 1 31")
    assert (probe.hits, probe.nmissed) == (hits + 31, 31)
    assert guest.run("caller 1 31").split()[0] == "31"
