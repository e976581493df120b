"""Probe definitions on a real kernel: their fields, conditions and refusals."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.definitions import Refused
from kgdbx.errors import DefinitionError, ProbeError
from kgdbx.probes.event import Event
from kgdbx.probes.value import Unreadable

CALLS = 23
GuestOf = Callable[..., Any]


def events_of(guest: Any, comm: str = "opener-") -> list[Event]:
    events: list[Event] = []

    def listen(event: Event) -> None:
        if event.task.comm.startswith(comm):
            events.append(event)

    guest.session.event_listeners.append(listen)
    return events


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_fields_by_name_and_as_kprobe_events_writes_them(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    events = events_of(guest)
    guest.session.define("p:names do_sys_openat2 dfd filename:ustring flags=how->flags:x64 $comm")
    guest.session.define("p:old/regs do_sys_openat2 dfd=%di:s32 f=+0(%si):ustring m=+8(%dx):u64")
    guest.session.define("r:back do_sys_openat2 dfd $retval:s64 filename:ustring")
    guest.run(f"opener 1 {CALLS} /nope")
    assert [e.probe for e in events] == ["kprobes/names", "old/regs", "kprobes/back"] * CALLS
    names, regs, back = events[:3]
    assert list(names.fields) == ["dfd", "filename", "flags", "comm"] or list(names.fields)[:3] == [
        "dfd",
        "filename",
        "flags",
    ]
    assert list(names.fields.values()) == [-100, "/nope", 0o100000, "opener-0"]
    assert list(regs.fields.values()) == [-100, "/nope", 0]
    assert list(back.fields.values()) == [-100, -errno.ENOENT, "/nope"]
    assert names.where.startswith("do_sys_openat2+0x0/0x")
    assert (names.kind, back.kind) == ("p", "r")
    assert back.return_address is not None and "sys_open" in back.return_where
    assert names.ts_ns <= regs.ts_ns <= back.ts_ns


def test_condition(guest: Any) -> None:
    events = events_of(guest)
    guest.session.define('p:only do_sys_openat2 filename:ustring if $comm == "opener-1"')
    guest.session.define("r:failed do_sys_openat2 $retval if $retval < 0")
    guest.run(f"opener 2 {CALLS}; opener 1 7 /nope")
    only = [e for e in events if e.probe == "kprobes/only"]
    assert {e.task.comm for e in only} == {"opener-1"}
    assert len(only) == CALLS // 2
    assert len([e for e in events if e.probe == "kprobes/failed"]) == 7


def test_memory_that_cannot_be_read_spoils_its_field_only(guest: Any) -> None:
    events = events_of(guest, "faulter")
    guest.session.define("p __x64_sys_ioctl bad=+0(0x1000):u32 name=+0(0x1000):ustring $pid")
    guest.run("faulter 5")
    assert len(events) == 5
    for event in events:
        bad, name, pid = event.fields.values()
        assert isinstance(bad, Unreadable) and isinstance(name, Unreadable)
        assert (str(bad), str(name), pid) == ("(fault)", "(fault)", event.task.pid)


def test_watch(guest: Any) -> None:
    events = events_of(guest, "sh")
    (watch,) = guest.session.define("w:limit panic_timeout panic_timeout $comm")
    assert (watch.size_bytes, watch.access) == (4, "w")
    guest.run("for n in 2 3 5; do echo $n > /proc/sys/kernel/panic; done")
    assert [e.fields["panic_timeout"] for e in events] == [2, 3, 5]
    assert {(e.kind, e.probe) for e in events} == {("w", "kprobes/limit")}


def test_pattern_with_refusals(guest: Any) -> None:
    # Of do_sys_* some have no dfd: all that can be placed are, and each refusal is listed.
    with pytest.raises(Refused) as caught:
        guest.session.define("p:all do_sys_open* how->flags")
    placed = [p.points[0].function.name for p in caught.value.placed]
    assert placed == ["do_sys_openat2"]
    assert list(caught.value.errors) == ["do_sys_open"]
    assert "there is no variable or symbol 'how'" in caught.value.errors["do_sys_open"]
    assert str(caught.value).startswith("1 probes placed, 1 refused:\n  do_sys_open: ")
    assert [p.name for p in guest.session.probes] == ["kprobes/all_do_sys_openat2"]


def test_pattern(guest: Any) -> None:
    placed = guest.session.define("p __x64_sys_getp[gp]id")
    assert sorted(p.points[0].function.name for p in placed) == [
        "__x64_sys_getpgid",
        "__x64_sys_getppid",
    ]
    events = events_of(guest, "caller-")
    guest.run(f"caller 2 {CALLS}")
    assert len(events) == CALLS
    with pytest.raises(ProbeError, match=r"no function matches 'nosuch_\*'"):
        guest.session.define("p nosuch_*")


def test_deleted_by_name(guest: Any) -> None:
    guest.session.define("p:mine do_sys_openat2 dfd")
    guest.session.define("p do_sys_openat2 dfd")
    guest.session.define("p do_sys_openat2 dfd")
    names = ["kprobes/mine", "kprobes/p_do_sys_openat2_0", "kprobes/p_do_sys_openat2_0_1"]
    assert [p.name for p in guest.session.probes] == names
    guest.session.define("-:mine")
    assert [p.name for p in guest.session.probes] == names[1:]
    with pytest.raises(ProbeError, match="there is no probe 'mine'") as caught:
        guest.session.define("-:mine")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(ProbeError) as caught:
        guest.session.define("p:p_do_sys_openat2_0 vfs_read")
    assert caught.value.errno == errno.EEXIST


def test_refused(guest: Any) -> None:
    for text, error, message in (
        ("p (", DefinitionError, "expected a function or an address"),
        ("p do_sys_openat2 nosuch", ProbeError, "no variable or symbol 'nosuch'"),
        ("p do_sys_openat2 $retval", ProbeError, "retval"),
        ("r do_open", ProbeError, "is inlined everywhere"),
        ("p vfs_raed", ProbeError, "nearest: vfs_read"),
    ):
        with pytest.raises(error, match=message.replace("$", r"\$")):
            guest.session.define(text)
    assert (len(guest.session.probes), guest.session.probes.sites) == (0, ())


def test_count_of_events_ends_a_run(guest: Any) -> None:
    events = events_of(guest, "caller-")
    guest.session.define('p __x64_sys_getpgid if $comm == "caller-0" || $comm == "caller-1"')
    command = guest.vm.start(f"caller 2 {CALLS}")
    assert guest.session.run(count=7, timeout_s=30) is not None
    assert guest.session.limit_reached
    assert len(events) == 7
    guest.session.run(command=command, timeout_s=30)
    assert len(events) == CALLS
