"""The knapsack behind a per-layer table: against every combination, on drawn instances and awkward ones."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.errors import InvariantError
from kvtune.tune.allocation import Allocation, Option, Unit, frontier, options_of, raised, within


def every(units: list[Unit]) -> list[tuple[int, float]]:
    choices = itertools.product(*(unit.options for unit in units))
    return [(sum(o.num_bytes for o in c), sum(o.harm for o in c)) for c in choices]


options = st.builds(
    lambda num_bytes, k, v: Option(codecs=("a", "b"), num_bytes=num_bytes, harms=(k, v)),
    st.integers(-2000, 2000),
    st.floats(0, 1),
    st.floats(0, 1),
)
instances = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5).map(
    lambda rows: [Unit(layers=(i,), options=tuple(row)) for i, row in enumerate(rows)]
)


@settings(max_examples=150, deadline=None)
@given(instances, st.integers(-10_000, 10_000))
def test_no_combination_within_a_budget_does_less_harm(units: list[Unit], budget: int) -> None:
    fitting = [harm for size, harm in every(units) if size <= budget]
    found = within(frontier(units), budget)
    if not fitting:
        assert found is None
    else:
        assert found is not None and found.num_bytes <= budget
        assert found.harm == pytest.approx(min(fitting), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(instances)
def test_the_frontier_falls_in_bytes_as_it_grows_in_harm_and_says_what_it_chose(units: list[Unit]) -> None:
    front = frontier(units)
    for larger, smaller in itertools.pairwise(front):
        assert larger.num_bytes > smaller.num_bytes and larger.harm < smaller.harm
    for allocation in front:
        chosen = [unit.options[i] for unit, i in zip(units, allocation.choice, strict=True)]
        assert allocation.num_bytes == sum(o.num_bytes for o in chosen)
        assert allocation.harm == pytest.approx(sum(o.harm for o in chosen))


def bits(layer: int, harm: float) -> Unit:
    """8 bits, or 4 at a cost, for keys and values alike."""
    harms = [{"int8": 0.0, "int4": harm}, {"int8": 0.0, "int4": harm / 10}]
    sizes = {(k, v): -60 * ((k == "int4") + (v == "int4")) for k in harms[0] for v in harms[1]}
    return Unit(layers=(layer,), options=options_of(harms, sizes))


def test_bits_leave_where_they_hurt_least() -> None:
    units = [bits(0, 5.0), bits(1, 0.1)]
    found = within(frontier(units), -120)
    assert found is not None
    assert found.table(units) == {0: ("int8", "int8"), 1: ("int4", "int4")}


def test_many_layers_stay_within_the_states_kept_and_close_to_the_optimum() -> None:
    units = [bits(layer, 1.0 + 0.37 * layer) for layer in range(40)]
    exact, thinned = frontier(units), frontier(units, max_states=64)
    assert len(thinned) <= 64
    for budget in (-600, -2400, -4000):
        best, near = within(exact, budget), within(thinned, budget)
        assert best is not None and near is not None
        assert best.harm <= near.harm <= 1.25 * best.harm + 0.5
    assert thinned[0].num_bytes == exact[0].num_bytes and thinned[-1].num_bytes == exact[-1].num_bytes


def test_the_most_harmful_side_is_raised_first_and_in_the_end_none_is_left() -> None:
    units = [bits(0, 0.2), bits(1, 1.0)]
    now: Allocation | None = frontier(units)[-1]
    tables = []
    while now is not None:
        tables.append(now.table(units))
        now = raised(units, now)
    assert tables[0] == {0: ("int4", "int4"), 1: ("int4", "int4")}
    assert tables[1] == {0: ("int4", "int4"), 1: ("int8", "int4")}
    assert tables[2] == {0: ("int8", "int4"), 1: ("int8", "int4")}
    assert tables[-1] == {0: ("int8", "int8"), 1: ("int8", "int8")} and len(tables) == 5


def test_raising_takes_the_next_larger_codec_that_hurts_less_not_the_largest() -> None:
    harms = [{"bf16": 0.0, "int8": 0.1, "fp8": 0.6, "int4": 0.5}, {"int8": 0.0}]
    sizes = {("bf16", "int8"): 0, ("int8", "int8"): -100, ("fp8", "int8"): -100, ("int4", "int8"): -160}
    units = [Unit(layers=(0,), options=options_of(harms, sizes))]
    smallest = frontier(units)[-1]
    higher = raised(units, smallest)
    assert higher is not None and higher.table(units) == {0: ("int8", "int8")}


def test_without_options_there_is_nothing_to_allocate() -> None:
    with pytest.raises(InvariantError, match="options"):
        frontier([])
    with pytest.raises(InvariantError, match="options"):
        frontier([Unit(layers=(0,), options=())])
