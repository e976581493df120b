"""MI output is records, however the bytes are cut; nothing is lost of what is no record."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kgdbx.shell.records import Record, RecordReader, quote

RECORDED = (Path(__file__).parent / "recorded.mi").read_bytes()
GDBS = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 27: "\\033"}


def read(pieces: list[bytes]) -> list[Record]:
    reader = RecordReader()
    return [record for piece in pieces for record in reader.feed(piece)] + reader.finish()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = sorted(place % (len(data) + 1) for place in places)
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


def escaped(text: str) -> str:
    """As printchar() of gdb/utils.c writes it to a host without UTF-8."""
    out = ""
    for byte in text.encode():
        if byte in (0x22, 0x5C):
            out += "\\" + chr(byte)
        elif byte in GDBS:
            out += GDBS[byte]
        elif byte < 0x20 or byte >= 0x7F:
            out += f"\\{byte:03o}"
        else:
            out += chr(byte)
    return out


VALUES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAMES = st.from_regex(r"[a-z][a-z-]{0,8}", fullmatch=True)


@st.composite
def streams(draw: st.DrawFn) -> tuple[str, Record]:
    mark, kind = draw(st.sampled_from([("~", "console"), ("&", "log"), ("@", "target")]))
    text = draw(VALUES)
    return f'{mark}"{escaped(text)}"', Record(kind, text=text)  # type: ignore[arg-type]


@st.composite
def results(draw: st.DrawFn) -> tuple[str, Record]:
    token = draw(st.none() | st.integers(0, 10**6))
    values = draw(st.dictionaries(NAMES, VALUES, max_size=4))
    more = "".join(f',{name}="{escaped(value)}"' for name, value in values.items())
    line = f"{'' if token is None else token}^done{more}"
    return line, Record("result", "done", line, values, token)


RAW = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=20).map(
    lambda text: (f"!{text}", Record("raw", text=f"!{text}"))
)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=40))
def test_a_recorded_stream_in_any_pieces(places: list[int]) -> None:
    assert read(cut(RECORDED, places)) == read([RECORDED])


def test_a_recorded_stream_byte_by_byte() -> None:
    whole = read([RECORDED])
    assert read([RECORDED[n : n + 1] for n in range(len(RECORDED))]) == whole
    assert [r.token for r in whole if r.kind == "result"] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        9,
        10,
        11,
        12,
        None,
    ]
    console = "".join(r.text for r in whole if r.kind == "console")
    assert "Probe 1 (kprobes/p___x64_sys_getpgid_0): " in console
    # What a program writes without an end of line swallows gdb's next record; it is shown.
    assert [r.text for r in whole if r.kind == "raw"] == ["raw", "no-newline8^done"]
    frames = next(r for r in whole if r.token == 11).results["stack"]
    assert frames[-3]["func"] == "start_secondary"


@settings(deadline=None)
@given(
    st.lists(streams() | results() | RAW, max_size=12), st.lists(st.integers(0, 9999), max_size=9)
)
def test_what_gdb_may_write_comes_back(lines: list[tuple[str, Record]], places: list[int]) -> None:
    data = "".join(f"{line}\n(gdb) \n" for line, _ in lines).encode()
    found = [record for record in read(cut(data, places)) if record.kind != "prompt"]
    assert found == [record for _, record in lines]


@settings(deadline=None)
@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_any_bytes_are_some_records(data: bytes, places: list[int]) -> None:
    found = read(cut(data, places))
    assert len(found) == len([line for line in data.split(b"\n")]) - (data[-1:] in (b"\n", b""))


def test_quote() -> None:
    assert quote('p "a\\n"\nb') == '"p \\"a\\\\n\\"\\nb"'
