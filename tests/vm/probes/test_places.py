"""Where probes go: interrupt handlers, noinstr code, early boot, inlined copies, clones, lines."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.attach import attach_vm
from kgdbx.errors import ProbeError
from kgdbx.machine.vm import configure, launch
from kgdbx.probes.event import Event
from kgdbx.probes.jprobe import Jprobe
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe
from kgdbx.resident.place.displacement import CannotDisplace
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.tasks import Task

CALLS = 23
GuestOf = Callable[..., Any]

# Interrupt and exception paths; most are in .noinstr.text or on kprobes' blacklist, where the
# kernel's own probes refuse to go.
_FORBIDDEN = (
    "exc_page_fault",
    "irqentry_enter",
    "irqentry_exit",
    "asm_exc_page_fault",
    "do_syscall_64",
    "tick_nohz_handler",
    "__do_softirq",
    "hrtimer_interrupt",
    "native_sched_clock",
    "entry_SYSCALL_64",
)


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_interrupts_exceptions_and_noinstr_code(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    hits: Counter[str] = Counter()
    probes = []
    for name in _FORBIDDEN:
        if not guest.kernel.vmlinux.lookup(name):
            continue

        def handler(p: Kprobe) -> None:
            hits[p.name] += 1
            if hits[p.name] == 11:
                p.unregister()

        probes.append(guest.session.register(Kprobe(name, handler, name=name)))
    never = {"tick_nohz_handler"} if kernel == "6.1" else set()  # high resolution: another one
    expected = {p.name: 11 for p in probes if p.name not in never}
    end = time.monotonic() + 60
    while time.monotonic() < end and any(hits[name] < 11 for name in expected):
        guest.run("usleep 300000; caller 2 1009 >/dev/null; /bin/true; /bin/true")
    assert {name: hits[name] for name in expected} == expected
    assert all(p.nfaults == 0 for p in probes)
    assert guest.run("caller 2 101").startswith("101 ")


def test_from_the_first_c_function_on() -> None:
    # Kernel 6.1 alone: unpacking 6.12 takes half a minute with a breakpoint at each place where
    # KASLR may put it.
    order: list[tuple[str, int, str, str]] = []
    with launch(configure("6.1", smp=2), paused=True) as vm, attach_vm(vm.info) as session:
        banner = session.kernel.program["linux_banner"].string_().decode()
        assert banner.startswith("Linux version 6.1.")
        assert session.kernel.program["init_task"].comm.string_() == b"swapper"

        def noting(name: str) -> Callable[[Task, Kernel], None]:
            def handler(task: Task, kernel: Kernel) -> None:
                state = kernel.program["system_state"].format_(type_name=False)
                order.append((name, task.pid, task.comm.partition("/")[0], state))

            return handler

        names = ("start_kernel", "rest_init", "kernel_init", "kernel_execve")
        probes = [session.register(Kprobe(name, noting(name))) for name in names]
        returns = session.register(Kretprobe("sched_init", noting("sched_init returned")))
        assert returns.maxactive >= 1
        for _ in range(100):
            session.run(timeout_s=1)
            if ("kernel_execve", 1) in [(name, pid) for name, pid, *_ in order]:
                break
        assert order[:4] == [
            ("start_kernel", 0, "swapper", "SYSTEM_BOOTING"),
            ("sched_init returned", 0, "swapper", "SYSTEM_BOOTING"),
            ("rest_init", 0, "swapper", "SYSTEM_BOOTING"),
            ("kernel_init", 1, "swapper", "SYSTEM_SCHEDULING"),
        ]
        assert [p.hits for p in probes[:3]] == [1, 1, 1]
        assert ("kernel_execve", 1, "swapper", "SYSTEM_RUNNING") in order
        assert not any(p.nfaults for p in (*probes, returns))
        assert session.kernel.memory.booted
        while len(session.probes):
            next(iter(session.probes)).unregister()
        session.target.resume()
        vm.wait_booted(60)
        session.target.interrupt()
        with pytest.raises(ProbeError, match="which the kernel freed when it had booted"):
            session.register(Kprobe("start_kernel"))


def test_every_inlined_copy(guest: Any) -> None:
    # do_open() has no code of its own; do_getpgid() has, and is inlined in getpgrp() as well.
    opened = []
    probe = guest.session.register(
        Kprobe("do_open", lambda task: opened.append(task.comm), name="inlined")
    )
    assert [p.function.name for p in probe.points] == ["path_openat"]
    assert {p.inlined for p in probe.points} == {"do_open"}
    assert probe.notes == ("do_open is inlined in 1 places, all of them probed",)
    assert guest.run(f"opener 2 {CALLS}") == f"{CALLS}\n"
    assert sum(comm.startswith("opener-") for comm in opened) == CALLS

    both = guest.session.register(Kprobe("do_getpgid"))
    assert [p.function.name for p in both.points] == ["do_getpgid", "__do_sys_getpgrp"] or [
        p.is_entry for p in both.points
    ] == [True] + [False] * (len(both.points) - 1)
    assert both.notes == (
        f"do_getpgid is inlined in {len(both.points) - 1} places, all of them probed",
    )
    with pytest.raises(ProbeError) as caught:
        guest.session.register(Kretprobe("do_open"))
    assert str(caught.value) == (
        "'do_open' is inlined everywhere: it has no entry and no return of its own; "
        "use a kprobe, which covers every inlined copy"
    )


def test_argument_of_an_inlined_copy(guest: Any) -> None:
    flags = []

    def opened(file: Any, task: Task) -> None:
        if task.comm.startswith("opener-"):
            flags.append(file.f_flags.value_())

    probe = guest.session.register(Kprobe("do_open", opened))
    guest.run(f"opener 2 {CALLS}")
    assert probe.nfaults == 0, probe.faults[0].trace
    assert flags == [0o100000] * CALLS


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_clone_with_the_arguments_that_the_compiler_left(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    names = []

    def executed(filename: Any) -> None:
        names.append(filename.name.string_().decode())

    probe = guest.session.register(Kprobe("do_execveat_common.isra.0", executed))
    guest.run("i=0; while [ $i -lt 5 ]; do /bin/nester 1 1; i=$((i+1)); done")
    assert probe.nfaults == 0, probe.faults[0].trace
    assert names.count("/bin/nester") == 5
    with pytest.raises(ProbeError, match=r"do_execveat_common\.isra\.0 has no debug information"):
        guest.session.register(Jprobe("do_execveat_common.isra.0", lambda filename: None))


def test_line_of_a_function(guest: Any) -> None:
    hits = []

    def handler(task: Task) -> None:
        if task.comm.startswith("opener-"):
            hits.append(task)

    first = guest.session.register(Kprobe("do_sys_openat2:0"))
    assert first.points[0].offset_bytes == 0
    later = guest.session.register(Kprobe("do_sys_openat2:9", handler))
    assert later.points[0].offset_bytes > 0
    guest.run(f"opener 2 {CALLS}")
    assert len(hits) == CALLS
    with pytest.raises(ProbeError, match="do_sys_openat2 has no code on line 900 or after it"):
        guest.session.register(Kprobe("do_sys_openat2:900"))


def test_inlined_copies_that_cannot_be_displaced_stop(guest: Any) -> None:
    # fsync()'s copy of fdput() is where a branch leads to; the others run inside the kernel.
    before = guest.text()
    events: list[Event] = []
    guest.session.event_listeners.append(events.append)
    (probe,) = guest.session.define("p:put fdput $comm")
    assert probe.tier == "resident"
    assert probe.tier_reason.startswith("stops at 29 of 195 places: ")
    assert "__x64_sys_fsync+0x3c: __x64_sys_fsync+0x" in probe.tier_reason
    assert "jumps into the displaced instructions" in probe.tier_reason
    guest.run("dd if=/etc/hostname of=/tmp/copy bs=1 count=5 conv=fsync 2> /dev/null")
    copying = [e for e in events if e.task.comm == "dd"]
    where = Counter(e.where.partition("+")[0] for e in copying)
    assert where["ksys_write"] == 6  # the last is what it says at the end
    assert where["__x64_sys_fsync"] == 1
    assert [e.ts_ns for e in events] == sorted(e.ts_ns for e in events)
    assert {e.fields["$comm"] for e in copying} == {"dd"}
    assert probe.hits == len(events)
    probe.unregister()
    assert guest.text() == before
    with pytest.raises(CannotDisplace, match="jumps into the displaced instructions"):
        guest.session.define("p:put fdput $comm", tier="resident")
