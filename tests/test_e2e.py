"""The whole thing, as a user has it: `sglfast serve` before simulated workers, in processes of their own, over real sockets."""

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e import (
    Prompts,
    explained,
    get,
    has_ended,
    metric,
    overlap_of,
    post,
    process_of,
    samples,
    send_all,
    small_stack,
    wait_events,
    wait_until,
)

from sglfast._counters import RANK_EXACT
from sglfast.load.stack import Stack
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH

INFLIGHT = "sglfast_inflight_requests"


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts()


@pytest.fixture
def stack() -> Iterator[Stack]:
    with small_stack() as running:
        yield running


def test_conversations_go_where_their_cache_is(stack: Stack, prompts: Prompts) -> None:
    """Forty conversations of five turns: each stays on one worker and pays for its newest turn only."""
    sizes_blocks = [20, 25, 30, 35, 40]  # every turn but the first finds more than half of its prompt
    turns = [[prompts.text(user, 64 * blocks) for user in range(1, 41)] for blocks in sizes_blocks]
    for turn, texts in enumerate(turns):
        answers = send_all(stack.url, texts, connections=8)
        assert [answer.error for answer in answers] == [""] * len(texts)
        for answer in answers:
            predicted, cached, state = overlap_of(answer)
            assert state == "EXACT"
            assert predicted == cached == (sizes_blocks[turn - 1] if turn else 0)
        wait_events(stack)
    assert metric(stack, "sglfast_worker_overlap_blocks_total") == 40 * sum(sizes_blocks[:-1])
    assert metric(stack, INFLIGHT) == 0
    assert metric(stack, "sglfast_worker_inflight_tokens") == 0


def test_models_health_and_errors_are_answered_by_the_router(stack: Stack) -> None:
    assert json.loads(get(f"{stack.url}/v1/models"))["data"][0]["id"] == "demo-model"
    for path in ("/health", "/healthz", "/liveness", "/readyz", "/readiness"):
        get(stack.url + path)
    answer = send_all(stack.url, [""], connections=1)[0]  # the worker's own 400, not the router's
    assert answer.status == 400
    assert b"error" in answer.body
    assert metric(stack, "sglfast_worker_requests_total", outcome="client_error") == 1


def test_a_killed_shard_fails_only_what_was_in_flight_on_it(stack: Stack, prompts: Prompts) -> None:
    victim = process_of(stack, "sglfast.edge.main")
    texts = [prompts.text(seed, 400) for seed in range(600)]

    def kill() -> None:
        time.sleep(0.5)
        os.kill(victim, signal.SIGKILL)

    answers = send_all(stack.url, texts, connections=32, max_tokens=40, during=kill)
    failed = [answer for answer in answers if answer.error]
    assert len(failed) <= 32
    # Whatever failed had begun before the shard died: nothing that came later met a closed door.
    assert {answer.error for answer in failed} <= {"closed", "cut"}
    assert victim != process_of(stack, "sglfast.edge.main")
    again = send_all(stack.url, texts[:100], connections=32)
    assert [answer.error for answer in again] == [""] * 100
    wait_until(lambda: metric(stack, INFLIGHT) == 0, "in-flight counters are back at 0")
    assert metric(stack, "sglfast_worker_inflight_requests") == 0
    assert metric(stack, "sglfast_worker_inflight_tokens") == 0
    assert metric(stack, "sglfast_process_restarts_total") == 1


def test_a_killed_index_is_exact_again_when_its_streams_are(stack: Stack, prompts: Prompts) -> None:
    texts = [prompts.text(seed, 1000) for seed in range(60)]
    send_all(stack.url, texts, connections=8)
    wait_events(stack)
    known = [overlap_of(answer) for answer in send_all(stack.url, texts, connections=8)]
    assert all(predicted == cached == 15 for predicted, cached, _ in known)
    victim = process_of(stack, "sglfast.index.main")
    beside = [prompts.text(seed, 300) for seed in range(1000, 1400)]
    answers = send_all(stack.url, beside, connections=32, during=lambda: os.kill(victim, signal.SIGKILL))
    assert [answer.error for answer in answers if answer.error] == []

    def is_exact() -> bool:
        is_new = metric(stack, "sglfast_process_restarts_total") == 1 and metric(stack, "sglfast_process_up", process="index") == 1
        return is_new and samples(stack, "sglfast_kv_rank_state") == [RANK_EXACT] * 4

    wait_until(is_exact, "all four streams are EXACT after the index was killed")
    found = [overlap_of(answer) for answer in send_all(stack.url, texts, connections=8)]
    assert all(predicted == cached == 15 for predicted, cached, _ in found)


