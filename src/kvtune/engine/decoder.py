"""The forward pass of Llama-like decoders without their modules: merged matrices, fused steps between them.

Transformers runs some forty operations per layer, most of them small; this runs four matrix products, the
attention, and one pass over memory for each norm, rotation and activation. Queries, keys and values are one
product, gate and up projections another. In 16 bit, matrices are laid out once for oneDNN's kernels instead
of at every call, and rounding is rarer than in Transformers; in float32 both compute the same.

Any other architecture, and any model that somebody hooked into, runs through Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from kvtune.engine.attention import AttentionStep, attend, store
from kvtune.engine.layer_ops import HeadNorms, Heads, LayerOps, layer_ops

__all__ = ["FUSED_FAMILIES", "Decoder", "Linear", "fused_decoder"]

FUSED_FAMILIES: Final = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
"""Transformers classes whose layers are: norm, attention with RoPE in halves, norm, gated SiLU."""
_PACKED_ROWS: Final = 32
"""Rows that packed matrices are laid out for; measured as good as any from 1 to 512."""


class Linear:
    """x [N, in] -> [N, out]: projections of one input, merged; their modules' weights become views of it."""

    def __init__(self, owner: nn.Module, *names: str) -> None:
        self._owner, self._names = owner, names
        projections: list[Any] = [getattr(owner, name) for name in names]
        self._widths = [int(projection.weight.shape[0]) for projection in projections]
        weights: list[torch.Tensor] = [projection.weight.detach() for projection in projections]
        biases: list[torch.Tensor] = [p.bias.detach() for p in projections if p.bias is not None]
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._bias = torch.cat(biases) if biases else None
        self._packed: Any = None
        for projection, view in zip(projections, self._weight.split(self._widths), strict=True):
            projection.weight.data = view

    def pack(self, *, keep: bool) -> None:
        """Lay the matrix out for oneDNN. Without `keep` the modules let go of their weights and use this."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, _PACKED_ROWS)
        self._weight = self._weight.new_empty(0)
        if keep:
            return
        start = 0
        for name, width in zip(self._names, self._widths, strict=True):
            setattr(self._owner, name, PackedProjection(self, start, start + width))
            start += width

    @property
    def bias(self) -> torch.Tensor | None:
        return self._bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            return functional.linear(x, self._weight, self._bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")


class PackedProjection(nn.Module):
    """One of the projections of a packed `Linear`, for whoever still runs the model through Transformers:
    computes them all and returns its own."""

    def __init__(self, merged: Linear, start: int, stop: int) -> None:
        super().__init__()
        self._merged, self._columns = merged, slice(start, stop)
        self.bias = None if merged.bias is None else merged.bias[start:stop]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self._merged(x.reshape(-1, x.shape[-1]))[:, self._columns]
        return out.reshape(*x.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class _Layer:
    index: int
    scale: float
    heads: Heads
    head_norms: HeadNorms | None
    norm: _Norm
    qkv: Linear
    out: Linear
    mlp_norm: _Norm
    gate_up: Linear
    down: Linear


class Decoder:
    """A Llama-like model's own weights behind one plain forward pass. Holds no state between steps."""

    def __init__(self, model: PreTrainedModel, ops: LayerOps) -> None:
        base: Any = model.base_model
        self._ops = ops
        self._embedding: torch.Tensor = base.embed_tokens.weight.detach()
        self._rotary: Any = base.rotary_emb
        self._layers = [_layer(module) for module in base.layers]
        self._norm = _norm(base.norm)
        self._head = Linear(model, "lm_head")

    def pack(self, *, keep: bool) -> None:
        """Lay all matrices out for oneDNN; without `keep` the model's modules use these from now on."""
        for layer in self._layers:
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
                linear.pack(keep=keep)
        self._head.pack(keep=keep)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        step: AttentionStep,
        keep: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits [len(keep), V] of the given rows (None: all) of a step of `input_ids`, `positions` [N].

        With `step.tails` the last layer computes nothing but these rows, besides everyone's keys and values.
        """
        ops = self._ops
        residual = functional.embedding(input_ids, self._embedding)
        angles = self._rotary(residual.new_empty(0, dtype=torch.float32), positions[None])
        cos, sin = (angle[0] for angle in angles)
        delta = None
        for layer in self._layers:
            x = ops.add_norm(residual, delta, layer.norm.weight, layer.norm.eps)
            q, k, v = ops.split_rope(layer.qkv(x), cos, sin, layer.heads, layer.head_norms)
            is_tail = layer is self._layers[-1] and step.tails is not None
            if is_tail and keep is not None:
                if not len(keep):
                    store(step, layer.index, k, v)
                    return residual.new_empty(0, 0)
                q, residual, keep = q.index_select(0, keep), residual.index_select(0, keep), None
            attended = attend(step, layer.index, q, k, v, scale=layer.scale, is_tail=is_tail)
            delta = layer.out(attended.view(len(attended), -1))
            x = ops.add_norm(residual, delta, layer.mlp_norm.weight, layer.mlp_norm.eps)
            delta = layer.down(ops.silu_mul(layer.gate_up(x)))
        x = ops.add_norm(residual, delta, self._norm.weight, self._norm.eps)
        return self._head(x if keep is None else x.index_select(0, keep))


def fused_decoder(model: PreTrainedModel) -> Decoder | None:
    """The fused forward pass of a model, weights shared; None where the model is not known to be alike."""
    if type(model).__name__ not in FUSED_FAMILIES or model.device.type != "cpu" or _is_changed(model):
        return None
    config: Any = model.config
    rotary: Any = model.base_model.rotary_emb
    layers: Any = model.base_model.layers
    is_alike = (
        config.hidden_act == "silu"
        and 2 * rotary.inv_freq.numel() == layers[0].self_attn.head_dim
        and all(_has_one_kind_of_bias(layer) for layer in layers)
        and len({parameter.dtype for parameter in model.parameters()}) == 1
    )
    return Decoder(model, layer_ops(model.dtype)) if is_alike else None


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies packed matrices of this dtype on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _is_changed(model: nn.Module) -> bool:
    """Whether some module was given hooks or a forward of its own."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )


def _has_one_kind_of_bias(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    merged = ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj))
    return all(len({p.bias is None for p in projections}) == 1 for projections in merged)


def _layer(module: Any) -> _Layer:
    attention = module.self_attn
    dim = int(attention.head_dim)
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    norms = None
    if q_norm is not None and k_norm is not None:
        q, k = _norm(q_norm), _norm(k_norm)
        norms = HeadNorms(q.weight, k.weight, q.eps)
    return _Layer(
        index=int(attention.layer_idx),
        scale=float(attention.scaling),
        heads=Heads(attention.q_proj.out_features // dim, attention.k_proj.out_features // dim, dim),
        head_norms=norms,
        norm=_norm(module.input_layernorm),
        qkv=Linear(attention, "q_proj", "k_proj", "v_proj"),
        out=Linear(attention, "o_proj"),
        mlp_norm=_norm(module.post_attention_layernorm),
        gate_up=Linear(module.mlp, "gate_proj", "up_proj"),
        down=Linear(module.mlp, "down_proj"),
    )


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight.detach(), float(module.variance_epsilon))
