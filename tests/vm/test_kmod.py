"""Test modules: built for a stock kernel, loaded into its guest, with symbols and types."""

from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.machine.kmod import build_kmod


@pytest.mark.parametrize("kernel", ["6.12"])
def test_a_module_of_our_own(guest_of: Callable[..., Any], kernel: str) -> None:
    module = build_kmod(kernel, "leak_kmalloc")
    guest = guest_of(kernel)
    guest.run("insmod /leak_kmalloc.ko blocks=7")
    modules = guest.kernel.modules
    modules.add_debug_file(module)
    loaded = modules.find("leak_kmalloc")
    assert loaded is not None and modules.load_debug_info(loaded)
    kept = guest.kernel.program.object("kept", filename="leak_kmalloc.c")
    assert guest.kernel.program.object("blocks", filename="leak_kmalloc.c").value_() == 7
    assert [bool(kept[n]) for n in range(7)] == [True] * 7
