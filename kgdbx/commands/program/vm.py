"""vm fetch, build, run, list, exec, clone, stop, clean: kernels and VMs."""

import argparse
import sys
from pathlib import Path
from typing import TextIO

from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.registry import argument
from kgdbx.errors import CommandError
from kgdbx.machine.config import MachineConfig
from kgdbx.machine.info import remove_stale
from kgdbx.machine.kernels import FLAVOURS, fetch_kernel
from kgdbx.machine.kgdb_kernel import KGDB_KERNEL, build_kgdb_kernel
from kgdbx.machine.qemu import find_qemu
from kgdbx.machine.snapshot import clone, make_template, remove_templates
from kgdbx.machine.vm import configure, find_vm, launch, list_vms, stop
from kgdbx.render import pick_style, table

_KERNELS = tuple(flavour.name for flavour in FLAVOURS)
_BOOT_S = 120.0

MACHINE_ARGUMENTS = (
    argument(
        "--kernel",
        choices=(*_KERNELS, KGDB_KERNEL),
        default=_KERNELS[0],
        help="kernel (default 6.1)",
    ),
    argument("--smp", type=int, default=2, metavar="N", help="vCPUs (default 2)"),
    argument("--memory", type=int, default=512, metavar="MIB", help="RAM (default 512)"),
    argument("--cpu", default="", metavar="MODEL", help="QEMU's CPU model"),
    argument("--append", default="", metavar="TEXT", help="more of the kernel's command line"),
    argument(
        "--module", action="append", default=[], metavar="NAME", help="module for modprobe to find"
    ),
    argument(
        "--file",
        action="append",
        default=[],
        metavar="GUEST=HOST",
        help="put a file of the host into the guest",
    ),
)
"""Options that say what a VM is made of."""


def machine_config(args: argparse.Namespace) -> MachineConfig:
    """The machine that the options describe."""
    files: dict[str, Path] = {}
    for text in args.file:
        guest, equals, host = text.partition("=")
        if not equals:
            raise CommandError(f"--file {text!r} is not GUEST=HOST")
        files[guest] = Path(host)
    return configure(
        args.kernel,
        smp=args.smp,
        memory_bytes=args.memory << 20,
        cpu_model=args.cpu,
        append=args.append,
        modules=args.module,
        files=files,
    )


_NAME = argument("--name", default="", help="name of the VM (default: made up)")


@PROGRAM_COMMANDS.command(
    name="vm fetch",
    summary="Fetch Debian's stock kernels, their debug symbols, and QEMU.",
    description="Everything goes to ~/.cache/kgdbx; nothing of the system is changed.",
    arguments=(argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(_KERNELS)),),
)
def fetch(out: TextIO, args: argparse.Namespace) -> None:
    qemu = find_qemu()
    print(f"QEMU {'.'.join(map(str, qemu.version))}: {qemu.path}", file=out)
    for name in args.kernels or _KERNELS:
        kernel = fetch_kernel(name)
        print(f"Linux {kernel.release}: {kernel.vmlinux}", file=out)


@PROGRAM_COMMANDS.command(
    name="vm build",
    summary="Build the kernel with KGDB, from Debian's source.",
    description="It takes some minutes, once; everything goes to ~/.cache/kgdbx. 'vm run --kernel\n"
    "kgdb' builds it if it is not there; this builds it anew when there is a newer source.",
    arguments=(argument("kernel", choices=(KGDB_KERNEL,), help=KGDB_KERNEL),),
)
def build(out: TextIO, args: argparse.Namespace) -> None:
    kernel = build_kgdb_kernel()
    print(f"Linux {kernel.release}: {kernel.vmlinux}", file=out)


@PROGRAM_COMMANDS.command(
    name="vm run",
    summary="Boot a VM with a stock kernel, or the one with KGDB; it stays until it is stopped.",
    arguments=(
        *MACHINE_ARGUMENTS,
        _NAME,
        argument(
            "--frozen", action="store_true", help="stand at the first instruction, before boot"
        ),
    ),
)
def run(out: TextIO, args: argparse.Namespace) -> None:
    vm = launch(machine_config(args), name=args.name, paused=args.frozen, keep=True)
    if not args.frozen:
        vm.wait_booted(_BOOT_S)
    print(vm.name, file=out)


@PROGRAM_COMMANDS.command(
    name="vm clone",
    summary="Start a booted VM in a moment, as a copy-on-write clone.",
    description="The first clone of a kind boots a template, which later ones share.",
    arguments=(*MACHINE_ARGUMENTS, _NAME),
)
def clone_(out: TextIO, args: argparse.Namespace) -> None:
    vm = clone(make_template(machine_config(args)), name=args.name, keep=True)
    print(vm.name, file=out)


@PROGRAM_COMMANDS.command(name="vm list", summary="List the running VMs.")
def list_(out: TextIO, args: argparse.Namespace) -> None:
    rows: list[tuple[object, ...]] = [
        (
            vm.info.name,
            vm.info.release,
            vm.info.smp,
            vm.info.memory_bytes >> 20,
            vm.info.accel,
            str(vm.info.pid),
            str(vm.info.gdb_socket),
            str(vm.info.kgdb_socket) if vm.info.kernel == KGDB_KERNEL else "",
        )
        for vm in list_vms()
    ]
    columns = ["name", "kernel", "cpus", "MiB", "accel", "pid", "gdb socket", "kgdb serial line"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print(table(columns, rows, pick_style(out)), file=out)


@PROGRAM_COMMANDS.command(
    name="vm exec",
    summary="Run a shell command in a VM, and exit with its status.",
    arguments=(
        argument("name", help="name of the VM", completes="vm"),
        argument("--timeout", type=float, default=60.0, metavar="S", help="seconds (default 60)"),
        argument("command", nargs=argparse.REMAINDER, help="the command"),
    ),
)
def exec_(out: TextIO, args: argparse.Namespace) -> int:
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words:
        raise CommandError("give a command to run")
    if words[0].startswith("-"):
        raise CommandError(f"options such as {words[0]} go before the name of the VM")
    vm = find_vm(args.name)
    vm.wait_booted(args.timeout)  # what is sent before the guest listens is lost
    completed = vm.execute(" ".join(words), timeout_s=args.timeout)
    out.write(completed.output)
    return completed.status


@PROGRAM_COMMANDS.command(
    name="vm stop",
    summary="Stop VMs.",
    arguments=(
        argument("names", nargs="*", metavar="NAME", help="names of VMs", completes="vm"),
        argument("--all", action="store_true", help="all VMs of this user"),
    ),
)
def stop_(out: TextIO, args: argparse.Namespace) -> None:
    names = [vm.name for vm in list_vms()] if args.all else args.names
    if not names and not args.all:
        raise CommandError("name the VMs to stop, or use --all")
    for name in names:
        stop(name)
        print(f"stopped {name}", file=sys.stderr)


@PROGRAM_COMMANDS.command(
    name="vm clean",
    summary="Free the memory that templates of clones take; running VMs go on.",
    description="Each takes about 120 MB of the host's memory. The next clone boots its own anew.\n"
    "What dead VMs have left is removed, too. Kernels stay, in ~/.cache/kgdbx.",
)
def clean(out: TextIO, args: argparse.Namespace) -> None:
    stale = remove_stale()
    print(f"removed {remove_templates()} templates, and {len(stale)} dead VMs", file=sys.stderr)
