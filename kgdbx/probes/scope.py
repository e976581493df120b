"""What the names in a definition's expressions stand for at a hit."""

from collections.abc import Callable, Mapping

import drgn

from kgdbx.arch.registers import Registers
from kgdbx.errors import ProbeError, SymbolError
from kgdbx.probes.handler import Supplier
from kgdbx.probes.probe import Hit
from kgdbx.symbols.kernel import Kernel

__all__ = ("HitScope", "KernelScope")

_KERNEL_HALF = 1 << 63


class KernelScope:
    """A scope outside of any hit: symbols, types and constants only."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @property
    def program(self) -> drgn.Program:
        return self.kernel.program

    def variable(self, name: str) -> drgn.Object:
        raise LookupError(name)

    def symbol(self, name: str) -> drgn.Object:
        try:
            return self.kernel.program[name]
        except (KeyError, drgn.BadDataError):  # the latter for assembler
            address = self.kernel.object_address(name)
            if address is None:
                raise LookupError(name) from None
            # A symbol without debug information, as kprobe_events sees all of them.
            return drgn.Object(self.kernel.program, "unsigned long", address=address)

    def register(self, name: str) -> int:
        raise ProbeError(f"there is no register {name!r} outside of a hit")

    def special(self, name: str, index: int | None) -> drgn.Object | int | str:
        raise ProbeError(f"there is no ${name} outside of a hit")

    def func(self) -> str:
        raise ProbeError("there is no $func outside of a hit")

    def kstack(self, depth: int) -> list[str]:
        raise ProbeError("there is no $kstack outside of a hit")

    def read_kernel(self, address: int, size_bytes: int) -> bytes:
        return self.kernel.memory.read(address, size_bytes)

    def read_user(self, address: int, size_bytes: int) -> bytes:
        raise ProbeError("there is no user memory outside of a hit")


class HitScope(KernelScope):
    """The scope of one probe point; :attr:`hit` is set at each hit.

    :param arguments: getters of the function's parameters
    """

    def __init__(self, kernel: Kernel, arguments: Mapping[str, Supplier]) -> None:
        super().__init__(kernel)
        self.arguments = arguments
        self.hit: Hit | None = None
        self.retval: Callable[[], drgn.Object | None] | None = None
        self.entry_values: Mapping[str, drgn.Object] | None = None
        self.entry_registers: Registers | None = None
        self._symbols: dict[int, str] = {}

    @property
    def _now(self) -> Hit:
        assert self.hit is not None, "evaluated outside of a hit"
        return self.hit

    def variable(self, name: str) -> drgn.Object:
        if self.entry_values is not None:
            return self.entry_values[name]
        supplier = self.arguments.get(name)
        if supplier is not None:
            value: drgn.Object = supplier(self._now)
            return value
        frame = self._now.stack_trace()[0]
        if name not in frame.locals():
            # drgn would go on to the file's globals, where a mere declaration is an absent object.
            raise LookupError(name)
        return frame[name]

    def register(self, name: str) -> int:
        return self._now.regs[name]

    def special(self, name: str, index: int | None) -> drgn.Object | int | str:
        hit = self._now
        if name == "retval":
            value = self.retval() if self.retval is not None else None
            if value is None:
                raise SymbolError(
                    "there is no $retval here: only in return probes, and not of void"
                )
            return value
        if name == "stack":
            if index is None:
                return hit.regs.rsp
            return self.kernel.memory.read_u64(hit.regs.rsp + 8 * index)
        if name == "arg":
            registers = self.entry_registers or hit.regs
            return registers.argument((index or 1) - 1)
        if name == "task":
            return drgn.Object(self.program, "struct task_struct *", value=hit.task.address)
        return {"comm": hit.task.comm, "pid": hit.task.pid, "tgid": hit.task.tgid, "cpu": hit.cpu}[
            name
        ]

    def func(self) -> str:
        return self._symbolize(self._now.address).partition("+")[0]

    def kstack(self, depth: int) -> list[str]:
        addresses: list[int] = []
        for frame in self._now.stack_trace():
            if len(addresses) == depth:
                break
            if frame.is_inline:
                continue
            try:
                address = frame.pc
            except LookupError:  # the unwinder does not know how to go on
                break
            if address < _KERNEL_HALF:
                break
            addresses.append(address)
        return [self._symbolize(address) for address in addresses]

    def _symbolize(self, address: int) -> str:
        if address not in self._symbols:
            self._symbols[address] = self.kernel.symbolize(address)
        return self._symbols[address]

    def read_user(self, address: int, size_bytes: int) -> bytes:
        regs = self._now.regs
        cr3 = regs.cr3 if "cr3" in regs else None
        return self.kernel.memory.read_user(address, size_bytes, cr3)
