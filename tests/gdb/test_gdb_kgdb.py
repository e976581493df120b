"""kgdbx in a real gdb over KGDB's serial line."""

import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kgdbx.gdb_launch import gdb_argv
from kgdbx.machine.cache import wait_until
from kgdbx.machine.vm import Vm
from tests.gdb.test_gdb_face import run_gdb

CALLS = 23
# Ends at the return of the last call, so that gdb's 'continue' comes to an end by itself.
SCRIPT = """
import pathlib
from kgdbx.probes.script import kretprobe
returned = []

@kretprobe("do_sys_openat2")
def count(hit, retval, task):
    if task.comm.startswith("opener-"):
        returned.append(retval.value_())
        if len(returned) == {calls}:
            hit.stop()

def start(session):
    session.define('p:opened do_sys_openat2 filename:ustring if $comm ~ "opener-*"')
    pathlib.Path({placed!r}).touch()

def stop(session):
    print("RETURNED", len(returned), min(returned) > 2)
"""


@pytest.fixture
def kgdb_vm(clone_of: Callable[..., Vm]) -> Vm:
    return clone_of("kgdb", 2)


def runs_on(vm: Vm) -> bool:
    """Whether no breakpoint is left: nobody is attached, and a stop would last."""
    return vm.execute("opener 1 7; echo 2 > /proc/sys/kernel/panic", timeout_s=60).status == 0


def test_probes_count_exactly(kgdb_vm: Vm, tmp_path: Path) -> None:
    script, placed = tmp_path / "count.py", tmp_path / "placed"
    script.write_text(SCRIPT.format(calls=CALLS, placed=str(placed)))
    started = []

    def begin() -> None:
        assert wait_until(placed.exists, 60)
        started.append(kgdb_vm.start(f"opener 2 {CALLS}"))

    starter = threading.Thread(target=begin)
    starter.start()
    out = run_gdb(
        f"kgdbx attach kgdb:{kgdb_vm.name}",
        f"kgdbx script {script}",
        "continue",
        "kgdbx list",
        "kgdbx detach",
        "info breakpoints",
        timeout_s=120,
    )
    starter.join()
    assert len(re.findall(r'opener-[01]-.* opened: .* filename="/etc/hostname"', out)) == CALLS, out
    assert f"RETURNED {CALLS} True" in out
    assert "No breakpoints" in out
    assert started[0].wait(60).output == f"{CALLS}\n"
    assert runs_on(kgdb_vm)


def test_interrupt_goes_to_the_console_and_quit_cleans(kgdb_vm: Vm) -> None:
    with subprocess.Popen(
        gdb_argv(load=True),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(
            f"kgdbx attach kgdb:{kgdb_vm.name}\nkgdbx kprobe do_sys_openat2\n"
            "kgdbx watch panic_timeout:4\ncontinue\n"
        )
        process.stdin.flush()
        while "Continuing" not in process.stdout.readline():
            assert process.poll() is None
        panic = "/proc/sys/kernel/panic"
        workload = f"for n in 3 5 7; do echo $n > {panic}; done; opener 2 {CALLS}"
        command = kgdb_vm.start(workload)
        hits = 0
        while hits < CALLS:
            hits += bool(re.search("opener-[01]-", process.stdout.readline()))
            assert process.poll() is None
        assert command.wait(60).output == f"{CALLS}\n"
        process.send_signal(signal.SIGINT)
        process.stdin.write("echo STOPPED\\n\nkgdbx list\nquit\n")
        process.stdin.close()
        output = process.stdout.read()
        watchdog.cancel()
    assert process.returncode == 0, output
    listing = output.partition("STOPPED")[2]
    assert re.search(r"  w  +stop  ENABLED +3 +0 +0 ", listing), output
    assert "Traceback" not in output
    assert runs_on(kgdb_vm)
