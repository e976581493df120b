"""Allocators as data: what a file may say, and what a kernel has of it."""

from pathlib import Path

import pytest

from kgdbx.errors import CommandError
from kgdbx.leaks.allocators import Allocator, load_allocators, present, read_allocators

OWN = """\
[[allocator]]
group = "widgets"
kind = "allocate"
functions = ["widget_get", "widgets:widget_new"]
address = "ret"
size = "a1 * 8"

[[allocator]]
group = "widgets"
kind = "free"
functions = ["widget_put"]
address = "a1"
"""


def test_files_add_to_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    known = load_allocators()
    assert load_allocators(path)[len(known) :] == (
        Allocator(
            "widgets", "allocate", ("widget_get", "widgets:widget_new"), "ret", size="a1 * 8"
        ),
        Allocator("widgets", "free", ("widget_put",), "a1"),
    )
    assert {a.kind for a in known} == {"allocate", "free", "transfer", "resize"}


def test_what_a_kernel_does_not_have_is_told() -> None:
    first, second = read_allocators(OWN, "own")
    found = present([first, second], ["kfree", "widget_get"])
    assert found.functions == {"widget_get": first}
    assert found.absent == ("widgets:widget_new", "widget_put")
    assert found.missing_groups == ()
    assert present([first, second], ["kfree"]).missing_groups == ("widgets",)


def test_the_last_to_name_a_function_counts() -> None:
    first, second = read_allocators(OWN.replace("widget_put", "widget_get"), "own")
    assert present([first, second], ["widget_get"]).functions == {"widget_get": second}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "free"', 'kind = "lend"', "own: allocator 2: there is no kind 'lend'; give "),
        ('address = "a1"', 'address = "ret"', "own: allocator 2: free is looked at before it runs"),
        ('kind = "free"', 'kind = "resize"', "own: allocator 2: resize has a size, and no count"),
        ('address = "a1"\n', "", "own: allocator 2 has no address"),
        ('["widget_put"]', "[]", "own: allocator 2 names no functions"),
        ('"widget_put"', '"widget put"', "own: allocator 2: 'widget put' is not the name of a"),
        ('size = "a1 * 8"', "size = 8", "own: allocator 1: size is not a line of text"),
        ('size = "a1 * 8"', 'bytes = "a1"', "own: allocator 1 has bytes; known are address,"),
        ("[[allocator]]", "[[allocators]]", "own has more than [[allocator]] tables"),
        ("functions = [", "functions [", "own is not TOML: "),
    ],
)
def test_what_makes_no_sense_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(CommandError, match="^" + message.replace("[", r"\[")):
        tuple(read_allocators(OWN.replace(old, new), "own"))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(CommandError, match="cannot read /nowhere"):
        load_allocators(Path("/nowhere"))
