"""One kernel in the shell: its gdb, what state it is in, and its probes to come back to."""

import asyncio
import contextlib
import shlex
from collections.abc import Callable
from typing import Any, Literal

from kgdbx.errors import CommandError, KgdbxError, MachineError, TargetLost
from kgdbx.gdb_launch import gdb_argv
from kgdbx.machine.info import VmInfo
from kgdbx.machine.vm import Vm, find_vm
from kgdbx.shell.gdb_process import GdbProcess, Reply
from kgdbx.shell.records import Record
from kgdbx.shell.vm_watch import VmWatch
from kgdbx.shell.words import changes_kernel, kgdbx_command

__all__ = ("KernelSession", "State")

State = Literal["detached", "stopped", "running", "lost"]

_INTERRUPT_TRIES = 10
_RETRY_S = 1.0
_RESUMES = ("continue", "c", "fg")


class KernelSession:
    """A gdb on a kernel.

    :param name: what it is called in the prompt
    :param where: VM, socket or ``host:port``, for KGDB behind ``kgdb:``; or a tty; empty for a gdb
        without a kernel
    :param vmlinux: the kernel's file; a VM of ours knows its own
    :param show: called with text as it comes, and whether it is lines of events
    :param sysrq: tty of the console over which KGDB's kernel can be stopped
    :ivar status: the last answer of :func:`kgdbx.views.status.status`
    :ivar replayed: instructions so far of a VM that replays what QEMU recorded; None of others
    :ivar on_change: called when the state or the status is another
    """

    def __init__(
        self,
        name: str,
        where: str,
        vmlinux: str | None,
        show: Callable[[str, bool], None],
        *,
        sysrq: str | None = None,
    ) -> None:
        self.name = name
        self.where = where
        self.vmlinux = vmlinux
        self.sysrq = sysrq
        self.info: VmInfo | None = None
        self.state: State = "detached"
        self.status: dict[str, Any] = {}
        self.replayed: int | None = None
        self.on_change: Callable[[], None] = lambda: None
        self.colour = False
        self._show = show
        self._process = self._new_process()
        self._executing = 0
        self._one_at_a_time = asyncio.Lock()
        self._registered: list[tuple[set[str], str]] = []
        self._watch: VmWatch | None = None
        self._closing = False
        self._waiting: list[asyncio.Event] = []

    @property
    def alive(self) -> bool:
        """Whether its gdb runs."""
        return self._process.alive

    @property
    def busy(self) -> bool:
        """Whether a command of the user is under way."""
        return self._executing > 0

    @property
    def probes(self) -> list[dict[str, Any]]:
        """Its probes as :func:`kgdbx.views.status.status` tells them."""
        return list(self.status.get("probes", ()))

    def _new_process(self) -> GdbProcess:
        process = GdbProcess(lambda record: None, self._on_events, lambda status: None)
        process.on_record = lambda record: self._on_record(process, record)
        process.on_exit = lambda status: self._on_exit(process, status)
        return process

    # Opening and closing

    async def open(self) -> None:
        """Start gdb, and attach.

        :raises KgdbxError: if that cannot be done; nothing is left of it then
        """
        self.info = None
        line = self.where.removeprefix("kgdb:")
        if line and "/" not in line and ":" not in line:
            self.info = find_vm(line).info
        argv = gdb_argv(load=True)
        if not self.where and self.vmlinux:
            argv.append(self.vmlinux)
        await self._process.start(argv, {"CLICOLOR_FORCE": "1" if self.colour else "0"})
        if self.where:
            words = [self.where, *([self.vmlinux] if self.vmlinux else [])]
            words += ["--sysrq", self.sysrq] if self.sysrq else []
            reply = await self._console(f"kgdbx attach {shlex.join(words)}")
            if reply.error:
                await self._process.end()
                raise TargetLost(f"cannot attach to {self.where}: {reply.error}")
        self._set_state("stopped" if self.where else "detached")
        if self.info is not None:
            await self._see_replayed()
            try:
                self._watch = VmWatch(self.info, self._on_vm_end)
            except ProcessLookupError:
                self._on_vm_end()
        await self.refresh()

    async def reopen(self, where: str = "") -> list[str]:
        """Start anew after gdb or the kernel is gone, with the probes that there were.

        :param where: another VM or stub
        :return: what could not be placed again
        """
        again = self._to_place_again()
        await self._end()
        self._process = self._new_process()
        self.where = where or self.where
        await self.open()  # if it fails, what is to be placed is still known
        self._registered.clear()
        failed = []
        for line in again:
            reply = await self.execute(line)
            if reply.error:
                failed.append(f"{line}: {reply.error}")
        return failed

    async def close(self) -> None:
        """Remove the probes, let the kernel run on, and end gdb."""
        self._closing = True
        with contextlib.suppress(KgdbxError):
            if self.alive and self.state == "running":
                await self.interrupt()
            if self.alive and self.state == "stopped":
                await self._console("kgdbx detach")
        await self._end()

    async def _end(self) -> None:
        # Its end is wanted: nothing is said of it.
        self._closing = True
        if self._watch is not None:
            self._watch.stop()
        await self._process.end()
        self._closing = False

    # Commands

    async def execute(self, line: str) -> Reply:
        """Have gdb execute a line; its output is shown.

        ``continue`` returns at once, so that more can be typed while the kernel runs. A command
        that changes probes stops a running kernel for as long as it takes.

        :raises TargetLost: if gdb ends meanwhile
        """
        async with self._one_at_a_time:
            self._executing += 1
            try:
                return await self._execute(line.strip())
            finally:
                self._executing -= 1
                await self.refresh()

    async def _execute(self, line: str) -> Reply:
        if line in _RESUMES:
            return await self.resume()
        if line == "interrupt":
            return await self.interrupt()
        line = kgdbx_command(line)
        if self.state != "running" or not changes_kernel(line):
            return await self._console_known(line)
        if (reply := await self.interrupt()).error:
            return reply
        done = await self._console_known(line)
        if self.status:  # not if it was 'detach'
            await self.resume()
        return done

    async def _console_known(self, line: str) -> Reply:
        # Note which probes a line registers, to place them again.
        if not line.startswith("kgdbx "):
            return await self._console(line)
        before = {probe["name"] for probe in self.probes}
        reply = await self._console(line)
        await self.refresh()
        if new := {probe["name"] for probe in self.probes} - before:
            self._registered.append((new, line))
        return reply

    def _to_place_again(self) -> list[str]:
        still = {probe["name"] for probe in self.probes}
        return [line for names, line in self._registered if names & still]

    async def resume(self) -> Reply:
        """Let the kernel run."""
        if self.state == "running":
            return Reply()
        reply = await self._process.request("-exec-continue --all")
        if reply.error:
            self._show(f"{reply.error}\n", False)
        return reply

    async def interrupt(self) -> Reply:
        """Stop the kernel; does nothing if it stands.

        QEMU's stub drops a break-in that meets a stop. gdb asks again where kgdbx is attached; here
        it is asked for the sake of the others.
        """
        reply = Reply()
        for _ in range(_INTERRUPT_TRIES):
            if self.state != "running":
                return reply
            with contextlib.suppress(TimeoutError):
                await self._process.ask("interrupt")
                await self.wait_stopped(_RETRY_S)
                return reply
        reply.error = "the kernel does not stop; is its VM alive?"
        self._show(f"{reply.error}\n", False)
        return reply

    def press_interrupt(self) -> None:
        """What ``^C`` does: stop the kernel, or the command that is under way."""
        if self._executing:
            self._process.signal_interrupt()
        elif self.state == "running":
            task = asyncio.get_running_loop().create_task(self.execute("interrupt"))
            task.add_done_callback(lambda done: done.exception())

    async def wait_stopped(self, timeout_s: float | None = None) -> None:
        """Wait until the kernel stands, or is gone.

        :raises TimeoutError: if it does not in time
        """
        changed = asyncio.Event()
        self._waiting.append(changed)
        try:
            async with asyncio.timeout(timeout_s):
                while self.state == "running":
                    changed.clear()
                    await changed.wait()
        finally:
            self._waiting.remove(changed)

    # Questions

    async def ask(self, name: str, **arguments: Any) -> Any:
        """Ask kgdbx in gdb.

        :raises CommandError: if gdb is busy or refuses
        """
        if self._executing or not self.alive:
            raise CommandError(f"session {self.name} is busy" if self.alive else "gdb has ended")
        return await self._process.ask(name, **arguments)

    async def request(self, line: str) -> Reply:
        """Send an MI command, such as ``-complete``."""
        if self._executing:
            raise CommandError(f"session {self.name} is busy")
        return await self._process.request(line)

    async def refresh(self) -> None:
        """Bring the status up to date, if gdb is there to tell."""
        if not self.alive or self.state == "lost":
            return
        with contextlib.suppress(KgdbxError):
            status = await self._process.ask("status")
            if self.replayed is not None:
                await self._see_replayed()
            if not status and self.state in ("stopped", "running"):
                self._set_state("detached")
            elif status and self.state == "detached":
                self._set_state("running" if status["running"] else "stopped")
            self.status = status
            self.on_change()

    async def _see_replayed(self) -> None:
        assert self.info is not None
        with contextlib.suppress(MachineError):  # somebody else asks QEMU
            self.replayed = await asyncio.to_thread(Vm(self.info).replayed)

    async def _console(self, line: str) -> Reply:
        return await self._process.console(line)

    # What gdb says

    def _on_record(self, process: GdbProcess, record: Record) -> None:
        if process is not self._process:
            return
        if record.kind == "async":
            self._on_async(record)
        elif record.kind == "raw":
            self._show(record.text + "\n", False)
        elif record.kind != "result":
            self._show(record.text, False)

    def _on_events(self, lines: bytes) -> None:
        self._show(lines.decode("utf-8", "replace"), True)

    def _on_async(self, record: Record) -> None:
        if record.name == "running" and record.text[:1] == "*":
            self._set_state("running")
        elif record.name == "stopped":
            gone = str(record.results.get("reason", "")).startswith("exited")
            self._set_state("lost" if gone else "stopped")
            if not self._executing and not gone:
                asyncio.get_running_loop().create_task(self.refresh())
        elif (
            record.name == "thread-group-exited" and self.state != "detached" and self.info is None
        ):
            self._set_state("lost")

    def _on_exit(self, process: GdbProcess, status: int) -> None:
        if process is self._process and not self._closing:
            self._show(f"kgdbx: gdb of {self.name} has ended with status {status}; ", False)
            self._show("'reopen' starts it again, with its probes\n", False)
            self._set_state("lost")

    def _set_state(self, state: State) -> None:
        if state != self.state:
            self.state = state
            for each in self._waiting:
                each.set()
            self.on_change()

    def _on_vm_end(self) -> None:
        self._show(
            f"kgdbx: VM {self.where} has ended; 'reopen VM' goes on with another one\n", False
        )
        self._set_state("lost")
