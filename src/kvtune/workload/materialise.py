"""From canonical requests to token ids: text is encoded, hash ids and bare lengths become tokens.

Tokens of a hashed block depend on (seed, hash id) alone, through a counter-based generator, so equal
paths of ids are equal prompts and different ids differ from their first tokens on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtune.errors import UsageError
from kvtune.workload.prefix import session_labels
from kvtune.workload.request import Materialised, Rejection, TokenRequest, Workload, WorkloadRequest

__all__ = ["DEFAULT_MAX_TOKENS", "materialise"]

DEFAULT_MAX_TOKENS: Final = 128
"""Tokens to generate where neither the request nor the caller says."""

Encode = Callable[[WorkloadRequest], list[int]]


def materialise(
    workload: Workload,
    *,
    vocab_size: int,
    max_model_len: int,
    encode: Encode | None = None,
    scale: float = 1.0,
    max_tokens: int | None = None,
    seed: int = 0,
    reserved_ids: Collection[int] = range(4),
) -> Materialised:
    """Turn a workload into requests an engine can be sent.

    `encode` (chat template and tokenizer) gives the ids of a request with messages or a prompt; it may
    raise UsageError or ValueError, which rejects that request. `scale` in (0, 1] shrinks recorded
    lengths of traces without text; hashed blocks shrink to whole tokens, so prefixes stay shared exactly
    as they were, and `Materialised.scale` is the factor really applied. `max_tokens` caps what is
    generated. Synthetic tokens are drawn from [0, vocab_size) without `reserved_ids`.

    A request whose recorded length does not fit into `max_model_len` is rejected; where only an upper
    bound is known, the bound is cut. Raises UsageError for impossible arguments or when no request is
    left.
    """
    _check_arguments(vocab_size, max_model_len, scale, max_tokens, seed)
    source = _TokenSource.create(vocab_size, reserved_ids, seed, _largest_id(workload))
    plan = _Plan(
        vocab_size, max_model_len, encode, max_tokens, source, _shrink(workload, scale, source.num_digits)
    )
    accepted: list[TokenRequest] = []
    rejected: list[Rejection] = []
    for request, session in zip(workload.requests, session_labels(workload.requests), strict=True):
        try:
            accepted.append(plan.build(request, session))
        except _CannotServe as refusal:
            rejected.append(Rejection(request_id=request.request_id, reason=str(refusal)))
    if not accepted:
        raise UsageError(
            f"none of the {len(rejected)} requests can be served: {_summary(rejected)}; "
            "use another workload, a smaller scale or a larger model length"
        )
    return Materialised(
        requests=tuple(accepted), rejected=tuple(rejected), scale=plan.shrink.factor,
        notes=_notes(workload, plan, scale, rejected), is_synthetic_text=workload.is_synthetic_text,
    )  # fmt: skip


class _CannotServe(Exception):  # noqa: N818  # control flow inside this module, never seen outside
    """One request cannot be served; the message is `kind: detail`."""


@dataclass(frozen=True, slots=True)
class _Shrink:
    """How recorded lengths shrink: blocks of `block` tokens become `scaled` tokens."""

    factor: float
    block: int
    scaled: int
    min_partial: int

    def length(self, tokens: int) -> int:
        return tokens if self.factor == 1 else max(1, round(tokens * self.factor))

    def partial(self, tokens: int) -> int:
        """Length of a prompt's last block. Shrunk ones keep enough tokens to differ from each other."""
        if tokens == self.block:
            return self.scaled
        return tokens if self.factor == 1 else min(self.scaled, max(self.min_partial, self.length(tokens)))


