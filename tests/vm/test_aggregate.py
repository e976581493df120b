"""``kgdbx trace --agg``: what is summed up inside a real kernel is exact."""

import json
import subprocess
import sys
from typing import Any

from kgdbx.attach import attach_vm
from kgdbx.machine.vm import Vm
from kgdbx.session import Session

FUNCTION = "__x64_sys_getpgid"
CALLS = 1009
WORK = f"caller 4 {CALLS}"


def maps(session: Session) -> dict[str, Any]:
    return {each.name: each for each in session.resident.maps.read()}


def total(each: Any) -> int:
    return sum(row.value for row in each.rows)


def test_exact_on_all_cpus(vm4: Vm) -> None:
    with attach_vm(vm4.info) as session:
        for text in (
            f"p {FUNCTION} @calls[$comm,$cpu] = count()",
            f"p {FUNCTION} @sum = sum($cpu*3-1)",
            f"p {FUNCTION} @least[$tgid] = min($cpu-2)",
            f"p {FUNCTION} @most = max((u8)($cpu-2))",
            f"p {FUNCTION} @mean = avg($cpu)",
            f"p {FUNCTION} @steps = lhist($cpu-1, 0, 2, 1)",
            f'p {FUNCTION} @two = count() if $comm == "caller-2"',
            f"p {FUNCTION} @stacks[$kstack:2,$func] = count()",
            f"p:bad {FUNCTION} @bad[+0(0x1000):u32] = count()",
            f"r {FUNCTION} @slow = hist($duration_ns)",
            f"r {FUNCTION} @many[regs->si] = lhist($retval, 0, 1000, 1)",
            f"r {FUNCTION} @result[$retval>0] = count()",
        ):
            session.define(text, tier="resident")
        command = vm4.start(WORK)
        session.run(command=command, timeout_s=100)
        assert command.poll() == 0
        command.discard()
        found = maps(session)
        calls = {row.key: row.value for row in found["calls"].rows}
        assert calls == {(f"caller-{n}", n): CALLS // 4 + (n < CALLS % 4) for n in range(4)}
        cpus = {n: CALLS // 4 + (n < CALLS % 4) for n in range(4)}
        weighed = sum(n * count for n, count in cpus.items())
        assert [row.value for row in found["sum"].rows] == [3 * weighed - CALLS]
        assert [row.value for row in found["least"].rows] == [-2]
        assert [row.value for row in found["most"].rows] == [255]
        assert [row.value for row in found["mean"].rows] == [weighed // CALLS]
        assert found["steps"].rows[0].buckets == (
            (None, 0, cpus[0]),
            (0, 1, cpus[1]),
            (1, 2, cpus[2]),
            (2, None, cpus[3]),
        )
        assert total(found["two"]) == cpus[2]
        (stack,) = found["stacks"].rows
        assert stack.value == CALLS
        assert [frame.partition("+")[0] for frame in stack.key[0]] == [FUNCTION, "do_syscall_64"]
        assert stack.key[1] == FUNCTION
        assert (found["bad"].rows, session.probes.find("kprobes/bad").nfaults) == ((), CALLS)
        assert total(found["slow"]) == CALLS
        assert found["slow"].rows[0].buckets[0][0] >= 64  # nanoseconds
        # More keys than places: what is missing is counted.
        many = found["many"]
        assert total(many) + many.lost == CALLS
        assert many.lost > 0
        assert [(row.key, row.value) for row in found["result"].rows] == [((1,), CALLS)]
        assert {each.lost for each in found.values() if each is not many} == {0}


def test_command(vm: Vm) -> None:
    argv = [sys.executable, "-m", "kgdbx", "trace", "--vm", vm.name, FUNCTION, "vfs_statx"]
    argv += ["--agg", "@n[$func] = count()", "-e", WORK, "--interval", "0.2"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    *intervals, last = done.stdout.strip().split("\n\n")
    assert f"@n[{FUNCTION}]: {CALLS}" in last.splitlines()
    shown = [line for each in intervals for line in each.splitlines() if FUNCTION in line]
    counts = [int(line.rpartition(" ")[2]) for line in shown]
    assert counts == sorted(counts)
    assert "2 functions" in done.stderr and "0 events lost" in done.stderr
    done = subprocess.run(
        [*argv[:-2], "--agg", "@c[$comm] = count()", "-o", "json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    schema, found, by_task = map(json.loads, done.stdout.splitlines())
    assert schema == {"schema": "kgdbx.map.1"}
    assert {"key": [FUNCTION], "value": CALLS} in found["rows"]
    callers = [row["value"] for row in by_task["rows"] if row["key"][0].startswith("caller-")]
    assert sum(callers) == CALLS
    done = subprocess.run(
        [*argv, "-n", "3"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "--count is for events, and --agg has none" in done.stderr
