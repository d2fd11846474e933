"""The gate as a whole: looks, shared error, whole answers, and what each candidate costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtune.errors import UsageError
from kvtune.quality import (
    MARGINS,
    Checker,
    Gate,
    Judged,
    Reference,
    SharedError,
    Verdict,
    judge_answers,
    judge_candidate,
    load_checker,
    looks_of,
    record_answers,
)
from kvtune.target import LoadRequest, ScoreItem, Scores

VOCABULARY = 48
NEAR = MARGINS["near-lossless"]


class Noisy:
    """Logits of each item drawn from its name, with a noise of its own per engine."""

    def __init__(self, damage: float, *, seed: int = 1, answers: Mapping[str, Sequence[int]] = {}) -> None:
        self.damage, self.seed, self.answers = damage, seed, answers
        self.scored: list[str] = []

    def generate(self, requests: Sequence[LoadRequest]) -> list[Sequence[int]]:
        return [self.answers.get(r.request_id, (5, 6, 7)) for r in requests]

    def score(self, items: Sequence[ScoreItem], *, num_top: int, chunk: int | None = None) -> list[Scores]:
        self.scored += [item.item_id for item in items]
        return [self._one(item, chunk) for item in items]

    def _one(self, item: ScoreItem, chunk: int | None) -> Scores:
        name = abs(hash_of(item.item_id))
        count = len(item.continuation)
        logits = np.random.default_rng(name).normal(0, 3, (count, VOCABULARY))
        logits += np.random.default_rng((name, self.seed)).normal(0, 1, logits.shape) * self.damage
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        argmax = logp.argmax(axis=1).astype(np.int32)
        if item.item_id.startswith("sure"):
            argmax = np.array(item.continuation, np.int32)
        return Scores(
            item_id=item.item_id, ids=np.broadcast_to(np.arange(VOCABULARY, dtype=np.int32), logp.shape),
            logprobs=logp.astype(np.float32), token_logprobs=logp[np.arange(count), 0].astype(np.float32),
            argmax=argmax, is_full=True,
        )  # fmt: skip


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "little") % (1 << 31)


def gate(num: int = 256, num_decode: int = 8) -> Gate:
    items = tuple(
        ScoreItem(item_id=f"r{i}", prompt_token_ids=(1,) * 20, continuation=(1,) * 24) for i in range(num)
    )
    base, again = Noisy(0.0), Noisy(1e-3)
    decode = tuple(range(num_decode))
    reference = Reference(
        items=items, scores=tuple(base.score(items, num_top=64)),
        aa_scores=tuple(again.score(items, num_top=64)), clusters=tuple(f"s{i}" for i in range(num)),
        strata=tuple({"prompt_tokens": "0-255"} for _ in items), decode_items=decode,
        decode_scores=tuple(base.score([items[i] for i in decode], num_top=64)),
    )  # fmt: skip
    return Gate(reference=reference, margin=NEAR)


def judged_by(damage: float, **changes: Any) -> tuple[Any, Any, Noisy]:
    candidate = Noisy(damage)
    verdict, cost = judge_candidate(candidate, gate(**changes), is_lossy=True, rng=np.random.default_rng(0))
    return verdict, cost, candidate


def test_plain_harm_ends_the_replay_at_the_first_look() -> None:
    verdict, cost, candidate = judged_by(0.6)
    assert verdict.verdict is Verdict.FAIL and len(candidate.scored) == verdict.num_requests == 64
    assert verdict.num_planned == 256 and cost.passes < 0.3 and verdict.confidence == pytest.approx(0.995)


def test_plain_harmlessness_ends_it_only_on_enough_sessions_and_after_the_decode_replay() -> None:
    verdict, cost, _ = judged_by(0.01)
    assert verdict.verdict is Verdict.PASS and verdict.num_requests == 128 and verdict.num_decode == 8
    assert cost.passes < 0.6


def test_what_is_close_to_the_margin_takes_the_whole_sample() -> None:
    verdict, cost, candidate = judged_by(0.058)
    assert verdict.num_requests == 256 and len(set(candidate.scored)) == 256
    assert cost.passes <= 2


def test_a_small_sample_is_looked_at_once_with_the_whole_error() -> None:
    assert [look.num_items for look in looks_of(60)] == [60] and looks_of(60)[0].confidence == 0.95
    assert judged_by(0.01, num=60)[0].verdict is Verdict.PASS


def test_a_knob_without_effect_is_inert_after_all_of_the_sample() -> None:
    verdict, _, candidate = judged_by(0.0)
    assert verdict.verdict is Verdict.INERT and len(candidate.scored) == 256


def test_looks_and_candidates_spend_no_more_than_the_error() -> None:
    assert sum(1 - look.confidence for look in looks_of(256)) == pytest.approx(0.05)
    shared = SharedError(6)
    assert sum(shared.level(i) for i in range(6)) == pytest.approx(0.05)
    before = shared.level(1)
    shared.passed(0)  # it fell for its speed
    assert shared.level(1) > before and sum(shared.level(i) for i in range(1, 6)) == pytest.approx(0.05)
    assert SharedError(1).level(0) == pytest.approx(0.05)


def test_holm_keeps_the_chance_of_any_false_pass_among_six_harmful_candidates() -> None:
    """Each candidate lies exactly at the margin: at most 5 % of runs may pass any."""
    rng = np.random.default_rng(3)
    runs, wrong, alone = 4000, 0, 0
    for _ in range(runs):
        p = rng.random(6)  # the p-value of a true null
        shared = SharedError(6)
        wrong += any(p[i] <= shared.level(i) for i in range(6))
        alone += any(p <= 0.05)
    assert wrong / runs <= 0.06 < 0.2 < alone / runs


def test_the_verdict_says_what_it_covers_and_what_it_cannot_see() -> None:
    record = judged_by(0.01)[0].to_dict()
    assert record["covered"]["requests"] == {"prompt_tokens": ["0-255"]}
    assert any("longer than 20 tokens" in s for s in record["cannot_see"])
    assert any("no probe" in s for s in record["cannot_see"])


# whole answers


def judged(checker: Checker | None = None, *, num: int = 4, high_value: bool = True) -> Judged:
    requests = tuple(
        LoadRequest(request_id=f"sure{i}", prompt_token_ids=(1, 2), max_tokens=3) for i in range(num)
    )
    return Judged(
        requests=requests, facts=tuple({"request_id": r.request_id} for r in requests), checker=checker,
        clusters=tuple(r.request_id for r in requests), is_high_value=high_value,
        text=lambda ids: " ".join(map(str, ids)),
    )  # fmt: skip


def compared(asked: Judged, answers: Mapping[str, Sequence[int]]) -> Any:
    reference = record_answers(Noisy(0), asked, aa_chunk=8)
    return judge_answers(Noisy(0, answers=answers), reference, rng=np.random.default_rng(0))


def test_one_changed_high_value_answer_among_many_is_harm() -> None:
    found = compared(judged(num=200), {"sure7": (5, 6, 8)})
    assert "'sure7' is harmed" in found.harm and "token 2" in found.harm
    assert found.rows[7]["first_change"] == 2 and found.rows[6]["status"] == "unchanged"


def test_the_users_checker_decides_what_harm_is() -> None:
    right = Checker("m:f", lambda request, answer: answer.startswith("5 6"))
    same = compared(judged(right), {"sure1": (5, 6, 8)})
    worse = compared(judged(right), {"sure1": (4, 6, 7)})
    assert same.harm == "" and same.rows[1]["status"] == "changed, as good"
    assert "from 1 to 0" in worse.harm and worse.to_dict()["checker"] == "m:f"


def test_an_answer_the_baseline_does_not_repeat_is_in_doubt_not_harmed() -> None:
    asked = judged()
    requests = tuple(LoadRequest(request_id=f"r{i}", prompt_token_ids=(1, 2), max_tokens=3) for i in range(4))
    reference = record_answers(Noisy(0), replace_requests(asked, requests), aa_chunk=8)
    found = judge_answers(Noisy(0, answers={"r1": (9, 9, 9)}), reference, rng=np.random.default_rng(0))
    assert found.harm == "" and "does not repeat" in found.doubt


def replace_requests(asked: Judged, requests: tuple[LoadRequest, ...]) -> Judged:
    return Judged(
        requests=requests, facts=asked.facts, clusters=asked.clusters, is_high_value=True, text=asked.text
    )


def test_harm_to_one_high_value_request_fails_a_candidate_that_passes_by_its_means() -> None:
    from dataclasses import replace

    answers = record_answers(Noisy(0), judged(), aa_chunk=8)
    whole = replace(gate(), answers=(answers,))
    sound, _ = judge_candidate(Noisy(0.01), whole, is_lossy=True, rng=np.random.default_rng(0))
    harmed, _ = judge_candidate(
        Noisy(0.01, answers={"sure2": (1, 1, 1)}), whole, is_lossy=True, rng=np.random.default_rng(0)
    )
    assert sound.verdict is Verdict.PASS and sound.answers is not None
    assert harmed.verdict is Verdict.FAIL and "sure2" in harmed.reason


def test_a_judged_sample_is_paired_and_both_directions_count() -> None:
    rule = Checker("m:f", lambda request, answer: answer == "5 6 7")
    found = compared(judged(rule, num=100, high_value=False), {f"sure{i}": (1,) for i in range(10)})
    assert found.loss is not None and found.loss.value == pytest.approx(0.1) and found.loss.low > 0
    assert len(found.rows) == 10 and found.harm == ""
    score = Checker("m:f", lambda request, answer: 0.5 if answer == "1" else 0.75)
    graded = compared(judged(score, num=100, high_value=False), {f"sure{i}": (1,) for i in range(10)})
    assert graded.loss is not None and graded.loss.value == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda r, a: "yes", "must return"),
        (lambda r, a: 3, "must return"),
        (lambda r, a: 1 / 0, "ZeroDivision"),
    ],
)
def test_a_checker_that_misbehaves_is_one_line_that_names_the_request(function: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as found:
        compared(judged(Checker("m:f", function)), {})
    assert "sure0" in str(found.value)


def test_a_checker_is_loaded_by_name_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rules.py").write_text("def ok(request, answer):\n    return 'yes' in answer\n")
    monkeypatch.chdir(tmp_path)
    assert load_checker("my_rules:ok").score({}, "oh yes") == 1.0
    for name, said in (
        ("my_rules", "module:function"),
        ("my_rules:no", "no function"),
        ("absent_m:f", "import"),
    ):
        with pytest.raises(UsageError, match=said):
            load_checker(name)
