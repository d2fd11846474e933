"""Planted damage is a function of what is read alone, shows in every path, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.codecs import CODECS
from kvtune.engine import LoadedModel, load_model
from kvtune.engine.target import RunningEngine
from kvtune.errors import UsageError
from kvtune.kernels import paged_attention
from kvtune.quality import (
    MARGINS,
    ReplaySettings,
    Verdict,
    divergence,
    is_bit_equal,
    judge,
    record_reference,
    replay,
)
from kvtune.spec import LayerSpec, ModelSpec
from kvtune.target import ScoreItem, Scores
from kvtune.testing.damage import (
    DAMAGES,
    Damage,
    DamagedTarget,
    Noise,
    RoundKeys,
    ShuffleValues,
    ZeroKeys,
    planted,
)
from kvtune.testing.models import tiny_config, write_model_folder
from kvtune.tune import TuneSettings, run
from kvtune.workload import TokenRequest

VOCAB = 211
EACH = [
    ZeroKeys(layer=1, beyond=20),
    ShuffleValues(layer=0, head=1),
    RoundKeys(bits=2),
    Noise(strength=0.3),
]
BY_NAME = {"argvalues": EACH, "ids": [type(damage).__name__ for damage in EACH]}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("llama"), "llama", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def llama(folder: Path) -> LoadedModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_model_folder(tmp_path_factory.mktemp("gemma2"), "gemma2", vocab_size=VOCAB))


def _engine(loaded: LoadedModel, *, prefix_caching: bool = True, **cache) -> Engine:
    """Reference kernels and padded rows: bits do not depend on how tokens are cut into steps."""
    return Engine(
        loaded,
        cache=CacheConfig(kv_budget="4MiB", enable_prefix_caching=prefix_caching, **cache),
        scheduler=SchedulerConfig(max_num_batched_tokens=64),
        config=EngineConfig(kernel="reference", pad_rows=16),
    )


def _tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, count).tolist()


def _items(count: int = 3) -> list[ScoreItem]:
    return [
        ScoreItem(item_id=f"i{i}", prompt_token_ids=_tokens(50 + i, i), continuation=_tokens(12, 90 + i))
        for i in range(count)
    ]


def _scores(engine: Engine, chunk: int = 48) -> list[Scores]:
    return engine.score(_items(), num_top=VOCAB, chunk=chunk)


def _equal(one: list[Scores], other: list[Scores]) -> bool:
    return all(is_bit_equal(a, b) for a, b in zip(one, other, strict=True))


def _mean_kl(one: list[Scores], other: list[Scores]) -> float:
    return float(np.mean([divergence(a, b).kl.mean() for a, b in zip(one, other, strict=True)]))


def _layer(heads: int = 2, dim: int = 32) -> tuple[LayerSpec, torch.Tensor, torch.Tensor]:
    spec = ModelSpec.from_config(tiny_config("llama", num_kv_heads=heads, head_dim=dim).to_dict())
    generator = torch.Generator().manual_seed(7)
    k, v = torch.randn(2, 700, heads, dim, generator=generator)
    return spec.layers[0], k, v


def _read(damage: Damage, layer: LayerSpec, k: torch.Tensor, v: torch.Tensor):
    return damage.read(0, layer)(k.clone(), v.clone())


# ---------------------------------------------------------------- what each damage does


@pytest.mark.parametrize("damage", **BY_NAME)
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 700), min_size=1, max_size=4))
def test_what_a_position_reads_does_not_depend_on_how_much_follows_or_was_read_before(damage, lengths):
    layer, k, v = _layer()
    whole = _read(damage, layer, k, v)
    read = damage.read(0, layer)  # one reader for all lengths, in any order
    for length in lengths:
        part = read(k[:length].clone(), v[:length].clone())
        assert all(torch.equal(a, b[:length]) for a, b in zip(part, whole, strict=True))


def test_zero_keys_begin_at_a_position_and_leave_values():
    layer, k, v = _layer()
    damaged_k, damaged_v = _read(ZeroKeys(layer=0, beyond=64), layer, k, v)
    assert torch.equal(damaged_k[:64], k[:64])
    assert not damaged_k[64:].any()
    assert torch.equal(damaged_v, v)


def test_shuffled_values_of_one_head_come_from_the_past_and_mostly_from_elsewhere():
    layer, k, v = _layer()
    v[:, 1] = torch.arange(700.0)[:, None]
    damaged_k, damaged_v = _read(ShuffleValues(layer=0, head=1), layer, k, v)
    source = damaged_v[:, 1, 0]
    assert torch.equal(damaged_k, k)
    assert torch.equal(damaged_v[:, 0], v[:, 0])
    assert (source <= torch.arange(700.0)).all()
    assert (source == torch.arange(700.0)).float().mean() < 0.05
    assert 0.4 < (source[100:] / torch.arange(100.0, 700.0)).mean() < 0.6  # uniform over the past


def test_keys_rounded_to_four_bits_are_what_the_int4_codec_decodes():
    layer, k, v = _layer()
    rounded, untouched = _read(RoundKeys(bits=4), layer, k, v)
    codec = CODECS["int4"]
    torch.testing.assert_close(rounded, codec.decode(codec.encode(k)), rtol=0, atol=1e-6)
    assert torch.equal(untouched, v)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_rounded_keys_have_that_many_levels_and_the_ends_stay(bits):
    layer, k, v = _layer()
    rounded, _ = _read(RoundKeys(bits=bits), layer, k, v)
    levels = [len(row.unique()) for row in rounded.flatten(0, 1)]
    assert max(levels) == 2**bits
    torch.testing.assert_close(rounded.amax(-1), k.amax(-1), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(rounded.amin(-1), k.amin(-1), rtol=2e-3, atol=2e-3)


def test_equal_keys_survive_rounding():
    layer, k, v = _layer()
    rounded, _ = _read(RoundKeys(bits=2), layer, torch.full_like(k, 0.5), v)
    assert torch.equal(rounded, torch.full_like(k, 0.5))


def test_noise_has_the_asked_strength_on_the_asked_sides_and_follows_its_seed():
    layer, k, v = _layer()
    damaged_k, damaged_v = _read(Noise(strength=0.25, sides=("k",)), layer, k, v)
    relative = (damaged_k - k).square().mean().sqrt() / k.square().mean().sqrt()
    assert 0.24 < float(relative) < 0.26
    assert torch.equal(damaged_v, v)
    assert torch.equal(_read(Noise(strength=0.25, sides=("k",)), layer, k, v)[0], damaged_k)
    assert not torch.equal(_read(Noise(strength=0.25, sides=("k",), seed=1), layer, k, v)[0], damaged_k)


def test_noise_of_no_strength_changes_nothing():
    layer, k, v = _layer()
    assert all(
        torch.equal(a, b) for a, b in zip(_read(Noise(strength=0.0), layer, k, v), (k, v), strict=True)
    )


# ---------------------------------------------------------------- in the engine


@pytest.mark.parametrize("damage", **BY_NAME)
@pytest.mark.parametrize("cache", [{}, {"k_codec": "int8", "v_codec": "int4"}, {"first_block_16bit": True}])
def test_every_way_of_cutting_a_prompt_reads_the_same_damage(llama, damage, cache):
    with _engine(llama, **cache) as engine:
        sound = _scores(engine)
        with planted(engine, damage):
            one = _scores(engine, chunk=48)
            assert _equal(one, _scores(engine, chunk=16))
            assert _equal(one, _scores(engine, chunk=1))  # token by token
    assert _mean_kl(sound, one) > 1e-3


@pytest.mark.parametrize("damage", [ZeroKeys(layer=1, beyond=20), RoundKeys(), Noise(strength=0.3)])
def test_damage_under_a_sliding_window_does_not_depend_on_what_the_cache_still_holds(gemma2, damage):
    with _engine(gemma2) as engine, planted(engine, damage):
        one = _scores(engine, chunk=96)
        assert _equal(one, _scores(engine, chunk=16))


@pytest.mark.parametrize("damage", **BY_NAME)
def test_a_prefix_hit_equals_a_miss_under_damage(llama, damage):
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
    prompts = [_tokens(64), [*_tokens(48), *_tokens(30, 9)]]
    answers = []
    for prefix_caching in (True, False):
        with _engine(llama, prefix_caching=prefix_caching) as engine, planted(engine, damage):
            outputs = [engine.generate([prompt], greedy)[0] for prompt in prompts]
        assert outputs[1].num_cached_tokens == (48 if prefix_caching else 0)
        answers.append([(output.token_ids, output.logprobs) for output in outputs])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("damage", **BY_NAME)
def test_generation_reads_the_damage_that_scoring_reads(llama, damage):
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompt = _tokens(60)
    with _engine(llama) as engine, planted(engine, damage):
        answer = engine.generate([prompt], greedy)[0].token_ids
        item = ScoreItem(item_id="a", prompt_token_ids=prompt, continuation=answer)
        assert engine.score([item], num_top=VOCAB)[0].argmax.tolist() == list(answer)


@pytest.mark.parametrize("damage", **BY_NAME)
def test_an_engine_is_restored_bit_for_bit(llama, damage):
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=3)
    prompt = _tokens(64)
    with _engine(llama) as engine, _engine(llama) as other:
        before = _scores(engine)
        sound = other.generate([prompt], greedy)[0]
        engine.generate([prompt], greedy)
        with planted(engine, damage):
            damaged = engine.generate([prompt], greedy)[0]
            assert damaged.num_cached_tokens == 0  # sound prefixes are not served to the damaged engine
            assert damaged.logprobs != sound.logprobs
            assert other.generate([_tokens(30, 3)], greedy)  # an engine over the same model
            assert _equal(_scores(other), before)
        after = engine.generate([prompt], greedy)[0]
        assert after.num_cached_tokens == 0  # nor damaged ones to the sound engine
        assert (after.token_ids, after.logprobs) == (sound.token_ids, sound.logprobs)
        assert _equal(_scores(engine), before)
        assert all(layer.attend is paged_attention for layer in engine.attention_layers.values())


def test_an_error_inside_restores_too(llama):
    with _engine(llama) as engine:
        before = _scores(engine)
        with pytest.raises(ZeroDivisionError), planted(engine, Noise(strength=1.0)):
            raise ZeroDivisionError
        assert _equal(_scores(engine), before)


def test_damages_apply_in_order_whether_given_together_or_nested(llama):
    first, second = Noise(strength=0.3), RoundKeys(bits=2)
    with _engine(llama) as engine:
        with planted(engine, first, second):
            together = _scores(engine)
        with planted(engine, second, first):
            reversed_ = _scores(engine)
        with planted(engine, first):
            alone = _scores(engine)
            with planted(engine, second):
                nested = _scores(engine)
            assert _equal(_scores(engine), alone)
    assert _equal(together, nested)
    assert not _equal(together, reversed_)


@pytest.mark.parametrize("kernel", ["torch", "native"])
def test_fast_kernels_show_the_damage_the_reference_shows(llama, kernel):
    damage = RoundKeys(bits=2)
    with _engine(llama) as engine, planted(engine, damage):
        expected = _scores(engine)
    with Engine(
        llama, cache=CacheConfig(kv_budget="4MiB"), scheduler=SchedulerConfig(),
        config=EngineConfig(kernel=kernel),
    ) as engine, planted(engine, damage):  # fmt: skip
        assert _mean_kl(expected, _scores(engine)) < 1e-4


def test_a_stronger_noise_diverges_about_as_its_square(llama):
    with _engine(llama, k_codec="fp32", v_codec="fp32") as engine:
        sound = _scores(engine)
        kl = []
        for strength in (0.005, 0.01, 0.02):
            with planted(engine, Noise(strength=strength)):
                kl.append(_mean_kl(sound, _scores(engine)))
    assert 2.5 < kl[1] / kl[0] < 6
    assert 2.5 < kl[2] / kl[1] < 6


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (ZeroKeys(layer=2), r"layers 0\.\.1, asked for layer 2"),
        (ZeroKeys(layer=-1), r"layers 0\.\.1, asked for layer -1"),
        (ShuffleValues(layer=0, head=2), r"KV heads 0\.\.1, asked for head 2"),
        (RoundKeys(choice=(0, 5)), "asked for layer 5"),
        (Noise(strength=1.0, choice=(7,)), "asked for layer 7"),
    ],
)
def test_layers_and_heads_a_model_lacks_are_refused_and_nothing_is_planted(llama, damage, words):
    with _engine(llama) as engine:
        with pytest.raises(UsageError, match=words), planted(engine, Noise(strength=1.0), damage):
            pass
        assert all(layer.attend is paged_attention for layer in engine.attention_layers.values())


def test_values_of_a_windowed_layer_cannot_be_shuffled(gemma2):
    with _engine(gemma2) as engine:
        damage = ShuffleValues(layer=0, head=0)
        with pytest.raises(UsageError, match="window of 24 tokens"), planted(engine, damage):
            pass
        with planted(engine, ShuffleValues(layer=1, head=0)):
            assert len(_scores(engine)) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: ZeroKeys(layer=0, beyond=-1),
        lambda: RoundKeys(bits=0),
        lambda: RoundKeys(bits=9),
        lambda: Noise(strength=-0.1),
        lambda: Noise(strength=float("inf")),
        lambda: Noise(strength=float("nan")),
        lambda: Noise(strength=1.0, sides=()),
        lambda: Noise(strength=1.0, sides=("k", "q")),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(UsageError, match="found"):
        make()


def test_unfinished_requests_are_refused_at_both_ends(llama):
    params = SamplingParams(max_tokens=4, temperature=0.0)
    with _engine(llama) as engine:
        engine.add_request("a", _tokens(20), params)
        with pytest.raises(UsageError, match="planting damage needs an idle engine"), planted(engine):
            pass
        engine.abort("a")
        engine.discard_outputs()
        with pytest.raises(UsageError, match="removing damage needs"), planted(engine, Noise(strength=1.0)):
            engine.add_request("b", _tokens(20), params)
        assert all(layer.attend is paged_attention for layer in engine.attention_layers.values())


def test_every_damage_is_listed_by_name():
    assert set(DAMAGES.values()) == {type(damage) for damage in EACH}


# ---------------------------------------------------------------- as a tuning target


def _requests(count: int = 12) -> list[TokenRequest]:
    return [
        TokenRequest(
            request_id=f"r{i}", arrival_s=0.01 * i, prompt_token_ids=tuple(_tokens(60, i)), max_tokens=8
        )
        for i in range(count)
    ]


def _is_int8(config) -> bool:
    return config.get("k_codec") == "int8"


@pytest.fixture
def damaged_target(folder: Path) -> DamagedTarget:
    return DamagedTarget(
        folder, damages=(RoundKeys(bits=2),), when=_is_int8, config=EngineConfig(kernel="torch"),
        cache=CacheConfig(kv_budget="4MiB"),
    )  # fmt: skip


def test_the_gate_fails_a_target_that_is_damaged_where_it_was_asked_to_be(damaged_target):
    verdicts = {}
    with damaged_target.start({"k_codec": "bf16"}) as running:
        reference = record_reference(running, _requests(), ReplaySettings(num_decode=0))
    for codec in ("int8", "bf16"):
        with damaged_target.start({"k_codec": codec}) as running:
            scores = replay(running, reference)
            assert running.effective["k_codec"] == codec
            verdicts[codec] = judge(
                reference, scores, margin=MARGINS["near-lossless"], is_lossy=codec != "bf16",
                rng=np.random.default_rng(0),
            ).verdict  # fmt: skip
    assert verdicts == {"int8": Verdict.FAIL, "bf16": Verdict.PASS}


def test_a_damaged_target_is_closed_with_its_damage_removed(damaged_target):
    running = damaged_target.start({"k_codec": "int8"})
    layers = list(running.engine.attention_layers.values())
    assert any(layer.attend is not paged_attention for layer in layers)
    running.close()
    running.close()
    assert all(layer.attend is paged_attention for layer in layers)


def test_a_running_target_can_be_damaged_for_a_while(damaged_target):
    with damaged_target.start({"k_codec": "bf16"}) as running:
        assert type(running) is RunningEngine
        before = running.score(_items(), num_top=VOCAB)
        with planted(running, RoundKeys(bits=2)):
            assert not _equal(running.score(_items(), num_top=VOCAB), before)
        assert _equal(running.score(_items(), num_top=VOCAB), before)


def test_an_impossible_damage_leaves_no_engine_behind(folder):
    target = DamagedTarget(folder, damages=(ZeroKeys(layer=9),), cache=CacheConfig(kv_budget="4MiB"))
    with pytest.raises(UsageError, match="asked for layer 9"):
        target.start({})


def test_tune_never_chooses_what_is_damaged(damaged_target, tmp_path):
    requests = _requests(40)
    record = run(damaged_target, requests, TuneSettings(budget_s=25.0, context=128), tmp_path).record
    tried = [trial for trial in record["trials"] if trial["config"]["k_codec"] == "int8"]
    assert tried
    assert all("FAIL" in str(trial["quality"]) for trial in tried if trial.get("quality"))
    assert record["winner"]["config"]["k_codec"] != "int8"
