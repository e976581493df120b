"""Where things are kept: the cache, the runtime directory and the RAM directory."""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kgdbx.errors import MachineError

__all__ = (
    "cache_dir",
    "locked",
    "populate",
    "ram_dir",
    "runtime_dir",
    "wait_until",
)

_SHM = Path("/dev/shm")
# Containers often have 64 MB only.
_SHM_BYTES = 2 << 30


def cache_dir() -> Path:
    """Directory of what can be fetched or built again, ``$XDG_CACHE_HOME/kgdbx``.

    :raises MachineError: if it cannot be made
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    path = home / "kgdbx"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise MachineError(
            f"cannot make {path}: {e.strerror}; set XDG_CACHE_HOME to a directory of yours"
        ) from e
    return path


def runtime_dir() -> Path:
    """Private directory of sockets and of the state of running VMs.

    :raises MachineError: if the directory belongs to someone else or is open to others
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(base) and os.path.isdir(base):
        return _private_dir(Path(base) / "kgdbx")
    return _private_dir(Path(f"/tmp/kgdbx-{os.getuid()}"))


def ram_dir() -> Path:
    """Private directory on tmpfs for guest RAM, or the runtime directory where that is too small.

    :raises MachineError: if the directory belongs to someone else or is open to others
    """
    if os.access(_SHM, os.W_OK | os.X_OK) and shutil.disk_usage(_SHM).total >= _SHM_BYTES:
        return _private_dir(_SHM / f"kgdbx-{os.getuid()}")
    return runtime_dir()


@contextlib.contextmanager
def locked(path: Path, timeout_s: float = 900.0) -> Iterator[None]:
    """Hold the lock file *path*; a second process, or thread, waits for its turn.

    :param timeout_s: seconds to wait; the default outlasts the download of a kernel
    :raises MachineError: if it is still held by someone else then, or cannot be made
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise MachineError(f"cannot lock {path}: {e.strerror}") from e
    try:
        if not wait_until(lambda: _try_lock(descriptor), timeout_s):
            raise MachineError(
                f"cannot lock {path} within {timeout_s:g} s; another kgdbx holds it: wait for it "
                "or end it"
            )
        yield
    finally:
        os.close(descriptor)


def populate(path: Path, fill: Callable[[Path], None]) -> Path:
    """Make the directory *path* once, whole or not at all.

    :param fill: called with an empty directory that becomes *path* when it returns; not called
        if *path* exists already
    :return: *path*
    :raises MachineError: if it cannot be made, as on a full disk
    """
    with locked(path.parent / f".{path.name}.lock"):
        if not path.exists():
            # What processes left that were killed here; the lock says that nobody is at it now.
            for rest in path.parent.glob(f".{path.name}.????????"):
                shutil.rmtree(rest, ignore_errors=True)
            try:
                _fill(path, fill)
            except OSError as e:
                raise MachineError(f"cannot make {path}: {e}") from e
    return path


def wait_until(
    condition: Callable[[], bool], timeout_s: float, *, longest_pause_s: float = 0.05
) -> bool:
    """Poll *condition* with growing pauses until it holds or *timeout_s* seconds have passed.

    :param longest_pause_s: seconds that the pauses grow to
    :return: whether it held
    """
    deadline = time.monotonic() + timeout_s
    pause = 0.0005
    while not condition():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, longest_pause_s)
    return True


def _fill(path: Path, fill: Callable[[Path], None]) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        fill(scratch)
        scratch.rename(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


# /tmp and /dev/shm are open to everyone, so someone else may have made the name first.
def _private_dir(path: Path) -> Path:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise MachineError(f"{path} is not a directory of this user; remove it")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise MachineError(f"{path} is open to other users; run: chmod 700 {path}")
    return path


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
