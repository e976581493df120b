"""A real kernel under a session, and the workloads that make it do what a test counts.

Inside gdb the session is over gdb's own connection: see ``tests/gdb``.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kgdbx.arch.instruction import decode_all, format_instruction
from kgdbx.attach import attach_vm
from kgdbx.machine.vm import Vm
from kgdbx.session import Session
from kgdbx.symbols.kernel import Kernel


@dataclasses.dataclass
class Guest:
    """A VM with a session attached; the guest stands still except in :meth:`run`."""

    vm: Vm
    session: Session

    @property
    def kernel(self) -> Kernel:
        return self.session.kernel

    def run(self, command: str, *, status: int = 0, timeout_s: float = 120) -> str:
        """Run a shell command to its end while probes fire; what it prints."""
        started = self.vm.start(command)
        self.session.run(command=started, timeout_s=timeout_s)
        assert started.poll() is not None, f"{command!r} did not end in {timeout_s} s"
        done = started.wait(5)
        assert done.status == status, done.output
        return done.output

    def offset_of(self, function: str, instruction: str) -> int:
        """Offset of the first instruction of a function whose text holds *instruction*."""
        (found,) = self.kernel.functions(function)
        code = self.kernel.read_code(found.address, found.size_bytes)
        for each in decode_all(code, found.address):
            if instruction in format_instruction(each):
                return each.ip - found.address
        raise LookupError(f"{function} has no {instruction!r}")

    def text(self) -> bytes:
        """The kernel's whole text, as it is in memory now."""
        start = self.kernel.address("_stext")
        return self.kernel.memory.read(start, self.kernel.address("_etext") - start)


def _attach(vm: Vm) -> Session:
    if "gdb" not in sys.modules:
        return attach_vm(vm.info)
    from kgdbx.gdb.attach import connect

    return connect(vm.name, None, keys=False)


@pytest.fixture
def guest_of(clone_of: Callable[..., Vm]) -> Iterator[Callable[..., Guest]]:
    """Function that gives a fresh clone with a session: ``guest_of(kernel="6.1", smp=2)``."""
    with ExitStack() as stack:

        def make(kernel: str = "6.1", smp: int = 2, **settings: Any) -> Guest:
            vm = clone_of(kernel, smp, **settings)
            return Guest(vm, stack.enter_context(_attach(vm)))

        yield make


@pytest.fixture
def guest(guest_of: Callable[..., Guest]) -> Guest:
    """A fresh clone of kernel 6.1 with 2 vCPUs and a session."""
    return guest_of()
