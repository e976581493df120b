"""Every error that kgdbx raises, as one tree.

::

    KgdbxError
     +-- TargetError            the connection to the kernel
     |    +-- MemoryFault       an address that cannot be read or written
     |    +-- TargetLost        the guest or its stub is gone
     |    +-- TargetTimeout     no answer within the deadline
     |    +-- ProtocolError     an answer that makes no sense
     |    +-- Unsupported       the stub or transport cannot do this
     +-- SymbolError            a name or address without meaning
     |    +-- BuildIdMismatch   debug symbols of another kernel
     +-- ProbeError             a probe that cannot be registered; carries ``errno``
     |    +-- DefinitionError   text that is not a probe definition
     |    +-- HandlerTimeout    a handler that ran past its limit
     +-- MachineError           a kernel, QEMU or VM that cannot be had
     +-- CommandError           wrong use of a command

Messages are lower case, have no full stop, and name the thing and the remedy.
"""

import errno as _errno

__all__ = (
    "BuildIdMismatch",
    "CommandError",
    "DefinitionError",
    "HandlerTimeout",
    "KgdbxError",
    "MachineError",
    "MemoryFault",
    "ProbeError",
    "ProtocolError",
    "SymbolError",
    "TargetError",
    "TargetLost",
    "TargetTimeout",
    "Unsupported",
)


class KgdbxError(Exception):
    """Root of the tree: catch this to catch everything that kgdbx raises on purpose."""


class TargetError(KgdbxError):
    """The connection to the kernel failed or refused."""


class MemoryFault(TargetError):
    """Memory that cannot be read or written.

    :ivar address: first address of the access (guest-virtual unless ``physical``)
    :ivar size_bytes: size of the access
    """

    def __init__(
        self, address: int, size_bytes: int, *, physical: bool = False, write: bool = False
    ) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.physical = physical
        verb = "write" if write else "read"
        space = "physical" if physical else "virtual"
        super().__init__(f"cannot {verb} {size_bytes} bytes at {space} address {address:#x}")


class TargetLost(TargetError):
    """The guest or its stub closed the connection."""


class TargetTimeout(TargetError):
    """The stub gave no answer within the deadline."""


class ProtocolError(TargetError):
    """The stub answered something that is not the remote serial protocol."""


class Unsupported(TargetError):
    """The transport cannot do what was asked; the message names a way that can."""


class SymbolError(KgdbxError):
    """A name or address that the kernel does not have.

    :ivar symbol: what was asked for
    :ivar candidates: nearest names, best first
    """

    def __init__(self, message: str, *, symbol: str = "", candidates: tuple[str, ...] = ()) -> None:
        self.symbol = symbol
        self.candidates = candidates
        super().__init__(message)


class BuildIdMismatch(SymbolError):
    """The debug symbols belong to another kernel than the one that runs.

    :ivar expected: build ID of the file, in hex
    :ivar found: build ID of the running kernel, in hex
    """

    def __init__(self, path: str, expected: str, found: str) -> None:
        self.expected = expected
        self.found = found
        super().__init__(
            f"{path} has build ID {expected}, the running kernel has {found or 'none'}; "
            "give the vmlinux of the running kernel",
            symbol=path,
        )


class ProbeError(KgdbxError):
    """A probe that cannot be registered.

    :ivar errno: the number that ``register_kprobe()`` would give, positive: EINVAL for a bad
        address or one inside an instruction, ENOENT for no such symbol, ENOSPC for no free debug
        register, EBUSY for bytes in use
    """

    def __init__(self, message: str, errno: int = _errno.EINVAL) -> None:
        self.errno = errno
        super().__init__(message)


class DefinitionError(ProbeError):
    """A text that is not a probe definition.

    :ivar text: the whole definition
    :ivar column: 0-based column of the fault in it
    """

    def __init__(self, message: str, text: str, column: int) -> None:
        self.text = text
        self.column = column
        super().__init__(f"{message}\n  {text}\n  {' ' * column}^")


class HandlerTimeout(ProbeError):
    """A handler ran longer than its limit and was interrupted."""

    def __init__(self, message: str) -> None:
        super().__init__(message, _errno.ETIMEDOUT)


class MachineError(KgdbxError):
    """A kernel, a QEMU or a VM that cannot be had."""


class CommandError(KgdbxError):
    """Wrong use of a command."""
