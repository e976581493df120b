"""Output: what is shown, what is left out, and what a transcript keeps."""

import pathlib

from hypothesis import given, settings
from hypothesis import strategies as st

from kgdbx.shell.layouts import Table, histogram_lines
from kgdbx.shell.plain import harmless, without_colour
from kgdbx.shell.printer import Printer
from kgdbx.shell.transcript import Transcript

PIECES = st.lists(st.lists(st.sampled_from(["a", "b ", "\n", "\x1b[31m"])).map("".join), max_size=9)


def test_commands_are_shown_whole_and_events_a_screenful() -> None:
    now = [0.0]
    printer = Printer(lambda: 24, lambda: now[0])
    printer.write("a", "line\n" * 1000)
    printer.write_events("event\n" * 1000)
    printer.write("a", "part")
    now[0] = 1.0
    shown = printer.frame().splitlines()
    assert shown.count("line") == 1000
    assert shown.count("event") == 24
    assert shown[-1] == "... 976 lines not shown; --log FILE has all"
    assert printer.dropped == 976
    printer.write("a", "ial\n")
    printer.write_events("event\n" * 3)
    assert printer.frame() == "partial\nevent\nevent\nevent\n"


def test_no_event_is_cut() -> None:
    now = [0.0]
    printer = Printer(lambda: 24, lambda: now[0])
    event = "wc-1 [000] 1.0: p: (f)\nwc-1 [000] 1.0: <stack trace>\n => f\n => g\n => h\n"
    printer.write_events(event * 100)
    assert printer.frame() == event * 4
    now[0] = 10.0
    printer.write_events(" => i\n" + event)  # the end of one that was left out
    assert printer.frame() == event + "... 481 lines not shown; --log FILE has all\n"


def test_no_event_is_unaccounted_for() -> None:
    now = [0.0]
    printer = Printer(lambda: 24, lambda: now[0])
    shown = 0
    for _ in range(400):
        printer.write_events("event\n" * 500)
        now[0] += 0.05
        shown += printer.frame().splitlines().count("event")
    now[0] += 1
    printer.frame()
    assert shown + printer.dropped == 200_000
    assert 24 + 20 * 48 - 48 <= shown <= 24 + 20 * 48


@settings(deadline=None)
@given(PIECES)
def test_lines_of_sessions_are_not_mixed(pieces: list[str]) -> None:
    printer = Printer()
    for piece in pieces:
        printer.write("a", piece, prefix="A ")
        printer.write("b", piece, prefix="B ")
    printer.flush("a", "A ")
    printer.flush("b", "B ")
    lines = printer.frame().splitlines()
    mine = [line.removeprefix("A ") for line in lines if line.startswith("A ")]
    text = harmless("".join(pieces))
    assert "\n".join(mine) == text.removesuffix("\n")


def test_a_guest_cannot_speak_to_the_terminal() -> None:
    evil = "\x1b[31mred\x1b[0m \x1b]0;title\x07\x1b[2J\x9b5A\x1bcx\r\x00\x7f\x1b[6n"
    assert harmless(evil) == "\x1b[31mred\x1b[0m x"
    assert without_colour(evil) == "red x"


@settings(deadline=None)
@given(st.text(max_size=60))
def test_only_colours_are_left(text: str) -> None:
    left = harmless(text)
    for colour in ("\x1b[0m", "\x1b[31m"):
        left = left.replace(colour, "")
    plain = without_colour(left)
    assert not any(c < " " and c not in "\t\n" for c in plain)


@settings(deadline=None)
@given(PIECES)
def test_a_transcript_is_a_script(tmp_path_factory: object, pieces: list[str]) -> None:
    path = pathlib.Path(tmp_path_factory.mktemp("log")) / "log"  # type: ignore[attr-defined]
    now = [0.0]
    log = Transcript(path, lambda: now[0])
    log.typed("continue", running=False)
    for piece in pieces:
        log.shown(piece)
    log.done()
    now[0] = 2.5
    log.typed("python\nprint(1)\nend", running=True)
    log.close()
    lines = path.read_text().splitlines()
    commands = [line for line in lines if not line.startswith("# ")]
    assert commands == ["continue", "wait 2.50", "python", "print(1)", "end"]
    shown = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    assert "\n".join(shown) == without_colour("".join(pieces)).removesuffix("\n")


def test_tables_are_as_wide_as_the_window() -> None:
    table = Table(("name", "n"), [("a" * 50, 5), ("b", 12345)])
    head, rows = table.lines(40)
    assert all(sum(len(text) for _, text in line) <= 40 for line in (head, *rows))
    assert table.sorted_by(1, True).rows[0] == ("b", 12345)


def test_histogram() -> None:
    answer = {"field": "n", "buckets": [[0, 1], [3, 4]], "count": 5, "mean": 4.2, "skipped": 2}
    lines = ["".join(text for _, text in line) for line in histogram_lines(answer, 60)]
    assert "n: 5 events, mean 4.2; 2 events without" in lines[0]
    assert [line.rstrip(" █").rsplit(None, 1) for line in lines[1:]] == [
        ["                       0", "1"],
        ["                       1", "0"],
        ["                  2 .. 3", "0"],
        ["                  4 .. 7", "4"],
    ]
    assert [line.count("█") for line in lines[1:]] == [6, 0, 0, 23]
