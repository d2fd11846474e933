"""What `tune` and `check` ask an engine beyond the replay: probes, high-value requests, judged answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtune.errors import UsageError

if TYPE_CHECKING:
    from kvtune.adapters.chat_encoder import ChatEncoder
    from kvtune.quality import Checker, GateQuestions, Judged, ProbeSource
    from kvtune.workload import Materialised, TokenRequest, Workload, WorkloadRequest

__all__ = ["answers_text", "gate_questions", "probes_text"]

NUM_JUDGED = 128
"""Requests of the workload whose whole answers the user's checker sees."""
MAX_CONVERSATIONS = 512
SHORTEST_LIMIT = 256
"""Probes may be this long even where the workload's prompts are shorter."""


def gate_questions(
    workload: Workload, tokens: Materialised, model: Path, *, max_model_len: int, seed: int,
    high_value: Path | None = None, judge: str | None = None,
) -> GateQuestions:  # fmt: skip
    """UsageError for a checker that cannot be loaded, and for a high-value request that cannot be served."""
    from kvtune.adapters.chat_encoder import chat_encoder
    from kvtune.quality import GateQuestions, load_checker

    checker = None if judge is None else load_checker(judge)
    encoder = chat_encoder(model)
    answers: list[Judged] = []
    if high_value is not None:
        answers.append(_high_value(high_value, model, tokens, max_model_len, checker, encoder, seed))
    if checker is not None:
        answers.append(_sample(workload, tokens, checker, encoder, seed))
    return GateQuestions(
        probes=None if encoder is None else _probes(workload, tokens, encoder, max_model_len),
        answers=tuple(answers), seed=seed,
    )  # fmt: skip


def _probes(
    workload: Workload, tokens: Materialised, encoder: ChatEncoder, max_model_len: int
) -> ProbeSource:
    """Lengths up to the 99th percentile of the workload's prompts, or what the model takes."""
    from kvtune.quality import Conversation, ProbeSource

    lengths = sorted(len(r.prompt_token_ids) for r in tokens.requests)
    longest = max(SHORTEST_LIMIT, lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))])
    chats = [r for r in workload.requests if r.messages and r.problem is None]
    return ProbeSource(
        encoder=encoder, max_tokens=min(longest, max_model_len),
        conversations=[
            Conversation(
                turns=tuple((m.role, m.content) for m in r.messages), language=r.tags.get("language", "")
            )
            for r in chats[:: max(1, len(chats) // MAX_CONVERSATIONS)]
        ],
    )  # fmt: skip


def _high_value(
    file: Path, model: Path, tokens: Materialised, max_model_len: int, checker: Checker | None,
    encoder: ChatEncoder | None, seed: int,
) -> Judged:  # fmt: skip
    from kvtune.adapters.prompt_encoder import prompt_encoder
    from kvtune.workload import load_workload, materialise

    asked = load_workload(file)
    encode = prompt_encoder(model) if any(r.has_text for r in asked.requests) else None
    vocab_size = 1 + max(max(r.prompt_token_ids) for r in tokens.requests)
    found = materialise(asked, vocab_size=vocab_size, max_model_len=max_model_len, encode=encode, seed=seed)
    if found.rejected:
        first = found.rejected[0]
        raise UsageError(
            f"--high-value {file}: request {first.request_id!r} cannot be served: {first.reason}; "
            "every high-value request must be judged, so mend it or take it out"
        )
    return _judged(asked.requests, found.requests, checker, encoder, is_high_value=True)


def _sample(
    workload: Workload, tokens: Materialised, checker: Checker, encoder: ChatEncoder | None, seed: int
) -> Judged:
    import numpy as np

    from kvtune.tune import choose_for_quality

    chosen = choose_for_quality(tokens.requests, NUM_JUDGED, np.random.default_rng(seed))
    return _judged(workload.requests, chosen, checker, encoder, is_high_value=False)


def _judged(
    asked: Sequence[WorkloadRequest], requests: Sequence[TokenRequest], checker: Checker | None,
    encoder: ChatEncoder | None, *, is_high_value: bool,
) -> Judged:  # fmt: skip
    from kvtune.quality import Judged
    from kvtune.target import LoadRequest

    by_id = {r.request_id: r for r in asked}
    text: Callable[[Sequence[int]], str] = _as_ids if encoder is None else encoder.text
    return Judged(
        requests=tuple(
            LoadRequest(
                request_id=r.request_id, prompt_token_ids=r.prompt_token_ids, max_tokens=r.max_tokens,
                cache_salt=r.cache_salt, ignore_eos=False,
            )
            for r in requests
        ),
        facts=tuple(_facts(by_id[r.request_id]) for r in requests),
        clusters=tuple(r.session_id or r.request_id for r in requests), text=text, checker=checker,
        is_high_value=is_high_value,
    )  # fmt: skip


def _facts(request: WorkloadRequest) -> dict[str, Any]:
    """What a checker is shown of a request."""
    return {
        "request_id": request.request_id, "prompt": request.prompt,
        "messages": [{"role": m.role, "content": m.content} for m in request.messages],
        "answer": request.answer, "tags": dict(request.tags),
    }  # fmt: skip


def _as_ids(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))


# -- what is shown --


def probes_text(quality: Mapping[str, Any]) -> list[str]:
    """The probes in one line, and the tasks left out in another."""
    probes = quality.get("probes")
    if not probes:
        return []
    lines = [
        f"probes      {probes['num_questions']} questions in {probes['num_contexts']} contexts: "
        f"baseline right {probes['reference_solved']}, lost {probes['lost']}, gained {probes['gained']}"
    ]
    if probes["left_out"]:
        names = ", ".join(entry["task"] for entry in probes["left_out"])
        lines.append(f"left out    tasks the baseline hardly solves: {names}")
    return lines


def answers_text(quality: Mapping[str, Any]) -> list[str]:
    """How the judged and high-value answers came out."""
    answers = quality.get("answers")
    if not answers:
        return []
    by = f" by {answers['checker']}" if answers["checker"] else " by equality"
    harmed = sum(row["status"] == "harmed" for row in answers["requests"])
    return [f"answers     {answers['num_requests']} judged{by}: {harmed} harmed"]
