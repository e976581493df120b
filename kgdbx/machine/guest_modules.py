"""Kernel modules for the guest, with what they depend on."""

import lzma
from collections.abc import Iterable
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.kernels import StockKernel

__all__ = ("find_module", "module_depends", "modules_tree", "read_module")


def find_module(kernel: StockKernel, name: str) -> Path:
    """The file of a module; ``-`` and ``_`` in its name are the same.

    :raises MachineError: if the kernel has no such module
    """
    wanted = _canonical(name)
    for path in kernel.modules.rglob("*.ko*"):
        if _canonical(path.name.partition(".ko")[0]) == wanted:
            return path
    raise MachineError(f"kernel {kernel.release} has no module {name}; see {kernel.modules}")


def read_module(path: Path) -> bytes:
    """The ELF bytes of a ``.ko`` or ``.ko.xz``.

    :raises MachineError: if it is compressed in another way
    """
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix != ".ko":
        raise MachineError(f"cannot decompress {path}; only .ko and .ko.xz are known")
    return data


def module_depends(data: bytes) -> tuple[str, ...]:
    """Names of the modules that one needs, from its ``.modinfo``."""
    # Only .modinfo holds NUL-terminated strings of this form.
    _, found, rest = data.partition(b"\0depends=")
    names = rest.partition(b"\0")[0].decode() if found else ""
    return tuple(name for name in names.split(",") if name)


def modules_tree(kernel: StockKernel, names: Iterable[str]) -> dict[str, bytes]:
    """Modules and all that they depend on, with a ``modules.dep`` for ``modprobe``.

    :return: name in the guest to content; empty if no module is asked for
    :raises MachineError: if the kernel has no such module
    """
    files: dict[str, tuple[str, bytes, tuple[str, ...]]] = {}
    pending = [_canonical(name) for name in names]
    while pending:
        name = pending.pop()
        if name not in files:
            path = find_module(kernel, name)
            data = read_module(path)
            needs = tuple(_canonical(n) for n in module_depends(data))
            files[name] = (f"kernel/{path.name.removesuffix('.xz')}", data, needs)
            pending += needs
    if not files:
        return {}
    root = f"lib/modules/{kernel.release}"
    lines = []
    for name, (file, _, _) in sorted(files.items()):
        others = [files[other][0] for other in _closure(name, files)]
        lines.append(f"{file}: {' '.join(others)}".rstrip() + "\n")
    tree = {f"{root}/{file}": data for file, data, _ in files.values()}
    tree[f"{root}/modules.dep"] = "".join(lines).encode()
    return tree


# All that a module needs, nearest first: modprobe loads them from the end.
def _closure(name: str, files: dict[str, tuple[str, bytes, tuple[str, ...]]]) -> list[str]:
    order: list[str] = []
    for need in files[name][2]:
        for other in [need, *_closure(need, files)]:
            if other in order:
                order.remove(other)
            order.append(other)
    return order


def _canonical(name: str) -> str:
    return name.replace("-", "_")
