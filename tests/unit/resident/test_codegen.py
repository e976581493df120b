"""Generated C against fetch: the same definitions over the same made-up memory."""

import shutil
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kgdbx.probes.definition import parse_definition
from kgdbx.probes.value import Unreadable
from kgdbx.resident.compile.codegen import NotResident, generate
from kgdbx.symbols.elf import Symbol

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
    # drgn's objects of type _Bool
    pytest.mark.filterwarnings("ignore:__int__ returned non-int:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__index__ returned non-int:DeprecationWarning"),
]

KERNEL, JIFFIES, PAIR = 0xFFFF888000000000, 0xFFFF888000000800, 0xFFFF888000000900
KERNEL_FUNCTIONS = {
    "copy_from_kernel_nofault",
    "copy_from_user_nofault",
    "strncpy_from_kernel_nofault",
    "strncpy_from_user_nofault",
}


FIELDS = """
count small yes wide seventh file text eighth count:x8 count:s64 count:u16 count:b4@1/8 wide:x32
file->flags file.flags file->flags:x8 file->low file->high file->odd file->color file->ok
file->raw file->raw:s8[4] file->raw:u8[2] file->nums file->nums[1] file->nums[count+10] file->pid
file->wide file->wide+1 file->table file->table[small&3] file->dentry->iname
file->dentry->iname:string file->dentry->iname:char[3] file->dentry->name:string
file->dentry->name file->names:string[2] file->names[1]:string file->names:x64[2] file->flex
file->open file->open:symbol file:symbol file:u8[1] *file->dentry:u8[8] &file->flags
file->dentry->name[1] file->dentry->name[0]:char
eighth->a eighth->b eighth->c *eighth whole whole.a whole.b[1] &whole.c whole:u8[4] &seventh
(long)text text:string text:ustring text:u8[4] text:char
%di %si %ax:s64 %di:s32 %bx %r12 %sp %ip %flags %cs
+8(%di) +8(%di):s32 +12(%di):b5@3/8 +u0(%si):string +0(%si):string +8(+0(%di)):string
+8(file->dentry):string -0x100(+0(%di)):x64 +0(%si):u8[3] +u1(%si)
@jiffies @jiffies+4:x16 jiffies jiffies+1 @0xffff888000000800:x8[2] first.flags first.nums &first
first.dentry->iname @no_type no_type
$stack $stack0 $stack1 $stack2:s32 +8($stack):s16 $stack600 $comm $comm:string $pid $tgid $cpu
$pid:x8 $task $task->pid $task->file->flags $task->comm $task->last $arg1 $arg6 $arg3:s32
\\5 \\"text" GREEN MINUS NULL sizeof(struct\tdentry) sizeof(*file) sizeof(file->dentry->iname)
((struct\tfile\t*)%di)->flags ((struct\tpair\t*)(%di+0x900))->a (u8)count-8 (s8)count*3 -small
~small +small !count (count==-9)+1 count?file->flags:0 small?0:file->nums[0] count/small count%small
count/(small-0xff) file->nums[1]>>1 count<<small count>>40 small>>(count+9) 7-small&0xf
file+1 &file->table[2]-&file->table[0] text+count file->table+2 (_Bool)count (enum\tcolor)7
count&&file->flags file->dentry?file->dentry->iname[0]:0 yes?text:NULL
eighth:string[1] whole:s16[3] file->dentry->iname[1] *file->names[0] (*file).flags
&*file &file->nums[1] &first.nums[1] *&first.flags *(int*)&eighth->b
+0x300(%di):string +0xa00(%di):string +0(%di+1):u8
0x10 -1 1U (long)-1 1==1
""".splitlines()
BAD = """
((struct\tfile\t*)0x10)->flags ((struct\tfile\t*)0)->dentry->iname +4(\\0x10) +0xff9(%di)
+0xffd(%di):u32 ((struct\tfile\t*)0xffff888000001000)->raw +u0(%di)
((struct\tfile\t*)0xffff888000001000)->low @0xffff888000001000:string count/(small-255)
count%(small-255) count>>(small-256) 1<<count ((struct\tdentry\t*)file->dentry->name)->iname
"""
STRINGS_INTO_NOTHING = """
+0xff8(%di):string +4091(%si):string +0(\\0x1000):string eighth:string[2] (char*)0:string
"""
CONDITIONS = """
count < 0
count == -9 && file->flags == -2
%dx == -9
%dx < 0
(long)%dx < 0
count > small || wide
count < 1U
small < -1
yes
!yes || !count
file
!file->dentry
file == %di && file > 0xffff000000000000
file & 0xfff
file->dentry != 0 && file->dentry->iname[0] == 's'
file + 1 == (struct file *)%di + 1
(char *)&file->flags - (char *)file == 8
&file->table[0] - &file->table[3] == -3
file->color == GREEN
seventh == -2
eighth->a == -1 && eighth->b[1] == -3
whole.c == 6
jiffies > 1 && @jiffies & 8
((struct file *)8)->flags
((struct file *)8)->flags || 1
1 || ((struct file *)8)->flags
0 && ((struct file *)8)->flags
count / (small - 255)
count && 7 / count
(count ? file->flags : seventh) == -2
(count ? $arg1 : 0) > 5
$pid == 123 && $tgid == 120 && $cpu == 2
$task->file->flags == -2
$comm == "bash"
$comm == "bas"
$comm == "bash2"
$comm != "bash"
"bash" == $comm
$comm == "bash old"
$comm ~ "ba*" && !($comm ~ "*z*")
$comm ~ "b[a-c]s?"
$comm ~ "b[!a]sh"
$comm ~ "*a*h"
$comm ~ "*"
$comm ~ ""
$comm ~ "*sh*sh"
$comm ~ "ash"
$comm
text == "user text"
text == "user tex"
text == "user text2"
text == ""
text ~ "user*"
text ~ "*t?x*"
text ~ "*[x-z]t"
text
text != $comm
file->dentry->iname == "short"
file->dentry->iname ~ "sh*"
file->dentry->iname == "shortage"
file->dentry->iname == "longer than it"
file->dentry->name ~ "a name*"
file->dentry->name == (file->dentry->name ? "x" : "y")
$task->comm == $comm
file->names[0] == file->dentry->iname
+8(file->dentry) == "short"
+0x300(%di) ~ "x*..."
+0x300(%di) ~ "x*y"
+0xa00(%di) ~ "*y..."
+0xff8(%di) == "no end!!"
(count ? $comm : "x") == "bash"
("x" == (count ? $comm : "x"))
file->flex == "flexible"
file->dentry ? file->flags : 0
sizeof(count) == 4
(file->ok == 1) + (count == -9) == 2
(void *)0 == NULL
%bx == 0xb00b && %r12 == 0
"" == "" && !""
""".strip().splitlines()
RETURNS = """
$retval %ax %dx %bx %sp $arg1 $arg2:s32 $arg6 $comm $pid $stack
$stack1 $stack0:x32
"""


