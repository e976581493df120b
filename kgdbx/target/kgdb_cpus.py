"""The CPUs at a stop of KGDB: which one it was, and the registers of all."""

import functools
from collections.abc import Callable

from kgdbx.arch.registers import Registers
from kgdbx.errors import ProtocolError, TargetError, Unsupported
from kgdbx.target.kgdb_memory import KgdbMemory
from kgdbx.target.kgdb_packets import KgdbPackets
from kgdbx.target.kgdb_state import KgdbState
from kgdbx.target.kgdb_threads import (
    KGDB_LAYOUT,
    PACKET_DIGITS,
    KgdbRegisters,
    cpu_of_shadow,
    shadow_thread,
    thread_ids,
)
from kgdbx.target.stub import decode_hex

__all__ = ("KgdbCpus",)

_RIP = KGDB_LAYOUT.number["rip"]
_RIP_DIGITS = 2 * KGDB_LAYOUT.sizes_bytes[_RIP]


class KgdbCpus:
    """Registers of a kernel that stands.

    :ivar numbers: the CPUs, counted from 0
    :ivar state: what the packets do not tell; None as long as the kernel is unknown
    :ivar stopped: the CPU that stopped
    :ivar rip: what KGDB has for ``rip`` of that one
    :ivar moved: where that one is to go on, if it is not there; goes out with the command that
        lets it run
    """

    def __init__(self, connection: KgdbPackets, memory: KgdbMemory) -> None:
        self._connection = connection
        self._memory = memory
        self.numbers: tuple[int, ...] = (0,)
        self.state: KgdbState | None = None
        self.stopped = 0
        self.rip = 0
        self.moved: int | None = None
        self._stops = 0
        self._selected: int | None = None  # the CPU whose registers g gives
        self._packets: dict[int, bytes] = {}  # g packets of this stop
        self._hits: dict[int, bool] = {}  # whether this stop is one of a debug register

    def list(self) -> None:
        """Ask which CPUs there are."""
        reply = self._connection.read(b"qfThreadInfo", lambda reply: reply[:1] == b"m")
        cpus = (cpu_of_shadow(thread) for thread in thread_ids(reply))
        self.numbers = tuple(sorted(cpu for cpu in cpus if cpu is not None)) or (0,)

    def at_stop(self, packet: bytes) -> None:
        """Find out which CPU stopped, and where.

        :param packet: the stop reply
        """
        self.forget()
        self.stopped = self._find(packet)
        reply = self._connection.read(b"p%x" % _RIP, lambda reply: len(reply) == _RIP_DIGITS)
        self.rip = int.from_bytes(decode_hex(reply), "little")

    def forget(self) -> None:
        """The kernel runs."""
        self._stops += 1
        self._selected = None
        self._packets.clear()
        self._hits.clear()
        self.moved = None

    def has_hit(self, address: int) -> bool:
        """Whether the CPU that stopped has hit a debug register since its stop before.

        :param address: what the debug register holds
        """
        if address not in self._hits:
            state = self.state
            self._hits[address] = state is not None and state.hit_again(address, self.stopped)
        return self._hits[address]

    def registers(self, cpu: int) -> Registers:
        """Registers of a CPU, read when they are asked for, as long as the kernel stands."""
        load = functools.partial(self._packet_of_stop, self._stops, cpu)
        rip = None
        if cpu == self.stopped:
            rip = self.rip if self.moved is None else self.moved
        elif cpu not in self.numbers:
            raise Unsupported(f"there is no CPU {cpu}; there are {len(self.numbers)}")
        return Registers(KgdbRegisters(load, rip, self._more(cpu)))

    def thread(self, pid: int) -> Registers:
        """Registers of a task.

        :raises TargetError: if there is no such task
        """
        self._selected = None
        if self._connection.exchange(b"Hg%x" % pid, _is_ok_or_error)[0] != b"OK":
            raise TargetError(f"KGDB knows no task {pid}")
        packet = self._read_g()
        return Registers(KgdbRegisters(lambda: packet))

    def write(self, cpu: int, name: str, value: int) -> None:
        """Write a register.

        :raises Unsupported: for one that is not known, or not reached without the state
        """
        if name not in KGDB_LAYOUT.number:
            raise Unsupported(f"KGDB does not write {name}")
        if name == "rip" and cpu == self.stopped:
            self.moved = value
            return
        self.write_through(cpu, name, value)

    def write_through(self, cpu: int, name: str, value: int) -> None:
        """As :meth:`write`, at once also for ``rip``."""
        number = KGDB_LAYOUT.number[name]
        data = value.to_bytes(KGDB_LAYOUT.sizes_bytes[number], "little")
        # KGDB says OK to rsp and leaves it as it is (dbg_set_reg() in arch/x86/kernel/kgdb.c).
        if name == "rsp" or cpu != self.stopped:
            if self.state is None:
                raise Unsupported(
                    f"KGDB writes no {name} of CPU {cpu}; attach with the kernel's symbols"
                )
            self._memory.write(self.state.register_address(cpu, name), data)
        else:
            self._select(cpu)
            self._expect_ok(b"P%x=%b" % (number, data.hex().encode()))
        self._packets.pop(cpu, None)

    def _more(self, cpu: int) -> dict[str, Callable[[], int]]:
        if self.state is None:
            return {}
        return {
            "gs_base": functools.partial(self.state.gs_base, cpu),
            "cr3": functools.partial(self.state.cr3, cpu),
        }

    def _find(self, packet: bytes) -> int:
        thread = packet[3:].partition(b"thread:")[2].rstrip(b";")
        shadow = cpu_of_shadow(int(thread, 16)) if thread else None
        if len(self.numbers) == 1:
            cpu = self.numbers[0]
        elif shadow is not None:
            cpu = shadow
        elif self.state is not None:
            cpu = self.state.active_cpu()
        else:
            return self._compare()
        self._selected = cpu  # g is about the CPU that stopped, until another one is asked for
        return cpu

    def _compare(self) -> int:
        # The task is told and not the CPU: it is the one whose registers are those of the task.
        found = self._read_g()
        for cpu in self.numbers:
            if self._packet(cpu) == found:
                return cpu
        raise ProtocolError("KGDB stopped on none of its CPUs")

    def _packet_of_stop(self, stop: int, cpu: int) -> bytes:
        if stop != self._stops:
            raise Unsupported("these registers are of an earlier stop, and were not read then")
        return self._packet(cpu)

    def _packet(self, cpu: int) -> bytes:
        packet = self._packets.get(cpu)
        if packet is None:
            self._select(cpu)
            packet = self._packets[cpu] = self._read_g()
        return packet

    def _read_g(self) -> bytes:
        return decode_hex(self._connection.read(b"g", lambda reply: len(reply) == PACKET_DIGITS))

    def _select(self, cpu: int) -> None:
        if cpu != self._selected:
            self._expect_ok(b"Hg" + shadow_thread(cpu))
            self._selected = cpu

    def _expect_ok(self, packet: bytes) -> None:
        reply, _ = self._connection.exchange(packet, _is_ok_or_error)
        if reply != b"OK":
            raise ProtocolError(f"KGDB answers {reply!r} to {packet!r}")


def _is_ok_or_error(reply: bytes) -> bool:
    return reply == b"OK" or (len(reply) == 3 and reply[:1] == b"E")
