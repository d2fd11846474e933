"""Refuse prompts and score items that cannot be right, before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvtune.engine.detokenizer import TokenDecoder
from kvtune.errors import UsageError
from kvtune.target import ScoreItem

__all__ = ["check_items", "prompt_token_ids"]


def prompt_token_ids(
    prompt: str | Sequence[int], tokenizer: TokenDecoder | None, vocab_size: int
) -> npt.NDArray[np.int32]:
    """A prompt as int32 [n], n >= 1; a text is encoded first. UsageError for what cannot be served."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UsageError("this model folder has no tokenizer; pass prompts as token ids")
        prompt = tokenizer.encode(prompt)
    return _check_token_ids(prompt, vocab_size, what="prompt")


def _check_token_ids(token_ids: Sequence[int], vocab_size: int, *, what: str) -> npt.NDArray[np.int32]:
    """The ids as int32 [n], n >= 1, each in [0, vocab_size). UsageError names the first bad one."""
    try:
        values = np.asarray(token_ids)
    except (ValueError, OverflowError):
        raise UsageError(f"{what}: expected a flat list of token ids") from None
    if values.size == 0:
        raise UsageError(f"{what} is empty: at least one token is needed")
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise UsageError(
            f"{what}: expected a flat list of integer token ids, found {values.dtype} {values.shape}"
        )
    bad = np.flatnonzero((values < 0) | (values >= vocab_size))
    if bad.size:
        raise UsageError(
            f"{what}: token id {values[bad[0]]} at position {bad[0]} is outside the vocabulary ({vocab_size})"
        )
    return values.astype(np.int32)


def check_items(items: Sequence[ScoreItem], *, vocab_size: int, max_model_len: int) -> None:
    """UsageError unless every item has a prompt, a continuation and ids inside the vocabulary."""
    for item in items:
        what = f"score item {item.item_id!r}"
        prompt = _check_token_ids(item.prompt_token_ids, vocab_size, what=f"{what}: prompt")
        continuation = _check_token_ids(item.continuation, vocab_size, what=f"{what}: continuation")
        if len(prompt) + len(continuation) > max_model_len:
            raise UsageError(
                f"{what} has {len(prompt)} + {len(continuation)} tokens, the engine takes {max_model_len}"
            )
        if item.at_ids is None:
            continue
        if item.at_ids.ndim != 2 or len(item.at_ids) != len(continuation) or item.at_ids.shape[1] < 1:
            raise UsageError(f"{what}: at_ids must be [{len(continuation)}, k], found {item.at_ids.shape}")
        if item.at_ids.min() < -1 or item.at_ids.max() >= vocab_size:
            raise UsageError(f"{what}: at_ids must lie in [-1, {vocab_size}) (-1: nothing)")
