"""A watch of modules in gdb, as people at the shell's prompt have it."""

import re
from collections.abc import Callable

from kgdbx.machine.kmod import build_kmod
from kgdbx.machine.vm import Vm
from tests.shell.test_script import commands, run


def test_a_watch_at_the_prompt(clone_of: Callable[..., Vm]) -> None:
    path = build_kmod("6.1", "watch_cases")
    vm = clone_of("6.1", 2)
    done = run(
        "--vm",
        vm.name,
        *commands(
            f"leaks watch watch-cases --ko {path}",
            "continue",
            "guest insmod /watch_cases.ko mode=calls",
            "leaks report",
            "leaks clear",
            "guest rmmod watch_cases",
            "guest insmod /watch_cases.ko mode=same times=3; rmmod watch_cases",
            "interrupt",
            "leaks unwatch",
            "leaks",
            ">>> leak(1)",
            "leaks report",
        ),
    )
    out = done.stdout
    assert re.search(r"^watch_cases: watched at \d+ functions$", out, re.M), out
    reports = re.findall(
        r"^Target module: 'watch_cases', (\w+)\nAllocations: (\d+)\n"
        r"(?:Possible leaks|Not yet freed): (\d+).*\nUnallocated frees: (\d+)",
        out,
        re.M,
    )
    expected = [("loaded", "2", "1", "0"), ("unloaded", "0", "0", "1")]
    assert reports == [*expected, *2 * [("unloaded", "3", "3", "0")]], out
    assert "+2 more allocation(s) with the same call stack." in out
    # The first one reported opens as it lies there.
    first = re.search(r"^ +1  (0x[0-9a-f]{16}) +\d+  kmalloc", out, re.M)
    assert first is not None and re.search(rf"^\*\(void \*\(\*\)\[\d+\]\){first[1]} = ", out, re.M)
    assert "no module is watched; begin with: kgdbx leaks watch MODULE" in out
    assert done.returncode == 1  # the last line
