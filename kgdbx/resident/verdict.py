"""Nullify, replace, and C handlers: probes that decide what becomes of a call."""

import abc
import errno
import re
from pathlib import Path

import drgn

from kgdbx.errors import DefinitionError, ProbeError
from kgdbx.probes.definition import ProbeDefinition, parse_definition
from kgdbx.probes.probe import Point
from kgdbx.resident.compile.codegen import generate
from kgdbx.resident.compile.decision import HANDLER, Decision, UserCode, jump_to, return_at_once
from kgdbx.resident.compile.user_code import (
    check_symbols,
    compile_handler,
    entry_of,
    kernel_symbols,
)
from kgdbx.resident.engine import Engine
from kgdbx.resident.probe import ResidentProbe
from kgdbx.resident.program import Program
from kgdbx.resident.reader import EventReader
from kgdbx.symbols.kernel import Function, Kernel

__all__ = ("CHandler", "Nullify", "Replace", "VerdictProbe", "parse_retval")

_IN_MEMORY = (drgn.TypeKind.STRUCT, drgn.TypeKind.UNION, drgn.TypeKind.CLASS)
_FUNCTION = re.compile(r"([\w-]+:)?[A-Za-z_][\w.]*")
_MIN_RETVAL, _MAX_RETVAL = -(1 << 63), (1 << 64) - 1
# include/linux/errno.h: what user space does not see, and Python's module does not have.
_KERNEL_ERRORS = {
    "ERESTARTSYS": 512,
    "ERESTARTNOINTR": 513,
    "ERESTARTNOHAND": 514,
    "ENOIOCTLCMD": 515,
    "ERESTART_RESTARTBLOCK": 516,
    "EPROBE_DEFER": 517,
    "EOPENSTALE": 518,
    "ENOPARAM": 519,
    "EBADHANDLE": 521,
    "ENOTSYNC": 522,
    "EBADCOOKIE": 523,
    "ENOTSUPP": 524,
    "ETOOSMALL": 525,
    "ESERVERFAULT": 526,
    "EBADTYPE": 527,
    "EJUKEBOX": 528,
    "EIOCBQUEUED": 529,
}
_CONSTANTS = {"NULL": 0, "false": 0, "true": 1}


def parse_retval(text: str) -> int:
    """A return value: a number, ``-ENOMEM`` and its like, ``NULL``, ``true`` or ``false``.

    :raises ProbeError: if it is none of them, or does not fit into 64 bits
    """
    word = text.strip()
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    sign, name = (-1, word[1:]) if word.startswith("-") else (1, word)
    error = _KERNEL_ERRORS.get(name, getattr(errno, name, None) if name[:1] == "E" else None)
    try:
        value = sign * error if isinstance(error, int) else int(word, 0)
    except ValueError:
        raise ProbeError(
            f"{text!r} is no return value: give a number, -ENOMEM and its like, NULL, true or false"
        ) from None
    if not _MIN_RETVAL <= value <= _MAX_RETVAL:
        raise ProbeError(f"{text} does not fit into 64 bits")
    return value


class VerdictProbe(ResidentProbe):
    """A probe at a function's entry that decides whether and how the call goes on.

    :param function: ``[module:]function``
    :param action: what is done, in the words of listings
    :param condition: an ``if`` expression; None for all calls
    :param module: only for calls whose return address is in this module
    :param name: a default if it is None
    """

    group = "verdict"
    done = "decided"
    """What was done with a call."""

    def __init__(
        self,
        function: str,
        engine: Engine,
        reader: EventReader,
        *,
        action: str,
        condition: str | None,
        module: str | None,
        name: str | None,
    ) -> None:
        self._decided = 0
        self._module = module
        definition = _definition(self.group, function, condition, name)
        super().__init__(definition, engine, reader, inlined_copies=False)
        words = [f"{self.group} {function} {action}".rstrip()]
        words += [f"if {condition}"] if condition else []
        words += [f"from {module}"] if module else []
        self.text = " ".join(words)

    @abc.abstractmethod
    def decision(self, kernel: Kernel, function: Function) -> Decision:
        """What is done with a call of a function; condition and callers are added to it.

        :raises ProbeError: if it cannot be done to this function
        """

    @property
    def decided(self) -> int:
        """Calls so far that did not go on as they would have by themselves."""
        programs = (p for p in self._programs if p.id in self._engine.programs)
        return self._decided + sum(self._engine.counts(p).decided for p in programs)

    @property
    def note(self) -> str:
        """The same, for listings."""
        return f"{self.decided} of its calls {self.done}"

    def prepare(self, kernel: Kernel) -> None:
        """Compile it for every place.

        :raises NotResident: if the condition asks for what code in the guest cannot do
        :raises CannotDisplace: if the function cannot give way to a jump
        :raises ProbeError: if the place is not a function's entry, or the module is not loaded
        """
        self._programs = [self._program(kernel, point) for point in self.points]

    def install(self) -> None:
        """Put it into the guest."""
        self._engine.install(self._programs)

    def uninstall(self) -> None:
        """Take it out of the guest; what it counted stays. Calls under way end as they began."""
        decided = self.decided
        super().uninstall()
        self._decided = decided

    def _program(self, kernel: Kernel, point: Point) -> Program:
        function = point.function
        if not point.is_entry:
            raise ProbeError(
                f"{self.group} goes to the entry of a function, not to "
                f"{function.qualified_name}+{point.offset_bytes:#x}",
                errno.EINVAL,
            )
        displacement = self._engine.displacement(function, point.address)
        body = generate(self._definition, kernel, point)
        found = self.decision(kernel, function)
        decision = Decision(
            found.action,
            body.condition,
            found.calls_kernel or body.calls_kernel,
            self._callers(kernel),
            found.user,
        )
        return Program("verdict", displacement, decision=decision)

    def _callers(self, kernel: Kernel) -> tuple[tuple[int, int], ...]:
        if self._module is None:
            return ()
        loaded = kernel.modules.find(self._module)
        if loaded is None:
            raise ProbeError(f"module {self._module!r} is not loaded", errno.ENOENT)
        return tuple((start, size) for start, size, _ in loaded.regions)


