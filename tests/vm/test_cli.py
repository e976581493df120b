"""The ``kgdbx`` program as its users run it."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from kgdbx.attach import attach_vm
from kgdbx.machine.cache import wait_until
from kgdbx.machine.vm import Vm, list_vms

EXAMPLES = Path(__file__).parent.parent.parent / "gdb_scripts" / "examples"
FUNCTION = "__x64_sys_getpgid"
CALLS = 101
PIPE_BYTES = 4096
LINE_BYTES = 160  # more than an event's


def kgdbx(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "kgdbx", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture
def endless(vm: Vm) -> Iterator[Vm]:
    command = vm.start("caller 2 1000000000")
    yield vm
    command.discard()


def is_unpatched(vm: Vm) -> bool:
    """Whether the guest runs past the probed function. Nobody is attached: a stop would last."""
    return vm.execute("caller 1 7").output.startswith("7 ")


def unread(stream: IO[str]) -> int:
    """Bytes that wait in a pipe."""
    size = fcntl.ioctl(stream.fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(size, sys.byteorder)


def test_events_of_a_command(vm: Vm) -> None:
    done = kgdbx(
        "probe",
        "--vm",
        vm.name,
        f"p:call {FUNCTION} $comm",
        f"r:back {FUNCTION} $retval",
        "-e",
        f"caller 4 {CALLS}",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    first, *lines = map(json.loads, done.stdout.splitlines())
    assert first == {"schema": "kgdbx.event.1"}
    events = [line for line in lines if "summary" not in line]
    assert sum(e["probe"] == "kprobes/call" for e in events) == CALLS
    assert sum(e["probe"] == "kprobes/back" for e in events) == CALLS
    assert {e["fields"]["$comm"] for e in events if e["kind"] == "p"} == {
        f"caller-{n}" for n in range(4)
    }
    summaries = {line["summary"]["probe"]: line["summary"] for line in lines if "summary" in line}
    assert summaries["kprobes/call"]["hits"] == CALLS
    assert summaries["kprobes/back"]["nmissed"] == 0
    assert is_unpatched(vm)


def test_text_is_ftrace_like(vm: Vm) -> None:
    done = kgdbx("probe", "--vm", vm.name, f"p:call {FUNCTION} %di", "-n", "3", "-e", "caller 1 7")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(f": call: ({FUNCTION}+0x0/0x" in line and " %di=0x" in line for line in lines)
    assert "kprobes/call" in done.stderr  # the table


def test_count_ends_the_run_exactly(endless: Vm) -> None:
    done = kgdbx("probe", "--vm", endless.name, f"p:call {FUNCTION}", "-n", "17", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"ts_ns"') == 17
    assert is_unpatched(endless)


def test_duration(endless: Vm) -> None:
    done = kgdbx("probe", "--vm", endless.name, f"p:call {FUNCTION}", "-d", "1.5")
    assert done.returncode == 0, done.stderr
    assert "call:" in done.stdout
    assert is_unpatched(endless)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing_behind(endless: Vm, number: signal.Signals) -> None:
    argv = [sys.executable, "-m", "kgdbx", "probe", "--vm", endless.name, f"p:call {FUNCTION}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert "call:" in run.stdout.readline()
        run.send_signal(number)
        _, errors = run.communicate(timeout=20)
    assert run.returncode == (0 if number is signal.SIGINT else 128 + number), errors
    assert "Traceback" not in errors
    assert is_unpatched(endless)


def test_killed_then_attached_again(endless: Vm) -> None:
    argv = [sys.executable, "-m", "kgdbx", "probe", "--vm", endless.name, f"p:call {FUNCTION}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert "call:" in run.stdout.readline()
        run.kill()
    with attach_vm(endless.info):
        pass  # takes out what was left
    assert is_unpatched(endless)


def test_reader_that_goes_away(endless: Vm) -> None:
    argv = [sys.executable, "-m", "kgdbx", "probe", "--vm", endless.name, f"p:call {FUNCTION}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.wait(timeout=20) == 0
    assert is_unpatched(endless)


def test_reader_that_stops_reading_holds_nothing_up(endless: Vm) -> None:
    argv = [sys.executable, "-m", "kgdbx", "probe", "--vm", endless.name, f"p:call {FUNCTION}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        fcntl.fcntl(run.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        assert wait_until(lambda: unread(run.stdout) > PIPE_BYTES - LINE_BYTES, 60)
        run.send_signal(signal.SIGTERM)
        assert is_unpatched(endless)
        output, errors = run.communicate(timeout=20)
    assert run.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert "call:" in output


def test_guest_command_that_fails(vm: Vm) -> None:
    done = kgdbx("probe", "--vm", vm.name, "p do_exit", "-e", "cat /nowhere")
    assert done.returncode == 1
    assert "No such file" in done.stderr
    assert "ended with status 1" in done.stderr


def test_script_and_its_fault(vm: Vm, tmp_path: Path) -> None:
    script = tmp_path / "probes.py"
    script.write_text(
        "from kgdbx.probes.script import kprobe\n"
        f"@kprobe({FUNCTION!r})\n"
        "def called(p, regs, task):\n"
        "    print(task.comm, p.hits)\n"
        "    if p.hits == 3:\n"
        "        raise RuntimeError('on purpose')\n"
    )
    done = kgdbx("probe", "--vm", vm.name, "-s", str(script), "-e", "caller 1 5")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"caller-0 {n}" for n in range(1, 6)]
    assert "RuntimeError: on purpose" in done.stderr
    assert "/kgdbx/probes/" not in done.stderr  # the way to the handler is of no interest
    assert is_unpatched(vm)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples(vm: Vm, name: str) -> None:
    done = kgdbx(
        "probe", "--vm", vm.name, "-s", str(EXAMPLES / name), "-e", "sh -c 'cat /nowhere; true'"
    )
    assert done.returncode == 0, done.stderr
    expected = {
        "clone_arguments.py": "exit_signal=17",
        "clone_stack.py": "__do_sys_clone",
        "failed_opens.py": "open '/nowhere': ENOENT",
    }
    assert expected[name] in done.stdout


@pytest.mark.parametrize(
    ("definition", "status", "message"),
    [
        ("p vfs_raed", 2, "nearest: vfs_read"),
        ("p vfs_read+2", 2, "inside the instruction that starts at vfs_read+0x0"),
        ("p vfs_read (", 2, "^"),
        ("p vfs_read nosuch", 2, "parameters: file, buf, count, pos"),
    ],
)
def test_bad_definitions(vm: Vm, definition: str, status: int, message: str) -> None:
    done = kgdbx("probe", "--vm", vm.name, definition)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert is_unpatched(vm)


def test_vm_life() -> None:
    name = f"cli-{os.getpid()}"
    try:
        assert kgdbx("vm", "clone", "--name", name, "--smp", "1").stdout == f"{name}\n"
        assert name in kgdbx("vm", "list").stdout
        done = kgdbx("vm", "exec", name, "--", "echo hello; exit 7")
        assert (done.returncode, done.stdout) == (7, "hello\n")
        done = kgdbx("vm", "clone", "--name", name, "--smp", "1")
        assert done.returncode == 3
        assert name in done.stderr
        done = kgdbx("doctor", "--vm", name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "slide 0x" in done.stdout
        assert "at any number of addresses" in done.stdout
    finally:
        done = kgdbx("vm", "stop", name)
    assert done.returncode == 0, done.stderr
    assert wait_until(lambda: name not in [vm.name for vm in list_vms()], 5)


def test_frozen_vm_is_probed_from_the_first_instruction() -> None:
    name = f"frozen-{os.getpid()}"
    try:
        assert kgdbx("vm", "run", "--name", name, "--frozen", "--smp", "1").returncode == 0
        done = kgdbx("probe", "--vm", name, "p:boot start_kernel", "-n", "1", timeout_s=90)
        assert done.returncode == 0, done.stderr
        assert "swapper" in done.stdout
        assert "start_kernel+0x0/" in done.stdout
        assert kgdbx("vm", "exec", name, "--", "echo booted", timeout_s=90).stdout == "booted\n"
    finally:
        kgdbx("vm", "stop", name)


def test_demo() -> None:
    done = kgdbx("demo", timeout_s=120)
    assert done.returncode == 0, done.stderr
    for expected in ('filename="/nowhere" $retval=-2', "looks up '/etc/hostname'", "is alive"):
        assert expected in done.stdout
