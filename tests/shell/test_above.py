"""Output that comes while a line is typed: above it, whole, and the line stays as it is."""

from collections.abc import Callable

from kgdbx.bench.terminal import Terminal

LINES = 300
# Writes lines longer than the window, one after another, while gdb waits for commands.
WRITER = f"""\
import gdb, threading, time
def work():
    for n in range({LINES}):
        gdb.post_event(lambda n=n: gdb.write("begin %04d %s end %04d\\n" % (n, "-" * 90, n)))
        time.sleep(0.01)
threading.Thread(target=work, daemon=True).start()
"""


def test_lines_above_a_line_that_is_typed(shell_in: Callable[..., Terminal]) -> None:
    columns = 80
    t = shell_in(columns=columns, rows=24)
    t.wait("gdb detached>")
    t.line(f"python exec({WRITER!r})")
    t.wait(lambda: last(t) >= 5)
    typed = "print 12"
    for letter in typed:
        wanted = min(last(t) + 3, LINES - 1)
        t.type(letter)
        t.wait(lambda wanted=wanted: last(t) >= wanted)
    t.wait(lambda: prompt_lines(t) == [typed])
    t.wait(lambda: last(t) == LINES - 1)
    assert prompt_lines(t) == [typed]
    assert sum("*1 gdb detached | 0 probes" in line for line in t.display()) == 1
    text = "".join(line.ljust(columns) for line in t.scrollback())
    at = 0
    for n in range(LINES):
        wanted = f"begin {n:04} {'-' * 90} end {n:04}"
        at = text.find(wanted, at)
        assert at >= 0, f"line {n} is not whole"
        at += len(wanted)
    t.type("3\r")
    t.wait("$1 = 123")
    t.line("quit")
    assert t.end() == 0


def last(t: Terminal) -> int:
    """Number of the last line that came; -1 before the first."""
    numbers = [line.rpartition(" end ")[2] for line in t.display() if "- end " in line]
    return int(numbers[-1]) if numbers and numbers[-1].isdigit() else -1


def prompt_lines(t: Terminal) -> list[str]:
    """What stands behind each prompt on the screen."""
    return [line.partition("> ")[2] for line in t.display() if "detached> " in line]
