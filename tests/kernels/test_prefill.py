"""Many query rows over a paged prefix mean what the reference means, whatever shares a pass over the keys."""

import pytest
import torch
from paged_case import make_case, random_query
from test_parity import MASKINGS, assert_close, masking, tolerance
from test_write_bytes import native

from kvtune.codecs import CODECS
from kvtune.kernels import choose_backend, gather_kv, paged_attention
from kvtune.kernels.reference import Masking

REFERENCE = choose_backend("reference")
ISAS = ["avx512_bf16", "avx512", "avx2", "portable"]


def attend(case, q, batch, backend, **kwargs):
    return paged_attention(q, case.cache, batch, scale=case.scale, backend=backend, **kwargs)


def assert_close_in_bf16(found, expected):
    """Rounding of the output, and of the weights before: both relative, to 8 bits."""
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).abs()
    assert (error <= 2**-7 * expected.abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_chunk_over_a_prefix_agrees_with_the_reference(isa, codec, name):
    """Row counts around the kernel's own (8 rows, 24 for panels, 64 a pass), ends inside and at blocks."""
    backend = native(isa)
    lengths = [5, 70, 64, 1100, 129]
    for group, rows in ((4, [5, 6, 16, 17, 33]), (1, [5, 24, 25, 64, 65])):
        case = make_case(lengths, k_codec=codec, v_codec=codec, group=group, first_codec="bf16")
        q = random_query(case, sum(rows) + 3)
        kwargs = masking(name, case.num_heads)
        expected = attend(case, q, case.batch(rows), REFERENCE, **kwargs)
        found = attend(case, q, case.batch(rows), backend, **kwargs)
        assert_close(found, expected, tolerance(backend.isa, codec, "bf16"))
        assert not found[sum(rows) :].any()
        half = attend(case, q.bfloat16(), case.batch(rows), backend, **kwargs)
        assert_close_in_bf16(half, attend(case, q.bfloat16().float(), case.batch(rows), REFERENCE, **kwargs))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128, 256])
def test_every_head_dim_and_group_agrees_with_the_reference(isa, head_dim):
    backend = native(isa)
    pairs = [("bf16", "bf16"), ("int8", "int4"), ("n8_rh", "fp8"), ("fp16", "n4_rh"), ("int4_rh", "fp32")]
    for group in (1, 4, 8):
        for codecs in pairs:
            case = make_case(
                [150, 41], k_codec=codecs[0], v_codec=codecs[1], group=group, head_dim=head_dim, v_head_dim=96
            )
            q = random_query(case, 80)
            expected = attend(case, q, case.batch([40, 40]), REFERENCE)
            found = attend(case, q, case.batch([40, 40]), backend)
            assert_close(found, expected, tolerance(backend.isa, *codecs))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MASKINGS)
@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_windows_caps_and_sinks_hold_for_every_row_of_a_chunk(isa, name, block_size):
    backend = native(isa)
    case = make_case([300, 90], k_codec="n8_rh", v_codec="int4", block_size=block_size, first_codec="fp16")
    q = random_query(case, 290)
    kwargs = masking(name, case.num_heads)
    expected = attend(case, q, case.batch([200, 90]), REFERENCE, **kwargs)
    found = attend(case, q, case.batch([200, 90]), backend, **kwargs)
    assert_close(found, expected, tolerance(backend.isa, "int8"))


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_outside_the_window_of_a_whole_chunk_are_never_read(isa):
    backend = native(isa)
    case = make_case([400], k_codec="int4", v_codec="int4")
    q = random_query(case, 50)
    expected = attend(case, q, case.batch([50]), REFERENCE, window=40)
    batch = case.batch([50])
    batch.block_table[0, : (350 - 40 + 1) // 16] = -1
    assert_close(attend(case, q, batch, backend, window=40), expected, tolerance(backend.isa, "int8"))


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_with_and_without_their_low_plane_share_a_pass(isa):
    backend = native(isa)
    case = make_case([333], k_codec="n8_rh", v_codec="n8_rh", group=4)
    case.cache.low_planes["k"].drop(case.tables[0][1:9:2].tolist())
    case.cache.low_planes["v"].drop(case.tables[0][2:20:3].tolist())
    q = random_query(case, 100)
    expected = attend(case, q, case.batch([100]), REFERENCE)
    assert_close(attend(case, q, case.batch([100]), backend), expected, tolerance(backend.isa, "int8"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_not_finite_in_one_sequence_never_reaches_another(isa, codec):
    backend = native(isa)
    clean = make_case([90, 70, 33], k_codec=codec, v_codec=codec)
    dirty = make_case([90, 70, 33], k_codec=codec, v_codec=codec)
    for id_ in dirty.tables[1]:
        dirty.cache.arena[id_] = 0xFF
    rows = [60, 40, 0]
    for dtype in (torch.float32, torch.bfloat16):
        q = random_query(clean, sum(rows)).to(dtype)
        expected = attend(clean, q, clean.batch(rows), backend)
        found = attend(dirty, q, dirty.batch(rows), backend)
        assert torch.equal(found[:60], expected[:60])
        assert found[60:].isnan().any()
        for bad in (torch.nan, torch.inf):
            broken = q.clone()
            broken[70, 0, 3] = bad
            found = attend(clean, broken, clean.batch(rows), backend)
            others = torch.arange(sum(rows)) != 70
            assert torch.equal(found[others], expected[others])
            assert torch.equal(found[70, 1:], expected[70, 1:])
            assert not found[70, 0].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS)
def test_bf16_rows_have_the_same_bits_alone_and_in_chunks(isa, codec):
    backend = native(isa)
    length = 1201  # two of the parts that are reduced by themselves
    case = make_case([length], k_codec=codec, v_codec=codec, group=3, head_dim=80, first_codec="bf16")
    q = random_query(case, length).bfloat16()
    whole = attend(case, q, case.batch([length]), backend, window=1100)
    for size in (1, 7, 23, 100):
        end = length - 37
        rows = attend(case, q[end - size : end], case.batch([size], [0], [end]), backend, window=1100)
        assert torch.equal(rows, whole[end - size : end])


@pytest.mark.parametrize("codecs", [("bf16", "bf16"), ("int8", "int4"), ("n8_rh", "n8_rh")], ids="-".join)
def test_thread_count_does_not_change_a_bit_of_a_chunk(codecs):
    backend = native("auto")
    case = make_case([5000, 700], k_codec=codecs[0], v_codec=codecs[1], group=4, num_kv_heads=1)
    for rows in ([30, 1], [300, 200]):  # fewer tasks than threads want, and more
        q = random_query(case, sum(rows))
        torch.set_num_threads(1)
        expected = attend(case, q, case.batch(rows), backend)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(attend(case, q, case.batch(rows), backend), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_log_sum_exp_of_every_row_is_that_of_its_scores(isa):
    library = native(isa).library
    case = make_case([200], group=2, head_dim=32, k_codec="int8", v_codec="int8")
    q = random_query(case, 70)
    lse = torch.empty(70, case.num_heads)
    library.attention(q, case.cache, case.batch([70]), Masking(case.scale, None, None, None), lse)
    k, _ = gather_kv(case.cache, case.tables[0], 200)
    scores = torch.einsum("nhd,thd->nht", q, k.repeat_interleave(2, 1)) * case.scale
    visible = torch.arange(200) <= torch.arange(130, 200)[:, None]
    expected = scores.masked_fill(~visible[:, None], -torch.inf).logsumexp(-1)
    assert (lse - expected).abs().max() < 1e-4
