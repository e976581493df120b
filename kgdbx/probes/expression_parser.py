"""Parser of the expressions of probe definitions: C's, and the forms of ``kprobe_events``."""

import re

from kgdbx.probes import expression as syntax
from kgdbx.probes.lexer import RESERVED, Scanner

__all__ = ("parse_expression", "read_expression")

_TEXT_OPERATORS = frozenset(("==", "!=", "~", "&&", "||"))
_MAX_DEPTH = 50
_MAX_NODES = 200

_INFIX = re.compile(r"->|<<|>>|[<>=!]=|&&|\|\||[-+*/%&|^~<>?.\[]")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SYMBOL = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
_SPECIAL = re.compile(r"\$([a-z]+(?:_[a-z]+)*)(\d*)(?!\w)", re.ASCII)
_DEREFERENCE = re.compile(r"([-+])(u?)(\d\w*)\(", re.ASCII)
_OFFSET = re.compile(r"([-+])(\d\w*)", re.ASCII)


def parse_expression(text: str) -> syntax.Expr:
    """Parse a text that is one expression.

    :raises DefinitionError: if it is not one
    """
    scanner = Scanner(text)
    expr = read_expression(scanner)
    if not scanner.at_end():
        raise scanner.expected("an operator or the end")
    return expr


def read_expression(scanner: Scanner) -> syntax.Expr:
    """Read the longest expression at the scanner's position, and go past it.

    :raises DefinitionError: if none starts there
    """
    return _Parser(scanner).expression()


