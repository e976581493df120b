"""Checks of the host and of an attached kernel: rows, never printed here."""

import dataclasses
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kgdbx.errors import KgdbxError, MachineError
from kgdbx.machine.kernels import FLAVOURS, find_kernel
from kgdbx.machine.kvm import kvm_works
from kgdbx.machine.qemu import Qemu, find_qemu
from kgdbx.session import Session

__all__ = ("Check", "host_checks", "session_checks")

_PACKAGES = ("drgn", "iced-x86", "numpy", "prompt_toolkit", "pyelftools", "pygdbmi", "qemu.qmp")
_GDB_S = 20


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    :ivar found: what is there
    :ivar remedy: what to do if it is not ok
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""


def host_checks() -> Iterator[Check]:
    """What kgdbx needs on this host."""
    yield Check("Python", sys.version_info >= (3, 11), sys.version.split()[0], "install 3.11")
    yield _gdb()
    for name in ("gcc", "setpriv"):
        path = shutil.which(name)
        yield Check(name, path is not None, path or "not found", "make setup")
    for package in _PACKAGES:
        try:
            yield Check(package, True, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, False, "not installed", "make setup")
    qemu: Qemu | None = None
    try:
        qemu = find_qemu()
    except MachineError as e:
        yield Check("QEMU", False, str(e), "kgdbx vm fetch")
    if qemu is not None:
        yield Check("QEMU", True, f"{'.'.join(map(str, qemu.version))}: {qemu.path}")
    for flavour in FLAVOURS:
        name = f"kernel {flavour.name}"
        try:
            kernel = find_kernel(flavour.name)
        except MachineError as e:
            yield Check(name, False, str(e), f"kgdbx vm fetch {flavour.name}")
        else:
            yield Check(name, True, kernel.release)
            if flavour is FLAVOURS[0] and qemu is not None:
                yield _kvm(qemu, kernel.vmlinuz)


def session_checks(session: Session) -> Iterator[Check]:
    """What an attached kernel and its transport can do."""
    target, kernel = session.target, session.kernel
    can = target.capabilities
    yield Check("stub", True, f"{target.name}, {len(target.cpus())} vCPUs")
    yield Check(
        "physical memory",
        can.physical_memory,
        "yes" if can.physical_memory else "no",
        "without it a vCPU stopped in user mode may map no kernel memory",
    )
    yield Check(
        "reads while running",
        True,
        "yes, guest RAM is mapped" if can.reads_while_running else "no, over the stub at stops",
    )
    yield Check("debug registers", True, str(can.hardware_breakpoints))
    most = can.software_breakpoints
    places = "at any number of addresses" if most is None else f"at {most} addresses"
    yield Check("software breakpoints", True, places)
    yield Check(
        "probes in the kernel",
        True,
        "yes" if can.writes_code else "no, KGDB cannot write code: each hit stops the kernel",
    )
    yield Check("KASLR", True, f"slide {kernel.slide:#x}")
    yield Check("build ID", True, f"{kernel.vmlinux.build_id} in the kernel and in vmlinux")
    yield Check(
        "page tables",
        True,
        f"{kernel.memory.levels} levels, {'booted' if kernel.memory.booted else 'early boot'}",
    )
    release = kernel.program["init_uts_ns"].name.release.string_().decode("ascii", "replace")
    yield Check("drgn", True, f"Linux {release}")
    for module in kernel.modules:
        try:
            has = kernel.modules.load_debug_info(module)
            yield Check(f"module {module.name}", has, "debug info" if has else "no debug file", "")
        except KgdbxError as e:
            yield Check(f"module {module.name}", False, str(e), "install the matching -dbg package")


def _gdb() -> Check:
    remedy = "make setup"
    code = "import sys; print(gdb.VERSION, '%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run(
            ["gdb", "-nx", "-batch", "-ex", f"python {code}"],
            capture_output=True,
            text=True,
            timeout=_GDB_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as e:
        return Check("gdb", False, f"{type(e).__name__}: {e}", remedy)
    found = done.stdout.strip()
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    same = found.endswith(f" {own}")
    return Check("gdb", same, f"{found} (its Python; this one is {own})", remedy)


def _kvm(qemu: Qemu, vmlinuz: Path) -> Check:
    if not os.path.exists("/dev/kvm"):
        return Check("KVM", True, "none: VMs run under TCG")
    works = kvm_works(qemu, vmlinuz)
    found = "works, but probes need TCG" if works else "/dev/kvm does not work"
    return Check("KVM", True, f"{found}: VMs run under TCG")
