"""The maps of a session: what its aggregations have summed up so far."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kgdbx.errors import ProbeError
from kgdbx.probes.value import FieldValue
from kgdbx.resident.compile.aggregate import MapShape
from kgdbx.resident.compile.codegen import RecordField
from kgdbx.resident.engine import Engine

__all__ = ("Map", "Maps", "Row")

_SIGN = 1 << 63
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Row:
    """What was summed up for one key.

    :ivar key: its parts
    :ivar value: of count, sum, min, max and avg; for histograms, how many there are
    :ivar buckets: of histograms, from the first to the last that is not empty: least value, end
        and count; None stands for no limit
    """

    key: tuple[FieldValue, ...]
    value: int
    buckets: tuple[tuple[int | None, int | None, int], ...] = ()


@dataclass(frozen=True)
class Map:
    """One map at one moment.

    :ivar rows: the least value first
    :ivar lost: hits that found no room for their key: the rows are not all then
    """

    name: str
    function: str
    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    lost: int = 0


class Maps:
    """Knows the maps that probes add to, and reads them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[str, tuple[MapShape, tuple[RecordField, ...]]] = {}

    def add(self, shape: MapShape, fields: tuple[RecordField, ...]) -> None:
        """Know a map.

        :param fields: the parts of its key
        :raises ProbeError: if probes add to one of this name that is not like it
        """
        old = self._known.get(shape.name)
        if old is not None and old[0] != shape and self._is_used(old[0]):
            raise ProbeError(
                f"@{shape.name} is a map of {old[0].function} already, or has other keys; "
                "give this one another name"
            )
        self._known[shape.name] = shape, fields

    def read(self) -> Iterator[Map]:
        """The maps as they are now. The guest may run."""
        for shape, fields in self._known.values():
            table = self._engine.table(shape)
            if table is None:
                continue
            found = table.read(self._engine.host)
            rows = [_row(shape, fields, key, values) for key, values in found.items()]
            rows.sort(key=lambda row: (row.value, str(row.key)))
            lost = table.lost(self._engine.host)
            yield Map(shape.name, shape.function, shape.keys, tuple(rows), lost)

    def _is_used(self, shape: MapShape) -> bool:
        programs = self._engine.programs.values()
        return any(p.body is not None and p.body.map == shape for p in programs)


def _row(shape: MapShape, fields: tuple[RecordField, ...], key: bytes, values: list[int]) -> Row:
    parts = tuple(
        field.decode(key[field.offset_bytes : field.offset_bytes + field.size_bytes])
        for field in fields
    )
    if shape.function in ("hist", "lhist"):
        limits = _powers() if shape.steps is None else _steps(*shape.steps)
        filled = [n for n, count in enumerate(values) if count]
        first, last = filled[0] if filled else 0, filled[-1] if filled else -1
        buckets = [(*limits(n), values[n]) for n in range(first, last + 1)]
        return Row(parts, sum(values), tuple(buckets))
    return Row(parts, _value(shape, values))


def _value(shape: MapShape, values: list[int]) -> int:
    if shape.function == "count":
        return values[0]
    count, word = values
    if shape.function in ("min", "max"):
        word ^= _MASK if shape.function == "min" else 0
        word ^= _SIGN if shape.is_signed else 0
    if shape.is_signed and word & _SIGN:
        word -= _MASK + 1
    if shape.function != "avg":
        return word
    mean = abs(word) // max(1, count)  # to zero, as in C
    return -mean if word < 0 else mean


def _powers() -> Callable[[int], tuple[int | None, int | None]]:
    def limits(number: int) -> tuple[int | None, int | None]:
        if number < 3:
            return ((None, 0), (0, 1), (1, 2))[number]
        return 1 << number - 2, 1 << number - 1

    return limits


def _steps(least: int, end: int, step: int) -> Callable[[int], tuple[int | None, int | None]]:
    last = (end - least) // step + 1

    def limits(number: int) -> tuple[int | None, int | None]:
        if number in (0, last):
            return (None, least) if number == 0 else (end, None)
        start = least + (number - 1) * step
        return start, start + step

    return limits
