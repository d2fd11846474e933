"""Adds models to the bundled ones: src/kvtune/plan/configs and src/kvtune/plan/catalogue.json.

    python tools/make_model_catalogue.py ORG--NAME.json [ORG--NAME.json ...]

A model that is there keeps its file and the size of its weights and is counted again. Each file is a
published config.json. Kept are the fields that decide sizes; parameters are counted on the `meta` device from
the Transformers class of the text decoder, so no weights are needed. A checkpoint that names a fp8
quantisation is weighed at one byte per parameter, any other at two.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

PLAN = Path(__file__).resolve().parents[1] / "src/kvtune/plan"
DROPPED = {
    "auto_map", "id2label", "label2id", "transformers_version", "vision_config", "audio_config",
    "_name_or_path", "return_dict", "output_attentions", "output_hidden_states",
}  # fmt: skip
EXPERTS_USED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
EXPERT = re.compile(r"\.experts\.|\.block_sparse_moe\.(input|output)_linear\.")
READ_AS = {"kimi_k2": "deepseek_v3", "qwen3_vl_text": "qwen3"}
"""Without a class for text of its own, with the fields of another."""


def trimmed(config: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in config.items():
        if name in DROPPED or (isinstance(value, float) and not math.isfinite(value)):
            continue
        if isinstance(value, list) and any(isinstance(v, float) and not math.isfinite(v) for v in value):
            continue
        if name == "quantization_config":
            kept[name] = {"quant_method": value.get("quant_method")}
        else:
            kept[name] = trimmed(value) if name.endswith("text_config") else value
    return kept


def count_parameters(config: dict[str, Any]) -> tuple[int, int]:
    """(all parameters, those that one token meets: of the experts, as many as it is routed to)."""
    text = {**config.get("text_config", config)}
    text.pop("quantization_config", None)
    kind = READ_AS.get(text["model_type"], text["model_type"])
    made = CONFIG_MAPPING[kind](**{k: v for k, v in text.items() if k != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made.get_text_config())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if EXPERT.search(name))
    used, held = (next((text[n] for n in names if text.get(n)), 0) for names in (EXPERTS_USED, EXPERTS))
    total = sum(sizes.values())
    return total, total - experts + (experts * used // held if experts else 0)


def main(files: list[str]) -> int:
    path = PLAN / "catalogue.json"
    catalogue = json.loads(path.read_text())
    for file in map(Path, files):
        config = json.loads(file.read_text())
        is_fp8 = "fp8" in str(config.get("quantization_config", {}))
        parameters, active = count_parameters(config)
        basis = "fp8, block scales not counted" if is_fp8 else "bf16"
        if "text_config" in config:
            basis += ", text decoder only"
        weights = {"weights_bytes": parameters * (1 if is_fp8 else 2), "basis": basis}
        name = file.stem.replace("--", "/", 1)
        counted = {"parameters": parameters, "active_parameters": active}
        catalogue[name] = {**counted, **weights, **catalogue.get(name, {}), **counted}
        out = PLAN / "configs" / file.name
        if not out.exists():
            out.write_text(json.dumps(trimmed(config), indent=2, sort_keys=True) + "\n")
        print(f"{name}: {parameters / 1e9:.2f}B parameters, {active / 1e9:.2f}B active, {basis}", flush=True)
    path.write_text(json.dumps(dict(sorted(catalogue.items())), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
