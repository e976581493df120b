"""The host's processor as the judge: instructions assembled by GNU as and single-stepped."""

import ctypes
import mmap
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kgdbx.arch.registers import Registers

# struct user_regs_struct, arch/x86/include/asm/user_64.h.
USER_REGS = (
    ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8")
    + ("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss")
    + ("fs_base", "gs_base", "ds", "es", "fs", "gs")
)
GENERAL = tuple(name for name in USER_REGS[:20] if name not in ("orig_rax", "cs"))
_STRUCT = struct.Struct(f"<{len(USER_REGS)}Q")
_TRACEME, _GETREGS, _SETREGS, _SINGLESTEP, _SETOPTIONS = 0, 12, 13, 9, 0x4200
_EXITKILL = 0x0010_0000

# Distance in bytes between two instructions of the assemble fixture.
_ROW_BYTES = 32


class Processor:
    """A forked child that executes one instruction at a time in memory shared with us.

    ``memory`` is one mapping in both processes, at ``base``.
    """

    def __init__(self, size_bytes: int = 64 << 10) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        self.memory = mmap.mmap(-1, size_bytes, prot=protection)
        self._anchor = ctypes.c_char.from_buffer(self.memory)
        self.base = ctypes.addressof(self._anchor)
        self._ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        self._ptrace.restype = ctypes.c_long
        self._ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
        self._regs = ctypes.create_string_buffer(_STRUCT.size)
        self.pid = os.fork()
        if self.pid == 0:
            self._ptrace(_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(1)
        self._wait(signal.SIGSTOP)
        self._call(_SETOPTIONS, _EXITKILL)
        self._call(_GETREGS)
        self._initial = dict(zip(USER_REGS, _STRUCT.unpack(self._regs.raw), strict=True))
        self._initial["orig_rax"] = (1 << 64) - 1  # not inside a system call

    def step(self, registers: dict[str, int]) -> dict[str, int]:
        """Execute one instruction with these general registers; those that it leaves."""
        values = {**self._initial, **registers}
        _STRUCT.pack_into(self._regs, 0, *(values[name] for name in USER_REGS))
        self._call(_SETREGS)
        self._call(_SINGLESTEP, 0)
        self._wait(signal.SIGTRAP)
        self._call(_GETREGS)
        after = dict(zip(USER_REGS, _STRUCT.unpack(self._regs.raw), strict=True))
        return {name: after[name] for name in GENERAL}

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        del self._anchor
        self.memory.close()

    def _call(self, request: int, data: int | None = None) -> None:
        pointer = ctypes.addressof(self._regs) if data is None else data
        if self._ptrace(request, self.pid, None, pointer) == -1:
            raise OSError(ctypes.get_errno(), f"ptrace request {request}")

    def _wait(self, expected: signal.Signals) -> None:
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSTOPPED(status), f"the stepped process is gone: status {status:#x}"
        got = os.WSTOPSIG(status)
        assert got == expected, f"stopped by {signal.Signals(got).name}"


class ProcessorMemory:
    """A :class:`kgdbx.arch.operands.Memory` over a copy of a processor's memory."""

    def __init__(self, base: int, content: bytes) -> None:
        self.base = base
        self.content = bytearray(content)

    def read_memory(self, address: int, size_bytes: int) -> bytes:
        offset = self._offset(address, size_bytes)
        return bytes(self.content[offset : offset + size_bytes])

    def write_memory(self, address: int, data: bytes) -> None:
        offset = self._offset(address, len(data))
        self.content[offset : offset + len(data)] = data

    def _offset(self, address: int, size_bytes: int) -> int:
        offset = address - self.base
        assert 0 <= offset <= len(self.content) - size_bytes, f"stray access at {address:#x}"
        return offset


@pytest.fixture(scope="session")
def processor() -> Iterator[Processor]:
    try:
        made = Processor()
    except OSError as e:
        pytest.skip(f"cannot trace a child: {e}")
    yield made
    made.close()


@pytest.fixture(scope="session")
def processor_memory() -> type[ProcessorMemory]:
    return ProcessorMemory


@pytest.fixture(scope="session")
def assemble(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Sequence[str]], list[bytes]]:
    """Assemble lines of AT&T syntax, each at a multiple of 32 bytes."""
    for tool in ("as", "objcopy"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")

    def run(lines: Sequence[str]) -> list[bytes]:
        folder: Path = tmp_path_factory.mktemp("as")
        source = [f".org {n * _ROW_BYTES}\n{line}" for n, line in enumerate(lines)]
        source.append(f".org {len(lines) * _ROW_BYTES}\n")
        (folder / "rows.s").write_text("\n".join(source))
        subprocess.run(["as", "-o", "rows.o", "rows.s"], cwd=folder, check=True, timeout=60)
        copy = ["objcopy", "-O", "binary", "-j", ".text", "rows.o", "rows.bin"]
        subprocess.run(copy, cwd=folder, check=True, timeout=60)
        code = (folder / "rows.bin").read_bytes()
        return [code[n * _ROW_BYTES :][:_ROW_BYTES] for n in range(len(lines))]

    return run


@pytest.fixture
def make_registers() -> Callable[..., Registers]:
    """Registers of the ``g`` packet's general part, zero unless given."""

    def make(**values: int) -> Registers:
        return Registers({**dict.fromkeys(GENERAL, 0), **values})

    return make
