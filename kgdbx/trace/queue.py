"""Frames that one reader has yet to take."""

import collections
import dataclasses

from kgdbx.trace.binary import Frame, LostSource, lost_frame

__all__ = ("Delivery", "FrameQueue")

# How much goes to the system in one call.
_PARTS = 64


@dataclasses.dataclass(frozen=True)
class Delivery:
    """What became of the events that were written while a reader was there.

    :ivar offered: events written
    :ivar sent: events handed over to the system for the reader
    :ivar lost: events dropped because the reader was slow, or gone
    :ivar connected: whether the reader is still there
    """

    offered: int
    sent: int
    lost: int
    connected: bool


class FrameQueue:
    """A bounded queue of whole frames that counts what it drops, and says so to the reader.

    :param limit_bytes: how much may wait; frames that have to arrive are let in beyond it
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._frames: collections.deque[Frame] = collections.deque()
        self._queued_bytes = 0
        self._head_bytes = 0  # of the first frame, gone already
        self._untold = 0
        self._offered = 0
        self._sent = 0
        self._lost = 0

    def __bool__(self) -> bool:
        return bool(self._frames)

    def offer(self, frame: Frame) -> None:
        """Queue a frame, or count it as lost if there is no room."""
        self._offered += frame.events
        if frame.events and self._queued_bytes + frame.size_bytes > self._limit_bytes:
            self._lost += frame.events
            self._untold += frame.events
            return
        self.tell_lost()
        self._append(frame)

    def tell_lost(self) -> None:
        """Queue what says how many events are missing at this point, if any are."""
        if self._untold:
            self._append(lost_frame(self._untold, LostSource.READER))
            self._untold = 0

    def parts(self) -> list[memoryview]:
        """The first bytes that wait, in pieces; empty if none do."""
        pieces: list[memoryview] = []
        skip = self._head_bytes
        for frame in self._frames:
            for part in frame.parts:
                if skip < len(part):
                    pieces.append(memoryview(part)[skip:])
                skip = max(0, skip - len(part))
            if len(pieces) >= _PARTS:
                break
        return pieces

    def taken(self, size_bytes: int) -> None:
        """The first bytes are gone: there is room for more."""
        self._head_bytes += size_bytes
        while self._frames and self._head_bytes >= self._frames[0].size_bytes:
            frame = self._frames.popleft()
            self._head_bytes -= frame.size_bytes
            self._queued_bytes -= frame.size_bytes
            self._sent += frame.events
        if self._queued_bytes <= self._limit_bytes // 2:
            self.tell_lost()

    def discard(self) -> None:
        """Drop everything: the reader is gone."""
        self._lost += sum(frame.events for frame in self._frames)
        self._frames.clear()
        self._queued_bytes = self._head_bytes = self._untold = 0

    def delivery(self, *, connected: bool) -> Delivery:
        """Counts up to now; frames that wait are neither sent nor lost."""
        return Delivery(self._offered, self._sent, self._lost, connected)

    def _append(self, frame: Frame) -> None:
        self._frames.append(frame)
        self._queued_bytes += frame.size_bytes
