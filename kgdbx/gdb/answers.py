"""Answers to a program that runs this gdb: one line of JSON each.

The program has gdb execute ``python kgdbx.gdb.answers.answer(NAME, ARGUMENTS)`` and takes the line
that starts with the ASCII record separator out of gdb's output.
"""

import json
from typing import Any

import gdb

from kgdbx.commands.context import Context
from kgdbx.errors import KgdbxError
from kgdbx.gdb.variables import Variables
from kgdbx.views.evaluate import Evaluator
from kgdbx.views.histogram import Histogram
from kgdbx.views.registry import VIEWS
from kgdbx.views.status import status
from kgdbx.views.stop import stop

__all__ = ("MARK", "Answers", "answer")

MARK = "\x1e"

_answers: list["Answers"] = []


class Answers:
    """What can be asked.

    :param context: the face's state
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._evaluator: Evaluator | None = None
        self._histograms: dict[tuple[int, str, str], Histogram] = {}
        _answers[:] = [self]

    def answer(self, name: str, arguments: dict[str, Any]) -> Any:
        """The answer to a question: a value that JSON has.

        :raises CommandError: if no kernel is attached
        """
        if name == "status":
            return status(self._context.session, _cpu()) if self._context.attached else {}
        if name == "stop":
            return stop(self._context.session, _cpu(), **arguments)
        if name == "evaluate":
            return self._evaluate(arguments["source"])
        if name == "histogram":
            return self._histogram(**arguments)
        return VIEWS[name](self._context.session, **arguments)

    def _histogram(self, probe: str, field: str) -> Any:
        # It counts on from the first time that it was asked for.
        session = self._context.session
        key = (id(session), probe, field)
        if key not in self._histograms:
            self._histograms[key] = Histogram(session, probe, field)
        return self._histograms[key].result()

    def _evaluate(self, source: str) -> str:
        session = self._context.session
        if self._evaluator is None or self._evaluator.session is not session:
            self._evaluator = Evaluator(session, Variables(session.kernel.program))
        return self._evaluator.run(source)


def answer(name: str, arguments: str = "{}") -> None:
    """Write the answer to a question as a line of its own.

    :param arguments: JSON object
    """
    try:
        reply = {"value": _answers[0].answer(name, json.loads(arguments))}
    except KgdbxError as e:
        reply = {"error": str(e)}
    except gdb.error as e:
        reply = {"error": str(e)}
    gdb.write(f"\n{MARK}{json.dumps(reply)}\n")
    gdb.flush()


def _cpu() -> int:
    # The vCPU that the user looks at: QEMU counts its threads from 1.
    thread = gdb.selected_thread()
    return 0 if thread is None else max(0, int(thread.ptid[1]) - 1)
