"""Debian packages without installing them: a private apt beside the system's own.

Mirrors, proxies and keys are the system's; lists, archives and pins are ours, so neither root nor
a change to the system is needed.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.cache import cache_dir, locked, wait_until
from kgdbx.machine.progress import Progress, terminal_progress
from kgdbx.machine.sources import codename, private_sources, read_sources

__all__ = ("Package", "download", "download_missing", "extract", "find_versions")

_LISTS_FRESH_S = 600.0
_DEADLINE_S = 1800.0
_RETRIES = 3


@dataclasses.dataclass(frozen=True)
class Package:
    """One version of a package, as the archive describes it."""

    name: str
    version: str
    depends: tuple[str, ...]


def find_versions(name: str) -> tuple[Package, ...]:
    """All versions of a package that the mirrors have, newest first.

    :raises MachineError: if there is none
    """
    with _lists():
        text = _run("apt-cache", *_options(), "show", name)
    packages = tuple(_parse_stanza(stanza) for stanza in text.split("\n\n") if stanza.strip())
    if not packages:
        raise MachineError(f"the Debian mirrors have no package {name}; check the apt sources")
    return packages


def download(
    packages: Sequence[Package], directory: Path, progress: Progress = terminal_progress
) -> list[Path]:
    """Download exactly these versions.

    :param directory: where the files go; ours to write
    :return: the ``.deb`` files
    :raises MachineError: if apt cannot get one of them
    """
    specs = [f"{package.name}={package.version}" for package in packages]
    return _fetch(["download"], specs, directory, directory, progress)


def download_missing(
    names: Sequence[str], directory: Path, progress: Progress = terminal_progress
) -> list[Path]:
    """Download the newest version of packages with those dependencies that the system lacks.

    On an older Debian that is the one from its backports.

    :param directory: where the files go; ours to write
    :return: the ``.deb`` files
    :raises MachineError: if apt cannot get one of them
    """
    (directory / "partial").mkdir(parents=True, exist_ok=True)
    arguments = ["install", "--yes", "--no-install-recommends", "--download-only", "--reinstall"]
    if _has_backports():
        arguments += ["-t", f"{codename()}-backports"]
    # Nothing is installed, so the lock of dpkg is not needed.
    arguments += ["-o", f"Dir::Cache::archives={directory}", "-o", "Debug::NoLocking=1"]
    return _fetch(arguments, names, directory / "partial", directory, progress)


def extract(deb: Path, directory: Path) -> None:
    """Unpack the files of a package, without running its scripts.

    :raises MachineError: if the file is damaged
    """
    directory.mkdir(parents=True, exist_ok=True)
    _run("dpkg-deb", "--extract", str(deb), str(directory))


# apt writes to `growing` while it loads; the finished files are in `directory`.
def _fetch(
    arguments: list[str],
    names: Sequence[str],
    growing: Path,
    directory: Path,
    progress: Progress,
) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    with _lists():
        plan = _run("apt-get", *_options(), "--print-uris", *arguments, *names, cwd=directory)
        sizes = [int(size) for size in re.findall(r"^'[^']+' \S+ (\d+) ", plan, re.MULTILINE)]
        total, count = sum(sizes), len(sizes)

        def loaded() -> int:
            return sum(_size(path) for d in {growing, directory} for path in d.glob("*.deb*"))

        with subprocess.Popen(
            [_tool("apt-get"), *_options(), "-q", *arguments, *names],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        ) as process:

            def finished() -> bool:
                progress(f"{count} Debian packages", min(loaded(), max(total - 1, 0)), total)
                return process.poll() is not None

            if not wait_until(finished, _DEADLINE_S, longest_pause_s=0.2):
                process.kill()
            _, errors = process.communicate()
        if process.returncode != 0:
            raise MachineError(
                f"apt cannot download {' '.join(names)}; check the network: {_reason(errors)}"
            )
        progress(f"{count} Debian packages", total, total)
    return sorted(directory.glob("*.deb"))


@contextlib.contextmanager
def _lists() -> Iterator[None]:
    # Ours alone meanwhile, and as new as can be had; an error for want of newer ones says so.
    with locked(cache_dir() / "apt" / "lock"):
        reason = _update()
        try:
            yield
        except MachineError as e:
            if not reason:
                raise
            raise MachineError(
                f"{e}; the package lists are old or incomplete, check the network: {reason}"
            ) from e


def _update() -> str:
    # Why the lists are not up to date; empty if they are.
    root = cache_dir() / "apt"
    for part in ("lists/partial", "archives/partial"):
        (root / part).mkdir(parents=True, exist_ok=True)
    text = private_sources(read_sources(), codename())
    sources, stamp = root / "sources.list", root / "updated"
    same = sources.exists() and sources.read_text() == text
    if same and stamp.exists() and time.time() - stamp.stat().st_mtime < _LISTS_FRESH_S:
        return ""
    sources.write_text(text)
    stamp.unlink(missing_ok=True)
    try:
        # Without the mode, apt takes a mirror that does not answer for one with nothing new.
        _run("apt-get", *_options(), "-q", "-o", "APT::Update::Error-Mode=any", "update")
    except MachineError as e:
        # A suite that the mirror does not carry is no reason to fail while others answer.
        if not any((root / "lists").glob("*_Packages*")):
            raise MachineError(f"no Debian mirror answers; check the network: {e}") from e
        return str(e)
    stamp.touch()
    return ""


def _options() -> list[str]:
    root = cache_dir() / "apt"
    settings = (
        f"Dir::Etc::sourcelist={root}/sources.list",
        "Dir::Etc::sourceparts=-",
        "Dir::Etc::preferences=-",
        "Dir::Etc::preferencesparts=-",
        f"Dir::State::lists={root}/lists",
        f"Dir::Cache={root}",
        "APT::Get::List-Cleanup=0",
        "APT::Sandbox::User=",
        "Acquire::Languages=none",
        f"Acquire::Retries={_RETRIES}",
    )
    return [word for setting in settings for word in ("-o", setting)]


def _parse_stanza(stanza: str) -> Package:
    fields = dict(re.findall(r"^([\w-]+): (.*)$", stanza, re.MULTILINE))
    depends = re.findall(r"(?:^|,) *([^ ,]+)", fields.get("Depends", ""))
    return Package(fields["Package"], fields["Version"], tuple(depends))


def _has_backports() -> bool:
    return f"{codename()}-backports" in private_sources(read_sources(), codename())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # apt renamed it meanwhile
        return 0


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise MachineError(f"{name} is not on this machine; kgdbx fetches on Debian only")
    return path


def _run(name: str, *arguments: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            [_tool(name), *arguments],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
            env=_environment(),
        )
    except subprocess.TimeoutExpired as e:
        raise MachineError(f"{name} did not end within {_DEADLINE_S:g} s") from e
    if done.returncode != 0:
        raise MachineError(f"{name} failed: {_reason(done.stderr)}")
    return done.stdout


def _reason(errors: str) -> str:
    # apt says the same of every suite; the first says enough.
    said = [line.removeprefix("E: ") for line in errors.splitlines() if line.startswith("E: ")]
    return said[0] if said else errors.strip()
