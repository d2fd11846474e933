"""The engine: composition root of manager, scheduler, runner and sampler.

One step: the scheduler decides, the runner performs, the sampler picks, the scheduler accepts. The
engine adds what users see: text, stop strings, times, streaming, abort.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from kvtune.closing import Closing
from kvtune.config import CacheConfig, EngineConfig, SchedulerConfig, format_bytes, parse_bytes
from kvtune.engine.arenas import (
    ArenaPlan,
    ElasticMemory,
    allocate_arenas,
    cache_manager,
    memory_for,
    plan_arenas,
)
from kvtune.engine.attention import AttentionLayer
from kvtune.engine.centring import centres_sha256, key_centres
from kvtune.engine.detokenizer import TokenDecoder
from kvtune.engine.identity import cache_fingerprint
from kvtune.engine.inputs import check_items, prompt_token_ids
from kvtune.engine.load import LoadedModel, load_model
from kvtune.engine.plane_mover import PlaneMover
from kvtune.engine.proof import check_readable, check_weights, warn_if_unproven
from kvtune.engine.request_state import RequestState
from kvtune.engine.runner import ModelRunner, last_rows
from kvtune.engine.sampler import check_sampling, request_seed, sample
from kvtune.engine.scoring import Scorer
from kvtune.engine.telemetry import (
    EngineStats,
    MemoryReport,
    cache_settings,
    engine_stats,
    memory_report,
    run_settings,
)
from kvtune.errors import UsageError
from kvtune.kernels import Backend, choose_backend
from kvtune.recipe import Recipe
from kvtune.sched import Scheduler
from kvtune.target import ScoreItem, Scores
from kvtune.tiers import HostArena, Tier
from kvtune.types import (
    BlockId,
    FinishReason,
    Request,
    RequestId,
    RequestOutput,
    RunnerOutput,
    Sampled,
    SamplingParams,
    SchedulerOutput,
)

__all__ = ["Engine"]

Prompt = str | Sequence[int]
ModelSource = str | Path | PreTrainedModel | LoadedModel


class Engine(Closing):
    """Serves one model through a paged, prefix-sharing, separately encoded K and V cache.

    Build with `from_pretrained` or `from_recipe`; use as a context manager or call `close`. Not
    thread-safe. Bad prompts and settings raise UsageError before anything is queued.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        plane_tier: Tier | None = None,
    ) -> None:
        """`plane_tier`: where dropped low planes rest; a host arena of `cache.plane_arena` bytes if None."""
        loaded.check_settings(config)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.loaded = loaded
        self.cache_config = cache
        self.config = config
        self.backend: Backend = choose_backend(config.kernel)
        self.max_model_len = config.max_model_len or loaded.max_model_len
        self._clock = clock
        self._plan = plan_arenas(
            loaded.spec, cache, max_model_len=self.max_model_len, max_num_seqs=scheduler.max_num_seqs,
            chunk=scheduler.chunk,
        )  # fmt: skip
        centres = key_centres(loaded, cache, max_model_len=self.max_model_len)
        self.key_centres_sha256 = centres_sha256(centres)
        self.fingerprint = cache_fingerprint(loaded, cache, self.key_centres_sha256)
        with memory_for(self._plan):
            self._manager = cache_manager(self._plan, cache, fingerprint=self.fingerprint)
        self._memory = ElasticMemory()
        self._arenas = allocate_arenas(
            self._plan, cache, centres, precision=self._manager.precision, memory=self._memory
        )
        tier = HostArena(cache.plane_arena_bytes) if plane_tier is None else plane_tier
        self._planes = PlaneMover(self._plan.groups, self._arenas, cache, tier)
        self._kv_budget_bytes = cache.kv_budget_bytes
        self._scheduler = Scheduler(
            self._manager, scheduler, max_model_len=self.max_model_len, eos_token_ids=loaded.eos_token_ids,
            clock=clock,
        )  # fmt: skip
        self._scheduler_config = scheduler
        self._runner = ModelRunner(
            loaded.model, self._plan.groups, self._arenas, block_size=cache.block_size, backend=self.backend,
            pad_rows=config.pad_rows, decoder=None if self.backend.name == "reference" else loaded.decoder,
        )  # fmt: skip
        self._scorer = Scorer(self._runner, self._manager, vocab_size=loaded.vocab_size)
        self._states: dict[RequestId, RequestState] = {}
        self._undelivered: list[RequestOutput] = []
        self._ids = itertools.count()
        self._is_closed = False
        self.on_step: Callable[[SchedulerOutput], None] | None = None
        """Called after every step that computed something, with the decision it performed."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_model: ModelSource,
        *,
        cache: CacheConfig | None = None,
        scheduler: SchedulerConfig | None = None,
        config: EngineConfig | None = None,
        tokenizer: TokenDecoder | None = None,
    ) -> Self:
        """An engine over a model folder, a Transformers model object, or an already loaded model.

        A model object is changed in place (its attention now belongs to kvtune). Raises
        InputFileError, UnsupportedModelError or UsageError, each with one line.
        """
        config = config or EngineConfig()
        is_loaded = isinstance(path_or_model, LoadedModel)
        loaded = path_or_model if is_loaded else load_model(path_or_model, config, tokenizer=tokenizer)
        return cls(
            loaded, cache=cache or CacheConfig(), scheduler=scheduler or SchedulerConfig(), config=config
        )

    @classmethod
    def from_recipe(cls, path: str | Path, model: ModelSource | None = None) -> Self:
        """The engine a recipe describes. `model` overrides the recipe's path, not its weights.

        UsageError for a recipe of another engine, other weights, codec constants or another read
        contract; a UserWarning where the kernel path or the version is not the one it was proven with.
        """
        recipe = Recipe.load(path)
        cache, scheduler, config = recipe.cache_config(), recipe.scheduler_config(), recipe.engine_config()
        check_readable(recipe, path)
        source = model if model is not None else recipe.model.get("path")
        if source is None:
            raise UsageError(f"recipe {path} names no model path; pass model=")
        loaded = source if isinstance(source, LoadedModel) else load_model(source, config)
        check_weights(recipe, path, loaded)
        engine = cls(loaded, cache=cache, scheduler=scheduler, config=config)
        warn_if_unproven(recipe, path, engine.backend)
        return engine

    # --- requests in, outputs out

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """Run all prompts to the end; outputs in prompt order. Nothing is left behind on an error."""
        if isinstance(prompts, str):
            raise UsageError("prompts must be a list: one text goes in as [text]")
        all_params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(all_params) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts need as many SamplingParams, found {len(all_params)}")
        own: dict[RequestId, RequestOutput | None] = {}
        try:
            for prompt, one in zip(prompts, all_params, strict=True):
                own[self._add_unnamed(prompt, one)] = None
            while any(output is None for output in own.values()):
                for state, new_ids, new_text in self._advance():
                    request_id = state.sequence.request_id
                    if request_id not in own:
                        self._undelivered.append(state.output(new_ids, new_text))
                    elif state.is_finished:
                        own[request_id] = state.output(new_ids, new_text)
        finally:
            for request_id, output in own.items():
                if output is None:
                    self._drop(request_id)
        return [output for output in own.values() if output is not None]

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        arrival_s: float | None = None,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
    ) -> None:
        """Queue one request; `step` delivers its outputs. `arrival_s` [s, engine clock]: default now.

        UsageError if it could never be served.
        """
        self._check_open()
        if request_id in self._states:
            raise UsageError(f"request id {request_id!r} is in use; give each request its own")
        tokenizer = self.loaded.tokenizer
        check_sampling(params, has_tokenizer=tokenizer is not None)
        request = Request(
            request_id=RequestId(request_id),
            prompt_token_ids=prompt_token_ids(prompt, tokenizer, self.loaded.vocab_size),
            sampling=params,
            arrival_s=self._clock() if arrival_s is None else arrival_s,
            priority=priority,
            tenant=tenant,
            cache_salt=cache_salt,
        )
        sequence = self._scheduler.add(request)
        seed = request_seed(self.config.seed, request.request_id, params)
        self._states[request.request_id] = RequestState(sequence, seed=seed, decoder=tokenizer)

    def step(self, *, finished_only: bool = False) -> list[RequestOutput]:
        """One scheduler step; an output for each request that got tokens or ended since the last call.

        `finished_only`: only outputs of requests that ended, which saves copying growing token lists.
        """
        advanced = [
            state.output(ids, text)
            for state, ids, text in self._advance()
            if state.is_finished or not finished_only
        ]
        delivered, self._undelivered = self._undelivered + advanced, []
        return delivered

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[RequestOutput]:
        """Outputs of one request as its tokens come; closing the iterator aborts it."""
        request_id = self._add_unnamed(prompt, params)
        return self._stream(request_id)

    def _stream(self, request_id: RequestId) -> Iterator[RequestOutput]:
        try:
            while request_id in self._states:
                others: list[RequestOutput] = []
                for output in self.step():
                    if output.request_id == request_id:
                        yield output
                    else:
                        others.append(output)
                self._undelivered[:0] = others
        finally:
            self._drop(request_id)

    def abort(self, request_id: str) -> bool:
        """End a request in any state and free all it holds; its last output comes with the next `step`.

        False if no such request is unfinished.
        """
        state = self._states.pop(RequestId(request_id), None)
        if state is None:
            return False
        self._scheduler.abort(RequestId(request_id))
        self._undelivered.append(state.output((), state.flush()))
        return True

    def discard_outputs(self) -> None:
        """Forget outputs that no `step` has delivered yet."""
        self._undelivered.clear()

    @property
    def attention_layers(self) -> Mapping[int, AttentionLayer]:
        """What this engine's attention reads and how, by layer; each engine over a model has its own."""
        return self._runner.layers

    @property
    def scheduler_config(self) -> SchedulerConfig:
        return self._scheduler_config

    @property
    def arena_plan(self) -> ArenaPlan:
        """KV groups, and how many blocks of each the budget bought."""
        return self._plan

    def cached_blocks(self, prompt: Prompt, *, cache_salt: str = "") -> tuple[tuple[BlockId, ...], ...]:
        """Per KV group, the blocks a request with this prompt would hit; -1 outside the group's window."""
        tokens = prompt_token_ids(prompt, self.loaded.tokenizer, self.loaded.vocab_size)
        blocks = self._manager.match(tokens, cache_salt=cache_salt).blocks
        return tuple(tuple(BlockId(b) for b in table) for table in blocks)

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    def is_unfinished(self, request_id: str) -> bool:
        return RequestId(request_id) in self._states

    @property
    def has_unfinished(self) -> bool:
        """Whether a call of `step` has something to do or to deliver."""
        return bool(self._states) or bool(self._undelivered)

    # --- scoring

    def score(self, items: Sequence[ScoreItem], *, num_top: int, chunk: int | None = None) -> list[Scores]:
        """Teacher-forced log-probabilities of each item's continuation, through this engine's cache.

        `chunk`: tokens per step, no more than a request's prefill may take (None: those), or 1 for decode
        steps: one token of each of a batch of items. The vocabulary is returned whole when it has at most
        `num_top` tokens. Neither other requests nor the result see each other's blocks, and no block stays
        behind; `stats` counts what was looked up and computed.
        """
        self._check_open()
        check_items(items, vocab_size=self.loaded.vocab_size, max_model_len=self.max_model_len)
        most = self._scheduler_config.chunk
        chunk = most if chunk is None else min(chunk, most)
        return self._scorer.score(items, num_top=num_top, chunk=chunk)

    # --- telling and ending

    def stats(self) -> EngineStats:
        return engine_stats(self._manager, self._scheduler, self._plan, self._arenas, self._planes.traffic())

    def effective(self, *, context: int) -> dict[str, Any]:
        """Settings read back from the live parts, by knob name, and what they cost.

        `kv_bytes_per_token` at `context` tokens or the engine's length if shorter.
        """
        return {
            **cache_settings(self._plan, self._arenas, self._manager),
            **run_settings(
                self.loaded, self.cache_config, self._scheduler_config, self.backend,
                context=min(context, self.max_model_len),
            ),
            "max_model_len": self.max_model_len,
            "fingerprint": self.fingerprint.hex(),
            "key_centres_sha256": self.key_centres_sha256,
        }  # fmt: skip

    def memory(self) -> MemoryReport:
        """KV bytes from storage, from the block tables of live requests, and as spec predicts them."""
        return memory_report(
            self._manager, self._plan, self._arenas, planes=self._planes.traffic(),
            budget_bytes=self._kv_budget_bytes,
        )  # fmt: skip

    def configure(self, scheduler: SchedulerConfig) -> None:
        """Change the scheduler's settings between steps; all of them are hot."""
        self._scheduler.configure(scheduler)
        self._scheduler_config = scheduler

    @property
    def kv_budget_bytes(self) -> int:
        """The KV budget in force."""
        return self._kv_budget_bytes

    def set_kv_budget(self, kv_budget: str | int) -> None:
        """Another KV budget from now on, between steps; at most the one the engine was started with.

        What it no longer pays for is given up at once: low planes of cached prefixes and cached prefixes,
        then, where `squeeze_planes` allows, low planes of running requests, then running requests, which are
        recomputed. Planes come back step by step once there is room again. UsageError, and nothing changed,
        where a live request could not be served to its end under that budget.
        """
        self._check_open()
        size = parse_bytes(kv_budget)
        most = self.cache_config.kv_budget_bytes
        if size > most:
            raise UsageError(
                f"KV budget {format_bytes(size)} is above the {format_bytes(most)} this engine was started "
                "with; start it with more"
            )
        budgets = self._plan.budgets_for(
            size, max_model_len=self.max_model_len, chunk=self._scheduler_config.chunk
        )
        output = self._scheduler.set_budgets(budgets)
        self._move_planes(output)
        self._kv_budget_bytes = size
        for group in self._plan.groups:
            self._memory.give_back(group.index, *self._manager.precision.free_places(group.index))

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running requests go on."""
        self._manager.reset_prefix_cache()

    def close(self) -> None:
        """Abort what runs and give the KV memory back. Idempotent."""
        if self._is_closed:
            return
        for request_id in list(self._states):
            self._drop(request_id)
        self._undelivered.clear()
        self._runner.close()
        self._planes.close()
        self._arenas.clear()
        self._is_closed = True

    # --- inside

    def _add_unnamed(self, prompt: Prompt, params: SamplingParams) -> RequestId:
        request_id = RequestId(f"auto-{next(self._ids)}")
        self.add_request(request_id, prompt, params)
        return request_id

    def _advance(self) -> list[tuple[RequestState, Sequence[int], str]]:
        """One scheduler step; (state, new token ids, new text) of each request that moved."""
        self._check_open()
        if not self._states and not self._manager.precision.has_resting:
            return []
        output = self._scheduler.schedule()
        try:
            self._move_planes(output)
            self._runner.copy_blocks(output.copies)
            sampled = self._run(output)
        except BaseException:
            self._abandon(output)
            raise
        updates = self._scheduler.update(output, RunnerOutput(sampled=tuple(sampled.values())))
        moved: list[tuple[RequestState, Sequence[int], str]] = []
        for update in updates:
            request_id, token_ids = update.request_id, update.new_token_ids
            state = self._states[request_id]
            new_text = state.append(token_ids, sampled[request_id])
            if state.is_stopped and not state.is_finished:
                self._scheduler.finish(request_id, FinishReason.STOP)
            if state.is_finished:
                del self._states[request_id]
            moved.append((state, token_ids, new_text))
        if self.on_step is not None and output.num_chunks:
            self.on_step(output)
        return moved

    def _move_planes(self, output: SchedulerOutput) -> None:
        """Before anything is copied or written: rows that are given up now are used again in this step."""
        if output.plane_moves:
            self._manager.precision.lose(self._planes.perform(output.plane_moves))

    def _run(self, output: SchedulerOutput) -> dict[RequestId, Sampled]:
        if not output.num_chunks:
            return {}
        decodes, others = output.decodes, output.others
        num_decodes = 0 if decodes is None else len(decodes)
        logits = self._runner.forward(others, last_rows(others, num_decodes=num_decodes), decodes=decodes)
        rows = [self._states[request_id].sample_row() for request_id in output.sampling_ids]
        return {one.request_id: one for one in sample(logits, rows)}

    def _abandon(self, output: SchedulerOutput) -> None:
        """A step broke off (out of memory, Ctrl-C): what it was writing is unknown, so its requests end.

        Nothing of it was published; all other requests and the cache are sound.
        """
        for chunk in output.chunks:
            self.abort(chunk.request_id)

    def _drop(self, request_id: RequestId) -> None:
        """Abort without an output: nobody is waiting for it any more."""
        if self._states.pop(request_id, None) is not None:
            self._scheduler.abort(request_id)

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError("this engine is closed; build a new one")
