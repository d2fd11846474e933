"""Our engine behind the Target port: knobs, effective settings, load, scores, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams
from kvtune.engine import EngineTarget
from kvtune.errors import InputFileError, KVTuneError, TargetError, UsageError
from kvtune.host import read_host
from kvtune.recipe import Recipe, codec_constants_sha256, configuration_of
from kvtune.target import LoadRequest, ScoreItem

CONFIG = {"k_codec": "int8", "v_codec": "int4", "block_size": 32, "enable_prefix_caching": True,
          "max_num_seqs": 4, "max_num_batched_tokens": 64}  # fmt: skip


class _Clock:
    """Time that moves by a millisecond per look and by what is slept."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def target(llama_folder, clock) -> EngineTarget:
    return EngineTarget(
        llama_folder, config=EngineConfig(kernel="torch"), cache=CacheConfig(kv_budget="2MiB"),
        clock=clock, sleep=clock.sleep,
    )  # fmt: skip


def _requests(count: int = 4, gap_s: float = 0.5) -> list[LoadRequest]:
    rng = np.random.default_rng(1)
    return [
        LoadRequest(
            request_id=f"r{index}", prompt_token_ids=rng.integers(3, 211, 20 + index).tolist(),
            max_tokens=6 + index, arrival_s=gap_s * index,
        )
        for index in range(count)
    ]  # fmt: skip


def test_knobs_offer_the_baseline_and_smaller_codecs(target):
    knobs = {knob.name: knob for knob in target.knobs()}
    assert set(knobs) == set(CONFIG)
    for knob in knobs.values():
        assert knob.baseline in knob.values
    assert knobs["k_codec"].values == ("bf16", "int8", "fp8", "n8_rh", "int4", "int4_rh")
    assert [knob.name for knob in knobs.values() if knob.is_lossy] == ["k_codec", "v_codec"]


def test_nested_the_code_of_two_planes_is_the_only_one_of_8_bits(llama_folder):
    nested = EngineTarget(llama_folder, config=EngineConfig(kernel="torch"), nested=True)
    knobs = {knob.name: knob for knob in nested.knobs()}
    assert knobs["k_codec"].values == knobs["v_codec"].values == ("bf16", "n8_rh", "int4", "int4_rh")
    assert nested.layer_codecs().codecs == ("bf16", "n8_rh", "int4", "int4_rh", "n4_rh")


def test_effective_settings_are_those_asked_for_read_from_the_engine(target):
    with target.start(CONFIG, kv_budget_bytes=1 << 20) as running:
        effective = running.effective
        assert {name: effective[name] for name in CONFIG} == CONFIG
        assert effective["num_blocks"] == (1 << 20) // running.engine._plan.block_bytes[0]
        assert effective["kv_capacity_tokens"] == 32 * effective["num_blocks"]
        assert effective["read_contract"] == "T0"
        assert effective["kernel"] == "torch"
        assert effective["dtype"] == "float32"
        predicted = target.kv_bytes_per_token(CONFIG, context=effective["reference_context"])
        assert effective["kv_bytes_per_token"] == predicted


def test_weights_are_read_once_for_all_starts(target):
    with target.start(CONFIG) as first, target.start({**CONFIG, "k_codec": "bf16"}) as second:
        assert first.engine.loaded is second.engine.loaded


def test_bytes_are_predicted_without_reading_the_weights(llama_folder):
    target = EngineTarget(llama_folder)
    baseline = target.kv_bytes_per_token({}, context=512)
    assert baseline == 2 * 2 * 2 * 32 * 2  # layers x (K, V) x heads x dim x bf16
    assert target.kv_bytes_per_token({"k_codec": "int8", "v_codec": "int8"}, context=512) < 0.54 * baseline
    assert target._loaded is None


def test_identity_names_model_engine_and_hardware(target, llama):
    identity = target.identity()
    assert identity["model"]["weights_sha256"] == llama.weights_sha256
    assert len(identity["model"]["tokenizer_sha256"]) == 64
    assert identity["engine"]["name"] == "kvtune"
    hardware = identity["hardware"]
    assert hardware["logical_cores"] >= hardware["num_cpus"] >= 1
    assert hardware["cpu"] == read_host().cpu


def test_a_load_honours_arrivals_and_sleeps_when_idle(target, clock):
    done: list[int] = []
    with target.start(CONFIG) as running:
        report = running.load(_requests(), on_done=done.append)
    assert done == [1, 2, 3, 4]
    assert sum(clock.slept) > 1.0
    assert report.duration_s >= 1.5
    for request, result in zip(_requests(), report.results, strict=True):
        assert result.request_id == request.request_id
        assert len(result.token_ids) == request.max_tokens
        assert result.error is None
        assert 0 < result.ttft_s < 0.4
        assert result.ttft_s < result.e2e_s
        assert result.tpot_s > 0
        assert len(result.itl_s) == request.max_tokens - 1
    assert report.counters["tokens_computed"] == sum(
        len(r.prompt_token_ids) + r.max_tokens - 1 for r in _requests()
    )
    assert report.counters["peak_requests_running"] == 1


def test_a_load_equals_generate_and_starts_from_an_empty_prefix_cache(target):
    with target.start({**CONFIG, "block_size": 16}) as running:
        expected = [tuple(tokens) for tokens in running.generate(_requests())]
        for _ in range(2):
            report = running.load(_requests(gap_s=0.0))
            assert [result.token_ids for result in report.results] == expected
            assert report.counters["hit_tokens"] == 0


