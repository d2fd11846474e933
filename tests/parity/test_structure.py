"""Which block every query reads, as integers: right sequence, right positions, right version, always.

A shadow store plays the arenas. For each packed step it notes, per KV group and slot, which prefix
(all tokens up to and including that position) was written, and in which version (16-bit first arena
or body). Then each query row must find exactly its own sequence at every position it may see.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvtune import CacheConfig, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.engine import Engine
from kvtune.engine.runner import pack_step

BLOCK = 16


class _ShadowArenas:
    """Follows the integers of every step of an engine; numbers are checked before the model runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._groups = engine._plan.groups
        self._num_body = engine._plan.num_blocks
        self._stored: list[dict[int, tuple[int, ...]]] = [{} for _ in self._groups]
        self.rows_checked = 0
        self._forward, engine._runner.forward = engine._runner.forward, self._check
        self._copy, engine._runner.copy_blocks = engine._runner.copy_blocks, self._copied

    def _copied(self, copies):
        for copy in copies:
            stored = self._stored[copy.group]
            for offset in range(BLOCK):
                source = stored.get(copy.src * BLOCK + offset)
                if source is not None:
                    stored[copy.dst * BLOCK + offset] = source
        self._copy(copies)

    def _check(self, others, rows, *, decodes=None):
        packed = pack_step(
            others, num_groups=len(self._groups), block_size=BLOCK, pad_rows=16, decodes=decodes
        )
        chunks = [*([] if decodes is None else decodes.chunks()), *others]
        texts = [self._engine._states[chunk.request_id].sequence.token_ids.tolist() for chunk in chunks]
        assert len(packed.input_ids) % 16 == 0
        for group in self._groups:
            self._write(group, chunks, texts, packed)
        for group in self._groups:
            for index, (chunk, text) in enumerate(zip(chunks, texts, strict=True)):
                for position in range(chunk.start, chunk.start + chunk.num_tokens):
                    self._read(group, packed.block_tables[group.index][index], text, position)
        return self._forward(others, rows, decodes=decodes)

    def _write(self, group, chunks, texts, packed) -> None:
        slots = packed.slots[group.index]
        written = [slot for slot in slots.tolist() if slot >= 0]
        assert len(set(written)) == len(written), "two rows write one slot"
        assert set(slots[packed.query_start[-1] :].tolist()) <= {-1}, "a padding row writes"
        for index, (chunk, text) in enumerate(zip(chunks, texts, strict=True)):
            first = packed.query_start[index]
            assert packed.context_len[index] == chunk.start + chunk.num_tokens
            for row, position in enumerate(range(chunk.start, chunk.start + chunk.num_tokens), start=first):
                assert packed.positions[row] == position
                assert packed.input_ids[row] == text[position]
                assert slots[row] % BLOCK == position % BLOCK
                self._stored[group.index][int(slots[row])] = tuple(text[: position + 1])

    def _read(self, group, table, text: list[int], position: int) -> None:
        first_seen = 0 if group.window is None else max(0, position - group.window + 1)
        has_first = self._engine._plan.num_first_blocks[group.index] > 0
        for block in range(first_seen // BLOCK, position // BLOCK + 1):
            block_id = int(table[block])
            assert (block_id >= self._num_body[group.index]) == (has_first and block == 0), "wrong version"
            last = min(position, block * BLOCK + BLOCK - 1)
            # the last visible slot names the whole prefix, so the slots before it are the same sequence
            for seen in {max(first_seen, block * BLOCK), last}:
                stored = self._stored[group.index].get(block_id * BLOCK + seen % BLOCK)
                assert stored == tuple(text[: seen + 1]), (group.kind, position, seen)
        self.rows_checked += 1


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(11)
    stem = rng.integers(3, 211, 70).tolist()
    tails = [rng.integers(3, 211, n).tolist() for n in (1, 20, 33, 2)]
    return [stem[:cut] + tail for cut, tail in zip((70, 64, 40, 16), tails, strict=True)]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("chunk", [16, 50, 512])
@pytest.mark.parametrize("first_block_16bit", [False, True])
def test_every_query_reads_its_own_sequence(pair, family, chunk, first_block_16bit):
    loaded, _ = pair(family)
    with Engine.from_pretrained(
        loaded,
        cache=CacheConfig(
            kv_budget="400KiB", k_codec="int8", v_codec="int4", first_block_16bit=first_block_16bit
        ),
        scheduler=SchedulerConfig(max_num_batched_tokens=chunk, max_num_seqs=8),
        config=EngineConfig(kernel="torch"),
    ) as engine:
        shadow = _ShadowArenas(engine)
        params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        first = engine.generate(_prompts(), params)
        again = engine.generate(_prompts(), params)
        assert sum(output.num_cached_tokens for output in again) > 0
        assert sum(output.num_cached_tokens for output in first) > 0  # followers of a shared prefix
        stepwise = sum(
            len(p) + 29 - o.num_cached_tokens for p, o in zip(_prompts() * 2, first + again, strict=True)
        )
        assert shadow.rows_checked >= stepwise * len(loaded.spec.kv_groups())
        engine._manager.check()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_query_reads_its_own_sequence_through_preemptions(pair, family):
    loaded, _ = pair(family)
    with Engine.from_pretrained(
        loaded,
        cache=CacheConfig(kv_budget="72KiB", k_codec="int8", v_codec="int8"),
        scheduler=SchedulerConfig(max_num_batched_tokens=16, watermark=0.0, reserved=0.0),
        config=EngineConfig(kernel="torch"),
    ) as engine:
        _ShadowArenas(engine)
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        engine.generate(_prompts(), params)
        assert engine.stats().scheduler.preemptions > 0
