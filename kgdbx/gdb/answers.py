"""Answers to a program that runs this gdb: a line of JSON each on its channel.

The program has gdb execute ``python kgdbx.gdb.answers.answer(NUMBER, NAME, ARGUMENTS)``.
"""

import json
from typing import Any, TextIO

import gdb

from kgdbx.commands.context import Context
from kgdbx.errors import KgdbxError
from kgdbx.gdb.channel import MARK
from kgdbx.gdb.variables import Variables
from kgdbx.target.gdb_inferior import GdbInferior
from kgdbx.views.evaluate import Evaluator
from kgdbx.views.histogram import Histogram
from kgdbx.views.registry import VIEWS
from kgdbx.views.status import status
from kgdbx.views.stop import stop

__all__ = ("Answers", "answer")

_answers: list["Answers"] = []


class Answers:
    """What can be asked.

    :param context: the face's state
    :param channel: where answers go; gdb's own output if there is none
    """

    def __init__(self, context: Context, channel: TextIO | None) -> None:
        self.out = context.out if channel is None else channel
        self._context = context
        self._evaluator: Evaluator | None = None
        self._histograms: dict[tuple[int, str, str], Histogram] = {}
        _answers[:] = [self]

    def answer(self, name: str, arguments: dict[str, Any]) -> Any:
        """The answer to a question: a value that JSON has.

        :raises CommandError: if no kernel is attached
        """
        if name == "status":
            return status(self._context.session, self._cpu) if self._context.attached else {}
        if name == "stop":
            return stop(self._context.session, self._cpu, **arguments)
        if name == "evaluate":
            return self._evaluation().run(arguments["source"])
        if name == "candidates":
            return self._evaluation().candidates(arguments["source"])
        if name == "interrupt":
            return self._interrupt()
        if name == "histogram":
            return self._histogram(**arguments)
        return VIEWS[name](self._context.session, **arguments)

    def _interrupt(self) -> None:
        # QEMU's stub drops a break-in that meets a stop: the request stays until the kernel stands.
        if self._context.attached and self._context.session.target.running:
            self._context.session.target.request_stop()
        gdb.execute("interrupt", to_string=True)

    @property
    def _cpu(self) -> int:
        target = self._context.session.target
        assert isinstance(target, GdbInferior)
        return target.looked_at()

    def _histogram(self, probe: str, field: str) -> Any:
        # It counts on from the first time that it was asked for.
        session = self._context.session
        key = (id(session), probe, field)
        if key not in self._histograms:
            self._histograms[key] = Histogram(session, probe, field)
        return self._histograms[key].result()

    def _evaluation(self) -> Evaluator:
        session = self._context.session
        if self._evaluator is None or self._evaluator.session is not session:
            self._evaluator = Evaluator(session, Variables(session.kernel.program))
        return self._evaluator


def answer(number: int, name: str, arguments: str = "{}") -> None:
    """Write the answer to a question as a line of its own.

    :param number: comes back with the answer
    :param arguments: JSON object
    """
    answers = _answers[0]
    reply: dict[str, Any] = {"number": number}
    try:
        reply["value"] = answers.answer(name, json.loads(arguments))
    except (KgdbxError, gdb.error) as e:
        reply["error"] = str(e)
    answers.out.write(f"{MARK}{json.dumps(reply)}\n")
    answers.out.flush()
