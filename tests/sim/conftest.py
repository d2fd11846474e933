"""A small simulated server."""

from __future__ import annotations

import pytest
from sim_case import MODELS, LinearCost

from kvtune.config import CacheConfig, SchedulerConfig
from kvtune.sim import Simulation
from kvtune.spec import ModelSpec


@pytest.fixture
def simulate():
    """Build a simulation of a small server; keywords of both settings classes, mixed."""

    def make(model="llama", *, cost=None, max_model_len=256, fingerprint=b"", cache=None, **scheduler):
        return Simulation(
            ModelSpec.from_config(MODELS[model]),
            cache=CacheConfig(**{"kv_budget": "512KiB", "block_size": 16, **(cache or {})}),
            scheduler=SchedulerConfig(**{"max_num_seqs": 16, "max_num_batched_tokens": 64, **scheduler}),
            max_model_len=max_model_len,
            cost=cost or LinearCost(),
            fingerprint=fingerprint,
        )

    return make
