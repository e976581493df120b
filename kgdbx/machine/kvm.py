"""Find out whether KVM works, by booting a kernel with it."""

import logging
import os
import subprocess
from pathlib import Path

from kgdbx.machine.cache import locked, runtime_dir
from kgdbx.machine.qemu import Qemu

__all__ = ("kvm_works",)

_log = logging.getLogger(__name__)
_DEVICE = Path("/dev/kvm")
# TCG needs about 3 s for this; a KVM that is slower is emulated itself and of no use.
_DEADLINE_S = 6.0


def kvm_works(qemu: Qemu, vmlinuz: Path) -> bool:
    """Whether a kernel boots with KVM here, tried once in each boot of the host.

    That ``/dev/kvm`` exists and makes vCPUs says little: in some clouds guests then crawl.

    :param vmlinuz: a kernel image to try it with
    """
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return False
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    record = runtime_dir() / f"kvm-{boot}"
    with locked(runtime_dir() / "kvm.lock", timeout_s=60):
        if not record.exists():
            works = _boots(qemu, vmlinuz)
            record.write_text("yes" if works else "no")
            if not works:
                _log.warning("%s is there but boots no kernel: falling back to TCG", _DEVICE)
        return record.read_text() == "yes"


# Without a root file system the kernel boots, panics and, so asked, reboots; QEMU ends then.
def _boots(qemu: Qemu, vmlinuz: Path) -> bool:
    argv = [*qemu.argv(), "-no-user-config", "-nodefaults", "-display", "none", "-nic", "none"]
    argv += ["-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256M", "-no-reboot"]
    argv += ["-kernel", str(vmlinuz), "-append", "panic=-1"]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=qemu.environment(),
            timeout=_DEADLINE_S,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
