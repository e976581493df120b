"""ftrace's text, as its readers expect it."""

import io
import re
from collections.abc import Callable
from pathlib import Path

from kgdbx.probes.event import Event
from kgdbx.probes.value import Hex, KernelStack, Unreadable
from kgdbx.symbols.tasks import Task
from kgdbx.trace.text import Style, TextSink, event_line

Make = Callable[..., Event]

# What a reader of /sys/kernel/tracing/trace looks for in a line.
LINE = re.compile(
    r" *(?P<comm>.+)-(?P<pid>\d+) +(\( *(?P<tgid>\d+)\) )?\[(?P<cpu>\d{3})\] +"
    r"(?P<seconds>\d+\.\d{6}): (?P<event>\S+): (?P<rest>.*)"
)


def test_lines(event: Make) -> None:
    assert event_line(event()) == (
        "             cat-412     [003]  12345.678901: opened: (do_sys_openat2+0x0/0x2c) dfd=-100"
    )
    fields = {
        "s": 'a "b"\n',
        "p": Hex(255),
        "raw": b"\x01\xff",
        "list": [1, Hex(2), "x"],
        "bad": Unreadable(0x10),
        "why": Unreadable(None, "optimized out"),
    }
    assert event_line(event(fields=fields, probe="mine/open")).partition(": ")[2] == (
        'mine/open: (do_sys_openat2+0x0/0x2c) s="a \\"b\\"\\n" p=0xff raw=01 ff '
        'list={1,0x2,"x"} bad=(fault) why=(optimized out)'
    )


def test_returns(event: Make) -> None:
    back = event(kind="r", return_address=0xFF1F, return_where="ksys+0x1f/0x40", duration_ns=1500)
    assert event_line(back).partition(": ")[2] == (
        "opened: (ksys+0x1f/0x40 <- do_sys_openat2) dfd=-100 duration_ns=1500"
    )
    unknown = event(kind="r", return_address=0xFF1F)
    assert "(0xff1f <- do_sys_openat2)" in event_line(unknown)
    assert "duration" not in event_line(unknown)


def test_stacks_are_events_of_their_own(event: Make) -> None:
    stack = KernelStack(["f+0x1/0x2 [xfs]", Hex(0x10)])
    lines = event_line(event(fields={"$kstack": stack, "dfd": 3})).splitlines()
    assert [line.partition(": ")[2] for line in lines[:2]] == [
        "opened: (do_sys_openat2+0x0/0x2c) dfd=3",
        "<stack trace>",
    ]
    assert lines[2:] == [" => f+0x1/0x2 [xfs]", " => 0x10"]


def test_a_guest_cannot_break_lines_or_reach_the_terminal(event: Make) -> None:
    hostile = event(
        task=Task(0, 1, 1, "a\n\x1b[2J\x9b-\x7f"), fields={"s": "\x9b31m", "t": "é", "u": "\n"}
    )
    line = event_line(hostile)
    assert line.isprintable()
    assert line.startswith("a\\n\\x1b[2J\\x9b-\\x7f-1 ")
    assert line.endswith('s="\\u009b31m" t="é" u="\\n"')


def test_colours(event: Make) -> None:
    style = Style(name="<N>", value="<V>", fault="<F>", reset="</>")
    line = event_line(event(fields={"a": 1, "b": Unreadable(1)}, duration_ns=2), style)
    assert line.endswith(
        "<N>opened</>: (do_sys_openat2+0x0/0x2c) a=<V>1</> b=<F>(fault)</> duration_ns=<V>2</>"
    )


def test_stream(event: Make) -> None:
    out = io.StringIO()
    sink = TextSink(out, cpus=4)
    sink.write([event(), event(cpu=1)])
    sink.write([])
    sink.write_lost(7, 2)
    sink.write_lost(1)
    sink.close()
    sink.close()
    assert out.getvalue() == (
        "# tracer: nop\n"
        "#\n"
        "# entries-in-buffer/entries-written: 0/0   #P:4\n"
        "#\n"
        "#           TASK-PID     CPU#     TIMESTAMP  FUNCTION\n"
        "#              | |         |         |         |\n"
        "             cat-412     [003]  12345.678901: opened: (do_sys_openat2+0x0/0x2c) dfd=-100\n"
        "             cat-412     [001]  12345.678901: opened: (do_sys_openat2+0x0/0x2c) dfd=-100\n"
        "CPU:2 [LOST 7 EVENTS]\n"
        "# [LOST 1 EVENTS]\n"
    )


def test_file_has_its_counts(event: Make, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with path.open("w") as file:
        file.write("before\n")
        sink = TextSink(file, cpus=2, tgid=True)
        sink.write(event() for _ in range(1013))
        sink.write_lost(10, 0)
        sink.close()
        file.write("after\n")
    lines = path.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after"
    assert lines[1] == "# tracer: nop"
    assert lines[3].rstrip() == "# entries-in-buffer/entries-written: 1013/1023   #P:2"
    assert lines[6] == "#           TASK-PID       TGID    CPU#     TIMESTAMP  FUNCTION"
    assert lines[7] == "#              | |           |       |         |         |"
    events = [LINE.fullmatch(line) for line in lines[8:-2]]
    assert len(events) == 1013
    assert events[0] is not None
    assert events[0].groupdict() == {
        "comm": "cat",
        "pid": "412",
        "tgid": "400",
        "cpu": "003",
        "seconds": "12345.678901",
        "event": "opened",
        "rest": "(do_sys_openat2+0x0/0x2c) dfd=-100",
    }


def test_appending_stays_appending(event: Make, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with path.open("a") as file:
        sink = TextSink(file)
        sink.write([event()])
        sink.close()
    lines = path.read_text().splitlines()
    assert lines[2] == "# entries-in-buffer/entries-written: 0/0   #P:1"
    assert len(lines) == 7


def test_without_header(event: Make) -> None:
    out = io.StringIO()
    TextSink(out, header=False).write([event()])
    assert out.getvalue() == event_line(event()) + "\n"
