"""A line with noise: what is read is right or not read at all, and nothing waits for ever."""

import time
from collections.abc import Callable

import pytest

from kgdbx.errors import ProtocolError, TargetError, TargetTimeout
from kgdbx.machine.vm import Vm
from kgdbx.symbols.elf import ElfSymbols
from kgdbx.symbols.kaslr import find_slide
from kgdbx.target.base import BreakpointKind, Stop
from kgdbx.target.kgdb import KgdbTarget
from tests.vm.kgdb.noisy_line import Noise, NoisyLine

Attach = Callable[..., tuple[KgdbTarget, NoisyLine]]
CALLS = 7
DEADLINE_S = 100.0
PER_BYTE = 0.001  # a reply of a few hundred bytes is harmed one time in three


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(Noise(lost=PER_BYTE), id="lost"),
        pytest.param(Noise(changed=PER_BYTE), id="changed"),
        pytest.param(
            Noise(lost=PER_BYTE / 3, repeated=PER_BYTE / 3, changed=PER_BYTE / 3, delayed=PER_BYTE),
            id="all",
        ),
    ],
)
def test_each_hit_is_counted_and_each_value_is_right(
    kgdb_vm: Vm, noisy: Attach, noise: Noise
) -> None:
    target, line = noisy(noise)
    symbols = ElfSymbols(kgdb_vm.info.vmlinux)
    slide = find_slide(target, symbols)
    assert slide is not None
    banner = symbols.address("linux_banner")
    size = len(symbols.read(banner, 256).split(b"\0")[0])
    probed = symbols.address("__x64_sys_getpgid") + slide
    hits = []

    def on_stop(stop: Stop) -> bool:
        hits.append(target.read_registers(stop.cpu).rip)
        assert target.read_memory(banner + slide, size) == symbols.read(banner, size)
        target.step(stop.cpu)
        return True

    command = kgdb_vm.start(f"caller 1 {CALLS}")
    target.insert_breakpoint(BreakpointKind.SOFTWARE, probed)
    end = time.monotonic() + DEADLINE_S
    while command.poll() is None:
        assert time.monotonic() < end, f"no end after {len(hits)} hits"
        target.run(on_stop, timeout_s=1.0)
    assert hits == [probed] * CALLS
    assert line.harmed or noise.delayed


def test_part_of_a_command_that_lets_the_kernel_run_is_lost(kgdb_vm: Vm, noisy: Attach) -> None:
    # A kernel that waits for the rest of a command takes the next one for it.
    target, line = noisy(Noise())
    symbols = ElfSymbols(kgdb_vm.info.vmlinux)
    slide = find_slide(target, symbols)
    assert slide is not None
    probed = symbols.address("__x64_sys_getpgid") + slide
    command = kgdb_vm.start("caller 1 1000000")
    target.insert_breakpoint(BreakpointKind.SOFTWARE, probed)
    second = probed + 5  # behind the NOP that ftrace patches
    step = b"s%x" % probed  # KGDB stops behind the breakpoint's byte
    for lost in [(0,), (1,), (-3,), (-2,), (-1,), (-3, -2), (1, -1), (-3, -2, -1)]:
        line.lose(b"c", *lost)
        harmed = line.harmed
        stop = target.run(lambda stop: False, timeout_s=30)
        assert stop is not None and line.harmed == harmed + len(lost)
        assert target.read_registers(stop.cpu).rip == probed
        line.lose(step, *lost)
        target.step(stop.cpu)
        assert line.harmed == harmed + 2 * len(lost)
        assert target.read_registers(stop.cpu).rip == second
    command.discard()


def test_a_line_that_carries_nothing_right_is_an_error_and_no_hang(noisy: Attach) -> None:
    started = time.monotonic()
    with pytest.raises((ProtocolError, TargetTimeout)):
        noisy(Noise(changed=0.5), answer_s=1.0)
    assert time.monotonic() - started < 60


def test_a_line_that_gets_bad_gives_right_values_or_errors(noisy: Attach) -> None:
    target, line = noisy(Noise(), answer_s=2.0)
    at = target.read_registers(target.cpus()[0]).rsp & -4096  # a stack may end at the next page
    right = target.read_memory(at, 64)
    values, errors = {}, 0
    for index, noise in enumerate((0.002, 0.01, 0.03, 0.3)):
        line.noise = Noise(changed=noise)
        for part in range(4):  # none of them twice: what was read is kept
            offset = 12 * index + 4 * part
            try:
                values[offset] = target.read_memory(at + offset, 4 + index)
            except TargetError:
                errors += 1
    line.noise = Noise()
    assert line.harmed
    assert errors  # the last of these lines carries hardly anything
    assert values
    assert values == {at: right[at : at + len(value)] for at, value in values.items()}
    assert target.read_memory(at + 3, 8) == right[3:11]
