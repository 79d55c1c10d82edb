"""sim/batches.py: several prompts and several answers in one request, on regular workers and on pairs."""

import asyncio
from contextlib import suppress
from typing import Any

import orjson
import pytest
from sim_peers import SLOW, run, running
from test_sim_jobs import pair

from sglfast.prompt.keys import RequestKind
from sglfast.sim.batches import split
from sglfast.sim.requests import RequestError

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
PROMPTS = [[n * 100 + k for k in range(20 + n)] for n in range(3)]
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4, "ignore_eos": True}


def parts(kind: RequestKind, body: dict[str, Any], *, has_rooms: bool = True) -> list[dict[str, Any]]:
    return split(kind, body, "r", has_rooms=has_rooms)


def test_one_is_left_as_it_is() -> None:
    for kind, body in (
        (RequestKind.CHAT, TALK),
        (RequestKind.CHAT, {**TALK, "n": 1}),
        (RequestKind.COMPLETIONS, {"prompt": ["only"]}),
        (RequestKind.COMPLETIONS, {"prompt": [1, 2, 3]}),
        (RequestKind.GENERATE, {"input_ids": [[1, 2]], "bootstrap_room": [5]}),
        (RequestKind.EMBEDDINGS, {"input": ["a", "b"]}),
    ):
        assert parts(kind, body) == [body]


def test_prompts_and_answers_are_parts() -> None:
    both = parts(RequestKind.COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "bootstrap_room": 7, "bootstrap_host": "h"})
    assert [(part["prompt"], part["n"], part["rid"], part["bootstrap_room"]) for part in both] == [
        ("a", 1, "r_0", 7), ("a", 1, "r_1", 8), ("b", 1, "r_2", 9), ("b", 1, "r_3", 10),
    ]  # fmt: skip
    body = {
        "text": ["a", "b"],
        "sampling_params": [{"max_new_tokens": 1}, {}],
        "rid": ["x", "y"],
        "bootstrap_room": [3, 9],
        "bootstrap_port": [None, 5],
    }
    found = [
        (part["text"], part["sampling_params"], part["rid"], part["bootstrap_room"], part["bootstrap_port"])
        for part in parts(RequestKind.GENERATE, body)
    ]
    assert found == [("a", {"max_new_tokens": 1, "n": 1}, "x", 3, None), ("b", {"n": 1}, "y", 9, 5)]


def test_lists_that_do_not_fit() -> None:
    body = {"text": ["a", "b"], "bootstrap_room": [1]}
    with pytest.raises(RequestError, match="bootstrap_room has 1 entries for 2 requests"):
        parts(RequestKind.GENERATE, body)
    assert len(parts(RequestKind.GENERATE, body, has_rooms=False)) == 2, "who has no rooms ignores them"
    with pytest.raises(RequestError, match="more than the simulator's 256"):
        parts(RequestKind.CHAT, {**TALK, "n": 257})


def test_whole_answers_come_together() -> None:
    async def test() -> None:
        async with running() as worker:
            params = {"max_new_tokens": 3, "ignore_eos": True}
            many = await worker.ask(GENERATE, {"input_ids": PROMPTS, "sampling_params": params})
            single = [await worker.ask(GENERATE, {"input_ids": ids, "sampling_params": params}) for ids in PROMPTS]
            assert [answer["text"] for answer in many] == [answer["text"] for answer in single]
            assert [answer["meta_info"]["prompt_tokens"] for answer in many] == [20, 21, 22]
            chat = await worker.ask(CHAT, {**TALK, "n": 2, "rid": "me"})
            one = await worker.ask(CHAT, TALK)
            assert [choice["index"] for choice in chat["choices"]] == [0, 1]
            assert chat["choices"][1]["message"] == one["choices"][0]["message"]
            assert (chat["usage"]["completion_tokens"], chat["id"]) == (8, "me")
            text = await worker.ask(COMPLETIONS, {"prompt": ["a b c", "d e f"], "max_tokens": 2})
            assert len(text["choices"]) == 2
            assert (await worker.stats())["requests"] == 7

    run(test())


