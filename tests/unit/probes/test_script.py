"""Probe scripts that cannot be run are told with their own lines, and nothing of ours."""

from pathlib import Path

import pytest

from kgdbx.errors import CommandError
from kgdbx.probes.script import read_script

HEAD = "from kgdbx.probes.script import kprobe\n"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (HEAD + "def half(", 2, "SyntaxError: '(' was never closed"),
        (HEAD + "def f():\n    nothing()\nf()\n", 3, "NameError: name 'nothing' is not defined"),
        ("import nosuch\n", 1, "ModuleNotFoundError: No module named 'nosuch'"),
        (HEAD + "@kprobe()\ndef f(): ...\n", 2, "missing 1 required positional argument"),
    ],
)
def test_a_script_that_raises(tmp_path: Path, text: str, line: int, says: str) -> None:
    script = tmp_path / "bad.py"
    script.write_text(text)
    with pytest.raises(CommandError) as caught:
        read_script(script, {})
    first, *trace, last = str(caught.value).splitlines()
    assert first == f"the probe script {script} failed:"
    assert says in last
    assert f'File "{script}", line {line}' in "\n".join(trace)
    assert "runpy" not in str(caught.value) and "/kgdbx/probes/" not in str(caught.value)


def test_a_script_without_a_probe(tmp_path: Path) -> None:
    script = tmp_path / "empty.py"
    script.write_text("print\n")
    with pytest.raises(CommandError, match=r"empty\.py defines no probe; mark a handler with"):
        read_script(script, {})
    with pytest.raises(CommandError, match=r"cannot read the probe script .*: Is a directory"):
        read_script(tmp_path, {})
