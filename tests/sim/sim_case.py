"""A small model's layout, random workloads, and a cost model that is a plain formula."""

from __future__ import annotations

import numpy as np

from kvtune.sim import SimRequest

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
MODELS = {"llama": LLAMA, "gemma2": GEMMA}


class LinearCost:
    """`fixed` seconds, and `per_row` for each row of a step."""

    source = "test"

    def __init__(self, fixed: float = 0.01, per_row: float = 1e-4, submission: float = 0.0) -> None:
        self.fixed, self.per_row, self.submission = fixed, per_row, submission

    def seconds(self, shapes):
        return self.fixed + self.per_row * (shapes[:, 0] + shapes[:, 2])

    def step_s(self, row):
        return self.fixed + self.per_row * (row[0] + row[2])

    def submission_s(self, num_prompt_tokens):
        return self.submission

    def to_dict(self):
        return {"source": self.source}


def step_clock() -> LinearCost:
    """One second a step: arrival times are step numbers."""
    return LinearCost(fixed=1.0, per_row=0.0)


def random_requests(
    rng: np.random.Generator, count: int, *, rate: float, vocab: int = 200
) -> list[SimRequest]:
    """Sessions whose prompts grow, so that prefixes repeat; prompts up to 150 tokens, answers up to 40."""
    arrivals = np.cumsum(rng.exponential(1.0 / rate, count))
    sessions: dict[int, np.ndarray] = {}
    requests: list[SimRequest] = []
    for i, arrival in enumerate(arrivals):
        session = int(rng.integers(0, max(2, count // 4)))
        history = sessions.get(session, rng.integers(3, vocab, int(rng.integers(4, 40))))
        prompt = np.concatenate([history, rng.integers(3, vocab, int(rng.integers(1, 30)))])[-150:]
        sessions[session] = prompt
        requests.append(
            SimRequest(
                request_id=f"r{i}",
                arrival_s=float(arrival),
                num_prompt_tokens=len(prompt),
                num_output_tokens=int(rng.integers(1, 41)),
                prompt_token_ids=prompt.astype(np.int32),
                priority=int(rng.random() < 0.1),
            )
        )
    return requests
