"""Runs probe definitions as native code and by fetch, over the same made-up kernel."""

import ctypes
import mmap
import re
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import drgn
import iced_x86
import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection

import kgdbx.resident.compile
from kgdbx.arch.registers import Registers
from kgdbx.errors import KgdbxError, MemoryFault
from kgdbx.probes.arguments import argument_suppliers, return_value_supplier
from kgdbx.probes.definition import parse_definition
from kgdbx.probes.evaluate import compile_condition
from kgdbx.probes.fetch import compile_fields
from kgdbx.probes.field import expand_fields
from kgdbx.probes.probe import Point
from kgdbx.probes.scope import HitScope
from kgdbx.probes.value import FieldValue
from kgdbx.resident.compile.codegen import Body, decode_fields, generate
from kgdbx.resident.compile.link import CFLAGS
from kgdbx.symbols.elf import Symbol
from kgdbx.symbols.kernel import Function
from kgdbx.symbols.tasks import Task

KERNEL, USER = 0xFFFF888000000000, 0x400000
DENTRY, LONG, EDGE = KERNEL + 0x200, KERNEL + 0x300, KERNEL + 0xFF8
JIFFIES, PAIR, FULL = KERNEL + 0x800, KERNEL + 0x900, KERNEL + 0xA00
TEXT = 0xFFFFFFFF81000000
MASK = (1 << 64) - 1
DOUBLES = """
long (*reader)(int, void *, u64, u64);
long copy_from_kernel_nofault(void *t, const void *f, u64 n) { return reader(0, t, (u64)f, n); }
long copy_from_user_nofault(void *t, const void *f, u64 n) { return reader(1, t, (u64)f, n); }
long strncpy_from_kernel_nofault(char *t, const void *f, long n)
{ return reader(2, t, (u64)f, n); }
long strncpy_from_user_nofault(char *t, const void *f, long n) { return reader(3, t, (u64)f, n); }
"""
WARNINGS = ["-Wall", "-Werror", "-Wno-unused-function", "-Wno-tautological-compare"]


def page(program: drgn.Program) -> bytes:
    data = bytearray(0x1000)
    file = drgn.Object(
        program,
        "struct file",
        {
            "dentry": DENTRY,
            "flags": -2,
            "low": 5,
            "high": 17,
            "odd": -9,
            "raw": (1, 2, 3, 255),
            "nums": (7, -7),
            "color": 5,
            "ok": True,
            "rate": 0.5,
            "open": TEXT + 0x10,
            "names": (DENTRY + 8, USER),
            "pid": 42,
            "wide": 0x8123456789,
            "table": (1, -2, 3, -4),
        },
    ).to_bytes_()
    data[: len(file)] = file
    data[len(file) : len(file) + 9] = b"flexible\0"
    data[0x200:0x210] = struct.pack("<Q8s", KERNEL + 0x280, b"short")
    data[0x280:0x28A] = b"a name\xff\0xx"
    data[0x300:0x600] = b"x" * 0x300
    data[0x800:0x808] = struct.pack("<Q", 0x1122334455667788)
    data[0x900:0x910] = struct.pack("<ihhq", -1, 2, -3, 1 << 40)
    data[0xA00:0xB01] = b"y" * 256 + b"\0"
    data[0xFF8:] = b"no end!!"
    return bytes(data)


class Memory:
    """Regions of made-up memory, and what reads them."""

    def __init__(self) -> None:
        self.regions: dict[int, Any] = {}
        self.calls = 0
        self.own: tuple[tuple[int, int], ...] = ()  # this process's memory in place of the kernel's
        self.wrong = False  # whether a user address was read as the kernel's

    def read(self, address: int, size_bytes: int) -> bytes:
        for start, data in self.regions.items():
            if start <= address and address + size_bytes <= start + len(data):
                return bytes(data[address - start : address - start + size_bytes])
        raise MemoryFault(address, size_bytes)

    def read_user(self, address: int, size_bytes: int, cr3: int | None = None) -> bytes:
        if address >> 63:
            raise MemoryFault(address, size_bytes)
        return self.read(address, size_bytes)

    def read_u64(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8), "little")

    def native(self, how: int, to: int, address: int, size_bytes: int) -> int:
        """Stands for the kernel's four functions."""
        self.calls += 1
        self.wrong |= not (how % 2 or address >> 63 or any(s <= address < e for s, e in self.own))
        read = self.read_user if how % 2 else self.read
        try:
            if how < 2:
                ctypes.memmove(to, read(address, size_bytes), size_bytes)
                return 0
            data = b""
            while len(data) < size_bytes and not data.endswith(b"\0"):
                data += read(address + len(data), 1)
        except MemoryFault:
            return -14
        data = data[:-1] + b"\0"
        ctypes.memmove(to, data, len(data))
        return len(data)


