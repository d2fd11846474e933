"""A tiny OpenAI-like server over the loopback, whose behaviour each test scripts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class StubServer(ThreadingHTTPServer):
    """`behave(handler, body)` answers a POST; `bodies` records what was sent."""

    daemon_threads = True
    behave: Callable[[StubHandler, Any], None]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.bodies: list[dict[str, Any]] = []
        self.sent_at: list[float] = []
        self.running = 0
        self.most_running = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


class StubHandler(BaseHTTPRequestHandler):
    server: StubServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append({"path": self.path, **body})
            self.server.sent_at.append(time.perf_counter())
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
        try:
            self.server.behave(self, body)
        except BrokenPipeError:
            pass
        finally:
            with self.server.lock:
                self.server.running -= 1

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": "stub-model", "max_model_len": 4096}]})

    def reply(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()

    def event(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Silent."""


def stream_tokens(*, gap_s: float = 0.0, first_s: float = 0.0, cached: int = 0, per_chunk: int = 1):
    """A behaviour: tokens counting up from the prompt's first, `gap_s` apart, then the usage."""

    def behave(handler: StubHandler, body: Any) -> None:
        handler.begin_stream()
        time.sleep(first_s)
        asked = body["max_tokens"]
        prompt = body.get("prompt") or [0]
        for start in range(0, asked, per_chunk):
            if start:
                time.sleep(gap_s)
            first = prompt[0] if isinstance(prompt, list) else 0
            ids = [first + i for i in range(start, min(asked, start + per_chunk))]
            reason = "length" if start + per_chunk >= asked else None
            handler.event({"choices": [{"text": "", "token_ids": ids, "finish_reason": reason}]})
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": asked,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        handler.event({"choices": [], "usage": usage})
        handler.event("[DONE]")

    return behave


@pytest.fixture
def stub() -> Iterator[StubServer]:
    server = StubServer()
    server.behave = stream_tokens()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def tokens_behaviour():
    """Makes the ordinary behaviour with other times, chunk sizes or cached tokens."""
    return stream_tokens
