"""Launch a VM, run commands in it, stop it."""

import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from kgdbx.errors import MachineError
from kgdbx.machine import info as infos
from kgdbx.machine.agent import Agent, Command, Completed
from kgdbx.machine.cache import wait_until
from kgdbx.machine.config import (
    MachineConfig,
    command_line,
    resolve_accel,
    resolve_cpu_model,
)
from kgdbx.machine.info import VmInfo
from kgdbx.machine.initramfs import build_initramfs
from kgdbx.machine.kernels import StockKernel
from kgdbx.machine.kgdb_kernel import get_kernel
from kgdbx.machine.process import is_alive, kill_process, spawn, start_time
from kgdbx.machine.qemu import Qemu, find_qemu
from kgdbx.machine.qmp import Qmp

__all__ = ("Vm", "configure", "find_vm", "launch", "list_vms", "run_machine", "stop")

MEMORY_BYTES = 512 << 20

_START_S = 20.0
_STOP_S = 3.0
_RUNNING = ("running",)
_PAUSED = ("paused", "prelaunch")


class Vm:
    """A running VM; leaving it as a context manager stops it."""

    def __init__(self, info: VmInfo) -> None:
        self.info = info
        self._agent = Agent(info.name, info.exec_socket, info.console, lambda: info.alive)

    @property
    def name(self) -> str:
        """Its name, unique among the user's VMs."""
        return self.info.name

    @property
    def alive(self) -> bool:
        """Whether its QEMU runs; the guest in it may stand still."""
        return self.info.alive

    def wait_booted(self, timeout_s: float = 120.0) -> None:
        """Wait until the guest takes commands.

        :param timeout_s: seconds to wait
        :raises MachineError: if that does not come, or the VM ends
        """
        try:
            self._agent.wait_ready(timeout_s)
        except MachineError as e:
            raise MachineError(
                f"VM {self.name} did not boot within {timeout_s:g} s; its console: "
                f"{_tail(self.info.console)}"
            ) from e

    def execute(self, command: str, timeout_s: float = 30.0) -> Completed:
        """Run a shell command in the guest to its end.

        :param timeout_s: seconds that it may take
        :raises MachineError: if it has not ended then: it takes too long, a debugger holds the
            guest, or its kernel is dead. Where the guest runs, the command is killed
        """
        started = self._agent.start(command)
        try:
            return started.wait(timeout_s)
        finally:
            with contextlib.suppress(MachineError):
                started.discard()

    def start(self, command: str) -> Command:
        """Start a shell command in the guest and return at once, also while the guest stands
        still: then it starts when the guest goes on.

        :raises MachineError: if the VM is gone
        """
        return self._agent.start(command)

    def status(self) -> str:
        """QEMU's word for it: ``running``, ``paused``, ``prelaunch``, ...

        :raises MachineError: if QEMU does not say, as while somebody else is connected to QMP
        """
        with self.qmp() as qmp:
            return str(qmp.execute("query-status")["status"])

    def replayed(self) -> int | None:
        """How many instructions QEMU has replayed; None if it replays no recording.

        :raises MachineError: as :meth:`status` does
        """
        with self.qmp() as qmp:
            state = qmp.execute("query-replay")
        return int(state["icount"]) if state["mode"] == "play" else None

    def qmp(self, timeout_s: float = 10.0) -> Qmp:
        """Connect to QMP; QEMU takes one connection at a time."""
        return Qmp(self.info.qmp_socket, timeout_s)

    def stop(self) -> None:
        """End the VM and remove all that it left; does nothing the second time.

        :raises MachineError: if QEMU does not end
        """
        self._agent.close()
        pid, started = self.info.pid, self.info.started
        if is_alive(pid, started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)  # QEMU's own way to quit, whoever holds QMP
            wait_until(lambda: not is_alive(pid, started), _STOP_S)
            kill_process(pid, started)
        infos.release_vm(self.info)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def configure(
    kernel: StockKernel | str,
    *,
    smp: int = 1,
    memory_bytes: int = MEMORY_BYTES,
    cpu_model: str = "",
    accel: str = "auto",
    append: str = "",
    modules: Sequence[str] = (),
    files: Mapping[str, Path] | None = None,
    extra_args: Sequence[str] = (),
    qemu: Qemu | None = None,
) -> MachineConfig:
    """Choose what a machine is made of; fetches and builds what is not there.

    :param kernel: a kernel or the name of its flavour, such as ``6.1``; ``kgdb`` for the one that
        is built here
    :param smp: number of vCPUs
    :param memory_bytes: size of guest RAM
    :param cpu_model: one of QEMU's, empty for the accelerator's default
    :param accel: ``auto``, ``tcg`` or ``kvm``
    :param append: more words for the kernel's command line
    :param modules: modules that ``modprobe`` shall find in the guest
    :param files: more files for the guest, path there to path here
    :param extra_args: more arguments for QEMU
    :raises MachineError: if a part cannot be had
    """
    qemu = qemu or find_qemu()
    kernel = get_kernel(kernel) if isinstance(kernel, str) else kernel
    accel = resolve_accel(qemu, kernel, accel)
    return MachineConfig(
        kernel=kernel,
        initramfs=build_initramfs(kernel, modules, files),
        memory_bytes=memory_bytes,
        smp=smp,
        cpu_model=resolve_cpu_model(cpu_model, accel),
        accel=accel,
        append=append,
        extra_args=tuple(extra_args),
    )


