"""A session: one target, its kernel and its probes, closed in reverse order."""

import contextlib
import dataclasses
import fnmatch
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

from kgdbx.errors import CommandError, HandlerTimeout, KgdbxError, ProbeError, TargetLost
from kgdbx.machine.info import VmInfo
from kgdbx.machine.vm import find_vm
from kgdbx.probes.arguments import argument_suppliers
from kgdbx.probes.defined import probe_from_definition
from kgdbx.probes.definition import ProbeDefinition, parse_definition
from kgdbx.probes.event import Event
from kgdbx.probes.manager import ProbeManager
from kgdbx.probes.probe import Hit, Probe
from kgdbx.probes.resolve import parse_place, resolve_points
from kgdbx.probes.script import read_script
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import Stop, Target
from kgdbx.target.ram import GuestRam
from kgdbx.target.rsp import RspTarget

__all__ = ("GuestCommand", "Refused", "Session", "open_ram")

_GLOB_LIMIT = 500
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class GuestCommand(Protocol):
    """A command under way in the guest."""

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""


class Refused(KgdbxError):
    """Some of several probes could not be placed.

    :ivar placed: those that are registered
    :ivar errors: message by function name
    """

    def __init__(self, placed: list[Probe], errors: dict[str, str]) -> None:
        self.placed = placed
        self.errors = errors
        lines = "\n".join(f"  {name}: {message}" for name, message in errors.items())
        super().__init__(f"{len(placed)} probes placed, {len(errors)} refused:\n{lines}")


