"""Calls in progress whose return address names a slot of ours, as they lie in memory."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kgdbx.symbols.kernel import Kernel

__all__ = (
    "NEXT_AT",
    "PendingReturn",
    "RET_ADDR_AT",
    "SLOT_BYTES",
    "TASK_AT",
    "empty_slot",
    "pending_returns",
    "true_return",
)

_SLOT = struct.Struct("<QQQQQQQQ")  # struct slot, prelude.h, without what it keeps

SLOT_BYTES = _SLOT.size
"""Size of a slot that keeps nothing."""

NEXT_AT = 48
"""Where a return probe's ``struct probe`` names the next."""

RET_ADDR_AT = 8
"""Where a slot holds the true return address."""

TASK_AT = 24
"""Where a slot holds its task."""


@dataclass(frozen=True)
class PendingReturn:
    """One call.

    :ivar slot: address of its slot
    :ivar ret_addr: where it returns to, unless that names a slot as well
    :ivar place: where its return address lies on the stack
    :ivar task: ``struct task_struct *``; 0 while the slot is being filled or set free
    :ivar stub: what stands there instead
    :ivar pid: the task's at the entry
    """

    slot: int
    ret_addr: int
    place: int
    task: int
    stub: int
    pid: int


def empty_slot(probe: int, stub: int, size_bytes: int) -> bytes:
    """A slot as the guest finds it first."""
    return _SLOT.pack(0, 0, 0, 0, 0, probe, stub, 0).ljust(size_bytes, b"\0")


def pending_returns(data: bytes, address: int, size_bytes: int) -> Iterator[PendingReturn]:
    """The slots in use.

    :param data: all slots of a probe
    :param address: of the first
    """
    for at in range(0, len(data), size_bytes):
        busy, ret_addr, place, task, _, _, stub, pid = _SLOT.unpack_from(data, at)
        if busy:
            yield PendingReturn(address + at, ret_addr, place, task, stub, pid)


def true_return(kernel: Kernel, address: int, start: int, end: int) -> int:
    """Where a call returns to in truth.

    :param address: what stands on the stack
    :param start: of the window where the stubs are
    """
    while start <= address < end:
        code = kernel.read_code(address, 5)  # push $slot
        slot = int.from_bytes(code[1:], "little", signed=True) & (1 << 64) - 1
        address = kernel.memory.read_u64(slot + RET_ADDR_AT)
    return address
