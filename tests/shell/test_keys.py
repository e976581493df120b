"""What keys do to the line, with a gdb that has no kernel."""

from collections.abc import Callable

from kgdbx.bench.terminal import Terminal

READY = "gdb detached>"


def leave(t: Terminal) -> None:
    t.line("quit")
    assert t.end() == 0


def test_vi(shell_in: Callable[..., Terminal]) -> None:
    t = shell_in("--vi")
    t.wait(READY)
    t.type("qprint 6*3\x1b0xA9\r")  # to the start, delete a letter, append at the end
    t.wait("$1 = 234")
    t.type("nonsense 4\x1bccprint 4*4\r")  # change the line
    t.wait("$2 = 16")
    leave(t)


def test_history_is_searched_and_kept(shell_in: Callable[..., Terminal]) -> None:
    first = shell_in()
    first.wait(READY)
    for n, line in enumerate(("print 111+222", "print 5", "print 7"), 1):
        first.line(line)
        first.wait(f"${n} = ")
    leave(first)
    t = shell_in()
    t.wait(READY)
    t.type("\x12111")
    t.wait("`111': print 111+222")
    t.type("\r\r")  # take it, run it
    t.wait("$1 = 333")
    t.type("\x1b[A\x1b[A\x1b[A\x1b[A\r")  # up: 111+222, quit, 7, 5
    t.wait("$2 = 5")
    leave(t)


def test_what_is_pasted_waits_for_enter(shell_in: Callable[..., Terminal]) -> None:
    t = shell_in()
    t.wait(READY)
    t.type("\x1b[200~print 600+1\nprint 600+2\nquit\x1b[201~")
    t.wait(lambda: any("quit" in line for line in t.display()))
    t.type("\x7f\x7f\x7f\x7fprint 600+3")
    t.wait("print 600+3")
    assert not any("= 60" in line for line in t.scrollback())
    t.type("\r")
    t.wait("$3 = 603")
    assert [line for line in t.scrollback() if "= 60" in line] == [
        "$1 = 601",
        "$2 = 602",
        "$3 = 603",
    ]
    t.type("\x1b[200~print 1\x1b[31m\x07\x00+1\x1b[201~\r")  # no key, and no colour
    t.wait(lambda: any("print 1" in line and "+1" in line for line in t.scrollback()))
    t.type("\x03\x15")
    t.line("print 600+4")
    t.wait("= 604")
    leave(t)


def colours(t: Terminal) -> set[str]:
    """Colours on the screen."""
    with t.lock:
        cells = [cell for row in t.screen.buffer.values() for cell in row.values()]
    return {colour for cell in cells for colour in (cell.fg, cell.bg)} - {"default"}


def test_no_color(shell_in: Callable[..., Terminal]) -> None:
    for environment, some in (({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)):
        t = shell_in(environment=environment)
        t.wait(READY)
        t.line('kprobe vfs_read "text" 5')
        t.wait("no kernel is attached")
        t.type("kprobe vfs_read --st")
        t.wait("leave the kernel standing")
        assert bool(colours(t)) is some
        t.type("\x15")
        leave(t)
