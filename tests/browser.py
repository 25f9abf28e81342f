"""A real browser for tests: headless Chromium, driven by its DevTools protocol."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

WAIT = 60  # seconds for a page to be ready: machines of tests are busy


class Page:
    """One page. Everything waits until the browser has answered."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse):
        self._loop, self._socket, self._number = loop, socket, 0
        self.errors: list[str] = []  # exceptions, and what the content security policy has refused

    def run(self, script: str) -> Any:
        """The value of a script's last expression, a promise's when it is one; raises where it throws."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str) -> Any:
        """The first value of a script that is true."""

        async def wait() -> None:
            await asyncio.sleep(0.1)

        for _ in range(10 * WAIT):
            if value := self.run(script):
                return value
            self._loop.run_until_complete(wait())
        raise AssertionError(f"never true: {script}; {self.errors}")

    def open(self, path: Path) -> None:
        """Load a page of the inspector, and wait until it is ready."""
        self._call("Page.navigate", url=path.as_uri())
        self.until("document.body && document.body.dataset.ready === 'yes'")

    def size(self, width: int, height: int) -> None:
        """Show the page in a window of this size."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def press(self, key: str) -> None:
        """Press a key: Tab, Enter, Escape, ArrowRight …"""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key],
                       **(text if kind == "keyDown" else {}))  # fmt: skip

    def click(self, x: float, y: float) -> None:
        """Click at a place of the window."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(self._answer(method, parameters))

    async def _answer(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive(timeout=WAIT)).data)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"]["text"])


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page in a browser whose files are in `folder`. Skips the test where there is no Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    process = subprocess.Popen([program, *options, "about:blank"], stderr=subprocess.PIPE, text=True)
    loop = asyncio.new_event_loop()
    try:
        found = next(filter(None, (re.search(r"ws://([^/]+)/", line) for line in process.stderr)))
        session = loop.run_until_complete(_session())
        page = loop.run_until_complete(_page(loop, session, found[1]))
        try:
            for domain in ("Page", "Runtime", "Log"):
                page._call(f"{domain}.enable")
            yield page
        finally:
            loop.run_until_complete(session.close())
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        loop.close()


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


async def _page(loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession, address: str) -> Page:
    async with session.get(f"http://{address}/json/list") as answer:
        pages = [entry for entry in await answer.json() if entry["type"] == "page"]
    socket = await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
    return Page(loop, socket)
