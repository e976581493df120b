"""Packets to KGDB over a serial line that may lose, repeat, delay or change bytes.

The protocol has neither numbers nor times. What KGDB makes of it (get_packet() and put_packet() in
kernel/debug/gdbstub.c) is this: it answers each packet with ``+`` before anything else; it repeats
its own packet at every byte that is no acknowledgment; and at a ``$`` in place of that it says
``-`` and forgets its packet, and the rest of ours. So:

- a reply counts only behind the ``+`` for the packet that asks for it;
- after the first error the line is a noisy one: from then on what is read is read until two
  replies in a row are the same, and what is left of older ones is waited for and dropped;
- what must not be done twice, letting the kernel run, is never repeated blindly.
"""

import math
import re
import select
import time
from collections.abc import Callable
from typing import Protocol

from kgdbx.errors import ProtocolError, TargetTimeout
from kgdbx.target.serial_line import SerialLine
from kgdbx.target.wake import Wake

__all__ = ("KgdbConnection", "KgdbPackets", "Valid")

Valid = Callable[[bytes], bool]
"""Whether a reply is one that a command can have."""

_TOKEN = re.compile(rb"[+-]|\$([^$#]*)#([0-9a-fA-F]{2})")
_RETRY_S = 0.4
_QUIET_S = 0.03
_SPIN_S = 0.0002
_NAP_S = 0.0002
_LONGEST = 4096  # no packet of KGDB has as many bytes (BUFMAX in arch/x86/include/asm/kgdb.h)
_ALIVE = b"qC"  # changes nothing
_ACK, _NAK = b"+", b"-"


def _anything(reply: bytes) -> bool:
    return True


def _is_alive(reply: bytes) -> bool:
    return reply.startswith(b"QC")


class KgdbPackets(Protocol):
    """Exchanges packets with a KGDB that waits for commands: a line of ours, or gdb's."""

    noisy: bool
    """Whether there was an error on the line, so that what is written is read back."""

    def exchange(self, payload: bytes, valid: Valid = ..., /) -> tuple[bytes, bool]:
        """Send a command that may be carried out twice, and get the reply.

        :return: the reply, and whether the command may have been carried out more than once
        """

    def read(self, payload: bytes, valid: Valid = ..., /) -> bytes:
        """Send a command that only reads, and get the reply."""


