"""The C of nullify, replace and C handlers, without a guest."""

import errno
from pathlib import Path

import pytest

from kgdbx.errors import ProbeError
from kgdbx.resident.compile.decision import HANDLER, Decision, jump_to, return_at_once
from kgdbx.resident.compile.kernel_facts import KernelFacts
from kgdbx.resident.compile.link import CompileError, LinkError, Object, compile_unit
from kgdbx.resident.compile.stub import StubCall, site_stub
from kgdbx.resident.compile.unit import Unit
from kgdbx.resident.compile.user_code import compile_handler, entry_of
from kgdbx.resident.nullify import parse_retval

NAMES = ("CURRENT", "CPU_NUMBER", "PREEMPT_COUNT", "TASK_PID", "TASK_COMM", "GUARD", "WINDOW")
FACTS = KernelFacts(
    "".join(f"#define {n} 0x40UL\n" for n in (*NAMES, "WINDOW_BYTES", "TSC_HZ", "NS_PER_TICK"))
)
CODE, DATA = 0xFFFFFFFFF0000000, 0xFFFFFFFFF0100000


def unit_of(*decisions: Decision) -> tuple[Unit, list[int]]:
    unit = Unit(FACTS)
    return unit, [unit.decision(d, "user_1") for d in decisions]


def compiled(source: str, path: Path) -> Object:
    path.write_text(source)
    return compile_handler(path, None)


@pytest.mark.parametrize(
    "decision",
    [
        Decision(return_at_once(-errno.EPERM)),
        Decision(jump_to(0xFFFFFFFF81000000), "\treturn c->di > 3;", callers=((16, 8), (64, 1))),
        Decision(jump_to()),
        Decision(HANDLER, calls_kernel=True),
    ],
)
def test_text_compiles_and_links(decision: Decision) -> None:
    unit, (number,) = unit_of(decision)
    unit.add(site_stub(1, [StubCall(CODE, number, CODE)], 16))
    found = compile_unit(unit.text, flags=("-Werror",))
    assert {f"decide_{number}", "site_1", "tail_1"} <= found.defined
    assert set(found.undefined) <= {"user_1"}
    linked = found.link(CODE, DATA, lambda name: CODE + 0x1000)
    assert linked.symbols == found.addresses(CODE, DATA)


def test_equal_decisions_share_a_handler() -> None:
    _, numbers = unit_of(*(Decision(return_at_once(n)) for n in (0, -1, 0)))
    assert numbers == [0, 1, 0]


def test_data_of_a_handler_is_apart_from_its_code(tmp_path: Path) -> None:
    source = 'int a = 7, b;\nstatic const char text[] = "x";\nconst char *p = text;\n'
    source += "int handler(struct pt_regs *regs) { b += a; return kgdbx_return(regs, *p); }\n"
    found = compiled(source, tmp_path / "a.c")
    linked = found.link(CODE, DATA, lambda name: None)
    assert CODE <= linked.symbols["handler"] < CODE + found.code_bytes
    for name in "abp":
        assert DATA <= linked.symbols[name] < DATA + found.data_bytes
    at = linked.symbols["p"] - DATA
    assert int.from_bytes(linked.data[at : at + 8], "little") - CODE < found.code_bytes
    assert linked.data[linked.symbols["a"] - DATA] == 7


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.c"
    with pytest.raises(CompileError, match=rf"{path}:2:28: error: "):
        compiled("\nint handler(void) { return nothing; }\n", path)
    with pytest.raises(LinkError, match="no symbol one, two"):
        compiled(
            "int one(void), two(void);\nint handler(void) { return one() + two(); }\n", path
        ).link(CODE, DATA, lambda name: None)


def test_entry(tmp_path: Path) -> None:
    path = tmp_path / "a.c"
    assert entry_of(compiled("int handler(void) { return 0; }", path), path, "f") == "handler"
    assert entry_of(compiled("long f(void) { return 0; }", path), path, "f") == "f"
    both = compiled("long f(void) { return 0; } long replacement(void) { return f(); }", path)
    with pytest.raises(ProbeError, match=r"replacement\(\) and f\(\)"):
        entry_of(both, path, "f")
    with pytest.raises(ProbeError, match=r"neither handler\(\) nor replacement\(\) nor g\(\)"):
        entry_of(compiled("static int unused;", path), path, "g")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-1", -1),
        ("0xffffffffffffffff", (1 << 64) - 1),
        ("-ENOMEM", -errno.ENOMEM),
        ("EPROBE_DEFER", 517),
        ("-ERESTARTSYS", -512),
        ("NULL", 0),
        ("true", 1),
    ],
)
def test_return_values(text: str, value: int) -> None:
    assert parse_retval(text) == value


@pytest.mark.parametrize("text", ["-EFOO", "x", "", "-", "0x10000000000000000", "--1", "errorcode"])
def test_no_return_values(text: str) -> None:
    with pytest.raises(ProbeError):
        parse_retval(text)
