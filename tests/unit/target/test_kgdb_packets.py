"""Packets to KGDB over a line that says what a script has it say."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kgdbx.errors import ProtocolError, TargetTimeout
from kgdbx.target.kgdb_packets import KgdbConnection
from kgdbx.target.serial_line import SerialLine

ANSWER_S = 3.0
Step = tuple[bytes, bytes] | tuple[bytes, bytes, float]
Attach = Callable[..., KgdbConnection]


def framed(payload: bytes) -> bytes:
    return b"$%b#%02x" % (payload, sum(payload) & 0xFF)


class Script:
    """Waits for bytes, then says bytes, after a pause or at once, in order."""

    def __init__(self, path: Path, steps: list[Step]) -> None:
        self.seen = b""
        self._steps = steps
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        stream, _ = self._listener.accept()
        with stream, contextlib.suppress(OSError):
            stream.settimeout(0.02)
            since = 0
            for wanted, answer, *pauses_s in self._steps:
                while wanted not in self.seen[since:] and not self._ended.is_set():
                    with contextlib.suppress(TimeoutError):
                        self.seen += stream.recv(4096)
                since = self.seen.find(wanted, since) + len(wanted)
                time.sleep(sum(pauses_s))
                stream.sendall(answer)
            self._ended.wait(30)

    def close(self) -> None:
        self._ended.set()
        self._thread.join(5)
        assert not self._thread.is_alive()
        self._listener.close()


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Attach]:
    with contextlib.ExitStack() as stack:

        def make(steps: list[Step], answer_s: float = ANSWER_S) -> KgdbConnection:
            script = Script(tmp_path / "line.sock", steps)
            stack.callback(script.close)
            line = SerialLine(str(tmp_path / "line.sock"), 5.0)
            connection = KgdbConnection(line, answer_s)
            stack.callback(connection.close)
            return connection

        yield make


M1 = framed(b"m1000,2")


def test_a_reply_counts_behind_its_acknowledgment(attach: Attach) -> None:
    connection = attach([(M1, framed(b"dead") + b"+" + framed(b"1122"))])
    assert connection.exchange(b"m1000,2") == (b"1122", False)
    assert connection.noisy  # the first one was an older one


def test_a_damaged_reply_is_asked_for_again(attach: Attach) -> None:
    connection = attach([(M1, b"+$1123#c6"), (b"-", framed(b"1122"))])
    assert connection.exchange(b"m1000,2") == (b"1122", False)


def test_a_command_that_was_damaged_is_sent_again(attach: Attach) -> None:
    connection = attach([(M1, b"-"), (M1, b"+" + framed(b"1122"))])
    assert connection.exchange(b"m1000,2") == (b"1122", True)


def test_a_noisy_line_is_read_until_two_replies_are_the_same(attach: Attach) -> None:
    answers = [b"1122", b"9922", b"1122", b"1122"]
    steps = [(M1, b"-"), *((M1, b"+" + framed(answer)) for answer in answers)]
    assert attach(steps).read(b"m1000,2") == b"1122"


def test_a_line_that_never_agrees_is_an_error(attach: Attach) -> None:
    steps = [(M1, b"-"), *((M1, b"+" + framed(b"%04x" % n)) for n in range(10000))]
    with pytest.raises(ProtocolError, match="garbles"):
        attach(steps, answer_s=1.5).read(b"m1000,2")


def test_silence_is_an_error_in_its_time(attach: Attach) -> None:
    started = time.monotonic()
    with pytest.raises(TargetTimeout, match="does the kernel run"):
        attach([]).exchange(b"m1000,2")
    assert time.monotonic() - started < 4 * ANSWER_S


def test_a_lost_acknowledgment_of_a_resume_does_not_resume_twice(attach: Attach) -> None:
    # The kernel runs, and answers nothing; later it stops.
    connection = attach([(framed(b"c"), b""), (framed(b"qC"), b"")])
    assert connection.start(b"c") is None
    assert connection.receive_stop(time.monotonic() + 0.1) is None


def test_a_resume_that_was_lost_is_sent_again(attach: Attach) -> None:
    c, alive = framed(b"c"), framed(b"qC")
    connection = attach([(c, b""), (alive, b"+" + framed(b"QC01")), (c, b"+")])
    assert connection.start(b"c") is None


def test_a_resume_whose_rest_was_lost_is_sent_again(attach: Attach) -> None:
    # KGDB takes the question for the rest of it.
    c, alive, told = framed(b"c"), framed(b"qC"), b"+" + framed(b"QC01")
    assert (
        attach([(c, b""), (alive, b"-"), (alive, told), (alive, told), (c, b"+")]).start(b"c")
        is None
    )


def test_a_refusal_that_comes_late_and_the_answer_behind_it(attach: Attach) -> None:
    # KGDB was slow: the question is answered, too, and that is no acknowledgment of the resume.
    c, alive, told = framed(b"c"), framed(b"qC"), b"+" + framed(b"QC01")
    steps = [(c, b""), (alive, b"-"), (alive, told + b"-"), (alive, told), (c, b"+"), (c, b"+")]
    connection = attach(steps)
    assert connection.start(b"c") is None
    assert connection.receive_stop(time.monotonic() + 0.5) is None


@pytest.mark.parametrize("late", [b"+" + framed(b"QC01"), b"-"], ids=["answer", "refusal"])
def test_a_kernel_that_has_never_run_is_sent_on(attach: Attach, late: bytes) -> None:
    # The resume was lost, or its end, and KGDB slower than we wait for what it says to that.
    c, alive, told = framed(b"c"), framed(b"qC"), b"+" + framed(b"QC01")
    stop = b"T05thread:01;"
    steps = [(c, b""), (alive, late, 1.0), (alive, told), (alive, told), (c, b"+" + framed(stop))]
    connection = attach(steps)
    assert connection.start(b"c") is None
    assert connection.receive_stop(time.monotonic() + ANSWER_S) == stop


def test_a_damaged_stop_with_a_refusal_behind_it(attach: Attach) -> None:
    c, alive, told = framed(b"c"), framed(b"qC"), b"+" + framed(b"QC01")
    stop = b"T05thread:01;"
    damaged = framed(stop)[:-1] + b"0"
    steps = [(c, b""), (alive, b"+" + damaged + b"-"), (b"-", b""), (alive, told)]
    connection = attach(steps)
    assert connection.start(b"c") == stop


def test_a_late_refusal_is_not_that_of_a_resume(attach: Attach) -> None:
    # KGDB takes longer than we wait, and refuses the same command when it comes again.
    c, alive, told = framed(b"c"), framed(b"qC"), b"+" + framed(b"QC01")
    ok = b"+" + framed(b"OK")
    steps = [(M1, b""), (M1, ok), (alive, b"-" + told), (alive, told), (alive, told)]
    connection = attach([*steps, (c, b"+"), (c, b"twice")])
    assert connection.exchange(b"m1000,2") == (b"OK", True)
    assert connection.start(b"c") is None
    assert connection.receive_stop(time.monotonic() + 0.5) is None


def test_a_stop_that_kgdb_has_forgotten_is_one(attach: Attach) -> None:
    stop, alive = b"T05thread:01;", framed(b"qC")
    damaged, told = framed(stop)[:-1] + b"0", b"+" + framed(b"QC01")
    # The line lost our asking for it again.
    steps = [(framed(b"c"), damaged), (b"-", b""), (alive, b"-"), (alive, told)]
    assert attach(steps).start(b"c") == stop


def test_a_damaged_stop_that_does_not_come_again_is_one(attach: Attach) -> None:
    stop, alive = b"T05thread:01;", framed(b"qC")
    damaged, told = framed(stop)[:-1] + b"0", b"+" + framed(b"QC01")
    connection = attach([(framed(b"c"), b"+" + damaged), (b"-", b""), (alive, b"-"), (alive, told)])
    assert connection.start(b"c") is None
    assert connection.receive_stop(time.monotonic() + ANSWER_S) == stop


def test_damaged_bytes_of_a_kernel_that_runs_are_no_stop(attach: Attach) -> None:
    connection = attach([(framed(b"c"), b"+$QC0"), (b"-", b"")])
    assert connection.start(b"c") is None
    assert connection.receive_stop(time.monotonic() + 2.5) is None


def test_a_stop_that_comes_damaged_is_asked_for_again(attach: Attach) -> None:
    stop = b"T05thread:01;"
    steps = [(framed(b"c"), b"+" + framed(stop)[:-1] + b"0"), (b"-", framed(stop))]
    connection = attach(steps)
    assert connection.start(b"c") is None
    assert connection.receive_stop(time.monotonic() + ANSWER_S) == stop


def test_a_stop_instead_of_the_acknowledgment(attach: Attach) -> None:
    stop = b"T05thread:01;"
    connection = attach([(framed(b"c"), framed(stop))])
    assert connection.start(b"c") == stop


def test_half_a_stop_is_asked_for_again(attach: Attach) -> None:
    stop = b"T05thread:01;"
    connection = attach([(framed(b"c"), b"+$T05thr"), (b"-", framed(stop))])
    assert connection.start(b"c") is None
    assert connection.receive_stop(time.monotonic() + ANSWER_S) == stop


def test_an_acknowledgment_that_comes_late_and_the_next_stop(attach: Attach) -> None:
    stop = b"T05thread:01;"
    connection = attach([(framed(b"c"), b""), (framed(b"qC"), b"+" + framed(stop) + b"-")])
    assert connection.start(b"c") == stop
