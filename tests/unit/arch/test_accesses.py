"""Which memory instructions access."""

import pytest

from kgdbx.arch.accesses import Access, memory_accesses
from kgdbx.arch.registers import Registers

REGISTERS = {"rip": 0x1000, "rax": 0x10, "rdx": 0x2000, "rsp": 0x3000, "rdi": 0x4000}
REGISTERS |= {"rsi": 0x5000, "rcx": 3, "gs_base": 0xFFFF888000000000}


@pytest.mark.parametrize(
    ("code", "accesses"),
    [
        ("8902", [(0x2000, 4, True)]),  # mov %eax,(%rdx)
        ("8b448208", [(0x2048, 4, False)]),  # mov 8(%rdx,%rax,4),%eax
        ("50", [(0x2FF8, 8, True)]),  # push %rax
        ("488b0510000000", [(0x1017, 8, False)]),  # mov 0x10(%rip),%rax
        ("6548ff0510000000", [(0xFFFF888000001018, 8, True)]),  # incq %gs:0x10(%rip)
        ("f348a5", [(0x4000, 8, True), (0x5000, 8, False)]),  # rep movsq: one element
        ("01c2", []),  # add %eax,%edx
    ],
)
def test_accesses(code: str, accesses: list[tuple[int, int, bool]]) -> None:
    found = memory_accesses(bytes.fromhex(code), Registers(dict(REGISTERS)))
    assert list(found) == [Access(*each) for each in accesses]


def test_overlaps() -> None:
    access = Access(0x2000, 4, writes=True)
    assert access.overlaps(0x2003, 1)
    assert access.overlaps(0x1FF8, 16)
    assert not access.overlaps(0x2004, 4)
    assert not access.overlaps(0x1FFC, 4)


def test_a_register_that_is_not_there_is_no_zero() -> None:
    registers = Registers({"rip": 0x1000})
    with pytest.raises(AttributeError, match="not available"):
        memory_accesses(bytes.fromhex("8902"), registers)
