"""The private apt takes its mirrors from the system's sources, in both formats."""

from pathlib import Path

import pytest

from kgdbx.errors import MachineError
from kgdbx.machine.sources import Source, parse_deb822, parse_list, private_sources, read_sources

ONE_LINE = """
# deb http://off.example/debian bookworm main
deb http://mirror.example/debian bookworm main contrib # a comment
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by=/keys/k.gpg]\thttp://sec.example/debian-security  bookworm-security main
"""

DEB822 = """\
Types: deb deb-src
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
 contrib
Signed-By: /keys/k.gpg

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://sec.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF
"""


def test_parse_list() -> None:
    assert parse_list(ONE_LINE) == [
        Source("http://mirror.example/debian", "bookworm", ("main", "contrib")),
        Source("http://sec.example/debian-security", "bookworm-security", ("main",), "/keys/k.gpg"),
    ]


def test_parse_deb822() -> None:
    mirror, parts = "http://mirror.example/debian", ("main", "contrib")
    assert parse_deb822(DEB822) == [
        Source(mirror, "bookworm", parts, "/keys/k.gpg"),
        Source(mirror, "bookworm-updates", parts, "/keys/k.gpg"),
        Source("http://sec.example/debian-security", "bookworm-security", ("main",)),
    ]


def test_read_sources_reads_both_formats(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://a.example/debian trixie main\n")
    (tmp_path / "sources.list.d/b.sources").write_text(DEB822)
    (tmp_path / "sources.list.d/c.list.save").write_text("deb http://no.example/debian x main\n")
    assert [s.suite for s in read_sources(tmp_path)] == [
        "trixie",
        "bookworm",
        "bookworm-updates",
        "bookworm-security",
    ]


def _suites(text: str) -> list[str]:
    return [
        line.split("] ")[-1].removeprefix("deb ").rsplit(" ", 1)[0] for line in text.split("\n")
    ]


def test_private_sources_of_bookworm_have_backports() -> None:
    text = private_sources(parse_deb822(DEB822), "bookworm")
    assert _suites(text) == [
        "http://mirror.example/debian bookworm",
        "http://sec.example/debian-security bookworm-security",
        "http://mirror.example/debian bookworm-backports",
        "",
    ]
    assert text.startswith("deb [signed-by=/keys/k.gpg] ")


def test_private_sources_of_trixie_have_the_kernel_of_bookworm() -> None:
    sources = [
        Source("http://m.example/debian", "trixie", ("main",), "/k.gpg"),
        Source("http://s.example/debian", "trixie-security", ("main",), "/k.gpg"),
    ]
    assert _suites(private_sources(sources, "trixie")) == [
        "http://m.example/debian bookworm",
        "http://s.example/debian bookworm-security",
        "http://m.example/debian trixie",
        "http://s.example/debian trixie-security",
        "",
    ]


def test_private_sources_without_a_mirror() -> None:
    other = [Source("https://other.example/apt", "nodistro", ("main",))]
    with pytest.raises(MachineError, match="no Debian mirror for bookworm main"):
        private_sources(other, "bookworm")
