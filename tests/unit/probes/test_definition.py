"""One line of the grammar to a definition and back; odd lines are refused with a column."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kgdbx.errors import DefinitionError
from kgdbx.probes.aggregation import Aggregation
from kgdbx.probes.definition import ProbeDefinition, format_definition, parse_definition
from kgdbx.probes.expression import (
    AtSymbol,
    Binary,
    Dereference,
    Expr,
    Index,
    Literal,
    Member,
    Name,
    Register,
    Special,
    format_expression,
    is_text,
)
from kgdbx.probes.expression_parser import parse_expression
from kgdbx.probes.field import FetchType, Field, expand_fields

EXPRESSIONS = (
    "dfd filename how->flags %di +4($stack) +u8(+0(%si)) @jiffies @jiffies+8 @0xffffffff81000000 "
    '$comm $pid $stack2 file->f_path.dentry->d_name.name count*2 a&(&b) a?b:c "x" sizeof(*file) '
    '(struct/file/*)%di $comm=="a/b" (u32)x+1 5 r w rw'
)
expressions = st.sampled_from(
    [parse_expression(text.replace("/", " ")) for text in EXPRESSIONS.split(" ")]
)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,9}", fullmatch=True)
functions = st.sampled_from(("vfs_read", "foo.isra.0", "f.cold", "__x64_sys_open"))
globs = st.sampled_from(("vfs_*", "*", "do_?ys", "[a-c]d[!x]*", "tcp_[rs]*_skb"))
bit_fields = st.sampled_from((1, 2, 4, 8)).flatmap(
    lambda size: st.builds(
        FetchType, st.just("b"), st.just(size), st.integers(0, 8 * size - 3), st.integers(1, 3)
    )
)
counts = st.none() | st.integers(1, 64)
fetch_types = st.one_of(
    st.builds(FetchType, st.sampled_from("usx"), st.sampled_from((1, 2, 4, 8)), count=counts),
    st.builds(FetchType, st.sampled_from(("string", "ustring", "symbol")), count=counts),
    st.builds(FetchType, st.just("char"), st.just(1), count=counts),
    bit_fields,
)


@st.composite
def _fields(draw: st.DrawFn, is_return: bool) -> tuple[Field, ...]:
    fields = {}
    for expr in draw(st.lists(expressions, max_size=4)):
        type_ = draw(st.none() | fetch_types)
        is_memory = isinstance(expr, Dereference | AtSymbol | Member | Name)
        if is_text(expr) or (type_ is not None and type_.count and not is_memory):
            type_ = None
        name = draw(st.none() | names) or format_expression(expr, spaces=False)
        fields[name] = Field(name, expr, type_)
    if is_return:
        fields["$retval"] = Field("$retval", Special("retval"), FetchType("s", 4))
    return tuple(fields.values())


@st.composite
def definitions(draw: st.DrawFn) -> ProbeDefinition:
    kind = draw(st.sampled_from("prw-"))
    name, group = draw(st.none() | names), draw(st.none() | names)
    if kind == "-":
        return ProbeDefinition("-", group, name or "x")
    values = {"fields": draw(_fields(kind == "r")), "condition": draw(st.none() | expressions)}
    if kind == "w":
        watches = expressions.filter(lambda expr: not is_text(expr))
        values["watch"] = draw(watches)
        values["size_bytes"] = draw(st.none() | st.sampled_from((1, 2, 4, 8, 24)))
        values["access"] = draw(st.sampled_from(("r", "w", "rw")))
        return ProbeDefinition("w", group, name, **values)
    if draw(st.booleans()):
        values["address"] = draw(st.integers(0, 2**64 - 1))
    else:
        values["module"] = draw(st.none() | st.sampled_from(("ext4", "snd-pcm", "r", "_x")))
        values["function"] = draw(functions | globs)
        place = draw(st.sampled_from(("entry", "offset", "line")))
        if kind == "p" and not any(c in values["function"] for c in "*?["):
            values["offset_bytes"] = draw(st.integers(1, 2**31 - 1)) if place == "offset" else 0
            values["line"] = draw(st.integers(0, 9999)) if place == "line" else None
    if kind == "r":
        values["maxactive"] = draw(st.integers(0, 4096))
    return ProbeDefinition(kind, group, name, **values)


@given(definitions())
def test_text_parses_to_the_same_definition(definition: ProbeDefinition) -> None:
    text = format_definition(definition)
    parsed = parse_definition(text)
    assert parsed == definition
    assert parsed.text == text == format_definition(parsed)


PIECES = (
    "p r w - p: r20: w:x -:g/n :x g/n f mod: f:12 f+0x10 +4 %return 0xffffffff81000000 vfs_* [a a "
    "x=%di %di @s+4 +0(%si) :string :u8 :x8[4] :b4@2/8 $kstack :8 $retval $vars $comm if "
    "@[ @a[$comm] = count() hist( ] "
    '(a + b) ( ) " \' \\ "s" = == 4096 99999999999999999999 é \0 \n \t r rw'
)


@given(st.lists(st.sampled_from([*PIECES.split(" "), " ", " "])).map("".join) | st.text())
def test_any_text_parses_or_is_refused_with_a_column(text: str) -> None:
    try:
        definition = parse_definition(text)
    except DefinitionError as e:
        assert e.text == text.strip()
        assert 0 <= e.column <= len(e.text)
        assert "\n" not in str(e).split("\n  ")[0]
    else:
        assert parse_definition(format_definition(definition)) == definition


def probe(kind: str, function: str, *fields: tuple[str, Expr] | Field, **rest) -> ProbeDefinition:
    each = tuple(f if isinstance(f, Field) else Field(*f) for f in fields)
    return ProbeDefinition(kind, function=function, fields=each, **rest)


DI, SI, RETVAL = Register("di"), Register("si"), Special("retval")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "p:myprobe do_sys_open dfd=%ax filename=%dx flags=%cx mode=+4($stack)",
            probe(
                "p",
                "do_sys_open",
                ("dfd", Register("ax")),
                ("filename", Register("dx")),
                ("flags", Register("cx")),
                ("mode", Dereference(Special("stack"), 4)),
                name="myprobe",
            ),
        ),
        (
            "r:myretprobe do_sys_open $retval",
            probe("r", "do_sys_open", ("$retval", RETVAL), name="myretprobe"),
        ),
        (
            "p:n mod:func+0x10 arg1=%di name=+0(%si):string",
            probe(
                "p",
                "func",
                ("arg1", DI),
                Field("name", Dereference(SI), FetchType("string")),
                name="n",
                module="mod",
                offset_bytes=16,
            ),
        ),
        (
            "r20:x do_sys_openat2 $retval:s32 if $retval < 0",
            probe(
                "r",
                "do_sys_openat2",
                Field("$retval", RETVAL, FetchType("s", 4)),
                name="x",
                maxactive=20,
                condition=Binary("<", RETVAL, Literal(0)),
            ),
        ),
        ("p:g/n f%return", probe("r", "f", group="g", name="n")),
        ("p:g.n f", probe("p", "f", group="g", name="n")),
        ("p:g/ f", probe("p", "f", group="g")),
        ("r f%return", probe("r", "f")),
        ("r f+0", probe("r", "f")),
        ("p\tf  \t a", probe("p", "f", ("a", Name("a")))),
        ("p f:12", probe("p", "f", line=12)),
        ("p m:f:0", probe("p", "f", line=0, module="m")),
        ("p foo.constprop.0+017", probe("p", "foo.constprop.0", offset_bytes=15)),
        ("p f $kstack", probe("p", "f", ("$kstack", Special("kstack")))),
        (
            "r f at=$kstack:8",
            probe("r", "f", ("at", Special("kstack"), FetchType("kstack", 8, count=8))),
        ),
        (
            "p f @[$comm,len] = hist(count) if count > 1",
            probe(
                "p",
                "f",
                condition=Binary(">", Name("count"), Literal(1, "int")),
                aggregation=Aggregation(
                    "",
                    (Field("$comm", Special("comm")), Field("len", Name("len"))),
                    "hist",
                    Name("count"),
                ),
            ),
        ),
        (
            "r f @ns [ k=a[1]:x8 ]=lhist( $duration_ns, -0x10, 32, 8 )",
            probe(
                "r",
                "f",
                aggregation=Aggregation(
                    "ns",
                    (Field("k", Index(Name("a"), Literal(1, "int")), FetchType("x", 1)),),
                    "lhist",
                    Special("duration_ns"),
                    (-16, 32, 8),
                ),
            ),
        ),
        ("p f @=count()", probe("p", "f", aggregation=Aggregation("", (), "count"))),
        ("p vfs_* $vars", probe("p", "vfs_*", ("$vars", Special("vars")))),
        ("p f if(a)", probe("p", "f", condition=Name("a"))),
        ("p f ifx", probe("p", "f", ("ifx", Name("ifx")))),
        ("p f x=a==b", probe("p", "f", ("x", Binary("==", Name("a"), Name("b"))))),
        ("p f a==b", probe("p", "f", ("a==b", Binary("==", Name("a"), Name("b"))))),
        (
            "p f (a + b):u8",
            probe("p", "f", Field("a+b", parse_expression("a+b"), FetchType("u", 1))),
        ),
        (
            "p f a?b:c:x8[3]",
            probe("p", "f", Field("a?b:c", parse_expression("a?b:c"), FetchType("x", 1, count=3))),
        ),
        ("p f a:b4@2/32", probe("p", "f", Field("a", Name("a"), FetchType("b", 4, 2, 4)))),
        ("p f $comm:string", probe("p", "f", Field("$comm", Special("comm"), FetchType("string")))),
        ("p 0xffffffff81234567", ProbeDefinition("p", address=0xFFFFFFFF81234567)),
        ("w:jif jiffies", ProbeDefinition("w", name="jif", watch=Name("jiffies"))),
        (
            "w init_task.comm:8 w",
            ProbeDefinition("w", watch=Member(Name("init_task"), "comm"), size_bytes=8),
        ),
        (
            "w jiffies :8 rw r if $cpu",
            ProbeDefinition(
                "w",
                watch=Name("jiffies"),
                size_bytes=8,
                access="rw",
                fields=(Field("r", Name("r")),),
                condition=Special("cpu"),
            ),
        ),
        (
            "w 0xffffffff81234567:4",
            ProbeDefinition("w", watch=Literal(0xFFFFFFFF81234567, "unsigned long"), size_bytes=4),
        ),
        ("-:n", ProbeDefinition("-", name="n")),
        ("-:g/n", ProbeDefinition("-", group="g", name="n")),
    ],
)
def test_definitions(text: str, expected: ProbeDefinition) -> None:
    assert parse_definition(text) == expected
    assert parse_definition(format_definition(expected)) == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("p func", "p_func_0"),
        ("r func", "r_func_0"),
        ("p func+0x10", "p_func_16"),
        ("p func:3", "p_func_L3"),
        ("p foo.isra.0", "p_foo_isra_0_0"),
        ("p mod:func", "p_mod_func_0"),
        ("p 0xffffffff81234567", "p_0xffffffff81234567"),
        ("w init_task.comm:8", "w_init_task_comm"),
        ("p:own func", "own"),
        ("p " + "f" * 100, "p_" + "f" * 61),
    ],
)
def test_default_names_are_those_of_kprobe_events(text: str, name: str) -> None:
    assert parse_definition(text).event_name == name


def test_default_group() -> None:
    assert parse_definition("p f").event_group == "kprobes"
    assert parse_definition("p:mine/x f").event_group == "mine"


def test_globs() -> None:
    assert parse_definition("p vfs_[rw]*").is_glob
    assert not parse_definition("p vfs_read.cold").is_glob
    assert not parse_definition("p 0x10").is_glob


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("", "expected a probe that starts with p, r, w or -, found the end", 0),
        ("x f", "expected a probe that starts with p, r, w or -, found 'x'", 0),
        ("p", "expected a function or an address, found the end", 1),
        ("p:", "expected an event name, found the end", 2),
        ("p:1 f", "expected an event name, found '1'", 2),
        ("p:g/1 f", "expected an event name, found '1'", 4),
        ("p:a-b f", "expected a space after the event name, found '-'", 3),
        ("p:" + "n" * 64 + " f", "a name has at most 63 characters", 2),
        ("p5:x f", "only a return probe (r) takes a maxactive", 1),
        ("r4097 f", "maxactive is at most 4096", 1),
        ("r99999999999999999999 f", "maxactive is at most 4096", 1),
        ("p f\nq", "expected one definition on one line", 3),
        ("p +4", "expected a function or an address, found '+'", 2),
        ("p f+", "expected an offset in bytes, found the end", 4),
        ("p f-4", "expected +offset, :line, %return or a space, found '-'", 3),
        ("p f+0xfffffffff", "the number is too large", 4),
        ("p mod: f", "expected a line number, found a space", 6),
        ("p f%ret", "expected +offset, :line, %return or a space, found '%'", 3),
        ("r f+4", "a return probe is for a whole function", 3),
        ("p f:4%return", "a return probe is for a whole function", 3),
        ("p f*+4", "a pattern takes no offset and no line", 4),
        ("p f[a", "expected +offset, :line, %return or a space, found '['", 3),
        ("p f a:u7", "expected a type", 6),
        ("p f a:u8x", "expected a type", 6),
        ("p f a:u8[0]", "an array has 1 to 64 elements", 9),
        ("p f a:u8[65]", "an array has 1 to 64 elements", 9),
        ("p f a:b9@0/8", "the bits do not fit into 8", 6),
        ("p f %di:u8[4]", "an array is read from memory; write +0(%di):u8[4]", 8),
        ("p f $comm:u8", "a string takes the types string and ustring only", 10),
        ("p f a b=a a:string", "the name 'a' is already used; write other=a:string", 10),
        (
            "p f a + b",
            "expected a variable, number, %register, $name or parentheses, found a space; a field",
            7,
        ),
        ("p f a)", "expected an operator, ':' and a type, or a space, found ')'", 5),
        (
            "p f if",
            "expected a variable, number, %register, $name or parentheses, found the end",
            6,
        ),
        ("p f if a = b", "expected an operator or the end ('==' compares), found '='", 9),
        ("p f $retval", "$retval has a value in a return probe (r) only", 4),
        ("p f if 1 + $retval", "$retval has a value in a return probe (r) only", 11),
        ("p f+1 $arg1", "$arg1 has a value at the function's entry only", 6),
        ("w a $arg1", "$arg1 has a value at the function's entry only", 4),
        ("p f @[$comm] = mean(x)", "expected one of count sum min max avg hist lhist", 15),
        ("p f @ = sum()", "expected sum(EXPR)", 12),
        ("p f @ = count(x)", "expected count()", 14),
        ("p f @ = max(x", "this parenthesis is not closed", 11),
        ("p f @ = max($comm)", "a string is no number; make it a key", 12),
        ("p f @ = sum($retval)", "$retval has a value in a return probe (r) only", 12),
        ("p f a @ = count()", "an aggregation takes no fields; put them between its brackets", 6),
        ("p f @ = count() a", "an aggregation takes no fields; put them between its brackets", 16),
        ("p f @ = count() @a = count()", "a probe has one aggregation", 16),
        ("p f @[$vars] = count()", "$vars is no key", 6),
        ("p f @ = lhist(x,0,10,3)", "STEP has to divide MAX - MIN, and MAX be above MIN", 14),
        ("p f @ = lhist(x,0,y,3)", "expected a number", 18),
        ("p f if $duration_ns > 3", "$duration_ns has a value in a return probe (r) only", 7),
        ("p f $func:u8", "$func takes no type", 10),
        ("p f $kstack:128", "a stack has 1 to 127 frames: $kstack:8", 12),
        ("p f $kstack:u8", "a stack has 1 to 127 frames: $kstack:8", 12),
        ("p f if $kstack", "$kstack is a field of its own, not part of an expression", 7),
        ("p f x=$vars", "stands for several fields and takes no name and no type", 6),
        ("p f $vars:u8", "stands for several fields and takes no name and no type", 4),
        ("p f ($vars+1)", "$vars is a field of its own, not part of an expression", 5),
        ("p f" + " 1" * 2, "the name '1' is already used; write other=1", 6),
        ("p f" + "".join(f" {n}" for n in range(129)), "a probe has at most 128 fields", 406),
        ("w", "expected something to watch, found the end", 1),
        ("w a:0", "a watch has 1 to 4096 bytes", 4),
        ("w a:8,", "expected a space after the size, found ','", 5),
        ("w a)", "expected an operator, ':' and a size, or a space, found ')'", 3),
        ('w "a"', "a string has no memory to watch", 2),
        ("-", "expected ':' and the name of the probe to delete, found the end", 1),
        ("-:g/", "expected an event name, found the end", 4),
        ("-:n f", "expected the end, found 'f'", 4),
    ],
)
def test_refusals_say_what_was_expected_and_where(text: str, message: str, column: int) -> None:
    with pytest.raises(DefinitionError) as caught:
        parse_definition(text)
    lines = str(caught.value).split("\n  ")
    assert lines[0].startswith(message)
    assert caught.value.column == column


def test_fields_of_all_variables() -> None:
    fields = parse_definition("p f b:u8 $vars c=%di").fields
    expanded = expand_fields(fields, {"vars": ["a", "b", "c", "d"]})
    assert [each.name for each in expanded] == ["b", "a", "d", "c"]
    assert expanded[0].type == FetchType("u", 1)
    assert expanded[1] == Field("a", Name("a"))
