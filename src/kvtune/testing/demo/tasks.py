"""Generated dialogues whose answers stand in their context: recall, verbatim copy, rules, look-ups. No torch.

Each generator draws a `Sample` from an rng; nothing is fixed, so a model cannot have seen the answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtune.testing.demo.corpus import DocumentedName

_SEPARATORS = (" ", ": ", " = ")
_QUESTIONS = ("{key}?", "What is {key}?", "Look up {key}.")


@dataclass(frozen=True, slots=True)
class Sample:
    """A dialogue: (role, content) turns; the assistant's turns are what the model must produce."""

    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Words:
    """The material of the generators: words (one token each, mostly) and pieces of text for filling."""

    words: Sequence[str]
    filler: Sequence[str] = field(default_factory=tuple)


def recall(
    rng: random.Random, material: Words, *, num_pairs: int, num_queries: int, filler_chars: int = 0,
    depth: float | None = None,
) -> Sample:  # fmt: skip
    """A list of keys with values, text between its lines, then questions for single keys.

    `depth` in 0..1 fixes where in the list the first asked key stands (0: first line).
    """
    keys = rng.sample(list(material.words), min(num_pairs, len(material.words)))
    values = [rng.choice(material.words) for _ in keys]
    separator = rng.choice(_SEPARATORS)
    lines = [f" {key}{separator}{value}" for key, value in zip(keys, values, strict=True)]
    context = "\n".join(_interleave(rng, lines, material.filler, filler_chars))
    question = rng.choice(_QUESTIONS)
    asked = [rng.randrange(len(keys)) for _ in range(num_queries)]
    if depth is not None:
        asked[0] = round(depth * (len(keys) - 1))
    turns: list[tuple[str, str]] = [("system" if rng.random() < 0.5 else "user", "List:\n" + context)]
    if turns[0][0] == "user":
        turns.append(("assistant", "Ready."))
    for index in asked:
        turns.append(("user", question.format(key=keys[index])))
        turns.append(("assistant", lines[index]))
    return Sample(tuple(turns))


def copy(rng: random.Random, text: str) -> Sample:
    """Repeat a piece of text word for word."""
    request = rng.choice(("Repeat this text:\n", "Copy:\n", "Say again:\n"))
    return Sample((("user", request + text), ("assistant", text)))


def profile(rng: random.Random, material: Words, *, num_turns: int) -> Sample:
    """A chat with a rule in the system prompt and facts told along the way that are asked for later."""
    closing = rng.choice(material.words)
    attributes = rng.sample(("name", "city", "team", "color", "project", "animal", "food", "language"), 6)
    facts: dict[str, str] = {}
    turns: list[tuple[str, str]] = [
        ("system", f"You are a helpful assistant. End every answer with {closing}.")
    ]
    for _ in range(num_turns):
        untold = [a for a in attributes if a not in facts]
        if untold and (not facts or rng.random() < 0.45):
            attribute = untold[0]
            facts[attribute] = rng.choice(material.words)
            turns.append(("user", f"My {attribute} is {facts[attribute]}."))
            turns.append(("assistant", f"Noted, your {attribute} is {facts[attribute]}. {closing}"))
        else:
            attribute = rng.choice(list(facts))
            turns.append(("user", f"What is my {attribute}?"))
            turns.append(("assistant", f"Your {attribute} is {facts[attribute]}. {closing}"))
    return Sample(tuple(turns))


def lookup(rng: random.Random, names: Sequence[DocumentedName], *, max_chars: int) -> Sample:
    """Sources in the context, then questions what each function does, answered by its docstring."""
    chosen: list[DocumentedName] = []
    used = 0
    for candidate in rng.sample(list(names), 12):
        if used + len(candidate.source) <= max_chars:
            chosen.append(candidate)
            used += len(candidate.source)
    if not chosen:
        chosen = [min(rng.sample(list(names), 12), key=lambda name: len(name.source))]
    turns: list[tuple[str, str]] = [
        ("system", "Answer from this code.\n" + "\n\n".join(c.source for c in chosen))
    ]
    for entry in rng.sample(chosen, len(chosen)):
        turns.append(("user", f"What does {entry.name} do?"))
        turns.append(("assistant", entry.summary))
    return Sample(tuple(turns))


def _interleave(
    rng: random.Random, lines: Sequence[str], filler: Sequence[str], filler_chars: int
) -> list[str]:
    """Lines in order, with pieces of filler text of about `filler_chars` in all at random places."""
    if not filler or filler_chars <= 0:
        return list(lines)
    pieces: list[tuple[float, str]] = [(float(i), line) for i, line in enumerate(lines)]
    remaining = filler_chars
    while remaining > 0:
        text = rng.choice(filler)
        start = rng.randrange(max(1, len(text) - 400))
        piece = text[start : start + rng.randint(60, 400)]
        pieces.append((rng.uniform(-0.5, len(lines) - 0.5), piece))
        remaining -= len(piece)
    return [piece for _, piece in sorted(pieces)]
