"""Maps: from the words of tables to rows, to bpftrace's text and to JSON."""

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest

from kgdbx.errors import ProbeError
from kgdbx.probes.value import KernelStack
from kgdbx.resident.compile.aggregate import MapShape
from kgdbx.resident.compile.codegen import RecordField
from kgdbx.resident.layout import FieldLayout
from kgdbx.resident.maps import Map, Maps, Row
from kgdbx.trace.map_sink import MapSink
from kgdbx.trace.map_text import map_json, map_text

MASK = (1 << 64) - 1
SIGN = 1 << 63
KEY = RecordField(FieldLayout("n", 0, 8, "u"), lambda data: int.from_bytes(data, "little"))


def read(function: str, values: list[int], *, signed: bool = True, steps: Any = None) -> Row:
    """The row of one key whose values are in a table."""
    shape = MapShape("m", function, ("n",), 8, signed, steps)
    table = SimpleNamespace(
        read=lambda host: {(5).to_bytes(8, "little"): values}, lost=lambda host: 0
    )
    engine: Any = SimpleNamespace(table=lambda shape: table, host=None, programs={})
    maps = Maps(engine)
    maps.add(shape, (KEY,))
    (found,) = maps.read()
    (row,) = found.rows
    assert row.key == (5,)
    return row


@pytest.mark.parametrize(
    ("function", "values", "signed", "value"),
    [
        ("count", [1009], False, 1009),
        ("sum", [3, MASK - 6], True, -7),
        ("sum", [3, MASK - 6], False, MASK - 6),
        ("avg", [3, MASK - 6], True, -2),
        ("avg", [3, 8], False, 2),
        ("max", [2, MASK - 1 ^ SIGN], True, -2),
        ("max", [2, 9], False, 9),
        ("min", [2, MASK ^ (MASK - 1 ^ SIGN)], True, -2),
        ("min", [2, MASK ^ 9], False, 9),
    ],
)
def test_values(function: str, values: list[int], signed: bool, value: int) -> None:
    assert read(function, values, signed=signed) == Row((5,), value)


def test_histograms() -> None:
    powers = read("hist", [1, 0, 2, 3] + [0] * 62)
    assert powers == Row((5,), 6, ((None, 0, 1), (0, 1, 0), (1, 2, 2), (2, 4, 3)))
    steps = read("lhist", [1, 0, 4, 2], steps=(0, 20, 10))
    assert steps == Row((5,), 7, ((None, 0, 1), (0, 10, 0), (10, 20, 4), (20, None, 2)))


def test_a_name_is_one_map_while_it_is_used() -> None:
    one = MapShape("m", "count", (), 0, False)
    other = MapShape("m", "sum", (), 0, False)
    programs = {1: SimpleNamespace(body=SimpleNamespace(map=one))}
    engine: Any = SimpleNamespace(programs=programs)
    maps = Maps(engine)
    maps.add(one, ())
    maps.add(one, ())
    with pytest.raises(ProbeError, match="@m is a map of count already"):
        maps.add(other, ())
    programs.clear()
    maps.add(other, ())


def test_text() -> None:
    rows = (Row(("a\n", 3), 1), Row((KernelStack(["f+0x1/0x2", "g+0x3/0x4"]),), 70))
    assert map_text(Map("", "count", ("x",), rows, lost=1234)) == (
        "@[a\\n, 3]: 1\n"
        "@[\n    f+0x1/0x2\n    g+0x3/0x4\n]: 70\n"
        "@: 1,234 hits found no room for their key and are missing"
    )
    buckets = ((None, 0, 1), (0, 1, 0), (1024, 2048, 4), (1500, 1501, 2), (3 << 20, None, 4))
    assert map_text(Map("h", "hist", (), (Row((), 11, buckets),))) == (
        "@h:\n"
        f"(..., 0)                1 |{'@' * 13:52}|\n"
        f"[0]                     0 |{'':52}|\n"
        f"[1K, 2K)                4 |{'@' * 52}|\n"
        f"[1500]                  2 |{'@' * 26:52}|\n"
        f"[3M, ...)               4 |{'@' * 52}|\n"
    )
    assert map_text(Map("", "count", (), ())) == ""


def test_json() -> None:
    rows = (Row(("cat", KernelStack(["f"])), -3),)
    assert json.loads(map_json(Map("m", "sum", ("$comm", "$kstack"), rows, 2))) == {
        "map": "@m",
        "function": "sum",
        "keys": ["$comm", "$kstack"],
        "rows": [{"key": ["cat", ["f"]], "value": -3}],
        "lost": 2,
    }
    rows = (Row((), 3, ((None, 0, 1), (0, 1, 2))),)
    assert json.loads(map_json(Map("m", "hist", (), rows)))["rows"] == [
        {
            "key": [],
            "buckets": [{"min": None, "end": 0, "count": 1}, {"min": 0, "end": 1, "count": 2}],
        }
    ]


def test_printed_at_intervals_and_at_the_end() -> None:
    out, now, counts = io.StringIO(), [100.0], iter(range(1, 9))
    sink = MapSink(
        out,
        lambda: [Map("", "count", (), (Row((), next(counts)),), lost=2)],
        interval_s=2,
        now_s=lambda: now[0],
    )
    for at in (100, 101.9, 102.1, 103, 104, 104.5, 109, 109.1, 110.9):
        now[0] = at
        sink.idle()
    sink.write()
    shown = [line for line in out.getvalue().splitlines() if line.startswith("@: ")]
    assert [line for line in shown if "room" not in line] == [f"@: {n}" for n in range(1, 6)]
    assert sink.lost == 2
