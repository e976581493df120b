"""A kernel in a core file, as QEMU's ``dump-guest-memory`` writes it."""

import dataclasses
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from kgdbx.arch import paging
from kgdbx.arch.registers import GENERAL_REGISTERS, Registers
from kgdbx.errors import MemoryFault, ProtocolError, TargetError, Unsupported
from kgdbx.target.base import IDLE_S, BreakpointKind, Capabilities, Stop, StopReason, Target

__all__ = ("CoreRam", "CoreTarget")

# /usr/include/elf.h
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_NHDR = struct.Struct("<III")
_ELF64_LITTLE = b"\x7fELF\x02\x01"
_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE = 4, 62, 1, 4
_MOST_SEGMENTS = 100_000
_MOST_NOTES = 1 << 20

# struct QEMUCPUState, target/i386/arch_dump.c: two numbers, 18 registers, 10 segments, 5 control
# registers, kernel_gs_base.
_CPU = struct.Struct("<II18Q240s5QQ")
_CPU_NAMES = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *(f"r{n}" for n in range(8, 16)),
    *("rip", "eflags"),
)
_SEGMENT = struct.Struct("<IIIIQ")
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")
_CR4_LA57 = 1 << 12
_PAGE = 4096


@dataclasses.dataclass(frozen=True)
class _Segment:
    physical: int
    size: int
    offset: int


