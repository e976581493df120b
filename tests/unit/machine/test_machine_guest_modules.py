"""Modules are packed with what they depend on, decompressed, and listed for modprobe."""

import lzma
from pathlib import Path

import pytest

from kgdbx.errors import MachineError
from kgdbx.machine.guest_modules import module_depends, modules_tree
from kgdbx.machine.kernels import StockKernel


def _kernel(tmp_path: Path) -> StockKernel:
    modules = tmp_path / "kernel/net"
    modules.mkdir(parents=True)
    for name, needs in (("top", "mid-one,low"), ("mid_one", "low"), ("low", ""), ("other", "")):
        data = b"ELF\0license=GPL\0depends=" + needs.replace("-", "_").encode() + b"\0name=x\0"
        (modules / f"{name}.ko.xz").write_bytes(lzma.compress(data))
    return StockKernel("6.1", "6.1.0-x", tmp_path, tmp_path, tmp_path, tmp_path)


def test_depends() -> None:
    assert module_depends(b"\0depends=a,b_c\0") == ("a", "b_c")
    assert module_depends(b"\0depends=\0") == ()
    assert module_depends(b"nothing") == ()


def test_dependencies_come_along(tmp_path: Path) -> None:
    tree = modules_tree(_kernel(tmp_path), ["top"])
    root = "lib/modules/6.1.0-x"
    assert sorted(tree) == [
        f"{root}/kernel/low.ko",
        f"{root}/kernel/mid_one.ko",
        f"{root}/kernel/top.ko",
        f"{root}/modules.dep",
    ]
    assert tree[f"{root}/kernel/low.ko"].startswith(b"ELF")
    assert tree[f"{root}/modules.dep"].decode().splitlines() == [
        "kernel/low.ko:",
        "kernel/mid_one.ko: kernel/low.ko",
        "kernel/top.ko: kernel/mid_one.ko kernel/low.ko",
    ]


def test_dash_and_underscore_are_the_same(tmp_path: Path) -> None:
    assert "lib/modules/6.1.0-x/kernel/mid_one.ko" in modules_tree(_kernel(tmp_path), ["mid-one"])


def test_nothing_asked_nothing_packed(tmp_path: Path) -> None:
    assert modules_tree(_kernel(tmp_path), []) == {}


def test_unknown_module(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"kernel 6\.1\.0-x has no module nope; see "):
        modules_tree(_kernel(tmp_path), ["nope"])
