"""kretprobe: a handler when a function returns."""

import collections
import dataclasses
import errno
from collections.abc import Callable
from typing import Any

import drgn
import drgn.helpers.linux.cpumask

from kgdbx.errors import MemoryFault, ProbeError
from kgdbx.probes.arguments import argument_suppliers, return_value_supplier
from kgdbx.probes.context import context_suppliers
from kgdbx.probes.handler import Supplier, bind_handler
from kgdbx.probes.probe import Hit, Point, Probe
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.tasks import Task

__all__ = ("EntryAttachment", "Kretprobe", "KretprobeInstance", "ReturnTable", "default_maxactive")

_THREAD_SIZE = 16 << 10  # THREAD_SIZE, arch/x86/include/asm/page_64_types.h, without KASAN


@dataclasses.dataclass(eq=False)
class KretprobeInstance:
    """A call that has not returned yet.

    :ivar rp: the kretprobe
    :ivar ret_addr: where the call returns to
    :ivar task: who made it
    :ivar data: whatever the entry handler keeps for the return handler
    """

    rp: "Kretprobe"
    ret_addr: int
    task: Task
    stack_pointer: int
    entry: "EntryAttachment"
    data: Any = None


class Kretprobe(Probe):
    """Look at what a function returns.

    Handlers name ``ri`` (the :class:`KretprobeInstance`), ``regs``, ``retval`` (a drgn object of
    the function's return type, None for void), ``p``, ``hit``, ``task``, ``cpu``, ``kernel``.

    :param handler: runs when the function returns; ``regs.ax`` may be changed
    :param entry_handler: runs at its entry, and may name the function's parameters; True
        (non-zero) means that this call's return is of no interest
    :param maxactive: calls that may be in progress at once; 0 for the kernel's default
    """

    kind = "r"

    def __init__(
        self,
        where: str | int,
        handler: Callable[..., Any] | None = None,
        *,
        entry_handler: Callable[..., Any] | None = None,
        maxactive: int = 0,
        name: str | None = None,
        hardware: bool = False,
    ) -> None:
        super().__init__(where, name=name, hardware=hardware)
        self.handler = handler
        self.entry_handler = entry_handler
        self.maxactive = maxactive
        self.active_instances: list[KretprobeInstance] = []
        self.abandoned = 0
        self._attached: tuple[EntryAttachment, ...] = ()

    def prepare(self, kernel: Kernel) -> None:
        for point in self.points:
            if point.inlined is not None:
                raise ProbeError(
                    f"{point.inlined!r} is inlined into {point.function.qualified_name}: it has "
                    "no return; use a kprobe, which covers every inlined copy",
                    errno.EINVAL,
                )
            if not point.is_entry:
                raise ProbeError(
                    f"a kretprobe goes to the entry of a function, not to {self.where!r}",
                    errno.EINVAL,
                )
        if self.maxactive <= 0:
            self.maxactive = default_maxactive(kernel)
        self._attached = tuple(EntryAttachment(self, kernel, point) for point in self.points)

    def attachments(self) -> tuple["EntryAttachment", ...]:
        """What to attach at each of the :attr:`points`."""
        return self._attached

    def uninstall(self) -> None:
        """Forget the calls that have not returned yet."""
        if self.manager is not None:
            self.manager.returns.forget(self)


def default_maxactive(kernel: Kernel) -> int:
    """``maxactive`` as register_kretprobe() in kernel/kprobes.c chooses it."""
    if kernel.memory.booted:
        cpus = int(drgn.helpers.linux.cpumask.num_possible_cpus(kernel.program))
    else:
        cpus = kernel.memory.read_u32(kernel.address("nr_cpu_ids"))  # NR_CPUS until it is known
    # CONFIG_PREEMPTION is a macro; this function exists only with it.
    return max(10, 2 * cpus) if kernel.vmlinux.lookup("preempt_schedule") else cpus


