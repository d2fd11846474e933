"""The fused forward pass computes what Transformers' modules compute, in fewer operations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvtune import EngineConfig
from kvtune.engine import load_model
from kvtune.engine.decoder import FUSED_FAMILIES, PackedProjection, can_pack, fused_decoder
from kvtune.engine.layer_ops import (
    HeadNorms,
    Heads,
    NativeLayerOps,
    TorchLayerOps,
    layer_ops,
    library_path,
)
from kvtune.errors import HostError
from kvtune.target import ScoreItem
from kvtune.testing.models import SERVED_FAMILIES, write_model_folder

FUSED = ("llama", "qwen2", "qwen3", "mistral")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
needs_native = pytest.mark.skipif(library_path() is None, reason="the native layers are not built")


@pytest.fixture
def native() -> NativeLayerOps:
    path = library_path()
    assert path is not None
    return NativeLayerOps(path)


def _random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _assert_close(mine: torch.Tensor, torchs: torch.Tensor) -> None:
    assert mine.dtype == torchs.dtype
    tolerance = TOLERANCE[mine.dtype]
    torch.testing.assert_close(mine, torchs, rtol=tolerance, atol=tolerance * 0.01)


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 16), (5, 37), (64, 768)])
class TestNativeOperationsEqualTorch:
    def test_norm_after_adding_to_the_residual(self, native, dtype, rows, dim):
        delta, weight = _random(rows, dim, dtype=dtype, seed=1), _random(dim, dtype=dtype, seed=2)
        for added in (delta, None):
            mine, torchs = (_random(rows, dim, dtype=dtype, scale=3.0) for _ in range(2))
            out = native.add_norm(mine, added, weight, 1e-5)
            expected = TorchLayerOps().add_norm(torchs, added, weight, 1e-5)
            assert torch.equal(mine, torchs)
            _assert_close(out, expected)

    def test_gated_activation(self, native, dtype, rows, dim):
        gate_up = _random(rows, 2 * dim, dtype=dtype, scale=20.0)
        _assert_close(native.silu_mul(gate_up), TorchLayerOps().silu_mul(gate_up))


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [Heads(1, 1, 2), Heads(4, 2, 80), Heads(8, 1, 128)])
@pytest.mark.parametrize("has_norms", [False, True])
def test_native_rotation_of_split_heads_equals_torchs(native, dtype, heads, has_norms):
    qkv = _random(7, (heads.num_heads + 2 * heads.num_kv_heads) * heads.dim, dtype=dtype)
    angle = torch.linspace(-9, 9, 7 * (heads.dim // 2)).view(7, -1).repeat(1, 2)
    norms = None
    if has_norms:
        norms = HeadNorms(
            _random(heads.dim, dtype=dtype, seed=1), _random(heads.dim, dtype=dtype, seed=2), 1e-6
        )
    mine = native.split_rope(qkv, angle.cos(), angle.sin(), heads, norms)
    torchs = TorchLayerOps().split_rope(qkv, angle.cos(), angle.sin(), heads, norms)
    for one, other in zip(mine, torchs, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(mine[2], torchs[2])


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_infinity_and_nan_stay_in_their_row_and_element(native, dtype):
    gate_up = torch.ones(3, 8, dtype=dtype)
    gate_up[1, 0], gate_up[1, 1], gate_up[1, 2] = torch.nan, torch.inf, -torch.inf
    out = native.silu_mul(gate_up)
    torch.testing.assert_close(out, TorchLayerOps().silu_mul(gate_up), equal_nan=True)
    assert out[1, 0].isnan() and out[1, 1].isposinf() and out[[0, 2]].isfinite().all()
    normed = native.add_norm(gate_up.clone(), None, torch.ones(8, dtype=dtype), 1e-5)
    assert normed[1].isnan().any() and normed[[0, 2]].isfinite().all()


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_rows_bits_depend_neither_on_its_neighbours_nor_on_threads(native, dtype):
    gate_up = _random(300, 512, dtype=dtype)
    whole = native.silu_mul(gate_up)
    torch.set_num_threads(2)
    try:
        assert torch.equal(native.silu_mul(gate_up), whole)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(native.silu_mul(gate_up[17:18].contiguous()), whole[17:18])


def test_a_library_that_does_not_load_is_one_clear_line(tmp_path):
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(HostError, match="do not load"):
        NativeLayerOps(tmp_path / "broken.so")


def test_other_dtypes_take_torch():
    assert isinstance(layer_ops(torch.float16), TorchLayerOps)
    assert isinstance(layer_ops(torch.float32, native=False), TorchLayerOps)


@pytest.mark.parametrize("family", SERVED_FAMILIES)
def test_known_families_are_fused_and_others_run_through_transformers(tmp_path, family):
    loaded = load_model(write_model_folder(tmp_path, family))
    assert (loaded.decoder is not None) == (family in FUSED)
    assert (type(loaded.model).__name__ in FUSED_FAMILIES) == (family in FUSED)


def _scores(engine, tokens) -> np.ndarray:
    item = ScoreItem(item_id="x", prompt_token_ids=tuple(tokens[:5]), continuation=tuple(tokens[5:]))
    return engine.score([item], num_top=211, chunk=48)[0].logprobs


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("family", FUSED)
def test_the_fused_pass_scores_like_transformers(tmp_path, make_engine, family, kernel):
    """Biases, norms of heads, windows; head dims that are no multiple of 16."""
    loaded = load_model(write_model_folder(tmp_path, family, head_dim=80))
    tokens = np.random.default_rng(0).integers(3, 211, 150).tolist()
    settings = {"cache": {"k_codec": "fp32", "v_codec": "fp32"}, "config": {"kernel": kernel}}
    fused = _scores(make_engine(loaded, **settings), tokens)
    plain = _scores(make_engine(dataclasses.replace(loaded, decoder=None), **settings), tokens)
    np.testing.assert_allclose(fused, plain, atol=1e-4)


def test_scaled_rope_and_a_tied_head_are_the_models_own(tmp_path, make_engine):
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = write_model_folder(tmp_path, "llama", rope_parameters=rope, tie_word_embeddings=True)
    loaded = load_model(folder)
    assert loaded.decoder is not None
    tokens = np.random.default_rng(0).integers(3, 211, 150).tolist()
    settings = {"cache": {"k_codec": "fp32", "v_codec": "fp32"}}
    fused = _scores(make_engine(loaded, **settings), tokens)
    plain = _scores(make_engine(dataclasses.replace(loaded, decoder=None), **settings), tokens)
    np.testing.assert_allclose(fused, plain, atol=1e-4)


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_fused_logits_of_a_token_have_the_same_bits_in_every_chunking(llama, make_engine, kernel):
    tokens = np.random.default_rng(1).integers(3, 211, 120).tolist()
    item = ScoreItem(item_id="x", prompt_token_ids=tuple(tokens[:5]), continuation=tuple(tokens[5:]))
    engine = make_engine(llama, config={"kernel": kernel, "pad_rows": 16})
    first, second = (engine.score([item], num_top=211, chunk=chunk)[0].logprobs for chunk in (16, 112))
    if kernel == "auto":  # torch's attention promises no bits
        assert np.array_equal(first, second)
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_a_model_with_hooks_runs_through_its_modules(llama_folder):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, attn_implementation="eager")
    model.model.layers[0].mlp.register_forward_hook(lambda *args: 2.0 * args[-1])
    assert load_model(model).decoder is None


def test_a_fused_pass_that_would_differ_is_not_used(llama_folder, monkeypatch):
    split_rope = TorchLayerOps.split_rope
    monkeypatch.setattr(
        "kvtune.engine.decoder.layer_ops", lambda _: _Swapped(split_rope)  # queries and keys change places
    )  # fmt: skip
    assert load_model(llama_folder).decoder is None


class _Swapped(TorchLayerOps):
    def __init__(self, split_rope) -> None:
        self._split_rope = split_rope

    def split_rope(self, qkv, cos, sin, heads, norms):
        return self._split_rope(self, qkv, sin, cos, heads, norms)


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="oneDNN packs no bfloat16 here")
class TestPackedWeights:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        return write_model_folder(tmp_path_factory.mktemp("bf16"), "qwen2", dtype=torch.bfloat16)

    def test_modules_of_a_folders_model_keep_no_second_copy_and_still_run(self, folder, make_engine):
        loaded = load_model(folder)
        attention = loaded.model.model.layers[0].self_attn
        assert isinstance(attention.k_proj, PackedProjection)
        assert not [name for name, _ in loaded.model.named_parameters() if "proj.weight" in name]
        original = AutoModelForCausalLM.from_pretrained(folder)
        x = _random(1, 5, 64, dtype=torch.bfloat16)
        expected = original.model.layers[0].self_attn.k_proj(x)
        torch.testing.assert_close(attention.k_proj(x), expected, rtol=0.02, atol=0.02)

    def test_a_users_model_object_keeps_its_weights(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        loaded = load_model(model)
        assert loaded.decoder is not None
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    def test_generation_goes_on_like_transformers_within_sixteen_bit_rounding(self, folder, make_engine):
        loaded = load_model(folder)
        tokens = np.random.default_rng(0).integers(3, 211, 100).tolist()
        fused = _scores(make_engine(loaded), tokens)
        exact = _scores(make_engine(load_model(folder, EngineConfig(dtype="float32"))), tokens)
        error = np.abs(np.exp(fused) - np.exp(exact)).sum(axis=1).mean() / 2
        assert error < 0.05  # total variation of the next token's distribution


def test_a_fused_decoder_shares_float32_weights_with_the_modules(llama_folder):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, attn_implementation="eager")
    assert fused_decoder(model) is not None
    attention = model.model.layers[0].self_attn
    storages = {getattr(attention, n).weight.untyped_storage().data_ptr() for n in ("q_proj", "k_proj")}
    assert len(storages) == 1
