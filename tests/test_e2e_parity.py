"""The parity loop over a whole router: a worker that keeps a part of its stores to itself is named, an honest one is not."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from e2e import Prompts, get, metric, post, samples, small_stack, wait_events, wait_until

from sglfast._counters import RANK_DEGRADED, RANK_EXACT
from sglfast.load.client import LoadClient
from sglfast.load.stack import Stack

CAUSE = "the worker leaves stored blocks out of its KV events"
SYSTEMS, SYSTEM_TOKENS, TURNS = 3, 300, 5


class Conversations:
    """Users, each with one conversation behind the other, which have the system prompts by turns. after: called behind each answer."""

    def __init__(self, stack: Stack, rng: random.Random, after: Callable[[], None] = lambda: None) -> None:
        self._stack = stack
        self._rng = rng
        self._prompts = Prompts()
        self._after = after
        self._begun = 0

    def send(self, count: int, *, users: int = 1) -> None:
        """So many requests, each user's one after the other."""
        asyncio.run(self._send(count, users))

    async def _send(self, count: int, users: int) -> None:
        client = LoadClient(self._stack.url)
        left = [count]
        await asyncio.gather(*(self._talk(client, left) for _ in range(users)))
        await client.close()

    async def _talk(self, client: LoadClient, left: list[int]) -> None:
        rng, prompts = self._rng, self._prompts
        while left[0]:
            messages = [{"role": "system", "content": prompts.text(1 + self._begun % SYSTEMS, SYSTEM_TOKENS)}]
            self._begun += 1
            for _ in range(TURNS):
                if not left[0]:
                    return
                left[0] -= 1
                messages.append({"role": "user", "content": prompts.text(rng.randrange(10**6), rng.randrange(60, 300))})
                body = {"model": "demo-model", "messages": messages, "max_tokens": 70, "ignore_eos": True}
                data = orjson.dumps(body)
                head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {client.host}\r\ncontent-type: application/json\r\n"
                answer = await client.send(
                    head.encode() + b"content-length: %d\r\n\r\n%b" % (len(data), data), timeout_s=60.0, is_stream=False
                )
                assert not answer.error, answer.error
                text = orjson.loads(answer.body)["choices"][0]["message"]["content"]
                messages.append({"role": "assistant", "content": text})
                self._after()


def keep_back(url: str, share: float, unit: str = "event") -> None:
    post(f"{url}/sim/keep_back_stores", {"share": share, "unit": unit})


def kv_states(stack: Stack) -> dict[str, tuple[str, str]]:
    """(state, reason) by worker."""
    found: dict[str, Any] = orjson.loads(get(f"{stack.url}/workers"))
    return {row["url"]: (row["kv"]["state"], row["kv"]["reason"]) for row in found["workers"]}


def is_named(stack: Stack) -> bool:
    return "DEGRADED" in (state for state, _ in kv_states(stack).values())


@pytest.mark.parametrize("unit", ["event", "block"])
def test_a_worker_that_does_not_publish_half_of_its_stores_is_named_within_50_requests(unit: str, rng: random.Random) -> None:
    with small_stack(workers=1) as stack:
        (url,) = stack.worker_urls
        talk = Conversations(stack, rng, lambda: wait_events(stack))
        talk.send(SYSTEMS * TURNS)  # what is told of the system prompts shows that keys agree, and stays
        keep_back(url, 0.5, unit)
        talk.send(50)
        wait_until(lambda: is_named(stack), "it is named")
        assert CAUSE in kv_states(stack)[url][1]
        assert CAUSE in stack.children[-1].output()
        assert metric(stack, "sglfast_kv_gaps_total") == 0, "its stream is whole"
        assert samples(stack, "sglfast_kv_rank_state") == [RANK_DEGRADED]

        keep_back(url, 0)
        for _ in range(20):
            if not is_named(stack):
                break
            talk.send(4 * TURNS)
        wait_until(lambda: kv_states(stack)[url] == ("EXACT", ""), "it is trusted again")
        assert samples(stack, "sglfast_kv_rank_state") == [RANK_EXACT]


def test_honest_workers_under_load_have_told_everything(rng: random.Random) -> None:
    """Requests that overtake events, caches that are too small, siblings in one batch: too little is predicted, and all of it comes."""
    with small_stack(workers=2, cache_tokens=12_000) as stack:
        talk = Conversations(stack, rng)
        talk.send(400, users=24)
        wait_events(stack)
        # The last ones are known when later events have been looked at.
        overtaken = metric(stack, "sglfast_worker_kv_predictions_total", result="came_since")
        Conversations(stack, rng, lambda: wait_events(stack)).send(10)
        assert overtaken > 0, "else there was nothing to be mistaken in"
        assert metric(stack, "sglfast_worker_kv_untold_total") == 0
        assert CAUSE not in stack.children[-1].output()
