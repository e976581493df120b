"""Where the maps of a trace are printed: at intervals, and at the end."""

import time
from collections.abc import Callable, Iterable

from kgdbx.resident.maps import Map
from kgdbx.trace.json_lines import json_line
from kgdbx.trace.map_text import MAP_SCHEMA, map_json, map_text
from kgdbx.trace.sink import Output

__all__ = ("MapSink",)


class MapSink:
    """Prints maps.

    :param read: gives the maps as they are
    :param interval_s: seconds between two times; None for once, at the end
    :param is_json: one object a line, in place of text
    :ivar lost: hits that the maps had no room for, when they were printed last
    """

    def __init__(
        self,
        out: Output,
        read: Callable[[], Iterable[Map]],
        *,
        interval_s: float | None = None,
        is_json: bool = False,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out
        self._read = read
        self._interval_s = interval_s
        self._is_json = is_json
        self._now_s = now_s
        self._next_s = now_s() + (interval_s or 0)
        self.lost = 0
        if is_json:
            out.write(json_line({"schema": MAP_SCHEMA}) + "\n")

    def idle(self) -> None:
        """Print them if it is time."""
        if self._interval_s is not None and self._now_s() >= self._next_s:
            late_s = self._now_s() - self._next_s
            self._next_s += self._interval_s * (1 + late_s // self._interval_s)
            self.write()
            self._out.write("" if self._is_json else "\n")
            self._out.flush()

    def write(self) -> None:
        """Print them."""
        self.lost = 0
        for each in self._read():
            self.lost += each.lost
            text = map_json(each) if self._is_json else map_text(each)
            self._out.write(f"{text}\n" if text else "")
        self._out.flush()