def words(*lines: str) -> list[str]:
    return [word.replace("\t", " ") for line in lines for word in line.split(" ") if word.strip()]


def test_fields_are_as_fetch_gives_them(guest: Any) -> None:
    guest.check([f"p f x=({f})" if " " in f else f"p f x={f}" for f in words(*FIELDS)])


def test_a_fault_leaves_the_other_fields(guest: Any) -> None:
    guest.check([f"p f a=count x={field} z=file->flags" for field in words(*BAD.splitlines())])


def test_a_string_that_runs_into_nothing_is_a_fault(guest: Any) -> None:
    # At a stop the address is that of the page that is missing.
    texts = [f"p f x={field} z=small" for field in words(*STRINGS_INTO_NOTHING.splitlines())]
    for native, fetched in guest.both(texts):
        for _, values in (native, fetched):
            assert isinstance(values["x"], Unreadable) and values["x"].reason == "fault"
            assert values["z"] == 255


def test_conditions(guest: Any) -> None:
    guest.check([f"p f x=count if {condition}" for condition in CONDITIONS])


@pytest.mark.parametrize(
    ("function", "more"),
    [
        (
            "two_words",
            "$retval.a $retval.b[1] $retval.c $retval:u8[2] pair.c color sign file->flags",
        ),
        ("pointer", "$retval:x8 $retval->flags $retval->raw file->dentry->iname"),
        ("words", "$retval:s32 a-1 p->c p:string"),
        ("unknown", "$retval+1"),
        ("entry", "seventh eighth->c whole.c whole text:string"),
    ],
)
def test_returns(guest: Any, function: str, more: str) -> None:
    guest.registers["rax"] = KERNEL
    texts = [f"r f x={each}" for each in words(*RETURNS.splitlines(), more)]
    guest.check([*texts, "r f $params if $arg1"], function)


