"""All tasks of a stopped kernel, each by one read of its ``struct task_struct``."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import drgn
import numpy as np

from kgdbx.symbols.kernel import Kernel

__all__ = ("StackedTask", "TaskWalk")

_MOST_TASKS = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h
_MOST_CPUS = 8192  # MAXSMP's NR_CPUS, arch/x86/Kconfig
_COMM_BYTES = 16  # TASK_COMM_LEN, include/linux/sched.h


class StackedTask(NamedTuple):
    """A task and where its kernel stack is.

    ``address`` is its ``struct task_struct *``, ``stack`` the lowest address of its stack, 0 if it
    has none any more, and ``sp`` the stack pointer that was saved when it last left a CPU.
    """

    address: int
    pid: int
    comm: str
    stack: int
    sp: int


class TaskWalk:
    """Walks the lists of tasks of a kernel.

    :param kernel: a stopped kernel
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        task = kernel.program.type("struct task_struct")
        members = ("stack", "thread.sp", "tasks.next", "thread_node.next", "signal", "pid", "comm")
        self._offsets = {name: drgn.offsetof(task, name) for name in members}
        self._first = min(self._offsets.values())
        self._span = max(self._offsets.values()) + _COMM_BYTES - self._first
        signal = kernel.program.type("struct signal_struct")
        self._thread_head = drgn.offsetof(signal, "thread_head")

    def tasks(self) -> Iterator[StackedTask]:
        """All threads, idle tasks, and tasks that run or wait for a CPU but are on no list.

        Those are dying: they took themselves off the list before they left their CPU.
        """
        seen: set[int] = set()
        for address, data in itertools.chain(self._listed(), self._queued()):
            if address not in seen:
                seen.add(address)
                yield self._task(address, data)

    def percpu_bases(self) -> list[int]:
        """What to add to the address of a per-CPU variable, for each CPU."""
        kernel = self._kernel
        offsets = kernel.object_address("__per_cpu_offset")
        count = kernel.object_address("nr_cpu_ids")
        if offsets is None or count is None:
            return [0]  # built for one CPU
        cpus = min(kernel.memory.read_u32(count), _MOST_CPUS)
        bases: list[int] = np.frombuffer(kernel.memory.read(offsets, cpus * 8), "<u8").tolist()
        return bases

    def _queued(self) -> Iterator[tuple[int, bytes]]:
        kernel = self._kernel
        queues = kernel.address("runqueues") if kernel.vmlinux.lookup("runqueues") else None
        if queues is None:
            return
        queue = kernel.program.type("struct rq")
        node = drgn.offsetof(kernel.program.type("struct task_struct"), "se.group_node")
        for base in self.percpu_bases():
            start = (base + queues) % (1 << 64)
            for member in ("curr", "idle"):
                task = kernel.memory.read_u64(start + drgn.offsetof(queue, member))
                if task:
                    yield task, self._read(task)
            if not queue.has_member("cfs_tasks"):
                continue
            head = start + drgn.offsetof(queue, "cfs_tasks")
            entry = kernel.memory.read_u64(head)
            for _ in range(_MOST_TASKS):
                if entry in (head, 0):
                    break
                yield entry - node, self._read(entry - node)
                entry = kernel.memory.read_u64(entry)

    def _listed(self) -> Iterator[tuple[int, bytes]]:
        first = self._kernel.address("init_task")
        leader = first
        for _ in range(_MOST_TASKS):
            data = self._read(leader)
            head = self._number(data, "signal") + self._thread_head
            yield leader, data
            node = self._number(data, "thread_node.next")
            for _ in range(_MOST_TASKS):
                if node in (head, 0):
                    break
                thread = node - self._offsets["thread_node.next"]
                of_thread = self._read(thread)
                yield thread, of_thread
                node = self._number(of_thread, "thread_node.next")
            leader = self._number(data, "tasks.next") - self._offsets["tasks.next"]
            if leader == first:
                return

    def _read(self, address: int) -> bytes:
        return self._kernel.memory.read(address + self._first, self._span)

    def _number(self, data: bytes, name: str, size_bytes: int = 8) -> int:
        at = self._offsets[name] - self._first
        return int.from_bytes(data[at : at + size_bytes], "little")

    def _task(self, address: int, data: bytes) -> StackedTask:
        at = self._offsets["comm"] - self._first
        comm = data[at : at + _COMM_BYTES].split(b"\0")[0].decode("utf-8", "replace")
        return StackedTask(
            address,
            self._number(data, "pid", 4),
            comm,
            self._number(data, "stack"),
            self._number(data, "thread.sp"),
        )
