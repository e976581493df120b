"""Fixtures that give real VMs: clones of templates that are booted once."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kgdbx.machine.snapshot import Template, clone, make_template
from kgdbx.machine.vm import Vm, configure


def template_of(kernel: str = "6.1", smp: int = 4, **settings: Any) -> Template:
    """A template; booted once a host boot, unless others have pushed it out meanwhile."""
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
    """A fresh clone of kernel 6.1 with 4 vCPUs."""
    return clone_of()
