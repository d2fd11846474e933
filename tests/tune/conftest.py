"""A deterministic engine behind the Target port: real logits perturbed by codec, time on its own clock."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from kvtune.errors import TargetError, UsageError
from kvtune.target import Config, Knob, LayerCodecs, LoadReport, LoadRequest, LoadResult, ScoreItem, Scores
from kvtune.workload import TokenRequest

VOCABULARY = 48
BITS = {"bf16": 16.0, "int8": 8.25, "int4": 4.5}
DAMAGE = {"bf16": 0.0, "int8": 0.01, "int4": 0.6}
"""Standard deviation of the noise added to logits of spread 3: mean KL about damage^2 / 2."""


class Clock:
    """Seconds that pass only when the engine works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def seeded(*parts: object) -> np.random.Generator:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


@dataclass
class FakeTarget:
    """`damage`, `slowdown`: per codec. `crash`: raises for a config, by stage (start, score, load)."""

    clock: Clock = field(default_factory=Clock)
    damage: Mapping[str, float] = field(default_factory=lambda: dict(DAMAGE))
    slowdown: Mapping[str, float] = field(default_factory=dict)
    crash: Callable[[Config, str], None] = lambda _config, _stage: None
    noise: float = 0.01
    aa_damage: float = 1e-3
    start_s: float = 1.0
    tokens_per_s: float = 20_000.0
    identity_model: Mapping[str, Any] = field(default_factory=lambda: {"path": "toy", "weights_sha256": "w"})
    name: str = "kvtune"
    starts: list[dict[str, Any]] = field(default_factory=list)
    num_open: int = 0
    confirm_damage: Mapping[str, float] = field(default_factory=dict)
    confirm_ids: frozenset[str] = frozenset()

    def knobs(self) -> Sequence[Knob]:
        codecs = ("bf16", "int8", "int4")
        return (
            Knob(name="k_codec", values=codecs, baseline="bf16", is_lossy=True),
            Knob(name="v_codec", values=codecs, baseline="bf16", is_lossy=True),
            Knob(name="block_size", values=(16, 32), baseline=16),
            Knob(name="max_num_seqs", values=(8, 16), baseline=16),
        )

    def identity(self) -> Mapping[str, Any]:
        return {
            "model": self.identity_model,
            "engine": {"name": "kvtune", "version": "1"},
            "hardware": {"cpu": "toy"},
        }

    def kv_bytes_per_token(self, config: Config, *, context: int) -> float:
        block = config["block_size"]
        rounded = -(-context // block) * block
        return (BITS[config["k_codec"]] + BITS[config["v_codec"]]) * 64 / 8 * rounded / context

    def start(self, config: Config, *, kv_budget_bytes: int | None = None) -> FakeRunning:
        self.clock.now += self.start_s
        self.crash(config, "start")
        if kv_budget_bytes is not None and kv_budget_bytes < self.kv_bytes_per_token(config, context=16) * 16:
            raise UsageError(f"kv_budget {kv_budget_bytes} holds no block")
        self.starts.append(dict(config))
        self.num_open += 1
        return FakeRunning(self, config, kv_budget_bytes or 1 << 20)


def unfinished(request_id: str) -> LoadResult:
    return LoadResult(
        request_id=request_id, token_ids=(), num_cached_tokens=0, ttft_s=None, tpot_s=None, e2e_s=None,
        error="not finished before the deadline",
    )  # fmt: skip


class FakeRunning:
    def __init__(self, target: FakeTarget, config: Config, budget: int) -> None:
        self.target, self.config = target, config
        self.is_open = True
        self.runs = 0
        size = target.kv_bytes_per_token(config, context=2048)
        self.effective: Mapping[str, Any] = {
            **config, "kv_bytes_per_token": size, "kv_capacity_tokens": int(budget / size),
            "num_blocks": int(budget / size / config["block_size"]), "read_contract": "T0", "kernel": "fake",
            "dtype": "float32", "max_num_batched_tokens": 512,
        }  # fmt: skip

    def generate(self, requests: Sequence[LoadRequest]) -> Sequence[Sequence[int]]:
        out = []
        for r in requests:
            tokens = self._logits(r.request_id, r.max_tokens, 512).argmax(axis=1)
            self._work(len(r.prompt_token_ids) + 4 * r.max_tokens)
            out.append([int(t) for t in tokens])
        return out

    def load(
        self, requests: Sequence[LoadRequest], *, deadline_s: float | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> LoadReport:  # fmt: skip
        self.target.crash(self.config, "load")
        self.runs += 1
        factor = max(self.target.slowdown.get(self.config[k], 1.0) for k in ("k_codec", "v_codec"))
        rng = seeded("load", sorted(self.config.items()), len(self.target.starts), self.runs)
        results, total = [], 0.0
        for i, r in enumerate(requests):
            jitter = factor * float(rng.lognormal(0, self.target.noise))
            tpot, ttft = 0.004 * jitter, (0.02 + 0.002 * i) * jitter
            results.append(
                LoadResult(
                    request_id=r.request_id, token_ids=[1] * r.max_tokens, num_cached_tokens=0,
                    ttft_s=ttft, tpot_s=tpot, e2e_s=ttft + tpot * r.max_tokens,
                )
            )  # fmt: skip
            total = max(total, r.arrival_s + ttft + tpot * r.max_tokens)
        duration = total if deadline_s is None else min(total, deadline_s)
        if duration < total:
            results = [r if (r.e2e_s or 0) <= duration else unfinished(r.request_id) for r in results]
        self.target.clock.now += duration
        return LoadReport(results=results, duration_s=duration)

    def score(
        self, items: Sequence[ScoreItem], *, num_top: int, chunk: int | None = None
    ) -> Sequence[Scores]:
        self.target.crash(self.config, "score")
        out = []
        for item in items:
            logits = self._logits(item.item_id, len(item.continuation), chunk)
            logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            rows, tokens = np.arange(len(logits)), np.asarray(item.continuation)
            self._work(len(item.prompt_token_ids) + len(item.continuation))
            out.append(
                Scores(
                    item_id=item.item_id,
                    ids=np.broadcast_to(np.arange(VOCABULARY, dtype=np.int32), logp.shape),
                    logprobs=logp.astype(np.float32), token_logprobs=logp[rows, tokens].astype(np.float32),
                    argmax=logp.argmax(axis=1).astype(np.int32), is_full=True,
                )
            )  # fmt: skip
        return out

    def _logits(self, item_id: str, tokens: int, chunk: int | None) -> np.ndarray:
        logits = seeded("model", item_id).normal(0, 3, (tokens, VOCABULARY))
        table = dict(self.target.damage)
        if item_id in self.target.confirm_ids:
            table |= self.target.confirm_damage
        for side in ("k_codec", "v_codec"):
            spread = table[self.config[side]]
            if spread:
                noise = seeded("damage", item_id, side, self.config[side]).normal(0, 1, logits.shape)
                logits = logits + spread * noise
        if chunk not in (None, 512):
            logits = logits + seeded("chunk", item_id, chunk).normal(0, self.target.aa_damage, logits.shape)
        return logits

    def _work(self, tokens: int) -> None:
        if not self.is_open:
            raise TargetError("closed")
        self.target.clock.now += tokens / self.target.tokens_per_s

    def close(self) -> None:
        if self.is_open:
            self.target.num_open -= 1
        self.is_open = False

    def __enter__(self) -> FakeRunning:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


LAYERS = 4
LAYER_BITS = {"bf16": 16.0, "int8": 8.25, "n8_rh": 8.5, "int4": 4.5, "n4_rh": 4.5}
LAYER_DAMAGE = {"bf16": 0.0, "int8": 0.004, "n8_rh": 0.004, "int4": 0.5, "n4_rh": 0.5}
LAYER_WEIGHT = {"k": (1.0, 0.5, 0.03, 0.02), "v": (0.8, 0.4, 0.015, 0.01)}
"""How much each layer's noise reaches the logits: the last two hardly."""


@dataclass
class LayeredTarget(FakeTarget):
    """Each layer has its own codecs, and its own share in the damage. `has_planes`: reads a nested code."""

    weight: Mapping[str, Sequence[float]] = field(default_factory=lambda: dict(LAYER_WEIGHT))
    has_planes: bool = True
    has_layers: bool = True
    confirm_relief: float = 1.0
    """What damage is multiplied by on the requests of `confirm_ids`."""

    def layer_codecs(self) -> LayerCodecs:
        nested = {"stored": "n8_rh", "high": "n4_rh"} if self.has_planes else {}
        codecs = ("bf16", "int8", "int4", *(("n8_rh", "n4_rh") if self.has_planes else ()))
        return LayerCodecs(layers=tuple(range(LAYERS)), codecs=codecs, **nested)

    def pairs(self, config: Config) -> list[tuple[str, str]]:
        table = config.get("layer_codecs", {})
        return [
            tuple(table.get(str(n), (config["k_codec"], config["v_codec"])))  # type: ignore[misc]
            for n in range(LAYERS)
        ]

    def kv_side_bytes_per_token(self, config: Config, *, context: int) -> Mapping[int, tuple[float, float]]:
        scale = self._scale(config, context)
        return {
            n: (LAYER_BITS[k] * scale, LAYER_BITS[v] * scale) for n, (k, v) in enumerate(self.pairs(config))
        }

    def kv_bytes_per_token(self, config: Config, *, context: int) -> float:
        return sum(k + v for k, v in self.kv_side_bytes_per_token(config, context=context).values())

    @staticmethod
    def _scale(config: Config, context: int) -> float:
        return 16 / 8 * (-(-context // config["block_size"]) * config["block_size"]) / context

    def start(self, config: Config, *, kv_budget_bytes: int | None = None) -> LayeredRunning:
        self.clock.now += self.start_s
        self.crash(config, "start")
        self.starts.append(dict(config))
        self.num_open += 1
        kind = PlaneRunning if self.has_planes else LayeredRunning
        return kind(self, config, kv_budget_bytes or 1 << 20)


class LayeredRunning(FakeRunning):
    planes: Mapping[int, tuple[int, int]] = {}

    def _logits(self, item_id: str, tokens: int, chunk: int | None) -> np.ndarray:
        target: Any = self.target
        logits = seeded("model", item_id).normal(0, 3, (tokens, VOCABULARY))
        for layer, pair in enumerate(target.pairs(self.config)):
            for at, (side, codec) in enumerate(zip("kv", pair, strict=True)):
                read = "n4_rh" if self.planes.get(layer, (2, 2))[at] == 1 else codec
                spread = LAYER_DAMAGE[read] * target.weight[side][layer]
                if item_id in target.confirm_ids:
                    spread *= target.confirm_relief
                if spread:
                    noise = seeded("damage", item_id, side, layer, read).normal(0, 1, logits.shape)
                    logits = logits + spread * noise
        if chunk not in (None, 512):
            logits = logits + seeded("chunk", item_id, chunk).normal(0, target.aa_damage, logits.shape)
        return logits


class PlaneRunning(LayeredRunning):
    @contextmanager
    def reading(self, planes: Mapping[int, tuple[int, int]]) -> Generator[None]:
        pairs = self.target.pairs(self.config)  # type: ignore[attr-defined]
        for layer, counts in planes.items():
            if any(n == 1 and codec != "n8_rh" for n, codec in zip(counts, pairs[layer], strict=True)):
                raise UsageError(f"layer {layer} is not nested")
        self.planes = planes
        try:
            yield
        finally:
            self.planes = {}


def make_requests(sessions: int = 48, turns: int = 2) -> list[TokenRequest]:
    rng = seeded("requests")
    return [
        TokenRequest(
            request_id=f"s{s}t{t}", arrival_s=float(10 * s + t), max_tokens=40,
            prompt_token_ids=tuple(int(x) for x in rng.integers(0, VOCABULARY, int(rng.integers(20, 200)))),
            session_id=f"s{s}", tags={"case": "easy" if s % 2 else "long"},
        )
        for s in range(sessions)
        for t in range(turns)
    ]  # fmt: skip


@pytest.fixture
def fake() -> type[FakeTarget]:
    return FakeTarget


@pytest.fixture
def layered() -> type[LayeredTarget]:
    return LayeredTarget


@pytest.fixture
def requests_() -> list[TokenRequest]:
    return make_requests()
