"""A kernel behind QEMU's gdbstub, driven over the remote serial protocol without gdb."""

import contextlib
import errno
import math
import time
from collections.abc import Iterator

from kgdbx.arch.registers import Registers
from kgdbx.errors import ProbeError, ProtocolError, TargetLost, TargetTimeout, Unsupported
from kgdbx.target import stub
from kgdbx.target.base import (
    DEBUG_REGISTERS,
    BreakpointKind,
    Capabilities,
    Stop,
    StopReason,
    check_debug_register,
)
from kgdbx.target.packet import PacketConnection, connect_stream
from kgdbx.target.ram import GuestRam
from kgdbx.target.run_loop import RunLoop

__all__ = ("RspTarget", "release_stub")

_ANSWER_S = 5.0


class RspTarget(RunLoop):
    """A target over the stub's own socket.

    Connecting stops the VM and removes breakpoints that a debugger which died left behind.

    :param address: path of the stub's Unix socket, or ``host:port``
    :param ram: the guest's RAM seen from the host, if it can be
    :param answer_s: seconds that the stub has for an answer
    :param stands: the VM stands and is not to run: what a debugger left behind stays then, as it
        goes with a detach, which lets the VM run
    :raises TargetError: if nothing listens at the address, or no stub answers
    """

    def __init__(
        self,
        address: str,
        *,
        ram: GuestRam | None = None,
        answer_s: float = _ANSWER_S,
        stands: bool = False,
    ) -> None:
        self._address = address
        self._ram = ram
        self._answer_s = answer_s
        self._breakpoints: set[tuple[BreakpointKind, int, int]] = set()
        self._queued: list[bytes] = []  # packets whose answer must be OK, sent with the next one
        self._owed = 0  # OKs that were not read yet
        self._unanswered = 0  # packets whose answer did not come in time, or not yet
        self._running = False
        self._closed = False
        self._register_thread: int | None = None
        if not stands:
            release_stub(address, answer_s)
        self._connection = PacketConnection(connect_stream(address, answer_s))
        try:
            with _one_at_a_time(address):
                self._packet_bytes = self._handshake()
            self._stop = stub.parse_stop(self._exchange(b"?"))
            self._threads = self._list_threads()
            self._layout = stub.read_layout(self._exchange, self._packet_bytes)
            physical = ram is not None or self._exchange(b"Qqemu.PhyMemMode:0") == b"OK"
            self._capabilities = Capabilities(
                hardware_breakpoints=DEBUG_REGISTERS,
                software_breakpoints=None,
                physical_memory=physical,
                reads_while_running=ram is not None,
                writes_while_running=ram is not None,
                cheap_watchpoints=True,
            )
        except BaseException:
            self._connection.close()
            raise

    @property
    def name(self) -> str:
        return self._address

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def connection(self) -> PacketConnection:
        """The packet layer, for its counters."""
        return self._connection

    def cpus(self) -> tuple[int, ...]:
        return tuple(self._threads)

    # Memory

    def read_memory(self, address: int, size_bytes: int, *, cpu: int | None = None) -> bytes:
        self._select(cpu)
        return self._read(address, size_bytes, physical=False)

    def write_memory(self, address: int, data: bytes, *, cpu: int | None = None) -> None:
        self._select(cpu)
        self._write(address, data, physical=False)

    def read_physical(self, address: int, size_bytes: int) -> bytes:
        if self._ram is not None:
            return self._ram.read(address, size_bytes)
        self._enter_physical_mode()
        try:
            return self._read(address, size_bytes, physical=True)
        finally:
            self._expect_ok(b"Qqemu.PhyMemMode:0")

    def write_physical(self, address: int, data: bytes) -> None:
        if self._running and self._ram is not None:
            self._ram.write(address, data)
            return
        # At a stop never through the mapped RAM: only the stub makes TCG drop translated code.
        self._enter_physical_mode()
        try:
            self._write(address, data, physical=True)
        finally:
            self._expect_ok(b"Qqemu.PhyMemMode:0")

    def flush_translations(self) -> None:
        self._require_stopped("flushing translations")
        stub.flush_translations(self._exchange)

    def _enter_physical_mode(self) -> None:
        self._require_stopped("physical memory through the stub")
        if self._exchange(b"Qqemu.PhyMemMode:1") != b"OK":
            raise Unsupported(f"the stub at {self.name} reads virtual memory only")

    def _read(self, address: int, size_bytes: int, *, physical: bool) -> bytes:
        self._require_stopped("memory through the stub")
        return stub.read_memory(
            self._exchange, self._packet_bytes, address, size_bytes, physical=physical
        )

    def _write(self, address: int, data: bytes, *, physical: bool) -> None:
        self._require_stopped("memory through the stub")
        stub.write_memory(self._exchange, self._packet_bytes, address, data, physical=physical)

    # Registers

    def read_registers(self, cpu: int) -> Registers:
        self._require_stopped("registers")
        self._select(cpu)
        return Registers(self._layout.unpack(stub.decode_hex(self._exchange(b"g"))))

    def write_registers(self, cpu: int, registers: Registers) -> None:
        self._require_stopped("registers")
        changed = registers.changed
        if changed:
            self._select(cpu)
        for name, value in changed.items():
            number = self._layout.number[name]
            size = self._layout.sizes_bytes[number]
            value_hex = value.to_bytes(size, "little").hex().encode()
            self._queued.append(b"P%x=%b" % (number, value_hex))

    # Breakpoints

    def insert_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        key = (kind, address, size_bytes)
        if key in self._breakpoints:
            raise ProbeError(f"there is a {kind.name} breakpoint at {address:#x}", errno.EBUSY)
        check_debug_register(self._breakpoints, kind, size_bytes)
        reply = self._exchange(b"Z%d,%x,%x" % (kind, address, size_bytes))
        if not reply:
            raise Unsupported(f"the stub at {self.name} has no {kind.name} breakpoints")
        if reply != b"OK":
            raise ProbeError(
                f"the stub refuses a {kind.name} breakpoint at {address:#x}: {reply!r}",
                errno.ENOSPC,
            )
        self._breakpoints.add(key)

    def remove_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        key = (kind, address, size_bytes)
        if key in self._breakpoints:
            self._expect_ok(b"z%d,%x,%x" % (kind, address, size_bytes))
            self._breakpoints.discard(key)

    # Run control

    def step(self, cpu: int) -> Stop:
        self._require_stopped("a step")
        before = self.read_registers(cpu).rip
        for _ in range(stub.STEP_TRIES):
            self._start(b"vCont;s:%b" % self._threads[cpu])
            stop = self._stopped(self._await_stop())
            if stop.reason is not StopReason.TRAP or self.read_registers(cpu).rip != before:
                break
        return stop

    def resume(self) -> None:
        if not self._running:
            self._start(b"vCont;c")

    def interrupt(self) -> Stop:
        if self._running:
            self._connection.send_raw(b"\x03")
            self._stopped(self._await_stop())
        return self._stop

    def request_stop(self) -> None:
        self._connection.wake()

    def forget_stop_request(self) -> None:
        self._connection.forget_wake()

    @property
    def _stop_is_requested(self) -> bool:
        return self._connection.woken

    def _next_stop(self, until: float) -> Stop | None:
        left = None if until == math.inf else max(0.0, until - time.monotonic())
        packet = self._connection.receive_or_wake(left)
        return None if packet is None or self._settle(packet) else self._stopped(packet)

    def _start(self, packet: bytes) -> None:
        queued, self._queued = self._queued, []
        self._owed += len(queued)
        self._running = True
        self._connection.send(*queued, packet)

    def _await_stop(self) -> bytes:
        while True:
            try:
                packet = self._connection.receive(self._answer_s)
            except TargetLost:
                self._running = False
                raise
            if not self._settle(packet):
                return packet

    def _settle(self, packet: bytes) -> bool:
        # Answers to register writes that went out together with the resume come before the stop.
        if not self._owed:
            return False
        self._owed -= 1
        if packet != b"OK":
            raise ProtocolError(f"the stub refuses to write a register: {packet!r}")
        return True

    def _stopped(self, packet: bytes) -> Stop:
        self._running = False
        self._stop = stub.parse_stop(packet)
        # gdb_set_stop_cpu() in gdbstub/gdbstub.c: but not for a watchpoint.
        selected = self._stop.reason is not StopReason.WATCHPOINT
        self._register_thread = self._stop.cpu if selected else None
        return self._stop

    def close(self, *, resume: bool = True) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if self._running:
                self.interrupt()
            if resume:
                self._exchange(b"D;1")  # removes every breakpoint, and the VM runs on
            else:
                for kind, address, size in tuple(self._breakpoints):
                    self.remove_breakpoint(kind, address, size)
        except TargetLost:
            self._running = False  # a guest that is gone needs no cleaning
        finally:
            self._breakpoints.clear()
            self._connection.close()

    # Protocol

    def _handshake(self) -> int:
        self._connection.send(b"qSupported:multiprocess+;xmlRegisters=i386;vContSupported+")
        while True:
            reply = self._connection.receive(self._answer_s)
            if size := stub.max_packet_bytes(reply):
                return size
            if not reply.startswith((b"T", b"S")):
                raise ProtocolError(f"{self.name} answers {reply[:40]!r}; is this a gdb stub?")

    def _exchange(self, packet: bytes) -> bytes:
        queued, self._queued = self._queued, []
        late = self._unanswered
        self._unanswered += len(queued) + 1
        self._connection.send(*queued, packet)
        for _ in range(late):
            self._answer()
        for _ in queued:
            reply = self._answer()
            if reply != b"OK":
                raise ProtocolError(f"the stub refuses to write a register: {reply!r}")
        return self._answer()

    def _answer(self) -> bytes:
        reply = self._connection.receive(self._answer_s)
        self._unanswered -= 1
        return reply

    def _expect_ok(self, packet: bytes) -> None:
        reply = self._exchange(packet)
        if reply != b"OK":
            raise ProtocolError(f"the stub answers {reply!r} to {packet!r}")

    def _list_threads(self) -> dict[int, bytes]:
        threads: list[bytes] = []
        reply = self._exchange(b"qfThreadInfo")
        while reply.startswith(b"m"):
            threads += reply[1:].split(b",")
            reply = self._exchange(b"qsThreadInfo")
        return {stub.cpu_of(thread): thread for thread in threads} or {0: b"p1.1"}

    def _select(self, cpu: int | None) -> None:
        cpu = self._stop.cpu if cpu is None else cpu
        if cpu != self._register_thread:
            if cpu not in self._threads:
                raise Unsupported(f"there is no vCPU {cpu}; there are {len(self._threads)}")
            self._expect_ok(b"Hg" + self._threads[cpu])
            self._register_thread = cpu

    def _require_stopped(self, what: str) -> None:
        if self._running:
            raise Unsupported(f"{what} needs a stopped kernel; interrupt it first")


def release_stub(address: str, answer_s: float = _ANSWER_S) -> None:
    """Have a stub drop the breakpoints of a debugger that died, before it is connected to.

    They go with a detach, which ends the attachment too.

    :param address: path of the stub's Unix socket, or ``host:port``
    :param answer_s: seconds that the stub has for an answer
    :raises TargetTimeout: if it gives none, as while another debugger is attached
    :raises TargetError: if nothing listens there
    """
    connection = PacketConnection(connect_stream(address, answer_s))
    try:
        connection.send(b"D;1")
        with _one_at_a_time(address):
            while connection.receive(answer_s) not in (b"OK", b""):
                pass  # the stop reply that QEMU before 9.0 sends on connect
    finally:
        connection.close()


@contextlib.contextmanager
def _one_at_a_time(address: str) -> Iterator[None]:
    # What it means that a stub gives no answer to the first that it is asked.
    try:
        yield
    except TargetTimeout as e:
        raise TargetTimeout(
            f"{e}: {address} serves one debugger at a time, and another one may be attached"
        ) from e
