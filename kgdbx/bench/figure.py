"""What a measurement gives."""

import dataclasses
import statistics
from collections.abc import Iterable

__all__ = ("Figure", "figure", "ratio")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured value.

    :ivar value: median of the runs
    :ivar unit: such as ``us``, ``1/s``; ``x`` for a ratio
    :ivar runs: how many runs there were
    """

    name: str
    value: float
    unit: str
    runs: int
    min: float
    max: float


def figure(name: str, samples: Iterable[float], unit: str) -> Figure:
    """The median of several runs."""
    values = sorted(samples)
    return Figure(name, statistics.median(values), unit, len(values), values[0], values[-1])


def ratio(name: str, ours: Iterable[float], theirs: Iterable[float]) -> Figure:
    """The median of ratios, each of two runs that followed one another."""
    return figure(name, (a / b for a, b in zip(ours, theirs, strict=True)), "x")
