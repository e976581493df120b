"""The parser, its text and its refusals; the trees themselves are made by Hypothesis."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kgdbx.errors import DefinitionError
from kgdbx.probes.expression import (
    SPECIALS,
    AtSymbol,
    Binary,
    Cast,
    Dereference,
    Expr,
    Index,
    Literal,
    Member,
    Name,
    Register,
    SizeOf,
    SizeOfType,
    Special,
    String,
    Ternary,
    Unary,
    format_expression,
    is_text,
    walk,
)
from kgdbx.probes.expression_parser import parse_expression
from kgdbx.probes.lexer import literal_type

A, B, C = Name("a"), Name("b"), Name("c")

names = st.sampled_from(("a", "file", "u4", "u32", "loff_t", "x8", "r", "w", "string", "ifx"))
types = st.sampled_from(("struct file *", "u32", "unsigned long", "const char **", "loff_t", "foo"))
symbols = st.sampled_from(("jiffies", "init_task", "key.12", "u8"))
offsets = st.integers(-(2**63) + 1, 2**63 - 1) | st.integers(-9, 9)


@st.composite
def _literals(draw: st.DrawFn) -> Literal:
    value = draw(st.integers(0, 300) | st.integers(0, 2**64 - 1))
    decimal, unsigned, long = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    return Literal(value, literal_type(value, decimal and value <= 9999, unsigned, long))


texts = st.one_of(
    st.builds(String, st.text()),
    st.just(Special("comm")),
)
leaves = st.one_of(
    _literals(),
    st.builds(Name, names),
    st.builds(Register, st.sampled_from(("di", "ax", "r8", "flags", "ss"))),
    st.sampled_from((Special("pid"), Special("stack"), Special("stack", 3), Special("arg", 1))),
    st.builds(AtSymbol, symbols, st.just(0) | offsets),
    st.builds(SizeOfType, types.filter(lambda name: name != "foo")),
    st.builds(Binary, st.just("~"), texts, st.builds(String, st.text())),
    st.builds(Binary, st.sampled_from(("==", "!=")), texts, texts),
    st.builds(Ternary, st.builds(Name, names), st.just(A), st.just(B)),
    st.builds(Unary, st.just("!"), texts),
)


def _nodes(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    operators = "|| && | ^ & == != < <= > >= << >> + - * / %"
    return st.one_of(
        st.builds(Unary, st.sampled_from("-+!~*&"), inner),
        st.builds(Binary, st.sampled_from(operators.split()), inner, inner),
        st.builds(Binary, st.sampled_from(("==", "!=", "&&", "||")), texts, inner),
        st.builds(Ternary, inner, inner, inner),
        st.builds(Member, inner, names, st.booleans()),
        st.builds(Index, inner, inner),
        st.builds(Cast, types, inner),
        st.builds(SizeOf, inner),
        st.builds(Dereference, inner, offsets, st.booleans()),
    )


expressions = st.recursive(leaves, _nodes, max_leaves=12)


@given(expressions, st.booleans())
def test_text_parses_to_the_same_tree(expr: Expr, spaces: bool) -> None:
    text = format_expression(expr, spaces=spaces)
    assert parse_expression(text) == expr
    assert format_expression(parse_expression(text), spaces=spaces) == text


@given(expressions)
def test_walk_finds_columns_inside_the_text(expr: Expr) -> None:
    text = format_expression(expr)
    nodes = list(walk(parse_expression(text)))
    assert nodes == list(walk(expr))
    assert all(0 <= node.column < len(text) for node in nodes)


PIECES = (
    "a file u4 0x1f 017 09 5UL %di %zz $comm $arg1 $arg $x @sym @0x1 +4( +u8( -0( ( ) [ ] -> . "
    "&& || & | ^ ~ ! = == != < <= << >> + - * / % ? : 'x' ' \" \"s\" \\ \\5 sizeof struct (u8) "
    "(struct\tfile\t*) (a) if é \0"
)


@given(st.lists(st.sampled_from([*PIECES.split(" "), " "])).map("".join) | st.text())
def test_any_text_parses_or_is_refused_with_a_column(text: str) -> None:
    try:
        expr = parse_expression(text)
    except DefinitionError as e:
        assert e.text == text
        assert 0 <= e.column <= len(text)
    else:
        assert parse_expression(format_expression(expr)) == expr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a+b*c", Binary("+", A, Binary("*", B, C))),
        ("a - b - c", Binary("-", Binary("-", A, B), C)),
        ("a & b == c", Binary("&", A, Binary("==", B, C))),
        ("a || b && c", Binary("||", A, Binary("&&", B, C))),
        ("a ? b : c ? a : b", Ternary(A, B, Ternary(C, A, B))),
        ("-a->b[c]", Unary("-", Index(Member(A, "b", True), C))),
        ("*a.b", Unary("*", Member(A, "b"))),
        ("(struct file *)a->b", Cast("struct file *", Member(A, "b", True))),
        ("((struct file*) a)->b", Member(Cast("struct file *", A), "b", True)),
        ("(const struct file * *)a", Cast("const struct file **", A)),
        ("(u8)-1", Cast("u8", Unary("-", Literal(1)))),
        ("(pid_t)*a", Cast("pid_t", Unary("*", A))),
        ("(a)-1", Binary("-", A, Literal(1))),
        ("(a)*b", Binary("*", A, B)),
        ("(a)b", Cast("a", B)),
        ("(a *)b", Cast("a *", B)),
        ("(a_t) != b", Binary("!=", Name("a_t"), B)),
        ("(a_t) && b", Binary("&&", Name("a_t"), B)),
        ("(u32)%di % a", Binary("%", Cast("u32", Register("di")), A)),
        ("a%%di", Binary("%", A, Register("di"))),
        ("a%b", Binary("%", A, B)),
        ("%rdi", Register("di")),
        ("%eflags", Register("flags")),
        ("%r8", Register("r8")),
        ("$stack", Special("stack")),
        ("$stack0", Special("stack", 0)),
        ("$arg2", Special("arg", 2)),
        ("+4($stack)", Dereference(Special("stack"), 4)),
        ("-0x10(%si)", Dereference(Register("si"), -16)),
        ("+010(%si)", Dereference(Register("si"), 8)),
        ("+u8(+0(%di))", Dereference(Dereference(Register("di")), 8, True)),
        ("a+ +4(%di)", Binary("+", A, Dereference(Register("di"), 4))),
        ("a++4(%di)", Binary("+", A, Dereference(Register("di"), 4))),
        ("@jiffies", AtSymbol("jiffies")),
        ("@jiffies-8", AtSymbol("jiffies", -8)),
        ("@jiffies - 8", Binary("-", AtSymbol("jiffies"), Literal(8))),
        ("(@jiffies)-8", Binary("-", AtSymbol("jiffies"), Literal(8))),
        ("@0x10", Dereference(Literal(16))),
        ("\\5", Literal(5)),
        ("\\-5", Unary("-", Literal(5))),
        ("\\+5", Literal(5)),
        ('\\"a b"', String("a b")),
        ("sizeof(struct file)", SizeOfType("struct file")),
        ("sizeof(u64) * 2", Binary("*", SizeOfType("u64"), Literal(2))),
        ("sizeof(a)", SizeOf(A)),
        ("sizeof *a", SizeOf(Unary("*", A))),
        ("'a'", Literal(97)),
        (r"'\n'", Literal(10)),
        (r'$comm == "a\"b\x41\101\t"', Binary("==", Special("comm"), String('a"bAA\t'))),
        ('$comm ~ "ba*"', Binary("~", Special("comm"), String("ba*"))),
        ("!$comm", Unary("!", Special("comm"))),
    ],
)
def test_trees(text: str, expected: Expr) -> None:
    assert parse_expression(text) == expected


@pytest.mark.parametrize(
    ("text", "type_name"),
    [
        ("0", "int"),
        ("2147483647", "int"),
        ("2147483648", "long"),
        ("0x80000000", "unsigned int"),
        ("037777777777", "unsigned int"),
        ("4294967296", "long"),
        ("0x8000000000000000", "unsigned long"),
        ("9223372036854775808", "unsigned long"),
        ("1u", "unsigned int"),
        ("1L", "long"),
        ("1ull", "unsigned long"),
        ("4294967296U", "unsigned long"),
        ("0b101", "int"),
    ],
)
def test_literals_have_the_type_c_gives_them(text: str, type_name: str) -> None:
    literal = parse_expression(text)
    assert isinstance(literal, Literal)
    assert literal.type_name == type_name


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("", "expected a variable, number, %register, $name or parentheses, found the end", 0),
        ("a +", "expected a variable, number, %register, $name or parentheses, found the end", 3),
        ("a b", "expected an operator or the end, found 'b'", 2),
        ("(a", "expected ')', found the end", 2),
        ("a[1", "expected ']', found the end", 3),
        ("a ? b", "expected ':', found the end", 5),
        ("a->", "expected the name of a member, found the end", 3),
        ("+4(a", "expected ')', found the end", 4),
        ("%foo", "expected a register such as %di, %rdi or %r8, found '%'", 0),
        ("$arg0", "expected $arg1, $arg2, ...", 0),
        ("$comm1", "expected one of " + " ".join(f"${name}" for name in SPECIALS), 0),
        ("0x1ffffffffffffffff", "the number does not fit into 64 bits", 0),
        ("089", "'089' is not a number; a leading 0 is octal", 0),
        ("12ab", "expected a number such as 12, 0x1f or 017", 0),
        ('a == "x', "the string has no closing quote", 5),
        (r'"\q"', r"unknown escape '\q'", 1),
        ("'ab'", "expected one ASCII character in single quotes", 0),
        ("$comm + 1", "a string takes no '+'; compare it with ==, != or ~", 6),
        ('"a"[0]', "a string takes no '[]'; compare it with ==, != or ~", 3),
        ("+0($comm)", "a string takes no 'dereference'; compare it with ==, != or ~", 0),
        ("a ~ b", "'~' compares with a pattern in double quotes", 2),
        ('a ? b : "c"', "'?:' has a string on one side only", 2),
        ("@+4", "expected a symbol or an address, found '+'", 1),
        ("\\x", "expected a number or a string, found 'x'", 1),
        ("if", "expected a variable, number, %register, $name or parentheses, found 'if'", 0),
        ("(" * 5000, "the expression is too long", 50),
        ("a" + "+a" * 5000, "the expression is too long", 400),
        ("a" + ".a" * 5000, "the expression is too long", 401),
        ("-" * 5000, "the expression is too long", 50),
        ("a[" * 5000, "the expression is too long", 100),
        ("a?" * 5000, "the expression is too long", 400),
        ("(a||b&&c|d^e&" * 5000, "the expression is too long", 433),
    ],
)
def test_refusals_say_what_was_expected_and_where(text: str, message: str, column: int) -> None:
    with pytest.raises(DefinitionError) as caught:
        parse_expression(text)
    assert str(caught.value).splitlines()[0] == message
    assert caught.value.column == column


def test_text() -> None:
    assert is_text(parse_expression('a ? $comm : "b"'))
    assert not is_text(parse_expression('$comm == "b"'))
