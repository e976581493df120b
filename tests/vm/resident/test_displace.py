"""Displacing the instructions of real kernels: every function, at entries and anywhere."""

import contextlib
import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kgdbx.arch.instruction import boundaries
from kgdbx.errors import ProbeError
from kgdbx.machine.vm import Vm
from kgdbx.resident.place.displace import (
    JUMP_BYTES,
    CannotDisplace,
    Displacement,
    busy_addresses,
    displace,
)
from kgdbx.symbols.blacklist import Blacklist
from kgdbx.symbols.kernel import Function, Kernel
from kgdbx.target.ram import GuestRam
from kgdbx.target.rsp import RspTarget

KERNELS = ["6.1", "6.12"]
# Where resident code lies in other guests: displaced instructions have to reach from there.
REGION = 0xFFFFFFFFFE000000
# Code that nothing runs in a guest without disks: it gives way to copies of displaced code.
UNUSED = ("ext4", "jbd2")
WORKLOAD = (
    "ls -lR /proc/self /sys/kernel/mm >/dev/null 2>&1; "
    "cat /proc/meminfo /proc/interrupts /proc/*/maps >/dev/null 2>&1; "
    "dd if=/dev/zero of=/tmp/z bs=64k count=20 2>/dev/null; md5sum </tmp/z; rm /tmp/z; "
    "(sleep 0.2 | cat) & wait; ping -c1 127.0.0.1 >/dev/null 2>&1; mount -t tmpfs t /mnt; "
    "umount /mnt; dmesg | grep -ciE 'BUG|Oops|WARN|Call Trace'; echo alive"
)


@dataclasses.dataclass
class Guest:
    """A VM and its kernel, which stands still except in :meth:`run`."""

    vm: Vm
    kernel: Kernel

    def run(self, command: str, timeout_s: float = 60) -> str:
        self.kernel.target.resume()
        done = self.vm.execute(command, timeout_s)
        self.kernel.target.interrupt()
        assert done.status == 0, done.output
        return done.output

    def function(self, name: str) -> Function:
        (found,) = self.kernel.functions(name)
        return found


@pytest.fixture
def guest_of(clone_of: Callable[..., Vm]) -> Iterator[Callable[..., Guest]]:
    with ExitStack() as stack:

        def make(name: str, **settings: Any) -> Guest:
            info = (vm := clone_of(name, 2, **settings)).info
            own_file = None if info.ram_shared else info.pid
            ram = stack.enter_context(GuestRam(info.ram_file, info.memory_bytes, own_file))
            target = stack.enter_context(RspTarget(str(info.gdb_socket), ram=ram))
            end = sum(ram.ranges()[-1])
            modules = info.debug_modules
            kernel = Kernel.attach(target, info.vmlinux, debug_modules=modules, ram_end=end)
            return Guest(vm, kernel)

        yield make


def all_functions(kernel: Kernel) -> list[Function]:
    """Functions of vmlinux of 5 bytes and more that are not freed after boot."""
    found = {}
    for name in kernel.vmlinux.function_names:
        for symbol in kernel.vmlinux.lookup(name):
            if (
                symbol.is_function
                and symbol.size_bytes >= JUMP_BYTES
                and symbol.section == ".text"
                and not name.startswith("__pfx_")
            ):
                function = Function(name, symbol.address + kernel.slide, symbol.size_bytes)
                found.setdefault(function.address, function)
    return list(found.values())


@pytest.mark.parametrize("name", KERNELS)
def test_every_entry_is_displaced_or_refused(guest_of: Callable[..., Guest], name: str) -> None:
    kernel = guest_of(name).kernel
    blacklist = Blacklist(kernel)
    functions = all_functions(kernel)
    counts: Counter[str] = Counter()
    started = time.monotonic()
    for function in functions:
        try:
            displacement = displace(kernel, function, function.address, blacklist)
        except CannotDisplace as e:
            counts[e.kind] += 1
            assert str(e)
            continue
        counts["ftrace NOP" if displacement.is_ftrace_nop else "moved"] += 1
        assert not (displacement.relocated(REGION) and displacement.is_ftrace_nop)
        assert function.address <= displacement.address <= function.address + 4
        assert len(displacement.original) >= JUMP_BYTES
        live = kernel.read_code(displacement.address, len(displacement.original))
        assert live == displacement.original
    per_thousand_s = (time.monotonic() - started) / len(functions) * 1000
    print(f"\n{name}: {len(functions)} functions, {per_thousand_s:.3f} s a thousand, {counts}")
    assert per_thousand_s < 0.5
    assert counts["ftrace NOP"] > 0.75 * len(functions)
    assert counts["ftrace NOP"] + counts["moved"] + counts["blacklist"] > 0.99 * len(functions)


