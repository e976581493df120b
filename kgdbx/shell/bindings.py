"""Keys of the prompt beyond those of prompt_toolkit."""

import codeop
import contextlib
from collections.abc import Callable

from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, completion_is_selected, has_focus
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from kgdbx.shell.blocks import split_commands
from kgdbx.shell.shell import Shell

__all__ = ("VIEW_KEYS", "bindings", "is_complete")

VIEW_KEYS = {
    "f2": "top",
    "f3": "hist",
    "f4": "stop",
    "f5": "tasks",
    "f6": "modules",
    "f7": "slabs",
}
"""Views by function key."""


def is_complete(text: str, python: bool = False) -> bool:
    """Whether Enter runs the text, or begins another line of it.

    :param python: it is Python without ``>>>``
    """
    if python:
        with contextlib.suppress(SyntaxError, ValueError, OverflowError):
            return codeop.compile_command(text) is not None
        return True
    _, complete = split_commands(text.split("\n"))
    return complete


def bindings(shell: Shell, run_line: Callable[[str], None]) -> KeyBindings:
    """The keys.

    :param run_line: called with a line that a key stands for
    """
    keys = KeyBindings()
    at_line = has_focus(DEFAULT_BUFFER)  # not in a search

    @keys.add("enter", filter=completion_is_selected)
    def take_completion(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion:
            buffer.apply_completion(buffer.complete_state.current_completion)

    @keys.add("enter", filter=at_line & Condition(lambda: _waits_for_more(shell)))
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    @keys.add("c-c", filter=at_line)
    def interrupt(event: KeyPressEvent) -> None:
        # The line first, as in any shell; an empty one means the kernel.
        session = shell.current
        if event.current_buffer.text:
            event.current_buffer.reset(append_to_history=True)
        if session is not None:
            session.press_interrupt()

    for key, name in VIEW_KEYS.items():

        @keys.add(key)
        def view(event: KeyPressEvent, name: str = name) -> None:
            run_line(name)

    for number in range(1, 10):

        @keys.add("escape", str(number))
        def switch(event: KeyPressEvent, number: int = number) -> None:
            if number in shell.sessions:
                run_line(f"session {number}")

    return keys


def _waits_for_more(shell: Shell) -> bool:
    from prompt_toolkit.application import get_app

    buffer = get_app().current_buffer
    return buffer.document.is_cursor_at_the_end and not is_complete(buffer.text, shell.python)
