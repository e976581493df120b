"""The part of the measurements that runs inside gdb."""

import json
import time
from pathlib import Path

import gdb

from kgdbx.attach import attach_vm
from kgdbx.bench.stop_tier import hits_per_second
from kgdbx.gdb.attach import connect
from kgdbx.machine.vm import find_vm

__all__ = ("main", "measure_kgdb")

_WARM_UP = 200


class _Plain(gdb.Breakpoint):
    # What a user of gdb's Python writes today.
    def __init__(self, address: int, hits: int, warm_up: int = _WARM_UP) -> None:
        super().__init__(f"*{address:#x}", internal=True)
        self.silent = True
        self.left = hits + warm_up
        self.wanted = hits
        self.start = 0.0
        self.elapsed = 0.0

    def stop(self) -> bool:
        self.left -= 1
        if self.left == self.wanted:
            self.start = time.perf_counter()
        elif self.left == 0:
            self.elapsed = time.perf_counter() - self.start
            return True
        return False


def main(vm: str, what: str, function: str, hits: int, result: str) -> None:
    """Measure hits a second in this gdb.

    :param what: ``plain`` for a bare gdb breakpoint, or a column of the guide
    :param function: the kernel function that is probed
    :param result: file to write to
    """
    if what == "plain":
        rate = _plain(vm, function, hits)
    else:
        session = connect(vm, None)
        try:
            rate = hits_per_second(session, what, function, hits)
        finally:
            session.close()
    Path(result).write_text(json.dumps({"hits_per_s": rate}))


def measure_kgdb(
    line: str, vmlinux: str, slide: int, address: int, hits: int, warm_up: int, result: str
) -> None:
    """Measure hits a second of a bare gdb breakpoint over KGDB's line; the kernel stands.

    :param slide: KASLR slide in bytes
    :param address: guest-virtual address of the breakpoint
    :param result: file to write to
    """
    gdb.execute(f"symbol-file -o {slide:#x} {vmlinux}", to_string=True)
    gdb.execute("set architecture i386:x86-64", to_string=True)
    gdb.execute("set remotetimeout 20", to_string=True)
    gdb.execute(f"target remote {line}", to_string=True)
    plain = _Plain(address, hits, warm_up)
    gdb.execute("continue", to_string=True)
    rate = hits / plain.elapsed
    plain.delete()
    gdb.execute("detach", to_string=True)
    Path(result).write_text(json.dumps({"hits_per_s": rate}))


def _plain(vm: str, function: str, hits: int) -> float:
    info = find_vm(vm).info
    with attach_vm(info) as session:
        address, slide = session.kernel.functions(function)[0].address, session.kernel.slide
    # With symbols, as a user has them, and as our own face has them.
    gdb.execute(f"symbol-file -o {slide:#x} {info.vmlinux}", to_string=True)
    gdb.execute(f"target remote {info.gdb_socket}", to_string=True)
    plain = _Plain(address, hits)
    gdb.execute("continue", to_string=True)
    rate = hits / plain.elapsed
    plain.delete()
    gdb.execute("detach", to_string=True)
    return rate
