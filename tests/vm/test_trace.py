"""``kgdbx trace`` as its users run it, on a real kernel, with exact counts."""

import collections
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kgdbx.attach import attach_vm
from kgdbx.definitions import Refused
from kgdbx.machine.vm import Vm
from kgdbx.trace.functions import definitions
from kgdbx.trace.recording import Lost, Recording

FUNCTION = "__x64_sys_getpgid"
CALLS = 1009
WORK = f"caller 4 {CALLS}"
MANY = ("vfs_*", "ext4_*", "tcp_*", "kmem_*", "security_*", "dev_*", "sock_*", "inet_*")


def trace(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "kgdbx", "trace", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)


def is_unpatched(vm: Vm) -> bool:
    return vm.execute("caller 1 7").output.startswith("7 ")


def test_every_call_is_an_event(vm4: Vm) -> None:
    done = trace("--vm", vm4.name, FUNCTION, "-f", "$comm pid=%si:s32", "-e", WORK, "-o", "json")
    assert done.returncode == 0, done.stderr
    first, *events = map(json.loads, done.stdout.splitlines())
    assert first == {"schema": "kgdbx.event.1"}
    assert len(events) == CALLS
    calls = collections.Counter(event["fields"]["$comm"] for event in events)
    assert set(calls) == {f"caller-{n}" for n in range(4)}
    times = [event["ts_ns"] for event in events]
    assert times == sorted(times)
    assert "1 functions, 1,009 hits, 0 events lost" in done.stderr
    assert "resident" in done.stderr
    assert is_unpatched(vm4)


