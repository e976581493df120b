"""Pointers that a module left behind, and nothing that only looks like them."""

from collections.abc import Callable
from typing import Any

from kgdbx.leaks.dangling import find_dangling
from kgdbx.leaks.heap import read_heap
from kgdbx.leaks.snapshot import take_snapshot
from kgdbx.session import Session


def test_what_a_module_left_behind(planted_in: Callable[[str], Any]) -> None:
    guest = planted_in("6.12")
    guest.load("left_behind")
    with Session.attach_vm(guest.vm.info) as session:
        assert session.ram is not None
        snapshot = take_snapshot(read_heap(session.kernel, session.ram))
    (module,) = [m for m in snapshot.modules if m.name == "left_behind"]
    left, freed = guest.told("left"), guest.told("freed")
    assert sorted(left.values()) == ["callback", "notifier", "timer"]
    assert guest.vm.execute("rmmod left_behind").status == 0
    with Session.attach_vm(guest.vm.info) as session:
        heap = read_heap(session.kernel, session.ram)
        found, truncated = find_dangling(heap, None, module.ranges)
    assert not truncated
    by_address = {each.address: each for each in found}
    assert not set(freed) & set(by_address)
    # The notifier's chain goes on into the module's own data.
    (notifier,) = [address for address, kind in left.items() if kind == "notifier"]
    assert set(by_address) == {*left, notifier + 8}
    assert {each.place.partition("+")[0] for each in found} == {"kmalloc-128"}
