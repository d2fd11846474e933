"""Every built-in codec keeps its declared error bound on any vector."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.codecs import CODECS, codec
from kvtune.errors import UsageError
from kvtune.spec import CODEC_STORAGE
from kvtune.testing.codec import HEAD_DIMS, CodecSuite


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestFp32(CodecSuite):
    def make_codec(self):
        return CODECS["fp32"]


class TestBf16(CodecSuite):
    def make_codec(self):
        return CODECS["bf16"]


class TestFp16(CodecSuite):
    def make_codec(self):
        return CODECS["fp16"]


class TestInt8(CodecSuite):
    def make_codec(self):
        return CODECS["int8"]


class TestInt4(CodecSuite):
    def make_codec(self):
        return CODECS["int4"]


class TestFp8(CodecSuite):
    def make_codec(self):
        return CODECS["fp8"]


class TestInt4Rh(CodecSuite):
    def make_codec(self):
        return CODECS["int4_rh"]


class TestN8Rh(CodecSuite):
    def make_codec(self):
        return CODECS["n8_rh"]


class TestN4Rh(CodecSuite):
    def make_codec(self):
        return CODECS["n4_rh"]


@st.composite
def vectors(draw):
    """[3, 2, d] with each vector at a magnitude and offset of its own, some channels extreme."""
    d = draw(st.sampled_from(HEAD_DIMS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(3, 2, d, generator=generator)
    exponents = draw(st.lists(st.integers(-140, 120), min_size=6, max_size=6))
    x = x * torch.tensor(exponents, dtype=torch.float64).exp2().view(3, 2, 1)
    x[..., draw(st.integers(0, d - 1))] *= draw(st.sampled_from([0.0, 1.0, 100.0, 1e5]))
    x = x + draw(st.sampled_from([0.0, 0.0, 1.0, -3000.0, 7e4])) * x.abs().amax(-1, keepdim=True)
    return x.clamp(-3.3e38, 3.3e38).float()


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=150, deadline=None)
@given(x=vectors())
def test_error_never_exceeds_the_bound(name, x):
    c = CODECS[name]
    error = (c.decode(c.encode(x)).double() - x.double()).abs().amax(-1)
    assert (error <= c.error_bound(x)).all()


def test_bounds_are_tight_on_ordinary_data():
    x = torch.randn(500, 4, 128)
    for name, share in (("int8", 0.0045), ("int4", 0.08), ("bf16", 0.004), ("fp16", 0.0005)):
        relative = CODECS[name].error_bound(x) / x.abs().amax(-1)
        assert (relative < share).all(), name


def test_int8_uses_the_scale_as_it_is_stored():
    x = torch.randn(200, 2, 64)
    encoded = CODECS["int8"].encode(x)
    scale = encoded.strip.float()
    assert torch.equal(scale, (x.abs().amax(-1, keepdim=True) / 127).half().float())
    assert torch.equal(encoded.codes.float() - 128, torch.round(x / scale).clamp(-127, 127))


def test_int8_rounds_half_to_even():
    x = torch.zeros(1, 1, 8)
    x[0, 0] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5])
    codes = CODECS["int8"].encode(x).codes[0, 0].int() - 128
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -2, 4]


def test_scales_beyond_fp16_saturate_and_the_bound_says_so():
    x = torch.full((1, 1, 32), 1e8)
    for name in ("int8", "int4", "fp16"):
        decoded = CODECS[name].decode(CODECS[name].encode(x))
        assert decoded.isfinite().all()
        assert CODECS[name].error_bound(x) > 1e7


def test_the_registry_and_spec_know_the_same_codecs():
    assert set(CODECS) == set(CODEC_STORAGE)
    assert all(c.name == name for name, c in CODECS.items())


def test_an_unknown_codec_is_refused_with_the_known_ones():
    with pytest.raises(
        UsageError, match=r"int3.*known: fp32, bf16, fp16, int8, int4, fp8, int4_rh, n8_rh, n4_rh"
    ):
        codec("int3")
