"""An audit as plain data, and as a few lines."""

from collections.abc import Iterator
from typing import Any

from kgdbx.leaks.report.finding import AuditReport, Finding, Trace

__all__ = ("audit_json", "audit_text")


def audit_json(report: AuditReport) -> dict[str, Any]:
    """The whole report, for ``json.dumps()``."""
    return {
        "modules": list(report.modules),
        "kernel": report.kernel,
        "command": report.command,
        "status": report.status,
        "passed": report.passed,
        "checks": list(report.checks),
        "allocations": report.allocations,
        "leaks": report.count("leak"),
        "not_freed_yet": report.not_freed_yet,
        "unallocated_frees": report.count("unallocated-free"),
        "notes": list(report.notes),
        "findings": [_finding(finding) for finding in report.findings],
        "caches": [
            {
                "name": cache.name,
                "before": cache.before,
                "after": cache.after,
                "object_bytes": cache.object_bytes,
            }
            for cache in report.caches
        ],
    }


def audit_text(report: AuditReport) -> str:
    """The report in lines: the verdict last."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: AuditReport) -> Iterator[str]:
    for finding in report.findings:
        yield from _told(finding)
    for note in report.notes:
        yield f"note: {note}"
    if report.status != 0:
        status = "did not end" if report.status is None else f"ended with status {report.status}"
        yield f"the command {status}"
    yet, frees = report.not_freed_yet, report.count("unallocated-free")
    leaks = report.count("leak") - yet
    still = f"{yet:,} not freed yet, " if yet else ""
    yield (
        f"{'PASS' if report.passed else 'FAIL'}: {', '.join(report.modules)} on {report.kernel}: "
        f"{report.allocations:,} allocations, {leaks:,} possible leaks, {still}"
        f"{frees:,} unallocated frees ({', '.join(report.checks)})"
    )


def _told(finding: Finding) -> Iterator[str]:
    whose = f"{finding.module}: " if finding.module else ""
    where = f"{finding.site.place}: " if finding.site and finding.site.place else ""
    yield f"{where}{whose}{finding.rule}: {finding.message}"
    yield from (
        f"    {line.text}{f' ({line.place})' if line.place else ''}" for line in finding.stack
    )
    if finding.freed_by:
        yield "  freed by"
        yield from (f"    {line.text}" for line in finding.freed_by)


def _finding(finding: Finding) -> dict[str, Any]:
    data: dict[str, Any] = {
        "rule": finding.rule,
        "module": finding.module,
        "message": finding.message,
        "failing": finding.failing,
        "direct": finding.direct,
        "blocks": [
            {"address": f"{address:#x}", "size": size or None}
            for address, size in zip(finding.addresses, finding.sizes, strict=True)
        ],
        "process": None if finding.from_interrupt else {"comm": finding.comm, "pid": finding.pid},
        "time_ns": finding.time_ns,
        "stack": [_trace(line) for line in finding.stack],
    }
    if finding.freed_by:
        data["freed_by"] = [_trace(line) for line in finding.freed_by]
    return data


def _trace(line: Trace) -> dict[str, Any]:
    data: dict[str, Any] = {"text": line.text, "address": f"{line.address:#x}"}
    return data | ({"file": line.file, "line": line.line} if line.file else {})
