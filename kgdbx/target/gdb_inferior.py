"""A kernel over gdb's own connection; runs inside gdb's Python.

gdb keeps its breakpoints, its user interface and its run control. Registers, memory and steps go
past it in packets of our own, and gdb is told to forget what it has cached.
"""

import contextlib
import dataclasses
import errno
import functools
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import gdb

from kgdbx.arch.registers import Registers
from kgdbx.errors import ProbeError, ProtocolError, TargetError, TargetLost, Unsupported
from kgdbx.target import stub
from kgdbx.target.base import (
    DEBUG_REGISTERS,
    IDLE_S,
    BreakpointKind,
    Capabilities,
    Stop,
    StopReason,
    Target,
    check_debug_register,
)
from kgdbx.target.gdb_settings import GdbSettings
from kgdbx.target.ram import GuestRam

__all__ = ("GdbTarget", "user_breakpoints")

_RETRY_S = 0.25
_WORDS = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "unsigned long"}
_ESCAPED = re.compile(rb"\}(.)", re.DOTALL)
_Key = tuple[BreakpointKind, int, int]


class GdbTarget(Target):
    """A target inside gdb.

    Breakpoints are internal ones of gdb, so that the user's own ``continue`` runs probes too:
    :attr:`on_stop` is asked at each stop at one of ours. What it raises is kept in
    :attr:`errors`, printed once, and the kernel runs on. ``^C`` while it runs stops the kernel.

    Two settings of gdb are changed until :meth:`close`:

    - ``set remote swbreak-feature-packet on``. gdb otherwise takes a stop one byte behind a
      breakpoint for a hit of it and moves the program counter back, although QEMU reports it
      exactly: an instruction of one byte (``push %rbp``) would be executed twice.
    - ``handle SIGTRAP nostop noprint``. With several vCPUs QEMU can report a vCPU again whose
      breakpoint has been dealt with; gdb then runs on silently. A breakpoint's stop is no signal
      to gdb and is shown as before.

    gdb steps over a breakpoint that lies where a handled one left the program counter. If it is
    the user's, we stop there, and the next ``continue`` takes it; :meth:`run` does so itself.

    :meth:`resume` is ``continue &``: gdb handles stops only when no command runs, so that
    :meth:`interrupt` cannot wait for one.

    :param address: what ``target remote`` takes; None for the connection that gdb has
    :param ram: the guest's RAM seen from the host, if it can be
    :raises TargetError: if gdb is not connected to a stub, or cannot be
    """

    def __init__(self, address: str | None = None, *, ram: GuestRam | None = None) -> None:
        self.on_stop: Callable[[Stop], bool] | None = None
        self.on_hit: Callable[[], None] = lambda: None
        self.errors: list[BaseException] = []
        self._ram = ram
        self._owns_connection = address is not None
        self._closed = False
        self._breakpoints: dict[_Key, _Breakpoint] = {}
        self._retired: list[_Breakpoint] = []  # disabled, to be deleted at a safe moment
        self._run: _Run | None = None
        self._stop_requested = False
        self._posted: set[object] = set()
        self._hits = 0
        self._hit_cpu: int | None = None  # while gdb asks whether to stop
        self._general_cpu = 0  # whose registers the stub reads, during a hit
        self._pc: int | None = None
        self._stale = False
        self._printed = False
        self._connection = _connect(address)
        self._name = str(self._connection.details)
        self._exited = False
        gdb.events.exited.connect(self._on_exited)
        gdb.events.stop.connect(self._on_stop_event)
        self._settings = self._change_settings()
        _New()
        try:
            self._learn()
        except BaseException:
            self.close(resume=False)
            raise

    def _change_settings(self) -> GdbSettings:
        return GdbSettings({"remote swbreak-feature-packet": "on"})

    # What this stub is and has.
    def _learn(self) -> None:
        self._packet_bytes = self._ask_packet_bytes()
        self._stop = Stop(self._selected_cpu(), StopReason.INTERRUPT, None, 2)
        self._layout = stub.read_layout(self._exchange, self._packet_bytes)
        physical = self._ram is not None or self._exchange(b"Qqemu.PhyMemMode:0") == b"OK"
        self._capabilities = Capabilities(
            hardware_breakpoints=DEBUG_REGISTERS,
            software_breakpoints=None,
            physical_memory=physical,
            reads_while_running=self._ram is not None,
            writes_while_running=self._ram is not None,
            single_cpu_step=b"s" in self._exchange(b"vCont?"),
            clock_stops=True,
        )

    @property
    def name(self) -> str:
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def running(self) -> bool:
        if self._hit_cpu is not None or not self._connected:
            return False
        thread = gdb.selected_thread()
        return thread is not None and bool(thread.is_running())

    @property
    def _connected(self) -> bool:
        return bool(self._connection.is_valid()) and not self._exited

    @property
    def in_hit(self) -> bool:
        """Whether gdb asks about a hit of one of our breakpoints."""
        return self._hit_cpu is not None

    @property
    def in_run(self) -> bool:
        """Whether :meth:`run` is under way; otherwise it is the user who lets the kernel run."""
        return self._run is not None

    @property
    def stop_requested(self) -> bool:
        """Whether the kernel is to stop, and runs still."""
        return self._stop_requested

    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(self._threads()))

    def looked_at(self) -> int:
        """CPU number of the thread that gdb's user has selected."""
        return self._selected_cpu() if gdb.selected_thread() is not None else 0

    # Memory

    def read_memory(self, address: int, size_bytes: int, *, cpu: int | None = None) -> bytes:
        self._require_stopped("memory through the stub")
        with self._general_thread(cpu):
            return stub.read_memory(self._exchange, self._packet_bytes, address, size_bytes)

    def write_memory(self, address: int, data: bytes, *, cpu: int | None = None) -> None:
        self._require_stopped("memory through the stub")
        with self._general_thread(cpu):
            stub.write_memory(self._exchange, self._packet_bytes, address, data)
        _execute("maint flush dcache")

    def read_physical(self, address: int, size_bytes: int) -> bytes:
        if self._ram is not None:
            return self._ram.read(address, size_bytes)
        with self._physical_mode():
            return stub.read_memory(
                self._exchange, self._packet_bytes, address, size_bytes, physical=True
            )

    def write_physical(self, address: int, data: bytes) -> None:
        if self._ram is not None and self.running:
            self._ram.write(address, data)
            return
        # At a stop never through the mapped RAM: only the stub makes TCG drop translated code.
        with self._physical_mode():
            stub.write_memory(self._exchange, self._packet_bytes, address, data, physical=True)
        _execute("maint flush dcache")

    @contextlib.contextmanager
    def _physical_mode(self) -> Iterator[None]:
        self._require_stopped("physical memory through the stub")
        if self._exchange(b"Qqemu.PhyMemMode:1") != b"OK":
            raise Unsupported(f"the stub at {self.name} reads virtual memory only")
        try:
            yield
        finally:
            self._expect_ok(b"Qqemu.PhyMemMode:0")

    # Registers

    def flush_translations(self) -> None:
        self._require_stopped("flushing translations")
        stub.flush_translations(self._exchange)

    def read_registers(self, cpu: int) -> Registers:
        self._require_stopped("registers")
        with self._general_thread(cpu):
            return Registers(self._layout.unpack(stub.decode_hex(self._exchange(b"g"))))

    def write_registers(self, cpu: int, registers: Registers) -> None:
        self._require_stopped("registers")
        changed = registers.changed
        if not changed:
            return
        with self._general_thread(cpu):
            for name, value in changed.items():
                number = self._layout.number[name]
                size = self._layout.sizes_bytes[number]
                value_hex = value.to_bytes(size, "little").hex().encode()
                self._expect_ok(b"P%x=%b" % (number, value_hex))
        if cpu == self._hit_cpu:
            self._pc = changed.get("rip", self._pc)
        self._forget_registers()

    # Breakpoints

    def insert_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        self._require_stopped("a breakpoint")
        key = (kind, address, size_bytes)
        if key in self._breakpoints:
            raise ProbeError(f"there is a {kind.name} breakpoint at {address:#x}", errno.EBUSY)
        check_debug_register(self._breakpoints, kind, size_bytes)
        for retired in self._retired:
            if retired.key == key:
                self._retired.remove(retired)
                retired.enabled = True
                self._breakpoints[key] = retired
                return
        try:
            self._breakpoints[key] = _Breakpoint(self, key)
        except (gdb.error, RuntimeError) as e:
            raise ProbeError(
                f"gdb refuses a {kind.name} breakpoint at {address:#x}: {e}", errno.ENOSPC
            ) from e

    def remove_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        found = self._breakpoints.pop((kind, address, size_bytes), None)
        if found is None:
            return
        if self._hit_cpu is None:
            found.delete()
        else:
            # gdb 13 crashes when it reports a hit of a breakpoint that is deleted meanwhile.
            # Disabling takes it out of the guest.
            found.enabled = False
            found.retired_at = self._hits
            self._retired.append(found)

    def _delete_retired(self, stopped_at: int | None) -> None:
        # During a hit: those that gdb does not look at for this stop. They lie elsewhere, and
        # no watchpoint is among them.
        for each in tuple(self._retired):
            kind, address, _ = each.key
            elsewhere = kind < BreakpointKind.WATCH_WRITE and address != stopped_at
            if stopped_at is None or (elsewhere and each.retired_at < self._hits):
                self._retired.remove(each)
                each.delete()

    # Run control

    def step(self, cpu: int) -> Stop:
        self._require_stopped("a step")
        before = self.read_registers(cpu).rip
        for _ in range(stub.STEP_TRIES):
            self._step_once(cpu)
            reason = self._stop.reason
            if reason is not StopReason.TRAP or self.read_registers(cpu).rip != before:
                break
        return self._stop

    def _step_once(self, cpu: int) -> None:
        threads = self._threads()
        here = self._general()
        self._stop = stub.parse_stop(self._exchange(b"vCont;s:" + threads[cpu]))
        if self._stop.cpu != here:  # gdb_set_stop_cpu() in gdbstub/gdbstub.c
            self._expect_ok(b"Hg" + threads[here])
        self._forget_registers()

    def resume(self) -> None:
        if not self.running:
            self._require_stopped("resuming")
            self._execute("continue &")

    def interrupt(self) -> Stop:
        if self.running:
            raise Unsupported(
                "gdb cannot wait for a stop inside of a command; use 'interrupt' at its prompt, "
                "or run with a time limit"
            )
        if not self._connected:
            raise TargetLost(f"the guest at {self.name} is gone")
        return self._stop

    def request_stop(self) -> None:
        self._stop_requested = True
        if self._run is not None:
            self._post_interrupt(self._run)

    def forget_stop_request(self) -> None:
        self._stop_requested = False

    def run(
        self,
        on_stop: Callable[[Stop], bool] | None = None,
        timeout_s: float | None = None,
        on_idle: Callable[[], None] | None = None,
        idle_s: float = IDLE_S,
    ) -> Stop | None:
        self._require_stopped("running")
        self._run = run = _Run(on_stop)
        timer = threading.Timer(timeout_s or 0.0, self._expire, (run,))
        timer.daemon = True
        idle: _IdleThread | None = None
        if on_idle is not None:
            call = functools.partial(self._call_idle, run, on_idle)
            idle = _IdleThread(self._post, call, idle_s)
        gdb.events.stop.connect(run.on_event)
        try:
            if timeout_s is not None:
                timer.start()
            if self._stop_requested:
                self._post_interrupt(run)
            while True:
                self._continue(run)
                if run.error is not None:
                    raise run.error
                ended = run.expired or self._stop_requested
                if ended and (run.hit is not None or run.interrupted):
                    return None
                if run.hit is not None:
                    return run.hit
                if not run.hands_over:
                    reason, signal = StopReason.TRAP, 5  # a breakpoint of the user
                    if run.interrupted:
                        reason, signal = StopReason.INTERRUPT, 2
                    self._stop = Stop(self._selected_cpu(), reason, None, signal)
                    return self._stop
        finally:
            self._run = None
            self._stop_requested = False
            timer.cancel()
            if idle is not None:
                idle.stop()
            run.retry.cancel()
            gdb.events.stop.disconnect(run.on_event)
            if self._connected:
                self._delete_retired(None)

    def _continue(self, run: "_Run") -> None:
        run.hit, run.interrupted, run.hands_over = None, False, False
        command = "continue"
        pc = self._own_breakpoint_here()
        if pc is not None:
            command = f"jump *{pc:#x}"  # to where it is: 'continue' would step over the breakpoint
        with _quiet():
            self._execute(command)
        if self._exited:
            raise TargetLost(f"the guest at {self.name} has shut down")

    def _own_breakpoint_here(self) -> int | None:
        # A stop may come just before a breakpoint is hit, which must not be missed then.
        pc = int(gdb.newest_frame().pc())
        return pc if self._at(pc) and not any(user_breakpoints(pc)) else None

    def _at(self, pc: int) -> "_Breakpoint | None":
        software = self._breakpoints.get((BreakpointKind.SOFTWARE, pc, 1))
        return software or self._breakpoints.get((BreakpointKind.HARDWARE, pc, 1))

    def _expire(self, run: "_Run") -> None:
        run.expired = True
        self._post_interrupt(run)

    def _post(self, action: Callable[[], None]) -> None:
        # Any thread may post an event; gdb takes it between two stops, while the guest runs.
        event = object()
        self._posted.add(event)

        def take() -> None:
            self._posted.discard(event)
            action()

        gdb.post_event(take)

    def _is_ending(self, run: "_Run") -> bool:
        return run.expired or self._stop_requested or run.error is not None

    def _post_interrupt(self, run: "_Run") -> None:
        def interrupt() -> None:
            if self._run is run and self._is_ending(run):
                with contextlib.suppress(gdb.error):
                    gdb.execute("interrupt", to_string=True)
                # The stub drops a break-in that meets a stop.
                run.retry.cancel()
                run.retry = threading.Timer(_RETRY_S, self._post_interrupt, (run,))
                run.retry.daemon = True
                run.retry.start()

        if self._run is run:
            self._post(interrupt)

    def _call_idle(self, run: "_Run", on_idle: Callable[[], None]) -> None:
        if self._run is run and self.running and not self._is_ending(run):
            try:
                on_idle()
            except BaseException as e:  # gdb would print it and wait on
                run.error = e
                self._post_interrupt(run)

    def close(self, *, resume: bool = True) -> None:
        if self._closed:
            return
        if self._hit_cpu is not None:
            raise Unsupported("a target cannot be closed while gdb handles a stop of it")
        self._closed = True
        try:
            if self._connected and not self.running:
                self._leave(resume)
        except gdb.error as e:
            if self._connected:
                raise TargetError(f"gdb cannot leave {self.name}: {e}") from e
        finally:
            self._breakpoints.clear()
            self._retired.clear()
            self._settings.restore()
            gdb.events.exited.disconnect(self._on_exited)
            gdb.events.stop.disconnect(self._on_stop_event)

    def _leave(self, resume: bool) -> None:
        self._delete_retired(None)
        for each in self._breakpoints.values():
            each.delete()
        for _ in range(3):
            if self._posted:
                # gdb crashes at its exit when an event is left over; a step takes them.
                with _quiet():
                    gdb.execute("stepi", to_string=True)
        if resume:
            gdb.execute("detach", to_string=True)
        elif self._owns_connection:
            gdb.execute("disconnect", to_string=True)

    # Hits

    def _hit(self, ours: "_Breakpoint") -> bool:
        # Called in place of a breakpoint's condition; whether gdb shall stop.
        if self._breakpoints.get(ours.key) is not ours:
            return False
        kind, address, _ = ours.key
        if kind >= BreakpointKind.WATCH_WRITE:
            return self._handle(StopReason.WATCHPOINT, address)
        return self._handle(StopReason.TRAP, None, elsewhere_than=address)

    # Whether gdb shall stop here.
    def _handle(
        self, reason: StopReason, watched: int | None, elsewhere_than: int | None = None
    ) -> bool:
        self._hits += 1
        self.on_hit()
        self._hit_cpu = self._general_cpu = cpu = self._selected_cpu()
        self._pc = None
        self._stop = stop = Stop(cpu, reason, watched)
        try:
            keep = self._dispatch(stop)
            if self._retired and elsewhere_than is not None:
                self._delete_retired(elsewhere_than)
        finally:
            self._hit_cpu = None
            if self._stale:
                _execute("maint flush register-cache")
                self._stale = False
        if not keep:
            return True
        return self._pc is not None and self._hands_over(self._pc)

    def _stop_at_interrupt(self) -> bool:
        # ^C during a hit, whoever was at work. Always stops.
        self._stop = dataclasses.replace(self._stop, reason=StopReason.INTERRUPT, signal=2)
        if self._run is not None:
            self._run.hit = self._stop
        return True

    def _dispatch(self, stop: Stop) -> bool:
        run = self._run
        callback = self.on_stop if run is None else run.on_stop
        keep = False
        try:
            keep = callback is not None and bool(callback(stop))
        except KeyboardInterrupt:
            stop = dataclasses.replace(stop, reason=StopReason.INTERRUPT, signal=2)
        except Exception as e:  # gdb must not see it in the middle of a stop
            if run is not None:
                run.error = run.error or e
            else:
                self._note(e)
                keep = self._connected
        if run is not None:
            keep = keep and not self._is_ending(run)
            run.hit = None if keep else stop
        elif keep and self._stop_requested:
            keep = False
            self._stop = dataclasses.replace(stop, reason=StopReason.INTERRUPT, signal=2)
        return keep

    def _note(self, error: BaseException) -> None:
        self.errors.append(error)
        if not self._printed:
            self._printed = True
            trace = "".join(traceback.format_exception(error))
            gdb.write(f"kgdbx: error at a probe; the kernel runs on:\n{trace}", gdb.STDERR)

    def _hands_over(self, pc: int) -> bool:
        # Whether a breakpoint of the user is next, which gdb would now step over.
        if len(gdb.breakpoints()) == len(self._breakpoints) + len(self._retired):
            return False  # all are ours
        for each in user_breakpoints(pc):
            if self._run is not None:
                self._run.hands_over = True
            else:
                gdb.write(f"kgdbx: breakpoint {each.number} is next; continue to take it\n")
            return True
        return False

    # gdb

    def _on_exited(self, event: Any) -> None:
        self._exited = True

    def _on_stop_event(self, event: Any) -> None:
        if self._run is not None:
            return
        self._stop_requested = False
        if getattr(event, "stop_signal", None) != "SIGINT":
            return
        # The user's next 'continue' would step over a breakpoint that is about to be hit.
        ours = self._at(int(gdb.newest_frame().pc()))
        if ours is not None:
            ours.stop()

    def _ask_packet_bytes(self) -> int:
        packet_bytes = stub.max_packet_bytes(self._exchange(b"qSupported"))
        if packet_bytes is None:
            raise ProtocolError(f"{self.name} does not say its packet size; is this a gdb stub?")
        return packet_bytes

    def _require_stopped(self, what: str) -> None:
        if not self._connected:
            raise TargetLost(f"the guest at {self.name} is gone")
        if self.running:
            raise Unsupported(f"{what} needs a stopped kernel; interrupt it first")

    def _threads(self) -> dict[int, bytes]:
        ids = (thread.ptid for thread in gdb.selected_inferior().threads())
        return {max(0, lwp - 1): b"p%x.%x" % (pid, lwp) for pid, lwp, _ in ids}

    def _selected_cpu(self) -> int:
        thread = gdb.selected_thread()
        if thread is None:
            raise TargetLost(f"the guest at {self.name} is gone")
        return max(0, int(thread.ptid[1]) - 1)

    def _general(self) -> int:
        # The vCPU that the stub's register packets are about, as far as gdb knows.
        if self._hit_cpu is not None:
            return self._general_cpu
        _execute("maint flush register-cache")
        gdb.newest_frame().pc()  # gdb selects its thread in the stub to read this
        return self._selected_cpu()

    @contextlib.contextmanager
    def _general_thread(self, cpu: int | None) -> Iterator[None]:
        cpu = self._stop.cpu if cpu is None else cpu
        here = self._general()
        if cpu == here:
            yield
            return
        threads = self._threads()
        if cpu not in threads:
            raise Unsupported(f"there is no vCPU {cpu}; there are {len(threads)}")
        self._expect_ok(b"Hg" + threads[cpu])
        try:
            yield
        finally:
            self._expect_ok(b"Hg" + threads[here])

    def _forget_registers(self) -> None:
        if self._hit_cpu is not None:
            self._stale = True  # once, when the hit is over
        else:
            _execute("maint flush register-cache")

    def _exchange(self, packet: bytes) -> bytes:
        try:
            reply = self._connection.send_packet(packet) or b""
        except (gdb.error, RuntimeError) as e:
            raise self._translated(e) from e
        return _ESCAPED.sub(lambda m: bytes((m[1][0] ^ 0x20,)), reply) if b"}" in reply else reply

    def _expect_ok(self, packet: bytes) -> None:
        reply = self._exchange(packet)
        if reply != b"OK":
            raise ProtocolError(f"the stub answers {reply!r} to {packet!r}")

    def _execute(self, command: str) -> None:
        try:
            gdb.execute(command, to_string=True)
        except gdb.error as e:
            raise self._translated(e) from e

    def _translated(self, error: Exception) -> TargetError:
        if not self._connected:
            return TargetLost(f"the guest at {self.name} is gone: {error}")
        return TargetError(f"gdb: {error}")


