"""Guest RAM in a file, without a guest: mapped by us, or privately by another process."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kgdbx.errors import MemoryFault, TargetError, TargetLost
from kgdbx.target.ram import GuestRam

LARGE = 3 << 30  # 2 GiB below the hole, 1 GiB above 4 GiB; sparse
LOW_END, HIGH_START, HIGH_END = 2 << 30, 4 << 30, 5 << 30

OWNER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
print("mapped", flush=True)
sys.stdin.readline()
"""
# Counts the values of an aligned word that are neither of the two that are written.
WATCHER = """
import mmap, sys, time
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
size = int(sys.argv[2])
words = memoryview(memory).cast({2: "H", 4: "I", 8: "Q"}[size])
whole = (0, (1 << 8 * size) - 1)
print("mapped", flush=True)
seen, torn, end = set(), 0, time.monotonic() + 0.5
while time.monotonic() < end or len(seen) < 2 and time.monotonic() < end + 20:
    for _ in range(1000):
        value = words[5]
        if value in whole:
            seen.add(value)
        else:
            torn += 1
print(len(seen), torn, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "ram"
    file.touch()
    with file.open("r+b") as stream:
        stream.truncate(LARGE)
    return file


@pytest.fixture
def owner(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-c", OWNER, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mapped\n"
        yield process
        process.kill()


@pytest.fixture(params=["shared", "private"])
def ram(request: pytest.FixtureRequest, path: Path) -> Iterator[GuestRam]:
    pid = request.getfixturevalue("owner").pid if request.param == "private" else None
    with GuestRam(path, LARGE, pid) as it:
        yield it


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 16, 4096, 70_000])
@pytest.mark.parametrize("address", [0, 3, 0x1000, LOW_END - 70_000, HIGH_START, HIGH_END - 70_000])
def test_what_is_written_is_read(ram: GuestRam, address: int, size: int) -> None:
    data = bytes((address + n) * 7 & 0xFF | 1 for n in range(size))
    ram.write(address, data)
    assert ram.read(address, size) == data
    buffer = bytearray(size)
    ram.read_into(address, memoryview(buffer))
    assert buffer == data
    after = ram.read(address + size, 8) if address + size + 8 <= LOW_END else bytes(8)
    assert after == bytes(8)
    if address:
        before = max(0, address - 8) if address < HIGH_START else None
        if before is not None:
            assert ram.read(before, address - before) == bytes(address - before)


def test_low_and_high_memory_are_not_the_same(ram: GuestRam) -> None:
    ram.write(0x2000, b"low")
    ram.write(HIGH_START + 0x2000, b"high")
    assert ram.read(0x2000, 4) == b"low\0"
    assert ram.ranges() == ((0, LOW_END), (HIGH_START, HIGH_END - HIGH_START))


@pytest.mark.parametrize(
    "address", [-8, LOW_END - 4, LOW_END, HIGH_START - 4, HIGH_END - 4, HIGH_END, 1 << 46]
)
def test_what_is_no_ram_is_a_fault(ram: GuestRam, address: int) -> None:
    buffer = bytearray(b"12345678")
    for access in (
        lambda: ram.read(address, 8),
        lambda: ram.read_into(address, memoryview(buffer)),
        lambda: ram.write(address, bytes(buffer)),
    ):
        with pytest.raises(MemoryFault) as fault:
            access()
        assert (fault.value.address, fault.value.size_bytes) == (address, 8)
        assert fault.value.physical
    assert str(fault.value) == f"cannot write 8 bytes at physical address {address:#x}"
    assert buffer == b"12345678"


def test_into_arrays(ram: GuestRam) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros((4, 2), dtype=numpy.uint64)
    ram.write(0x3000, b"".join(n.to_bytes(8, "little") for n in range(8)))
    ram.read_into(0x3000, array.data)
    assert array.ravel().tolist() == list(range(8))
    ram.read_into(0x3008, array[1:].data)
    assert array.ravel().tolist() == [0, 1, 1, 2, 3, 4, 5, 6]
    ram.read_into(0x3000, memoryview(b""))


def test_a_private_mapping_leaves_the_file_alone(
    path: Path, owner: subprocess.Popen[bytes]
) -> None:
    with GuestRam(path, LARGE, owner.pid) as private, GuestRam(path, LARGE) as shared:
        private.write(0x1000, b"private!")
        assert shared.read(0x1000, 8) == bytes(8)
        shared.write(0x2000, b"shared!!")
        assert private.read(0x2000, 8) == b"shared!!"
        assert private.read(0x1000, 8) == b"private!"


def test_a_vm_that_has_ended(path: Path, owner: subprocess.Popen[bytes]) -> None:
    with GuestRam(path, LARGE, owner.pid) as ram:
        ram.write(0, b"12345678")
        owner.kill()
        owner.wait(10)
        for access in (
            lambda: ram.read(0, 8),
            lambda: ram.read_into(0, memoryview(bytearray(8))),
            lambda: ram.write(0, b"12345678"),
        ):
            with pytest.raises(TargetLost, match="the VM's memory is gone"):
                access()
    with pytest.raises(TargetError, match="has the VM ended"):
        GuestRam(path.with_name("other"), LARGE, os.getpid())


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_word_is_written_at_once(path: Path, size: int) -> None:
    argv = [sys.executable, "-c", WATCHER, str(path), str(size)]
    values = (bytes(size), b"\xff" * size)
    with (
        GuestRam(path, LARGE) as ram,
        subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as watcher,
    ):
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "mapped\n"
        end = time.monotonic() + 60
        while watcher.poll() is None and time.monotonic() < end:
            for value in values * 500:
                ram.write(5 * size, value)
        assert watcher.stdout.readline() == "2 0\n"


def test_closed_twice(ram: GuestRam) -> None:
    ram.write(0, b"12345678")
    ram.close()
    ram.close()
