"""What every handler may name besides the probed function's own parameters."""

import drgn

from kgdbx.arch.exceptions import Trap
from kgdbx.errors import MemoryFault
from kgdbx.probes.handler import Supplier
from kgdbx.probes.probe import Probe

__all__ = ("PAGE_FAULT", "context_suppliers", "is_memory_fault")

PAGE_FAULT = int(Trap.X86_TRAP_PF)


def context_suppliers(probe: Probe) -> dict[str, Supplier]:
    """``p``, ``regs``, ``hit``, ``task``, ``cpu`` and ``kernel`` of a hit."""
    return {
        "p": lambda hit: probe,
        "regs": lambda hit: hit.regs,
        "hit": lambda hit: hit,
        "task": lambda hit: hit.task,
        "cpu": lambda hit: hit.cpu,
        "kernel": lambda hit: hit.kernel,
    }


def is_memory_fault(error: BaseException) -> bool:
    """Whether a handler failed because it read memory that is not there."""
    return isinstance(error, (MemoryFault, drgn.FaultError))
