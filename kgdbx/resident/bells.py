"""Hits that wait for the host: one place for each CPU, and the word that the stub watches."""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kgdbx.arch.registers import Registers
from kgdbx.resident.guest_call import Script
from kgdbx.resident.host import HostView
from kgdbx.resident.memory import PAGE_BYTES, Block, GuestMemory

__all__ = ("BELL_WATCH_BYTES", "Bell", "Bells", "make_bells")

BELL_WATCH_BYTES = 16
"""More than a debug register can watch: QEMU does, and none is taken from the user."""

_BELL = struct.Struct("<25Q")  # struct bell, prelude.h
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
    :ivar regs: as they were at the probe
    """

    cpu: int
    address: int
    tsc: int
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

    def waiting(self, host: HostView, gs_bases: Mapping[int, int]) -> Iterator[Bell]:
        """The vCPUs that wait now. The kernel stands."""
        data = host.read(self.address, _BELL.size * self.cpus)
        for cpu, (pending, address, cr3, tsc, *values) in enumerate(_BELL.iter_unpack(data)):
            if pending:
                names = {name: v for name, v in zip(_NAMES, values, strict=True) if name}
                yield Bell(
                    cpu,
                    address,
                    tsc,
                    Registers({**names, "cr3": cr3, "gs_base": gs_bases[cpu]}),
                )

    def answer(self, host: HostView, cpu: int) -> None:
        """Let a vCPU go on when the kernel runs."""
        host.write(self.address + _BELL.size * cpu, bytes(8))


def make_bells(memory: GuestMemory, cpus: int) -> Script[Bells]:
    """Take memory for them from the guest."""
    size = PAGE_BYTES + -(-cpus * _BELL.size // PAGE_BYTES) * PAGE_BYTES
    block: Block = yield from memory.pages(size)
    return Bells(block.address, block.address + PAGE_BYTES, cpus)
