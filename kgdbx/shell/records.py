"""gdb's output under the machine interface: bytes to records, however the bytes are cut."""

import re
from typing import Any, Literal, NamedTuple

from pygdbmi import gdbmiparser

__all__ = ("Kind", "Record", "RecordReader", "quote")

Kind = Literal["result", "async", "console", "log", "target", "prompt", "raw"]
"""What a record is; ``raw`` is a line that is none: of a program that gdb runs."""

_STREAMS: dict[int, Kind] = {ord("~"): "console", ord("&"): "log", ord("@"): "target"}
_STRUCTURED = re.compile(rb"(\d*)([\^*+=])([a-z][a-z0-9-]*)(,|$)")
_ESCAPE = re.compile(rb"\\([0-7]{3}|.)", re.DOTALL)
_LETTERS = {
    b"n": b"\n",
    b"t": b"\t",
    b"r": b"\r",
    b"a": b"\a",
    b"b": b"\b",
    b"f": b"\f",
    b"v": b"\v",
    b"e": b"\x1b",
}


class Record(NamedTuple):
    """One line of gdb's output.

    :ivar name: class of a result (``done``) or of an asynchronous record (``stopped``)
    :ivar text: text of a stream, or the line as it came
    :ivar results: what a result or asynchronous record tells
    :ivar token: number of the request that a result answers
    """

    kind: Kind
    name: str = ""
    text: str = ""
    results: dict[str, Any] = {}  # noqa: RUF012
    token: int | None = None


class RecordReader:
    """Makes records of bytes as they come, in pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Record]:
        """The records that end in *data*."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        return [_record(line.removesuffix(b"\r")) for line in lines]

    def finish(self) -> list[Record]:
        """What is left of a gdb that ended in the middle of a line."""
        rest, self._rest = self._rest, b""
        return [_record(rest)] if rest else []


def quote(text: str) -> str:
    """Text as a C string of a request: line breaks and quotes escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _record(line: bytes) -> Record:
    stream = _STREAMS.get(line[0]) if len(line) > 2 and line[1] == 34 and line[-1] == 34 else None
    if stream is not None:
        return Record(stream, text=_unescape(line[2:-1]))
    text = line.decode("utf-8", "replace")
    if text.rstrip() == "(gdb)":
        return Record("prompt", text=text)
    match = _STRUCTURED.match(line)
    if match is None:
        return Record("raw", text=text)
    try:
        parsed = gdbmiparser.parse_response(text)
    except Exception:
        # The parser has no errors of its own. What it cannot read is shown as it came.
        return Record("raw", text=text)
    kind: Kind = "result" if match[2] == b"^" else "async"
    token = int(match[1]) if match[1] else None
    return Record(kind, match[3].decode(), text, parsed["payload"] or {}, token)


def _unescape(data: bytes) -> str:
    if b"\\" in data:
        data = _ESCAPE.sub(_unescaped, data)
    return data.decode("utf-8", "replace")


def _unescaped(match: re.Match[bytes]) -> bytes:
    code = match[1]
    if len(code) == 3:
        return bytes((int(code, 8) & 0xFF,))
    return _LETTERS.get(code, code)
