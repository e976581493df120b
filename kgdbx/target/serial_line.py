"""A serial line: a tty of this machine, or a socket behind which there is one."""

import os
import re
import select
import stat
import termios
import time

from kgdbx.errors import TargetError, TargetLost
from kgdbx.target.packet import connect_stream

__all__ = ("SerialLine", "is_tty")

_DEFAULT_BAUD = 115200
_BITS_PER_BYTE = 10  # 8 data bits, a start and a stop bit
_TTY = re.compile(r"(?P<path>/.*?)(?:,(?P<baud>\d+))?")


def is_tty(address: str) -> bool:
    """Whether an address is a tty such as ``/dev/ttyS0`` or ``/dev/ttyUSB0,57600``."""
    path = address.partition(",")[0]
    try:
        return path.startswith("/") and stat.S_ISCHR(os.stat(path).st_mode)
    except OSError:
        return path.startswith("/dev/")


class SerialLine:
    """Bytes in and out; what the other side makes of them is not its business.

    :param address: ``/dev/ttyS0[,115200]`` (8 data bits, no parity, no flow control), path of a
        Unix socket, or ``host:port`` of a terminal server
    :param timeout_s: seconds to wait for a socket's connection
    :raises TargetError: if it cannot be opened, or someone else has it
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self.bytes_received = 0
        self.bytes_per_s: float | None = None  # None for a socket
        if is_tty(address):
            self._fd = self._open_tty(address)
            self._socket = None
        else:
            self._socket = connect_stream(address, timeout_s)
            self._socket.setblocking(False)
            self._fd = self._socket.fileno()
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def fileno(self) -> int:
        """Its descriptor; -1 when closed."""
        return self._fd

    def transfer_s(self, size_bytes: int) -> float:
        """Seconds that so many bytes are on the line, as far as that is known."""
        return size_bytes / self.bytes_per_s if self.bytes_per_s else 0.0

    def read(self, timeout_s: float) -> bytes:
        """What has come, waiting up to *timeout_s* seconds for something; empty if nothing came.

        :raises TargetLost: if the other side is gone
        """
        self._require_open()
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            if timeout_s <= 0 or not self._poll.poll(timeout_s * 1000):
                return b""
            return self.read(0)
        except OSError as e:
            raise TargetLost(f"the line to {self.address} is gone: {e.strerror}") from e
        if not data:
            raise TargetLost(f"the line to {self.address} was closed: the machine behind it ended")
        self.bytes_received += len(data)
        return data

    def write(self, data: bytes, timeout_s: float = 5.0) -> None:
        """Send bytes.

        :raises TargetLost: if the other side is gone, or takes nothing for *timeout_s* seconds
        """
        self._require_open()
        left = memoryview(data)
        while left:
            try:
                count = os.write(self._fd, left)
            except BlockingIOError:
                if not select.select([], [self._fd], [], timeout_s)[1]:
                    raise TargetLost(f"the line to {self.address} takes no bytes") from None
                continue
            except OSError as e:
                raise TargetLost(f"the line to {self.address} is gone: {e.strerror}") from e
            left = left[count:]

    def drain(self, quiet_s: float, limit_s: float) -> bytes:
        """Take what comes until nothing has come for *quiet_s* seconds, *limit_s* at most."""
        end = time.monotonic() + limit_s
        data = b""
        while time.monotonic() < end and (part := self.read(quiet_s)):
            data += part
        return data

    def send_break(self) -> None:
        """Hold the line low for a quarter of a second and more, which a console takes for SysRq.

        :raises TargetError: if it is a socket, which has no such thing
        """
        if self._socket is not None:
            raise TargetError(
                f"a break cannot be sent over the socket {self.address}; if it is a console "
                f"server that speaks telnet, give telnet:{self.address}, else break in on the "
                "machine: echo g > /proc/sysrq-trigger"
            )
        termios.tcsendbreak(self._fd, 0)

    def close(self) -> None:
        """Close it; does nothing the second time."""
        fd, self._fd = self._fd, -1
        if self._socket is not None:
            self._socket.close()
        elif fd >= 0:
            os.close(fd)  # the driver sends what it still has

    def _open_tty(self, address: str) -> int:
        match = _TTY.fullmatch(address)
        assert match is not None
        baud = int(match["baud"] or _DEFAULT_BAUD)
        speed = getattr(termios, f"B{baud}", None)
        if speed is None:
            raise TargetError(f"{address}: {baud} is no speed of a serial port; try 115200")
        try:
            fd = os.open(match["path"], os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise TargetError(f"cannot open {match['path']}: {e.strerror}") from e
        try:
            _make_raw(fd, speed)
        except termios.error as e:
            os.close(fd)
            raise TargetError(f"{match['path']} is no serial port: {e.args[1]}") from e
        self.bytes_per_s = baud / _BITS_PER_BYTE
        return fd

    def _require_open(self) -> None:
        if self._fd < 0:
            raise TargetLost(f"the line to {self.address} is closed")


def _make_raw(fd: int, speed: int) -> None:
    # As cfmakeraw(3), without flow control: KGDB polls the port and knows of none.
    settings = termios.tcgetattr(fd)
    settings[0] = termios.IGNBRK
    settings[1] = 0
    settings[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
    settings[3] = 0
    settings[4] = settings[5] = speed
    settings[6][termios.VMIN] = 1
    settings[6][termios.VTIME] = 0
    termios.tcsetattr(fd, termios.TCSANOW, settings)
    termios.tcflush(fd, termios.TCIOFLUSH)
