"""Low planes come and go; what they say stays the same, bit for bit."""

import pytest
import torch
from paged_case import make_case, random_query
from test_write_bytes import native

from kvtune.codecs import write_kv
from kvtune.errors import UsageError
from kvtune.kernels import LayerCache, LowPlanes, choose_backend, copy_blocks, gather_kv, paged_attention
from kvtune.spec import PackedLayout

ISAS = ["reference", "torch", "avx512", "avx2", "portable"]


def backend_of(isa):
    return choose_backend(isa) if isa in ("reference", "torch") else native(isa)


def nested_case(**changes):
    return make_case([100, 333], k_codec="n8_rh", v_codec="n8_rh", group=4, **changes)


def attend(case, q, backend, **masking):
    return paged_attention(q, case.cache, case.batch([2, 3]), scale=case.scale, backend=backend, **masking)


def limit(backend) -> float:
    return 6e-4 if backend.isa == "avx512" else 2e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sides", ["k", "v", "kv"])
def test_dropping_and_restoring_gives_the_same_bits(isa, sides):
    backend = backend_of(isa)
    case = nested_case(first_codec="bf16")
    q = random_query(case, 5)
    before = attend(case, q, backend)
    blocks = case.tables[1][1:9].tolist()
    kept = {side: case.cache.low_planes[side].drop(blocks) for side in sides}
    dropped = attend(case, q, backend)
    assert torch.equal(dropped[:2], before[:2])  # the other sequence has its planes
    assert not torch.equal(dropped[2:], before[2:])
    for side, planes in kept.items():
        case.cache.low_planes[side].restore(blocks, planes)
    assert torch.equal(attend(case, q, backend), before)


@pytest.mark.parametrize("isa", ISAS)
def test_reading_one_plane_is_reading_the_four_bit_codec(isa):
    backend = backend_of(isa)
    nested = nested_case()
    narrow = make_case([100, 333], k_codec="n4_rh", v_codec="n4_rh", group=4)
    q = random_query(nested, 5)
    both = attend(nested, q, backend)
    nested.cache.k_planes = nested.cache.v_planes = 1
    assert torch.equal(attend(nested, q, backend), attend(narrow, q, backend))
    ids = nested.tables[1]
    for found, expected in zip(gather_kv(nested.cache, ids, 333, backend=backend),
                               gather_kv(narrow.cache, ids, 333, backend=backend), strict=True):  # fmt: skip
        assert torch.equal(found, expected)
    nested.cache.k_planes = nested.cache.v_planes = 2
    assert torch.equal(attend(nested, q, backend), both)


@pytest.mark.parametrize("isa", ISAS)
def test_one_side_at_a_time_changes_that_side_alone(isa):
    case = nested_case()
    ids, backend = case.tables[0], backend_of(isa)
    k2, v2 = gather_kv(case.cache, ids, 100, backend=backend)
    case.cache.k_planes = 1
    k1, v1 = gather_kv(case.cache, ids, 100, backend=backend)
    assert torch.equal(v1, v2)
    assert 0.05 < (k1 - k2).square().mean().sqrt() < 0.15
    case.cache.k_planes, case.cache.v_planes = 2, 1
    k1, v1 = gather_kv(case.cache, ids, 100, backend=backend)
    assert torch.equal(k1, k2)
    assert 0.05 < (v1 - v2).square().mean().sqrt() < 0.15


