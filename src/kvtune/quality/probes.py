"""Questions with known answers, asked of baseline and candidate alike: does the candidate still find them?

Divergence says how far answers move, probes whether they stay right. They are drawn at run time, so no model
has seen an answer, from `tasks` and from the user's own conversations with facts put into the system prompt
and asked at the end. Each context carries two questions: the second reads the cache the first left behind.

An answer counts as solved when every token of the right one is the most likely under teacher forcing: that
is what greedy decoding would have written, at the price of one forward pass. Both discordant directions of
the pairs count (see `paired`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kvtune.errors import TargetError
from kvtune.quality.bootstrap import CONFIDENCE, Estimate
from kvtune.quality.paired import clustered_net_loss, mcnemar_p, pairs_needed
from kvtune.quality.replay import length_bucket
from kvtune.quality.tasks import TASKS, Material, draw
from kvtune.target import RunningTarget, ScoreItem, Scores

__all__ = [
    "Conversation",
    "Probe",
    "ProbeOutcome",
    "ProbeReference",
    "ProbeSource",
    "Solved",
    "ask_probes",
    "draw_probes",
    "judge_probes",
    "num_probes_for",
    "record_probes",
]

OWN: Final = "own_conversation"
"""The task made of the user's own requests."""
SYSTEM: Final = "You are a helpful assistant."
NUM_QUESTIONS: Final = 2
ONE_QUESTION: Final = frozenset({"common_word"})
"""Tasks whose context has one answer only; the next question is another task's."""
DEPTHS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
SHORTEST: Final = 128
"""Tokens of the shortest probe; each further length is twice the one before."""
SOLVED_SHARE: Final = 0.2
"""A task the baseline solves less often has too few answers to lose."""
NUM_SCREENED: Final = 6
"""Contexts of a task asked first; a task of which none is solved is not asked again."""
SIZED: Final = 0.94
"""Share of the longest probe allowed that one is drawn for: samples are sized by and large."""
SPARE: Final = 1.3
"""Probes drawn beyond what a candidate without a single loss needs."""

Solved = tuple[tuple[bool, ...], ...]
"""Per probe, per question."""


