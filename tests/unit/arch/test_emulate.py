"""Every emulated instruction against the processor that runs the tests."""

import random
from collections.abc import Callable, Sequence

import pytest

from kgdbx.arch import alu
from kgdbx.arch.emulate import emulator_for
from kgdbx.arch.instruction import instruction_length
from kgdbx.arch.registers import Registers
from kgdbx.errors import MemoryFault

STATES_PER_ROW = 40

NO_OPERATIONS = [
    "nop",
    ".byte 0x66, 0x90",
    ".byte 0x0f, 0x1f, 0x00",
    ".byte 0x0f, 0x1f, 0x40, 0x00",
    ".byte 0x0f, 0x1f, 0x44, 0x00, 0x00",  # what ftrace leaves at a function's entry
    ".byte 0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00",
    ".byte 0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00",
    ".byte 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00",
    ".byte 0x66, 0x66, 0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00",
    "endbr64",
    "prefetcht0 (%rax)",
    "prefetcht1 (%rax)",
    "prefetcht2 (%rax)",
    "prefetchnta 8(%rax,%rbx,4)",
    "prefetchw (%rax)",
]

MOVES = [
    "mov %rdi,%rax",
    "mov %r15,%r8",
    "mov %edi,%eax",
    "mov %eax,%eax",
    "mov %di,%ax",
    "mov %r9w,%bx",
    "mov %dil,%al",
    "mov %sil,%r10b",
    "mov %ah,%bl",
    "mov %cl,%dh",
    "mov %bh,%ch",
    "mov $0x1122334455667788,%rax",
    "mov $-1,%rax",
    "mov $0x80000000,%eax",
    "mov $-2,%cx",
    "mov $0x7f,%dl",
    "mov $0x81,%ah",
    "mov (%rsi),%rax",
    "mov 8(%rsi,%rcx,8),%rax",
    "mov -64(%rsi),%eax",
    "mov (%rsi,%rcx,2),%ax",
    "mov 1(%rsi),%al",
    "mov 3(%rsi),%ah",
    "mov 0x40(%rsp),%r12",
    "mov %rsp,%rbp",
    "mov (%rsi),%rsi",
    "mov 0x2000(%rip),%rax",
    "mov %rax,(%rsi)",
    "mov %eax,8(%rsi,%rcx,8)",
    "mov %ax,(%rsp)",
    "mov %ah,5(%rsp)",
    "mov %r11b,7(%rsi)",
    "movq $-5,0x10(%rsp)",
    "movl $0x80000001,0x10(%rsp)",
    "movw $0x8001,0x10(%rsp)",
    "movb $0x80,0x10(%rsp)",
    "cs mov %rax,%rbx",
    "ds mov (%rsi),%rax",
    "movzbl %al,%ebx",
    "movzbl %ah,%ebx",
    "movzbl %dil,%eax",
    "movzbw %cl,%ax",
    "movzbq (%rsi),%rax",
    "movzwl %ax,%eax",
    "movzwq (%rsi,%rcx,4),%r9",
    "movsbl %al,%ebx",
    "movsbw %ch,%dx",
    "movsbq (%rsi),%rdx",
    "movswl %ax,%ebp",
    "movswq 2(%rsi),%rax",
    "movslq %edi,%rax",
    "movslq 4(%rsi),%r13",
    "lea (%rax,%rbx,8),%rcx",
    "lea -1(%rdi),%eax",
    "lea 0x1234(%rax,%r9,2),%dx",
    "lea 0x10(,%rax,4),%rbx",
    "lea 0x100(%rip),%rdi",
    "lea 0x7fffffff,%rax",
    "lea 8(%rsp),%rsp",
    "xchg %rax,%rbx",
    "xchg %eax,%ecx",
    ".byte 0x87, 0xc0",  # xchg %eax,%eax with a ModRM byte is no NOP: it clears the upper half
    "xchg %dx,%r8w",
    "xchg %al,%ah",
    "xchg %cl,%bl",
    "cbw",
    "cwde",
    "cdqe",
    "cwd",
    "cdq",
    "cqo",
    "bswap %rax",
    "bswap %r9d",
]

