"""leaks scan and mark as their users run them, on a VM and on a core file of it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def leaks(*arguments: str, timeout_s: float = 60) -> tuple[int, list[dict[str, Any]]]:
    argv = [sys.executable, "-m", "kgdbx", "leaks", *arguments, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    first, *lines = map(json.loads, done.stdout.splitlines())
    assert first == {"schema": "kgdbx.leaks.1"}, done.stderr
    return done.returncode, lines


def lost(lines: list[dict[str, Any]]) -> set[int]:
    return {int(line["leak"]["address"], 16) for line in lines if "leak" in line}


def test_since_a_mark_and_in_a_core_file(planted_in: Callable[[str], Any], tmp_path: Path) -> None:
    guest = planted_in("6.1")
    vm = guest.vm
    status, _ = leaks("mark", "before", "--vm", vm.name)
    assert status == 0
    guest.load("planted_leaks")
    told = set(guest.told("lost"))
    status, lines = leaks("scan", "--vm", vm.name, "--since", "before")
    assert (status, lost(lines)) == (1, told)
    growth = {line["growth"]["cache"]: line["growth"] for line in lines if "growth" in line}
    assert (growth["planted_own"]["objects"], growth["planted_own"]["more_objects"]) == (1, 1)
    core = tmp_path / "core"
    with vm.qmp(60) as qmp:
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{core}")
    status, lines = leaks("scan", "--core", str(core), "--vmlinux", str(vm.info.vmlinux))
    assert status == 1
    assert told <= lost(lines)
    status, lines = leaks("scan", "--vm", vm.name, "--since", "before", "--live")
    assert (status, lost(lines)) == (1, told)
