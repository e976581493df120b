"""apt itself, on mirrors that do not answer."""

import shutil
from pathlib import Path

import pytest

from kgdbx.errors import MachineError
from kgdbx.machine import packages
from kgdbx.machine.packages import extract, find_versions
from kgdbx.machine.sources import Source

pytestmark = pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt")


def test_a_mirror_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packages, "_RETRIES", 0)  # apt waits between them
    dead = Source("http://127.0.0.1:1/debian", packages.codename(), ("main",))
    monkeypatch.setattr(packages, "read_sources", lambda: [dead])
    with pytest.raises(MachineError, match=r"^no Debian mirror answers; check the network: .*127"):
        find_versions("busybox-static")


def test_a_damaged_package(tmp_path: Path) -> None:
    deb = tmp_path / "a.deb"
    deb.write_bytes(b"!<arch>\ndamaged")
    with pytest.raises(MachineError, match=r"^dpkg-deb failed: .*a\.deb"):
        extract(deb, tmp_path / "out")
