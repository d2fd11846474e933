"""Whatever a config holds, reading it ends in a ModelSpec of sane size or in one typed error."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.errors import UnsupportedModelError, UsageError
from kvtune.plan import bundled_models, find_model
from kvtune.spec import ENGINES, KVFormat, ModelSpec, Paging, allocator_bytes, logical_bytes

CONFIGS = {name: find_model(name).config for name in bundled_models()}
HOSTILE = st.one_of(
    st.sampled_from([0, -1, 1, 7, 2**31, 2**40, 10**4000, -(10**30), True, False, None, 1.5, float("nan"),
                     float("inf"), "8", "", "full_attention", [], {}, [None], ["full_attention"],
                     ["mamba"] * 5000, {"0": {"head_dim": 8}}, {"text_config": {}}]),
    st.integers(-5, 200),
    st.text(max_size=8),
    st.lists(st.sampled_from(["full_attention", "sliding_attention", "mamba", "moe", 3]), max_size=70),
)  # fmt: skip
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def read_or_refuse(config: Any) -> None:
    try:
        spec = ModelSpec.from_config(config)
    except UnsupportedModelError as error:
        assert 0 < len(str(error)) < 2000
        return
    assert 1 <= len(spec.layers) <= 4096
    assert logical_bytes(spec, 4096, KVFormat.of("bf16")) >= 0
    for engine in ENGINES:
        try:
            assert allocator_bytes(spec, 4096, KVFormat.of("bf16"), engine, Paging(tp=2)) >= 0
        except UsageError as error:  # e.g. a head dim our packed layout does not hold
            assert engine == "kvtune", error


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_real_config_with_hostile_values_never_crashes(data: st.DataObject) -> None:
    config: Any = copy.deepcopy(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))])
    for _ in range(data.draw(st.integers(1, 3))):
        target = config
        if isinstance(config.get("text_config"), dict) and data.draw(st.booleans()):
            target = config["text_config"]
        field = data.draw(st.sampled_from([*sorted(target), "num_kv_shared_layers", "per_layer_config"]))
        if data.draw(st.integers(0, 4)) == 0:
            target.pop(field, None)
        else:
            target[field] = data.draw(HOSTILE)
    read_or_refuse(config)


@settings(max_examples=100, deadline=None)
@given(
    config=st.dictionaries(st.text(max_size=12), JSON, max_size=6),
    kind=st.sampled_from(["llama", "jamba", ""]),
)
def test_an_arbitrary_object_never_crashes(config: dict[str, Any], kind: str) -> None:
    read_or_refuse({**config, "model_type": kind} if kind else config)
