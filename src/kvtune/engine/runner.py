"""Runs packed steps of a Transformers decoder over paged KV arenas.

Performs the effects a `SchedulerOutput` describes (block copies, KV writes, the forward pass) and
knows nothing of requests, queues or sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from kvtune.engine.attention import AttentionLayer, AttentionStep
from kvtune.engine.decoder import Decoder
from kvtune.errors import InvariantError, UnsupportedModelError
from kvtune.kernels import AttentionBatch, Backend, LayerCache, copy_blocks
from kvtune.spec import KVGroup
from kvtune.types import BlockCopy, DecodeColumns, ScheduledChunk

__all__ = ["ModelRunner", "PackedStep", "last_rows", "pack_step", "row_multiple", "tail_starts"]

IntArray = npt.NDArray[np.int64]
_EXACT_ROWS = 32
_COMPILED = (torch.bfloat16, torch.float16)
"""Dtypes whose matrix products oneDNN compiles on a CPU."""


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The integers of one step: what the model and, per KV group, the attention kernels read.

    `input_ids`, `positions` [N]; `query_start` [S + 1]; `context_len` [S]; per group `block_tables`
    [S, M] (-1 pads) and `slots` [N] = block id * block_size + offset, -1 for a padding row.
    """

    input_ids: IntArray
    positions: IntArray
    query_start: npt.NDArray[np.int32]
    context_len: npt.NDArray[np.int32]
    block_tables: tuple[npt.NDArray[np.int32], ...]
    slots: tuple[IntArray, ...]


