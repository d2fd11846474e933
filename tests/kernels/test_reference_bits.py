"""A query row's bits depend on nothing but its own sequence (float32, one thread)."""

import pytest
import torch
from paged_case import make_case, random_query

from kvtune.kernels import choose_backend, paged_attention

REFERENCE = choose_backend("reference")
PAIRS = [
    ("fp32", "fp32"),
    ("bf16", "bf16"),
    ("fp16", "fp16"),
    ("int8", "int8"),
    ("int4", "int4"),
    ("int8", "int4"),
]
LENGTH = 333


def run(case, q, batch, **masking):
    return paged_attention(q, case.cache, batch, scale=case.scale, backend=REFERENCE, **masking)


def chunked(case, q, size, **masking):
    out = []
    for start in range(0, LENGTH, size):
        end = min(start + size, LENGTH)
        out.append(run(case, q[start:end], case.batch([end - start], [0], [end]), **masking))
    return torch.cat(out)


@pytest.mark.parametrize("codecs", PAIRS, ids="-".join)
@pytest.mark.parametrize("masking", [{}, {"window": 50}, {"softcap": 20.0}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_chunk_size_does_not_change_a_bit(codecs, masking, head_dim):
    case = make_case([LENGTH], k_codec=codecs[0], v_codec=codecs[1], head_dim=head_dim)
    q = random_query(case, LENGTH)
    whole = chunked(case, q, 320, **masking)
    for size in (16, 100, LENGTH):
        assert torch.equal(chunked(case, q, size, **masking), whole)


@pytest.mark.parametrize("codecs", PAIRS, ids="-".join)
@pytest.mark.parametrize("group", [1, 4])
def test_decode_equals_prefill_bit_for_bit(codecs, group):
    case = make_case([LENGTH], k_codec=codecs[0], v_codec=codecs[1], group=group)
    q = random_query(case, LENGTH)
    whole = chunked(case, q, LENGTH)
    for end in (1, 15, 16, 17, 128, 129, 200, LENGTH):
        row = run(case, q[end - 1 : end], case.batch([1], [0], [end]))
        assert torch.equal(row[0], whole[end - 1])


def test_sinks_and_neighbours_do_not_change_a_bit():
    case = make_case([LENGTH, 7, 150], k_codec="int8", v_codec="int4", group=4)
    sinks = torch.randn(case.num_heads)
    rows = [100, 3, 1]
    q = random_query(case, sum(rows) + 5)  # five padding rows
    packed = run(case, q, case.batch(rows), sinks=sinks)
    start = 0
    for s, n in enumerate(rows):
        alone = run(case, q[start : start + n], case.batch([n], [s]), sinks=sinks)
        assert torch.equal(packed[start : start + n], alone)
        start += n
    assert torch.equal(packed[start:], torch.zeros_like(packed[start:]))


@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
def test_block_size_and_block_order_do_not_change_a_bit(head_dim):
    outputs = []
    for block_size, shuffle in ((16, True), (16, False), (64, True), (128, False)):
        case = make_case(
            [LENGTH],
            k_codec="int8",
            v_codec="bf16",
            block_size=block_size,
            shuffle=shuffle,
            head_dim=head_dim,
        )
        outputs.append(run(case, random_query(case, 20), case.batch([20])))
    for other in outputs[1:]:
        assert torch.equal(other, outputs[0])
