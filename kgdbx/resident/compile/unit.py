"""The C text of probes: prelude, handlers, and the stubs that functions jump to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

import drgn

from kgdbx.errors import SymbolError
from kgdbx.resident.compile.codegen import Body
from kgdbx.resident.compile.decision import Decision
from kgdbx.resident.ring import Stream
from kgdbx.resident.table import Table
from kgdbx.symbols.kernel import Kernel

__all__ = ("KernelFacts", "RETURN_STUB_BYTES", "STACK_SOURCE", "StubCall", "Unit")

RETURN_STUB_BYTES = 16

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

STACK_SOURCE = """\
u32 kgdbx_stack(const struct regs *regs, u64 *to, u32 size)
{
	return CALLED(walk_stack(regs, current_task(), to, size));
}
"""
"""What a user's handler calls to have its call stack."""

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
# Addresses of ours that are left below the stack are taken away, as CALLED() does it in prelude.h.
_SITE = """\
	push ${probe}
	call handler_{handler}
	movq $0, -8(%rsp)
	lea 8(%rsp), %rsp
"""
_FILTERED_SITE = """\
	push ${probe}
	call filter_{handler}
	testb $1, (%rsp)
	jz 1f
	call handler_{handler}
1:	movq $0, -8(%rsp)
	lea 8(%rsp), %rsp
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

_RETURN_STUB = """\
__asm__(".text\\n"
	"return_stub_{n}:\\n"
	"	push %rdi\\n	push %rsi\\n	push %rdx\\n	push %rcx\\n"
	"	mov 32(%rsp), %rdi\\n	mov %rax, %rsi\\n	lea 32(%rsp), %rcx\\n"
	"	call return_{n}\\n	movq $0, -8(%rsp)\\n"
	"	pop %rcx\\n	pop %rdx\\n	pop %rsi\\n	pop %rdi\\n"
	"	ret\\n");
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
	ring_bell((struct bell *){bells:#x}UL, (u64 *){watched:#x}UL, regs, p);
	return 0;
}}
"""

# A stub that keeps all registers as struct pt_regs (struct regs) and asks decide_N(regs, probe)
# what to do: 0 to go on, else to go on as the registers say now. Interrupts are off meanwhile.
_FULL_SITE = """\
	lea -0x28(%rsp), %rsp
	pushfq
	push %rdi
	push %rsi
	push %rdx
	push %rcx
	push %rax
	push %r8
	push %r9
	push %r10
	push %r11
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	cli
	cld
	mov 0x78(%rsp), %rax
	mov %rax, 0x90(%rsp)
	movq $-1, 0x78(%rsp)
	lea 0xa8(%rsp), %rax
	mov %rax, 0x98(%rsp)
	movq $0x10, 0x88(%rsp)
	movq $0x18, 0xa0(%rsp)
	movq ${address}, 0x80(%rsp)
	mov %rsp, %rdi
	mov ${probe}, %rsi
	call decide_{handler}
	movq $0, -8(%rsp)
	test %rax, %rax
	jnz 1f
	movq $2f, 0x80(%rsp)
1:	mov 0x98(%rsp), %rdx
	mov 0x80(%rsp), %rax
	mov 0x90(%rsp), %rcx
	mov %rax, -8(%rdx)
	mov %rcx, -16(%rdx)
	lea -16(%rdx), %rdx
	mov %rdx, 0x78(%rsp)
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
	pop %rbx
	pop %r11
	pop %r10
	pop %r9
	pop %r8
	pop %rax
	pop %rcx
	pop %rdx
	pop %rsi
	pop %rdi
	mov (%rsp), %rsp
	popfq
	ret
2:	movq $0, -8(%rsp)
	movq $0, -0x28(%rsp)
