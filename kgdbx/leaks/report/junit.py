"""An audit as JUnit's XML: a test case for each check, as CI systems show them."""

import re
import xml.etree.ElementTree as ET

from kgdbx.leaks.report.finding import AuditReport, Finding

__all__ = ("junit_text",)

_CASES = {
    "watch": ("leak", "freed-late", "unallocated-free"),
    "scan": ("unreferenced",),
    "dangling": ("dangling",),
}
# XML 1.0, section 2.2: what a document cannot hold, not even escaped
_FORBIDDEN = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_text(report: AuditReport) -> str:
    """The XML of a report."""
    suites = ET.Element("testsuites")
    suite = ET.SubElement(suites, "testsuite", name="kgdbx audit")
    failures = 0
    for module in report.modules:
        for check in report.checks:
            case = ET.SubElement(suite, "testcase", classname=f"kgdbx.audit.{module}", name=check)
            found = [f for f in report.findings if f.rule in _CASES[check] and _concerns(f, module)]
            failing = [f for f in found if f.failing]
            failures += bool(failing)
            if failing:
                message = "; ".join(f"{f.rule}: {f.message}" for f in failing)
                failure = ET.SubElement(case, "failure", type=failing[0].rule, message=message)
                failure.text = "\n\n".join(map(_told, failing))
            hints = [f for f in found if not f.failing]
            if hints or report.notes:
                out = ET.SubElement(case, "system-out")
                out.text = "\n\n".join([*report.notes, *map(_told, hints)])
    case = ET.SubElement(suite, "testcase", classname="kgdbx.audit", name="command")
    if report.status != 0:
        failures += 1
        said = "it did not end" if report.status is None else f"exit status {report.status}"
        failure = ET.SubElement(case, "failure", type="command", message=said)
        failure.text = report.command
    for element in (suites, suite):
        element.set("tests", str(len(suite.findall("testcase"))))
        element.set("failures", str(failures))
        element.set("errors", "0")
    ET.SubElement(suite, "system-out").text = f"{report.allocations} allocations"
    for element in suites.iter():
        element.text = _FORBIDDEN.sub("?", element.text) if element.text else None
        for key, value in element.attrib.items():
            element.set(key, _FORBIDDEN.sub("?", value))
    ET.indent(suites)
    text = ET.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _concerns(finding: Finding, module: str) -> bool:
    return finding.module in ("", module)


def _told(finding: Finding) -> str:
    lines = [f"{finding.rule}: {finding.message}"]
    lines += [f"  {line.text}{f' ({line.place})' if line.place else ''}" for line in finding.stack]
    return "\n".join(lines)
