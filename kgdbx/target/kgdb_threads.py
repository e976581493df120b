"""Threads and registers as KGDB has them: tasks, and a shadow of each CPU."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping

from kgdbx.arch.registers import GENERAL_REGISTERS, RegisterLayout
from kgdbx.errors import ProtocolError

__all__ = (
    "KGDB_LAYOUT",
    "KgdbRegisters",
    "PACKET_DIGITS",
    "PT_REGS_OFFSETS",
    "cpu_of_shadow",
    "shadow_thread",
    "thread_ids",
)

KGDB_LAYOUT = RegisterLayout(
    GENERAL_REGISTERS + ("eflags", "cs", "ss", "ds", "es"), (8,) * 17 + (4,) * 5
)
"""What a ``g`` packet has (``NUMREGBYTES`` in arch/x86/include/asm/kgdb.h)."""

PACKET_DIGITS = 2 * sum(KGDB_LAYOUT.sizes_bytes)
"""Hexadecimal digits of a ``g`` packet."""

PT_REGS_OFFSETS = {
    name: 8 * index
    for index, name in enumerate(
        ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8")
        + ("rax", "rcx", "rdx", "rsi", "rdi", "orig_ax", "rip", "cs", "eflags", "rsp", "ss")
    )
}
"""Offsets in ``struct pt_regs`` in bytes (arch/x86/include/asm/ptrace.h)."""

# KGDB has no place for them in pt_regs and sends whatever was there.
_NEVER = frozenset({"ds", "es"})
# All that switch_to() leaves of a sleeping task (sleeping_thread_to_gdb_regs() in
# arch/x86/kernel/kgdb.c). The others come as zeros.
_SLEEPING = frozenset({"rbp", "rsp"})
_SHADOW = 1 << 31


def shadow_thread(cpu: int) -> bytes:
    """Thread ID of a CPU: -CPU - 2 (shadow_pid() in kernel/debug/gdbstub.c)."""
    return b"%x" % ((-cpu - 2) & 0xFFFFFFFF)


def cpu_of_shadow(thread: int) -> int | None:
    """CPU of a thread ID; None if it is a task's."""
    return (1 << 32) - thread - 2 if thread >= _SHADOW else None


def thread_ids(reply: bytes) -> list[int]:
    """Thread IDs of an answer to ``qfThreadInfo`` or ``qsThreadInfo``.

    :raises ProtocolError: if it is none
    """
    try:
        return [int(each, 16) for each in reply[1:].split(b",") if each]
    except ValueError as e:
        raise ProtocolError(f"KGDB answers {reply[:40]!r} for a list of threads") from e


class KgdbRegisters(MutableMapping[str, int]):
    """Registers of one thread, with those alone that KGDB knows.

    :param packet: the bytes of a ``g`` packet
    :param more: registers that are not in it, looked up when they are asked for
    :ivar sleeping: whether it is a task that does not run, of which little is known
    """

    def __init__(self, packet: bytes, more: Mapping[str, Callable[[], int]] | None = None) -> None:
        self._packet = packet
        self._values = KGDB_LAYOUT.unpack(packet)
        self._more = dict(more or {})
        self.sleeping = self._values["rip"] == 0

    def __getitem__(self, name: str) -> int:
        if not self._has(name):
            if name not in self._more:
                raise KeyError(name)
            return self._more[name]()
        return self._values[name]

    def __setitem__(self, name: str, value: int) -> None:
        if not self._has(name):
            raise KeyError(name)
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        raise TypeError("a register cannot be deleted")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._has(name) or name in self._more)

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in KGDB_LAYOUT.names if self._has(name))
        yield from self._more

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __copy__(self) -> "KgdbRegisters":
        other = KgdbRegisters(self._packet, self._more)
        for name in KGDB_LAYOUT.names:
            if self._has(name):
                other._values[name] = self._values[name]
        return other

    def _has(self, name: str) -> bool:
        known = _SLEEPING if self.sleeping else KGDB_LAYOUT.number
        return name in known and name not in _NEVER
