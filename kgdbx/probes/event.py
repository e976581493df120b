"""What a hit reports."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kgdbx.symbols.tasks import Task

__all__ = ("Event",)


@dataclasses.dataclass(frozen=True)
class Event:
    """One hit of a probe definition.

    :ivar ts_ns: nanoseconds of the guest's ``CLOCK_MONOTONIC``; where it cannot be read, of the
        host's clock since the session began
    :ivar cpu: vCPU, counted from 0
    :ivar probe: ``group/name`` of the probe
    :ivar kind: ``p``, ``r`` or ``w``
    :ivar address: guest-virtual address of the probe point
    :ivar where: the same as ``func+0x0/0x2c [module]``
    :ivar fields: values in the order of the definition
    :ivar return_address: where a returning function returns to, otherwise None
    :ivar return_where: the same as text, otherwise empty
    :ivar duration_ns: nanoseconds since the function was entered, at a return; None if not known
    """

    ts_ns: int
    cpu: int
    task: Task
    probe: str
    kind: str
    address: int
    where: str
    fields: Mapping[str, Any]
    return_address: int | None = None
    return_where: str = ""
    duration_ns: int | None = None
