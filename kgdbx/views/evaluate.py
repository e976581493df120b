"""drgn expressions on a session: one line in, printed result out."""

import ast
import contextlib
import importlib
import io
import traceback
from collections.abc import MutableMapping
from typing import Any

import drgn

from kgdbx.errors import CommandError, KgdbxError
from kgdbx.session import Session
from kgdbx.views.leaks import Leaks, leak_functions
from kgdbx.views.python_names import python_names

__all__ = ("Evaluator",)

_NAME = "<shell>"
_MOST_NAMES = 500


class Evaluator:
    """A Python namespace on a kernel, which stays as long as its session.

    It has ``prog``, ``session``, ``kernel``, drgn's classes and its helpers for Linux, with the
    program filled in: ``find_task(1).comm``; and ``leaks()`` and ``leak(N)``. The last
    result is ``_``.

    :param variables: the debugger's ``$`` variables: ``$x`` in an expression is ``variables["x"]``
    :param standing: the kernel does not run on as long as this is used
    :ivar own_names: names that drgn's own prompt does not have
    :ivar names: all of them
    """

    def __init__(
        self, session: Session, variables: MutableMapping[str, Any], *, standing: bool = False
    ) -> None:
        self.session = session
        program = session.kernel.program
        drgn.set_default_prog(program)  # helpers take it where they are not given one
        self.own_names: dict[str, Any] = {
            "session": session,
            "kernel": session.kernel,
            **leak_functions(session, standing=standing),
        }
        self.names: dict[str, Any] = {"prog": program, "drgn": drgn, "_variables": variables}
        for module in ("drgn", "drgn.helpers.common", "drgn.helpers.linux"):
            found = importlib.import_module(module)
            public = getattr(found, "__all__", None) or [n for n in dir(found) if n[0] != "_"]
            self.names |= {name: getattr(found, name) for name in public}
        self.names |= self.own_names

    def candidates(self, source: str) -> list[list[str]]:
        """Names that may stand next, see :func:`~kgdbx.views.python_names.python_names`."""
        return python_names(source, self.names)[:_MOST_NAMES]

    def run(self, source: str) -> str:
        """Run statements; the value of the last one, if it is an expression, is printed.

        :return: what was printed
        :raises CommandError: with the traceback, if the code raises
        """
        out = io.StringIO()
        try:
            tree = ast.parse(_with_variables(source), _NAME)
            last = tree.body[-1] if tree.body else None
            body = tree.body[:-1] if isinstance(last, ast.Expr) else tree.body
            with contextlib.redirect_stdout(out):
                exec(compile(ast.Module(body, []), _NAME, "exec"), self.names)
                if isinstance(last, ast.Expr):
                    value = eval(compile(ast.Expression(last.value), _NAME, "eval"), self.names)
                    if value is not None:
                        self.names["_"] = value
                        print(_pretty(value))
        except KeyboardInterrupt:
            raise CommandError(f"{out.getvalue()}interrupted") from None
        except KgdbxError as e:
            raise CommandError(f"{out.getvalue()}{e}") from e
        except (Exception, SystemExit) as e:
            # Code of the user may raise anything; its own frames tell where.
            trace = "".join(traceback.format_exception(e.with_traceback(_own_frames(e))))
            raise CommandError(f"{out.getvalue()}{trace.rstrip()}") from e
        return out.getvalue()


def _with_variables(source: str) -> str:
    # $name -> _variables["name"], outside of strings and comments.
    parts, quote = [], ""
    at = 0
    while at < len(source):
        char = source[at]
        if quote:
            if char == "\\":
                parts.append(char)
                at += 1
                char = source[at : at + 1]
            elif source.startswith(quote, at):
                parts.append(quote[1:])
                at += len(quote) - 1
                quote = ""
        elif char in "\"'":
            quote = char * 3 if source.startswith(char * 3, at) else char
            parts.append(quote[1:])
            at += len(quote) - 1
        elif char == "#":
            end = source.find("\n", at)
            end = len(source) if end < 0 else end
            parts.append(source[at:end])
            at = end
            continue
        elif char == "$":
            end = at + 1
            while source[end : end + 1].isalnum() or source[end : end + 1] == "_":
                end += 1
            if end > at + 1:
                parts.append(f'_variables["{source[at + 1 : end]}"]')
                at = end
                continue
        parts.append(char)
        at += 1
    return "".join(parts)


def _own_frames(error: BaseException) -> Any:
    # A traceback from the user's own first line on.
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != _NAME:
        trace = trace.tb_next
    return trace


def _pretty(value: Any) -> str:
    if isinstance(value, drgn.Object | drgn.Type | drgn.StackTrace | drgn.StackFrame):
        return str(value)
    if isinstance(value, Leaks):
        return repr(value)
    if isinstance(value, list | tuple) and any(isinstance(each, drgn.Object) for each in value):
        return "\n".join(f"[{n}] {each}" for n, each in enumerate(value))
    if hasattr(value, "__next__"):  # a helper's generator
        return "\n".join(str(each) for each in value)
    return repr(value)
