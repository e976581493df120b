"""Functions that return at once, functions in place of others, and C handlers, in real kernels."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kgdbx.attach import attach_vm
from kgdbx.errors import DefinitionError, ProbeError, SymbolError
from kgdbx.probes.event import Event
from kgdbx.probes.probe import State
from kgdbx.resident.compile.link import CompileError, LinkError

GuestOf = Callable[..., Any]
GETPGID = "__x64_sys_getpgid"
CALLS = 60

HANDLER = """\
static int calls;

int handler(struct pt_regs *regs)
{
	struct kernel_clone_args args = { .exit_signal = 6 };

	calls++;
	regs->di = (args.exit_signal + calls) << 8;
	return KGDBX_CONTINUE;
}
"""
REPLACEMENT = """\
extern int _printk(const char *format, ...);
extern long kgdbx_original(const struct pt_regs *regs);
extern struct task_struct init_task;

static unsigned long calls = 40;
static const char *const format = "%s: getpgid(%ld) gave %d, call %lu\\n";

long __x64_sys_getpgid(const struct pt_regs *regs)
{
	long group = kgdbx_original(regs);

	if (++calls < 43)
		_printk(format, init_task.comm, regs->di, group > 0, calls);
	return group;
}
"""


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "handler.c"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_nullified_calls_return_the_value(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    text = guest.text()
    events: list[Event] = []
    guest.session.event_listeners.append(events.append)
    probe = guest.session.nullify(GETPGID, "-EPERM")
    guest.session.define(f"r:back {GETPGID} retval=$retval:s64")
    guest.run(f"caller 2 {CALLS}")
    assert (probe.hits, probe.decided, probe.nmissed) == (CALLS, CALLS, 0)
    assert [e.fields["retval"] for e in events] == [-1] * CALLS
    assert (probe.kind, probe.tier, probe.name) == ("n", "resident", f"nullify/{GETPGID}")
    probe.unregister()
    guest.run(f"caller 2 {CALLS}")
    assert probe.decided == CALLS
    assert all(e.fields["retval"] > 0 for e in events[CALLS:])
    for each in tuple(guest.session.probes):
        each.unregister()
    assert guest.text() == text


def test_condition_on_parameters_and_task(guest: Any) -> None:
    guest.run("echo one > /tmp/a; echo two > /tmp/b")
    probe = guest.session.nullify(
        "do_sys_openat2", "-ENOMEM", condition='filename == "/tmp/a" && $comm == "cat"'
    )
    out = guest.run("cat /tmp/a /tmp/b; read line < /tmp/a; echo $line", status=0)
    assert out.splitlines()[-2:] == ["two", "one"]
    assert "/tmp/a': Cannot allocate memory" in out
    assert probe.decided == 1 and probe.hits > 2
    assert probe.note == "1 of its calls nullified"
    pid = guest.session.nullify(GETPGID, condition="$pid == 1", name="of_init")
    guest.run(f"caller 1 {CALLS}")
    assert (pid.hits, pid.decided, pid.name) == (CALLS, 0, "nullify/of_init")


def test_only_calls_from_a_module(guest_of: GuestOf) -> None:
    guest = guest_of()
    with pytest.raises(ProbeError, match="module 'dummy' is not loaded"):
        guest.session.nullify("__alloc_percpu_gfp", "NULL", module="dummy")
    guest.run("modprobe dummy numdummies=0")
    probe = guest.session.nullify("__alloc_percpu_gfp", "NULL", module="dummy")
    out = guest.run("ip link add d1 type dummy; echo $?; mount -t tmpfs none /tmp && echo mounted")
    assert "Cannot allocate memory" in out
    assert out.split()[-2:] == ["2", "mounted"]
    assert (probe.hits, probe.decided) == (1, 1)
    probe.disable()
    guest.run("ip link add d1 type dummy && ip link del d1")
    probe.enable()
    assert "2" in guest.run("ip link add d1 type dummy; echo $?").split()
    assert (probe.hits, probe.decided) == (2, 2)


def test_function_of_a_module_that_is_loaded_later(guest_of: GuestOf) -> None:
    guest = guest_of()
    probe = guest.session.nullify("dummy:dummy_dev_init", "-EIO")
    assert probe.state is State.PENDING
    faults: list[str] = []
    guest.session.probes.fault_listeners.append(lambda _, fault: faults.append(fault.trace))
    add = "modprobe dummy numdummies=0; ip link add d1 type dummy"
    for calls in (1, 2):
        out = guest.run(f"{add}; true")
        assert "Input/output error" in out, (probe.state, faults)
        assert (probe.state, probe.hits, probe.decided) == (State.ENABLED, calls, calls)
        guest.run("rmmod dummy")
        assert probe.state is State.GONE
    probe.unregister()
    guest.run(add)


def test_replaced_by_a_function_of_the_same_type(guest: Any) -> None:
    events: list[Event] = []
    guest.session.event_listeners.append(events.append)
    probe = guest.session.replace(GETPGID, "__x64_sys_getpriority")
    guest.session.define("p:other __x64_sys_getpriority")
    guest.run(f"caller 1 {CALLS}")
    assert (probe.hits, probe.decided, probe.kind) == (CALLS, CALLS, "x")
    assert len([e for e in events if e.probe == "kprobes/other"]) == CALLS
    with pytest.raises(ProbeError, match=r"another type"):
        guest.session.replace(GETPGID, "vfs_read")
    with pytest.raises(ProbeError, match="cannot replace itself"):
        guest.session.replace("vfs_read", "vfs_read")


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_handler_counts_and_changes_an_argument(
    guest_of: GuestOf, source: Callable[[str], Path], kernel: str
) -> None:
    guest = guest_of(kernel)
    probe = guest.session.replace("do_group_exit", source(HANDLER), condition="exit_code == 3 << 8")
    out = guest.run("for n in 1 2; do sh -c 'exit 3'; echo $?; done; sh -c 'exit 4'; echo $?")
    assert out.split() == ["7", "8", "4"]
    assert (probe.kind, probe.decided) == ("c", 0)


def test_handler_sees_its_call_stack(guest: Any, source: Callable[[str], Path]) -> None:
    path = source(
        "unsigned long found[8];\n"
        "int handler(struct pt_regs *regs)\n"
        "{\n"
        "\tunsigned int n = kgdbx_stack(regs, found, 8);\n"
        "\treturn kgdbx_return(regs, n == 3 && found[0] == regs->ip ? found[1] : 0);\n"
        "}\n"
    )
    events: list[Event] = []
    guest.session.event_listeners.append(events.append)
    # The stub of the return probe stands where the first return address is looked for.
    guest.session.define(f"r:back {GETPGID} by=$retval:symbol")
    guest.session.replace(GETPGID, path)
    guest.run("caller 1 3")
    assert [e.fields["by"].partition("+")[0] for e in events] == ["do_syscall_64"] * 3


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_handler_returns_or_jumps(
    guest_of: GuestOf, source: Callable[[str], Path], kernel: str
) -> None:
    guest = guest_of(kernel)
    events: list[Event] = []
    guest.session.event_listeners.append(events.append)
    path = source(
        "long other(const struct pt_regs *regs);\n"
        "int calls;\n"
        "int handler(struct pt_regs *regs)\n"
        "{\n"
        "\tswitch (calls++ % 3) {\n"
        "\tcase 0: return kgdbx_return(regs, -5);\n"
        "\tcase 1: return kgdbx_jump(regs, (unsigned long)other);\n"
        "\t}\n"
        "\treturn 1;\n"  # without saying where to
        "}\n"
        "long other(const struct pt_regs *regs) { return 7; }\n"
    )
    probe = guest.session.replace(GETPGID, path)
    guest.session.define(f"r:back {GETPGID} retval=$retval:s64")
    guest.run("caller 1 6")
    returned = [e.fields["retval"] for e in events]
    assert returned[:2] == returned[3:5] == [-5, 7]
    assert returned[2] == returned[5] > 7
    assert (probe.hits, probe.decided) == (6, 4)


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_replacement_calls_the_kernel_and_the_original(
    guest_of: GuestOf, source: Callable[[str], Path], kernel: str
) -> None:
    guest = guest_of(kernel)
    probe = guest.session.replace(GETPGID, source(REPLACEMENT))
    out = guest.run(f"caller 2 {CALLS}; dmesg | grep -o 'swapper.*'")
    lines = sorted(line for line in out.splitlines() if "getpgid" in line)
    assert lines == [f"swapper/0: getpgid(0) gave 1, call {n}" for n in (41, 42)]
    assert (probe.hits, probe.decided) == (CALLS, CALLS)


def test_handler_is_not_entered_from_a_handler(guest: Any, tmp_path: Path) -> None:
    outer, inner = tmp_path / "outer.c", tmp_path / "inner.c"
    outer.write_text(
        "extern unsigned long int_sqrt(unsigned long x);\n"
        "int handler(struct pt_regs *regs)\n"
        "{\n\treturn int_sqrt(16) == 4 ? 0 : kgdbx_return(regs, -1);\n}\n"
    )
    inner.write_text("int handler(struct pt_regs *regs) { return kgdbx_return(regs, 5); }\n")
    root = guest.session.replace("int_sqrt", inner)
    probe = guest.session.replace(GETPGID, outer)
    guest.run(f"caller 2 {CALLS}")
    assert (probe.hits, probe.decided, probe.nmissed) == (CALLS, 0, 0)
    assert (root.decided, root.nmissed) == (0, CALLS)


def test_a_handler_that_faults_ends_its_task_alone(
    guest: Any, source: Callable[[str], Path]
) -> None:
    before = guest.text()
    # A probe whose handler calls the kernel is kept out of that, also on the vCPU of the oops.
    (after,) = guest.session.define(f"p:after {GETPGID} $kstack", tier="resident")
    handler = source("int handler(struct pt_regs *regs)\n{\n\treturn *(volatile int *)8;\n}\n")
    faulty = guest.session.replace("do_sys_openat2", handler, condition='$comm == "cat"')
    assert guest.run("cat /etc/hostname; echo $?; caller 2 1009").startswith("Killed\n137\n1009 ")
    assert "BUG: kernel NULL pointer dereference, address: 0000000000000008" in guest.run("dmesg")
    assert (after.hits, after.nmissed) == (1009, 0)
    assert faulty.nmissed == 0
    faulty.unregister()
    after.unregister()
    assert guest.run("cat /etc/hostname") == "kgdbx\n"
    assert guest.text() == before


def test_session_ends_while_a_replacement_sleeps(clone_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "slow.c"
    path.write_text(
        "extern void msleep(unsigned int msecs);\n"
        "extern long kgdbx_original(int dfd, const char *filename, struct open_how *how);\n"
        "long replacement(int dfd, const char *filename, struct open_how *how)\n"
        "{\n\tmsleep(700);\n\treturn kgdbx_original(dfd, filename, how);\n}\n"
    )
    vm = clone_of("6.1", 2)
    with attach_vm(vm.info) as session:
        probe = session.replace("do_sys_openat2", path, condition='$comm == "cat"')
        command = vm.start("cat /proc/sys/kernel/ostype")
        end = time.monotonic() + 20
        while not probe.decided and time.monotonic() < end:
            session.run(timeout_s=0.05)
        assert probe.decided and command.poll() is None
    done = command.wait(10)
    assert (done.status, done.output) == (0, "Linux\n")


def test_what_cannot_be_done_changes_nothing(guest: Any, source: Callable[[str], Path]) -> None:
    session, text = guest.session, guest.text()
    path = source("int handler(struct pt_regs *regs)\n{\n\treturn regs->nothing;\n}\n")
    with pytest.raises(CompileError, match=rf"{path}:3:20: error: .*no member named") as caught:
        session.replace(GETPGID, path)
    assert "vmlinux.h" not in str(caught.value)
    path = source("int handler(struct pt_regs *regs)\n{\n\treturn undeclared();\n}\n")
    with pytest.raises(CompileError, match=rf"{path}:3:16: error: implicit declaration"):
        session.replace(GETPGID, path)
    path = source(
        "extern int nowhere(void), vfs_raed(void);\n"
        "int handler(struct pt_regs *regs) { return nowhere() + vfs_raed(); }\n"
    )
    with pytest.raises(LinkError, match=r"no symbol 'nowhere'.*'vfs_raed' \(nearest: vfs_read"):
        session.replace(GETPGID, path)
    with pytest.raises(ProbeError, match="neither handler"):
        session.replace(GETPGID, source("int x;\n"))
    with pytest.raises(ProbeError, match="only one of them"):
        session.replace(GETPGID, source("int handler(void) { return 0; } int replacement;\n"))
    with pytest.raises(ProbeError, match="there is no file"):
        session.replace(GETPGID, Path("/nowhere.c"))
    with pytest.raises(ProbeError, match="'-EFOO' is no return value"):
        session.nullify(GETPGID, "-EFOO")
    with pytest.raises(ProbeError, match="nearest: .*vfs_read"):
        session.nullify("vfs_rea")
    with pytest.raises(SymbolError, match="no function 'vfs_raed'; nearest: vfs_read"):
        session.replace("vfs_read", "vfs_raed")
    for name in ("vfs_*", "vfs_read+4", "vfs_read if 1"):
        with pytest.raises(DefinitionError):
            session.nullify(name)
    assert not list(session.probes)
    assert guest.text() == text


def test_on_and_off_under_load(guest_of: GuestOf, source: Callable[[str], Path]) -> None:
    guest = guest_of(smp=4)
    session, text = guest.session, guest.text()
    load = guest.vm.start("for n in 1 2; do caller 4 400000; opener 2 2000; done")
    decided = [0, 0]
    path = source(REPLACEMENT)
    with session.define(f"p {GETPGID}")[0]:
        session.run(count=1, timeout_s=60)  # it has begun
    for _ in range(12):
        nullified = session.nullify(GETPGID, "-EPERM", condition="$cpu & 1")
        replaced = session.replace(GETPGID, path)
        looks = session.define(f"r:looks {GETPGID} $retval if $retval < -1")
        session.run(timeout_s=0.05)
        for probe in (nullified, *looks, replaced):
            probe.unregister()
        decided = [decided[0] + nullified.decided, decided[1] + replaced.decided]
        session.run(timeout_s=0.02)
    assert guest.text() == text
    assert min(decided) > 0
    session.run(command=load, timeout_s=100)
    done = load.wait(5)
    assert done.status == 0, done.output
    assert "Oops" not in guest.run("dmesg") and "BUG" not in guest.run("dmesg")


def test_command_and_a_kill_in_the_middle(clone_of: Any, source: Callable[[str], Path]) -> None:
    vm = clone_of("6.1", 2)
    with attach_vm(vm.info) as session:
        start = session.kernel.address("_stext")
        size = session.kernel.address("_etext") - start
        text = session.kernel.memory.read(start, size)
    command = [sys.executable, "-m", "kgdbx"]
    options = ["--vm", vm.info.name]
    done = subprocess.run(
        [*command, "nullify", *options, GETPGID, "-EPERM", "-n", "10", "-e", "caller 1 100000"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"nullify {GETPGID} -EPERM" in done.stderr and "calls nullified" in done.stderr
    with subprocess.Popen(
        [*command, "replace", *options, GETPGID, str(source(REPLACEMENT))],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith(f"Probe 1 (replace/{GETPGID})"), line
        process.send_signal(signal.SIGKILL)
    with attach_vm(vm.info) as session:
        # Those of the probes that follow the guest's ftrace may be among them.
        assert session.recovery is not None and session.recovery.patches >= 1
        assert session.kernel.memory.read(start, size) == text
    assert vm.execute("caller 1 10").status == 0
