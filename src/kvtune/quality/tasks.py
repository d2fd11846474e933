"""Tasks whose answers stand in their context, drawn at run time and scored: the gate's probes. No tensors.

The kinds follow RULER (Hsieh et al. 2024, arXiv:2404.06654): retrieval with few or many distractors and
near-duplicate keys, variable tracking, aggregation; and what chats need besides: verbatim copy, list and
JSON completion, a system-prompt rule kept to the end, a second question on the same context. Everything
is drawn from an rng, so no model can have seen an answer, and each answer states what it answers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from kvtune.errors import UsageError

__all__ = ["TASKS", "Difficulty", "Material", "Sample", "Task", "draw", "is_correct"]

Difficulty = Literal["easy", "hard"]
_MIN_TOKENS: Final = 48
_ATTRIBUTES: Final = ("name", "city", "team", "color", "project", "animal", "food", "language")
_ANSWER_TOKENS: Final = 24
"""Room a question with its answer and the turns' marks may take, in tokens."""


def _count_characters(text: str) -> int:
    """Tokens of English text in a usual vocabulary, roughly."""
    return 1 + len(text) // 4


@dataclass(frozen=True, slots=True)
class Material:
    """What samples are made of: at least 64 `words` (best one token each), `filler` texts that stand
    between what matters, and `count_tokens`, the tokens of a piece of text."""

    words: Sequence[str]
    filler: Sequence[str] = ()
    count_tokens: Callable[[str], int] = field(default=_count_characters)


