"""What was changed in a guest, on disk before it is changed: who comes next can put it back.

One JSON object a line. A journal belongs to one boot of one guest; it is believed only as far as
the guest's memory agrees with it.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kgdbx.errors import CommandError

__all__ = ("Journal", "Patch", "read_journal")

_VERSION = 1
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Patch:
    """Bytes of code that were replaced.

    :ivar address: guest-virtual
    """

    address: int
    original: bytes
    replacement: bytes


class Journal:
    """Writes what is about to be done.

    :param path: None keeps no journal: nothing can be put back after a SIGKILL
    """

    def __init__(self, path: Path | None, **facts: Any) -> None:
        self._path = path
        self._fd = -1
        if path is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(path, flags, 0o600)
            self._write([{"kgdbx": "journal", "version": _VERSION, **facts}])

    def patches(self, patches: Iterable[Patch]) -> None:
        """Note patches before they are written."""
        self._write(
            {"patch": p.address, "from": p.original.hex(), "to": p.replacement.hex()}
            for p in patches
        )

    def restored(self, addresses: Iterable[int]) -> None:
        """Note that the original bytes are back."""
        self._write({"restored": address} for address in addresses)

    def note(self, **record: Any) -> None:
        """Note memory that was taken: ``blocks``, ``percpu``, ``window``, ``code``, ``slots``; and
        slots that are gone: ``no_slots``.
        """
        self._write([record])

    def close(self) -> None:
        """All is put back: there is nothing to recover."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            assert self._path is not None
            self._path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Keep the file: something could not be put back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, records: Iterable[dict[str, Any]]) -> None:
        if self._fd >= 0:
            text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
            os.write(self._fd, text.encode())


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a journal; an unfinished last line is left out.

    :raises CommandError: if it is no journal of ours
    """
    data = path.read_bytes()[:_MAX_BYTES]
    lines = data.split(b"\n")[:-1]
    try:
        records = [json.loads(line) for line in lines]
        if records and not (
            records[0].get("kgdbx") == "journal" and records[0].get("version") == _VERSION
        ):
            raise ValueError
    except (ValueError, AttributeError) as e:
        raise CommandError(f"{path} is not a journal of this version of kgdbx") from e
    yield from records
