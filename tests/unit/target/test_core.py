"""Core files: what is in one is found, and what is no good is refused with the reason."""

import struct
from pathlib import Path

import pytest

from kgdbx.errors import MemoryFault, TargetError, Unsupported
from kgdbx.target.core import CoreRam, CoreTarget

PAGE = 4096


def note(rip: int) -> bytes:
    registers = [0] * 16 + [rip, 2]
    state = struct.pack("<II18Q", 1, 440, *registers) + bytes(240) + struct.pack("<6Q", *[0] * 6)
    return struct.pack("<III", 5, len(state), 0) + b"QEMU\0\0\0\0" + state


def core(segments: list[tuple[int, bytes]], notes: bytes = b"", *, kind: int = 4) -> bytes:
    count = len(segments) + 1
    table = 64
    at = table + 56 * count
    parts = [notes]
    headers = [struct.pack("<IIQQQQQQ", 4, 0, at, 0, 0, len(notes), len(notes), 0)]
    at += len(notes)
    for physical, data in segments:
        size = len(data)
        headers.append(struct.pack("<IIQQQQQQ", 1, 0, at, 0, physical, size, size, 0))
        parts.append(data)
        at += size
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        kind,
        62,
        1,
        0,
        table,
        0,
        0,
        64,
        56,
        count,
        0,
        0,
        0,
    )
    return header + b"".join(headers) + b"".join(parts)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "core"
    path.write_bytes(data)
    return path


def test_memory_and_registers(tmp_path: Path) -> None:
    pages = [bytes([n]) * PAGE for n in range(4)]
    data = core(
        [(0, pages[0] + pages[1]), (2 * PAGE, pages[2]), (1 << 32, pages[3])],
        note(0x1111) + note(0x2222),
    )
    target = CoreTarget(write(tmp_path, data))
    assert target.ram.ranges() == ((0, 3 * PAGE), (1 << 32, PAGE))
    assert target.ram.read(PAGE - 1, 2) == b"\0\1"
    assert target.ram.read(2 * PAGE - 1, 2) == b"\1\2"
    with pytest.raises(MemoryFault):
        target.ram.read(3 * PAGE - 1, 2)
    assert [target.read_registers(cpu).rip for cpu in target.cpus()] == [0x1111, 0x2222]
    with pytest.raises(Unsupported, match="can be read and nothing else"):
        target.resume()
    target.close()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"KDUMP   " + bytes(100), "it is no 64-bit ELF file; dump without compression"),
        (core([(0, bytes(PAGE))], kind=2), "it is no core file of x86-64"),
        (core([(0, bytes(PAGE))])[:-1], "segment 1 reaches past its end: it was cut off"),
        (core([(0, bytes(100))]), "segment 1 is not of whole pages"),
        (core([]), "it holds no memory"),
        (core([(0, bytes(PAGE))])[:100], "its program headers make no sense"),
    ],
)
def test_refused(tmp_path: Path, data: bytes, why: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(TargetError) as caught:
        CoreRam(path)
    assert str(caught.value) == f"cannot use {path}: {why}"
