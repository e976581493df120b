"""Probes over KGDB's serial line, beside gdb's own Python breakpoints on the same line."""

import contextlib
import functools
import json
import select
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from kgdbx.attach import attach, attach_kgdb
from kgdbx.bench.figure import Figure, figure, ratio
from kgdbx.errors import MachineError
from kgdbx.gdb_launch import gdb_argv
from kgdbx.machine.snapshot import clone, make_template
from kgdbx.machine.sysrq import sysrq_g
from kgdbx.machine.vm import Vm, configure
from kgdbx.probes.kprobe import Kprobe
from kgdbx.session import Session
from kgdbx.target.base import Stop
from kgdbx.target.kgdb import KgdbTarget

__all__ = ("measure",)

_FUNCTION = "__x64_sys_getpgid"
_CALLING = "caller 1 1000000000000"
_HITS = 60
_WARM_UP = 5
_RUN_S = 200


def measure(rounds: int) -> Iterator[Figure]:
    """Hits a second of both, and bytes on the line for each hit.

    :param rounds: how often both are measured, in turn, on one VM
    """
    ours, theirs, ours_bytes, theirs_bytes = [], [], [], []
    with clone(make_template(configure("kgdb", smp=1))) as vm:
        workload = vm.start(_CALLING)
        try:
            for _ in range(rounds):
                rate, per_hit = _kprobe(vm)
                ours.append(rate)
                ours_bytes.append(per_hit)
                rate, per_hit = _gdb(vm)
                theirs.append(rate)
                theirs_bytes.append(per_hit)
        finally:
            workload.discard()
    yield ratio("kgdb.stop.vs_gdb", ours, theirs)
    yield figure("kgdb.stop.hits_per_s", ours, "1/s")
    yield figure("kgdb.gdb.hits_per_s", theirs, "1/s")
    yield figure("kgdb.stop.bytes_per_hit", ours_bytes, "B")
    yield figure("kgdb.gdb.bytes_per_hit", theirs_bytes, "B")


def _kprobe(vm: Vm) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(prefix="kgdbx-bench-") as scratch:
        path = Path(scratch) / "line.sock"
        with _Meter(vm.info.kgdb_socket, path) as meter:
            break_in = functools.partial(sysrq_g, vm.info)
            target = KgdbTarget(str(path), break_in=break_in)
            with attach(target, vm.info.vmlinux) as session:
                return _count(session, meter)


def _count(session: Session, meter: "_Meter") -> tuple[float, float]:
    probe = session.register(Kprobe(_FUNCTION, lambda p, regs: None))
    start, begun = 0.0, 0

    def on_stop(stop: Stop) -> bool:
        nonlocal start, begun
        going = session.probes.on_stop(stop)
        if probe.hits == _WARM_UP:
            start, begun = time.perf_counter(), meter.bytes
        return going and probe.hits < _WARM_UP + _HITS

    if session.target.run(on_stop, _RUN_S) is None:
        raise MachineError(f"fewer than {_HITS} hits in {_RUN_S} s")
    return _HITS / (time.perf_counter() - start), (meter.bytes - begun) / _HITS


def _gdb(vm: Vm) -> tuple[float, float]:
    session = attach_kgdb(vm.info)
    address, slide = session.kernel.address(_FUNCTION), session.kernel.slide
    session.target.close(resume=False)  # gdb is to find a kernel that stands
    with tempfile.TemporaryDirectory(prefix="kgdbx-bench-") as scratch:
        directory = Path(scratch)
        result = directory / "result.json"
        with _Meter(vm.info.kgdb_socket, directory / "line.sock") as meter:
            code = (
                "import kgdbx.bench.in_gdb as b; "
                f"b.measure_kgdb({str(meter.path)!r}, {str(vm.info.vmlinux)!r}, {slide:#x}, "
                f"{address:#x}, {_HITS}, {_WARM_UP}, {str(result)!r})"
            )
            done = subprocess.run(
                [*gdb_argv(), "-batch", "-ex", f"python {code}"],
                capture_output=True,
                text=True,
                timeout=_RUN_S,
                check=False,
            )
        if not result.exists():
            raise MachineError(f"gdb measured nothing: {done.stdout}{done.stderr}")
        # Attaching and leaving are in it, and little beside the hits.
        rate = float(json.loads(result.read_text())["hits_per_s"])
        return rate, meter.bytes / (_HITS + _WARM_UP)


class _Meter:
    # Passes bytes on, as gdb does not tell how many there were.
    def __init__(self, upstream: Path, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._upstream = socket.socket(socket.AF_UNIX)
        self._upstream.connect(str(upstream))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "_Meter":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self._listener.close()
        self._upstream.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                stream, _ = self._listener.accept()
                with stream, contextlib.suppress(OSError):
                    self._carry(stream)
                return

    def _carry(self, stream: socket.socket) -> None:
        other = {stream: self._upstream, self._upstream: stream}
        while not self._ended.is_set():
            for source in select.select(list(other), [], [], 0.05)[0]:
                data = source.recv(4096)
                if not data:
                    return
                self.bytes += len(data)
                other[source].sendall(data)