def test_a_stream_of_several() -> None:
    async def test() -> None:
        async with running() as worker:
            async with worker.post(CHAT, {**TALK, "n": 3, "stream": True, "stream_options": {"include_usage": True}}) as response:
                assert response.status == 200
                events = [line[6:] async for line in response.content if line.startswith(b"data: ")]
            assert events[-1] == b"[DONE]\n"
            assert [event.strip() for event in events].count(b"[DONE]") == 1
            *values, usage = [orjson.loads(event) for event in events[:-1]]
            assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 12)
            texts = ["", "", ""]
            for value in values:
                assert value["usage"] is None
                (choice,) = value["choices"]
                texts[choice["index"]] += choice["delta"].get("content") or ""
            assert texts[0] == texts[1] == texts[2] != ""
            body = {"input_ids": PROMPTS, "sampling_params": {"max_new_tokens": 2}, "stream": True}
            async with worker.post(GENERATE, body) as response:
                events = [line[6:] async for line in response.content if line.startswith(b"data: {")]
            assert {orjson.loads(event)["index"] for event in events} == {0, 1, 2}

    run(test())


def test_a_part_that_is_refused_ends_all() -> None:
    async def test() -> None:
        async with running(**SLOW) as worker:
            body = {"input_ids": [*PROMPTS, list(range(5000))], "sampling_params": {"max_new_tokens": 1000}}
            assert "longer than the model's context" in (await worker.ask(GENERATE, body, 400))["error"]["message"]
            await worker.until(lambda stats: not stats["running"] and not stats["waiting"])

    run(test())


@pytest.mark.parametrize("how", ["leave", "abort"])
def test_who_leaves_leaves_with_all_parts(how: str) -> None:
    async def test() -> None:
        async with running(**SLOW) as worker:
            body = {"input_ids": PROMPTS, "sampling_params": {"max_new_tokens": 1000}, "rid": "b"}
            asking = asyncio.create_task(worker.ask(GENERATE, body))
            await worker.until(lambda stats: stats["running"] == 3)
            if how == "leave":
                asking.cancel()
                with suppress(asyncio.CancelledError):
                    await asking
            else:
                async with worker.post("/abort_request", {"rid": "b"}) as answer:
                    assert answer.status == 200
                assert [part["meta_info"]["finish_reason"]["type"] for part in await asking] == ["abort"] * 3
            stats = await worker.until(lambda stats: not stats["running"])
            assert stats["streams_aborted"] == 3

    run(test())


@pytest.mark.parametrize("rooms", [[5, 99, 7], 1000])
def test_a_pair_takes_batches(rooms: Any) -> None:
    async def test() -> None:
        async with pair() as workers:
            base = workers.body(0)
            n = 3 if isinstance(rooms, list) else None
            fields = {name: [value] * n if n else value for name, value in base.items()} | {"bootstrap_room": rooms}
            body = {"input_ids": PROMPTS, "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}, **fields}
            prefill, decode = await workers.both(GENERATE, body)
            assert [part["meta_info"]["completion_tokens"] for part in prefill] == [1, 1, 1]
            assert [part["meta_info"]["completion_tokens"] for part in decode] == [4, 4, 4]
            _, chat = await workers.both(CHAT, {**TALK, "n": 3, **fields, "bootstrap_room": [1, 2, 3] if n else 50})
            assert [choice["index"] for choice in chat["choices"]] == [0, 1, 2]
            await workers.rest()
            assert (await workers.prefill.stats())["rooms"] == {"kept": 0, "transferred": 6, "failed": 0}

    run(test())


def test_a_room_that_never_comes_ends_the_batch_and_the_other_rooms() -> None:
    async def test() -> None:
        async with pair(decode={"disaggregation_bootstrap_timeout": 0.2}) as workers:
            body = workers.body(0, input_ids=PROMPTS, sampling_params={"max_new_tokens": 2}) | {"bootstrap_room": [1, 2, 3]}
            first = asyncio.create_task(workers.prefill.ask(GENERATE, {**body, "bootstrap_room": [1, 2, 4]}, 500))
            told = await workers.decode.ask(GENERATE, body, 500)
            assert "did not give room 3 within 0.2 s" in told["message"]
            # Room 4 is waited for by nobody: its request ends with its client.
            first.cancel()
            with suppress(asyncio.CancelledError):
                await first
            await workers.rest()

    run(test())