ARITHMETIC = [
    f"{name}{rest}"
    for name in ("add", "adc", "sub", "sbb", "cmp", "and", "or", "xor", "test")
    for rest in (
        "q %rbx,%rax",
        "l %ebx,%eax",
        "w %bx,%r8w",
        "b %bl,%al",
        "b %ah,%ch",
        "q %rdi,%rdi",
        "l %edi,%edi",
        "q $-1,%rax",
        "q $0x7fffffff,%r9",
        "l $0x80000000,%edx",
        "l $1,%edx",
        "w $0x8000,%cx",
        "b $0x80,%al",
        "b $0x7f,%bh",
        "q $0x18,%rsp",
        "q %rax,8(%rsi)",
        "l $0x11,(%rsp)",
        "b %cl,(%rsi,%rcx,1)",
    )
] + [
    f"{name}{rest}"
    for name in ("add", "adc", "sub", "sbb", "cmp", "and", "or", "xor")
    for rest in ("q 8(%rsi),%rax", "l (%rsi,%rcx,4),%eax", "w (%rsp),%dx", "b (%rsi),%ah")
]

SINGLE = [
    f"{name}{rest}"
    for name in ("inc", "dec", "neg", "not")
    for rest in ("q %rax", "l %r10d", "w %dx", "b %al", "b %bh", "q (%rsi)", "b 3(%rsp)")
]

SHIFTS = [
    f"{name}{rest}"
    for name in ("shl", "shr", "sar")
    for rest in (
        "q $1,%rax",
        "q $12,%rdi",
        "q $63,%rdi",
        "l $1,%eax",
        "l $31,%r8d",
        "l $0,%eax",
        "w $3,%dx",
        "b $7,%al",
        "b $1,%ah",
        "q %cl,%rax",
        "l %cl,%ebx",
        "l $4,(%rsp)",
    )
] + ["sarw $20,%ax", "sarb $31,%al"]

PRODUCTS = [
    "imul %rbx,%rax",
    "imul %edi,%ecx",
    "imul %dx,%r8w",
    "imul (%rsi),%rax",
    "imul $24,%rdi,%rax",
    "imul $-3,%eax,%eax",
    "imul $0x12345678,%rbx,%r9",
    "imul $1000,(%rsi),%dx",
]

BIT_TESTS = ["bt $5,%rax", "bt $63,%rdi", "bt %ebx,%ecx", "bt %dx,%r8w", "bt $33,%eax"]

STACK = [
    "push %rax",
    "push %rbp",
    "push %rsp",
    "push %r15",
    "push $-1",
    "push $0x12345678",
    "push 8(%rsi)",
    "push 8(%rsp)",
    "pop %rax",
    "pop %r12",
    "pop %rsp",
    "leave",
    "call . + 0x40",
    "call . - 0x1000",
    ".byte 0x67, 0xe8, 0x10, 0, 0, 0",  # addr32 call
    ".byte 0x2e, 0xe8, 0x10, 0, 0, 0",  # cs call
    "call *%rax",
    "call *%rsp",
    "call *(%rsi)",
    "call *8(%rsp)",
    "ret",
    "ret $16",
    "jmp . + 0x10",
    "jmp . + 0x12345",
    ".byte 0x2e, 0xe9, 0x10, 0, 0, 0",  # cs jmp
    "jmp *%rdi",
    "jmp *8(%rsi)",
    "notrack jmp *%rax",
]

CC = ("o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g")
CONDITIONAL = [
    text
    for cc in CC
    for text in (
        f"j{cc} . + 0x10",
        f"j{cc} . - 0x12345",
        f"set{cc} %al",
        f"set{cc} %dh",
        f"set{cc} 5(%rsp)",
        f"cmov{cc} %rbx,%rax",
        f"cmov{cc} %ebx,%eax",
        f"cmov{cc} (%rsi),%ax",
        f"cmov{cc} 4(%rsi),%edi",
    )
]

ROWS = [
    *NO_OPERATIONS,
    *MOVES,
    *ARITHMETIC,
    *SINGLE,
    *SHIFTS,
    *PRODUCTS,
    *BIT_TESTS,
    *STACK,
    *CONDITIONAL,
]

