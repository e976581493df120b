"""Parameter locations against what gcc's calls really pass."""

import random
import shutil
import subprocess
from collections.abc import Sequence

import pytest

from kgdbx.arch.calling import Location, Parameter, ParameterKind, locate_parameters

INTEGER, STRUCT = ParameterKind.INTEGER, ParameterKind.STRUCT
FLOAT, MEMORY = ParameterKind.FLOAT, ParameterKind.MEMORY

# C type to its descriptor. Structures are arrays of bytes in disguise, so their bytes can be named.
TYPES = {
    "char": Parameter(1),
    "short": Parameter(2),
    "int": Parameter(4),
    "long": Parameter(8),
    "void *": Parameter(8),
    "__int128": Parameter(16, INTEGER, 16),
    "struct s1": Parameter(1, STRUCT),
    "struct s8": Parameter(8, STRUCT),
    "struct s12": Parameter(12, STRUCT, 4),
    "struct s16": Parameter(16, STRUCT),
    "struct s24": Parameter(24, STRUCT),
    "struct s40": Parameter(40, STRUCT),
    "struct aligned32": Parameter(32, STRUCT, 16),
    "struct packed9": Parameter(9, MEMORY, 1),
    "struct empty": Parameter(0, STRUCT),
}

PROLOGUE = r"""
#include <stdio.h>
#include <string.h>
struct s1 { char a; };
struct s8 { int a; short b; char c; };
struct s12 { int a, b, c; };
struct s16 { void *a; long b; };
struct s24 { long a, b, c; };
struct s40 { long a, b, c, d, e; };
struct aligned32 { long a, b, c; } __attribute__((aligned(16)));
struct packed9 { char a; long b; } __attribute__((packed));
struct empty { };
struct big { long a, b, c; };

/* Six argument registers, then the stack from the return address on. */
unsigned char seen[6 * 8 + 512];
void record(void);
__asm__(
    ".pushsection .text\nrecord:\n"
    "mov %rdi, seen(%rip)\n mov %rsi, seen+8(%rip)\n mov %rdx, seen+16(%rip)\n"
    "mov %rcx, seen+24(%rip)\n mov %r8, seen+32(%rip)\n mov %r9, seen+40(%rip)\n"
    "push %rdi\n"
    "lea 8(%rsp), %rsi\n lea seen+48(%rip), %rdi\n mov $512, %ecx\n rep movsb\n"
    "pop %rax\n"  /* what a function that returns in memory returns */
    "ret\n.popsection\n");
static void fill(void *to, int size, int seed)
{
    for (int i = 0; i < size; i++) ((unsigned char *)to)[i] = seed + 7 * i;
}
static void show(void)
{
    for (unsigned i = 0; i < sizeof seen; i++) printf("%02x", seen[i]);
    printf("\n");
}
"""

REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")


def _pattern(size: int, seed: int) -> bytes:
    return bytes((seed + 7 * i) % 256 for i in range(size))


def _case(number: int, types: Sequence[str], returns_memory: bool) -> str:
    lines = [f"static void case{number}(void) {{"]
    for n, name in enumerate(types):
        lines.append(f"{name} v{n}; fill(&v{n}, sizeof v{n}, {37 * n + 11});")
    result = "struct big" if returns_memory else "void"
    arguments = ", ".join(f"v{n}" for n in range(len(types)))
    call = f"(({result} (*)({', '.join(types) or 'void'}))record)({arguments});"
    lines.append(f"struct big b = {call} (void)b;" if returns_memory else call)
    lines.append("show(); }")
    return "\n".join(lines)


def _taken(recorded: bytes, location: Location, size: int) -> bytes:
    if location.stack_offset_bytes is not None:
        return recorded[48 + location.stack_offset_bytes :][:size]
    words = [recorded[8 * REGISTERS.index(name) :][:8] for name in location.registers]
    return b"".join(words)[:size]


@pytest.mark.parametrize("optimize", ["-O0", "-O2"])
def test_like_gcc(optimize, tmp_path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    rng = random.Random(optimize)
    cases: list[tuple[list[str], bool]] = [([name] * 8, False) for name in TYPES]
    for _ in range(200):
        types = [rng.choice(list(TYPES)) for _ in range(rng.randrange(11))]
        cases.append((types, rng.random() < 0.25))
    body = [_case(n, *case) for n, case in enumerate(cases)]
    calls = " ".join(f"case{n}();" for n in range(len(cases)))
    source = tmp_path / "calls.c"
    source.write_text("\n".join([PROLOGUE, *body, f"int main(void) {{ {calls} return 0; }}"]))
    program = tmp_path / "calls"
    command = ["gcc", "-w", optimize, "-fcf-protection=none", "-o", str(program), str(source)]
    subprocess.run(command, check=True, timeout=120)
    output = subprocess.run([program], check=True, timeout=20, capture_output=True, text=True)
    records = [bytes.fromhex(line) for line in output.stdout.split()]
    assert len(records) == len(cases)
    for (types, returns_memory), recorded in zip(cases, records, strict=True):
        parameters = [TYPES[name] for name in types]
        locations = locate_parameters(parameters, returns_memory=returns_memory)
        for n, (parameter, location) in enumerate(zip(parameters, locations, strict=True)):
            if parameter.size_bytes == 0:
                assert location is None
                continue
            assert location is not None
            if types[n] == "struct s8":
                size = 7  # the eighth byte is padding
            else:
                size = 24 if types[n] == "struct aligned32" else parameter.size_bytes
            got = _taken(recorded, location, size)
            assert got == _pattern(size, 37 * n + 11), (types, returns_memory, n, location)


def test_first_six_integers_are_in_registers() -> None:
    found = locate_parameters([Parameter(8)] * 8)
    assert found[:6] == [Location((name,)) for name in REGISTERS]
    assert found[6:] == [Location(stack_offset_bytes=8), Location(stack_offset_bytes=16)]


def test_a_pair_is_not_torn() -> None:
    found = locate_parameters([Parameter(8)] * 5 + [Parameter(16, STRUCT), Parameter(4)])
    assert found[5:] == [Location(stack_offset_bytes=8), Location(("r9",))]


def test_room_for_the_result_takes_the_first_register() -> None:
    assert locate_parameters([Parameter(8)], returns_memory=True) == [Location(("rsi",))]


def test_vector_registers_are_out_of_reach() -> None:
    found = locate_parameters([Parameter(8, FLOAT), Parameter(8)])
    assert found == [None, Location(("rdi",))]


def test_no_parameters() -> None:
    assert locate_parameters([]) == []
