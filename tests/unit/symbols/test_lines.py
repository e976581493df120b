"""Lines of functions to addresses, against gdb and against labels in the code."""

import os
import re
import subprocess
from pathlib import Path

import drgn
import pytest
from elftools.elf.elffile import ELFFile

from kgdbx.errors import MachineError, SymbolError
from kgdbx.machine.kernels import find_kernel
from kgdbx.symbols.elf import ElfSymbols
from kgdbx.symbols.lines import (
    Declaration,
    address_line,
    function_declaration,
    line_addresses,
)

# mark_N is a label on line N of the file
_SOURCE = """\
extern volatile int sink;
static inline __attribute__((always_inline)) int helper(int a)
{
    sink = a;
    return a * 3;
}

int __attribute__((noipa))
counted(int a)
{
    asm volatile("mark_11: nop");

    /* no code on line 13 */
    sink = helper(a);
    asm volatile("mark_15: nop");
    while (sink < a) {
        asm volatile("nop");
        sink++;
    }
    return sink;
}

int next(int a)
{
    return counted(a + 1);
}

__attribute__((section(".init.text"))) void early(void)
{
    sink = 1;
    asm volatile("mark_31: nop");
    sink = 2;
}

static int __attribute__((noipa)) twice(int a) { return a + 1; }
int use(int a) { return twice(a); }
"""
_OTHER = """\
volatile int sink;

static int __attribute__((noipa)) twice(int a) { return a + 2; }
int use_other(int a) { return twice(a); }
"""


def _compile(directory: Path, *options: str) -> None:
    for name, text in (("source", _SOURCE), ("other", _OTHER)):
        (directory / f"{name}.c").write_text(text)
        argv = ["gcc", "-O2", "-g", "-fno-pie", *options, "-c", f"{name}.c", "-o", f"{name}.o"]
        subprocess.run(argv, cwd=directory, check=True)


