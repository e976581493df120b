"""Time stamp counter to nanoseconds of the guest's ``CLOCK_MONOTONIC``."""

import dataclasses
import struct

from kgdbx.symbols.kernel import Kernel

__all__ = (
    "Clock",
    "IDENTITY",
    "SAMPLE_SOURCE",
    "clock_from_sample",
)

_SHIFT = 32

SAMPLE_SOURCE = """\
u64 ktime_get(void);
void sample_clock(u64 *sample)
{
	u64 least = ~0UL;
	u32 n;

	for (n = 0; n < 16; n++) {
		u64 before = read_tsc(), ns = ktime_get(), after = read_tsc();

		if (after - before >= least)
			continue;
		least = after - before;
		sample[0] = before;
		sample[1] = ns;
		sample[2] = after;
	}
}
"""
"""A function that reads both clocks at once: several times, as a host that is busy may have the
vCPU stand still in between."""


@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """A line through one moment, in the form of the kernel's clock sources.

    See ``struct clocksource``, include/linux/clocksource.h.

    :ivar tsc_base: the counter at that moment
    :ivar ns_base: nanoseconds at that moment
    :ivar mult: nanoseconds a tick, times 2 to the power of *shift*
    :ivar shift: see *mult*
    """

    tsc_base: int
    ns_base: int
    mult: int
    shift: int

    def ns(self, tsc: int) -> int:
        """Nanoseconds at a value of the counter."""
        return self.ns_base + self.duration_ns(tsc - self.tsc_base)

    def duration_ns(self, ticks: int) -> int:
        """Nanoseconds of a number of ticks."""
        return ticks * self.mult >> self.shift


IDENTITY = Clock(0, 0, 1, 0)
"""For a counter that counts nanoseconds, and for one whose rate is not known."""


def clock_from_sample(kernel: Kernel, sample: bytes) -> Clock:
    """The line through what ``sample_clock()`` wrote, at the rate that the kernel measured.

    That rate, ``tsc_khz``, is right to some parts in 10,000; the kernel corrects the clock that
    it shows, but not the counter.
    """
    before, ns, after = struct.unpack("<QQQ", sample)
    khz = kernel.memory.read_u32(kernel.address("tsc_khz"))
    return Clock((before + after) // 2, ns, (10**6 << _SHIFT) // khz, _SHIFT)