def test_inside_a_function_registers_have_values(guest: Any) -> None:
    guest.check([f"p f+8 x={each}" for each in words("%di %ax %dx %ip %sp %flags $task $stack1")])


@pytest.mark.parametrize(
    ("text", "function", "reason"),
    [
        ("w jiffies", "entry", "a data watch has no instruction of its own"),
        ("p f+8 count", "entry", "where 'count' is at this address only a stop can find out"),
        ("p f nope", "entry", "there is no variable, symbol or constant 'nope'"),
        ("p f percpu", "entry", "'percpu' is a per-CPU variable"),
        ("p f @percpu", "entry", "'percpu' is a per-CPU variable"),
        ("p f file->rate", "entry", "a value of type 'double' does not fit into a register"),
        ("p f rate", "nothing", "there is no variable, symbol or constant 'rate'"),
        ("p f file->nope", "entry", "cannot evaluate 'file->nope': 'file_alias' has no member"),
        ("p f count->x", "entry", "cannot evaluate 'count->x': 'int' is not a structure, union,"),
        ("p f count/0", "entry", "cannot evaluate 'count / 0': division by zero"),
        ("p f *file", "entry", "'file_alias' has strings in other memory than its own"),
        ("p f file->names", "entry", "'char *[2]' has strings in other memory than its own"),
        ("p f &count", "entry", "cannot evaluate '&count': cannot take address of value"),
        ("p f +0(%di):string[64]", "entry", "a record of 16"),
        ("p f $arg7", "entry", "$arg7 is not in a register; give the parameter's name"),
        ("r f $retval", "nothing", "the function returns nothing"),
        ('p f (count?$comm:"x")', "entry", "'count ? $comm : \"x\"' is a string that"),
        ("p f (count?file:1)", "entry", "'count ? file : 1' has values of two types"),
        ("p f (count?1U:count)", "entry", "'count ? 1U : count' has values of two types"),
        ("p f (count?$arg1:0)-1", "entry", "the result of '?:' is of two types"),
        ("p f x=1 if (count?$arg1:0)>count", "entry", "the result of '?:' is of two types"),
        ("p f $pid:string", "entry", "$pid is no address"),
    ],
)
def test_what_must_run_on_the_stop_tier(guest: Any, text: str, function: str, reason: str) -> None:
    kernel: Any = guest.kernel
    with pytest.raises(NotResident) as caught:
        generate(parse_definition(text), kernel, guest.point(function, 8 * ("+8" in text)))
    assert str(caught.value).startswith(reason)


def test_a_comparison_reads_no_more_than_it_needs(guest: Any) -> None:
    # At a stop this is a fault: there a string is read as a whole.
    ((native, fetched),) = guest.both(['p f count if +0xff8(%di) == "no"'])
    assert (native[0], fetched[0]) == (0, -1)


def test_only_functions_of_the_kernel_are_linked(guest: Any) -> None:
    fields = words(*FIELDS, *BAD.splitlines(), *STRINGS_INTO_NOTHING.splitlines())
    texts = [f"p f x={field}" for field in fields if " " not in field]
    texts += [f"p f x=count if {condition}" for condition in CONDITIONS]
    texts += ["r f $params $retval $arg1 seventh"]
    assert guest.machine_code(*texts)[0] == KERNEL_FUNCTIONS


