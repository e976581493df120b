"""Paths that readers open: private, not in place of anything, and gone at the end."""

import os
import socket
import stat
from pathlib import Path

import pytest

from kgdbx.trace.endpoint import FifoEndpoint, SocketEndpoint
from kgdbx.trace.errors import TraceError

Kind = type[FifoEndpoint] | type[SocketEndpoint]
BOTH = pytest.mark.parametrize("kind", [FifoEndpoint, SocketEndpoint])


@BOTH
def test_only_for_this_user_and_gone_at_the_end(kind: Kind, tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        endpoint = kind(tmp_path / "events")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(endpoint.path.stat().st_mode) == 0o600
    endpoint.close()
    assert list(tmp_path.iterdir()) == []
    endpoint.close()


@BOTH
def test_private_directory(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    endpoint = kind()
    assert endpoint.path.parent.parent == tmp_path
    assert stat.S_IMODE(endpoint.path.parent.stat().st_mode) == 0o700
    endpoint.close()
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_files_are_not_overwritten(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(TraceError, match=rf"^{path}: exists and is no (FIFO|socket); give another"):
        kind(path)
    assert path.read_text() == "data"
    with pytest.raises(TraceError, match="nowhere/x: No such file"):
        kind(tmp_path / "nowhere" / "x")


@BOTH
def test_links_are_not_followed(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(TraceError, match="link: exists and is no"):
        kind(tmp_path / "link")
    assert not (tmp_path / "target").exists()


def test_a_fifo_of_the_users_is_used_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    os.mkfifo(path)
    FifoEndpoint(path).close()
    assert path.is_fifo()


def test_what_took_the_path_later_stays(tmp_path: Path) -> None:
    for kind in (FifoEndpoint, SocketEndpoint):
        path = tmp_path / "events"
        endpoint = kind(path)
        path.unlink()
        path.write_text("data")
        endpoint.close()
        assert path.read_text() == "data"
        path.unlink()


def test_a_file_that_took_the_fifos_path_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "events"
    endpoint = FifoEndpoint(path)
    path.unlink()
    assert list(endpoint.accept(0)) == []
    path.write_text("data")
    with pytest.raises(TraceError, match="exists and is no FIFO"):
        list(endpoint.accept(0))
    endpoint.close()
    assert path.read_text() == "data"


def test_abandoned_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "events"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(path))
    endpoint = SocketEndpoint(path)
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(str(path))
        (number,) = endpoint.accept(0)
        os.close(number)
    endpoint.close()


def test_socket_in_use(tmp_path: Path) -> None:
    first = SocketEndpoint(tmp_path / "events")
    with pytest.raises(TraceError, match="another program listens there"):
        SocketEndpoint(tmp_path / "events")
    assert first.path.is_socket()
    first.close()
    with pytest.raises(TraceError, match="AF_UNIX path too long"):
        SocketEndpoint(tmp_path / ("x" * 120))


def test_fifo_reader(tmp_path: Path) -> None:
    endpoint = FifoEndpoint(tmp_path / "events")
    assert list(endpoint.accept(0)) == []
    reader = os.open(endpoint.path, os.O_RDONLY | os.O_NONBLOCK)
    (writer,) = endpoint.accept(0)
    assert not os.get_blocking(writer)
    assert list(endpoint.accept(1)) == []
    os.close(writer)
    os.close(reader)
    endpoint.close()
