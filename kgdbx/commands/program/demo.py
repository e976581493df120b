"""demo: the three kinds of probe on a stock kernel, from boot to the end."""

import argparse
from typing import TextIO

from kgdbx.attach import attach_vm
from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.registry import argument
from kgdbx.commands.session.listing import PROBE_COLUMNS, probe_rows
from kgdbx.commands.session.probe import describe
from kgdbx.errors import MachineError
from kgdbx.machine.kernels import FLAVOURS
from kgdbx.machine.vm import configure, launch
from kgdbx.probes.jprobe import Jprobe
from kgdbx.render import pick_style, table
from kgdbx.trace.text import event_line

_WORKLOAD = "cat /etc/hostname /nowhere"
_DEFINITIONS = (
    "p:open do_sys_openat2 filename:string how->flags",
    "r:opened do_sys_openat2 filename:string $retval",
)
_BOOT_S = 120.0
_WORKLOAD_S = 60.0


@PROGRAM_COMMANDS.command(
    name="demo",
    summary="Boot a stock kernel, probe it, show what happens, and leave it as it was.",
    arguments=(
        argument(
            "--kernel",
            choices=tuple(flavour.name for flavour in FLAVOURS),
            default=FLAVOURS[0].name,
        ),
    ),
)
def demo(out: TextIO, args: argparse.Namespace) -> int:
    style = pick_style(out)

    def say(text: str) -> None:
        print(text, file=out, flush=True)

    def heading(text: str) -> None:
        say(f"\n{style.bold}# {text}{style.reset}")

    heading(f"Boot Debian's stock {args.kernel} kernel, 2 vCPUs, KASLR on")
    with launch(configure(args.kernel, smp=2)) as vm:
        vm.wait_booted(_BOOT_S)
        say(vm.execute("uname -srv").output.rstrip())

        heading("Attach to QEMU's gdbstub")
        with attach_vm(vm.info) as session:
            kernel = session.kernel
            say(f"KASLR slide {kernel.slide:#x}, build ID {kernel.vmlinux.build_id}")
            entry = kernel.functions("do_sys_openat2")[0].address
            before = kernel.read_code(entry, 64)

            heading("A kprobe, a kretprobe and a jprobe")
            session.event_listeners.append(lambda event: say(event_line(event, style)))
            for text in _DEFINITIONS:
                say(describe(session.define(text)[0]))

            def path_openat(nd, task):  # type: ignore[no-untyped-def]
                name = nd.name.name.string_().decode(errors="replace")
                say(f"{'jprobe':>24} path_openat: {task.comm} looks up {name!r}")

            say(describe(session.register(Jprobe("path_openat", path_openat, name="lookup"))))

            heading(f"{_WORKLOAD} in the guest")
            command = vm.start(_WORKLOAD)
            session.run(command=command, timeout_s=_WORKLOAD_S)
            if command.poll() is None:
                raise MachineError(f"the workload did not end within {_WORKLOAD_S:g} s")

            heading("The probes")
            say(table(PROBE_COLUMNS, probe_rows(list(session.probes)), style))

        heading("Detached: the guest runs on, unpatched")
        with attach_vm(vm.info) as session:
            same = session.kernel.read_code(entry, 64) == before
        say(f"do_sys_openat2's code is {'what it was' if same else 'CHANGED'}")
        say(vm.execute("echo the guest is alive").output.rstrip())
        return 0 if same else 1
