"""What may stand next in a line of Python with drgn."""

import ast
import builtins
import inspect
import re
from collections.abc import Mapping
from typing import Any

import drgn

from kgdbx.views.names import members_of_type

__all__ = ("python_names",)

# What is before the last dot is looked up: names, members and items, and no calls.
_TAIL = re.compile(r"""((?:\w+(?:\[(?:\d+|"\w+"|'\w+')\])?\.)*)(\w*)$""")


def python_names(source: str, names: Mapping[str, Any]) -> list[list[str]]:
    """Names that the last word of a line may become, and what each is.

    :param source: the line up to the cursor
    :param names: those of the namespace that it runs in
    :return: name, and a type or a signature, of what begins with that word
    """
    match = _TAIL.search(source)
    base, piece = (match[1].removesuffix("."), match[2]) if match else ("", "")
    if not base:
        if not piece:
            return []
        found = [[name, _about(value)] for name, value in names.items()]
        found += [[name, ""] for name in dir(builtins)]
    else:
        try:
            found = _attributes(_look_up(ast.parse(base, mode="eval").body, names))
        except (AttributeError, IndexError, KeyError, SyntaxError, TypeError, drgn.FaultError):
            return []  # half a line need not mean anything
    hidden = not piece.startswith("_")
    return [
        each
        for each in sorted(found)
        if each[0].startswith(piece) and not (hidden and each[0].startswith("_"))
    ]


def _look_up(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Attribute):
        return getattr(_look_up(node.value, names), node.attr)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return _look_up(node.value, names)[node.slice.value]
    raise SyntaxError(f"{type(node).__name__} is not looked up")


def _attributes(value: Any) -> list[list[str]]:
    if isinstance(value, drgn.Object):
        methods = [[name, "drgn"] for name in dir(value) if name.endswith("_")]
        return members_of_type(value.type_) + methods
    # Of a class what is called is looked at there: a property would be read.
    kind = type(value)
    return [[name, _about(getattr(kind, name, None))] for name in dir(value)]


def _about(value: Any) -> str:
    if isinstance(value, drgn.Object):
        return str(value.type_.type_name())
    if inspect.ismodule(value):
        return "module"
    if not callable(value):
        return ""
    try:
        return str(inspect.signature(value))
    except (TypeError, ValueError):  # written in C
        return (inspect.getdoc(value) or "").partition("\n")[0]
