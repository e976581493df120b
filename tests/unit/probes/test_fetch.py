"""Evaluation over a small C program's types and a page of made-up memory."""

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import drgn
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kgdbx.errors import KgdbxError, MemoryFault, ProbeError, SymbolError
from kgdbx.probes.definition import parse_definition
from kgdbx.probes.evaluate import compile_condition, evaluate, locate
from kgdbx.probes.expression_parser import parse_expression
from kgdbx.probes.fetch import compile_fields
from kgdbx.probes.value import MAX_STRING_BYTES, FieldValue, Hex, Unreadable

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")

SOURCE = """
typedef unsigned char u8; typedef unsigned int u32; typedef int pid_t;
enum color { RED, GREEN = 5 };
struct dentry { const unsigned char *name; char iname[8]; };
struct file {
    struct dentry *dentry; int flags; unsigned low : 3, high : 5; u8 raw[4]; short nums[2];
    enum color color; _Bool ok; double rate; int (*open)(struct file *); char *names[2];
    struct { pid_t pid; } owner;
};
struct file first; unsigned long jiffies; void *any;
int use(struct file *file) { return file->flags + first.flags; }
"""

KERNEL = 0xFFFF888000000000
USER = 0x400000
FILE, DENTRY, LONG, EDGE = KERNEL, KERNEL + 0x100, KERNEL + 0x200, KERNEL + 0xFF8
JIFFIES = KERNEL + 0x800
OPEN = 0xFFFFFFFF81000010


def _page() -> bytes:
    page = bytearray(0x1000)
    struct.pack_into(
        "<QiB4sxhh2xI?3xdQQQi",  # struct file
        page,
        0,
        DENTRY,
        -2,
        5 | 17 << 3,
        b"\1\2\3\xff",
        7,
        -7,
        5,
        True,
        0.5,
        OPEN,
        DENTRY + 8,
        USER,
        42,
    )
    page[0x100:0x110] = struct.pack("<Q8s", KERNEL + 0x180, b"short")
    page[0x180:0x18A] = b"a name\xff\0xx"
    page[0x200:0x400] = b"x" * 0x200
    page[0x800:0x808] = struct.pack("<Q", 0x1122334455667788)
    page[0xFF8:] = b"no end!!"
    return bytes(page)


class FakeScope:
    """Two pages of memory, a few variables, and a function's registers."""

    def __init__(self, program: drgn.Program) -> None:
        self.program = program
        self.pages = {KERNEL: _page(), USER: b"user text\0".ljust(0x1000, b"\0")}
        self.registers = {"di": FILE, "si": USER, "ax": 2**64 - 2}
        self.variables = {
            "file": drgn.Object(program, "struct file *", FILE),
            "text": drgn.Object(program, "char *", USER),
            "bad": drgn.Object(program, "struct file *", 0x10),
            "null": drgn.Object(program, "struct file *", 0),
            "gone": drgn.Object(program, "int"),
            "count": drgn.Object(program, "int", 7),
            "first": drgn.Object(program, "int", 1),
            "pair": drgn.Object(program, "char [4]", b"ab"),
        }
        self.reads = 0

    def variable(self, name: str) -> drgn.Object:
        return self.variables[name]

    def register(self, name: str) -> int:
        return self.registers[name]

    def special(self, name: str, index: int | None) -> drgn.Object | int | str:
        if name == "retval":
            return drgn.Object(self.program, "long", -2)
        if name == "stack":
            return DENTRY if index is None else 0x1000 + index
        return {"comm": "bash", "pid": 123, "cpu": 1, "arg": 2**64 - 1}[name]

    def symbol(self, name: str) -> drgn.Object:
        types = {"jiffies": ("unsigned long", JIFFIES), "first": ("struct file", FILE)}
        return drgn.Object(self.program, types[name][0], address=types[name][1])

    def read_kernel(self, address: int, size_bytes: int) -> bytes:
        return self._read(address, size_bytes, True)

    def read_user(self, address: int, size_bytes: int) -> bytes:
        return self._read(address, size_bytes, False)

    def _read(self, address: int, size_bytes: int, kernel: bool) -> bytes:
        self.reads += 1
        page = self.pages.get(address & ~0xFFF)
        offset = address & 0xFFF
        if page is None or offset + size_bytes > 0x1000 or kernel != (address >= 2**63):
            raise MemoryFault(address, size_bytes)
        return page[offset : offset + size_bytes]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> drgn.Program:
    directory: Path = tmp_path_factory.mktemp("types")
    source, path = directory / "types.c", directory / "types.o"
    source.write_text(SOURCE)
    subprocess.run(["gcc", "-g", "-c", source, "-o", path], check=True)
    program = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    program.extra_module("types", create=True).try_file(path, force=True)
    page = _page()
    program.add_memory_segment(
        KERNEL, len(page), lambda address, count, offset, physical: page[offset : offset + count]
    )
    program.register_symbol_finder("fake", _find_symbol, enable_index=0)
    return program


