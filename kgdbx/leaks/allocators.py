"""What allocates and what frees, as data: ``allocators.toml``, and files of the user's."""

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from kgdbx.errors import CommandError

__all__ = ("Allocator", "Watched", "load_allocators", "present", "read_allocators")

_KINDS = ("allocate", "free", "transfer", "resize")
_KEYS = {"group", "kind", "functions", "address", "size", "count"}
_NAME = re.compile(r"([\w-]+:)?[A-Za-z_][\w.]*")
_RETURNED = re.compile(r"\bret\b")


@dataclasses.dataclass(frozen=True)
class Allocator:
    """One way to allocate or to free.

    :ivar group: what it is told of as, when none of a group is there
    :ivar kind: ``allocate``, ``free``, ``transfer``: the block is the kernel's from now on, or
        ``resize``: it has another size if it is returned where it was
    :ivar functions: names that it has in one kernel or another, ``module:name`` in a module
    :ivar address: C over ``a1`` to ``a4``, and ``ret`` of what allocates
    :ivar size: C for the bytes; 0 if they are not known
    :ivar count: C; if it is given, *address* is that of an array
    """

    group: str
    kind: str
    functions: tuple[str, ...]
    address: str
    size: str = "0"
    count: str | None = None


@dataclasses.dataclass(frozen=True)
class Watched:
    """What of it a kernel has.

    :ivar functions: of each function the way it is
    :ivar absent: names that it does not have
    :ivar missing_groups: groups that it has nothing of
    """

    functions: dict[str, Allocator]
    absent: tuple[str, ...]
    missing_groups: tuple[str, ...]


def load_allocators(*files: Path) -> tuple[Allocator, ...]:
    """Those that are known, and those of files; of two for one function the last counts.

    :raises CommandError: if a file cannot be read or says what makes no sense
    """
    own = resources.files("kgdbx.leaks").joinpath("allocators.toml").read_text("utf-8")
    found = list(read_allocators(own, "allocators.toml"))
    for path in files:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise CommandError(f"cannot read {path}: {e}") from e
        found += read_allocators(text, str(path))
    return tuple(found)


def read_allocators(text: str, name: str) -> Iterator[Allocator]:
    """The allocators of a file.

    :param name: what messages call it
    :raises CommandError: if it says what makes no sense
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise CommandError(f"{name} is not TOML: {e}") from e
    if set(data) - {"allocator"} or not isinstance(data.get("allocator", []), list):
        raise CommandError(f"{name} has more than [[allocator]] tables")
    for number, each in enumerate(data.get("allocator", []), 1):
        yield _read(each, f"{name}: allocator {number}")


def present(allocators: Iterable[Allocator], names: Iterable[str]) -> Watched:
    """What a kernel has of allocators.

    :param names: the functions it has
    """
    have = set(names)
    functions: dict[str, Allocator] = {}
    absent: list[str] = []
    groups: dict[str, bool] = {}
    for each in allocators:
        for name in each.functions:
            groups[each.group] = groups.get(each.group, False) or name in have
            if name in have:
                functions[name] = each
            else:
                absent.append(name)
    missing = tuple(group for group, there in groups.items() if not there)
    return Watched(functions, tuple(absent), missing)


def _read(data: Any, where: str) -> Allocator:
    if not isinstance(data, dict):
        raise CommandError(f"{where} is not a table")
    unknown = sorted(set(data) - _KEYS)
    if unknown:
        raise CommandError(
            f"{where} has {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}"
        )
    functions = data.get("functions")
    if not isinstance(functions, list) or not functions:
        raise CommandError(f"{where} names no functions")
    for name in functions:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise CommandError(f"{where}: {name!r} is not the name of a function")
    texts = {key: data[key] for key in _KEYS - {"functions"} if key in data}
    for key, value in texts.items():
        if not isinstance(value, str) or not value.strip() or "\n" in value:
            raise CommandError(f"{where}: {key} is not a line of text")
    for key in ("group", "kind", "address"):
        if key not in texts:
            raise CommandError(f"{where} has no {key}")
    if texts["kind"] not in _KINDS:
        raise CommandError(f"{where}: there is no kind {texts['kind']!r}; give {', '.join(_KINDS)}")
    if texts["kind"] != "allocate" and any(map(_RETURNED.search, texts.values())):
        raise CommandError(f"{where}: {texts['kind']} is looked at before it runs, and has no ret")
    if texts["kind"] == "resize" and ("count" in texts or "size" not in texts):
        raise CommandError(f"{where}: resize has a size, and no count")
    return Allocator(functions=tuple(functions), **texts)
