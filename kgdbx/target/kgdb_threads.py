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

    Over a serial line a ``g`` packet takes its time, and most hits need but ``rip``.

    :param load: gives the bytes of a ``g`` packet, when a register of it is asked for
    :param rip: its value, if it is known without
    :param more: registers that are not in the packet, looked up when they are asked for
    """

    def __init__(
        self,
        load: Callable[[], bytes],
        rip: int | None = None,
        more: Mapping[str, Callable[[], int]] | None = None,
    ) -> None:
        self._load = load
        self._more = dict(more or {})
        self._loaded: MutableMapping[str, int] | None = None
        self._known = {} if rip is None else {"rip": rip}
        self._sleeping = False

    def __getitem__(self, name: str) -> int:
        if name in self._known:
            return self._known[name]
        if name in self._more:
            return self._more[name]()
        if not self._has(name):
            raise KeyError(name)
        return self._values()[name]

    def __setitem__(self, name: str, value: int) -> None:
        if not self._has(name):
            raise KeyError(name)
        self._known[name] = value

    def __delitem__(self, name: str) -> None:
        raise TypeError("a register cannot be deleted")

    def __contains__(self, name: object) -> bool:
        return name in self._known or (
            isinstance(name, str) and (name in self._more or self._has(name))
        )

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in KGDB_LAYOUT.names if self._has(name))
        yield from self._more

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __copy__(self) -> "KgdbRegisters":
        values = self._values()  # the copy may outlive the stop
        other = KgdbRegisters(self._load, None, self._more)
        other._loaded, other._sleeping = values, self._sleeping
        other._known = dict(self._known)
        return other

    def _has(self, name: str) -> bool:
        if name not in KGDB_LAYOUT.number or name in _NEVER:
            return False
        # A task that runs has an address.
        if not self._known.get("rip"):
            self._values()
        return not self._sleeping or name in _SLEEPING

    def _values(self) -> MutableMapping[str, int]:
        if self._loaded is None:
            self._loaded = KGDB_LAYOUT.unpack(self._load())
            self._sleeping = self._loaded["rip"] == 0
        return self._loaded
