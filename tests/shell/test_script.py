"""The shell without a terminal: commands of -c and of a file, exit status, transcripts."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kgdbx.machine.vm import Vm

FUNCTION = "__x64_sys_getpgid"
EVENT = re.compile(rf"p_{FUNCTION}_0: \({FUNCTION}\+0x0/0x\w+\) \$comm=\"caller-[01]\"")


def run(*arguments: str, script: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "kgdbx", "shell", *arguments],
        input=script,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


def commands(*lines: str) -> list[str]:
    return [word for line in lines for word in ("-c", line)]


def test_counts_and_a_transcript_that_does_it_again(vm: Vm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = (
        f'kprobe {FUNCTION} $comm if $comm ~ "caller*"',
        "continue",
        "guest caller 2 211",
        "interrupt",
        ">>> [p.hits for p in session.probes]",
        ">>> find_task(1).comm",
        "set $answer = 41",
        ">>> $answer + 1",
        "kprobe $answer_is_no_function",
    )
    done = run("--vm", vm.name, "--log", str(log), *commands(*lines))
    again = run("--vm", vm.name, script=log.read_text())
    for each in (done, again):
        assert len(EVENT.findall(each.stdout)) == 211, each.stdout
        assert "\n[211]\n" in each.stdout
        assert '(char [16])"agent"' in each.stdout
        assert "\n(int)42\n" in each.stdout
        assert each.returncode == 1  # the last line is no probe
    typed = [line for line in log.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in typed if not line.startswith("wait ")] == list(lines)
    assert vm.execute("caller 1 7").output.startswith("7 ")  # unpatched, and running


def test_over_kgdb(clone_of: Callable[..., Vm]) -> None:
    vm = clone_of("kgdb", 2)
    lines = (
        f'kprobe {FUNCTION} $comm if $comm ~ "caller*"',
        "continue",
        "guest caller 2 23",
        "interrupt",
        "sessions",
        "stop",
        "tasks",
    )
    done = run("--vm", vm.name, "--kgdb", *commands(*lines))
    assert done.returncode == 0, done.stdout
    assert len(EVENT.findall(done.stdout)) == 23, done.stdout
    assert re.search(rf"1  {vm.name} +stopped +kgdb_\S+ +1 +23 +kgdb:{vm.name}", done.stdout), (
        done.stdout
    )
    assert re.search("#[0-9]+ +__handle_sysrq", done.stdout)
    assert re.search("kthreadd", done.stdout)
    assert vm.execute("caller 1 7", timeout_s=60).output.startswith("7 ")


def test_without_a_kernel() -> None:
    done = run(*commands("print 6*7", "python", "kgdbx list", "print 1"))
    assert done.returncode == 1
    assert "not complete" in done.stdout
    done = run(
        script="python\nfor n in (1, 2):\n  print('line', n)\nend\nprint 6*7\nkgdbx list\np 1\n"
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-4:-1] == ["line 1", "line 2", "$1 = 42"]
    assert "no kernel is attached" in done.stdout
    assert run(*commands("print 6*7", "quit", "nonsense")).returncode == 0
    assert run("--vm", "nosuch", "-c", "p 1").returncode == 3
    assert run("--connect", "localhost:1", "-c", "p 1").returncode == 2
