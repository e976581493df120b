"""Where modules were: what is noted comes back, unless it is damaged or of another kernel."""

from pathlib import Path

import pytest

from kgdbx.errors import CommandError
from kgdbx.leaks.gone import note_gone, read_gone
from kgdbx.leaks.snapshot import ModuleRange

TEXT, DATA = (0xFFFFFFFFC0200000, 0x3000), (0xFFFFFFFFC0210000, 0x1000)


def test_what_went_several_times_is_noted_once(tmp_path: Path) -> None:
    path = tmp_path / "vm" / "gone.json"
    assert read_gone(path, "aa") == ()
    note_gone(path, "aa", {"first": (TEXT, DATA), "second": ()})
    note_gone(path, "aa", {"third": (DATA,)})
    note_gone(path, "aa", {"first": (TEXT, DATA)})
    wanted = (ModuleRange("third", (DATA,)), ModuleRange("first", (TEXT, DATA)))
    assert read_gone(path, "aa") == wanted
    assert [each.name for each in path.parent.iterdir()] == ["gone.json"]


def test_of_another_kernel(tmp_path: Path) -> None:
    path = tmp_path / "gone.json"
    note_gone(path, "aa", {"first": (TEXT,)})
    with pytest.raises(CommandError, match="gone.json is of another kernel; remove it"):
        read_gone(path, "bb")
    assert note_gone(path, "bb", {"second": (DATA,)}) == (ModuleRange("second", (DATA,)),)


@pytest.mark.parametrize(
    "text",
    (
        "",
        "[]",
        '{"format": 2, "build_id": "aa", "modules": []}',
        '{"format": 1, "build_id": "aa"}',
        '{"format": 1, "build_id": "aa", "modules": [["m", [[-1, 2]]]]}',
        '{"format": 1, "build_id": "aa", "modules": [["m", [["0", 2]]]]}',
        '{"format": 1, "build_id": "aa", "modules": [["m"]]}',
        "[" * 100000,
    ),
)
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gone.json"
    path.write_text(text)
    with pytest.raises(CommandError, match="is damaged"):
        read_gone(path, "aa")
