"""Replace: another function of the kernel, or C of the user's, has the calls."""

import errno
from pathlib import Path

from kgdbx.errors import ProbeError
from kgdbx.resident.compile.decision import HANDLER, Decision, UserCode, jump_to
from kgdbx.resident.compile.user_code import (
    check_symbols,
    compile_handler,
    entry_of,
    kernel_symbols,
)
from kgdbx.resident.verdict import Verdict
from kgdbx.symbols.kernel import Function, Kernel

__all__ = ("CHandler", "Replace")


class Replace(Verdict):
    """Another function of the kernel runs in place of the function.

    :param other: ``[module:]function``
    :param any_type: do not compare the types of the two
    """

    group = "replace"
    kind = "x"
    done = "replaced"

    def __init__(self, other: str, *, any_type: bool = False) -> None:
        self.action = f"by {other}"
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


class CHandler(Verdict):
    """A user's C file decides: ``int handler(struct pt_regs *regs)``, or a function that runs in
    place of the probed one: ``replacement()``, or one of the same name.

    :param path: the file
    :param types: ``vmlinux.h`` of the kernel
    :param function: ``[module:]function`` that is probed
    :raises CompileError: with the file and line of each error
    """

    group = "replace"

    def __init__(self, path: Path, types: Path | None, function: str) -> None:
        self.action = f"by {path}"
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


def _type_text(kernel: Kernel, function: Function) -> str | None:
    type_ = kernel.function_type(function)
    if type_ is None:
        return None
    parameters = [p.type.type_name() for p in type_.parameters]
    parameters += ["..."] if type_.is_variadic else []
    return f"{type_.type.type_name()}({', '.join(parameters) or 'void'})"
