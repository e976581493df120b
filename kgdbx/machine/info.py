"""What is known of each VM, in a directory of its own; every process of the user sees them."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from kgdbx.errors import MachineError
from kgdbx.machine.cache import locked, ram_dir, runtime_dir
from kgdbx.machine.process import is_alive, kill_process

__all__ = (
    "VmInfo",
    "claim_directory",
    "list_infos",
    "ram_file",
    "read_info",
    "release_directory",
    "release_vm",
    "remove_stale",
    "validate_name",
    "write_info",
)

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET = "console.sock"


@dataclasses.dataclass(frozen=True)
class VmInfo:
    """One running VM.

    :ivar directory: its private directory
    :ivar pid: process ID of its QEMU
    :ivar started: when that process started, in clock ticks since the host's boot
    :ivar owner_pid: the process that it ends with, or 0 if it stays
    :ivar owner_started: like ``started``
    :ivar kernel: name of the kernel's flavour, such as ``6.1``
    :ivar release: what ``uname -r`` says in it
    :ivar vmlinux: ELF file with the kernel's symbols and DWARF
    :ivar debug_modules: directory of its modules' debug symbols
    :ivar gdb_socket: Unix socket of the gdbstub, one connection at a time
    :ivar qmp_socket: Unix socket of QMP, one connection at a time
    :ivar exec_socket: Unix socket of the guest's second serial port, where the agent listens
    :ivar console: file with what the guest wrote to its console
    :ivar ram_file: the file that backs guest RAM
    :ivar ram_shared: whether that file holds the RAM; otherwise the process's private mapping of
        the file holds it, as in a clone
    :ivar memory_bytes: size of guest RAM
    :ivar smp: number of vCPUs
    :ivar cpu_model: QEMU's name of the CPU model
    :ivar accel: ``tcg`` or ``kvm``
    """

    name: str
    directory: Path
    pid: int
    started: int
    owner_pid: int
    owner_started: int
    kernel: str
    release: str
    vmlinux: Path
    debug_modules: Path
    gdb_socket: Path
    qmp_socket: Path
    exec_socket: Path
    console: Path
    ram_file: Path
    ram_shared: bool
    memory_bytes: int
    smp: int
    cpu_model: str
    accel: str

    @property
    def alive(self) -> bool:
        """Whether its QEMU runs."""
        return is_alive(self.pid, self.started)

    @property
    def kgdb_socket(self) -> Path:
        """Unix socket of the serial port that KGDB has; there in a VM with the KGDB kernel."""
        return self.directory / "kgdb.sock"

    @property
    def console_socket(self) -> Path:
        """Unix socket of the console's serial port; there in a VM with the KGDB kernel."""
        return self.directory / "console.sock"

    @property
    def journal(self) -> Path:
        """Where a session notes what it has changed in the guest; gone with the VM."""
        return self.directory / "journal"


def validate_name(name: str) -> None:
    """Check a VM's name.

    :raises MachineError: if it has other characters than letters, digits, ``.``, ``_`` and ``-``
    """
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise MachineError(f"'{name}' is no name for a VM; use letters, digits, '.', '_' and '-'")


def claim_directory(name: str) -> tuple[Path, int]:
    """Make the directory of a new VM and lock it until its state is written.

    :return: the directory, and a descriptor to close when :func:`write_info` is done
    :raises MachineError: if the name is in use, or the paths of its sockets are too long
    """
    validate_name(name)
    directory = _vms_dir() / name
    size = len(os.fsencode(directory / _LONGEST_SOCKET))
    if size > _SOCKET_PATH_BYTES:
        raise MachineError(
            f"the sockets of VM {name} have paths of {size} bytes and Unix allows "
            f"{_SOCKET_PATH_BYTES}; take a shorter name or set XDG_RUNTIME_DIR to a shorter path"
        )
    with locked(_vms_dir() / ".lock", timeout_s=30):
        for path in _directories():
            _remove_if_stale(path, also_if_owned=path == directory)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError as e:
            raise MachineError(
                f"there is a VM {name} already; take another name or run: kgdbx vm stop {name}"
            ) from e
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return directory, lock


def write_info(info: VmInfo) -> None:
    """Write a VM's state, whole or not at all."""
    fields = {k: str(v) if isinstance(v, Path) else v for k, v in vars(info).items()}
    scratch = info.directory / "vm.json.new"
    scratch.write_text(json.dumps(fields, indent=1))
    scratch.rename(info.directory / "vm.json")


def read_info(name: str) -> VmInfo:
    """State of the VM *name*.

    :raises MachineError: if there is no such VM, or it does not run any more
    """
    validate_name(name)
    info = _read(_vms_dir() / name)
    if info is None or not info.alive:
        names = ", ".join(other.name for other in list_infos()) or "none"
        raise MachineError(f"there is no VM {name}; running: {names}")
    return info


def list_infos() -> list[VmInfo]:
    """State of all VMs of this user that run, by name."""
    infos = map(_read, _directories())
    return [info for info in infos if info is not None and info.alive]


def ram_file(directory: Path) -> Path:
    """Where the RAM of the VM in *directory* goes, unless it is a clone."""
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:8]
    return ram_dir() / f"{directory.name}-{digest}.ram"


def release_directory(directory: Path) -> None:
    """Remove what a VM left behind; its process must be gone."""
    ram_file(directory).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def release_vm(info: VmInfo) -> None:
    """Remove what a VM that has ended left behind, unless another one has taken its name."""
    with locked(_vms_dir() / ".lock", timeout_s=30):
        now = _read(info.directory)
        if now is not None and (now.pid, now.started) == (info.pid, info.started):
            release_directory(info.directory)


def remove_stale() -> list[str]:
    """Remove what VMs left behind that are gone, and end those whose owner is gone.

    :return: names of the VMs removed
    """
    with locked(_vms_dir() / ".lock", timeout_s=30):
        return [d.name for d in _directories() if _remove_if_stale(d, also_if_owned=True)]


# A dead VM's console is still there for an owner that lives, unless `also_if_owned`.
def _remove_if_stale(directory: Path, *, also_if_owned: bool) -> bool:
    if _is_being_made(directory):
        return False
    info = _read(directory)
    if info is not None:
        owned = info.owner_pid == 0 or is_alive(info.owner_pid, info.owner_started)
        if owned and (info.alive or not also_if_owned):
            return False
        kill_process(info.pid, info.started)
    release_directory(directory)
    return True


def _is_being_made(directory: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def _read(directory: Path) -> VmInfo | None:
    try:
        fields: dict[str, Any] = json.loads((directory / "vm.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise MachineError(f"{directory}/vm.json is damaged; remove that directory") from e
    for field in dataclasses.fields(VmInfo):
        if field.type is Path:
            fields[field.name] = Path(fields[field.name])
    return VmInfo(**fields)


def _directories() -> list[Path]:
    return [path for path in sorted(_vms_dir().iterdir()) if path.is_dir()]


def _vms_dir() -> Path:
    path = runtime_dir() / "vms"
    path.mkdir(mode=0o700, exist_ok=True)
    return path
