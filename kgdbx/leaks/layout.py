"""How the kernel describes its memory: offsets and constants from debug information."""

import dataclasses

import drgn

from kgdbx.errors import SymbolError

__all__ = ("CacheLayout", "Layout", "PageLayout", "PercpuLayout", "VmLayout", "read_layout")

# Page types before they were an enumeration: macros in include/linux/page-flags.h, which debug
# information does not show. A type is set if its bit is clear and PAGE_TYPE_BASE is set.
_OLD_BASE = 0xF0000000
_OLD_BUDDY, _OLD_TABLE = 0x80, 0x200
_NEW_SHIFT = 24


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """``struct page`` and what is laid over it. Offsets are in bytes, flags are masks.

    :ivar size_bytes: of a ``struct page``
    :ivar slab_mask: bits to look at in flags (old) or page_type (new) for slabs
    :ivar slab_value: what they are for a slab
    :ivar slab_by_type: whether these are bits of page_type
    :ivar order_shift: where the order of a compound page is in the word of its second page
    """

    size_bytes: int
    flags: int
    compound_head: int
    mapping: int
    private: int
    page_type: int
    refcount: int
    list: int
    order: int
    order_shift: int
    reserved: int
    head: int
    lru: int
    slab_by_type: bool
    slab_mask: int
    slab_value: int
    buddy_mask: int
    buddy_value: int
    table_mask: int
    table_value: int


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """``struct slab``, ``struct kmem_cache`` and ``struct kmem_cache_cpu``; offsets in bytes.

    :ivar objects_word: offset in ``struct slab`` of the 8 bytes that hold the counters
    :ivar objects_shift: bits below ``objects`` in them
    :ivar objects_mask: of ``objects``, when shifted
    :ivar extensions: offset in ``struct slab`` of the pointer to what is kept for each object
    :ivar random: None unless freelists are encoded (CONFIG_SLAB_FREELIST_HARDENED)
    """

    slab_cache: int
    freelist: int
    objects_word: int
    objects_shift: int
    objects_mask: int
    extensions: int | None
    size_bytes: int
    cpu_slab: int | None
    size: int
    object_size: int
    offset: int
    red_left_pad: int | None
    name: int
    random: int | None
    cpu_freelist: int
    cpu_slab_page: int
    cpu_bytes: int


@dataclasses.dataclass(frozen=True)
class VmLayout:
    """``struct vmap_area`` and ``struct vm_struct``, offsets in bytes."""

    va_start: int
    va_end: int
    vm: int
    area_bytes: int
    addr: int
    size: int
    flags: int
    pages: int
    caller: int
    vm_bytes: int


@dataclasses.dataclass(frozen=True)
class PercpuLayout:
    """``struct pcpu_chunk``, offsets in bytes."""

    list: int
    base_addr: int
    alloc_map: int
    bound_map: int
    nr_pages: int
    start_offset: int
    end_offset: int
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """All that is needed of a kernel's types; :func:`read_layout` makes it."""

    page: PageLayout
    cache: CacheLayout
    vm: VmLayout
    percpu: PercpuLayout


def read_layout(program: drgn.Program) -> Layout:
    """Read the layout of a kernel's memory management.

    :raises SymbolError: if debug information lacks a part: the kernel has another allocator than
        SLUB, or is of another age than is known here
    """
    try:
        return Layout(
            _page_layout(program),
            _cache_layout(program),
            _vm_layout(program),
            _percpu_layout(program),
        )
    except LookupError as e:
        raise SymbolError(
            f"the memory of this kernel has an unknown layout: {e}; "
            "kernels with SLUB since 5.17 can be scanned"
        ) from e


