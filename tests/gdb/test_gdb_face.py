"""kgdbx in a real gdb, as its users run it: gdb -x gdb_scripts/kgdbx.py vmlinux."""

import os
import pty
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kgdbx.attach import attach_vm
from kgdbx.commands import session as session_commands
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.gdb_launch import gdb_argv
from kgdbx.machine.agent import Command
from kgdbx.machine.cache import wait_until
from kgdbx.machine.vm import Vm

ROOT = Path(__file__).parent.parent.parent
FUNCTION = "__x64_sys_getpgid"
COMMANDS = sorted(c.name for c in SESSION_COMMANDS.discover(session_commands))


@pytest.fixture
def endless(vm: Vm) -> Iterator[Vm]:
    command = vm.start("caller 2 1000000000")
    yield vm
    command.discard()


def run_gdb(*commands: str, vmlinux: Path | None = None, timeout_s: float = 150) -> str:
    """Output of a gdb that runs commands and ends."""
    argv = [*gdb_argv(load=True), "-batch"]
    for command in commands:
        argv += ["-ex", command]
    argv += [str(vmlinux)] if vmlinux else []
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert "internal-error" not in done.stderr
    assert "Fatal signal" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def is_unpatched(vm: Vm) -> bool:
    """Whether the guest runs past the probed function. Nobody is attached: a stop would last."""
    return vm.execute("caller 1 7").output.startswith("7 ")


def test_the_documented_command_line(vm: Vm) -> None:
    argv = ["gdb", "-q", "-batch", "-x", str(ROOT / "gdb_scripts" / "kgdbx.py")]
    argv += ["-ex", f"kgdbx attach {vm.name}", "-ex", "info line do_sys_openat2"]
    done = subprocess.run(
        [*argv, str(vm.info.vmlinux)], capture_output=True, text=True, timeout=150
    )
    assert f"Linux {vm.info.release} on 2 vCPUs, KASLR slide 0x" in done.stdout, done.stderr
    with attach_vm(vm.info) as session:
        address = session.kernel.functions("do_sys_openat2")[0].address
    assert f"{address:#x}" in done.stdout  # gdb's own symbols follow KASLR
    assert is_unpatched(vm)


def test_events_and_listing(endless: Vm) -> None:
    out = run_gdb(
        f"kgdbx attach {endless.name}",
        f"kgdbx kprobe --stop {FUNCTION} %di $comm if $pid > 0",
        f"kgdbx kretprobe {FUNCTION}",
        "continue",
        "backtrace 1",
        "kgdbx list",
        "kgdbx delete",
        "kgdbx list",
    )
    assert f"({FUNCTION}+0x0/" in out
    assert '$comm="caller-' in out
    assert "#0  " in out and "getpgid" in out.partition("#0  ")[2].splitlines()[0]
    assert "hits" in out and "r___x64_sys_getpgid_0" in out
    assert "No probes." in out
    assert is_unpatched(endless)


def test_exact_counts_on_four_cpus(vm4: Vm, tmp_path: Path) -> None:
    script, placed = tmp_path / "count.py", tmp_path / "placed"
    script.write_text(
        "import pathlib\n"
        "from kgdbx.probes.script import kprobe, kretprobe\n"
        "seen = []\n"
        f"@kprobe({FUNCTION!r})\n"
        "def entered(p, task):\n"
        "    seen.append(task.comm)\n"
        f"@kretprobe({FUNCTION!r})\n"
        "def returned(p, hit, retval):\n"
        "    if p.hits == 211:\n"
        "        hit.stop()\n"
        "def start(session):\n"
        f"    pathlib.Path({str(placed)!r}).touch()\n"
        "def stop(session):\n"
        "    probes = {p.kind: p for p in session.probes}\n"
        "    print('COUNTS', len(seen), probes['p'].hits, probes['r'].hits, probes['r'].nmissed)\n"
    )
    commands: list[Command] = []

    def call() -> None:
        assert wait_until(placed.exists, 40)
        commands.append(vm4.start("caller 4 211"))

    starter = threading.Thread(target=call)
    starter.start()
    out = run_gdb(f"kgdbx attach {vm4.name}", f"kgdbx script {script}", "continue", "kgdbx detach")
    starter.join()
    assert "COUNTS 211 211 211 0" in out
    assert commands[0].wait(20).output.startswith("211 ")
    assert is_unpatched(vm4)


