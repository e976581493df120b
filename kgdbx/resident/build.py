"""Makes the code of probes and writes it into the guest, where nothing leads to it yet."""

import struct
from collections.abc import Mapping, Sequence

from kgdbx.resident.clock import SAMPLE_SOURCE
from kgdbx.resident.compile.decision import ORIGINAL, STACK, STACK_SOURCE
from kgdbx.resident.compile.link import Linked, compile_unit
from kgdbx.resident.compile.stub import RETURN_STUB_BYTES, StubCall, return_stubs, site_stub
from kgdbx.resident.compile.unit import Unit
from kgdbx.resident.guest_call import GuestCaller
from kgdbx.resident.holding import Holding
from kgdbx.resident.host import HostView
from kgdbx.resident.program import Program, Site, user_code
from kgdbx.resident.returns import empty_slot
from kgdbx.symbols.kernel import Kernel

__all__ = ("Builder", "jump")

_PROBE = struct.Struct("<QQIIIIQQ16x")  # struct probe
_JUMP_BYTES = 5
_TAIL_SLACK_BYTES = 40  # a short branch that is moved grows, and the jump back


class Builder:
    """Builds the stubs of sites, and the handlers of their probes."""

    def __init__(self, kernel: Kernel, host: HostView, caller: GuestCaller) -> None:
        self._kernel = kernel
        self._host = host
        self._caller = caller
        self._next_site = 0

    def build(
        self, holding: Holding, sites: Mapping[int, Site], new: Sequence[Program]
    ) -> dict[int, int]:
        """Write stubs, handlers and what the guest reads of the probes.

        :param new: probes whose handlers are not there yet
        :return: address of each site's stub, by the site's
        :raises ProbeError: if it cannot be compiled or placed
        """
        unit = Unit(holding.facts, holding.code.handlers, holding.code.numbers)
        if holding.clock is None:
            unit.add(SAMPLE_SOURCE)
        users = self._place_user_code(holding, new)
        if any(STACK in user.object.undefined for _, user in user_code(new)):
            unit.add(STACK_SOURCE)
        for program in new:
            _add_handler(unit, holding, program)
        numbers: dict[int, int] = {}
        for address, site in sites.items():
            numbers[address] = self._next_site
            self._next_site += 1
            calls = [
                StubCall(
                    p.address,
                    p.handler,
                    address if p.keeps_all else None,
                    p.kind == "p" and p.body is not None and p.body.filters_first,
                )
                for p in site.programs
            ]
            room = len(site.displacement.original) + _TAIL_SLACK_BYTES
            unit.add(site_stub(numbers[address], calls, room))
        compiled = compile_unit(unit.text)
        place = holding.take_code(self._caller, compiled.code_bytes)
        code = place.address
        linked = compiled.link(code, 0, holding.resolve)
        holding.code.add(place, linked.symbols, unit.new)
        text = bytearray(linked.code)
        for address, site in sites.items():
            tail = linked.symbols[f"tail_{numbers[address]}"]
            moved = site.displacement.relocated(tail)
            moved += jump(tail + len(moved), site.displacement.resume)
            text[tail - code : tail - code + len(moved)] = moved
        self._kernel.memory.write(code, bytes(text))
        for program, own_code in users.items():
            tail = linked.symbols[f"tail_{numbers[program.displacement.address]}"]
            own = {ORIGINAL: tail, STACK: linked.symbols.get(STACK)}
            self._write_user_code(program, own_code, own)
        self._write_controls(holding, linked, new)
        for program in new:
            program.units += (place, holding.code.unit_of(program.handler))
        for site in sites.values():
            site.unit = place
        return {at: linked.symbols[f"site_{number}"] for at, number in numbers.items()}

    def _place_user_code(self, holding: Holding, programs: Sequence[Program]) -> dict[Program, int]:
        places: dict[Program, int] = {}
        for program, user in user_code(programs):
            unit = holding.take_code(self._caller, user.object.code_bytes)
            program.units.append(unit)
            places[program] = unit.address
            entry = user.object.addresses(unit.address, program.user_data)[user.entry]
            holding.code.add(unit, {_user_symbol(program): entry})
        return places

    def _write_user_code(self, program: Program, code: int, own: Mapping[str, int | None]) -> None:
        assert program.decision is not None and program.decision.user is not None
        user = program.decision.user
        linked = user.object.link(
            code,
            program.user_data,
            lambda name: own[name] if name in own else user.resolve(name),
        )
        self._kernel.memory.write(code, linked.code)
        if linked.data:
            self._host.write(program.user_data, linked.data)

    def _write_controls(
        self, holding: Holding, linked: Linked, programs: Sequence[Program]
    ) -> None:
        for program in programs:
            self._host.write(
                program.address,
                _PROBE.pack(
                    program.counters,
                    program.slots,
                    program.maxactive,
                    0,
                    program.id,
                    program.slot_bytes,
                    program.displacement.address,
                    program.point or program.displacement.address,
                ),
            )
            if program.kind != "r":
                continue
            stubs = linked.symbols[f"slots_{program.id}"]
            slots = b"".join(
                empty_slot(program.address, stubs + n * RETURN_STUB_BYTES, program.slot_bytes)
                for n in range(program.maxactive)
            )
            self._host.write(program.slots, slots)
            # Not before: what others have left there is not to be taken for calls in progress.
            holding.journal.note(slots=(program.slots, program.maxactive, program.slot_bytes))


def jump(at: int, to: int) -> bytes:
    """``jmp rel32``."""
    return b"\xe9" + (to - at - _JUMP_BYTES).to_bytes(4, "little", signed=True)


def _add_handler(unit: Unit, holding: Holding, program: Program) -> None:
    if program.decision is not None:
        program.handler = unit.decision(program.decision, _user_symbol(program))
        return
    if program.body is None:
        assert holding.bells is not None
        program.handler = unit.bell(holding.bells.address, holding.bells.watched)
        return
    to = program.table or program.stream
    assert to is not None
    kind = "full" if program.keeps_all else program.kind
    program.handler = unit.handler(kind, program.body, to)
    if program.kind == "r":
        unit.add(
            return_stubs(
                program.id, program.handler, program.slots, program.maxactive, program.slot_bytes
            )
        )


def _user_symbol(program: Program) -> str:
    return f"user_{program.id}"