class CoreRam:
    """The guest-physical memory that a core file holds. Nothing of the file is trusted.

    :param path: an ELF core file of x86-64
    :raises TargetError: if it cannot be read or is none
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:
            raise TargetError(f"cannot read {path}: {e}") from e
        try:
            self._segments, self.notes = self._read_headers()
        except BaseException:
            self._data.close()
            raise

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Guest-physical ``(start, size_bytes)`` of all that is there."""
        return tuple((s.physical, s.size) for s in self._segments)

    def read(self, address: int, size_bytes: int) -> bytes:
        """Read guest-physical memory.

        :raises MemoryFault: if any byte is not in the file
        """
        for segment in self._segments:
            start = address - segment.physical
            if start >= 0 and start + size_bytes <= segment.size:
                at = segment.offset + start
                return self._data[at : at + size_bytes]
        raise MemoryFault(address, size_bytes, physical=True)

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Read guest-physical memory into a buffer.

        :raises MemoryFault: if any byte is not in the file
        """
        if buffer.nbytes:
            buffer.cast("B")[:] = self.read(address, buffer.nbytes)

    def close(self) -> None:
        """Close the file."""
        self._data.close()

    def _read_headers(self) -> tuple[list[_Segment], list[bytes]]:
        data = self._data
        if data[:6] != _ELF64_LITTLE or len(data) < _EHDR.size:
            raise self._bad("it is no 64-bit ELF file; dump without compression")
        header = _EHDR.unpack_from(data)
        kind, machine, table, entry, count = (header[n] for n in (1, 2, 5, 9, 10))
        if (kind, machine) != (_ET_CORE, _EM_X86_64):
            raise self._bad("it is no core file of x86-64")
        if entry != _PHDR.size or count > _MOST_SEGMENTS or table + entry * count > len(data):
            raise self._bad("its program headers make no sense")
        found: dict[int, _Segment] = {}
        notes: list[bytes] = []
        for n in range(count):
            kind, _, offset, _, physical, size, _, _ = _PHDR.unpack_from(data, table + n * entry)
            if offset + size > len(data):
                raise self._bad(f"segment {n} reaches past its end: it was cut off")
            if kind == _PT_LOAD and size:
                segment = _Segment(physical, size, offset)
                if physical % _PAGE or size % _PAGE or physical + size > 1 << 52:
                    raise self._bad(f"segment {n} is not of whole pages")
                # With paging the same memory may be there at several virtual addresses.
                if physical not in found or found[physical].size < size:
                    found[physical] = segment
            elif kind == _PT_NOTE:
                notes += self._read_notes(offset, size)
        if not found:
            raise self._bad("it holds no memory")
        return _joined(sorted(found.values(), key=lambda s: s.physical)), notes

    def _read_notes(self, offset: int, size: int) -> list[bytes]:
        # Descriptions of all notes by QEMU itself: one a CPU.
        found = []
        end = offset + min(size, _MOST_NOTES)
        while offset + _NHDR.size <= end:
            name_size, desc_size, _ = _NHDR.unpack_from(self._data, offset)
            name = offset + _NHDR.size
            desc = name + (name_size + 3 & ~3)
            if desc + desc_size > end:
                break
            if self._data[name : name + name_size].rstrip(b"\0") == b"QEMU":
                found.append(self._data[desc : desc + desc_size])
            offset = desc + (desc_size + 3 & ~3)
        return found

    def _bad(self, why: str) -> TargetError:
        return TargetError(f"cannot use {self._path}: {why}")


class CoreTarget(Target):
    """The kernel in a core file: it stands for ever.

    :param ram: its memory, and its vCPUs' states as QEMU noted them
    :raises ProtocolError: if the file has no states of vCPUs
    """

    def __init__(self, path: Path) -> None:
        self.ram = CoreRam(path)
        self._name = str(path)
        self._cpus = [_registers(note) for note in self.ram.notes if len(note) >= _CPU.size]
        if not self._cpus:
            self.ram.close()
            raise ProtocolError(f"{path} has no state of CPUs; dump it with QEMU's own command")

    @property
    def name(self) -> str:
        """The file's name."""
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        """Memory only."""
        return Capabilities(
            hardware_breakpoints=0,
            software_breakpoints=0,
            physical_memory=True,
            reads_while_running=True,
            writes_while_running=False,
        )

    @property
    def running(self) -> bool:
        """Never."""
        return False

    def cpus(self) -> tuple[int, ...]:
        """Numbers of all vCPUs."""
        return tuple(range(len(self._cpus)))

    def read_memory(self, address: int, size_bytes: int, *, cpu: int | None = None) -> bytes:
        """Read virtual memory through a vCPU's page tables.

        :raises MemoryFault: if any byte is not mapped, or not in the file
        """
        registers = self._cpus[cpu or 0]
        levels = 5 if registers.cr4 & _CR4_LA57 else 4

        def translate(at: int) -> paging.Translation:
            return paging.translate(self._word, registers.cr3, at, levels)

        return paging.read_virtual(self.ram.read, translate, address, size_bytes)

    def read_physical(self, address: int, size_bytes: int) -> bytes:
        """Read guest-physical memory.

        :raises MemoryFault: if any byte is not in the file
        """
        return self.ram.read(address, size_bytes)

    def read_registers(self, cpu: int) -> Registers:
        """Registers of a vCPU when the file was written."""
        return self._cpus[cpu].copy()

    def interrupt(self) -> Stop:
        """It stands already."""
        return Stop(0, StopReason.INTERRUPT)

    def forget_stop_request(self) -> None:
        """There is none."""

    def request_stop(self) -> None:
        """It stands already."""

    def close(self, *, resume: bool = True) -> None:
        """Close the file."""
        self.ram.close()

    def write_memory(self, address: int, data: bytes, *, cpu: int | None = None) -> None:
        """Refused: a core file is not changed."""
        self._refuse()

    def write_physical(self, address: int, data: bytes) -> None:
        """Refused: a core file is not changed."""
        self._refuse()

    def flush_translations(self) -> None:
        """Refused: nothing runs."""
        self._refuse()

    def write_registers(self, cpu: int, registers: Registers) -> None:
        """Refused: nothing runs."""
        self._refuse()

    def insert_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        """Refused: nothing runs."""
        self._refuse()

    def remove_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        """There is none."""

    def step(self, cpu: int) -> Stop:
        """Refused: nothing runs."""
        self._refuse()

    def resume(self) -> None:
        """Refused: nothing runs."""
        self._refuse()

    def run(
        self,
        on_stop: Callable[[Stop], bool] | None = None,
        timeout_s: float | None = None,
        on_idle: Callable[[], None] | None = None,
        idle_s: float = IDLE_S,
    ) -> Stop | None:
        """Refused: nothing runs."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise Unsupported(f"{self._name} is a core file: it can be read and nothing else")

    def _word(self, address: int) -> int:
        return int.from_bytes(self.ram.read(address, 8), "little")


def _joined(segments: list[_Segment]) -> list[_Segment]:
    # Neighbours in memory and in the file become one; of overlaps the rest is kept.
    joined: list[_Segment] = []
    for segment in segments:
        if joined:
            last = joined[-1]
            end = last.physical + last.size
            if segment.physical + segment.size <= end:
                continue
            if segment.physical < end:
                cut = end - segment.physical
                segment = _Segment(end, segment.size - cut, segment.offset + cut)
            if segment.physical == end and segment.offset == last.offset + last.size:
                joined[-1] = _Segment(last.physical, last.size + segment.size, last.offset)
                continue
        joined.append(segment)
    return joined


def _registers(note: bytes) -> Registers:
    fields = _CPU.unpack_from(note)
    values = dict(zip(_CPU_NAMES, fields[2:20], strict=True))
    segments = list(_SEGMENT.iter_unpack(fields[20]))
    for name, (selector, _, _, _, base) in zip(_SEGMENTS, segments, strict=False):
        values[name] = selector
        values[f"{name}_base"] = base
    values.update(zip(("cr0", "cr1", "cr2", "cr3", "cr4"), fields[21:26], strict=True))
    values["k_gs_base"] = fields[26]
    assert set(GENERAL_REGISTERS) <= set(values)
    return Registers(values)