def test_returns_have_results_and_durations(vm: Vm) -> None:
    done = trace("--vm", vm.name, "-r", FUNCTION, "-e", WORK, "-o", "json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()[1:]]
    assert len(events) == CALLS
    assert all(event["fields"]["$retval"] > 0 for event in events)
    assert all(0 < event["duration_ns"] < 10**9 for event in events)


def test_filter(vm: Vm) -> None:
    done = trace("--vm", vm.name, FUNCTION, "--filter", '$comm == "caller-2"', "-e", WORK)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines
    assert all("caller-2-" in line for line in lines)
    assert "1,009 hits" in done.stderr


def test_pattern_to_a_file_for_viewers(vm: Vm, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    done = trace(
        "--vm", vm.name, "-r", "__x64_sys_getp*", "-e", WORK, "-o", "chrome", "-w", str(path)
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    items = json.loads(path.read_text())
    slices = collections.Counter(item["name"] for item in items if item["ph"] == "X")
    assert slices[FUNCTION] == CALLS
    assert "0 events lost" in done.stderr


def test_recording_holds_every_call(vm4: Vm, tmp_path: Path) -> None:
    path = tmp_path / "trace.kgdbx"
    done = trace(
        "--vm", vm4.name, "-r", FUNCTION, "-f", "$retval $comm", "-e", WORK, "--raw", str(path)
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    with Recording(path) as recording:
        items = list(recording.items())
    assert len(items) == CALLS
    assert not any(isinstance(item, Lost) for item in items)
    converted = trace("--read", str(path), "-o", "json")
    events = [json.loads(line) for line in converted.stdout.splitlines()[1:]]
    assert len(events) == CALLS
    assert {event["where"].partition("+")[0] for event in events} == {FUNCTION}
    times = [event["ts_ns"] for event in events]
    assert times == sorted(times)
    text = trace("--read", str(path))
    assert text.stdout.count(f"{FUNCTION}: (") == CALLS


def test_socket_gives_every_record(vm: Vm, tmp_path: Path) -> None:
    path, got = tmp_path / "records", tmp_path / "got"
    reader = (
        "import socket, sys, time\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "while True:\n"
        "    try: s.connect(sys.argv[1])\n"
        "    except OSError: time.sleep(0.05)\n"
        "    else: break\n"
        "f = open(sys.argv[2], 'wb')\n"
        "while data := s.recv(65536): f.write(data)\n"
    )
    with subprocess.Popen([sys.executable, "-c", reader, str(path), str(got)]) as process:
        done = trace("--vm", vm.name, FUNCTION, "--socket", str(path), "--wait", "-e", WORK)
        assert done.returncode == 0, done.stderr
        assert process.wait(10) == 0
    with Recording(got) as recording:
        assert len(list(recording.items())) == CALLS


def test_count_ends_the_run_exactly(vm: Vm) -> None:
    command = vm.start("caller 2 1000000000")
    done = trace("--vm", vm.name, FUNCTION, "-n", "17")
    command.discard()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if not line.startswith("# [LOST ")]) == 17
    assert is_unpatched(vm)


def test_interrupt_ends_it(vm: Vm) -> None:
    command = vm.start("caller 2 1000000000")
    argv = [sys.executable, "-m", "kgdbx", "trace", "--vm", vm.name, FUNCTION, "-b", "64K"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        while f"{FUNCTION}:" not in run.stdout.readline():  # losses may be told first
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    command.discard()
    assert run.returncode == 0, errors
    assert "events lost" in errors
    assert is_unpatched(vm)


def test_refusals_are_told(vm: Vm) -> None:
    done = trace("--vm", vm.name, FUNCTION, "do_int3", "no_such_function", "-e", "caller 1 7")
    assert "not traced: no_such_function: " in done.stderr
    assert len(done.stdout.splitlines()) == 7
    nothing = trace("--vm", vm.name, "--tier", "resident", "do_int3")
    assert nothing.returncode == 2
    assert "not traced: do_int3: on the kernel's blacklist for kprobes" in nothing.stderr
    assert is_unpatched(vm)


def test_a_thousand_functions_leave_nothing_behind(vm: Vm) -> None:
    with attach_vm(vm.info) as session:
        start = session.kernel.address("_stext")
        size = session.kernel.address("_etext") - start
        before = session.kernel.memory.read(start, size)
        wanted = definitions(MANY, session.function_names)[:1000]
        try:
            placed = session.define_many(wanted, tier="resident", inlined_copies=False)
        except Refused as e:
            placed = e.placed
        assert len(placed) > 900
        command = vm.start("caller 1 100")
        session.run(command=command, timeout_s=30)
        assert command.poll() == 0
        assert sum(probe.hits for probe in placed) > 0
        assert session.kernel.memory.read(start, size) != before
        for probe in reversed(placed):
            probe.unregister()
        assert session.kernel.memory.read(start, size) == before
    assert is_unpatched(vm)


def test_recording_says_the_same_as_the_events(vm: Vm, tmp_path: Path) -> None:
    shown, raw = tmp_path / "shown", tmp_path / "raw"
    fields = (
        "dfd filename:ustring flags=how->flags how->mode:x16 low=how->flags:b4@2/32 $comm $pid:s16"
        ' $cpu $tgid words=+0(%dx):u32[3] text="as it is" constant=-7 %si $stack0 how *how'
        " bad=*(int*)8 init_task.comm name=init_task.comm:string $task->comm $task->pid"
    )
    command = "cat /proc/version /no/such/file > /dev/null 2>&1; true"
    done = trace(
        "--vm",
        vm.name,
        "do_sys_openat2",
        "-f",
        fields,
        *("-o", "json", "-w", str(shown), "--raw", str(raw), "-e", command),
    )
    assert done.returncode == 0, done.stderr
    assert "resident" in done.stderr
    converted = trace("--read", str(raw), "-o", "json").stdout.splitlines()
    lines = shown.read_text().splitlines()
    assert len(lines) > 2
    for line, other in zip(lines[1:], converted[1:], strict=True):
        event, same = json.loads(line), json.loads(other)
        # What the kernel's types are needed for stays bytes in a recording.
        assert event["fields"].pop("*how") != same["fields"].pop("*how")
        assert event == same


def test_a_buffer_that_is_too_small(vm: Vm, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    done = trace("--vm", vm.name, FUNCTION, "-b", "4K", "--raw", str(raw), "-e", WORK)
    assert done.returncode == 0, done.stderr
    with Recording(raw) as recording:
        items = list(recording.items())
    lost = sum(item.count for item in items if isinstance(item, Lost))
    assert lost > 0
    assert len([item for item in items if not isinstance(item, Lost)]) + lost == CALLS
    assert f"1,009 hits, {lost} events lost" in done.stderr
    assert "the buffers of 4 KiB a CPU were full at times; see --buffer" in done.stderr
    assert is_unpatched(vm)


def test_a_module_that_is_not_loaded_yet(clone_of: Callable[..., Vm], tmp_path: Path) -> None:
    vm = clone_of("6.1", 2)
    raw = tmp_path / "raw"
    come_and_go = "for n in 1 2 3; do modprobe dummy; rmmod dummy; done"
    done = trace("--vm", vm.name, "dummy:dummy_*_module", "--raw", str(raw), "-e", come_and_go)
    assert done.returncode == 0, done.stderr
    assert "2 functions, 6 hits, 0 events lost" in done.stderr
    with Recording(raw) as recording:
        items = list(recording.items())
    called = [item.where.partition("+")[0] for item in items if not isinstance(item, Lost)]
    assert called == ["dummy_init_module", "dummy_cleanup_module"] * 3
    assert is_unpatched(vm)


def test_last_events_before_a_panic(clone_of: Callable[..., Vm]) -> None:
    vm = clone_of("6.1", 2, append="panic=0")
    crash = f"opener 2 {CALLS}; echo c > /proc/sysrq-trigger"
    done = trace(
        "--vm", vm.name, "-f", "$comm", "__x64_sys_openat", "sysrq_handle_crash", "-e", crash
    )
    assert done.returncode == 1
    assert "the kernel has panicked; these were its last events" in done.stderr
    opened = [line for line in done.stdout.splitlines() if 'comm="opener-' in line]
    assert len(opened) == CALLS
    assert "sysrq_handle_crash: (sysrq_handle_crash+0x0/" in done.stdout.splitlines()[-1]
    assert not vm.info.journal.exists()
