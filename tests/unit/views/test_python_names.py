"""Candidates in a line of Python: looked up, never called."""

from typing import Any

import pytest

from kgdbx.views.python_names import python_names


class Thing:
    """Has what must not run while somebody types."""

    def __init__(self) -> None:
        self.inner = self
        self.items = {"key": self, 1: self}

    @property
    def bomb(self) -> int:
        raise AssertionError("a property was read")

    def method(self, a: int, b: str = "x") -> None:
        raise AssertionError("a method was called")


NAMES: dict[str, Any] = {"thing": Thing(), "things": 1, "_hidden": 2}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("thi", ["thing", "things"]),
        ("print(thi", ["thing", "things"]),
        ("_hid", ["_hidden"]),
        ("thing.", ["bomb", "inner", "items", "method"]),
        ("thing.inner.inner.me", ["method"]),
        ('x = thing.items["key"].m', ["method"]),
        ("thing.items[1].b", ["bomb"]),
        ("thing.method().x", []),
        ("thing.nothing.x", []),
        ("nothing.x", []),
        ("", []),
    ],
)
def test_names(source: str, found: list[str]) -> None:
    assert [name for name, _ in python_names(source, NAMES)] == found


def test_what_they_are() -> None:
    assert dict(python_names("thing.m", NAMES))["method"] == "(self, a: int, b: str = 'x') -> None"
