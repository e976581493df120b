"""An audit as one HTML page: what leaks, where from, and which caches grew. Nothing is fetched."""

import html
from collections.abc import Iterator
from importlib import resources

from kgdbx.leaks.report.finding import AuditReport, CacheGrowth, Finding
from kgdbx.leaks.report.flame import Flame, flame_of

__all__ = ("audit_page",)

_MOST_CACHES = 20
_ROW = 18  # pixels


def audit_page(report: AuditReport) -> str:
    """The page of a report."""
    template = resources.files("kgdbx.leaks.report").joinpath("page.html").read_text("utf-8")
    parts = {
        "TITLE": html.escape(f"{', '.join(report.modules)}: audit"),
        "VERDICT": "passed" if report.passed else "failed",
        "SUMMARY": _summary(report),
        "FINDINGS": "".join(_finding(n, f) for n, f in enumerate(report.findings, 1)),
        "FLAME": _flame(report),
        "CACHES": _caches(report.caches),
    }
    for name, text in parts.items():
        template = template.replace(f"@{name}@", text)
    return template


def _summary(report: AuditReport) -> str:
    rows = [
        ("kernel", report.kernel),
        ("command", report.command or "none"),
        ("allocations", f"{report.allocations:,}"),
        ("possible leaks", f"{report.count('leak') - report.not_freed_yet:,}"),
        *([("not freed yet", f"{report.not_freed_yet:,}")] if report.not_freed_yet else []),
        ("unallocated frees", f"{report.count('unallocated-free'):,}"),
        ("looked for", ", ".join(report.checks)),
        *(("note", note) for note in report.notes),
    ]
    return "".join(f"<tr><th>{html.escape(k)}<td>{html.escape(v)}" for k, v in rows)


def _finding(number: int, finding: Finding) -> str:
    whose = f"{finding.module}: " if finding.module else ""
    level = "failing" if finding.failing else "hint"
    stack = "\n".join(
        html.escape(f"{line.text}{f'  {line.place}' if line.place else ''}")
        for line in finding.stack
    )
    who = "an interrupt" if finding.from_interrupt else f"{finding.comm} ({finding.pid})"
    more = f"<p>by {html.escape(who)}" if finding.stack else ""
    title = html.escape(f"{whose}{finding.rule}: {finding.message}")
    return (
        f'<section class="finding {level}" id="finding-{number}"><h3>{title}</h3>{more}'
        f"<pre>{stack}</pre></section>\n"
    )


def _flame(report: AuditReport) -> str:
    leaks = [(n, f) for n, f in enumerate(report.findings, 1) if f.rule == "leak" and f.failing]
    flame = flame_of([(n, f) for n, f in leaks if f.stack])
    if flame is None:
        return "<p>Nothing leaks."
    height = _ROW * flame.depth
    bars = "".join(_bars(flame, 0.0, 100.0, 0, flame.value))
    return f'<div class="flame" style="height:{height}px">{bars}</div>'


def _bars(flame: Flame, left: float, width: float, level: int, whole: int) -> Iterator[str]:
    share = 100 * flame.value / whole if whole else 0
    label = html.escape(flame.name)
    title = f"{label}: {flame.value:,} bytes, {share:.1f} %"
    style = f"left:{left:.4f}%;width:{width:.4f}%;top:{level * _ROW}px"
    yield (
        f'<a class="bar" href="#finding-{flame.finding}" style="{style}" title="{title}">'
        f"{label}</a>"
    )
    for child in flame.children.values():
        part = width * child.value / flame.value
        yield from _bars(child, left, part, level + 1, whole)
        left += part


def _caches(caches: tuple[CacheGrowth, ...]) -> str:
    grown = sorted((c for c in caches if c.growth_bytes), key=lambda c: -abs(c.growth_bytes))
    if not grown:
        return "<p>No cache grew, or none was looked at."
    most = max(abs(c.growth_bytes) for c in grown)
    rows = "".join(_cache(cache, most) for cache in grown[:_MOST_CACHES])
    rest = len(grown) - _MOST_CACHES
    more = f"<p>{rest} more changed by less." if rest > 0 else ""
    return f'<table class="caches">{rows}</table>{more}'


def _cache(cache: CacheGrowth, most: int) -> str:
    width = 100 * abs(cache.growth_bytes) / most
    kind = "more" if cache.growth_bytes > 0 else "less"
    return (
        f"<tr><th>{html.escape(cache.name)}<td>{cache.after - cache.before:+,}"
        f"<td>{cache.growth_bytes:+,} bytes"
        f'<td class="chart"><div class="{kind}" style="width:{width:.2f}%"></div>\n'
    )
