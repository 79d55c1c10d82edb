"""sim/inference.py over real sockets: caches and events, clients that leave, time and load."""

import asyncio
import time
from contextlib import suppress
from typing import Any

import aiohttp
import orjson
import pytest
from sim_peers import INFERENCE, SLOW, following, run, running

from sglfast.sim.prompts import LONG_PROMPT_CHARS
from sglfast.wire.server_info import parse_server_info


@pytest.mark.parametrize("path", INFERENCE)
def test_errors_have_the_routes_shape(path: str) -> None:
    async def test() -> None:
        async with running() as worker:
            error = await worker.ask(path, {}, 400)
            if path == "/generate":
                assert set(error) == {"error"}
                assert "text or input_ids" in error["error"]["message"]
            else:
                assert set(error) == {"object", "message", "type", "param", "code"}
                assert (error["object"], error["type"], error["code"]) == ("error", "Bad Request", 400)
            async with worker.session.post(worker.worker.url + path, data=b"{", headers={"content-type": "application/json"}) as bad:
                assert bad.status == 400
            assert (await worker.stats())["refused"] == 2

    run(test())


def test_an_identical_prompt_is_cached_and_the_answer_the_same() -> None:
    async def test() -> None:
        async with running(page_size=64) as worker:
            text = " ".join(f"word{i}" for i in range(300))
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 20}
            first = await worker.ask("/v1/chat/completions", body)
            again = await worker.ask("/v1/chat/completions", {**body, "stream": False, "temperature": 0.7})
            n = first["usage"]["prompt_tokens"]
            assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
            assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": (n - 1) // 64 * 64}
            assert first["choices"] == again["choices"]
            # The next turn of the conversation finds prompt and answer in the cache.
            answer = first["choices"][0]["message"]
            turn = [*body["messages"], {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "more"}]
            third = await worker.ask("/v1/chat/completions", {"messages": turn, "max_tokens": 1})
            assert third["usage"]["prompt_tokens_details"]["cached_tokens"] == (n + 19) // 64 * 64
            stats = await worker.stats()
            assert stats["prompt_tokens_total"] == 2 * n + third["usage"]["prompt_tokens"]
            assert (stats["requests"], stats["refused"], stats["running"], stats["waiting"]) == (3, 0, 0, 0)

    run(test())


def test_natural_end_and_exact_length() -> None:
    async def test() -> None:
        async with running() as worker:
            path, body = "/v1/chat/completions", INFERENCE["/v1/chat/completions"]
            natural = await worker.ask(path, body)
            assert natural["choices"][0]["finish_reason"] == "stop"
            n = natural["usage"]["completion_tokens"]
            assert 128 <= n <= 256
            longer = await worker.ask(path, {**body, "max_tokens": 300})
            assert (longer["usage"]["completion_tokens"], longer["choices"][0]["finish_reason"]) == (n, "stop")
            exact = await worker.ask(path, {**body, "max_tokens": 300, "ignore_eos": True})
            assert (exact["usage"]["completion_tokens"], exact["choices"][0]["finish_reason"]) == (300, "length")

    run(test())


def test_salts_keep_caches_apart() -> None:
    async def test() -> None:
        async with running() as worker:
            cached = []
            for salt in ("a", "b", "a", None):
                body = {"input_ids": list(range(40)), "cache_salt": salt, "sampling_params": {"max_new_tokens": 1}}
                cached.append((await worker.ask("/generate", body))["meta_info"]["cached_tokens"])
            assert cached == [0, 0, 36, 0]

    run(test())


@pytest.mark.parametrize("shape", ["map", "array"])
def test_events_alone_tell_what_is_cached(shape: str) -> None:
    async def test() -> None:
        # 120 blocks for 8 conversations of up to 40 blocks: much is evicted.
        small: dict[str, Any] = {"cache_tokens": 480, "chunked_prefill_tokens": 64}
        async with running(event_shape=shape, **small) as worker, following(worker.worker) as follower:
            for round_ in range(5):
                asked = [worker.generate([1000 * i + n for n in range(20 + 25 * round_)], 10) for i in range(8)]
                await asyncio.gather(*asked)
                stats = await worker.stats()
                await follower.settle()
                assert follower.blocks == set(stats["ranks"][0]["block_keys"])
            assert stats["cache_evicted_blocks"] > 50
            assert stats["cache_used_blocks"] == len(follower.blocks) <= 120
            assert stats["cache_locked_blocks"] == 0
            assert follower.sequences == list(range(follower.sequences[0], stats["ranks"][0]["next_sequence"]))

    run(test())


