"""What the names in a definition stand for at a resident probe, as C over ``struct context``."""

from dataclasses import dataclass

import drgn

from kgdbx.arch.calling import Location, Parameter, ParameterKind, locate_parameters
from kgdbx.arch.registers import ARGUMENT_REGISTERS, PT_REGS_NAMES
from kgdbx.errors import SymbolError
from kgdbx.probes.arguments import argument_suppliers
from kgdbx.probes.probe import Point
from kgdbx.probes.scope import KernelScope
from kgdbx.probes.value import AGGREGATES, underlying_type
from kgdbx.resident.compile.code import Code
from kgdbx.resident.compile.values import (
    MODEL_ADDRESS,
    NotResident,
    Place,
    Value,
    constant,
    convert,
    place_of,
    scalar_of,
    value_of,
)
from kgdbx.symbols.kernel import Kernel

__all__ = ("Names",)

_PERCPU_END = 1 << 32  # per-CPU symbols are offsets
_SHORT_NAMES = {long: short for short, long in PT_REGS_NAMES.items()}
_ARGUMENTS = tuple(_SHORT_NAMES.get(name, name) for name in ARGUMENT_REGISTERS)
_INTEGERS = (drgn.TypeKind.INT, drgn.TypeKind.BOOL, drgn.TypeKind.ENUM, drgn.TypeKind.POINTER)
_MAX_SAVED_BYTES = 64
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class _Parameter:
    type_: drgn.Type
    location: Location


