"""The C of handlers: what calls a condition, fills a record or adds to a map."""

from kgdbx.resident.compile.codegen import Body
from kgdbx.resident.compile.stub import return_stub
from kgdbx.resident.ring import Stream
from kgdbx.resident.table import Table

__all__ = ("bell_text", "handler_text")

_CONDITION = """\
static __always_inline int condition_{n}(const struct context *c)
{{
{condition}
}}
"""
_FILL = """\
static __always_inline void fill_{n}(const struct context *c, u8 *rec)
{{
{fill}
}}
"""

_SUM_UP = """\
static __always_inline int sum_up_{n}(const struct context *c, struct table *tables, u32 places)
{{
{fill}
}}
"""

_ENTRY_CONTEXT = """\
{{
		.di = di, .si = si, .dx = dx, .cx = cx, .r8 = r8, .r9 = r9,{frame}
		.task = current_task(), .cpu = current_cpu(),
	}}"""

# Our frame, the return to the stub, and pp lie below it. Not for nothing: it takes a frame pointer.
_SP = """
		.sp = (u64)__builtin_frame_address(0) + 24,"""
_ENTRY_STACK = """
		.pc = p->point, .bp = *(u64 *)__builtin_frame_address(0),"""
_RETURN_STACK = """
		.pc = true_return(slot->ret_addr), .bp = *(u64 *)__builtin_frame_address(0),"""
_PLACE = """
		.ip = p->point,"""
_DURATION = """
		.duration_ns = ticks_ns(read_tsc() - slot->tsc),"""

_RECORD = """\
	{record} *record;
	u64 seq;

{enter}{filter}	if (pass <= 0)
		goto out;
	record = ({record} *)reserve({stream}, &seq);
	if (unlikely(!record))
		goto out;
	fill_header({header}, p, c.task, seq, read_tsc());
{more}	fill_{n}(&c, (u8 *)record);
	commit({header}, seq);
out:
{leave}"""

_ADD = """\
{enter}{filter}	if (pass > 0 && sum_up_{n}(&c, {table}) < 0)
		count_fault(p);
{leave}"""

_EVALUATE = """\
	pass = condition_{n}(&c);
	if (unlikely(pass < 0))
		count_fault(p);
"""

_ENTRY = """\
__handler void handler_{n}(u64 di, u64 si, u64 dx, u64 cx, u64 r8, u64 r9, u64 pp)
{{
	struct probe *p = (struct probe *){pp};
	const struct context c = {context};
	int pass{passed};

{core}	return;
}}
"""

# Called before the handler: gcc saves all the registers that a function may need at its start, and
# a hit that is dropped shall not pay for those of the rest. It passes a hit by the lowest bit of
# pp, which lies on the stack.
_FILTER = """\
__handler void filter_{n}(u64 di, u64 si, u64 dx, u64 cx, u64 r8, u64 r9, u64 pp)
{{
	struct probe *p = (struct probe *)pp;
	const struct context c = {context};
	int pass;

	count_hit(p);
{filter}	if (unlikely(pass > 0))
		__asm__ volatile("incq %0" : "+m"(pp)::"cc");
}}
"""
_FULL = """\
u64 decide_{n}(const struct regs *regs, struct probe *p)
{{
	const struct context c = {{
		.di = regs->di, .si = regs->si, .dx = regs->dx, .cx = regs->cx, .r8 = regs->r8,
		.r9 = regs->r9, .sp = regs->sp, .regs = regs, .task = current_task(),
		.cpu = current_cpu(), .pc = p->point, .ip = p->point,
	}};
	int pass;

{core}	return 0;
}}
"""

_RETURN = """\
__handler void handler_{n}(u64 di, u64 si, u64 dx, u64 cx, u64 r8, u64 r9, u64 pp)
{{
	struct probe *p = (struct probe *)pp;
	const struct context entry = {context}, *c = &entry;
	struct slot *slot = hook_return(p, c);

	if (unlikely(!slot))
		return;
{saves}	arm_return(slot, c);
}}
__handler void return_{n}(struct slot *slot, u64 ax, u64 rdx, u64 *place)
{{
	struct probe *p = slot->probe;
	const struct context c = {{
		.ax = ax, .rdx = rdx, .sp = (u64)(place + 1), .saved = slot->saved,{frame}
		.task = current_task(), .cpu = current_cpu(),
	}};
	int pass;

	*place = slot->ret_addr;
{core}	release_slot(slot);
}}
"""

_ENTER = "\tif (!enter_handler(p))\n\t\tgoto missed;\n"
_LEAVE = "\tleave_handler();\nmissed:\n"
_RETURN_HEADER = """\
	record->ret_addr = true_return(slot->ret_addr);
	record->entry_tsc = slot->tsc;
"""

_BELL = """\
u64 decide_{n}(struct regs *regs, struct probe *p)
{{
	return ring_bell((struct bell *){bells:#x}UL, (u64 *){watched:#x}UL, regs, p);
}}
"""


def bell_text(number: int, bells: int, watched: int) -> str:
    """C of the handler that has the host look at a hit.

    :param bells: address of the first CPU's ``struct bell``
    :param watched: address of the word that the host watches
    """
    return _BELL.format(n=number, bells=bells, watched=watched)


def handler_text(number: int, kind: str, body: Body, to: Stream | Table) -> str:
    """C of the handler for a body, and assembly of its return stub if it has one.

    :param number: of the handler
    :param kind: ``p``, ``r`` or ``full``; see :meth:`~kgdbx.resident.compile.unit.Unit.handler`
    :param to: where its records go, or what its hits are summed up in
    """
    is_return = kind == "r"
    stub = return_stub(number) if is_return else ""
    if body.handlers:
        return body.handlers.replace("@N@", str(number)) + stub
    text = f"{body.condition}{body.fill}{body.saves}"
    walks, times = "save_stack(" in text, "c->duration_ns" in text
    is_filtered = kind == "p" and body.filters_first
    evaluate = _EVALUATE.format(n=number)
    names = {
        "n": number,
        "filter": "" if is_filtered else evaluate,
        "enter": _ENTER if body.calls_kernel else "",
        "leave": _LEAVE if body.calls_kernel else "",
    }
    if isinstance(to, Stream):
        core = _RECORD.format(
            **names,
            record="struct return_record" if is_return else "struct record",
            header="&record->common" if is_return else "record",
            more=_RETURN_HEADER if is_return else "",
            stream=to.arguments,
        )
    else:
        core = _ADD.format(**names, table=to.arguments)
    entry = _SP if walks or is_return or "c->sp" in text else ""
    if not is_return:
        entry += _ENTRY_STACK if walks else ""
        entry += _PLACE if "c->ip" in text else ""
    parts = _CONDITION + (_FILL if isinstance(to, Stream) else _SUM_UP)
    fragments = parts.format(n=number, condition=body.condition or "\treturn 1;", fill=body.fill)
    context = _ENTRY_CONTEXT.format(frame=entry)
    if is_filtered:
        fragments += _FILTER.format(n=number, context=context, filter=evaluate)
    handlers = {"p": _ENTRY, "full": _FULL, "r": _RETURN}[kind].format(
        n=number,
        core=core if is_filtered else f"\tcount_hit(p);\n{core}",
        pp="(pp - 1)" if is_filtered else "pp",
        passed=" = 1" if is_filtered else "",
        context=context,
        frame=(_RETURN_STACK if walks else "")
        + (_PLACE if "c->ip" in text else "")
        + (_DURATION if times else ""),
        saves="".join(f"\tslot->saved[{n}] = {e};\n" for n, e in enumerate(body.saves)),
    )
    return fragments + handlers + stub
