"""The runner performs what a step says: copies whole blocks, packs integers, returns the rows asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kvtune import EngineConfig, SamplingParams
from kvtune.engine import load_model
from kvtune.engine.runner import last_rows, pack_step, row_multiple, tail_starts
from kvtune.errors import InvariantError
from kvtune.types import BlockCopy, BlockId, DecodeColumns, RequestId, ScheduledChunk


def _chunk(tokens, start, *tables, samples=True) -> ScheduledChunk:
    return ScheduledChunk(
        request_id=RequestId("r"), token_ids=np.array(tokens, dtype=np.int32), start=start,
        block_tables=tuple(np.array(table, dtype=np.int32) for table in tables), samples=samples,
    )  # fmt: skip


def test_a_packed_step_holds_positions_slots_and_tables_of_each_group():
    chunks = [_chunk([7, 8, 9], 15, [4, 2], [-1, 6]), _chunk([5], 0, [3], [1], samples=False)]
    chunks[0].block_tables[1][0] = 8
    packed = pack_step(chunks, num_groups=2, block_size=16, pad_rows=8)
    assert packed.input_ids.tolist() == [7, 8, 9, 5, 0, 0, 0, 0]
    assert packed.positions.tolist() == [15, 16, 17, 0, 0, 0, 0, 0]
    assert packed.query_start.tolist() == [0, 3, 4]
    assert packed.context_len.tolist() == [18, 1]
    assert packed.block_tables[0].tolist() == [[4, 2], [3, -1]]
    assert packed.slots[0].tolist() == [4 * 16 + 15, 2 * 16, 2 * 16 + 1, 3 * 16, -1, -1, -1, -1]
    assert packed.slots[1].tolist() == [8 * 16 + 15, 6 * 16, 6 * 16 + 1, 16, -1, -1, -1, -1]
    assert last_rows(chunks).tolist() == [2]


def test_decodes_as_columns_are_packed_like_their_chunks():
    tables = np.array([[4, 2, -1], [5, 6, 7]], dtype=np.int32)
    decodes = DecodeColumns(
        request_ids=(RequestId("a"), RequestId("b")), token_ids=np.array([3, 9], dtype=np.int32),
        starts=np.array([17, 47]), num_blocks=np.array([2, 3]), block_tables=(tables,),
    )  # fmt: skip
    for others in ([], [_chunk([7, 8, 9], 62, [1, 3, 9, 8, 11]), _chunk([5], 0, [12], samples=False)]):
        alone = pack_step([*decodes.chunks(), *others], num_groups=1, block_size=16, pad_rows=8)
        packed = pack_step(others, num_groups=1, block_size=16, pad_rows=8, decodes=decodes)
        for field in dataclasses.fields(packed):
            own, same = getattr(packed, field.name), getattr(alone, field.name)
            assert np.array_equal(own, same), field.name
        assert last_rows(others, num_decodes=2).tolist() == last_rows([*decodes.chunks(), *others]).tolist()


def test_rounded_row_counts_are_few_and_never_an_eighth_more():
    rounded = {n: -(-n // row_multiple(n)) * row_multiple(n) for n in range(1, 4097)}
    assert all(n <= rows < 1.125 * n for n, rows in rounded.items())
    assert [rounded[n] for n in (1, 31, 33, 64, 65, 130, 512)] == [1, 31, 36, 64, 72, 144, 512]
    assert len(set(rounded.values())) == 32 + 7 * 8


def test_steps_of_a_sixteen_bit_model_come_in_few_row_counts(llama_folder, llama, make_engine):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 200, n).tolist() for n in range(40, 60)]
    one_each = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)

    def row_counts(loaded):
        engine = make_engine(loaded, scheduler={"max_num_seqs": 1})
        counts, run = [], engine._runner._run_model
        engine._runner._run_model = lambda packed, *rest: (
            counts.append(len(packed.input_ids)) or run(packed, *rest)
        )
        engine.generate(prompts, one_each)
        return counts

    sixteen_bit = load_model(llama_folder, EngineConfig(dtype="bfloat16"))
    assert row_counts(sixteen_bit) == [-(-n // 4) * 4 for n in range(40, 60)]
    assert row_counts(llama) == list(range(40, 60))


def test_a_token_without_a_block_is_a_bug_that_is_reported():
    with pytest.raises(InvariantError, match="no block in KV group 1"):
        pack_step([_chunk([7], 0, [4], [-1])], num_groups=2, block_size=16)


def test_copies_move_whole_blocks_in_every_layer_of_their_group_only(gemma2, make_engine):
    engine = make_engine(gemma2)
    generator = torch.Generator().manual_seed(0)
    for cache in engine._arenas.values():
        cache.arena.random_(0, 255, generator=generator)
    before = {layer: cache.arena.clone() for layer, cache in engine._arenas.items()}
    engine._runner.copy_blocks([
        BlockCopy(group=1, src=BlockId(3), dst=BlockId(5)), BlockCopy(group=1, src=BlockId(1), dst=BlockId(0))
    ])  # fmt: skip
    for group in gemma2.spec.kv_groups():
        for layer in group.layers:
            expected = before[layer].clone()
            if group.index == 1:
                expected[5], expected[0] = before[layer][3], before[layer][1]
            assert torch.equal(engine._arenas[layer].arena, expected)


def test_logits_are_those_of_the_rows_asked_for(llama, make_engine):
    runner = make_engine(llama)._runner
    chunks = [_chunk(range(3, 40), 0, [0, 1, 2]), _chunk(range(50, 60), 0, [3])]
    whole = runner.forward(chunks, np.arange(47))
    picked = runner.forward(chunks, np.array([46, 3, 36]))
    torch.testing.assert_close(picked, whole[[46, 3, 36]])
    assert runner.forward(chunks, np.array([], dtype=np.int64)).numel() == 0


def test_the_last_rows_of_sequences_are_told_from_any_other_choice():
    starts = np.array([0, 3, 3, 7], dtype=np.int32)
    assert tail_starts(starts, np.array([2, 5, 6])).tolist() == [0, 1, 1, 3]
    assert tail_starts(starts, np.arange(7)).tolist() == [0, 3, 3, 7]
    assert tail_starts(starts, np.array([], dtype=np.int64)).tolist() == [0, 0, 0, 0]
    for other in ([1], [2, 5], [6, 2], [2, 6, 6]):
        assert tail_starts(starts, np.array(other)) is None


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("pad_rows", [0, 16])
def test_a_last_layer_that_computes_wanted_rows_alone_gives_the_same_logits(
    llama, make_engine, kernel, pad_rows
):
    settings = {"kernel": kernel, "pad_rows": pad_rows}
    fused = make_engine(llama, config=settings)._runner
    plain = make_engine(dataclasses.replace(llama, decoder=None), config=settings)._runner
    for runner in (fused, plain):
        runner.forward([_chunk(range(3, 40), 0, [0, 1, 2])], np.array([], dtype=np.int64))
    chunks = [_chunk(range(40, 45), 37, [0, 1, 2]), _chunk(range(50, 60), 0, [3])]
    for rows in ([4, 14], [3, 4], [14], list(range(15)), [14, 2]):
        wanted = np.array(rows)
        torch.testing.assert_close(
            fused.forward(chunks, wanted), plain.forward(chunks, wanted), atol=1e-4, rtol=0
        )
