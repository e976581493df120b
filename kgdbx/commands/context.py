"""What a session command works on: the session, and where its output goes."""

from collections.abc import Callable
from typing import Protocol

from kgdbx.errors import CommandError
from kgdbx.probes.event import Event
from kgdbx.probes.probe import HandlerFault, Probe
from kgdbx.session import Session
from kgdbx.trace.text import Style, event_line

__all__ = ("Context", "Output")


class Output(Protocol):
    """Where text goes: a file, or gdb's own streams."""

    def write(self, text: str, /) -> int:
        """Write text."""

    def flush(self) -> None:
        """Show what was written."""


class Context:
    """The state of a face: at most one session.

    :param out: where text goes
    :param events: where lines of events go, if elsewhere
    :param connect: attaches to a VM by name, a socket or ``host:port``, with an optional vmlinux,
        and the line of a console over which KGDB's kernel can be stopped
    """

    def __init__(
        self,
        out: Output,
        connect: Callable[[str, str | None, str | None], Session],
        style: Style,
        events: Output | None = None,
    ) -> None:
        self.out = out
        self._events = out if events is None else events
        self.style = style
        self._connect = connect
        self._session: Session | None = None
        self._warned: set[str] = set()

    @property
    def session(self) -> Session:
        """The attached kernel.

        :raises CommandError: if none is attached
        """
        if self._session is None:
            raise CommandError("no kernel is attached; use: kgdbx attach VM")
        return self._session

    @property
    def attached(self) -> bool:
        """Whether a kernel is attached."""
        return self._session is not None

    def attach(self, where: str, vmlinux: str | None, sysrq: str | None = None) -> Session:
        """Attach, and show events and faults from now on.

        :raises CommandError: if a kernel is attached already
        """
        if self._session is not None:
            raise CommandError(f"{self._session.target.name} is attached; detach first")
        session = self._connect(where, vmlinux, sysrq)
        session.event_listeners.append(self._show_event)
        session.probes.fault_listeners.append(self._show_fault)
        self._session = session
        return session

    def detach(self) -> None:
        """Unregister every probe and let the kernel run on; does nothing without a session."""
        if self._session is not None and self._session.target.running:
            raise CommandError("the kernel runs; stop it first, with ^C or 'interrupt'")
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def write(self, text: str) -> None:
        """Write lines of text."""
        self.out.write(text.rstrip("\n") + "\n")
        self.out.flush()

    def _show_event(self, event: Event) -> None:
        self._events.write(event_line(event, self.style) + "\n")
        self._events.flush()

    def _show_fault(self, probe: Probe, fault: HandlerFault) -> None:
        # The first of each probe in full; the others are counted in the listing.
        if probe.name not in self._warned:
            self._warned.add(probe.name)
            self.write(
                f"{self.style.fault}probe {probe.name}: {fault.handler} raised, the guest goes "
                f"on; see the faults column of 'list'{self.style.reset}\n{fault.trace}"
            )
