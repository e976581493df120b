"""One gdb under the machine interface: requests go in one after another, records come out."""

import asyncio
import contextlib
import json
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from kgdbx.errors import CommandError, TargetLost
from kgdbx.shell.records import Record, RecordReader, quote

__all__ = ("GdbProcess", "Reply")

# Of kgdbx.gdb.channel; that package is for gdb's own Python.
_MARK = b"\x1e"
_CHANNEL_VARIABLE = "KGDBX_CHANNEL"
_READ_BYTES = 1 << 16
_END_S = 10.0
_ENDED = "gdb has ended; use 'reopen' to start it again"


class Reply:
    """What came for one request until gdb was ready for the next.

    :ivar results: of the result record
    :ivar error: gdb's message, or empty
    """

    def __init__(self) -> None:
        self.name = ""
        self.results: dict[str, Any] = {}
        self.error = ""


class _Request:
    def __init__(self, token: int) -> None:
        self.token = token
        self.reply = Reply()
        self.future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()


class GdbProcess:
    """A gdb that runs as long as its session.

    A command may end before its result is complete: gdb says ``^running`` in the middle of it. So
    each request is followed by one that changes nothing; its result tells that the other is over.

    :ivar on_record: called with each record that is no result
    :ivar on_events: called with lines of events, which come on a way of their own
    :ivar on_exit: called once with gdb's exit status, when all its output was handed out
    """

    def __init__(
        self,
        on_record: Callable[[Record], None],
        on_events: Callable[[bytes], None],
        on_exit: Callable[[int], None],
    ) -> None:
        self.on_record = on_record
        self.on_events = on_events
        self.on_exit = on_exit
        self._reader = RecordReader()
        self._requests: deque[_Request] = deque()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._token = 0
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None

    async def start(self, argv: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """Start gdb.

        :param argv: its command line without ``--interpreter``
        :raises CommandError: if it does not start
        """
        read_end, write_end = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *argv,
                "--interpreter=mi3",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=os.environ | {_CHANNEL_VARIABLE: str(write_end)} | (environment or {}),
                limit=_READ_BYTES,
                pass_fds=(write_end,),
                start_new_session=True,  # the terminal's ^C is for the shell
            )
        except OSError as e:
            os.close(read_end)
            raise CommandError(f"cannot start {argv[0]}: {e.strerror}; run 'make setup'") from e
        finally:
            os.close(write_end)
        loop = asyncio.get_running_loop()
        self._pump = loop.create_task(self._read(await _stream(read_end)))
        # So that a running kernel leaves gdb free for other requests.
        await self.request("-gdb-set mi-async on")

    @property
    def pid(self) -> int:
        """Process number of gdb; 0 before it starts."""
        return self._process.pid if self._process is not None else 0

    @property
    def alive(self) -> bool:
        """Whether gdb runs."""
        return self._process is not None and self._process.returncode is None

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return bool(self._requests)

    async def request(self, line: str) -> Reply:
        """Send a request, and wait until gdb is done with it.

        :param line: an MI command such as ``-exec-continue``
        :raises TargetLost: if gdb ends meanwhile
        """
        process = self._process
        if process is None or process.stdin is None or not self.alive:
            raise TargetLost(_ENDED)
        self._token += 2
        request = _Request(self._token)
        self._requests.append(request)
        end = f"{self._token + 1}-gdb-show confirm"
        process.stdin.write(f"{self._token}{line}\n{end}\n".encode())
        with contextlib.suppress(ConnectionError):  # the reader notices
            await process.stdin.drain()
        return await request.future

    async def console(self, command: str) -> Reply:
        """Have gdb execute a line as typed at its own prompt; its output comes as records."""
        return await self.request(f"-interpreter-exec console {quote(command)}")

    async def ask(self, name: str, **arguments: Any) -> Any:
        """Ask kgdbx in gdb, without anything being shown.

        :raises CommandError: if it refuses
        """
        text = json.dumps(arguments)
        number = self._token
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            reply = await self.console(
                f"python kgdbx.gdb.answers.answer({number}, {name!r}, {text!r})"
            )
            if reply.error:
                raise CommandError(reply.error)
            async with asyncio.timeout(_END_S):
                found = await answer
        except TimeoutError:
            raise CommandError(f"gdb gave no answer to {name!r}") from None
        finally:
            del self._answers[number]
            if answer.done() and not answer.cancelled():
                answer.exception()  # taken note of, also if the request was what failed
        if "error" in found:
            raise CommandError(found["error"])
        return found["value"]

    def signal_interrupt(self) -> None:
        """Interrupt what gdb does now, as ``^C`` at its terminal."""
        if self.alive:
            os.kill(self.pid, signal.SIGINT)

    async def end(self) -> None:
        """Have gdb leave; kills it if it does not."""
        if self._process is None:
            return
        if self.alive and self._process.stdin is not None:
            with contextlib.suppress(ConnectionError):
                self._process.stdin.write(b"-gdb-exit\n")
                self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), _END_S)
            except TimeoutError:
                self._process.kill()
        if self._pump is not None:
            await self._pump

    async def _read(self, channel: asyncio.StreamReader) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        events = asyncio.get_running_loop().create_task(self._read_channel(channel))
        while data := await process.stdout.read(_READ_BYTES):
            for record in self._reader.feed(data):
                self._take(record)
            await asyncio.sleep(0)  # keys first, however much there is
        for record in self._reader.finish():
            self._take(record)
        status = await process.wait()
        await events
        for future in (*(each.future for each in self._requests), *self._answers.values()):
            if not future.done():
                future.set_exception(TargetLost(_ENDED))
        self._requests.clear()
        self.on_exit(status)

    async def _read_channel(self, channel: asyncio.StreamReader) -> None:
        rest = b""
        while data := await channel.read(_READ_BYTES):
            whole, _, rest = (rest + data).rpartition(b"\n")
            if _MARK not in whole:
                self.on_events(whole + b"\n" if whole else b"")
            else:
                for line in whole.split(b"\n"):
                    self._take_line(line)
            await asyncio.sleep(0)

    def _take_line(self, line: bytes) -> None:
        if not line.startswith(_MARK):
            self.on_events(line + b"\n")
            return
        answer = json.loads(line[1:])
        future = self._answers.get(answer["number"])
        if future is not None and not future.done():
            future.set_result(answer)

    def _take(self, record: Record) -> None:
        head = self._requests[0] if self._requests else None
        if record.kind == "result" and head is not None:
            self._take_result(head, record)
        elif record.kind != "prompt":
            self.on_record(record)

    def _take_result(self, head: _Request, record: Record) -> None:
        if record.token == head.token + 1:
            self._requests.popleft()
            if not head.future.done():
                head.future.set_result(head.reply)
        elif record.token in (head.token, None):
            head.reply.name = record.name
            head.reply.results = record.results
            if record.name == "error":
                head.reply.error = str(record.results.get("msg", "")) or "gdb refuses it"


async def _stream(descriptor: int) -> asyncio.StreamReader:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(_READ_BYTES, loop)
    file = os.fdopen(descriptor, "rb", buffering=0)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    return reader