class ReturnTable:
    """Calls that have not returned yet, by the task and the stack pointer that they return with.

    Not by vCPU: a task may sleep in the function and return on another one. Not by return
    address alone: other calls return there too.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._pending: dict[tuple[int, int], list[KretprobeInstance]] = {}
        self._awaited: collections.Counter[int] = collections.Counter()
        self._offsets: tuple[int, int] | None = None

    def add(self, instance: KretprobeInstance) -> bool:
        """Take an instance if the probe has one left.

        :return: False if all *maxactive* are in use
        """
        rp = instance.rp
        self._drop_unwound(instance)
        if len(rp.active_instances) >= rp.maxactive:
            self._drop_dead(rp)
        if len(rp.active_instances) >= rp.maxactive:
            return False
        rp.active_instances.append(instance)
        key = (instance.task.address, instance.stack_pointer)
        self._pending.setdefault(key, []).append(instance)
        self._awaited[instance.ret_addr] += 1
        return True

    def returning(self, task_address: int, stack_pointer: int) -> list[KretprobeInstance]:
        """Instances of the call that returns now, newest first; they are free again.

        :param stack_pointer: as it is after the return
        """
        found = self._pending.pop((task_address, stack_pointer - 8), [])
        for instance in found:
            self._release(instance)
        return found[::-1]

    def cancel(self, instance: KretprobeInstance) -> None:
        """Free an instance whose return is of no interest; does nothing the second time."""
        if instance in instance.rp.active_instances:
            self._drop(instance)

    @property
    def is_empty(self) -> bool:
        """Whether no call is in progress."""
        return not self._pending

    def is_awaited(self, address: int) -> bool:
        """Whether a call in progress returns to an address."""
        return address in self._awaited

    def forget(self, rp: Kretprobe) -> None:
        """Drop all instances of a probe that is being unregistered."""
        for instance in tuple(rp.active_instances):
            self._drop(instance)

    def _drop_unwound(self, entered: KretprobeInstance) -> None:
        # A task that enters a function at this depth has left every call at this depth or deeper
        # on the same stack, however it did: an exception fixup, a longjmp-like exit, exec.
        stack = entered.stack_pointer // _THREAD_SIZE
        for instance in tuple(entered.rp.active_instances):
            if (
                instance.task.address == entered.task.address
                and instance.stack_pointer // _THREAD_SIZE == stack
                and instance.stack_pointer <= entered.stack_pointer
            ):
                self._drop(instance)
                instance.rp.abandoned += 1

    def _drop_dead(self, rp: Kretprobe) -> None:
        # kprobe_flush_task(): a task that died in a probed function never returns from it.
        for instance in tuple(rp.active_instances):
            if not self._is_alive(instance.task):
                self._drop(instance)
                rp.abandoned += 1

    def _is_alive(self, task: Task) -> bool:
        memory = self._kernel.memory
        if self._offsets is None:
            type_ = self._kernel.program.type("struct task_struct")
            self._offsets = (type_.member("pid").offset, type_.member("exit_state").offset)
        pid, exit_state = self._offsets
        try:
            return (
                memory.read_u32(task.address + pid) == task.pid
                and memory.read_u32(task.address + exit_state) == 0
            )
        except MemoryFault:
            return False

    def _release(self, instance: KretprobeInstance) -> None:
        instance.rp.active_instances.remove(instance)
        self._awaited[instance.ret_addr] -= 1
        if not self._awaited[instance.ret_addr]:
            del self._awaited[instance.ret_addr]

    def _drop(self, instance: KretprobeInstance) -> None:
        self._release(instance)
        key = (instance.task.address, instance.stack_pointer)
        siblings = self._pending[key]
        siblings.remove(instance)
        if not siblings:
            del self._pending[key]


class EntryAttachment:
    """A kretprobe at its function's entry; the manager inserts the site of the return.

    :ivar probe: on whose account hits go
    """

    def __init__(self, probe: Kretprobe, kernel: Kernel, point: Point) -> None:
        self.probe: Probe = probe
        self.point = point
        self._rp = probe
        self._instance: KretprobeInstance | None = None
        what = point.function.qualified_name
        context = context_suppliers(probe)
        instance: dict[str, Supplier] = {"ri": lambda hit: self._instance}
        self._entry: Callable[[Hit], Any] | None = None
        self._return: Callable[[Hit], Any] | None = None
        if probe.entry_handler is not None:
            names = {**argument_suppliers(kernel, point), **context, **instance}
            self._entry = bind_handler(probe.entry_handler, names, what)
        if probe.handler is not None:
            retval: dict[str, Supplier] = {"retval": return_value_supplier(kernel, point)}
            names = {**context, **retval, **instance}
            self._return = bind_handler(probe.handler, names, f"the return of {what}")

    def before(self, hit: Hit) -> bool:
        probe = self.probe
        assert probe.manager is not None
        stack_pointer = hit.regs.rsp
        return_address = hit.kernel.memory.read_u64(stack_pointer)
        instance = KretprobeInstance(self._rp, return_address, hit.task, stack_pointer, self)
        returns = probe.manager.returns
        if not returns.add(instance):
            probe.nmissed += 1
            return False
        if self._entry is not None:
            self._instance = instance
            if probe.call(self._entry, "entry_handler", hit):
                returns.cancel(instance)
                return False
            if not probe.active:
                return False  # the handler has unregistered or disabled its own probe
        if not probe.manager.watch_return(instance):
            returns.cancel(instance)
            probe.nmissed += 1
        return False

    def returned(self, hit: Hit, instance: KretprobeInstance) -> None:
        """Runs at the return address."""
        self.probe.hits += 1
        if self._return is not None:
            self._instance = instance
            self.probe.call(self._return, "handler", hit)

    def after(self, hit: Hit) -> None:
        """Nothing: the function has only begun."""

    def fault(self, hit: Hit, trap: int) -> bool:
        return False
