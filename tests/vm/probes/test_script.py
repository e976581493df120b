"""Probe scripts in a real kernel."""

from pathlib import Path
from typing import Any

import pytest

from kgdbx.errors import CommandError, ProbeError

CALLS = 23

_GOOD = """
from kgdbx.probes.script import jprobe, kprobe, kretprobe, watch

order = []

def start(s):
    assert s is session
    order.append("start")

def stop(s):
    order.append("stop")

def after(task):
    note(task, "post")

def note(task, what):
    if task.comm.startswith("opener-"):
        order.append(what)

@kprobe("do_sys_openat2", post_handler=after)
def before(p, regs, task):
    assert regs.ip == kernel.address("do_sys_openat2")
    note(task, "pre")

@jprobe("do_sys_openat2", name="mine")
def arguments(dfd, task):
    note(task, f"dfd {dfd.value_()}")

@kretprobe("do_sys_openat2", maxactive=20)
def returned(retval, task):
    note(task, "return")

@watch("panic_timeout", size_bytes=4)
def changed(old, new):
    order.append((prog["panic_timeout"].value_(), new))
"""


def test_decorators_and_hooks(guest: Any, tmp_path: Path) -> None:
    script = tmp_path / "good.py"
    script.write_text(_GOOD)
    probes = guest.session.load_script(script)
    kinds = [(type(p).__name__, p.name.rstrip("0123456789")) for p in probes]
    assert kinds == [
        ("Kprobe", "before"),
        ("Jprobe", "mine"),
        ("Kretprobe", "returned"),
        ("Watch", "changed"),
    ]
    assert probes[2].maxactive == 20
    guest.run(f"opener 1 {CALLS}; echo 7 > /proc/sys/kernel/panic")
    order = probes[0].pre_handler.__globals__["order"]
    once = ["pre", "dfd -100", "post", "return"]
    assert order == ["start", *once * CALLS, (7, 7)]
    guest.session.close()
    assert order[-1] == "stop"


@pytest.mark.parametrize("fault", ["probe", "start"])
def test_script_that_fails_leaves_nothing(guest: Any, tmp_path: Path, fault: str) -> None:
    script = tmp_path / "bad.py"
    second = "vfs_raed" if fault == "probe" else "vfs_read"
    script.write_text(
        "from kgdbx.probes.script import kprobe\n"
        "@kprobe('vfs_write')\n"
        "def first(): pass\n"
        f"@kprobe({second!r})\n"
        "def second(): pass\n"
        "def start(session): raise ZeroDivisionError\n"
    )
    with pytest.raises(ProbeError if fault == "probe" else CommandError) as caught:
        guest.session.load_script(script)
    assert isinstance(caught.value.__cause__, ZeroDivisionError) == (fault == "start")
    assert (len(guest.session.probes), guest.session.probes.sites) == (0, ())


def test_script_without_probes(guest: Any, tmp_path: Path) -> None:
    script = tmp_path / "empty.py"
    script.write_text("x = 1\n")
    with pytest.raises(CommandError, match="defines no probe; mark a handler with @kprobe"):
        guest.session.load_script(script)
    with pytest.raises(CommandError, match="cannot read the probe script .*: No such file"):
        guest.session.load_script(tmp_path / "none.py")
