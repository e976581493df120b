"""Descriptions of probes: there and back, and what is refused."""

import dataclasses
import json
from typing import Any

import pytest

from kgdbx.resident.layout import FieldLayout, ProbeLayout


def test_there_and_back(opened: ProbeLayout) -> None:
    fields = (
        *opened.fields[:1],
        FieldLayout("a", 72, 16, "x", count=4),
        FieldLayout("b", 72, 4, "s", bits=(3, 29)),
        FieldLayout("c", 72, 24, "raw", type_name="struct path"),
        FieldLayout("d", 72, 4, "u", bits=(0, 64), is_signed=True, fault_bit=63),
        FieldLayout("$comm", 32, 16, "string"),
        FieldLayout("text", 0, 0, "string", value="a"),
        FieldLayout("zero", 0, 0, "x", value=0),
    )
    layout = dataclasses.replace(opened, fields=fields)
    assert ProbeLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_json(opened: ProbeLayout) -> None:
    # The example of docs/trace_format.md.
    assert opened.to_json() == {
        "id": 2,
        "name": "kprobes/opened",
        "kind": "r",
        "address": "0xffffffff81200000",
        "where": "do_sys_openat2+0x0/0x2c",
        "record_bytes": 344,
        "faults": 64,
        "fields": [
            {
                "name": "filename",
                "offset": 72,
                "size": 264,
                "kind": "string",
                "limit": 256,
                "fault": 0,
                "expression": "name(x)",
            },
            {"name": "$retval", "offset": 336, "size": 8, "kind": "s", "type": "long"},
        ],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": -1}, "its number is -1"),
        ({"id": 1 << 20}, "its number is 1048576"),
        ({"id": True}, "'id' is missing or no integer"),
        ({"id": None}, "'id' is missing or no integer"),
        ({"name": 5}, "'name' is missing or no text"),
        ({"name": "n" * 5000}, "a name is too long"),
        ({"kind": "q"}, "there is no kind 'q'"),
        ({"address": "12"}, "'address' is not hex text"),
        ({"address": "0x" + "f" * 17}, "'address' is not hex text"),
        ({"record_bytes": 63}, "records of 63 bytes"),
        ({"record_bytes": 1 << 17}, "records of 131072 bytes"),
        ({"record_bytes": 343}, "field '$retval' is not inside the record"),
        ({"faults": 340}, "fault mask at 340 in records of 344 bytes"),
        ({"faults": 8}, "fault mask at 8"),
        ({"faults": None}, "field 'filename' has a fault bit, but there is no fault mask"),
        (
            {"fields": [{"name": "n", "offset": 340, "size": 4, "kind": "u", "fault": 3}]},
            "field 'n' has no room for an address",
        ),
        ({"fields": {}}, "'fields' is not a list"),
        ({"fields": [7]}, "7 is not an object"),
    ],
)
def test_bad_probes(opened: ProbeLayout, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("$", r"\$")):
        ProbeLayout.from_json(opened.to_json() | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "float"}, "there is no kind 'float'"),
        ({"offset": -1}, "negative offset"),
        ({"size": 0}, "n: 0 bytes"),
        ({"size": -8}, "n: -8 bytes"),
        ({"value": 1}, "n: 8 bytes"),
        ({"value": 1.5}, "'value' is missing or no integer"),
        ({"size": 24}, "an integer of 24 bytes"),
        ({"count": 3}, "8 bytes are not 3 elements"),
        ({"count": 0}, "8 bytes are not 0 elements"),
        ({"bits": [120, 9]}, r"bits 120\+9 of 8 bytes"),
        ({"bits": [-1, 9]}, r"bits -1\+9"),
        ({"bits": [0, 0]}, r"bits 0\+0"),
        ({"bits": [0]}, "'bits' is not a pair"),
        ({"bits": "ab"}, "'bits' is not a pair"),
        ({"bits": [0, "1"]}, "'bits' is missing or no integer"),
        ({"fault": 64}, "fault bit 64"),
        ({"limit": -1}, "negative limit"),
        ({"type": 1}, "'type' is missing or no text"),
        ({"name": "n" * 5000}, "too long"),
    ],
)
def test_bad_fields(changes: dict[str, Any], message: str) -> None:
    good = FieldLayout("n", 48, 8, "u").to_json()
    with pytest.raises(ValueError, match=message):
        FieldLayout.from_json(good | changes)
