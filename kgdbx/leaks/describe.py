"""What a block may be: its type by the name of its cache, text in it, symbols that it points to."""

import dataclasses
import re

import drgn

from kgdbx.errors import KgdbxError
from kgdbx.leaks.blocks import Block, BlockKind, Heap

__all__ = ("Description", "describe_block", "member_at", "symbol_at", "typed_object")

_LOOK_BYTES = 512
_MOST_SYMBOLS = 3
_TEXT = re.compile(rb"[\x20-\x7e]{4,}(?=\0)")
_KERNEL_HALF = 1 << 63
# The struct of a cache has the cache's name, with one of these endings, or one of these names.
_ENDINGS = ("", "_cache", "_cachep", "_struct", "_inode_cache", "_slab")
_NAMES = {
    "filp": "file",
    "pool_workqueue": "pool_workqueue",
    "proc_inode_cache": "proc_inode",
    "shmem_inode_cache": "shmem_inode_info",
    "sock_inode_cache": "socket_alloc",
    "inode_cache": "inode",
    "kernfs_node_cache": "kernfs_node",
    "mnt_cache": "mount",
    "names_cache": "",
    "radix_tree_node": "xa_node",
    "skbuff_head_cache": "sk_buff",
}
# At its end are the registers of the FPU, as many as the CPU has: fpu__init_task_struct_size().
_OF_ANY_SIZE = ("task_struct",)


@dataclasses.dataclass(frozen=True)
class Description:
    """What can be told of a block.

    :ivar type_name: such as ``struct dentry``; a guess by the name of its cache. Empty for none
    :ivar text: the first printable string in it; empty for none
    :ivar symbols: what it points to in the kernel or in modules, such as ``ext4_fops``
    """

    type_name: str
    text: str
    symbols: tuple[str, ...]


def describe_block(heap: Heap, block: Block) -> Description:
    """Look at a block's first bytes."""
    data = _read(heap, block)
    text = _TEXT.search(data)
    words = [int.from_bytes(data[n : n + 8], "little") for n in range(0, len(data) - 7, 8)]
    symbols: dict[str, None] = {}
    for word in words:
        name = symbol_at(heap, word) if word >= _KERNEL_HALF else ""
        if name:
            symbols[name] = None
    return Description(
        _type_name(heap, block),
        text[0].decode("ascii") if text else "",
        tuple(symbols)[:_MOST_SYMBOLS],
    )


def typed_object(heap: Heap, block: Block) -> drgn.Object | None:
    """The block as a drgn object, if the name of its cache tells the type.

    :return: a reference to a ``struct``, or None
    """
    name = _type_name(heap, block)
    if not name:
        return None
    return drgn.Object(heap.kernel.program, name, address=block.address)


def symbol_at(heap: Heap, address: int) -> str:
    """``name+0x8 [module]`` of a variable or function at an address; empty if there is none."""
    kernel = heap.kernel
    link = address - kernel.slide
    vmlinux = kernel.vmlinux
    if vmlinux.address("_text") <= link < vmlinux.address("_end"):
        symbol = vmlinux.containing(link)
        return _with_offset(symbol.name, link - symbol.address) if symbol else ""
    module = kernel.modules.containing(address)
    if module is None:
        return ""
    below = (s for s in kernel.modules.symbols(module) if s.address <= address and s.name)
    best = max(below, key=lambda s: s.address, default=None)
    name = _with_offset(best.name, address - best.address) if best else ""
    return f"{name} [{module.name}]" if name else f"[{module.name}]"


def member_at(type_: drgn.Type, offset: int) -> str:
    """The member at an offset of a structure, such as ``d_u.d_rcu.func``; empty if none is."""
    for member in type_.members if type_.kind in _COMPOUND else ():
        start = member.bit_offset // 8
        inner = _plain(member.type)
        size = drgn.sizeof(inner) if inner.is_complete() else 0
        if start <= offset < start + size:
            rest = member_at(inner, offset - start)
            return ".".join(part for part in (member.name or "", rest) if part)
    return ""


_COMPOUND = (drgn.TypeKind.STRUCT, drgn.TypeKind.UNION)


def _plain(type_: drgn.Type) -> drgn.Type:
    while type_.kind == drgn.TypeKind.TYPEDEF:
        type_ = type_.type
    return type_


def _with_offset(name: str, offset: int) -> str:
    return f"{name}+{offset:#x}" if offset else name


def _read(heap: Heap, block: Block) -> bytes:
    if block.kind is BlockKind.PERCPU:
        return b""
    try:
        return heap.memory.read(block.address, min(block.size_bytes, _LOOK_BYTES))
    except KgdbxError:
        return b""  # an area with holes


# A cache may be merged with others of its size: the type must have that very size, about.
def _type_name(heap: Heap, block: Block) -> str:
    if block.kind is not BlockKind.SLAB or block.cache.startswith("kmalloc-"):
        return ""
    names = [_NAMES[block.cache]] if block.cache in _NAMES else []
    for ending in _ENDINGS:
        if block.cache.endswith(ending):
            names.append(block.cache[: len(block.cache) - len(ending)])
    cache = next(c for c in heap.slabs.caches if c.name == block.cache)
    for name in filter(None, names):
        try:
            type_ = heap.kernel.program.type(f"struct {name}")
        except LookupError:
            continue
        size = type_.size if type_.is_complete() else None
        if size is None:
            continue
        if name in _OF_ANY_SIZE or cache.object_bytes - 8 < size <= cache.object_bytes:
            return f"struct {name}"
    return ""
