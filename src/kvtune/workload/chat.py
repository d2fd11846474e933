"""A realistic chat workload from text at hand: shared system prompts, sessions whose history grows,
questions about documentation and code, bursty arrivals and think times. No network."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from kvtune.errors import UsageError
from kvtune.workload.material import Passage, collect_passages
from kvtune.workload.request import Message, Workload, WorkloadRequest

__all__ = ["generate_chat"]

_MIN_CHARACTERS: Final = 1500
_READING_SPEED: Final = 60.0
"""Characters of an answer per second between a question and the earliest follow-up."""

_QUESTIONS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "en": {
            "explain": "Explain what {name} does and when I should use it.",
            "summarise": "Summarise {name} in one sentence.",
            "parameters": "Which parameters does {name} take? List them in order.",
            "lookup": 'Which name is documented with these words: "{sentence}"?',
            "code": "Show the code of {name} and say what it is for.",
        },
        "de": {
            "explain": "Erkläre, was {name} tut und wann man es benutzt.",
            "summarise": "Fasse {name} in einem Satz zusammen.",
            "parameters": "Welche Parameter hat {name}? Zähle sie der Reihe nach auf.",
            "lookup": 'Welcher Name ist mit diesen Worten beschrieben: "{sentence}"?',
            "code": "Zeige den Code von {name} und sage, wozu er dient.",
        },
        "fr": {
            "explain": "Explique ce que fait {name} et quand il faut l'utiliser.",
            "summarise": "Résume {name} en une phrase.",
            "parameters": "Quels sont les paramètres de {name} ? Donne-les dans l'ordre.",
            "lookup": 'Quel nom est décrit par ces mots : "{sentence}" ?',
            "code": "Montre le code de {name} et dis à quoi il sert.",
        },
        "es": {
            "explain": "Explica qué hace {name} y cuándo conviene usarlo.",
            "summarise": "Resume {name} en una frase.",
            "parameters": "¿Qué parámetros tiene {name}? Enuméralos en orden.",
            "lookup": '¿Qué nombre se describe con estas palabras: "{sentence}"?',
            "code": "Muestra el código de {name} y di para qué sirve.",
        },
    }
)
_LANGUAGE_WEIGHTS: Final = {"en": 70, "de": 12, "fr": 9, "es": 9}

_ANSWERS: Final[Mapping[str, Callable[[Passage], str]]] = MappingProxyType(
    {
        "explain": lambda p: f"{p.name}: {p.opening}",
        "summarise": lambda p: p.sentence,
        "parameters": lambda p: ", ".join(p.parameters) or f"{p.name} takes no parameters.",
        "lookup": lambda p: p.name,
        "code": lambda p: (
            f"```python\n{p.code}\n```\n{p.sentence}" if 0 < len(p.code) <= _MAX_CODE_ANSWER else p.opening
        ),
    }
)

_ROLES: Final = (
    "You are a careful assistant for Python programmers. Answer from the text you are given. "
    "Quote names exactly as they are written and do not guess.",
    "You review code for a team that maintains long-lived services. Be brief. Name the function, "
    "state what it returns, and point out one risk at most.",
    "You write reference documentation. Use plain words, the present tense and short sentences. "
    "Keep parameter names unchanged.",
    "You help newcomers. Explain one thing at a time and give the exact name of every function "
    "you mention, with its module.",
    "You are the search assistant of a documentation site. Answer with the name that fits best, "
    "then with one sentence that says why.",
    "You translate questions in any language into exact answers about the standard library. "
    "Names and code stay in English.",
)
_MAX_CODE_ANSWER: Final = 1500
_KINDS: Final = {"easy": 25, "average": 55, "long_context": 20}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    max_chars: int
    mean_turns: float
    think_time_s: float
    passages: Sequence[Passage]


def generate_chat(
    *,
    num_requests: int | None = None,
    num_sessions: int | None = None,
    seed: int = 0,
    max_chars: int = 9000,
    num_system_prompts: int = 6,
    mean_turns: float = 4.0,
    request_rate: float = 1.0,
    burstiness: float = 1.0,
    think_time_s: float = 8.0,
) -> Workload:
    """A multi-turn chat workload of `num_requests` requests (default 300) or of whole `num_sessions`.

    `max_chars`: longest prompt, roles included; about 3 characters make a token of a 2k-entry BPE.
    `request_rate`: requests per second on average. `burstiness`: shape of the gamma-distributed gaps
    between session starts as in vLLM's benchmark (1 Poisson, below 1 bursty). `think_time_s`: median
    pause after an answer was read. Tags: case (easy, average, long_context), language, task, turn.
    Output lengths are those of the recorded answers. Raises UsageError for impossible numbers.
    """
    _check({
        "num_requests": (num_requests, 1), "num_sessions": (num_sessions, 1),
        "max_chars": (max_chars, _MIN_CHARACTERS), "num_system_prompts": (num_system_prompts, 1),
        "mean_turns": (mean_turns, 1), "request_rate": (request_rate, 1e-6), "burstiness": (burstiness, 1e-3),
        "think_time_s": (think_time_s, 0),
    })  # fmt: skip
    rng = random.Random(seed)  # noqa: S311  # reproducible workload, no secrets
    passages = collect_passages()
    systems = _system_prompts(rng, passages, num_system_prompts, max_chars // 4)
    weights = [1 / rank for rank in range(1, len(systems) + 1)]  # a few prompts get most sessions
    settings = _Settings(
        max_chars=max_chars, mean_turns=mean_turns, think_time_s=think_time_s, passages=passages
    )  # fmt: skip
    gap_s = mean_turns / request_rate
    wanted = num_requests if num_requests or num_sessions else 300
    requests: list[WorkloadRequest] = []
    start_s = 0.0
    for index in itertools.count():
        if index == num_sessions or (wanted is not None and len(requests) >= wanted):
            break
        system = rng.choices(systems, weights)[0]
        requests += _session(rng, index, start_s, system, settings)
        start_s += rng.gammavariate(burstiness, gap_s / burstiness)
    kept = sorted(requests[:wanted], key=lambda request: request.arrival_s)
    note = f"generated: {len(kept)} chat requests over standard-library documentation, seed {seed}"
    return Workload(requests=tuple(kept), format="generated_chat", notes=(note,))


def _check(lows: Mapping[str, tuple[float | None, float]]) -> None:
    for name, (value, low) in lows.items():
        if value is not None and not value >= low:
            raise UsageError(f"{name} must be at least {low}, found {value}")


def _system_prompts(rng: random.Random, passages: Sequence[Passage], count: int, max_chars: int) -> list[str]:
    """Distinct prompts from a few hundred characters up to `max_chars`: a role, then an index of names."""
    prompts: list[str] = []
    for number in range(count):
        role = _ROLES[number % len(_ROLES)]
        prompt = f"{role}\n\nIndex {number + 1} of the reference:\n"
        target = max_chars * (number + 1) // count
        for passage in rng.sample(passages, len(passages)):
            line = f"- {passage.name}: {passage.sentence[:120]}\n"
            if len(prompt) + len(line) > target:
                break
            prompt += line
        prompts.append(prompt[:max_chars])
    return prompts


def _session(
    rng: random.Random, index: int, start_s: float, system: str, settings: _Settings
) -> Iterator[WorkloadRequest]:
    passages = settings.passages
    kind = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
    language = rng.choices(list(_LANGUAGE_WEIGHTS), list(_LANGUAGE_WEIGHTS.values()))[0]
    topic = rng.choice(sorted({passage.module for passage in passages}))
    history = [Message("system", system)]
    arrival_s = start_s
    for turn in range(1, _num_turns(rng, settings.mean_turns) + 1):
        passage = _pick(rng, passages, topic)
        task = rng.choice(list(_ANSWERS))
        question = _QUESTIONS[language][task].format(name=passage.name, sentence=passage.sentence[:200])
        # Each message also costs its role and two line ends, see `_length`.
        room = settings.max_chars - _length(history) - len(question) - 16
        if room < 0:
            return
        excerpt = _excerpt(rng, passages, passage, min(room, _excerpt_size(rng, kind, turn, settings)))
        history.append(Message("user", f"{excerpt}{question}"))
        answer = _ANSWERS[task](passage)
        yield WorkloadRequest(
            request_id=f"chat-{index}-{turn}", arrival_s=arrival_s, messages=tuple(history), answer=answer,
            session_id=f"chat-{index}",
            tags={
                "case": _case(_length(history), settings.max_chars), "language": language, "task": task,
                "turn": str(turn),
            },
        )  # fmt: skip
        history.append(Message("assistant", answer))
        arrival_s += len(answer) / _READING_SPEED + settings.think_time_s * rng.lognormvariate(0, 0.8)


def _num_turns(rng: random.Random, mean: float) -> int:
    """Geometric: after each turn the user goes on with the same probability."""
    turns = 1
    while rng.random() > 1 / mean:
        turns += 1
    return turns


def _pick(rng: random.Random, passages: Sequence[Passage], topic: str) -> Passage:
    """Mostly from the session's module; people digress."""
    near = [passage for passage in passages if passage.module == topic]
    return rng.choice(near if rng.random() < 0.8 else passages)


