"""Time the engine's own steps under a mixture of loads, so that a simulator can predict them.

Rounds of synthetic requests: each draws how many run at once, how long prompts and answers are, how much of
their prompts they share with how many others, and how many tokens a step may hold; every step's shape and
time is kept. What is measured is what a load run does: the whole of `Engine.step`, and separately
`Engine.add_request`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch

from kvtune._version import __version__
from kvtune.engine.engine import Engine
from kvtune.host import read_host
from kvtune.sched.shape import CALIBRATION_VERSION, SHAPE_COLUMNS, ReadGeometry, StepShapes
from kvtune.types import SamplingParams, SchedulerOutput

__all__ = ["Calibration", "StepTimer", "calibrate"]

_ROUND_S: Final = 0.2
"""Short, so that no kind of load falls into one spell of a machine whose speed drifts."""
_ROUND_STEPS: Final = 24
"""The same, where rounds are to repeat step by step."""
_WARM_UP_S: Final = 1.0
_LONGEST_ANSWER: Final = 256
_MEAN_ANSWER: Final = 64
_NUM_HEADS: Final = 6
_LARGEST_HEAD: Final = 0.95
"""Share of a prompt that is head, at most."""
_LONG_ROUNDS: Final = 0.45
"""Share of rounds whose prompts are all long, so that decodes read as much as a busy server's; in the others
many run over little, or else what a sequence costs would be taken for what its bytes cost."""
_SHORT: Final = 64
"""Tokens the longest prompt of a round may have, at least."""
_FILL: Final = 0.9
"""Share of the cache that heads and running requests may take."""


@dataclass(slots=True)
class Calibration:
    """Measured steps: `shapes` rows by SHAPE_COLUMNS, `seconds` each, `submissions` (prompt tokens, seconds).

    `facts` say on what: model, settings, hardware.
    """

    shapes: list[list[float]] = field(default_factory=list[list[float]])
    seconds: list[float] = field(default_factory=list[float])
    submissions: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """The content of a calibration file, as `kvtune.sim.load_calibration` reads it."""
        return {
            "calibration_version": CALIBRATION_VERSION,
            "columns": list(SHAPE_COLUMNS),
            "facts": self.facts,
            "shapes": self.shapes,
            "seconds": self.seconds,
            "submissions": [list(pair) for pair in self.submissions],
        }


class StepTimer:
    """Steps an engine and keeps each step's shape and time; one at a time per engine.

    Shapes are worked out by `flush`, not between the steps of a run that is timed as a whole.
    """

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.calibration = Calibration(facts=_facts(engine))
        self._engine = engine
        self._clock = clock
        num_heads = engine.loaded.spec.num_attention_heads
        self._shapes = StepShapes(
            ReadGeometry.of(engine.arena_plan.groups, engine.cache_config, num_heads=num_heads)
        )
        self._decided: SchedulerOutput | None = None
        self._steps: list[SchedulerOutput] = []
        engine.on_step = self._keep

    def _keep(self, output: SchedulerOutput) -> None:
        self._decided = output

    def step(self) -> None:
        start = self._clock()
        self._engine.step(finished_only=True)
        self.took(self._clock() - start)

    def took(self, seconds: float) -> None:
        """The engine made a step (whoever called it) in this time."""
        decided, self._decided = self._decided, None
        if decided is not None:
            self._steps.append(decided)
            self.calibration.seconds.append(seconds)

    def flush(self) -> None:
        """Bring `calibration.shapes` up to its `seconds`."""
        self.calibration.shapes += [self._shapes.row(step) for step in self._steps]
        self._steps.clear()

    def submit(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        start = self._clock()
        self._engine.add_request(request_id, prompt, params)
        self.calibration.submissions.append((len(prompt), self._clock() - start))

    def close(self) -> None:
        self._engine.on_step = None


def calibrate(
    engine: Engine,
    *,
    seconds: float = 45.0,
    num_rounds: int | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[float], None] | None = None,
) -> Calibration:
    """Measure for about `seconds`; `on_progress` gets the share done. The engine must be idle, its prefix
    cache is emptied. Nothing else should run on the machine meanwhile.

    With `num_rounds` the rounds end by steps, not by time: every call with the same seed makes the same
    steps, so that each can be timed several times, apart from what disturbs the machine for a moment.
    """
    engine.reset_prefix_cache()
    timer = StepTimer(engine, clock=clock)
    load = _Load(engine, timer, np.random.default_rng(seed))
    original = engine.scheduler_config

    def steps(of_seconds: float) -> Iterable[int]:
        return range(_ROUND_STEPS) if num_rounds is not None else _until(clock, of_seconds)

    try:
        begin = clock()
        load.round(steps(_WARM_UP_S))
        timer.calibration.shapes.clear()
        timer.calibration.seconds.clear()
        timer.calibration.submissions.clear()
        by_count = np.linspace(0.0, 1.0, num_rounds or 0, endpoint=False).tolist()
        for share in by_count if num_rounds is not None else _shares(clock, begin, seconds):
            if on_progress is not None:
                on_progress(share)
            load.round(steps(_ROUND_S))
    finally:
        load.end()
        timer.close()
        engine.configure(original)
        engine.reset_prefix_cache()
    return timer.calibration


def _shares(clock: Callable[[], float], begin: float, seconds: float) -> Iterator[float]:
    """The share of the time spent, before each round."""
    while (spent := clock() - begin) < seconds:
        yield spent / seconds


def _until(clock: Callable[[], float], seconds: float) -> Iterator[int]:
    """Steps of a round, counted until its time is over."""
    end = clock() + seconds
    return itertools.takewhile(lambda _: clock() < end, itertools.count())


@dataclass(frozen=True, slots=True)
class _Mix:
    """What one round sends: `concurrency` requests at once, prompts of `shortest` to `longest` tokens that
    begin with one of `heads`."""

    concurrency: int
    heads: tuple[list[int], ...]
    shortest: int
    longest: int


class _Load:
    """Rounds of random requests at a random concurrency.

    A few long prompts stay in the cache from round to round and head the prompts of each: that gives decodes
    over long contexts, their own or shared, and short prefills behind long cached prefixes, without the time
    it would take to prefill them. Half of the requests stay too. The cache fills up and evicts as a server's
    does.
    """

    def __init__(self, engine: Engine, timer: StepTimer, rng: np.random.Generator) -> None:
        self._engine = engine
        self._timer = timer
        self._rng = rng
        self._config = engine.scheduler_config
        self._capacity = engine.arena_plan.capacity_tokens
        self._longest = max(8, engine.max_model_len - _LONGEST_ANSWER)
        self._heads = [self._tokens(self._longest) for _ in range(_NUM_HEADS)]
        self._live: list[str] = []
        self._ids = itertools.count()

    def round(self, steps: Iterable[int]) -> None:
        engine = self._engine
        fewer = max(0.0, self._rng.uniform(-3.0, 3.0))  # half of the rounds have the engine's own budget
        budget = max(16, round(self._config.max_num_batched_tokens * 2.0**-fewer))
        engine.configure(replace(self._config, max_num_batched_tokens=budget))
        mix = self._mix(min(self._config.max_num_seqs, budget))
        self._keep(mix.concurrency // 2)
        for _ in steps:
            while len(self._live) < mix.concurrency:
                self._live.append(self._send(mix))
            self._timer.step()
            self._live = [request_id for request_id in self._live if engine.is_unfinished(request_id)]
        self._timer.flush()

    def end(self) -> None:
        """End all requests."""
        self._keep(0)

    def _keep(self, most: int) -> None:
        """End all but `most` of the requests under way, drawn at random."""
        self._rng.shuffle(self._live)
        for request_id in self._live[most:]:
            self._engine.abort(request_id)
        del self._live[most:]
        self._engine.discard_outputs()

    def _mix(self, most: int) -> _Mix:
        """Prompts as long as fit: the heads once, and what each request has of its own."""
        concurrency = self._log_uniform(1, most)
        heads = self._rng.permutation(_NUM_HEADS)[: self._log_uniform(1, min(_NUM_HEADS, concurrency))]
        is_long = self._rng.random() < _LONG_ROUNDS
        share = self._rng.uniform(_LARGEST_HEAD / 2 if is_long else 0.0, _LARGEST_HEAD)
        room = _FILL * self._capacity - concurrency * _MEAN_ANSWER
        fitting = int(room / (len(heads) * share + concurrency * (1.0 - share)))
        longest = max(8, min(self._longest, fitting))
        if not is_long:
            longest = self._log_uniform(min(_SHORT, longest), longest)
        cut = int(share * longest)
        shortest = int(self._rng.uniform(0.3, 0.9) * longest) if is_long else self._log_uniform(4, longest)
        return _Mix(concurrency, tuple(self._heads[i][:cut] for i in heads), max(4, shortest), longest)

    def _tokens(self, count: int) -> list[int]:
        return self._rng.integers(0, self._engine.loaded.vocab_size, count).tolist()

    def _send(self, mix: _Mix) -> str:
        request_id = f"calibrate/{next(self._ids)}"
        length = self._log_uniform(mix.shortest, mix.longest)
        answer = min(self._log_uniform(4, _LONGEST_ANSWER), self._engine.max_model_len - length)
        head = mix.heads[self._rng.integers(len(mix.heads))][: length - 1]
        prompt = head + self._tokens(length - len(head))
        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        self._timer.submit(request_id, prompt, params)
        return request_id

    def _log_uniform(self, low: int, high: int) -> int:
        return int(np.exp(self._rng.uniform(np.log(low), np.log(high + 1))))


def _facts(engine: Engine) -> dict[str, Any]:
    loaded, cache = engine.loaded, engine.cache_config
    return {
        "model_type": loaded.spec.model_type,
        "weights_sha256": loaded.weights_sha256,
        "config_sha256": loaded.config_sha256,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "kernel": engine.backend.name,
        "num_threads": torch.get_num_threads(),
        "k_codec": cache.k_codec,
        "v_codec": cache.v_codec,
        "layer_codecs": cache.to_dict()["layer_codecs"],
        "block_size": cache.block_size,
        "kv_budget": cache.kv_budget_bytes,
        "max_num_seqs": engine.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": engine.scheduler_config.max_num_batched_tokens,
        "max_model_len": engine.max_model_len,
        "kvtune": __version__,
        "torch": torch.__version__,
        "hardware": read_host().to_dict(),
    }
