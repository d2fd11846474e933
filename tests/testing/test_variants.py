"""Variants keep full-precision outputs bit for bit, make codecs struggle, and refuse what they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.errors import InputFileError, UnsupportedModelError, UsageError
from kvtune.quality import divergence, is_bit_equal
from kvtune.target import ScoreItem, Scores
from kvtune.testing.models import tiny_config, write_model_folder
from kvtune.testing.variants import (
    VARIANTS,
    BiasedKeys,
    HeavyTailedValues,
    SlidingWindow,
    Variant,
    transform_model,
    write_variant,
)

VOCAB = 211
DTYPES = (torch.float32, torch.bfloat16)
EXACT = [
    pytest.param("llama", BiasedKeys(), id="biased_keys-llama"),
    pytest.param("llama", HeavyTailedValues(), id="heavy_tailed_values-llama"),
    pytest.param("mistral", HeavyTailedValues(spread=2.0, seed=3), id="heavy_tailed_values-mistral"),
    pytest.param("qwen2", HeavyTailedValues(), id="heavy_tailed_values-qwen2"),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random models by family; queries of the slowest RoPE pair are zero, as in the reference model.

    In bf16 on disk: a float32 file is mapped as it lies, and products depend on their operands' alignment.
    """
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            path = write_model_folder(tmp_path_factory.mktemp(family), family, vocab_size=VOCAB)
            model = AutoModelForCausalLM.from_pretrained(path)
            with torch.no_grad():
                for layer in model.model.layers:
                    rows = layer.self_attn.q_proj.weight.view(4, 32, -1)
                    rows[:, [15, 31]] = 0
            model.to(torch.bfloat16).save_pretrained(path)
            made[family] = path
        return made[family]

    return folder


def _load(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def _tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, count).tolist()


@torch.no_grad()
def _prefill_and_decode(model: PreTrainedModel, ids: list[int], num_prompt: int) -> torch.Tensor:
    """Logits [T, V]: a prefill of the prompt, then one token a step over Transformers' own cache."""
    cache = DynamicCache(config=model.config)
    parts = [model(torch.tensor([ids[:num_prompt]]), past_key_values=cache).logits[0]]
    parts += [model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in ids[num_prompt:]]
    return torch.cat(parts)


def _engine(source: Path, *, k: str, v: str, dtype: str = "float32", kernel: str = "auto") -> Engine:
    return Engine.from_pretrained(
        source,
        cache=CacheConfig(kv_budget="4MiB", k_codec=k, v_codec=v),
        scheduler=SchedulerConfig(max_num_batched_tokens=48),
        config=EngineConfig(dtype=dtype, kernel=kernel),
    )


def _scores(engine: Engine, count: int = 4) -> list[Scores]:
    items = [
        ScoreItem(item_id=f"i{i}", prompt_token_ids=_tokens(70 + i, i), continuation=_tokens(20, 100 + i))
        for i in range(count)
    ]
    return engine.score(items, num_top=VOCAB)


def _mean_kl(one: list[Scores], other: list[Scores]) -> float:
    return float(np.mean([divergence(a, b).kl.mean() for a, b in zip(one, other, strict=True)]))


@pytest.mark.parametrize(("family", "variant"), EXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers_gives_the_same_bits_in_prefill_and_in_decode(
    folder_of, tmp_path, family, variant, dtype
):
    source = folder_of(family)
    written = write_variant(source, tmp_path / "variant", variant)
    one, other = (_prefill_and_decode(_load(path, dtype), _tokens(60), 44) for path in (source, written))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("family", "variant"), EXACT)
@pytest.mark.parametrize(
    ("dtype", "codec"), [("float32", "fp32"), ("float32", "bf16"), ("bfloat16", "fp32"), ("bfloat16", "bf16")]
)
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_the_engine_gives_the_same_bits_from_a_cache_that_stores_what_was_computed(
    folder_of, tmp_path, family, variant, dtype, codec, kernel
):
    source = folder_of(family)
    written = write_variant(source, tmp_path / "variant", variant)
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3)
    answers, scores = [], []
    for path in (source, written):
        with _engine(path, k=codec, v=codec, dtype=dtype, kernel=kernel) as engine:
            outputs = engine.generate([_tokens(50, 1), _tokens(65, 2)], greedy)
            answers.append([(output.token_ids, output.logprobs) for output in outputs])
            scores.append(_scores(engine))
    assert answers[0] == answers[1]
    assert all(is_bit_equal(one, other) for one, other in zip(*scores, strict=True))