def _shrink(workload: Workload, scale: float, num_digits: int) -> _Shrink:
    if not any(request.is_synthetic for request in workload.requests):
        return _Shrink(1.0, 1, 1, 1)
    if workload.block_size is None:
        if any(request.hash_ids for request in workload.requests):
            raise UsageError("a workload with hash ids needs a block_size: how many tokens one id stands for")
        return _Shrink(scale, 1, 1, 1)
    scaled = max(1, round(workload.block_size * scale))
    if scaled < min(num_digits, workload.block_size):
        raise UsageError(
            f"scale {scale:g} leaves {scaled} of a block's {workload.block_size} tokens, too few to tell its "
            f"ids apart; use a scale of at least {num_digits / workload.block_size:.3g}"
        )
    return _Shrink(scaled / workload.block_size, workload.block_size, scaled, num_digits)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What every request is built with."""

    vocab_size: int
    max_model_len: int
    encode: Encode | None
    max_tokens: int | None
    source: _TokenSource
    shrink: _Shrink

    def build(self, request: WorkloadRequest, session: str) -> TokenRequest:
        if request.problem is not None:
            raise _CannotServe(f"unsupported content: {request.problem}")
        for name, value in (("output_length", request.output_length), ("max_tokens", request.max_tokens)):
            if value is not None and value <= 0:
                raise _CannotServe(f"nothing to generate: {name} is {value}")
        _check_unicode(request.cache_salt)
        prompt = self._prompt(request)
        return TokenRequest(
            request_id=request.request_id, arrival_s=request.arrival_s, prompt_token_ids=prompt,
            max_tokens=self._output(request, len(prompt)), session_id=session,
            cache_salt=request.cache_salt, priority=request.priority, tags=request.tags,
        )  # fmt: skip

    def _prompt(self, request: WorkloadRequest) -> tuple[int, ...]:
        if request.token_ids is not None:
            ids: Sequence[int] = request.token_ids
        elif request.has_text:
            _check_text(request)
            ids = self._encoded(request)
        else:
            return self._synthetic(request)
        if len(ids) == 0:
            raise _CannotServe("empty prompt: there is no token to start from")
        self._check_fits(len(ids))
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise _CannotServe(f"token out of vocabulary: id {bad}, the model has {self.vocab_size}")
        return tuple(ids)

    def _encoded(self, request: WorkloadRequest) -> list[int]:
        if self.encode is None:
            raise _CannotServe("no tokenizer: the request is text and the model folder has no tokenizer")
        try:
            return self.encode(request)
        except (UsageError, ValueError) as error:
            raise _CannotServe(f"cannot be encoded: {ascii(str(error))[1:-1][:200]}") from error

    def _synthetic(self, request: WorkloadRequest) -> tuple[int, ...]:
        if not request.input_length or request.input_length < 0:
            raise _CannotServe(f"empty prompt: input_length is {request.input_length}")
        blocks, tail = self._block_lengths(request.input_length, len(request.hash_ids or ()))
        self._check_fits(sum(blocks) + tail)
        pieces = [
            self.source.block(hash_id, length)
            for hash_id, length in zip(request.hash_ids or (), blocks, strict=True)
        ]
        if tail:
            pieces.append(self.source.own(request.request_id, tail))
        return tuple(np.concatenate(pieces).tolist())

    def _block_lengths(self, input_length: int, num_ids: int) -> tuple[list[int], int]:
        """(tokens of each hashed block, tokens after them that no id names)."""
        if num_ids == 0:
            return [], self.shrink.length(input_length)
        covered = num_ids * self.shrink.block
        if covered < input_length:
            return [self.shrink.scaled] * num_ids, self.shrink.length(input_length - covered)
        last = input_length - covered + self.shrink.block
        return [*[self.shrink.scaled] * (num_ids - 1), self.shrink.partial(last)], 0

    def _check_fits(self, num_tokens: int) -> None:
        if num_tokens >= self.max_model_len:
            raise _CannotServe(
                f"too long: the prompt has {num_tokens} tokens, the model holds {self.max_model_len}"
            )

    def _output(self, request: WorkloadRequest, num_prompt: int) -> int:
        """Tokens to generate: as recorded (it must fit), else the bound (cut so that it fits)."""
        room = self.max_model_len - num_prompt
        recorded = self._recorded(request)
        if recorded is None:
            bounds = [b for b in (request.max_tokens, self.max_tokens) if b is not None]
            return min([*bounds, room] if bounds else [DEFAULT_MAX_TOKENS, room])
        wanted = recorded if self.max_tokens is None else min(recorded, self.max_tokens)
        if wanted > room:
            raise _CannotServe(
                f"too long: {num_prompt} prompt and {wanted} output tokens, "
                f"the model holds {self.max_model_len}"
            )
        return wanted

    def _recorded(self, request: WorkloadRequest) -> int | None:
        if request.output_length is not None:
            return (
                self.shrink.length(request.output_length) if request.is_synthetic else request.output_length
            )
        if not request.answer or self.encode is None:
            return None
        answer = WorkloadRequest(request_id=request.request_id, prompt=request.answer)
        _check_text(answer)
        return len(self._encoded(answer)) or None


@dataclass(frozen=True, slots=True)
class _TokenSource:
    """Deterministic tokens from (seed, key): Philox, a counter-based generator (Salmon et al., SC'11)."""

    alphabet: npt.NDArray[np.int64]
    seed: int
    num_digits: int

    _BLOCK: Final = 0
    _OWN: Final = 1
    _OFFSETS: Final = 2

    @classmethod
    def create(cls, vocab_size: int, reserved: Collection[int], seed: int, largest_id: int) -> _TokenSource:
        alphabet = np.setdiff1d(np.arange(vocab_size), np.asarray(sorted(reserved), dtype=np.int64))
        if len(alphabet) < 2:
            raise UsageError(f"a vocabulary of {vocab_size} without the reserved ids leaves nothing to draw")
        num_digits = 1
        while len(alphabet) ** num_digits <= largest_id:
            num_digits += 1
        return cls(alphabet, seed, num_digits)

    def block(self, hash_id: int, length: int) -> npt.NDArray[np.int64]:
        """[length] tokens of a hashed block. Its first tokens spell the id (lowest digit first, in the
        base of the alphabet), so blocks of at least `num_digits` tokens differ whenever their ids do."""
        draws = self._raw(hash_id, self._BLOCK, length)
        offsets = self._raw(0, self._OFFSETS, self.num_digits)
        rest = hash_id
        for place in range(min(length, self.num_digits)):
            rest, digit = divmod(rest, len(self.alphabet))
            draws[place] = (digit + offsets[place]) % len(self.alphabet)
        return self.alphabet[draws]

    def own(self, request_id: str, length: int) -> npt.NDArray[np.int64]:
        """[length] tokens that belong to one request alone."""
        digest = hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).digest()
        return self.alphabet[self._raw(int.from_bytes(digest[:8], "little"), self._OWN, length)]

    def _raw(self, key: int, domain: int, length: int) -> npt.NDArray[np.int64]:
        # Raw words: their stream is fixed, whereas numpy may change how Generator methods draw.
        generator = np.random.Philox(
            key=np.array([self.seed, key], dtype=np.uint64), counter=np.array([0, 0, 0, domain], np.uint64)
        )
        return (generator.random_raw(length) % np.uint64(len(self.alphabet))).astype(np.int64)


