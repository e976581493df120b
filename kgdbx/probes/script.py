"""Probe scripts: plain Python files whose handlers are marked with decorators.

::

    from kgdbx.probes.script import jprobe, kprobe, kretprobe, watch

    @kprobe("vfs_read+0x10")
    def pre(p, regs):
        print(f"{regs.ip:#x}")

    @jprobe("do_sys_openat2")
    def opened(filename, how):
        print(filename, how.flags)

    @kretprobe("do_sys_openat2", maxactive=20)
    def returned(ri, retval):
        print(ri.task.comm, retval)

A script finds ``session``, ``kernel`` and ``prog`` (the drgn program) as global names. It may
define ``start(session)`` and ``stop(session)``, which run after its probes are registered and
before they are removed.
"""

import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kgdbx.errors import CommandError, KgdbxError
from kgdbx.probes.jprobe import Jprobe
from kgdbx.probes.kprobe import Kprobe
from kgdbx.probes.kretprobe import Kretprobe
from kgdbx.probes.probe import Probe
from kgdbx.probes.user_trace import user_trace
from kgdbx.probes.watch import Watch

__all__ = ("Script", "jprobe", "kprobe", "kretprobe", "read_script", "watch")

_MARK = "__kgdbx_probes__"
_Handler = TypeVar("_Handler", bound=Callable[..., Any])


def kprobe(
    where: str | int,
    *,
    post_handler: Callable[..., Any] | None = None,
    fault_handler: Callable[..., Any] | None = None,
    name: str | None = None,
    hardware: bool = False,
) -> Callable[[_Handler], _Handler]:
    """Make the function a kprobe's ``pre_handler``; see :class:`~kgdbx.probes.kprobe.Kprobe`."""
    return _marker(
        lambda handler: Kprobe(
            where,
            handler,
            post_handler=post_handler,
            fault_handler=fault_handler,
            name=name,
            hardware=hardware,
        )
    )


def jprobe(
    where: str | int, *, name: str | None = None, hardware: bool = False
) -> Callable[[_Handler], _Handler]:
    """Make the function a jprobe's handler; see :class:`~kgdbx.probes.jprobe.Jprobe`."""
    return _marker(lambda handler: Jprobe(where, handler, name=name, hardware=hardware))


def kretprobe(
    where: str | int,
    *,
    maxactive: int = 0,
    entry_handler: Callable[..., Any] | None = None,
    name: str | None = None,
    hardware: bool = False,
) -> Callable[[_Handler], _Handler]:
    """Make the function a kretprobe's handler; see
    :class:`~kgdbx.probes.kretprobe.Kretprobe`.
    """
    return _marker(
        lambda handler: Kretprobe(
            where,
            handler,
            maxactive=maxactive,
            entry_handler=entry_handler,
            name=name,
            hardware=hardware,
        )
    )


def watch(
    where: str | int, *, size_bytes: int = 8, access: str = "w", name: str | None = None
) -> Callable[[_Handler], _Handler]:
    """Make the function a data watch's handler; see :class:`~kgdbx.probes.watch.Watch`."""
    return _marker(
        lambda handler: Watch(where, handler, size_bytes=size_bytes, access=access, name=name)
    )


class Script:
    """A probe script that was run.

    :param names: its global names
    :ivar probes: in the order in which they are defined
    """

    def __init__(self, path: Path, names: dict[str, Any]) -> None:
        self._path = path
        self._names = names
        makers = [m for value in names.values() for m in getattr(value, _MARK, ()) if m]
        self.probes: list[Probe] = [make() for make in dict.fromkeys(makers)]

    def start(self, session: object) -> None:
        """Call its ``start(session)``, if it has one.

        :raises CommandError: with the script's own lines, if that raises
        :raises KgdbxError: if kgdbx refuses what it asks for
        """
        self._call("start", session)

    def stop(self, session: object) -> None:
        """Call its ``stop(session)``; see :meth:`start`."""
        self._call("stop", session)

    @property
    def has_start(self) -> bool:
        """Whether it defines ``start(session)``."""
        return "start" in self._names

    def _call(self, name: str, session: object) -> None:
        hook = self._names.get(name)
        if hook is None:
            return
        try:
            hook(session)
        except KgdbxError:
            raise
        except Exception as e:
            raise _failed(self._path, e, f"{name}() of ") from e


def read_script(path: Path, names: Mapping[str, Any]) -> Script:
    """Run a probe script.

    :param names: its global names
    :raises CommandError: if the file cannot be read or raises, or defines no probe
    """
    try:
        path.open("rb").close()
    except OSError as e:
        raise CommandError(f"cannot read the probe script {path}: {e.strerror}") from e
    try:
        found = runpy.run_path(str(path), init_globals=dict(names), run_name="__kgdbx__")
    except Exception as e:
        raise _failed(path, e) from e
    script = Script(path, found)
    if not script.probes and not script.has_start:
        raise CommandError(
            f"{path} defines no probe; mark a handler with @kprobe, @jprobe, @kretprobe or @watch"
        )
    return script


def _failed(path: Path, error: Exception, what: str = "") -> CommandError:
    return CommandError(f"{what}the probe script {path} failed:\n{user_trace(error).rstrip()}")


def _marker(make: Callable[[_Handler], Probe]) -> Callable[[_Handler], _Handler]:
    def mark(handler: _Handler) -> _Handler:
        def maker() -> Probe:
            probe = make(handler)
            if probe.name == f"{type(probe).__name__.lower()}{probe.number}":
                probe.name = f"{getattr(handler, '__name__', 'handler')}{probe.number}"
            return probe

        # Decorators nearest to the function run first.
        setattr(handler, _MARK, (maker, *getattr(handler, _MARK, ())))
        return handler

    return mark
