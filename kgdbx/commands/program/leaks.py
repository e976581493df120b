"""leaks scan, mark, dangling: memory that nothing points to, and pointers to what is gone."""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from kgdbx.attach import open_core
from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.program.probe import TARGET_ARGUMENTS, is_over_kgdb, open_session
from kgdbx.commands.registry import argument
from kgdbx.commands.session.leaks import (
    block_record,
    dangling_table,
    growth_table,
)
from kgdbx.errors import CommandError, MachineError, Unsupported
from kgdbx.leaks.blocks import Heap
from kgdbx.leaks.dangling import find_dangling, ranges_in_use
from kgdbx.leaks.gone import note_gone, read_gone
from kgdbx.leaks.heap import read_heap
from kgdbx.leaks.layout import read_layout
from kgdbx.leaks.native import load_native
from kgdbx.leaks.scan import Scan, confirm, scan_heap
from kgdbx.leaks.snapshot import Snapshot, growth_since, read_snapshot, take_snapshot
from kgdbx.leaks.watch import LeakWatch
from kgdbx.machine.info import validate_name
from kgdbx.machine.vm import find_vm
from kgdbx.render import pick_style
from kgdbx.session import Session
from kgdbx.target.core import CoreTarget
from kgdbx.trace.json_lines import json_line
from kgdbx.views.leaks import all_registers, leak_table

__all__ = ("remember_gone",)

_PARTIAL = 4
_MOST = 200
_SCHEMA = "kgdbx.leaks.1"
_RUNNING, _NOT_STARTED = "running", "prelaunch"  # RunState, qapi/run-state.json

_JSON = argument("--json", action="store_true", help="one JSON object a line")
_CORE = argument("--core", metavar="FILE", help="a core file of QEMU's dump-guest-memory")
_STATUS = """\
Exit status: 0 nothing found, 1 something found, 4 nothing found but parts were not looked at."""


@PROGRAM_COMMANDS.command(
    name="leaks scan",
    summary="Scan the whole kernel for memory that nothing points to.",
    description=f"""\
The guest stands while its memory is looked at, some tenths of a second, so that all is of one
moment; --live has it run on, looks twice, and reports what was lost both times. A VM that was
paused before stays so.

  kgdbx leaks scan --vm a
  kgdbx leaks mark before --vm a; ...; kgdbx leaks scan --vm a --since before
  kgdbx leaks scan --core FILE --vmlinux FILE

{_STATUS}""",
    arguments=(
        *TARGET_ARGUMENTS,
        _CORE,
        argument("--live", action="store_true", help="let the guest run; scan twice"),
        argument("--since", metavar="NAME", help="only what has come since that mark, and growth"),
        argument("--limit", type=int, default=_MOST, metavar="N", help=f"lines (default {_MOST})"),
        _JSON,
    ),
)
def scan(out: TextIO, args: argparse.Namespace) -> int:
    with _open(args) as session:
        mark = _read_mark(session, args)
        found = _scan_live(session) if args.live else _scan_standing(session)
        leaks = [b for b in found.leaks if mark is None or not mark.holds(b)]
        heap, style = found.heap, pick_style(out)
        growth = growth_since(mark, heap) if mark is not None else ()
        _begin(out, found.errors, args)
        if args.json:
            for block in leaks:
                print(json_line({"leak": block_record(heap, block)}), file=out)
            for each in growth:
                print(json_line({"growth": vars(each)}), file=out)
        else:
            if leaks:
                print(leak_table(heap, leaks[: args.limit], style), file=out)
            if len(leaks) > args.limit:
                print(f"and {len(leaks) - args.limit} more; see --limit", file=out)
            if growth:
                print(growth_table(growth, style), file=out)
            size = sum(block.size_bytes for block in leaks)
            print(f"{len(leaks)} blocks of {size:,} bytes that nothing points to", file=out)
            if leaks:
                print(f"one more look: {_one_more_look(args, leaks[0].address)}", file=out)
    return 1 if leaks else _PARTIAL if found.errors else 0


