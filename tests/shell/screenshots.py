"""Pictures of the shell at work, for its documentation: ``make screenshots``."""

import sys
import tempfile
from pathlib import Path

from kgdbx.bench.terminal import Terminal
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.vm import Vm, configure
from tests.shell.svg import screen_svg


def main(directory: Path) -> None:
    """Write the pictures.

    :param directory: where to; what is there is replaced
    """
    directory.mkdir(parents=True, exist_ok=True)
    template = make_template(configure("6.1", smp=2))
    with clone(template, name="node1") as a, clone(template, name="node2") as b:
        environment = {"KGDBX_HISTORY": tempfile.mkdtemp() + "/history"}
        argv = [sys.executable, "-m", "kgdbx", "shell", "--vm", a.name, "--vm", b.name]
        with Terminal(argv, columns=120, rows=26, environment=environment) as t:
            take(t, directory, a)
    with clone(template, name="node1") as a:
        environment = {"KGDBX_HISTORY": tempfile.mkdtemp() + "/history"}
        argv = [sys.executable, "-m", "kgdbx", "shell", "--vm", a.name]
        with Terminal(argv, columns=200, rows=50, environment=environment) as t:
            take_wide(t, directory, a)


def take_picture(t: Terminal, path: Path, title: str) -> None:
    """The screen as it is now."""
    with t.lock:
        text = screen_svg(t.screen, title)
    path.write_text(text)
    print(path)


def take_wide(t: Terminal, directory: Path, vm: Vm) -> None:
    """The same on a large window."""
    t.wait("cpu 0>", 90)
    t.line("kprobe vfs_read file->f_inode->i_ino count $comm $kstack:4")
    t.wait("Probe 1 ")
    t.line("continue")
    t.wait("running>")
    load = vm.start("while true; do wc /proc/version /proc/meminfo /etc/hostname > /dev/null; done")
    t.wait(lambda: sum("vfs_read" in line for line in t.display()) > 10)
    t.type("kretprobe vfs_writ")
    t.wait("vfs_writev")
    t.wait("ssize_t vfs_write(")
    take_picture(t, directory / "events-200x50.svg", "Events in a window of 200 by 50")
    t.type("\x15")
    t.line("kprobe --stop vfs_read count if count > 100")
    t.wait("stopped")
    t.line("stop")
    t.wait("#3 ")
    take_picture(t, directory / "stop-200x50.svg", "A stop in a window of 200 by 50")
    t.type("q")
    load.discard()
    t.line("quit")
    t.end()


def take(t: Terminal, directory: Path, vm: Vm) -> None:
    """A short session, with a picture of each thing worth one."""

    def picture(name: str, title: str) -> None:
        take_picture(t, directory / f"{name}.svg", title)

    t.wait("*1 ")
    t.wait("cpu 0>", 90)
    t.type("\x0c")
    t.type("kprobe vfs_read file->f_inode->i_")
    t.wait("unsigned long")
    t.wait("ssize_t vfs_read(")
    picture("completion", "Completion of members behind a parameter of vfs_read")
    t.type("\x15kprobe vfs_read file->f_inode->i_ino count $comm\r")
    t.wait("Probe 1 ")
    t.line("kretprobe do_sys_openat2 filename:string $retval")
    t.wait("2 probes")
    t.line("continue")
    t.wait("running>")
    t.type("\x0c")
    vm.start("cat /etc/hostname; ls / > /dev/null; cat /proc/version > /dev/null")
    t.wait("/proc/version")
    t.type(">>> find_task(1).comm\r")
    t.wait("(char [16])")
    t.type("kprobe vfs_wri")
    t.wait("vfs_writev")
    t.wait("ssize_t vfs_write(")
    picture("events", "Events above the prompt, which completes a function meanwhile")
    t.type("\x15")
    load = vm.start("while true; do wc /proc/version /proc/meminfo /etc/hostname > /dev/null; done")
    t.type("\x15top\r")
    t.wait("hits/s")
    t.wait(lambda: rate(t) > 0)
    picture("top", "Live table of probes")
    t.type("q")
    t.line("hist vfs_read count")
    t.wait("events, mean")
    t.wait("█")
    t.wait(lambda: any("count:" in line and "0 events" not in line for line in t.display()))
    picture("hist", "Live histogram of the sizes of reads")
    t.type("q")
    t.line("slabs")
    t.wait("kmalloc")
    picture("slabs", "Slab caches")
    t.type("q")
    t.line("kprobe --stop vfs_read count if count > 100")
    t.wait("stopped")
    t.line("stop")
    t.wait("#3 ")
    picture("stop", "Instructions and stack where the kernel stands")
    t.type("q")
    load.discard()
    t.line("quit")
    t.end()


def rate(t: Terminal) -> int:
    """Hits a second of the first probe, as the table shows."""
    rows = [line.split() for line in t.display() if " vfs_read" in line or "p_vfs_read" in line]
    return int(rows[0][3].replace(",", "")) if rows and len(rows[0]) > 3 else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
