"""A kgdbx that is killed, whatever it was doing: the guest lives, and is put right."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kgdbx.attach import attach_vm
from kgdbx.machine.vm import Vm
from kgdbx.session import Session

KILLS = int(os.environ.get("KGDBX_TEST_KILLS", "3"))
VICTIM = """
import random, sys, time
from kgdbx.attach import connect
from kgdbx.probes.definition import parse_definition

DEFINITIONS = (
    "p:o do_sys_openat2 dfd filename:ustring",
    "r20:n do_nanosleep $retval",
    "r20:m do_nanosleep",
    "r:v vfs_read $retval",
    "p:g __x64_sys_getpgid regs->di",
    "r:h __x64_sys_getpgid $retval",
)
random.seed(int(sys.argv[2]))
session = connect(sys.argv[1])
while True:
    start = time.monotonic()
    probes = session.define_many(map(parse_definition, DEFINITIONS[:4]), tier="resident")
    probes += [session.define(text, tier="resident")[0] for text in DEFINITIONS[4:]]
    session.run(timeout_s=0.05)
    for probe in reversed(probes):
        probe.unregister()
    if random.random() < 0.5:
        session.resident.close()
    print(time.monotonic() - start, flush=True)
"""
HELD = """
import sys
from kgdbx.attach import connect
from kgdbx.probes.definition import parse_definition

session = connect(sys.argv[1])
# More than one page table maps.
session.define_many([parse_definition(f"r4096:m{n} do_nanosleep") for n in range(9)])
session.define("r20:n do_nanosleep $retval", tier="resident")
session.define('p:e do_nanosleep if $comm ~ "caller*"', tier="resident")
print("up", flush=True)
session.run(count=8)
print("8 sleep", flush=True)
session.run()
"""


def victim(script: str, vm: Vm, *arguments: object) -> tuple[subprocess.Popen[bytes], str]:
    """Start a script and wait for the first line that it prints."""
    argv = [sys.executable, "-c", script, vm.name, *map(str, arguments)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    return process, next_line(process)


def next_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().rstrip()


def kill_holder(vm: Vm) -> None:
    """Have a kgdbx place its probe and kill it."""
    process, line = victim(HELD, vm)
    assert line == "up"
    kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def text_of(session: Session) -> bytes:
    start = session.kernel.address("_text")
    return session.kernel.memory.read(start, session.kernel.address("_etext") - start)


def assert_no_oops(vm: Vm) -> None:
    console = vm.info.console.read_text(errors="replace")
    assert not [word for word in ("RIP:", "BUG:", "Oops", "stuck for") if word in console], console


def test_killed_at_random_moments(clone_of: Callable[..., Vm]) -> None:
    vm = clone_of("6.1", 4)
    with attach_vm(vm.info) as session:
        assert session.recovery is None
        before = text_of(session)
    command = vm.start("caller 2 100000000 & caller 8 10000 100000")
    moments = random.Random(5)
    recovered = 0
    for number in range(KILLS):
        process, cycle_s = victim(VICTIM, vm, number)
        time.sleep(moments.random() * float(cycle_s))
        kill(process)
        with attach_vm(vm.info) as session:
            recovered += session.recovery is not None
            assert session.recovery is None or not session.recovery.conflicts
            assert text_of(session) == before
            assert not vm.info.journal.exists()
            session.run(timeout_s=0.1)
    assert recovered > 0
    assert vm.execute("caller 4 1009").output.startswith("1009 ")
    assert_no_oops(vm)
    command.discard()


def test_command(clone_of: Callable[..., Vm]) -> None:
    vm = clone_of("6.1", 2)
    process, line = victim(HELD, vm)
    assert line == "up"
    sleepers = vm.start("caller 8 8 600000000")
    assert next_line(process) == "8 sleep"
    kill(process)
    first, second = (
        subprocess.run(
            [sys.executable, "-m", "kgdbx", "recover", vm.name],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for _ in range(2)
    )
    assert first.stdout.startswith("an earlier kgdbx was killed: put back 3 places of code and 8 ")
    assert (second.stdout, first.stderr + second.stderr) == ("there is nothing to undo\n", "")
    assert (first.returncode, second.returncode) == (0, 0)
    assert vm.execute("killall caller").status == 0  # each returns through what was put back
    assert sleepers.wait(60).status == 128 + 15
    assert_no_oops(vm)


def test_journal_of_another_boot(clone_of: Callable[..., Vm]) -> None:
    vm = clone_of("6.1", 2)
    kill_holder(vm)
    journal: Path = vm.info.journal
    lines = journal.read_text().splitlines()
    first: dict[str, Any] = json.loads(lines[0])
    with attach_vm(vm.info) as session:
        assert (
            session.recovery is not None and session.recovery.patches == 3
        )  # two are where ftrace is followed
        before = text_of(session)
    first["slide"] += 0x1000000
    journal.write_text("\n".join((json.dumps(first), *lines[1:], "")))
    with attach_vm(vm.info) as session:
        assert session.recovery is not None
        assert (session.recovery.patches, session.recovery.freed_bytes) == (0, 0)
        assert text_of(session) == before
    assert not journal.exists()


def test_what_does_not_agree_stays_and_is_tried_again(clone_of: Callable[..., Vm]) -> None:
    vm = clone_of("6.1", 2)
    with attach_vm(vm.info) as session:
        before = text_of(session)
    kill_holder(vm)
    journal: Path = vm.info.journal
    true = journal.read_text()
    lines = [json.loads(line) for line in true.splitlines()]
    # As if someone else had patched the same place since.
    for line in lines:
        if "patch" in line:
            line["from"], line["to"] = "9090909090", "cccccccccc"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with attach_vm(vm.info) as session:
        assert session.recovery is not None and session.recovery.patches == 0
        assert "left as it is" in session.recovery.conflicts[0]
        assert text_of(session) != before
        session.define("r vfs_read", tier="resident")
        session.run(timeout_s=0.1)
    kept = journal.with_name(f"{journal.name}.1")
    assert kept.exists() and not journal.exists()
    kept.write_text(true)
    with attach_vm(vm.info) as session:
        assert session.recovery is not None
        assert (session.recovery.patches, session.recovery.conflicts) == (3, [])
        assert text_of(session) == before
    assert not kept.exists()
