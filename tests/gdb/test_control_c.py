"""One ^C stops the kernel, whatever gdb does just then."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kgdbx.gdb_launch import gdb_argv
from kgdbx.machine.vm import Vm

FUNCTION = "__x64_sys_getpgid"
# KGDBX_TIMES=25 presses it that often with each kind of probe.
TIMES = int(os.environ.get("KGDBX_TIMES", "2"))
# The stop takes what a busy machine takes; a ^C that is lost never comes.
LOST_S = 60.0
PROBES = {
    "stop": f"from kgdbx.probes.script import kprobe\n@kprobe({FUNCTION!r})\ndef f(): pass\n",
    "slow": "import time\nfrom kgdbx.probes.script import kprobe\n"
    f"@kprobe({FUNCTION!r})\ndef f(): time.sleep(0.05)\n",
    "resident": f"def start(session):\n    session.define('p {FUNCTION} $comm')\n",
    "rare": "from kgdbx.probes.script import kprobe\n@kprobe('do_exit')\ndef f(): pass\n",
}


class Gdb:
    """A gdb whose output is read as it comes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            gdb_argv(load=True),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.text = ""
        self.came = threading.Condition()
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.came:
                if "$comm=" not in line:  # events come by the thousand
                    self.text += line
                    self.came.notify_all()

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def wait(self, text: str, timeout_s: float) -> None:
        with self.came:
            assert self.came.wait_for(lambda: text in self.text, timeout_s), self.text


@contextmanager
def running_gdb() -> Iterator[Gdb]:
    gdb = Gdb()
    try:
        yield gdb
        gdb.write("quit")
        assert gdb.process.wait(60) == 0
    finally:
        gdb.process.kill()
        gdb.process.wait()
        gdb.thread.join()
        for file in (gdb.process.stdin, gdb.process.stdout):
            assert file is not None
            file.close()


def test_each_one_stops_the_kernel(vm: Vm, tmp_path: Path) -> None:
    load = vm.start("caller 2 1000000000")
    with running_gdb() as gdb:
        gdb.write(f"kgdbx attach {vm.name}")
        for kind, text in PROBES.items():
            script = tmp_path / f"{kind}.py"
            script.write_text(text)
            gdb.write(f"kgdbx script {script}")
            for n in range(TIMES):
                gdb.write(f"echo GO {kind} {n}\\n\ncontinue\necho STOPPED {kind} {n}\\n")
                gdb.wait(f"GO {kind} {n}\n", 60)
                time.sleep(0.1 + 0.05 * (n % 10))  # somewhere in it
                gdb.process.send_signal(signal.SIGINT)
                gdb.wait(f"STOPPED {kind} {n}\n", LOST_S)
            gdb.write("kgdbx delete")
        gdb.write("kgdbx detach\necho LEFT\\n")
        gdb.wait("LEFT\n", 60)
        assert "Traceback" not in gdb.text and "internal-error" not in gdb.text
    load.discard()
    assert vm.execute("caller 1 7").output.startswith("7 ")
