"""Tasks state their answers in their contexts, keep to their size, and are drawn anew each time."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.errors import UsageError
from kvtune.quality.tasks import TASKS, Difficulty, Material, Sample, draw, is_correct

WORDS = tuple(f"w{a}{b}" for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst")
MATERIAL = Material(WORDS, ("Some prose that stands between the lines. " * 30,))
every_task = pytest.mark.parametrize("name", TASKS)
every_difficulty = pytest.mark.parametrize("difficulty", get_args(Difficulty))


def context_of(sample: Sample) -> str:
    return "\n".join(content for _, content in sample.turns[: sample.scored[0]])


def answers_of(sample: Sample) -> list[str]:
    return [sample.turns[index][1] for index in sample.scored]


@every_task
@every_difficulty
def test_a_sample_scores_assistant_turns_that_follow_a_question(name: str, difficulty: Difficulty) -> None:
    sample = draw(name, random.Random(1), MATERIAL, num_tokens=700, difficulty=difficulty, num_questions=3)
    assert sample.task == name
    assert sample.scored
    for index in sample.scored:
        assert sample.turns[index][0] == "assistant"
        assert sample.turns[index - 1][0] == "user"


@every_task
@every_difficulty
@pytest.mark.parametrize("num_tokens", [400, 1000, 4000])
def test_a_sample_keeps_to_its_size(name: str, difficulty: Difficulty, num_tokens: int) -> None:
    rng = random.Random(2)
    for _ in range(5):
        sample = draw(name, rng, MATERIAL, num_tokens=num_tokens, difficulty=difficulty)
        size = sum(MATERIAL.count_tokens(content) + 1 for _, content in sample.turns)
        assert 0.7 * num_tokens <= size <= 1.15 * num_tokens


@every_task
def test_the_same_rng_draws_the_same_sample_and_another_draws_another(name: str) -> None:
    def drawn(seed: int) -> Sample:
        return draw(name, random.Random(seed), MATERIAL, num_tokens=500)

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


@pytest.mark.parametrize("name", ["recall", "near_duplicates", "copy", "json_completion"])
def test_the_asked_line_stands_in_the_context_word_for_word(name: str) -> None:
    sample = draw(name, random.Random(5), MATERIAL, num_tokens=900, num_questions=4)
    for answer in answers_of(sample):
        assert answer in context_of(sample).splitlines()


def test_near_duplicates_share_words_and_stay_unique() -> None:
    sample = draw("near_duplicates", random.Random(6), MATERIAL, num_tokens=900)
    keys = [tuple(key.split()) for key in re.findall(r"^ (\w+ \w+): \w+$", context_of(sample), re.M)]
    assert len(keys) == len(set(keys)) > 20
    assert max(Counter(first for first, _ in keys).values()) > 1
    assert max(Counter(second for _, second in keys).values()) > 1


def test_a_traced_variable_ends_at_its_number() -> None:
    rng = random.Random(7)
    lengths: set[int] = set()
    for _ in range(20):
        sample = draw("tracking", rng, MATERIAL, num_tokens=600)
        assigned = dict(re.findall(r"^ (\w+) = (\w+)$", context_of(sample), re.M))
        chain = answers_of(sample)[0].split(" = ")
        chain[0] = chain[0].strip()
        assert all(assigned[left] == right for left, right in itertools.pairwise(chain))
        assert chain[-1].isdigit()
        lengths.add(len(chain) - 1)
    assert lengths == {2, 3, 4}


def test_a_count_is_the_number_of_times_the_word_is_listed() -> None:
    rng = random.Random(8)
    counts: set[str] = set()
    for _ in range(20):
        sample = draw("count", rng, MATERIAL, num_tokens=600)
        word, number = answers_of(sample)[0].split(":")
        assert context_of(sample).splitlines().count(f" -{word}") == int(number)
        counts.add(number)
    assert counts == {"1", "2", "3", "4"}


@every_difficulty
def test_the_common_word_leads_by_far(difficulty: Difficulty) -> None:
    rng = random.Random(9)
    for _ in range(20):
        sample = draw("common_word", rng, MATERIAL, num_tokens=600, difficulty=difficulty)
        items = Counter(re.findall(r"^ - (\w+)$", context_of(sample), re.M)).most_common()
        assert items[0][0] == answers_of(sample)[0].strip()
        assert items[0][1] >= 3
        assert all(number <= items[0][1] / 3 for _, number in items[1:])


def test_records_are_json() -> None:
    sample = draw("json_completion", random.Random(10), MATERIAL, num_tokens=900)
    assert len(json.loads(answers_of(sample)[0])) == 4


def test_a_completed_list_is_the_list_it_was_started_from() -> None:
    sample = draw("list_completion", random.Random(11), MATERIAL, num_tokens=900)
    question = sample.turns[sample.scored[0] - 1][1]
    answer = answers_of(sample)[0]
    assert answer.strip().startswith(question.removeprefix("Complete ").rstrip(","))
    assert answer in context_of(sample).splitlines()


def test_every_answer_of_a_chat_keeps_the_rule_and_the_facts() -> None:
    sample = draw("rule", random.Random(12), MATERIAL, num_tokens=900, num_questions=4)
    closing = sample.turns[0][1].removesuffix(".").split()[-1]
    assert all(content.endswith(f" {closing}") for role, content in sample.turns if role == "assistant")
    for index in sample.scored:
        attribute = sample.turns[index - 1][1].removesuffix("?").split()[-1]
        value = re.search(rf"My {attribute} is (\w+)\.", context_of(sample))
        assert value is not None
        assert f"{attribute} is {value[1]}." in sample.turns[index][1]


def test_the_second_question_is_scored_and_the_first_is_not() -> None:
    sample = draw("second_question", random.Random(13), MATERIAL, num_tokens=900)
    asked = [index for index, (role, text) in enumerate(sample.turns) if role == "user" and len(text) < 80]
    assert len(asked) == 2
    assert sample.scored == (asked[1] + 1,)


def test_depth_places_the_answer() -> None:
    for depth in (0.0, 0.5, 1.0):
        sample = draw("recall", random.Random(14), MATERIAL, num_tokens=900, depth=depth)
        context = context_of(sample)
        found = context.index(answers_of(sample)[0]) / len(context)
        assert abs(found - depth) < 0.2


@every_difficulty
def test_no_line_is_asked_twice_while_others_are_unasked(difficulty: Difficulty) -> None:
    for seed in range(20):
        sample = draw(
            "recall", random.Random(seed), MATERIAL, num_tokens=900, num_questions=3, depth=0.5,
            difficulty=difficulty,
        )  # fmt: skip
        assert len(set(answers_of(sample))) == 3


@pytest.mark.parametrize("name", ["count", "common_word"])
def test_what_is_counted_stands_in_no_filler(name: str) -> None:
    filler = "w" + " and again ".join(f"{word}, {word}ing" for word in WORDS)
    material = Material(WORDS, (filler,) * 4)
    for seed in range(10):
        sample = draw(name, random.Random(seed), material, num_tokens=900, difficulty="easy")
        context = sample.turns[0][1]
        listed = set(re.findall(r"^ - (\w+)$", context, re.MULTILINE))
        prose = " ".join(line for line in context.splitlines() if not line.startswith(" - "))
        assert prose.count("again") > 5 and not [word for word in listed if f" {word}" in prose]


def test_white_space_does_not_make_an_answer_wrong() -> None:
    assert is_correct(" key: value", "key:  value\n")
    assert not is_correct(" key: value", " key: other")
    assert not is_correct(" key: value", " key: value value")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "riddle"}, "unknown task 'riddle'"),
        ({"num_tokens": 10}, "at least 72 tokens, found 10"),
        ({"num_questions": 0}, "num_questions must be at least 1, found 0"),
        ({"depth": 1.5}, "depth must lie in 0..1, found 1.5"),
        ({"material": Material(("one",) * 100)}, "at least 64 different words, found 1"),
    ],
)
def test_an_impossible_request_is_refused_in_one_line(wrong: dict[str, object], said: str) -> None:
    asked = {"name": "recall", "material": MATERIAL, "num_tokens": 500} | wrong
    with pytest.raises(UsageError) as refused:
        draw(asked.pop("name"), random.Random(0), asked.pop("material"), **asked)  # type: ignore[arg-type]
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(TASKS)), seed=st.integers(0, 2**32), num_tokens=st.integers(300, 6000),
    questions=st.integers(1, 8), difficulty=st.sampled_from(get_args(Difficulty)),
    filler=st.sampled_from([(), ("x",), MATERIAL.filler]),
)  # fmt: skip
def test_any_request_draws_a_sample(
    name: str, seed: int, num_tokens: int, questions: int, difficulty: Difficulty, filler: tuple[str, ...]
) -> None:
    material = Material(WORDS, filler)
    sample = draw(
        name, random.Random(seed), material, num_tokens=num_tokens, difficulty=difficulty,
        num_questions=questions,
    )  # fmt: skip
    assert all(content for _, content in sample.turns)
    assert len(sample.scored) == (1 if name == "common_word" else questions)
