"""Rotated and nested codecs in an engine: centres from the weights, planes that come and go, hit = miss."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvtune import CacheConfig, SamplingParams
from kvtune.engine import load_model, reading_planes
from kvtune.engine.centring import BIAS_POSITIONS, key_centres
from kvtune.errors import UsageError
from kvtune.target import ScoreItem
from kvtune.testing.models import write_model_folder

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
ROTATED = ("int4_rh", "n8_rh", "n4_rh")


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory):
    """Qwen2 with key biases of 20 in the slowest and the fastest RoPE pair."""
    folder = write_model_folder(tmp_path_factory.mktemp("qwen2"), "qwen2", vocab_size=211)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.data.zero_().view(model.config.num_key_value_heads, -1)
        half = bias.shape[1] // 2
        bias[:, [half - 1, 2 * half - 1, 0]] = 20.0
    return load_model(model)


@pytest.fixture
def start(make_engine):
    """An engine with these cache settings; `config` as a dict."""

    def started(loaded, *, config=None, **cache):
        return make_engine(loaded, cache={"kv_budget": "4MiB", **cache}, config=config)

    return started


def items(count: int = 3, length: int = 70) -> list[ScoreItem]:
    rng = np.random.default_rng(0)
    return [
        ScoreItem(
            item_id=str(i),
            prompt_token_ids=tuple(rng.integers(8, 200, length).tolist()),
            continuation=tuple(rng.integers(8, 200, 20).tolist()),
        )
        for i in range(count)
    ]


def logprobs(engine) -> torch.Tensor:
    scores = engine.score(items(), num_top=engine.loaded.vocab_size)
    return torch.cat([torch.from_numpy(one.logprobs) for one in scores])


def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def test_the_bias_is_carried_through_rope_and_averaged_over_positions(biased):
    bias = CacheConfig(k_codec="int4_rh", key_centring="bias")
    centres = key_centres(biased, bias, max_model_len=biased.max_model_len)
    assert sorted(centres) == [layer.index for layer in biased.spec.layers]
    config = biased.model.config
    dim = biased.spec.layers[0].k_head_dim
    base = config.rope_parameters["rope_theta"]
    positions = torch.arange(min(BIAS_POSITIONS, biased.max_model_len), dtype=torch.float64)
    frequency = base ** (-2 * (dim / 2 - 1) / dim)
    cosine, sine = torch.cos(positions * frequency).mean(), torch.sin(positions * frequency).mean()
    slow = torch.tensor([20 * (cosine - sine), 20 * (cosine + sine)]).float()
    for centre in centres.values():
        assert torch.allclose(centre[:, [dim // 2 - 1, dim - 1]], slow.expand(len(centre), 2), rtol=0.02)
        assert centre[:, 0].abs().max() < 3  # the fastest pair turns round and round: only noise is left
        others = [d for d in range(dim) if d not in (0, dim // 2, dim // 2 - 1, dim - 1)]
        assert torch.equal(centre[:, others], torch.zeros_like(centre[:, others]))


def test_what_keys_share_beside_their_bias_is_centred_too(biased):
    """Keys of layer 0 do not depend on attention: there, the centre is the bias and the mean of the rest."""
    bias = key_centres(biased, CacheConfig(k_codec="int4_rh", key_centring="bias"), max_model_len=256)[0]
    both = key_centres(biased, CacheConfig(k_codec="int4_rh"), max_model_len=256)[0]
    unbiased = copy.deepcopy(biased.model)
    for layer in unbiased.model.layers:
        layer.self_attn.k_proj.bias.data.zero_()
    probe = CacheConfig(k_codec="int4_rh", key_centring="probe")
    rest = key_centres(load_model(unbiased), probe, max_model_len=256)[0]
    assert rest.abs().max() > 0.1
    assert torch.allclose(both, bias + rest, atol=0.1)  # bfloat16 of 20 is that coarse
    small = bias.abs() < 1
    assert torch.allclose(both[small], (bias + rest)[small], atol=0.01)


def test_centres_are_constants_of_the_weights(biased, llama):
    cache = CacheConfig(k_codec="int4_rh", layer_codecs={0: ("int8", "int4_rh")})
    for loaded in (biased, llama):
        one = key_centres(loaded, cache, max_model_len=64)
        other = key_centres(loaded, cache, max_model_len=64)
        assert 0 not in one and one  # only layers with rotated keys have a centre
        assert all(torch.equal(one[layer], other[layer]) for layer in one)
    assert key_centres(biased, CacheConfig(k_codec="int8"), max_model_len=64) == {}
    assert key_centres(biased, CacheConfig(k_codec="n8_rh", key_centring="off"), max_model_len=64) == {}


def test_a_model_without_key_biases_is_probed_or_refused(llama):
    probed = key_centres(llama, CacheConfig(k_codec="n8_rh"), max_model_len=64)
    assert any(bool(centre.abs().max() > 0) for centre in probed.values())
    with pytest.raises(UsageError, match="layer 0 of llama has no k_proj bias"):
        key_centres(llama, CacheConfig(k_codec="n8_rh", key_centring="bias"), max_model_len=64)
    with pytest.raises(UsageError, match="key_centring must be auto, bias, probe or off, found 'mean'"):
        CacheConfig(key_centring="mean")


def test_a_centre_helps_where_keys_are_biased(biased, start):
    def scored(**cache):
        return logprobs(start(biased, v_codec="fp32", **cache))

    whole = scored(k_codec="fp32")
    plain, rotated, bias, probe = (
        kl(whole, scored(k_codec=codec, key_centring=centring))
        for codec, centring in (
            ("int4", "off"),
            ("int4_rh", "off"),
            ("int4_rh", "bias"),
            ("int4_rh", "probe"),
        )
    )
    assert bias < rotated / 2 and bias < plain / 2
    assert probe < rotated / 2


@pytest.mark.parametrize("codec", ROTATED)
def test_a_model_with_soft_caps_and_windows_scores_as_with_wide_keys(gemma2, start, codec):
    """Gemma 2 caps its scores: a centre that did not come back would show."""
    whole = logprobs(start(gemma2, kv_budget="8MiB", k_codec="fp32", v_codec="fp32"))
    found = logprobs(start(gemma2, kv_budget="8MiB", k_codec=codec, v_codec="fp32"))
    assert kl(whole, found) < (1e-4 if codec == "n8_rh" else 2e-2)


@pytest.mark.parametrize("codec", [*ROTATED, "fp8"])
def test_hits_equal_misses_bit_for_bit(biased, start, codec):
    def engine():
        return start(
            biased, k_codec=codec, v_codec=codec,
            config={"kernel": "reference", "pad_rows": 16},
        )  # fmt: skip

    prompt = list(range(8, 78))
    warm, cold = engine(), engine()
    warm.generate([[*prompt[:64], 5, 6]], GREEDY)
    hit, miss = warm.generate([prompt], GREEDY)[0], cold.generate([prompt], GREEDY)[0]
    assert hit.num_cached_tokens == 64 and miss.num_cached_tokens == 0
    assert hit.token_ids == miss.token_ids
    for layer in range(len(biased.spec.layers)):
        one, other = warm.attention_layers[layer].cache, cold.attention_layers[layer].cache
        blocks = {tuple(row.tolist()) for row in one.arena if row.any()}
        assert {tuple(row.tolist()) for row in other.arena if row.any()} <= blocks


def test_another_centre_is_another_fingerprint(biased, start):
    prints = {
        start(biased, kv_budget="2MiB", k_codec="int4_rh", key_centring=centring).fingerprint
        for centring in ("auto", "bias", "off")
    }
    assert len(prints) == 3
    plain = {
        start(biased, kv_budget="2MiB", k_codec="int8", key_centring=centring).fingerprint
        for centring in ("auto", "off")
    }
    assert len(plain) == 1  # no rotated key, no centre


def test_planes_are_read_per_layer_and_side_and_come_back_bit_equal(biased, start):
    nested = start(biased, k_codec="n8_rh", v_codec="n8_rh")
    whole = logprobs(nested)
    last = len(biased.spec.layers) - 1
    with reading_planes(nested, {last: (1, 2)}):
        one_side = logprobs(nested)
    narrow = start(biased, k_codec="n8_rh", v_codec="n8_rh", layer_codecs={last: ("n4_rh", "n8_rh")})
    assert torch.equal(one_side, logprobs(narrow))
    assert not torch.equal(one_side, whole)
    assert torch.equal(logprobs(nested), whole)


def test_what_was_cached_under_fewer_planes_is_not_hit_under_more(biased, start):
    engine = start(biased, k_codec="n8_rh", v_codec="n8_rh")
    prompt = list(range(8, 78))
    with reading_planes(engine, dict.fromkeys(engine.attention_layers, (1, 1))):
        engine.generate([prompt], GREEDY)
    assert engine.generate([prompt], GREEDY)[0].num_cached_tokens == 0


def test_planes_that_are_not_there_are_refused(biased, start):
    engine = start(biased, k_codec="n8_rh", v_codec="int4")
    for planes, words in (
        ({0: (1, 1)}, "v of layer 0 is stored as int4, which has no second plane"),
        ({0: (3, 2)}, "has 1 or 2 planes to read, found 3"),
        ({99: (1, 2)}, "layer 99 has no KV cache"),
    ):
        with pytest.raises(UsageError, match=words), reading_planes(engine, planes):
            pass
    engine.add_request("a", [5, 6, 7], GREEDY)
    with pytest.raises(UsageError, match="finish or abort"), reading_planes(engine, {0: (1, 2)}):
        pass


def test_memory_counts_every_plane(biased, start):
    engine = start(biased, kv_budget="1MiB", k_codec="n8_rh", v_codec="int4_rh")
    engine.add_request("a", list(range(8, 60)), GREEDY)
    engine.step()
    memory = engine.memory()
    assert memory.allocated_bytes == memory.predicted_allocated_bytes
    assert memory.referenced_bytes == memory.predicted_referenced_bytes > 0


def greedy_with_pause(engine, pause) -> list[tuple[int, ...]]:
    """Tokens of two requests; `pause(engine)` runs when both are half-way."""
    for name, start_id in (("a", 8), ("b", 40)):
        engine.add_request(name, list(range(start_id, start_id + 60)), SamplingParams(
            max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=5))  # fmt: skip
    outputs = {}
    for step in range(40):
        if step == 6:
            pause(engine)
        for output in engine.step():
            outputs[output.request_id] = output
    return [(name, outputs[name].token_ids, outputs[name].logprobs) for name in ("a", "b")]


def all_planes(engine):
    return [low for layer in engine.attention_layers.values() for low in layer.cache.low_planes.values()]


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_planes_dropped_and_restored_during_a_run_leave_no_trace(biased, start, kernel):
    def spill_and_return(engine):
        for low in all_planes(engine):
            blocks = torch.arange(low.num_blocks)
            planes = low.drop(blocks)
            low.resize(0)  # the memory is the machine's again
            assert low.nbytes == 0
            low.resize(len(blocks))
            low.restore(blocks, planes)

    def drop(engine):
        for low in all_planes(engine):
            low.discard(torch.arange(low.num_blocks))
            low.resize(0)

    def run(pause):
        engine = start(biased, config={"kernel": kernel}, kv_budget="1MiB", k_codec="n8_rh", v_codec="n8_rh")
        return greedy_with_pause(engine, pause)

    whole = run(lambda engine: None)
    assert run(spill_and_return) == whole
    assert run(drop) != whole  # goes on at 4 bits, to the end
