"""Attaching with the symbols of a running kernel, or with others."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kgdbx.attach import attach, attach_vm
from kgdbx.errors import BuildIdMismatch, ProbeError, SymbolError
from kgdbx.machine.kernels import find_kernel
from kgdbx.probes.jprobe import Jprobe
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe
from kgdbx.session import Session
from kgdbx.symbols.elf import ElfSymbols
from kgdbx.symbols.program import make_program
from kgdbx.target.rsp import RspTarget

CloneOf = Callable[..., Any]


def attach_to(vm: Any, vmlinux: Path) -> Session:
    return attach(RspTarget(str(vm.info.gdb_socket)), vmlinux)


def test_vmlinux_of_another_kernel(clone_of: CloneOf) -> None:
    vm = clone_of("6.1", 2)
    other = find_kernel("6.12").vmlinux
    with pytest.raises(BuildIdMismatch) as caught:
        attach_to(vm, other)
    running = ElfSymbols(vm.info.vmlinux).build_id
    assert caught.value.expected == ElfSymbols(other).build_id
    assert caught.value.found == running
    assert str(caught.value) == (
        f"{other} has build ID {caught.value.expected}, the running kernel has {running}; "
        "give the vmlinux of the running kernel"
    )
    assert vm.execute("echo alive").output == "alive\n"


def test_vmlinux_without_debug_information(clone_of: CloneOf, tmp_path: Path) -> None:
    vm = clone_of("6.1", 2)
    stripped = tmp_path / "vmlinux"
    subprocess.run(
        ["objcopy", "--strip-debug", str(vm.info.vmlinux), str(stripped)], check=True, timeout=60
    )
    message = f"{stripped} has no debug information; install the kernel's -dbg package"
    with attach_to(vm, stripped) as session:
        # Addresses and registers work; whatever has a type says what is missing.
        assert session.kernel.symbolize(session.kernel.address("vfs_read")).startswith("vfs_read+")
        bare = session.register(Kprobe("__x64_sys_getpgid", lambda regs: None))
        typed = session.register(Kprobe("__x64_sys_getpgid", lambda task: None))
        for probe in (Kretprobe("__x64_sys_getpgid"), Kprobe("dummy:dummy_setup")):
            with pytest.raises(SymbolError) as caught:
                session.register(probe)
            assert str(caught.value) == message
        with pytest.raises(ProbeError, match="__x64_sys_getpgid has no debug information"):
            session.register(Jprobe("__x64_sys_getpgid", lambda regs: None))
        command = vm.start("caller 2 23")
        session.run(command=command, timeout_s=30)
        assert (bare.hits, bare.nfaults) == (23, 0)
        assert (typed.hits, str(typed.faults[0].error)) == (23, message)
    assert vm.execute("echo alive").output == "alive\n"


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_kaslr_slide_and_objects(clone_of: CloneOf, kernel: str) -> None:
    vm = clone_of(kernel, 2)
    listed = vm.execute("grep -E ' (vfs_read|_stext|jiffies)$' /proc/kallsyms").output
    release = vm.execute("uname -r").output.strip()
    assert "nokaslr" not in vm.execute("cat /proc/cmdline").output
    with attach_vm(vm.info) as session:
        kernel_ = session.kernel
        for line in listed.splitlines():
            address, _, name = line.split()
            assert kernel_.address(name) == int(address, 16)
        assert kernel_.slide % 0x200000 == 0
        uts = kernel_.program["init_uts_ns"].name
        assert uts.release.string_().decode() == release
        assert kernel_.symbolize(kernel_.address("vfs_read") + 9).startswith("vfs_read+0x9/0x")
        assert kernel_.symbolize(kernel_.address("panic_timeout")).startswith("0x")
        (alias,) = kernel_.functions("__x64_sys_getpgrp")  # debug information: __do_sys_getpgrp
        type_ = kernel_.function_type(alias)
        assert type_ is not None and type_.type.type_name() == "long"


def test_module_symbols(clone_of: CloneOf) -> None:
    vm = clone_of("6.1", 2)
    vm.execute("modprobe dummy")
    listed = vm.execute("grep -E ' dummy_(setup|xmit)\\s.dummy.$' /proc/kallsyms").output
    with attach_vm(vm.info) as session:
        module = session.kernel.modules.find("dummy")
        assert module is not None
        assert len(listed.splitlines()) == 2
        for line in listed.splitlines():
            address, _, name, _ = line.split()
            (function,) = session.kernel.functions(name)
            assert (function.address, function.qualified_name) == (
                int(address, 16),
                f"dummy:{name}",
            )
            assert session.kernel.symbolize(function.address) == (
                f"{name}+0x0/{function.size_bytes:#x} [dummy]"
            )
        assert session.kernel.modules.find("nosuch") is None


def test_a_module_that_is_just_being_loaded_is_no_trouble(
    guest_of: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    guest = guest_of("6.1")
    session, kernel = guest.session, guest.kernel
    session.define("p find_module_sections", tier="stop")
    command = guest.vm.start("modprobe dummy")
    session.run(count=1, command=command, timeout_s=60)
    assert command.poll() is None
    program = make_program(session.target, kernel.memory, kernel.vmlinux, kernel.slide)
    assert program["init_task"].comm.string_() == b"swapper/0"
    assert caplog.messages == []
    session.run(command=command, timeout_s=60)
    assert command.wait(60).status == 0
