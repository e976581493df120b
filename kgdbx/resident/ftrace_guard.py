"""The guest's own ftrace beside our jumps: where it is about to trace, ours gives way.

ftrace checks what is at a function's entry before it writes its call there. Another jump than its
own makes it warn, and switch itself off for good.
"""

from collections.abc import Callable, Container, Iterable

import drgn
import numpy as np

from kgdbx.errors import KgdbxError, ProbeError
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe
from kgdbx.probes.probe import Probe
from kgdbx.resident.engine import Engine
from kgdbx.resident.probe import ResidentProbe
from kgdbx.symbols.kernel import Kernel

__all__ = ("FtraceGuard",)

# arch/x86/kernel/ftrace.c; kernel/trace/ftrace.c calls them around every change of code.
_BEFORE, _AFTER = "ftrace_arch_code_modify_prepare", "ftrace_arch_code_modify_post_process"
_MOST_PAGES = 1 << 20
_LIFTED = "lifted: the guest's own ftrace traces this function"


class FtraceGuard:
    """Watches ftrace with probes of its own, once a jump of ours is where ftrace may write.

    :param register: registers a probe
    :param probes: the registered probes
    :param demote: puts breakpoints in the place of doorbells that jump from given addresses
    """

    def __init__(
        self,
        kernel: Kernel,
        engine: Engine,
        register: Callable[[Probe], Probe],
        probes: Iterable[Probe],
        demote: Callable[[Container[int]], None],
    ) -> None:
        self._kernel = kernel
        self._demote = demote
        self._engine = engine
        self._register = register
        self._probes = probes
        self._own: list[Probe] = []

    def follow(self) -> None:
        """Watch ftrace from now on; does nothing the second time, or without ftrace."""
        vmlinux = self._kernel.vmlinux
        if any(p.active for p in self._own) or not vmlinux.lookup("ftrace_pages_start"):
            return
        self._own = [
            Kprobe(_BEFORE, self._before, name="kgdbx/ftrace_before"),
            Kretprobe(_AFTER, self._after, name="kgdbx/ftrace_after"),
        ]
        for probe in self._own:
            probe.is_internal = True
            self._register(probe)

    def _before(self) -> None:
        if not self._engine.ftrace_sites:
            return
        traced = set(_to_be_traced(self._kernel))
        self._demote(traced)
        wanted = traced & self._engine.ftrace_sites
        if wanted:
            self._engine.lift(sorted(wanted))
            self._tell(wanted)

    def _after(self) -> None:
        for address in self._engine.put_back():
            for probe in self._at({address}):
                probe.tier_reason = ""

    def _tell(self, addresses: set[int]) -> None:
        for probe in self._at(addresses):
            probe.tier_reason = _LIFTED
            probe.record_fault("ftrace", _lifted(probe))

    def _at(self, addresses: set[int]) -> list[ResidentProbe]:
        return [
            probe
            for probe in self._probes
            if isinstance(probe, ResidentProbe)
            and any(p.displacement.address in addresses for p in probe.programs)
        ]


def _lifted(probe: Probe) -> KgdbxError:
    return ProbeError(
        f"{probe.name} is lifted as long as the guest's own ftrace traces the function: calls "
        "are not seen meanwhile"
    )


def _to_be_traced(kernel: Kernel) -> list[int]:
    # What ftrace_check_record() would give FTRACE_UPDATE_MAKE_CALL: somebody wants it, and it
    # is not there yet. The count of those who want it is in the bits below the flags.
    enabled = _flag(kernel.program, "FTRACE_FL_ENABLED")
    count = (1 << _lowest_flag_bit(kernel.program)) - 1
    record = kernel.program.type("struct dyn_ftrace")
    size = drgn.sizeof(record)
    ip, flags = (int(record.member(name).offset) // 8 for name in ("ip", "flags"))
    found: list[int] = []
    page = kernel.program["ftrace_pages_start"]
    for _ in range(_MOST_PAGES):
        if not page:
            break
        used = int(page.index)
        data = kernel.memory.read(int(page.records), used * size)
        words = np.frombuffer(data, "<u8").reshape(used, size // 8)
        wanted = (words[:, flags] & np.uint64(count)) != 0
        wanted &= (words[:, flags] & np.uint64(enabled)) == 0
        found += words[wanted, ip].tolist()
        page = page.next.read_()
    return found


def _flag(program: drgn.Program, name: str) -> int:
    return int(program.constant(name))


def _lowest_flag_bit(program: drgn.Program) -> int:
    # The enumeration of FTRACE_FL_* has no name.
    type_ = program.constant("FTRACE_FL_ENABLED").type_
    values = [value for name, value in type_.enumerators if name.startswith("FTRACE_FL_")]
    return int(min(value for value in values if value)).bit_length() - 1