class KgdbConnection:
    """Exchanges packets with KGDB; one at a time, as it polls its port.

    :param line: owned from now on
    :param answer_s: seconds until a command that has no answer is given up
    :ivar noisy: whether there was an error on the line
    :ivar errors: how many there were
    """

    def __init__(self, line: SerialLine, answer_s: float) -> None:
        self.line = line
        self.noisy = False
        self.errors = 0
        self.packets_sent = 0
        self.wake = Wake()
        self._answer_s = answer_s
        self._buffer = b""
        self._unacknowledged = False
        self._dirty = False  # something may be on the way that answers nothing any more
        self._late_stop: bytes | None = None
        self._started = b""  # the last command that lets the kernel run
        self._asked = 0  # questions whether it waits for commands since the line was clean
        self._poll = select.poll()
        self._poll.register(line, select.POLLIN)
        self._poll.register(self.wake, select.POLLIN)

    def exchange(
        self, payload: bytes, valid: Valid = _anything, timeout_s: float | None = None
    ) -> tuple[bytes, bool]:
        """Send a command that may be carried out twice, and get the reply.

        :param valid: tells whether what came can be a reply to it
        :param timeout_s: seconds until it is given up, if not the usual ones
        :return: the reply, and whether the command may have been carried out more than once
        :raises TargetTimeout: if there is none in time
        :raises ProtocolError: if what comes makes no sense, again and again
        """
        timeout_s = self._answer_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        tries = 0
        while True:
            tries += 1
            self._send(payload)
            reply = self._reply(deadline)
            if reply is not None and valid(reply):
                self._dirty = self._dirty or tries > 1  # the others may be answered, too
                return reply, tries > 1
            self._note_error()
            if time.monotonic() >= deadline:
                if reply is not None:
                    raise ProtocolError(f"the stub answers {reply[:40]!r} to {payload[:40]!r}")
                raise TargetTimeout(
                    f"no answer from KGDB within {timeout_s:g} s; does the kernel run? then "
                    "stop it: --sysrq LINE, or echo g > /proc/sysrq-trigger there"
                )

    def late_answer(self, timeout_s: float) -> bytes | None:
        """The reply to a command that was sent before, to a kernel that ran; None if none comes."""
        return self._reply(time.monotonic() + timeout_s)

    def read(self, payload: bytes, valid: Valid = _anything) -> bytes:
        """Send a command that only reads; on a noisy line, until two replies are the same.

        :raises TargetTimeout: if there is no reply in time
        :raises ProtocolError: if no two replies are the same
        """
        deadline = time.monotonic() + 4 * self._answer_s
        reply, _ = self.exchange(payload, valid)
        while self.noisy:
            again, _ = self.exchange(payload, valid)
            if again == reply:
                break
            reply = again
            self._note_error()
            if time.monotonic() >= deadline:
                raise ProtocolError(
                    f"the line to {self.line.address} garbles what it carries: no two replies to "
                    f"{payload[:40]!r} are the same"
                )
        return reply

    def start(self, payload: bytes) -> bytes | None:
        """Send a command that lets the kernel run, such as ``c``.

        :return: the stop reply, if that was as fast as the acknowledgment
        :raises TargetTimeout: if KGDB does not take it
        """
        deadline = time.monotonic() + self._answer_s
        self._started = payload
        while True:
            if self._dirty:
                self._catch_up()
            self._send(payload)
            errors = self.errors
            kind, packet = self._token(self._retry_end(deadline))
            while kind == b"!" and time.monotonic() < deadline:
                # It may be the next stop already.
                self._note_error()
                self._ask_again()
                kind, packet = self._token(self._retry_end(deadline))
            if kind == _ACK:
                return None
            if kind == b"$" and packet[:1] == b"T":
                self._unacknowledged = True
                return packet  # there was no stop before this that was not answered
            damaged = self.errors != errors
            self._note_error()
            # Was it lost, or the acknowledgment? KGDB answers if it still waits for commands.
            # If not, it finds the question at its next stop, and drops it.
            if kind != _NAK and not self._still_stopped(deadline, damaged=damaged):
                return self._late_stop
            if time.monotonic() >= deadline:
                raise TargetTimeout(f"KGDB does not take {payload!r}")

    def receive_stop(self, deadline: float | None) -> bytes | None:
        """Wait for the kernel's next stop.

        :param deadline: on the clock of :func:`time.monotonic`
        :return: the stop reply; None at the deadline, or at once while :attr:`wake` is set
        """
        end = math.inf if deadline is None else deadline
        damaged = False
        while True:
            errors = self.errors
            kind, packet = self._stop_token(self._retry_end(end) if damaged else deadline)
            damaged = damaged or self.errors != errors
            stands = False
            if kind == b"$":
                self._unacknowledged = True
                if re.match(rb"[ST][0-9a-f]{2}", packet):
                    return packet
                self.acknowledge()  # console output, or the answer to a question of ours
                stands = _is_alive(packet)
            elif kind == b"!":
                self._note_error()
                self._ask_again()
                damaged = True
            elif kind == b"" and (not damaged or self.wake.is_set):
                return None
            else:
                stands = kind != _ACK  # it refuses what we ask, or part of it
            if stands:
                # Its stop was damaged; or it was slow, and has never run.
                self._note_error()
                was_told = damaged or not self._started
                stop = self._lost_stop() if was_told else self.start(self._started)
                if stop is not None:
                    return stop
                damaged = False

    def acknowledge(self) -> None:
        """Acknowledge the last packet now, and not with the next command."""
        if self._unacknowledged:
            self._unacknowledged = False
            self.line.write(_ACK)

    def quiet(self) -> None:
        """Drop what is on the way."""
        self._buffer = b""
        self.line.drain(_QUIET_S, self._answer_s)
        self._dirty = False

    def forgive(self) -> None:
        """What was taken for errors was a kernel that ran, and did not listen."""
        self.noisy = False
        self.errors = 0

    def close(self) -> None:
        """Close the line; does nothing the second time."""
        self.line.close()
        self.wake.close()

    def _send(self, payload: bytes) -> None:
        if self._dirty:
            self.quiet()
        packet = b"$%b#%02x" % (payload, sum(payload) & 0xFF)
        if self._unacknowledged:
            self._unacknowledged = False
            packet = _ACK + packet
        self._buffer = b""
        self.packets_sent += 1
        self.line.write(packet)

    # The reply to the packet just sent; None if it has to be sent again.
    def _reply(self, deadline: float) -> bytes | None:
        acknowledged = False
        asked_again = False
        while True:
            kind, packet = self._token(self._retry_end(deadline))
            if kind == b"":
                if not acknowledged or asked_again:
                    return None
                # It has the command: any byte makes it repeat the reply.
                asked_again = True
                self._note_error()
                self.line.write(_NAK)
            elif kind == _ACK:
                acknowledged = True
            elif kind == _NAK:
                return None
            elif kind == b"$" and acknowledged:
                self._unacknowledged = True
                return packet
            elif kind == b"!" and acknowledged:
                self._note_error()
                self.line.write(_NAK)
            else:
                self._note_error()  # an older reply, again
                if packet[:1] == b"T":
                    self._late_stop = packet  # or a stop that came meanwhile

    def _catch_up(self) -> None:
        # KGDB answers in order. What comes behind its answer to a question, and nothing else with
        # that, is no answer to what was sent before.
        deadline = time.monotonic() + self._answer_s
        while time.monotonic() < deadline:
            self._ask()
            errors, kinds = self.errors, []
            kind, packet = self._token(self._retry_end(deadline))
            while kind != b"" and not _is_alive(packet):
                if kind == b"!":
                    self._note_error()
                    self._ask_again()
                kinds.append(kind)
                kind, packet = self._token(self._retry_end(deadline))
            self._unacknowledged = kind != b""
            if kind == b"$" and kinds == [_ACK] and self.errors == errors:
                if self._asked == 1:
                    self._dirty, self._asked = False, 0
                    return
                self._asked = 0  # it may be the answer to an earlier one, and this one refused
            else:
                self._note_error()
        raise TargetTimeout(f"KGDB does not answer as it should over {self.line.address}")

    def _still_stopped(self, deadline: float, *, damaged: bool) -> bool:
        self._late_stop = None
        came = self._buffer + self.line.drain(_QUIET_S, self._answer_s)
        self._dirty = False
        tokens = list(_TOKEN.finditer(came))
        if any(match[0] == _NAK for match in tokens):
            return True  # nothing else of ours can be what it refuses
        # It says '-' to a question that it takes for the rest of the command. That is also how it
        # forgets a stop that it has told: then this, or what there is of it, came before.
        whole = b"".join(match[0] for match in tokens if match[1] is not None)
        first = whole == came and b"$T" not in whole and not damaged  # or older replies, again
        self._ask()
        while True:
            errors = self.errors
            kind, packet = self._token(self._retry_end(deadline))
            first = first and self.errors == errors
            if kind == _NAK and first:
                self._dirty = True  # it may be a late refusal, and the question still be answered
                return True
            if kind == _NAK:
                break
            if kind == b"$" and packet[:1] == b"T":
                self._late_stop = packet
            elif kind == b"$" and packet.startswith(b"QC"):
                self._unacknowledged = True
                self._asked = 0
                return self._late_stop is None
            elif kind == b"!" or (kind == b"" and self._buffer):
                self._note_error()
                self._ask_again()
                damaged = True
            if kind == b"" and (not self._buffer or time.monotonic() >= deadline):
                if damaged:
                    break
                return False
            first = False
        if self._late_stop is None:
            self._late_stop = self._lost_stop()
        return False

    def _ask(self) -> None:
        self._asked += 1
        self._send(_ALIVE)

    def _lost_stop(self) -> bytes | None:
        # The stop that KGDB has told, and forgotten; None if it does not listen, because the kernel
        # runs. It would repeat it at '?', and remove all breakpoints (gdb_cmd_status()).
        try:
            reply, _ = self.exchange(_ALIVE, _is_alive, timeout_s=2 * _RETRY_S)
        except TargetTimeout:
            return None
        return b"T05thread:%b;" % reply.removeprefix(b"QC")

    # As _token(), but what has come in part, and does not go on, is damaged.
    def _stop_token(self, deadline: float | None) -> tuple[bytes, bytes]:
        while True:
            until = deadline
            if self._buffer:
                until = min(math.inf if deadline is None else deadline, self._retry_end(math.inf))
            kind, packet = self._token(until, wakes=True)
            if kind != b"" or self.wake.is_set:
                return kind, packet
            if self._buffer:
                return b"!", b""
            if deadline is not None and time.monotonic() >= deadline:
                return kind, packet

    def _ask_again(self) -> None:
        self._buffer = b""
        self.line.write(_NAK)

    # What comes next: an acknowledgment, a packet ("$"), a damaged one ("!"), or nothing ("").
    def _token(self, deadline: float | None, *, wakes: bool = False) -> tuple[bytes, bytes]:
        spin_end = 0.0 if wakes else time.monotonic() + _SPIN_S
        while True:
            match = _TOKEN.search(self._buffer)
            if match is not None:
                if match.start():
                    self._note_error()
                self._buffer = self._buffer[match.end() :]
                if match[1] is None:
                    return match[0], b""
                good = int(match[2], 16) == sum(match[1]) & 0xFF
                return (b"$" if good else b"!"), match[1]
            if len(self._buffer) > _LONGEST:
                raise ProtocolError(
                    f"what comes from {self.line.address} are no packets; is KGDB there, at this "
                    "speed?"
                )
            if wakes and self.wake.is_set:
                return b"", b""
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return b"", b""
            # To be woken takes longer than most answers do.
            if time.monotonic() >= spin_end:
                self._wait(left, wakes=wakes)
            if self._buffer:
                time.sleep(_NAP_S)  # more is coming, and not to be woken for each byte
            data = self.line.read(0)
            if data:
                self._buffer += data
                spin_end = 0.0 if wakes else time.monotonic() + _SPIN_S

    def _wait(self, left: float | None, *, wakes: bool) -> None:
        if wakes:
            self._poll.poll(None if left is None else left * 1000)
        else:
            select.select([self.line], [], [], left)

    def _retry_end(self, deadline: float) -> float:
        on_the_line = self.line.transfer_s(_LONGEST // 2)
        return min(deadline, time.monotonic() + _RETRY_S + on_the_line)

    def _note_error(self) -> None:
        self.errors += 1
        self.noisy = self._dirty = True
