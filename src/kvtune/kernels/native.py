"""The native library through ctypes: plain C records, tensors by address, no torch and no Python ABI.

The C++ sources are in csrc/. `num_threads` follows torch's at each call; with one, no thread is started.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from kvtune.errors import InvariantError, UsageError
from kvtune.kernels.batch import AttentionBatch, LayerCache
from kvtune.kernels.planes import LowPlanes
from kvtune.kernels.reference import Masking
from kvtune.kernels.torch_team import torch_team
from kvtune.native_library import find_library, open_library
from kvtune.spec import PackedLayout

__all__ = ["MAX_HEAD_DIM", "NativeLibrary", "library_path"]

ABI_VERSION = 8
MAX_HEAD_DIM = 512
CODEC_NUMBERS = {
    "fp32": 0, "bf16": 1, "fp16": 2, "int8": 3, "int4": 4, "fp8": 5, "int4_rh": 6, "n8_rh": 7, "n4_rh": 8,
}  # fmt: skip
STATUS = {1: "a block id is outside the arenas", 2: "an argument was refused", 3: "out of memory"}


class _Side(ctypes.Structure):
    _fields_ = (
        ("codec", c_int32),
        ("head_dim", c_int32),
        ("codes_offset", c_int64),
        ("strip_offset", c_int64),
        ("centre", c_void_p),
        ("low", c_void_p),
        ("low_bytes", c_int64),
        ("low_row", c_void_p),
        ("num_low_rows", c_int64),
    )


class _Arena(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("num_blocks", c_int64),
        ("block_bytes", c_int64),
        ("k", _Side),
        ("v", _Side),
    )


class _Cache(ctypes.Structure):
    _fields_ = (("block_size", c_int32), ("num_kv_heads", c_int32), ("body", _Arena), ("first", _Arena))


class _Rows(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("row_stride", c_int64), ("head_stride", c_int64), ("is_bf16", c_int32))


class _Write(ctypes.Structure):
    _fields_ = (
        ("cache", POINTER(_Cache)),
        ("k", _Rows),
        ("v", _Rows),
        ("slots", c_void_p),
        ("num_tokens", c_int64),
        ("num_threads", c_int32),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("cache", POINTER(_Cache)),
        ("q", _Rows),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("query_start", c_void_p),
        ("context_len", c_void_p),
        ("block_table", c_void_p),
        ("sinks", c_void_p),
        ("table_stride", c_int64),
        ("num_rows", c_int64),
        ("num_seqs", c_int32),
        ("num_heads", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("num_threads", c_int32),
    )


class _Gather(ctypes.Structure):
    _fields_ = (
        ("cache", POINTER(_Cache)),
        ("block_ids", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("num_tokens", c_int64),
        ("num_threads", c_int32),
    )


def library_path() -> Path | None:
    """Where the built library lies: beside this module, or wherever the package was installed from."""
    return find_library("kernels", "kvtune_kernels")


class NativeLibrary:
    """A loaded library and the instruction set to use. HostError if it does not load or lacks the set."""

    def __init__(self, path: Path, isa: str = "auto") -> None:
        self._library = open_library(
            path, "native kernels", abi_symbol="kvtune_abi_version", abi_version=ABI_VERSION
        )
        self._library.kvtune_use_team.argtypes = (c_void_p,)
        self._library.kvtune_use_team(torch_team())
        self._library.kvtune_find_isa.argtypes = (c_char_p,)
        self._library.kvtune_isa_name.argtypes = (c_int32,)
        self._library.kvtune_isa_name.restype = c_char_p
        self._library.kvtune_saved_tokens.restype = c_int64
        self._isa = int(self._library.kvtune_find_isa(isa.encode()))
        if self._isa < 0:
            raise UsageError(
                f"instruction set {isa!r} is not available here; use auto, portable, avx2, avx512 or "
                "avx512_bf16"
            )
        self.isa: str = self._library.kvtune_isa_name(self._isa).decode()

    def write(self, cache: LayerCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Encode and store; see kvtune.kernels.store_kv. Slots were checked by the caller."""
        k, v, slots = _readable(k), _readable(v), slots.to(torch.int64).contiguous()
        record = _cache_record(cache, cache.k_low, cache.v_low)
        args = _Write(
            record,
            _rows(k),
            _rows(v),
            slots.data_ptr(),
            slots.shape[0],
            torch.get_num_threads(),
        )
        self._call("kvtune_write", args)

    def attention(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        masking: Masking,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [N, H, Dk] -> [N, H, Dv] in q.dtype; `lse` float32 [N, H] receives the log-sum-exp, sinks too.

        InvariantError if the batch does not fit `q` or the block table, or names a block that is not there.
        """
        dtype, q = q.dtype, _readable(q)
        out = torch.empty(q.shape[0], q.shape[1], cache.layout.v_head_dim, dtype=q.dtype)
        starts, lengths, table = _index_tensors(batch)
        sinks = None if masking.sinks is None else _floats(masking.sinks)
        record = _cache_record(cache, cache.read_planes("k"), cache.read_planes("v"))
        args = _Attention(
            record,
            _rows(q),
            out.data_ptr(),
            None if lse is None else lse.data_ptr(),
            starts.data_ptr(),
            lengths.data_ptr(),
            table.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            table.shape[1],
            q.shape[0],
            batch.num_seqs,
            q.shape[1],
            masking.window or 0,
            masking.scale,
            masking.softcap or 0.0,
            torch.get_num_threads(),
        )
        self._call("kvtune_attention", args)
        return out if out.dtype is dtype else out.to(dtype)

    def saved_tokens(
        self, num_heads: int, cache: LayerCache, batch: AttentionBatch, window: int | None = None
    ) -> int:
        """Tokens that attention over this batch does not read again for another sequence.

        Sequences with few rows whose block tables begin alike read that beginning together.
        """
        starts, lengths, table = _index_tensors(batch)
        record = _cache_record(cache, cache.read_planes("k"), cache.read_planes("v"))
        args = _Attention(
            cache=record,
            query_start=starts.data_ptr(),
            context_len=lengths.data_ptr(),
            block_table=table.data_ptr(),
            table_stride=table.shape[1],
            num_rows=int(starts[-1]),
            num_seqs=batch.num_seqs,
            num_heads=num_heads,
            window=window or 0,
        )
        saved = int(self._library.kvtune_saved_tokens(ctypes.byref(args), self._isa))
        if saved < 0:
            raise InvariantError(f"kvtune_saved_tokens: {STATUS[2]}")
        return saved

    def gather(
        self, cache: LayerCache, block_ids: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoded float32 (k [n, h, Dk], v [n, h, Dv]) of the first tokens of a row of blocks."""
        layout, ids = cache.layout, block_ids.to(torch.int32).contiguous()
        k = torch.empty(num_tokens, layout.num_kv_heads, layout.k_head_dim)
        v = torch.empty(num_tokens, layout.num_kv_heads, layout.v_head_dim)
        record = _cache_record(cache, cache.read_planes("k"), cache.read_planes("v"))
        args = _Gather(
            record,
            ids.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            num_tokens,
            torch.get_num_threads(),
        )
        self._call("kvtune_gather", args)
        return k, v

    def _call(self, function: str, args: ctypes.Structure) -> None:
        status = int(getattr(self._library, function)(ctypes.byref(args), c_int32(self._isa)))
        if status:
            raise InvariantError(f"{function}: {STATUS.get(status, f'status {status}')}")


def _index_tensors(batch: AttentionBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Starts, lengths and block table as the library reads them."""
    return _int32(batch.query_start), _int32(batch.context_len), _int32(batch.block_table)


def _int32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()


def _floats(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.float32).contiguous()


def _readable(x: torch.Tensor) -> torch.Tensor:
    """[n, heads, dim] as the library reads it: bf16 or float32, dims beside each other; a copy if need be."""
    if x.dtype is not torch.bfloat16 and x.dtype is not torch.float32:
        x = x.to(torch.float32)
    return x if x.stride(2) == 1 else x.contiguous()


def _rows(x: torch.Tensor) -> _Rows:
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1), x.dtype is torch.bfloat16)


def _arena_record(arena: torch.Tensor, layout: PackedLayout, centre: torch.Tensor | None) -> _Arena:
    centre_at = None if centre is None else centre.data_ptr()
    k = _Side(CODEC_NUMBERS[layout.k_codec], layout.k_head_dim, 0, layout.k_strip_offset, centre_at)
    v = _Side(CODEC_NUMBERS[layout.v_codec], layout.v_head_dim, layout.v_codes_offset, layout.v_strip_offset)
    return _Arena(arena.data_ptr(), arena.shape[0], layout.arena_bytes, k, v)


def _set_planes(side: _Side, low: LowPlanes | None) -> None:
    if low is not None:
        side.low, side.low_bytes = low.arena.data_ptr(), low.plane_bytes
        side.low_row, side.num_low_rows = low.row_of.data_ptr(), low.num_rows


def _planes_key(low: LowPlanes | None) -> tuple[int, int, int]:
    return (0, 0, 0) if low is None else (low.arena.data_ptr(), low.row_of.data_ptr(), low.num_rows)


def _cache_record(
    cache: LayerCache, k_low: LowPlanes | None, v_low: LowPlanes | None
) -> ctypes.Array[_Cache]:
    """What the library reads of a cache. Made anew only when an address in it changed: it costs ten calls."""
    centre = 0 if cache.k_centre is None else cache.k_centre.data_ptr()
    key = (cache.arena.data_ptr(), centre, _planes_key(k_low), _planes_key(v_low))
    if cache.native_record is None or cache.native_record[0] != key:
        cache.native_record = (key, _new_record(cache, k_low, v_low))
    return cache.native_record[1]


def _new_record(cache: LayerCache, k_low: LowPlanes | None, v_low: LowPlanes | None) -> ctypes.Array[_Cache]:
    first = _Arena()
    if cache.first_arena is not None and cache.first_layout is not None:
        first = _arena_record(cache.first_arena, cache.first_layout, cache.k_centre)
    body = _arena_record(cache.arena, cache.layout, cache.k_centre)
    _set_planes(body.k, k_low)
    _set_planes(body.v, v_low)
    # an array of one is its own pointer
    return (_Cache * 1)(_Cache(cache.layout.block_size, cache.layout.num_kv_heads, body, first))
