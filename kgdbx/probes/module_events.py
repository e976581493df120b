"""Module load and unload: probes follow a module's code as it comes and goes."""

from typing import TYPE_CHECKING

from kgdbx.arch.registers import Registers
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe, KretprobeInstance
from kgdbx.probes.probe import Probe

if TYPE_CHECKING:
    from kgdbx.probes.manager import ProbeManager

__all__ = ("ModuleEvents",)

# Called by load_module() in kernel/module/main.c for each module, best first. The first runs when
# the module is mapped and relocated and before any of its code does, its parameters' setters
# included; the second just before its init. ftrace_module_enable() is empty without ftrace.
_LOADING = ("ftrace_module_enable", "do_init_module")
_INIT = "do_init_module"
_FREEING = "free_module"
_MAXACTIVE = 64


class ModuleEvents:
    """Watches the kernel's module loader with probes of its own, once a probe needs it."""

    def __init__(self, manager: "ProbeManager") -> None:
        self._manager = manager
        self._own: list[Probe] = []

    def follow(self) -> None:
        """Watch the loader from now on; does nothing the second time."""
        if self._own:
            return
        kernel = self._manager.kernel
        loading = next(name for name in _LOADING if kernel.vmlinux.lookup(name))
        self._own = [
            Kprobe(loading, self._on_loading, name="kgdbx/module_loading"),
            Kprobe(_FREEING, self._on_freeing, name="kgdbx/module_freeing"),
            Kretprobe(
                _INIT,
                self._on_init_done,
                entry_handler=self._on_init,
                maxactive=_MAXACTIVE,
                name="kgdbx/module_init",
            ),
        ]
        try:
            for probe in self._own:
                probe.is_internal = True
                self._manager.register(probe)
        except BaseException:
            for probe in self._own:
                probe.unregister()
            self._own = []
            raise

    def _on_loading(self, regs: Registers) -> None:
        module = self._manager.kernel.modules.at(regs.rdi)
        self._manager.module_loaded(module)

    def _on_init(self, ri: KretprobeInstance, regs: Registers) -> None:
        ri.data = self._manager.kernel.modules.at(regs.rdi)

    def _on_init_done(self, ri: KretprobeInstance) -> None:
        # do_free_init() frees these later; nothing runs there any more.
        regions = tuple((start, size) for start, size, init in ri.data.regions if init)
        self._manager.memory_freed(regions)

    def _on_freeing(self, regs: Registers) -> None:
        module = self._manager.kernel.modules.at(regs.rdi)
        self._manager.memory_freed(tuple((start, size) for start, size, _ in module.regions))
        self._manager.kernel.modules.forget(module)