class Nullify(VerdictProbe):
    """The function returns a value at once; its code does not run.

    :param retval: a number, or what :func:`parse_retval` takes
    """

    group = "nullify"
    done = "nullified"

    def __init__(
        self,
        function: str,
        engine: Engine,
        reader: EventReader,
        retval: int | str = 0,
        *,
        condition: str | None = None,
        module: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            function,
            engine,
            reader,
            action=str(retval),
            condition=condition,
            module=module,
            name=name,
        )
        self.kind = "n"
        self._retval = parse_retval(str(retval))

    def decision(self, kernel: Kernel, function: Function) -> Decision:
        """Return at once.

        :raises ProbeError: if the function returns a structure
        """
        type_ = kernel.function_type(function)
        if type_ is not None and _bare(type_.type).kind in _IN_MEMORY:
            raise ProbeError(
                f"{function.qualified_name} returns {type_.type.type_name()}, which is more than "
                "a number; replace it with a function of its type",
                errno.EINVAL,
            )
        return Decision(return_at_once(self._retval))


class Replace(VerdictProbe):
    """Another function of the kernel runs in place of the function.

    :param other: ``[module:]function``
    :param any_type: do not compare the types of the two
    """

    group = "replace"
    done = "replaced"

    def __init__(
        self,
        function: str,
        engine: Engine,
        reader: EventReader,
        other: str,
        *,
        condition: str | None = None,
        module: str | None = None,
        name: str | None = None,
        any_type: bool = False,
    ) -> None:
        super().__init__(
            function,
            engine,
            reader,
            action=f"by {other}",
            condition=condition,
            module=module,
            name=name,
        )
        self.kind = "x"
        self._other = other
        self._any_type = any_type

    def decision(self, kernel: Kernel, function: Function) -> Decision:
        """Go on at the other function.

        :raises SymbolError: if there is no other function
        :raises ProbeError: if there are several, it may go away, or its type is another one
        """
        other = self._find(kernel)
        if other.address == function.address:
            raise ProbeError(f"{function.qualified_name} cannot replace itself", errno.EINVAL)
        if other.module is not None and (
            function.module is None or function.module.name != other.module.name
        ):
            raise ProbeError(
                f"{other.qualified_name} is in a module, which may be unloaded while "
                f"{function.qualified_name} is still called",
                errno.EINVAL,
            )
        types = [_type_text(kernel, each) for each in (function, other)]
        if not self._any_type and None not in types and types[0] != types[1]:
            raise ProbeError(
                f"{function.qualified_name} is {types[0]}, and {other.qualified_name} is "
                f"{types[1]}: another type",
                errno.EINVAL,
            )
        return Decision(jump_to(other.address))

    def _find(self, kernel: Kernel) -> Function:
        module, _, name = self._other.rpartition(":")
        loaded = kernel.modules.find(module) if module else None
        if module and loaded is None:
            raise ProbeError(f"module {module!r} is not loaded", errno.ENOENT)
        found = kernel.functions(name, loaded)
        if len(found) > 1:
            raise ProbeError(f"there are {len(found)} functions {self._other!r}", errno.EINVAL)
        return found[0]


class CHandler(VerdictProbe):
    """A user's C file decides: ``int handler(struct pt_regs *regs)``, or a function that runs in
    place of the probed one: ``replacement()``, or one of the same name.

    :param path: the file
    :param types: ``vmlinux.h`` of the kernel
    :raises CompileError: with the file and line of each error
    """

    group = "replace"

    def __init__(
        self,
        function: str,
        engine: Engine,
        reader: EventReader,
        path: Path,
        types: Path | None,
        *,
        condition: str | None = None,
        module: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            function,
            engine,
            reader,
            action=f"by {path}",
            condition=condition,
            module=module,
            name=name,
        )
        self._object = compile_handler(path, types)
        self._entry = entry_of(self._object, path, function.rpartition(":")[2])
        self.kind = "c" if self._entry == "handler" else "x"
        self.done = "decided" if self._entry == "handler" else "replaced"

    def decision(self, kernel: Kernel, function: Function) -> Decision:
        """Ask the user's handler, or go on at the user's function.

        :raises LinkError: if the file needs what the kernel does not have
        """
        user = UserCode(self._object, self._entry, kernel_symbols(kernel, function))
        check_symbols(user, kernel)
        is_handler = self._entry == "handler"
        return Decision(HANDLER if is_handler else jump_to(), calls_kernel=is_handler, user=user)


def _definition(
    group: str, function: str, condition: str | None, name: str | None
) -> ProbeDefinition:
    if not _FUNCTION.fullmatch(function):
        raise DefinitionError(f"{function!r} is not the name of a function", function, 0)
    name = name or re.sub(r"\W", "_", function)
    test = f" if {condition}" if condition else ""
    return parse_definition(f"p:{group}/{name} {function}{test}")


def _type_text(kernel: Kernel, function: Function) -> str | None:
    type_ = kernel.function_type(function)
    if type_ is None:
        return None
    parameters = [p.type.type_name() for p in type_.parameters]
    parameters += ["..."] if type_.is_variadic else []
    return f"{type_.type.type_name()}({', '.join(parameters) or 'void'})"


def _bare(type_: drgn.Type) -> drgn.Type:
    while type_.kind is drgn.TypeKind.TYPEDEF:
        type_ = type_.type
    return type_
