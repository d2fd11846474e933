"""Probes: what is asked, what counts as solved, and what the pairs say."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kvtune.errors import TargetError
from kvtune.quality.paired import clustered_net_loss, net_loss
from kvtune.quality.probes import (
    OWN,
    Conversation,
    Probe,
    ProbeReference,
    ProbeSource,
    ask_probes,
    draw_probes,
    judge_probes,
    known_tasks,
    num_probes_for,
    record_probes,
)
from kvtune.quality.tasks import TASKS
from kvtune.target import ScoreItem, Scores

WORDS = [
    f"{a}{b}" for a in ("stone", "river", "cloud", "table", "horse") for b in "abcdefghijklmnopqrstuvwxyz"
]
END = 0


class CharacterEncoder:
    """One token per character, a mark per role, END after each turn."""

    words: Sequence[str] = WORDS

    def count(self, text: str) -> int:
        return len(text)

    def dialogue(
        self, turns: Sequence[tuple[str, str]], scored: Sequence[int]
    ) -> tuple[list[int], list[tuple[int, int]]] | None:
        if turns[0][0] != "system" or any(a[0] == b[0] for a, b in itertools.pairwise(turns)):
            return None
        ids: list[int] = []
        spans = []
        for index, (role, content) in enumerate(turns[: scored[-1] + 1]):
            ids.append({"system": 1, "user": 2, "assistant": 3}[role])
            start = len(ids)
            ids += [*map(ord, content), END]
            if index in scored:
                spans.append((start, len(ids)))
        return ids, spans


class Answering:
    """Scores as an engine that answers by `knows(task, item_id, number)` would give."""

    def __init__(self, knows: Any) -> None:
        self.knows, self.calls = knows, 0
        self.asked: list[str] = []

    def score(self, items: Sequence[ScoreItem], *, num_top: int, chunk: int | None = None) -> list[Scores]:
        self.calls += 1
        self.asked += [item.item_id for item in items]
        out = []
        for item in items:
            argmax = np.array(item.continuation, np.int32)
            ends = [
                i for i, token in enumerate(argmax) if token == END and (i == 0 or not self._user(item, i))
            ]
            for number, end in enumerate(ends):
                if not self.knows(item, number):
                    argmax[end] = 999
            out.append(Scores(item_id=item.item_id, ids=argmax[:, None], argmax=argmax, is_full=False,
                              logprobs=np.zeros((len(argmax), 1), np.float32),
                              token_logprobs=np.zeros(len(argmax), np.float32)))  # fmt: skip
        return out

    @staticmethod
    def _user(item: ScoreItem, end: int) -> bool:
        """Whether the turn that ends here is a question."""
        head = [t for t in item.continuation[:end] if t in (2, 3)]
        return bool(head) and head[-1] == 2


def source(**changes: Any) -> ProbeSource:
    chat = Conversation(
        turns=(("system", "Be brief."), ("user", "How do I bake bread? " * 4), ("assistant", "With flour."),
               ("user", "And then?")), language="de",
    )  # fmt: skip
    settings = {"conversations": [chat] * 3, "max_tokens": 4000, **changes}
    return ProbeSource(encoder=CharacterEncoder(), **settings)


def drawn(count: int = 56, seed: int = 0, **changes: Any) -> tuple[Probe, ...]:
    made = source(**changes)
    return draw_probes(made, random.Random(seed), count=count, tasks=known_tasks(made))[0]


def text(probe: Probe) -> str:
    return "".join(
        chr(t) if t > 3 else "\n" for t in (*probe.item.prompt_token_ids, *probe.item.continuation)
    )


def test_every_probe_has_a_system_prompt_and_most_a_second_question_on_the_same_context() -> None:
    probes = drawn()
    assert all(p.item.prompt_token_ids[0] == 1 for p in probes)
    twice = [p for p in probes if len(p.answers) == 2]
    assert {p.strata["task"] for p in probes if p not in twice} <= {"common_word"} and len(twice) > 40


def test_probes_cover_tasks_lengths_depths_and_difficulties() -> None:
    probes = drawn(160)
    seen = {name: {p.strata[name] for p in probes} for name in probes[0].strata}
    assert seen["task"] == {*known_tasks(source())} and len(seen["task"]) == 11
    assert len(seen["prompt_tokens"]) >= 3 and len(seen["depth"]) == 5
    for task in TASKS:  # whatever their number, each task meets easy and hard, short and long
        own = [p for p in probes if p.strata["task"] == task]
        assert {p.strata["difficulty"] for p in own} == {"easy", "hard"}
        assert min(p.num_tokens for p in own) < 500 and max(p.num_tokens for p in own) > 2500
    assert seen["difficulty"] == {"easy", "hard", "own"} and seen["language"] == {"en", "de"}


def test_own_conversations_keep_their_turns_and_get_a_list_that_is_asked_at_the_end() -> None:
    own = next(p for p in drawn() if p.strata["task"] == OWN)
    said = text(own)
    assert (
        said.startswith("\nBe brief.\n\nList:") and "How do I bake bread?" in said and "With flour." in said
    )
    assert "And then?" not in said  # a last question without an answer is cut
    start, end = own.answers[0]
    answer = "".join(map(chr, own.item.continuation[start : end - 1]))
    assert said.index(answer) < said.index("How do I bake bread?")


def test_conversations_with_tool_turns_or_without_answers_are_not_used() -> None:
    tool = Conversation(turns=(("user", "x"), ("assistant", "y"), ("tool", "z")))
    alone = Conversation(turns=(("user", "x"),))
    assert OWN not in known_tasks(source(conversations=[tool, alone]))


def test_the_same_seed_draws_the_same_probes_and_another_seed_others() -> None:
    assert [p.item.continuation for p in drawn()] == [p.item.continuation for p in drawn()]
    assert [p.item.continuation for p in drawn()] != [p.item.continuation for p in drawn(seed=1)]


def test_no_probe_is_longer_than_allowed_and_lengths_shrink_to_the_mean_asked_for() -> None:
    assert max(p.num_tokens for p in drawn(max_tokens=700)) <= 700
    made = source(max_tokens=1000)
    assert made.lengths(float("inf")) == (128, 256, 512, 1000)
    assert made.lengths(300) == (128, 256, 512) and made.lengths(1) == (128,)


def test_an_answer_is_solved_only_if_every_token_of_it_is_the_most_likely() -> None:
    probe = next(p for p in drawn() if len(p.answers) == 2)
    whole = Answering(lambda *_: True).score([probe.item], num_top=1)[0]
    assert probe.solved(whole) == (True, True)
    for number, (start, _) in enumerate(probe.answers):
        spoilt = Answering(lambda *_: True).score([probe.item], num_top=1)[0]
        spoilt.argmax[start] = 999
        assert probe.solved(spoilt) == (number != 0, number != 1)
    with pytest.raises(TargetError):
        drawn()[0].solved(Answering(lambda *_: True).score([drawn()[1].item], num_top=1)[0])


def test_tasks_the_baseline_does_not_solve_are_asked_once_then_named_and_left_out() -> None:
    names: dict[str, str] = {}
    made = source()
    knows = Answering(lambda item, _: "List:" in "".join(map(chr, item.prompt_token_ids)))
    found = record_probes(knows, made, random.Random(0), count=120, chunk=None)
    names = {p.strata["task"]: p.item.item_id for p in found.probes}
    assert set(names) == {"recall", OWN} and knows.calls == 2
    assert {t["task"] for t in found.left_out} == set(known_tasks(made)) - {"recall", OWN}
    assert len(found.probes) > 100
    asked = Answering(lambda *_: True)
    solved = ask_probes(asked, found)
    assert asked.calls == 1 and len(solved) == len(found.probes)


def test_a_baseline_that_solves_nothing_leaves_no_probe() -> None:
    found = record_probes(Answering(lambda *_: False), source(), random.Random(0), count=80, chunk=None)
    assert found.probes == () and len(found.left_out) == 11
    assert judge_probes(found, ()) is None


def outcome(lost: int, gained: int, n: int = 100) -> Any:
    probes = drawn(n)
    was = tuple(tuple(i >= gained for _ in p.answers) for i, p in enumerate(probes))
    is_ = tuple(tuple(i < len(probes) - lost for _ in p.answers) for i, p in enumerate(probes))
    return judge_probes(ProbeReference(probes=probes, solved=was), is_)


def test_both_directions_count_and_each_stratum_tells_its_share() -> None:
    found = outcome(6, 2)
    record = found.to_dict()
    assert record["lost"] > record["gained"] > 0 and record["net_loss"]["low"] < record["net_loss"]["value"]
    by_task = [s for s in record["strata"] if s["stratum"] == "task"]
    assert sum(s["lost"] for s in by_task) == record["lost"]
    assert sum(s["num_questions"] for s in by_task) == record["num_questions"]
    assert {s["stratum"] for s in record["strata"]} >= {"question", "depth", "language", "prompt_tokens"}


def test_enough_probes_without_a_loss_prove_the_margin_and_fewer_do_not() -> None:
    enough = num_probes_for(0.05)
    assert outcome(0, 0, enough + 6).loss.high <= 0.05 < outcome(0, 0, 30).loss.high


def test_as_many_more_questions_as_are_asked_for_settle_it_where_nothing_was_lost() -> None:
    few = outcome(0, 0, 30)
    more = few.more_needed(0.05)
    assert more is not None
    contexts = 30 + round(more * 30 / few.num_questions)
    assert outcome(0, 0, contexts + 2).loss.high <= 0.05 < outcome(0, 0, contexts - 8).loss.high


def test_pairs_that_fall_together_count_as_one() -> None:
    losses = [1] * 8 + [0] * 192
    alone = clustered_net_loss(losses, [str(i) for i in range(200)])
    twins = clustered_net_loss(losses, [str(i // 2) for i in range(200)])
    assert alone.high == pytest.approx(net_loss(8, 0, 200).high, rel=0.01) and twins.high > alone.high
    assert twins.num_clusters == 100 and twins.n == 200 and twins.value == pytest.approx(0.04)
    assert clustered_net_loss([0] * 200, [str(i // 2) for i in range(200)]).high == pytest.approx(
        0.03, rel=0.01
    )


def test_bounds_of_clustered_pairs_hold_their_level() -> None:
    """Pairs of one context fall together half of the time; of 400 bounds 5 % may lie below the truth."""
    rng = np.random.default_rng(5)
    misses = 0
    for _ in range(400):
        both = rng.random(150) < 0.5
        first, second = (rng.choice([1, 0, -1], p=[0.06, 0.92, 0.02], size=150) for _ in range(2))
        second = np.where(both, first, second)
        bounds = clustered_net_loss([*first, *second], [str(i) for i in range(150)] * 2)
        misses += bounds.high < 0.04
    assert misses <= 31  # 2.5 sigma above 20
