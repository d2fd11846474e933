"""Sequences whose block tables begin alike read that beginning together, and no bit tells."""

import random

import numpy as np
import pytest
import torch
from paged_case import make_case, random_query
from test_parity import TOLERANCE, masking
from test_write_bytes import native

from kvtune.codecs import CODECS
from kvtune.kernels import AttentionBatch, LayerCache, choose_backend, paged_attention
from kvtune.kernels.reference import Masking
from kvtune.sched.shared_reads import SharedReads
from kvtune.spec import PackedLayout

REFERENCE = choose_backend("reference")
ISAS = ["avx512_bf16", "avx512", "avx2", "portable"]
LENGTHS = [1500, 1300, 2200, 700, 90, 1800, 1281]
SHARED = {1: (0, 1280), 2: (0, 1280), 3: (0, 528), 6: (0, 1280), 5: (2, 1700)}
"""sequence -> (whose tokens it begins with, how many): a tree, ends inside a tile, a split and a block."""
ROWS = [1, 2, 8, 1, 1, 3, 1]


def shared_case(lengths=LENGTHS, shared=SHARED, **kwargs):
    case = make_case(lengths, **kwargs)
    block_size = case.cache.layout.block_size
    for s, (owner, num_tokens) in shared.items():
        count = num_tokens // block_size
        case.tables[s][:count] = case.tables[owner][:count]
    return case


def attend(case, q, rows, backend, members=None, **kwargs):
    return paged_attention(
        q, case.cache, case.batch(rows, members), scale=case.scale, backend=backend, **kwargs
    )


def attend_alone(case, q, rows, backend, **kwargs):
    """Every sequence in a call of its own."""
    parts = zip(q[: sum(rows)].split(rows), rows, strict=True)
    outputs = [attend(case, part, [n], backend, [s], **kwargs) for s, (part, n) in enumerate(parts)]
    return torch.cat(outputs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_sequences_that_share_a_prefix_have_the_bits_they_have_alone(isa, codec, name):
    backend = native(isa)
    case = shared_case(k_codec=codec, v_codec=codec, group=2, first_codec="bf16")
    kwargs = {k: v for k, v in masking(name, case.num_heads).items() if k != "window"}
    for dtype in (torch.float32, torch.bfloat16):
        q = random_query(case, sum(ROWS)).to(dtype)
        together = attend(case, q, ROWS, backend, **kwargs)
        assert torch.equal(together, attend_alone(case, q, ROWS, backend, **kwargs))
    expected = attend(case, q.float(), ROWS, REFERENCE, **kwargs)
    assert (attend(case, q.float(), ROWS, backend, **kwargs) - expected).abs().max() < TOLERANCE["fixed"]


def test_what_is_shared_is_read_once():
    """Of a tree the prefixes that save most; nothing little, behind a window or read by a whole chunk."""
    library = native("auto").library
    case = shared_case(k_codec="int8", v_codec="int8", group=1)

    def saved(rows, **masking):
        return library.saved_tokens(case.num_heads, case.cache, case.batch(rows), **masking)

    assert saved(ROWS) == 4 * 1280  # 0, 1, 2, 5 and 6; 3 would cost them 768 tokens each
    assert saved([1, 0, 1, 1, 1, 1, 0]) == max(2 * 1280, 3 * 512)
    assert saved([1, 0, 0, 1, 1, 0, 0]) == 512
    assert saved([1, 0, 90, 0, 1, 90, 0]) == 0
    assert saved(ROWS, window=4096) == 0
    little = shared_case(LENGTHS, {1: (0, 240)}, k_codec="int8", v_codec="int8", group=1)
    assert library.saved_tokens(little.num_heads, little.cache, little.batch(ROWS)) == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "codecs", [("int8", "int8"), ("n8_rh", "int4"), ("bf16", "bf16"), ("int8", "bf16"), ("fp8", "fp8")]
)
def test_rows_enough_for_products_of_bytes_share_no_prefix_that_a_cache_holds(isa, codecs):
    """Four query heads to a KV head: only what decodes codes to floats, or multiplies floats, gains."""
    case = shared_case(k_codec=codecs[0], v_codec=codecs[1], group=4)
    has_byte_products = isa.startswith("avx512") and not {"bf16", "fp8"} & set(codecs)
    saved = native(isa).library.saved_tokens(case.num_heads, case.cache, case.batch(ROWS))
    assert saved == (0 if has_byte_products else 4 * 1280)