class _Run:
    # One GdbTarget.run().

    def __init__(self, on_stop: Callable[[Stop], bool] | None) -> None:
        self.on_stop = on_stop
        self.expired = False
        self.hit: Stop | None = None
        self.interrupted = False
        self.hands_over = False
        self.error: BaseException | None = None
        self.retry = threading.Timer(0, lambda: None)

    def on_event(self, event: Any) -> None:
        self.interrupted = getattr(event, "stop_signal", None) == "SIGINT"


class _IdleThread:
    # Has a function called in gdb's own thread, with a pause between one's end and the next.

    def __init__(
        self,
        post: Callable[[Callable[[], None]], None],
        call: Callable[[], None],
        idle_s: float,
    ) -> None:
        self._post = post
        self._call = call
        self._idle_s = idle_s
        self._ended = threading.Event()
        self._called = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="kgdbx-idle", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._called.set()
        self._thread.join()

    def _tick(self) -> None:
        while not self._ended.wait(self._idle_s):
            self._called.clear()
            if self._ended.is_set():
                return  # stop() came before the clear()
            self._post(self._take)
            self._called.wait()

    def _take(self) -> None:
        try:
            self._call()
        finally:
            self._called.set()


class _Breakpoint(gdb.Breakpoint):
    # One of ours, which the user does not see.

    def __init__(self, target: GdbTarget, key: _Key) -> None:
        self.key = key
        self.retired_at = 0
        self._target = target
        kind, address, size_bytes = key
        if kind is BreakpointKind.SOFTWARE:
            super().__init__(f"*{address:#x}", gdb.BP_BREAKPOINT, internal=True)
        elif kind is BreakpointKind.HARDWARE:
            super().__init__(f"*{address:#x}", gdb.BP_HARDWARE_BREAKPOINT, internal=True)
        else:
            expression = f"*({_WORDS[size_bytes]} *){address:#x}"
            classes = {
                # gdb passes over a write that leaves the value as it was; this one never does.
                # An argument of the function would be watched by single steps.
                BreakpointKind.WATCH_WRITE: (f"$_kgdbx_new() + 0 * {expression}", gdb.WP_WRITE),
                BreakpointKind.WATCH_READ: (expression, gdb.WP_READ),
                BreakpointKind.WATCH_ACCESS: (expression, gdb.WP_ACCESS),
            }
            what, wp_class = classes[kind]
            super().__init__(what, gdb.BP_WATCHPOINT, wp_class, internal=True)
        self.silent = True

    def stop(self) -> bool:
        """Whether gdb shall stop."""
        try:
            return self._target._hit(self)
        except KeyboardInterrupt:
            return self._target._stop_at_interrupt()
        except BaseException as e:  # gdb would stay in the middle of a stop
            self._target._note(e)
            return True


