"""Fixtures that give real VMs: clones of templates that are booted once."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kgdbx.machine.initramfs import GUEST_FILES
from kgdbx.machine.kmod import build_kmod
from kgdbx.machine.snapshot import Template, clone, make_template
from kgdbx.machine.vm import Vm, configure

MODULES = ("dummy", "loop", "tun", "kvm")
"""Modules of the stock kernels that tests load."""


@functools.cache
def kmods(kernel: str) -> dict[str, Path]:
    """Test modules of ours by their path in the guest, such as ``/watch_cases.ko``."""
    sources = sorted((GUEST_FILES / "kmod").glob("*.c"))
    return {f"/{source.stem}.ko": build_kmod(kernel, source.stem) for source in sources}


def template_of(kernel: str = "6.1", smp: int = 4, **settings: Any) -> Template:
    """A template; booted once a host boot, unless others have pushed it out meanwhile.

    Guests of the stock kernels have all modules that tests load, so that few have to be booted.
    """
    if kernel != "kgdb":
        settings = {"modules": MODULES, "files": kmods(kernel)} | settings
    return make_template(configure(kernel, smp=smp, **settings))


@pytest.fixture
def clone_of() -> Iterator[Callable[..., Vm]]:
    """Function that gives clones: ``clone_of(kernel="6.1", smp=4, paused=False, **settings)``.

    *settings* are those of ``configure()``, hashable. The test's end stops the clones.
    """
    with ExitStack() as stack:

        def make(kernel: str = "6.1", smp: int = 4, *, paused: bool = False, **settings: Any) -> Vm:
            template = template_of(kernel, smp, **settings)
            return stack.enter_context(clone(template, paused=paused))

        yield make


@pytest.fixture
def vm(clone_of: Callable[..., Vm]) -> Vm:
    """A fresh clone of kernel 6.1 with 2 vCPUs."""
    return clone_of(smp=2)


@pytest.fixture
def vm4(clone_of: Callable[..., Vm]) -> Vm:
    """A fresh clone of kernel 6.1 with 4 vCPUs, whose stops take twice the time."""
    return clone_of()