def test_killed_control_leaves_no_process(stack: Stack) -> None:
    router = stack.children[-1].pid
    pids = [process_of(stack, "sglfast.index.main"), *(process_of(stack, "sglfast.edge.main", n) for n in (0, 1))]
    os.kill(router, signal.SIGKILL)
    wait_until(lambda: all(map(has_ended, pids)), "index and shards have ended")


def test_sigterm_finishes_the_stream_in_flight_and_tells_readiness(stack: Stack) -> None:
    router = stack.children[-1].pid
    host, port = stack.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "demo-model", "prompt": "hello", "max_tokens": 3000, "stream": True, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    with (
        socket.create_connection((host, int(port)), timeout=30) as client,
        socket.create_connection((host, int(port)), timeout=30) as probe,
    ):
        client.sendall(head + body)
        data = client.recv(4096)
        os.kill(router, signal.SIGTERM)

        def is_draining() -> bool:
            with socket.create_connection((host, int(port)), timeout=30) as other:
                other.sendall(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
                return other.recv(4096).startswith(b"HTTP/1.1 503")

        wait_until(is_draining, "/readyz answers 503 while the stream goes on")
        assert probe.recv(1) == b""  # an idle connection is closed
        while not data.endswith(b"0\r\n\r\n"):
            piece = client.recv(65536)
            assert piece, "the stream was cut by the shutdown"
            data = data[-4096:] + piece
    assert b"data: [DONE]" in data
    wait_until(lambda: has_ended(router), "the router has ended")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_streams_whose_clients_leave_at_random_leave_nothing_behind(rng: random.Random) -> None:
    """10,000 streams of 64 chunks; a third of the clients leave somewhere in the middle."""
    from e2e_leavers import run_leavers

    with small_stack(policy="round_robin", decode_tokens_per_s=500.0) as stack:
        run_leavers(stack, rng, streams=10_000, chunks=64, connections=128)


def test_explain_says_what_a_request_would_get_and_counts_nothing(stack: Stack, prompts: Prompts) -> None:
    send_all(stack.url, [prompts.text(1, 700)], connections=1)
    wait_events(stack)
    text = prompts.text(1, 1000)

    def ask() -> dict[str, Any]:
        return explained(stack, "/v1/completions", {"model": "demo-model", "prompt": text})

    # Until the router's own prediction has ended, the score goes by that as well.
    wait_until(lambda: not any(row["overlap_blocks_by_tier"]["predicted"] for row in ask()["candidates"]), "events alone are left")
    before = metric(stack, "sglfast_requests_total"), metric(stack, "sglfast_decisions_total")
    found = ask()
    assert (found["model"], found["policy"], found["block_size"]) == ("demo-model", "cache_aware", 64)
    assert (found["prompt_tokens"], found["prompt_blocks"]) == (1000, 15)
    assert found["choice"]["decision"] == "cache_hit"
    owner = next(row for row in found["candidates"] if row["worker"] == found["choice"]["worker"])
    assert owner["overlap_blocks"] == owner["overlap_blocks_by_tier"]["device"] == 10
    assert owner["score"] == 360
    assert sorted(row["overlap_blocks"] for row in found["candidates"]) == [0, 0, 0, 10]
    assert (metric(stack, "sglfast_requests_total"), metric(stack, "sglfast_decisions_total")) == before
    answer = send_all(stack.url, [text], connections=1)[0]
    assert f"worker={found['choice']['worker']};" in answer.kv
    by_ids = explained(stack, "/generate", {"input_ids": list(range(200))})
    assert by_ids["prompt_tokens"] == 200
    nothing = explained(stack, "/v1/chat/completions", {"model": "demo-model"})
    assert nothing["unkeyed_because"]


def test_a_wrong_chat_template_is_named_within_50_requests(tmp_path: Path, prompts: Prompts) -> None:
    """The workers render ChatML, the router something else: events and hashes are fine, predictions are not."""
    shutil.copytree(DEMO_TOKENIZER_PATH, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}>")
    with small_stack(serve_flags=["--tokenizer-path", str(tmp_path / "other")]) as stack:
        bodies = [
            {"model": "demo-model", "max_tokens": 2, "messages": [{"role": "user", "content": prompts.text(seed % 5, 700)}]}
            for seed in range(50)
        ]
        for body in bodies:
            post(f"{stack.url}/v1/chat/completions", body)
        wait_until(lambda: metric(stack, "sglfast_worker_kv_predictions_total", result="too_low") >= 20, "samples are counted")
        wait_until(lambda: "template" in stack.children[-1].output(), "the log names the template")
