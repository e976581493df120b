"""Probes made from definitions: their hits become events."""

import errno
from collections.abc import Callable, Iterable, Mapping

import drgn

from kgdbx.arch.registers import Registers
from kgdbx.errors import KgdbxError, ProbeError, SymbolError
from kgdbx.probes.arguments import argument_suppliers, return_value_supplier
from kgdbx.probes.definition import ProbeDefinition, format_definition
from kgdbx.probes.evaluate import compile_condition, evaluate, locate
from kgdbx.probes.event import Event
from kgdbx.probes.expression import Expr, Name, Special, format_expression, walk
from kgdbx.probes.fetch import compile_fields
from kgdbx.probes.field import Field, expand_fields
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe, KretprobeInstance
from kgdbx.probes.probe import Hit, Point, Probe
from kgdbx.probes.scope import HitScope, KernelScope
from kgdbx.probes.watch import Watch
from kgdbx.symbols.kernel import Kernel

__all__ = ("Emit", "place_text", "probe_from_definition")

Emit = Callable[[Event, Hit], None]


def probe_from_definition(
    definition: ProbeDefinition, kernel: Kernel, emit: Emit, *, hardware: bool = False
) -> Probe:
    """Make a probe that emits an event at each hit that its condition lets pass.

    :param emit: takes each event, and the hit that it comes from
    :raises ProbeError: if the definition is a pattern or a deletion
    """
    if definition.is_glob or definition.kind == "-":
        raise ProbeError(f"{definition.text!r} is not one probe")
    if definition.aggregation is not None:
        raise ProbeError("an aggregation runs inside the kernel only", errno.EOPNOTSUPP)
    if definition.kind == "w":
        return _watch(definition, kernel, emit)
    if definition.kind == "r":
        return _DefinedKretprobe(definition, emit, hardware=hardware)
    return _DefinedKprobe(definition, emit, hardware=hardware)


def place_text(definition: ProbeDefinition) -> str:
    """The place of a definition alone, as ``[module:]function[+offset]``."""
    if definition.address is not None:
        return f"{definition.address:#x}"
    module = f"{definition.module}:" if definition.module else ""
    place = f"{module}{definition.function}"
    if definition.line is not None:
        return f"{place}:{definition.line}"
    return f"{place}+{definition.offset_bytes:#x}" if definition.offset_bytes else place


class _Recorder:
    # Turns hits at one point into events.

    def __init__(
        self, definition: ProbeDefinition, kernel: Kernel, point: Point | None, emit: Emit
    ) -> None:
        arguments = argument_suppliers(kernel, point) if point is not None else {}
        self.scope = HitScope(kernel, arguments)
        names = {"vars": tuple(arguments), "params": tuple(arguments)}
        fields = expand_fields(definition.fields, names)
        _check_names(definition, fields, kernel, point, arguments)
        self._fields = compile_fields(fields)
        condition = definition.condition
        self._condition = compile_condition(condition) if condition is not None else None
        self._definition = definition
        self._name = f"{definition.event_group}/{definition.event_name}"
        self._emit = emit
        self.entry_names = _entry_names(fields, condition, arguments)
        self._known: dict[int, str] = {}
        self._where = kernel.symbolize(point.address) if point is not None else ""

    def record(self, probe: Probe, hit: Hit, return_address: int | None = None) -> None:
        self.scope.hit = hit
        if self._condition is not None:
            try:
                if not self._condition(self.scope):
                    return
            except KgdbxError as e:
                probe.record_fault("condition", e)
                return
        assert probe.manager is not None
        event = Event(
            probe.manager.clock_ns(hit.tsc),
            hit.cpu,
            hit.task,
            self._name,
            self._definition.kind,
            hit.address,
            self._where or hit.kernel.symbolize(hit.address),
            self._fields(self.scope),
            return_address,
            self._symbolize(return_address, hit) if return_address is not None else "",
        )
        self._emit(event, hit)

    def _symbolize(self, address: int, hit: Hit) -> str:
        # A function returns to few places, and each is a search in the symbol table.
        if address not in self._known:
            self._known[address] = hit.kernel.symbolize(address)
        return self._known[address]


class _DefinedKprobe(Kprobe):
    def __init__(self, definition: ProbeDefinition, emit: Emit, *, hardware: bool) -> None:
        super().__init__(
            place_text(definition), self._record, name=_full_name(definition), hardware=hardware
        )
        self.text = format_definition(definition)
        self._definition = definition
        self._emit = emit
        self._recorders: dict[int, _Recorder] = {}

    def prepare(self, kernel: Kernel) -> None:
        self._recorders = {
            point.address: _Recorder(self._definition, kernel, point, self._emit)
            for point in self.points
        }
        super().prepare(kernel)

    def _record(self, hit: Hit) -> None:
        self._recorders[hit.address].record(self, hit)


