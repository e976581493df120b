"""kprobe: handlers before and after any instruction, and for its faults."""

from collections.abc import Callable
from typing import Any

from kgdbx.probes.arguments import argument_suppliers
from kgdbx.probes.context import PAGE_FAULT, context_suppliers, is_memory_fault
from kgdbx.probes.handler import Supplier, bind_handler
from kgdbx.probes.probe import Hit, Point, Probe
from kgdbx.symbols.kernel import Kernel

__all__ = ("Kprobe", "KprobeAttachment")

_FLAGS = 0  # the guide's `flags` argument: always 0 on x86


class Kprobe(Probe):
    """Break into the kernel at an instruction.

    Handlers name what they want: ``p`` (this probe), ``regs`` (writable registers), ``hit``
    (:class:`~kgdbx.probes.probe.Hit`), ``task``, ``cpu``, ``kernel``, and the parameters of the
    probed function, as drgn objects. Where a parameter is itself called ``p`` or ``regs``, the
    probe and the registers win, as in ``pre_handler(p, regs)``.

    :param pre_handler: runs before the instruction. True (non-zero) means that it set up the
        registers itself, and the instruction is not executed; if ``regs.ip`` was left alone,
        execution goes on behind it
    :param post_handler: runs after it; may name ``flags`` (always 0)
    :param fault_handler: runs if the instruction takes an exception, or *pre_handler* reads
        memory that is not there; names ``trapnr``. True means that it is dealt with
    """

    kind = "p"
    inlined_copies = True

    def __init__(
        self,
        where: str | int,
        pre_handler: Callable[..., Any] | None = None,
        *,
        post_handler: Callable[..., Any] | None = None,
        fault_handler: Callable[..., Any] | None = None,
        name: str | None = None,
        hardware: bool = False,
    ) -> None:
        super().__init__(where, name=name, hardware=hardware)
        self.pre_handler = pre_handler
        self.post_handler = post_handler
        self.fault_handler = fault_handler
        self._attached: tuple[KprobeAttachment, ...] = ()

    def prepare(self, kernel: Kernel) -> None:
        self._attached = tuple(KprobeAttachment(self, kernel, point) for point in self.points)

    def attachments(self) -> tuple["KprobeAttachment", ...]:
        """What to attach at each of the :attr:`points`."""
        return self._attached


class KprobeAttachment:
    """A kprobe at one of its points."""

    def __init__(self, probe: Kprobe, kernel: Kernel, point: Point) -> None:
        self.probe: Probe = probe
        self.point = point
        self._trap = 0
        suppliers = self._suppliers(kernel, point)
        what = point.function.qualified_name
        self._pre = _bind(probe.pre_handler, suppliers, what)
        self._post = _bind(probe.post_handler, {**suppliers, "flags": lambda hit: _FLAGS}, what)
        self._fault = _bind(
            probe.fault_handler, {**suppliers, "trapnr": lambda hit: self._trap}, what
        )

    def _suppliers(self, kernel: Kernel, point: Point) -> dict[str, Supplier]:
        return {**argument_suppliers(kernel, point), **context_suppliers(self.probe)}

    def before(self, hit: Hit) -> bool:
        self.probe.hits += 1
        if self._pre is None:
            return False
        faults = self.probe.nfaults
        result = self.probe.call(self._pre, "pre_handler", hit)
        if self.probe.nfaults != faults and self._fault is not None:
            error = self.probe.faults[-1].error
            if is_memory_fault(error):
                self.fault(hit, PAGE_FAULT)
                return False  # the instruction itself did nothing wrong
        return bool(result)

    def after(self, hit: Hit) -> None:
        if self._post is not None:
            self.probe.call(self._post, "post_handler", hit)

    def fault(self, hit: Hit, trap: int) -> bool:
        if self._fault is None:
            return False
        self._trap = trap
        return bool(self.probe.call(self._fault, "fault_handler", hit))


def _bind(
    handler: Callable[..., Any] | None, suppliers: dict[str, Supplier], what: str
) -> Callable[[Hit], Any] | None:
    return None if handler is None else bind_handler(handler, suppliers, what)
