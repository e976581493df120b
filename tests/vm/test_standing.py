"""A VM that its user has paused."""

import hashlib
import subprocess
import sys
from collections.abc import Callable

from kgdbx.attach import open_ram
from kgdbx.machine.vm import Vm

CHUNK_BYTES = 16 << 20


def kgdbx(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kgdbx", *argv], capture_output=True, text=True, timeout=120
    )


def digest(vm: Vm) -> str:
    found = hashlib.sha1()
    ram = open_ram(vm.info)
    for start, size in ram.ranges():
        for at in range(start, start + size, CHUNK_BYTES):
            found.update(ram.read(at, min(CHUNK_BYTES, start + size - at)))
    ram.close()
    return found.hexdigest()


def test_leaks_are_looked_for_without_one_instruction(clone_of: Callable[..., Vm]) -> None:
    vm = clone_of(smp=2, paused=True)
    before = digest(vm)
    done = kgdbx("leaks", "scan", "--vm", vm.name)
    assert done.returncode in (0, 1), done.stderr
    assert "blocks of" in done.stdout
    assert f"VM {vm.name} stands, and is left standing\n" in done.stderr
    live = kgdbx("leaks", "scan", "--vm", vm.name, "--live")
    assert live.returncode == 2
    assert "a VM that stands does not change: leave out --live" in live.stderr
    assert vm.status() == "paused"
    assert digest(vm) == before
    with vm.qmp() as qmp:
        qmp.execute("cont")
    assert vm.execute("echo runs").output == "runs\n"
    assert digest(vm) != before  # what would have been seen
    assert kgdbx("leaks", "scan", "--vm", vm.name).returncode in (0, 1)
    assert vm.status() == "running"
