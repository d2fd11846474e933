"""What a reader wants to see beside the verdict; nothing in it decides anything.

The winner one setting at a time, its memory, its KL by position, pairs of answers: the most damaged first,
each kind of request at least once. Texts are the user's: nothing of them is kept beyond what is shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtune.quality import QualityVerdict, Reference, kl_by_position
from kvtune.target import Config, Target
from kvtune.tune.ablation import Ablation
from kvtune.tune.confirmation import Confirmation, Confirmed
from kvtune.tune.memory import memory_record
from kvtune.tune.pace import Pace
from kvtune.tune.settings import TuneSettings
from kvtune.workload import TokenRequest

__all__ = ["AnswerPair", "answer_pairs", "answer_record", "evidence_record", "position_record"]

NUM_WORST = 4
PER_CASE = 2
MAX_SAMPLES = 12
PROMPT_TOKENS = 160
"""Of a prompt its end is shown: the question is there."""
MAX_TEXT = 1200

Text = Callable[[Sequence[int]], str]


def evidence_record(
    confirmation: Confirmation, confirmed: Confirmed, ablation: Ablation, *, target: Target,
    settings: TuneSettings, requests: Sequence[TokenRequest], baseline: Config, pace: Pace,
    rng: np.random.Generator,
) -> dict[str, Any]:  # fmt: skip
    """`ablation`, `memory`, `positions` and `answers_side_by_side` of a result, as far as time is left."""
    reference, quality = confirmation.reference, confirmed.quality
    return {
        "ablation": ablation.record(confirmed.config),
        "memory": memory_record(
            target, {"baseline": baseline, "winner": confirmed.config}, requests,
            kv_budget_bytes=settings.kv_budget_bytes, context=settings.context, pace=pace,
        ),
        "positions": position_record(reference, quality, rng),
        "answers_side_by_side": answer_record(
            answer_pairs(reference, quality, confirmed.answers), settings.text
        ),
    }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPair:
    """One request, what both configurations answered greedily, and how far apart they are by replay."""

    request_id: str
    strata: Mapping[str, str]
    prompt_token_ids: Sequence[int]
    baseline: tuple[int, ...]
    winner: tuple[int, ...]
    kl: float
    flips: float

    @property
    def first_change(self) -> int | None:
        """Tokens both answers begin with; None where they are equal."""
        if self.baseline == self.winner:
            return None
        pairs = zip(self.baseline, self.winner, strict=False)
        shorter = min(len(self.baseline), len(self.winner))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def answer_pairs(
    reference: Reference, quality: QualityVerdict, winner: Sequence[Sequence[int]]
) -> list[AnswerPair]:
    """The replayed requests in order, most damaged first. `winner`: its answers to `reference.items`."""
    pairs = [
        AnswerPair(
            request_id=item.item_id, strata=strata, prompt_token_ids=item.prompt_token_ids,
            baseline=tuple(int(t) for t in item.continuation), winner=tuple(int(t) for t in answer),
            kl=float(candidate.kl.mean()), flips=float(candidate.flips.mean()),
        )
        for item, strata, answer, (candidate, _) in zip(
            reference.items, reference.strata, winner, quality.divergences, strict=False
        )
    ]  # fmt: skip
    return sorted(pairs, key=lambda pair: -pair.kl)


def answer_record(pairs: Sequence[AnswerPair], text: Text | None) -> dict[str, Any]:
    """The `answers_side_by_side` of a result. Without a tokenizer token ids stand for texts."""
    if not pairs:
        return {}
    read = text or _as_ids
    changed = [pair for pair in pairs if pair.first_change is not None]
    return {
        "num_requests": len(pairs), "num_changed": len(changed),
        "are_texts": text is not None,
        "json": None if text is None else _json_validity(pairs, text),
        "samples": [_sample(pair, read) for pair in _chosen(pairs)],
    }  # fmt: skip


def position_record(
    reference: Reference, quality: QualityVerdict, rng: np.random.Generator
) -> dict[str, list[dict[str, Any]]]:
    """KL by position of the requests that were replayed; empty where every bit was equal."""
    if not quality.divergences:
        return {}
    lengths = [len(item.prompt_token_ids) for item in reference.items]
    return kl_by_position(quality.divergences, lengths, reference.clusters, rng=rng)


def _chosen(pairs: Sequence[AnswerPair]) -> list[AnswerPair]:
    """The worst of all, the worst whose text changed, then the worst of each case not among them yet."""
    changed = [pair for pair in pairs if pair.first_change is not None]
    chosen = list(pairs[:NUM_WORST])
    chosen += [pair for pair in changed[:NUM_WORST] if pair not in chosen]
    for case in dict.fromkeys(pair.strata.get("case", "") for pair in pairs):
        of_case = [pair for pair in pairs if pair.strata.get("case", "") == case]
        chosen += [pair for pair in of_case[:PER_CASE] if pair not in chosen]
    return sorted(chosen[:MAX_SAMPLES], key=lambda pair: -pair.kl)


def _sample(pair: AnswerPair, read: Text) -> dict[str, Any]:
    return {
        "request_id": pair.request_id, "strata": dict(pair.strata), "kl": pair.kl, "flips": pair.flips,
        "prompt_tokens": len(pair.prompt_token_ids), "first_change": pair.first_change,
        "prompt_end": read(pair.prompt_token_ids[-PROMPT_TOKENS:])[-MAX_TEXT // 2 :],
        "baseline": read(pair.baseline)[:MAX_TEXT], "winner": read(pair.winner)[:MAX_TEXT],
    }  # fmt: skip


def _json_validity(pairs: Sequence[AnswerPair], text: Text) -> dict[str, int]:
    """Answers that begin with a whole JSON object or list: of the baseline, and of those the winner's."""
    valid = [pair for pair in pairs if _is_json(text(pair.baseline))]
    kept = sum(_is_json(text(pair.winner)) for pair in valid)
    return {"baseline_valid": len(valid), "still_valid": kept}


def _is_json(text: str) -> bool:
    """What follows the object does not count: answers run on past their end mark."""
    try:
        return isinstance(json.JSONDecoder().raw_decode(text.lstrip())[0], dict | list)
    except (ValueError, RecursionError):
        return False


def _as_ids(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))
