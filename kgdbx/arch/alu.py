"""What x86-64 arithmetic does to a result and to the flags, as pure functions.

Every binary operation is ``(a, b, flags, bits) -> (result, flags)`` and every unary one
``(a, flags, bits) -> (result, flags)``: *a* is the destination's old value, *flags* the whole
RFLAGS, of which bits outside the six status flags pass through, and *bits* is 8, 16, 32 or 64.
Source: the "Flags Affected" paragraphs of the Intel SDM, Vol. 2. Flags that it calls undefined mean
nothing here either.
"""

from collections.abc import Callable

__all__ = (
    "AF",
    "CF",
    "OF",
    "PF",
    "SF",
    "STATUS_FLAGS",
    "ZF",
    "adc",
    "add",
    "and_",
    "bswap",
    "bt",
    "condition",
    "dec",
    "imul",
    "inc",
    "neg",
    "not_",
    "or_",
    "sar",
    "sbb",
    "shl",
    "shr",
    "sign_extend",
    "sub",
    "xor",
)

CF = 1 << 0
PF = 1 << 2
AF = 1 << 4
ZF = 1 << 6
SF = 1 << 7
OF = 1 << 11
STATUS_FLAGS = CF | PF | AF | ZF | SF | OF
"""Carry, parity, auxiliary carry, zero, sign and overflow: Intel SDM Vol. 1, section 3.4.3."""

_PARITY = tuple(0 if byte.bit_count() & 1 else PF for byte in range(256))


def sign_extend(value: int, bits: int) -> int:
    """The signed number that the low *bits* of *value* mean."""
    sign = 1 << (bits - 1)
    return ((value & ((1 << bits) - 1)) ^ sign) - sign


def add(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """ADD."""
    return _sum(a, b, 0, flags, bits)


def adc(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """ADC."""
    return _sum(a, b, flags & CF, flags, bits)


def sub(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """SUB and CMP."""
    return _difference(a, b, 0, flags, bits)


def sbb(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """SBB."""
    return _difference(a, b, flags & CF, flags, bits)


def and_(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """AND and TEST."""
    return _logic(a & b, flags, bits)


def or_(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """OR."""
    return _logic(a | b, flags, bits)


def xor(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """XOR."""
    return _logic(a ^ b, flags, bits)


def imul(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """IMUL with two or three operands: CF and OF tell that the product did not fit."""
    product = sign_extend(a, bits) * sign_extend(b, bits)
    result = product & ((1 << bits) - 1)
    flags = flags & ~STATUS_FLAGS | _of_result(result, bits)
    return result, flags if product == sign_extend(result, bits) else flags | CF | OF


def shl(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """SHL; *b* is the count."""
    count = _count(b, bits)
    if not count:
        return a, flags
    shifted = a << count
    result = shifted & ((1 << bits) - 1)
    carry = shifted >> bits & 1
    overflow = carry ^ result >> (bits - 1)
    return result, _shifted(result, carry, overflow, flags, bits)


def shr(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """SHR; *b* is the count."""
    count = _count(b, bits)
    if not count:
        return a, flags
    result = a >> count
    return result, _shifted(result, a >> (count - 1) & 1, a >> (bits - 1), flags, bits)


def sar(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """SAR; *b* is the count."""
    count = _count(b, bits)
    if not count:
        return a, flags
    signed = sign_extend(a, bits)
    result = signed >> count & ((1 << bits) - 1)
    return result, _shifted(result, signed >> (count - 1) & 1, 0, flags, bits)


def bt(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """BT of a register: CF is bit *b* modulo *bits*."""
    return a, flags & ~CF | a >> (b & (bits - 1)) & 1


def inc(a: int, flags: int, bits: int) -> tuple[int, int]:
    """INC: like ADD of 1, but CF stays."""
    result, new = _sum(a, 1, 0, flags, bits)
    return result, new & ~CF | flags & CF


def dec(a: int, flags: int, bits: int) -> tuple[int, int]:
    """DEC: like SUB of 1, but CF stays."""
    result, new = _difference(a, 1, 0, flags, bits)
    return result, new & ~CF | flags & CF


def neg(a: int, flags: int, bits: int) -> tuple[int, int]:
    """NEG."""
    return _difference(0, a, 0, flags, bits)


def not_(a: int, flags: int, bits: int) -> tuple[int, int]:
    """NOT: no flag changes."""
    return a ^ ((1 << bits) - 1), flags


def bswap(a: int, flags: int, bits: int) -> tuple[int, int]:
    """BSWAP of 32 or 64 bits: no flag changes."""
    return int.from_bytes(a.to_bytes(bits // 8, "little"), "big"), flags


def condition(number: int) -> Callable[[int], bool]:
    """The test that ``jcc``, ``setcc`` and ``cmovcc`` make on RFLAGS.

    :param number: the ``tttn`` field of the opcode, 0 to 15: Intel SDM Vol. 2D, appendix B.1.4.7
    :return: a function of the flags
    """
    test = _CONDITIONS[number >> 1]
    return (lambda flags: not test(flags)) if number & 1 else test


def _any_of(mask: int) -> Callable[[int], bool]:
    return lambda flags: bool(flags & mask)


def _less(flags: int) -> bool:
    # SF differs from OF.
    return (flags & SF) != (flags & OF) >> 4


# Even condition numbers; each odd one is the opposite.
_CONDITIONS: tuple[Callable[[int], bool], ...] = (
    _any_of(OF),
    _any_of(CF),
    _any_of(ZF),
    _any_of(CF | ZF),
    _any_of(SF),
    _any_of(PF),
    _less,
    lambda flags: _less(flags) or bool(flags & ZF),
)


def _of_result(result: int, bits: int) -> int:
    # PF of the low byte, ZF, SF.
    flags = _PARITY[result & 0xFF]
    if not result:
        flags |= ZF
    if result >> (bits - 1):
        flags |= SF
    return flags


def _sum(a: int, b: int, carry: int, flags: int, bits: int) -> tuple[int, int]:
    total = a + b + carry
    result = total & ((1 << bits) - 1)
    flags = flags & ~STATUS_FLAGS | _of_result(result, bits) | total >> bits
    flags |= (a ^ b ^ result) & AF
    if ((a ^ result) & (b ^ result)) >> (bits - 1):
        flags |= OF
    return result, flags


def _difference(a: int, b: int, borrow: int, flags: int, bits: int) -> tuple[int, int]:
    total = a - b - borrow
    result = total & ((1 << bits) - 1)
    flags = flags & ~STATUS_FLAGS | _of_result(result, bits) | (a ^ b ^ result) & AF
    if total < 0:
        flags |= CF
    if ((a ^ b) & (a ^ result)) >> (bits - 1):
        flags |= OF
    return result, flags


def _logic(result: int, flags: int, bits: int) -> tuple[int, int]:
    # AF is undefined; processors and QEMU clear it.
    return result, flags & ~STATUS_FLAGS | _of_result(result, bits)


def _count(count: int, bits: int) -> int:
    return count & (63 if bits == 64 else 31)


def _shifted(result: int, carry: int, overflow: int, flags: int, bits: int) -> int:
    flags = flags & ~STATUS_FLAGS | _of_result(result, bits) | carry
    return flags | OF if overflow else flags
