"""Tracebacks of the user's own code, without the way of kgdbx to it."""

import traceback
from pathlib import Path

import kgdbx

__all__ = ("user_trace",)

_OURS = (str(Path(kgdbx.__file__).parent), "<frozen ")


def user_trace(error: BaseException) -> str:
    """Traceback of an error, from the first call that leaves kgdbx; all of it if none does."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OURS):
        trace = trace.tb_next
    if trace is None and not isinstance(error, SyntaxError):
        trace = error.__traceback__
    return "".join(traceback.format_exception(type(error), error, trace))
