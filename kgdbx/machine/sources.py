"""The system's apt sources, read to make private ones from.

Both formats are read: one line a source (``sources.list``) and deb822 stanzas (``*.sources``).
"""

import dataclasses
import platform
from pathlib import Path

from kgdbx.errors import MachineError

__all__ = ("Source", "codename", "parse_deb822", "parse_list", "private_sources", "read_sources")

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Releases whose kernels and QEMU are used, oldest first.
_RELEASES = ("bookworm", "trixie")


@dataclasses.dataclass(frozen=True)
class Source:
    """One suite of one mirror.

    :ivar signed_by: path of a keyring, or empty
    """

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""


def codename() -> str:
    """Name of the Debian release that runs here, such as ``bookworm``.

    :raises MachineError: if this is not Debian
    """
    try:
        release = platform.freedesktop_os_release()
    except OSError as e:
        raise MachineError("no /etc/os-release; kernels are fetched on Debian only") from e
    name = release.get("VERSION_CODENAME", "")
    if release.get("ID") != "debian" or name not in _RELEASES:
        raise MachineError(
            f"this is {release.get('PRETTY_NAME', 'unknown')}; kernels are fetched on Debian "
            f"{' or '.join(_RELEASES)} only"
        )
    return name


def read_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """All binary package sources of the system."""
    found: list[Source] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if path.is_file() and path.suffix == ".list":
            found += parse_list(path.read_text(errors="replace"))
        elif path.is_file() and path.suffix == ".sources":
            found += parse_deb822(path.read_text(errors="replace"))
    return found


def parse_list(text: str) -> list[Source]:
    """Read the one-line format: ``deb [signed-by=KEYRING] URI SUITE COMPONENT...``."""
    found = []
    for line in text.splitlines():
        kind, _, rest = line.partition("#")[0].strip().replace("\t", " ").partition(" ")
        if kind != "deb":
            continue
        signed_by, rest = "", rest.strip()
        if rest.startswith("["):
            options, _, rest = rest[1:].partition("]")
            for option in options.split():
                name, _, value = option.partition("=")
                signed_by = value if name.lower() == "signed-by" else signed_by
        words = rest.split()
        if len(words) >= 2:
            found.append(Source(words[0], words[1], tuple(words[2:]), signed_by))
    return found


def parse_deb822(text: str) -> list[Source]:
    """Read the stanzas of a ``.sources`` file. A key written into the stanza itself is dropped."""
    found: list[Source] = []
    for fields in _stanzas(text):
        if fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        if "deb" not in fields.get("types", "").split():
            continue
        key = fields.get("signed-by", "").strip()
        components = tuple(fields.get("components", "").split())
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                found.append(Source(uri, suite, components, key if key.startswith("/") else ""))
    return found


def private_sources(sources: list[Source], release: str) -> str:
    """A ``sources.list`` of the Debian mirrors among *sources* for all releases that we use.

    :param release: code name of the system's own release
    :raises MachineError: if none of *sources* is a mirror of that release
    """
    aliases = {release, "stable", "oldstable"}
    archive = next((s for s in sources if s.suite in aliases and "main" in s.components), None)
    security = next((s for s in sources if s.suite in {f"{a}-security" for a in aliases}), None)
    if archive is None:
        raise MachineError(
            f"no Debian mirror for {release} main in the apt sources; add one to /etc/apt"
        )
    lines = []
    for name in _RELEASES[: _RELEASES.index(release) + 1]:
        lines.append(_line(archive, name))
        if security is not None:
            lines.append(_line(security, f"{name}-security"))
    if release != _RELEASES[-1]:
        lines.append(_line(archive, f"{release}-backports"))
    return "".join(lines)


def _line(source: Source, suite: str) -> str:
    key = source.signed_by or (str(_KEYRING) if _KEYRING.exists() else "")
    option = f"[signed-by={key}] " if key else ""
    return f"deb {option}{source.uri} {suite} main\n"


def _stanzas(text: str) -> list[dict[str, str]]:
    stanzas: list[dict[str, str]] = [{}]
    name = ""
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if not line.strip():
            stanzas.append({})
        elif line[0] in " \t":
            stanzas[-1][name] = f"{stanzas[-1].get(name, '')} {line.strip()}"
        else:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            stanzas[-1][name] = value.strip()
    return [stanza for stanza in stanzas if stanza]
