"""Headless Chromium over its DevTools pipe: real layout, colours and DOM, with scripts switched off.

The pipe needs no client library: JSON messages ended by a zero byte on the descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

BROWSER = next((b for b in ("chromium-headless-shell", "chromium", "google-chrome") if shutil.which(b)), None)

DESKTOP, PHONE = (1280, 900), (390, 844)


_LAUNCH = """import os, sys
read, write = (os.dup2(int(fd), 90 + i) for i, fd in enumerate(sys.argv[1:3]))
os.dup2(read, 3), os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])"""
"""The browser wants its pipe on 3 and 4, whatever the pipe's own numbers are."""


class Browser:
    """One page of one browser. `width`, `height` in CSS pixels; `scheme` light or dark; scripts off unless
    asked for."""

    def __init__(self, profile: Path, *, has_scripts: bool = False) -> None:
        ours, theirs = os.pipe(), os.pipe()  # we write into the first, read from the second
        self._write, self._read = ours[1], theirs[0]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _LAUNCH, str(ours[0]), str(theirs[1]), str(BROWSER), "--headless",
             "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
             "--hide-scrollbars", "--disable-background-networking", f"--user-data-dir={profile}",
             "about:blank"],
            pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        self._ids, self._buffer = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets", session=None)["targetInfos"]
        page = next(t for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", session=None, targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")
        if not has_scripts:
            self.call("Emulation.setScriptExecutionDisabled", value=True)

    def open(self, page: Path, *, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Self:
        width, height = size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=size == PHONE)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self._receive()
        return self

    def dom(self) -> str:
        """The document as it stands after parsing."""
        root = self.call("DOM.getDocument", depth=0)["root"]["nodeId"]
        return str(self.call("DOM.getOuterHTML", nodeId=root)["outerHTML"])

    def content_size(self) -> tuple[float, float]:
        """Width and height of all there is to scroll to."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return float(size["width"]), float(size["height"])

    def evaluate(self, expression: str) -> Any:
        """DevTools' own console; the page's policy does not bind it. Needs scripts."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, file: Path, *, top: float = 0.0, height: float | None = None) -> None:
        """A stretch of the page, from `top` on; all of it unless `height` is given."""
        width, whole = self.content_size()
        clip = {"x": 0, "y": top, "width": width, "height": height or whole, "scale": 1}
        data = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def messages(self) -> list[str]:
        """Console messages, log entries and exceptions since the page was opened."""
        kinds = ("Runtime.consoleAPICalled", "Log.entryAdded", "Runtime.exceptionThrown")
        return [json.dumps(e["params"])[:300] for e in self.events if e["method"] in kinds]

    def requests(self) -> list[str]:
        found = (e for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [e["params"]["request"]["url"] for e in found]

    def call(self, method: str, *, session: str | None = "", **params: Any) -> Any:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == number:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser went away"
            self._buffer += piece
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