class _Parser:
    # Precedence climbing; the levels are C's. Depth and size are bounded, so that no text can
    # exhaust Python's stack here or in those who walk the tree.

    def __init__(self, scanner: Scanner) -> None:
        self.scanner = scanner
        self.depth = self.nodes = 0

    def expression(self) -> syntax.Expr:
        condition = self.binary(1)
        column = self.scanner.skip_space()
        if not self.scanner.take_text("?"):
            return condition
        then = self.expression()
        self.scanner.expect(":")
        otherwise = self.expression()
        if syntax.is_text(then) != syntax.is_text(otherwise):
            raise self.scanner.error("'?:' has a string on one side only", column)
        return syntax.Ternary(condition, then, otherwise, column=column)

    def binary(self, level: int) -> syntax.Expr:
        left = self.prefix()
        while True:
            column = self.scanner.skip_space()
            match = self.scanner.peek(_INFIX)
            operator = match[0] if match else ""
            if syntax.PRECEDENCE.get(operator, 0) < level:
                return left
            self.scanner.position += len(operator)
            right = self.binary(syntax.PRECEDENCE[operator] + 1)
            if operator == "~" and not (isinstance(right, syntax.String)):
                raise self.scanner.error("'~' compares with a pattern in double quotes", column)
            if operator not in _TEXT_OPERATORS:
                self.refuse_text(operator, column, left, right)
            left = syntax.Binary(operator, left, right, column=column)

    def prefix(self) -> syntax.Expr:
        self.depth += 1
        self.count()
        expr = self.unary() or self.postfix(self.primary())
        self.depth -= 1
        return expr

    def count(self) -> None:
        self.nodes += 1
        if self.depth > _MAX_DEPTH or self.nodes > _MAX_NODES:
            raise self.scanner.error("the expression is too long")

    def unary(self) -> syntax.Expr | None:
        scanner = self.scanner
        column = scanner.skip_space()
        if scanner.peek(_DEREFERENCE):
            return None
        type_name = scanner.type_in_parentheses(cast=True)
        if type_name:
            operand = self.prefix()
            self.refuse_text("cast", column, operand)
            return syntax.Cast(type_name, operand, column=column)
        for operator in "-+!~*&":
            if scanner.take_text(operator):
                operand = self.prefix()
                if operator != "!":
                    self.refuse_text(operator, column, operand)
                return syntax.Unary(operator, operand, column=column)
        name = scanner.peek(_NAME)
        if name is None or name[0] != "sizeof":
            return None
        scanner.take(_NAME)
        scanner.skip_space()
        type_name = scanner.type_in_parentheses(cast=False)
        if type_name:
            return syntax.SizeOfType(type_name, column=column)
        operand = self.prefix()
        self.refuse_text("sizeof", column, operand)
        return syntax.SizeOf(operand, column=column)

    def postfix(self, operand: syntax.Expr) -> syntax.Expr:
        scanner = self.scanner
        while True:
            column = scanner.skip_space()
            arrow = scanner.take_text("->")
            if arrow or scanner.take_text("."):
                scanner.skip_space()
                name = scanner.take(_NAME)
                if name is None:
                    raise scanner.expected("the name of a member")
                self.count()
                self.refuse_text("->" if arrow else ".", column, operand)
                operand = syntax.Member(operand, name[0], arrow, column=column)
            elif scanner.take_text("["):
                self.count()
                index = self.expression()
                scanner.expect("]")
                self.refuse_text("[]", column, operand, index)
                operand = syntax.Index(operand, index, column=column)
            else:
                return operand

    def primary(self) -> syntax.Expr:
        scanner, column = self.scanner, self.scanner.position
        if match := scanner.take(_DEREFERENCE):
            operand = self.expression()
            scanner.expect(")")
            self.refuse_text("dereference", column, operand)
            return syntax.Dereference(
                operand, self.offset(match[1], match[3], column), bool(match[2]), column=column
            )
        if scanner.take_text("("):
            expr = self.expression()
            scanner.expect(")")
            return expr
        if scanner.take_text("@"):
            return self.at(column)
        if scanner.take_text("\\"):
            return self.immediate(column)
        if (number := scanner.number()) is not None:
            return syntax.Literal(*number, column=column)
        if (code := scanner.character()) is not None:
            return syntax.Literal(code, column=column)
        if (text := scanner.string()) is not None:
            return syntax.String(text, column=column)
        if (register := scanner.register()) is not None:
            return syntax.Register(register, column=column)
        if scanner.text.startswith("$", column, scanner.end):
            return self.special(column)
        name = scanner.peek(_NAME)
        if name is None or name[0] in RESERVED:
            raise scanner.expected("a variable, number, %register, $name or parentheses")
        scanner.take(_NAME)
        return syntax.Name(name[0], column=column)

    def special(self, column: int) -> syntax.Expr:
        match = self.scanner.take(_SPECIAL)
        name, digits = (match[1], match[2]) if match else ("", "")
        if name not in syntax.SPECIALS or (digits and name not in ("arg", "stack")):
            known = " ".join(f"${name}" for name in syntax.SPECIALS)
            raise self.scanner.error(f"expected one of {known}", column)
        if name == "arg" and not digits.strip("0"):
            raise self.scanner.error("expected $arg1, $arg2, ...", column)
        if len(digits) > 4:
            raise self.scanner.error(f"the number in '${name}{digits}' is too large", column)
        return syntax.Special(name, int(digits) if digits else None, column=column)

    def at(self, column: int) -> syntax.Expr:
        number = self.scanner.number()
        if number is not None:
            return syntax.Dereference(syntax.Literal(*number, column=column + 1), column=column)
        symbol = self.scanner.take(_SYMBOL)
        if symbol is None:
            raise self.scanner.expected("a symbol or an address")
        offset = self.scanner.take(_OFFSET)
        offset_bytes = self.offset(offset[1], offset[2], offset.start()) if offset else 0
        return syntax.AtSymbol(symbol[0], offset_bytes, column=column)

    def immediate(self, column: int) -> syntax.Expr:
        scanner = self.scanner
        text = scanner.string()
        if text is not None:
            return syntax.String(text, column=column)
        negative = scanner.take_text("-")
        if not negative:
            scanner.take_text("+")
        number = scanner.number()
        if number is None:
            raise scanner.expected("a number or a string")
        literal = syntax.Literal(*number, column=column)
        return syntax.Unary("-", literal, column=column) if negative else literal

    def offset(self, sign: str, digits: str, column: int) -> int:
        value = self.scanner.integer(digits, column + 1)
        if value >= 1 << 63:
            raise self.scanner.error("the offset does not fit into 63 bits", column)
        return -value if sign == "-" else value

    def refuse_text(self, what: str, column: int, *operands: syntax.Expr) -> None:
        if any(syntax.is_text(operand) for operand in operands):
            message = f"a string takes no '{what}'; compare it with ==, != or ~"
            raise self.scanner.error(message, column)
