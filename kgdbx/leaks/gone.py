"""Where modules were that are gone: kept in a file, for who looks for pointers to them later."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kgdbx.errors import CommandError
from kgdbx.leaks.snapshot import ModuleRange

__all__ = ("note_gone", "read_gone")

_FORMAT = 1
_MOST_BYTES = 1 << 24
_MOST = 1000  # the oldest are forgotten
_WORD_MAX = (1 << 64) - 1


def note_gone(
    path: Path, build_id: str, gone: Mapping[str, Sequence[tuple[int, int]]]
) -> tuple[ModuleRange, ...]:
    """Add modules that were seen to go to those in a file, which is made if there is none.

    :param build_id: of the kernel; what is noted of another one is dropped
    :param gone: guest-virtual ``(start, size_bytes)`` of their memory, by name
    :return: all that is known now
    """
    try:
        known = read_gone(path, build_id)
    except CommandError:
        known = ()
    new = tuple(ModuleRange(name, tuple(ranges)) for name, ranges in gone.items() if ranges)
    kept = (*(each for each in known if each not in new), *new)[-_MOST:]
    record = {
        "format": _FORMAT,
        "build_id": build_id,
        "modules": [[each.name, list(each.ranges)] for each in kept],
    }
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(record), "utf-8")
    scratch.rename(path)
    return kept


def read_gone(path: Path, build_id: str) -> tuple[ModuleRange, ...]:
    """Modules that were seen to go, oldest first; none if there is no file. It is not trusted.

    :raises CommandError: if it is damaged, or of another kernel
    """
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_MOST_BYTES))
        if not isinstance(record, dict) or record["format"] != _FORMAT:
            raise ValueError("another format")
        same = record["build_id"] == build_id
        found = tuple(_module(*each) for each in record["modules"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as e:
        raise CommandError(f"{path} is damaged ({e}); remove it") from e
    if not same:
        raise CommandError(f"{path} is of another kernel; remove it")
    return found


def _module(name: Any, ranges: Any) -> ModuleRange:
    pairs = tuple((start, size) for start, size in ranges)
    for value in (value for pair in pairs for value in pair):
        if not isinstance(value, int) or not 0 <= value <= _WORD_MAX:
            raise ValueError("an address that is none")
    return ModuleRange(str(name), pairs)