def _largest_id(workload: Workload) -> int:
    return max((max(r.hash_ids) for r in workload.requests if r.hash_ids), default=0)


def _check_arguments(
    vocab_size: int, max_model_len: int, scale: float, max_tokens: int | None, seed: int
) -> None:
    if not 0 < scale <= 1:
        raise UsageError(f"the scale of a workload must lie in (0, 1], found {scale}")
    if vocab_size < 2 or max_model_len < 2:
        raise UsageError(f"vocabulary ({vocab_size}) and model length ({max_model_len}) must be at least 2")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens must be at least 1, found {max_tokens}")
    if not 0 <= seed < 2**64:
        raise UsageError(f"the seed must lie in [0, 2^64), found {seed}")


def _check_text(request: WorkloadRequest) -> None:
    texts = [message.content for message in request.messages] or [request.prompt or ""]
    if not any(texts):
        raise _CannotServe("empty prompt: the text has no character")
    _check_unicode(*texts, *(message.role for message in request.messages))


def _check_unicode(*texts: str) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _CannotServe(f"not Unicode text: lone surrogate at character {error.start}") from None


def _summary(rejected: Sequence[Rejection]) -> str:
    kinds = Counter(rejection.reason.partition(":")[0] for rejection in rejected)
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{shown} (first: {rejected[0].request_id[:60]!a}: {rejected[0].reason})"


def _notes(
    workload: Workload, plan: _Plan, asked_scale: float, rejected: Sequence[Rejection]
) -> tuple[str, ...]:
    notes: list[str] = []
    if workload.is_synthetic_text:
        notes.append("text is synthetic: tokens were drawn from lengths and block hashes")
    if plan.shrink.factor != 1:
        shrunk = f"scale {plan.shrink.factor:.6g}: recorded lengths were shrunk"
        if workload.block_size:
            shrunk += f", blocks of {plan.shrink.block} tokens to {plan.shrink.scaled}"
        notes.append(shrunk + "; arrival times are unchanged")
    elif asked_scale != 1:
        notes.append(f"scale {asked_scale:g} was not applied: text and token ids keep their length")
    if rejected:
        notes.append(f"{len(rejected)} of {len(workload.requests)} requests rejected: {_summary(rejected)}")
    return tuple(notes)
