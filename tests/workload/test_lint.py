"""Planted breakages are found at their place and priced; clean traffic and natural variety are left alone."""

import json
import random
import uuid

import pytest

from kvtune.errors import UsageError
from kvtune.workload import Message, Workload, WorkloadRequest, generate_chat, lint_workload
from kvtune.workload.lint.document import Document
from kvtune.workload.lint.volatile import mask

WORDS = [
    "copper", "river", "lantern", "orchard", "velvet", "harbour", "meadow", "thunder", "basil", "compass",
    "ember", "willow",
]  # fmt: skip
POLICY = " ".join(
    f"Rule {word}: answer briefly, cite the manual, never {verb}."
    for verb in ("guess", "rush")
    for word in WORDS
)


def question(rng):
    return "Please tell me about " + " ".join(rng.choice(WORDS) for _ in range(12)) + "?"


def chats(make_system, *, count=60, seed=1, **fields):
    rng = random.Random(seed)
    requests = tuple(
        WorkloadRequest(
            request_id=f"r{i}",
            arrival_s=float(i),
            messages=(Message("system", make_system(i, rng)), Message("user", question(rng))),
            **{name: make(i, rng) for name, make in fields.items()},
        )
        for i in range(count)
    )
    return Workload(requests=requests, format="openai_chat")


def only_finding(workload):
    report = lint_workload(workload)
    assert [f.rule for f in report.findings if f.level == "error"] == [report.findings[0].rule], (
        report.findings
    )
    return report, report.findings[0]


def hour(i):
    return f"2026-11-22T{8 + i // 60:02d}:{i % 60:02d}:07Z"


TOOLS = [
    json.dumps({"type": "function", "function": {"name": name, "description": f"{name} {POLICY[:300]}"}})
    for name in ("search", "browse", "calculate", "mail", "calendar")
]
BULLETS = [f"- {name}: {POLICY[i * 40 : i * 40 + 120]}" for i, name in enumerate(WORDS[:8])]

PLANTED = {
    "timestamp": lambda i, rng: f"You are a helpful assistant.\nThe time is {hour(i)}.\n{POLICY}",
    "uuid": lambda i, rng: f"Conversation {uuid.UUID(int=rng.getrandbits(128))}.\n{POLICY}",
    "request_id": lambda i, rng: f"X-Request-Id: {rng.getrandbits(64):016x}a1\n{POLICY}",
    "number": lambda i, rng: f"You have {1000 + 37 * i} credits left.\n{POLICY}",
    "whitespace": lambda i, rng: f"You are a helpful{' ' * (1 + i)}assistant.\n{POLICY}",
    "varying_line": lambda i, rng: f"You talk to {WORDS[i % 12].title()} {WORDS[i // 12]}.\n{POLICY}",
    "list_order": lambda i, rng: "Topics:\n" + "\n".join(rng.sample(BULLETS, 8)) + f"\n{POLICY}",
    "json_order": lambda i, rng: (
        "Tools: " + json.dumps([json.loads(t) for t in rng.sample(TOOLS, 5)]) + POLICY
    ),
}
LARGE = 2 * len(POLICY)


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_breakage_is_named_and_priced(rule):
    clean = lint_workload(chats(lambda i, rng: f"You are a helpful assistant.\n{POLICY}"))
    assert clean.is_clean and clean.findings == ()
    report, finding = only_finding(chats(PLANTED[rule]))
    assert finding.rule == rule
    assert not report.is_clean
    # Nearly all of the policy is lost in nearly every request after the first.
    expected = 59 * len(POLICY) / 4
    assert finding.lost_tokens == pytest.approx(expected, rel=0.25 if "order" not in rule else 1.2)
    assert finding.num_requests >= 45
    assert (finding.position.message, finding.position.role) == (0, "system")
    assert report.reused_tokens + report.lost_tokens <= report.prompt_tokens
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_place_is_that_of_the_first_changing_character():
    system = PLANTED["timestamp"]
    _, finding = only_finding(chats(system))
    written = system(3, random.Random(0)).index("2026")
    assert written <= finding.position.character <= written + len(hour(0))
    assert finding.position.token == pytest.approx((written + len("system\n")) / 4, abs=6)
    for one, other in finding.samples:
        assert one != other and one.startswith("2026-11-22T") and other.startswith("2026-11-22T")
    assert all(a != b for a, b in finding.request_ids)


