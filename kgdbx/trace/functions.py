"""Which functions a trace is of, and what to say of those that it cannot have."""

import collections
import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from kgdbx.errors import CommandError
from kgdbx.probes.definition import ProbeDefinition, parse_definition

__all__ = ("FUNCTION_LIMIT", "definitions", "is_pattern", "refusals")

FUNCTION_LIMIT = 10_000
"""Most functions of one trace."""

_NAME_LIMIT = 63
_PLACE = re.compile(r"(?:([A-Za-z_][\w-]*):)?([A-Za-z_*?\[][\w.*?\[\]!-]*)", re.ASCII)
_SHOWN = 8  # refusals that are listed one by one; more are counted
_ADDRESS = re.compile(r"0x[0-9a-f]{5,}")

Names = Callable[[str | None], Iterable[str]]


def is_pattern(place: str) -> bool:
    """Whether ``[MODULE:]FUNC`` may stand for several functions, as ``MODULE:`` alone does."""
    return any(c in place for c in "*?[") or place.endswith(":")


def definitions(
    places: Iterable[str],
    names: Names,
    *,
    fields: str = "",
    condition: str = "",
    returns: bool = False,
) -> list[ProbeDefinition]:
    """A definition for each function, each with a name of its own.

    :param places: ``[MODULE:]FUNC``, or a pattern
    :param names: functions of a module, or of vmlinux without one
    :param fields: as in a probe definition
    :param condition: an expression; empty for none
    :param returns: probe the returns
    :raises CommandError: if a place is none, no function matches, or too many do
    :raises DefinitionError: if the fields or the condition cannot be parsed
    """
    kind = "r" if returns else "p"
    # Parsed once: whatever stands in the place of the function, the rest is the same.
    text = f"{kind} f {fields.strip()} {f'if {condition}' if condition else ''}"
    template = parse_definition(text)
    found: dict[tuple[str | None, str], None] = {}
    for place in places:
        found.update(dict.fromkeys(_functions(place, names)))
        if len(found) > FUNCTION_LIMIT:
            raise CommandError(
                f"{len(found)} functions match, more than {FUNCTION_LIMIT}; narrow it down"
            )
    taken: set[str] = set()
    return [
        dataclasses.replace(
            template,
            module=module,
            function=function,
            name=_free_name(function, taken),
            text=f"{kind} {_shown(module, function)}",
        )
        for module, function in found
    ]


def refusals(errors: Mapping[str, str]) -> Iterator[str]:
    """Lines that say which functions are not traced and why; many are counted by their reasons.

    :param errors: message by function
    """
    if len(errors) <= _SHOWN:
        for name, message in errors.items():
            yield f"not traced: {name}: {_one_line(message)}"
        return
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name, message in errors.items():
        groups[_reason(name, message)].append(name)
    yield f"not traced: {len(errors)} functions:"
    for reason, names in sorted(groups.items(), key=lambda item: -len(item[1])):
        more = ", ..." if len(names) > 1 else ""
        yield f"{len(names):>6}  {reason} ({names[0]}{more})"


def _functions(place: str, names: Names) -> Iterator[tuple[str | None, str]]:
    match = _PLACE.fullmatch(f"{place}*" if place.endswith(":") else place)
    if match is None:
        raise CommandError(f"{place!r} is no function, [MODULE:]FUNC, and no pattern of any")
    module, pattern = match[1], match[2]
    if not is_pattern(pattern):
        yield module, pattern
        return
    fits = re.compile(fnmatch.translate(pattern)).match
    some = False
    for name in names(module):
        if fits(name) and not name.startswith("__pfx_"):
            some = True
            yield module, name
    if not some:
        where = f" in the module {module!r}, if it is loaded" if module else ""
        raise CommandError(f"no function matches {pattern!r}{where}")


def _shown(module: str | None, function: str) -> str:
    return f"{module}:{function}" if module else function


def _free_name(function: str, taken: set[str]) -> str:
    # Of an event: functions of several modules may have one name.
    base = name = re.sub(r"\W", "_", function, flags=re.ASCII)[:_NAME_LIMIT]
    number = 0
    while name in taken:
        number += 1
        suffix = f"_{number}"
        name = base[: _NAME_LIMIT - len(suffix)] + suffix
    taken.add(name)
    return name


def _reason(name: str, message: str) -> str:
    # The same words for all functions that one thing is wrong with.
    text = _ADDRESS.sub("0x...", message.partition("\n")[0])
    return re.sub(rf"(?<![\w.])'?{re.escape(name)}'?(?![\w.])", "it", text).strip(" ;:")


def _one_line(message: str) -> str:
    return " ".join(line.strip() for line in message.splitlines())
