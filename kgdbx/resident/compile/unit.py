"""One C unit: the prelude, the handlers of probes, and the stubs that functions jump to."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources

from kgdbx.resident.compile.codegen import Body
from kgdbx.resident.compile.decision import Decision
from kgdbx.resident.compile.handler_text import bell_text, handler_text
from kgdbx.resident.compile.kernel_facts import KernelFacts
from kgdbx.resident.ring import Stream
from kgdbx.resident.table import Table

__all__ = ("Unit",)


@dataclass
class Unit:
    """One C unit under construction.

    Handlers that do the same are written once: what differs is in their ``struct probe``.

    :param handlers: those of earlier units
    :param numbers: of those to come
    :ivar new: those of this unit
    """

    facts: KernelFacts
    handlers: Mapping[tuple[object, ...], int] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    new: dict[tuple[object, ...], int] = field(default_factory=dict)
    _parts: list[str] = field(default_factory=list)

    def handler(self, kind: str, body: Body, to: Stream | Table) -> int:
        """Number of the handler for a body.

        :param kind: ``p`` or ``r`` at a function's entry: the symbols are ``handler_N``, and
            ``return_stub_N``; ``full`` where all registers are kept: ``decide_N``
        :param to: where its records go, or what its hits are summed up in
        """
        key = (kind, body.condition, body.fill, body.saves, to, body.handlers, body.shared)
        shared = body.shared.replace("@STREAM@", to.arguments)
        is_known = key in self.handlers or key in self.new
        if not is_known and shared and shared not in self._parts:
            self._parts.append(shared)
        return self._once(key, lambda number: handler_text(number, kind, body, to))

    def bell(self, bells: int, watched: int) -> int:
        """Number of the handler that has the host look at a hit; of the kind ``full``."""
        return self._once(
            ("bell", bells, watched), lambda number: bell_text(number, bells, watched)
        )

    def decision(self, decision: Decision, user: str) -> int:
        """Number of the handler that decides what becomes of a call; of the kind ``full``.

        :param user: symbol of the user's function, if it has one
        """
        return self._once(
            ("decision", decision.text(0, user)), lambda number: decision.text(number, user)
        )

    def add(self, source: str) -> None:
        """Add C or assembly text."""
        self._parts.append(source)

    @property
    def text(self) -> str:
        """The whole unit."""
        prelude = resources.files("kgdbx.resident.compile").joinpath("prelude.h").read_text("utf-8")
        return "\n".join((self.facts.defines, prelude, *self._parts))

    def _once(self, key: tuple[object, ...], text: Callable[[int], str]) -> int:
        number = self.handlers.get(key, self.new.get(key))
        if number is None:
            number = self.new[key] = next(self.numbers)
            self._parts.append(text(number))
        return number
