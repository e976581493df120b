"""Watched modules that come and go while all CPUs allocate and free what the others allocated."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from kgdbx.attach import attach_vm
from kgdbx.leaks.watch import place_watch
from kgdbx.machine.vm import Vm

ROUNDS = 6
SAID = re.compile(r"watch_busy: (\d+)")


def test_exact_on_four_cpus_round_after_round(guest_of: Callable[..., Any]) -> None:
    guest = guest_of(smp=4)
    session = guest.session
    names = ["watch_busy", "watch_leaker"]
    watch = place_watch(session.kernel, session.resident, session.probes, names)
    out = guest.run(
        f"for i in $(seq {ROUNDS}); do insmod /watch_busy.ko times=97 lose=$i fail=$((i % 3 == 0))"
        " 2>/dev/null; rmmod watch_busy 2>/dev/null; done; dmesg -c"
    )
    said = [int(count) for count in SAID.findall(out)]
    # insmod tries a module again, in another way, if its init has failed.
    lost = [i for i in range(1, ROUNDS + 1) for _ in range(2 if i % 3 == 0 else 1)]
    assert len(said) == watch.sessions == len(lost)
    for n, (count, lose) in enumerate(zip(said, lost, strict=True), 1):
        report = watch.report(n)
        assert (n, report.totals) == (n, (count, lose, 0))
        assert report.over and not report.notes
        assert report.failed_init == (("watch_busy",) if lose % 3 == 0 else ())
    # Two at once, whichever comes and goes first
    out = guest.run(
        f"(for i in $(seq {ROUNDS}); do insmod /watch_leaker.ko; rmmod watch_leaker; done) &"
        f" for i in $(seq {ROUNDS}); do insmod /watch_busy.ko times=97; rmmod watch_busy; done;"
        " wait; dmesg"
    )
    said = [int(count) for count in SAID.findall(out)]
    reports = [watch.report(n) for n in range(len(lost) + 1, watch.sessions + 1)]
    assert sum(sum(r.allocations.values()) for r in reports) == sum(said) + 16 * ROUNDS
    assert sum(len(r.leaks) for r in reports) == (1 + 4) * ROUNDS
    assert not any(r.unallocated or r.freed_late or r.notes for r in reports)
    assert "BUG:" not in out


def test_a_kgdbx_that_is_killed_leaves_nothing(clone_of: Callable[..., Vm]) -> None:
    vm = clone_of("6.1", 2)
    before = text_of(vm)
    argv = ["leaks", "watch", "watch_busy", "--vm", vm.info.name, "--stdin"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", "kgdbx", *argv], **pipes, text=True) as watch:
        assert watch.stdin is not None and watch.stdout is not None and watch.stderr is not None
        try:
            watch.stdin.write("flush\n")
            watch.stdin.flush()
            assert watch.stderr.readline() == "kgdbx: no module was loaded yet\n"
            loop = "while insmod /watch_busy.ko times=97 && rmmod watch_busy; do :; done"
            endless = vm.start(loop)
            assert watch.stdout.readline() == "Target module: 'watch_busy', unloaded\n"
        finally:
            watch.kill()
    assert text_of(vm) == before  # whatever attaches first puts it back
    assert endless.poll() is None
    endless.discard()
    assert "BUG:" not in vm.execute("dmesg", timeout_s=60).output


def text_of(vm: Vm) -> bytes:
    """The kernel's text, as a session that attaches anew sees it."""
    with attach_vm(vm.info) as session:
        kernel = session.kernel
        start = kernel.address("_stext")
        return kernel.memory.read(start, kernel.address("_etext") - start)