@dataclass(frozen=True, slots=True)
class Sample:
    """A dialogue of (role, content) turns. `scored` are the indices of the assistant's turns to score;
    each is asked with the true turns before it."""

    task: str
    turns: tuple[tuple[str, str], ...]
    scored: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A named generator of samples; `draw` is the way to call it."""

    name: str
    description: str
    draw: Callable[[_Request], Sample]


@dataclass(frozen=True, slots=True)
class _Request:
    rng: random.Random
    material: Material
    num_tokens: int
    hard: bool
    num_questions: int
    depth: float | None

    def words(self, count: int) -> list[str]:
        return self.rng.sample(self.material.words, min(count, len(self.material.words)))

    def room(self) -> int:
        return self.num_tokens - _ANSWER_TOKENS * self.num_questions - 16

    def num_lines(self, line: str, *, easy: int, most: int) -> int:
        """How many lines like this one: up to `easy`, or when hard as many as fit, at most `most`."""
        fitting = max(3, min(most, self.room() // (self.material.count_tokens(line + "\n"))))
        if not self.hard:
            return self.rng.randint(3, max(3, min(easy, fitting)))
        return self.rng.randint(max(3, fitting // 2), fitting)

    def asked(self, count: int) -> list[int]:
        """Lines asked for, each once before any is asked again; `depth` in 0..1 fixes the first (0: first
        line)."""
        rounds = -(-self.num_questions // count)
        order = [line for _ in range(rounds) for line in self.rng.sample(range(count), count)]
        if self.depth is not None:
            first = round(self.depth * (count - 1))
            order.remove(first)
            order.insert(0, first)
        return order[: self.num_questions]


def draw(
    name: str,
    rng: random.Random,
    material: Material,
    *,
    num_tokens: int,
    difficulty: Difficulty = "hard",
    num_questions: int = 1,
    depth: float | None = None,
) -> Sample:
    """Draw a sample of task `name` of about `num_tokens` tokens, questions and answers included.

    `difficulty`: easy has few distractors among filler text, hard has as many as fit. `depth` in 0..1
    fixes where the first answer stands, where the task has lines to choose from (0: at the start).
    Raises UsageError for an unknown task, too few words, or a context too small to hold anything.
    """
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    if len(set(material.words)) < 64:
        raise UsageError(f"tasks need at least 64 different words, found {len(set(material.words))}")
    if num_questions < 1:
        raise UsageError(f"num_questions must be at least 1, found {num_questions}")
    if num_tokens < _MIN_TOKENS + _ANSWER_TOKENS * num_questions:
        raise UsageError(
            f"{num_questions} questions need a context of at least "
            f"{_MIN_TOKENS + _ANSWER_TOKENS * num_questions} tokens, found {num_tokens}"
        )
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise UsageError(f"depth must lie in 0..1, found {depth}")
    request = _Request(rng, material, num_tokens, difficulty == "hard", num_questions, depth)
    return TASKS[name].draw(request)


def is_correct(expected: str, answer: str) -> bool:
    """True where the answer is the expected one, white space aside."""
    return expected.split() == answer.split()


# ---------------------------------------------------------------- retrieval


def _recall(request: _Request) -> Sample:
    """Keys with values among filler; questions for single keys."""
    rng = request.rng
    separator = rng.choice((" ", ": ", " = "))
    count = request.num_lines(" key: value", easy=12, most=320)
    keys = request.words(count)
    lines = [f" {key}{separator}{rng.choice(request.material.words)}" for key in keys]
    question = rng.choice(("Value of {}?", "What is {}?", "Look up {}."))
    pairs = [(question.format(keys[i]), lines[i]) for i in request.asked(len(keys))]
    return _dialogue(request, "recall", "List:", lines, pairs)


def _near_duplicates(request: _Request) -> Sample:
    """Keys of two words; other keys share the first word, the second, or each of them apart."""
    rng = request.rng
    wanted = request.num_lines(" first second: value", easy=8, most=120)
    side = max(2, round((1.5 * wanted) ** 0.5))
    drawn = request.words(2 * side)
    firsts, seconds = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    grid = [(first, second) for first in firsts for second in seconds]
    keys = [f" {first} {second}" for first, second in rng.sample(grid, min(wanted, len(grid)))]
    lines = [f"{key}: {rng.choice(request.material.words)}" for key in keys]
    question = rng.choice(("Value of{}?", "What is{}?", "Look up{}."))
    pairs = [(question.format(keys[i]), lines[i]) for i in request.asked(len(keys))]
    return _dialogue(request, "near_duplicates", "Pairs:", lines, pairs)


def _tracking(request: _Request) -> Sample:
    """Variables assigned from variables, two to four hops; the answer writes the chain to its number."""
    rng = request.rng
    hops = rng.randint(2, 4) if request.hard else 2
    count = max(2, request.num_lines(" name = name", easy=12, most=240) // hops)
    names = request.words(count * hops)
    chains = [names[i : i + hops] for i in range(0, len(names) - hops + 1, hops)]
    numbers = [str(rng.randint(10, 99)) for _ in chains]
    lines: list[str] = []
    for chain, number in zip(chains, numbers, strict=True):
        lines += [f" {left} = {right}" for left, right in zip(chain, [*chain[1:], number], strict=True)]
    rng.shuffle(lines)
    pairs = [
        (f"Trace {chains[i][0]}.", " " + " = ".join([*chains[i], numbers[i]]))
        for i in request.asked(len(chains))
    ]
    return _dialogue(request, "tracking", "Variables:", lines, pairs)


# ---------------------------------------------------------------- aggregation


def _count(request: _Request) -> Sample:
    """Words that stand in a list one to four times each, and nowhere else in the context; how often?"""
    rng = request.rng
    kinds = max(2, request.num_lines(" - word", easy=12, most=60) // 2)
    words = request.words(kinds)
    times = {word: rng.randint(1, 4) for word in words}
    items = [f" - {word}" for word in words for _ in range(times[word])]
    rng.shuffle(items)
    pairs = [
        (f"How often is {words[i]} in the list?", f" {words[i]}:{times[words[i]]}")
        for i in request.asked(len(words))
    ]
    return _dialogue(request, "count", "Items:", items, pairs, avoid=words)


def _common_word(request: _Request) -> Sample:
    """One word stands in the list at least three times as often as any other: which?"""
    rng = request.rng
    size = max(8, request.num_lines(" - word", easy=20, most=240))
    share = 4 if request.hard else 2
    times = max(3, size // share)
    words = request.words(1 + max(2, size - times))
    others: list[str] = []
    for word in words[1:]:
        others += [word] * rng.randint(1, max(1, min(times // 3, 8)))
    items = [f" - {word}" for word in [words[0]] * times + others[: size - times]]
    rng.shuffle(items)
    pairs = [("Which item is most common?", f" {words[0]}")]
    return _dialogue(request, "common_word", "Items:", items, pairs, avoid=words)


# ---------------------------------------------------------------- completion


def _copy(request: _Request) -> Sample:
    """Passages of text under labels; one is to be repeated word for word (its first 30 words)."""
    rng = request.rng
    words = request.material.words
    longest = 30 if request.hard else 12
    passage = " ".join(_passage(request, longest))
    count = request.num_lines(f" [label] {passage}", easy=2, most=16 if request.hard else 2)
    labels = request.words(count)
    texts = [" ".join(_passage(request, longest)) or rng.choice(words) for _ in labels]
    lines = [f" [{label}] {text}" for label, text in zip(labels, texts, strict=True)]
    pairs = [(f"Repeat [{labels[i]}].", lines[i]) for i in request.asked(len(labels))]
    return _dialogue(request, "copy", "Passages:", lines, pairs)


def _passage(request: _Request, longest: int) -> list[str]:
    """Words of a piece of filler text, or drawn words where there is no filler."""
    rng = request.rng
    length = rng.randint(6, longest)
    if request.material.filler and rng.random() < 0.7:
        text = rng.choice(request.material.filler).split()
        if len(text) > length:
            start = rng.randrange(len(text) - length)
            return [word[:24] for word in text[start : start + length]]
    return [rng.choice(request.material.words) for _ in range(length)]


def _list_completion(request: _Request) -> Sample:
    """Lists under names; a question gives the first two items, the answer writes out the whole list."""
    rng = request.rng
    longest = 7 if request.hard else 5
    count = request.num_lines(" name:" + " word," * longest, easy=5, most=60)
    names = request.words(count)
    lists = [request.words(rng.randint(4, longest)) for _ in names]
    lines = [f" {name}: {', '.join(items)}." for name, items in zip(names, lists, strict=True)]
    pairs = [
        (f"Complete {names[i]}: {', '.join(lists[i][:2])},", lines[i]) for i in request.asked(len(names))
    ]
    return _dialogue(request, "list_completion", "Lists:", lines, pairs)


def _json_completion(request: _Request) -> Sample:
    """Records as JSON lines, each with fields of its own; the answer is the asked record."""
    rng = request.rng
    num_fields = 3 if request.hard else 2
    example = '{"name": "word", ' + ", ".join(['"word": "word"'] * num_fields) + "}"
    count = request.num_lines(example, easy=5, most=60)
    names = request.words(count)
    lines = [_record(rng, request.material.words, name, num_fields) for name in names]
    pairs = [(f"Give the record of {names[i]}.", lines[i]) for i in request.asked(len(names))]
    return _dialogue(request, "json_completion", "Records:", lines, pairs)


def _record(rng: random.Random, words: Sequence[str], name: str, num_fields: int) -> str:
    """A JSON object on one line; a space after each opening quote keeps words single tokens."""
    fields = [f'" {key}": " {rng.choice(words)}"' for key in rng.sample(words, num_fields)]
    return " {" + ", ".join([f'"name": " {name}"', *fields]) + "}"


# ---------------------------------------------------------------- dialogue


def _rule(request: _Request) -> Sample:
    """A system prompt with a closing word, facts told along the way, questions for them at the end."""
    rng = request.rng
    closing = rng.choice(request.material.words)
    attributes = rng.sample(_ATTRIBUTES, len(_ATTRIBUTES) if request.hard else 4)
    facts = {attribute: rng.choice(request.material.words) for attribute in attributes}
    system = f"You are a helpful assistant. End every answer with {closing}."
    turns: list[tuple[str, str]] = [("system", system)]
    told = 0
    room = request.room() - 24
    while room > 0 or told < len(attributes):
        chatter = _filler(request, min(max(room, 0) // 2, 160)) if rng.random() < 0.6 else ""
        if told < len(attributes) and (room <= 0 or rng.random() < 0.6):
            attribute = attributes[told]
            told += 1
            added = (
                ("user", f"{chatter}My {attribute} is {facts[attribute]}."),
                ("assistant", f"Noted, your {attribute} is {facts[attribute]}. {closing}"),
            )
        elif told and rng.random() < 0.5:
            added = _question(rng.choice(attributes[:told]), facts, closing)
        else:
            added = (("user", f"{chatter}Go on."), ("assistant", f"Noted. {closing}"))
        turns += added
        room -= sum(request.material.count_tokens(content) + 2 for _, content in added)
    scored: list[int] = []
    for index in request.asked(len(attributes)):
        turns += _question(attributes[index], facts, closing)
        scored.append(len(turns) - 1)
    return Sample("rule", tuple(turns), tuple(scored))


def _question(
    attribute: str, facts: Mapping[str, str], closing: str
) -> tuple[tuple[str, str], tuple[str, str]]:
    return (
        ("user", f"What is my {attribute}?"),
        ("assistant", f"Your {attribute} is {facts[attribute]}. {closing}"),
    )


def _second_question(request: _Request) -> Sample:
    """Values and records in one context; a first question about one kind, the scored ones about both."""
    rng = request.rng
    both = " key: value\n" + _record(rng, request.material.words, "name", 2)
    count = max(2, request.num_lines(both, easy=5, most=80))
    names = request.words(2 * count)
    values = [f" {key}: {rng.choice(request.material.words)}" for key in names[:count]]
    records = [_record(rng, request.material.words, name, 2) for name in names[count:]]
    lines = rng.sample([*values, *records], len(values) + len(records))
    first, *rest = request.asked(len(records))
    questions = [(f"Give the record of {names[count + first]}.", records[first])]
    opening = rng.randrange(count)
    questions.insert(0, (f"What is {names[opening]}?", values[opening]))
    for number, index in enumerate(rest):
        if number % 2:
            questions.append((f"Give the record of {names[count + index]}.", records[index]))
        else:
            chosen = index % len(values)
            questions.append((f"What is {names[chosen]}?", values[chosen]))
    sample = _dialogue(request, "second_question", "Notes:", lines, questions)
    return Sample(sample.task, sample.turns, sample.scored[1:])


# ---------------------------------------------------------------- putting together


def _dialogue(
    request: _Request,
    task: str,
    title: str,
    lines: Sequence[str],
    questions: Sequence[tuple[str, str]],
    *,
    avoid: Sequence[str] = (),
) -> Sample:
    """The lines among filler as system or user turn, then the questions with their answers; words that
    begin with one to `avoid` are taken out of the filler, where they would be one more to count."""
    context = title + "\n" + "\n".join(_among_filler(request, lines, avoid))
    if request.rng.random() < 0.5:
        turns = [("system", context)]
    else:
        turns = [("user", context), ("assistant", "Ready.")]
    scored: list[int] = []
    for question, answer in questions:
        turns += [("user", question), ("assistant", answer)]
        scored.append(len(turns) - 1)
    return Sample(task, tuple(turns), tuple(scored))


def _among_filler(request: _Request, lines: Sequence[str], avoid: Sequence[str]) -> list[str]:
    """The lines in order, pieces of filler at random places up to the context's size."""
    room = request.room() - request.material.count_tokens("\n".join(lines))
    pieces: list[tuple[float, str]] = [(float(index), line) for index, line in enumerate(lines)]
    while room > 24 and request.material.filler:
        piece = _filler(request, min(room, 160))
        if not piece:
            break
        if avoid:
            piece = re.sub(rf"\b({'|'.join(map(re.escape, avoid))})\w*", "", piece)
        pieces.append((request.rng.uniform(-0.5, len(lines) - 0.5), piece.rstrip("\n")))
        room -= request.material.count_tokens(piece) + 1
    return [piece for _, piece in sorted(pieces)]


