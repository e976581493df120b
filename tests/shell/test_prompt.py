"""The shell as a person has it: keys in, screen out."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

from kgdbx.bench.terminal import Terminal
from kgdbx.machine.cache import wait_until
from kgdbx.machine.vm import Vm, configure, launch

FUNCTION = "__x64_sys_getpgid"


def prompt_line(terminal: Terminal) -> str:
    """What stands behind the last prompt on the screen."""
    lines = [line for line in terminal.display() if "> " in f"{line} "]
    return lines[-1].partition("> ")[2] if lines else ""


def test_a_day_at_the_prompt(vm: Vm, shell_in: Callable[..., Terminal]) -> None:
    t = shell_in("--vm", vm.name, columns=80, rows=24)
    t.wait("cpu 0>", 90)
    t.type("kprobe __x64getpgid")  # letters in their order
    t.wait(lambda: any(FUNCTION in line for line in t.display()[4:]))
    t.type("\t")
    t.wait(lambda: FUNCTION in prompt_line(t))
    t.type(" $co")
    t.wait("long __x64_sys_getpgid(const struct pt_regs *regs)")
    t.type("mm\r")
    t.wait("Probe 1 (kprobes/p___x64_sys_getpgid_0)")
    t.line("continue")
    t.wait("running>")
    t.type("print 40 +")  # stays as it is while events come
    vm.start("caller 2 7")
    t.wait("1 probes, 7 hits")  # counted in the guest; the records are read a moment later
    t.wait(lambda: events(t) >= 7)
    assert prompt_line(t) == "print 40 +"
    t.type(" 2\r")
    t.wait("$1 = 42")
    t.line("kretprobe do_sys_openat2")  # stops the kernel for a moment
    t.wait("2 probes")
    t.wait("running>")
    t.type("\x1bOQ")
    t.wait("hits/s")
    t.wait("p___x64_sys_getpgid_0")
    t.type("q")
    t.wait("$1 = 42")
    t.type("\x03")
    t.wait("received signal SIGINT")
    t.wait("stopped")
    t.line("stop")
    t.wait("#0 ")
    t.resize(60, 20)
    t.wait(lambda: max(map(len, t.display())) <= 60 and any("#0" in each for each in t.display()))
    t.type("q")
    t.wait(lambda: "#0" not in "".join(t.display()))
    t.line("kprobe vfs_raed")
    t.wait("nearest: vfs_read")
    t.type("kprobe vfs_read file->f_inode->i_in")
    t.wait("unsigned long")
    assert events(t) == 7
    t.type("\x03\x04")
    assert t.end() == 0
    assert vm.execute("caller 1 7").output.startswith("7 ")


def test_what_dies_is_noticed_and_can_be_opened_again(
    clone_of: Callable[..., Vm], shell_in: Callable[..., Terminal]
) -> None:
    first, second = clone_of(smp=2), clone_of(smp=2)
    t = shell_in("--vm", first.name, "--vm", second.name, columns=200, rows=50)
    t.wait(f"*1 {first.name} stopped  2 {second.name} stopped", 120)
    t.line(f"kprobe {FUNCTION} $comm")
    t.wait("Probe 1")
    os.kill(min(children(t.process.pid)), signal.SIGKILL)  # the first gdb
    t.wait("has ended with status -9")
    t.line("reopen")
    t.wait(lambda: placed(t) == 2, 90)
    first.stop()
    t.wait(f"VM {first.name} has ended")
    t.wait("lost>")
    t.line("session 2")
    t.wait(f"*2 {second.name}")
    t.line("close")
    t.wait(f"closed {second.name}")
    t.line(f"reopen {second.name}")
    t.wait(lambda: placed(t) == 3, 90)
    t.line("c")
    t.wait(f"{second.name} running>")  # named after its VM
    second.start("caller 2 5")
    t.wait("1 probes, 5 hits")
    t.line("quit")
    assert t.end() == 0
    assert second.execute("caller 1 7").output.startswith("7 ")


def events(terminal: Terminal) -> int:
    """How many events were shown so far."""
    return sum("caller-" in line and "[00" in line for line in terminal.scrollback())


def placed(terminal: Terminal) -> int:
    """How often a probe was placed so far."""
    return sum(line.startswith("Probe 1 ") for line in terminal.scrollback())


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(each) for each in file.read().split()]


def test_keys_are_answered_while_events_flood(
    clone_of: Callable[..., Vm], shell_in: Callable[..., Terminal]
) -> None:
    columns, rows = 200, 50
    vm = clone_of(smp=1)
    t = shell_in("--vm", vm.name, columns=columns, rows=rows)
    t.wait("cpu 0>", 90)
    t.line(f"kprobe {FUNCTION}")
    t.wait("Probe 1")
    t.line("c")
    t.wait("running>")
    flood = vm.start("caller 1 100000000")
    t.wait("lines not shown")
    typed = ""
    for letter in "qwxyz" * 4:
        typed += letter
        t.type(letter)
        t.wait(lambda wanted=typed: prompt_line(t) == wanted)
    event = rf" +caller-0-\d+ +\[000\] +\d+\.\d{{6}}: p_{FUNCTION}_0: \({FUNCTION}\+0x0/0x\w+\)"
    text = "".join(line.ljust(columns) for line in t.scrollback())  # as it was before it wrapped
    assert text.count("[000]") > 30
    assert text.count("[000]") - len(re.findall(event, text)) <= 1  # the last may be on its way
    for n in range(8):
        t.resize(columns - 3 * n, rows - n)
        typed += "r"
        t.type("r")
        t.wait(lambda wanted=typed: prompt_line(t) == wanted)
    t.resize(columns, rows)
    t.wait(lambda: prompt_line(t) == typed)
    t.type("\x03")
    t.wait("received signal SIGINT")
    t.line("quit")
    t.end()
    flood.discard()


def test_a_live_one_beside_a_replay(
    clone_of: Callable[..., Vm], shell_in: Callable[..., Terminal], tmp_path: Path
) -> None:
    live = clone_of(smp=2)

    def start(mode: str) -> Vm:
        replay = f"shift=1,sleep=off,rr={mode},rrfile={tmp_path / 'recording'}"
        config = configure("6.1", smp=1, memory_bytes=256 << 20, extra_args=("-icount", replay))
        return launch(config, paused=mode == "replay")

    with start("record") as vm:
        assert vm.replayed() is None
        with vm.qmp() as qmp:
            assert wait_until(lambda: qmp.execute("query-replay")["icount"] > 200_000_000, 60)
    with start("replay") as vm:
        assert vm.replayed() == 0
        t = shell_in("--vm", live.name, "--vm", vm.name, columns=200, rows=50)
        t.wait(f"*1 {live.name} stopped  2 {vm.name} stopped", 120)
        t.line(f"session {vm.name}")
        t.wait(lambda: position(t, vm.name) > 0)
        before = position(t, vm.name)
        t.line("tbreak setup_arch")
        t.line("continue")
        t.wait("setup_arch+0x0 cpu 0>", 60)
        assert position(t, vm.name) > before
        t.line(f"session {live.name}")
        t.wait(f"{live.name} ")
        t.line("quit")
        assert t.end() == 0
    assert live.execute("echo alive").output == "alive\n"


def position(terminal: Terminal, name: str) -> int:
    """How many instructions a replay has come, by the last prompt."""
    found = re.findall(rf"^{re.escape(name)} @([\d,]+) ", "\n".join(terminal.display()), re.M)
    return int(found[-1].replace(",", "")) if found else 0
