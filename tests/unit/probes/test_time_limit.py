"""Handlers are ended in time, but never in the middle of what must stay whole."""

import signal
import threading
import time
import types
from typing import Any

import pytest

from kgdbx.errors import HandlerTimeout
from kgdbx.probes.time_limit import time_limit


def _module(name: str, source: str) -> Any:
    module = types.ModuleType(name)
    exec(source, module.__dict__)
    return module


SPIN = """
import time
def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
"""


def test_ends_what_runs_too_long() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(HandlerTimeout, match="handlers ran longer than 0.02 s"), time_limit(0.02):
        time.sleep(10)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_leaves_alone_what_does_not() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.06)
    with time_limit(None):
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["kgdbx.target.rsp", "kgdbx.probes.manager", "kgdbx.probes.site"])
def test_waits_for_the_end_of_what_must_stay_whole(name: str) -> None:
    module = _module(name, SPIN)
    start = time.monotonic()
    with pytest.raises(HandlerTimeout), time_limit(0.02):
        module.spin(0.1)
        time.sleep(10)
    assert 0.1 <= time.monotonic() - start < 5


def test_a_signal_just_before_a_system_call_is_not_the_only_one() -> None:
    module = _module("kgdbx.probes.site", SPIN)
    for n in range(500):
        start = time.monotonic()
        with pytest.raises(HandlerTimeout), time_limit(0.0002):
            module.spin(n * 4e-6)
            time.sleep(20)
        assert time.monotonic() - start < 10


def test_what_calls_the_handler_does_not_count() -> None:
    # The transport's run() calls the manager, which calls the probe, which calls the handler.
    probe = _module("kgdbx.probes.probe", "def call(handler): handler()")
    target = _module("kgdbx.target.rsp", "def run(call, handler): call(handler)")
    start = time.monotonic()
    with pytest.raises(HandlerTimeout), time_limit(0.02):
        target.run(probe.call, lambda: time.sleep(10))
    assert time.monotonic() - start < 5


def test_no_limit_in_other_threads() -> None:
    ended = []

    def body() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(5)
    assert ended == [True]