class _New(gdb.Function):
    # Convenience function that has another value each time.

    def __init__(self) -> None:
        super().__init__("_kgdbx_new")
        self._count = 0

    def invoke(self) -> int:
        """Its value."""
        self._count += 1
        return self._count


def _connect(address: str | None) -> Any:
    if address is not None:
        try:
            gdb.execute(f"target remote {address}", to_string=True)
        except gdb.error as e:
            raise TargetError(f"cannot connect to {address}: {e}; is the VM running?") from e
    connection = gdb.selected_inferior().connection
    if not isinstance(connection, gdb.RemoteTargetConnection):
        raise TargetError("gdb is not connected to a stub; use 'target remote' first")
    return connection


def user_breakpoints(pc: int) -> Iterator[Any]:
    """Breakpoints of the user that are enabled at an address."""
    for each in gdb.breakpoints():
        code = each.type in (gdb.BP_BREAKPOINT, gdb.BP_HARDWARE_BREAKPOINT)
        if code and each.enabled and not isinstance(each, _Breakpoint):
            locations = getattr(each, "locations", ())  # not before gdb 13
            if any(location.enabled and location.address == pc for location in locations):
                yield each


def _execute(command: str) -> None:
    gdb.execute(command, to_string=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Output of stops goes past to_string; gdb 13 and newer can hold it back.
    try:
        before = gdb.parameter("suppress-cli-notifications")
    except RuntimeError:
        yield
        return
    _execute("set suppress-cli-notifications on")
    try:
        yield
    finally:
        _execute(f"set suppress-cli-notifications {'on' if before else 'off'}")
