"""Code that decides what becomes of a call: return at once, another function, or a user's C."""

from collections.abc import Callable
from dataclasses import dataclass

from kgdbx.resident.compile.link import Object

__all__ = (
    "Decision",
    "HANDLER",
    "ORIGINAL",
    "STACK",
    "STACK_SOURCE",
    "UserCode",
    "jump_to",
    "return_at_once",
)

ORIGINAL = "kgdbx_original"
"""What a user's code calls the probed function as it is without our jump."""

STACK = "kgdbx_stack"
"""What a user's handler calls to have its call stack."""

STACK_SOURCE = """\
u32 kgdbx_stack(const struct regs *regs, u64 *to, u32 size)
{
	return CALLED(walk_stack(regs, current_task(), to, size));
}
"""
"""The C of that."""

_MASK = (1 << 64) - 1

_DECIDE = """\
extern int {user}(struct regs *regs);
static __always_inline int condition_{n}(const struct context *c)
{{
{condition}
}}
static __always_inline bool act_{n}(struct regs *regs)
{{
{action}
}}
u64 decide_{n}(struct regs *regs, struct probe *p)
{{
	const struct context c = {{
		.di = regs->di, .si = regs->si, .dx = regs->dx, .cx = regs->cx, .r8 = regs->r8,
		.r9 = regs->r9, .sp = regs->sp, .regs = regs, .task = current_task(),
		.cpu = current_cpu(),
	}};
	bool decided = false;
	int pass;

{callers}	count_hit(p);
{enter}	pass = condition_{n}(&c);
	if (unlikely(pass < 0))
		count_fault(p);
	if (pass > 0)
		decided = act_{n}(regs);
{leave}	if (decided)
		gs_increment(p->counters + 24);
	return decided;
}}
"""

_CALLERS = """\
	const u64 from = true_return(*(const u64 *)regs->sp);

	if (!({test}))
		return 0;
"""
_ENTER = "\tif (!enter_handler(p))\n\t\treturn 0;\n"
_LEAVE = "\tleave_handler();\n"

# A handler that says so and changes nothing would be called for ever.
HANDLER = "\tconst u64 ip = regs->ip;\n\n\treturn {user}(regs) && regs->ip != ip;"
"""Action that asks a user's ``int handler(struct pt_regs *regs)``."""


def return_at_once(value: int) -> str:
    """Action: the function returns *value*, its lower 64 bits."""
    return (
        f"\tregs->ax = {value & _MASK:#x}UL;\n\tregs->ip = *(const u64 *)regs->sp;\n"
        "\tregs->sp += 8;\n\treturn true;"
    )


def jump_to(address: int | None = None) -> str:
    """Action: go on at another function, by default the user's."""
    target = "(u64){user}" if address is None else f"{address:#x}UL"
    return f"\tregs->ip = {target};\n\treturn true;"


@dataclass(frozen=True)
class UserCode:
    """A user's compiled C file.

    :ivar entry: the function of it that is called, or that calls go to
    :ivar resolve: address of a symbol of the kernel; None if it has none
    """

    object: Object
    entry: str
    resolve: Callable[[str], int | None]


@dataclass(frozen=True)
class Decision:
    """What a call leads to.

    :ivar action: statements of a function of ``struct regs *regs`` that returns whether the call
        goes on as the registers say then; ``{user}`` is the user's function
    :ivar condition: as :attr:`kgdbx.resident.compile.codegen.Body.condition`
    :ivar calls_kernel: whether functions of the kernel are called, or the user's
    :ivar callers: guest-virtual ``(start, size_bytes)`` of where calls must come from; all count
        if it is empty
    """

    action: str
    condition: str | None = None
    calls_kernel: bool = False
    callers: tuple[tuple[int, int], ...] = ()
    user: UserCode | None = None

    def text(self, number: int, user: str) -> str:
        """Its C, with the function ``decide_N``.

        :param user: symbol of the user's function
        """
        test = " || ".join(f"from - {start:#x}UL < {size:#x}UL" for start, size in self.callers)
        return _DECIDE.format(
            n=number,
            user=user,
            condition=self.condition or "\treturn 1;",
            action=self.action.format(user=user),
            callers=_CALLERS.format(test=test) if test else "",
            enter=_ENTER if self.calls_kernel else "",
            leave=_LEAVE if self.calls_kernel else "",
        )
