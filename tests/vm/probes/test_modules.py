"""Probes in modules: before their first instruction, after their last, and back again."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kgdbx.attach import attach
from kgdbx.errors import ProbeError, SymbolError
from kgdbx.machine.kernels import find_kernel
from kgdbx.probes.jprobe import Jprobe
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe
from kgdbx.probes.probe import State
from kgdbx.target.rsp import RspTarget

GuestOf = Callable[..., Any]


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_pending_probe_hits_the_modules_own_init(guest_of: GuestOf, kernel: str) -> None:
    guest = guest_of(kernel)
    names: list[str] = []

    def device(dev: Any) -> None:
        names.append(dev.name.string_().decode())

    results: list[int] = []
    probes = [
        guest.session.register(Kprobe("dummy:dummy_init_module", name="init")),
        guest.session.register(Jprobe("dummy:dummy_dev_init", device)),
        guest.session.register(
            Kretprobe("dummy:dummy_init_module", lambda retval: results.append(retval.value_()))
        ),
    ]
    assert {p.state for p in probes} == {State.PENDING}
    assert probes[0].notes == ("waits for module 'dummy' to be loaded",)
    guest.run("modprobe dummy numdummies=3")
    init, jprobe, returned = probes
    assert not any(p.nfaults for p in probes), [f.trace for p in probes for f in p.faults]
    assert (init.hits, jprobe.hits, returned.hits) == (1, 3, 1)
    assert (names, results) == (["dummy0", "dummy1", "dummy2"], [0])
    # init's memory is freed; the rest stays
    assert (init.state, returned.state, jprobe.state) == (State.GONE, State.GONE, State.ENABLED)
    where = guest.kernel.symbolize(jprobe.points[0].address)
    assert where.startswith("dummy_dev_init+0x0/0x") and where.endswith(" [dummy]")
    with pytest.raises(ProbeError, match="the code of probe 'init' is gone"):
        init.enable()


def test_unloaded_and_loaded_again(guest_of: GuestOf) -> None:
    guest = guest_of()
    probe = guest.session.register(Kprobe("dummy:dummy_setup"))
    init = guest.session.register(Kprobe("dummy:dummy_init_module"))
    exit_ = guest.session.register(Kretprobe("dummy:dummy_cleanup_module"))
    addresses = []
    for turn in (1, 2, 3):
        guest.run("modprobe dummy numdummies=2")
        assert (probe.state, probe.hits, init.hits) == (State.ENABLED, 2 * turn, turn)
        addresses.append(probe.points[0].address)
        guest.run("rmmod dummy")
        assert (probe.state, exit_.hits) == (State.GONE, turn)
        # something else takes the place where it was
        guest.run("modprobe loop" if turn == 1 else "true")
    assert len(set(addresses)) > 1
    assert guest.kernel.modules.find("dummy") is None
    assert not any(p.nfaults for p in (probe, init, exit_))
    left = [s for s in guest.session.probes.sites if s.address in addresses]
    assert left == []


def test_parameter_setter_runs_before_init(guest_of: GuestOf) -> None:
    guest = guest_of()
    order: list[str] = []

    def setter(s: Any) -> None:
        order.append(s.string_().decode())

    guest.session.register(Jprobe("loop:loop_set_hw_queue_depth", setter))
    guest.session.register(Kprobe("loop:loop_init", lambda: order.append("init")))
    guest.run("modprobe loop hw_queue_depth=77")
    assert order == ["77", "init"]


def test_init_that_fails(guest_of: GuestOf) -> None:
    guest = guest_of()
    results = []
    init = guest.session.register(
        Kretprobe("loop:loop_init", lambda retval: results.append(retval.value_()))
    )
    probe = guest.session.register(Kprobe("loop:loop_add"))
    for _ in range(2):
        guest.run("modprobe loop max_part=1000000", status=1)
        assert set(results) == {-errno.EINVAL}
        assert (probe.state, init.state) == (State.GONE, State.GONE)
    assert guest.kernel.modules.find("loop") is None
    guest.run("modprobe loop")
    assert (results[-1], probe.state) == (0, State.ENABLED)
    assert probe.hits >= 1


def test_unknown_names(guest_of: GuestOf) -> None:
    guest = guest_of()
    with pytest.raises(ProbeError) as caught:
        guest.session.register(Kprobe("dummy:dummy_setpu"))
    assert str(caught.value).startswith(
        "module 'dummy' has no function 'dummy_setpu'; nearest: dummy_setup"
    )
    unknown = guest.session.register(Kprobe("nosuch:function"))
    assert (unknown.state, unknown.notes) == (
        State.PENDING,
        ("module 'nosuch' is not loaded, and there is no file of that name",),
    )
    guest.run("modprobe dummy")
    with pytest.raises(ProbeError, match="no function 'dummy:dummy_setpu'; nearest: dummy_setup"):
        guest.session.register(Kprobe("dummy:dummy_setpu"))
    # a module's function needs no module name when it is loaded
    with guest.session.register(Kprobe("dummy_setup")) as probe:
        assert probe.points[0].function.qualified_name == "dummy:dummy_setup"


def test_debug_file_of_another_build(clone_of: Callable[..., Any], tmp_path: Path) -> None:
    vm = clone_of("6.1", 2)
    wrong = find_kernel("6.12").debug_modules
    (tmp_path / "loop.ko").symlink_to(next(wrong.rglob("loop.ko*")))
    vm.execute("modprobe loop")
    target = RspTarget(str(vm.info.gdb_socket))
    with attach(target, vm.info.vmlinux, debug_modules=tmp_path) as session:
        with pytest.raises(SymbolError) as caught:
            session.register(Jprobe("loop:loop_add", lambda: None))
        assert str(caught.value).startswith(
            f"{tmp_path / 'loop.ko'} is not of the build of the loaded module: "
        )
        assert (len(session.probes), session.probes.sites[3:]) == (0, ())
