"""The task list, as ``ps`` shows it."""

from typing import Any

import drgn
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.sched import task_state_to_char

from kgdbx.session import Session

__all__ = ("tasks",)


def tasks(session: Session) -> dict[str, Any]:
    """All tasks by pid.

    :return: ``rows`` of pid, parent's pid, vCPU, state, kernel-virtual address of the ``struct
        task_struct``, resident KiB and command; ``errors`` says what could not be read
    """
    program = session.kernel.program
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    try:
        for task in for_each_task(program):
            try:
                rows.append(_row(program, task))
            except (drgn.FaultError, LookupError, ValueError) as e:
                errors.append(f"task {task.value_():#x}: {e}")
    except drgn.FaultError as e:  # the list changes while the kernel runs
        errors.append(f"the list ends early: {e}")
    return {"rows": sorted(rows, key=lambda row: int(row["pid"])), "errors": errors}


def _row(program: drgn.Program, task: drgn.Object) -> dict[str, Any]:
    return {
        "pid": task.pid.value_(),
        "ppid": task.real_parent.tgid.value_(),
        "cpu": _cpu(task),
        "state": task_state_to_char(task),
        "task": task.value_(),
        "rss_kib": _resident_pages(task) * 4,
        "command": task.comm.string_().decode("utf-8", "backslashreplace"),
    }


def _cpu(task: drgn.Object) -> int:
    # Linux kernel commit bcf9033e5449 ("sched: move CPU field back into thread_info if
    # THREAD_INFO_IN_TASK=y") (in v5.16).
    try:
        return int(task.thread_info.cpu)
    except AttributeError:
        return int(task.cpu)


def _resident_pages(task: drgn.Object) -> int:
    # Of files, anonymous and shared: MM_FILEPAGES, MM_ANONPAGES, MM_SHMEMPAGES in
    # include/linux/mm_types_task.h.
    if not task.mm:
        return 0
    stat = task.mm.rss_stat
    # Linux kernel commit f1a7941243c1 ("mm: convert mm's rss stats into percpu_counter") (in
    # v6.2). The counters' shares of single vCPUs are left out.
    try:
        counts = [stat[n].count.value_() for n in (0, 1, 3)]
    except TypeError:
        counts = [stat.count[n].counter.value_() for n in (0, 1, 3)]
    return sum(max(0, count) for count in counts)
