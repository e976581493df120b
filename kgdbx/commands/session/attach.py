"""attach: connect to a running kernel."""

import argparse

from kgdbx.commands.context import Context
from kgdbx.commands.registry import argument
from kgdbx.commands.session import SESSION_COMMANDS


@SESSION_COMMANDS.command(
    name="attach",
    summary="Attach to a running VM by name, a stub's socket, or host:port.",
    description="The kernel is stopped. KASLR is found without help, and the build ID of vmlinux\n"
    "is compared with the running kernel's.",
    arguments=(
        argument(
            "where",
            nargs="?",
            default="",
            help="VM name, path of a Unix socket, or host:port, for KGDB behind 'kgdb:'; a tty; "
            "gdb's own connection if left out",
            completes="vm",
        ),
        argument(
            "vmlinux",
            nargs="?",
            help="the kernel's file with debug symbols; a VM of ours knows its own",
            completes="file",
        ),
        argument(
            "--sysrq",
            metavar="LINE",
            help="console over which KGDB's kernel can be stopped: tty or telnet:host:port",
            completes="file",
        ),
    ),
)
def attach(context: Context, args: argparse.Namespace) -> None:
    session = context.attach(args.where, args.vmlinux, args.sysrq)
    if session.recovery is not None:
        context.write(session.recovery.text)
    kernel = session.kernel
    release = kernel.program["init_uts_ns"].name.release.string_().decode("ascii", "replace")
    context.write(
        f"Linux {release} on {len(session.target.cpus())} vCPUs, KASLR slide {kernel.slide:#x}, "
        f"build ID {kernel.vmlinux.build_id}"
    )


@SESSION_COMMANDS.command(
    name="detach",
    summary="Remove every probe, and let the kernel run on.",
    needs_session=True,
)
def detach(context: Context, args: argparse.Namespace) -> None:
    context.detach()