def test_a_script_lets_the_kernel_run(endless: Vm, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import signal\n"
        "def start(session):\n"
        "    before = signal.getsignal(signal.SIGTERM)\n"
        f"    session.define('p {FUNCTION}')\n"
        "    stop = session.run(count=3, timeout_s=50)\n"
        "    same = signal.getsignal(signal.SIGTERM) is before\n"
        "    print('RAN', stop is not None, session.limit_reached, same)\n"
    )
    out = run_gdb(f"kgdbx attach {endless.name}", f"kgdbx script {script}", "kgdbx detach")
    assert "RAN True True True" in out
    assert out.count(f": ({FUNCTION}+0x0") == 3
    assert is_unpatched(endless)


def test_single_stepped_instruction_and_watch(endless: Vm) -> None:
    out = run_gdb(
        f"kgdbx attach {endless.name}",
        "kgdbx watch --stop jiffies",
        "continue",
        "kgdbx list",
    )
    assert "w_jiffies" in out
    assert " 1       0       0 " in out
    assert is_unpatched(endless)


def test_errors_are_one_line_and_no_traceback(vm: Vm) -> None:
    cases = {
        "kgdbx kprobe vfs_raed": "nearest: vfs_read",
        "kgdbx kprobe vfs_read+2": "inside the instruction that starts at vfs_read+0x0",
        "kgdbx kprobe vfs_read (": "expected",
        "kgdbx delete nosuch": "there is no probe 'nosuch'; registered: none",
        "kgdbx script /nowhere.py": "cannot read the probe script /nowhere.py",
        "kgdbx enable --nonsense": "unrecognized arguments",
        "kgdbx attach other": "is attached; detach first",
    }
    out = run_gdb(f"kgdbx attach {vm.name}", *cases)
    for case, message in cases.items():
        assert message in out, case
    assert is_unpatched(vm)


def test_errors_without_a_kernel() -> None:
    assert "no kernel is attached" in run_gdb("kgdbx kprobe vfs_read")
    assert "there is no VM nosuch; running: " in run_gdb("kgdbx attach nosuch")


def test_a_vm_with_another_debugger_is_refused_soon(vm: Vm) -> None:
    with attach_vm(vm.info):
        assert "serves one debugger at a time" in run_gdb(f"kgdbx attach {vm.name}")
    assert is_unpatched(vm)


def test_interrupt_stops_the_kernel_and_quit_cleans(endless: Vm) -> None:
    with subprocess.Popen(
        gdb_argv(load=True),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(
            f"kgdbx attach {endless.name}\nkgdbx kprobe {FUNCTION} $comm\ncontinue\n"
        )
        process.stdin.flush()
        while "caller-" not in process.stdout.readline():
            assert process.poll() is None
        process.stdin.write("kgdbx list\nquit\n")
        process.stdin.close()
        output: list[str] = []
        listed = threading.Event()

        def read() -> None:
            for line in process.stdout:
                output.append(line)
                if "ENABLED" in line:
                    listed.set()

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(3):
            # gdb passes ^C on to the stub, which drops it at a stop: then it takes another one.
            process.send_signal(signal.SIGINT)
            if listed.wait(30):
                break
        else:
            process.kill()
        reader.join()
        process.wait(60)
    rest = "".join(output)
    assert process.returncode == 0, rest[-4000:]
    assert listed.is_set()
    assert "Traceback" not in rest
    assert is_unpatched(endless)


def test_killed_gdb_leaves_a_guest_that_can_be_attached(endless: Vm) -> None:
    with subprocess.Popen(
        gdb_argv(load=True), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"kgdbx attach {endless.name}\nkgdbx kprobe {FUNCTION}\ncontinue\n")
        process.stdin.flush()
        while FUNCTION + "+0x0" not in process.stdout.readline():
            assert process.poll() is None
        while "p___x64" not in process.stdout.readline():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    with attach_vm(endless.info):
        pass  # takes out what was left
    assert is_unpatched(endless)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_gdb_that_is_ended_lets_the_guest_run_on(endless: Vm, number: signal.Signals) -> None:
    # The tests may run under nohup, and gdb heeds that.
    argv = ["env", f"--default-signal={number.name}", *gdb_argv(load=True)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"kgdbx attach {endless.name}\nkgdbx kprobe {FUNCTION}\ncontinue\n")
        process.stdin.flush()
        while "caller-" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=60)
    assert is_unpatched(endless)


