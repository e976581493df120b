"""A user's C file, compiled with the kernel's own types and checked against its symbols."""

from collections.abc import Callable
from pathlib import Path

from kgdbx.errors import ProbeError
from kgdbx.resident.compile.decision import ORIGINAL, STACK, UserCode
from kgdbx.resident.compile.link import LinkError, Object, compile_file
from kgdbx.symbols.elf import near_names
from kgdbx.symbols.kernel import Function, Kernel

__all__ = ("check_symbols", "compile_handler", "entry_of", "kernel_symbols")

_HEADER = Path(__file__).with_name("handler.h")
_FLAGS = (
    "-Werror=implicit-function-declaration",
    "-Werror=implicit-int",
    "-Werror=int-conversion",
    "-Werror=incompatible-pointer-types",
    "-Werror=return-type",
    "-DBPF_NO_PRESERVE_ACCESS_INDEX",
    "-DBPF_NO_KFUNC_PROTOTYPES",
)
_FREED = (".init", ".exit")


def compile_handler(path: Path, types: Path | None) -> Object:
    """Compile a file.

    :param types: ``vmlinux.h`` of the kernel; None leaves ``struct pt_regs`` and integers
    :raises CompileError: with the file and line of each error
    :raises ProbeError: if there is no such file
    """
    if not path.is_file():
        raise ProbeError(f"there is no file {path}")
    headers = [header for header in (types, _HEADER) if header is not None]
    include = [word for h in headers for word in ("-I", str(h.parent), "-include", str(h))]
    return compile_file(path, flags=(*_FLAGS, *include))


def entry_of(compiled: Object, path: Path, function: str) -> str:
    """The function of a file that takes the calls: ``handler``, ``replacement``, or one of the
    probed function's own name.

    :raises ProbeError: if there is none, or more than one
    """
    wanted = ("handler", "replacement", function)
    found = [name for name in dict.fromkeys(wanted) if name in compiled.defined]
    if len(found) == 1:
        return found[0]
    names = " and ".join(f"{name}()" for name in found)
    raise ProbeError(
        f"{path} defines {names}: only one of them can take the calls"
        if found
        else f"{path} defines neither handler() nor replacement() nor {function}()"
    )


def kernel_symbols(kernel: Kernel, function: Function) -> Callable[[str], int | None]:
    """Function that resolves the kernel's symbols, and those of the probed function's module.

    It raises :class:`~kgdbx.resident.compile.link.LinkError` for a name that is not one thing.
    """

    def resolve(name: str) -> int | None:
        found = kernel.vmlinux.lookup(name)
        if found and all(s.section.startswith(_FREED) for s in found):
            raise LinkError(f"{name!r} is freed after the boot")
        addresses = {s.address for s in found}
        if len(addresses) > 1:
            raise LinkError(f"the kernel has {len(addresses)} symbols {name!r}")
        if found:
            return kernel.object_address(name)
        symbols = kernel.modules.symbols(function.module) if function.module else ()
        return next((s.address for s in symbols if s.name == name), None)

    return resolve


def check_symbols(code: UserCode, kernel: Kernel) -> None:
    """Look up all that a file needs of the kernel.

    :raises LinkError: for what it does not have, with the nearest names
    """
    missing = [
        name
        for name in code.object.undefined
        if name not in (ORIGINAL, STACK) and code.resolve(name) is None
    ]
    if missing:
        hints = [_hint(name, kernel) for name in missing]
        raise LinkError(f"the kernel has no symbol {', '.join(hints)}")


def _hint(name: str, kernel: Kernel) -> str:
    near = near_names(name, kernel.vmlinux.function_names)
    return f"{name!r} (nearest: {', '.join(near)})" if near else repr(name)
