"""A workload as requests of a benchmark: text or chat as its file states it, or a model's token ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtune.adapters.openai_client import CompletionsClient, StreamRequest
from kvtune.adapters.prompt_encoder import prompt_encoder
from kvtune.errors import TargetError, UsageError
from kvtune.model_folder import read_config
from kvtune.spec import ModelSpec, text_config
from kvtune.target import LoadRequest
from kvtune.workload import Workload, WorkloadRequest, materialise

__all__ = ["first_model", "load_requests", "text_request", "token_request"]

DEFAULT_MAX_TOKENS = 128
SHOWN_REJECTIONS = 5


def first_model(client: CompletionsClient) -> str:
    """The name of the first model a server lists. TargetError if it lists none."""
    models = client.get("/v1/models")
    try:
        return str(models["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise TargetError(f"{client.base_url} lists no model; name one with --model-name") from None


def text_request(request: WorkloadRequest, common: Mapping[str, Any], cap: int | None) -> StreamRequest:
    """The request as its file states it: token ids, chat or text. UsageError where it has lengths only.

    `common` goes into every body; at most `cap` tokens are asked for.
    """
    if request.token_ids is not None:
        path, content = "/v1/completions", {"prompt": list(request.token_ids)}
    elif request.messages:
        messages = [{"role": m.role, "content": m.content} for m in request.messages]
        path, content = "/v1/chat/completions", {"messages": messages}
    elif request.prompt is not None:
        path, content = "/v1/completions", {"prompt": request.prompt}
    else:
        raise UsageError(
            f"request {request.request_id} has lengths but no text; give --model DIR, the server's model "
            "folder, so that tokens can be made for it"
        )
    asked = request.output_length or request.max_tokens or DEFAULT_MAX_TOKENS
    body = {**common, **content, "max_tokens": asked if cap is None else min(asked, cap)}
    return StreamRequest(request_id=request.request_id, arrival_s=request.arrival_s, body=body, path=path)


def token_request(request: LoadRequest, common: Mapping[str, Any]) -> StreamRequest:
    """A prompt of token ids. Generated ids are asked for (vLLM's extension, ignored elsewhere): a server
    without a tokenizer streams no text, so they are all there is to time."""
    body = {
        **common,
        "prompt": list(request.prompt_token_ids),
        "max_tokens": request.max_tokens,
        "return_token_ids": True,
    }
    return StreamRequest(request_id=request.request_id, arrival_s=request.arrival_s, body=body)


def load_requests(
    workload: Workload,
    folder: Path,
    *,
    max_tokens: int | None,
    scale: float,
    seed: int,
    max_model_len: int | None = None,
) -> tuple[list[LoadRequest], list[str]]:
    """Token requests for the model in `folder`, and what the user should know (rejections included).

    `max_model_len`: None takes the model's. Raises what reading the folder and materialising raise.
    """
    raw = read_config(folder)
    needs_tokenizer = any(request.has_text for request in workload.requests)
    longest = max_model_len or ModelSpec.from_config(raw).max_model_len
    if longest is None:
        raise UsageError(f"{folder}: config.json does not say how long a sequence may be")
    made = materialise(
        workload,
        vocab_size=int(text_config(raw)[0]["vocab_size"]),
        max_model_len=longest,
        encode=prompt_encoder(folder) if needs_tokenizer else None,
        scale=scale,
        max_tokens=max_tokens,
        seed=seed,
    )
    notes = [*workload.notes, *made.notes]
    notes += [f"left out {r.request_id}: {r.reason}" for r in made.rejected[:SHOWN_REJECTIONS]]
    if len(made.rejected) > SHOWN_REJECTIONS:
        notes.append(f"left out {len(made.rejected)} requests in all")
    requests = [
        LoadRequest(
            request_id=r.request_id,
            prompt_token_ids=r.prompt_token_ids,
            max_tokens=r.max_tokens,
            arrival_s=r.arrival_s,
            cache_salt=r.cache_salt,
        )
        for r in made.requests
    ]
    return requests, notes
