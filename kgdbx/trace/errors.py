"""Errors of outputs and recordings."""

from kgdbx.errors import KgdbxError

__all__ = ("FormatError", "TraceError")


class TraceError(KgdbxError):
    """An output that cannot be made, or that has failed; the message names its path."""


class FormatError(TraceError):
    """Bytes that are not the binary format of docs/trace_format.md.

    :ivar offset_bytes: where in the file or stream
    """

    def __init__(self, message: str, name: str, offset_bytes: int) -> None:
        self.offset_bytes = offset_bytes
        super().__init__(f"{name}: at offset {offset_bytes}: {message}")
