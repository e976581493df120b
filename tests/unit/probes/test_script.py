"""Probe scripts that cannot be run are told with their own lines, and nothing of ours."""

from pathlib import Path

import pytest

from kgdbx.errors import CommandError, ProbeError
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


@pytest.mark.parametrize("hook", ["start", "stop"])
def test_a_hook_that_raises(tmp_path: Path, hook: str) -> None:
    script = tmp_path / "bad.py"
    script.write_text(f"def start(session): ...\ndef {hook}(session):\n    session.nosuch\n")
    with pytest.raises(CommandError) as caught:
        getattr(read_script(script, {}), hook)(1)
    first, *trace, last = str(caught.value).splitlines()
    assert first == f"{hook}() of the probe script {script} failed:"
    assert last == "AttributeError: 'int' object has no attribute 'nosuch'"
    assert f'File "{script}", line 3' in "\n".join(trace)
    assert "/kgdbx/probes/" not in str(caught.value)


def test_what_kgdbx_refuses_in_a_hook_is_no_fault_of_the_script(tmp_path: Path) -> None:
    script = tmp_path / "refused.py"
    script.write_text(
        "from kgdbx.errors import ProbeError\n"
        "def start(session):\n    raise ProbeError('planted', 22)\n"
    )
    with pytest.raises(ProbeError, match="^planted$"):
        read_script(script, {}).start(None)


def test_a_script_without_a_probe(tmp_path: Path) -> None:
    script = tmp_path / "empty.py"
    script.write_text("print\n")
    with pytest.raises(CommandError, match=r"empty\.py defines no probe; mark a handler with"):
        read_script(script, {})
    with pytest.raises(CommandError, match=r"cannot read the probe script .*: Is a directory"):
        read_script(tmp_path, {})
