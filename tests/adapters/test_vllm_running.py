"""What a running vLLM says about itself: settings read back, differences found, counters."""

import pytest

from kvtune.adapters.vllm_running import counters_of, effective_settings


class FakeClient:
    def __init__(self, **cache):
        self.cache = {
            "cache_dtype": "fp8_e4m3", "block_size": 32, "enable_prefix_caching": True, "num_gpu_blocks": 64,
            "kv_cache_size_tokens": 2048, "kv_cache_memory_bytes": 1 << 20,
        } | cache  # fmt: skip

    def get(self, path):
        assert path.startswith("/server_info")
        return {"vllm_config": {
            "cache_config": self.cache,
            "scheduler_config": {"max_num_seqs": 8, "max_num_batched_tokens": 256},
            "model_config": {"dtype": "torch.bfloat16", "max_model_len": 512},
        }}  # fmt: skip


class FakeTarget:
    """512 bytes per token in whole blocks."""

    class offer:  # noqa: N801
        attention_backend, version = "CPU_ATTN", "0.32.0"

    reference_context = 100

    def predicted_bytes(self, config, num_tokens):
        return -(-num_tokens // config["block_size"]) * config["block_size"] * 512

    def command(self, config, budget):
        return ["vllm"]


ASKED = {"kv_dtype": "fp8_e4m3", "block_size": 32, "max_num_seqs": 8}


def read_back(asked=ASKED, **cache):
    return effective_settings(FakeClient(**cache), asked=asked, budget=1 << 20, target=FakeTarget())


def test_what_runs_as_asked_has_no_findings_and_bytes_follow_from_what_runs():
    effective = read_back()
    assert effective["findings"] == []
    assert effective["kv_bytes_per_token"] == 4 * 32 * 512 / 100
    assert (effective["num_blocks"], effective["kv_capacity_tokens"]) == (64, 2048)
    assert (effective["kernel"], effective["dtype"]) == ("vllm:CPU_ATTN", "bfloat16")


@pytest.mark.parametrize(
    ("asked", "cache", "said"),
    [
        (ASKED, {"cache_dtype": "auto"}, "kv_dtype: asked for 'fp8_e4m3', vLLM runs 'auto'"),
        (ASKED | {"enable_prefix_caching": True}, {"enable_prefix_caching": False}, "enable_prefix_caching"),
        (ASKED | {"k_codec": "int8"}, {}, "k_codec: vLLM has no such knob"),
        (ASKED, {"kv_cache_memory_bytes": None}, "KV budget"),
        (ASKED, {"num_gpu_blocks": 90}, "should hold 64 blocks of 16384 bytes, vLLM made 90"),
    ],
)
def test_every_difference_from_what_was_asked_is_a_finding(asked, cache, said):
    findings = read_back(asked, **cache)["findings"]
    assert len(findings) == 1
    assert said in findings[0]


def test_capacity_leaves_out_vllms_null_block_where_it_is_not_stated():
    assert read_back(kv_cache_size_tokens=None)["kv_capacity_tokens"] == 63 * 32


def test_counters_are_summed_over_engines_and_their_creation_times_are_not_counters():
    text = (
        '# HELP vllm:prompt_tokens_total x\n'
        'vllm:prompt_tokens_total{engine="0",model_name="m"} 40.0\n'
        'vllm:prompt_tokens_total{engine="1",model_name="m"} 2.0\n'
        'vllm:prompt_tokens_created{engine="0",model_name="m"} 1.79e+09\n'
        'vllm:num_preemptions_total{engine="0"} 3.0\n'
        'vllm:prompt_tokens_by_source_total{source="local_compute"} 7.0\n'
    )  # fmt: skip
    counters = counters_of(text)
    assert counters["prompt_tokens"] == 42
    assert counters["num_preemptions"] == 3
    assert counters["prefix_cache_hits"] == 0
