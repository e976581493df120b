"""What the first words of a line at the prompt mean."""

import pytest

from kgdbx.shell.words import (
    changes_kernel,
    find_session_command,
    kgdbx_command,
    session_arguments,
)

LINES = {
    "leaks": ("leaks", "", True),
    "leaks --limit 3": ("leaks", "--limit 3", True),
    "leaks watch ext4 jbd2": ("leaks watch", "ext4 jbd2", True),
    "kx leaks watch --ko 'a b.ko'": ("leaks watch", "--ko 'a b.ko'", True),
    "kgdbx  leaks  report": ("leaks report", "", False),
    "leaks flush 2": ("leaks report", "2", False),
    "kp vfs_read count $comm": ("kprobe", "vfs_read count $comm", True),
    "kgdbx list": ("list", "", False),
}


@pytest.mark.parametrize("line", LINES)
def test_the_longest_name_is_the_command(line: str) -> None:
    name, arguments, changes = LINES[line]
    command = find_session_command(line)
    assert command is not None and command.name == name
    assert session_arguments(line) == arguments
    assert changes_kernel(line) is changes


@pytest.mark.parametrize("line", ["", "kgdbx", "list", "watch jiffies", "print leaks"])
def test_what_is_gdbs_stays_gdbs(line: str) -> None:
    assert find_session_command(line) is None
    assert kgdbx_command(line) == line
    assert not changes_kernel(line)
