"""What the guest says of its mixed work: all of it was done, or it does not count."""

import pytest

from kgdbx.bench.mixed import rounds_of
from kgdbx.errors import MachineError
from kgdbx.machine.initramfs import GUEST_FILES

KINDS = (
    *("files", "processes", "sockets", "pipes", "modules"),
    *("mounts", "disks", "namespaces", "cgroups", "insides"),
)


def test_every_kind_was_done() -> None:
    assert rounds_of("".join(f"{what} {n}\n" for n, what in enumerate(KINDS, 1))) == {
        what: n for n, what in enumerate(KINDS, 1)
    }
    # That is what the guest is told to do.
    text = (GUEST_FILES / "workload" / "mixed-work").read_text()
    assert all(f"again {what} " in text for what in KINDS) and text.count("again ") == len(KINDS)


@pytest.mark.parametrize("said", ["", "disks 0\n", "disks failed after 3 rounds: busy\n"])
def test_a_kind_that_was_not_done(said: str) -> None:
    others = "".join(f"{what} 3\n" for what in KINDS if what != "disks")
    with pytest.raises(MachineError, match="not all done: no disks: "):
        rounds_of(others + said)
