"""Colour goes to terminals that have it, and where it is asked for."""

import io

import pytest

from kgdbx.render import COLOUR, pick_style
from kgdbx.trace.text import PLAIN


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "terminal", "other"),
    [
        ({"TERM": "xterm"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, False),
        ({"TERM": "dumb", "CLICOLOR_FORCE": "1"}, True, True),
    ],
)
def test_colour(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], terminal: bool, other: bool
) -> None:
    for name in ("NO_COLOR", "CLICOLOR_FORCE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pick_style(Terminal()) is (COLOUR if terminal else PLAIN)
    assert pick_style(io.StringIO()) is (COLOUR if other else PLAIN)
    assert pick_style(Terminal(), "never") is PLAIN
    assert pick_style(io.StringIO(), "always") is COLOUR
