"""A fresh draw of the same traffic holds; doubled lengths, other languages and other sharing do not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kvtune.errors import InputFileError
from kvtune.workload import Message, Workload, WorkloadRequest, workload_drift, workload_profile
from kvtune.workload.script import script_of


def traffic(
    seed: int,
    num_requests: int,
    *,
    scale: float = 1.0,
    german: float = 0.3,
    shared: int = 40,
    rate: float = 1.0,
) -> Workload:
    """Sessions whose history grows, under one of four system prompts; lengths vary between sessions."""
    rng, requests, start_s = np.random.default_rng(seed), [], 0.0
    while len(requests) < num_requests:
        session, spread = len(requests), rng.lognormal(0, 0.3)
        language = "de" if rng.random() < german else "en"
        tenant = int(rng.choice(4, p=[0.5, 0.25, 0.15, 0.1]))
        history = [tenant] * shared
        for turn in range(int(rng.integers(1, 4))):
            history = history + [1000 + session] * max(1, int(scale * spread * rng.lognormal(4, 0.6)))
            requests.append(
                WorkloadRequest(
                    request_id=f"{session}-{turn}", session_id=str(session), arrival_s=start_s + 5 * turn,
                    token_ids=tuple(history), tags={"language": language},
                    output_length=max(1, int(scale * spread * rng.lognormal(3, 0.6))),
                )
            )  # fmt: skip
        start_s += rng.exponential(2 / rate)
    requests = sorted(requests[:num_requests], key=lambda r: r.arrival_s)
    return Workload(requests=tuple(requests), format="test")


def verdicts(proven: Workload, found: Workload) -> dict[str, str]:
    profile = json.loads(json.dumps(workload_profile(proven), allow_nan=False))
    return {shift.name: shift.verdict for shift in workload_drift(profile, found)}


def test_a_fresh_draw_holds_and_a_doubled_one_does_not_over_many_seeds() -> None:
    alarms = missed = 0
    for seed in range(0, 60, 3):
        proven = traffic(seed, 240)
        fresh = verdicts(proven, traffic(seed + 1, 160))
        alarms += "drifted" in fresh.values() or "unclear" in fresh.values()
        doubled = verdicts(proven, traffic(seed + 2, 160, scale=2.0))
        missed += "drifted" not in (doubled["prompt length"], doubled["answer length"])
    assert alarms <= 1 and missed == 0


def test_the_same_workload_has_not_drifted_in_anything() -> None:
    proven = traffic(7, 400)
    assert set(verdicts(proven, proven).values()) == {"same"}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"german": 0.9}, "language"),
        ({"shared": 400}, "prefix sharing"),
        ({"rate": 4.0}, "arrival rate"),
        ({"scale": 0.4}, "answer length"),
    ],
)  # fmt: skip
def test_what_changed_is_named(change: dict[str, Any], name: str) -> None:
    assert verdicts(traffic(1, 600), traffic(2, 600, **change))[name] == "drifted"


def test_lengths_that_spread_out_are_seen_although_their_mean_stays() -> None:
    proven, found = traffic(1, 600), traffic(2, 600)
    half = [
        WorkloadRequest(
            request_id=r.request_id, session_id=r.session_id, arrival_s=r.arrival_s, tags=r.tags,
            input_length=max(1, int(len(r.token_ids or ()) * (4 if int(r.session_id) % 2 else 0.25))),
        )
        for r in found.requests
    ]  # fmt: skip
    found = Workload(requests=tuple(half), format="test")
    assert verdicts(proven, found)["prompt lengths"] == "drifted"


def test_too_few_requests_are_unclear_and_never_the_same() -> None:
    proven = traffic(1, 300)
    for count in (1, 5, 12):
        assert verdicts(proven, traffic(2, count))["prompt length"] == "unclear"


def test_a_kind_of_request_that_was_not_there_is_named() -> None:
    def chats(text: str) -> Workload:
        rows = [
            WorkloadRequest(request_id=str(i), messages=(Message("user", f"{text} {i}"),), max_tokens=8)
            for i in range(80)
        ]
        return Workload(requests=tuple(rows), format="test")

    found = verdicts(chats("what is a river?"), chats("что такое река?"))
    assert found["script"] == "drifted" and found["answer length"] == "same"


@pytest.mark.parametrize(
    ("text", "script"),
    [("hello", "latin"), ("Straße", "latin"), ("что это", "cyrillic"), ("这是什么", "han"),
     ("これは何です", "kana"), ("ما هذا", "arabic"), ("이것은", "hangul"), ("123 !?", "none"),
     ("ok 这是什么意思", "han"),
     ("\ud800", "none")],
)  # fmt: skip
def test_the_script_of_a_text(text: str, script: str) -> None:
    assert script_of(text) == script


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"prompt": 3}, {"prompt": {"unit": "tokens", "mean_log": "x"}},
        {"prompt": {"unit": "tokens", "mean_log": 1e300, "error": 0}}, {"num_sessions": None},
        {"strata": {"language": {str(i): {"share": 0} for i in range(1000)}}}, {"strata": []},
        {"sharing": {"block_size": 16, "windows": {"16": []}}}, {"arrivals": {"log_rate": True, "n": 3}},
    ],
)  # fmt: skip
def test_a_profile_that_is_none_is_refused_in_one_line(change: dict[str, Any]) -> None:
    proven = traffic(1, 200)
    with pytest.raises(InputFileError) as caught:
        workload_drift({**workload_profile(proven), **change}, proven)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_profile_holds_no_text_and_stays_small() -> None:
    rows = [
        WorkloadRequest(request_id="secret-id", prompt=f"my secret {i}" * (i + 1), tags={"task": "x" * 10**6})
        for i in range(400)
    ]
    text = json.dumps(workload_profile(Workload(requests=tuple(rows), format="test")))
    assert "secret" not in text and len(text) < 8000
