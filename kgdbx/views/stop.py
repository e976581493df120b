"""Around a stop: source, instructions, and the stack with its arguments."""

import contextlib
from pathlib import Path
from typing import Any

import drgn

from kgdbx.arch.instruction import decode_all, format_instruction
from kgdbx.errors import KgdbxError, ProbeError
from kgdbx.probes.probe import Hit
from kgdbx.session import Session
from kgdbx.views.status import place

__all__ = ("stop",)

_BEHIND = 24
_CODE_BYTES = 160
_VALUE_CHARACTERS = 100


def stop(session: Session, cpu: int, frames: int = 24) -> dict[str, Any]:
    """What is known of where the kernel stands.

    :param cpu: the vCPU to look at
    :param frames: most frames of the stack to tell
    :return: ``cpu``, ``where``, ``comm``, ``pid``; ``source`` with ``file`` and ``line``;
        ``code`` of address, text and place; ``stack`` of frames with their arguments;
        ``errors`` says what could not be had
    """
    if session.target.running:
        return {"errors": ["the kernel runs; stop it to look around"]}
    found: dict[str, Any] = place(session, cpu)
    errors: list[str] = []
    registers = session.target.read_registers(cpu)
    found["code"] = _code(session, registers.rip, errors)
    found["source"] = _source(session, registers.rip)
    found["stack"] = _stack(session, cpu, frames, errors)
    return found | {"errors": errors}


def _code(session: Session, address: int, errors: list[str]) -> list[list[Any]]:
    kernel = session.kernel
    function = kernel.function_at(address)
    start = function.address if function else address
    try:
        data = kernel.read_code(start, address - start + _CODE_BYTES)
    except KgdbxError as e:
        errors.append(f"code: {e}")
        return []
    end = start + (function.size_bytes if function else len(data))
    found: list[list[Any]] = []
    with contextlib.suppress(ProbeError):  # the last one is cut short
        for each in decode_all(data, start):
            if each.ip >= end:
                break
            found.append([each.ip, format_instruction(each), kernel.symbolize(each.ip)])
    here = next((n for n, row in enumerate(found) if row[0] >= address), 0)
    return found[max(0, here - _BEHIND) :]


def _source(session: Session, address: int) -> dict[str, Any]:
    # The innermost inlined function first. Distributions do not ship the text; a tree of one's own
    # is found by its path.
    try:
        location = session.kernel.program.source_location(address)[0]
    except (LookupError, drgn.FaultError):
        return {}
    path = Path(location.filename)
    lines: list[str] = []
    if path.is_file():
        lines = path.read_text(errors="replace").splitlines()
    return {
        "file": location.filename,
        "line": location.line,
        "text": lines,
    }


def _stack(session: Session, cpu: int, most: int, errors: list[str]) -> list[dict[str, Any]]:
    registers = session.target.read_registers(cpu)
    try:
        trace = Hit(session.kernel, cpu, registers, registers.rip).stack_trace()
    except (KgdbxError, drgn.FaultError, LookupError, ValueError) as e:
        errors.append(f"stack: {e}")
        return []
    if len(trace) > most:
        errors.append(f"stack: {len(trace) - most} more frames")
    return [_frame(session, frame) for frame in list(trace)[:most]]


def _frame(session: Session, frame: drgn.StackFrame) -> dict[str, Any]:
    try:
        file, line, _ = frame.source()
    except LookupError:
        file, line = "", 0
    return {
        "address": frame.pc,
        "function": frame.name or session.kernel.symbolize(frame.pc),
        "where": session.kernel.symbolize(frame.pc),
        "inline": frame.is_inline,
        "file": file,
        "line": line,
        "arguments": [[name, _value(frame, name)] for name in _parameter_names(session, frame)],
    }


def _parameter_names(session: Session, frame: drgn.StackFrame) -> list[str]:
    # drgn tells the names in scope; which of them are parameters, the function's type.
    if frame.function_name is None:
        return []
    try:
        type_ = session.kernel.program.function(frame.function_name).type_
        here = set(frame.locals())
    except LookupError:
        return []
    return [p.name for p in type_.parameters if p.name in here]


def _value(frame: drgn.StackFrame, name: str) -> str:
    try:
        value = frame[name]
        if value.absent_:
            return "<optimized out>"
        return str(value.format_(dereference=False, symbolize=True, type_name=False))[
            :_VALUE_CHARACTERS
        ]
    except (LookupError, drgn.FaultError) as e:
        return f"<{e}>"
