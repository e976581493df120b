"""A VM with the KGDB kernel, its serial line, and a line that is worse."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kgdbx.attach import attach_kgdb
from kgdbx.machine.sysrq import sysrq_g
from kgdbx.machine.vm import Vm
from kgdbx.session import Session
from kgdbx.target.kgdb import KgdbTarget
from tests.vm.kgdb.noisy_line import Noise, NoisyLine


@pytest.fixture
def kgdb_vm(clone_of: Callable[..., Vm]) -> Vm:
    """A fresh clone of the KGDB kernel with 2 vCPUs."""
    return clone_of("kgdb", 2)


@pytest.fixture
def attached(kgdb_vm: Vm) -> Iterator[Session]:
    """A session over its serial line."""
    with attach_kgdb(kgdb_vm.info) as session:
        yield session


@pytest.fixture
def noisy(kgdb_vm: Vm, tmp_path: Path) -> Iterator[Callable[..., tuple[KgdbTarget, NoisyLine]]]:
    """Function that attaches a target by a line with noise: ``noisy(Noise(...))``."""
    with ExitStack() as stack:

        def attach(noise: Noise, **settings: Any) -> tuple[KgdbTarget, NoisyLine]:
            line = NoisyLine(kgdb_vm.info.kgdb_socket, tmp_path / "line.sock", noise)
            stack.callback(line.close)
            break_in = functools.partial(sysrq_g, kgdb_vm.info)
            target = KgdbTarget(str(line.path), break_in=break_in, **settings)
            stack.callback(target.close)
            return target, line

        yield attach
