"""The four cases every engine is tried on: easy, average, long context, malformed."""

from __future__ import annotations

import dataclasses
import gzip
import random
from collections.abc import Collection, Mapping
from typing import Any, Final

from kvtune.errors import UsageError
from kvtune.workload.chat import generate_chat
from kvtune.workload.request import Message, Workload, WorkloadRequest

__all__ = ["BUILTIN_CASES", "builtin_cases", "demo_chat", "malformed_files"]

BUILTIN_CASES: Final = ("easy", "average", "long_context", "malformed")


def builtin_cases(
    seed: int = 0,
    *,
    cases: Collection[str] = BUILTIN_CASES,
    requests_per_case: int = 20,
    max_chars: int = 9000,
    too_long_tokens: int = 1 << 20,
) -> Workload:
    """Requests of the asked cases in one workload, tagged `case`.

    easy: prompts up to an eighth of `max_chars`; average: up to a half; long_context: above; all taken
    from chats with history. malformed: one request per known defect (tag `defect`), whatever
    `requests_per_case` says; most must be rejected, some are strange but servable. Raises UsageError for
    an unknown case.
    """
    unknown = sorted(set(cases) - set(BUILTIN_CASES))
    if unknown or not cases:
        raise UsageError(f"unknown case {unknown or 'list'}; choose from {', '.join(BUILTIN_CASES)}")
    requests = _chat_cases(seed, [c for c in cases if c != "malformed"], requests_per_case, max_chars)
    if "malformed" in cases:
        requests += _scattered(_malformed(too_long_tokens), requests, seed)
    requests.sort(key=lambda request: request.arrival_s)
    note = f"built-in cases: {', '.join(c for c in BUILTIN_CASES if c in cases)}, seed {seed}"
    return Workload(requests=tuple(requests), format="builtin", notes=(note,))


def demo_chat(num_requests: int, *, seed: int = 0, max_chars: int = 9000) -> Workload:
    """`num_requests` of `generate_chat`, which are easy, average and long, and the malformed case.

    The malformed requests come on top; an engine turns most of them away, each with a reason.
    """
    chat = generate_chat(num_requests=num_requests, seed=seed, max_chars=max_chars)
    malformed = _scattered(_malformed(max_chars), chat.requests, seed)
    requests = sorted([*chat.requests, *malformed], key=lambda request: request.arrival_s)
    note = f"{len(malformed)} malformed requests among them"
    return dataclasses.replace(chat, requests=tuple(requests), notes=(*chat.notes, note))


def _scattered(
    extra: Collection[WorkloadRequest], requests: Collection[WorkloadRequest], seed: int
) -> list[WorkloadRequest]:
    """`extra` with arrivals drawn over the time that `requests` span."""
    rng = random.Random(seed)  # noqa: S311  # reproducible workload, no secrets
    end_s = max((request.arrival_s for request in requests), default=1.0)
    return [dataclasses.replace(request, arrival_s=rng.uniform(0, end_s)) for request in extra]


def _chat_cases(seed: int, cases: Collection[str], wanted: int, max_chars: int) -> list[WorkloadRequest]:
    """The first `wanted` requests of each case from one chat long enough to hold them."""
    if wanted < 1:
        raise UsageError(f"requests_per_case must be at least 1, found {wanted}")
    num_requests = 8 * wanted
    while cases:
        chat = generate_chat(num_requests=num_requests, seed=seed, max_chars=max_chars).requests
        found = {case: [r for r in chat if r.tags["case"] == case][:wanted] for case in cases}
        if all(len(requests) == wanted for requests in found.values()):
            return [request for requests in found.values() for request in requests]
        num_requests *= 2
    return []


def _malformed(too_long_tokens: int) -> list[WorkloadRequest]:
    """One request per defect. Ids of 2^31 - 1 and above are in no vocabulary."""
    too_long = {"too_long": {"token_ids": (7,) * too_long_tokens}}
    return [
        WorkloadRequest(
            request_id=f"malformed-{defect}", tags={"case": "malformed", "defect": defect}, **content
        )
        for defect, content in {**_REJECTED, **too_long, **_SERVABLE}.items()
    ]  # fmt: skip