def launch(
    config: MachineConfig,
    *,
    name: str = "",
    paused: bool = False,
    keep: bool = False,
    qemu: Qemu | None = None,
) -> Vm:
    """Start a machine; see :meth:`Vm.wait_booted`.

    :param name: empty for one that is made up
    :param paused: stand still at the first instruction, until QMP ``cont`` or a debugger
    :param keep: let it outlive this process
    :raises MachineError: if the name is in use or QEMU refuses
    """
    return run_machine(config, name, qemu, None, None, paused=paused, keep=keep)


def run_machine(
    config: MachineConfig,
    name: str,
    qemu: Qemu | None,
    template_ram: Path | None,
    load: Callable[[Qmp], None] | None,
    *,
    paused: bool,
    keep: bool,
) -> Vm:
    """Start QEMU; the common part of :func:`launch` and ``clone``.

    :param template_ram: file to take RAM from without writing to it, or None for RAM of its own
    :param load: called to load a state into QEMU, or None to boot
    """
    qemu = qemu or find_qemu()
    name = name or f"vm-{os.getpid()}-{secrets.token_hex(3)}"
    directory, lock = infos.claim_directory(name)
    ram = template_ram or infos.ram_file(directory)
    pid = 0
    try:
        _check_space(ram.parent, config.memory_bytes)
        argv = command_line(qemu, config, directory, ram, ram_shared=template_ram is None)
        argv += ["-incoming", "defer"] if load else []
        argv += ["-S"] if paused else []
        log = directory / "qemu.log"
        pid = spawn(argv, qemu.environment(), log, keep=keep)
        info = VmInfo(
            name=name,
            directory=directory,
            pid=pid,
            started=start_time(pid),
            owner_pid=0 if keep else os.getpid(),
            owner_started=0 if keep else start_time(os.getpid()),
            kernel=config.kernel.name,
            release=config.kernel.release,
            vmlinux=config.kernel.vmlinux,
            debug_modules=config.kernel.debug_modules,
            gdb_socket=directory / "gdb.sock",
            qmp_socket=directory / "qmp.sock",
            exec_socket=directory / "exec.sock",
            console=directory / "console.log",
            ram_file=ram,
            ram_shared=template_ram is None,
            memory_bytes=config.memory_bytes,
            smp=config.smp,
            cpu_model=config.cpu_model,
            accel=config.accel,
        )
        _wait_started(info, log, load, _PAUSED if paused else _RUNNING)
        infos.write_info(info)
    except BaseException:
        if pid:
            kill_process(pid, start_time(pid))
        infos.release_directory(directory)
        raise
    finally:
        os.close(lock)
    return Vm(info)


def list_vms() -> list[Vm]:
    """All VMs of this user that run, by name."""
    return [Vm(info) for info in infos.list_infos()]


def find_vm(name: str) -> Vm:
    """The running VM *name*.

    :raises MachineError: if there is none
    """
    return Vm(infos.read_info(name))


def stop(name: str) -> None:
    """Stop the VM *name*.

    :raises MachineError: if there is none
    """
    find_vm(name).stop()


def _wait_started(
    info: VmInfo, log: Path, load: Callable[[Qmp], None] | None, wanted: tuple[str, ...]
) -> None:
    connection: list[Qmp] = []

    # QEMU makes the socket a moment before it listens there.
    def connected() -> bool:
        if info.qmp_socket.exists():
            try:
                connection.append(Qmp(info.qmp_socket, _START_S))
            except MachineError:
                return not info.alive
        return bool(connection) or not info.alive

    wait_until(connected, _START_S, longest_pause_s=0.005)
    if not connection:
        raise MachineError(f"QEMU did not start: {_tail(log) or 'it does not answer'}")
    with connection[0] as qmp:
        try:
            if load:
                load(qmp)
            qmp.wait_status("query-status", wanted, _START_S)
        except MachineError as e:
            # Its own words say more than a connection that broke.
            raise MachineError(f"QEMU did not start: {_tail(log) or e}") from e


# RAM that does not fit ends in SIGBUS much later.
def _check_space(directory: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size_bytes:
        raise MachineError(
            f"{directory} has {free >> 20} MiB free and guest RAM needs {size_bytes >> 20} MiB; "
            "stop VMs or take less memory"
        )


def _tail(path: Path, size_bytes: int = 800) -> str:
    try:
        text = path.read_bytes()[-size_bytes:].decode(errors="replace").strip()
    except OSError:
        text = ""
    return text
