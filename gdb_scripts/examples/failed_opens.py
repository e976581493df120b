"""A kretprobe: opens that fail, and why (the kprobes guide's third example)."""

import errno
import os

from kgdbx.probes.script import kretprobe


def remember_name(ri, regs, hit, filename):
    # The user's page is there at the return, but a thread may have changed it by then.
    name = hit.kernel.memory.read_string(filename.value_(), cr3=regs.cr3)
    ri.data = name.decode(errors="replace")


@kretprobe("do_sys_openat2", entry_handler=remember_name, maxactive=20)
def show_failure(ri, retval):
    code = -retval.value_()
    if code > 0:
        name = errno.errorcode.get(code, code)
        print(f"{ri.task.comm}[{ri.task.pid}] open {ri.data!r}: {name} {os.strerror(code)}")
