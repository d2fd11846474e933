"""Fast kernels mean what the reference means, and the reference means attention."""

import pytest
import torch
from paged_case import make_case, random_query
from test_write_bytes import native

from kvtune.codecs import CODECS
from kvtune.errors import UsageError
from kvtune.kernels import choose_backend, paged_attention

REFERENCE = choose_backend("reference")
TORCH = choose_backend("torch")
CONTEXTS = [1, 15, 16, 17, 100, 515]
PAIRS = sorted({*((c, c) for c in CODECS), *((c, "int8") for c in CODECS), *(("int4", c) for c in CODECS),
                ("int4_rh", "n8_rh"), ("n8_rh", "bf16"), ("n4_rh", "int4_rh")})  # fmt: skip
MASKINGS = ["plain", "window", "softcap", "sinks", "all"]
TOLERANCE = {"exact": 2e-5, "fixed": 6e-4}
"""`exact`: float32 against float32. `fixed`: integer codes times 16-bit fixed point (avx512)."""


def masking(name: str, num_heads: int) -> dict:
    window = {"window": 37} if name in ("window", "all") else {}
    softcap = {"softcap": 15.0} if name in ("softcap", "all") else {}
    sinks = {"sinks": torch.linspace(-2, 4, num_heads)} if name in ("sinks", "all") else {}
    return {**window, **softcap, **sinks}


def tolerance(isa: str | None, *codecs: str) -> float:
    fixed = (isa or "").startswith("avx512") and any(c.startswith(("int", "n")) for c in codecs)
    return TOLERANCE["fixed" if fixed else "exact"]


def attend(case, q, batch, backend, **kwargs):
    return paged_attention(q, case.cache, batch, scale=case.scale, backend=backend, **kwargs)


def assert_close(found, expected, limit):
    assert found.isfinite().all()
    assert (found - expected).abs().max() < limit


@pytest.mark.parametrize("name", MASKINGS)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_reference_is_dense_attention_over_the_decoded_cache(name, head_dim):
    for k_codec, v_codec in (("fp32", "fp32"), ("int8", "int4"), ("bf16", "fp16")):
        case = make_case(
            CONTEXTS, k_codec=k_codec, v_codec=v_codec, group=4, head_dim=head_dim, v_head_dim=96
        )
        kwargs = masking(name, case.num_heads)
        rows = [1, 3, 16, 17, 40, 1]
        q = random_query(case, sum(rows))
        out = attend(case, q, case.batch(rows), REFERENCE, **kwargs)
        start = 0
        for s, n in enumerate(rows):
            expected = case.dense(s, q[start : start + n], **kwargs)
            assert (out[start : start + n] - expected).abs().max() < 5e-6
            start += n