def find_arena(functions: list[Function]) -> tuple[int, int]:
    """The longest stretch of code that nothing uses: all of one directory."""
    best = run = (0, 0)
    for function in sorted(functions, key=lambda each: each.address):
        if any(part in function.name for part in UNUSED):
            end = function.address + function.size_bytes
            run = (run[0] if function.address < run[1] + 0x8000 else function.address, end)
            best = max(best, run, key=lambda each: each[1] - each[0])
    return best


def jump(at: int, to: int) -> bytes:
    return b"\xe9" + (to - at - JUMP_BYTES).to_bytes(4, "little", signed=True)


def replace(kernel: Kernel, wanted: list[Displacement], arena: tuple[int, int]) -> int:
    """Replace instructions by jumps to copies in the arena; how many were replaced."""
    busy = [
        each.address for each in busy_addresses(kernel, [(d.address, d.resume) for d in wanted])
    ]
    text = kernel.address("_stext")
    image = bytearray(kernel.memory.read(text, kernel.address("_etext") - text))
    original = bytes(image)
    at = arena[0]
    chosen = [d for d in wanted if not any(d.address < ip < d.resume for ip in busy)]
    for displacement in chosen:
        copy = displacement.relocated(at)
        copy += jump(at + len(copy), displacement.resume)
        assert at + len(copy) <= arena[1], "the arena is too small"
        image[at - text : at - text + len(copy)] = copy
        here = displacement.address - text
        # What is left of the instructions is never run.
        size = len(displacement.original)
        image[here : here + size] = jump(displacement.address, at).ljust(size, b"\xcc")
        at += len(copy)
    for page in range(0, len(image), 0x1000):
        if image[page : page + 0x1000] != original[page : page + 0x1000]:
            kernel.memory.write(text + page, bytes(image[page : page + 0x1000]))
    return len(chosen)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_runs_with_all_entries_displaced(
    guest_of: Callable[..., Guest], name: str
) -> None:
    guest = guest_of(name)
    before = guest.run(WORKLOAD)
    blacklist = Blacklist(guest.kernel)
    functions = all_functions(guest.kernel)
    arena = find_arena(functions)
    wanted = []
    for function in functions:
        if not arena[0] <= function.address < arena[1]:
            with contextlib.suppress(CannotDisplace):
                wanted.append(displace(guest.kernel, function, function.address, blacklist))
    assert replace(guest.kernel, wanted, arena) > 0.85 * len(functions)
    assert guest.run(WORKLOAD) == before


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_runs_with_instructions_displaced_anywhere(
    guest_of: Callable[..., Guest], name: str
) -> None:
    guest = guest_of(name)
    kernel = guest.kernel
    before = guest.run(WORKLOAD)
    blacklist = Blacklist(kernel)
    functions = all_functions(kernel)
    arena = find_arena(functions)
    dice = random.Random(name)
    hot = [f for f in functions if f.name.startswith(("vfs_", "do_", "proc_", "__", "sched", "k"))]
    wanted, refused = [], Counter[str]()
    for function in dice.sample(hot, 4000):
        if arena[0] <= function.address < arena[1] or blacklist.reason(function.address):
            continue
        code = kernel.read_code(function.address, function.size_bytes)
        try:
            address = dice.choice(boundaries(code, function.address))
            wanted.append(displace(kernel, function, address, blacklist))
        except CannotDisplace as e:
            refused[e.kind] += 1
        except ProbeError:
            refused["no code"] += 1
    count = replace(kernel, wanted, arena)
    print(f"\n{name}: {count} places, refused {refused}")
    assert count > 1500
    assert guest.run(WORKLOAD) == before


