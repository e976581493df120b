"""Nullify: calls return a value at once."""

import errno

import drgn

from kgdbx.errors import ProbeError
from kgdbx.probes.value import underlying_type
from kgdbx.resident.compile.decision import Decision, return_at_once
from kgdbx.resident.verdict import Verdict
from kgdbx.symbols.kernel import Function, Kernel

__all__ = ("Nullify", "parse_retval")

_IN_MEMORY = (drgn.TypeKind.STRUCT, drgn.TypeKind.UNION, drgn.TypeKind.CLASS)
_MIN_RETVAL, _MAX_RETVAL = -(1 << 63), (1 << 64) - 1
# include/linux/errno.h: what user space does not see, and Python's module does not have.
_KERNEL_ERRORS = {
    "ERESTARTSYS": 512,
    "ERESTARTNOINTR": 513,
    "ERESTARTNOHAND": 514,
    "ENOIOCTLCMD": 515,
    "ERESTART_RESTARTBLOCK": 516,
    "EPROBE_DEFER": 517,
    "EOPENSTALE": 518,
    "ENOPARAM": 519,
    "EBADHANDLE": 521,
    "ENOTSYNC": 522,
    "EBADCOOKIE": 523,
    "ENOTSUPP": 524,
    "ETOOSMALL": 525,
    "ESERVERFAULT": 526,
    "EBADTYPE": 527,
    "EJUKEBOX": 528,
    "EIOCBQUEUED": 529,
}
_CONSTANTS = {"NULL": 0, "false": 0, "true": 1}


def parse_retval(text: str) -> int:
    """A return value: a number, ``-ENOMEM`` and its like, ``NULL``, ``true`` or ``false``.

    :raises ProbeError: if it is none of them, or does not fit into 64 bits
    """
    word = text.strip()
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    sign, name = (-1, word[1:]) if word.startswith("-") else (1, word)
    error = _KERNEL_ERRORS.get(name, getattr(errno, name, None) if name[:1] == "E" else None)
    try:
        value = sign * error if isinstance(error, int) else int(word, 0)
    except ValueError:
        raise ProbeError(
            f"{text!r} is no return value: give a number, -ENOMEM and its like, NULL, true or false"
        ) from None
    if not _MIN_RETVAL <= value <= _MAX_RETVAL:
        raise ProbeError(f"{text} does not fit into 64 bits")
    return value


class Nullify(Verdict):
    """The function returns a value at once; its code does not run.

    :param retval: a number, or what :func:`parse_retval` takes
    :raises ProbeError: if it is neither
    """

    group = "nullify"
    kind = "n"
    done = "nullified"

    def __init__(self, retval: int | str = 0) -> None:
        self.action = str(retval)
        self._retval = parse_retval(self.action)

    def decision(self, kernel: Kernel, function: Function) -> Decision:
        """Return at once.

        :raises ProbeError: if the function returns a structure
        """
        type_ = kernel.function_type(function)
        if type_ is not None and underlying_type(type_.type).kind in _IN_MEMORY:
            raise ProbeError(
                f"{function.qualified_name} returns {type_.type.type_name()}, which is more than "
                "a number; replace it with a function of its type",
                errno.EINVAL,
            )
        return Decision(return_at_once(self._retval))