def test_arguments_are_plain_moves(guest: Any) -> None:
    text = "p f count file text:u64 $arg4:u8 $pid $comm if count > 5"
    used, code = guest.machine_code(text)
    assert not used
    assert [each.split()[0] for each in code] == words(
        "xor cmp setg ret",  # the condition
        "mov mov mov mov mov mov mov mov ret",  # the fields
        "ret",
    )


def test_what_is_always_mapped_is_read_directly(guest: Any) -> None:
    link = 0xFFFFFFFF82000000
    guest.kernel.globals["jiffies"] = ("unsigned long", link)
    guest.kernel.image[link] = Symbol("jiffies", link, 8, False, ".data")
    try:
        text = "p f @jiffies jiffies+1 $task->last $stack0 seventh whole.c if $task->pid == 1"
        assert not guest.machine_code(text)[0]
        assert guest.machine_code("p f @jiffies+4")[0]
        guest.kernel.image[link] = Symbol("jiffies", link, 8, False, ".init.data")
        assert guest.machine_code(text)[0]
    finally:
        guest.kernel.globals["jiffies"] = ("unsigned long", JIFFIES)
        guest.kernel.image.clear()


INTEGERS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 2, 31, 63, 64, 127, 128, 255, 1 << 31, 1 << 63]),
)
NAMES = st.sampled_from(
    words("a b c d e f p->a p->b[1] p->c (s8)a (u16)b (_Bool)c 1 -1 7 2U 31 3L")
)


def expressions() -> st.SearchStrategy[str]:
    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        signs = st.sampled_from(words("+ - * / % << >> & | ^ == != < <= > >= && ||"))
        casts = st.sampled_from(words("- ~ ! + (u8) (s16) (u32) (s64) (_Bool)"))
        binary = st.tuples(inner, signs, inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
        ends = st.sampled_from(["(s64)", ""])
        choice = st.tuples(inner, inner, ends, inner).map(
            lambda t: f"({t[0]} ? (s64){t[1]} : {t[2]}{t[3]})"
        )
        return binary | choice | st.tuples(casts, inner).map(lambda t: f"{t[0]}({t[1]})")

    return st.recursive(NAMES, larger, max_leaves=8)


def is_resident(guest: Any, text: str, function: str) -> bool:
    kernel: Any = guest.kernel
    try:
        generate(parse_definition(text), kernel, guest.point(function))
    except NotResident:
        return False
    return True


SLOW = settings(
    max_examples=4,
    phases=[Phase.explicit, Phase.generate],  # each step of shrinking would compile again
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)


@SLOW
@given(
    st.lists(expressions(), min_size=40, max_size=40),
    st.lists(st.tuples(*[INTEGERS] * 4), min_size=6, max_size=6),
)
def test_integers_are_as_drgns(guest: Any, texts: list[str], inputs: list[tuple[int, ...]]) -> None:
    texts = [f"r f x=({text}) y=({text}):x32 if {text}" for text in texts]
    texts = [text for text in texts if is_resident(guest, text, "words")]
    guest.check_with(
        texts,
        "words",
        [
            dict(zip(("rdi", "rsi", "rdx", "rcx"), values, strict=True)) | {"r8": PAIR}
            for values in inputs
        ],
    )


@SLOW
@given(
    st.lists(st.tuples(*[st.text("ab*?[]!-\xe9", max_size=7)] * 2), min_size=40, max_size=40),
)
def test_patterns_are_as_fnmatch_has_them(guest: Any, pairs: list[tuple[str, str]]) -> None:
    texts = []
    for index, (text, pattern) in enumerate(pairs):
        if not text.isascii() and set(pattern) & {"?", "["}:
            continue
        raw = text.encode() + b"\0"
        at = 0x400 + 0x20 * index
        guest.kernel.pages[1][at : at + len(raw)] = raw
        quoted = pattern.replace("\\", "\\\\")
        texts.append(f'p f x=1 if (char *)((u64)$task + {at}) ~ "{quoted}"')
    if texts:
        guest.check(texts)
