"""One definition means the same at a stop of the kernel and inside the guest."""

from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.errors import KgdbxError
from kgdbx.probes.event import Event

GuestOf = Callable[..., Any]
OPEN = "do_sys_openat2"
# Each is placed twice, once for each tier, and both see the same hits.
DEFINITIONS = {
    "parameters": f"p {OPEN} dfd filename how",
    "members": f"p {OPEN} how->flags how->mode m=how->resolve:x8",
    "user_string": f"p {OPEN} filename:ustring u=+0(%si):ustring",
    "specials": f"p {OPEN} $comm $pid $tgid $cpu $task",
    "arguments": f"p {OPEN} $arg1 $arg2:x64 $arg3 a=$arg1:s32 b=$arg1:u8 c=$arg1:x16",
    "registers": f"p {OPEN} %di %si:x64 low=%dx:u32 a=%bx b=%r12 f=%sp",
    "stack": f"p {OPEN} $stack0 s=$stack1 t=$stack2:symbol",
    "task": f"p {OPEN} g=$task->group_leader->comm:string n=$task->tgid "
    "c=$task->comm p=$task->parent->pid u=$task->cred->uid.val",
    "casts": f"p {OPEN} a=(s8)dfd b=(u8)dfd c=(u64)dfd d=-dfd e=dfd*3 f=dfd>>2 g=(u32)dfd>>2",
    "sizes": f"p {OPEN} a=sizeof(struct file) b=sizeof(int)+dfd",
    "globals": f"p {OPEN} a=jiffies_64>0 b=&init_task:symbol c=init_task.pid d=init_task.comm",
    "unreadable": f"p {OPEN} bad=+0(0x1000):u32 dfd us=+0(0x1000):ustring "
    "ks=+0(-4096):string $comm null=((struct file *)0)->f_mode",
    "arrays": f"p {OPEN} a=$task->comm[0]:u8 b=+0(%dx):x64[3] c=$task->comm:char[4]",
    "bits": f"p {OPEN} a=how->flags:b4@2/64 b=$task->in_execve c=$task->no_cgroup_migration",
    "path": "p security_file_open file->f_path.dentry->d_name.name:string "
    "file->f_path.dentry->d_inode->i_ino file->f_flags "
    "fs=file->f_path.mnt->mnt_sb->s_type->name:string "
    "up=file->f_path.dentry->d_parent->d_name.name:string",
    "operations": "p security_file_open o=file->f_path.dentry->d_inode->i_fop:symbol "
    "m=file->f_path.dentry->d_inode->i_mode s=file->f_path.dentry->d_inode->i_size",
    "returned": f"r {OPEN} $retval s=$retval:s32 x=$retval:x64 dfd filename:ustring $comm",
    "returned_pointer": "r do_filp_open $retval f=$retval->f_flags dfd",
    "returned_void": "r fd_install fd f=file->f_flags",
    "returned_opened": "r do_dentry_open $retval f->f_inode->i_ino $arg2",
    "call_stack": f"p {OPEN} $kstack short=$kstack:2",
    "inner_call_stack": "p do_dentry_open $kstack:32",
    "inside_call_stack": "p do_dentry_open+0x5 $kstack",
    "returned_stack": "r do_filp_open $kstack",
    "condition": f"p {OPEN} dfd if how->flags & 0x8000 && dfd == -100",
    "by_name": f'p {OPEN} $pid if $comm == "opener-1"',
    "by_pattern": f'p {OPEN} $pid if $comm ~ "opener-*" && !(dfd > 0)',
    "by_string": "p security_file_open d=file->f_path.dentry->d_name.name:string "
    'if file->f_path.dentry->d_name.name ~ "host*"',
    "by_result": f"r {OPEN} $retval if $retval < 0",
    "faulting": f"p {OPEN} dfd if ((struct file *)0)->f_mode == 3",
}


def run_both(guest: Any, workload: str) -> dict[str, tuple[list[Event], list[Event]]]:
    events: list[Event] = []
    guest.session.event_listeners.append(events.append)
    pairs, reasons = {}, {}
    for name, text in DEFINITIONS.items():
        kind, _, rest = text.partition(" ")
        kind += "64" if kind == "r" else ""
        try:
            (resident,) = guest.session.define(f"{kind}:res/{name} {rest}", tier="resident")
        except KgdbxError as e:
            reasons[name] = str(e)
            continue
        (stop,) = guest.session.define(f"{kind}:stop/{name} {rest}", tier="stop")
        pairs[name] = stop, resident
    assert not reasons
    guest.run(workload)
    events = [e for e in events if e.task.comm.startswith("opener-")]
    for name, (stop, resident) in pairs.items():
        assert (stop.tier, resident.tier) == ("stop", "resident")
        assert resident.nmissed == stop.nmissed == 0, name
        assert resident.hits == stop.hits, name
        assert resident.nfaults == stop.nfaults, name
    return {
        name: (
            [e for e in events if e.probe == f"stop/{name}"],
            [e for e in events if e.probe == f"res/{name}"],
        )
        for name in DEFINITIONS
    }


def by_task(events: list[Event]) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for event in events:
        found.setdefault(event.task.pid, []).append(event)
    return found


def differences(stop: Event, resident: Event) -> list[str]:
    found = [
        f"{what}: {getattr(stop, what)!r} at a stop, {getattr(resident, what)!r} in the guest"
        for what in ("kind", "address", "where", "cpu", "return_address", "return_where")
        if getattr(stop, what) != getattr(resident, what)
    ]
    assert list(stop.fields) == list(resident.fields)
    for name, ours in resident.fields.items():
        theirs = stop.fields[name]
        if (str(ours), type(ours)) != (str(theirs), type(theirs)):
            found.append(f"{name}: {theirs!r} at a stop, {ours!r} in the guest")
    return found


@pytest.mark.parametrize("kernel", ["6.12"])
def test_both_tiers_see_the_same(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    both = run_both(guest, "opener 2 6; opener 2 4 /no/such/file")
    problems = {}
    for name, (stop, resident) in both.items():
        ours, theirs = by_task(resident), by_task(stop)
        wrong = [] if name == "faulting" or stop else ["no event"]
        wrong += [] if ours.keys() == theirs.keys() else [f"{len(stop)} {len(resident)} events"]
        for pid in ours.keys() & theirs.keys():
            for a, b in zip(theirs[pid], ours[pid], strict=True):
                wrong += differences(a, b)
        if wrong:
            problems[name] = dict.fromkeys(wrong)
    assert not problems
    assert len(both["condition"][1]) == 10
    assert len(both["by_name"][1]) == 5
    assert len(both["by_string"][1]) == 6
    assert len(both["by_result"][1]) == 4
    assert both["faulting"] == ([], [])
    assert str(both["unreadable"][1][0].fields["bad"]) == "(fault)"
    # Return probes wait for most of these calls: the stacks are whole all the same.
    for name, innermost in (
        ("call_stack", OPEN),
        ("inner_call_stack", "do_dentry_open"),
        ("returned_stack", OPEN),
    ):
        stacks = [event.fields["$kstack"] for event in both[name][1]]
        assert {stack[0].partition("+")[0] for stack in stacks} == {innermost}, name
        assert {stack[-1].partition("+")[0] for stack in stacks} == {
            "entry_SYSCALL_64_after_hwframe"
        }, (name, stacks[0])
    whole, short = both["call_stack"][1][0].fields.values()
    assert short == whole[:2]
