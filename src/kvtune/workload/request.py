"""The canonical request every reader produces, and what materialising it yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "Materialised",
    "Message",
    "Rejection",
    "TokenRequest",
    "Workload",
    "WorkloadRequest",
    "transcript",
]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequest:
    """One request as a file or a generator states it. Its prompt is the first of these that is present:
    `token_ids`, `messages`, `prompt`, `hash_ids` (one id per block of prompt), `input_length` alone.

    `output_length`: tokens the request really generated; `answer`: the recorded text, encoded to get
    that length; `max_tokens`: only an upper bound the client asked for.
    `hash_lengths`: tokens each hash id stands for, where they are not all of the workload's block size.
    `tools`: JSON of each tool offered with the messages, in the order sent.
    `session_id`: requests of one conversation share it; "" where the file does not say.
    """

    request_id: str
    arrival_s: float = 0.0
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[str, ...] = ()
    token_ids: tuple[int, ...] | None = None
    hash_ids: tuple[int, ...] | None = None
    hash_lengths: tuple[int, ...] | None = None
    input_length: int | None = None
    output_length: int | None = None
    max_tokens: int | None = None
    answer: str | None = None
    session_id: str = ""
    cache_salt: str = ""
    priority: int = 0
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    problem: str | None = None
    """Why the reader already knows that this request cannot be served (for example an image part)."""

    @property
    def has_text(self) -> bool:
        """Whether a tokenizer is needed to get its tokens."""
        return self.token_ids is None and (bool(self.messages) or self.prompt is not None)

    @property
    def is_synthetic(self) -> bool:
        """Whether only lengths (and perhaps hashes) are known, so that its tokens have to be made up."""
        return self.token_ids is None and not self.has_text and self.input_length is not None


def transcript(request: WorkloadRequest) -> str:
    """The text of a request as one string: tools, as chat templates put them first, roles and contents."""
    if request.messages:
        tools = "".join(f"{tool}\n" for tool in request.tools)
        return tools + "".join(f"{message.role}\n{message.content}\n" for message in request.messages)
    return request.prompt or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A file's (or generator's) requests in arrival order, ties in file order.

    `sha256`: of the file's bytes as stored, "" for a generator. `block_size`: prompt tokens per hash id,
    None where there are no hash ids. `is_synthetic_text`: some prompts have no text of their own, so no
    quality claim may rest on the workload. `notes`: what the user should be told, detection included;
    `warnings`: those of them that say something was wrong with the file.
    """

    requests: tuple[WorkloadRequest, ...]
    format: str
    path: Path | None = None
    sha256: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    is_synthetic_text: bool = False
    block_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """A request an engine can be sent: `max_tokens` new tokens are to be generated."""

    request_id: str
    arrival_s: float
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    session_id: str = ""
    cache_salt: str = ""
    priority: int = 0
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A parsable request that cannot be served, and why."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Materialised:
    """Token requests in arrival order, the requests left out, and what was done to lengths and text.

    `scale`: the factor really applied to recorded lengths (scaled blocks hold whole tokens).
    """

    requests: tuple[TokenRequest, ...]
    rejected: tuple[Rejection, ...] = ()
    scale: float = 1.0
    notes: tuple[str, ...] = ()
    is_synthetic_text: bool = False
