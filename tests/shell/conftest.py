"""The shell in a terminal, as a person has it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kgdbx.bench.terminal import Terminal


@pytest.fixture
def shell_in(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Function that starts the shell: ``shell_in("--vm", name, columns=80, rows=24)``."""
    with ExitStack() as stack:

        def start(
            *arguments: str, environment: dict[str, str] | None = None, **settings: Any
        ) -> Terminal:
            argv = [sys.executable, "-m", "kgdbx", "shell", *arguments]
            # ^X^E edits the line with it.
            own = {"KGDBX_HISTORY": str(tmp_path / "history"), "EDITOR": "true"}
            own |= environment or {}
            return stack.enter_context(Terminal(argv, environment=own, **settings))

        yield start