@PROGRAM_COMMANDS.command(
    name="leaks mark",
    summary="Remember what is allocated, for 'leaks scan --since' and 'leaks dangling'.",
    description="It is kept with the VM and goes with it. Also remembers where modules are.",
    arguments=(argument("name", help="a name for it"), *TARGET_ARGUMENTS, _JSON),
)
def mark(out: TextIO, args: argparse.Namespace) -> int:
    with _open(args) as session:
        path = _mark_path(session, args, args.name)
        heap = _standing_heap(session)
        snapshot = take_snapshot(heap)
        snapshot.write(path)
        size = sum(each.size_bytes for each in snapshot.usage)
    _begin(out, heap.errors, args)
    if args.json:
        record = {"mark": args.name, "blocks": len(snapshot.addresses), "bytes": size}
        print(json_line(record), file=out)
    else:
        print(f"{args.name}: {len(snapshot.addresses):,} blocks of {size:,} bytes", file=out)
    return _PARTIAL if heap.errors else 0


@PROGRAM_COMMANDS.command(
    name="leaks dangling",
    summary="Find pointers into a module that was unloaded.",
    description=f"""\
Where the module was is known if it was watched when it went, by 'leaks watch' or 'audit', from a
mark that was made while it was loaded, or from --range.
Looks at all memory in use: variables, allocated objects, per-CPU memory, stacks. What was freed
does not count.

  kgdbx leaks mark loaded --vm a; kgdbx vm exec a -- rmmod foo; kgdbx leaks dangling foo --vm a

{_STATUS}""",
    arguments=(
        argument("module", nargs="?", help="a module that is gone; all that are, if left out"),
        *TARGET_ARGUMENTS,
        argument("--mark", metavar="NAME", help="the mark (default: all that is known)"),
        argument("--range", action="append", default=[], metavar="START+SIZE", help="where it was"),
        _JSON,
    ),
)
def dangling(out: TextIO, args: argparse.Namespace) -> int:
    with _open(args) as session:
        ranges = [_parse_range(text) for text in args.range] or _ranges_gone(session, args)
        heap = _standing_heap(session)
        found, truncated = find_dangling(heap, all_registers(session), ranges)
        errors = [*heap.errors, *(["there are more pointers"] if truncated else [])]
        for start, size in ranges_in_use(heap, ranges):
            errors.append(f"{start:#x}+{size:#x}, where something else has come to be")
        _begin(out, errors, args)
        if args.json:
            for each in found:
                record = {
                    "address": hex(each.address),
                    "value": hex(each.value),
                    "offset": each.offset,
                    "place": each.place,
                    "holder": block_record(heap, each.holder) if each.holder else None,
                }
                print(json_line({"dangling": record}), file=out)
        else:
            if found:
                print(dangling_table(found, pick_style(out)), file=out)
            print(f"{len(found)} pointers into what is gone", file=out)
    return 1 if found else _PARTIAL if errors else 0


def remember_gone(session: Session, args: argparse.Namespace, watch: LeakWatch) -> None:
    """Note where modules were that have gone under a watch, for 'leaks dangling'."""
    if args.vm and watch.gone:
        note_gone(_gone_path(args), session.kernel.vmlinux.build_id, watch.gone)


def _open(args: argparse.Namespace) -> Session:
    if getattr(args, "core", None):
        if not args.vmlinux or args.vm or args.connect:
            raise CommandError("--core FILE needs --vmlinux FILE, and no other kernel")
        return open_core(Path(args.core), Path(args.vmlinux).expanduser())
    if is_over_kgdb(args):
        raise Unsupported(
            "a scan reads all of the kernel's memory, two days for each GiB over a serial line; "
            "scan a VM of ours without --kgdb, or a core file: --vm or --core"
        )
    session = open_session(args, leave_standing=_stands(args))
    if session.leaves_standing:
        ran = ", but for what was just put right" if session.recovery is not None else ""
        print(f"kgdbx: VM {args.vm} stands, and is left standing{ran}", file=sys.stderr)
    if session.ram is None:
        session.close()
        raise Unsupported("this needs the memory of a VM of ours, or a core file: --vm or --core")
    return session


# Whether a VM was paused before we came. QMP serves one at a time.
def _stands(args: argparse.Namespace) -> bool:
    if not args.vm:
        return False
    try:
        status = find_vm(args.vm).status()
    except MachineError as e:
        print(f"kgdbx: VM {args.vm} runs on after this, if it stood or not: {e}", file=sys.stderr)
        return False
    if status == _NOT_STARTED:
        raise CommandError(f"the kernel of VM {args.vm} has not begun to boot; let it run first")
    return status != _RUNNING


