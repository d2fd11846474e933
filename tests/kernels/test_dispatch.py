"""The chosen backend is printable, and every refusal is one line."""

import pytest

from kvtune.errors import HostError, UsageError
from kvtune.kernels import choose_backend, dispatch


def test_named_backends_are_taken_as_given():
    for name in ("torch", "reference"):
        backend = choose_backend(name)
        assert (backend.name, backend.isa) == (name, None)
        assert backend.reason.startswith(name)


def test_without_a_library_auto_takes_torch_and_says_why(monkeypatch):
    monkeypatch.setattr(dispatch, "library_path", lambda: None)
    backend = choose_backend("auto")
    assert backend.name == "torch"
    assert "compiler" in backend.reason
    with pytest.raises(HostError, match="compiler"):
        choose_backend("native")


def test_a_library_that_does_not_load_falls_back_with_the_loaders_words(monkeypatch, tmp_path):
    broken = tmp_path / "libkvtune_kernels.so"
    broken.write_text("not a library")
    monkeypatch.setattr(dispatch, "library_path", lambda: broken)
    backend = choose_backend("auto")
    assert backend.name == "torch"
    assert "do not load" in backend.reason
    with pytest.raises(HostError, match="do not load"):
        choose_backend("native")


def test_the_environment_forces_an_instruction_set(monkeypatch):
    if dispatch.library_path() is None:
        pytest.skip("native kernels are not built")
    monkeypatch.setenv("KVTUNE_ISA", "portable")
    backend = choose_backend("auto")
    assert (backend.name, backend.isa) == ("native", "portable")
    monkeypatch.setenv("KVTUNE_ISA", "sse9")
    with pytest.raises(UsageError, match="sse9"):
        choose_backend("auto")


def test_an_unknown_backend_is_refused():
    with pytest.raises(UsageError, match=r"triton.*auto, native, torch, reference"):
        choose_backend("triton")