def _filler(request: _Request, num_tokens: int) -> str:
    """A line-ended piece of some filler text of at most `num_tokens` tokens, "" where there is none."""
    if not request.material.filler or num_tokens < 8:
        return ""
    rng = request.rng
    text = rng.choice(request.material.filler)
    start = rng.randrange(max(1, len(text) - 400))
    piece = text[start : start + rng.randint(60, 400)]
    tokens = request.material.count_tokens(piece)
    if tokens > num_tokens:
        piece = piece[: len(piece) * num_tokens // tokens]
    return piece + "\n" if piece else ""


TASKS: Final[Mapping[str, Task]] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("recall", "values of keys at any depth", _recall),
            Task("near_duplicates", "values of keys that share words with others", _near_duplicates),
            Task("tracking", "variables followed over two to four assignments", _tracking),
            Task("copy", "a labelled passage repeated word for word", _copy),
            Task("count", "how often a word stands in a list", _count),
            Task("common_word", "the most common word of a list", _common_word),
            Task("list_completion", "the rest of a named list", _list_completion),
            Task("json_completion", "a record as JSON", _json_completion),
            Task("rule", "facts of a chat, answered under a system prompt's rule", _rule),
            Task("second_question", "another question of another kind on the same context", _second_question),
        )
    }
)