def _excerpt_size(rng: random.Random, kind: str, turn: int, settings: _Settings) -> int:
    if kind == "easy" or (turn > 1 and rng.random() < 0.5):
        return 0
    if kind == "long_context" and turn == 1:
        return int(settings.max_chars * rng.uniform(0.4, 0.75))
    return int(0.1 * settings.max_chars * rng.lognormvariate(0, 0.7))


def _excerpt(rng: random.Random, passages: Sequence[Passage], target: Passage, size: int) -> str:
    """At most `size` characters: the passage asked about, whole, somewhere among others (one is cut)."""
    pieces = [_shown(target)]
    room = size - len(pieces[0])
    if room < 0:
        return ""
    while room > 0:
        piece = _shown(rng.choice(passages))[:room]
        pieces.append(piece)
        room -= len(piece)
    if len(pieces) > 2:  # the last one may be cut and stays last
        place = rng.randrange(len(pieces) - 1)
        pieces[0], pieces[place] = pieces[place], pieces[0]
    return "".join(pieces)


def _shown(passage: Passage) -> str:
    code = f"\n```python\n{passage.code}\n```" if passage.code else ""
    return f"### {passage.name}({', '.join(passage.parameters)})\n{passage.text}{code}\n\n"


def _length(history: Sequence[Message]) -> int:
    return sum(len(message.role) + len(message.content) + 2 for message in history)


def _case(length: int, max_chars: int) -> str:
    if length <= max_chars // 8:
        return "easy"
    return "average" if length <= max_chars // 2 else "long_context"