class FakeKernel:
    """As much of a kernel as a scope and the code generator ask for."""

    def __init__(self, directory: Path) -> None:
        source, path = Path(__file__).with_name("types.c"), directory / "types.o"
        subprocess.run(["gcc", "-g", "-c", source, "-o", path], check=True)
        self.program = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
        self.program.extra_module("types", create=True).try_file(path, force=True)
        self.memory, self.slide = Memory(), 0
        self.image: dict[int, Symbol] = {}
        self.globals = {
            "jiffies": ("unsigned long", JIFFIES),
            "first": ("struct file", KERNEL),
            "percpu": ("int", 0x1F000),
        }
        self.vmlinux = SimpleNamespace(containing=self._containing, has_debug_info=True)
        self.pages = [mmap.mmap(-1, 0x2000), mmap.mmap(-1, 0x1000)]
        self.stack, self.task = (
            ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in self.pages
        )
        self.memory.regions = {
            KERNEL: page(self.program),
            USER: b"user text\0".ljust(0xFFB, b"\0") + b"edge!",
            self.stack: self.pages[0],
            self.task: self.pages[1],
        }
        self.memory.own = (self.stack, self.stack + 0x2000), (self.task, self.task + 0x1000)
        for start, end in ((1 << 63, MASK), (self.stack, self.stack + 0x2000 - 1)):
            self.program.add_memory_segment(start, end - start + 1, self._segment)
        self.program.add_memory_segment(self.task, 0x1000, self._segment)
        self.program.register_object_finder("fake", self._find, enable_index=0)
        self.program.register_symbol_finder("fake", self._symbol, enable_index=0)

    def _segment(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        try:
            return self.memory.read(address, count)
        except MemoryFault as e:
            raise drgn.FaultError(str(e), address) from e

    def _find(self, program: drgn.Program, name: str, flags: Any, file: Any) -> Any:
        known = self.globals
        if name not in known or not flags & drgn.FindObjectFlags.VARIABLE:
            return None
        return drgn.Object(program, known[name][0], address=known[name][1])

    def _symbol(self, program: Any, name: Any, address: int | None, one: bool) -> Any:
        if address is None or not TEXT <= address < TEXT + 0x30:
            return []
        kinds = drgn.SymbolBinding.GLOBAL, drgn.SymbolKind.FUNC
        return [drgn.Symbol("my_open", TEXT, 0x30, *kinds)]

    def _containing(self, address: int) -> Symbol | None:
        return self.image.get(address)

    def function_type(self, function: Function) -> drgn.Type | None:
        try:
            return self.program.function(function.name).type_
        except LookupError:
            return None

    def object_address(self, name: str) -> int | None:
        return {"no_type": JIFFIES}.get(name)


class CContext(ctypes.Structure):
    """``struct context``."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("di", "si", "dx", "cx", "r8", "r9")),
        *((name, ctypes.c_uint64) for name in ("sp", "ax", "rdx", "regs", "task", "saved")),
        ("cpu", ctypes.c_uint32),
    ]


READER = ctypes.CFUNCTYPE(
    ctypes.c_long, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64
)


def functions(number: int, body: Body) -> str:
    saves = "".join(f"to[{n}] = {e};" for n, e in enumerate(body.saves))
    return f"""
static __always_inline int condition_{number}(const struct context *c)
{{ {body.condition or "return 1;"} }}
static __always_inline void fill_{number}(const struct context *c, u8 *rec) {{ {body.fill} }}
int do_condition_{number}(const struct context *c) {{ return condition_{number}(c); }}
void do_fill_{number}(const struct context *c, u8 *rec) {{ fill_{number}(c, rec); }}
void do_saves_{number}(const struct context *c, u64 *to) {{ {saves} }}
"""


def unit(bodies: Sequence[Body]) -> str:
    prelude = Path(kgdbx.resident.compile.__file__).with_name("prelude.h").read_text()
    capitals = set(re.findall(r"\b[A-Z][A-Z_]+\b", re.sub(r"/\*.*?\*/", "", prelude, flags=re.S)))
    constants = capitals - set(re.findall(r"#define (\w+)", prelude))
    facts = "".join(f"#define {name} 64UL\n" for name in sorted(constants))
    return facts + prelude + "".join(functions(n, body) for n, body in enumerate(bodies))


class Guest:
    """Runs definitions both ways: compiled here, and by fetch over a scope of the same hit."""

    def __init__(self, kernel: FakeKernel, directory: Path) -> None:
        self.kernel, self.directory = kernel, directory
        self.count = 0
        self.reader = READER(kernel.memory.native)
        general = ("ax", "bx", "cx", "dx", "si", "di", "bp")
        self.registers = dict.fromkeys((f"r{name}" for name in general), 0)
        self.registers |= dict.fromkeys((f"r{n}" for n in range(8, 16)), 0)
        self.registers |= {"rip": 0, "rsp": kernel.stack + 0x800, "eflags": 0x246, "cs": 0x10}
        self.registers |= {"rdi": KERNEL, "rsi": USER, "rdx": MASK - 8, "rcx": 0xABC_FF, "r8": 2}
        self.registers |= {"r9": 1 << 40, "rax": MASK - 1, "rbx": 0xB00B}
        at = 0x800
        stacked = struct.pack("<QQQ", TEXT, 0xEEEE_FFFE, PAIR) + struct.pack("<ihhq", 9, 8, 7, 6)
        kernel.pages[0][at : at + len(stacked)] = stacked
        task = struct.pack("<qiiQ16sq", 3, 123, 120, KERNEL, b"bash\0old", 77)
        kernel.pages[1][: len(task)] = task

    def point(self, function: str, offset: int = 0) -> Point:
        return Point(TEXT + offset, Function(function, TEXT, 0x100))

    def compile(self, bodies: Sequence[Body]) -> ctypes.CDLL:
        self.count += 1
        source = self.directory / f"unit{self.count}.c"
        source.write_text(unit(bodies) + DOUBLES)
        path = source.with_suffix(".so")
        command = ["gcc", "-O1", "-shared", "-fPIC", "-w", source, "-o", path]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(path))
        ctypes.c_void_p.in_dll(library, "reader").value = ctypes.cast(
            self.reader, ctypes.c_void_p
        ).value
        return library

    def native(
        self, library: ctypes.CDLL, number: int, body: Body, kind: str
    ) -> tuple[int, dict[str, FieldValue]]:
        names = ("di", "si", "dx", "cx", "r8", "r9")
        r = Registers(self.registers)
        context = CContext(*(r[name] for name in names), sp=r["sp"])
        context.task, context.cpu = self.kernel.task, 2
        if kind == "r":
            saved = (ctypes.c_uint64 * (len(body.saves) + 1))()
            getattr(library, f"do_saves_{number}")(ctypes.byref(context), saved)
            for name in names:
                setattr(context, name, 0xBAD0_BAD0_BAD0)
            context.ax, context.rdx, context.sp = r["ax"], r["dx"], r["sp"] + 8
            context.saved = ctypes.addressof(saved)
        order = "r15 r14 r13 r12 bp bx r11 r10 r9 r8 ax cx dx si di orig_ax ip cs flags sp ss"
        values = [r[name] if name in dir(r) else 0x10 for name in order.split(" ")]
        regs = (ctypes.c_uint64 * len(values))(*values)
        context.regs = ctypes.addressof(regs) if body.uses_regs else 0
        record = (ctypes.c_uint8 * max(body.record_bytes, 64))(*b"\xa5" * 64)
        task = bytes(self.kernel.pages[1][:64])
        header = struct.pack("<QQ8sIHH16s", 1, 2, task[8:16], 3, 2, 0, task[24:40])
        ctypes.memmove(record, header, len(header))
        result = getattr(library, f"do_condition_{number}")(ctypes.byref(context))
        getattr(library, f"do_fill_{number}")(ctypes.byref(context), record)
        assert len(record) == max(body.record_bytes, 64)
        return result, decode_fields(body, bytes(record))

    def fetched(self, text: str, function: str, offset: int) -> tuple[int, dict[str, FieldValue]]:
        kernel: Any = self.kernel
        point, definition = self.point(function, offset), parse_definition(text)
        suppliers = argument_suppliers(kernel, point)
        scope = HitScope(kernel, suppliers)
        regs = Registers(dict(self.registers))
        regs.rip = point.address
        task = Task(
            self.kernel.task, 123, 120, bytes(self.kernel.pages[1][24:40]).split(b"\0")[0].decode()
        )
        hit: Any = SimpleNamespace(regs=regs, kernel=kernel, cpu=2, task=task, stack_trace=no_stack)
        scope.hit = hit
        if definition.kind == "r":
            scope.entry_values = {
                name: value.read_() if value.address_ is not None else value
                for name, value in ((name, get(hit)) for name, get in suppliers.items())
            }
            scope.entry_registers = regs.copy()
            regs.rsp = regs.rsp + 8
            for name in ("di", "si", "cx", "r8", "r9"):
                assert name in regs
            scope.retval = lambda: return_value_supplier(kernel, point)(hit)
        names = tuple(suppliers)
        fields = expand_fields(definition.fields, {"params": names, "vars": names})
        result = 1
        if definition.condition is not None:
            try:
                result = int(compile_condition(definition.condition)(scope))
            except KgdbxError:
                result = -1
        return result, compile_fields(fields)(scope)

    def both(
        self, texts: Sequence[str], function: str = "entry", offset: int = 0
    ) -> list[tuple[Any, Any]]:
        kernel: Any = self.kernel
        point = self.point(function, offset)
        definitions = [parse_definition(text) for text in texts]
        bodies = [generate(each, kernel, point) for each in definitions]
        library = self.compile(bodies)
        return [
            (
                self.native(library, n, bodies[n], definitions[n].kind),
                self.fetched(text, function, offset),
            )
            for n, text in enumerate(texts)
        ]

    def check(self, texts: Sequence[str], function: str = "entry", offset: int = 0) -> None:
        different = []
        for text, (native, fetched) in zip(texts, self.both(texts, function, offset), strict=True):
            kinds = [[type(value) for value in each[1].values()] for each in (native, fetched)]
            if native != fetched or kinds[0] != kinds[1]:
                different.append((text, native, fetched))
        assert not different
        assert not self.kernel.memory.wrong

    def check_with(
        self, texts: Sequence[str], function: str, inputs: Sequence[dict[str, int]]
    ) -> None:
        kernel: Any = self.kernel
        definitions = [parse_definition(text) for text in texts]
        bodies = [generate(each, kernel, self.point(function)) for each in definitions]
        library, kept = self.compile(bodies), dict(self.registers)
        try:
            for registers in inputs:
                self.registers |= registers
                for n, text in enumerate(texts):
                    native = self.native(library, n, bodies[n], definitions[n].kind)
                    assert native == self.fetched(text, function, 0), (text, registers)
        finally:
            self.registers |= kept

    def machine_code(self, *texts: str, function: str = "entry") -> tuple[set[str], list[str]]:
        """Symbols that the code is linked with, and its instructions, as the kernel gets them."""
        kernel: Any = self.kernel
        bodies = [generate(parse_definition(t), kernel, self.point(function)) for t in texts]
        source = self.directory / "kernel.c"
        source.write_text(unit(bodies))
        path = source.with_suffix(".o")
        subprocess.run(["gcc", *CFLAGS, *WARNINGS, "-c", source, "-o", path], check=True)
        with path.open("rb") as file:
            elf = ELFFile(file)
            symbols = elf.get_section_by_name(".symtab")
            used = {
                symbols.get_symbol(each["r_info_sym"]).name
                for section in elf.iter_sections()
                if isinstance(section, RelocationSection)
                for each in section.iter_relocations()
            }
            code = elf.get_section_by_name(".text").data()
        decoder = iced_x86.Decoder(64, code)
        return used, [str(each) for each in decoder if each.mnemonic != iced_x86.Mnemonic.NOP]


def no_stack() -> list[Any]:
    return [SimpleNamespace(locals=lambda: [])]


@pytest.fixture(scope="session")
def prelude() -> str:
    """What every unit begins with."""
    return unit([])


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    directory = tmp_path_factory.mktemp("codegen")
    yield Guest(FakeKernel(directory), directory)
