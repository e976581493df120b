"""An audit as SARIF 2.1.0, which code review tools show at the lines that it names.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/
"""

import hashlib
import importlib.metadata
from typing import Any

from kgdbx.leaks.report.finding import RULES, AuditReport, Finding, Trace

__all__ = ("audit_sarif",)

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def audit_sarif(report: AuditReport) -> dict[str, Any]:
    """The log of a report, for ``json.dumps()``."""
    rules = [{"id": rule, "shortDescription": {"text": meaning}} for rule, meaning in RULES.items()]
    notes = [{"level": "warning", "message": {"text": note}} for note in report.notes]
    invocation: dict[str, Any] = {"executionSuccessful": report.status == 0}
    if report.command:
        invocation["commandLine"] = report.command
    if report.status is not None:
        invocation["exitCode"] = report.status
    if notes:
        invocation["toolExecutionNotifications"] = notes
    driver = {"name": "kgdbx", "version": importlib.metadata.version("kgdbx"), "rules": rules}
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "columnKind": "unicodeCodePoints",
        "results": [_result(finding) for finding in report.findings],
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(finding: Finding) -> dict[str, Any]:
    whose = f"{finding.module}: " if finding.module else ""
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": list(RULES).index(finding.rule),
        "level": "error" if finding.failing else "note",
        "message": {"text": f"{whose}{finding.message}"},
        "partialFingerprints": {"stack/v1": _fingerprint(finding)},
        "occurrenceCount": len(finding.addresses) or 1,
    }
    if finding.site is not None:
        result["locations"] = [_location(finding.site)]
    if finding.stack:
        frames = [{"location": _location(line)} for line in finding.stack]
        result["stacks"] = [{"message": {"text": "allocated or freed here"}, "frames": frames}]
    return result


def _location(line: Trace) -> dict[str, Any]:
    location: dict[str, Any] = {
        "logicalLocations": [{"name": line.function, "kind": "function"}],
        "message": {"text": line.text},
    }
    if line.file:
        absolute = line.file.startswith("/")
        location["physicalLocation"] = {
            "artifactLocation": {"uri": f"file://{line.file}" if absolute else line.file},
            "region": {"startLine": line.line},
        }
    return location


def _fingerprint(finding: Finding) -> str:
    # The same code gives the same one, wherever the kernel lies today.
    words = "\n".join((finding.rule, finding.module, *(line.function for line in finding.stack)))
    return hashlib.sha256(words.encode()).hexdigest()[:32]
