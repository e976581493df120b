"""The host's side of the exec agent against a socket that plays the guest."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kgdbx.errors import MachineError
from kgdbx.machine.agent import Agent, Completed


class Guest:
    """The guest's serial port."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.port = socket.socket()

    def accept(self) -> None:
        self.port.close()
        self.port, _ = self._listener.accept()
        self.port.settimeout(5)

    def read_line(self) -> list[str]:
        line = b""
        while not line.strip() or not line.endswith(b"\n"):
            line += self.port.recv(1)
        return line.decode().split()

    def frame(self, identity: str, kind: str, data: bytes) -> bytes:
        return b"\x01kx %s %s %d\n%s" % (identity.encode(), kind.encode(), len(data), data)

    def close(self) -> None:
        self.port.close()
        self._listener.close()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path / "exec.sock")
    yield guest
    guest.close()


@pytest.fixture
def agent(tmp_path: Path, guest: Guest) -> Iterator[Agent]:
    agent = Agent("one", tmp_path / "exec.sock", tmp_path / "console.log", lambda: True)
    yield agent
    agent.close()


def test_command_goes_out_and_result_comes_back(agent: Agent, guest: Guest) -> None:
    command = agent.start("echo \n'ü'")
    guest.accept()
    verb, identity, text = guest.read_line()
    assert (verb, bytes.fromhex(text).decode()) == ("run", "echo \n'ü'")
    assert command.poll() is None
    guest.port.send(guest.frame(identity, "o", b"\x01kx \n\0"))
    guest.port.send(guest.frame(identity, "x", b"3"))
    assert command.wait(5) == Completed(3, "\x01kx \n\0")
    assert command.poll() == 3


def test_noise_and_strangers_are_skipped(agent: Agent, guest: Guest) -> None:
    command = agent.start("true")
    guest.accept()
    _, identity, _ = guest.read_line()
    noise = bytes(range(256)) + b"\x01kx \x01kx 12 o 5\n"
    stranger = guest.frame("0123456789abcdef", "o", b"not ours")
    guest.port.send(noise + stranger + guest.frame(identity, "x", b"0"))
    assert command.wait(5) == Completed(0, "")


def test_frame_in_single_bytes(agent: Agent, guest: Guest) -> None:
    command = agent.start("true")
    guest.accept()
    _, identity, _ = guest.read_line()
    for byte in guest.frame(identity, "o", b"abc") + guest.frame(identity, "x", b"0"):
        assert command.poll() is None
        guest.port.send(bytes([byte]))
    assert command.wait(5) == Completed(0, "abc")


def test_two_at_once_end_in_any_order(agent: Agent, guest: Guest) -> None:
    first, second = agent.start("first"), agent.start("second")
    guest.accept()
    ids = [guest.read_line()[1], guest.read_line()[1]]
    guest.port.send(guest.frame(ids[1], "x", b"2") + guest.frame(ids[0], "x", b"1"))
    assert (first.wait(5).status, second.wait(5).status) == (1, 2)


def test_no_answer(agent: Agent, guest: Guest) -> None:
    command = agent.start("sleep 9")
    with pytest.raises(MachineError, match=r"'sleep 9' in VM one has not ended after 0\.01 s"):
        command.wait(0.01)
    guest.accept()
    _, identity, _ = guest.read_line()
    command.discard()
    assert guest.read_line() == ["kill", identity]
    assert guest.port.recv(1) == b""  # idle: others get their turn


def test_guest_goes_away(agent: Agent, guest: Guest) -> None:
    command = agent.start("reboot")
    guest.accept()
    guest.close()
    for _ in range(2):
        with pytest.raises(MachineError, match="VM one is gone; its last words are in "):
            command.wait(5)
    with pytest.raises(MachineError, match="VM one is gone"):
        agent.start("true")


def test_command_too_long(agent: Agent) -> None:
    with pytest.raises(MachineError, match="a command of 100001 characters is too long"):
        agent.start("x" * 100_001)