@pytest.mark.parametrize("isa", ISAS[1:])
def test_every_backend_reads_a_mixture_of_planes_alike(isa):
    backend = backend_of(isa)
    case = nested_case(first_codec="bf16", head_dim=80)
    case.cache.low_planes["k"].discard(case.tables[1][2::3].tolist())
    case.cache.low_planes["v"].discard(case.tables[1][1::2].tolist())
    q = random_query(case, 5)
    for masking in ({}, {"window": 90}, {"softcap": 12.0}):
        expected = attend(case, q, choose_backend("reference"), **masking)
        assert (attend(case, q, backend, **masking) - expected).abs().max() < limit(backend)
    for found, expected in zip(gather_kv(case.cache, case.tables[1], 333, backend=backend),
                               gather_kv(case.cache, case.tables[1], 333), strict=True):  # fmt: skip
        assert torch.equal(found, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_a_block_without_a_row_keeps_what_is_written_at_four_bits(isa):
    backend = backend_of(isa)
    layout = PackedLayout(
        block_size=16, num_kv_heads=2, k_head_dim=64, v_head_dim=64, k_codec="n8_rh", v_codec="n8_rh"
    )
    narrow = PackedLayout(
        block_size=16, num_kv_heads=2, k_head_dim=64, v_head_dim=64, k_codec="n4_rh", v_codec="n4_rh"
    )
    cache, other = LayerCache.allocate(layout, 3), LayerCache.allocate(narrow, 3)
    for low in cache.low_planes.values():
        low.discard([1])
        low.resize(2)
    k, v = torch.randn(48, 2, 64), torch.randn(48, 2, 64)
    for target in (cache, other):
        write_kv(target, k, v, torch.arange(48), backend=backend)
    assert torch.equal(cache.arena, other.arena)
    whole, high = gather_kv(cache, torch.tensor([0, 1, 2]), 48), gather_kv(other, torch.tensor([0, 1, 2]), 48)
    for mine, theirs in zip(whole, high, strict=True):
        assert torch.equal(mine[16:32], theirs[16:32])
        assert not torch.equal(mine[:16], theirs[:16])


def test_rows_are_freed_reused_and_given_back_to_the_machine():
    case = nested_case()
    low, n = case.cache.low_planes["k"], case.cache.num_blocks
    before = gather_kv(case.cache, case.tables[1], 333)
    size = case.cache.nbytes
    used = case.tables[1].tolist()
    spare = [b for b in range(n) if b not in used]
    low.discard(spare)
    assert (low.num_free, low.is_resident(used).all(), low.is_resident(spare).any()) == (
        len(spare),
        True,
        False,
    )
    low.resize(len(used))
    assert case.cache.nbytes == size - len(spare) * low.plane_bytes
    with pytest.raises(UsageError, match=f"{len(used)} low planes are in use"):
        low.resize(len(used) - 1)
    with pytest.raises(UsageError, match="1 blocks need a low plane, 0 rows are free"):
        low.attach(spare[:1])
    assert torch.equal(gather_kv(case.cache, case.tables[1], 333)[0], before[0])
    low.resize(n)
    low.attach(spare)
    assert (low.num_free, bool(low.is_resident(range(n)).all())) == (0, True)
    assert torch.equal(gather_kv(case.cache, case.tables[1], 333)[0], before[0])


def test_copied_blocks_take_their_planes_with_them():
    case = nested_case()
    cache, (a, b, c) = case.cache, case.tables[1][:3].tolist()
    low = cache.low_planes["k"]
    low.discard([a])
    copy_blocks(cache, [a], [c])  # without its plane: the copy has none
    assert not low.is_resident([c]).item()
    k = gather_kv(cache, torch.tensor([a, c]), 32)[0]
    assert torch.equal(k[:16], k[16:])
    copy_blocks(cache, [b], [c])  # with its plane, into a free row
    assert low.is_resident([c]).item()
    k = gather_kv(cache, torch.tensor([b, c]), 32)[0]
    assert torch.equal(k[:16], k[16:])


def test_what_is_not_there_cannot_be_dropped_or_restored_wrongly():
    low = LowPlanes(4, 64)
    low.drop([1])
    for verb, words in (
        (lambda: low.drop([1]), "block 1 has no low plane"),
        (lambda: low.read([0, 1]), "block 1 has no low plane"),
        (lambda: low.drop([7]), r"block ids must lie in 0\.\.3, found 7\.\.7"),
        (lambda: low.drop([2, 2]), "named twice"),
        (lambda: low.restore([1], torch.zeros(1, 32, dtype=torch.uint8)), r"planes must be uint8 \[1, 64\]"),
    ):
        with pytest.raises(UsageError, match=words):
            verb()
    assert low.is_resident([0, 2, 3]).all()


def test_a_cache_without_its_planes_is_refused():
    layout = PackedLayout(
        block_size=16, num_kv_heads=2, k_head_dim=64, v_head_dim=64, k_codec="n8_rh", v_codec="int8"
    )
    arena = torch.zeros(3, layout.arena_bytes, dtype=torch.uint8)
    with pytest.raises(UsageError, match="k_low must hold planes of 1024 bytes for 3 blocks, found 0 bytes"):
        LayerCache(arena, layout)
    with pytest.raises(UsageError, match="the first arena has no low planes"):
        LayerCache.allocate(layout, 3, first_layout=layout, num_first_blocks=1)
    assert LayerCache.allocate(layout, 3).nbytes == 3 * layout.block_bytes
