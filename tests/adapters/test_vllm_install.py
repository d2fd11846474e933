"""Finding a vLLM, spelling its flags, and reading the cause out of its log."""

import pytest

from kvtune.adapters.vllm_install import VLLMInstall, VLLMOffer, knob_flags, root_cause
from kvtune.errors import EngineUnavailableError


def offer(**changes) -> VLLMOffer:
    values = {
        "version": "0.32.0", "has_vllm_command": True, "platform": "cpu", "torch": "2", "transformers": "5",
        "attention_backend": "CPU_ATTN", "model_dtype": "bfloat16", "max_model_len": 64,
        "kv_dtypes": {"auto": None, "bfloat16": None, "fp8": None, "fp8_e4m3": None, "fp8_ds_mla": None,
                      "int8_per_token_head": "CPU_ATTN does not list it"},
        "block_sizes": [32], "default_block_size": 128, "default_max_num_seqs": 128,
        "default_max_num_batched_tokens": 2048, "default_enable_prefix_caching": True, "flags": [],
    }  # fmt: skip
    return VLLMOffer(**values | changes)


def test_dtypes_to_search_leave_out_aliases_autos_equal_the_unsupported_and_the_unsizeable():
    assert offer().search_dtypes() == ("auto", "fp8_e4m3")


def test_the_vllm_command_is_used_where_it_works_and_its_module_where_the_build_breaks_it(tmp_path):
    python = tmp_path / "python"
    (tmp_path / "vllm").touch(mode=0o755)
    install = VLLMInstall(python)
    assert install.launcher(offer(), "m") == [str(tmp_path / "vllm"), "serve", "m"]
    assert install.launcher(offer(has_vllm_command=False), "m")[:3] == [
        str(python), "-m", "vllm.entrypoints.openai.api_server"]  # fmt: skip


def test_every_knob_has_its_flag_and_absent_ones_keep_vllms_default():
    flags = knob_flags({"kv_dtype": "fp8_e4m3", "block_size": 32, "enable_prefix_caching": False})
    assert flags == ["--kv-cache-dtype", "fp8_e4m3", "--block-size", "32", "--no-enable-prefix-caching"]


def test_without_a_vllm_the_error_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineUnavailableError, match=r"not found on PATH.*pip install .*--vllm-python"):
        VLLMInstall.locate()
    with pytest.raises(EngineUnavailableError, match="no executable file"):
        VLLMInstall.locate(tmp_path / "python")


def test_a_python_without_vllm_is_named_with_the_install_line(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'vllm'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(EngineUnavailableError, match=r"has no vLLM; install it"):
        VLLMInstall.locate(python).ask(tmp_path, {})


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            "(Worker pid=1) ERROR 11-22 02:30:21 [m.py:1063] ValueError: No common block size for 16.\n"
            "RuntimeError: Worker failed with error 'No common block size', please check\n"
            "RuntimeError: Engine core initialization failed. See root cause above.",
            "No common block size for 16.",
        ),
        ("RuntimeError: Engine core initialization failed.", "Engine core initialization failed."),
        (
            "(A pid=1) WARNING 11-22 02:30:21 [b.py:1] ValueError: only a warning\n"
            "torch.OutOfMemoryError: out of memory",
            "out of memory",
        ),
        ("vllm serve: error: argument --block-size: invalid", "argument --block-size: invalid"),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for SchedulerConfig\n"
            "  Value error, max_num_batched_tokens (4) is too small [type=value_error, input=4]",
            "max_num_batched_tokens (4) is too small",
        ),
        ("INFO all is well: really", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_cause_in_a_log_is_the_first_error_that_is_no_consequence(log, cause):
    assert root_cause(log) == cause
