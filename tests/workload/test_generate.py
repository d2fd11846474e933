"""Generated workloads: deterministic, multi-turn, bounded, varied; the four built-in cases."""

import concurrent.futures
import itertools
import logging
import statistics as st
import subprocess
import sys
import textwrap
from collections import defaultdict

import pytest

from kvtune.errors import UsageError
from kvtune.workload import builtin_cases, demo_chat, generate_chat, workload_statistics
from kvtune.workload.material import collect_passages
from kvtune.workload.statistics import transcript

CHAT = generate_chat(num_requests=400, seed=3)


def by_session(requests):
    sessions = defaultdict(list)
    for request in requests:
        sessions[request.session_id].append(request)
    return sessions


def test_the_same_seed_gives_the_same_workload_and_another_seed_another():
    assert generate_chat(num_requests=400, seed=3) == CHAT
    assert generate_chat(num_requests=400, seed=4).requests != CHAT.requests


def test_another_process_generates_the_same_text():
    code = (
        "import hashlib; from kvtune.workload import generate_chat as g;"
        "print(hashlib.sha256(repr(g(num_requests=60).requests).encode()).hexdigest())"
    )
    path = ":".join(sys.path)
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
        ).stdout
        for hash_seed in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1


def test_each_turn_continues_the_history_of_its_session_with_the_recorded_answer():
    for turns in by_session(CHAT.requests).values():
        assert [r.arrival_s for r in turns] == sorted(r.arrival_s for r in turns)
        assert [r.tags["turn"] for r in turns] == [str(k + 1) for k in range(len(turns))]
        for before, after in itertools.pairwise(turns):
            assert after.messages[: len(before.messages)] == before.messages
            assert after.messages[len(before.messages)].content == before.answer
            assert [m.role for m in after.messages[-3:]] == ["user", "assistant", "user"]


def test_system_prompts_are_shared_by_sessions_and_several():
    systems = {turns[0].messages[0].content for turns in by_session(CHAT.requests).values()}
    assert 4 <= len(systems) <= 6
    assert len(by_session(CHAT.requests)) > 10 * len(systems) / 2


@pytest.mark.parametrize("max_chars", [1500, 4000, 9000])
def test_prompts_reach_up_to_the_limit_and_never_beyond(max_chars):
    lengths = [len(transcript(r)) for r in generate_chat(num_requests=300, max_chars=max_chars).requests]
    assert max(lengths) <= max_chars
    assert max(lengths) > 0.9 * max_chars
    assert st.quantiles(lengths, n=10)[0] < 0.25 * max_chars
    assert st.stdev(lengths) > 0.15 * max_chars


def test_cases_tasks_and_languages_are_all_covered_and_answers_are_never_empty():
    for tag, least in (("case", 3), ("task", 5), ("language", 4)):
        assert len({r.tags[tag] for r in CHAT.requests}) == least
    assert all(r.answer for r in CHAT.requests)
    assert len({r.messages[-1].content for r in CHAT.requests}) > 300


def test_burstiness_below_one_makes_arrivals_burstier_than_poisson():
    def cv(burstiness):
        chat = generate_chat(num_sessions=400, mean_turns=1, burstiness=burstiness, max_chars=1500)
        return workload_statistics(chat)["arrival_cv"]

    assert 0.85 < cv(1.0) < 1.15
    assert cv(0.1) > 2


def test_the_request_rate_holds_on_average():
    chat = generate_chat(num_sessions=600, request_rate=5, mean_turns=1, max_chars=1500)
    assert len(chat.requests) / chat.requests[-1].arrival_s == pytest.approx(5, rel=0.2)


@pytest.mark.parametrize(
    "arguments", [{"num_requests": 0}, {"max_chars": 100}, {"burstiness": 0}, {"mean_turns": 0}]
)
def test_impossible_numbers_are_refused(arguments):
    with pytest.raises(UsageError, match=next(iter(arguments))):
        generate_chat(**arguments)


def test_there_is_text_even_where_documentation_was_stripped():
    code = "from kvtune.workload import generate_chat as g; print(len(g(num_requests=30).requests))"
    run = subprocess.run(
        [sys.executable, "-OO", "-c", code], check=True, capture_output=True, text=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert run.stdout.strip() == "30"


def test_what_other_libraries_did_to_standard_modules_does_not_change_the_text(monkeypatch):
    before = collect_passages()

    def advice(self) -> None:
        """A method that some library hangs on a standard class, documented at length: do use it often."""

    monkeypatch.setattr(logging.Logger, "advice", advice, raising=False)
    monkeypatch.setattr(textwrap, "advice", advice, raising=False)
    assert concurrent.futures.ProcessPoolExecutor  # loaded on first use
    monkeypatch.setattr(concurrent.futures, "Extra", int, raising=False)
    assert collect_passages() == before


def test_passages_hold_no_memory_addresses():
    passages = collect_passages()
    assert len(passages) > 300
    assert not any(" at 0x" in p.text + "".join(p.parameters) for p in passages)


def test_built_in_cases_hold_as_many_requests_as_asked_and_the_malformed_ones():
    workload = builtin_cases(1, requests_per_case=5)
    counts = defaultdict(int)
    for request in workload.requests:
        counts[request.tags["case"]] += 1
    assert {case: counts[case] for case in ("easy", "average", "long_context")} == dict.fromkeys(
        ("easy", "average", "long_context"), 5
    )
    assert counts["malformed"] > 20
    assert [r.arrival_s for r in workload.requests] == sorted(r.arrival_s for r in workload.requests)
    assert len({r.request_id for r in workload.requests}) == len(workload.requests)
    assert builtin_cases(1, requests_per_case=5) == workload
    lengths = {
        case: [len(transcript(r)) for r in workload.requests if r.tags["case"] == case] for case in counts
    }
    assert max(lengths["easy"]) <= 9000 / 8 < min(lengths["average"])
    assert max(lengths["average"]) <= 4500 < min(lengths["long_context"])


def test_the_demo_chat_holds_all_four_cases_in_order_of_arrival():
    workload = demo_chat(300, seed=3)
    counts = defaultdict(int)
    for request in workload.requests:
        counts[request.tags["case"]] += 1
    assert set(counts) == {"easy", "average", "long_context", "malformed"}
    assert sum(counts.values()) - counts["malformed"] == 300
    assert [r.arrival_s for r in workload.requests] == sorted(r.arrival_s for r in workload.requests)
    malformed = [r.arrival_s for r in workload.requests if r.tags["case"] == "malformed"]
    assert max(malformed) - min(malformed) > 0.5 * workload.requests[-1].arrival_s
    assert demo_chat(300, seed=3) == workload


def test_an_unknown_case_is_refused():
    for cases in (["hard"], []):
        with pytest.raises(UsageError, match="choose from"):
            builtin_cases(cases=cases)
