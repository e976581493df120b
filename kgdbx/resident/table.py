"""Maps in the guest: for each CPU a hash table that probes add to and the host reads as it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kgdbx.resident.compile.aggregate import MapShape
from kgdbx.resident.guest_call import Script
from kgdbx.resident.host import HostView
from kgdbx.resident.memory import Block, GuestMemory

__all__ = ("CONTROL_BYTES", "Table", "make_table")

CONTROL_BYTES = 16
"""Size of ``struct table``, prelude.h."""

_TABLE_BYTES = 1 << 20
_MOST_PLACES = 4096
_FILLED = 3
_MASK = (1 << 64) - 1


@dataclass(eq=False)
class Table:
    """The tables of one map.

    :ivar places: how many keys fit into each, a power of two
    :ivar controls: address of a ``struct table`` for each CPU, in a data page of ours
    """

    shape: MapShape
    places: int
    controls: int
    blocks: list[Block]

    @property
    def arguments(self) -> str:
        """The last arguments of ``sum_up_N()`` in C."""
        return f"(struct table *){self.controls:#x}UL, {self.places}"

    def start(self, host: HostView) -> None:
        """Write what the guest starts from, before any probe uses it."""
        for cpu, block in enumerate(self.blocks):
            control = block.address.to_bytes(8, "little").ljust(CONTROL_BYTES, b"\0")
            host.write(self.controls + CONTROL_BYTES * cpu, control)

    def read(self, host: HostView) -> dict[bytes, list[int]]:
        """What all CPUs have added up, by key. The guest may run.

        The words of a key may be of moments that are a hit or two apart.
        """
        found: dict[bytes, list[int]] = {}
        key_words = self.shape.key_bytes // 8
        is_extreme = self.shape.function in ("min", "max")
        for block in self.blocks:
            data = host.read(block.address, self.places * self.shape.place_bytes)
            table = np.frombuffer(data, "<u8").reshape(self.places, -1)
            for place in table[(table[:, 0] & _FILLED) == _FILLED]:
                key, values = place[1 : 1 + key_words].tobytes(), place[1 + key_words :].tolist()
                old = found.get(key)
                found[key] = values if old is None else _added(old, values, is_extreme)
        return found

    def lost(self, host: HostView) -> int:
        """Hits that found no room for their key."""
        controls = (self.controls + CONTROL_BYTES * cpu for cpu in range(len(self.blocks)))
        return sum(host.read_u64(control + 8) for control in controls)


def make_table(memory: GuestMemory, controls: int, cpus: int, shape: MapShape) -> Script[Table]:
    """Take the memory of a map from the guest.

    :param controls: address of ``struct table`` for each CPU, in a data page of ours
    """
    size = _TABLE_BYTES
    while size > shape.place_bytes * _MOST_PLACES * 2:
        size //= 2
    blocks: list[Block] = []
    for _ in range(cpus):
        block = yield from memory.pages(size, max(4096, shape.place_bytes * 2))
        size = min(size, block.size_bytes)
        blocks.append(block)
    places = 1 << (size // shape.place_bytes).bit_length() - 1
    return Table(shape, min(places, _MOST_PLACES), controls, blocks)


def _added(one: Sequence[int], other: Sequence[int], is_extreme: bool) -> list[int]:
    if is_extreme:
        return [one[0] + other[0], max(one[1], other[1])]
    return [(a + b) & _MASK for a, b in zip(one, other, strict=True)]
