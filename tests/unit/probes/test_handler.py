"""Handlers are called with what they name."""

import errno
from typing import Any

import pytest

from kgdbx.errors import ProbeError
from kgdbx.probes.handler import bind_handler

HIT: Any = object()
SUPPLIERS = {"regs": lambda hit: "regs", "task": lambda hit: "task", "hit": lambda hit: hit}


def call(handler: Any) -> Any:
    return bind_handler(handler, SUPPLIERS, "vfs_read")(HIT)


def test_called_with_what_it_names() -> None:
    assert call(lambda: "nothing") == "nothing"
    assert call(lambda task, regs: (task, regs)) == ("task", "regs")
    assert call(lambda hit, /, regs: (hit, regs)) == (HIT, "regs")
    assert call(lambda *, task: task) == "task"
    assert call(lambda regs, **others: (regs, others)) == ("regs", {"task": "task", "hit": HIT})


def test_defaults_stay_for_what_is_not_there() -> None:
    assert call(lambda regs, limit=7: (regs, limit)) == ("regs", 7)
    assert call(lambda regs=None: regs) == "regs"


def test_bound_methods() -> None:
    class Handler:
        def __call__(self, task: Any) -> Any:
            return self, task

    handler = Handler()
    assert call(handler) == (handler, "task")


def test_only_what_is_named_is_computed() -> None:
    def explode(hit: Any) -> Any:
        raise AssertionError

    bound = bind_handler(lambda regs: regs, {**SUPPLIERS, "task": explode}, "vfs_read")
    assert bound(HIT) == "regs"


def test_unknown_names_are_refused() -> None:
    def handler(regs: Any, file: Any) -> None: ...

    with pytest.raises(ProbeError) as caught:
        bind_handler(handler, SUPPLIERS, "vfs_read")
    assert caught.value.errno == errno.EINVAL
    assert str(caught.value) == (
        "handler() has a parameter 'file', which vfs_read does not; there are: regs, task, hit"
    )
    with pytest.raises(ProbeError, match=r"takes \*values; name the values it needs instead"):
        bind_handler(lambda *values: None, SUPPLIERS, "vfs_read")
