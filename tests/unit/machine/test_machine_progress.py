"""How far something has come, on a terminal and elsewhere."""

import io

import pytest

from kgdbx.machine.progress import terminal_count, terminal_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_a_terminal_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr("sys.stderr", stream)
        terminal_progress("load", 1 << 20, 2 << 20)
        terminal_count("steps", 7)
        terminal_count("steps", 9, ended=True)
        lines = stream.getvalue().replace("\x1b[K", "").split("\r")[1:]
        if isinstance(stream, Terminal):
            assert lines == [f"load [{'#' * 15}{'-' * 15}] 1/2 MiB", "7 steps", "9 steps\n"]
        else:
            assert lines == []
