"""Pointers that a module left behind, and nothing that only looks like them."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from kgdbx.attach import attach_vm
from kgdbx.leaks.dangling import find_dangling, ranges_in_use
from kgdbx.leaks.heap import read_heap
from kgdbx.leaks.snapshot import take_snapshot


def test_what_a_module_left_behind(planted_in: Callable[[str], Any]) -> None:
    guest = planted_in("6.12")
    guest.load("left_behind")
    with attach_vm(guest.vm.info) as session:
        assert session.ram is not None
        heap = read_heap(session.kernel, session.ram)
        snapshot = take_snapshot(heap)
    (module,) = [m for m in snapshot.modules if m.name == "left_behind"]
    assert ranges_in_use(heap, module.ranges) == module.ranges
    left, freed = guest.told("left"), guest.told("freed")
    assert sorted(left.values()) == ["callback", "notifier", "timer"]
    assert guest.vm.execute("rmmod left_behind").status == 0
    with attach_vm(guest.vm.info) as session:
        heap = read_heap(session.kernel, session.ram)
        found, truncated = find_dangling(heap, None, module.ranges)
    assert not truncated
    assert ranges_in_use(heap, module.ranges) == ()
    by_address = {each.address: each for each in found}
    assert not set(freed) & set(by_address)
    # The notifier's chain goes on into the module's own data.
    (notifier,) = [address for address, kind in left.items() if kind == "notifier"]
    assert set(by_address) == {*left, notifier + 8}
    assert {each.place.partition("+")[0] for each in found} == {"kmalloc-128"}


def test_an_init_that_failed_under_an_audit(planted_in: Callable[[str], Any]) -> None:
    guest = planted_in("6.1")
    name = guest.vm.name
    audit = kgdbx(
        *("audit", "--vm", name, "--modules", "left_behind", "--json"),
        *("--command", "insmod /left_behind.ko fail=1; test $? != 0"),
    )
    assert audit.returncode == 1, audit.stderr
    # What it could not load busybox loads once more, by the older system call.
    wanted = guest.told("left")
    assert sorted(wanted.values()) == 2 * ["callback"] + 2 * ["notifier"] + 2 * ["timer"]
    findings = [f for f in json.loads(audit.stdout)["findings"] if f["rule"] == "dangling"]
    assert {int(f["blocks"][0]["address"], 16) for f in findings} == set(wanted)
    # Where it was is known from then on.
    later = kgdbx("leaks", "dangling", "left_behind", "--vm", name, "--json")
    assert later.returncode == 1, later.stderr
    lines = [json.loads(line) for line in later.stdout.splitlines()]
    assert {int(line["dangling"]["address"], 16) for line in lines[1:]} == set(wanted)


def kgdbx(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kgdbx", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)