def test_settings_are_restored(vm: Vm) -> None:
    names = ("confirm", "pagination", "breakpoint pending", "height", "print symbol")
    shows = [f"show {name}" for name in names]
    bare = run_gdb(*shows)
    used = run_gdb(f"kgdbx attach {vm.name}", f"kgdbx kprobe {FUNCTION}", "kgdbx detach", *shows)
    assert bare.splitlines() == used.splitlines()[-len(bare.splitlines()) :]


def test_completion(vm: Vm) -> None:
    out = run_gdb(
        f"kgdbx attach {vm.name}",
        "complete kgdbx kprobe vfs_rea",
        "complete kgdbx kprobe vfs_read co",
        "complete kgdbx kr",
        "complete kgdbx kprobe --st",
        "complete kgdbx leaks w",
        "complete kgdbx leaks watch overla",
        f"complete kgdbx attach {vm.name[:-2]}",
    )
    assert "kgdbx kprobe vfs_read\n" in out
    assert "kgdbx kprobe vfs_read count\n" in out
    assert "kgdbx kretprobe\n" in out
    assert "kgdbx kprobe --stop\n" in out
    assert "kgdbx leaks watch\n" in out
    assert "kgdbx leaks watch overlay\n" in out
    assert f"kgdbx attach {vm.name}\n" in out


def test_tab_completes_at_gdbs_prompt() -> None:
    pid, terminal = pty.fork()
    if not pid:
        os.environ["TERM"] = "xterm"
        argv = gdb_argv(load=True)
        os.execvp(argv[0], argv)
    shown = ""
    try:
        for typed, wanted in (("", "(gdb) "), ("kgdbx kret\t", "kgdbx kretprobe ")):
            os.write(terminal, typed.encode())
            end = time.monotonic() + 60
            while wanted not in shown:
                ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
                assert ready, shown
                shown += os.read(terminal, 4096).decode()
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def test_help() -> None:
    out = run_gdb(*(each for name in COMMANDS for each in (f"echo <{name}>", f"help kgdbx {name}")))
    for name in COMMANDS:
        text = out.partition(f"<{name}>")[2].partition("<")[0]
        assert f"Usage: kgdbx {name}" in text
        summary = next(line for line in text.splitlines() if line and "," not in line[:20])
        assert len(summary) <= 78


def test_loading_twice_does_nothing() -> None:
    out = run_gdb("python kgdbx.gdb.load.load()", "help kgdbx")
    assert out.count("kgdbx attach -- ") == 1


def test_repeated_runs_do_not_crash_gdb(endless: Vm) -> None:
    commands = [f"kgdbx attach {endless.name}"]
    for _ in range(10):
        commands += [f"kgdbx kprobe --stop {FUNCTION}", "continue", "kgdbx delete"]
    out = run_gdb(*commands)
    assert out.count(f"({FUNCTION}+0x0/") == 10
    assert is_unpatched(endless)