def _page_layout(program: drgn.Program) -> PageLayout:
    page = program.type("struct page")
    flags = {e.name: e.value for e in program.type("enum pageflags").enumerators or ()}
    order, order_shift = _order_place(program, page)
    # Linux kernel commit 46df8e73a4a3 ("mm: free up PG_slab") (in v6.10) made it a page type, and
    # commit 4ffca5a96678 ("mm: support only one page_type per page") (in v6.12) an enumeration.
    try:
        types = {e.name: e.value for e in program.type("enum pagetype").enumerators or ()}
    except LookupError:
        buddy_mask, table_mask = _OLD_BASE | _OLD_BUDDY, _OLD_BASE | _OLD_TABLE
        buddy_value = table_value = _OLD_BASE
        slab_by_type, slab_value = False, 1 << flags["PG_slab"]
        slab_mask = slab_value
    else:
        slab_mask = buddy_mask = table_mask = 0xFF << _NEW_SHIFT
        buddy_value = types["PGTY_buddy"] << _NEW_SHIFT
        table_value = types["PGTY_table"] << _NEW_SHIFT
        slab_by_type, slab_value = True, types["PGTY_slab"] << _NEW_SHIFT
    return PageLayout(
        size_bytes=page.size or 0,
        flags=_offset(page, "flags"),
        compound_head=_offset(page, "compound_head"),
        mapping=_offset(page, "mapping"),
        private=_offset(page, "private"),
        page_type=_offset(page, "page_type"),
        refcount=_offset(page, "_refcount"),
        list=_offset(page, "lru"),
        order=order,
        order_shift=order_shift,
        reserved=1 << flags["PG_reserved"],
        head=1 << flags["PG_head"],
        lru=1 << flags["PG_lru"],
        slab_by_type=slab_by_type,
        slab_mask=slab_mask,
        slab_value=slab_value,
        buddy_mask=buddy_mask,
        buddy_value=buddy_value,
        table_mask=table_mask,
        table_value=table_value,
    )


# The order of a compound page is in its second page: of the word that starts at an offset, 8 bits.
def _order_place(program: drgn.Program, page: drgn.Type) -> tuple[int, int]:
    # Linux kernel commit ebc1baf5c9b4 ("mm: free up a word in the first tail page") (in v6.6).
    folio = program.type("struct folio")
    if folio.has_member("_flags_1") and not page.has_member("compound_order"):
        if not folio.has_member("_folio_order"):
            return _offset(folio, "_flags_1") - (page.size or 0), 0
        return _offset(folio, "_folio_order") - (page.size or 0), 0
    byte = _offset(page, "compound_order")
    return byte & ~7, 8 * (byte & 7)


def _cache_layout(program: drgn.Program) -> CacheLayout:
    slab = program.type("struct slab")
    cache = program.type("struct kmem_cache")
    cpu = program.type("struct kmem_cache_cpu")
    objects = slab.member("objects")
    word = objects.bit_offset // 64
    # Linux kernel commit 21c690a349ba ("mm: introduce slabobj_ext to support slab object
    # extensions") (in v6.10) renamed it.
    extensions = _optional(slab, "obj_exts")
    if extensions is None:
        extensions = _optional(slab, "memcg_data")
    return CacheLayout(
        slab_cache=_offset(slab, "slab_cache"),
        freelist=_offset(slab, "freelist"),
        objects_word=8 * word,
        objects_shift=objects.bit_offset - 64 * word,
        objects_mask=(1 << (objects.bit_field_size or 0)) - 1,
        extensions=extensions,
        size_bytes=_offset(cache, "node"),
        cpu_slab=_optional(cache, "cpu_slab"),
        size=_offset(cache, "size"),
        object_size=_offset(cache, "object_size"),
        offset=_offset(cache, "offset"),
        red_left_pad=_optional(cache, "red_left_pad"),
        name=_offset(cache, "name"),
        random=_optional(cache, "random"),
        cpu_freelist=_offset(cpu, "freelist"),
        cpu_slab_page=_offset(cpu, "slab"),
        cpu_bytes=cpu.size or 0,
    )


def _vm_layout(program: drgn.Program) -> VmLayout:
    area = program.type("struct vmap_area")
    vm = program.type("struct vm_struct")
    return VmLayout(
        va_start=_offset(area, "va_start"),
        va_end=_offset(area, "va_end"),
        vm=_offset(area, "vm"),
        area_bytes=area.size or 0,
        addr=_offset(vm, "addr"),
        size=_offset(vm, "size"),
        flags=_offset(vm, "flags"),
        pages=_offset(vm, "pages"),
        caller=_offset(vm, "caller"),
        vm_bytes=vm.size or 0,
    )


def _percpu_layout(program: drgn.Program) -> PercpuLayout:
    chunk = program.type("struct pcpu_chunk")
    return PercpuLayout(
        list=_offset(chunk, "list"),
        base_addr=_offset(chunk, "base_addr"),
        alloc_map=_offset(chunk, "alloc_map"),
        bound_map=_offset(chunk, "bound_map"),
        nr_pages=_offset(chunk, "nr_pages"),
        start_offset=_offset(chunk, "start_offset"),
        end_offset=_offset(chunk, "end_offset"),
        size_bytes=_offset(chunk, "populated"),
    )


def _offset(type_: drgn.Type, member: str) -> int:
    return int(type_.member(member).offset)


def _optional(type_: drgn.Type, member: str) -> int | None:
    return _offset(type_, member) if type_.has_member(member) else None
