"""Fitting step times: known coefficients are found again, noise is averaged, bad files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sim_case import GEMMA, LLAMA

from kvtune.config import CacheConfig
from kvtune.errors import InputFileError, UsageError
from kvtune.sched.shape import CALIBRATION_VERSION, SHAPE_COLUMNS, ReadGeometry, StepShapes
from kvtune.sim import FittedCost, RooflineCost, load_calibration
from kvtune.sim.nnls import nonnegative_least_squares
from kvtune.spec import ModelSpec
from kvtune.types import Admission, MissCause, ScheduledChunk, SchedulerOutput


def random_shapes(rng, count):
    """Steps as an engine makes them: decodes over contexts, and in half of them a prefill chunk."""
    geometry = ReadGeometry.of(ModelSpec.from_config(LLAMA).kv_groups(), CacheConfig(), num_heads=None)
    rows = []
    for _ in range(count):
        chunks = [(int(rng.integers(1, 2000)), 1, True) for _ in range(int(rng.integers(0, 33)))]
        if not chunks or rng.random() < 0.5:
            chunks.append((int(rng.integers(0, 1000)), int(rng.integers(2, 513)), bool(rng.integers(0, 2))))
        rows.append(geometry.row_of(chunks))
    return np.array(rows)


def true_seconds(shapes):
    """Weights are read once up to 32 rows, then every row costs; attention by bytes and pairs."""
    rows = shapes[:, 0] + shapes[:, 2]
    return (
        2e-3 + 3e-5 * np.maximum(rows, 32) + 2e-5 * shapes[:, 3] + 1e-10 * shapes[:, 4] + 5e-9 * shapes[:, 6]
    )


def test_exact_steps_are_predicted_on_shapes_the_fit_has_not_seen():
    rng = np.random.default_rng(0)
    shapes = random_shapes(rng, 1500)
    model = FittedCost.fit(shapes, true_seconds(shapes))
    assert model.error is not None
    assert model.error.num_shapes > 100
    assert model.error.mean_absolute < 0.01
    unseen = random_shapes(rng, 300)
    assert np.abs(model.seconds(unseen) / true_seconds(unseen) - 1).mean() < 0.01


def test_noise_does_not_bias_the_sum_of_predicted_steps():
    rng = np.random.default_rng(1)
    shapes = random_shapes(rng, 3000)
    seconds = true_seconds(shapes) * (1 + rng.exponential(0.1, len(shapes)))  # only ever slower
    model = FittedCost.fit(shapes, seconds)
    fresh = random_shapes(rng, 2000)
    assert model.seconds(fresh).sum() == pytest.approx(1.1 * true_seconds(fresh).sum(), rel=0.02)
    assert model.error is not None
    assert model.error.mean_absolute < 0.12


def test_a_machine_that_stood_still_for_a_second_does_not_make_every_step_slower():
    rng = np.random.default_rng(2)
    shapes = random_shapes(rng, 2000)
    seconds = true_seconds(shapes)
    clean = FittedCost.fit(shapes, seconds).seconds(shapes).sum()
    seconds[rng.integers(0, 2000, 3)] += 5.0
    assert FittedCost.fit(shapes, seconds).seconds(shapes).sum() == pytest.approx(clean, rel=0.02)


def test_one_step_costs_what_it_costs_among_many():
    rng = np.random.default_rng(3)
    shapes = random_shapes(rng, 400)
    model = FittedCost.fit(shapes, true_seconds(shapes))
    beyond = shapes.copy()
    beyond[:, 2] += 4000  # more rows than were ever measured
    for rows in (shapes, beyond, np.zeros((1, len(SHAPE_COLUMNS)))):
        together = model.seconds(rows)
        assert [model.step_s(row) for row in rows.tolist()] == pytest.approx(together.tolist())
        assert (together > 0).all()


def test_more_work_never_takes_less_time():
    rng = np.random.default_rng(4)
    shapes = random_shapes(rng, 600)
    model = FittedCost.fit(shapes, true_seconds(shapes) * rng.uniform(0.8, 1.2, len(shapes)))
    base = model.seconds(shapes)
    for column in range(len(SHAPE_COLUMNS)):
        more = shapes.copy()
        more[:, column] += 50.0
        assert (model.seconds(more) >= base - 1e-12).all()


def test_submissions_are_fitted_by_a_line():
    rng = np.random.default_rng(5)
    shapes = random_shapes(rng, 300)
    tokens = rng.integers(1, 4000, 200).astype(float)
    submissions = np.stack((tokens, 2e-5 + 1e-7 * tokens), axis=1)
    model = FittedCost.fit(shapes, true_seconds(shapes), submissions=submissions)
    assert model.submission_s(1000) == pytest.approx(1.2e-4)


def test_too_few_shapes_are_refused():
    shapes = random_shapes(np.random.default_rng(6), 10)
    with pytest.raises(UsageError, match="at least 24 distinct batch shapes, found 10"):
        FittedCost.fit(shapes, true_seconds(shapes))


def test_a_roofline_is_bound_by_bytes_for_few_rows_and_by_operations_for_many():
    cost = RooflineCost(
        bandwidth=1e12, flops=1e14, weights_bytes=1e10, num_parameters=5e9, pair_flops=1e4, efficiency=1.0,
        overhead_s=0.0,
    )  # fmt: skip
    few, many = np.zeros((1, len(SHAPE_COLUMNS))), np.zeros((1, len(SHAPE_COLUMNS)))
    few[0, 0], many[0, 2] = 1, 4096
    assert cost.seconds(few)[0] == pytest.approx(1e10 / 1e12)
    assert cost.seconds(many)[0] == pytest.approx(2 * 5e9 * 4096 / 1e14)
    assert cost.to_dict()["source"] == "roofline"
    with pytest.raises(UsageError, match="bandwidth must be above zero"):
        RooflineCost(bandwidth=0, flops=1, weights_bytes=1, num_parameters=1, pair_flops=1)


def test_nnls_agrees_with_exhaustive_search_over_which_columns_are_used():
    rng = np.random.default_rng(7)
    for _ in range(30):
        a, b = rng.normal(size=(12, 4)), rng.normal(size=12)
        best = np.inf
        for mask in range(16):
            columns = [j for j in range(4) if mask >> j & 1]
            x = np.zeros(4)
            if columns:
                x[columns] = np.linalg.lstsq(a[:, columns], b, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(np.linalg.norm(a @ x - b)))
        found = nonnegative_least_squares(a, b)
        assert (found >= 0).all()
        assert np.linalg.norm(a @ found - b) == pytest.approx(best, abs=1e-9)


def calibration(**changes):
    shapes = random_shapes(np.random.default_rng(8), 60)
    body = {
        "calibration_version": CALIBRATION_VERSION, "columns": list(SHAPE_COLUMNS),
        "facts": {"dtype": "bf16"},
        "shapes": shapes.tolist(), "seconds": true_seconds(shapes).tolist(), "submissions": [[10, 1e-4]],
    }  # fmt: skip
    return {**body, **changes}


def test_a_calibration_file_is_read_back_with_its_facts(tmp_path: Path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(calibration()))
    model = load_calibration(path)
    assert model.source == "fitted"
    assert model.to_dict()["calibrated_on"] == {"dtype": "bf16"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a calibration file"),
        (json.dumps({"calibration_version": 1}), "not a calibration file"),
        (
            json.dumps(calibration(calibration_version=9)),
            f"version 9, this kvtune reads {CALIBRATION_VERSION}",
        ),
        (json.dumps(calibration(seconds=[1.0])), "1 times do not belong to shapes"),
        (json.dumps(calibration(shapes=[[1, 2]], seconds=[1.0])), "do not belong to shapes"),
        (
            json.dumps(calibration(shapes=[["x"] * len(SHAPE_COLUMNS)], seconds=[1.0])),
            "not a calibration file",
        ),
        (json.dumps(calibration(seconds=[-1.0] * 60)), "negative or infinite"),
        (json.dumps(calibration(seconds=[1e999] * 60)), "negative or infinite"),
        (json.dumps(calibration(submissions=[[1, -1.0]])), "negative or infinite"),
    ],
)
def test_a_damaged_calibration_file_is_refused_in_one_line(tmp_path: Path, content: str, message: str):
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(InputFileError, match=message) as refusal:
        load_calibration(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_a_missing_calibration_file_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(InputFileError, match="--calibrate"):
        load_calibration(tmp_path / "none.json")


@pytest.mark.parametrize("config", [LLAMA, GEMMA])
def test_the_shape_of_a_run_of_decodes_is_that_of_its_steps(config):
    geometry = ReadGeometry.of(ModelSpec.from_config(config).kv_groups(), CacheConfig(), num_heads=None)
    contexts = np.array([1, 5, 23, 24, 25, 90])
    rows = geometry.decode_rows(contexts, 40)
    one_by_one = [geometry.row_of([(int(c) - 1 + step, 1, True) for c in contexts]) for step in range(40)]
    np.testing.assert_allclose(rows, one_by_one)


def chunk(name, start, num_tokens, *tables):
    return ScheduledChunk(
        request_id=name, token_ids=np.zeros(num_tokens, dtype=np.int32), start=start,
        block_tables=tuple(np.array(table, dtype=np.int32) for table in tables), samples=True,
    )  # fmt: skip


def test_a_block_that_several_sequences_hold_counts_once_in_distinct_bytes():
    groups = ModelSpec.from_config(GEMMA).kv_groups()
    geometry = ReadGeometry.of(groups, CacheConfig(block_size=16), num_heads=None)
    block = {g.window: 16 * 2 * g.num_kv_heads * g.k_head_dim * 2 * len(g.layers) for g in groups}
    tables = {None: ([0, 1, 2, 3], [0, 1, 4], [0, 1, 2, 5]), 24: ([-1, -1, 6, 7], [-1, 8, 9], [-1, -1, 6, 5])}
    order = [g.window for g in groups]
    chunks = [
        chunk(name, start, n, *(tables[window][i] for window in order))
        for i, (name, start, n) in enumerate([("a", 63, 1), ("b", 40, 8), ("c", 63, 1)])
    ]
    row = dict(zip(SHAPE_COLUMNS, geometry.row(SchedulerOutput(step=1, others=tuple(chunks))), strict=True))
    # blocks 0 and 1 three times and 2 twice in the full group, 6 twice in the sliding one
    repeated = 5 * block[None] + block[24]
    assert row["distinct_bytes"] == row["decode_bytes"] + row["prefill_bytes"] - repeated
    alone = dict(
        zip(SHAPE_COLUMNS, geometry.row(SchedulerOutput(step=1, others=tuple(chunks[:1]))), strict=True)
    )
    assert alone["distinct_bytes"] == alone["decode_bytes"]


def test_what_attention_reads_for_several_at_once_counts_once_in_decode_bytes():
    spec = ModelSpec.from_config(LLAMA)
    (group,) = spec.kv_groups()
    alike = np.arange(1024, dtype=np.int32)
    tables = [(np.append(alike, np.int32(2000 + i)),) for i in range(3)]
    starts = np.array([1024 * 16 + 3] * 3)
    overlaps = {
        heads: ReadGeometry.of((group,), CacheConfig(block_size=16), num_heads=heads).overlap(tables, starts)
        for heads in (None, spec.num_attention_heads)
    }
    block = 16 * 2 * group.num_kv_heads * group.k_head_dim * 2 * len(group.layers)
    assert {overlap.repeated_bytes for overlap in overlaps.values()} == {2 * 1024 * block}
    assert overlaps[None].saved_bytes == 0
    assert overlaps[spec.num_attention_heads].saved_bytes == 2 * 1024 * block
    geometry = ReadGeometry.of((group,), CacheConfig(block_size=16), num_heads=spec.num_attention_heads)
    together = overlaps[spec.num_attention_heads]
    rows = geometry.decode_rows(starts + 1, 2, overlap=together)
    plain = geometry.decode_rows(starts + 1, 2)
    assert (plain[:, 4] - rows[:, 4] == together.saved_bytes).all()
    assert rows[0].tolist() == geometry.row_of((), decode_starts=starts.tolist(), overlap=together)


def test_what_a_prefill_leaves_behind_fades_from_step_to_step():
    shapes = StepShapes(ReadGeometry.of(ModelSpec.from_config(LLAMA).kv_groups(), CacheConfig(), num_heads=4))

    def after_prefill(num_tokens):
        step = SchedulerOutput(step=1, others=(chunk("a", 32, num_tokens, [0, 1, 2]),))
        return shapes.row(step)[SHAPE_COLUMNS.index("after_prefill")]

    assert [after_prefill(n) for n in (1, 8, 1, 1, 1)] == pytest.approx([0, 0, 1, 1 / 2, 1 / 3])
    rows = shapes.decode_rows(np.array([40]), 5)
    assert rows[:, -1] == pytest.approx([1 / 4, 1 / 5, 1 / 6, 1 / 7, 1 / 8])
    shapes.decoded(3)
    assert after_prefill(1) == pytest.approx(1 / 7)
    assert after_prefill(2) == 0


def test_requests_that_leave_the_queue_count_with_all_their_tokens():
    geometry = ReadGeometry.of(
        ModelSpec.from_config(GEMMA).kv_groups(), CacheConfig(block_size=16), num_heads=None
    )
    chunks = (chunk("a", 32, 8, [0, 1, 2], [0, 1, 2]), chunk("b", 0, 8, [3], [3]))
    found = Admission(request_id="a", num_cached_tokens=32, misses={MissCause.NEVER_SEEN: 8})
    row = dict(
        zip(
            SHAPE_COLUMNS,
            geometry.row(SchedulerOutput(step=1, others=chunks, admitted=(found,))),
            strict=True,
        )
    )
    assert row["num_admitted"] == 1
    assert row["admitted_tokens"] == 40
    assert row["num_prefills"] == 2


def test_pairs_and_bytes_of_a_prefill_are_those_counted_query_by_query():
    geometry = ReadGeometry.of(ModelSpec.from_config(GEMMA).kv_groups(), CacheConfig(), num_heads=None)
    start, n = 17, 30
    pairs = seen = 0
    for group in ModelSpec.from_config(GEMMA).kv_groups():
        width = group.window or 10**9
        pairs += len(group.layers) * sum(min(p + 1, width) for p in range(start, start + n))
        keys = {k for p in range(start, start + n) for k in range(max(0, p - width + 1), p + 1)}
        per_token = 2 * group.num_kv_heads * group.k_head_dim * 2 * len(group.layers)  # K and V, 2 bytes each
        seen += len(keys) * per_token
    row = dict(zip(SHAPE_COLUMNS, geometry.row_of([(start, n, True)]), strict=True))
    assert row["prefill_pairs"] == pairs
    assert row["prefill_bytes"] == pytest.approx(seen)