class Names:
    """Names at one point.

    :param is_return: at the return from the function there
    :ivar point: as given
    :ivar saves: C expressions that have to be kept at the entry for the return
    :ivar uses_regs: whether registers are used that a context has only when it is asked for them
    """

    def __init__(self, kernel: Kernel, point: Point, is_return: bool) -> None:
        if is_return and not point.is_entry:
            raise NotResident("a return probe goes to the entry of a function")
        self.program = kernel.program
        self.saves: list[str] = []
        self.uses_regs = False
        self.parameter_names = tuple(argument_suppliers(kernel, point))
        self._kernel = kernel
        self._scope = KernelScope(kernel)
        self.point = point
        self._is_return = is_return
        self._type = kernel.function_type(point.function) if point.is_entry else None
        self._parameters = _parameters(self._type) if self._type is not None else {}
        self._task = self.program.type("struct task_struct")

    def lookup(self, name: str, code: Code) -> Value | Place:
        """A parameter, else a kernel symbol, else a constant.

        :raises NotResident: if there is none, or where it is cannot be known here
        """
        parameter = self._parameters.get(name)
        if parameter is not None:
            return self._parameter(parameter, code)
        if name in self.parameter_names or not self.point.is_entry:
            raise NotResident(f"where '{name}' is at this address only a stop can find out")
        try:
            return self._object(name, self.symbol(name))
        except LookupError:
            pass
        try:
            return constant(self.program.constant(name))
        except LookupError:
            if name == "NULL":
                return constant(drgn.NULL(self.program, "void *"))
        raise NotResident(f"there is no variable, symbol or constant '{name}'")

    def symbol(self, name: str) -> drgn.Object:
        """A function or global variable.

        :raises LookupError: if there is none
        """
        try:
            return self._scope.symbol(name)
        except SymbolError as e:
            raise LookupError(name) from e

    def global_place(
        self, name: str, found: drgn.Object, type_: drgn.Type, offset_bytes: int
    ) -> Place:
        """Memory at a symbol.

        :param found: the symbol, a reference
        :param type_: what is at *offset_bytes* from it
        :raises NotResident: if it is a per-CPU variable
        """
        address = found.address_
        if address is None:
            raise NotResident(f"'{name}' has no address")
        if address < _PERCPU_END:
            raise NotResident(f"'{name}' is a per-CPU variable")
        model = drgn.Object(self.program, type_, address=MODEL_ADDRESS)
        direct = range(self._mapped_bytes(found, address))
        return Place(model, f"{address:#x}UL", offset_bytes, direct, absolute=address)

    def register(self, name: str) -> Value:
        """A register, by its name in ``struct pt_regs``."""
        if name == "ip" and self.point.is_entry and not self._is_return:
            return self._unsigned_long(f"{self.point.address:#x}UL")
        if name == "sp":
            return self._unsigned_long("c->sp")
        if self._is_return and name in ("ax", "dx"):
            return self._unsigned_long("c->rdx" if name == "dx" else "c->ax")
        if not self._is_return and self.point.is_entry and name in _ARGUMENTS:
            return self._unsigned_long(f"c->{name}")
        self.uses_regs = True
        return self._unsigned_long(f"c->regs->{name}")

    def special(self, name: str, index: int | None, code: Code) -> Value | Place:
        """``$name`` or ``$nameN``, except the string ``$comm``.

        :raises NotResident: if it has no value here
        """
        match name:
            case "pid" | "tgid":
                model = drgn.Object(self.program, "int", address=MODEL_ADDRESS)
                return self._task_place(name, model)
            case "cpu":
                return value_of(drgn.Object(self.program, "int", 1), "(s32)c->cpu")
            case "task":
                pointer = self.program.pointer_type(self._task)
                model = drgn.Object(self.program, pointer, MODEL_ADDRESS)
                return value_of(model, "(u64)c->task", direct_bytes=drgn.sizeof(self._task))
            case "arg":
                return self._argument(index or 1)
            case "stack":
                return self._unsigned_long("c->sp") if index is None else self._stack(index, code)
            case "duration_ns" if self._is_return:
                return self._unsigned_long("c->duration_ns")
            case "retval" if self._is_return:
                return self._return_value(code)
        raise NotResident(f"${name} has no value here")

    def comm(self) -> Place:
        """The current task's name: an array of char that always has an end."""
        member = self._task.member("comm")
        model = drgn.Object(self.program, member.type, address=MODEL_ADDRESS)
        return self._task_place("comm", model)

    def _task_place(self, member: str, model: drgn.Object) -> Place:
        offset = int(self._task.member(member).offset)
        return Place(model, "c->task", offset, range(drgn.sizeof(self._task)))

    def _unsigned_long(self, text: str) -> Value:
        return value_of(drgn.Object(self.program, "unsigned long", 1), text)

    def _object(self, name: str, found: drgn.Object) -> Value | Place:
        if found.absent_:
            raise NotResident(f"'{name}' is declared only")
        if found.address_ is None:
            return constant(found)
        return self.global_place(name, found, found.type_, 0)

    def _mapped_bytes(self, found: drgn.Object, address: int) -> int:
        # What is in the image and not freed after the boot can be read without care.
        link = address - self._kernel.slide
        symbol = self._kernel.vmlinux.containing(link)
        if symbol is None or not symbol.section or symbol.section.startswith((".init", ".exit")):
            return 0
        size = symbol.address + symbol.size_bytes - link
        kind = underlying_type(found.type_).kind
        has_size = kind in _INTEGERS or (kind in AGGREGATES and found.type_.is_complete())
        if symbol.address == link and has_size:
            size = max(size, drgn.sizeof(found))  # an alias may have no size of its own
        return max(0, size)

    def _argument(self, number: int) -> Value:
        if number > len(_ARGUMENTS):
            raise NotResident(f"$arg{number} is not in a register; give the parameter's name")
        return self._unsigned_long(self._entry_word(f"c->{_ARGUMENTS[number - 1]}"))

    def _entry_word(self, text: str) -> str:
        # At the return, what was kept of the entry.
        if not self._is_return:
            return text
        if text not in self.saves:
            self.saves.append(text)
        return f"c->saved[{self.saves.index(text)}]"

    def _stack(self, index: int, code: Code) -> Value:
        model = drgn.Object(self.program, "unsigned long", address=MODEL_ADDRESS)
        offset = 8 * index
        if not index and not self._is_return:
            place = Place(model, "c->sp", 0, range(8))
            return self._unsigned_long(code.load(place, scalar_of(model)))
        place = Place(model, "c->sp", offset, space="kernel")
        scalar = scalar_of(model)
        text, far = code.capture(lambda: code.load(place, scalar))
        near = Place(model, "c->sp", offset, range(offset, offset + 8))
        word = code.variable("u64")
        # What is in the page of the stack pointer is mapped; a stack ends with a page.
        code.line(f"if (likely(!((c->sp ^ (c->sp + {offset})) >> {_PAGE_BYTES.bit_length() - 1})))")
        code.line(f"{word} = {code.load(near, scalar)};")
        code.line("else {")
        code.lines += far
        code.line(f"{word} = {text}; }}")
        return self._unsigned_long(word)

    def _parameter(self, parameter: _Parameter, code: Code) -> Value | Place:
        type_, location = parameter.type_, parameter.location
        stack = location.stack_offset_bytes
        size = drgn.sizeof(type_)
        if stack is not None and not self._is_return:
            model = drgn.Object(self.program, type_, address=MODEL_ADDRESS)
            return Place(model, "c->sp", stack, range(stack, stack + size))
        if stack is None:
            words = [f"c->{_SHORT_NAMES.get(name, name)}" for name in location.registers]
        else:
            if size > _MAX_SAVED_BYTES:
                raise NotResident("a parameter on the stack is too large to keep for the return")
            words = [f"*(const u64 *)(c->sp + {at})" for at in range(stack, stack + size, 8)]
        words = [self._entry_word(word) for word in words]
        if len(words) == 1 and underlying_type(type_).kind in _INTEGERS:
            return self._scalar(type_, words[0])
        return self._copy(type_, words, code)

    def _return_value(self, code: Code) -> Value | Place:
        type_ = self._type.type if self._type is not None else self.program.type("unsigned long")
        kind = underlying_type(type_).kind
        if kind is drgn.TypeKind.VOID:
            raise NotResident("the function returns nothing")
        if kind not in AGGREGATES:
            return self._scalar(type_, "c->ax")
        if drgn.sizeof(type_) <= 16:
            return self._copy(type_, ["c->ax", "c->rdx"], code)
        return place_of(self.program, type_, "c->ax")

    def _copy(self, type_: drgn.Type, words: list[str], code: Code) -> Place:
        name = code.name()
        code.line(f"const u64 {name}[{len(words)}] = {{ {', '.join(words)} }};")
        model = drgn.Object(self.program, type_, address=MODEL_ADDRESS)
        return Place(model, name, direct=range(8 * len(words)), is_copy=True)

    def _scalar(self, type_: drgn.Type, word: str) -> Value:
        model = drgn.Object(self.program, type_, 1)
        scalar = scalar_of(model)
        return value_of(model, f"(u8)({word} & 1)" if scalar.boolean else convert(word, scalar))


def _parameters(type_: drgn.Type) -> dict[str, _Parameter]:
    result = underlying_type(type_.type)
    in_memory = result.kind in AGGREGATES and drgn.sizeof(result) > 16
    locations = locate_parameters(
        [_abi_parameter(p.type) for p in type_.parameters], returns_memory=in_memory
    )
    return {
        parameter.name: _Parameter(parameter.type, location)
        for parameter, location in zip(type_.parameters, locations, strict=True)
        if parameter.name and location is not None
    }


def _abi_parameter(type_: drgn.Type) -> Parameter:
    type_ = underlying_type(type_)
    if type_.kind is drgn.TypeKind.FLOAT:
        return Parameter(drgn.sizeof(type_), ParameterKind.FLOAT)
    if type_.kind in AGGREGATES:
        return Parameter(drgn.sizeof(type_), ParameterKind.STRUCT)
    if type_.kind in _INTEGERS:
        size = drgn.sizeof(type_)
        return Parameter(size, alignment_bytes=16 if size == 16 else 8)
    return Parameter(8)
