"""What modules allocate and free in real kernels: exact numbers, from load to unload."""

from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.leaks.findings import WatchReport, group_by_stack
from kgdbx.leaks.watch import LeakWatch, place_watch
from kgdbx.machine.kmod import build_kmod

GuestOf = Callable[..., Any]
MODULES = ("watch_leaker", "watch_cleaner", "watch_cases")
PARAMETERS = "/sys/module/{}/parameters/{}"

# Allocations, possible leaks, unallocated frees
CASES = {
    "rcu": (2, 0, 0),
    "texts": (4, 0, 0),
    "same": (23, 23, 0),
    "realloc": (4, 1, 0),
    "fail": (1, 1, 0),
    "calls": (2, 0, 0),
    "interrupts": (2, 2, 0),
    "processors": (50, 0, 0),
    "every": (19, 0, 0),
}


class Watched:
    """A guest with the test modules, and a watch."""

    def __init__(self, guest_of: GuestOf, kernel: str, *names: str) -> None:
        files = {name: build_kmod(kernel, name) for name in MODULES}
        self.guest = guest_of(kernel)
        session = self.guest.session
        for path in files.values():
            session.kernel.modules.add_debug_file(path)
        self.watch: LeakWatch = place_watch(session.kernel, session.resident, session.probes, names)

    def run(self, command: str, status: int = 0) -> WatchReport:
        self.guest.run(command, status=status)
        return self.watch.report()

    def lose(self) -> tuple[list[int], WatchReport]:
        """Load and unload the leaker; the addresses that it lost, as it says."""
        lost = PARAMETERS.format("watch_leaker", "lost")
        said = self.guest.run(f"insmod /watch_leaker.ko && cat {lost} && rmmod watch_leaker")
        return [int(word) for word in said.split(",")], self.watch.report()


def cleaner(blocks: list[int]) -> str:
    return f"insmod /watch_cleaner.ko blocks={','.join(map(str, blocks))} && rmmod watch_cleaner"


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_every_way_to_allocate_is_counted(guest_of: GuestOf, kernel: str) -> None:
    watched = Watched(guest_of, kernel, "watch_cases")
    for mode in CASES:
        status = "1" if mode == "fail" else "0"
        report = watched.run(
            f"insmod /watch_cases.ko mode={mode} times=23 2>/dev/null;"
            f" [ $(($? != 0)) = {status} ] && (rmmod watch_cases || [ {status} = 1 ]) 2>/dev/null"
        )
        assert (mode, report.totals) == (mode, CASES[mode])
        assert report.over and not report.notes
        assert report.failed_init == (("watch_cases",) if mode == "fail" else ())
        if mode == "same":
            (group,) = group_by_stack(report.leaks)
            assert (len(group.events), group.size_bytes) == (23, 2300)
            place = watched.watch.frames.line(group.stack.site)
            assert place is not None and place[0].endswith("watch_cases.c")
            outermost = watched.watch.frames.line(group.stack.frames[-1])
            assert outermost is not None and outermost[0] == "arch/x86/entry/entry_64.S"
            assert group.stack.direct and group.stack.site.function in ("open_one", "same")
        elif mode == "realloc":
            assert [e.size_bytes for e in report.leaks] == [61]
        elif mode == "interrupts":
            assert {(e.size_bytes, e.from_interrupt) for e in report.leaks} == {
                (60, True),
                (70, True),
            }
    done = PARAMETERS.format("watch_cases", "done")
    said = watched.guest.run(f"insmod /watch_cases.ko mode=sizes && cat {done}; rmmod watch_cases")
    assert watched.watch.report().totals == (int(said), 0, 0)
    assert int(said) > 150


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_blocks_that_outlive_their_module(guest_of: GuestOf, kernel: str) -> None:
    watched = Watched(guest_of, kernel, "watch_leaker", "watch_cleaner")
    for n in range(4):
        lost, report = watched.lose()
        assert report.totals == (16, 4, 0)
        assert {(e.address, e.size_bytes) for e in report.leaks} == set(
            zip(lost, (40, 32768, 40, 40), strict=True)
        )
        assert {e.stack.site.function for e in report.leaks} == {"watch_leaker_init"}
        assert sorted(e.stack.direct for e in report.leaks) == [False, False, True, True]
        after = watched.run(cleaner(lost))
        # Each load begins a new session. Nothing of the last one is left in it.
        assert after.session == 2 * n + 2 and after.totals == (0, 0, 0)
        before = watched.watch.report(2 * n + 1)
        assert before.totals == (16, 0, 0) and len(before.freed_late) == 4
        assert {e.freed_by.module for e in before.freed_late} == {"watch_cleaner"}


def test_one_of_two_modules_frees_for_the_other(guest_of: GuestOf) -> None:
    watched = Watched(guest_of, "6.12", "watch_leaker", "watch_cleaner")
    lost = PARAMETERS.format("watch_leaker", "lost")
    report = watched.run(
        f"insmod /watch_leaker.ko && insmod /watch_cleaner.ko blocks=$(cat {lost})"
        " && rmmod watch_cleaner && rmmod watch_leaker"
    )
    assert report.totals == (16, 0, 0)
    assert report.allocations == {"watch_leaker": 16, "watch_cleaner": 0}
    assert report.frees == {"watch_leaker": 16, "watch_cleaner": 0}


def test_frees_of_what_others_allocated(guest_of: GuestOf) -> None:
    watched = Watched(guest_of, "6.12", "watch-cleaner")
    lost = PARAMETERS.format("watch_leaker", "lost")
    said = watched.guest.run(f"insmod /watch_leaker.ko && cat {lost}")
    blocks = [int(word) for word in said.split(",")]
    report = watched.run(cleaner(blocks))
    assert report.totals == (0, 0, 4)
    assert sorted(e.address for e in report.unallocated) == sorted(blocks)
    assert {e.stack.frames[0].function for e in report.unallocated} == {
        "kfree",
        "free_pages",
        "vfree",
    }


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_attached_late_reported_at_once_and_forgotten(guest_of: GuestOf, kernel: str) -> None:
    watched = Watched(guest_of, kernel, "watch_cases")
    session = watched.guest.session
    watched.guest.run("insmod /watch_leaker.ko")
    late = place_watch(session.kernel, session.resident, session.probes, ["watch_leaker"])
    report = late.report()
    assert report.totals == (0, 0, 0) and not report.over and report.loaded == ("watch_leaker",)
    assert report.notes == ("watch_leaker was loaded before: earlier allocations unknown",)
    late.stop()
    # Until now, again and again, and from now on
    for _ in range(2):
        report = watched.run("test -e /sys/module/watch_cases || insmod /watch_cases.ko mode=calls")
        assert report.totals == (2, 1, 0) and not report.over
    watched.watch.clear()
    assert watched.watch.report().totals == (0, 0, 0)
    report = watched.run("rmmod watch_cases")
    assert report.totals == (0, 0, 1)
    assert report.unallocated[0].stack.site.function == "watch_cases_exit"
    watched.watch.stop()
    assert watched.watch.report().totals == (0, 0, 1)
