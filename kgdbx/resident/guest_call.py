"""Call the kernel's own functions: a vCPU that takes a timer interrupt makes the calls.

Whatever the guest does, it takes timer interrupts, and an interrupt handler may allocate atomic
memory. So the calls are made where the kernel enters one, with the registers put back before it
goes on. While a handler of a probe runs it is the vCPU of its hit that makes them.

Should kgdbx die meanwhile, the guest finds its own way back: behind the return address lies a
``struct pt_regs`` of the interrupted state, and the kernel's own exit from an exception takes it
from there.
"""

import struct
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Generic, TypeVar

from kgdbx.arch.registers import Registers
from kgdbx.errors import ProbeError, TargetTimeout, Unsupported
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import BreakpointKind, Stop, StopReason

__all__ = ("Call", "GuestCaller", "Script")

_HOST_FUNCTION = "irq_enter_rcu"
_CAPTURE_S = 10.0
_CALL_S = 30.0
_STACK_GAP_BYTES = 128
_INTERRUPTS = 1 << 9  # X86_EFLAGS_IF: the calls are made on one vCPU
# mov %rax,%rbx: its last byte alone is a ret, which nothing else ever executes.
_HIDDEN_RET = b"\x48\x89\xc3"
_RETURNS = ("restore_regs_and_return_to_kernel", "error_return")  # arch/x86/entry/entry_64.S
_SEARCH_BYTES = 1 << 20
# struct pt_regs, arch/x86/include/asm/ptrace.h
_PT_REGS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx"),
    *("rsi", "rdi", "rax", "rip", "cs", "eflags", "rsp", "ss"),
)
_ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Call:
    """One call of a kernel function.

    :ivar address: guest-virtual address of the function
    :ivar arguments: at most six integers
    """

    address: int
    arguments: tuple[int, ...] = ()


Script = Generator[Call, int, _T]
"""Yields calls, is sent what each returned (``rax``), and returns what came of it all."""