class _DefinedKretprobe(Kretprobe):
    def __init__(self, definition: ProbeDefinition, emit: Emit, *, hardware: bool) -> None:
        super().__init__(
            place_text(definition),
            self._record,
            entry_handler=self._remember,
            maxactive=definition.maxactive,
            name=_full_name(definition),
            hardware=hardware,
        )
        self.text = format_definition(definition)
        self._definition = definition
        self._emit = emit
        self._recorder: _Recorder | None = None

    def prepare(self, kernel: Kernel) -> None:
        point = self.points[0]
        self._recorder = _Recorder(self._definition, kernel, point, self._emit)
        self._return_value = return_value_supplier(kernel, point)
        super().prepare(kernel)

    def _remember(self, hit: Hit, ri: KretprobeInstance) -> None:
        # Parameters mean their values at the entry: at the return their registers are gone.
        assert self._recorder is not None
        scope = self._recorder.scope
        values: dict[str, drgn.Object] = {}
        for name in self._recorder.entry_names:
            try:
                value = scope.arguments[name](hit)
                values[name] = value.read_() if value.address_ is not None else value
            except (KgdbxError, drgn.FaultError):
                # Its field is shown as unreadable, and the others as they are.
                values[name] = drgn.Object(scope.program, "void *")
        ri.data = (values, hit.regs.copy())

    def _record(self, hit: Hit, ri: KretprobeInstance) -> None:
        assert self._recorder is not None
        scope = self._recorder.scope
        values: Mapping[str, drgn.Object]
        registers: Registers
        values, registers = ri.data
        scope.entry_values, scope.entry_registers = values, registers
        scope.retval = lambda: self._return_value(hit)
        hit.address = ri.entry.point.address
        self._recorder.record(self, hit, ri.ret_addr)


def _watch(definition: ProbeDefinition, kernel: Kernel, emit: Emit) -> Watch:
    assert definition.watch is not None
    address, size = locate(definition.watch, KernelScope(kernel))
    size = definition.size_bytes or size or 8
    recorder = _Recorder(definition, kernel, None, emit)

    def accessed(p: Watch, hit: Hit, old: int, new: int) -> None:
        recorder.record(p, hit)

    watch = Watch(
        address, accessed, size_bytes=size, access=definition.access, name=_full_name(definition)
    )
    watch.text = format_definition(definition)
    watch.notes = (format_expression(definition.watch),)
    return watch


def _full_name(definition: ProbeDefinition) -> str:
    return f"{definition.event_group}/{definition.event_name}"


def _entry_names(
    fields: Iterable[Field], condition: Expr | None, arguments: Mapping[str, object]
) -> tuple[str, ...]:
    used = {node.name for node in _nodes(fields, condition) if isinstance(node, Name)}
    return tuple(name for name in arguments if name in used)


def _nodes(fields: Iterable[Field], condition: Expr | None) -> Iterable[Expr]:
    for field in fields:
        yield from walk(field.expression)
    if condition is not None:
        yield from walk(condition)


def _check_names(
    definition: ProbeDefinition,
    fields: Iterable[Field],
    kernel: Kernel,
    point: Point | None,
    arguments: Mapping[str, object],
) -> None:
    # At registration, not at the first hit.
    at_entry = point is not None and point.is_entry
    for node in _nodes(fields, definition.condition):
        if isinstance(node, Special) and node.name == "retval" and definition.kind != "r":
            raise ProbeError("$retval is for return probes: r FUNCTION ... $retval", errno.EINVAL)
        if isinstance(node, Special) and node.name == "duration_ns":
            raise ProbeError(
                "$duration_ns is known inside the kernel only: its clock stands still at a stop",
                errno.EOPNOTSUPP,
            )
        if not isinstance(node, Name) or node.name in arguments or (point and not at_entry):
            continue
        try:
            evaluate(node, KernelScope(kernel))
        except (SymbolError, ProbeError) as e:
            known = ", ".join(arguments) or "none are known: no debug information"
            raise ProbeError(
                f"{definition.event_name}: there is no variable or symbol {node.name!r}; "
                f"parameters: {known}",
                errno.ENOENT,
            ) from e
