"""The client against a scripted server: times, order, limits, and every way a stream can go wrong."""

import time

import pytest

from kvtune.adapters.openai_client import CompletionsClient, StreamRequest
from kvtune.errors import TargetError, UsageError


def request(name: str, *, first: int = 0, max_tokens: int = 4, arrival_s: float = 0.0) -> StreamRequest:
    body = {"prompt": [first, 1, 2], "max_tokens": max_tokens}
    return StreamRequest(request_id=name, body=body, arrival_s=arrival_s)


def run(stub, *requests, **settings):
    return CompletionsClient(stub.url).stream_all(requests, **settings)


def test_tokens_counts_and_cached_tokens_come_back_in_request_order(stub, tokens_behaviour):
    stub.behave = tokens_behaviour(cached=2)
    results, _ = run(stub, request("a", first=10, arrival_s=0.05), request("b", first=20, max_tokens=2))
    assert [r.request_id for r in results] == ["a", "b"]
    assert results[0].token_ids == (10, 11, 12, 13)
    assert results[1].token_ids == (20, 21)
    assert [r.error for r in results] == [None, None]
    assert [(r.num_prompt_tokens, r.output_tokens, r.num_cached_tokens) for r in results] == [
        (3, 4, 2),
        (3, 2, 2),
    ]
    assert stub.bodies[0]["stream_options"] == {"include_usage": True}


def test_requests_are_sent_at_their_arrival_times_and_latency_counts_from_there(stub, tokens_behaviour):
    stub.behave = tokens_behaviour(first_s=0.1, gap_s=0.05)
    began = time.perf_counter()
    results, duration_s = run(stub, request("now"), request("later", arrival_s=1.0))
    assert stub.sent_at[1] - began > 0.98
    for result in results:
        assert 0.1 <= result.ttft_s < 1.0  # counted from the start of the run it were 1.1 for the second
        assert result.tpot_s >= 0.045
        assert result.e2e_s == pytest.approx(result.ttft_s + sum(result.itl_s))
    assert duration_s >= 1.0 + results[1].e2e_s - 0.02


def test_waiting_for_the_clients_own_concurrency_limit_is_not_latency(stub, tokens_behaviour):
    stub.behave = tokens_behaviour(first_s=0.7)
    results, _ = run(stub, request("a"), request("b"), max_concurrency=1)
    assert all(0.7 <= r.ttft_s < 1.4 for r in results)  # waiting for the first it were 1.4 for the second
    assert stub.most_running == 1


def test_several_tokens_in_one_chunk_are_counted_and_tpot_spreads_them(stub, tokens_behaviour):
    stub.behave = tokens_behaviour(per_chunk=3, gap_s=0.06)
    (result,), _ = run(stub, request("a", max_tokens=6))
    assert result.chunk_tokens == (3, 3)
    assert result.output_tokens == 6
    assert result.tpot_s == pytest.approx(result.itl_s[0] / 5)


def test_a_refused_request_is_a_result_with_its_reason_and_the_others_go_on(stub, tokens_behaviour):
    def behave(handler, body):
        if body["prompt"][0] == 7:
            handler.reply(400, {"error": {"message": "too\nlong", "code": 400}})
        else:
            tokens_behaviour()(handler, body)

    stub.behave = behave
    results, _ = run(stub, request("bad", first=7), request("good"))
    assert results[0].error == "HTTP 400: too long"
    assert results[0].e2e_s is None
    assert results[1].error is None


def test_a_stream_cut_before_its_end_is_an_error_with_the_tokens_it_had(stub):
    def behave(handler, body):
        handler.begin_stream()
        handler.event({"choices": [{"text": "", "token_ids": [5], "finish_reason": None}]})

    stub.behave = behave
    (result,), _ = run(stub, request("a"))
    assert "without a finish reason" in result.error
    assert result.token_ids == (5,)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"error": {"message": "engine died"}}, "engine died"),
        ("{broken", "JSONDecodeError"),
        ("[1, 2]", "event object"),
        ({"choices": ["text"]}, "AttributeError"),
        ({"choices": [{"token_ids": ["x"]}]}, "ValueError"),
    ],
)
def test_an_error_or_nonsense_inside_a_stream_is_recorded_not_raised(stub, event, said):
    def behave(handler, body):
        handler.begin_stream()
        handler.event(event)
        handler.event("[DONE]")

    stub.behave = behave
    (result,), _ = run(stub, request("a"))
    assert said in result.error


def test_what_is_unfinished_at_the_deadline_is_cancelled_and_says_so(stub, tokens_behaviour):
    stub.behave = tokens_behaviour(gap_s=0.2)
    began = time.perf_counter()
    done: list[int] = []
    results, _ = run(
        stub, request("short", max_tokens=1), request("long", max_tokens=50), request("never", arrival_s=9.0),
        deadline_s=0.5, on_done=done.append,
    )  # fmt: skip
    assert time.perf_counter() - began < 2
    assert results[0].error is None
    assert "deadline of 0.5 s" in results[1].error
    assert len(results[1].token_ids) >= 1
    assert "deadline" in results[2].error
    assert done == [1, 2, 3]


def test_a_text_only_chat_stream_is_counted_by_chunk_where_the_server_gives_no_usage(stub):
    def behave(handler, body):
        handler.begin_stream()
        handler.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for word in ("a", " b"):
            handler.event({"choices": [{"delta": {"content": word}}]})
        handler.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        handler.event("[DONE]")

    stub.behave = behave
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    (result,), _ = run(stub, StreamRequest(request_id="a", body=body, path="/v1/chat/completions"))
    assert (result.text, result.output_tokens, result.num_cached_tokens) == ("a b", 2, None)
    assert stub.bodies[0]["path"] == "/v1/chat/completions"


def test_a_server_that_is_not_there_fails_each_request_and_raises_for_plain_calls():
    from kvtune.adapters.server_process import free_loopback_port

    client = CompletionsClient(f"http://127.0.0.1:{free_loopback_port()}")
    (result,), _ = client.stream_all([request("a")])
    assert "Connect" in result.error
    with pytest.raises(TargetError, match=r"GET http://127.0.0.1:\d+/v1/models failed"):
        client.get("/v1/models")


def test_plain_posts_are_limited_and_handled_with_their_index(stub):
    def behave(handler, body):
        time.sleep(0.05)
        handler.reply(200, {"double": 2 * body["n"]})

    stub.behave = behave
    seen = {}
    bodies = [{"n": n} for n in range(5)]
    CompletionsClient(stub.url).post_all(
        "/x", bodies, lambda i, reply: seen.update({i: reply["double"]}), concurrency=2
    )
    assert seen == {0: 0, 1: 2, 2: 4, 3: 6, 4: 8}
    assert stub.most_running == 2


def test_a_failing_post_stops_the_rest(stub):
    stub.behave = lambda handler, body: handler.reply(500, {"error": {"message": "dead"}})
    with pytest.raises(TargetError, match="POST /x answered 500: dead"):
        CompletionsClient(stub.url).post_all("/x", [{"n": 1}] * 50, lambda *_: None)
    assert len(stub.bodies) < 50


def test_an_address_that_is_no_url_is_refused():
    with pytest.raises(UsageError, match="expected a server URL"):
        CompletionsClient("localhost:8000")
