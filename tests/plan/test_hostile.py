"""Whatever a config holds, a plan of it ends in numbers or in one line naming the field, and quickly."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtune.errors import UnsupportedModelError, UsageError
from kvtune.plan import ModelSource, PlanRequest, bundled_models, find_model, plan_model
from kvtune.spec import ENGINES

CONFIGS = {name: dict(find_model(name).config) for name in bundled_models()}
VALUES = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**40, 10**400, True, None, 1.5, float("nan"), float("inf"), "8", "",
                     [], {}, [None], ["mamba"] * 5000, {"0": {"head_dim": 8}}, [[[[]]]]]),
    st.integers(-3, 300),
    st.text(max_size=6),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_config_gives_a_plan_or_one_short_line(data: st.DataObject) -> None:
    config: Any = copy.deepcopy(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))])
    target = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for _ in range(data.draw(st.integers(1, 3))):
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(VALUES)
    request = PlanRequest(
        engine=data.draw(st.sampled_from(sorted(ENGINES))), tp=data.draw(st.sampled_from([1, 2, 7])),
        gpu="h200", weights_bytes=1 << 30, contexts=(1, 4096, 1 << 27),
    )  # fmt: skip
    try:
        plan = plan_model(ModelSource(name="hostile", config=config), request)
    except (UnsupportedModelError, UsageError) as error:
        assert 0 < len(str(error)) < 2000
        assert "\n" not in str(error)
        return
    body = json.loads(json.dumps(plan.to_dict(explain=True)))
    for parts in body["at_context"].values():
        assert parts["allocator_bytes"] >= parts["logical_bytes"] >= 0


@pytest.mark.parametrize("name", bundled_models())
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_every_bundled_model_plans_on_every_engine(name: str, engine: str) -> None:
    plan = plan_model(find_model(name), PlanRequest(engine=engine, gpu="b300", contexts=(1, 131_072)))
    assert plan.capacity[0].max_concurrency.keys() == {"1", "131072"}
    assert plan.formulas
    assert json.dumps(plan.to_dict())
