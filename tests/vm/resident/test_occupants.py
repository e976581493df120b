"""Who is found inside of code: vCPUs, and everybody whose stack leads back to it."""

import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.attach import attach_vm
from kgdbx.machine.cache import wait_until
from kgdbx.resident.place.displace import busy_addresses, tasks_inside
from kgdbx.resident.place.task_walk import TaskWalk
from kgdbx.symbols.kernel import Kernel

KERNELS = ["6.1", "6.12"]
CloneOf = Callable[..., Any]


def range_of(kernel: Kernel, name: str) -> tuple[int, int]:
    (function,) = kernel.functions(name)
    return function.address, function.address + function.size_bytes


def sleepers(vm: Any) -> int:
    """How many threads sleep for a time now."""
    done = vm.execute("cat /proc/[0-9]*/task/*/stack 2>/dev/null | grep -c hrtimer_nanosleep; true")
    return int(done.output)


@pytest.mark.parametrize("name", KERNELS)
def test_every_frame_that_the_kernel_shows_is_found(clone_of: CloneOf, name: str) -> None:
    vm = clone_of(name, 4)
    vm.start("for i in $(seq 150); do sleep 1000 & done; caller 4 4000 1000000")
    assert wait_until(lambda: sleepers(vm) == 154, 60)
    shown = vm.execute("cd /proc; grep . [0-9]*/task/*/comm [0-9]*/task/*/stack 2>/dev/null; true")
    names = dict(re.findall(r"task/(\d+)/comm:(.*)", shown.output))
    frames = re.findall(r"task/(\d+)/stack:\[<0>\] ([\w.]+)\+(0x[0-9a-f]+)/", shown.output)
    with attach_vm(vm.info) as session:
        kernel = session.kernel
        tasks = list(TaskWalk(kernel).tasks())
        assert len({task.address for task in tasks}) == len(tasks)
        assert sum(task.pid == 0 for task in tasks) == 4  # one idle task a CPU
        assert len(names.keys() - {str(task.pid) for task in tasks}) <= 2  # grep and its shell
        text = (kernel.address("_text"), kernel.address("_etext"))
        began = time.monotonic()
        found = busy_addresses(kernel, [text])
        took = time.monotonic() - began
        print(f"\n{name}: {len(tasks)} tasks, {len(found)} addresses, {took:.3f} s")
        began = time.thread_time()
        busy_addresses(kernel, [range_of(kernel, "do_nanosleep")])
        assert time.thread_time() - began < 0.2
        by_task: dict[str, set[int]] = {}
        for each in found:
            by_task.setdefault(each.who.split(" (")[0], set()).add(each.address)
        compared = Counter[str]()
        for pid, function, offset in frames:
            # Others have moved on since, or come.
            comm = names.get(pid, "")
            if not re.match(r"sleep|caller|kthreadd|kswapd|kcompactd|oom_reaper|cpuhp", comm):
                continue
            places = {f.address + int(offset, 16) for f in kernel.functions(function)}
            assert places & by_task[f"task {pid}"], (names[pid], function, offset)
            compared[names[pid]] += 1
        assert compared["sleep"] >= 150 * 4
        assert sum(n for name_, n in compared.items() if name_.startswith("caller")) >= 4 * 4
        for cpu in kernel.target.cpus():
            rip = kernel.target.read_registers(cpu).rip
            here = {each.address for each in found if each.who == f"CPU {cpu}"}
            assert here == ({rip} if text[0] < rip < text[1] else set())


@pytest.mark.parametrize("name", KERNELS)
def test_messages_and_bounds(clone_of: CloneOf, name: str) -> None:
    vm = clone_of(name, 2)
    vm.start("sleep 1000")
    assert wait_until(lambda: sleepers(vm) == 1, 60)
    with attach_vm(vm.info) as session:
        kernel = session.kernel
        start, end = range_of(kernel, "do_nanosleep")
        messages = tasks_inside(kernel, [(start, end)])
        pattern = r"task \d+ \(sleep\) returns to do_nanosleep\+0x[0-9a-f]+"
        (message,) = (each for each in messages if re.fullmatch(pattern, each))
        back = start + int(message.rpartition("+")[2], 16)
        assert message not in tasks_inside(kernel, [(back, end)])
        assert message in tasks_inside(kernel, [(back, end)], include_start=True)
        assert message not in tasks_inside(kernel, [(start, back)], include_start=True)
        assert message in tasks_inside(kernel, [(start, back + 1)])
        # among other ranges, overlapping ones too
        others = [(start - 64, start - 32), (start - 100, end + 100), (end + 200, end + 300)]
        assert message in tasks_inside(kernel, [(start, start + 1), *others])
        idle = tasks_inside(kernel, [range_of(kernel, "do_idle")])
        assert len({each.split(" returns")[0] for each in idle if "swapper/" in each}) == 2
        assert tasks_inside(kernel, []) == []
        assert tasks_inside(kernel, [range_of(kernel, "kernel_power_off")]) == []


@pytest.mark.parametrize("name", KERNELS)
def test_tasks_under_way_are_found(clone_of: CloneOf, name: str) -> None:
    # Each vCPU in the kernel has its system call's return address on its task's stack, even
    # while it is on an interrupt's stack.
    vm = clone_of(name, 4)
    vm.start("for i in 1 2 3 4 5 6; do dd if=/dev/zero of=/dev/null bs=4k & done; wait")
    # Their shell names them, too.
    assert wait_until(lambda: vm.execute("ps | grep -c '[d]d if='; true").output == "7\n", 60)
    in_kernel = on_other_stack = 0
    with attach_vm(vm.info) as session:
        kernel = session.kernel
        entry = range_of(kernel, "do_syscall_64")
        stacks = {task.address: task for task in TaskWalk(kernel).tasks()}
        for _ in range(60):
            session.target.resume()
            time.sleep(0.02)  # a moment later, wherever the guest is then
            session.target.interrupt()
            found = busy_addresses(kernel, [entry])
            for cpu in kernel.target.cpus():
                regs = kernel.target.read_registers(cpu)
                task = stacks.get(kernel.current.address(regs))
                function = kernel.function_at(regs.rip)
                if task is None or task.comm != "dd" or regs.cs & 3 or function is None:
                    continue
                if not function.name.startswith(("read_zero", "write_null", "vfs_", "ksys_")):
                    on_other_stack += not task.stack <= regs.rsp < task.stack + 0x4000
                    continue
                in_kernel += 1
                assert any(f"task {task.pid} " in each.text for each in found), function.name
        assert in_kernel > 5
    print(f"\n{name}: {in_kernel} in system calls, {on_other_stack} on other stacks")
