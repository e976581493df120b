"""A kprobe: who makes processes, with registers and stack (the kprobes guide's first example)."""

from kgdbx.probes.script import kprobe


def show_flags(p, regs, flags):
    print(f"post_handler: ip={regs.ip:#x} flags={flags:#x}")


@kprobe("kernel_clone", post_handler=show_flags)
def show_stack(p, regs, hit, args):
    print(f"pre_handler: {hit.task.comm}[{hit.task.pid}] flags={args.flags.value_():#x}")
    print(f"  ip={regs.ip:#x} sp={regs.sp:#x} di={regs.di:#x}")
    for frame in hit.stack_trace():
        print(f"    {frame.name}")
