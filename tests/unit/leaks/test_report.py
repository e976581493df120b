"""The forms of a report: exact texts and structures, and the page in a browser."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from kgdbx.leaks.report.finding import AuditReport, CacheGrowth, Finding, Trace, tell_lost
from kgdbx.leaks.report.flame import flame_of
from kgdbx.leaks.report.junit import junit_text
from kgdbx.leaks.report.kmemleak import kmemleak_text
from kgdbx.leaks.report.page import audit_page
from kgdbx.leaks.report.sarif import audit_sarif
from kgdbx.leaks.report.summary import audit_json, audit_text

PageOf = Callable[[Path], AbstractContextManager[Any]]

CALL = Trace("do_one_initcall+0x59/0x1ed", 0xFFFFFFFF81002459, "init/main.c", 1271)
OPEN = Trace("first_open+0x14/0x40 [first]", 0xFFFFFFFFC0100014, "/src/first.c", 31)
READ = Trace("first_read+0x22/0x90 [first]", 0xFFFFFFFFC0100122, "/src/<first>.c", 57)
KMALLOC = Trace("__kmalloc+0x0/0x149", 0xFFFFFFFF81300000, "mm/slab_common.c", 948)

TWICE = Finding(
    "leak",
    "first",
    "2 blocks of 600 bytes in all not freed",
    (0xFFFF888004000100, 0xFFFF888004000200),
    (200, 400),
    (KMALLOC, OPEN, CALL),
    OPEN,
    comm="insmod",
    pid=95,
    time_ns=5_000_000_000,
)
ONCE = dataclasses.replace(
    TWICE,
    message="1 block of 200 bytes not freed",
    addresses=(0xFFFF888004000300,),
    sizes=(200,),
    stack=(KMALLOC, READ, CALL),
    site=READ,
    from_interrupt=True,
)
HINT = Finding("unreferenced", "", "64 bytes that nothing points to", (4096,), (64,), failing=False)
REPORT = AuditReport(
    ("first", "second"),
    "6.1.0",
    41,
    (TWICE, ONCE, HINT),
    "insmod & rmmod",
    0,
    ("a ring was <full>",),
    ("watch", "scan"),
    (CacheGrowth("kmalloc-256", 10, 13, 256), CacheGrowth("dentry", 7, 5, 192)),
)
CLEAN = dataclasses.replace(REPORT, findings=(HINT,))


def test_the_verdict() -> None:
    assert not REPORT.passed and CLEAN.passed
    assert not dataclasses.replace(CLEAN, status=7).passed
    assert not dataclasses.replace(CLEAN, status=None).passed
    lines = audit_text(REPORT).splitlines()
    assert lines[0] == "/src/first.c:31: first: leak: 2 blocks of 600 bytes in all not freed"
    assert lines[2] == "    first_open+0x14/0x40 [first] (/src/first.c:31)"
    assert lines[-2] == "note: a ring was <full>"
    assert lines[-1] == (
        "FAIL: first, second on 6.1.0: 41 allocations, 3 possible leaks, 0 unallocated frees"
        " (watch, scan)"
    )
    assert audit_text(CLEAN).splitlines()[-1].startswith("PASS: ")
    assert "the command did not end" in audit_text(dataclasses.replace(CLEAN, status=None))


def test_what_a_loaded_module_may_yet_free() -> None:
    kept, lost = TWICE.addresses
    yet = dataclasses.replace(
        TWICE, message="2 blocks of 600 bytes in all not freed yet", failing=False
    )
    assert list(tell_lost(yet, {4096})) == [yet]
    hint = dataclasses.replace(REPORT, findings=(yet,))
    assert hint.passed and (hint.count("leak"), hint.not_freed_yet) == (2, 2)
    assert "0 possible leaks, 2 not freed yet, 0 un" in audit_text(hint).splitlines()[-1]
    assert kmemleak_text(hint) == "" and "Nothing leaks." in audit_page(hint)
    parts = tuple(tell_lost(yet, {lost}))
    assert [(f.message, f.addresses, f.sizes, f.failing) for f in parts] == [
        ("1 block of 400 bytes not freed, and nothing points there", (lost,), (400,), True),
        ("1 block of 200 bytes not freed yet", (kept,), (200,), False),
    ]
    parted = dataclasses.replace(REPORT, findings=parts)
    assert not parted.passed and (parted.count("leak"), parted.not_freed_yet) == (2, 1)
    assert kmemleak_text(parted).count("unreferenced object") == 1
    # A module that has gone frees nothing any more.
    assert list(tell_lost(TWICE, {lost})) == [TWICE]


def test_json() -> None:
    told = json.loads(json.dumps(audit_json(REPORT)))
    assert (told["passed"], told["allocations"], told["leaks"]) == (False, 41, 3)
    assert told["findings"][0]["blocks"][1] == {"address": "0xffff888004000200", "size": 400}
    assert told["findings"][0]["process"] == {"comm": "insmod", "pid": 95}
    assert told["findings"][1]["process"] is None
    assert told["findings"][0]["stack"][1]["line"] == 31


def test_junit_has_a_case_for_each_check_of_each_module() -> None:
    root = ET.fromstring(junit_text(REPORT))
    cases = {(c.get("classname"), c.get("name")): c for c in root.iter("testcase")}
    assert len(cases) == 5 and root.get("tests") == "5" and root.get("failures") == "1"
    failure = cases["kgdbx.audit.first", "watch"].find("failure")
    assert failure is not None and failure.get("type") == "leak"
    assert "/src/<first>.c:57" in (failure.text or "")
    assert cases["kgdbx.audit.second", "watch"].find("failure") is None
    assert "nothing points to" in cases["kgdbx.audit.first", "scan"].findtext("system-out", "")
    ended = ET.fromstring(junit_text(dataclasses.replace(CLEAN, status=3, command="a\x01b")))
    failure = ended.find(".//testcase[@name='command']/failure")
    assert failure is not None and (failure.get("message"), failure.text) == (
        "exit status 3",
        "a?b",
    )


def test_sarif_names_file_and_line() -> None:
    log = json.loads(json.dumps(audit_sarif(REPORT)))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert [r["level"] for r in run["results"]] == ["error", "error", "note"]
    for result in run["results"]:
        rule = run["tool"]["driver"]["rules"][result["ruleIndex"]]
        assert rule["id"] == result["ruleId"]
    place = run["results"][0]["locations"][0]["physicalLocation"]
    assert place == {
        "artifactLocation": {"uri": "file:///src/first.c"},
        "region": {"startLine": 31},
    }
    assert "locations" not in run["results"][2]
    # Another boot, other addresses, the same finding
    moved = dataclasses.replace(
        TWICE, stack=tuple(dataclasses.replace(t, address=1) for t in TWICE.stack)
    )
    again = audit_sarif(dataclasses.replace(REPORT, findings=(moved, ONCE)))["runs"][0]["results"]
    prints = [r["partialFingerprints"]["stack/v1"] for r in run["results"]]
    assert [r["partialFingerprints"]["stack/v1"] for r in again] == prints[:2]
    assert prints[0] != prints[1]


def test_kmemleak() -> None:
    assert kmemleak_text(CLEAN).count("unreferenced object") == 1
    text = kmemleak_text(dataclasses.replace(REPORT, findings=(TWICE,)))
    assert text.splitlines()[:5] == [
        "unreferenced object 0xffff888004000100 (size 200):",
        '  comm "insmod", pid 95, jiffies 4294893546',
        "  backtrace:",
        "    [<ffffffff81300000>] __kmalloc+0x0/0x149",
        "    [<ffffffffc0100014>] first_open+0x14/0x40 [first]",
    ]
    assert text.count("unreferenced object") == 2


def test_a_flame_adds_up() -> None:
    flame = flame_of([(1, TWICE), (2, ONCE)])
    assert flame is not None and (flame.value, flame.depth) == (800, 4)
    (call,) = flame.children.values()
    assert {n: (c.value, c.finding) for n, c in call.children.items()} == {
        "first_open [first]": (600, 1),
        "first_read [first]": (200, 2),
    }
    assert flame_of([]) is None


@pytest.mark.timeout(600)
def test_the_page_in_a_browser(page_of: PageOf, tmp_path: Path) -> None:
    path = tmp_path / "audit.html"
    path.write_text(audit_page(REPORT), "utf-8")
    with page_of(path) as page:
        assert page.value("document.getElementById('verdict').textContent") == "failed"
        # The flame: widths are shares of the bytes, each level below the one before
        boxes = page.value(
            "[...document.querySelectorAll('.bar')].map(b => { const r = b.getBoundingClientRect();"
            " return [b.textContent, r.width, r.top, r.height] })"
        )
        wide = {text: width for text, width, _, _ in boxes if text != "__kmalloc"}
        assert list(wide) == [
            "all",
            "do_one_initcall",
            "first_open [first]",
            "first_read [first]",
        ]
        assert wide["all"] > 500
        assert wide["first_open [first]"] == pytest.approx(wide["all"] * 0.75, abs=1)
        assert wide["first_read [first]"] == pytest.approx(wide["all"] * 0.25, abs=1)
        assert all(height > 10 for _, _, _, height in boxes)
        assert len({top for _, _, top, _ in boxes}) == 4
        bars = page.value(
            "[...document.querySelectorAll('.chart div')].map(b => [b.className,"
            " b.getBoundingClientRect().width])"
        )
        assert [kind for kind, _ in bars] == ["more", "less"]
        assert bars[1][1] == pytest.approx(bars[0][1] * 384 / 768, abs=1)
        # Links lead to what is there
        targets = page.value("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
        assert len(targets) > 5 and all(re.fullmatch("#[a-z0-9-]+", t) for t in targets)
        assert page.value(
            "[...document.querySelectorAll('a')].every(a => document.querySelector(a.hash))"
        )
        page.value("[...document.querySelectorAll('.bar')].at(-2).click()")
        assert page.value("document.querySelector(':target h3').textContent").endswith(ONCE.message)
        assert "/src/<first>.c:57" in page.value(
            "document.querySelector(':target pre').textContent"
        )
        assert {url.partition("#")[0] for url in page.requests} == {path.as_uri()}
        assert page.complaints == []
