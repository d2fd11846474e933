"""Client of an OpenAI-compatible server: timed streams for load runs, plain posts for scoring.

One asyncio loop per call, no state between calls. A request that fails becomes a result with `error`;
only a wrong address or a missing dependency raises. Works with any server that speaks
`/v1/completions` or `/v1/chat/completions` with server-sent events; token ids and cached-token counts
are taken where the server sends them (vLLM: `return_token_ids`, `--enable-prompt-tokens-details`).
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from kvtune.errors import MissingExtraError, TargetError, UsageError

__all__ = ["CompletionsClient", "StreamRequest", "StreamResult"]

MAX_ERROR_CHARS = 300
CONNECT_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 600.0
"""Longest silence within one request. Queueing counts as silence, so it is generous."""


def _httpx() -> Any:
    try:
        return importlib.import_module("httpx2")
    except ImportError:
        raise MissingExtraError("talking to a server", "tune") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """One request to stream: the JSON `body` goes to `path` at `arrival_s` seconds into the run."""

    request_id: str
    body: Mapping[str, Any]
    path: str = "/v1/completions"
    arrival_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamResult:
    """What one stream showed. Times are seconds on the run's clock, which starts at 0.

    `start_s` is where latencies count from: the arrival (also when the client was late, so that a slow
    server cannot hide its queue) or, under a concurrency limit, the moment of sending.
    `chunk_times_s[i]` is when chunk i came, `chunk_tokens[i]` how many tokens it held.
    Counts the server did not state are None. `error` is None for a stream that ended properly.
    """

    request_id: str
    start_s: float
    end_s: float
    chunk_times_s: tuple[float, ...] = ()
    chunk_tokens: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    text: str = ""
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.chunk_times_s[0] - self.start_s if self.chunk_times_s else None

    @property
    def e2e_s(self) -> float | None:
        """Until the last token; None for a failed request."""
        return None if self.error or not self.chunk_times_s else self.chunk_times_s[-1] - self.start_s

    @property
    def output_tokens(self) -> int:
        """The server's count, else the tokens seen."""
        return sum(self.chunk_tokens) if self.num_output_tokens is None else self.num_output_tokens

    @property
    def tpot_s(self) -> float | None:
        """Mean gap after the first token, as vLLM's benchmark defines it; None below two tokens."""
        if self.output_tokens < 2 or not self.chunk_times_s:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Gaps between chunks (several tokens of one chunk came together)."""
        return tuple(b - a for a, b in itertools.pairwise(self.chunk_times_s))


class _StreamError(Exception):
    """The server said no, or something that is no answer; the text says what."""


class _Stream:
    """What one stream has shown so far; frozen into a StreamResult at the end."""

    def __init__(self, request: StreamRequest, start_s: float) -> None:
        self.request = request
        self.start_s = start_s
        self.times: list[float] = []
        self.counts: list[int] = []
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.usage: Mapping[str, Any] = {}
        self.is_done = False
        self.has_finish_reason = False

    def add(self, event: Mapping[str, Any], now_s: float) -> None:
        """Take in one server-sent event. Raises when it reports an error or makes no sense."""
        if "error" in event:
            raise _StreamError(error_text(event))
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices") or ():
            text = _choice_text(choice)
            ids = choice.get("token_ids") or ()
            self.has_finish_reason |= choice.get("finish_reason") is not None
            if ids or text:
                self.times.append(now_s)
                self.counts.append(len(ids) or 1)
                self.token_ids.extend(int(token) for token in ids)
                self.texts.append(text)

    def result(self, end_s: float, error: str | None) -> StreamResult:
        if error is None and not (self.is_done or self.has_finish_reason):
            error = f"stream ended after {len(self.times)} chunks without a finish reason"
        details = self.usage.get("prompt_tokens_details") or {}
        return StreamResult(
            request_id=self.request.request_id,
            start_s=self.start_s,
            end_s=end_s,
            chunk_times_s=tuple(self.times),
            chunk_tokens=tuple(self.counts),
            token_ids=tuple(self.token_ids),
            text="".join(self.texts),
            num_prompt_tokens=self.usage.get("prompt_tokens"),
            num_output_tokens=self.usage.get("completion_tokens"),
            num_cached_tokens=details.get("cached_tokens"),
            error=error,
        )


def _choice_text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""


def error_text(body: Any) -> str:
    """The message inside an error body of any of the usual shapes, as one line."""
    found: Any = body
    while isinstance(found, Mapping):
        inner = cast("Mapping[str, Any]", found)
        found = inner.get("error") or inner.get("message") or inner.get("detail") or json.dumps(dict(inner))
    return " ".join(str(found).split())[:MAX_ERROR_CHARS]


def _is_server_url(url: str) -> bool:
    """http(s), a host, a port that exists, and nothing a URL cannot hold."""
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:  # the port is no number or beyond 65535, or a bracket is missing
        return False
    is_plain = url.isascii() and url.isprintable() and " " not in url
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and is_plain


class CompletionsClient:
    """Talks to one server. `base_url` without `/v1`; raises UsageError when it is not an http(s) URL."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        trimmed = base_url.rstrip("/").removesuffix("/v1")
        if not _is_server_url(trimmed):
            raise UsageError(f"expected a server URL such as http://127.0.0.1:8000, found {base_url!r}")
        self.base_url = trimmed
        self._clock = clock
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._httpx = _httpx()
        self.transport_errors: tuple[type[Exception], ...] = (self._httpx.HTTPError, OSError)
        self._timeout = self._httpx.Timeout(idle_timeout_s, connect=CONNECT_TIMEOUT_S)

    def _client(self) -> Any:
        """trust_env=False: a proxy in the environment would sit between us and what we measure."""
        limits = self._httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return self._httpx.AsyncClient(
            base_url=self.base_url,
            headers=self._headers,
            timeout=self._timeout,
            limits=limits,
            trust_env=False,
        )

    # -- plain requests --

    def get(self, path: str) -> Any:
        """JSON (or text, where it is not JSON) of a GET. TargetError on any failure."""
        return self._call("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """JSON of a POST. TargetError on any failure."""
        return self._call("POST", path, body or {})

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        async def call() -> Any:
            async with self._client() as client:
                return await self._exchange(client, method, path, body)

        return asyncio.run(call())

    async def _exchange(self, client: Any, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        reply: Any = None
        try:
            reply = await client.request(method, path, json=body)
        except self.transport_errors as error:
            raise TargetError(f"{method} {self.base_url}{path} failed: {_describe(error)}") from error
        content = _json_or_text(reply)
        if reply.status_code >= 400:
            raise TargetError(f"{method} {path} answered {reply.status_code}: {error_text(content)}")
        return content

    def post_all(
        self,
        path: str,
        bodies: Sequence[Mapping[str, Any]],
        handle: Callable[[int, Any], None],
        *,
        concurrency: int = 1,
    ) -> None:
        """POST every body, at most `concurrency` at once; `handle(index, json)` gets each reply as it comes.

        TargetError from the first that fails; the others are cancelled.
        """

        async def run() -> None:
            gate = asyncio.Semaphore(concurrency)
            async with self._client() as client:

                async def one(index: int) -> None:
                    async with gate:
                        handle(index, await self._exchange(client, "POST", path, bodies[index]))

                await _all_or_first_error([one(index) for index in range(len(bodies))])

        asyncio.run(run())

    # -- timed streams --

    def stream_all(
        self,
        requests: Sequence[StreamRequest],
        *,
        deadline_s: float | None = None,
        max_concurrency: int | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> tuple[list[StreamResult], float]:
        """Send every request at its arrival time; returns results in request order and the run's seconds.

        What is unfinished at `deadline_s` is cancelled and has that as its error. `on_done(n)` is told
        after each request how many are done.
        """

        async def run() -> tuple[list[StreamResult], float]:
            session = _LoadRun(self, requests, deadline_s, max_concurrency, on_done)
            async with self._client() as client:
                results = await asyncio.gather(*(session.one(client, request) for request in requests))
            return results, session.now()

        return asyncio.run(run())


async def _all_or_first_error(jobs: Sequence[Any]) -> None:
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _LoadRun:
    """One load run: its clock, its deadline and its concurrency limit."""

    def __init__(
        self,
        owner: CompletionsClient,
        requests: Sequence[StreamRequest],
        deadline_s: float | None,
        max_concurrency: int | None,
        on_done: Callable[[int], None] | None,
    ) -> None:
        self._clock = owner._clock
        self._request_errors = (*owner.transport_errors, ValueError, TypeError, AttributeError)
        self._began = self._clock()
        self._deadline_s = deadline_s
        self._on_done = on_done
        self._num_done = 0
        self._is_limited = max_concurrency is not None
        self._gate = asyncio.Semaphore(max_concurrency or max(1, len(requests)))

    def now(self) -> float:
        return self._clock() - self._began

    async def one(self, client: Any, request: StreamRequest) -> StreamResult:
        stream = _Stream(request, request.arrival_s)
        error: str | None = None
        try:
            async with asyncio.timeout(self._time_left()):
                await asyncio.sleep(max(0.0, request.arrival_s - self.now()))
                async with self._gate:
                    if self._is_limited:
                        stream.start_s = self.now()
                    await self._follow(client, stream)
        except TimeoutError:
            error = f"not finished at the deadline of {self._deadline_s:g} s"
        except _StreamError as problem:
            error = str(problem)
        except self._request_errors as problem:
            error = _describe(problem)
        self._num_done += 1
        if self._on_done is not None:
            self._on_done(self._num_done)
        return stream.result(self.now(), error)

    def _time_left(self) -> float | None:
        return None if self._deadline_s is None else max(0.0, self._deadline_s - self.now())

    async def _follow(self, client: Any, stream: _Stream) -> None:
        body = {**stream.request.body, "stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", stream.request.path, json=body) as reply:
            if reply.status_code >= 400:
                await reply.aread()
                raise _StreamError(f"HTTP {reply.status_code}: {error_text(_json_or_text(reply))}")
            async for data in _events(reply):
                if data == "[DONE]":
                    stream.is_done = True
                    return
                now = self.now()
                event = json.loads(data)
                if not isinstance(event, dict):
                    raise _StreamError(f"the server sent {data[:80]!r} where an event object belongs")
                stream.add(cast("dict[str, Any]", event), now)


async def _events(reply: Any) -> AsyncIterator[str]:
    """The data of each server-sent event; comments and other fields are skipped."""
    async for line in reply.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


def _json_or_text(reply: Any) -> Any:
    try:
        return json.loads(reply.content)
    except ValueError:
        return reply.text


def _describe(error: BaseException) -> str:
    """An exception as one line; several of httpx's have no text of their own."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:MAX_ERROR_CHARS] if text else type(error).__name__
