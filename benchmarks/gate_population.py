"""A population of requests with the reference's answers to them, kept in files for `bench_gate`."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.adapters.prompt_encoder import prompt_encoder
from kvtune.config import EngineConfig
from kvtune.engine.target import EngineTarget, RunningEngine
from kvtune.errors import UsageError
from kvtune.model_folder import files_sha256, weight_files
from kvtune.quality.divergence import TokenDivergence, divergence
from kvtune.target import LoadRequest, ScoreItem, Scores
from kvtune.testing.damage import DamagedTarget, Noise
from kvtune.workload import TokenRequest, Workload, demo_chat, materialise

CHUNK, AA_CHUNK, OTHER_CHUNK = 512, 96, 160
KV_BUDGET = 96 * 2**20
BATCH = 64
"""Requests scored together; full-vocabulary scores of a batch are held in memory at once."""


@dataclass(frozen=True)
class Setup:
    args: argparse.Namespace
    target: EngineTarget
    baseline: Mapping[str, Any]
    workload: Workload
    requests: tuple[TokenRequest, ...]

    def start(self, codecs: Mapping[str, str] | None = None, *, strength: float = 0.0) -> RunningEngine:
        config = {**self.baseline, **(codecs or {})}
        if strength:
            damaged = DamagedTarget(
                self.args.model, config=self.target.config, damages=(Noise(strength=strength, seed=7),)
            )
            return damaged.start(config, kv_budget_bytes=KV_BUDGET)
        return self.target.start(config, kv_budget_bytes=KV_BUDGET)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _fingerprint(args: argparse.Namespace) -> str:
    """What was computed holds for these weights and these requests only."""
    weights = files_sha256(weight_files(args.model))
    asked = [weights, args.population, args.max_chars, args.tokens, args.seed, args.calibration]
    asked += [args.load_requests, args.load_tokens, args.rounds]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


def set_up(args: argparse.Namespace) -> Setup:
    config = EngineConfig(dtype="auto", num_threads=args.threads)
    target = EngineTarget(args.model, config=config)
    args.work /= _fingerprint(args)
    args.work.mkdir(parents=True, exist_ok=True)
    workload = demo_chat(args.population + args.population // 8, seed=args.seed, max_chars=args.max_chars)
    tokens = materialise(
        workload, vocab_size=target.loaded.vocab_size, max_model_len=target.loaded.max_model_len,
        encode=prompt_encoder(args.model), seed=args.seed,
    )  # fmt: skip
    if len(tokens.requests) < args.population:
        raise UsageError(f"{args.population} requests asked, {len(tokens.requests)} generated")
    baseline = {knob.name: knob.baseline for knob in target.knobs()}
    return Setup(args, target, baseline, workload, tokens.requests[: args.population])


class Population:
    """A reference's answers to every request and candidates' divergences from them, kept on disk."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.items = self._answers()
        self.clusters = [r.session_id or r.request_id for r in setup.requests]
        self._sizes = [len(item.continuation) for item in self.items]
        self._reference: np.ndarray[Any, Any] | None = None

    def _answers(self) -> list[ScoreItem]:
        """Greedy answers of the baseline; an empty one is cut out with its request."""
        file = self.setup.args.work / "answers.json"
        requests = self.setup.requests
        if not file.exists():
            say(f"generating {len(requests)} answers")
            with self.setup.start() as running:
                answers = running.generate(
                    [LoadRequest(request_id=r.request_id, prompt_token_ids=r.prompt_token_ids,
                                 max_tokens=self.setup.args.tokens) for r in requests]
                )  # fmt: skip
            file.write_text(json.dumps([[int(t) for t in a] for a in answers]))
        found = json.loads(file.read_text())
        return [
            ScoreItem(item_id=r.request_id, prompt_token_ids=r.prompt_token_ids, continuation=tuple(a))
            for r, a in zip(requests, found, strict=True)
        ]

    def divergences(
        self, name: str, codecs: Mapping[str, str] | None = None, *, strength: float = 0.0,
        chunk: int = CHUNK,
    ) -> list[TokenDivergence]:  # fmt: skip
        """Of a candidate from the reference, per request, exact over the whole vocabulary, in float64."""
        file = self.setup.args.work / f"{name}.npz"
        if not file.exists():
            say(f"replaying {len(self.items)} requests: {name}")
            with self.setup.start(codecs, strength=strength) as running:
                found = list(self._compare(running, range(len(self.items)), chunk))
            _save(file, found)
        with np.load(file) as data:
            kl, flips, delta = (
                np.split(data[k], np.cumsum(self._sizes)[:-1]) for k in ("kl", "flips", "nll")
            )
        vocab = self.setup.target.loaded.vocab_size
        return [
            TokenDivergence(item_id=i.item_id, kl=a, flips=b, delta_nll=c, num_ids=vocab, is_exact=True)
            for i, a, b, c in zip(self.items, kl, flips, delta, strict=True)
        ]

    def mean_kl(self, strength: float, rows: Sequence[int]) -> float:
        """Mean KL per token of some requests under noise of this strength."""
        with self.setup.start(strength=strength) as running:
            return float(np.concatenate([d.kl for d in self._compare(running, rows, CHUNK)]).mean())

    def _compare(self, running: RunningEngine, rows: Sequence[int], chunk: int) -> Iterator[TokenDivergence]:
        reference = self._reference_scores()
        starts = np.concatenate([[0], np.cumsum(self._sizes)])
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            scores = running.score(
                [self.items[i] for i in batch], num_top=self.setup.target.loaded.vocab_size, chunk=chunk
            )
            for i, one in zip(batch, scores, strict=True):
                yield divergence(_scores(self.items[i], reference[starts[i] : starts[i + 1]]), one)

    def _reference_scores(self) -> np.ndarray[Any, Any]:
        """Log-probabilities of the reference [tokens, vocabulary] float32, a file mapped into memory."""
        file = self.setup.args.work / "reference.npy"
        shape = (sum(self._sizes), self.setup.target.loaded.vocab_size)
        if self._reference is None and not file.exists():
            say(f"scoring the reference, {shape[0] * shape[1] * 4 / 2**20:.0f} MiB")
            partial = file.with_suffix(".part.npy")
            out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            at = 0
            with self.setup.start() as running:
                for first in range(0, len(self.items), BATCH):
                    for one in running.score(
                        self.items[first : first + BATCH], num_top=shape[1], chunk=CHUNK
                    ):
                        out[at : at + len(one.logprobs)] = one.logprobs
                        at += len(one.logprobs)
            out.flush()
            partial.replace(file)
        if self._reference is None:
            self._reference = np.load(file, mmap_mode="r")
        return self._reference

    def spread(self, rng: np.random.Generator, count: int) -> tuple[list[int], list[str]]:
        """One request of each of `count` sessions drawn with replacement: as tune chooses from many."""
        members = self._sessions()
        drawn = [members[i] for i in rng.integers(len(members), size=count)]
        return [rows[int(rng.integers(len(rows)))] for rows in drawn], [str(i) for i in range(count)]

    def _sessions(self) -> list[list[int]]:
        sessions: dict[str, list[int]] = {}
        for row, cluster in enumerate(self.clusters):
            sessions.setdefault(cluster, []).append(row)
        return list(sessions.values())

    def draw(self, rng: np.random.Generator, count: int) -> tuple[list[int], list[str]]:
        """Sessions drawn with replacement until they hold `count` requests: rows, and a cluster per row."""
        members = self._sessions()
        rows: list[int] = []
        clusters: list[str] = []
        while len(rows) < count:
            drawn = members[int(rng.integers(len(members)))]
            clusters += [str(len(rows))] * len(drawn)
            rows += drawn
        return rows[:count], clusters[:count]


def _scores(item: ScoreItem, logprobs: np.ndarray[Any, Any]) -> Scores:
    rows = np.asarray(logprobs)
    ids = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
    chosen = rows[np.arange(len(rows)), np.asarray(item.continuation)]
    return Scores(item_id=item.item_id, ids=ids, logprobs=rows, token_logprobs=chosen,
                  argmax=rows.argmax(axis=1).astype(np.int32), is_full=True)  # fmt: skip


def _save(file: Path, found: Sequence[TokenDivergence]) -> None:
    partial = file.with_suffix(".part.npz")
    sides = {"kl": "kl", "flips": "flips", "nll": "delta_nll"}
    arrays = {name: np.concatenate([getattr(d, m) for d in found]) for name, m in sides.items()}
    np.savez(partial, **arrays)
    partial.replace(file)
