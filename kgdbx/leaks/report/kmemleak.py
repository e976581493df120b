"""Leaks in the words of the kernel's kmemleak, which commit messages quote: mm/kmemleak.c."""

from collections.abc import Iterator

from kgdbx.leaks.report.finding import AuditReport, Finding, Trace

__all__ = ("kmemleak_text",)

_RULES = ("leak", "unreferenced")
_HZ = 250  # of Debian's kernels; kmemleak shows jiffies, which begin 5 minutes before they wrap
_FIRST_JIFFY = (1 << 32) - 300 * _HZ


def kmemleak_text(report: AuditReport) -> str:
    """The leaks of a report; empty if there are none."""
    blocks = [line for finding in report.findings for line in _finding(finding)]
    return "\n".join(blocks) + "\n" if blocks else ""


def _finding(finding: Finding) -> Iterator[str]:
    may_be_none = finding.rule == "leak" and not finding.failing
    if finding.rule not in _RULES or may_be_none:
        return
    jiffies = _FIRST_JIFFY + finding.time_ns * _HZ // 10**9
    comm, pid = ("hardirq", 0) if finding.from_interrupt else (finding.comm, finding.pid)
    for address, size in zip(finding.addresses, finding.sizes, strict=True):
        yield f"unreferenced object {address:#018x} (size {size}):"
        yield f'  comm "{comm}", pid {pid}, jiffies {jiffies}'
        if finding.stack:
            yield "  backtrace:"
        yield from (f"    {_line(line)}" for line in finding.stack)


def _line(line: Trace) -> str:
    return f"[<{line.address:016x}>] {line.text}"
