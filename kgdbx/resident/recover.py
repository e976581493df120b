"""Put a guest back in order whose kgdbx died: by its journal, as far as the guest agrees."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kgdbx.errors import CommandError, MemoryFault
from kgdbx.resident.guest_call import GuestCaller
from kgdbx.resident.journal import read_journal
from kgdbx.resident.memory import Block, GuestMemory
from kgdbx.resident.returns import (
    PendingReturn,
    never_returns,
    pending_returns,
    stands_at,
    true_return,
)
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import Stop

__all__ = ("Recovery", "recover")


@dataclass
class Recovery:
    """What was put back.

    :ivar patches: places of code whose original bytes are back
    :ivar returns: calls in progress whose return address is back
    :ivar freed_bytes: memory given back to the guest
    :ivar conflicts: what was left as it is, since the guest does not agree with the journal
    """

    patches: int = 0
    returns: int = 0
    freed_bytes: int = 0
    conflicts: list[str] = field(default_factory=list)

    def __add__(self, other: "Recovery") -> "Recovery":
        return Recovery(
            self.patches + other.patches,
            self.returns + other.returns,
            self.freed_bytes + other.freed_bytes,
            self.conflicts + other.conflicts,
        )

    @property
    def text(self) -> str:
        """All of it, for users: one line, and one for each conflict."""
        done = (
            f"an earlier kgdbx was killed: put back {self.patches} places of code and "
            f"{self.returns} return addresses, freed {self.freed_bytes >> 10} KiB"
        )
        return "\n".join((done, *self.conflicts))


@dataclass
class _Journalled:
    slide: int
    patches: dict[int, tuple[bytes, list[bytes]]] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    percpu: list[int] = field(default_factory=list)
    entries: dict[int, int] = field(default_factory=dict)  # of the window, with their values
    window: tuple[int, int] = (0, 0)  # start, end
    code: list[tuple[int, int]] = field(default_factory=list)
    slots: list[tuple[int, int, int]] = field(default_factory=list)


def recover(
    kernel: Kernel,
    path: Path,
    dispatch: Callable[[Stop], bool],
    wait_until_unused: Callable[[Sequence[tuple[int, int]], Callable[[], bool]], bool],
) -> Recovery:
    """Undo what a journal says. The kernel stands; the journal is removed when all is undone.

    :param dispatch: handles stops while the guest makes calls for us
    :param wait_until_unused: lets the guest run until nothing is inside ranges of addresses, and
        a function that it calls at each stop is true; whether that came to be
    :raises CommandError: if the journal makes no sense
    """
    found = _read(path, kernel)
    done = Recovery()
    if found.slide != kernel.slide:
        path.unlink()  # the guest has booted since: all of it is gone
        return done
    memory = kernel.memory
    for address, (original, replacements) in reversed(found.patches.items()):
        live = kernel.read_code(address, len(original))
        if live in replacements:
            memory.write(address, original)
            done.patches += 1
        elif live != original:
            done.conflicts.append(
                f"{kernel.symbolize(address)} holds {live.hex(' ')}, neither what kgdbx wrote "
                f"nor what was there before ({original.hex(' ')}): left as it is"
            )
    entries = [at for at, value in found.entries.items() if memory.read_u64(at) == value]
    if not entries:
        path.unlink()  # they were taken away already, or never written
        return done
    start, end = found.window

    def restore_returns() -> bool:
        calls = {pending.stub: pending for pending in _pending(kernel, found)}
        for pending in tuple(calls.values()):
            if stands_at(memory, pending):
                true = true_return(kernel, pending.stub, start, end)
                memory.write(pending.place, true.to_bytes(8, "little"))
                done.returns += 1
                stub = pending.stub
                while stub in calls:  # of several probes at one function
                    passed = calls.pop(stub)
                    memory.write(passed.slot, bytes(8))
                    stub = passed.ret_addr
        return all(never_returns(kernel, pending) for pending in calls.values())

    restore_returns()
    if done.conflicts or not wait_until_unused(found.code, restore_returns):
        done.conflicts.append("code of kgdbx's is still in use in the guest: its memory stays")
        return done
    for entry in entries:
        memory.write(entry, bytes(8))
    kernel.target.flush_translations()
    guest = GuestMemory(kernel)
    GuestCaller(kernel, dispatch).run(guest.give_back(found.blocks, found.percpu))
    done.freed_bytes = sum(block.size_bytes for block in found.blocks)
    path.unlink()
    return done


def _pending(kernel: Kernel, found: _Journalled) -> Iterator[PendingReturn]:
    for address, count, size_bytes in found.slots:
        try:
            data = kernel.memory.read(address, count * size_bytes)
        except MemoryFault:
            continue  # this part of the window is gone: whoever took it away waited for the calls
        yield from pending_returns(data, address, size_bytes)


def _read(path: Path, kernel: Kernel) -> _Journalled:
    records = list(read_journal(path))
    try:
        found = (
            _Journalled(slide=int(records[0]["slide"])) if records else _Journalled(kernel.slide)
        )
        for record in records[1:]:
            _take(found, record)
    except (KeyError, TypeError, ValueError) as e:
        raise CommandError(f"{path} is damaged: {e!r}") from e
    return found


def _take(found: _Journalled, record: dict[str, Any]) -> None:
    if "patch" in record:
        address = int(record["patch"])
        original, to = bytes.fromhex(record["from"]), bytes.fromhex(record["to"])
        if len(original) != len(to):
            raise ValueError("a patch that changes the length of code")
        found.patches.setdefault(address, (original, []))[1].append(to)
    elif "restored" in record:
        found.patches.pop(int(record["restored"]), None)
    elif "blocks" in record:
        found.blocks += (Block(int(a), int(n)) for a, n in record["blocks"])
    elif "percpu" in record:
        found.percpu += map(int, record["percpu"])
    elif "window" in record:
        entry, value, start, end = map(int, record["window"])
        found.entries[entry] = value
        found.window = start, end
    elif "code" in record:
        start, end = map(int, record["code"])
        found.code.append((start, end))
    elif "slots" in record:
        address, count, size_bytes = map(int, record["slots"])
        found.slots.append((address, count, size_bytes))
    elif "no_slots" in record:
        gone = set(map(int, record["no_slots"]))
        found.slots = [slots for slots in found.slots if slots[0] not in gone]
