"""^C while drgn reads memory comes when it is through, and once."""

import os
import signal
import time

import pytest

from kgdbx.endings import raise_interrupt

DEADLINE_S = 20.0

# As a read that drgn asks for: what counts is the module that it is in.
READ = """
def read(kill, sleep):
    kill()
    sleep()
    done.append(True)
"""


@pytest.fixture
def done() -> list[bool]:
    return []


def test_interrupt_waits_for_drgn(done: list[bool]) -> None:
    names = {"__name__": "kgdbx.symbols.program", "done": done}
    exec(READ, names)
    before = signal.signal(signal.SIGINT, raise_interrupt)
    interrupts = 0
    end = time.monotonic() + DEADLINE_S
    try:
        try:
            names["read"](lambda: os.kill(os.getpid(), signal.SIGINT), lambda: time.sleep(0.05))
            assert done == [True]
            while time.monotonic() < end:
                time.sleep(0.001)
        except KeyboardInterrupt:
            interrupts += 1
        assert interrupts == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            while time.monotonic() < end:
                time.sleep(0.001)
    finally:
        signal.signal(signal.SIGINT, before)
