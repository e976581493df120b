"""Where the running kernel keeps what the C of handlers needs, as ``#define`` lines."""

from dataclasses import dataclass

import drgn

from kgdbx.errors import SymbolError
from kgdbx.symbols.kernel import Kernel

__all__ = ("KernelFacts",)


@dataclass(frozen=True)
class KernelFacts:
    """Where the running kernel keeps what handlers need.

    :ivar defines: the text of ``#define`` lines
    """

    defines: str

    @classmethod
    def of(cls, kernel: Kernel, guard: int, window: int, window_bytes: int) -> "KernelFacts":
        """Read them from the debug information.

        :param guard: per-CPU address of the word that says that a handler runs
        :raises SymbolError: if this kernel keeps them in an unknown way
        """
        task = kernel.program.type("struct task_struct")
        pid, tgid = (int(task.member(name).offset) for name in ("pid", "tgid"))
        if tgid != pid + 4:
            raise SymbolError("struct task_struct has tgid elsewhere than behind pid")
        khz = kernel.memory.read_u32(kernel.address("tsc_khz"))
        values = {
            "CURRENT": _per_cpu(kernel, "current_task", "current_task"),
            "CPU_NUMBER": _per_cpu(kernel, "cpu_number", "cpu_number"),
            "PREEMPT_COUNT": _per_cpu(kernel, "__preempt_count", "preempt_count"),
            "TASK_PID": pid,
            "TASK_COMM": int(task.member("comm").offset),
            "TASK_STACK": int(task.member("stack").offset),
            "HARDIRQ_STACK": _per_cpu(kernel, "hardirq_stack_ptr", "hardirq_stack_ptr"),
            "GUARD": guard,
            "WINDOW": window,
            "WINDOW_BYTES": window_bytes,
            "TSC_HZ": 1000 * khz,
            "NS_PER_TICK": (10**6 << 32) // khz,  # times 1 << 32
        }
        return cls("".join(f"#define {name} {value:#x}UL\n" for name, value in values.items()))


def _per_cpu(kernel: Kernel, symbol: str, member: str) -> int:
    # Linux kernel commit e57ef2ed97c1 ("x86: Put hot per CPU variables into a struct") (in v6.2).
    if kernel.vmlinux.lookup(symbol):
        return kernel.vmlinux.address(symbol)
    try:
        hot = kernel.program.type("struct pcpu_hot")
    except LookupError:
        raise SymbolError(f"the kernel has neither {symbol} nor struct pcpu_hot") from None
    assert isinstance(hot, drgn.Type)
    return kernel.vmlinux.address("pcpu_hot") + int(hot.member(member).offset)
