"""The prompt and the line below it: which session, its state, its probes, what happens."""

from prompt_toolkit.formatted_text import StyleAndTextTuples

from kgdbx.shell.kernel_session import KernelSession
from kgdbx.shell.knowledge import Knowledge
from kgdbx.shell.shell import Shell

__all__ = ("prompt", "toolbar")


def prompt(shell: Shell) -> StyleAndTextTuples:
    """``a running> ``, or where it stands: ``a vfs_read+0x0 cpu 1> ``; of a replay also how many
    instructions it has come: ``a @1,234,567 running> ``.
    """
    if shell.python:
        return [("", ">>> ")]
    session = shell.current
    if session is None:
        return [("", "kgdbx> ")]
    return [
        ("bold", session.name),
        ("", " " if session.replayed is None else f" @{session.replayed:,} "),
        (f"class:prompt.{session.state}", _state(session)),
        ("", "> "),
    ]


def toolbar(shell: Shell, knowledge: Knowledge, line: str, columns: int) -> StyleAndTextTuples:
    """Sessions and counts; and the declaration of the function that is being typed.

    :param line: what was typed so far
    :param columns: width of the terminal
    """
    parts: StyleAndTextTuples = []
    declaration = _declaration(knowledge, line)
    if declaration:
        parts.append(("italic", _cut(f" {declaration}", columns) + "\n"))
    left: StyleAndTextTuples = []
    for number, session in shell.sessions.items():
        mark = "*" if session is shell.current else " "
        left.append(("", f"{mark}{number} {session.name} "))
        left.append((f"class:toolbar.{session.state}", session.state))
        left.append(("", " "))
    used = sum(len(piece[1]) for piece in left)
    if used > columns:
        left = [("", _cut("".join(piece[1] for piece in left), columns))]
        used = columns
    return [*parts, *left, ("", _cut(f"| {_counts(shell)}", columns - used))]


def _counts(shell: Shell) -> str:
    session = shell.current
    probes = session.probes if session is not None else []
    hits = sum(int(probe["hits"]) for probe in probes)
    missed = sum(int(probe["missed"]) for probe in probes)
    faults = sum(int(probe["faults"]) for probe in probes)
    parts = [f"{len(probes)} probes", f"{hits:,} hits"]
    if lost := session.status.get("lost", 0) if session is not None else 0:
        parts.append(f"{lost:,} lost")
    parts += [f"{missed:,} missed"] if missed else []
    parts += [f"{faults:,} faults"] if faults else []
    parts += [f"{shell.printer.dropped:,} not shown"] if shell.printer.dropped else []
    if session is not None and session.busy:
        parts.append("busy, ^C ends it")
    return ", ".join(parts)


def _declaration(knowledge: Knowledge, line: str) -> str:
    # Of the last function on the line.
    for word in reversed(line.replace(":", " ").split()):
        name = word.partition("+")[0]
        if declaration := knowledge.signature(name):
            return declaration
        if len(name) > 2 and knowledge.is_function(name):
            knowledge.want_signatures([name])
            return ""
    return ""


def _state(session: KernelSession) -> str:
    where = session.status.get("where")
    if session.state == "stopped" and where:
        return f"{str(where).partition('/')[0]} cpu {session.status.get('cpu', 0)}"
    return session.state


def _cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: max(0, columns - 1)] + ">"
