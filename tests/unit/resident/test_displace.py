"""Instructions that are moved do what they did: run on the processor that runs the tests."""

import ctypes
import itertools
import mmap
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iced_x86 import Decoder, Instruction

from kgdbx.arch.instruction import branch_target, decode
from kgdbx.resident.place.displace import CannotDisplace, Displacement

MAP_32BIT = 0x40
AREA_BYTES = 1 << 16
COPY = 0x8000  # where copies lie in the area
KERNEL = 0xFFFFFFFF81000000
REGION = 0xFFFFFFFFFE000000

# Code of a function f(a, b) that starts with what is displaced, and how many bytes these are.
# Other parts of a function lie behind, up to its return.
FUNCTIONS = {
    "ftrace's NOP": (".byte 0x0f, 0x1f, 0x44, 0, 0\n lea (%rdi,%rsi),%rax\n ret", 5),
    "push": (
        "push %rbp\n push %rbx\n push %r12\n nop\n mov %rdi,%rax\n pop %r12\n pop %rbx\n"
        " pop %rbp\n ret",
        5,
    ),
    "sub rsp": (
        "sub $0x28,%rsp\n nop\n mov %rdi,0x10(%rsp)\n mov 0x10(%rsp),%rax\n add $0x28,%rsp\n ret",
        5,
    ),
    "mov": ("mov %rdi,%rax\n mov %rsi,%rcx\n add %rcx,%rax\n ret", 6),
    "mov immediate": ("mov $0x12345678,%eax\n ret", 5),
    "lea rip-relative": (
        "lea value(%rip),%rax\n mov (%rax),%rax\n ret\n.balign 8\nvalue: .quad 0x1122334455667788",
        7,
    ),
    "load rip-relative": ("mov value(%rip),%rax\n ret\n.balign 8\nvalue: .quad 0x1234567", 7),
    "store rip-relative": (
        "movl $0x77,value(%rip)\n mov value(%rip),%eax\n ret\n.balign 8\nvalue: .quad 0",
        10,
    ),
    "compare rip-relative": (
        "cmpq $7,value(%rip)\n sete %al\n movzbl %al,%eax\n ret\n.balign 8\nvalue: .quad 7",
        8,
    ),
    "xor": ("xor %eax,%eax\n xor %ecx,%ecx\n nop\n add %rdi,%rax\n ret", 5),
    "test and short jcc": ("test %rdi,%rdi\n je 1f\n mov $1,%eax\n ret\n1: mov $2,%eax\n ret", 5),
    "cmp and near jcc": (
        "cmp %rsi,%rdi\n {disp32} jb 1f\n mov $1,%eax\n ret\n1: mov $2,%eax\n ret",
        9,
    ),
    "short jcc over a jump": (
        "nop\n test %edi,%edi\n jne 1f\n mov $5,%eax\n ret\n1: mov $6,%eax\n ret",
        5,
    ),
    "short jmp": ("nop\n nop\n nop\n jmp 1f\n ud2\n1: mov %rdi,%rax\n ret", 5),
    "near jmp": ("{disp32} jmp 1f\n ud2\n1: mov %rsi,%rax\n ret", 5),
    "indirect jmp": ("lea 1f(%rip),%rax\n jmp *%rax\n ud2\n1: mov %rsi,%rax\n ret", 9),
    "jmp through memory": (
        "jmp *value(%rip)\n ud2\n1: mov %rsi,%rax\n ret\n.balign 8\nvalue: .quad 1b",
        6,
    ),
    "ret and padding": ("mov %edi,%eax\n ret\n int3\n int3\n int3", 5),
    "ret alone": ("ret\n .fill 4, 1, 0xcc", 5),
    "jrcxz": ("mov %rdi,%rcx\n jrcxz 1f\n mov $1,%eax\n ret\n1: mov $2,%eax\n ret", 5),
    "loop back to the jump": ("shr %rdi\n nop\n jne f\n mov %rdi,%rax\n ret", 6),
    "loop": ("mov %rdi,%rcx\n loop 1f\n mov $1,%eax\n ret\n1: mov $2,%eax\n ret", 5),
    "call": (
        "call g\n add %rdi,%rax\n ret\ng: mov (%rsp),%rax\n lea f(%rip),%rcx\n"
        " sub %rcx,%rax\n add %rsi,%rax\n ret",
        5,
    ),
    "call through a register": (
        "lea g(%rip),%rax\n call *%rax\n add %rdi,%rax\n ret\n"
        "g: mov (%rsp),%rax\n lea f(%rip),%rcx\n sub %rcx,%rax\n ret",
        9,
    ),
    "call through memory": (
        "call *value(%rip)\n add %rdi,%rax\n ret\ng: mov $3,%eax\n ret\n.balign 8\nvalue: .quad g",
        6,
    ),
    "endbr64 in the middle": ("nop\n endbr64\n mov %rdi,%rax\n ret", 5),
    "setcc and cmov": ("cmp %rsi,%rdi\n setb %al\n movzbl %al,%eax\n ret", 6),
}
ARGUMENTS = [(0, 0), (1, 0), (5, 7), (7, 5), (3, 3), (1 << 40, 2)]


