"""Names of an ELF file that gcc made."""

import subprocess
from pathlib import Path

import pytest

from kgdbx.errors import SymbolError
from kgdbx.symbols.elf import read_symbols

TWICE = "static __attribute__((noinline, noclone)) int twice(int n) { return n * @; }\n"


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Two files with a function of the same name each, and names that end alike."""
    for n, name in ((3, "first"), (5, "second")):
        source = TWICE.replace("@", str(n)) + f"int {name}(int n) {{ return twice(n) + 1; }}\n"
        (tmp_path / f"{name}.c").write_text(source + f"int not_{name} = {n};\n")
    build(tmp_path, "first.c", "second.c")
    return tmp_path / "linked"


def build(directory: Path, *sources: str) -> None:
    argv = ["gcc", "-O1", "-nostdlib", "-no-pie", "-Wl,-e,0", *sources, "-o", "linked"]
    subprocess.run(argv, cwd=directory, check=True, timeout=60)


def test_names(linked: Path) -> None:
    symbols = read_symbols(linked)
    assert symbols.function_names == ("first", "second", "twice")
    assert {"not_first", "not_second"} < set(symbols.names())
    both = symbols.lookup("twice")
    assert len({symbol.address for symbol in both}) == len(both) == 2
    assert symbols.address("twice") == both[0].address == min(s.address for s in both)
    (first,) = symbols.lookup("first")
    assert (first.is_function, first.section) == (True, ".text")
    assert symbols.containing(first.address + 1) == first
    assert symbols.lookup("not_first")[0].size_bytes == 4
    for absent in ("", "irst", "twice\0", "not_third"):
        assert symbols.lookup(absent) == ()
    with pytest.raises(SymbolError, match="has no symbol 'third'"):
        symbols.address("third")


def test_a_file_that_was_built_anew_is_read_anew(linked: Path) -> None:
    symbols = read_symbols(linked)
    assert read_symbols(linked) is symbols
    build(linked.parent, "first.c")
    assert read_symbols(linked).function_names == ("first", "twice")
    linked.unlink()
    with pytest.raises(SymbolError, match="cannot read"):
        read_symbols(linked)