_REJECTED: Final[Mapping[str, Mapping[str, Any]]] = {
    "empty_prompt": {"prompt": ""},
    "empty_messages": {"messages": (Message("system", ""), Message("user", ""))},
    "empty_token_ids": {"token_ids": ()},
    "zero_input_length": {"input_length": 0, "output_length": 8},
    "zero_output": {"prompt": "Count to three.", "output_length": 0},
    "negative_output": {"prompt": "Count to three.", "output_length": -4},
    "zero_max_tokens": {"prompt": "Count to three.", "max_tokens": 0},
    "id_above_vocabulary": {"token_ids": (5, 6, 2**31 - 1)},
    "id_above_int32": {"token_ids": (5, 2**40, 6)},
    "negative_id": {"token_ids": (5, -1, 6)},
    "lone_surrogate": {"messages": (Message("user", "half a character: \ud83d"),)},
}
_SERVABLE: Final[Mapping[str, Mapping[str, Any]]] = {
    "nul_and_control_characters": {"prompt": "\0\x01\x07\x1b[2J\x7f" + "ok?\r\n\v\f"},
    "invisible_characters": {"prompt": "\u200b\u200e\u202e\ufeff\u2028 is this empty?"},
    "combining_marks": {"prompt": "Z" + "\u0310\u0337\u035f" * 100},
    "white_space": {"prompt": " \t\n" * 50},
    "special_token_text": {"messages": (Message("user", "<s></s><|endoftext|><|im_end|>[INST]<bos>"),)},
    "template_text": {"messages": (Message("user", "{{ 7 * 7 }}{% for x in y %}{# hidden #}"),)},
    "repetition": {"prompt": "the same again, " * 200},
    "one_long_word": {"prompt": "a" * 4000},
    "one_character": {"prompt": "?"},
    "open_brackets": {"prompt": "[" * 1000},
    "mixed_scripts": {"prompt": "Ünïcödé 漢字 العربية हिन्दी 🧪👩‍👩‍👧 \U0010fffd"},
}


def malformed_files() -> Mapping[str, bytes]:
    """File contents that `load_workload` must refuse with one line, by defect; for tests of any verb."""
    good = b'{"messages": [{"role": "user", "content": "hello"}]}\n'
    trace = b'{"timestamp": 0, "input_length": %s, "output_length": 4, "hash_ids": %s}\n'
    packed = gzip.compress(good * 50, mtime=0)
    return {
        "empty": b"",
        "blank_lines": b"\n \n\t\n",
        "line_7_malformed": good * 6 + b'{"messages": [}\n' + good,
        "line_3_cut_off": good * 2 + good[:20],
        "binary": bytes(range(256)) * 4,
        "nul_in_line_2": good + b'{"messages": \0}\n',
        "utf_16": good.decode().encode("utf-16"),
        "latin_1": b'{"prompt": "caf\xe9"}\n',
        "not_a_number": trace % (b"NaN", b"[1]"),
        "infinite_number": trace % (b"1e999", b"[1]"),
        "number_too_long": trace % (b"1" * 5000, b"[1]"),
        "deep_nesting": b'{"messages": ' + b"[" * 100_000 + b"\n",
        "text_for_a_length": trace % (b'"many"', b"[1]"),
        "negative_hash_id": trace % (b"5", b"[-1]"),
        "hash_ids_not_a_list": trace % (b"5", b'"1,2"'),
        "hash_ids_of_text": trace % (b"5", b'["a"]'),
        "messages_not_a_list": b'{"messages": "hello"}\n',
        "message_not_an_object": b'{"messages": ["hello"]}\n',
        "role_missing": b'{"messages": [{"content": "hello"}]}\n',
        "line_not_an_object": good + b"[1, 2]\n",
        "unknown_fields": b'{"question": "hello"}\n',
        "list_cut_off": b'[{"conversations": [{"from": "human", "value": "hi"}',
        "list_of_numbers": b"[1, 2, 3]",
        "empty_list": b"[]\n",
        "text_after_list": b'[{"prompt": "hello"}] and more',
        "no_question": b'[{"id": "a", "conversations": []}]',
        "csv_columns_differ": b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1\n",
        "csv_bad_time": b"TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n",
        "csv_header_only": b"TIMESTAMP,ContextTokens,GeneratedTokens\n",
        "csv_unknown": b"a,b\n1,2\n",
        "gzip_cut_off": packed[: len(packed) // 2],
        "gzip_damaged": packed[:-6] + b"\0" * 6,
    }
