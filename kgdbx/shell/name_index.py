"""Names of a kernel for completion: 200,000 of them, and the first matches at once."""

import bisect
import re
import time
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

__all__ = ("NameIndex",)

_FUZZY_S = 0.02
_CHARACTERS = {c: 1 << n for n, c in enumerate("abcdefghijklmnopqrstuvwxyz0123456789_.")}
_OTHER = 1 << 63


class NameIndex:
    """Finds names by their start, by a part, and by letters in their order.

    :param names: any number of them; compared without regard to case
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(sorted(set(names), key=lambda name: (name.lower(), name)))
        self._lowered = [name.lower() for name in self._names]
        self._text = "\n" + "\n".join(self._lowered) + "\n"
        starts = np.fromiter((len(name) + 1 for name in self._lowered), np.int64, len(self._names))
        self._starts: npt.NDArray[np.int64] = np.concatenate(([1], 1 + np.cumsum(starts)))
        self._masks: npt.NDArray[np.uint64] = np.fromiter(
            (_mask(name) for name in self._lowered), np.uint64, len(self._names)
        )

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        at = bisect.bisect_left(self._lowered, name.lower())
        return name in self._names[at : at + 8]

    def search(self, piece: str, most: int = 200, budget_s: float = _FUZZY_S) -> list[str]:
        """Names that match, the best first: by start, by a word in them, by a part, by letters.

        :param piece: what was typed
        :param most: how many to give
        :param budget_s: seconds to look for names that have the letters in their order
        """
        wanted = piece.lower()
        found: dict[str, None] = {}
        for name in self._matches(wanted, time.perf_counter() + budget_s):
            found[name] = None
            if len(found) >= most:
                break
        return list(found)

    def _matches(self, wanted: str, deadline: float) -> Iterator[str]:
        yield from self._starting(wanted)
        if not wanted:
            return
        for row in (*self._containing(f"_{wanted}"), *self._containing(wanted)):
            yield self._names[row]
        if len(wanted) > 1:
            yield from self._fuzzy(wanted, deadline)

    def _starting(self, wanted: str) -> Iterator[str]:
        at = bisect.bisect_left(self._lowered, wanted)
        # The shortest of the first ones is what is meant most of the time.
        end = at
        while end < len(self._lowered) and end < at + 400 and self._lowered[end].startswith(wanted):
            end += 1
        yield from sorted(self._names[at:end], key=len)

    def _containing(self, part: str) -> list[int]:
        rows: list[int] = []
        at = self._text.find(part)
        while at >= 0 and len(rows) < 400:
            row = int(np.searchsorted(self._starts, at, side="right")) - 1
            rows.append(row)
            at = self._text.find(part, int(self._starts[row + 1]))
        return rows

    def _fuzzy(self, wanted: str, deadline: float) -> Iterator[str]:
        mask = np.uint64(_mask(wanted))
        candidates = np.flatnonzero((self._masks & mask) == mask)
        pattern = re.compile("[^\n]*?".join(map(re.escape, wanted)))
        scored: list[tuple[int, int]] = []
        for n, row in enumerate(candidates.tolist()):
            if match := pattern.search(self._lowered[row]):
                scored.append((match.end() - match.start(), row))
            if n % 256 == 255 and time.perf_counter() > deadline:
                break
        for _, row in sorted(scored):
            yield self._names[row]


def _mask(name: str) -> int:
    mask = 0
    for character in set(name):
        mask |= _CHARACTERS.get(character, _OTHER)
    return mask