"""


@dataclass(frozen=True)
class StubCall:
    """What a site's stub calls.

    :ivar probe: address of the ``struct probe``
    :ivar handler: number of the handler
    :ivar address: of the site, if the handler wants all registers, otherwise None
    :ivar filtered: whether the handler has a filter in front
    """

    probe: int
    handler: int
    address: int | None = None
    filtered: bool = False


@dataclass(frozen=True)
class KernelFacts:
    """Where the running kernel keeps what handlers need.

    :ivar defines: the text of ``#define`` lines
    """

    defines: str

    @classmethod
    def of(cls, kernel: Kernel, guard: int, window: int, window_bytes: int) -> "KernelFacts":
        """Read them from the debug information.

        :param guard: per-CPU address of the word that says that a handler runs
        :raises SymbolError: if this kernel keeps them in an unknown way
        """
        task = kernel.program.type("struct task_struct")
        pid, tgid = (int(task.member(name).offset) for name in ("pid", "tgid"))
        if tgid != pid + 4:
            raise SymbolError("struct task_struct has tgid elsewhere than behind pid")
        khz = kernel.memory.read_u32(kernel.address("tsc_khz"))
        values = {
            "CURRENT": _per_cpu(kernel, "current_task", "current_task"),
            "CPU_NUMBER": _per_cpu(kernel, "cpu_number", "cpu_number"),
            "PREEMPT_COUNT": _per_cpu(kernel, "__preempt_count", "preempt_count"),
            "TASK_PID": pid,
            "TASK_COMM": int(task.member("comm").offset),
            "TASK_STACK": int(task.member("stack").offset),
            "HARDIRQ_STACK": _per_cpu(kernel, "hardirq_stack_ptr", "hardirq_stack_ptr"),
            "GUARD": guard,
            "WINDOW": window,
            "WINDOW_BYTES": window_bytes,
            "TSC_HZ": 1000 * khz,
            "NS_PER_TICK": (10**6 << 32) // khz,  # times 1 << 32
        }
        return cls("".join(f"#define {name} {value:#x}UL\n" for name, value in values.items()))


@dataclass
class Unit:
    """One C unit under construction.

    Handlers that do the same are written once: what differs is in their ``struct probe``.

    :param handlers: those of earlier units; those of this one are added
    """

    facts: KernelFacts
    handlers: dict[tuple[object, ...], int]
    _parts: list[str] = field(default_factory=list)

    def handler(self, kind: str, body: Body, to: Stream | Table) -> int:
        """Number of the handler for a body.

        :param kind: ``p`` or ``r`` at a function's entry: the symbols are ``handler_N``, and
            ``return_stub_N``; ``full`` where all registers are kept: ``decide_N``
        :param to: where its records go, or what its hits are summed up in
        """
        key = (kind, body.condition, body.fill, body.saves, to, body.handlers, body.shared)
        number = self.handlers.get(key)
        if number is None:
            number = self.handlers[key] = len(self.handlers)
            shared = body.shared.replace("@STREAM@", to.arguments)
            if shared and shared not in self._parts:
                self._parts.append(shared)
            self._parts.append(_handler_text(number, kind, body, to))
        return number

    def bell(self, bells: int, watched: int) -> int:
        """Number of the handler that has the host look at a hit; of the kind ``full``."""
        key = ("bell", bells, watched)
        number = self.handlers.get(key)
        if number is None:
            number = self.handlers[key] = len(self.handlers)
            self._parts.append(_BELL.format(n=number, bells=bells, watched=watched))
        return number

    def decision(self, decision: Decision, user: str) -> int:
        """Number of the handler that decides what becomes of a call; of the kind ``full``.

        :param user: symbol of the user's function, if it has one
        """
        key = ("decision", decision.text(0, user))
        number = self.handlers.get(key)
        if number is None:
            number = self.handlers[key] = len(self.handlers)
            self._parts.append(decision.text(number, user))
        return number

    def site(self, number: int, calls: Sequence["StubCall"], tail_bytes: int) -> None:
        """The stub ``site_N``: calls handlers, then ``tail_N`` with the displaced instructions.

        :param calls: in order
        :param tail_bytes: room to leave for them and a jump back
        """
        lines = [f".balign 16\\n.globl site_{number}\\nsite_{number}:\\n"]
        lines += (_call_text(call) for call in calls)
        lines.append(f".globl tail_{number}\\ntail_{number}:\\n	.skip {tail_bytes}, 0xcc\\n")
        self._assemble(lines)

    def return_stubs(self, number: int, handler: int, slots: int, count: int, size: int) -> None:
        """``slots_N``: for each slot a stub whose address names it.

        :param slots: address of the first slot
        :param size: bytes of a slot
        """
        lines = [f".balign 16\\n.globl slots_{number}\\nslots_{number}:\\n"]
        lines += (
            f".balign {RETURN_STUB_BYTES}\\n	pushq ${_signed(slots + n * size)}\\n"
            f"	jmp return_stub_{handler}\\n"
            for n in range(count)
        )
        self._assemble(lines)

    def add(self, source: str) -> None:
        """Add C text."""
        self._parts.append(source)

    @property
    def text(self) -> str:
        """The whole unit."""
        prelude = resources.files("kgdbx.resident.compile").joinpath("prelude.h").read_text("utf-8")
        return "\n".join((self.facts.defines, prelude, *self._parts))

    def _assemble(self, lines: list[str]) -> None:
        text = "\n".join(f'\t"{line}"' for line in lines)
        self._parts.append(f'__asm__(".text\\n"\n{text});\n')


def _call_text(call: StubCall) -> str:
    probe = _signed(call.probe)
    if call.address is None:
        text = (_FILTERED_SITE if call.filtered else _SITE).format(
            probe=probe, handler=call.handler
        )
    else:
        text = _FULL_SITE.format(address=_signed(call.address), probe=probe, handler=call.handler)
    return text.replace("\n", "\\n")


def _handler_text(number: int, kind: str, body: Body, to: Stream | Table) -> str:
    is_return = kind == "r"
    stub = _RETURN_STUB.format(n=number) if is_return else ""
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


def _per_cpu(kernel: Kernel, symbol: str, member: str) -> int:
    # Linux kernel commit e57ef2ed97c1 ("x86: Put hot per CPU variables into a struct") (in v6.2).
    if kernel.vmlinux.lookup(symbol):
        return kernel.vmlinux.address(symbol)
    try:
        hot = kernel.program.type("struct pcpu_hot")
    except LookupError:
        raise SymbolError(f"the kernel has neither {symbol} nor struct pcpu_hot") from None
    assert isinstance(hot, drgn.Type)
    return kernel.vmlinux.address("pcpu_hot") + int(hot.member(member).offset)


def _signed(address: int) -> int:
    return address - (1 << 64) if address >> 63 else address
