"""Commands of several lines: where they end, and what gdb is given for them."""

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ("Block", "split_commands")

_GDB_BLOCKS = frozenset(("commands", "define", "document", "if", "while", "python", "py"))
_C_BODY = re.compile(r"\s*(?:kgdbx\s+|kx\s+)?replace\s.*\{\s*$")
_PYTHON_PROBE = re.compile(r"\s*@(kprobe|jprobe|kretprobe|watch)\b|\s*from kgdbx\.")


class Block:
    """One command, of one line or of many.

    ======================  ====================================  =========================
    it starts with          it ends with                          gdb gets
    ======================  ====================================  =========================
    ``@kprobe(...)`` etc.   an empty line                         ``kgdbx script FILE``
    ``replace FUNC {``      the matching ``}``                    ``kgdbx replace FUNC FILE``
    ``python``, ``define``  the matching ``end``                  ``source FILE``
    ``>>>`` with a ``:``    an empty line                         (evaluated)
    anything else           its line, unless that ends in ``\\``    the line
    ======================  ====================================  =========================
    """

    def __init__(self, first: str) -> None:
        self.lines = [first]
        self._kind = _kind(first)

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join(self.lines)

    @property
    def complete(self) -> bool:
        """Whether no line is missing."""
        last = self.lines[-1].strip()
        match self._kind:
            case "line":
                return not self.lines[-1].endswith("\\")
            case "c":
                return sum(line.count("{") - line.count("}") for line in self.lines) <= 0
            case "gdb":
                return self._depth() == 0
            case _:
                return len(self.lines) > 1 and not last

    def command(self, directory: Path) -> str:
        """The command in one line; what takes more is written to a file.

        :param directory: where to write it
        """
        if self._kind == "line":
            return " ".join(line.removesuffix("\\").strip() for line in self.lines)
        if self._kind == "py":
            return self.text
        if self._kind == "c":
            head = self.lines[0].strip().removesuffix("{").strip()
            head = head.partition("replace")[2].strip()
            return f"kgdbx replace {head} {_write(directory, '.c', self.lines[1:-1])}"
        if self._kind == "probe":
            imports = "from kgdbx.probes.script import jprobe, kprobe, kretprobe, watch"
            return f"kgdbx script {_write(directory, '.py', [imports, *self.lines])}"
        return f"source {_write(directory, '.gdb', self.lines)}"

    def _depth(self) -> int:
        # Python's lines are not gdb's: nothing but its end counts there.
        depth, in_python = 0, False
        for line in self.lines:
            word = line.split("#")[0].split()[:1]
            if word == ["end"]:
                depth, in_python = max(0, depth - 1), False
            elif not in_python and word and _opens(line, word[0]):
                depth += 1
                in_python = word[0] in ("python", "py", "document")
        return depth


def split_commands(lines: Iterable[str]) -> tuple[list[Block], bool]:
    """Commands of lines, such as those of a script.

    :return: the commands, and whether the last one is complete
    """
    blocks: list[Block] = []
    for line in lines:
        if blocks and not blocks[-1].complete:
            blocks[-1].lines.append(line)
        elif line.strip():
            blocks.append(Block(line))
    return blocks, not blocks or blocks[-1].complete


def _kind(first: str) -> str:
    if _PYTHON_PROBE.match(first):
        return "probe"
    if _C_BODY.match(first):
        return "c"
    if first.lstrip().startswith(">>>"):
        return "py" if first.rstrip().endswith(":") else "line"
    word = first.split()[:1]
    return "gdb" if word and _opens(first, word[0]) else "line"


def _opens(line: str, word: str) -> bool:
    if word in ("python", "py"):
        return line.strip() == word  # with an argument it is complete
    return word in _GDB_BLOCKS


def _write(directory: Path, suffix: str, lines: Iterable[str]) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", suffix=suffix, prefix="typed-", dir=directory, delete=False
    ) as file:
        file.write("\n".join(lines) + "\n")
    return Path(file.name)
