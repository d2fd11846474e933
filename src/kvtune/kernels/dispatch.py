"""One door to every kernel: choose a backend, say why, and call it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from kvtune.errors import HostError, InvariantError, UsageError
from kvtune.kernels import reference, torch_path
from kvtune.kernels.batch import AttentionBatch, LayerCache
from kvtune.kernels.native import MAX_HEAD_DIM, NativeLibrary, library_path
from kvtune.kernels.packing import store_codes
from kvtune.kernels.planes import LowPlanes
from kvtune.kernels.quantise import encode_values
from kvtune.kernels.reference import Masking

__all__ = ["BACKENDS", "Backend", "choose_backend", "copy_blocks", "gather_kv", "paged_attention", "store_kv"]

BACKENDS = ("native", "torch", "reference")


@dataclass(frozen=True)
class Backend:
    """Which kernels run, and why. `reason` is one printable line; `library` is set for native alone."""

    name: str
    reason: str
    library: NativeLibrary | None = field(default=None, repr=False, compare=False)

    @property
    def isa(self) -> str | None:
        """Instruction set of the native kernels: avx512_bf16, avx512, avx2 or portable."""
        return None if self.library is None else self.library.isa


def choose_backend(name: str = "auto", *, isa: str | None = None) -> Backend:
    """`auto` takes native where its library loads, else torch and says why; a name is taken as given.

    `isa` (default: the environment's KVTUNE_ISA, else the best) forces an instruction set. HostError if
    native is asked for and cannot be had, UsageError on an unknown name or instruction set.
    """
    if name in ("torch", "reference"):
        return Backend(name, f"{name}: asked for")
    if name not in ("auto", "native"):
        raise UsageError(f"unknown kernel backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    path = library_path()
    if path is None:
        missing = "no native library in this installation: rebuild with a C++17 compiler at hand"
        if name == "native":
            raise HostError(missing)
        return Backend("torch", f"torch: {missing}")
    isa = isa or os.environ.get("KVTUNE_ISA") or "auto"
    try:
        library = NativeLibrary(path, isa)
    except HostError as error:
        if name == "native":
            raise
        return Backend("torch", f"torch: {error}")
    return Backend(
        "native", f"native: {library.isa} ({'best here' if isa == 'auto' else 'asked for'})", library
    )


def paged_attention(
    q: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    backend: Backend,
) -> torch.Tensor:
    """Attention of packed query rows over the paged cache, this step's keys included (already written).

    q [N, H, Dk]; returns [N, H, Dv] in q.dtype, 0 in padding rows. Query row i of sequence s sits at
    position context_len[s] - rows(s) + i and sees keys at positions <= its own and > own - window.
    `softcap`: scores become softcap * tanh(score / softcap) (Gemma 2). `sinks` [H]: one more logit per
    head without a value (GPT-OSS). UsageError if the head counts, dims or lengths do not fit the cache.

    All backends compute in float32 except: torch multiplies in q.dtype; native on avx512 takes q and the
    softmax weights as 16-bit fixed point against integer codes (128 times finer than int8 itself); and native
    on avx512_bf16, where q is bf16, rounds the weights to bf16 against bf16 values.
    Native also leaves rotated keys and values rotated: it rotates q once and the output back, and adds the
    score of the keys' centre to every score, so sinks, soft-caps and a first block of another codec see
    the scores of the keys themselves.
    Native serves prefill chunks too, 64 query rows of a KV head to a pass over the keys; a row's bits do not
    depend on how a prompt was chunked, nor on threads. Sequences with few rows whose block tables begin alike
    read that beginning once for all of them, which changes no bit either.
    """
    _check_query(q, cache, batch)
    masking = Masking(scale, window, softcap, sinks)
    if backend.name == "reference":
        _check_lengths(q, cache, batch)
        return reference.paged_attention(q, cache, batch, masking)
    if backend.library is not None and _fits_native(cache):
        try:
            return backend.library.attention(q, cache, batch, masking)
        except InvariantError:
            _check_lengths(q, cache, batch)  # says what does not fit, if that was it
            raise
    _check_lengths(q, cache, batch)
    return torch_path.paged_attention(q, cache, batch, masking)


def store_kv(
    cache: LayerCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, *, backend: Backend
) -> None:
    """Encode k [N, h, Dk] and v [N, h, Dv] with the layout's codecs into `slots` [N]; -1 writes nothing.

    Slots must be distinct. All backends write the same bytes.
    """
    _check_slots(cache, k, v, slots)
    if backend.library is not None and _fits_native(cache):
        backend.library.write(cache, k, v, slots)
        return
    block_size = cache.layout.block_size
    block, offset = slots.div(block_size, rounding_mode="floor"), slots % block_size
    for arena, layout, base in cache.parts():
        rows = ((slots >= 0) & (block >= base) & (block < base + arena.shape[0])).nonzero().squeeze(1)
        if rows.numel():
            encoded_k = encode_values(layout.k_codec, k[rows], cache.k_centre)
            encoded_v = encode_values(layout.v_codec, v[rows])
            store_codes(
                arena, layout, k=encoded_k, v=encoded_v, block=block[rows] - base, offset=offset[rows],
                low=cache.low_planes if base == 0 else {},
            )  # fmt: skip


def gather_kv(
    cache: LayerCache,
    block_ids: torch.Tensor,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the first `num_tokens` tokens of blocks int [m] -> (k [n, h, Dk], v [n, h, Dv]).

    Ids below 0 give zeros. The values are the same on every backend; None takes torch.
    """
    if num_tokens > block_ids.numel() * cache.layout.block_size:
        raise UsageError(
            f"asked for {num_tokens} tokens, found {block_ids.numel()} blocks of {cache.layout.block_size}"
        )
    if backend is not None and backend.library is not None and _fits_native(cache):
        k, v = backend.library.gather(cache, block_ids, num_tokens)
        return k.to(dtype), v.to(dtype)
    return reference.gather_tokens(cache, block_ids, num_tokens, dtype)


def copy_blocks(
    cache: LayerCache,
    src: list[int] | torch.Tensor,
    dst: list[int] | torch.Tensor,
    *,
    rows: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Copy whole blocks src[i] -> dst[i] (copy-on-write). Both ends lie in the same arena.

    `rows`: source and target rows of their low planes, where the block pool gives them out; -1 for blocks
    that have none (first blocks).
    """
    sources, targets = torch.as_tensor(src, dtype=torch.long), torch.as_tensor(dst, dtype=torch.long)
    if sources.shape != targets.shape:
        raise UsageError(
            f"copy_blocks needs as many targets as sources, found {len(targets)}, {len(sources)}"
        )
    if rows is None and any(low.is_assigned for low in cache.low_planes.values()):
        raise UsageError("these blocks' low planes lie in rows of the block pool's; name the rows")
    copied = 0
    for arena, _, base in cache.parts():
        stop = base + arena.shape[0]
        inside = (sources >= base) & (sources < stop) & (targets >= base) & (targets < stop)
        arena[targets[inside] - base] = arena[sources[inside] - base]
        for low in cache.low_planes.values() if base == 0 else ():
            _copy_planes(low, sources[inside], targets[inside], rows)
        copied += int(inside.sum())
    if copied != len(sources):
        raise UsageError("copy_blocks: a block id is out of range, or a pair spans the body and first arenas")


def _copy_planes(
    low: LowPlanes, src: torch.Tensor, dst: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    if not low.is_assigned:
        low.copy(src, dst)
    elif rows is not None:
        has_row = (rows[0] >= 0) & (rows[1] >= 0)
        low.write_rows(rows[1][has_row], low.read_rows(rows[0][has_row]))


def _fits_native(cache: LayerCache) -> bool:
    return max(cache.layout.k_head_dim, cache.layout.v_head_dim) <= MAX_HEAD_DIM


def _check_query(q: torch.Tensor, cache: LayerCache, batch: AttentionBatch) -> None:
    layout = cache.layout
    if q.dim() != 3 or q.shape[2] != layout.k_head_dim or q.shape[1] % layout.num_kv_heads:
        raise UsageError(
            f"q must be [N, multiple of {layout.num_kv_heads}, {layout.k_head_dim}], found {list(q.shape)}"
        )
    if batch.query_start.shape[0] != batch.num_seqs + 1 or batch.block_table.shape[0] != batch.num_seqs:
        raise UsageError(
            f"batch of {batch.num_seqs} sequences needs query_start [{batch.num_seqs + 1}] and a block table "
            f"row each, found {list(batch.query_start.shape)} and {list(batch.block_table.shape)}"
        )


def _check_lengths(q: torch.Tensor, cache: LayerCache, batch: AttentionBatch) -> None:
    if not batch.num_seqs:
        return
    rows = batch.query_start.diff()
    width = batch.block_table.shape[1] * cache.layout.block_size
    num_rows, context = int(batch.query_start[-1]), int(batch.context_len.max())
    before = int((batch.context_len - rows).min())
    ordered = int(batch.query_start[0]) == 0 and int(rows.min()) >= 0
    if not ordered or num_rows > q.shape[0] or context > width or before < 0:
        raise UsageError(
            f"attention batch does not fit: {num_rows} rows in q of {q.shape[0]}, context up to {context} in "
            f"a block table of {width} tokens, fewest tokens before a sequence's first row {before}"
        )


def _check_slots(cache: LayerCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    layout, n = cache.layout, slots.shape[0]
    expected = [(n, layout.num_kv_heads, layout.k_head_dim), (n, layout.num_kv_heads, layout.v_head_dim)]
    if [tuple(k.shape), tuple(v.shape)] != expected:
        raise UsageError(f"k and v must be {expected}, found {tuple(k.shape)} and {tuple(v.shape)}")
    limit = (cache.num_blocks + cache.num_first_blocks) * layout.block_size
    if n and (int(slots.max()) >= limit or int(slots.min()) < -1):
        raise UsageError(f"slots must lie in [-1, {limit}), found {int(slots.min())}..{int(slots.max())}")