def test_a_key_bias_is_what_the_cache_holds(folder_of):
    model = _load(folder_of("llama"), torch.float32)
    variant = transform_model(model, BiasedKeys(sigma=7.0))
    for plain, biased in zip(model.model.layers, variant.model.layers, strict=True):
        bias = biased.self_attn.k_proj.bias.view(2, 32)
        assert (bias[:, [15, 31]] > 0).all()
        assert torch.count_nonzero(bias) == 4
        assert torch.equal(plain.self_attn.k_proj.weight, biased.self_attn.k_proj.weight)


def test_the_bias_is_sigma_deviations_of_the_keys_of_the_given_text(folder_of):
    model = _load(folder_of("llama"), torch.float32)
    ids = _tokens(200, 5)
    keys = []
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda m, a, out: keys.append(out[0])
    )
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    expected = keys[0].view(200, 2, 32).var(0).mean(-1).sqrt()
    biased = transform_model(model, BiasedKeys(sigma=3.0, token_ids=ids))
    found = biased.model.layers[0].self_attn.k_proj.bias.view(2, 32)[:, 15]
    torch.testing.assert_close(found, 3.0 * expected, rtol=1e-5, atol=0)


def test_codecs_lose_more_on_biased_keys_and_four_bits_far_more_than_eight(folder_of, tmp_path):
    source = folder_of("llama")
    written = write_variant(source, tmp_path / "variant", BiasedKeys(sigma=20.0))
    losses = {}
    for name, path in (("plain", source), ("biased", written)):
        with _engine(path, k="fp32", v="fp32") as engine:
            reference = _scores(engine)
        for codec in ("int8", "int4"):
            with _engine(path, k=codec, v="fp32") as engine:
                losses[name, codec] = _mean_kl(reference, _scores(engine))
    assert losses["biased", "int4"] > 4 * losses["plain", "int4"] > 0
    assert losses["biased", "int4"] > 20 * losses["biased", "int8"]


def test_codecs_lose_more_on_heavy_tailed_values(folder_of, tmp_path):
    source = folder_of("llama")
    written = write_variant(source, tmp_path / "variant", HeavyTailedValues(spread=2.0))
    losses = []
    for path in (source, written):
        with _engine(path, k="fp32", v="fp32") as engine:
            reference = _scores(engine)
        with _engine(path, k="fp32", v="int4") as engine:
            losses.append(_mean_kl(reference, _scores(engine)))
    assert losses[1] > 2 * losses[0] > 0


def test_value_channels_are_scaled_by_powers_of_two_with_a_heavy_tail(folder_of):
    model = _load(folder_of("qwen2"), torch.bfloat16)
    variant = transform_model(model, HeavyTailedValues(spread=1.5, max_exponent=6))
    plain, scaled = (m.model.layers[0].self_attn for m in (model, variant))
    factor = (scaled.v_proj.weight.float() / plain.v_proj.weight.float())[:, 0]
    exponents = factor.log2()
    assert torch.equal(exponents, exponents.round())
    assert (exponents.min(), exponents.max()) == (0, 6)
    assert torch.equal(scaled.v_proj.bias, plain.v_proj.bias * factor)


def test_the_sliding_twin_serves_from_two_kv_groups_and_equals_its_own_eager_run(folder_of, tmp_path):
    written = write_variant(folder_of("llama"), tmp_path / "variant", SlidingWindow(window=24))
    ids = _tokens(90, 4)
    with torch.no_grad():
        own = torch.log_softmax(_load(written, torch.float32)(torch.tensor([ids])).logits[0], -1)
        full = torch.log_softmax(_load(folder_of("llama"), torch.float32)(torch.tensor([ids])).logits[0], -1)
    with _engine(written, k="fp32", v="fp32") as engine:
        assert [layer.window for layer in engine.attention_layers.values()] == [24, None]
        assert len({layer.group for layer in engine.attention_layers.values()}) == 2
        item = ScoreItem(item_id="a", prompt_token_ids=ids[:60], continuation=ids[60:])
        found = torch.from_numpy(engine.score([item], num_top=VOCAB)[0].logprobs)
        outputs = engine.generate([ids], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))
    torch.testing.assert_close(found, own[59:-1], rtol=0, atol=1e-4)
    assert (found - full[59:-1]).abs().max() > 0.1  # a model of its own
    assert outputs[0].token_ids == _greedy(_load(written, torch.float32), ids, 6)


@torch.no_grad()
def _greedy(model: PreTrainedModel, ids: list[int], count: int) -> tuple[int, ...]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[-count:])


