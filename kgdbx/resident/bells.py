"""Hits that wait for the host: one place for each CPU, and the word that the stub watches."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kgdbx.arch.registers import Registers
from kgdbx.resident.guest_call import Script
from kgdbx.resident.host import HostView
from kgdbx.resident.memory import PAGE_BYTES, Block, GuestMemory

__all__ = ("BELL_WATCH_BYTES", "Bell", "Bells", "make_bells")

BELL_WATCH_BYTES = 16
"""More than a debug register can watch: QEMU does, and none is taken from the user."""

_BELL = struct.Struct("<27Q")  # struct bell, prelude.h
_GIVEN_UP, _REGS = 32, 48  # offsets in it
_FREE, _WAITS, _ANSWERED = range(3)
_GO_ON, _GO_ON_WITH, _GO_THERE = range(3)
# struct regs, by gdb's names; None is left out
_NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx"),
    *("rsi", "rdi", None, "rip", "cs", "eflags", "rsp", "ss"),
)


@dataclass(frozen=True)
class Bell:
    """A vCPU that waits.

    :ivar address: of the ``struct probe``'s site
    :ivar tsc: when it was hit
    :ivar gave_up: whether hits before it on this CPU were missed, because nobody answered
    :ivar regs: as they were at the probe
    """

    cpu: int
    address: int
    tsc: int
    gave_up: bool
    regs: Registers


@dataclass(frozen=True)
class Bells:
    """Where vCPUs wait.

    :ivar watched: a word alone in its page: TCG slows down all accesses to a page with a
        watchpoint
    :ivar address: ``struct bell`` of each CPU
    """

    watched: int
    address: int
    cpus: int

    def waiting(self, host: HostView, gs_bases: Sequence[int]) -> Iterator[Bell]:
        """The vCPUs that wait now. The kernel stands."""
        data = host.read(self.address, _BELL.size * self.cpus)
        for cpu, bell in enumerate(_BELL.iter_unpack(data)):
            pending, address, cr3, tsc, given_up, _, *values = bell
            if pending == _WAITS:
                names = {name: v for name, v in zip(_NAMES, values, strict=True) if name}
                yield Bell(
                    cpu,
                    address,
                    tsc,
                    given_up > 0,
                    Registers({**names, "cr3": cr3, "gs_base": gs_bases[cpu]}),
                )

    def free(self, host: HostView, cpu: int) -> None:
        """Forget a vCPU that waits: it is taken elsewhere."""
        bell = self.address + _BELL.size * cpu
        host.write(bell + _GIVEN_UP, bytes(16))
        host.write(bell, _FREE.to_bytes(8, "little"))

    def answer(
        self, host: HostView, cpu: int, regs: Registers | None = None, *, leaves: bool = False
    ) -> None:
        """Let a vCPU go on when the kernel runs.

        :param regs: what it shall go on with; None for what it has
        :param leaves: whether it goes where they say, and not to what else is at the place
        """
        bell = self.address + _BELL.size * cpu
        answer = _GO_ON
        if regs is not None:
            answer = _GO_THERE if leaves else _GO_ON_WITH
            values = (regs[name] if name else 0 for name in _NAMES)
            host.write(bell + _REGS, struct.pack(f"<{len(_NAMES)}Q", *values))
        host.write(bell + _GIVEN_UP, struct.pack("<2Q", 0, answer))
        host.write(bell, _ANSWERED.to_bytes(8, "little"))


def make_bells(memory: GuestMemory, cpus: int) -> Script[Bells]:
    """Take memory for them from the guest."""
    size = PAGE_BYTES + -(-cpus * _BELL.size // PAGE_BYTES) * PAGE_BYTES
    block: Block = yield from memory.pages(size)
    return Bells(block.address, block.address + PAGE_BYTES, cpus)
