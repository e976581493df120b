"""What a machine is made of, and the QEMU command line for it."""

import dataclasses
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.kernels import StockKernel
from kgdbx.machine.kgdb_kernel import KGDB_KERNEL
from kgdbx.machine.kvm import kvm_works
from kgdbx.machine.qemu import Qemu

__all__ = ("MachineConfig", "command_line", "resolve_accel", "resolve_cpu_model")

_APPEND = "console=ttyS0 panic=-1"
# KGDB has the second serial port, so the agent goes to the fourth: the third has the console's
# interrupt.
_APPEND_KGDB = "console=ttyS0 panic=-1 kgdboc=ttyS1,115200 agent=ttyS3"


@dataclasses.dataclass(frozen=True)
class MachineConfig:
    """Everything that a VM's guest can see; a snapshot and its clones have the same.

    :ivar memory_bytes: size of guest RAM
    :ivar smp: number of vCPUs
    :ivar accel: ``tcg`` or ``kvm``
    :ivar append: more words for the kernel's command line
    :ivar extra_args: more arguments for QEMU
    """

    kernel: StockKernel
    initramfs: Path
    memory_bytes: int
    smp: int
    cpu_model: str
    accel: str
    append: str = ""
    extra_args: tuple[str, ...] = ()


def resolve_accel(qemu: Qemu, kernel: StockKernel, accel: str) -> str:
    """The accelerator to use for ``auto``, ``tcg`` or ``kvm``.

    ``auto`` is TCG: under KVM the stub writes its breakpoints into the guest's memory, which
    probes do not expect yet.

    :param kernel: what to try KVM with
    :raises MachineError: if it is none of them, or ``kvm`` and that does not work here
    """
    if accel not in ("auto", "kvm", "tcg"):
        raise MachineError(f"there is no accelerator {accel}; there are auto, kvm, tcg")
    if accel != "kvm":
        return "tcg"
    if not kvm_works(qemu, kernel.vmlinuz):
        raise MachineError("KVM does not work on this machine; use accelerator tcg or auto")
    return "kvm"


def resolve_cpu_model(cpu_model: str, accel: str) -> str:
    """The CPU model to use; an empty one stands for the accelerator's own default."""
    return cpu_model or ("host" if accel == "kvm" else "qemu64")


def command_line(
    qemu: Qemu, config: MachineConfig, directory: Path, ram: Path, *, ram_shared: bool
) -> list[str]:
    """QEMU's command line, with the sockets and the console log in *directory*.

    :param ram: file that backs guest RAM
    :param ram_shared: write to that file, or keep what is written to the process
    """
    size = config.memory_bytes
    accel = config.accel
    if accel == "tcg" and "-icount" not in config.extra_args:  # which counts on one thread
        accel = "tcg,thread=multi"
    share = "on" if ram_shared else "off"
    kgdb = config.kernel.name == KGDB_KERNEL
    append = _APPEND_KGDB if kgdb else _APPEND
    return [
        *qemu.argv(),
        *("-no-user-config", "-nodefaults", "-display", "none", "-nic", "none", "-no-reboot"),
        *("-M", "q35,memory-backend=m0", "-accel", accel, "-cpu", config.cpu_model),
        *("-smp", _topology(config), "-m", f"{size}B"),
        "-object",
        f"memory-backend-file,id=m0,size={size}B,mem-path={_escape(ram)},share={share}",
        *("-kernel", str(config.kernel.vmlinuz), "-initrd", str(config.initramfs)),
        *("-append", f"{append} {config.append}".strip()),
        *_serial_ports(directory, kgdb=kgdb),
        *_server("gdb0", directory / "gdb.sock"),
        *("-gdb", "chardev:gdb0"),
        *_server("qmp0", directory / "qmp.sock"),
        *("-mon", "chardev=qmp0,mode=control"),
        *config.extra_args,
    ]


# SeaBIOS puts the first CPU of each socket into the MP table, where the KGDB kernel looks.
def _topology(config: MachineConfig) -> str:
    if config.kernel.name != KGDB_KERNEL:
        return str(config.smp)
    return f"{config.smp},sockets={config.smp},cores=1,threads=1"


def _serial_ports(directory: Path, *, kgdb: bool) -> list[str]:
    log = _escape(directory / "console.log")
    agent = [*_server("exec0", directory / "exec.sock"), "-serial", "chardev:exec0"]
    if not kgdb:
        return ["-chardev", f"file,id=console0,path={log}", "-serial", "chardev:console0", *agent]
    option, console = _server("console0", directory / "console.sock")
    return [
        *(option, f"{console},logfile={log}", "-serial", "chardev:console0"),
        *_server("kgdb0", directory / "kgdb.sock"),
        *("-serial", "chardev:kgdb0", "-serial", "none"),
        *agent,
    ]


def _server(name: str, path: Path) -> tuple[str, str]:
    return "-chardev", f"socket,id={name},path={_escape(path)},server=on,wait=off"


# QEMU's option lists write a comma as two.
def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")