def test_every_layer_of_a_sliding_twin_may_have_the_window(folder_of):
    twin = transform_model(
        _load(folder_of("llama"), torch.float32), SlidingWindow(window=8, every_other=False)
    )
    assert twin.config.layer_types == ["sliding_attention"] * 2


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_in_memory_becomes_the_same_model_as_its_folder(folder_of, tmp_path, name):
    variant = VARIANTS[name]()
    source = folder_of("llama")
    written = _load(write_variant(source, tmp_path / "variant", variant), torch.float32)
    in_memory = transform_model(_load(source, torch.float32), variant)
    ids = torch.tensor([_tokens(40)])
    with torch.no_grad():
        assert torch.equal(written(ids).logits, in_memory(ids).logits)


def test_the_model_that_was_transformed_is_left_alone(folder_of):
    model = _load(folder_of("llama"), torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    for make in VARIANTS.values():
        transform_model(model, make())
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tied_embeddings_stay_tied(tmp_path):
    folder = write_model_folder(tmp_path / "tied", "llama", vocab_size=VOCAB, tie_word_embeddings=True)
    twin = transform_model(_load(folder, torch.float32), HeavyTailedValues())
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert _load(write_variant(folder, tmp_path / "out", HeavyTailedValues()), torch.float32) is not None


def test_tokenizer_and_template_travel_with_the_weights(folder_of, tmp_path):
    source = folder_of("mistral")
    extra = tmp_path / "source"
    extra.mkdir()
    for file in source.iterdir():
        (extra / file.name).write_bytes(file.read_bytes())
    for name in ("tokenizer.json", "chat_template.jinja"):
        (extra / name).write_text(f"{name} of the model")
    (extra / "README.md").write_text("not the variant's")
    out = write_variant(extra, tmp_path / "out", HeavyTailedValues())
    assert (out / "tokenizer.json").read_text() == "tokenizer.json of the model"
    assert (out / "chat_template.jinja").exists()
    assert not (out / "README.md").exists()


@pytest.mark.parametrize("change", [{}, {"sigma": 0.0}])
def test_queries_that_see_the_biased_pair_are_refused(tmp_path, change):
    folder = write_model_folder(tmp_path / "model", "llama", vocab_size=VOCAB)
    with pytest.raises(UnsupportedModelError, match=r"rows \[15, 31\].*held at zero"):
        write_variant(folder, tmp_path / "out", BiasedKeys(**change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "variant", "words"),
    [
        ("qwen2", BiasedKeys(), "BiasedKeys knows llama; the model is qwen2"),
        ("gemma2", HeavyTailedValues(), "HeavyTailedValues knows .*the model is gemma2"),
        ("mistral", SlidingWindow(), "SlidingWindow knows llama; the model is mistral"),
    ],
)
def test_other_families_are_refused_by_name(family: str, variant: Variant, words: str):
    with pytest.raises(UnsupportedModelError, match=words):
        variant.apply(tiny_config(family).to_dict(), {})


@pytest.mark.parametrize("variant", [BiasedKeys(), SlidingWindow()])
def test_a_model_with_attention_biases_is_refused(variant: Variant):
    with pytest.raises(UnsupportedModelError, match="biases"):
        variant.apply(tiny_config("llama", attention_bias=True).to_dict(), {})


@pytest.mark.parametrize("variant", [BiasedKeys(), HeavyTailedValues()])
def test_weights_without_the_projections_are_refused(variant: Variant):
    with pytest.raises(UnsupportedModelError, match=r"has no weights self_attn\.[qv]_proj"):
        variant.apply(tiny_config("llama").to_dict(), {})


@pytest.mark.parametrize(
    "make",
    [
        lambda: BiasedKeys(sigma=-1.0),
        lambda: BiasedKeys(sigma=float("nan")),
        lambda: BiasedKeys(sigma=float("inf")),
        lambda: BiasedKeys(token_ids=[1, 2]),
        lambda: HeavyTailedValues(spread=0.0),
        lambda: HeavyTailedValues(max_exponent=17),
        lambda: SlidingWindow(window=0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(UsageError, match="found"):
        make()


def test_token_ids_outside_the_vocabulary_are_refused(folder_of, tmp_path):
    with pytest.raises(UsageError, match=r"0\.\.210, found 5\.\.211"):
        write_variant(folder_of("llama"), tmp_path / "out", BiasedKeys(token_ids=[*range(5, 30), 211]))


def test_a_folder_that_holds_files_is_not_overwritten(folder_of, tmp_path):
    source = folder_of("llama")
    with pytest.raises(UsageError, match="new or empty folder"):
        write_variant(source, source, HeavyTailedValues())
    with pytest.raises(InputFileError, match=r"\.safetensors"):
        (tmp_path / "config.json").write_text(json.dumps({}))
        write_variant(tmp_path, tmp_path / "out", HeavyTailedValues())
