"""Leaked bytes by stack, as a tree: the outermost caller at its root."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from kgdbx.leaks.report.finding import Finding

__all__ = ("Flame", "flame_of")


@dataclass
class Flame:
    """One function on a path from the outside.

    :ivar value: bytes that leak below it; a block of unknown size counts as one
    :ivar finding: number of the first finding below it
    """

    name: str
    finding: int
    value: int = 0
    children: dict[str, "Flame"] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Levels, itself included."""
        return 1 + max((child.depth for child in self.children.values()), default=0)


def flame_of(findings: Iterable[tuple[int, Finding]]) -> Flame | None:
    """The tree of some findings with their numbers; None if there are none."""
    root: Flame | None = None
    for number, finding in findings:
        root = root or Flame("all", number)
        value = sum(size or 1 for size in finding.sizes)
        node = root
        node.value += value
        for line in reversed(finding.stack):
            module = line.text.partition("[")[2]
            name = f"{line.function} [{module}" if module else line.function
            node = node.children.setdefault(name, Flame(name, number))
            node.value += value
    return root
