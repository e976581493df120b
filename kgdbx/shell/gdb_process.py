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

_MARK = "\x1e"  # kgdbx.gdb.answers.MARK; that module is for gdb's own Python
_READ_BYTES = 1 << 16
_END_S = 10.0


class Reply:
    """What came for one request until gdb was ready for the next.

    :ivar results: of the result record
    :ivar error: gdb's message, or empty
    :ivar answer: JSON that was found in the output, or None
    """

    def __init__(self) -> None:
        self.name = ""
        self.results: dict[str, Any] = {}
        self.error = ""
        self.answer: Any = None


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
    :ivar on_exit: called once with gdb's exit status, when all its output was handed out
    """

    def __init__(self, on_record: Callable[[Record], None], on_exit: Callable[[int], None]) -> None:
        self.on_record = on_record
        self.on_exit = on_exit
        self._reader = RecordReader()
        self._requests: deque[_Request] = deque()
        self._token = 0
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None

    async def start(self, argv: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """Start gdb.

        :param argv: its command line without ``--interpreter``
        :raises CommandError: if it does not start
        """
        try:
            self._process = await asyncio.create_subprocess_exec(
                *argv,
                "--interpreter=mi3",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=os.environ | (environment or {}),
                limit=_READ_BYTES,
                start_new_session=True,  # the terminal's ^C is for the shell
            )
        except OSError as e:
            raise CommandError(f"cannot start {argv[0]}: {e.strerror}; run 'make setup'") from e
        self._pump = asyncio.get_running_loop().create_task(self._read())
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
            raise TargetLost("gdb has ended; use 'reopen' to start it again")
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
        reply = await self.console(f"python kgdbx.gdb.answers.answer({name!r}, {text!r})")
        if reply.error:
            raise CommandError(reply.error)
        if reply.answer is None:
            raise CommandError(f"gdb gave no answer to {name!r}")
        if "error" in reply.answer:
            raise CommandError(reply.answer["error"])
        return reply.answer["value"]

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

    async def _read(self) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        while data := await process.stdout.read(_READ_BYTES):
            for record in self._reader.feed(data):
                self._take(record)
            await asyncio.sleep(0)  # keys first, however much there is
        for record in self._reader.finish():
            self._take(record)
        status = await process.wait()
        lost = TargetLost("gdb has ended; use 'reopen' to start it again")
        for request in self._requests:
            if not request.future.done():
                request.future.set_exception(lost)
        self._requests.clear()
        self.on_exit(status)

    def _take(self, record: Record) -> None:
        head = self._requests[0] if self._requests else None
        if record.kind == "result" and head is not None:
            self._take_result(head, record)
        elif record.kind == "console" and record.text.startswith(f"\n{_MARK}") and head is not None:
            head.reply.answer = json.loads(record.text[2:])
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