# The command that opens a block as a drgn object.
def _one_more_look(args: argparse.Namespace, address: int) -> str:
    kernel = ["--vm", args.vm] if args.vm else ["--core", args.core, "--vmlinux", args.vmlinux]
    return shlex.join(["kgdbx", "drgn", *kernel, "-e", f"leak({address:#x})"])


# The guest stands no longer than it takes to read its memory.
def _prepare(session: Session) -> None:
    if isinstance(session.target, CoreTarget) or session.leaves_standing:
        return
    session.target.resume()
    read_layout(session.kernel.program)
    load_native()
    session.target.interrupt()


def _scan_standing(session: Session) -> Scan:
    assert session.ram is not None
    _prepare(session)
    started = time.monotonic()
    found = scan_heap(session.kernel, session.ram, all_registers(session))
    print(f"kgdbx: scanned in {time.monotonic() - started:.2f} s", file=sys.stderr)
    return found


def _standing_heap(session: Session) -> Heap:
    assert session.ram is not None
    _prepare(session)
    return read_heap(session.kernel, session.ram)


def _scan_live(session: Session) -> Scan:
    if isinstance(session.target, CoreTarget):
        raise CommandError("a core file does not run: leave out --live")
    if session.leaves_standing:
        raise CommandError("a VM that stands does not change: leave out --live")
    assert session.ram is not None
    scans = []
    for _ in range(2):
        session.target.interrupt()
        registers = all_registers(session)
        session.target.resume()
        scans.append(scan_heap(session.kernel, session.ram, registers))
    session.target.interrupt()
    return confirm(*scans)


# What was not looked at comes first: whoever reads the rest has to know.
def _begin(out: TextIO, errors: Sequence[str], args: argparse.Namespace) -> None:
    if args.json:
        print(json_line({"schema": _SCHEMA}), file=out)
    for error in errors:
        if args.json:
            print(json_line({"error": error}), file=out)
        else:
            print(f"kgdbx: not looked at: {error}", file=sys.stderr)


def _marks(args: argparse.Namespace) -> Path:
    if not args.vm:
        raise CommandError("marks are kept with a VM of ours: --vm NAME")
    return find_vm(args.vm).info.directory / "marks"


def _mark_path(session: Session, args: argparse.Namespace, name: str) -> Path:
    validate_name(name)
    return _marks(args) / f"{name}.zip"


def _read_mark(session: Session, args: argparse.Namespace) -> Snapshot | None:
    if not args.since:
        return None
    path = _mark_path(session, args, args.since)
    return read_snapshot(path, session.kernel.vmlinux.build_id)


def _gone_path(args: argparse.Namespace) -> Path:
    return find_vm(args.vm).info.directory / "gone.json"


def _ranges_gone(session: Session, args: argparse.Namespace) -> list[tuple[int, int]]:
    marks = [_mark_path(session, args, args.mark)] if args.mark else _marks(args).glob("*.zip")
    build_id = session.kernel.vmlinux.build_id
    known = [m for path in marks for m in read_snapshot(path, build_id).modules]
    known += () if args.mark else read_gone(_gone_path(args), build_id)
    wanted = args.module.replace("-", "_") if args.module else None
    loaded = {(m.name, m.regions[0][0]) for m in session.kernel.modules}
    ranges = {
        each
        for module in known
        if wanted in (None, module.name) and (module.name, module.ranges[0][0]) not in loaded
        for each in module.ranges
    }
    if not ranges:
        what = f"where module {args.module!r} was" if args.module else "of a module that is gone"
        raise CommandError(
            f"nothing is known {what}; watch it go, make a mark while it is loaded, or give --range"
        )
    return sorted(ranges)


def _parse_range(text: str) -> tuple[int, int]:
    start, plus, size = text.partition("+")
    try:
        if plus:
            return int(start, 16), int(size, 0)
    except ValueError:
        pass
    raise CommandError(f"--range {text!r} is not START+SIZE, such as 0xffffffffc0200000+0x3000")
