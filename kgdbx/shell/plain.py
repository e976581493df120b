"""What of foreign text may reach a terminal: printable characters and colours."""

import re

__all__ = ("harmless", "without_colour")

_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
# Whole sequences, so that nothing of them is left as text; then every single control character.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_colour(text: str) -> str:
    """The text alone."""
    return _CONTROL.sub("", _SEQUENCE.sub("", text))


def harmless(text: str) -> str:
    """The text with its colours, and without anything else that a terminal would obey.

    Text of a guest may try to: names of tasks, strings, files.
    """
    if "\x1b" not in text:
        return without_colour(text) if _CONTROL.search(text) else text
    parts, at = [], 0
    for colour in _COLOUR.finditer(text):
        parts += [without_colour(text[at : colour.start()]), colour[0]]
        at = colour.end()
    return "".join([*parts, without_colour(text[at:])])
