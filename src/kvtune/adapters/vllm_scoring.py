"""Teacher-forced log-probabilities out of a running vLLM, by prefill and by decode.

Prefill: `prompt_logprobs` over prompt + continuation; vLLM computes every position of such a request and
never serves it from the prefix cache. Decode: greedy generation with `logprobs`; as long as it says the
continuation its steps score it, and where it departs it starts again behind the right token. Both report
raw log-probabilities (before temperature), which is vLLM's default `logprobs_mode`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtune.adapters.openai_client import CompletionsClient
from kvtune.errors import TargetError, UsageError
from kvtune.target import ScoreItem, Scores

__all__ = ["Scorer", "ids_to_ask", "scores_of"]

ALIGNED_TOP = 4
"""With `at_ids`, this many times as many ids are asked for, so that they hold most of the reference's."""
MAX_ALIGNED_TOP = 256
DECODE_RUN = 32
"""Tokens generated per request: a departure wastes at most this many steps."""

Table = dict[int, float]
"""Token id -> log-probability at one position."""


def ids_to_ask(items: Sequence[ScoreItem], num_top: int, vocab_size: int) -> int:
    """How many ids to ask for per position. More than `num_top` where they must be aligned to `at_ids`."""
    if num_top < 1:
        raise UsageError(f"num_top must be at least 1, found {num_top}")
    if any(item.at_ids is not None for item in items):
        num_top = max(num_top, min(ALIGNED_TOP * num_top, MAX_ALIGNED_TOP))
    return min(num_top, vocab_size)


class Scorer:
    """Scores items against one server. Raises TargetError when vLLM fails or leaves positions out."""

    def __init__(self, client: CompletionsClient, model: str, vocab_size: int) -> None:
        self._client = client
        self._model = model
        self._vocab_size = vocab_size

    def by_prefill(self, items: Sequence[ScoreItem], num_top: int, *, concurrency: int = 1) -> list[Scores]:
        """One request per item, `concurrency` at once."""
        top = ids_to_ask(items, num_top, self._vocab_size)
        scores: dict[int, Scores] = {}

        def take(index: int, reply: Any) -> None:
            tables = _prefill_tables(items[index], reply)
            scores[index] = scores_of(items[index], tables, num_top, self._vocab_size)

        bodies = [self._prefill_body(item, top) for item in items]
        self._client.post_all("/v1/completions", bodies, take, concurrency=concurrency)
        return [scores[index] for index in range(len(items))]

    def by_decode(self, items: Sequence[ScoreItem], num_top: int) -> list[Scores]:
        """Token by token through vLLM's decode kernels, one item after the other."""
        top = ids_to_ask(items, num_top, self._vocab_size)
        scores: list[Scores] = []
        for item in items:
            tables: list[Table] = []
            while len(tables) < len(item.continuation):
                tables += self._decode_run(item, len(tables), top)
            if any(token not in table for table, token in zip(tables, item.continuation, strict=True)):
                self._name_missing(item, tables)
            scores.append(scores_of(item, tables, num_top, self._vocab_size))
        return scores

    def _decode_run(self, item: ScoreItem, done: int, top: int) -> list[Table]:
        """Tables of the continuation's positions from `done` to the first departure from it, inclusive."""
        body = {
            "model": self._model,
            "prompt": [*item.prompt_token_ids, *item.continuation[:done]],
            "max_tokens": min(DECODE_RUN, len(item.continuation) - done),
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": top,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        said, rows = _generated_tables(item, self._client.post("/v1/completions", body))
        agreed = 0
        while agreed < len(said) and said[agreed] == item.continuation[done + agreed]:
            agreed += 1
        return rows[: agreed + 1]

    def _name_missing(self, item: ScoreItem, tables: Sequence[Table]) -> None:
        """A continuation token that decode's top ids lack is taken from a prefill, which always names it."""
        named = _prefill_tables(item, self._client.post("/v1/completions", self._prefill_body(item, 1)))
        for table, other, token in zip(tables, named, item.continuation, strict=True):
            table.setdefault(token, other[token])

    def _prefill_body(self, item: ScoreItem, top: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": [*item.prompt_token_ids, *item.continuation],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": top,
        }


def _generated_tables(item: ScoreItem, reply: Any) -> tuple[list[int], list[Table]]:
    """Generated tokens and the table each was chosen from."""
    try:
        choice = reply["choices"][0]
        tables = [_token_table(row) for row in choice["logprobs"]["top_logprobs"]]
        said = [int(token) for token in choice["token_ids"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise TargetError(f"item {item.item_id}: vLLM answered without token log-probabilities") from error
    if not tables or len(tables) != len(said):
        raise TargetError(f"item {item.item_id}: vLLM scored {len(tables)} of {len(said)} generated tokens")
    return said, tables


def _token_table(row: Mapping[str, float]) -> Table:
    """From `{"token_id:17": -0.5, ...}`."""
    return {int(name.removeprefix("token_id:")): float(value) for name, value in row.items()}


def _prefill_tables(item: ScoreItem, reply: Any) -> list[Table]:
    """Tables of the continuation's positions. Position i holds the distribution given the tokens before i."""
    try:
        positions = reply["choices"][0]["prompt_logprobs"]
        start = len(item.prompt_token_ids)
        tables = [
            {int(token): float(entry["logprob"]) for token, entry in row.items()} for row in positions[start:]
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise TargetError(f"item {item.item_id}: vLLM answered without prompt_logprobs") from error
    if len(tables) != len(item.continuation):
        raise TargetError(
            f"item {item.item_id}: vLLM scored {len(tables)} of {len(item.continuation)} positions"
        )
    return tables


def scores_of(item: ScoreItem, tables: Sequence[Table], num_top: int, vocab_size: int) -> Scores:
    """Scores at the item's `at_ids`, else at its `num_top` likeliest ids (of equals the smaller first)."""
    ranked = [sorted(table, key=lambda token, table=table: (-table[token], token)) for table in tables]
    width = min(num_top, vocab_size)
    wanted = item.at_ids if item.at_ids is not None else [order[:width] for order in ranked]
    ids, logprobs = _aligned(tables, wanted)
    spoken = [table[token] for table, token in zip(tables, item.continuation, strict=True)]
    return Scores(
        item_id=item.item_id,
        ids=ids,
        logprobs=logprobs,
        token_logprobs=np.array(spoken, np.float32),
        argmax=np.array([order[0] for order in ranked], np.int32),
        is_full=ids.shape[1] == vocab_size and bool((ids >= 0).all()),
    )


def _aligned(tables: Sequence[Table], wanted: Any) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Ids and log-probabilities [T, k] at the wanted ids; -1 and -inf where a table lacks one."""
    ids = np.array(wanted, dtype=np.int32).reshape(len(tables), -1)
    logprobs = np.full(ids.shape, -np.inf, np.float32)
    for row, table in enumerate(tables):
        for column, token in enumerate(ids[row].tolist()):
            if token in table:
                logprobs[row, column] = table[token]
            else:
                ids[row, column] = -1
    return ids, logprobs