class ChatEncoder(Protocol):
    """A model's chat template; `kvtune.adapters.chat_encoder` has the body."""

    words: Sequence[str]

    def count(self, text: str) -> int: ...

    def dialogue(
        self, turns: Sequence[tuple[str, str]], scored: Sequence[int]
    ) -> tuple[list[int], list[tuple[int, int]]] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A user's own request as (role, content) turns. `language`: its tag, "" where unknown."""

    turns: tuple[tuple[str, str], ...]
    language: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSource:
    """What probes are made of: the model's template, the user's conversations (they are also the filler
    between what matters), and the longest probe in tokens (the workload's p99, or what the model takes)."""

    encoder: ChatEncoder
    conversations: Sequence[Conversation] = ()
    max_tokens: int = 1024

    def lengths(self, mean_tokens: float) -> tuple[int, ...]:
        """Doubling lengths up to `max_tokens`, cut from above until their mean is at most `mean_tokens`."""
        lengths = [SHORTEST]
        while lengths[-1] * 2 < self.max_tokens:
            lengths.append(lengths[-1] * 2)
        if self.max_tokens > lengths[-1]:
            lengths.append(self.max_tokens)
        while len(lengths) > 1 and sum(lengths) / len(lengths) > mean_tokens:
            lengths.pop()
        return tuple(lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """`answers`: [start, end) of each right answer within the item's continuation. `strata`: task, length,
    depth, language, difficulty."""

    item: ScoreItem
    answers: tuple[tuple[int, int], ...]
    strata: Mapping[str, str]

    @property
    def num_tokens(self) -> int:
        return len(self.item.prompt_token_ids) + len(self.item.continuation)

    def solved(self, scores: Scores) -> tuple[bool, ...]:
        """Per question. TargetError where the engine answered another item."""
        right, found = list(self.item.continuation), scores.argmax.tolist()
        if scores.item_id != self.item.item_id or len(found) != len(right):
            raise TargetError(f"asked for the scores of {self.item.item_id!r}, found {scores.item_id!r}")
        return tuple(found[a:b] == right[a:b] for a, b in self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReference:
    """Probes with the baseline's answers. `left_out`: tasks it hardly solves, with counts; `refused`:
    dialogues that the chat template cannot express."""

    probes: tuple[Probe, ...]
    solved: Solved
    left_out: tuple[Mapping[str, Any], ...] = ()
    refused: int = 0
    chunk: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(p.num_tokens for p in self.probes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOutcome:
    """Baseline against candidate. `loss`: (lost - gained) / questions with its bounds."""

    loss: Estimate
    lost: int
    gained: int
    num_questions: int
    reference_solved: int
    strata: tuple[Mapping[str, Any], ...]
    left_out: tuple[Mapping[str, Any], ...]
    longest: int

    def more_needed(self, limit: float) -> int | None:
        """Further questions that would settle it at the discordance seen; None where no number would."""
        gap = abs(limit - self.loss.value)
        needed = pairs_needed((self.lost + self.gained) / self.num_questions, gap)
        if needed is None:
            return None
        if not self.lost + self.gained:  # then contexts count, not questions, and the bound falls as 1 / n
            needed = max(needed, math.ceil(self.num_questions * self.loss.high / gap))
        return max(1, needed - self.num_questions)

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_questions": self.num_questions, "num_contexts": self.loss.num_clusters,
            "reference_solved": self.reference_solved, "lost": self.lost, "gained": self.gained,
            "net_loss": self.loss.to_dict(), "mcnemar_p": mcnemar_p(self.lost, self.gained),
            "longest_tokens": self.longest, "strata": [dict(s) for s in self.strata],
            "left_out": [dict(t) for t in self.left_out],
        }  # fmt: skip


def num_probes_for(limit: float, confidence: float = CONFIDENCE) -> int:
    """Contexts that prove a net loss of at most `limit` where none is lost, and some to spare."""
    return math.ceil(SPARE * -math.log(1 - confidence) / limit)


# ---------------------------------------------------------------- drawing


def draw_probes(
    source: ProbeSource, rng: random.Random, *, count: int, tasks: Sequence[str], prefix: str = "probe",
    mean_tokens: float = math.inf,
) -> tuple[tuple[Probe, ...], int]:  # fmt: skip
    """About `count` probes, tasks, lengths, depths and difficulties in turn, and how many the template
    refused. `mean_tokens` bounds their mean length."""
    material = _material(source)
    lengths = source.lengths(mean_tokens)
    probes: list[Probe] = []
    refused = 0
    for number in range(count):
        round_, place = divmod(number, len(tasks))
        task = tasks[place]
        # by round and place, not by number: whatever the number of tasks, each meets all lengths in turn
        length = lengths[(round_ + place) % len(lengths)]
        item_id = f"{prefix}/{number}"
        if task == OWN:
            probe = _own_probe(source, material, rng, item_id=item_id)
        else:
            probe = _drawn_probe(
                source, material, rng, task, item_id=item_id, num_tokens=length,
                depth=DEPTHS[round_ % len(DEPTHS)], is_hard=bool((round_ // 2 + place) % 2),
            )  # fmt: skip
        if probe is None:
            refused += 1
        else:
            probes.append(probe)
    return tuple(probes), refused


def known_tasks(source: ProbeSource) -> tuple[str, ...]:
    """Every drawn task, and the user's own conversations as often as four of them."""
    names = list(TASKS)
    if not any(_is_usable(c) for c in source.conversations):
        return tuple(names)
    return tuple(name for i in range(0, len(names), 3) for name in (*names[i : i + 3], OWN))


def _material(source: ProbeSource) -> Material:
    filler = [
        content for conversation in source.conversations for role, content in conversation.turns
        if role != "system" and len(content) >= 40
    ]  # fmt: skip
    return Material(source.encoder.words, filler, source.encoder.count)


def _drawn_probe(
    source: ProbeSource, material: Material, rng: random.Random, task: str, *, item_id: str,
    num_tokens: int, depth: float, is_hard: bool,
) -> Probe | None:  # fmt: skip
    difficulty = "hard" if is_hard else "easy"
    num_tokens = min(num_tokens, round(SIZED * source.max_tokens))
    asked = 1 if task in ONE_QUESTION else NUM_QUESTIONS
    sample = draw(
        task, rng, material, num_tokens=num_tokens, difficulty=difficulty, num_questions=asked, depth=depth
    )
    turns, scored = list(sample.turns), list(sample.scored)
    if turns[0][0] != "system":
        turns, scored = [("system", SYSTEM), *turns], [i + 1 for i in scored]
    strata = {"task": task, "depth": f"{depth:.0%}", "language": "en", "difficulty": difficulty}
    return _encoded(source, turns, scored, strata, item_id)


def _own_probe(source: ProbeSource, material: Material, rng: random.Random, *, item_id: str) -> Probe | None:
    """One of the user's conversations; its system prompt gets a short list, asked at the end."""
    usable = [c for c in source.conversations if _is_usable(c)]
    conversation = rng.choice(usable)
    keys = rng.sample(list(material.words), min(rng.choice((4, 8, 16)), len(material.words)))
    lines = [f" {key}: {rng.choice(material.words)}" for key in keys]
    asked = rng.sample(range(len(keys)), NUM_QUESTIONS)
    turns = _with_list(conversation.turns, "List:\n" + "\n".join(lines))
    scored: list[int] = []
    for index in asked:
        turns += [("user", f"What is {keys[index]}?"), ("assistant", lines[index])]
        scored.append(len(turns) - 1)
    strata = {"task": OWN, "depth": "0%", "language": conversation.language or "unknown",
              "difficulty": "own"}  # fmt: skip
    return _encoded(source, turns, scored, strata, item_id)


def _is_usable(conversation: Conversation) -> bool:
    """Plain turns only, with at least one answer behind them."""
    roles = [role for role, _ in conversation.turns]
    return set(roles) <= {"system", "user", "assistant"} and "assistant" in roles


def _with_list(turns: Sequence[tuple[str, str]], facts: str) -> list[tuple[str, str]]:
    """The conversation up to its last answer, `facts` in its system prompt."""
    out = list(turns)
    while out and out[-1][0] != "assistant":
        out.pop()
    system = ""
    if out[0][0] == "system":
        system = out.pop(0)[1] + "\n\n"
    return [("system", system + facts), *out]


def _encoded(
    source: ProbeSource, turns: Sequence[tuple[str, str]], scored: Sequence[int],
    strata: Mapping[str, str], item_id: str,
) -> Probe | None:  # fmt: skip
    found = source.encoder.dialogue(turns, scored)
    if found is None:
        return None
    token_ids, spans = found
    first = spans[0][0]
    if len(token_ids) > source.max_tokens or any(end <= start for start, end in spans):
        return None
    item = ScoreItem(
        item_id=item_id, prompt_token_ids=tuple(token_ids[:first]), continuation=tuple(token_ids[first:])
    )
    return Probe(
        item=item, answers=tuple((start - first, end - first) for start, end in spans),
        strata={**strata, "prompt_tokens": length_bucket(first)},
    )  # fmt: skip


# ---------------------------------------------------------------- asking


def record_probes(
    running: RunningTarget, source: ProbeSource, rng: random.Random, *, count: int, chunk: int | None,
    mean_tokens: float = math.inf,
) -> ProbeReference:  # fmt: skip
    """Draw probes and ask the started baseline. First some of each task, then the rest of `count` from the
    tasks of which it solves any; tasks under SOLVED_SHARE are left out and named. May come back empty."""
    names = known_tasks(source)
    kinds = sorted(set(names))
    first, refused = draw_probes(
        source, rng, count=min(count, NUM_SCREENED * len(kinds)), tasks=kinds, prefix="screen",
        mean_tokens=mean_tokens,
    )  # fmt: skip
    probes, solved = list(first), list(_ask(running, first, chunk))
    able = {p.strata["task"] for p, right in zip(probes, solved, strict=True) if any(right)}
    tasks = [name for name in names if name in able]
    kept = sum(p.strata["task"] in able for p in probes)
    if tasks and count > kept:
        rest, more = draw_probes(source, rng, count=count - kept, tasks=tasks, mean_tokens=mean_tokens)
        refused += more
        probes += rest
        solved += _ask(running, rest, chunk)
    return _without_unsolved(probes, solved, refused, chunk)


def _without_unsolved(
    probes: Sequence[Probe], solved: Sequence[tuple[bool, ...]], refused: int, chunk: int | None
) -> ProbeReference:
    counts: dict[str, list[int]] = {}
    for probe, right in zip(probes, solved, strict=True):
        entry = counts.setdefault(probe.strata["task"], [0, 0])
        entry[0] += sum(right)
        entry[1] += len(right)
    low = {task for task, (won, asked) in counts.items() if won < SOLVED_SHARE * asked}
    kept = [(p, s) for p, s in zip(probes, solved, strict=True) if p.strata["task"] not in low]
    left_out = [{"task": t, "solved": counts[t][0], "num_questions": counts[t][1]} for t in sorted(low)]
    return ProbeReference(
        probes=tuple(p for p, _ in kept), solved=tuple(s for _, s in kept), left_out=tuple(left_out),
        refused=refused, chunk=chunk,
    )  # fmt: skip


def ask_probes(running: RunningTarget, reference: ProbeReference) -> Solved:
    """The candidate's answers to the same questions: one forward pass."""
    return _ask(running, reference.probes, reference.chunk)


def _ask(running: RunningTarget, probes: Sequence[Probe], chunk: int | None) -> Solved:
    if not probes:
        return ()
    scores = running.score([p.item for p in probes], num_top=1, chunk=chunk)
    if len(scores) != len(probes):
        raise TargetError(f"asked {len(probes)} probes, found {len(scores)} answers")
    return tuple(p.solved(s) for p, s in zip(probes, scores, strict=True))


# ---------------------------------------------------------------- judging


@dataclass(frozen=True, slots=True)
class _Question:
    strata: Mapping[str, str]
    cluster: str
    was: bool
    is_: bool

    @property
    def loss(self) -> int:
        return int(self.was) - int(self.is_)


def judge_probes(
    reference: ProbeReference, solved: Solved, *, confidence: float = CONFIDENCE
) -> ProbeOutcome | None:
    """Pair the candidate's answers with the baseline's; None where no probe is usable."""
    questions = [
        _Question({**probe.strata, "question": f"{number + 1}"}, probe.item.item_id, was, is_)
        for probe, before, after in zip(reference.probes, reference.solved, solved, strict=True)
        for number, (was, is_) in enumerate(zip(before, after, strict=True))
    ]
    if not questions:
        return None
    loss = clustered_net_loss(
        [q.loss for q in questions], [q.cluster for q in questions], confidence=confidence
    )
    return ProbeOutcome(
        loss=loss, lost=sum(q.loss > 0 for q in questions), gained=sum(q.loss < 0 for q in questions),
        num_questions=len(questions), reference_solved=sum(q.was for q in questions),
        strata=tuple(_by_stratum(questions)), left_out=reference.left_out,
        longest=max(p.num_tokens for p in reference.probes),
    )  # fmt: skip


def _by_stratum(questions: Sequence[_Question]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[_Question]] = {}
    for question in questions:
        for pair in question.strata.items():
            groups.setdefault(pair, []).append(question)
    return [
        {"stratum": name, "value": value, "num_questions": len(rows),
         "reference_solved": sum(q.was for q in rows), "lost": sum(q.loss > 0 for q in rows),
         "gained": sum(q.loss < 0 for q in rows)}
        for (name, value), rows in sorted(groups.items())
    ]  # fmt: skip
