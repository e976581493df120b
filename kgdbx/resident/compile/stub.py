"""The assembly of stubs: where functions jump to, and where calls return to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ("RETURN_STUB_BYTES", "StubCall", "return_stub", "return_stubs", "site_stub")

RETURN_STUB_BYTES = 16
"""Distance from one slot's stub to the next."""

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

_RETURN_STUB = """\
__asm__(".text\\n"
	"return_stub_{n}:\\n"
	"	push %rdi\\n	push %rsi\\n	push %rdx\\n	push %rcx\\n"
	"	mov 32(%rsp), %rdi\\n	mov %rax, %rsi\\n	lea 32(%rsp), %rcx\\n"
	"	call return_{n}\\n	movq $0, -8(%rsp)\\n"
	"	pop %rcx\\n	pop %rdx\\n	pop %rsi\\n	pop %rdi\\n"
	"	ret\\n");
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


def site_stub(number: int, calls: Sequence[StubCall], tail_bytes: int) -> str:
    """The stub ``site_N``: calls handlers, then ``tail_N`` with the displaced instructions.

    :param calls: in order
    :param tail_bytes: room to leave for them and a jump back
    """
    lines = [f".balign 16\\n.globl site_{number}\\nsite_{number}:\\n"]
    lines += (_call_text(call) for call in calls)
    lines.append(f".globl tail_{number}\\ntail_{number}:\\n	.skip {tail_bytes}, 0xcc\\n")
    return _assembly(lines)


def return_stub(handler: int) -> str:
    """The stub ``return_stub_N``: calls ``return_N`` with the slot that a slot's stub pushed."""
    return _RETURN_STUB.format(n=handler)


def return_stubs(number: int, handler: int, slots: int, count: int, size_bytes: int) -> str:
    """``slots_N``: for each slot a stub whose address names it.

    :param slots: address of the first slot
    :param size_bytes: of a slot
    """
    lines = [f".balign 16\\n.globl slots_{number}\\nslots_{number}:\\n"]
    lines += (
        f".balign {RETURN_STUB_BYTES}\\n	pushq ${_signed(slots + n * size_bytes)}\\n"
        f"	jmp return_stub_{handler}\\n"
        for n in range(count)
    )
    return _assembly(lines)


def _call_text(call: StubCall) -> str:
    probe = _signed(call.probe)
    if call.address is None:
        text = (_FILTERED_SITE if call.filtered else _SITE).format(
            probe=probe, handler=call.handler
        )
    else:
        text = _FULL_SITE.format(address=_signed(call.address), probe=probe, handler=call.handler)
    return text.replace("\n", "\\n")


def _assembly(lines: Iterable[str]) -> str:
    text = "\n".join(f'\t"{line}"' for line in lines)
    return f'__asm__(".text\\n"\n{text});\n'


def _signed(address: int) -> int:
    return address - (1 << 64) if address >> 63 else address
