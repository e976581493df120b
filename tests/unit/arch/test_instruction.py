import errno

import pytest

from kgdbx.arch.instruction import (
    MAX_INSTRUCTION_BYTES,
    boundaries,
    branch_target,
    decode,
    decode_all,
    format_instruction,
    instruction_length,
    is_boundary,
)
from kgdbx.errors import ProbeError

START = 0xFFFF_FFFF_8100_0000

# A function as the kernel runs it: ftrace NOP, frame, BUG() with code after it, return.
FUNCTION = bytes.fromhex(
    "0f1f440000"  # +0   nopl
    "55"  # +5   push %rbp
    "4889e5"  # +6   mov %rsp,%rbp
    "0f0b"  # +9   ud2
    "e900010000"  # +11  jmp
    "c3"  # +16  ret
)
OFFSETS = [0, 5, 6, 9, 11, 16]


def test_boundaries() -> None:
    assert boundaries(FUNCTION, START) == [START + offset for offset in OFFSETS]


def test_is_boundary() -> None:
    found = [n for n in range(-2, 20) if is_boundary(FUNCTION, START, START + n)]
    assert found == OFFSETS


def test_no_code_has_no_boundaries() -> None:
    assert boundaries(b"", START) == []
    assert not is_boundary(b"", START, START)


@pytest.mark.parametrize("tail", ["06", "e80000", "0f", "66" * 20, "c4e2"])
def test_undecodable_bytes_end_the_walk(tail) -> None:
    code = FUNCTION + bytes.fromhex(tail)
    seen = []
    with pytest.raises(ProbeError, match=rf"^no instruction at {START + 17:#x}: ") as caught:
        seen.extend(i.ip for i in decode_all(code, START))
    assert caught.value.errno == errno.EINVAL
    # Addresses before the bad bytes are known, those behind are not.
    assert is_boundary(code, START, START + 16)
    assert not is_boundary(code, START, START + 15)
    with pytest.raises(ProbeError):
        is_boundary(code, START, START + len(code) - 1 if len(tail) > 2 else START + 17)


@pytest.mark.parametrize(
    ("code", "length"),
    [("90", 1), ("0f1f440000", 5), ("66666666662e0f1f840000000000", 14), ("48b8" + "11" * 8, 10)],
)
def test_instruction_length(code, length) -> None:
    assert instruction_length(bytes.fromhex(code) + b"\xcc" * MAX_INSTRUCTION_BYTES) == length


def test_nothing_is_no_instruction() -> None:
    with pytest.raises(ProbeError, match=r"^no instruction at 0x10: nothing; "):
        decode(b"", 0x10)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("0f1f440000", "nopl (%rax,%rax,1)"),
        ("f30f1efa", "endbr64"),
        ("488b4708", "mov 0x8(%rdi),%rax"),
        ("65488b042528000000", "mov %gs:0x28,%rax"),
        ("488b0500100000", "mov 0x1000(%rip),%rax # 0xffffffff81001007"),
        ("e8fb0f0000", "call 0xffffffff81001000"),
        ("74fe", "je 0xffffffff81000000"),
        ("4883ec18", "sub $0x18,%rsp"),
        ("f0480fc107", "lock xadd %rax,(%rdi)"),
        ("f348ab", "rep stos %rax,(%rdi)"),
        ("0f0b", "ud2"),
    ],
)
def test_format(code, text) -> None:
    assert format_instruction(decode(bytes.fromhex(code), START)) == text


@pytest.mark.parametrize(
    ("code", "target"),
    [
        ("e8fb0f0000", START + 0x1000),
        ("ebfe", START),
        ("7400", START + 2),
        ("ffd0", None),
        ("c3", None),
    ],
)
def test_branch_target(code, target) -> None:
    assert branch_target(decode(bytes.fromhex(code), START)) == target
