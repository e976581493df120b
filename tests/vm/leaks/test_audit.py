"""An audit from the command line: the verdict, and each form of the report."""

import json
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

from kgdbx.machine.kmod import build_kmod
from kgdbx.machine.vm import Vm

MODULES = ("watch_leaker", "watch_cases")
KMODS = (*MODULES, "left_behind")


def kgdbx(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kgdbx", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


def test_an_audit_fails_for_what_leaks_and_passes_for_what_does_not(
    clone_of: Callable[..., Vm], tmp_path: Path
) -> None:
    files = {name: build_kmod("6.1", name) for name in KMODS}
    vm = clone_of("6.1", 2)
    options = ["--vm", vm.info.name, "--modules", ",".join(MODULES)]
    options += [f"--ko={path}" for path in files.values()]
    outputs = {name: tmp_path / name for name in ("junit", "sarif", "kmemleak", "html")}
    forms = [f"--{name}={path}" for name, path in outputs.items()]
    script = tmp_path / "script.sh"
    script.write_text("insmod /watch_leaker.ko\nrmmod watch_leaker\n")

    done = kgdbx("audit", *options, *forms, "--json", str(script))
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert (told["allocations"], told["leaks"], told["unallocated_frees"]) == (16, 4, 0)
    assert told["checks"] == ["watch", "scan", "dangling"] and not told["passed"]
    leaks = [f for f in told["findings"] if f["rule"] == "leak"]
    sizes = sorted(block["size"] for leak in leaks for block in leak["blocks"])
    assert sizes == [40, 40, 40, 32768]
    assert all(len(leak["stack"]) > 4 for leak in leaks), leaks
    # What nothing points to is told of once.
    found = [block["address"] for f in told["findings"] for block in f["blocks"]]
    assert len(found) == len(set(found))
    assert sum(cache["after"] - cache["before"] for cache in told["caches"]) != 0

    case = ET.parse(outputs["junit"]).find(".//testcase[@name='watch']")
    assert case is not None and case.find("failure") is not None
    (run,) = json.loads(outputs["sarif"].read_text())["runs"]
    assert run["results"][0]["level"] == "error"
    for result in run["results"][:4]:
        place = result["locations"][0]["physicalLocation"]
        assert place["artifactLocation"]["uri"].endswith("watch_leaker.c")
        text = Path("vm/kmod/watch_leaker.c").read_text().splitlines()
        assert re.search("alloc|get_free|kmemdup", text[place["region"]["startLine"] - 1])
    blocks = outputs["kmemleak"].read_text()
    assert len(re.findall(r"^unreferenced object 0x[0-9a-f]{16} \(size \d+\):$", blocks, re.M)) >= 4
    assert 'comm "insmod"' in blocks and "watch_leaker_init+0x" in blocks
    assert "watch_leaker_init [watch_leaker]" in outputs["html"].read_text()

    # Another module has left pointers to where this one is put.
    done = vm.execute("insmod /left_behind.ko && rmmod left_behind", timeout_s=60)
    assert done.status == 0, done.output
    command = "insmod /watch_cases.ko mode=texts && rmmod watch_cases"
    done = kgdbx("audit", *options, "--command", command)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("PASS: watch_cases on 6.1.0-")
    assert (
        "4 allocations, 0 possible leaks, 0 unallocated frees (watch, scan, dangling)"
        in done.stdout
    )
    done = kgdbx("audit", *options, "--no-scan", "--command", command)
    assert done.returncode == 0, done.stdout
    assert "4 allocations, 0 possible leaks, 0 unallocated frees (watch)" in done.stdout

    # It stays, and keeps 32 of 70 blocks: the others nobody can free any more.
    command = "insmod /watch_cases.ko mode=same times=70"
    done = kgdbx("audit", *options, "--json", "--command", command)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert told["notes"] == ["still loaded: watch_cases; what is not freed yet may be freed later"]
    # An old pointer may hide one of what is lost.
    assert told["leaks"] == 70 and 32 <= told["not_freed_yet"] < 40
    of_module = [f for f in told["findings"] if f["rule"] == "leak"]
    assert {(f["failing"], f["message"].partition("not ")[2]) for f in of_module} == {
        (True, "freed, and nothing points there"),
        (False, "freed yet"),
    }


def test_watch_obeys_its_standard_input(clone_of: Callable[..., Vm]) -> None:
    path = build_kmod("6.1", "watch_cases")
    vm = clone_of("6.1", 2)
    argv = ["leaks", "watch", "watch_cases", "--vm", vm.info.name, "--stdin", "--json"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "kgdbx", *argv, "--ko", str(path)]
    with subprocess.Popen(command, **pipes, text=True) as watch:
        assert watch.stdin is not None and watch.stdout is not None and watch.stderr is not None

        def order(text: str) -> None:
            watch.stdin.write(text)
            watch.stdin.flush()

        try:
            order("flush\n")
            assert watch.stderr.readline() == "kgdbx: no module was loaded yet\n"
            vm.execute("insmod /watch_cases.ko mode=calls", timeout_s=60)
            order("flush\n")
            told = json.loads(watch.stdout.readline())
            assert (told["allocations"], told["leaks"]) == (2, 1)
            assert told["findings"][0]["message"] == "1 block of 80 bytes not freed yet"
            order("clear\nflush\n")
            told = json.loads(watch.stdout.readline())
            assert (told["allocations"], told["leaks"]) == (0, 0)
            vm.execute("rmmod watch_cases", timeout_s=60)
            told = json.loads(watch.stdout.readline())
            assert (told["leaks"], told["unallocated_frees"]) == (0, 1)
            assert told["findings"][0]["stack"][1]["text"].startswith("watch_cases_exit+")
            watch.send_signal(signal.SIGINT)
            assert watch.wait(60) == 1
        finally:
            watch.kill()
