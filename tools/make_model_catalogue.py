"""Adds models to the bundled ones: src/kvtune/plan/configs and src/kvtune/plan/catalogue.json.

    python tools/make_model_catalogue.py ORG--NAME.json [ORG--NAME.json ...]

Each file is a published config.json. Kept are the fields that decide sizes; parameters are counted on the
`meta` device from the Transformers class of the text decoder, so no weights are needed. A checkpoint that
names a fp8 quantisation is weighed at one byte per parameter, any other at two.
"""

from __future__ import annotations

import json
import math
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
READ_AS = {"kimi_k2": "deepseek_v3", "qwen3_vl_text": "qwen3"}
"""Without a class for text of its own, with the fields of another."""


def trimmed(config: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in config.items():
        if name in DROPPED or (isinstance(value, float) and not math.isfinite(value)):
            continue
        if name == "quantization_config":
            value = {"quant_method": value.get("quant_method")}
        if isinstance(value, list) and any(isinstance(v, float) and not math.isfinite(v) for v in value):
            continue
        kept[name] = trimmed(value) if isinstance(value, dict) and name.endswith("text_config") else value
    return kept


def count_parameters(config: dict[str, Any]) -> int:
    text = {**config.get("text_config", config)}
    text.pop("quantization_config", None)
    kind = READ_AS.get(text["model_type"], text["model_type"])
    made = CONFIG_MAPPING[kind](**{k: v for k, v in text.items() if k != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made.get_text_config())
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def main(files: list[str]) -> int:
    path = PLAN / "catalogue.json"
    catalogue = json.loads(path.read_text())
    for file in map(Path, files):
        config = json.loads(file.read_text())
        is_fp8 = "fp8" in str(config.get("quantization_config", {}))
        parameters = count_parameters(config)
        basis = "fp8, block scales not counted" if is_fp8 else "bf16"
        if "text_config" in config:
            basis += ", text decoder only"
        catalogue[file.stem.replace("--", "/", 1)] = {
            "parameters": parameters, "weights_bytes": parameters * (1 if is_fp8 else 2), "basis": basis,
        }  # fmt: skip
        (PLAN / "configs" / file.name).write_text(
            json.dumps(trimmed(config), indent=2, sort_keys=True) + "\n"
        )
        print(f"{file.stem}: {parameters / 1e9:.2f}B parameters, {basis}")
    path.write_text(json.dumps(dict(sorted(catalogue.items())), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