@pytest.mark.parametrize("name", KERNELS)
def test_what_the_kernel_itself_patches(guest_of: Callable[..., Guest], name: str) -> None:
    guest = guest_of(name)
    kernel = guest.kernel
    blacklist = Blacklist(kernel)
    tables = blacklist.tables.of(None)
    assert all(
        table for table in (tables.jump_labels, tables.static_calls, tables.faulting, tables.fixups)
    )
    seen = Counter[str]()
    for kind, addresses in (
        ("jump label", tables.jump_labels),
        ("static call", tables.static_calls),
        ("exception table", tables.faulting),
    ):
        for address in addresses:
            function = kernel.function_at(address)
            if function is None or blacklist.reason(address) or ".init" in section(kernel, address):
                continue
            with pytest.raises(CannotDisplace) as caught:
                displace(kernel, function, address, blacklist)
            # Some are refused for a reason that is found earlier.
            seen[caught.value.kind] += 1
            if caught.value.kind == kind:
                assert kernel.symbolize(address) in str(caught.value)
    print(f"\n{name}: {seen}")
    assert min(seen[kind] for kind in ("jump label", "static call", "exception table")) > 500


def section(kernel: Kernel, address: int) -> str:
    symbol = kernel.vmlinux.containing(address - kernel.slide)
    return symbol.section if symbol else ".init"


TRACING = "/sys/kernel/debug/tracing"


@pytest.mark.parametrize("name", KERNELS)
def test_what_the_guest_traces_itself(guest_of: Callable[..., Guest], name: str) -> None:
    guest = guest_of(name)
    kernel = guest.kernel
    blacklist = Blacklist(kernel)
    vfs_read, getpgid = guest.function("vfs_read"), guest.function("__x64_sys_getpgid")
    assert displace(kernel, vfs_read, vfs_read.address, blacklist).is_ftrace_nop
    code = kernel.read_code(vfs_read.address, vfs_read.size_bytes)
    starts = [a for a in boundaries(code, vfs_read.address) if a > vfs_read.address + 9]
    for probed in starts:
        with contextlib.suppress(CannotDisplace):
            displaced = displace(kernel, vfs_read, probed, blacklist)
            break
    offset = probed - vfs_read.address

    # a tracer on the entry: ftrace's call
    guest.run(f"cd {TRACING}; echo vfs_read >set_ftrace_filter; echo function >current_tracer")
    with pytest.raises(CannotDisplace, match="already patched by ftrace") as caught:
        displace(kernel, vfs_read, vfs_read.address, blacklist)
    assert caught.value.kind == "patched"
    assert displace(kernel, vfs_read, probed, blacklist) == displaced
    guest.run(f"cd {TRACING}; echo nop >current_tracer; echo >set_ftrace_filter")
    assert displace(kernel, vfs_read, vfs_read.address, blacklist).is_ftrace_nop

    # a kprobe behind the entry: int3, or the jump of an optimized one
    enable = "echo 1 >events/kprobes/enable"
    for optimized, kind in ((0, "int3"), (1, "patched")):
        guest.run(f"echo {optimized} >/proc/sys/debug/kprobes-optimization")
        guest.run(
            f"cd {TRACING}; echo 'p:there vfs_read+{offset}' >kprobe_events; {enable}; sleep 1"
        )
        live = kernel.read_code(probed, 1)
        if optimized and live == b"\xcc":
            kind = "int3"  # the kernel could not optimize it
        with pytest.raises(CannotDisplace, match="a kprobe|already patched") as caught:
            displace(kernel, vfs_read, probed, blacklist)
        assert caught.value.kind == kind
        guest.run(f"cd {TRACING}; echo 0 >events/kprobes/enable; echo >kprobe_events; sleep 1")
        assert displace(kernel, vfs_read, probed, blacklist) == displaced
    assert displace(kernel, getpgid, getpgid.address, blacklist).is_ftrace_nop


CODES = {
    "int3": ("cc 90 90 90 90 c3", "int3"),
    "a jump into it": ("48 89 f8 48 89 f1 eb fb c3", "jump target"),
    "its end": ("31 c0 c3 55", "too short"),
    "a jump to nowhere": ("e9 00 00 00 40 c3", "patched"),
    "a call to nowhere": ("e8 00 00 00 40 c3", "patched"),
    "a call that is not the last one": ("ff d0 48 89 c7 c3", "instruction"),
    "ud2": ("48 89 f8 0f 0b c3", "instruction"),
    "sti": ("fb 48 89 f8 48 89 c7 c3", "instruction"),
    "iretq": ("48 89 f8 48 cf", "instruction"),
    "a NOP of ftrace behind a push": ("55 0f 1f 44 00 00 c3", "instruction"),
    "a distance to elsewhere": ("48 8b 05 00 00 00 80 c3", "reach"),
    "a call through the stack": ("48 89 f8 ff 54 24 08 c3", "instruction"),
    "a system call": ("48 89 f8 0f 05 c3", "instruction"),
}


