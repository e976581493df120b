"""The very bytes that go into the guest, run natively: what a hit costs without an emulator."""

import struct
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from kgdbx.bench.figure import Figure, figure
from kgdbx.errors import MachineError
from kgdbx.resident.compile.codegen import Body
from kgdbx.resident.compile.kernel_facts import KernelFacts
from kgdbx.resident.compile.link import compile_unit
from kgdbx.resident.compile.stub import StubCall, site_stub
from kgdbx.resident.compile.unit import Unit
from kgdbx.resident.ring import Stream

__all__ = ("entry_cost",)

_CODE, _DATA = 0x40000000, 0x50000000  # within reach of a sign-extended push
_PROBE, _CONTROL, _CHUNKS, _RING = _DATA, _DATA + 0x100, _DATA + 0x200, _DATA + 0x10000
_RESUME = _CODE + 0x10105  # native.c
_SLOT_BYTES, _SLOTS = 64, 16384
_POSITION, _COUNTERS = 0x200, 0x300  # behind gs
_CALLS = 20_000_000
_RUN_S = 120
_FACTS = KernelFacts(
    "#define CURRENT 0x100UL\n#define CPU_NUMBER 0x108UL\n#define PREEMPT_COUNT 0x110UL\n"
    "#define TASK_PID 0x10UL\n#define TASK_COMM 0x40UL\n#define GUARD 0x118UL\n"
    "#define WINDOW 0x40000000UL\n#define WINDOW_BYTES 0x200000UL\n#define TSC_HZ 1000000000UL\n"
    "#define NS_PER_TICK 0x100000000UL\n"
)
_ONE_FIELD = Body(None, "\t*(u64 *)(rec + 48) = c->di;", (), 56, (), False, False)


def entry_cost(rounds: int) -> Iterator[Figure]:
    """An entry event with one field: nanoseconds, and cycles of the time stamp counter.

    DKM published 200 ns at 800 MHz, which is 160 cycles.
    """
    blob, site = _image()
    samples = [_run(blob, site) for _ in range(rounds)]
    yield figure("probes.native.entry_ns", (ns for ns, _ in samples), "ns")
    yield figure("probes.native.entry_cycles", (cycles for _, cycles in samples), "1")


def _image() -> tuple[bytes, int]:
    unit = Unit(_FACTS)
    stream = Stream(_SLOT_BYTES, _SLOTS, _SLOTS, False, _POSITION, _CONTROL)
    handler = unit.handler("p", _ONE_FIELD, stream)
    unit.add(site_stub(0, [StubCall(_PROBE, handler)], 16))
    linked = compile_unit(unit.text).link(_CODE, 0, lambda name: 0)
    code = bytearray(linked.code)
    tail = linked.symbols["tail_0"]
    jump = b"\xe9" + (_RESUME - tail - 5).to_bytes(4, "little", signed=True)
    code[tail - _CODE : tail - _CODE + 5] = jump
    data = struct.pack("<QQIIIIQ", _COUNTERS, 0, 0, 0, 1, 0, 0).ljust(0x100, b"\0")
    data += struct.pack("<QQQQ", _CHUNKS, 0, 0, 0).ljust(0x100, b"\0")
    data += struct.pack("<Q", _RING)
    return bytes(code).ljust(1 << 16, b"\xcc") + data, linked.symbols["site_0"]


def _run(blob: bytes, site: int) -> tuple[float, float]:
    source = resources.files("kgdbx.bench").joinpath("native.c")
    with tempfile.TemporaryDirectory(prefix="kgdbx-bench-") as directory:
        program, image = Path(directory) / "native", Path(directory) / "image"
        image.write_bytes(blob)
        with resources.as_file(source) as path:
            subprocess.run(["gcc", "-O2", "-o", program, path], check=True, timeout=_RUN_S)
        values = (_CODE, _DATA, site, _POSITION, _SLOTS, _CALLS)
        done = subprocess.run(
            [program, image, *map(str, values)],
            capture_output=True,
            text=True,
            timeout=_RUN_S,
            check=False,
        )
    if done.returncode:
        raise MachineError(f"the native run failed: status {done.returncode} {done.stderr}")
    ns, cycles, _ = done.stdout.split()
    return float(ns), float(cycles)