def _find_symbol(
    program: drgn.Program, name: str | None, address: int | None, one: bool
) -> list[drgn.Symbol]:
    if address is None or not OPEN - 0x10 <= address < OPEN + 0x20:
        return []
    kinds = drgn.SymbolBinding.GLOBAL, drgn.SymbolKind.FUNC
    return [drgn.Symbol("my_open", OPEN - 0x10, 0x30, *kinds)]


@pytest.fixture
def scope(program: drgn.Program) -> Iterator[FakeScope]:
    yield FakeScope(program)


def fetch(scope: FakeScope, *fields: str) -> dict[str, FieldValue]:
    return compile_fields(parse_definition("r f " + " ".join(fields)).fields)(scope)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 7),
        ("file->flags", -2),
        ("file.flags", -2),
        ("file->flags:x8", 0xFE),
        ("file->flags:u16", 0xFFFE),
        ("file->low", 5),
        ("file->high", 17),
        ("file->color", 5),
        ("file->ok", 1),
        ("file->raw", b"\1\2\3\xff"),
        ("file->raw:s8[4]", [1, 2, 3, -1]),
        ("file->raw:u8[2]", [1, 2]),
        ("file->nums", [7, -7]),
        ("file->nums[1]", -7),
        ("file->owner.pid", 42),
        ("file->owner", "{ .pid = 42, }"),
        ("file->dentry->iname", "short"),
        ("file->dentry->iname:string", "short"),
        ("file->dentry->iname:char[3]", ["s", "h", "o"]),
        ("file->dentry->name:string", "a name\\xff"),
        ("file->names:string[2]", ["short", "user text"]),
        ("file->names[1]:string", "user text"),
        ("file", FILE),
        ("file:u8", 0),
        ("file:u8[1]", [DENTRY & 0xFF]),
        ("file->open:symbol", "my_open+0x10/0x30"),
        ("file:symbol", hex(FILE)),
        ("text", USER),
        ("text:string", "user text"),
        ("text:ustring", "user text"),
        ("pair", "ab"),
        ("pair:string", "ab"),
        ("pair:u8[2]", [97, 98]),
        ("%di", FILE),
        ("%di:s32", -(FILE & 0x80000000) + (FILE & 0x7FFFFFFF)),
        ("%si:string", "user text"),
        ("%ax:s64", -2),
        ("%ax:b4@1/8", 15),
        ("+8(%di)", 0x0302018D_FFFFFFFE),
        ("+8(%di):s32", -2),
        ("+12(%di):b5@3/8", 17),
        ("+u0(%si):string", "user text"),
        ("+0(%si):string", "user text"),
        ("+8(+0(%di)):string", "short"),
        ("+8(file->dentry):string", "short"),
        ("+48(%di):string[2]", ["short", "user text"]),
        ("-0x100(+0(%di)):x64", DENTRY),
        ("@jiffies", 0x1122334455667788),
        ("@jiffies+4:x16", 0x3344),
        (f"@{JIFFIES:#x}:x8[2]", [0x88, 0x77]),
        ("$stack", DENTRY),
        ("$stack2", 0x1002),
        ("+8($stack):string", "short"),
        ("$retval", -2),
        ("$comm", "bash"),
        ("$comm:string", "bash"),
        ("$pid", 123),
        ("$arg1", 2**64 - 1),
        ("\\5", 5),
        ('\\"text"', "text"),
        ("GREEN", 5),
        ("NULL", 0),
        ("sizeof(struct dentry)", 16),
        ("sizeof(*bad)", 72),
        ("&file->flags", FILE + 8),
        ("((struct file *)%di)->flags", -2),
        ("(u8)count-8", -1),
        ("first", 1),
        ("count?file->flags:0", -2),
    ],
)
def test_fields(scope: FakeScope, field: str, value: FieldValue) -> None:
    assert list(fetch(scope, f"x={field}").values()) == [value]


