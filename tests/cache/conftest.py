"""Managers keep their pools in native code where it was built; `pools` makes a module prove both."""

import pytest

from kvtune.cache import native


@pytest.fixture(params=["native", "python"])
def pools(request, monkeypatch):
    """A test module that uses it runs on native and on pure-Python pools."""
    if request.param == "python":
        monkeypatch.setattr(native, "library_path", lambda: None)
    elif native.library_path() is None:
        pytest.skip("the native pools are not built")
    return request.param
