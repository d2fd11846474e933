"""What a layer keeps, what a codec stores, and the packed byte layout of one block of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvtune.errors import UsageError

__all__ = ["CODEC_STORAGE", "CodecStorage", "KVGroup", "LayerKind", "PackedLayout", "codec_storage"]

BLOCK_ALIGN = 64
"""Blocks and code tiles start on a cache line, so that one 64-byte load never straddles two."""


class LayerKind(StrEnum):
    """What a layer keeps between steps. Values are Transformers' `layer_types` words where it has them."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"
    CHUNKED = "chunked_attention"
    MLA = "mla"
    SHARED = "shared"
    """Attends to another layer's KV and stores none."""
    LINEAR = "linear_attention"
    MAMBA1 = "mamba1"
    MAMBA2 = "mamba2"
    CONV = "conv"
    """A short convolution (LFM2): a few past inputs per channel."""
    NONE = "none"
    """No attention, no state (an MLP-only layer)."""


@dataclass(frozen=True, slots=True)
class CodecStorage:
    """Stored bits of one codec: `code_bits` per element plus `strip_values` fp16 per token per head.

    `scale_group`: that many consecutive elements share one more scale of `scale_bytes` (NVFP4: 16 and 1);
    0 means none. `rope_bits`: an MLA latent's RoPE part is kept at this width (DeepSeek's fp8_ds_mla: 16);
    0 means like the rest. `low_bits` of `code_bits` lie in a plane of their own, which can be dropped.
    `is_rotated`: the vector is centred (keys) and rotated by Hadamard blocks before it is quantised.
    """

    name: str
    code_bits: int
    strip_values: int
    scale_group: int = 0
    scale_bytes: int = 1
    rope_bits: int = 0
    low_bits: int = 0
    is_rotated: bool = False

    def bits_per_element(self, head_dim: int) -> float:
        return 8 * self.head_bytes(head_dim) / head_dim

    def head_bytes(self, head_dim: int) -> int:
        """Bytes one token of one head takes, scales included, block padding not."""
        scales = -(-head_dim // self.scale_group) * self.scale_bytes if self.scale_group else 0
        return -(-head_dim * self.code_bits // 8) + 2 * self.strip_values + scales

    def latent_bytes(self, latent_dim: int, rope_dim: int) -> int:
        """Bytes one token of an MLA layer takes: the compressed latent and the shared RoPE key."""
        if not self.rope_bits:
            return self.head_bytes(latent_dim + rope_dim)
        return self.head_bytes(latent_dim) + -(-rope_dim * self.rope_bits // 8)


CODEC_STORAGE = {
    c.name: c
    for c in (
        CodecStorage("fp32", 32, 0),
        CodecStorage("bf16", 16, 0),
        CodecStorage("fp16", 16, 0),
        CodecStorage("int8", 8, 1),  # symmetric: scale
        CodecStorage("int4", 4, 2),  # asymmetric: scale, minimum
        CodecStorage("fp8", 8, 1),  # e4m3: scale
        CodecStorage("int4_rh", 4, 2, is_rotated=True),
        CodecStorage("n8_rh", 8, 2, low_bits=4, is_rotated=True),  # two nibble planes
        CodecStorage("n4_rh", 4, 2, is_rotated=True),  # the high plane of n8_rh alone
    )
}


def codec_storage(name: str) -> CodecStorage:
    """Storage facts of a codec; UsageError names the known ones."""
    try:
        return CODEC_STORAGE[name]
    except KeyError:
        raise UsageError(f"unknown KV codec {name!r}; known: {', '.join(CODEC_STORAGE)}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """Byte layout of one block of one layer. The same bytes serve CPU and GPU kernels.

    ::

        block = [K codes][V codes][K strip][V strip][pad to 64]

        K codes  [h][B/16][d/e][16 tokens][4 bytes]   e = elements in 4 bytes (fp32 1, bf16 2, int8 4, int4 8)
        V codes  [h][B/e][d][4 bytes]                 the 4 bytes hold e consecutive tokens of one dim
        strip    [h][strip_values][B] fp16            per token per head: scale (, minimum)

    A 4-byte word of K is one token's next e dims, so a 64-byte load is 16 tokens side by side: a dot
    product needs no horizontal sum, and the words are the B operand of VNNI (dpbusd, dpbf16ps) and of AMX.
    int4: the low nibbles of the word's 4 bytes are elements 0-3, the high nibbles elements 4-7.
    int8 is stored as unsigned with offset 128. (Layout: our micro-benchmarks of row-major against tiles.)
    n8_rh has its high nibbles here, packed like int4, and its low nibbles packed the same way in a separate
    region: one row of `k_low_bytes` or `v_low_bytes` per block that has its low plane.
    B must be a multiple of 16 and d of 8.
    """

    block_size: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    k_codec: str
    v_codec: str

    def __post_init__(self) -> None:
        if self.block_size % 16:
            raise UsageError(f"block size {self.block_size} is not a multiple of 16, which kernels need")
        for name, dim in (("k_head_dim", self.k_head_dim), ("v_head_dim", self.v_head_dim)):
            if dim % 8 or dim <= 0:
                raise UsageError(
                    f"{name} {dim} is not a positive multiple of 8, which the packed layout needs"
                )
        codec_storage(self.k_codec)
        codec_storage(self.v_codec)

    def _code_bytes(self, codec: str, dim: int) -> int:
        storage = codec_storage(codec)
        return self.num_kv_heads * self.block_size * dim * (storage.code_bits - storage.low_bits) // 8

    def _low_bytes(self, codec: str, dim: int) -> int:
        return self.num_kv_heads * self.block_size * dim * codec_storage(codec).low_bits // 8

    def _strip_bytes(self, codec: str) -> int:
        return self.num_kv_heads * self.block_size * codec_storage(codec).strip_values * 2

    @property
    def k_codes_bytes(self) -> int:
        return self._code_bytes(self.k_codec, self.k_head_dim)

    @property
    def v_codes_offset(self) -> int:
        return self.k_codes_bytes  # a multiple of 64: 16 tokens x 8 dims x 4 bits = 64 bytes

    @property
    def v_codes_bytes(self) -> int:
        return self._code_bytes(self.v_codec, self.v_head_dim)

    @property
    def k_strip_offset(self) -> int:
        return self.v_codes_offset + self.v_codes_bytes

    @property
    def k_strip_bytes(self) -> int:
        return self._strip_bytes(self.k_codec)

    @property
    def v_strip_offset(self) -> int:
        return self.k_strip_offset + self.k_strip_bytes

    @property
    def v_strip_bytes(self) -> int:
        return self._strip_bytes(self.v_codec)

    @property
    def arena_bytes(self) -> int:
        """Bytes of one block's row of the arena: all but low planes, padding included."""
        end = self.v_strip_offset + self.v_strip_bytes
        return -(-end // BLOCK_ALIGN) * BLOCK_ALIGN

    @property
    def k_low_bytes(self) -> int:
        """Bytes of the low plane of one block's keys; 0 for codecs that are not nested."""
        return self._low_bytes(self.k_codec, self.k_head_dim)

    @property
    def v_low_bytes(self) -> int:
        return self._low_bytes(self.v_codec, self.v_head_dim)

    @property
    def side_bytes(self) -> tuple[int, int]:
        """Bytes of (keys, values) in one block: codes, all planes and scales, without padding."""
        return (
            self.k_codes_bytes + self.k_strip_bytes + self.k_low_bytes,
            self.v_codes_bytes + self.v_strip_bytes + self.v_low_bytes,
        )

    @property
    def block_bytes(self) -> int:
        """Bytes one block takes with all its planes, scales and padding included."""
        return self.arena_bytes + self.k_low_bytes + self.v_low_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers that share one block table: same kind, window and head geometry.

    `layers` are model layer indices; `window` is in tokens (a query at position p sees
    positions > p - window), None for full attention.
    """

    index: int
    kind: LayerKind
    layers: tuple[int, ...]
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    window: int | None = None