class GuestCaller:
    """Makes calls in a kernel.

    :param dispatch: handles stops that have nothing to do with the calls, as a target's ``run``
        asks for it
    :param handling: the vCPU whose handlers run; it must not go on by itself
    :ivar calling: whether calls are under way
    """

    def __init__(
        self,
        kernel: Kernel,
        dispatch: Callable[[Stop], bool],
        handling: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._kernel = kernel
        self.dispatch = dispatch
        self.handling = handling
        self.calling = False

    def run(self, script: Script[_T]) -> _T:
        """Make the calls of a script, all in one interrupt. The kernel stands before and after.

        :raises TargetTimeout: if the guest takes no timer interrupt, or a call does not return
        """
        outer, self.calling = self.calling, True
        try:
            return _Run(self._kernel, self.dispatch, script).run(self.handling())
        finally:
            self.calling = outer


class _Run(Generic[_T]):
    def __init__(
        self, kernel: Kernel, dispatch: Callable[[Stop], bool], script: Script[_T]
    ) -> None:
        self._target = kernel.target
        self._kernel = kernel
        self._dispatch = dispatch
        self._script = script
        self._entry = kernel.address(_HOST_FUNCTION)
        self._landing = _hidden_ret(kernel)
        self._way_back = next(kernel.address(n) for n in _RETURNS if kernel.vmlinux.lookup(n))
        self._waits = self._waited = False  # by a breakpoint of ours, for who makes the calls
        self._cpu: int | None = None
        self._saved: Registers | None = None
        self._stack = 0
        self._result: list[_T] = []
        self._error: BaseException | None = None

    def run(self, cpu: int | None) -> _T:
        self._waits = self._waited = cpu is None and self._insert(self._entry)
        landing = self._insert(self._landing)
        try:
            if cpu is None or self._start(cpu, self._target.read_registers(cpu)):
                self._run_on()
        except Unsupported:  # the guest has not run
            if self._cpu is not None and not self._finished:
                self._give_back(self._target.read_registers(self._cpu))
            raise
        finally:
            if self._waits:
                self._remove(self._entry)
            if landing:
                self._remove(self._landing)
        if self._error is not None:
            raise self._error
        if not self._finished:
            if self._cpu is None:
                raise TargetTimeout(
                    f"the guest took no interrupt within {_CAPTURE_S:g} s, and functions of its "
                    "kernel can be called in one only"
                )
            raise TargetTimeout(f"a call in the guest did not return within {_CALL_S:g} s")
        return self._result[0]

    def _run_on(self) -> None:
        # A stop that is asked for meanwhile ends what this is part of, and not this.
        deadline = time.monotonic() + (_CAPTURE_S if self._cpu is None else _CALL_S)
        while (left := deadline - time.monotonic()) > 0 and not self._finished:
            captured = self._cpu is not None
            stop = self._target.run(self._on_stop, left)
            if stop is not None and not self._finished:
                break
            if self._cpu is not None and not captured:
                deadline = time.monotonic() + _CALL_S

    @property
    def _finished(self) -> bool:
        return bool(self._result) or self._error is not None

    def _insert(self, address: int) -> bool:
        try:
            self._target.insert_breakpoint(BreakpointKind.SOFTWARE, address)
        except ProbeError:
            return False  # a probe of the user's is there, and stops for us too
        return True

    def _remove(self, address: int) -> None:
        self._target.remove_breakpoint(BreakpointKind.SOFTWARE, address)

    def _on_stop(self, stop: Stop) -> bool:
        if stop.reason is not StopReason.TRAP:
            return self._dispatch(stop)
        regs = self._target.read_registers(stop.cpu)
        if regs.rip == self._landing and stop.cpu == self._cpu:
            return self._advance(regs, regs.rax)
        if regs.rip != self._entry:
            return self._dispatch(stop)
        if self._waits:
            self._waits = False
            self._remove(self._entry)
            return self._start(stop.cpu, regs)
        if self._waited:
            return True  # reported a second time after its breakpoint was taken out
        if not self._dispatch(stop):
            return False
        return self._cpu is not None or self._start(stop.cpu, self._target.read_registers(stop.cpu))

    def _start(self, cpu: int, regs: Registers) -> bool:
        self._cpu, self._saved = cpu, regs.copy()
        frame = struct.pack(f"<{len(_PT_REGS)}Q", *(regs[name] for name in _PT_REGS))
        self._stack = ((regs.rsp - _STACK_GAP_BYTES) & ~15) - len(frame) - 16
        way_back = self._way_back.to_bytes(8, "little")
        self._kernel.memory.write(self._stack + 8, way_back + frame)
        return self._advance(regs, None)

    def _advance(self, regs: Registers, returned: int | None) -> bool:
        try:
            call = next(self._script) if returned is None else self._script.send(returned)
        except StopIteration as e:
            self._result.append(e.value)
        except BaseException as e:
            self._error = e
        else:
            self._kernel.memory.write(self._stack, self._landing.to_bytes(8, "little"))
            for name, value in zip(_ARGUMENTS, call.arguments, strict=False):
                setattr(regs, name, value & (1 << 64) - 1)
            regs.rsp, regs.rip, regs.rax = self._stack, call.address, 0
            regs.eflags &= ~_INTERRUPTS
            self._target.write_registers(self._cpu or 0, regs)
            return True
        self._give_back(regs)
        return False

    def _give_back(self, regs: Registers) -> None:
        assert self._saved is not None
        regs.restore(self._saved)
        self._target.write_registers(self._cpu or 0, regs)


def _hidden_ret(kernel: Kernel) -> int:
    start = kernel.address("_text")
    while True:
        code = kernel.read_code(start, _SEARCH_BYTES)
        found = code.find(_HIDDEN_RET)
        if found >= 0:
            return start + found + len(_HIDDEN_RET) - 1
        start += len(code)
