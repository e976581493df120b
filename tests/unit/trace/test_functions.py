"""Which functions a trace is of."""

import pytest

from kgdbx.errors import CommandError, DefinitionError
from kgdbx.probes.definition import format_definition
from kgdbx.trace.functions import FUNCTION_LIMIT, definitions, is_pattern, refusals

VMLINUX = ("vfs_read", "vfs_write", "__pfx_vfs_read", "open_exec", "vfs_read.cold")
DUMMY = ("dummy_setup", "dummy_xmit", "vfs_read")


def names(module: str | None) -> tuple[str, ...]:
    return {None: VMLINUX, "dummy": DUMMY}.get(module, ())


def texts(*places: str, **options: str | bool) -> list[str]:
    return [format_definition(each) for each in definitions(places, names, **options)]  # type: ignore[arg-type]


def test_names_and_patterns() -> None:
    assert texts("open_exec") == ["p:open_exec open_exec"]
    assert texts("vfs_[rw]*") == [
        "p:vfs_read vfs_read",
        "p:vfs_write vfs_write",
        "p:vfs_read_cold vfs_read.cold",
    ]
    assert texts("dummy:dummy_*") == [
        "p:dummy_setup dummy:dummy_setup",
        "p:dummy_xmit dummy:dummy_xmit",
    ]
    assert texts("dummy:") == texts("dummy:*")


def test_a_name_without_a_pattern_need_not_be_known_yet() -> None:
    assert texts("snd:snd_open") == ["p:snd_open snd:snd_open"]


def test_each_function_once_with_a_name_of_its_own() -> None:
    assert texts("vfs_read", "vfs_rea?", "dummy:vfs_read") == [
        "p:vfs_read vfs_read",
        "p:vfs_read_1 dummy:vfs_read",
    ]


def test_fields_filter_and_returns() -> None:
    (text,) = texts(
        "open_exec", fields="a->b comm=$comm", condition='$comm == "a  b"', returns=True
    )
    assert text == 'r:open_exec open_exec a->b comm=$comm if $comm == "a  b"'


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nothing_*", "no function matches 'nothing_*'"),
        ("gone:*", "in the module 'gone', if it is loaded"),
        ("a b", "no function, \\[MODULE:\\]FUNC"),
        ("vfs_read+4", "no function"),
        ("vfs_read:10", "no function, "),
        ("", "no function"),
    ],
)
def test_no_place(place: str, message: str) -> None:
    with pytest.raises(CommandError, match=message.replace("*'", "\\*'")):
        texts(place)


def test_wrong_fields_are_pointed_at() -> None:
    with pytest.raises(DefinitionError, match="expected"):
        texts("vfs_*", fields="count +")
    with pytest.raises(DefinitionError, match="expected"):
        texts("vfs_*", condition="count =")


def test_too_many() -> None:
    with pytest.raises(CommandError, match="narrow it down"):
        definitions(["*"], lambda module: map("f{}".format, range(FUNCTION_LIMIT + 1)))


def test_is_pattern() -> None:
    assert [is_pattern(p) for p in ("f", "m:f", "f*", "m:", "[ab]", "f?")] == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]


def test_few_refusals_are_listed() -> None:
    assert list(refusals({"f": "is two:\n  0x1 f\n  0x2 f", "g": "gone"})) == [
        "not traced: f: is two: 0x1 f 0x2 f",
        "not traced: g: gone",
    ]


def test_many_refusals_are_counted_by_reason() -> None:
    errors = {f"f{n}": f"f{n} is in .init.text" for n in range(9)}
    errors["g"] = "patched: it goes to 0xffffffff81000000"
    errors["h"] = "patched: it goes to 0xffffffff82000000"
    assert list(refusals(errors)) == [
        "not traced: 11 functions:",
        "     9  it is in .init.text (f0, ...)",
        "     2  patched: it goes to 0x... (g, ...)",
    ]
