"""The reader in the documentation, and one in C, run as programs of their own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest

from kgdbx.probes.event import Event
from kgdbx.resident.clock import Clock
from kgdbx.resident.layout import FieldLayout, ProbeLayout
from kgdbx.trace.endpoint import FifoEndpoint, SocketEndpoint
from kgdbx.trace.fifo import Fifo
from kgdbx.trace.recording_writer import RecordingWriter
from kgdbx.trace.sink import RecordSink

DOCS = Path(__file__).parents[3] / "docs"
READER = DOCS / "read_trace.py"
DEADLINE_S = 20.0
Write = Callable[[RecordSink], None]

EXPECTED = """\
b'cat' 412 [000] 50000 kprobes/n n=0
b'cat' 412 [000] 50001 kprobes/n n=1
b'cat' 412 [003] 52000 kprobes/opened filename=b'/etc/passwd' $retval=-2
b'cat' 412 [003] 52000 kprobes/opened filename=(fault) $retval=-13
b'sh' 7 [001] 50000 kprobes/k x=0x10 bits=-3 list=01 00 fe ff wide=4294967294 $comm=b'sh' same=text
LOST 17 EVENTS
"""


@pytest.fixture
def write(
    entry: ProbeLayout,
    opened: ProbeLayout,
    opened_record: Callable[..., bytes],
    numbered: Callable[..., npt.NDArray[Any]],
) -> Write:
    """Writes a bit of everything."""
    fields = (
        FieldLayout("x", 48, 2, "x"),
        FieldLayout("bits", 50, 1, "s", bits=(2, 4)),
        FieldLayout("list", 52, 4, "u", count=2),
        FieldLayout("wide", 54, 2, "u", bits=(0, 32), is_signed=True),
        FieldLayout("$comm", 32, 16, "string"),
        FieldLayout("same", 0, 0, "string", value="text"),
    )
    kinds = ProbeLayout(3, "kprobes/k", "w", 0, "data", 56, fields)

    def write(sink: RecordSink) -> None:
        sink.add_probes([entry])
        records = numbered(2)
        records["tsc"] = (1000, 1002)
        sink.write_batch(records)
        sink.add_probes([opened, kinds])
        sink.write_batch(opened_record() + opened_record(retval=-13, faults=1), 344)
        records = numbered(1)
        records["probe"], records["pid"], records["cpu"], records["comm"] = 3, 7, 1, b"sh"
        records["n"] = int.from_bytes(b"\x10\0\xb4\0\x01\0\xfe\xff", "little")
        sink.write_batch(records)
        sink.write_lost(17)
        sink.close()

    return write


def test_it_has_40_lines() -> None:
    assert len(READER.read_text().splitlines()) <= 40


def test_a_recording(write: Write, clock: Clock, tmp_path: Path) -> None:
    write(RecordingWriter(tmp_path / "trace", clock))
    run = [sys.executable, "-I", READER, tmp_path / "trace"]
    assert subprocess.run(run, capture_output=True, check=True, text=True).stdout == EXPECTED


@pytest.mark.parametrize("kind", [FifoEndpoint, SocketEndpoint])
def test_a_stream(write: Write, clock: Clock, tmp_path: Path, kind: type[Any]) -> None:
    fifo = Fifo(kind(tmp_path / "events"), clock)
    run = [sys.executable, "-I", READER, fifo.path]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as reader:
        assert fifo.wait_for_reader(DEADLINE_S)
        write(fifo)
        assert reader.communicate(timeout=DEADLINE_S)[0] == EXPECTED
    assert reader.returncode == 0


def test_other_events(clock: Clock, tmp_path: Path, event: Callable[..., Event]) -> None:
    writer = RecordingWriter(tmp_path / "trace", clock)
    writer.write([event()])
    writer.close()
    run = [sys.executable, "-I", READER, tmp_path / "trace"]
    output = subprocess.run(run, capture_output=True, check=True, text=True).stdout
    assert output.startswith('{"ts_ns":12345678901234,"cpu":3,"comm":"cat",')


def test_not_a_trace(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"x" * 100)
    run = [sys.executable, "-I", READER, tmp_path / "other"]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 1
    assert "this is not the start of a trace" in result.stderr


C_READER = """
#include <stdint.h>
#include <stdio.h>
#include <string.h>
struct header { char magic[8]; uint16_t version, size; uint32_t order;
    uint64_t tsc_base, ns_base, mult; uint32_t shift; char zeros[20]; };
struct frame { uint32_t size; uint16_t type, zero; uint32_t record_bytes, count; };
struct record { uint64_t seq, tsc; uint32_t pid, tgid, probe; uint16_t cpu, flags;
    char comm[16]; };
static _Alignas(8) char content[16 << 20];
int main(void)
{
    struct header h;
    struct frame f;
    if (fread(&h, sizeof h, 1, stdin) != 1 || memcmp(h.magic, "KGDBXTRC", 8))
        return 1;
    while (fread(&f, sizeof f, 1, stdin) == 1) {
        if (f.size > sizeof content || fread(content, 1, f.size, stdin) != f.size)
            return 2;
        for (uint32_t i = 0; f.type == 2 && i < f.count; i++) {
            const struct record *r = (void *)(content + i * f.record_bytes);
            uint64_t ns = h.ns_base
                + ((__int128)(int64_t)(r->tsc - h.tsc_base) * h.mult >> h.shift);
            printf("%.16s %u %u %u %lu\\n", r->comm, r->pid, r->probe, r->cpu, ns);
        }
    }
    return f.type != 5;
}
"""


def test_in_c(write: Write, clock: Clock, tmp_path: Path) -> None:
    write(RecordingWriter(tmp_path / "trace", clock))
    compiler = ["gcc", "-Wall", "-Werror", "-o", tmp_path / "reader", "-x", "c", "-"]
    subprocess.run(compiler, input=C_READER, text=True, check=True)
    with (tmp_path / "trace").open("rb") as file:
        result = subprocess.run(
            [tmp_path / "reader"], stdin=file, stdout=subprocess.PIPE, check=True
        )
    assert result.stdout.decode().splitlines() == [
        "cat 412 1 0 50000",
        "cat 412 1 0 50001",
        "cat 412 2 3 52000",
        "cat 412 2 3 52000",
        "sh 7 3 1 50000",
    ]
