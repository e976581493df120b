"""Fetch the fields of a probe definition at a stop, as values of an event."""

from collections.abc import Callable, Sequence

from kgdbx.errors import MemoryFault, ProbeError, SymbolError
from kgdbx.probes.evaluate import (
    Scope,
    compile_memory,
    compile_object,
    compile_string,
    compile_text,
    guarded,
    read_string,
)
from kgdbx.probes.expression import AtSymbol, Dereference, Expr, Register, Special, is_text
from kgdbx.probes.field import STACK_DEPTH, FetchType, Field
from kgdbx.probes.value import FieldValue, Hex, KernelStack, Unreadable, plain_value

__all__ = ("compile_fields", "converter")


def compile_fields(fields: Sequence[Field]) -> Callable[[Scope], dict[str, FieldValue]]:
    """Prepare fields; the function that is returned gives the value of each by its name.

    A field that fails is :class:`~kgdbx.probes.value.Unreadable`. ``$vars`` and ``$params`` have
    to be expanded before, see :func:`~kgdbx.probes.field.expand_fields`.
    """
    fetchers = [(each.name, guarded(each.expression, _fetcher(each))) for each in fields]

    def fetch(scope: Scope) -> dict[str, FieldValue]:
        values: dict[str, FieldValue] = {}
        for name, fetcher in fetchers:
            try:
                values[name] = fetcher(scope)
            except MemoryFault as e:
                values[name] = Unreadable(e.address)
            except (SymbolError, ProbeError) as e:
                values[name] = Unreadable(None, str(e))
        return values

    return fetch


def converter(to: FetchType, user: bool = False) -> Callable[[Scope, int], FieldValue]:
    """A function that makes the value of a typed field of the number that was read for it.

    :param user: a string is in user memory, wherever its address points
    """
    bits = 8 * to.size_bytes
    mask, sign = (1 << bits) - 1, 1 << (bits - 1)
    match to.base:
        case "s":
            return lambda scope, value: ((value & mask) ^ sign) - sign
        case "x":
            return lambda scope, value: Hex(value & mask)
        case "b":
            mask = (1 << to.bit_width) - 1
            return lambda scope, value: (value >> to.bit_offset) & mask
        case "char":
            return lambda scope, value: chr(value & mask)
        case "symbol":
            return lambda scope, value: _symbol_name(scope, value & mask)
        case "string" | "ustring":
            return lambda scope, value: read_string(scope, value, user)
    return lambda scope, value: value & mask


def _fetcher(each: Field) -> Callable[[Scope], FieldValue]:
    expr, to = each.expression, each.type
    if isinstance(expr, Special) and expr.name == "kstack":
        depth = to.count if to and to.count else STACK_DEPTH
        return lambda scope: KernelStack(scope.kstack(depth))
    if isinstance(expr, Special) and expr.name == "func":
        return lambda scope: scope.func()
    if to is None:
        return _untyped(expr)
    if is_text(expr):
        return compile_text(expr)
    user = to.base == "ustring" or (isinstance(expr, Dereference) and expr.user)
    if to.is_string and to.count is None:
        return compile_string(expr, user=user)
    convert = converter(to, user)
    if to.count is not None:
        size, memory = to.size_bytes, compile_memory(expr, to.size_bytes * to.count)

        def elements(scope: Scope) -> FieldValue:
            data = memory(scope)
            chunks = (data[at : at + size] for at in range(0, len(data), size))
            return [convert(scope, int.from_bytes(chunk, "little")) for chunk in chunks]

        return elements
    if isinstance(expr, Dereference | AtSymbol):
        memory = compile_memory(expr, to.size_bytes)
        return lambda scope: convert(scope, int.from_bytes(memory(scope), "little"))
    value = compile_object(expr)
    return lambda scope: convert(scope, int(value(scope)))


def _untyped(expr: Expr) -> Callable[[Scope], FieldValue]:
    if is_text(expr):
        return compile_text(expr)
    value = compile_object(expr)
    if isinstance(expr, Register | Dereference | AtSymbol) or (
        isinstance(expr, Special) and expr.name == "stack"
    ):
        return lambda scope: Hex(int(value(scope)))
    return lambda scope: plain_value(value(scope))


def _symbol_name(scope: Scope, address: int) -> str:
    try:
        symbol = scope.program.symbol(address)
    except LookupError:
        return hex(address)
    return f"{symbol.name}+{address - symbol.address:#x}/{symbol.size:#x}"
