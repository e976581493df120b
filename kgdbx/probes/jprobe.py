"""jprobe: a handler with the probed function's own signature."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from kgdbx.errors import ProbeError
from kgdbx.probes.arguments import argument_suppliers
from kgdbx.probes.context import context_suppliers
from kgdbx.probes.handler import Supplier
from kgdbx.probes.kprobe import Kprobe, KprobeAttachment
from kgdbx.probes.probe import Hit, Point
from kgdbx.symbols.kernel import Kernel

__all__ = ("Jprobe", "JprobeReturn", "jprobe_return")


class JprobeReturn(Exception):
    """Ends a jprobe's handler; see :func:`jprobe_return`."""


def jprobe_return() -> None:
    """End a jprobe's handler here, from any depth; reaching its end does the same."""
    raise JprobeReturn


class Jprobe(Kprobe):
    """Look at the arguments of a function at its entry.

    The handler's parameters are those of the function, as drgn objects, in any number and order;
    it may name ``regs``, ``hit``, ``task``, ``cpu`` and ``kernel`` too where the function has no
    such parameter. Any number of jprobes may be on one function. The handler changes nothing by
    returning: the function runs with the registers and stack that it was called with.

    :param where: a function; it must have debug information
    :param entry: the handler
    """

    kind = "j"
    inlined_copies = True

    def __init__(
        self,
        where: str | int,
        entry: Callable[..., Any],
        *,
        name: str | None = None,
        hardware: bool = False,
    ) -> None:
        super().__init__(where, _observing(entry), name=name, hardware=hardware)

    def prepare(self, kernel: Kernel) -> None:
        for point in self.points:
            if not point.is_entry and point.inlined is None:
                raise ProbeError(
                    f"a jprobe goes to the entry of a function, not to {self.where!r}; "
                    "use a kprobe there"
                )
            if kernel.function_type(point.function) is None and point.inlined is None:
                raise ProbeError(
                    f"{point.function.qualified_name} has no debug information, so its arguments "
                    "are not known; use a kprobe and regs.argument(n)"
                )
        self._attached = tuple(_JprobeAttachment(self, kernel, point) for point in self.points)


class _JprobeAttachment(KprobeAttachment):
    def _suppliers(self, kernel: Kernel, point: Point) -> dict[str, Supplier]:
        # Here the function's own names win: a jprobe has its signature.
        return {**context_suppliers(self.probe), **argument_suppliers(kernel, point)}

    def before(self, hit: Hit) -> bool:
        entered = hit.regs.copy()
        skip = super().before(hit)
        hit.regs.restore(entered)
        return skip


def _observing(entry: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(entry)
    def handler(*args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(JprobeReturn):
            entry(*args, **kwargs)

    return handler
