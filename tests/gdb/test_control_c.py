"""One ^C stops the kernel, whatever gdb does just then."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kgdbx.gdb_launch import gdb_argv
from kgdbx.machine.vm import Vm

FUNCTION = "__x64_sys_getpgid"
TIMES = int(os.environ.get("KGDBX_TIMES", "6"))
# The stop takes what a busy machine takes; a ^C that is lost never comes.
LOST_S = 20.0
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
                self.text = (self.text + line)[-20_000:]
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


@pytest.mark.parametrize("kind", PROBES)
def test_each_one_stops_the_kernel(vm: Vm, tmp_path: Path, kind: str) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBES[kind])
    load = vm.start("caller 2 1000000000")
    with running_gdb() as gdb:
        gdb.write(f"kgdbx attach {vm.name}")
        gdb.write(f"kgdbx script {script}")
        for n in range(TIMES):
            gdb.write(f"echo GO{n}\\n\ncontinue\necho STOPPED{n}\\n")
            gdb.wait(f"GO{n}\n", 60)
            time.sleep(0.02 + 0.013 * n)  # somewhere in it
            gdb.process.send_signal(signal.SIGINT)
            gdb.wait(f"STOPPED{n}\n", LOST_S)
        gdb.write("kgdbx list\nkgdbx detach\necho LEFT\\n")
        gdb.wait("LEFT\n", 60)
        assert "Traceback" not in gdb.text and "internal-error" not in gdb.text
    load.discard()
    assert vm.execute("caller 1 7").output.startswith("7 ")