def test_they_share_one_that_no_cache_holds():
    library = native("auto").library
    if not library.isa.startswith("avx512"):
        pytest.skip("no products of bytes here")
    layout = PackedLayout(
        block_size=16, num_kv_heads=8, k_head_dim=256, v_head_dim=256, k_codec="int8", v_codec="int8"
    )
    cache = LayerCache.allocate(layout, 1)
    enough = -(-(48 << 20) // layout.block_bytes) + 4

    def saved(num_blocks):
        context = num_blocks * 16 + 5
        tables = torch.zeros(2, num_blocks + 1, dtype=torch.int32)  # one block over and over
        batch = AttentionBatch(
            torch.arange(3, dtype=torch.int32), torch.full((2,), context, dtype=torch.int32), tables,
            torch.full((2,), -1),
        )  # fmt: skip
        return library.saved_tokens(8 * 4, cache, batch)

    assert saved(enough) == enough * 16 // 64 * 64
    assert saved(enough // 2) == 0


@pytest.mark.parametrize(
    "codecs", [("int8", "int8"), ("bf16", "bf16"), ("int8", "fp8"), ("int4_rh", "n8_rh")]
)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_scheduler_knows_what_is_not_read_again(codecs, group):
    """`kvtune.sched.shared_reads` tells the same rule without tensors, for the simulator."""
    backend = native("avx512")
    found: list[int] = []
    for seed in range(6):
        rng = random.Random(seed)
        lengths = [rng.randint(200, 3000) for _ in range(rng.randint(2, 9))]
        shared = {
            s: (owner := rng.randrange(s), rng.randint(0, min(lengths[s], lengths[owner])))
            for s in range(1, len(lengths))
            if rng.random() < 0.8
        }
        case = shared_case(lengths, shared, k_codec=codecs[0], v_codec=codecs[1], group=group)
        layout = case.cache.layout
        rule = SharedReads(
            k_codec=codecs[0], v_codec=codecs[1], block_size=layout.block_size, num_heads=group,
            block_bytes=layout.block_bytes,
        )  # fmt: skip
        tables = [np.array(table, dtype=np.int32) for table in case.tables]
        common = [(length - 1) // layout.block_size for length in lengths]
        batch = case.batch([1] * len(lengths))
        expected = backend.library.saved_tokens(case.num_heads, case.cache, batch)
        assert rule.saved_tokens(tables, common) == expected
        found.append(expected)
    is_byte_product = codecs[0] != "bf16" and codecs[1] != "fp8"
    assert any(found) == (group < 4 or not is_byte_product)


@pytest.mark.parametrize("num_tokens", [240, 512, 528, 1024, 1040, 2048, 2112])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_prefix_may_end_anywhere(num_tokens, group):
    """Below what is worth sharing, at and beside the ends of tiles and of parts reduced by themselves."""
    backend = native("auto")
    lengths = [num_tokens + n for n in (1, 5, 70, 1100, 17)]
    rows = [1, 2, 3, 1, 1]
    shared = dict.fromkeys(range(1, 5), (0, num_tokens))
    case = shared_case(lengths, shared, k_codec="int8", v_codec="n8_rh", group=group)
    q = random_query(case, sum(rows))
    assert torch.equal(attend(case, q, rows, backend), attend_alone(case, q, rows, backend))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit_of_shared_prefixes(threads):
    backend = native("auto")
    for kv_heads in (1, 4):  # fewer tasks than threads want, and more
        case = shared_case(k_codec="int8", v_codec="int4_rh", num_kv_heads=kv_heads, group=2)
        q = random_query(case, sum(ROWS))
        expected = attend_alone(case, q, ROWS, backend)
        torch.set_num_threads(threads)
        assert torch.equal(attend(case, q, ROWS, backend), expected)
        torch.set_num_threads(1)


def test_chunks_windows_and_sequences_without_rows_share_nothing_wrongly():
    backend = native("auto")
    case = shared_case(k_codec="int8", v_codec="int8", group=2)
    rows = [100, 1, 0, 1, 90, 9, 8]
    q = random_query(case, sum(rows))
    for kwargs in ({}, {"window": 300}):
        assert torch.equal(
            attend(case, q, rows, backend, **kwargs), attend_alone(case, q, rows, backend, **kwargs)
        )


def test_equal_block_tables_still_leave_every_row_its_own_key():
    backend = native("auto")
    case = shared_case(
        [2560, 2560, 2560], {1: (0, 2560), 2: (0, 2560)}, k_codec="int8", v_codec="int8", group=2
    )
    q = random_query(case, 5)
    assert torch.equal(attend(case, q, [1, 2, 2], backend), attend_alone(case, q, [1, 2, 2], backend))


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_after_the_prefix_stays_with_its_sequence(isa):
    backend = native(isa)
    clean = shared_case(k_codec="bf16", v_codec="int8", group=2)
    dirty = shared_case(k_codec="bf16", v_codec="int8", group=2)
    for id_ in dirty.tables[1][1280 // 16 :]:
        dirty.cache.arena[id_] = 0xFF
    q = random_query(clean, sum(ROWS))
    expected, found = (attend(case, q, ROWS, backend) for case in (clean, dirty))
    others = torch.ones(sum(ROWS), dtype=torch.bool)
    others[1:3] = False
    assert torch.equal(found[others], expected[others])
    assert found[1:3].isnan().any()
    broken = q.clone()
    broken[1] = torch.nan
    found = attend(clean, broken, ROWS, backend)
    others[2] = True
    assert torch.equal(found[others], expected[others])
    assert found[1].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_block_that_is_not_there_is_told_of_in_a_shared_prefix_too(isa):
    from kvtune.errors import InvariantError

    backend = native(isa)
    case = shared_case(k_codec="int8", v_codec="int8", group=2)
    batch = case.batch(ROWS)
    batch.block_table[[0, 1, 2, 5, 6], 7] = -1
    with pytest.raises(InvariantError, match="block id"):
        paged_attention(random_query(case, sum(ROWS)), case.cache, batch, scale=1.0, backend=backend)


def test_log_sum_exp_of_shared_prefixes_is_that_of_the_rows_alone():
    library = native("auto").library
    case = shared_case(k_codec="int8", v_codec="int8", group=2, head_dim=32)
    q = random_query(case, sum(ROWS))
    plain = Masking(case.scale, None, None, None)
    together, alone = torch.empty(2, sum(ROWS), case.num_heads).unbind(0)
    library.attention(q, case.cache, case.batch(ROWS), plain, together)
    start = 0
    for s, n in enumerate(ROWS):
        library.attention(
            q[start : start + n], case.cache, case.batch([n], [s]), plain, alone[start : start + n]
        )
        start += n
    assert torch.equal(together, alone)
