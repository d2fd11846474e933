"""Native code writes and reads exactly the bytes that torch defines."""

import itertools

import pytest
import torch
from paged_case import make_case

from kvtune.codecs import CODECS, write_kv
from kvtune.errors import UsageError
from kvtune.kernels import Backend, LayerCache, choose_backend, copy_blocks, gather_kv
from kvtune.kernels.native import library_path
from kvtune.spec import PackedLayout

REFERENCE = choose_backend("reference")
PAIRS = list(itertools.product(CODECS, CODECS))


def native(isa: str) -> Backend:
    """The native backend, or a skip where it is not built or the machine lacks the instruction set."""
    if library_path() is None:
        pytest.skip("native kernels are not built")
    try:
        return choose_backend("native", isa=isa)
    except UsageError as error:
        pytest.skip(str(error))


def awkward_tokens(n: int, head_dim: int, seed: int = 0) -> torch.Tensor:
    """[n, 2, d] over all magnitudes, with NaN, infinities, zeros and saturation."""
    g = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-130, 120, (n, 2, 1), generator=g).float()
    exponent[n // 2 :] = 0
    x = torch.randn(n, 2, head_dim, generator=g) * exponent.exp2()
    x[3, 0, 5], x[4, 1, 5], x[5, 0, 0] = torch.nan, torch.inf, -torch.inf
    x[6, 0, 1] = -torch.nan
    x[7], x[8], x[9], x[10] = 0.0, -0.0, 65510.0, -70000.0
    x[11], x[12] = x[11].sign() * 3.3e38, x[12].sign() * 1e-45
    return x


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("block_size", [16, 48, 64])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_native_write_is_byte_identical_to_torch(isa, block_size, head_dim):
    backend = native(isa)
    for k_codec, v_codec in PAIRS:
        caches = [
            make_case(
                [5],
                k_codec=k_codec,
                v_codec=v_codec,
                block_size=block_size,
                head_dim=head_dim,
                first_codec="bf16",
            ).cache
            for _ in range(2)
        ]
        limit = (caches[0].num_blocks + 1) * block_size
        slots = torch.randperm(limit, generator=torch.Generator().manual_seed(1))[: limit * 2 // 3]
        slots[::7] = -1
        k, v = awkward_tokens(len(slots), head_dim), awkward_tokens(len(slots), head_dim, seed=5)
        for cache, chosen in zip(caches, (REFERENCE, backend), strict=True):
            write_kv(cache, k, v, slots, backend=chosen)
        assert torch.equal(caches[0].arena, caches[1].arena), (k_codec, v_codec)
        assert torch.equal(caches[0].first_arena, caches[1].first_arena), (k_codec, v_codec)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_native_gather_returns_the_same_floats(isa):
    backend = native(isa)
    for k_codec, v_codec in PAIRS:
        case = make_case([150], k_codec=k_codec, v_codec=v_codec, block_size=32, first_codec="fp16")
        expected = gather_kv(case.cache, case.tables[0], 150)
        found = gather_kv(case.cache, case.tables[0], 150, backend=backend)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_heads_before_tokens_and_other_types_write_the_same_bytes(isa, dtype):
    """As a model hands them over: a view of [h, n, d], which is read where it lies."""
    backend = native(isa)
    for codec in CODECS:
        layout = PackedLayout(
            block_size=16, num_kv_heads=3, k_head_dim=72, v_head_dim=40, k_codec=codec, v_codec=codec
        )
        k, v = torch.randn(3, 50, 72).to(dtype).transpose(0, 1), torch.randn(50, 3, 80).to(dtype)[..., ::2]
        expected, found = LayerCache.allocate(layout, 4), LayerCache.allocate(layout, 4)
        write_kv(expected, k.float().contiguous(), v.float(), torch.arange(50), backend=REFERENCE)
        write_kv(found, k, v, torch.arange(50), backend=backend)
        assert torch.equal(found.arena, expected.arena), codec


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_write_the_same_bytes(threads):
    backend = native("auto")
    layout = PackedLayout(
        block_size=16, num_kv_heads=4, k_head_dim=64, v_head_dim=64, k_codec="int8", v_codec="int4"
    )
    k, v = torch.randn(100, 4, 64), torch.randn(100, 4, 64)
    expected, found = LayerCache.allocate(layout, 7), LayerCache.allocate(layout, 7)
    write_kv(expected, k, v, torch.arange(100), backend=REFERENCE)
    torch.set_num_threads(threads)
    write_kv(found, k, v, torch.arange(100), backend=backend)
    assert torch.equal(found.arena, expected.arena)


@pytest.mark.parametrize("name", ["native", "torch"])
def test_what_is_written_is_what_is_read_for_every_codec(name):
    backend = native("auto") if name == "native" else choose_backend(name)
    for codec_name, c in CODECS.items():
        layout = PackedLayout(
            block_size=32,
            num_kv_heads=2,
            k_head_dim=64,
            v_head_dim=96,
            k_codec=codec_name,
            v_codec=codec_name,
        )
        cache = LayerCache.allocate(layout, 4)
        k, v = torch.randn(70, 2, 64), torch.randn(70, 2, 96)
        slots = torch.tensor([3, 0, 2])[torch.arange(70) // 32] * 32 + torch.arange(70) % 32
        write_kv(cache, k, v, slots, backend=backend)
        got_k, got_v = gather_kv(cache, torch.tensor([3, 0, 2]), 70)
        assert torch.equal(got_k, c.decode(c.encode(k)))
        assert torch.equal(got_v, c.decode(c.encode(v)))


def test_writing_one_token_leaves_every_other_byte_alone():
    for name in ("native", "torch"):
        backend = native("auto") if name == "native" else choose_backend(name)
        case = make_case([64], k_codec="int4", v_codec="int4")
        k0, v0 = gather_kv(case.cache, case.tables[0], 64)
        slot = case.tables[0][1].long().view(1) * 16 + 5  # token 21
        write_kv(case.cache, torch.randn(1, 2, 64), torch.randn(1, 2, 64), slot, backend=backend)
        k1, v1 = gather_kv(case.cache, case.tables[0], 64)
        others = torch.arange(64) != 21
        assert torch.equal(k0[others], k1[others])
        assert torch.equal(v0[others], v1[others])
        assert not torch.equal(k0[21], k1[21])


def test_copied_blocks_hold_the_same_bytes_in_body_and_first_arena():
    case = make_case([20, 20], k_codec="int8", v_codec="int8", first_codec="bf16")
    cache, n = case.cache, case.cache.num_blocks
    copy_blocks(cache, [0, n], [2, n + 1])
    assert torch.equal(cache.arena[2], cache.arena[0])
    assert torch.equal(cache.first_arena[1], cache.first_arena[0])
    with pytest.raises(UsageError, match="copy_blocks"):
        copy_blocks(cache, [0], [n])


def test_slots_and_shapes_that_do_not_fit_are_refused():
    cache = make_case([20]).cache
    x = torch.randn(1, 2, 64)
    with pytest.raises(UsageError, match="slots must lie in"):
        write_kv(cache, x, x, torch.tensor([cache.num_blocks * 16]), backend=REFERENCE)
    with pytest.raises(UsageError, match="k and v must be"):
        write_kv(cache, x[..., :32], x, torch.tensor([0]), backend=REFERENCE)
