"""leaks scan and mark as their users run them, on a VM and on a core file of it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCKS = 7


def leaks(*arguments: str, timeout_s: float = 60) -> tuple[int, list[dict[str, Any]]]:
    argv = [sys.executable, "-m", "kgdbx", "leaks", *arguments, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    first, *lines = map(json.loads, done.stdout.splitlines())
    assert first == {"schema": "kgdbx.leaks.1"}, done.stderr
    return done.returncode, lines


def lost(lines: list[dict[str, Any]]) -> set[str]:
    return {
        line["leak"]["address"]
        for line in lines
        if "leak" in line and line["leak"]["cache"] == "kmalloc-256"
    }


def test_since_a_mark_and_in_a_core_file(planted_in: Callable[[str], Any], tmp_path: Path) -> None:
    vm = planted_in("6.1").vm
    status, _ = leaks("mark", "before", "--vm", vm.name)
    assert status == 0
    done = vm.execute(f"insmod /leak_kmalloc.ko blocks={BLOCKS}")
    assert done.status == 0, done.output
    status, lines = leaks("scan", "--vm", vm.name, "--since", "before")
    addresses = lost(lines)
    assert (status, len(addresses)) == (1, BLOCKS)
    growth = {line["growth"]["cache"]: line["growth"] for line in lines if "growth" in line}
    assert growth["kmalloc-256"]["more_objects"] >= 2 * BLOCKS  # it keeps as many as it loses
    core = tmp_path / "core"
    with vm.qmp(60) as qmp:
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{core}")
    status, lines = leaks("scan", "--core", str(core), "--vmlinux", str(vm.info.vmlinux))
    assert (status, lost(lines)) == (1, addresses)
    status, lines = leaks("scan", "--vm", vm.name, "--since", "before", "--live")
    assert (status, lost(lines)) == (1, addresses)
