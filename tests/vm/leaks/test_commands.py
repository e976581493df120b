"""leaks scan and mark as their users run them, on a VM and on a core file of it."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kgdbx.bench.terminal import Terminal
from kgdbx.leaks.heap import read_heap
from kgdbx.machine.kmod import build_kmod


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
    look = ("drgn", "--core", str(core), "--vmlinux", str(vm.info.vmlinux), "-e")
    opened = kgdbx(*look, "for each in leaks(): print(hex(each.value_()))").stdout.split()
    of_cpus = [line for line in lines if "leak" in line and line["leak"]["cache"] == "percpu"]
    assert len(of_cpus) == 1  # its object is that of CPU 0, and the report has its offset
    (at_cpu_0,) = {int(each, 16) for each in opened} - lost(lines)
    assert lost(lines) - {int(each, 16) for each in opened} == lost(of_cpus)
    assert at_cpu_0 > 1 << 63
    status, lines = leaks("scan", "--vm", vm.name, "--since", "before", "--live")
    assert (status, lost(lines)) == (1, told)


def test_a_reported_block_is_a_drgn_object(
    planted_in: Callable[[str], Any], tmp_path: Path
) -> None:
    guest = planted_in("6.1")
    guest.load("planted_leaks")
    name = guest.vm.name
    done = kgdbx("leaks", "scan", "--vm", name)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("one more look: ")]
    words = shlex.split(line.partition(": ")[2])
    assert kgdbx(*words[1:]).stdout.startswith("*(")
    # Each of the two points to the other, and nobody to them.
    cycle = [address for address, kind in guest.told("lost").items() if kind == "cycle"]
    script = tmp_path / "look.py"
    script.write_text(
        "import sys\n"
        "a, b = (int(word, 16) for word in sys.argv[1:])\n"
        "planted = leak(a, 'struct planted')\n"
        "assert planted.type_.type_name() == 'struct planted *', planted.type_\n"
        "assert (planted.value_(), planted.other.value_()) == (a, b)\n"
        "assert leak(b + 8, 'struct planted').other == planted\n"
        "assert len(leak(a)[0]) * 8 >= planted.type_.type.size\n"
        "found = leaks()\n"
        "assert {a, b} <= {each.value_() for each in found}\n"
        "assert found == [leak(n) for n in range(1, len(found) + 1)]\n"
        "from drgn.helpers.linux.pid import find_task\n"
        "init = leak(find_task(prog, 1))\n"
        "assert init.type_.type_name() == 'struct task_struct *', init.type_\n"
        "print(init.comm.string_().decode(), planted.kref.refcount.refs.counter.value_())\n"
    )
    ko = build_kmod("6.1", "planted_leaks")
    done = kgdbx("drgn", "--vm", name, f"--ko={ko}", str(script), *map(hex, cycle))
    assert (done.returncode, done.stdout) == (0, "agent 1\n"), done.stderr
    done = kgdbx("drgn", "--vm", name, "--live", "-e", "leak(0xffff000000000000)")
    assert done.returncode == 2 and "it is in no block of the heap" in done.stderr
    done = kgdbx("drgn", "--vm", name, "-e", "leak(1000)")
    assert done.returncode == 2 and "there is no leak 1000: leaks() has " in done.stderr
    with Terminal([sys.executable, "-m", "kgdbx", "drgn", "--vm", name], columns=120) as t:
        t.wait(">>> leak(N", 90)
        t.line(f"[each.value_() for each in leaks()].index({cycle[0]}) + 1000")
        t.wait(lambda: any(re.fullmatch(r"10\d\d", line.strip()) for line in t.display()), 60)
        number = next(int(n) for n in map(str.strip, t.display()) if re.fullmatch(r"10\d\d", n))
        t.line(f"leak({number - 999}).value_() - {cycle[0]} + 4711")
        t.wait(lambda: any(line.strip() == "4711" for line in t.display()), 60)
        t.wait(lambda: t.display()[t.screen.cursor.y] == ">>>")  # readline loses ^D before it
        t.type("\x04")
        assert t.end() == 0


def test_what_cannot_be_looked_at_is_told(guest_of: Callable[..., Any], tmp_path: Path) -> None:
    guest = guest_of()
    vm, ram = guest.vm, guest.session.ram
    heap = read_heap(guest.kernel, ram)
    number = next(n for n, c in enumerate(heap.slabs.caches) if c.name == "kmalloc-64")
    (slab, *_) = np.flatnonzero((heap.slabs.cache == number) & (heap.slabs.freelist != 0)).tolist()
    place = int(heap.slabs.freelist[slab]) + heap.slabs.caches[number].free_offset
    guest.session.close()
    assert leaks("mark", "before", "--vm", vm.name)[0] == 0
    # An idle guest does not come across it.
    ram.write(place - heap.memory.direct_map, (0x1234).to_bytes(8, "little"))
    status, lines = leaks("scan", "--vm", vm.name, "--since", "before")
    assert (status, lost(lines)) == (4, set())
    (error,) = [line["error"] for line in lines if "error" in line]
    assert error.startswith("cache kmalloc-64: the freelist of the slab at ")
    bare = tmp_path / "vmlinux"
    subprocess.run(["strip", "--strip-debug", "-o", bare, vm.info.vmlinux], check=True, timeout=60)
    core = tmp_path / "core"
    with vm.qmp(60) as qmp:
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{core}")
    done = kgdbx("leaks", "scan", "--core", str(core), "--vmlinux", str(bare))
    assert done.returncode == 3 and "has no debug information" in done.stderr


def kgdbx(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kgdbx", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