def test_what_lies_behind_the_first_cause_is_said():
    def system(i, rng):
        return f"The time is {hour(i)}. Conversation {uuid.UUID(int=rng.getrandbits(128))}.\n{POLICY}"

    _, finding = only_finding(chats(system))
    assert (finding.rule, finding.behind) == ("timestamp", ("uuid",))


def test_shuffled_tools_and_shuffled_keys_of_tools_are_told_apart():
    def shuffled(i, rng):
        return tuple(rng.sample(TOOLS, 5))

    def reversed_keys(i, rng):
        return tuple(json.dumps(dict(reversed(json.loads(t).items()))) if i % 2 else t for t in TOOLS)

    system = lambda i, rng: POLICY  # noqa: E731
    _, finding = only_finding(chats(system, tools=shuffled))
    assert (finding.rule, finding.position.message, finding.position.role) == ("tool_order", -1, "tools")
    one = chats(system, tools=reversed_keys)
    report = lint_workload(one)
    # Two orders of keys alternate: only the first request of the second kind loses.
    assert [f.rule for f in report.findings] == ["json_key_order"]
    assert report.findings[0].num_requests == 1


def test_a_salt_for_each_request_is_found():
    workload = chats(lambda i, rng: POLICY, cache_salt=lambda i, rng: f"salt-{i}")
    _, finding = only_finding(workload)
    assert (finding.rule, finding.num_requests) == ("cache_salt", 59)
    per_tenant = chats(lambda i, rng: POLICY, cache_salt=lambda i, rng: f"salt-{i % 4}")
    assert lint_workload(per_tenant).is_clean


def test_a_value_that_changes_behind_all_that_is_shared_costs_nothing():
    workload = chats(lambda i, rng: f"{POLICY}\nThe time is {hour(i)}.")
    assert lint_workload(workload).is_clean


def test_a_date_that_changes_once_a_day_loses_one_prompt_a_day_not_all():
    report = lint_workload(chats(lambda i, rng: f"Today is November {1 + i // 20}, 2026.\n{POLICY}"))
    (finding,) = report.findings
    assert (finding.rule, finding.num_requests) == ("timestamp", 2)


def test_ordinary_chats_are_clean():
    report = lint_workload(generate_chat(num_requests=150, seed=3))
    assert report.is_clean, report.findings


def test_different_numbers_in_questions_are_no_breakage():
    rng = random.Random(2)
    requests = tuple(
        WorkloadRequest(request_id=str(i), prompt=f"{POLICY}\nWhat is {rng.random()} times {rng.random()}?")
        for i in range(50)
    )
    assert lint_workload(Workload(requests=requests, format="prompts")).is_clean


def test_plain_prompts_with_the_question_before_the_instructions_are_found():
    rng = random.Random(2)
    requests = tuple(
        WorkloadRequest(request_id=str(i), prompt=f"{question(rng)}\nInstructions\n{POLICY}")
        for i in range(50)
    )
    _, finding = only_finding(Workload(requests=requests, format="prompts"))
    assert (finding.rule, finding.position.role) == ("varying_line", "prompt")


def test_the_tolerated_loss_decides_between_error_and_note():
    workload = chats(lambda i, rng: f"Today is November {1 + i // 20}, 2026.\n{POLICY}")
    share = lint_workload(workload).findings[0].lost_share
    assert not lint_workload(workload, max_loss=share * 0.9).is_clean
    report = lint_workload(workload, max_loss=share * 1.1)
    assert report.is_clean and report.findings[0].level == "note"
    with pytest.raises(UsageError, match="0 to 1"):
        lint_workload(workload, max_loss=1.5)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("2026-11-22", "timestamp"), ("22.11.2026", "timestamp"), ("11/22/2026", "timestamp"),
        ("2026-11-22T08:00:01.123+02:00", "timestamp"), ("2026-11-22 08:00:01 UTC", "timestamp"),
        ("Sunday, November 22, 2026", "timestamp"), ("22 Nov 2026", "timestamp"), ("8:15 PM", "timestamp"),
        ("1763798400", "timestamp"), ("1763798400123", "timestamp"), ("Friday", "timestamp"),
        ("3f2b8c1e-0a4d-4a53-9a3f-2a1d5e6f7a8b", "uuid"),
        ("req_8f3ab2c91d", "request_id"), ("session-id: 12ab34", "request_id"),
        ("X-Trace-ID=99f1", "request_id"),
        ("chatcmpl-AbC123xyz789", "request_id"), ("9e107d9d372bb682", "request_id"),
        ("kJ8s7Hq2LmN0pQrStUvWx", "request_id"), ("17", "number"), ("3,141.59", "number"),
        ("\t", "whitespace"), ("\u00a0", "whitespace"), ("\r\n", "whitespace"),
    ],
)  # fmt: skip
def test_volatile_values_are_recognised(text, rule):
    masked = mask(f"before {text} after")
    expected = {"\t": " ", "\u00a0": " ", "\r\n": "\n"}.get(text, f"\x00{rule}\x00")
    if rule == "whitespace":
        assert text not in masked
    elif rule == "request_id" and text.startswith(("session", "X-")):
        assert expected in masked
    else:
        assert masked.startswith(f"before {expected}"), masked


