"""sim/jobs.py: a prefill and a decode worker over real sockets, each asked by HTTP as a router would ask both."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest
from sim_peers import INFERENCE, SLOW, Worker, following, run, running

from sglfast.sim.rooms import Rooms

PROMPT = list(range(100, 142))
CHAT = "/v1/chat/completions"
ASKED: Any = INFERENCE[CHAT]
# A prompt takes a second.
SLOW_PREFILL: dict[str, Any] = {"prefill_tokens_per_s": 42.0, "chunked_prefill_tokens": 8}


class Pair:
    """One prefill and one decode worker."""

    def __init__(self, prefill: Worker, decode: Worker) -> None:
        self.prefill = prefill
        self.decode = decode

    @property
    def rooms(self) -> Rooms:
        assert self.prefill.worker.rooms is not None
        return self.prefill.worker.rooms

    def body(self, room: int, **more: Any) -> dict[str, Any]:
        return {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.rooms.port, "bootstrap_room": room, **more}

    def generate(self, room: int, new_tokens: int = 5, **more: Any) -> dict[str, Any]:
        params = {"max_new_tokens": new_tokens, "ignore_eos": True}
        return self.body(room, input_ids=PROMPT, sampling_params=params, **more)

    async def both(self, path: str, body: Any, decode_status: int = 200, prefill_status: int = 200) -> tuple[Any, Any]:
        first, second = self.prefill.ask(path, body, prefill_status), self.decode.ask(path, body, decode_status)
        answers = await asyncio.gather(first, second)
        return answers[0], answers[1]

    async def until_they_meet(self) -> None:
        await self.prefill.until(lambda stats: bool(stats["rooms"]["kept"] and self.rooms.callers))

    async def rest(self) -> None:
        """Wait until neither holds anything of any request."""
        await self.prefill.until(lambda stats: not (stats["rooms"]["kept"] or stats["running"] or stats["cache_locked_blocks"]))
        await self.decode.until(lambda stats: not (stats["running"] or stats["waiting"]))


@asynccontextmanager
async def pair(prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None) -> AsyncIterator[Pair]:
    one: dict[str, Any] = {"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 0, **(prefill or {})}
    other: dict[str, Any] = {"disaggregation_mode": "decode", **(decode or {})}
    async with running(**one) as first, running(**other) as second:
        yield Pair(first, second)


@pytest.mark.parametrize("path", [path for path in INFERENCE if "embeddings" not in path])
@pytest.mark.parametrize("decode_first", [False, True])
def test_a_request_is_served_by_two_workers(path: str, decode_first: bool) -> None:
    async def test() -> None:
        async with pair() as workers, running() as regular:
            limit: dict[str, Any] = (
                {"sampling_params": {"max_new_tokens": 40, "ignore_eos": True}} if path == "/generate" else {"max_tokens": 40}
            )
            asked: dict[str, Any] = {**INFERENCE[path], **limit}  # type: ignore[dict-item]
            plain = await regular.ask(path, asked)
            body = workers.body(2**63 - 1, **asked)
            tasks = [asyncio.create_task((workers.decode if decode_first else workers.prefill).ask(path, body))]
            await asyncio.sleep(0.05)
            assert not tasks[0].done()  # each waits for the other
            tasks.append(asyncio.create_task((workers.prefill if decode_first else workers.decode).ask(path, body)))
            answers = await asyncio.gather(*tasks)
            prefill, decode = reversed(answers) if decode_first else answers
            if path == "/generate":
                assert (prefill["meta_info"]["completion_tokens"], prefill["meta_info"]["finish_reason"]["type"]) == (1, "length")
                assert (decode["text"], decode["output_ids"]) == (plain["text"], plain["output_ids"])
            else:
                assert prefill["usage"]["completion_tokens"] == 1
                assert decode["choices"] == plain["choices"]
                assert decode["usage"] == plain["usage"]
            await workers.rest()

    run(test())


def test_cached_tokens_are_those_of_the_prefill_worker_and_only_it_has_a_cache() -> None:
    async def test() -> None:
        async with pair() as workers, following(workers.prefill.worker) as follower:
            for room, cached in ((1, 0), (2, 40)):
                prefill, decode = await workers.both("/generate", workers.generate(room))
                assert (prefill["meta_info"]["cached_tokens"], decode["meta_info"]["cached_tokens"]) == (cached, cached)
                assert decode["meta_info"]["completion_tokens"] == 5
            await follower.settle()
            assert len(follower.blocks) == 10  # of 42 tokens, four to a page
            stats = await workers.decode.stats()
            assert (stats["cache_used_blocks"], stats["prompt_tokens_total"], stats["generated_tokens_total"]) == (0, 0, 10)
            rooms = (await workers.prefill.stats())["rooms"]
            assert rooms == {"kept": 0, "transferred": 2, "failed": 0}
            await workers.rest()

    run(test())


def test_a_stream_comes_from_the_decode_worker_as_it_is_made() -> None:
    async def test() -> None:
        async with pair(decode=SLOW) as workers:
            body = workers.body(7, **ASKED, stream=True, max_tokens=5, stream_options={"include_usage": True})
            prefill = asyncio.create_task(workers.prefill.session.post(workers.prefill.worker.url + CHAT, json=body))
            async with workers.decode.post(CHAT, body) as response:
                assert response.status == 200
                lines = [line async for line in response.content if line.startswith(b"data: ")]
            assert lines[-1] == b"data: [DONE]\n"
            assert b'"completion_tokens":5' in lines[-2]
            assert len(lines) >= 7
            async with await prefill as first:
                text = await first.text()
            assert text.count('"content":') == 3  # the role, one token, the end
            await workers.rest()

    run(test())


def test_what_they_tell_of_themselves() -> None:
    async def test() -> None:
        async with pair() as workers:
            info = await workers.prefill.get("/server_info")
            assert (info["disaggregation_mode"], info["disaggregation_bootstrap_port"]) == ("prefill", workers.rooms.port)
            assert info["kv_events"] is not None
            info = await workers.decode.get("/server_info")
            assert (info["disaggregation_mode"], info["disable_radix_cache"], info["kv_events"]) == ("decode", True, None)
            assert (await workers.decode.get("/model_info"))["disaggregation_mode"] == "decode"

    run(test())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"bootstrap_room": None}, "without bootstrap room id"),
        ({"bootstrap_room": -1}, "bootstrap_room"),
        ({"bootstrap_room": "7"}, "bootstrap_room"),
        ({"bootstrap_host": None}, "bootstrap_host"),
        ({"bootstrap_port": 0}, "bootstrap_port"),
        ({"bootstrap_port": True}, "bootstrap_port"),
    ],
)
def test_a_decode_worker_refuses_what_no_router_sends(wrong: dict[str, Any], told: str) -> None:
    async def test() -> None:
        async with pair() as workers:
            body = {**workers.body(1, **ASKED), **wrong}
            answer = await workers.decode.ask(CHAT, body, 400)
            assert told in answer["message"]
            if "bootstrap_room" in wrong:
                assert told in (await workers.prefill.ask(CHAT, body, 400))["message"]
            await workers.rest()

    run(test())


def test_a_regular_worker_ignores_the_fields() -> None:
    async def test() -> None:
        async with running() as worker:
            body = {**ASKED, "bootstrap_host": 1, "bootstrap_port": "x", "bootstrap_room": -4, "max_tokens": 3}
            assert (await worker.ask(CHAT, body))["usage"]["completion_tokens"] == 3

    run(test())


def test_a_port_that_is_null_is_the_decode_workers_own() -> None:
    async def test() -> None:
        async with running(disaggregation_mode="prefill", disaggregation_bootstrap_port=0) as prefill:
            assert prefill.worker.rooms is not None
            async with running(disaggregation_mode="decode", disaggregation_bootstrap_port=prefill.worker.rooms.port) as decode:
                workers = Pair(prefill, decode)
                await workers.both("/generate", {**workers.generate(1), "bootstrap_port": None})

    run(test())


def test_each_gives_up_when_the_other_never_comes() -> None:
    async def test() -> None:
        async with pair({"disaggregation_bootstrap_timeout": 0.1}, {"disaggregation_bootstrap_timeout": 0.1}) as workers:
            told = await workers.decode.ask("/generate", workers.generate(1), 500)
            assert "did not give room 1 within 0.1 s" in told["message"]
            told = await workers.prefill.ask("/generate", workers.generate(2), 500)
            assert "no decode worker fetched room 2 within 0.1 s" in told["message"]
            # Who comes later hears of it at once.
            told = await workers.decode.ask("/generate", workers.generate(2), 500)
            assert "no decode worker fetched room 2" in told["message"]
            await workers.rest()
            assert (await workers.decode.stats())["failed"] == 2
            assert (await workers.prefill.stats())["failed"] == 1

    run(test())


def test_another_prompt_is_noticed() -> None:
    async def test() -> None:
        async with pair() as workers:
            for room, ids in ((1, PROMPT[:-1]), (2, [*PROMPT[:-1], 1])):
                body = workers.generate(room)
                answers = workers.prefill.ask("/generate", body, 500), workers.decode.ask("/generate", {**body, "input_ids": ids}, 500)
                first, second = await asyncio.gather(*answers)
                assert "closed its connection" in first["message"]
                assert "computed another prompt" in second["message"]
            await workers.rest()

    run(test())


@pytest.mark.parametrize("how", ["abort", "leave"])
@pytest.mark.parametrize("where", ["waiting", "kept"])
def test_an_end_of_the_prefill_ends_the_decode(how: str, where: str) -> None:
    async def test() -> None:
        async with pair(SLOW_PREFILL if where == "waiting" else None) as workers:
            body = workers.generate(3, rid="a")
            prefill = asyncio.create_task(workers.prefill.ask("/generate", body))
            if where == "waiting":
                decode = asyncio.create_task(workers.decode.ask("/generate", body, 500))
                await workers.until_they_meet()
            else:
                await workers.prefill.until(lambda stats: stats["cache_locked_blocks"] == 10)
            if how == "abort":
                async with workers.prefill.post("/abort_request", {"rid": "a"}) as answer:
                    assert answer.status == 200
                assert (await prefill)["meta_info"]["finish_reason"]["type"] == "abort"
            else:
                prefill.cancel()
                with suppress(asyncio.CancelledError):
                    await prefill
                await workers.prefill.until(lambda stats: stats["streams_aborted"] == 1)
            if where == "kept":
                decode = asyncio.create_task(workers.decode.ask("/generate", body, 500))
            assert "prefill request ended" in (await decode)["message"]
            await workers.rest()

    run(test())


@pytest.mark.parametrize("how", ["abort", "leave"])
def test_an_end_of_the_decode_ends_the_prefill(how: str) -> None:
    async def test() -> None:
        async with pair(SLOW_PREFILL) as workers:
            body = workers.generate(3, rid="a")
            prefill = asyncio.create_task(workers.prefill.ask("/generate", body, 500))
            decode = asyncio.create_task(workers.decode.ask("/generate", body))
            await workers.until_they_meet()
            if how == "abort":
                async with workers.decode.post("/abort_request", {"rid": "a"}) as answer:
                    assert answer.status == 200
                info = (await decode)["meta_info"]
                assert (info["finish_reason"]["type"], info["completion_tokens"]) == ("abort", 0)
            else:
                decode.cancel()
                with suppress(asyncio.CancelledError):
                    await decode
            assert "decode worker closed its connection" in (await prefill)["message"]
            await workers.rest()

    run(test())


def test_a_prefill_worker_that_dies_ends_the_decode_when_heartbeats_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglfast.sim.rooms.HEARTBEATS_S", 0.3)

    async def test() -> None:
        async with pair(SLOW_PREFILL) as workers:
            body = workers.generate(3)
            prefill = asyncio.create_task(workers.prefill.ask("/generate", body))
            decode = asyncio.create_task(workers.decode.ask("/generate", body, 500))
            await workers.until_they_meet()
            await workers.prefill.ask("/sim/restart", {})
            with pytest.raises(aiohttp.ClientError):
                await prefill
            assert not decode.done()
            assert "is not there, or died before it gave room 3" in (await decode)["message"]
            await workers.rest()
            # It is back on its port, and works.
            await workers.both("/generate", workers.generate(3, new_tokens=1))

    run(test())


def test_nobody_at_the_bootstrap_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglfast.sim.rooms.HEARTBEATS_S", 0.1)

    async def test() -> None:
        async with pair() as workers:
            rooms = workers.rooms
            body = workers.generate(1)
            rooms.close()
            told = await workers.decode.ask("/generate", body, 500)
            assert f"127.0.0.1:{body['bootstrap_port']} is not there" in told["message"]
            told = await workers.decode.ask("/generate", {**body, "bootstrap_host": "a..b"}, 500)
            assert "a..b" in told["message"]
            await rooms.open()

    run(test())


def test_a_room_has_one_request() -> None:
    async def test() -> None:
        async with pair() as workers:
            body = workers.generate(1)
            first = asyncio.create_task(workers.prefill.ask("/generate", body))
            await workers.prefill.until(lambda stats: stats["rooms"]["kept"] == 1)
            assert "taken by another request" in (await workers.prefill.ask("/generate", body, 400))["error"]["message"]
            await workers.decode.ask("/generate", body)
            await first
            assert "fetched before" in (await workers.decode.ask("/generate", body, 500))["message"]
            await workers.rest()

    run(test())


def test_a_long_prompt_and_many_at_once() -> None:
    async def test() -> None:
        async with pair({"cache_tokens": 100_000}, {"cache_tokens": 100_000}) as workers:
            long = {"messages": [{"role": "user", "content": "word " * 8000}], "max_tokens": 2}
            _, answer = await workers.both(CHAT, workers.body(1, **long))
            assert answer["usage"]["prompt_tokens"] > 8000
            await asyncio.gather(*(workers.both("/generate", workers.generate(room, new_tokens=20)) for room in range(2, 40)))
            await workers.rest()
            assert (await workers.prefill.stats())["rooms"] == {"kept": 0, "transferred": 39, "failed": 0}

    run(test())


def test_embeddings_need_no_other_worker() -> None:
    async def test() -> None:
        async with pair() as workers:
            for worker in (workers.prefill, workers.decode):
                assert (await worker.ask("/v1/embeddings", INFERENCE["/v1/embeddings"]))["data"]

    run(test())
