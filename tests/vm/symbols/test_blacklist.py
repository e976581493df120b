"""The blacklist that is found from outside, beside the one that the kernel itself shows."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.attach import attach_vm
from kgdbx.symbols.blacklist import Blacklist

# Refused here, allowed by kprobes, which single-step copies.
OUR_OWN = ("thunk", "a trampoline of a static call", "the kernel runs copies")


@pytest.mark.parametrize("name", ["6.1", "6.12"])
def test_same_as_the_kernels(clone_of: Callable[..., Any], name: str) -> None:
    vm = clone_of(name, 2)
    shown = vm.execute(
        "mount -t debugfs none /sys/kernel/debug 2>/dev/null; "
        "cat /sys/kernel/debug/kprobes/blacklist"
    ).output
    ranges = []
    for line in shown.splitlines():
        bounds, function = line.split()
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        ranges.append((start, end, function))
    assert len(ranges) > 300
    with attach_vm(vm.info) as session:
        kernel = session.kernel
        blacklist = Blacklist(kernel)
        for start, end, function in ranges:
            assert blacklist.reason(start), function
            assert blacklist.reason(end - 1), function
        starts = {start for start, _, _ in ranges}
        asked = 0
        began = time.monotonic()
        for function in kernel.vmlinux.function_names:
            for symbol in kernel.vmlinux.lookup(function):
                if not symbol.is_function or symbol.section != ".text":
                    continue
                asked += 1
                reason = blacklist.reason(symbol.address + kernel.slide)
                if symbol.address + kernel.slide in starts:
                    assert reason, function
                elif reason and not any(ours in reason for ours in OUR_OWN):
                    # a second name of one that is listed, or a label inside of it
                    at = symbol.address + kernel.slide
                    assert any(start <= at < end for start, end, _ in ranges), function
        assert (time.monotonic() - began) / asked < 100e-6
    print(f"\n{name}: {len(ranges)} ranges, {asked} functions")


def test_modules(clone_of: Callable[..., Any]) -> None:
    vm = clone_of("6.1", 2)
    assert vm.execute("modprobe tun && modprobe kvm").status == 0
    listed = vm.execute("cat /sys/kernel/debug/kprobes/blacklist").output
    with attach_vm(vm.info) as session:
        blacklist = Blacklist(session.kernel)
        modules = tuple(session.kernel.modules)
        assert modules
        starts = {int(line.split("-")[0], 16) for line in listed.splitlines()}
        for module in modules:
            for symbol in session.kernel.modules.symbols(module):
                if symbol.is_function and symbol.size_bytes:
                    assert bool(blacklist.reason(symbol.address)) == (symbol.address in starts)
        blacklist.forget_modules()
        assert blacklist.reason(modules[0].base) is None or modules[0].base in starts
        assert blacklist.reason(0xFFFFFFFFFE000000) is None