def pack_step(
    chunks: Sequence[ScheduledChunk],
    *,
    num_groups: int,
    block_size: int,
    pad_rows: int = 0,
    decodes: DecodeColumns | None = None,
) -> PackedStep:
    """Lay `decodes` and then the chunks of one step side by side, in order; pad to a multiple of `pad_rows`
    if it is set."""
    num_decodes = 0 if decodes is None else len(decodes)
    lengths = np.array([1] * num_decodes + [len(chunk.token_ids) for chunk in chunks], dtype=np.int64)
    starts = np.empty(len(lengths), dtype=np.int64)
    starts[num_decodes:] = [chunk.start for chunk in chunks]
    token_ids = [chunk.token_ids for chunk in chunks]
    if decodes is not None:
        starts[:num_decodes] = decodes.starts
        token_ids.insert(0, decodes.token_ids)
    query_start = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=query_start[1:])
    num_tokens = int(query_start[-1])
    num_rows = -(-num_tokens // pad_rows) * pad_rows if pad_rows else num_tokens

    input_ids = np.zeros(num_rows, dtype=np.int64)
    positions = np.zeros(num_rows, dtype=np.int64)
    np.concatenate(token_ids, out=input_ids[:num_tokens])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    positions[:num_tokens] = np.arange(num_tokens) + (starts - query_start[:-1])[sequence]

    context_len = starts + lengths
    block_index, offset = np.divmod(positions[:num_tokens], block_size)
    width = int(-(-context_len.max() // block_size))
    tables: list[npt.NDArray[np.int32]] = []
    slots: list[IntArray] = []
    for group in range(num_groups):
        table = _packed_tables(chunks, decodes, group, width)
        blocks = table[sequence, block_index].astype(np.int64)
        if blocks.size and blocks.min() < 0:
            raise InvariantError(f"a scheduled token has no block in KV group {group}")
        slot = np.full(num_rows, -1, dtype=np.int64)
        slot[:num_tokens] = blocks * block_size + offset
        tables.append(table)
        slots.append(slot)
    return PackedStep(
        input_ids, positions, query_start.astype(np.int32), context_len.astype(np.int32),
        tuple(tables), tuple(slots),
    )  # fmt: skip


def _packed_tables(
    chunks: Sequence[ScheduledChunk], decodes: DecodeColumns | None, group: int, width: int
) -> npt.NDArray[np.int32]:
    """[S, width] block tables of one group, -1 behind the shorter ones."""
    num_decodes = 0 if decodes is None else len(decodes)
    columns = None if decodes is None else decodes.block_tables[group][:, :width]
    if columns is not None and not chunks and columns.shape[1] == width:
        return np.ascontiguousarray(columns)
    table = np.full((num_decodes + len(chunks), width), -1, dtype=np.int32)
    if columns is not None:
        table[:num_decodes, : columns.shape[1]] = columns
    for row, chunk in enumerate(chunks, num_decodes):
        own = chunk.block_tables[group][:width]
        table[row, : len(own)] = own
    return table


def row_multiple(num_tokens: int) -> int:
    """What the rows of a step in 16 bit are rounded up to: 1 up to 32 rows, then eight counts per doubling.

    oneDNN compiles a kernel for each number of rows that meets each shape of weights, and keeps 1,024.
    Prefills have hundreds of row counts: kernels were compiled again and again (for steps of 100 to 400
    rows, more than half of the time of their products) and held 0.9 GB.
    """
    return 1 if num_tokens <= _EXACT_ROWS else 1 << ((num_tokens - 1).bit_length() - 4)


def tail_starts(query_start: npt.NDArray[np.int32], rows: IntArray) -> npt.NDArray[np.int32] | None:
    """[S + 1] starts of each sequence's share of `rows`, where that is the last rows it has in the step; else
    None."""
    bounds = np.searchsorted(rows, query_start)
    expected = np.repeat(query_start[1:] - bounds[1:], np.diff(bounds)) + np.arange(len(rows))
    return bounds.astype(np.int32) if np.array_equal(rows, expected) else None


def last_rows(chunks: Sequence[ScheduledChunk], *, num_decodes: int = 0) -> IntArray:
    """Row of the last token of each chunk that samples, in chunk order, behind `num_decodes` decodes."""
    ends = np.cumsum([len(chunk.token_ids) for chunk in chunks], dtype=np.int64) - 1 + num_decodes
    sampling = ends[np.array([chunk.samples for chunk in chunks], dtype=bool)]
    return np.concatenate((np.arange(num_decodes, dtype=np.int64), sampling)) if num_decodes else sampling


class ModelRunner:
    """One model over its layers' KV arenas.

    `caches` maps a model layer index to its arena; layers of one group share block ids. `pad_rows`
    pads the rows of the forward and of the output head, so that the shapes of matrix products, and
    with them their bits, do not depend on how many tokens a step holds. `decoder`: the model's forward
    pass instead of Transformers'.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Sequence[KVGroup],
        caches: Mapping[int, LayerCache],
        *,
        block_size: int,
        backend: Backend,
        pad_rows: int = 0,
        decoder: Decoder | None = None,
    ) -> None:
        self._model: Any = model
        self._decoder = decoder
        self._groups = tuple(groups)
        self._caches = dict(caches)
        self._block_size = block_size
        self._backend = backend
        self._pad_rows = pad_rows
        self._has_kernel_per_shape = model.device.type == "cpu" and model.dtype in _COMPILED
        self._layers = {
            layer: AttentionLayer(layer, group.index, caches[layer], group.window)
            for group in groups
            for layer in group.layers
        }

    @property
    def layers(self) -> Mapping[int, AttentionLayer]:
        """Every attention layer by its index in the model."""
        return self._layers

    def close(self) -> None:
        """Let go of the arenas; the runner cannot be used any more."""
        self._caches.clear()
        self._layers.clear()

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, in every layer of each copy's group."""
        for group in self._groups:
            places = [(c.src, c.dst, c.src_row, c.dst_row) for c in copies if c.group == group.index]
            if not places:
                continue
            src, dst, *rows = (torch.tensor(ids, dtype=torch.int64) for ids in zip(*places, strict=True))
            for layer in group.layers:
                copy_blocks(self._caches[layer], src, dst, rows=(rows[0], rows[1]))

    def forward(
        self, chunks: Sequence[ScheduledChunk], rows: IntArray, *, decodes: DecodeColumns | None = None
    ) -> torch.Tensor:
        """Run one step of `decodes`, then `chunks`; return the model's logits [len(rows), V] of the given
        rows of the packed step.

        The output head runs on those rows only, through the model's own forward, so that soft-caps
        and logit scales of a family stay the model's.
        """
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks) + (0 if decodes is None else len(decodes))
        packed = pack_step(
            chunks, num_groups=len(self._groups), block_size=self._block_size,
            pad_rows=self._multiple(num_tokens), decodes=decodes,
        )  # fmt: skip
        step = AttentionStep(self._batches(packed), self._layers, self._backend)
        with torch.inference_mode():
            logits = self._run_model(packed, step, rows)
        self._check_calls(step)
        return logits[: len(rows)]

    def _padded(self, rows: IntArray) -> IntArray:
        """Some rows twice, so that their number is one the output head has seen."""
        multiple = self._pad_rows
        if not multiple and self._decoder is not None and self._has_kernel_per_shape:
            multiple = row_multiple(len(rows))
        return np.resize(rows, -(-len(rows) // multiple) * multiple) if multiple and len(rows) else rows

    def _multiple(self, num_tokens: int) -> int:
        if self._pad_rows or not self._has_kernel_per_shape:
            return self._pad_rows
        return row_multiple(num_tokens)

    def _run_model(self, packed: PackedStep, step: AttentionStep, rows: IntArray) -> torch.Tensor:
        if self._decoder is None:
            return self._run_modules(packed, step, self._padded(rows))
        keep = None
        if len(rows) < packed.query_start[-1] or (np.diff(rows) != 1).any():
            keep = torch.from_numpy(self._padded(rows))
            starts = tail_starts(packed.query_start, rows)
            if starts is not None:
                query_start = torch.from_numpy(starts)
                step.tails = tuple(replace(batch, query_start=query_start) for batch in step.batches)
        input_ids, positions = torch.from_numpy(packed.input_ids), torch.from_numpy(packed.positions)
        return self._decoder.forward(input_ids, positions, step, keep)

    def _run_modules(self, packed: PackedStep, step: AttentionStep, keep: IntArray) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "input_ids": torch.from_numpy(packed.input_ids)[None],
            "position_ids": torch.from_numpy(packed.positions)[None],
            "attention_mask": None,
            "use_cache": False,
            "kvtune_step": step,
        }
        if not len(keep):  # a step of inner prefill chunks: nobody needs logits
            self._model.base_model(**arguments)
            return torch.empty(0, 0)
        return self._model(**arguments, logits_to_keep=torch.from_numpy(keep)).logits[0]

    def _batches(self, packed: PackedStep) -> tuple[AttentionBatch, ...]:
        query_start = torch.from_numpy(packed.query_start)
        context_len = torch.from_numpy(packed.context_len)
        return tuple(
            AttentionBatch(
                query_start=query_start,
                context_len=context_len,
                block_table=torch.from_numpy(table),
                slots=torch.from_numpy(slots),
            )
            for table, slots in zip(packed.block_tables, packed.slots, strict=True)
        )

    def _check_calls(self, step: AttentionStep) -> None:
        for group in self._groups:
            for layer in group.layers:
                calls = step.calls.get(layer, 0)
                if calls != 1:
                    raise UnsupportedModelError(
                        f"{self._model.config.model_type}: layer {layer} ({group.kind}) called kvtune's "
                        f"attention {calls} times in a step instead of once; this family is not supported"
                    )
