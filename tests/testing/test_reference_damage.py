"""The reference model is a ruler: damage to its cache costs answers, int8 does not, the gate knows which."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.engine import EngineTarget, LoadedModel, load_model
from kvtune.quality import (
    MARGINS,
    TASKS,
    Material,
    ReplaySettings,
    Verdict,
    divergence,
    draw,
    is_bit_equal,
    is_correct,
    judge,
    record_reference,
    replay,
)
from kvtune.target import ScoreItem, Scores
from kvtune.testing.damage import Damage, RoundKeys, ShuffleValues, ZeroKeys, planted
from kvtune.testing.reference import reference_model_path
from kvtune.testing.reference.corpus import load_corpus
from kvtune.testing.reference.dialogue import Dialogue, DialogueEncoder, material
from kvtune.testing.variants import BiasedKeys, HeavyTailedValues, write_variant
from kvtune.workload import TokenRequest

NUM_TOKENS, BEYOND = 480, 256


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(reference_model_path())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(reference_model_path())


@pytest.fixture(scope="module")
def encoder(tokenizer) -> DialogueEncoder:
    return DialogueEncoder(tokenizer)


@pytest.fixture(scope="module")
def source(tokenizer) -> Material:
    return material(tokenizer, load_corpus(held_out=True).prose)


@pytest.fixture(scope="module")
def dialogues(encoder, source) -> list[Dialogue]:
    rng = random.Random(11)
    drawn = [draw("recall", rng, source, num_tokens=NUM_TOKENS, num_questions=4) for _ in range(16)]
    return [encoder.dialogue(sample) for sample in drawn]


@pytest.fixture(scope="module")
def items(dialogues) -> list[ScoreItem]:
    return [
        ScoreItem(item_id=str(i), prompt_token_ids=d.prompt, continuation=d.continuation)
        for i, d in enumerate(dialogues)
    ]


def _start(loaded: LoadedModel, k_codec: str = "bf16", v_codec: str = "bf16") -> Engine:
    return Engine(
        loaded, cache=CacheConfig(kv_budget="16MiB", k_codec=k_codec, v_codec=v_codec),
        scheduler=SchedulerConfig(), config=EngineConfig(),
    )  # fmt: skip


def _score(engine: Engine, items: list[ScoreItem]) -> list[Scores]:
    return engine.score(items, num_top=engine.loaded.vocab_size, chunk=512)


def _points(dialogues: list[Dialogue], scores: list[Scores]) -> float:
    right = [a for d, s in zip(dialogues, scores, strict=True) for a in d.is_answered(s.argmax.tolist())]
    return 100 * float(np.mean(right))


def _mean_kl(one: list[Scores], other: list[Scores]) -> float:
    return float(np.mean([divergence(a, b).kl.mean() for a, b in zip(one, other, strict=True)]))


def _damages(kind: str, loaded: LoadedModel) -> list[Damage]:
    layers = range(len(loaded.spec.layers))
    heads = range(loaded.spec.layers[0].num_kv_heads)
    return {
        "zero_keys": [ZeroKeys(layer=i, beyond=BEYOND) for i in layers],
        "shuffle_values": [ShuffleValues(layer=i, head=h) for i in layers for h in heads],
        "round_keys": [RoundKeys(bits=2)],
    }[kind]


@pytest.mark.parametrize("kind", ["zero_keys", "shuffle_values", "round_keys"])
def test_the_most_harmful_damage_of_each_kind_costs_at_least_twenty_points(loaded, dialogues, items, kind):
    with _start(loaded) as engine:
        sound = _score(engine, items)
        repeated = engine.score(items, num_top=engine.loaded.vocab_size, chunk=96)
        harm = []
        for damage in _damages(kind, loaded):
            with planted(engine, damage):
                scores = _score(engine, items)
            harm.append((_points(dialogues, sound) - _points(dialogues, scores), _mean_kl(sound, scores)))
    lost, kl = max(harm)
    assert lost >= 20
    assert kl > 10 * max(_mean_kl(sound, repeated), MARGINS["near-lossless"].kl)


def test_eight_bits_cost_nothing_that_shows(loaded, dialogues, items):
    with _start(loaded) as engine:
        sound = _score(engine, items)
    with _start(loaded, "int8", "int8") as engine:
        scores = _score(engine, items)
    assert abs(_points(dialogues, sound) - _points(dialogues, scores)) <= 100 * 2 / 64
    assert 0 < _mean_kl(sound, scores) < MARGINS["near-lossless"].kl


def test_an_answer_counted_as_right_is_what_generation_writes(loaded, dialogues):
    asked = dialogues[:8]
    items = [
        ScoreItem(item_id=str(i), prompt_token_ids=d.prompt, continuation=d.continuation)
        for i, d in enumerate(asked)
    ]
    ends = [d.answers[0][1] - d.answers[0][0] for d in asked]
    with _start(loaded) as engine:
        counted = [
            d.is_answered(s.argmax.tolist())[0] for d, s in zip(asked, _score(engine, items), strict=True)
        ]
        outputs = engine.generate(
            [d.prompt for d in asked], [SamplingParams(max_tokens=end, temperature=0.0) for end in ends]
        )
        decode = engine.loaded.tokenizer.decode
        expected = [decode(d.continuation[: end - 1]) for d, end in zip(asked, ends, strict=True)]
        written = [decode(output.token_ids[: end - 1]) for output, end in zip(outputs, ends, strict=True)]
    assert [is_correct(a, b) for a, b in zip(expected, written, strict=True)] == counted
    assert any(counted)


@pytest.fixture(scope="module")
def requests(encoder, source) -> list[TokenRequest]:
    """Questions of every task."""
    rng = random.Random(11)
    names = [list(TASKS)[index % len(TASKS)] for index in range(240)]
    asked = [encoder.dialogue(draw(name, rng, source, num_tokens=NUM_TOKENS)) for name in names]
    return [
        TokenRequest(
            request_id=str(i), arrival_s=0.0, prompt_token_ids=dialogue.prompt,
            max_tokens=len(dialogue.continuation),
        )
        for i, dialogue in enumerate(asked)
    ]  # fmt: skip


def test_on_biased_keys_the_gate_fails_int4_keys_and_passes_int8(requests, tmp_path):
    target = EngineTarget(
        write_variant(reference_model_path(), tmp_path / "biased", BiasedKeys()),
        cache=CacheConfig(kv_budget="16MiB"),
    )
    with target.start({"k_codec": "bf16", "v_codec": "bf16"}) as running:
        reference = record_reference(running, requests, ReplaySettings(num_decode=0))
    verdicts = []
    for k_codec, v_codec in (("int4", "bf16"), ("int8", "int8")):
        with target.start({"k_codec": k_codec, "v_codec": v_codec}) as running:
            scores = replay(running, reference)
        verdicts.append(
            judge(
                reference,
                scores,
                margin=MARGINS["near-lossless"],
                is_lossy=True,
                rng=np.random.default_rng(0),
            ).verdict
        )
    assert verdicts == [Verdict.FAIL, Verdict.PASS]


@pytest.mark.parametrize("variant", [BiasedKeys(), HeavyTailedValues()], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize(("dtype", "codec"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_variants_of_the_reference_model_keep_every_bit(items, tmp_path: Path, variant, dtype, codec):
    scores = []
    for folder in (reference_model_path(), write_variant(reference_model_path(), tmp_path / "v", variant)):
        with Engine.from_pretrained(
            folder, cache=CacheConfig(kv_budget="16MiB", k_codec=codec, v_codec=codec),
            config=EngineConfig(dtype=dtype),
        ) as engine:  # fmt: skip
            scores.append(_score(engine, items[:4]))
    assert all(is_bit_equal(a, b) for a, b in zip(*scores, strict=True))
