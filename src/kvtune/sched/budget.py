"""How many prompt tokens a step computes: what its time, and with it inter-token latency, hangs on.

A function of the batch and the settings alone, so that an engine and its simulation decide alike.

Beside decodes, few: all who decode wait for every one of them (Sarathi-Serve's stall-free batches). While
nobody decodes, nobody waits for a next token: prompts that fit share one large step and start to decode
together, as one batch. A prompt that does not fit goes by chunks, in order of arrival: parts of several at
once would only delay the first.
"""

from __future__ import annotations

from kvtune.config import SchedulerConfig

__all__ = ["chunk_of", "prefill_budget"]


def prefill_budget(config: SchedulerConfig, left: int, *, num_decodes: int) -> int:
    """Tokens for prefills in a step of `num_decodes` decodes, `left` of its budget not taken by them."""
    return min(left, config.max_prefill_beside_decodes) if num_decodes else left


def chunk_of(config: SchedulerConfig, num_uncomputed: int, left: int, *, num_decodes: int) -> int:
    """How many of its tokens a sequence computes in a step that may take `left` more; 0: none in this step.

    One that is left with some is the last of the step.
    """
    chunk = min(num_uncomputed, left, config.max_prefill_chunk)
    if num_decodes or chunk == num_uncomputed:
        return chunk
    taken = config.max_num_batched_tokens - left
    return max(0, min(chunk, config.max_prefill_chunk - taken))
