"""Debian's headless Chromium, in the cache, and the few words that tests speak with it."""

import fcntl
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kgdbx.machine.cache import cache_dir, populate
from kgdbx.machine.packages import download_missing, extract
from kgdbx.machine.progress import terminal_progress

_PACKAGE = "chromium-headless-shell"
_ANSWER_S = 60.0


def _fetch() -> Path:
    """Where the package and what it needs are, unpacked."""

    def fill(path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="debs.", dir=cache_dir()) as debs:
            for deb in download_missing([_PACKAGE], Path(debs), terminal_progress):
                extract(deb, path)
                deb.unlink()

    return populate(cache_dir() / "chromium", fill)


class Browser:
    """The DevTools protocol over a pipe: JSON, each message ended by NUL."""

    def __init__(self, to: int, come: int) -> None:
        self._to = to
        self._come = come
        self._data = b""
        self._last = 0
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return self._until(lambda m: m.get("id") == self._last)["result"]

    def wait(self, method: str) -> dict[str, Any]:
        for event in self.events:
            if event["method"] == method:
                return event
        return self._until(lambda m: m.get("method") == method)

    def _until(self, fits: Any) -> dict[str, Any]:
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            while b"\0" not in self._data:
                data = os.read(self._come, 1 << 16)
                assert data, "the browser has ended"
                self._data += data
            text, _, self._data = self._data.partition(b"\0")
            message = json.loads(text)
            if "method" in message:
                self.events.append(message)
            if fits(message):
                assert "error" not in message, message
                return message
        raise AssertionError(f"no answer in {_ANSWER_S} s")


class Page:
    """A page that was loaded."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def value(self, expression: str) -> Any:
        """What JavaScript makes of an expression."""
        answer = self._browser.ask(
            "Runtime.evaluate", self._session, expression=expression, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    @property
    def requests(self) -> list[str]:
        """Addresses that it asked for."""
        events = self._browser.events
        return [
            e["params"]["request"]["url"]
            for e in events
            if e["method"] == "Network.requestWillBeSent"
        ]

    @property
    def complaints(self) -> list[Any]:
        """What the browser did not like about it."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown")
        return [e["params"] for e in self._browser.events if e["method"] in kinds]


def _pipe() -> tuple[int, int]:
    # Out of the way of 3 and 4.
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


@pytest.fixture
def page_of() -> Callable[[Path], AbstractContextManager[Page]]:
    """Function that shows a file in a browser of its own."""
    return _page_of


@contextmanager
def _page_of(path: Path) -> Iterator[Page]:
    root = _fetch()
    libraries = {str(lib.parent) for lib in root.rglob("*.so*")}
    program = root / "usr/lib/chromium/chromium-headless-shell"
    to_read, to_write = _pipe()
    from_read, from_write = _pipe()

    with tempfile.TemporaryDirectory() as profile:
        argv = [str(program), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        argv += ["--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        # It speaks on 3 and 4.
        moved = ["/bin/bash", "-c", f'exec "$@" 3<&{to_read} 4>&{from_write}', "bash"]
        paths = ":".join([*sorted(libraries), os.environ.get("LD_LIBRARY_PATH", "")]).strip(":")
        process = subprocess.Popen(
            [*moved, *argv, "--window-size=1200,900", "about:blank"],
            env={**os.environ, "LD_LIBRARY_PATH": paths, "HOME": profile},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(to_read, from_write),
        )
        os.close(to_read)
        os.close(from_write)
        try:
            browser = Browser(to_write, from_read)
            target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
            attached = browser.ask("Target.attachToTarget", targetId=target, flatten=True)
            session = attached["sessionId"]
            for domain in ("Page", "Network", "Log", "Runtime"):
                browser.ask(f"{domain}.enable", session)
            browser.ask("Page.navigate", session, url=path.as_uri())
            browser.wait("Page.loadEventFired")
            yield Page(browser, session)
        finally:
            process.kill()
            process.wait()
            os.close(to_write)
            os.close(from_read)
