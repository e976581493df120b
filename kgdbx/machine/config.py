"""What a machine is made of, and the QEMU command line for it."""

import dataclasses
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.kernels import StockKernel
from kgdbx.machine.kvm import kvm_works
from kgdbx.machine.qemu import Qemu

__all__ = ("MachineConfig", "command_line", "resolve_accel", "resolve_cpu_model")

_APPEND = "console=ttyS0 panic=-1"


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
    accel = "tcg,thread=multi" if config.accel == "tcg" else config.accel
    share = "on" if ram_shared else "off"
    return [
        *qemu.argv(),
        *("-no-user-config", "-nodefaults", "-display", "none", "-nic", "none", "-no-reboot"),
        *("-M", "q35,memory-backend=m0", "-accel", accel, "-cpu", config.cpu_model),
        *("-smp", str(config.smp), "-m", f"{size}B"),
        "-object",
        f"memory-backend-file,id=m0,size={size}B,mem-path={_escape(ram)},share={share}",
        *("-kernel", str(config.kernel.vmlinuz), "-initrd", str(config.initramfs)),
        *("-append", f"{_APPEND} {config.append}".strip()),
        *("-chardev", f"file,id=console0,path={_escape(directory / 'console.log')}"),
        *("-serial", "chardev:console0"),
        *_server("exec0", directory / "exec.sock"),
        *("-serial", "chardev:exec0"),
        *_server("gdb0", directory / "gdb.sock"),
        *("-gdb", "chardev:gdb0"),
        *_server("qmp0", directory / "qmp.sock"),
        *("-mon", "chardev=qmp0,mode=control"),
        *config.extra_args,
    ]


def _server(name: str, path: Path) -> tuple[str, str]:
    return "-chardev", f"socket,id={name},path={_escape(path)},server=on,wait=off"


# QEMU's option lists write a comma as two.
def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")