def test_addresses_and_registers_are_shown_in_hexadecimal(scope: FakeScope) -> None:
    for field in ("file", "text", "%di", "+0(%di)", "@jiffies", "$stack", "$stack1", "count:x8"):
        (value,) = fetch(scope, field).values()
        assert isinstance(value, Hex)
        assert f"{value}" == str(value) == hex(value)
    for field in ("count", "file->flags", "%di:u64", "$pid"):
        (value,) = fetch(scope, field).values()
        assert not isinstance(value, Hex)


def test_a_fault_leaves_the_other_fields(scope: FakeScope) -> None:
    assert fetch(
        scope, "bad->flags", "count", "+4(bad)", "bad:string", "null->dentry->iname", "gone"
    ) == {
        "bad->flags": Unreadable(0x18),
        "count": 7,
        "+4(bad)": Unreadable(0x14),
        "bad": Unreadable(0x10),
        "null->dentry->iname": Unreadable(0),
        "gone": Unreadable(None, "'gone' is optimized out here"),
    }
    assert str(Unreadable(0x18)) == "(fault)"


def test_long_strings_are_cut_and_marked(scope: FakeScope) -> None:
    text = f"+0({LONG:#x}):string"
    assert list(fetch(scope, text).values()) == ["x" * MAX_STRING_BYTES + "..."]


def test_a_string_that_runs_into_an_unreadable_page_is_a_fault(scope: FakeScope) -> None:
    assert fetch(scope, f"x=@{EDGE:#x}:string") == {"x": Unreadable(KERNEL + 0x1000)}


def test_memory_is_read_once_for_a_short_string(scope: FakeScope) -> None:
    fetch(scope, "text:string")
    assert scope.reads == 1


@pytest.mark.parametrize(
    ("condition", "value"),
    [
        ("$retval < 0", True),
        ("$retval == -2", True),
        ("%ax == -2", True),  # as in C: -2 becomes unsigned
        ("%ax < 0", False),
        ("(long)%ax < 0", True),
        ("count > 5 && count <= 7", True),
        ("count == 6 || !count", False),
        ("count / 2 == 3 && -count / 2 == -3 && -count % 4 == -3", True),
        ("count & 4 | 8", True),
        ("1 << 3 == 8 && 0x80000000 >> 31 == 1", True),
        ("0 - 1U > 0", True),
        ("file", True),
        ("!null", True),
        ("null == 0 && file != 0 && null == NULL", True),
        ("file == %di && file > 0xffff000000000000", True),
        ("file & 0xfff", False),
        ("file + 1 == (struct file *)%di + 1", True),
        ("(char *)&file->flags - (char *)file == 8", True),
        ("*&file->flags == -2 && (count ? 3 : 4) == 3", True),
        ("bad && bad == 0x10", True),
        ("null && null->flags", False),
        ("!null || null->flags", True),
        ("file->color == GREEN", True),
        ("file->raw[3] == 255", True),
        ('$comm == "bash"', True),
        ('$comm != "bash"', False),
        ('"bash" == $comm', True),
        ('$comm ~ "ba*" && !($comm ~ "*z*")', True),
        ('$comm ~ "b[a-c]s?"', True),
        ('$comm ~ "a"', False),
        ('text == "user text"', True),
        ('file->dentry->iname == "short"', True),
        ('file->dentry->iname ~ "sh*"', True),
        ('+8(file->dentry) == "short"', True),
        ('%si ~ "user*"', True),
        ('(count ? $comm : "x") == "bash"', True),
        ("sizeof(count) == 4", True),
        ("(first == 1) + (count == 7) == 2", True),
    ],
)
def test_conditions(scope: FakeScope, condition: str, value: bool) -> None:
    assert compile_condition(parse_expression(condition))(scope) is value


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("bad->flags", MemoryFault, "cannot read 1 bytes at virtual address 0x18"),
        ("bad->flags == 1", MemoryFault, "cannot read 1 bytes at virtual address 0x18"),
        ("+0(bad)", MemoryFault, "cannot read 8 bytes at virtual address 0x10"),
        ('bad == "x"', MemoryFault, "cannot read 256 bytes at virtual address 0x10"),
        ("gone + 1", SymbolError, "'gone + 1' is optimized out here"),
        ("nope", SymbolError, "no variable, symbol or constant 'nope' here"),
        ("@nope", ProbeError, "cannot evaluate '@nope': nope"),
        ("count / 0", ProbeError, "cannot evaluate 'count / 0': division by zero"),
        ("count->x", ProbeError, "cannot evaluate 'count->x': 'int' is not a structure, union,"),
        ("file->x", ProbeError, "cannot evaluate 'file->x': 'struct file' has no member 'x'"),
        ("*file + 1", ProbeError, "cannot evaluate '*file + 1': invalid operands to binary +"),
        ("(struct nope *)file", ProbeError, "cannot evaluate '(struct nope *)file': could not"),
        ("&5", ProbeError, "cannot evaluate '&5': cannot take address of value"),
        ("$vars", ProbeError, "cannot evaluate '$vars': vars"),
    ],
)
def test_errors(scope: FakeScope, text: str, error: type[KgdbxError], message: str) -> None:
    with pytest.raises(error) as caught:
        evaluate(parse_expression(text), scope)
    assert type(caught.value) is error
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("jiffies", (JIFFIES, 8)),
        ("@jiffies", (JIFFIES, None)),
        ("file->flags", (FILE + 8, 4)),
        ("&file->flags", (FILE + 8, 4)),
        ("*file", (FILE, 72)),
        ("file", (FILE, 72)),
        ("+8(%di)", (FILE + 8, None)),
        ("%di+8", (FILE + 8, None)),
        (f"{JIFFIES:#x}", (JIFFIES, None)),
        ("(void *)%di", (FILE, None)),
    ],
)
def test_locate(scope: FakeScope, text: str, place: tuple[int, int | None]) -> None:
    assert locate(parse_expression(text), scope) == place