@pytest.fixture(scope="module")
def area() -> Iterator[tuple[mmap.mmap, int]]:
    """Executable memory below 2 GiB, whose addresses an instruction can push, as the kernel's."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_32BIT
    memory = mmap.mmap(-1, AREA_BYTES, flags=flags, prot=protection)
    anchor = ctypes.c_char.from_buffer(memory)
    yield memory, ctypes.addressof(anchor)
    del anchor
    memory.close()


@pytest.fixture(scope="module")
def assembled(
    tmp_path_factory: pytest.TempPathFactory, area: tuple[mmap.mmap, int]
) -> Callable[[str], bytes]:
    for tool in ("as", "ld", "objcopy"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")

    def run(source: str) -> bytes:
        folder: Path = tmp_path_factory.mktemp("as")
        (folder / "f.s").write_text(f".globl f\nf: {source}\n")
        base = area[1]
        for command in (
            ["as", "-o", "f.o", "f.s"],
            ["ld", f"-Ttext={base:#x}", "-e", "f", "-o", "f", "f.o"],
            ["objcopy", "-O", "binary", "-j", ".text", "f", "f.bin"],
        ):
            subprocess.run(command, cwd=folder, check=True, timeout=60)
        return (folder / "f.bin").read_bytes()

    return run


def jump(at: int, to: int) -> bytes:
    return b"\xe9" + (to - at - 5).to_bytes(4, "little", signed=True)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_moved_instructions_do_the_same(
    kind: str, area: tuple[mmap.mmap, int], assembled: Callable[[str], bytes]
) -> None:
    source, size = FUNCTIONS[kind]
    code = assembled(source)
    memory, base = area
    function = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)(base)

    def results() -> list[int]:
        found = []
        for first, second in ARGUMENTS:
            memory[: len(code)] = code  # some change their own data
            if patch:
                memory[: len(patch)] = patch
            found.append(function(first, second))
        return found

    patch = b""
    expected = results()
    displacement = Displacement(base, code[:size])
    copy = displacement.relocated(base + COPY)
    copy += jump(base + COPY + len(copy), displacement.resume)
    memory[COPY : COPY + len(copy)] = copy
    # Whatever is left of the replaced instructions must not be run.
    patch = jump(base, base + COPY).ljust(size, b"\xcc")
    if kind == "ret alone":
        function(0, 0)
    else:
        assert results() == expected


def test_properties() -> None:
    nop = Displacement(KERNEL, bytes.fromhex("0f1f440000"))
    assert nop.is_ftrace_nop
    assert nop.resume == KERNEL + 5
    assert nop.relocated(REGION) == b""
    pushes = Displacement(KERNEL, bytes.fromhex("554889e553"))
    assert not pushes.is_ftrace_nop
    assert pushes.relocated(REGION) == pushes.original


def test_a_loop_goes_to_the_jump_not_to_the_copy() -> None:
    # 1: dec %edi; nop; jne 1b
    moved = Displacement(KERNEL, bytes.fromhex("ffcf9075fb")).relocated(REGION)
    assert branch_target(list(Decoder(64, moved, ip=REGION))[-1]) == KERNEL


def test_a_jump_to_itself_goes_to_the_jump() -> None:
    moved = Displacement(KERNEL, bytes.fromhex("ebfecccccc")).relocated(REGION)
    (only,) = Decoder(64, moved, ip=REGION)
    assert branch_target(only) == KERNEL


def test_a_call_pushes_the_true_return_address() -> None:
    original = b"\xe8" + (0x1000).to_bytes(4, "little")
    push, to = Decoder(64, Displacement(KERNEL, original).relocated(REGION), ip=REGION)
    assert push.immediate(0) == KERNEL + 5
    assert branch_target(to) == KERNEL + 5 + 0x1000


def test_per_cpu_variables_by_distance() -> None:
    # The address space comes round: mov %gs:0x34000(%rip at 0),%rax
    distance = 0x34000 - (KERNEL + 8) + (1 << 64)
    original = bytes.fromhex("65488b05") + (distance & 0xFFFFFFFF).to_bytes(4, "little")
    assert decode(original, KERNEL).ip_rel_memory_address == 0x34000
    (moved,) = Decoder(64, Displacement(KERNEL, original).relocated(REGION), ip=REGION)
    assert moved.ip_rel_memory_address == 0x34000


@pytest.mark.parametrize("code", ["488d05cc1d0100", "e900100000", "0f8400100000", "e800100000"])
def test_what_is_named_by_distance_has_to_be_in_reach(code: str) -> None:
    with pytest.raises(CannotDisplace, match="2 GiB|return address") as caught:
        Displacement(0x12345678000, bytes.fromhex(code)).relocated(0x1000)
    assert caught.value.kind == "reach"
    assert caught.value.address == 0x12345678000


SHORT = [
    "55", "4157", "4883ec28", "4889e5", "31c0", "4885ff", "4839f7", "83ff03", "488d4701", "c3",
    "c9", "5d", "90", "6690", "0f1f00", "f30f1efa", "e800010000", "eb10", "7505", "e910200000",
    "0f8512340000", "488b0512340000", "488d3d12340000", "833d1234000005", "65488b042500340300",
    "c7055566000077000000", "48c7c001000000", "b8ffffffff", "ff15aabb0000", "ffe0", "41ffd3",
    "e302", "e2f0", "48b81122334455667788", "f0480fb10f", "f3a4", "0fb6c0", "480fc8", "9c", "9d",
]  # fmt: skip


def meaning(instruction: Instruction) -> tuple[object, ...]:
    """What an instruction does wherever it lies."""
    target = branch_target(instruction)
    if target is not None:
        return (instruction.mnemonic, target)
    place = instruction.ip_rel_memory_address if instruction.is_ip_rel_memory_operand else None
    displacement = instruction.memory_displacement if place is None else None
    operands = tuple(
        (instruction.op_kind(n), instruction.op_register(n) if instruction.op_kind(n) == 0 else 0)
        for n in range(instruction.op_count)
    )
    base = instruction.memory_base, instruction.memory_index, instruction.memory_index_scale
    prefixes = instruction.has_lock_prefix, instruction.has_rep_prefix, instruction.segment_prefix
    return (instruction.code, operands, base, displacement, place, prefixes)


@given(
    st.lists(st.sampled_from(SHORT), min_size=1, max_size=5),
    st.integers(0, 0x3000000),
    st.integers(0, 0x1000000),
)
def test_copies_decode_to_the_same_instructions(codes: list[str], low: int, high: int) -> None:
    start, copy = KERNEL + low, REGION + high
    original = bytes.fromhex("".join(codes))
    moved = list(Decoder(64, Displacement(start, original).relocated(copy), ip=copy))
    expected = []
    for instruction in Decoder(64, original, ip=start):
        text = original[instruction.ip - start : instruction.next_ip - start]
        if not text.startswith((b"\x90", b"\x66\x90", b"\x0f\x1f", b"\xf3\x0f\x1e\xfa")):
            expected.append(instruction)
        if text[0] in (0xC3, 0xEB, 0xE9) or text == b"\xff\xe0":
            break
    given_ = iter(moved)
    for instruction in expected:
        got = next(given_)
        assert not got.is_invalid
        if instruction.is_call_near or instruction.is_call_near_indirect:
            assert got.immediate(0) == instruction.next_ip
            jump_ = next(given_)
            assert branch_target(jump_) == branch_target(instruction)
            assert jump_.memory_base == instruction.memory_base
            assert jump_.op_register(0) == instruction.op_register(0)
        elif instruction.is_jcx_short or instruction.is_loop:
            # near: over a jump, to a jump there
            over, there = next(given_), next(given_)
            assert branch_target(got) == there.ip
            assert branch_target(over) == there.next_ip
            assert branch_target(there) == branch_target(instruction)
        else:
            assert meaning(got) == meaning(instruction)
    assert list(itertools.islice(given_, 1)) == []