REFUSED = [
    "lock addl $1,(%rsp)",
    "lock xadd %rax,(%rsi)",
    "xchg %rax,(%rsi)",
    "cmpxchg %rax,(%rsi)",
    "rep movsq",
    "repne scasb",
    "movsb",
    "stosq",
    "mov %gs:0,%rax",
    "mov %gs:(%rsi),%rax",
    "incl %gs:0x10",
    "mov %fs:8,%rax",
    "mov (%esi),%eax",
    "mov 8(%esi),%rax",
    "lea (%eax),%rbx",
    "mov %ds,%eax",
    "mov %eax,%ss",
    "mov %cr3,%rax",
    "mov %rax,%cr0",
    "mov %rax,%dr7",
    "push %fs",
    "pop %gs",
    "pushw %ax",
    "popw %ax",
    "pushw $5",
    "pop (%rsi)",
    ".byte 0x66, 0xe9, 0, 0, 0, 0",
    ".byte 0x66, 0xe8, 0, 0, 0, 0",
    ".byte 0x66, 0x0f, 0x84, 0, 0, 0, 0",
    ".byte 0x66, 0xc3",
    ".byte 0xf3, 0xc3",
    "retw",
    "lret",
    "ljmp *(%rsi)",
    "lcall *(%rsi)",
    "iretq",
    "sysretq",
    "syscall",
    "pushfq",
    "popfq",
    "sti",
    "cli",
    "stac",
    "clac",
    "hlt",
    "pause",
    "int3",
    "int $0x80",
    "ud2",
    "rdtsc",
    "rdmsr",
    "wrmsr",
    "cpuid",
    "swapgs",
    "in %dx,%al",
    "out %al,%dx",
    "div %rcx",
    "idiv %ecx",
    "mul %rcx",
    "imul %rcx",
    "bt %rax,(%rsi)",
    "btsl $1,(%rsi)",
    "loop .",
    "jrcxz .",
    "enter $16,$0",
    "movaps %xmm0,%xmm1",
    "movq %rax,%xmm0",
    "xabort $1",
    "std",
    ".byte 0xf0, 0x90",  # a locked NOP is no instruction
]


def _undefined(row: str) -> int:
    """Flags that the SDM leaves undefined after an instruction."""
    if row.startswith(("and", "or", "xor", "test")):
        return alu.AF
    if row.startswith(("shl", "shr", "sar")):
        return alu.AF if " $1," in row else alu.AF | alu.OF
    if row.startswith("imul"):
        return alu.SF | alu.ZF | alu.AF | alu.PF
    if row.startswith("bt "):
        return alu.OF | alu.SF | alu.AF | alu.PF
    return 0


EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF) + (
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
POINTERS = ("rsp", "rsi")
NUMBERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp") + tuple(f"r{n}" for n in range(8, 16))
CODE_OFFSET = 0x100
STACK_SIZE = 0x4000  # the kernel's THREAD_SIZE
STACK_OFFSET = 0x4000  # an aligned stack begins at or above it
WINDOW = slice(0x1000 - 64, 0x2100)  # of the stack: what the rows can reach


def _random_value(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(EDGES)
    if kind < 0.5:
        return (rng.choice(EDGES) + rng.randrange(-3, 4)) % (1 << 64)
    return rng.getrandbits(64)


_POOL = random.Random("pool")
POOL = b"".join(_random_value(_POOL).to_bytes(8, "little") for _ in range(8 << 10))


def _stack_of(base: int) -> int:
    return (base + STACK_OFFSET + STACK_SIZE - 1) & ~(STACK_SIZE - 1)


def _random_state(rng: random.Random, row: str, base: int, content: bytearray) -> dict[str, int]:
    """Registers and memory that the row can run with: its pointers point into the stack."""
    stack = _stack_of(base)
    state = {name: _random_value(rng) for name in NUMBERS}
    state["eflags"] = 0x202 | rng.getrandbits(12) & alu.STATUS_FLAGS
    state["rip"] = base + CODE_OFFSET
    state["rsp"] = stack + 0x1000 + rng.randrange(64)
    if "rsi" in row:
        state["rsi"] = state["rsp"] + 0x800 + rng.randrange(256)
    if "(%rsi,%rcx" in row:
        state["rcx"] = rng.randrange(-15, 16) % (1 << 64)
    if row == "leave":
        state["rbp"] = stack + 0x2000 + rng.randrange(64)
    size = WINDOW.stop - WINDOW.start
    start = rng.randrange(len(POOL) - size)
    content[stack - base + WINDOW.start : stack - base + WINDOW.stop] = POOL[start : start + size]
    if row.startswith(("ret", "jmp", "call", "notrack")):
        # Any canonical address; the fault at it would come with the next instruction.
        target = rng.choice((base, 0, (1 << 47) - 4097, rng.getrandbits(46)))
        for name in ("rax", "rdi"):
            state[name] = target
        for pointer in POINTERS:
            for offset in (0, 8):
                where = (state[pointer] + offset - base) % (1 << 64)
                if where < len(content) - 8:
                    content[where : where + 8] = target.to_bytes(8, "little")
    return state


@pytest.fixture(scope="module")
def code_of(assemble: Callable[[Sequence[str]], list[bytes]]) -> dict[str, bytes]:
    rows = ROWS + REFUSED
    return {
        row: code[: instruction_length(code)] if row in ROWS else code
        for row, code in zip(rows, assemble(rows), strict=True)
    }


def test_rows_are_distinct() -> None:
    rows = ROWS + REFUSED
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("row", ROWS)
def test_like_the_processor(row, code_of, processor, processor_memory) -> None:
    code = code_of[row]
    emulator = emulator_for(code, processor.base + CODE_OFFSET)
    assert emulator is not None
    defined = ~_undefined(row)
    rng = random.Random(row)
    content = bytearray(POOL[: len(processor.memory)])
    content[CODE_OFFSET : CODE_OFFSET + len(code)] = code
    for _ in range(STATES_PER_ROW):
        state = _random_state(rng, row, processor.base, content)
        memory = processor_memory(processor.base, content)
        processor.memory[:] = bytes(content)
        expected = processor.step(state)
        regs = Registers(dict(state))
        emulator.run(regs, memory)
        got = {name: regs[name] for name in expected}
        got["eflags"] &= defined
        expected["eflags"] &= defined
        shown = {name: hex(value) for name, value in state.items()}
        assert got == expected, shown
        assert memory.content == processor.memory[:], shown


class FaultyMemory:
    """Memory of which one kind of access fails; the other reads *value* or forgets what it gets."""

    def __init__(self, *, reads: bool, writes: bool, value: int = 0x1234) -> None:
        self.reads, self.writes, self.value = reads, writes, value
        self.accesses = 0

    def read_memory(self, address: int, size_bytes: int) -> bytes:
        self.accesses += 1
        if not self.reads:
            raise MemoryFault(address, size_bytes)
        return self.value.to_bytes(8, "little")[:size_bytes]

    def write_memory(self, address: int, data: bytes) -> None:
        self.accesses += 1
        if not self.writes:
            raise MemoryFault(address, len(data), write=True)


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_a_fault_changes_no_register(row, reads, code_of, make_registers) -> None:
    emulator = emulator_for(code_of[row], 0x1000)
    assert emulator is not None
    regs = make_registers(rsp=0x9000, rsi=0x9800, rbp=0x9900, rip=0x1000, rax=0x2000)
    memory = FaultyMemory(reads=reads, writes=False)
    try:
        emulator.run(regs, memory)
    except MemoryFault:
        assert regs.changed == {}
        assert emulator.touches_memory
    else:
        assert "rip" in regs.changed
        assert not memory.accesses or reads
    assert emulator.touches_memory == bool(memory.accesses)


@pytest.mark.parametrize("row", REFUSED)
def test_refused(row, code_of) -> None:
    assert emulator_for(code_of[row], 0x1000) is None


@pytest.mark.parametrize("code", [b"", b"\x0f", b"\xe8\x00\x00", b"\x06", b"\x66" * 15])
def test_bytes_that_are_no_instruction(code) -> None:
    assert emulator_for(code, 0x1000) is None


@pytest.mark.parametrize("rsi", [0x9000 - 1, 0xC000, 0xFFFF_8880_0000_0000, 0x7FFF_0000])
@pytest.mark.parametrize("row", ["mov %rax,(%rsi)", "incq (%rsi)", "addq %rax,8(%rsi)"])
def test_stores_off_the_stack_are_the_processors(row, rsi, code_of, make_registers) -> None:
    emulator = emulator_for(code_of[row], 0x1000)
    regs = make_registers(rsp=0x9000 + 16, rsi=rsi, rip=0x1000)
    with pytest.raises(MemoryFault) as caught:
        emulator.run(regs, FaultyMemory(reads=True, writes=True))
    assert caught.value.address in (rsi, rsi + 8)
    assert regs.changed == {}


@pytest.mark.parametrize("row", ["ret", "jmp *%rdi", "call *%rax", "call *(%rsi)"])
@pytest.mark.parametrize("target", [1 << 47, 0xFFFF_7FFF_FFFF_FFFF, 1 << 62])
def test_branches_to_impossible_addresses_are_the_processors(
    row, target, code_of, make_registers
) -> None:
    emulator = emulator_for(code_of[row], 0x1000)
    regs = make_registers(rsp=0x9000, rsi=0x9800, rdi=target, rax=target)
    with pytest.raises(MemoryFault):
        emulator.run(regs, FaultyMemory(reads=True, writes=True, value=target))
    assert regs.changed == {}


def test_nop_writes_rip_only(make_registers) -> None:
    emulator = emulator_for(bytes.fromhex("0f1f440000"), 0xFFFF_FFFF_8100_0000)
    regs = make_registers()
    emulator.run(regs, None)
    assert regs.changed == {"rip": 0xFFFF_FFFF_8100_0005}
    assert not emulator.touches_memory