@pytest.mark.parametrize(
    "text", ["may I ask", "the march of time", "sunflower", "facade", "deadbeef", "re-use"]
)
def test_ordinary_words_are_not_volatile(text):
    assert mask(text) == text


def test_a_place_in_the_canonical_form_is_found_in_the_text():
    text = f"At {hour(1)} and {uuid.UUID(int=5)} we met"
    document = Document(WorkloadRequest(request_id="a", prompt=text))
    reach, masked = document.original_length(len(document.canonical))
    assert (reach, masked) == (len(text), len(hour(1)) + 36)
    assert document.original_length(2) == (2, 0)


def test_hostile_text_takes_time_in_proportion_to_its_length():
    for unit in ('[{"', "- ", "1:", "a1", "A", "0", " ", "\n", "Mon ", "req-", '{"a":'):
        request = WorkloadRequest(request_id="a", prompt=unit * (200_000 // len(unit)))
        lint_workload(Workload(requests=(request,) * 2, format="x"))


def hashed(rows, **fields):
    requests = tuple(
        WorkloadRequest(
            request_id=str(i), arrival_s=float(i), input_length=n, hash_ids=tuple(ids), session_id=s, **fields
        )
        for i, (s, n, ids) in enumerate(rows)
    )
    return Workload(requests=requests, format="x", block_size=16)


def turns(head):
    """20 sessions of 5 turns that grow by 10 blocks each; `head` names the first block of a turn."""
    rows, fresh = [], 10_000
    for session in range(20):
        ids = []
        for turn in range(5):
            first = head(session, turn)
            # All behind a changed head has other hashes.
            fresh_ids = range(fresh, fresh + 9 + 10 * turn)
            ids = [*ids, *range(fresh, fresh + 10)] if first is None else [first, *fresh_ids]
            fresh += 200
            rows.append((f"s{session}", 16 * len(ids), ids))
    return hashed(rows)


def test_sessions_that_continue_are_clean_by_their_hashes():
    report = lint_workload(turns(lambda session, turn: None))
    assert report.is_clean and report.evidence == "hashes"
    assert any("no text" in note for note in report.notes)


def test_a_head_that_changes_every_turn_is_found_at_block_0():
    report, finding = only_finding(turns(lambda session, turn: 100 * session + turn))
    assert (finding.rule, finding.position.token, finding.num_requests) == ("changing_head", 0, 80)
    assert finding.lost_tokens == 20 * 16 * (10 + 20 + 30 + 40)
    assert any("first block" in note for note in report.notes)


def test_a_turn_cut_shorter_on_purpose_is_not_a_breakage():
    rows = [(f"s{i}", 16 * n, [i * 1000 + n * 100 + k for k in range(n)]) for i in range(30) for n in (9, 5)]
    assert lint_workload(hashed(rows)).is_clean


def test_content_that_comes_back_in_another_order_is_found():
    rng = random.Random(4)
    rows = []
    for i in range(80):
        passages = rng.sample(range(10, 16), 6)
        rows.append(("", 6 * 100 + 300, [1, *passages, 1000 + i]))
    requests = tuple(
        WorkloadRequest(
            request_id=str(i), input_length=n, hash_ids=tuple(ids), hash_lengths=(200, *[100] * 6, 100)
        )
        for i, (_, n, ids) in enumerate(rows)
    )
    report, finding = only_finding(Workload(requests=requests, format="ragpulse"))
    assert finding.rule == "moved_content"
    # In a fixed order all six passages would be shared by every request but the first.
    assert report.reused_tokens + finding.lost_tokens == 79 * 800
    assert finding.position.token >= 200


def test_lengths_alone_cannot_be_linted():
    workload = Workload(requests=(WorkloadRequest(request_id="a", input_length=5),), format="azure")
    with pytest.raises(UsageError, match="lengths only"):
        lint_workload(workload)
