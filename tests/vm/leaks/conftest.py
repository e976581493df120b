"""A guest with modules that plant leaks, and what they say of them."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.attach import attach_vm, open_ram
from kgdbx.leaks.scan import Scan, scan_heap
from kgdbx.machine.vm import Vm


@dataclasses.dataclass
class Planted:
    """A guest with test modules in its root directory."""

    vm: Vm

    def load(self, module: str) -> None:
        """Load a module and keep the guest as it is then."""
        done = self.vm.execute(f"insmod /{module}.ko", timeout_s=60)
        assert done.status == 0, done.output

    def told(self, verdict: str) -> dict[int, str]:
        """What the modules say in the log: kind by address, of ``lost`` or ``kept`` blocks."""
        log = self.vm.execute("dmesg").output
        found = re.findall(rf" {verdict}: (\w+) ([0-9a-f]+)", log)
        return {int(address, 16): kind for kind, address in found}

    def scan(self) -> Scan:
        """Stop the guest and scan it."""
        with attach_vm(self.vm.info) as session, open_ram(self.vm.info) as ram:
            registers = [session.target.read_registers(cpu) for cpu in session.target.cpus()]
            return scan_heap(session.kernel, ram, registers)


@pytest.fixture
def planted_in(clone_of: Callable[..., Any]) -> Callable[[str], Planted]:
    """Function that gives a guest of a kernel with the test modules."""

    def make(kernel: str) -> Planted:
        return Planted(clone_of(kernel, 2))

    return make
