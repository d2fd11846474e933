"""Conformance of a `Codec`: each sentence of the port's contract, proved on chosen and random vectors."""

from __future__ import annotations

import torch

from kvtune.codecs import Codec

__all__ = ["HEAD_DIMS", "CodecSuite", "awkward_vectors"]

HEAD_DIMS = (32, 64, 80, 96, 128, 256)


def awkward_vectors(head_dim: int, *, seed: int = 0) -> torch.Tensor:
    """Finite vectors float32 [T, 2, head_dim] at which codecs fail first.

    Zeros, negative zeros, one channel 1e4 times the others, subnormals of fp16 and of fp32, a constant, a
    large common offset, values beyond fp16, values near float32's end, and plain normals.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(10, 2, head_dim, generator=generator)
    normal[0] = 0.0
    normal[1] = -0.0
    normal[2, :, 0] *= 1e4
    normal[3] *= 1e-7
    normal[4] *= 1e-40
    normal[5] = 3.25
    normal[6] += 1000.0
    normal[7] *= 1e6
    normal[8] *= 5e37
    return normal


class CodecSuite:
    """Subclass with `make_codec`; holds for every codec, whatever it stores."""

    def make_codec(self) -> Codec:
        raise NotImplementedError

    def test_decoding_stays_within_the_declared_bound(self) -> None:
        codec = self.make_codec()
        for head_dim in HEAD_DIMS:
            x = awkward_vectors(head_dim)
            error = (codec.decode(codec.encode(x)) - x).abs().amax(-1)
            bound = codec.error_bound(x)
            assert bound.shape == error.shape
            assert bool((error <= bound).all()), f"head dim {head_dim}: {error} exceeds {bound}"

    def test_the_bound_says_something(self) -> None:
        codec = self.make_codec()
        x = torch.randn(64, 2, 64, generator=torch.Generator().manual_seed(0))
        assert bool((codec.error_bound(x) < x.abs().amax(-1)).all())

    def test_a_zero_vector_stays_zero(self) -> None:
        codec = self.make_codec()
        assert bool((codec.decode(codec.encode(torch.zeros(3, 2, 64))) == 0).all())

    def test_each_token_and_head_is_encoded_by_itself(self) -> None:
        codec = self.make_codec()
        x = awkward_vectors(64)
        whole = codec.decode(codec.encode(x))
        for t in range(x.shape[0]):
            for h in range(x.shape[1]):
                alone = codec.decode(codec.encode(x[t : t + 1, h : h + 1]))
                assert torch.equal(alone[0, 0], whole[t, h])

    def test_nan_and_infinity_stay_in_their_vector_and_are_seen_there(self) -> None:
        codec = self.make_codec()
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(1))
            clean = codec.decode(codec.encode(x))
            x[2, 1, 7] = bad
            decoded = codec.decode(codec.encode(x))
            assert not bool(decoded[2, 1].isfinite().all())
            assert bool(codec.error_bound(x)[2, 1].isinf())
            decoded[2, 1] = clean[2, 1]
            assert torch.equal(decoded, clean)

    def test_stored_size_is_what_spec_says(self) -> None:
        codec = self.make_codec()
        encoded = codec.encode(torch.zeros(4, 2, 64))
        assert encoded.strip.dtype == torch.float16
        assert tuple(encoded.strip.shape) == (4, 2, codec.storage.strip_values)
        assert tuple(encoded.codes.shape) == (4, 2, 64)
        if encoded.codes.is_floating_point():
            assert encoded.codes.element_size() * 8 == codec.storage.code_bits
        else:
            random = codec.encode(torch.randn(64, 2, 64, generator=torch.Generator().manual_seed(2)))
            assert int(random.codes.max()) < 1 << codec.storage.code_bits

    def test_sixteen_bit_inputs_give_what_their_float32_values_give(self) -> None:
        codec = self.make_codec()
        x = torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
        assert torch.equal(codec.decode(codec.encode(x)), codec.decode(codec.encode(x.float())))
