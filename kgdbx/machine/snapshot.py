"""Snapshot a booted VM once and clone it many times, in about a tenth of a second each.

A clone maps the template's RAM privately, so that nothing is copied until it is written to.
"""

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.cache import populate, ram_dir
from kgdbx.machine.config import MachineConfig, command_line
from kgdbx.machine.qemu import Qemu, find_qemu
from kgdbx.machine.qmp import Qmp
from kgdbx.machine.vm import Vm, launch, run_machine

__all__ = ("Template", "clone", "make_template", "remove_templates")

_MIGRATE_S = 60.0
_FORMAT = 1
# Templates to keep: about 120 MB each, so a tenth of a RAM directory of 16 GB, and never fewer.
_KEPT = 12
_TEMPLATE_BYTES = 120 << 20
_SHARE = 10
# RAM is not in the stream; it is what the file holds.
_IGNORE_SHARED = {"capability": "x-ignore-shared", "state": True}


@dataclasses.dataclass(frozen=True)
class Template:
    """A booted guest at rest, in the RAM directory until the host reboots.

    :ivar ram: file with its RAM
    :ivar state: file with the state of its devices and vCPUs
    """

    config: MachineConfig
    ram: Path
    state: Path


def make_template(
    config: MachineConfig, *, qemu: Qemu | None = None, boot_timeout_s: float = 180.0
) -> Template:
    """Boot a machine until it takes commands and keep it, unless that was done before.

    All clones of one template have the same KASLR offset.

    :param config: see :func:`~kgdbx.machine.vm.configure`
    :param boot_timeout_s: seconds that booting may take
    :raises MachineError: if it does not boot
    """
    qemu = qemu or find_qemu()
    directory = _templates_dir() / _key(qemu, config)
    populate(directory, lambda path: _fill(path, config, qemu, boot_timeout_s))
    os.utime(directory)
    _prune()
    return Template(config, directory / "ram", directory / "state")


def clone(
    template: Template,
    name: str = "",
    *,
    paused: bool = False,
    keep: bool = False,
    qemu: Qemu | None = None,
) -> Vm:
    """Start a VM that goes on from where the template was left.

    :param name: empty for one that is made up
    :param paused: stand still there, until QMP ``cont`` or a debugger
    :param keep: let it outlive this process
    :raises MachineError: if the name is in use or the template was removed
    """
    if not template.state.exists():
        raise MachineError(f"template {template.state.parent} is gone; make it again")

    def load(qmp: Qmp) -> None:
        qmp.execute("migrate-set-capabilities", capabilities=[_IGNORE_SHARED])
        qmp.execute("migrate-incoming", uri=f"file:{template.state}")

    return run_machine(template.config, name, qemu, template.ram, load, paused=paused, keep=keep)


def remove_templates() -> int:
    """Remove all templates; running clones go on.

    :return: how many were removed
    """
    templates = _templates()
    for path in templates:
        shutil.rmtree(path, ignore_errors=True)
    return len(templates)


def _fill(path: Path, config: MachineConfig, qemu: Qemu, boot_timeout_s: float) -> None:
    with launch(config, name=f"template-{os.getpid()}-{path.name[-8:]}", qemu=qemu) as vm:
        vm.wait_booted(boot_timeout_s)
        vm.execute("sync")
        with vm.qmp() as qmp:
            qmp.execute("migrate-set-capabilities", capabilities=[_IGNORE_SHARED])
            # It is migrated running, and so that is how a clone starts.
            qmp.execute("migrate", uri=f"file:{path / 'state'}")
            if qmp.wait_status("query-migrate", ("completed", "failed"), _MIGRATE_S) == "failed":
                error = qmp.execute("query-migrate").get("error-desc", "no reason given")
                raise MachineError(f"QEMU cannot save the state of the template: {error}")
        # The file stays where it is while QEMU has it open: a link keeps it.
        os.link(vm.info.ram_file, path / "ram")


# They hold RAM of the host: drop those used longest ago.
def _prune() -> None:
    total = shutil.disk_usage(_templates_dir()).total
    kept = max(_KEPT, total // _SHARE // _TEMPLATE_BYTES)
    for path in sorted(_templates(), key=lambda path: -path.stat().st_mtime)[kept:]:
        shutil.rmtree(path, ignore_errors=True)


# Everything that the guest in it was made from.
def _key(qemu: Qemu, config: MachineConfig) -> str:
    image = config.kernel.vmlinuz.stat()
    argv = command_line(qemu, config, Path("/"), Path("/ram"), ram_shared=True)
    parts = [_FORMAT, qemu.version, config.kernel.release, image.st_size, image.st_mtime_ns, *argv]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def _templates() -> list[Path]:
    return [path for path in _templates_dir().iterdir() if path.name[0] != "."]


def _templates_dir() -> Path:
    path = ram_dir() / "templates"
    path.mkdir(mode=0o700, exist_ok=True)
    return path
