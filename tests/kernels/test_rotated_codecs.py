"""Centring and rotating change what is stored, never what attention means."""

import pytest
import torch
from paged_case import dense_attention, make_case, random_query
from test_write_bytes import awkward_tokens, native

from kvtune.codecs import CODECS, write_kv
from kvtune.errors import UsageError
from kvtune.kernels import LayerCache, choose_backend, gather_kv, paged_attention
from kvtune.kernels.rotation import hadamard, rotation_block
from kvtune.spec import CODEC_STORAGE, PackedLayout

REFERENCE = choose_backend("reference")
ROTATED = [name for name, storage in CODEC_STORAGE.items() if storage.is_rotated]
ISAS = ["reference", "torch", "avx512", "avx2", "portable"]
MASKINGS = {"plain": {}, "softcap": {"softcap": 15.0}, "sinks": {"sinks": torch.linspace(-2, 4, 8)}}


def backend_of(isa):
    return choose_backend(isa) if isa in ("reference", "torch") else native(isa)


def far_centre(head_dim: int, num_kv_heads: int = 2, size: float = 20.0) -> torch.Tensor:
    """A few channels far from zero, as key biases have them."""
    centre = torch.zeros(num_kv_heads, head_dim)
    centre[:, [head_dim // 2 - 1, head_dim - 1]] = size
    centre[1, 3] = -size / 2
    return centre


@pytest.mark.parametrize("dim", [8, 64, 72, 80, 96, 128, 256, 512])
def test_the_rotation_is_orthonormal_and_its_own_inverse(dim):
    matrix = hadamard(torch.eye(dim))
    block = rotation_block(dim)
    assert block == min(128, dim & -dim)
    assert torch.allclose(matrix @ matrix, torch.eye(dim), atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    assert ((matrix != 0).sum(-1) == block).all()
    x = torch.randn(7, dim)
    assert torch.allclose(hadamard(x).square().sum(-1), x.square().sum(-1), rtol=1e-5)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_native_writes_and_gathers_centred_keys_bit_for_bit(isa, head_dim):
    backend = native(isa)
    centre = torch.randn(2, head_dim) * 30
    for codec in ROTATED:
        cases = [make_case([5], k_codec=codec, head_dim=head_dim, first_codec="bf16", centre=centre)
                 for _ in range(2)]  # fmt: skip
        caches = [case.cache for case in cases]
        slots = torch.arange((caches[0].num_blocks + 1) * 16)
        k, v = awkward_tokens(len(slots), head_dim), awkward_tokens(len(slots), head_dim, seed=5)
        for cache, chosen in zip(caches, (REFERENCE, backend), strict=True):
            write_kv(cache, k, v, slots, backend=chosen)
        assert torch.equal(caches[0].arena, caches[1].arena), codec
        assert torch.equal(caches[0].first_arena, caches[1].first_arena), codec
        for side, low in caches[0].low_planes.items():
            assert torch.equal(low.arena, caches[1].low_planes[side].arena), codec
        ids = torch.arange(len(slots) // 16)
        pairs = (gather_kv(caches[0], ids, len(slots), backend=chosen) for chosen in (REFERENCE, backend))
        for expected, found in zip(*pairs, strict=True):
            assert torch.equal(expected.nan_to_num(12345.0), found.nan_to_num(12345.0)), codec


@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("first_codec", [None, "bf16", "int4_rh"])
def test_a_centre_is_seen_by_no_score(isa, masking, first_codec):
    """Sinks, soft-caps and a first block of another codec break shift invariance: the centre comes back."""
    backend = backend_of(isa)
    for codec in ROTATED:
        case = make_case(
            [40, 130], k_codec=codec, v_codec=codec, group=4, first_codec=first_codec, centre=far_centre(64)
        )
        q = random_query(case, 6)
        expected = paged_attention(
            q, case.cache, case.batch([2, 4]), scale=case.scale, backend=REFERENCE, **MASKINGS[masking]
        )
        found = paged_attention(
            q, case.cache, case.batch([2, 4]), scale=case.scale, backend=backend, **MASKINGS[masking]
        )
        assert (found - expected).abs().max() < (6e-4 if backend.isa == "avx512" else 2e-5), codec


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("masking", MASKINGS)
def test_centred_keys_attend_like_the_keys_themselves(isa, masking):
    """Against float64 attention over the values that were written, not over what the codec made of them."""
    centre = far_centre(64)
    case = make_case([200], k_codec="n8_rh", v_codec="fp32", group=4, centre=centre)
    plain = make_case([200], k_codec="fp32", v_codec="fp32", group=4, centre=centre)
    q = random_query(case, 3)
    k, v = gather_kv(plain.cache, plain.tables[0], 200)
    expected = dense_attention(q, k, v, scale=case.scale, **MASKINGS[masking])
    found = paged_attention(
        q, case.cache, case.batch([3]), scale=case.scale, backend=backend_of(isa), **MASKINGS[masking]
    )
    assert (found - expected).abs().max() < 0.01
    off_centre = make_case([200], k_codec="n8_rh", v_codec="fp32", group=4, centre=centre)
    off_centre.cache.k_centre = None  # what forgetting it would do
    wrong = paged_attention(
        q, off_centre.cache, off_centre.batch([3]), scale=case.scale, backend=backend_of(isa),
        **MASKINGS[masking],
    )  # fmt: skip
    if masking == "plain":
        assert (wrong - expected).abs().max() < 0.01  # softmax alone is shift-invariant
    else:
        assert (wrong - expected).abs().max() > 0.05


@pytest.mark.parametrize("codec", ROTATED)
def test_the_bound_holds_around_a_centre_and_centring_tightens_it(codec):
    c = CODECS[codec]
    centre = far_centre(64, size=300.0)
    x = torch.randn(500, 2, 64) + centre
    error = (c.decode(c.encode(x, centre), centre) - x).abs().amax(-1)
    assert (error <= c.error_bound(x, centre)).all()
    assert (c.error_bound(x, centre) < c.error_bound(x) / 3).all()


def test_nested_codes_lose_nothing_against_codes_of_their_own_width():
    """Relative error at d = 128 (measured): both planes .0059, int8 .0065; high plane .0957, int4 .0997."""
    x = torch.randn(2000, 2, 128, generator=torch.Generator().manual_seed(0))

    def error(name):
        c = CODECS[name]
        return float((c.decode(c.encode(x)) - x).square().mean().sqrt() / x.square().mean().sqrt())

    assert error("n8_rh") < error("int8")
    assert error("n4_rh") < error("int4") * 1.02
    assert error("n4_rh") < error("int4_rh") * 1.02


def test_a_rotation_spreads_an_outlier_that_ruins_plain_codes():
    x = torch.randn(500, 2, 64, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 30

    def error(name):
        c = CODECS[name]
        return float((c.decode(c.encode(x)) - x)[..., :7].square().mean().sqrt())

    assert error("int4_rh") < error("int4") / 1.5


def test_a_centre_that_does_not_fit_is_refused():
    layout = PackedLayout(
        block_size=16, num_kv_heads=2, k_head_dim=64, v_head_dim=64, k_codec="int4_rh", v_codec="int4"
    )
    for bad in (torch.zeros(64), torch.zeros(2, 64).half(), torch.full((2, 64), torch.nan)):
        with pytest.raises(UsageError, match=r"k_centre must be contiguous finite float32 \[2, 64\]"):
            LayerCache.allocate(layout, 3, k_centre=bad)
