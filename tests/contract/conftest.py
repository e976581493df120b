"""The targets that the contract is about: a fake, a VM over RSP, a VM over KGDB's serial line, and
a VM under gdb.

Inside gdb (see tests/gdb/test_gdb_target.py) the last one, elsewhere the others.
"""

import abc
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from kgdbx.machine.snapshot import Template, clone, make_template
from kgdbx.machine.sysrq import sysrq_g
from kgdbx.machine.vm import Vm, configure
from kgdbx.symbols.elf import ElfSymbols, read_symbols
from kgdbx.symbols.kaslr import find_slide
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.kgdb import kgdb_ram, kgdb_symbols
from kgdbx.target.base import Target
from kgdbx.target.fake import FakeInstruction, FakeTarget
from kgdbx.target.kgdb import KgdbTarget
from kgdbx.target.ram import GuestRam
from kgdbx.target.rsp import RspTarget

IMAGE_MAP = 0xFFFFFFFF80000000


class Guest(abc.ABC):
    """A guest with a target attached, and what a test has to know of it.

    :ivar probed: address of an instruction that :meth:`begin` makes the guest execute
    :ivar following: the one behind it
    :ivar data: address of 4 bytes that the guest leaves alone
    :ivar physical: guest-physical address of ``data``
    :ivar written: address of 8 bytes that the guest writes again and again
    :ivar unmapped: address where nothing is mapped
    """

    target: Target
    probed: int
    following: int
    data: int
    physical: int
    written: int
    unmapped = 0xFFFFA00000000000

    @abc.abstractmethod
    def begin(self, calls: int) -> None:
        """Make the guest execute ``probed`` so many times when it runs."""

    @abc.abstractmethod
    def done(self) -> bool:
        """Whether it has."""

    @abc.abstractmethod
    def runs_freely(self) -> bool:
        """Whether the guest runs and meets no breakpoint at ``probed``."""

    @abc.abstractmethod
    def kill(self) -> None:
        """End the guest at once; called from another thread."""

    @abc.abstractmethod
    def connect_to_nothing(self) -> Target:
        """Attach to what is not there."""


class FakeGuest(Guest):
    probed, following, data, written = 0x1000, 0x1005, 0x2000, 0x2008
    physical = data + 0x100000

    def __init__(self, *, with_ram: bool) -> None:
        self.target = self.fake = FakeTarget(
            [
                FakeInstruction(self.probed),
                FakeInstruction(self.following),
                FakeInstruction(0x100A, writes=(self.written, b"\x01" * 8)),
            ],
            {0x1000: bytes(0x100), 0x2000: bytes(0x100)},
            cpus=2,
            virtual_base=-0x100000,
            ram=with_ram,
        )
        self.fake.calls = 0

    def begin(self, calls: int) -> None:
        self.fake.calls = calls
        self.fake._rounds[:] = [0, calls]  # the first vCPU makes all of them

    def done(self) -> bool:
        return self.fake.halted

    def runs_freely(self) -> bool:
        return not self.fake.breakpoints

    def kill(self) -> None:
        self.fake.lose()

    def connect_to_nothing(self) -> Target:
        pytest.skip("a fake has nothing to connect to")


class VmGuest(Guest):
    """A clone of kernel 6.1 with 2 vCPUs."""

    def __init__(self, vm: Vm, attach: Callable[..., Target], *, with_ram: bool) -> None:
        info = vm.info
        self.vm = vm
        self._attach = attach
        ram = GuestRam(info.ram_file, info.memory_bytes, info.pid) if with_ram else None
        self.ram = ram
        self.target = attach(str(info.gdb_socket), ram=ram)
        symbols = read_symbols(info.vmlinux)
        slide = find_slide(self.target, symbols)
        assert slide is not None
        self._find(symbols, slide)

    def _find(self, symbols: ElfSymbols, slide: int) -> None:
        self.probed = symbols.address("__x64_sys_getpgid") + slide
        self.following = self.probed + 5  # behind the NOP of ftrace
        self.data = symbols.address("panic_timeout") + slide
        phys_base = self.target.read_memory(symbols.address("phys_base") + slide, 8)
        self.physical = self.data - IMAGE_MAP + int.from_bytes(phys_base, "little", signed=True)
        self.written = symbols.address("jiffies") + slide

    def begin(self, calls: int) -> None:
        self._command = self.vm.start(f"caller 1 {calls}")

    def done(self) -> bool:
        return self._command.poll() is not None

    def runs_freely(self) -> bool:
        return self.vm.execute("caller 1 3", timeout_s=20).status == 0

    def kill(self) -> None:
        os.kill(self.vm.info.pid, signal.SIGKILL)

    def connect_to_nothing(self) -> Target:
        return self._attach("/nonexistent/gdb.sock")


class KgdbGuest(VmGuest):
    """A clone of the KGDB kernel with 2 vCPUs, over its serial line."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.ram = None
        self._attach = KgdbTarget
        break_in = functools.partial(sysrq_g, vm.info)
        self.target = target = KgdbTarget(str(vm.info.kgdb_socket), break_in=break_in)
        kernel = Kernel.attach(target, vm.info.vmlinux)
        target.read_ahead_in(*kgdb_ram(kernel))
        target.use_symbols(kgdb_symbols(kernel))
        self._find(kernel.vmlinux, kernel.slide)


@functools.cache
def template(kernel: str = "6.1") -> Template:
    return make_template(configure(kernel, smp=2))


def kgdb_guest() -> Iterator[KgdbGuest]:
    with clone(template("kgdb")) as vm:
        guest = KgdbGuest(vm)
        try:
            yield guest
        finally:
            if vm.alive:
                guest.target.close()


def vm_guest(attach: Callable[..., Target], *, with_ram: bool) -> Iterator[VmGuest]:
    with clone(template()) as vm:
        guest = VmGuest(vm, attach, with_ram=with_ram)
        try:
            yield guest
        finally:
            if vm.alive:
                guest.target.close()
            if guest.ram is not None:
                guest.ram.close()


KINDS = ("gdb",) if "gdb" in sys.modules else ("fake", "rsp")


KGDB = () if "gdb" in sys.modules else ("kgdb",)


@pytest.fixture(params=[*(kind + ram for kind in KINDS for ram in ("", "+ram")), *KGDB])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    kind, _, ram = request.param.partition("+")
    if kind == "fake":
        yield FakeGuest(with_ram=bool(ram))
    elif kind == "kgdb":
        yield from kgdb_guest()
    elif kind == "rsp":
        yield from vm_guest(RspTarget, with_ram=bool(ram))
    else:
        from kgdbx.target.gdb_qemu import GdbTarget

        yield from vm_guest(GdbTarget, with_ram=bool(ram))


@pytest.fixture
def target(guest: Guest) -> Target:
    return guest.target
