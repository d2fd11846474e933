"""Our engine as a tuning target: one model, loaded once, started under many configurations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from kvtune.closing import Closing
from kvtune.codecs import CODECS
from kvtune.config import CacheConfig, EngineConfig, SchedulerConfig
from kvtune.engine.engine import Engine
from kvtune.engine.facts import engine_facts, hardware_facts
from kvtune.engine.identity import kv_bytes_per_token, kv_side_bytes_per_token
from kvtune.engine.load import LoadedModel, load_model, read_spec
from kvtune.engine.moments import memory_moments
from kvtune.engine.planes import reading_planes
from kvtune.errors import KVTuneError, TargetError, UsageError
from kvtune.model_folder import hub_repo, model_digests, weight_dtypes
from kvtune.recipe import configuration_of
from kvtune.spec import codec_storage
from kvtune.target import (
    Config,
    Knob,
    LayerCodecs,
    LoadReport,
    LoadRequest,
    LoadResult,
    MemoryMoment,
    ScoreItem,
    Scores,
)
from kvtune.types import FinishReason, RequestOutput, SamplingParams

__all__ = ["EngineTarget", "RunningEngine"]

T = TypeVar("T")

REFERENCE_CONTEXT = 2048
"""Context [tokens] at which `kv_bytes_per_token` is reported, or the model's length if shorter."""

_BASELINE_CODEC = "bf16"
_NESTED, _HIGH = "n8_rh", "n4_rh"
"""The code of two planes, and what its high plane alone holds."""
_GAUGES = ("requests_", "blocks_", "resident_bytes_", "plane_arena_")
"""Counters whose value at the end is reported; of all others, the growth during the load."""


