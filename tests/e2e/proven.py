"""A recipe as `tune` would write it for this installation, without the tuning."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvtune.config import EngineConfig
from kvtune.engine.target import EngineTarget
from kvtune.recipe import Recipe, codec_constants_sha256, configuration_of
from kvtune.workload import load_workload, workload_profile

BASELINE = {
    "k_codec": "bf16", "v_codec": "bf16", "block_size": 16, "enable_prefix_caching": True,
    "max_num_seqs": 16, "max_num_batched_tokens": 512,
}  # fmt: skip
CITIES = ("Paris", "Oslo", "Rome", "Cairo", "Lima", "Bern", "Kyoto", "Quito")


def chats(path: Path, count: int, *, seed: int = 0, repeat: int = 1, first: int = 0) -> Path:
    """`count` short conversations; `repeat` makes every user message that many times as long."""
    rows: list[dict[str, Any]] = []
    for i in range(first, first + count):
        words = " ".join(CITIES[(i * 7 + seed + j * j) % len(CITIES)] for j in range(4 + (i * 5 + seed) % 9))
        turns = [
            {"role": "user", "content": f"My cities are {words}. " * repeat},
            {"role": "assistant", "content": "Noted."},
            {"role": "user", "content": f"Which city is number {i % 4 + 1}? " * repeat},
        ]
        rows.append({"messages": turns, "max_tokens": 6})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def proven_recipe(path: Path, model: Path, workload: Path, codec: str = "int8", **changes: Any) -> Path:
    """Write the recipe to `path`; `changes` replace whole members."""
    config = EngineConfig(num_threads=1)
    identity = EngineTarget(model, config=config).identity()
    requests = load_workload(workload)
    members: dict[str, Any] = {
        "model": identity["model"], "engine": identity["engine"], "hardware": identity["hardware"],
        "workload": {"sha256": requests.sha256, "block_size": None, "profile": workload_profile(requests)},
        "read_contract": "T0", "kernel": identity["engine"]["kernel"]["path"],
        "codec_constants_sha256": codec_constants_sha256(), "evidence": {}, "fallback": {},
        "configuration": configuration_of(
            {**BASELINE, "k_codec": codec, "v_codec": codec}, kv_budget_bytes=16 << 20,
            engine=config.to_dict(),
        ),
        "baseline": {"configuration": BASELINE}, "quality": {"verdict": "PASS", "proven": True},
        "provenance": {"margin": {"name": "aggressive", "probes": 0.3}},
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    return Recipe(**{**members, **changes}).save(path)
