"""gdb's convenience variables as a mapping, for drgn expressions."""

from collections.abc import Iterator, MutableMapping
from typing import Any

import drgn
import gdb

__all__ = ("Variables",)


class Variables(MutableMapping[str, Any]):
    """``$name`` of gdb: integers and pointers become drgn objects of their type, if it has one.

    :param program: makes the objects
    """

    def __init__(self, program: drgn.Program) -> None:
        self._program = program

    def __getitem__(self, name: str) -> Any:
        value = gdb.parse_and_eval(f"${name}")
        if value.type.code == gdb.TYPE_CODE_VOID:
            raise KeyError(f"${name} is not set")
        if value.type.strip_typedefs().code not in (gdb.TYPE_CODE_INT, gdb.TYPE_CODE_PTR):
            return value.string() if _is_text(value) else str(value)
        try:
            type_ = self._program.type(str(value.type))
        except (LookupError, SyntaxError):
            return int(value)
        return drgn.Object(self._program, type_, value=int(value))

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(value, drgn.Object):
            gdb.set_convenience_variable(name, value)
            return
        number = int(value.value_())
        try:
            type_ = gdb.lookup_type(value.type_.type_name().removesuffix("*").strip())
            if value.type_.kind is drgn.TypeKind.POINTER:
                type_ = type_.pointer()
            gdb.set_convenience_variable(name, gdb.Value(number).cast(type_))
        except gdb.error:  # a type that gdb does not know, or writes in another way
            gdb.set_convenience_variable(name, number)

    def __delitem__(self, name: str) -> None:
        gdb.set_convenience_variable(name, None)

    def __iter__(self) -> Iterator[str]:
        text = gdb.execute("show convenience", to_string=True)
        for line in text.splitlines():
            if line.startswith("$"):
                yield line[1:].partition(" ")[0]

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _is_text(value: Any) -> bool:
    array = value.type.strip_typedefs().code == gdb.TYPE_CODE_ARRAY
    return bool(array and value.type.target().sizeof == 1)