@pytest.mark.parametrize("isa", ["torch", "avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("codecs", PAIRS, ids="-".join)
def test_every_codec_pair_agrees_with_the_reference(isa, codecs):
    backend = TORCH if isa == "torch" else native(isa)
    case = make_case([1, 15, 17, 515], k_codec=codecs[0], v_codec=codecs[1], group=4, first_codec="bf16")
    rows = [1, 2, 17, 1]
    q = random_query(case, sum(rows) + 2)
    for name in ("plain", "all"):
        kwargs = masking(name, case.num_heads)
        expected = attend(case, q, case.batch(rows), REFERENCE, **kwargs)
        found = attend(case, q, case.batch(rows), backend, **kwargs)
        assert_close(found, expected, tolerance(backend.isa, *codecs, "bf16"))
        assert torch.equal(found[sum(rows) :], torch.zeros_like(found[sum(rows) :]))


@pytest.mark.parametrize("isa", ["torch", "avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 12])
def test_every_head_dim_and_group_agrees_with_the_reference(isa, head_dim, group):
    backend = TORCH if isa == "torch" else native(isa)
    for codecs in (
        ("fp32", "fp32"),
        ("int8", "int8"),
        ("int4", "bf16"),
        ("n8_rh", "n8_rh"),
        ("int4_rh", "fp8"),
    ):
        case = make_case(CONTEXTS, k_codec=codecs[0], v_codec=codecs[1], group=group, head_dim=head_dim)
        rows = [1] * len(CONTEXTS)
        q = random_query(case, len(rows))
        expected = attend(case, q, case.batch(rows), REFERENCE)
        found = attend(case, q, case.batch(rows), backend)
        assert_close(found, expected, tolerance(backend.isa, *codecs))


@pytest.mark.parametrize("isa", ["torch", "avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("name", MASKINGS)
@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_windows_caps_and_sinks_agree_with_the_reference(isa, name, block_size):
    backend = TORCH if isa == "torch" else native(isa)
    case = make_case(CONTEXTS, k_codec="int8", v_codec="bf16", block_size=block_size, first_codec="fp16")
    kwargs = masking(name, case.num_heads)
    rows = [1, 15, 2, 17, 99, 130]
    q = random_query(case, sum(rows))
    expected = attend(case, q, case.batch(rows), REFERENCE, **kwargs)
    assert_close(
        attend(case, q, case.batch(rows), backend, **kwargs), expected, tolerance(backend.isa, "int8")
    )


@pytest.mark.parametrize("isa", ["reference", "torch", "avx512_bf16", "avx512", "avx2", "portable"])
def test_blocks_that_left_the_window_are_never_read(isa):
    backend = choose_backend(isa) if isa in ("reference", "torch") else native(isa)
    case = make_case([300], k_codec="int8", v_codec="int8")
    q = random_query(case, 1)
    expected = attend(case, q, case.batch([1]), REFERENCE, window=40)
    batch = case.batch([1])
    batch.block_table[0, : (300 - 40) // 16] = -1
    assert_close(attend(case, q, batch, backend, window=40), expected, tolerance(backend.isa, "int8"))


@pytest.mark.parametrize("isa", ["reference", "torch", "avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("codec", CODECS)
def test_nan_in_one_sequence_never_reaches_another(isa, codec):
    backend = choose_backend(isa) if isa in ("reference", "torch") else native(isa)
    clean = make_case([40, 50, 33], k_codec=codec, v_codec=codec)
    dirty = make_case([40, 50, 33], k_codec=codec, v_codec=codec)
    for id_ in dirty.tables[1]:
        dirty.cache.arena[id_] = 0xFF
    q = random_query(clean, 3)
    expected = attend(clean, q, clean.batch([1, 1, 1]), backend)
    found = attend(dirty, q, dirty.batch([1, 1, 1]), backend)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert found[1].isnan().any()


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_a_query_or_key_that_is_not_finite_shows_in_its_row_alone(isa):
    backend = native(isa)
    for codec in ("fp32", "int8", "int4"):
        case = make_case([40, 50], k_codec=codec, v_codec=codec)
        q = random_query(case, 2)
        expected = attend(case, q, case.batch([1, 1]), backend)
        for bad in (torch.nan, torch.inf):
            broken = q.clone()
            broken[1, 0, 3] = bad
            found = attend(case, broken, case.batch([1, 1]), backend)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1, 1:], expected[1, 1:])
            assert not found[1, 0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_query_dtype(dtype):
    case = make_case([100], k_codec="int8", v_codec="int8", group=4)
    q = random_query(case, 5).to(dtype)
    expected = attend(case, q.float(), case.batch([5]), REFERENCE)
    for backend in (TORCH, REFERENCE, choose_backend("auto")):
        found = attend(case, q, case.batch([5]), backend)
        assert found.dtype == dtype
        assert (found.float() - expected).abs().max() < 0.03


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("codec", CODECS)
def test_native_rows_have_the_same_bits_whatever_runs_beside_them(isa, codec):
    backend = native(isa)
    L = 1333  # spans two of the parts that are reduced by themselves
    case = make_case([L, 200], k_codec=codec, v_codec=codec, group=3, head_dim=80)
    q = random_query(case, L)
    whole = attend(case, q, case.batch([L], [0]), backend, window=1100)
    chunks = [
        attend(
            case,
            q[a : min(a + 100, L)],
            case.batch([min(100, L - a)], [0], [min(a + 100, L)]),
            backend,
            window=1100,
        )
        for a in range(0, L, 100)
    ]
    assert torch.equal(torch.cat(chunks), whole)
    for end in (1, 64, 65, 1024, 1025, L):
        row = attend(case, q[end - 1 : end], case.batch([1], [0], [end]), backend, window=1100)
        assert torch.equal(row[0], whole[end - 1])
    packed = attend(case, torch.cat((q[:7], q[-1:])), case.batch([7, 1], [1, 0]), backend, window=1100)
    assert torch.equal(packed[7], whole[-1])


def test_thread_count_does_not_change_a_bit():
    backend = native("auto")
    case = make_case([5000, 30], k_codec="int8", v_codec="int4", group=4)
    q = random_query(case, 2)
    expected = attend(case, q, case.batch([1, 1]), backend)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(attend(case, q, case.batch([1, 1]), backend), expected)


def test_log_sum_exp_is_that_of_the_scores():
    library = native("auto").library
    from kvtune.kernels.reference import Masking

    case = make_case([77], group=2, head_dim=32)
    q = random_query(case, 1)
    sinks = torch.randn(case.num_heads)
    lse = torch.empty(1, case.num_heads)
    library.attention(q, case.cache, case.batch([1]), Masking(case.scale, None, None, sinks), lse)
    from kvtune.kernels import gather_kv

    k, _ = gather_kv(case.cache, case.tables[0], 77)
    scores = torch.einsum("hd,thd->ht", q[0], k.repeat_interleave(2, 1)) * case.scale
    expected = torch.cat((scores, sinks.unsqueeze(1)), 1).logsumexp(1)
    assert (lse[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_are_read_where_they_lie(isa, dtype):
    """A view of [H, n, d], as a model hands it over; the output is contiguous and rounds like torch."""
    backend = native(isa)
    case = make_case([70, 33], k_codec="int8", v_codec="bf16", group=4, head_dim=72)
    heads_first = random_query(case, 30).to(dtype).transpose(0, 1).contiguous()
    q = heads_first.transpose(0, 1)
    batch = case.batch([20, 6])
    found = attend(case, q, batch, backend)
    assert found.is_contiguous()
    assert found.dtype == dtype
    assert torch.equal(found, attend(case, q.contiguous(), batch, backend))
    assert not found[26:].any()


def test_a_cache_whose_planes_move_is_read_anew():
    backend = native("auto")
    case = make_case([100], k_codec="n8_rh", v_codec="n8_rh")
    q = random_query(case, 1)
    for change in (
        lambda: case.cache.k_low.drop(case.tables[0][:3].tolist()),
        lambda: case.cache.k_low.resize(case.cache.k_low.num_rows - 3),
        lambda: setattr(case.cache, "v_planes", 1),
    ):
        change()
        expected = attend(case, q, case.batch([1]), REFERENCE)
        assert_close(attend(case, q, case.batch([1]), backend), expected, TOLERANCE["fixed"])


def test_a_batch_without_sequences_and_rows_without_tokens_give_zeros():
    case = make_case([20, 20])
    for backend in (REFERENCE, TORCH, choose_backend("auto")):
        empty = attend(case, random_query(case, 3), case.batch([], []), backend)
        assert torch.equal(empty, torch.zeros_like(empty))
        found = attend(case, random_query(case, 2), case.batch([0, 2]), backend)
        assert found.isfinite().all()


def test_queries_that_do_not_fit_are_refused():
    case = make_case([20])
    for backend in (REFERENCE, TORCH, choose_backend("auto")):
        with pytest.raises(UsageError, match="q must be"):
            paged_attention(torch.randn(1, 3, 64), case.cache, case.batch([1]), scale=1.0, backend=backend)
        with pytest.raises(UsageError, match="does not fit"):
            attend(case, random_query(case, 1), case.batch([2]), backend)
