"""Steering to data-parallel ranks, as a user has it: conversations go back to the rank that holds them; whole processes, two shards."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator

import orjson
import pytest
from e2e import (
    Prompts,
    completion,
    explained,
    get,
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

from sglfast.load.client import Answer, LoadClient
from sglfast.load.stack import Stack

WORKERS, RANKS = 2, 4
CONVERSATIONS, TURNS = 12, 6
FIRST_TOKENS, TURN_TOKENS = 1500, 200
TIMEOUT_S = 60.0
RANK_EXACT = 2


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts()


def ranked(*flags: str, policy: str = "cache_aware", **sim: float) -> Stack:
    return small_stack(policy, flags, workers=WORKERS, dp_size=RANKS, **sim)


def wait_exact(stack: Stack) -> None:
    wait_until(lambda: samples(stack, "sglfast_kv_rank_state") == [RANK_EXACT] * WORKERS * RANKS, "all event streams are followed")


@pytest.fixture
def stack() -> Iterator[Stack]:
    with ranked() as running:
        wait_exact(running)
        yield running


def generate(prompt: str, host: str) -> bytes:
    """The same as `completion` by SGLang's own route, which knows no header."""
    body = {"text": prompt, "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    data = orjson.dumps(body)
    head = f"POST /generate HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nx-sglfast-kv: 1\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n%b" % (len(data), data)


def converse(stack: Stack, prompts: Prompts, request: Callable[[str, str], bytes] = completion) -> list[list[Answer]]:
    """Conversations at once, each of which sends a turn when the index knows what the last one has left in the cache."""

    async def run() -> list[list[Answer]]:
        client = LoadClient(stack.url)

        async def one(number: int) -> list[Answer]:
            answers = []
            text = prompts.text(1 + number, FIRST_TOKENS)
            for turn in range(TURNS):
                answers.append(await client.send(request(text, client.host), timeout_s=TIMEOUT_S, is_stream=request is completion))
                text += prompts.text(1000 + 100 * number + turn, TURN_TOKENS)
                await asyncio.to_thread(wait_events, stack)
            return answers

        found = await asyncio.gather(*map(one, range(CONVERSATIONS)))
        await client.close()
        return found

    found = asyncio.run(run())
    assert not [answer.error for conversation in found for answer in conversation if answer.error or answer.status != 200]
    return found


def place_of(answer: Answer) -> str:
    """Worker and rank that the router believed in."""
    return answer.kv.partition("; overlap")[0]


def rank_loads(stack: Stack) -> list[float]:
    found = samples(stack, "sglfast_rank_inflight_requests") + samples(stack, "sglfast_rank_inflight_tokens")
    assert len(found) == 2 * WORKERS * RANKS
    return found


def tokens_by_rank(stack: Stack) -> list[int]:
    """Prompt tokens that each rank was given, as the engines count them."""
    stats = [orjson.loads(get(f"{url}/sim/stats")) for url in stack.worker_urls]
    return [rank["prompt_tokens_total"] for worker in stats for rank in worker["ranks"]]


def verdicts(stack: Stack, result: str) -> float:
    return metric(stack, "sglfast_worker_kv_predictions_total", result=result)


@pytest.mark.parametrize("request_of", [completion, generate])
def test_conversations_return_to_their_rank(stack: Stack, prompts: Prompts, request_of: Callable[[str, str], bytes]) -> None:
    found = converse(stack, prompts, request_of)
    assert all(len(set(map(place_of, conversation))) == 1 for conversation in found)
    assert len({place_of(conversation[0]) for conversation in found}) > WORKERS, "more than one rank of a worker has conversations"
    known = [0, *((FIRST_TOKENS + turn * TURN_TOKENS) // 64 for turn in range(TURNS - 1))]
    for conversation in found:
        assert [overlap_of(answer)[0] for answer in conversation] == known
        if request_of is completion:
            assert [overlap_of(answer)[1] for answer in conversation] == known, "the engines found what was predicted"
            assert {overlap_of(answer)[2] for answer in conversation} == {"EXACT"}
    assert verdicts(stack, "exact") == CONVERSATIONS * (TURNS - 1)
    assert verdicts(stack, "too_high") == verdicts(stack, "too_low") == 0
    assert sum(count > 0 for count in tokens_by_rank(stack)) >= WORKERS * RANKS - 2, "new conversations go to idle ranks"
    wait_until(lambda: not any(rank_loads(stack)), "nothing is left as load")


def test_without_steering_the_worker_s_turns_miss_the_cache(prompts: Prompts) -> None:
    with ranked("--disable-dp-steering") as stack:
        wait_exact(stack)
        found = converse(stack, prompts)
        later = [answer for conversation in found for answer in conversation[1:]]
        assert sum(overlap_of(answer)[0] > overlap_of(answer)[1] for answer in later) > len(later) / 3
        assert verdicts(stack, "too_high") > len(later) / 3
        wait_until(lambda: "spreads requests over its 4 data-parallel ranks itself" in stack.children[-1].output(), "the cause is told")
        assert samples(stack, "sglfast_rank_inflight_requests") == []


def test_dp_aware_shares_the_ranks_out_whatever_the_policy(prompts: Prompts) -> None:
    with ranked("--dp-aware", policy="round_robin", prefill_tokens_per_s=20_000.0) as stack:
        texts = [prompts.text(seed, 400) for seed in range(64)]
        answers = send_all(stack.url, texts, connections=16)
        assert [answer.error for answer in answers] == [""] * 64
        assert all(count > 400 for count in tokens_by_rank(stack))
        wait_until(lambda: not any(rank_loads(stack)), "nothing is left as load")


def test_a_client_s_own_rank_wins(stack: Stack, prompts: Prompts) -> None:
    async def ask(head: bytes, body: dict[str, object]) -> Answer:
        client = LoadClient(stack.url)
        data = orjson.dumps(body)
        request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n%b"
        answer = await client.send(request % (head, len(data), data), timeout_s=TIMEOUT_S, is_stream=False)
        await client.close()
        return answer

    def given(head: bytes, **fields: object) -> int:
        """Send four prompts; the one rank number, of either worker, that was given tokens by them."""
        before = tokens_by_rank(stack)
        for seed in range(4):
            text = prompts.text(500 + 10 * len(head) + len(fields) + 100 * seed, 300)
            answer = asyncio.run(ask(head, {"model": "demo-model", "prompt": text, "max_tokens": 1, **fields}))
            assert (answer.error, answer.status) == ("", 200), answer.body
        after = tokens_by_rank(stack)
        (rank,) = {place % RANKS for place in range(WORKERS * RANKS) if after[place] > before[place]}
        return rank

    assert given(b"X-Data-Parallel-Rank: 2\r\n") == 2
    assert given(b"", routed_dp_rank=1) == 1
    assert given(b"", data_parallel_rank=3) == 3


def test_the_explanation_names_the_rank(stack: Stack, prompts: Prompts) -> None:
    text = prompts.text(77, 1000)
    (answer,) = send_all(stack.url, [text], connections=1)
    wait_events(stack)
    found = explained(stack, "/v1/completions", {"model": "demo-model", "prompt": text + prompts.text(78, 50)})
    worker, rank = place_of(answer).removeprefix("worker=").split("; rank=")
    assert (found["choice"]["worker"], found["choice"]["rank"]) == (worker, int(rank))
    (row,) = (row for row in found["candidates"] if row["worker"] == worker)
    assert [each["overlap_blocks"] for each in row["ranks"]] == [15 if number == int(rank) else 0 for number in range(RANKS)]
    assert row["ranks"][int(rank)]["why"].startswith("holds the longest part")
    assert row["ranks"][0]["load"] == {"requests": 0, "tokens": 0}


def test_a_killed_shard_leaves_no_load_on_a_rank(prompts: Prompts) -> None:
    with ranked(decode_tokens_per_s=100.0) as stack:
        victim = process_of(stack, "sglfast.edge.main")
        texts = [prompts.text(seed, 400) for seed in range(48)]
        seen: list[float] = []

        def kill() -> None:
            wait_until(lambda: sum(samples(stack, "sglfast_rank_inflight_requests")) >= 16, "requests are in flight on ranks")
            seen.extend(rank_loads(stack))
            os.kill(victim, signal.SIGKILL)

        answers = send_all(stack.url, texts, connections=24, max_tokens=100, during=kill)
        assert any(seen)
        assert 0 < sum(bool(answer.error) for answer in answers) <= 24
        wait_until(lambda: not any(rank_loads(stack)), "nothing is left as load")


def test_workers_that_fail_and_come_back_leave_no_load_on_a_rank(stack: Stack, prompts: Prompts) -> None:
    texts = [prompts.text(seed, 300) for seed in range(400)]
    for mode in ("cut_body", "error_500", "busy_503", "refuse"):
        post(f"{stack.worker_urls[0]}/sim/fault", {"mode": mode, "share": 0.3})
        send_all(stack.url, texts[:150], connections=24, max_tokens=8)
    post(f"{stack.worker_urls[0]}/sim/fault", {"mode": "none"})

    def restart() -> None:
        time.sleep(0.1)
        post(f"{stack.worker_urls[1]}/sim/restart", {"down_s": 0.3})

    send_all(stack.url, texts, connections=24, max_tokens=20, during=restart)
    wait_until(lambda: metric(stack, "sglfast_inflight_requests") == 0, "in flight is back at 0")
    assert not any(rank_loads(stack))
    assert metric(stack, "sglfast_worker_inflight_tokens") == 0


@pytest.mark.parametrize(("policy", "flags"), [("cache_aware", ()), ("round_robin", ("--dp-aware",))])
def test_a_worker_that_comes_back_with_fewer_ranks_fails_no_request(policy: str, flags: tuple[str, ...], prompts: Prompts) -> None:
    """No health check sees it: the refusal of a rank is what tells."""
    with ranked("--health-check-interval-secs", "3600", *flags, policy=policy) as stack:
        wait_exact(stack)
        for url in stack.worker_urls:
            post(f"{url}/sim/restart", {"dp_size": 2})
        answers = send_all(stack.url, [prompts.text(seed, 300) for seed in range(200)], connections=24)
        assert [(answer.status, answer.error) for answer in answers] == [(200, "")] * 200
        assert metric(stack, "sglfast_worker_rank_refusals_total") >= WORKERS, "it is by refusals that they were told apart"
        wait_until(lambda: len(samples(stack, "sglfast_kv_rank_state")) == WORKERS * 2, "the workers have been asked again", 5.0)
        wait_until(lambda: samples(stack, "sglfast_kv_rank_state") == [RANK_EXACT] * WORKERS * 2, "their streams are followed")
        refused = metric(stack, "sglfast_worker_rank_refusals_total")
        time.sleep(0.3)  # shards act by the new table
        before = tokens_by_rank(stack)
        answers = send_all(stack.url, [prompts.text(1000 + seed, 300) for seed in range(100)], connections=24)
        assert [answer.status for answer in answers] == [200] * 100
        assert all(now > then for now, then in zip(tokens_by_rank(stack), before, strict=True)), "they are told ranks again"
        assert metric(stack, "sglfast_worker_rank_refusals_total") == refused
        wait_until(lambda: metric(stack, "sglfast_inflight_requests") == 0, "all have left")
        assert not any(samples(stack, "sglfast_rank_inflight_requests"))
