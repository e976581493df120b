"""The scan of a kernel that has kmemleak, beside kmemleak itself."""

from kgdbx.bench.kmemleak import compare, kmemleak_machine
from kgdbx.machine.snapshot import clone, make_template


def test_all_is_found_where_kmemleak_knows_every_block() -> None:
    with clone(make_template(kmemleak_machine())) as vm:
        told = compare(vm)
    assert (told.planted, told.kept) == (13, 4 + 9)
    # Its own records point to every block, and callbacks of RCU wait behind them.
    assert told.kgdbx.missed == {} and told.kgdbx.false == {}
    assert told.kgdbx.found == 13
    assert told.kgdbx.others <= 5
    # It was there, and looked; pages it does not follow at all.
    assert told.kmemleak.found >= 5
    assert {"page", "pages"} <= told.kmemleak.missed.keys()
    assert told.kmemleak.found + sum(told.kmemleak.missed.values()) == 13
