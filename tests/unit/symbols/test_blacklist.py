"""Ranges of code where no probe may run, from a kernel made of a few symbols."""

import dataclasses
import struct
from types import SimpleNamespace
from typing import Any

from kgdbx.symbols.blacklist import Blacklist

SLIDE = 0x1000000
BASE = 0xFFFFFFFF81000000


@dataclasses.dataclass
class Symbols:
    """The part of a symbol table that a blacklist needs."""

    table: dict[str, int]
    data: bytes = b""

    def lookup(self, name: str) -> tuple[Any, ...]:
        found = self.table.get(name)
        return () if found is None else (SimpleNamespace(name=name, address=found),)

    def address(self, name: str) -> int:
        return self.table[name]

    def next_address(self, address: int) -> int | None:
        return min((a for a in self.table.values() if a > address), default=None)

    def read(self, address: int, size_bytes: int) -> bytes:
        start = address - self.table["__start_kprobe_blacklist"]
        return self.data[start : start + size_bytes]


def blacklist_of(symbols: Symbols) -> Blacklist:
    kernel: Any = SimpleNamespace(
        vmlinux=symbols,
        slide=SLIDE,
        modules=(),
        address=lambda name: symbols.address(name) + SLIDE,
    )
    return Blacklist(kernel)


def symbols(**offsets: int) -> dict[str, int]:
    return {
        "_text": BASE,
        **{name: BASE + at for name, at in offsets.items()},
        "_end": BASE + 0x9000,
    }


def at(offset: int) -> int:
    return BASE + SLIDE + offset


def test_sections() -> None:
    blacklist = blacklist_of(
        Symbols(
            symbols(
                __noinstr_text_start=0x1000,
                __noinstr_text_end=0x1100,
                __entry_text_start=0x2000,
                __entry_text_end=0x2800,
                __kprobes_text_start=0x1100,
                __kprobes_text_end=0x1100,
            )
        )
    )
    assert blacklist.reason(at(0xFFF)) is None
    assert blacklist.reason(at(0x1000)) == "in .noinstr.text, where nothing may be traced"
    assert blacklist.reason(at(0x10FF)) == "in .noinstr.text, where nothing may be traced"
    assert blacklist.reason(at(0x1100)) is None
    assert str(blacklist.reason(at(0x2400))).startswith("in .entry.text")
    assert blacklist.reason(at(0x2800)) is None


def test_listed_functions_reach_to_the_next_symbol() -> None:
    blacklist = blacklist_of(
        Symbols(
            symbols(listed=0x3000, other=0x3030, inner=0x1010, __start_kprobe_blacklist=0x5000,
                    __stop_kprobe_blacklist=0x5010, __noinstr_text_start=0x1000,
                    __noinstr_text_end=0x1100),
            struct.pack("<2Q", BASE + 0x3000, BASE + 0x1010),
        )
    )  # fmt: skip
    listed = "on the kernel's blacklist for kprobes (NOKPROBE_SYMBOL)"
    assert blacklist.reason(at(0x2FFF)) is None
    assert blacklist.reason(at(0x3000)) == listed
    assert blacklist.reason(at(0x302F)) == listed
    assert blacklist.reason(at(0x3030)) is None
    # A listed function inside of a section takes nothing of it away.
    for offset in (0x1000, 0x1010, 0x1020, 0x10FF):
        assert blacklist.reason(at(offset)) == "in .noinstr.text, where nothing may be traced"


def test_a_kernel_without_kprobes_has_no_list() -> None:
    blacklist = blacklist_of(Symbols(symbols()))
    assert blacklist.reason(at(0x3000)) is None
    assert blacklist.reason(0xFFFFFFFFC0000000) is None  # no module