def test_a_request_that_cannot_be_served_fails_alone(target):
    bad = LoadRequest(request_id="bad", prompt_token_ids=[999], max_tokens=3)
    with target.start(CONFIG) as running:
        report = running.load([bad, *_requests()])
    assert "outside the vocabulary" in report.results[0].error
    assert all(result.error is None for result in report.results[1:])


def test_a_deadline_ends_a_load_and_leaves_nothing_running(target):
    with target.start(CONFIG) as running:
        report = running.load(_requests(), deadline_s=0.6)
        assert [result.error is None for result in report.results] == [True, False, False, False] or (
            [result.error is None for result in report.results] == [True, True, False, False]
        )
        assert report.duration_s < 0.8
        assert running.engine.memory().referenced_bytes == 0
        assert not running.engine.has_unfinished
        assert running.load(_requests()).results[3].error is None


def test_scores_come_in_item_order(target):
    items = [
        ScoreItem(item_id=str(i), prompt_token_ids=[5 + i, 6], continuation=[9, 10 + i]) for i in range(3)
    ]
    with target.start(CONFIG) as running:
        assert [score.item_id for score in running.score(items, num_top=3)] == ["0", "1", "2"]


def test_a_configuration_that_cannot_fit_or_is_unknown_is_refused(target):
    with pytest.raises(UsageError, match="cannot hold one block"):
        target.start(CONFIG, kv_budget_bytes=64)
    with pytest.raises(UsageError, match="no knob 'kv_dtype'"):
        target.start({"kv_dtype": "fp8"})
    with pytest.raises(UsageError, match="unknown KV codec"):
        target.start({"k_codec": "int3"})


def test_a_missing_model_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(InputFileError, match=r"config\.json not found"):
        EngineTarget(tmp_path / "nothing")


def test_a_failing_engine_is_a_target_error_and_gives_its_memory_back(target):
    running = target.start(CONFIG)

    def explode(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    running.engine._runner.forward = explode
    with pytest.raises(TargetError, match="out of memory"):
        running.load(_requests())
    with pytest.raises(KVTuneError, match="closed"):
        running.generate(_requests())
    running.close()


def _recipe(target: EngineTarget, path, *, model=None, engine=None, **members) -> None:
    identity = target.identity()
    proven = Recipe(
        model={**identity["model"], **(model or {})}, engine={**identity["engine"], **(engine or {})},
        hardware=identity["hardware"],
        workload={}, read_contract="T0", kernel="torch", codec_constants_sha256=codec_constants_sha256(),
        configuration=configuration_of(CONFIG, kv_budget_bytes=1 << 20, engine={"kernel": "torch"}),
        baseline={}, evidence={}, quality={"verdict": "PASS"}, fallback={},
    )  # fmt: skip
    replace(proven, **members).save(path)


def test_an_engine_built_from_a_recipe_repeats_the_targets_tokens(target, tmp_path):
    _recipe(target, tmp_path / "recipe.json")
    with target.start(CONFIG, kv_budget_bytes=1 << 20) as running:
        expected = running.generate(_requests())
        fingerprint = running.effective["fingerprint"]
    with Engine.from_recipe(tmp_path / "recipe.json") as engine:
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        prompts = [request.prompt_token_ids for request in _requests()]
        for _ in ("miss", "hit"):
            outputs = engine.generate(prompts, params)
            assert [output.token_ids for output in outputs] == [tokens[:6] for tokens in expected]
        assert engine.effective(context=64)["fingerprint"] == fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"weights_sha256": "0" * 64}}, "was proven for weights 000000000000"),
        ({"engine": {"name": "vllm"}}, "for engine 'vllm'"),
        ({"read_contract": "T1"}, "read contract 'T1', this engine has T0"),
        ({"codec_constants_sha256": "1" * 64}, "codec constants 111111111111"),
    ],
)
def test_a_recipe_that_says_nothing_about_what_is_here_is_refused(target, tmp_path, change, message):
    _recipe(target, tmp_path / "recipe.json", **change)
    with pytest.raises(UsageError, match=message):
        Engine.from_recipe(tmp_path / "recipe.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "native"}, "proven with kernel path native, here it is torch"),
        ({"engine": {"version": "0.0.1"}}, r"proven with kvtune 0\.0\.1"),
    ],
)
def test_another_kernel_path_or_version_than_the_proven_one_is_a_warning(target, tmp_path, change, message):
    _recipe(target, tmp_path / "recipe.json", **change)
    with pytest.warns(UserWarning, match=message), Engine.from_recipe(tmp_path / "recipe.json") as engine:
        assert len(engine.generate([[5, 6]], SamplingParams(max_tokens=2))[0].token_ids) == 2


def test_memory_is_foreseen_to_the_byte_at_every_moment_from_lengths_alone(target) -> None:
    shared = _requests()[0].prompt_token_ids
    requests = [replace(r, prompt_token_ids=[*shared, *r.prompt_token_ids]) for r in _requests()]
    moments = target.memory_moments(CONFIG, requests)
    names = [m.name for m in moments]
    assert names == ["before load", "after load", "after prefill", "in decode", "after the run"]
    before, loaded, prefilled, decoding, after = moments
    assert before.allocated_bytes == 0 < loaded.allocated_bytes
    assert all(m.allocated_bytes == m.predicted_allocated_bytes for m in moments)
    assert all(m.used_bytes == m.predicted_used_bytes for m in moments)
    assert loaded.used_bytes == 0 == after.used_bytes
    assert 0 < prefilled.used_bytes < decoding.used_bytes
    assert prefilled.num_requests == len(requests)
    assert decoding.num_tokens > prefilled.num_tokens >= sum(len(r.prompt_token_ids) for r in requests)
    assert all((m.process_bytes or 1) > 0 for m in moments)