class EngineTarget:
    """Implements `kvtune.target.Target`.

    `config` holds what is not searched (dtype, max_model_len, threads, kernel); `cache` and `scheduler`
    the settings a configuration does not name. The weights are read on first use and shared by all
    starts. `clock` and `sleep` are in seconds.
    """

    name = "kvtune"

    def __init__(
        self,
        model_path: str | Path,
        *,
        config: EngineConfig | None = None,
        cache: CacheConfig | None = None,
        scheduler: SchedulerConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        nested: bool = False,
    ) -> None:
        """`nested`: of the codecs of 8 bits only the one of two planes is offered."""
        self._nested = nested
        self.model_path = Path(model_path)
        self.config = config or EngineConfig()
        self._cache = cache or CacheConfig()
        self._scheduler = scheduler or SchedulerConfig()
        self._clock = clock
        self._sleep = sleep
        self._spec = read_spec(self.model_path)
        self._loaded: LoadedModel | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The model; read and self-tested on first use."""
        if self._loaded is None:
            self._loaded = load_model(self.model_path, self.config)
        return self._loaded

    def knobs(self) -> Sequence[Knob]:
        # n4_rh is left to layers that a recipe reads at 4 bits: on its own it is int4_rh by another name
        codecs = tuple(name for name in self._codecs() if name != _HIGH)
        base_cache, base_scheduler = CacheConfig(), self._scheduler
        return (
            Knob(name="k_codec", values=codecs, baseline=_BASELINE_CODEC, is_lossy=True),
            Knob(name="v_codec", values=codecs, baseline=_BASELINE_CODEC, is_lossy=True),
            Knob(name="block_size", values=(16, 32, 64, 128), baseline=base_cache.block_size),
            Knob(name="enable_prefix_caching", values=(True, False), baseline=True),
            Knob(name="max_num_seqs", values=_with((4, 8, 16, 32, 64), base_scheduler.max_num_seqs),
                 baseline=base_scheduler.max_num_seqs),
            Knob(name="max_num_batched_tokens",
                 values=_with((256, 512, 1024, 2048), base_scheduler.max_num_batched_tokens),
                 baseline=base_scheduler.max_num_batched_tokens),
        )  # fmt: skip

    def layer_codecs(self) -> LayerCodecs:
        """Implements `kvtune.target.AllocatesLayers`."""
        layers = tuple(sorted(layer for group in self._spec.kv_groups() for layer in group.layers))
        return LayerCodecs(layers=layers, codecs=self._codecs(), stored=_NESTED, high=_HIGH)

    def kv_side_bytes_per_token(self, config: Config, *, context: int) -> Mapping[int, tuple[float, float]]:
        cache, scheduler = self._settings(config, None)
        return kv_side_bytes_per_token(self._spec, cache, scheduler, context=context)

    def _codecs(self) -> tuple[str, ...]:
        bits = codec_storage(_NESTED).code_bits
        return tuple(
            name
            for name in _codecs()
            if not self._nested or name == _NESTED or codec_storage(name).code_bits != bits
        )

    def identity(self) -> Mapping[str, Any]:
        loaded = self.loaded
        return {
            "model": {
                "path": str(self.model_path),
                "repo": hub_repo(self.model_path),
                "weight_dtypes": weight_dtypes(self.model_path),
                "model_type": loaded.spec.model_type,
                **model_digests(self.model_path, weights_sha256=loaded.weights_sha256),
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "rope_regime": loaded.rope_regime,
                "max_model_len": self.config.max_model_len or loaded.max_model_len,
            },
            "engine": engine_facts(self.config),
            "hardware": hardware_facts(self.config),
        }

    def kv_bytes_per_token(self, config: Config, *, context: int) -> float:
        """Allocator bytes of a sequence of `context` tokens divided by `context`, as spec predicts."""
        cache, scheduler = self._settings(config, None)
        return kv_bytes_per_token(self._spec, cache, scheduler, context=context)

    def start(self, config: Config, *, kv_budget_bytes: int | None = None) -> RunningEngine:
        cache, scheduler = self._settings(config, kv_budget_bytes)
        engine = Engine(self.loaded, cache=cache, scheduler=scheduler, config=self.config, clock=self._clock)
        return RunningEngine(engine, clock=self._clock, sleep=self._sleep)

    def memory_moments(
        self, config: Config, requests: Sequence[LoadRequest], *, kv_budget_bytes: int | None = None
    ) -> Sequence[MemoryMoment]:
        """KV memory of `config` while it serves `requests`; see `kvtune.engine.moments`."""
        _ = self.loaded  # weights are there before the first look
        return memory_moments(lambda: self.start(config, kv_budget_bytes=kv_budget_bytes).engine, requests)

    def _settings(self, config: Config, kv_budget_bytes: int | None) -> tuple[CacheConfig, SchedulerConfig]:
        sorted_knobs = configuration_of(config, kv_budget_bytes=kv_budget_bytes)
        known = {**sorted_knobs["cache"], **sorted_knobs["scheduler"]}
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise UsageError(
                f"engine kvtune has no knob {unknown[0]!r}; known: {', '.join(k.name for k in self.knobs())}"
            )
        cache = CacheConfig.from_dict({**self._cache.to_dict(), **sorted_knobs["cache"]})
        return cache, replace(self._scheduler, **sorted_knobs["scheduler"])


class RunningEngine(Closing):
    """Implements `kvtune.target.RunningTarget` over one engine."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self.engine = engine
        self.effective: Mapping[str, Any] = engine.effective(context=REFERENCE_CONTEXT)
        """Settings as the live engine has them: read from its arenas, manager and scheduler."""
        self._clock = clock
        self._sleep = sleep

    def generate(self, requests: Sequence[LoadRequest]) -> Sequence[Sequence[int]]:
        """Greedy continuations. Raises UsageError for a request that can never be served."""
        outputs = self._guard(
            lambda: self.engine.generate(
                [request.prompt_token_ids for request in requests], [_greedy(request) for request in requests]
            )
        )
        return [output.token_ids for output in outputs]

    def load(
        self,
        requests: Sequence[LoadRequest],
        *,
        deadline_s: float | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> LoadReport:
        self.engine.reset_prefix_cache()
        before = self.engine.stats().counters()
        run = _LoadRun(self.engine, requests, clock=self._clock, sleep=self._sleep, on_done=on_done)
        duration_s = self._guard(lambda: run.drive(deadline_s))
        after = self.engine.stats().counters()
        counters = {
            name: value if name.startswith(_GAUGES) else value - before.get(name, 0.0)
            for name, value in after.items()
        }
        counters["peak_requests_running"] = run.peak_running
        return LoadReport(results=run.results(), duration_s=duration_s, counters=counters)

    def score(
        self, items: Sequence[ScoreItem], *, num_top: int, chunk: int | None = None
    ) -> Sequence[Scores]:
        return self._guard(lambda: self.engine.score(items, num_top=num_top, chunk=chunk))

    def reading(self, planes: Mapping[int, tuple[int, int]]) -> AbstractContextManager[None]:
        """Implements `kvtune.target.ReadsPlanes`."""
        return reading_planes(self.engine, planes)

    def _guard(self, call: Callable[[], T]) -> T:
        """Our own errors pass; what torch raises (out of memory, a bad kernel) becomes a TargetError."""
        try:
            return call()
        except KVTuneError:
            raise
        except (RuntimeError, MemoryError) as error:
            self.close()
            raise TargetError(f"the engine failed: {error}; its KV memory was given back") from error

    def close(self) -> None:
        self.engine.close()


class _LoadRun:
    """Sends requests at their arrival times and collects what each one saw."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[LoadRequest],
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        on_done: Callable[[int], None] | None,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._clock = clock
        self._sleep = sleep
        self._on_done = on_done
        self._results: dict[int, LoadResult] = {}
        self._order = {f"load/{index}": index for index in range(len(requests))}
        self.peak_running = 0

    def drive(self, deadline_s: float | None) -> float:
        """Run to the end or the deadline [s from start]; returns the wall time in seconds."""
        start = self._clock()
        due = sorted(range(len(self._requests)), key=lambda i: self._requests[i].arrival_s)
        at = 0
        try:
            while len(self._results) < len(self._requests):
                now = self._clock() - start
                if deadline_s is not None and now >= deadline_s:
                    break
                while at < len(due) and self._requests[due[at]].arrival_s <= now:
                    self._send(due[at], start)
                    at += 1
                if self._engine.has_unfinished:
                    self._step()
                elif at < len(due):
                    until = self._requests[due[at]].arrival_s
                    self._sleep(max(0.0, (until if deadline_s is None else min(until, deadline_s)) - now))
        finally:
            self._give_up()
        return self._clock() - start

    def _send(self, index: int, start: float) -> None:
        request = self._requests[index]
        try:
            self._engine.add_request(
                f"load/{index}", request.prompt_token_ids, _greedy(request),
                arrival_s=start + request.arrival_s, cache_salt=request.cache_salt,
            )  # fmt: skip
        except UsageError as error:
            self._done(index, _failed(request, str(error)))

    def _step(self) -> None:
        outputs = self._engine.step(finished_only=True)
        self.peak_running = max(self.peak_running, self._engine.num_running)
        for output in outputs:
            index = self._order[output.request_id]
            self._done(index, _result(self._requests[index], output))

    def _done(self, index: int, result: LoadResult) -> None:
        self._results[index] = result
        if self._on_done is not None:
            self._on_done(len(self._results))

    def _give_up(self) -> None:
        """At the deadline or on an interrupt nothing keeps running."""
        for request_id, index in self._order.items():
            if index not in self._results:
                self._engine.abort(request_id)
                self._results[index] = _failed(self._requests[index], "not finished before the deadline")
        self._engine.discard_outputs()

    def results(self) -> list[LoadResult]:
        return [self._results[index] for index in range(len(self._requests))]


def _codecs() -> tuple[str, ...]:
    """The baseline's codec and all smaller ones, those of more bits first."""
    smaller = (name for name in CODECS if codec_storage(name).code_bits < 16)
    return (_BASELINE_CODEC, *sorted(smaller, key=lambda name: -codec_storage(name).code_bits))


def _greedy(request: LoadRequest) -> SamplingParams:
    return SamplingParams(max_tokens=request.max_tokens, temperature=0.0, ignore_eos=request.ignore_eos)


def _result(request: LoadRequest, output: RequestOutput) -> LoadResult:
    metrics = output.metrics
    return LoadResult(
        request_id=request.request_id,
        token_ids=output.token_ids,
        num_cached_tokens=output.num_cached_tokens,
        ttft_s=metrics.ttft_s,
        tpot_s=metrics.tpot_s,
        e2e_s=metrics.e2e_s,
        itl_s=metrics.itl_s,
        error="aborted" if output.finish_reason is FinishReason.ABORT else None,
    )


def _failed(request: LoadRequest, reason: str) -> LoadResult:
    return LoadResult(
        request_id=request.request_id, token_ids=(), num_cached_tokens=0, ttft_s=None, tpot_s=None,
        e2e_s=None, error=reason,
    )  # fmt: skip


def _with(values: tuple[int, ...], extra: int) -> tuple[int, ...]:
    return tuple(sorted({*values, extra}))
