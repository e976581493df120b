"""Inlined instances, against labels that the inlined bodies write into a section of their own."""

import os
import struct
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from kgdbx.errors import MachineError, SymbolError
from kgdbx.machine.kernels import find_kernel
from kgdbx.symbols.dwarf import DebugFile
from kgdbx.symbols.inlines import InlineSite, inlined_instances

# Each inlined body notes its own address in .sites.<name>.
_HEADER = """
#define MARK(name) asm volatile("1:\\tnop\\n\\t.pushsection .sites." #name \\
                                ",\\"a\\"\\n\\t.quad 1b\\n\\t.popsection")
static inline __attribute__((always_inline)) void leaf(void) { MARK(leaf); }
static inline __attribute__((always_inline)) void outer(void) { MARK(outer); leaf(); }
static inline __attribute__((always_inline)) void abc(void) { MARK(abc); }
"""
_ONE = """
#include "shared.h"
void one(void)
{
    leaf();
    outer();
}
__attribute__((section(".init.text"))) void early(void)
{
    leaf();
}
int not_inlined(int a) { return a + 1; }
"""
_TWO = """
#include "shared.h"
static void leaf_of_two(void) { leaf(); }
extern int x(int);
int two(int a)
{
    if (a) {
        abc();
        leaf_of_two();
    }
    return x(a);
}
"""


def _compile(directory: Path, *options: str) -> list[Path]:
    (directory / "shared.h").write_text(_HEADER)
    objects = []
    for name, text in (("one", _ONE), ("two", _TWO)):
        (directory / f"{name}.c").write_text(text)
        argv = ["gcc", "-O2", "-g", *options, "-c", f"{name}.c", "-o", f"{name}.o"]
        subprocess.run(argv, cwd=directory, check=True)
        objects.append(directory / f"{name}.o")
    return objects


def _link(directory: Path, *options: str) -> Path:
    # with relocations that are applied already, as in Debian's vmlinux
    argv = ["ld", "-e", "one", "--emit-relocs", "--defsym=x=0x401000", *options]
    subprocess.run([*argv, "one.o", "two.o", "-o", "vmlinux"], cwd=directory, check=True)
    return directory / "vmlinux"


def _marks(path: Path, name: str) -> list[int]:
    with path.open("rb") as file:
        data = ELFFile(file).get_section_by_name(f".sites.{name}").data()
    return sorted(address for (address,) in struct.iter_unpack("<Q", data))


