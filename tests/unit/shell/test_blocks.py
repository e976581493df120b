"""Where commands of several lines end, and what becomes of them."""

import pathlib

import pytest

from kgdbx.shell.blocks import Block, split_commands

CASES = {
    "one line": ["info registers"],
    "continued": ["kprobe vfs_read \\", "count"],
    "python": ["python", "if 1:", "  print(2)", "end"],
    "python in a line": ["python print(1)"],
    "nested": ["define f", "if $x", "python", "if 1: pass", "end", "end", "end"],
    "document": ["document f", "if you read this", "end"],
    "commands": ["commands 1", "silent", "end"],
    "probe": ['@kprobe("vfs_read")', "def f(count):", "    print(count)", ""],
    "C": ["replace vfs_read {", "long replacement(void)", "{", "return 0;", "}", "}"],
    "drgn": [">>> for t in for_each_task():", "...     print(t.pid)", ""],
}


@pytest.mark.parametrize("lines", CASES.values(), ids=CASES.keys())
def test_a_command_ends_with_its_last_line(lines: list[str]) -> None:
    for n in range(1, len(lines)):
        _, complete = split_commands(lines[:n])
        assert not complete, lines[:n]
    blocks, complete = split_commands([*lines, "next command"])
    assert complete
    assert [block.lines for block in blocks] == [lines, ["next command"]]


def test_files_for_gdb(tmp_path: pathlib.Path) -> None:
    def made(name: str) -> tuple[str, str]:
        (block,), _ = split_commands(CASES[name])
        command, _, file = block.command(tmp_path).rpartition(" ")
        return command, pathlib.Path(file).read_text()

    assert made("C") == (
        "kgdbx replace vfs_read",
        "long replacement(void)\n{\nreturn 0;\n}\n",
    )
    assert made("nested") == ("source", "\n".join(CASES["nested"]) + "\n")
    command, text = made("probe")
    assert command == "kgdbx script"
    compile(text, "typed", "exec")
    assert text.startswith("from kgdbx.probes.script import jprobe, kprobe, kretprobe, watch\n")


def test_lines_are_joined(tmp_path: pathlib.Path) -> None:
    (block,), _ = split_commands(CASES["continued"])
    assert block.command(tmp_path) == "kprobe vfs_read count"
    assert Block("p 1").command(tmp_path) == "p 1"