def test_closures_follow_the_program(program: drgn.Program, scope: FakeScope) -> None:
    condition = compile_condition(parse_expression("count == 7 && sizeof(int) == 4"))
    other = FakeScope(program)
    other.program = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    other.variables = {"count": drgn.Object(other.program, "int", 8)}
    assert [condition(scope), condition(other), condition(scope)] == [True, False, True]


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
def test_division_truncates_as_in_c(program: drgn.Program, a: int, b: int) -> None:
    assume(b != 0 and (a, b) != (-(2**31), -1))
    scope = FakeScope(program)
    scope.variables |= {"a": drgn.Object(program, "int", a), "b": drgn.Object(program, "int", b)}
    quotient = evaluate(parse_expression("a / b"), scope).value_()
    assert quotient == abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    assert evaluate(parse_expression("a % b"), scope).value_() == a - b * quotient


OPERANDS = (
    "file first bad gone count text pair null 1 -1 0x7fffffffffffffff %di %si $stack $comm $pid "
    '@jiffies (*file) "s" GREEN nope sizeof(int) +8(%di) -8(%si) +u0(text) file->dentry'
)
OPERATORS = "+ - * / % << >> & | ^ == != < >= && ||"
FORMS = "-{} ~{} !{} (u8){} (struct\tfile\t*){} ({})->flags ({}).raw ({})[1] ({})->nope use({}) {}"
expressions = st.recursive(
    st.sampled_from(OPERANDS.split(" ")),
    lambda inner: st.one_of(
        st.builds(str.format, st.sampled_from(FORMS.split(" ")), inner),
        st.builds("({0}{1}{2})".format, inner, st.sampled_from(OPERATORS.split(" ")), inner),
        st.builds("({0}?{1}:{2})".format, inner, inner, inner),
    ),
    max_leaves=5,
)


@given(expressions)
def test_evaluation_raises_nothing_foreign(program: drgn.Program, text: str) -> None:
    scope = FakeScope(program)
    try:
        (field,) = parse_definition(f"r f x={text}:s32 if {text}").fields
        expr = parse_expression(text)
    except KgdbxError:
        return
    compile_fields([field, parse_definition(f"r f y={text}").fields[0]])(scope)
    for use in (compile_condition(expr), lambda scope: locate(expr, scope)):
        try:
            use(scope)
        except KgdbxError:
            continue
