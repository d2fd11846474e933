"""What a decoder layer does between its matrix products: native, one pass each, or in torch.

Both compute in float32 and round once, at the end; a row's bits depend on that row alone.
"""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import torch
from torch.nn import functional

from kvtune.kernels.torch_team import torch_team
from kvtune.native_library import find_library, open_library

__all__ = ["HeadNorms", "Heads", "LayerOps", "NativeLayerOps", "TorchLayerOps", "layer_ops", "library_path"]

ABI_VERSION: Final = 2
_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}


class Heads(NamedTuple):
    """How a row of merged queries, keys and values is laid out, side by side."""

    num_heads: int
    num_kv_heads: int
    dim: int


class HeadNorms(NamedTuple):
    """Weights [dim] of the norms over each query and key head before rotating (Qwen3)."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


class LayerOps(Protocol):
    """Tensors are contiguous, of one dtype but for cosines and sines (float32)."""

    def add_norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add `delta` [N, dim] to `residual` [N, dim] in place; the RMS norm of the sum times `weight`."""
        ...

    def split_rope(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norms: HeadNorms | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [N, H, dim], k and v [N, h, dim] of merged rows [N, (H + 2h) dim]; q and k rotated in halves.

        `cos`, `sin` [N, dim], both halves equal, as Transformers makes them.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up [N, dim] of rows [N, 2 dim] that hold gate, then up."""
        ...


class TorchLayerOps:
    """The definition, in any floating dtype."""

    def add_norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if delta is not None:
            residual += delta
        return _rms_norm(residual.float(), weight, eps).to(residual.dtype)

    def split_rope(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norms: HeadNorms | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        counts = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
        q, k, v = qkv.view(len(qkv), -1, heads.dim).split(counts, dim=1)
        q, k = q.float(), k.float()
        if norms is not None:
            q, k = _rms_norm(q, norms.q, norms.eps), _rms_norm(k, norms.k, norms.eps)
        return _rotated(q, cos, sin).to(v.dtype), _rotated(k, cos, sin).to(v.dtype), v.contiguous()

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (functional.silu(gate.float()) * up.float()).to(gate_up.dtype)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class NativeLayerOps:
    """The same in float32 and bfloat16 on the CPU, by the library built from csrc/. HostError where it does
    not load."""

    def __init__(self, path: Path) -> None:
        library = open_library(
            path, "native layers", abi_symbol="kvtune_layers_abi_version", abi_version=ABI_VERSION
        )
        library.kvtune_layers_use_team.argtypes = (c_void_p,)
        library.kvtune_layers_use_team(torch_team())
        self._add_norm = library.kvtune_add_norm
        self._add_norm.argtypes = (*(c_void_p,) * 4, c_int64, c_int64, c_float, c_int32, c_int32)
        self._add_norm.restype = None
        self._split_rope = library.kvtune_split_rope
        self._split_rope.argtypes = (*(c_void_p,) * 8, *(c_int64,) * 4, c_float, c_int32, c_int32)
        self._split_rope.restype = None
        self._silu_mul = library.kvtune_silu_mul
        self._silu_mul.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32)
        self._silu_mul.restype = None

    def add_norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = torch.empty_like(residual)
        rows, dim = residual.shape
        self._add_norm(
            residual.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(),
            out.data_ptr(), rows, dim, eps, _DTYPES[residual.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def split_rope(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norms: HeadNorms | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_heads, num_kv_heads, dim = heads
        rows = qkv.shape[0]
        q = qkv.new_empty(rows, num_heads, dim)
        k, v = qkv.new_empty(rows, num_kv_heads, dim), qkv.new_empty(rows, num_kv_heads, dim)
        self._split_rope(
            qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            None if norms is None else norms.q.data_ptr(), None if norms is None else norms.k.data_ptr(),
            q.data_ptr(), k.data_ptr(), v.data_ptr(), rows, num_heads, num_kv_heads, dim,
            0.0 if norms is None else norms.eps, _DTYPES[qkv.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return q, k, v

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, width = gate_up.shape
        out = gate_up.new_empty(rows, width // 2)
        self._silu_mul(
            gate_up.data_ptr(), out.data_ptr(), rows, width // 2, _DTYPES[gate_up.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        return out


def library_path() -> Path | None:
    """Where the built library lies: beside this module, or wherever the package was installed from."""
    return find_library("engine", "kvtune_layers")


def layer_ops(dtype: torch.dtype, *, native: bool = True) -> LayerOps:
    """Native where it is wanted, built, and knows the dtype; else torch."""
    path = library_path() if native and dtype in _DTYPES else None
    return TorchLayerOps() if path is None else NativeLayerOps(path)
