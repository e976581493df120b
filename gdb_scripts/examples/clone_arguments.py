"""A jprobe: the arguments of process creation, by name (the kprobes guide's second example)."""

from kgdbx.probes.script import jprobe


@jprobe("kernel_clone")
def kernel_clone(args, task):
    print(
        f"{task.comm}[{task.pid}] clone_flags={args.flags.value_():#x} "
        f"stack={args.stack.value_():#x} exit_signal={args.exit_signal.value_()}"
    )
