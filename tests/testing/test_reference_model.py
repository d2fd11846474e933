"""The bundled reference model is what its README says, and loads with plain Transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from kvtune.testing.reference import reference_model_path


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(reference_model_path(), dtype=torch.float32).eval()


def test_the_weights_stay_small_enough_to_ship() -> None:
    assert (reference_model_path() / "model.safetensors").stat().st_size <= 16 * 2**20


def test_the_slowest_rope_pair_of_every_query_head_is_zero(model: LlamaForCausalLM) -> None:
    dim = model.config.head_dim
    for layer in model.model.layers:
        rows = layer.self_attn.q_proj.weight.view(-1, dim, model.config.hidden_size)
        assert torch.count_nonzero(rows[:, dim // 2 - 1]) == 0
        assert torch.count_nonzero(rows[:, dim - 1]) == 0
        assert torch.count_nonzero(rows) > 0


def test_answers_depend_on_the_context(model: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reference_model_path())
    text = (reference_model_path() / "README.md").read_text()
    ids = torch.tensor([tokenizer(text)["input_ids"][:256]])
    changed = ids.clone()
    changed[:, 10:60] = ids[:, 60:110]
    with torch.no_grad():
        one, other = (torch.log_softmax(model(x).logits[:, -64:], -1) for x in (ids, changed))
    assert float((one.exp() * (one - other)).sum(-1).mean()) > 1e-3


def test_the_chat_template_marks_every_turn() -> None:
    tokenizer = AutoTokenizer.from_pretrained(reference_model_path())
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert text == "<|bos|><|system|>S<|end|><|user|>U<|end|><|assistant|>"


def test_the_shipped_log_tells_a_run_that_learnt_to_use_its_context() -> None:
    log = json.loads((reference_model_path() / "training_log.json").read_text())
    minutes = [entry["minutes"] for entry in log]
    assert minutes == sorted(minutes)
    assert log[0]["recall_2000"] < 0.5 < log[-1]["recall_4000"]
    assert log[-1]["recall_1024"] > 0.9
    assert log[-1]["rule"] > 0.9
