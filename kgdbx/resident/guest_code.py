"""Our code in the guest: handlers, and the stubs that functions jump to and calls return to.

It comes in units, each written at once. Those that only removed probes needed are given back when
nothing in the guest can come to them any more: a session may see a module come and go all day.
"""

import itertools
from collections.abc import Iterable, Mapping

from kgdbx.resident.heap import Heap
from kgdbx.resident.program import CodeUnit

__all__ = ("GuestCode",)


class GuestCode:
    """The units of one guest.

    :param heap: where they are
    :ivar symbols: addresses by name, some of them of data
    :ivar handlers: numbers of the handlers that are there, by what they do
    :ivar numbers: those of the handlers to come
    """

    def __init__(self, heap: Heap) -> None:
        self.heap = heap
        self.symbols: dict[str, int] = {}
        self.handlers: dict[tuple[object, ...], int] = {}
        self.numbers = itertools.count()
        self._units: list[CodeUnit] = []
        self._unit_of: dict[int, CodeUnit] = {}

    def take(self, size_bytes: int) -> CodeUnit:
        """Have a place for a unit; there is room in the heap."""
        unit = CodeUnit(self.heap.take(size_bytes), size_bytes)
        self._units.append(unit)
        return unit

    def add(
        self,
        unit: CodeUnit,
        symbols: Mapping[str, int],
        handlers: Mapping[tuple[object, ...], int] | None = None,
    ) -> None:
        """Say what is in a unit."""
        self.symbols.update(symbols)
        for key, number in (handlers or {}).items():
            self.handlers[key] = number
            self._unit_of[number] = unit

    def unit_of(self, handler: int) -> CodeUnit:
        """Where a handler is."""
        return self._unit_of[handler]

    def unneeded(self, needed: Iterable[CodeUnit]) -> list[CodeUnit]:
        """All units but those."""
        kept = set(needed)
        return [unit for unit in self._units if unit not in kept]

    def give_back(self, units: Iterable[CodeUnit]) -> None:
        """Forget units that nothing leads to, and nothing is inside of."""
        gone = set(units)
        self._units = [unit for unit in self._units if unit not in gone]
        self._unit_of = {n: unit for n, unit in self._unit_of.items() if unit not in gone}
        self.handlers = {key: n for key, n in self.handlers.items() if n in self._unit_of}
        self.symbols = {
            name: address
            for name, address in self.symbols.items()
            if not any(address in unit for unit in gone)
        }
        for unit in gone:
            self.heap.give_back(unit.address, unit.size_bytes)
