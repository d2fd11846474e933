"""Descriptions of synthetic load, one JSON object: GuideLLM's and AIPerf's `{prompt_tokens, output_tokens,
..._stdev, ..._min, ..._max, turns, prefix_tokens, prefix_count}`, or vLLM's `prefix_repetition`
`{num_prefixes, prefix_len, suffix_len, output_len}`; `samples` (or `num_prompts`) requests are drawn.

A prompt is one of the shared prefixes, then tokens of its own. Its tokens are made up: lengths and block
hashes are all there is. Turns of a session carry their whole history.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvtune.workload.formats.record import Format
from kvtune.workload.request import WorkloadRequest
from kvtune.workload.row import Row

BLOCK_SIZE: Final = 16
_DEFAULT_SAMPLES: Final = 1000
_MAX_SAMPLES: Final = 1_000_000
_MAX_BLOCKS: Final = 50_000_000
_COLUMNS: Final = frozenset(
    (*(f"{name}_tokens{end}" for name in ("prompt", "output") for end in ("", "_stdev", "_min", "_max")),
     "turns", "prefix_tokens", "prefix_count", "samples", "num_prompts", "seed", "num_prefixes", "prefix_len",
     "suffix_len", "output_len", "request_rate", "type", "kind", "source")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Lengths:
    mean: int
    stdev: float
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return max(self.low, min(self.high, round(rng.gauss(self.mean, self.stdev))))


def parse(row: Row) -> Iterator[WorkloadRequest]:
    rng = random.Random(row.integer("seed", default=0))  # noqa: S311  # draws load, no secrets
    repeats_prefixes = "suffix_len" in row.fields
    prompt = _lengths(row, "suffix_len" if repeats_prefixes else "prompt_tokens")
    output = _lengths(row, "output_len" if repeats_prefixes else "output_tokens")
    prefix_tokens = _count(row, "prefix_len" if repeats_prefixes else "prefix_tokens", 0)
    num_prefixes = _count(row, "num_prefixes" if repeats_prefixes else "prefix_count", 1, low=1)
    samples = _count(row, "num_prompts", _count(row, "samples", _DEFAULT_SAMPLES, low=1), low=1)
    turns = _count(row, "turns", 1, low=1)
    longest = prefix_tokens + turns * (prompt.high + output.high)
    if samples > _MAX_SAMPLES or samples * (longest // BLOCK_SIZE + 1) > _MAX_BLOCKS:
        row.fail(
            f"{samples} requests of up to {longest} tokens are more than can be held; ask for fewer samples"
        )
    rate = row.time("request_rate", default=0.0)
    session = _Session(prefix_tokens, num_prefixes)
    at = 0.0
    for number in range(samples):
        if number % turns == 0:
            session.start(number // turns, rng)
        yield session.turn(number, at, prompt.draw(rng), output.draw(rng))
        at += rng.expovariate(rate) if rate else 0.0


def _count(row: Row, name: str, default: int, *, low: int = 0) -> int:
    found = row.optional_tokens(name)
    if found is not None and found < low:
        row.fail(f"'{name}' must be at least {low}, found {found}")
    return default if found is None else found


def _lengths(row: Row, name: str) -> _Lengths:
    mean = row.tokens(name)
    stdev = row.time(f"{name}_stdev", default=0.0)
    low = _count(row, f"{name}_min", 1)
    high = _count(row, f"{name}_max", max(low, round(mean + 3 * stdev)))
    if high < low:
        row.fail(f"'{name}_max' must be at least '{name}_min', found {high} and {low}")
    return _Lengths(mean, stdev, low, high)


class _Session:
    """One conversation: a shared prefix, then tokens that nobody else has. Block ids name whole prefixes."""

    def __init__(self, prefix_tokens: int, num_prefixes: int) -> None:
        self._prefix_tokens = prefix_tokens
        self._num_prefixes = num_prefixes
        self._shared = prefix_tokens // BLOCK_SIZE
        self._next_id = num_prefixes * self._shared
        self._name = ""
        self._ids: list[int] = []
        self._full = 0  # blocks that the prompt before fills and this one shares
        self._tokens = 0

    def start(self, number: int, rng: random.Random) -> None:
        prefix = rng.randrange(self._num_prefixes)
        self._name = f"session-{number}"
        self._ids = list(range(prefix * self._shared, (prefix + 1) * self._shared))
        self._full = self._shared
        self._tokens = self._prefix_tokens

    def turn(self, number: int, at: float, prompt: int, output: int) -> WorkloadRequest:
        length = self._tokens + prompt
        known = self._ids[: self._full]
        needed = -(-length // BLOCK_SIZE) - len(known)
        self._ids = [*known, *range(self._next_id, self._next_id + needed)]
        self._next_id += needed
        self._full, self._tokens = length // BLOCK_SIZE, length + output
        return WorkloadRequest(
            request_id=f"{self._name}#{number}", arrival_s=at, input_length=length, output_length=output,
            hash_ids=tuple(self._ids), session_id=self._name,
        )  # fmt: skip


def _matches(first: Mapping[str, Any]) -> bool:
    return ("prompt_tokens" in first and "output_tokens" in first and "prompt" not in first) or (
        "prefix_len" in first and "suffix_len" in first
    )


FORMAT: Final = Format(
    name="synthetic",
    title="description of synthetic load (lengths and shared prefixes)",
    matches=_matches,
    parse=parse,
    columns=_COLUMNS,
    block_size=BLOCK_SIZE,
)
