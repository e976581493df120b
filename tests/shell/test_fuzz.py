"""Any keys in any order leave the prompt alive."""

import os
import random
import time
from collections.abc import Callable

from kgdbx.bench.terminal import Terminal

# KGDBX_FUZZ=10000 presses that many.
SEQUENCES = int(os.environ.get("KGDBX_FUZZ", "41"))
WORDS = (
    "kprobe ",
    "vfs_read",
    "help",
    "info ",
    "list",
    ">>> 1+1",
    "@kprobe('x')",
    "print 1",
    "top",
)
KEYS = (
    *(chr(n) for n in range(1, 32) if chr(n) not in "\x04\x1a\x1b\x0f"),  # ^D and ^O end or run
    *("\x1b[A", "\x1b[B", "\x1b[C", "\x1b[D", "\x1b[H", "\x1b[F", "\x1b[3~", "\x1b[5~", "\x1b[6~"),
    *(
        "\x1bf",
        "\x1bb",
        "\x1bd",
        "\x1b.",
        "\x1b1",
        "\x1bOQ",
        "\x1bOR",
        "\x1bOS",
        "\x1b[15~",
        "\x1b",
    ),
    *(
        "\x1b[200~pasted\nlines\x1b[201~",
        "\x1b[200~python\x1b[201~",
        "ä",
        "漢",
        "\\",
        '"',
        "(",
        "}",
    ),
    *("\r", "\t", " ", "a", "0", "$", "%", "->", "\x7f", "\x17", "\x15", "\x0b", "\x19", "\x1f"),
)


def test_random_keys(shell_in: Callable[..., Terminal]) -> None:
    make = random.Random(42)
    t = shell_in("--color", "always", columns=80, rows=24)
    t.wait("gdb detached>")
    for n in range(SEQUENCES):
        t.type("".join(make.choice((make.choice(KEYS), make.choice(WORDS))) for _ in range(8)))
        if n % 10 == 0:
            t.resize(make.randint(20, 200), make.randint(5, 60))
        if n % 25 == 24 or n == SEQUENCES - 1:
            still_answers(t, n)
    t.type("\x1b\x1b")
    t.line("quit")
    assert t.end() == 0


def still_answers(t: Terminal, number: int) -> None:
    """Leave whatever the keys began, and have gdb count."""
    t.resize(100, 30)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        t.type("q\x03\x15")  # out of a view, a search, a line
        t.type(f"\x15print {number} + 1000000\r")
        try:
            t.wait(f"= {number + 1000000}", 3)
        except AssertionError:
            if t.process.poll() is not None:
                raise
            continue
        return
    raise AssertionError("\n".join(t.display()))