def test_what_the_events_show_is_what_the_next_request_hits() -> None:
    async def test() -> None:
        async with running() as worker, following(worker.worker) as follower:
            prompt = list(range(100, 142))
            answer = await worker.generate(prompt, 15)
            await follower.settle()
            # 42 + 14 tokens have KV: 14 pages.
            assert len(follower.blocks) == 14
            assert (await worker.generate(prompt + answer["output_ids"] + [1, 2]))["meta_info"]["cached_tokens"] == 56

    run(test())


def test_ranks_have_caches_and_streams_of_their_own() -> None:
    async def test() -> None:
        async with running(dp_size=2) as worker, following(worker.worker, 1) as follower:
            prompt = list(range(20))
            for header, cached in (("1", 0), ("0", 0), ("1", 16)):
                answer = await worker.generate(prompt, headers={"X-Data-Parallel-Rank": header})
                assert answer["meta_info"]["cached_tokens"] == cached
            await follower.settle()
            stats = await worker.stats()
            assert follower.blocks == set(stats["ranks"][1]["block_keys"])
            assert len(follower.blocks) == 5
            facts = parse_server_info(orjson.dumps(await worker.get("/server_info")), worker.worker.url)
            assert facts.kv is not None
            assert facts.kv.live_endpoint(1) == f"tcp://127.0.0.1:{worker.worker.publisher.live_port + 1}"
            # Without a wish, ranks take turns.
            before = [rank["prompt_tokens_total"] for rank in stats["ranks"]]
            for i in range(4):
                await worker.generate([50 + i] * 6)
            after = [rank["prompt_tokens_total"] for rank in (await worker.stats())["ranks"]]
            assert [b - a for a, b in zip(before, after, strict=True)] == [12, 12]
            async with worker.post("/generate", {"text": "a", "routed_dp_rank": 2}) as response:
                assert response.status == 400
                assert "out of range" in await response.text()
            async with worker.post("/generate", {"text": "a", "routed_dp_rank": 2, "stream": True}) as response:
                assert (response.status, response.content_type) == (200, "text/event-stream")
                event, done, _ = (await response.text()).split("\n\n")
                error = orjson.loads(event.removeprefix("data: "))["error"]
                assert (error["code"], error["message"]) == (400, "routed_dp_rank=2 out of range [0, 2)")
                assert done == "data: [DONE]"
            async with worker.post("/v1/completions", {"prompt": "a", "routed_dp_rank": 2, "stream": True}) as response:
                assert response.status == 400

    run(test())


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(is_stream: bool) -> None:
    async def test() -> None:
        async with running(**SLOW, max_running_requests=1) as worker:
            body = {"input_ids": list(range(20)), "stream": is_stream, "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True}}
            running_one = asyncio.create_task(worker.ask("/generate", body))
            await worker.until(lambda stats: stats["running"] == 1)
            waiting_one = asyncio.create_task(worker.ask("/generate", body))
            await worker.until(lambda stats: stats["waiting"] == 1)
            for task in (waiting_one, running_one):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            stats = await worker.until(lambda stats: stats["streams_aborted"] == 2 and not stats["running"])
            assert (stats["waiting"], stats["cache_locked_blocks"]) == (0, 0)
            assert stats["generated_tokens_total"] < 100

    run(test())


def test_abort_request_ends_one_answer() -> None:
    async def test() -> None:
        async with running(**SLOW) as worker:
            bodies = [{"rid": rid, "text": "hello", "stream": True} for rid in ("one", "two")]
            async with worker.post("/generate", bodies[0]) as one, worker.post("/generate", bodies[1]) as two:
                await one.content.readline()
                await two.content.readline()
                assert "Duplicate" in (await worker.ask("/generate", bodies[0] | {"stream": False}, 400))["error"]["message"]
                async with worker.post("/abort_request", {"rid": "one"}) as response:
                    assert response.status == 200
                rest = (await one.content.read()).decode()
                assert '"finish_reason":{"type":"abort"' in rest
                assert rest.endswith("data: [DONE]\n\n")
                assert (await worker.until(lambda stats: stats["running"] == 1))["streams_aborted"] == 1
                async with worker.post("/abort_request", {"abort_all": True}) as response:
                    assert response.status == 200
                assert b'"abort"' in await two.content.read()
            # The id is free again.
            async with worker.post("/generate", bodies[0]) as one:
                assert one.status == 200

    run(test())


def test_long_prompts_leave_the_loop_free() -> None:
    async def test() -> None:
        async with running(cache_tokens=100_000) as worker:
            text = "several words of text " * LONG_PROMPT_CHARS
            long = [asyncio.create_task(worker.ask("/generate", {"text": text[i:], "rid": f"l{i}"})) for i in range(4)]
            await asyncio.sleep(0)
            for answer in await asyncio.gather(*long):
                assert answer["meta_info"]["prompt_tokens"] > LONG_PROMPT_CHARS
            # Leaving or being cut while the prompt is read are ends like others.
            gone = asyncio.create_task(worker.ask("/generate", {"text": "x" + text, "rid": "gone"}))
            cut = asyncio.create_task(worker.ask("/generate", {"text": "y" + text, "rid": "cut"}))
            await worker.until(lambda stats: stats["requests"] == 6)
            async with worker.post("/abort_request", {"rid": "cut"}) as response:
                assert response.status == 200
            gone.cancel()
            assert (await cut)["meta_info"]["finish_reason"]["type"] == "abort"
            stats = await worker.until(lambda stats: stats["streams_aborted"] == 2)
            assert (stats["running"], stats["waiting"]) == (0, 0)
            too_long = await worker.ask("/v1/completions", {"prompt": text * 2}, 400)
            assert "longer than the model's context length (100000 tokens)" in too_long["message"]

    run(test())


def test_tokens_take_their_time() -> None:
    async def test() -> None:
        async with running(prefill_tokens_per_s=2000.0, decode_tokens_per_s_per_request=50.0) as worker:
            began_s = time.monotonic()

            async def ask(first: int) -> tuple[float, float]:
                body = {"input_ids": list(range(first, first + 300)), "stream": True, "sampling_params": {"max_new_tokens": 11}}
                async with worker.post("/generate", body) as response:
                    await response.content.readline()
                    first_s = time.monotonic() - began_s
                    await response.content.read()
                    return first_s, time.monotonic() - began_s

            # 300 tokens at 2000 a second, and 10 more at 50 a second. Lower bounds only: others use this machine.
            (one, one_end), (two, two_end) = await asyncio.gather(ask(0), ask(1000))
            assert min(one, two) >= 0.149
            assert max(one, two) >= 0.298
            assert min(one_end, two_end) >= 0.149 + 0.2
            await ask(0)
            stats = await worker.stats()
            assert stats["cached_tokens_total"] == 296

    run(test())


def test_256_streams_at_once() -> None:
    async def test() -> None:
        async with running(decode_tokens_per_s_per_request=200.0, cache_tokens=100_000) as worker:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as session:

                async def ask(i: int) -> int:
                    body = {"prompt": [i, 1, 2, 3, 4, 5], "max_tokens": 20, "stream": True}
                    async with session.post(worker.worker.url + "/v1/completions", json=body) as response:
                        return (await response.read()).count(b"data: ")

                assert await asyncio.gather(*(ask(i) for i in range(256))) == [21] * 256
            stats = await worker.until(lambda stats: stats["connections"] == 1)
            assert stats["generated_tokens_total"] == 256 * 20
            assert (stats["running"], stats["streams_aborted"]) == (0, 0)
            # One step serves all streams.
            assert stats["steps"] < 256

    run(test())


def test_instant_answers_have_the_same_shapes() -> None:
    async def test() -> None:
        async with running(instant=True) as worker:
            for path, body in INFERENCE.items():
                whole = await worker.ask(path, body)
                if path == "/v1/embeddings":
                    assert whole["data"][0]["embedding"]
                    continue
                assert (whole.get("usage") or whole["meta_info"])["prompt_tokens"] > 5
                async with worker.post(path, {**body, "max_tokens": 8, "stream": True}) as response:
                    data = [line for line in (await response.text()).split("\n\n") if line]
                assert data[-1] == "data: [DONE]"
                assert len(data) == {"/generate": 129, "/v1/completions": 9, "/v1/chat/completions": 11}[path]
            assert (await worker.ask("/v1/chat/completions", {}, 400))["code"] == 400
            stats = await worker.stats()
            assert (stats["requests"], stats["cache_used_blocks"], stats["events_published"]) == (8, 0, 1)

    run(test())