class Session:
    """A kernel under control, with its probes.

    Leaving a session as a context manager unregisters every probe, newest first, and lets the
    kernel run on, whatever happened.

    :param target: a stopped target
    :param kernel: the kernel in it
    """

    def __init__(self, target: Target, kernel: Kernel) -> None:
        self.target = target
        self.kernel = kernel
        self.probes = ProbeManager(kernel)
        self.event_listeners: list[Callable[[Event], None]] = []
        self._stop_hooks: list[Callable[[Session], Any]] = []
        self._emitted = 0
        self._limit: int | None = None
        self._stop_on: set[str] = set()
        self._listener_error: Exception | None = None
        self._closed = False

    @classmethod
    def connect(cls, where: str, vmlinux: str | None = None) -> "Session":
        """Attach without gdb to a VM by its name, or to any stub.

        :param where: name of a VM of ours, path of a Unix socket, or ``host:port``
        :param vmlinux: the kernel's file; a VM of ours knows its own
        :raises CommandError: if *vmlinux* is needed and missing
        """
        if "/" not in where and ":" not in where:
            return cls.attach_vm(find_vm(where).info)
        if vmlinux is None:
            raise CommandError(f"give the vmlinux with debug symbols of the kernel at {where}")
        return cls.attach(RspTarget(where), Path(vmlinux).expanduser())

    @classmethod
    def attach_vm(cls, info: VmInfo) -> "Session":
        """Attach without gdb to a VM of ours."""
        ram = open_ram(info)
        return cls.attach(
            RspTarget(str(info.gdb_socket), ram=ram),
            info.vmlinux,
            debug_modules=info.debug_modules,
            ram=ram,
        )

    @classmethod
    def attach(
        cls,
        target: Target,
        vmlinux: Path,
        *,
        debug_modules: Path | None = None,
        ram: GuestRam | None = None,
    ) -> "Session":
        """Find the kernel in a target; the target is closed if that fails.

        :param debug_modules: directory with the debug files of its modules
        :param ram: the guest's RAM, if the target has it
        :raises BuildIdMismatch: if *vmlinux* is of another kernel
        """
        try:
            ram_end = sum(ram.ranges()[-1]) if ram is not None else 0
            kernel = Kernel.attach(target, vmlinux, debug_modules=debug_modules, ram_end=ram_end)
            return cls(target, kernel)
        except BaseException:
            target.close()
            raise

    # Probes

    def define(
        self, text: str | ProbeDefinition, *, hardware: bool = False, stop: bool = False
    ) -> list[Probe]:
        """Register what a probe definition says; a pattern registers many.

        :param stop: leave the kernel standing after each event
        :raises DefinitionError: if the text is no definition
        :raises ProbeError: if the probe cannot be placed
        :raises Refused: if some of a pattern's functions could not be probed; the others are
        """
        definition = parse_definition(text) if isinstance(text, str) else text
        if definition.kind == "-":
            name = definition.event_name
            if definition.group is not None:
                name = f"{definition.group}/{name}"
            probe = self.probes.find(name)
            probe.unregister()
            return [probe]
        if not definition.is_glob:
            return [self._define_one(definition, hardware, stop)]
        placed: list[Probe] = []
        errors: dict[str, str] = {}
        for each in self._expand(definition):
            try:
                placed.append(self._define_one(each, hardware, stop))
            except KgdbxError as e:
                errors[each.function or ""] = str(e)
        if errors:
            raise Refused(placed, errors)
        return placed

    def register(self, probe: Probe) -> Probe:
        """Register a probe with handlers of its own."""
        return self.probes.register(probe)

    def load_script(self, path: Path) -> list[Probe]:
        """Register the probes of a script; none of them if one is refused.

        :raises CommandError: if the script cannot be used
        :raises ProbeError: if a probe of it cannot be placed
        """
        names = {"session": self, "kernel": self.kernel, "prog": self.kernel.program}
        probes, namespace = read_script(path, names)
        placed: list[Probe] = []
        try:
            placed += (self.probes.register(probe) for probe in probes)
            if "start" in namespace:
                namespace["start"](self)
        except BaseException:
            for probe in reversed(placed):
                probe.unregister()
            raise
        if "stop" in namespace:
            self._stop_hooks.append(namespace["stop"])
        return placed

    def function_names(self, module: str | None = None) -> Iterator[str]:
        """Names of all functions, for completion and patterns."""
        if module is None:
            yield from self.kernel.vmlinux.function_names
            return
        loaded = self.kernel.modules.find(module)
        if loaded is not None:
            yield from sorted(s.name for s in self.kernel.modules.symbols(loaded) if s.is_function)

    def parameter_names(self, place: str) -> tuple[str, ...]:
        """Names of the parameters of the function at a place, for completion."""
        points, _ = resolve_points(self.kernel, parse_place(place), module=None, inlined=False)
        return tuple(argument_suppliers(self.kernel, points[0])) if points else ()

    # Running

    def run(
        self,
        *,
        timeout_s: float | None = None,
        count: int | None = None,
        command: GuestCommand | None = None,
    ) -> Stop | None:
        """Let the kernel run and its probes fire.

        Ends at the first of: ``^C``, the time, the number of events, the end of a command in the
        guest, or a hit that asks for a stop. The kernel stands afterwards.

        :param timeout_s: seconds
        :param count: events
        :param command: a command under way in the guest
        :return: the stop, or None if the time or ``^C`` or the command ended it
        :raises TargetLost: if the guest shuts down or is killed
        :raises Exception: what an event listener raised
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._limit = None if count is None else self._emitted + count
        done = threading.Event()
        self.target.forget_stop_request()
        with _stop_on_signals(self.target, done), _stop_at_end(self.target, command, done):
            while not done.is_set():
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    break
                stop = self.target.run(self.probes.on_stop, remaining)
                if self._listener_error is not None:
                    error, self._listener_error = self._listener_error, None
                    raise error
                if stop is not None:
                    return stop
                if command is None or command.poll() is not None:
                    break
        return None

    @property
    def limit_reached(self) -> bool:
        """Whether the last :meth:`run` ended by its number of events."""
        return self._limit is not None and self._emitted >= self._limit

    def close(self) -> None:
        """Unregister every probe, newest first, and let the kernel run on."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self.target.close)
            stack.callback(self._withdraw)
            for hook in self._stop_hooks:
                stack.callback(hook, self)

    def _withdraw(self) -> None:
        try:
            self.target.interrupt()
            self.probes.close()
        except TargetLost:
            pass  # a guest that is gone needs no cleaning

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _define_one(self, definition: ProbeDefinition, hardware: bool, stop: bool) -> Probe:
        if definition.name is None:
            definition = self._named(definition)
        probe = probe_from_definition(definition, self.kernel, self._emit, hardware=hardware)
        self.probes.register(probe)
        (self._stop_on.add if stop else self._stop_on.discard)(probe.name)
        return probe

    def _named(self, definition: ProbeDefinition) -> ProbeDefinition:
        # perf probe's way: the second probe at a place gets _1 behind its name.
        taken = {probe.name for probe in self.probes}
        base = name = definition.event_name
        for number in itertools.count(1):
            if f"{definition.event_group}/{name}" not in taken:
                break
            name = f"{base}_{number}"
        return dataclasses.replace(definition, name=name)

    def _expand(self, definition: ProbeDefinition) -> Iterator[ProbeDefinition]:
        assert definition.function is not None
        pattern = definition.function
        names = [
            name
            for name in self.function_names(definition.module)
            if fnmatch.fnmatchcase(name, pattern) and not name.startswith("__pfx_")
        ]
        if not names:
            raise ProbeError(f"no function matches {pattern!r}")
        if len(names) > _GLOB_LIMIT:
            raise CommandError(
                f"{pattern!r} matches {len(names)} functions, more than {_GLOB_LIMIT}; "
                "narrow it down"
            )
        prefix = f"{definition.name}_" if definition.name else None
        for name in names:
            yield dataclasses.replace(
                definition,
                function=name,
                name=f"{prefix}{name.replace('.', '_')}" if prefix else None,
                text="",
            )

    def _emit(self, event: Event, hit: Hit) -> None:
        self._emitted += 1
        try:
            for listener in tuple(self.event_listeners):
                listener(event)
        except HandlerTimeout:
            raise  # a reader that has stopped reading: counted as a fault, and the run goes on
        except Exception as e:  # not the handler's fault: run() raises it when the kernel stands
            self._listener_error = self._listener_error or e
            hit.stop()
        if self.limit_reached or event.probe in self._stop_on:
            hit.stop()


def open_ram(info: VmInfo) -> GuestRam:
    """The RAM of a VM of ours."""
    return GuestRam(info.ram_file, info.memory_bytes, None if info.ram_shared else info.pid)


@contextlib.contextmanager
def _stop_on_signals(target: Target, done: threading.Event) -> Iterator[None]:
    # ^C ends the run at a point where nothing is half done; so do requests to end the process,
    # which then goes on with its way out.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        done.set()
        target.request_stop()

    previous = {number: signal.signal(number, note) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for signum in caught:
        if signum != signal.SIGINT:
            raise SystemExit(128 + signum)


@contextlib.contextmanager
def _stop_at_end(
    target: Target, command: GuestCommand | None, done: threading.Event
) -> Iterator[None]:
    # The guest's agent answers on its own line; watching it needs no stop of the guest.
    if command is None:
        yield
        return
    quit_event = threading.Event()

    def watch() -> None:
        while not quit_event.is_set():
            if command.poll() is not None:
                done.set()
                target.request_stop()
                return
            quit_event.wait(0.02)

    thread = threading.Thread(target=watch, name="kgdbx-guest-command", daemon=True)
    thread.start()
    try:
        yield
    finally:
        quit_event.set()
        thread.join()
