"""An audit from the command line: the verdict, and each form of the report."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

from kgdbx.machine.kmod import build_kmod
from kgdbx.machine.vm import Vm

MODULES = ("watch_leaker", "watch_cases")


def kgdbx(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kgdbx", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


def test_an_audit_fails_for_what_leaks_and_passes_for_what_does_not(
    clone_of: Callable[..., Vm], tmp_path: Path
) -> None:
    files = {name: build_kmod("6.1", name) for name in MODULES}
    vm = clone_of("6.1", 2, files={f"/{name}.ko": path for name, path in files.items()})
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

    done = kgdbx(
        *("audit", *options, "--no-scan", "--command"),
        "insmod /watch_cases.ko mode=texts && rmmod watch_cases",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PASS: watch_cases on 6.1.0-")
    assert "4 allocations, 0 possible leaks, 0 unallocated frees (watch)" in done.stdout