@pytest.fixture(params=["-gdwarf-5", "-gdwarf-4"])
def vmlinux(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    _compile(tmp_path, request.param)
    argv = ["ld", "-e", "next", "source.o", "other.o", "-o", "vmlinux"]
    subprocess.run(argv, cwd=tmp_path, check=True)
    return tmp_path / "vmlinux"


@pytest.fixture
def module(tmp_path: Path) -> Path:
    _compile(tmp_path)
    argv = ["ld", "-r", "source.o", "other.o", "-o", "module.ko"]
    subprocess.run(argv, cwd=tmp_path, check=True)
    return tmp_path / "module.ko"


def _address(path: Path, name: str) -> int:
    return ElfSymbols(path).address(name)


def _gdb_line(path: Path, place: str) -> int:
    argv = ["gdb", "-nx", "-batch", "-ex", f"info line {place}", str(path)]
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    match = re.search(r"(?:starts at|is at) address (0x[0-9a-f]+)", text)
    assert match, text
    return int(match[1], 16)


def test_declaration_by_name_and_address(vmlinux: Path) -> None:
    expected = Declaration("source.c", 9)
    assert function_declaration(vmlinux, "counted") == expected
    assert function_declaration(vmlinux, _address(vmlinux, "counted")) == expected
    assert function_declaration(vmlinux, _address(vmlinux, "counted") + 5) == expected
    assert function_declaration(vmlinux, "helper") == Declaration("source.c", 2)


def test_declaration_of_an_ambiguous_name(vmlinux: Path) -> None:
    with pytest.raises(SymbolError) as caught:
        function_declaration(vmlinux, "twice")
    assert str(caught.value) == (
        "there are 2 functions 'twice': other.c:3, source.c:35; give an address"
    )
    assert caught.value.candidates == ("other.c:3", "source.c:35")


def test_declaration_of_nothing(vmlinux: Path) -> None:
    with pytest.raises(SymbolError) as caught:
        function_declaration(vmlinux, "no_such_function")
    assert str(caught.value) == "vmlinux has no function 'no_such_function'"
    with pytest.raises(SymbolError) as caught:
        function_declaration(vmlinux, 0x10)
    assert str(caught.value) == "vmlinux has no function with debug information at 0x10"


def test_line_starts_at_its_label(vmlinux: Path) -> None:
    counted = _address(vmlinux, "counted")
    for line in (11, 15):
        found = line_addresses(vmlinux, counted, line - 9)
        assert (found.file, found.function_line, found.line) == ("source.c", 9, line - 9)
        assert found.addresses[0] == _address(vmlinux, f"mark_{line}")


@pytest.mark.parametrize("line", [11, 15, 17, 20])
def test_lines_agree_with_gdb(vmlinux: Path, line: int) -> None:
    found = line_addresses(vmlinux, _address(vmlinux, "counted"), line - 9)
    assert found.line == line - 9
    assert _gdb_line(vmlinux, f"source.c:{line}") in found.addresses


@pytest.mark.parametrize(("line", "nearest"), [(12, 14), (13, 14), (19, 20)])
def test_line_without_code_gives_the_next(vmlinux: Path, line: int, nearest: int) -> None:
    found = line_addresses(vmlinux, _address(vmlinux, "counted"), line - 9)
    assert found.line == nearest - 9
    assert found == line_addresses(vmlinux, _address(vmlinux, "counted"), nearest - 9)


@pytest.mark.parametrize("line", [-5, 13, 400])
def test_lines_of_other_functions_do_not_count(vmlinux: Path, line: int) -> None:
    with pytest.raises(SymbolError) as caught:
        line_addresses(vmlinux, _address(vmlinux, "counted"), line)
    assert str(caught.value) == (
        f"counted has no code on line {line} or after it (source.c:{9 + line}); give a smaller line"
    )
    assert caught.value.symbol == f"counted:{line}"


def test_addresses_of_a_module_are_in_their_section(module: Path) -> None:
    with module.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".symtab")
        values = {symbol.name: symbol["st_value"] for symbol in symbols.iter_symbols()}
    found = line_addresses(module, values["early"], 31 - 28, ".init.text")
    assert (found.function_line, found.line) == (28, 3)
    assert found.addresses[0] == values["mark_31"]
    found = line_addresses(module, values["counted"], 15 - 9, ".text")
    assert found.addresses[0] == values["mark_15"]
    assert function_declaration(module, values["counted"], ".text") == ("source.c", 9)


def test_address_line(vmlinux: Path) -> None:
    program = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    module = program.extra_module(str(vmlinux), create=True)
    module = module[0] if isinstance(module, tuple) else module
    module.try_file(str(vmlinux), force=True)
    module.address_ranges = [(0x400000, 0x500000)]
    location = address_line(program, _address(vmlinux, "mark_15"))
    assert location is not None
    file, line = location
    assert (Path(file).name, line) == ("source.c", 15)
    assert address_line(program, 0x10) is None


@pytest.fixture
def real_vmlinux() -> Path:
    if given := os.environ.get("KGDBX_TEST_VMLINUX"):
        return Path(given)
    try:
        return find_kernel("6.1").vmlinux
    except MachineError as e:
        pytest.skip(str(e))


def test_real_kernel(real_vmlinux: Path) -> None:
    vfs_read = _address(real_vmlinux, "vfs_read")
    file, line = function_declaration(real_vmlinux, vfs_read)
    assert file == "fs/read_write.c"
    assert function_declaration(real_vmlinux, "vfs_read") == (file, line)
    first = line_addresses(real_vmlinux, vfs_read, 0)
    assert first.addresses[0] == vfs_read
    symbols = ElfSymbols(real_vmlinux)
    for relative in range(2, 20):
        found = line_addresses(real_vmlinux, vfs_read, relative)
        assert found.line >= relative
        for address in found.addresses:
            symbol = symbols.containing(address)
            assert symbol is not None and symbol.name.startswith("vfs_read")
