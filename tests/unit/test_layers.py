"""Imports go one way: a module imports from its own layer and those left of it."""

import ast
from pathlib import Path

import pytest

import kgdbx

PACKAGE = Path(kgdbx.__file__).parent
LAYERS = (
    {"errors", "arch"},
    {"target"},
    {"symbols"},
    {"probes"},
    {"resident"},
    {"trace"},
    {"machine"},
    {"leaks"},
    {"definitions", "endings", "gdb_launch", "runner", "session"},
    {"attach"},
    {"doctor"},
    {"render"},
    {"bench"},
    {"views"},
    {"commands"},
    {"gdb"},
    {"shell"},
    {"cli", "__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Runs inside gdb, started by a measurement there.
IN_GDB = {"bench/in_gdb.py"}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layer(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES)
def test_imports_go_left(file: str) -> None:
    own = layer(file)
    if own == "__init__" or file in IN_GDB:
        return
    for name in imported(PACKAGE / file):
        package, _, rest = name.partition(".")
        if package == "kgdbx" and rest:
            other = rest.partition(".")[0]
            if other in RANK:
                assert RANK[other] <= RANK[own], f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES)
def test_only_the_gdb_parts_import_gdb(file: str) -> None:
    if file.startswith(("gdb/", "target/gdb_")) or file in IN_GDB:
        return
    assert "gdb" not in {name.partition(".")[0] for name in imported(PACKAGE / file)}


def test_every_folder_has_a_layer() -> None:
    assert {layer(file) for file in FILES} - {"__init__"} <= set(RANK)
