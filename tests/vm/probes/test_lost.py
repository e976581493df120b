"""A guest that goes away under a session."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from kgdbx.errors import TargetLost
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe

GuestOf = Callable[..., Any]


def test_killed_while_it_runs(guest: Any) -> None:
    guest.session.register(Kprobe("__x64_sys_getpgid"))
    guest.session.register(Kretprobe("do_nanosleep"))
    guest.vm.start("caller 2 1000003")
    killer = threading.Timer(0.5, os.kill, (guest.vm.info.pid, signal.SIGKILL))
    killer.start()
    start = time.monotonic()
    with pytest.raises(TargetLost):
        guest.session.run(timeout_s=30)
    assert time.monotonic() - start < 10
    killer.join()
    guest.session.close()
    guest.session.close()


def test_killed_in_a_handler(guest: Any) -> None:
    def kill() -> None:
        os.kill(guest.vm.info.pid, signal.SIGKILL)
        os.waitid(os.P_PID, guest.vm.info.pid, os.WEXITED | os.WNOWAIT)

    guest.session.register(Kprobe("__x64_sys_getpgid", kill))
    guest.vm.start("caller 1 1")
    with pytest.raises(TargetLost):
        guest.session.run(timeout_s=30)
    guest.session.close()


def test_shut_down_by_itself(guest: Any) -> None:
    guest.session.register(Kprobe("__x64_sys_getpgid"))
    guest.vm.start("poweroff -f")
    with pytest.raises(TargetLost):
        guest.session.run(timeout_s=30)
    guest.session.close()