@pytest.fixture(params=["-gdwarf-5", "-gdwarf-4"])
def vmlinux(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    _compile(tmp_path, request.param)
    return _link(tmp_path)


@pytest.mark.parametrize("name", ["leaf", "outer", "abc"])
def test_addresses_are_those_of_the_bodies(vmlinux: Path, name: str) -> None:
    found = inlined_instances(vmlinux, name)
    assert sorted(site.address for site in found.sites) == _marks(vmlinux, name)
    assert not found.truncated


def test_function_and_call_of_each_site(vmlinux: Path) -> None:
    sites = inlined_instances(vmlinux, "leaf").sites
    assert sorted((site.function, site.file, site.line) for site in sites) == [
        ("early", "one.c", 10),
        ("one", "one.c", 5),
        ("one", "shared.h", 5),
        ("two", "two.c", 3),
    ]
    assert {site.section for site in sites} == {""}


def test_function_that_was_not_inlined_has_no_sites(vmlinux: Path) -> None:
    assert inlined_instances(vmlinux, "not_inlined").sites == ()


def test_unknown_function(vmlinux: Path) -> None:
    with pytest.raises(SymbolError) as caught:
        inlined_instances(vmlinux, "no_such_function")
    assert str(caught.value) == "vmlinux has no function 'no_such_function'"
    assert caught.value.symbol == "no_such_function"


def test_deadline_gives_a_truncated_result(vmlinux: Path) -> None:
    found = inlined_instances(vmlinux, "leaf", timeout_s=-1)
    assert (found.sites, found.truncated) == ((), True)
    assert not inlined_instances(vmlinux, "leaf", timeout_s=60).truncated


def test_compressed_debug_sections(tmp_path: Path) -> None:
    _compile(tmp_path)
    path = _link(tmp_path, "--compress-debug-sections=zlib")
    found = inlined_instances(path, "leaf").sites
    assert sorted(site.address for site in found) == _marks(path, "leaf")


def test_link_time_optimization_inlines_across_units(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text(
        'int near(int a) { asm volatile("1:\\tnop\\n\\t.pushsection .sites.near,\\"a\\"\\n\\t'
        '.quad 1b\\n\\t.popsection" : "+r"(a)); return a; }\n'
    )
    (tmp_path / "b.c").write_text("int near(int);\nint far(int a) { return near(a) + 1; }\n")
    argv = "gcc -O2 -g -flto -nostdlib -static -Wl,-e,far -fno-pie -no-pie a.c b.c -o vmlinux"
    subprocess.run(argv.split(), cwd=tmp_path, check=True)
    path = tmp_path / "vmlinux"
    sites = inlined_instances(path, "near").sites
    assert [(site.function, site.file, site.line) for site in sites] == [("far", "b.c", 2)]
    assert set(_marks(path, "near")) >= {site.address for site in sites}


def test_module_gives_sections_and_offsets(tmp_path: Path) -> None:
    _compile(tmp_path)
    argv = ["ld", "-r", "one.o", "two.o", "-o", "module.ko"]
    subprocess.run(argv, cwd=tmp_path, check=True)
    path = tmp_path / "module.ko"
    sites = inlined_instances(path, "leaf").sites
    with path.open("rb") as file:
        elf = ELFFile(file)
        symbols = elf.get_section_by_name(".symtab")
        expected = []
        for relocation in elf.get_section_by_name(".rela.sites.leaf").iter_relocations():
            section = symbols.get_symbol(relocation["r_info_sym"])["st_shndx"]
            expected.append((elf.get_section(section).name, relocation["r_addend"]))
    assert [(site.section, site.address) for site in sites] == sorted(expected)
    assert [site.function for site in sites if site.section == ".init.text"] == ["early"]


def test_addresses_in_a_module_need_a_section(tmp_path: Path) -> None:
    debug = DebugFile(_compile(tmp_path)[0])
    assert debug.sections.split_address(debug.sections.join_address(".init.text", 0x12)) == (
        ".init.text",
        0x12,
    )
    with pytest.raises(SymbolError) as caught:
        debug.sections.join_address("", 0x12)
    assert str(caught.value) == "one.o has no section ''; an address in a .ko needs one"


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not an ELF file")
    with pytest.raises(SymbolError, match="is not an ELF file"):
        DebugFile(text)
    text.write_text("")
    with pytest.raises(SymbolError, match="is not an ELF file"):
        DebugFile(text)
    with pytest.raises(SymbolError, match="No such file or directory"):
        DebugFile(tmp_path / "none")
    bare = _compile(tmp_path, "-g0")[0]
    with pytest.raises(SymbolError) as caught:
        DebugFile(bare)
    assert str(caught.value) == (
        f"{bare} has no debug information; install the kernel's -dbg package"
    )


@pytest.fixture
def real_vmlinux() -> Path:
    if given := os.environ.get("KGDBX_TEST_VMLINUX"):
        return Path(given)
    try:
        return find_kernel("6.1").vmlinux
    except MachineError as e:
        pytest.skip(str(e))


def test_real_kernel(real_vmlinux: Path) -> None:
    (site,) = inlined_instances(real_vmlinux, "do_open", timeout_s=60).sites
    assert site == InlineSite(site.address, "path_openat", "fs/namei.c", site.line, "")
    assert site.line > 3000
    # a header's function, in hundreds of units
    found = inlined_instances(real_vmlinux, "get_current", timeout_s=60)
    assert len(found.sites) > 1000
    assert min(site.address for site in found.sites) >= 0xFFFFFFFF81000000
    assert not found.truncated
