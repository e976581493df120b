"""The guest's clock at a stop, from what the kernel's timekeeping has written down last."""

import drgn

from kgdbx.symbols.kernel import Kernel

__all__ = ("LastTick",)

_WORD_BYTES = 8


class LastTick:
    """``CLOCK_MONOTONIC`` at the last timer tick, some milliseconds ago at most.

    Between two ticks the kernel adds what its clock source counts. A debug stub shows no such
    counter: this is the time that it cannot be earlier than. See ``struct timekeeper``,
    include/linux/timekeeper_internal.h.

    :raises LookupError: if the kernel has no such thing
    :raises AttributeError: if it has, and not in this form
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        program = kernel.program
        core = program["tk_core"]
        reader = core.timekeeper.tkr_mono
        assert core.address_ is not None
        self._address = core.address_
        # seqcount_raw_spinlock_t begins with its counter, include/linux/seqlock.h
        self._seq = _offset(core, core.seq)
        self._cycles = _offset(core, reader.cycle_last)
        self._shift = _offset(core, reader.shift)
        self._nsec = _offset(core, reader.xtime_nsec)
        self._base = _offset(core, reader.base)
        self._clock = _offset(core, reader.clock)
        self._name_at = program.type("struct clocksource").member("name").offset
        offsets = (self._seq, self._cycles, self._shift, self._nsec, self._base, self._clock)
        self._size_bytes = max(offsets) + _WORD_BYTES
        self._last: tuple[int, int | None] = 0, None

    def read(self) -> tuple[int, int | None]:
        """Nanoseconds of ``CLOCK_MONOTONIC``, and the time stamp counter at that moment.

        The kernel stands. 0 before it keeps time; None where its clock is another counter. While
        a tick is being written down, that of the one before.

        :raises MemoryFault: if the kernel's memory cannot be read
        """
        data = self._kernel.memory.read(self._address, self._size_bytes)

        def word(at: int, size_bytes: int = _WORD_BYTES) -> int:
            return int.from_bytes(data[at : at + size_bytes], "little")

        if not word(self._seq, 4) & 1:
            ns = word(self._base) + (word(self._nsec) >> (word(self._shift, 4) & 63))
            self._last = ns, word(self._cycles) if self._is_tsc(word(self._clock)) else None
        return self._last

    def _is_tsc(self, clock: int) -> bool:
        memory = self._kernel.memory
        name = memory.read_u64(clock + self._name_at) if clock else 0
        return name != 0 and memory.read(name, 4) == b"tsc\0"


def _offset(whole: drgn.Object, part: drgn.Object) -> int:
    assert whole.address_ is not None and part.address_ is not None
    return int(part.address_ - whole.address_)
