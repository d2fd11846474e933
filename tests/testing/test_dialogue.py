"""Drawn tasks become the token ids the chat template gives, and answers are found where they stand."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import AutoTokenizer

from kvtune.errors import UsageError
from kvtune.quality import TASKS, Sample, draw
from kvtune.testing.reference import reference_model_path
from kvtune.testing.reference.dialogue import END, SPECIALS, DialogueEncoder, material, single_token_words


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(reference_model_path())


@pytest.fixture(scope="module")
def encoder(tokenizer) -> DialogueEncoder:
    return DialogueEncoder(tokenizer)


def _sample(tokenizer, name: str, seed: int = 0, questions: int = 3) -> Sample:
    source = material(tokenizer, ["Return a list of the names in the given mapping.\n" * 3])
    return draw(name, random.Random(seed), source, num_tokens=400, num_questions=questions)


@pytest.mark.parametrize("name", TASKS)
def test_a_dialogue_is_what_the_chat_template_renders(tokenizer, encoder, name):
    sample = _sample(tokenizer, name)
    messages = [{"role": role, "content": content} for role, content in sample.turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert list(encoder.dialogue(sample).token_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TASKS)
def test_scored_answers_are_where_their_turns_stand(tokenizer, encoder, name):
    sample = _sample(tokenizer, name)
    dialogue = encoder.dialogue(sample)
    assert len(dialogue.answers) == len(sample.scored)
    for (start, end), turn in zip(dialogue.answers, sample.scored, strict=True):
        said = dialogue.token_ids[start:end]
        assert said[-1] == END
        assert tokenizer.decode(said[:-1]) == sample.turns[turn][1]
    assert dialogue.prompt + dialogue.continuation == dialogue.token_ids[: dialogue.answers[-1][1]]


def test_an_answer_counts_only_where_every_token_is_the_most_likely_one(tokenizer, encoder):
    dialogue = encoder.dialogue(_sample(tokenizer, "recall"))
    greedy = list(dialogue.continuation)
    assert dialogue.is_answered(greedy) == [True] * 3
    first = dialogue.answers[0][0]
    start, end = dialogue.answers[1]
    for position in (start, end - 1):
        wrong = [*greedy[: position - first], 9, *greedy[position - first + 1 :]]
        assert dialogue.is_answered(wrong) == [True, False, True]
    between = [*greedy[: start - first - 1], 9, *greedy[start - first :]]  # a token of the question
    assert dialogue.is_answered(between) == [True] * 3


def test_words_are_single_tokens_and_enough_for_every_task(tokenizer, encoder):
    words = single_token_words(tokenizer)
    assert len(words) == len(set(words)) > 300
    assert all(len(encoder.text(f" {word}")) == 1 for word in words)


def test_a_tokenizer_with_other_special_tokens_is_refused():
    class Other:
        def convert_ids_to_tokens(self, ids) -> list[str]:
            return [f"t{index}" for index in ids]

    with pytest.raises(UsageError, match=r"special tokens <\|pad\|>.*found \('t0'"):
        DialogueEncoder(Other())
    assert len(SPECIALS) == 6
