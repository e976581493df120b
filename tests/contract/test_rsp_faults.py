"""Stubs that are slow, broken or gone: an error of the right kind in its time, never a hang."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgdbx.errors import ProtocolError, TargetError, TargetLost, TargetTimeout
from kgdbx.target.base import StopReason
from kgdbx.target.packet import PacketConnection
from kgdbx.target.rsp import RspTarget

ANSWER_S = 0.4
SOON_S = 4.0
ANSWERS = {
    b"D;1": b"OK",
    b"Hg": b"OK",
    b"qSupported": b"PacketSize=1000;vContSupported+",
    b"?": b"T05thread:01;",
    b"qfThreadInfo": b"m01",
    b"qsThreadInfo": b"l",
    b"Qqemu.PhyMemMode:0": b"OK",
    b"vCont?": b"vCont;c;C;s;S",
}
Fault = Callable[[socket.socket], None]


def framed(payload: bytes) -> bytes:
    return b"$%b#%02x" % (payload, sum(payload) & 0xFF)


class Stub:
    """Answers like a stub, until a packet comes for which there is a fault.

    :ivar seen: all that came in
    """

    def __init__(self, path: Path, faults: dict[bytes, Fault]) -> None:
        self.address = str(path)
        self.seen: list[bytes] = []
        self._faults = faults
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                stream, _ = self._listener.accept()
                with stream:
                    self._answer(stream)

    def _answer(self, stream: socket.socket) -> None:
        buffer = b""
        while not self._ended.is_set():
            stream.settimeout(0.05)
            try:
                data = stream.recv(4096)
            except TimeoutError:
                continue
            if not data:
                return
            buffer += data
            while True:
                _, _, rest = buffer.partition(b"$")
                packet, end, rest = rest.partition(b"#")
                if not end or len(rest) < 2:
                    break
                buffer = rest[2:]
                self.seen.append(packet)
                fault = next((f for p, f in self._faults.items() if packet.startswith(p)), None)
                if fault is not None:
                    fault(stream)
                else:
                    answers = (a for p, a in ANSWERS.items() if packet.startswith(p))
                    stream.sendall(b"+" + framed(next(answers, b"")))

    def close(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        assert not self._thread.is_alive()


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Callable[..., Stub]]:
    with contextlib.ExitStack() as stack:

        def make(faults: dict[bytes, Fault] | None = None) -> Stub:
            it = Stub(tmp_path / "gdb.sock", faults or {})
            stack.callback(it.close)
            return it

        yield make


@contextlib.contextmanager
def attached(it: Stub) -> Iterator[RspTarget]:
    target = RspTarget(it.address, answer_s=ANSWER_S)
    try:
        yield target
    finally:
        with contextlib.suppress(TargetError):
            target.close()


@contextlib.contextmanager
def soon(error: type[TargetError]) -> Iterator[None]:
    started = time.monotonic()
    with pytest.raises(error):
        yield
    assert time.monotonic() - started < SOON_S


def silent(stream: socket.socket) -> None:
    pass


def closing(stream: socket.socket) -> None:
    stream.shutdown(socket.SHUT_RDWR)


def sending(data: bytes, *, times: int = 1) -> Fault:
    def fault(stream: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for _ in range(times):
                stream.sendall(data)

    return fault


def closing_after(data: bytes) -> Fault:
    def fault(stream: socket.socket) -> None:
        stream.sendall(data)
        closing(stream)

    return fault


def answering(*answers: bytes) -> Fault:
    # One after the other, the last one again and again.
    left = list(answers)

    def fault(stream: socket.socket) -> None:
        stream.sendall(left.pop(0) if len(left) > 1 else left[0])

    return fault


def test_the_stub_of_these_tests_is_a_stub(stub: Callable[..., Stub]) -> None:
    it = stub({b"m": answering(framed(b"1122"))})
    with attached(it) as target:
        assert target.read_memory(0x1000, 2) == b"\x11\x22"
        assert target.cpus() == (0,)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        pytest.param(silent, TargetTimeout, id="silent"),
        pytest.param(sending(b"$112"), TargetTimeout, id="half a packet"),
        pytest.param(closing, TargetLost, id="closes"),
        pytest.param(closing_after(b"$11"), TargetLost, id="closes in a packet"),
        pytest.param(closing_after(b"$1122#"), TargetLost, id="closes in a checksum"),
        pytest.param(sending(b"x" * 8192), ProtocolError, id="garbage"),
        pytest.param(sending(b"$1122#00" * 20), ProtocolError, id="wrong checksums"),
        pytest.param(sending(b"$1122#zz" * 20), ProtocolError, id="checksums that are none"),
        pytest.param(sending(b"$" + b"1" * 4096, times=600), ProtocolError, id="endless"),
        pytest.param(sending(framed(b"112")), ProtocolError, id="odd hex"),
        pytest.param(sending(framed(b"hello!")), ProtocolError, id="no hex"),
        pytest.param(sending(framed(b"11223344")), ProtocolError, id="more than asked for"),
    ],
)
def test_a_broken_answer(stub: Callable[..., Stub], fault: Fault, error: type[TargetError]) -> None:
    with attached(stub({b"m": fault})) as target, soon(error):
        target.read_memory(0x1000, 2)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        pytest.param(silent, TargetTimeout, id="no answer to a break-in"),
        pytest.param(closing, TargetLost, id="closes"),
        pytest.param(sending(b"x" * 8192), ProtocolError, id="garbage"),
        pytest.param(sending(framed(b"Tzz")), ProtocolError, id="a stop that is none"),
        pytest.param(sending(framed(b"W00")), TargetLost, id="the guest shuts down"),
    ],
)
def test_a_run_that_breaks(
    stub: Callable[..., Stub], fault: Fault, error: type[TargetError]
) -> None:
    with attached(stub({b"vCont;c": fault})) as target, soon(error):
        target.run(timeout_s=0.3)


@pytest.mark.parametrize("packet", [b"D;1", b"qSupported", b"?", b"qXfer"])
@pytest.mark.parametrize(
    ("fault", "errors"),
    [
        (silent, TargetTimeout),
        (closing, TargetLost),
        (sending(b"HTTP/1.1 400 Bad Request\r\n" * 400), ProtocolError),
    ],
)
def test_a_stub_that_breaks_while_attaching(
    stub: Callable[..., Stub], packet: bytes, fault: Fault, errors: type[TargetError]
) -> None:
    it = stub({packet: fault})
    with soon(errors):
        RspTarget(it.address, answer_s=ANSWER_S)


def test_nothing_listens(tmp_path: Path) -> None:
    with soon(TargetError):
        RspTarget(str(tmp_path / "none.sock"))
    with soon(TargetError):
        RspTarget("localhost:1")


def test_a_packet_is_sent_again_on_request(stub: Callable[..., Stub]) -> None:
    it = stub({b"m": answering(b"-", b"+" + framed(b"1122"))})
    with attached(it) as target:
        assert target.read_memory(0x1000, 2) == b"\x11\x22"
    assert it.seen.count(b"m1000,2") == 2


def test_an_answer_is_asked_for_again(stub: Callable[..., Stub]) -> None:
    it = stub({b"m": sending(b"$1122#00" + framed(b"3344"))})
    with attached(it) as target:
        assert target.read_memory(0x1000, 2) == b"\x33\x44"


def test_an_answer_that_comes_late_is_not_taken_for_the_next(stub: Callable[..., Stub]) -> None:
    answers = [b"", framed(b"1122") + framed(b"3344"), framed(b"5566")]
    with attached(stub({b"m": answering(*answers)})) as target:
        with soon(TargetTimeout):
            target.read_memory(0x1000, 2)
        assert target.read_memory(0x2000, 2) == b"\x33\x44"
        assert target.read_memory(0x3000, 2) == b"\x55\x66"


def test_a_stop_between_garbage(stub: Callable[..., Stub]) -> None:
    it = stub({b"vCont;c": sending(b"++xyz" + framed(b"T05thread:p01.01;"))})
    with attached(it) as target:
        stop = target.run(timeout_s=SOON_S)
        assert stop is not None
        assert stop.reason is StopReason.TRAP


# Framing


def escaped(payload: bytes) -> bytes:
    return b"".join(
        b"}" + bytes((byte ^ 0x20,)) if byte in b"#$}*" else bytes((byte,)) for byte in payload
    )


def through(chunks: list[bytes], count: int) -> list[bytes]:
    # Each chunk is what one recv() gives.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = PacketConnection(ours)
    try:
        for chunk in chunks:
            theirs.sendall(chunk)
        return [connection.receive(1.0) for _ in range(count)]
    finally:
        connection.close()
        theirs.close()


@given(st.binary(max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_packet_may_be_split_at_any_byte(payload: bytes) -> None:
    wire = framed(escaped(payload))
    for at in range(1, len(wire)):
        assert through([wire[:at], wire[at:]], 1) == [payload]


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5), st.data())
@settings(max_examples=100, deadline=None)
def test_packets_come_out_as_they_went_in(payloads: list[bytes], data: st.DataObject) -> None:
    wire = b"+".join(framed(escaped(payload)) for payload in payloads)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(wire) - 1), max_size=20)))
    chunks = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert through(chunks, len(payloads)) == payloads


def test_run_length_encoding() -> None:
    assert through([framed(b"0* 1")], 1) == [b"00001"]  # "Overview" in the manual's appendix
