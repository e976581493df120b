"""A serial line that loses, repeats, changes and delays bytes, between a debugger and KGDB."""

import contextlib
import dataclasses
import random
import select
import socket
import threading
import time
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Noise:
    """How bad a line is; the same seed gives the same noise for the same bytes.

    :ivar lost: probability that a byte is lost
    :ivar repeated: that it comes twice
    :ivar changed: that it comes as another one
    :ivar delayed: that it comes late, with all behind it
    :ivar delay_s: how late
    """

    seed: int = 1
    lost: float = 0.0
    repeated: float = 0.0
    changed: float = 0.0
    delayed: float = 0.0
    delay_s: float = 0.05


class NoisyLine:
    """Listens at *path* and passes bytes to and from the socket *upstream*.

    :ivar noise: may be changed
    :ivar harmed: bytes that did not come through as they were sent
    """

    def __init__(self, upstream: Path, path: Path, noise: Noise) -> None:
        self.path = path
        self.harmed = 0
        self.noise = noise
        self._random = random.Random(noise.seed)
        self._losses: list[tuple[bytes, int]] = []
        self._upstream = socket.socket(socket.AF_UNIX)
        self._upstream.connect(str(upstream))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def lose(self, payload: bytes, *indices: int) -> None:
        """The next time that the debugger sends a packet, lose some of its bytes.

        :param indices: from ``$``, or from behind the check sum
        """
        packet = b"$%b#%02x" % (payload, sum(payload) & 0xFF)
        self._losses += [(packet, index % len(packet)) for index in indices]

    def close(self) -> None:
        self._ended.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()
        self._upstream.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                stream, _ = self._listener.accept()
                with stream, contextlib.suppress(OSError):
                    self._pass_bytes(stream)

    def _pass_bytes(self, stream: socket.socket) -> None:
        other = {stream: self._upstream, self._upstream: stream}
        while not self._ended.is_set():
            for source in select.select(list(other), [], [], 0.05)[0]:
                data = source.recv(256)
                if not data:
                    return
                if source is stream:
                    data = self._without_losses(data)
                other[source].sendall(self._spoil(data))

    def _without_losses(self, data: bytes) -> bytes:
        lost = {data.find(packet) + index for packet, index in self._losses if packet in data}
        if lost:
            self._losses.clear()
            self.harmed += len(lost)
        return bytes(byte for n, byte in enumerate(data) if n not in lost)

    def _spoil(self, data: bytes) -> bytes:
        noise, parts = self.noise, []
        for byte in data:
            dice = self._random.random()
            out = bytes((byte,))
            if dice < noise.lost:
                out = b""
            elif (dice := dice - noise.lost) < noise.repeated:
                out = bytes((byte, byte))
            elif (dice := dice - noise.repeated) < noise.changed:
                out = bytes((byte ^ (1 << self._random.randrange(8)),))
            elif (dice := dice - noise.changed) < noise.delayed:
                time.sleep(noise.delay_s)
            self.harmed += out != bytes((byte,))
            parts.append(out)
        return b"".join(parts)