def test_code_that_is_refused(guest_of: Callable[..., Guest]) -> None:
    guest = guest_of("6.1")
    kernel = guest.kernel
    blacklist = Blacklist(kernel)
    function = dataclasses.replace(guest.function("ext4_read_inode_bitmap"), size_bytes=65)
    for what, (text, kind) in CODES.items():
        code = bytes.fromhex(text)
        kernel.memory.write(function.address, code.ljust(64, b"\x90") + b"\xc3")
        here = function if what != "its end" else dataclasses.replace(function, size_bytes=3)
        with pytest.raises(CannotDisplace) as caught:
            displace(kernel, here, function.address, blacklist)
        assert caught.value.kind == kind, what
    # and the same as it is allowed
    for text, size in (
        ("55 48 89 e5 53 c3", 5),
        ("48 89 f8 ff d0 c3", 5),
        ("31 c0 c3 cc cc cc", 5),
        ("f3 0f 1e fa 0f 1f 44 00 00 c3", 5),
        ("48 89 f8 eb 20", 5),
        ("48 89 f8 74 20 c3", 5),
    ):
        code = bytes.fromhex(text)
        kernel.memory.write(function.address, code.ljust(64, b"\x90") + b"\xc3")
        assert len(displace(kernel, function, function.address, blacklist).original) == size, text


def test_places_of_our_own(guest_of: Callable[..., Guest]) -> None:
    guest = guest_of("6.1")
    kernel = guest.kernel
    blacklist = Blacklist(kernel)
    function = guest.function("vfs_read")
    entry = displace(kernel, function, function.address, blacklist)
    code = kernel.read_code(function.address, function.size_bytes)
    behind = boundaries(code, function.address)[2]
    kernel.memory.write(entry.address, jump(entry.address, REGION))
    with pytest.raises(CannotDisplace, match="already patched"):
        displace(kernel, function, function.address, blacklist)
    ours = {entry.address: entry.original}
    with pytest.raises(CannotDisplace, match=r"another resident probe is at vfs_read\+0x0"):
        displace(kernel, function, function.address, blacklist, ours)
    there = displace(kernel, function, behind, blacklist, ours)
    assert there.original == code[behind - function.address :][: len(there.original)]
    with pytest.raises(CannotDisplace, match="no instruction starts here"):
        displace(kernel, function, behind + 1, blacklist, ours)
    kernel.memory.write(entry.address, entry.original)


@pytest.mark.parametrize("name", KERNELS)
def test_modules(guest_of: Callable[..., Guest], name: str) -> None:
    guest = guest_of(name)
    guest.run("modprobe tun && modprobe kvm")
    kernel = guest.kernel
    blacklist = Blacklist(kernel)
    counts = Counter[str]()
    for module in kernel.modules:
        tables = blacklist.tables.of(module)
        for symbol in kernel.modules.symbols(module):
            if not symbol.is_function or symbol.size_bytes < JUMP_BYTES:
                continue
            if module.in_init(symbol.address) or symbol.name.startswith("__pfx_"):
                continue
            (function, *_) = kernel.functions(symbol.name, module)
            try:
                found = displace(kernel, function, function.address, blacklist)
            except CannotDisplace as e:
                counts[e.kind] += 1
                continue
            counts["ftrace NOP" if found.is_ftrace_nop else "moved"] += 1
            found.relocated(REGION)
        for address in tables.jump_labels:
            function_ = kernel.function_at(address)
            if function_ is not None and not module.in_init(address):
                with pytest.raises(CannotDisplace):
                    displace(kernel, function_, address, blacklist)
                counts["jump labels"] += 1
    print(f"\n{name}: {counts}")
    assert counts["ftrace NOP"] > 500
    assert counts["jump labels"] > 20
