"""sim/worker.py over real sockets: routes, faults, restarts, lost events."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
import uvloop
from sim_peers import INFERENCE, SLOW, WAIT_S, Worker, following, replayed, run, running

from sglfast.sim.events import all_cleared
from sglfast.wire.kv_events import AllBlocksCleared, decode_batch


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_every_route_answers(factory: Callable[[], Any]) -> None:
    async def test() -> None:
        async with running() as worker:
            url = worker.worker.url
            assert await worker.get("/server_info") == {**await worker.get("/get_server_info")}
            assert await worker.get("/model_info") == await worker.get("/get_model_info")
            assert (await worker.get("/v1/models"))["data"][0]["id"] == "demo-model"
            assert (await worker.get("/v1/loads"))["loads"][0]["num_running_reqs"] == 0
            for path in ("/health", "/health_generate"):
                async with worker.session.get(url + path) as response:
                    assert (response.status, await response.read()) == (200, b"")
            for path, body in INFERENCE.items():
                await worker.ask(path, body)
            async with worker.post("/abort_request", {"rid": "nobody"}) as response:
                assert (response.status, await response.read()) == (200, b"")
            async with worker.session.get(url + "/nothing") as response:
                assert (response.status, await response.json()) == (404, {"detail": "Not Found"})
            async with worker.session.get(url + "/v1/completions") as response:
                assert (response.status, response.headers["allow"]) == (405, "POST")
            async with worker.session.head(url + "/health") as response:
                assert response.status == 405

    run(test(), factory)


def test_headers_are_uvicorns_and_nothing_is_echoed() -> None:
    async def test() -> None:
        async with running() as worker:
            headers = {"x-request-id": "abc", "traceparent": "00-1-2-3"}
            async with worker.post("/generate", INFERENCE["/generate"], headers=headers) as response:
                assert {name.lower() for name in response.headers} == {"date", "server", "content-length", "content-type"}
            async with worker.post("/generate", {**INFERENCE["/generate"], "stream": True}, headers=headers) as response:
                assert {name.lower() for name in response.headers} == {"date", "server", "content-type", "transfer-encoding"}
                assert response.headers["server"] == "uvicorn"

    run(test())


def test_flush_is_refused_while_busy() -> None:
    async def test() -> None:
        async with running(**SLOW) as worker, following(worker.worker) as follower:
            async with worker.post("/generate", {"input_ids": list(range(20)), "stream": True}) as stream:
                await stream.content.readline()
                async with worker.post("/flush_cache", None) as response:
                    assert (response.status, await response.text()) == (400, "Flush cache failed.\n")
            await worker.until(lambda stats: stats["running"] == 0)
            async with worker.post("/flush_cache", None) as response:
                assert response.status == 200
                assert (await response.text()).startswith("Cache flushed.")
            await follower.settle()
            assert follower.blocks == set()
            assert (await worker.stats())["cache_used_blocks"] == 0

    run(test())


def test_dropped_events_leave_a_gap_that_a_replay_closes() -> None:
    async def test() -> None:
        async with running() as worker, following(worker.worker) as follower:
            last = follower.sequences[-1]
            assert await worker.ask("/sim/drop_events", {"count": 1}) == {"count": 1, "rank": None}
            await worker.generate(list(range(20)))
            await worker.generate(list(range(100, 120)))
            await follower.receive()
            assert follower.sequences[-1] == last + 2
            for sequence, payload in await replayed(worker.worker, last + 1):
                if sequence == last + 1:
                    follower.apply(payload)
            stats = await worker.stats()
            assert follower.blocks == set(stats["ranks"][0]["block_keys"])
            assert stats["events_dropped"] == 1
            for wrong in ({}, {"count": -1}, {"count": 1, "rank": 1}):
                assert "error" in await worker.ask("/sim/drop_events", wrong, 400)

    run(test())


def test_stores_that_are_kept_back_leave_no_gap_and_a_restart_keeps_them_back() -> None:
    async def test() -> None:
        async with running() as worker, following(worker.worker) as follower:
            before = await worker.stats()
            assert await worker.ask("/sim/keep_back_stores", {"share": 1}) == {"share": 1, "unit": "event"}
            await worker.generate(list(range(20)))
            stats = await worker.stats()
            assert stats["events_published"] == before["events_published"]
            assert stats["blocks_kept_back"] == stats["cache_used_blocks"] > 0
            await worker.ask("/sim/keep_back_stores", {"share": 0})
            last = follower.sequences[-1]
            await worker.generate(list(range(100, 120)))
            await follower.receive()
            assert follower.sequences[-1] == last + 1
            stats = await worker.stats()
            assert len(follower.blocks) == stats["cache_used_blocks"] - stats["blocks_kept_back"]
            assert await replayed(worker.worker, last + 2) == []
            await worker.ask("/sim/keep_back_stores", {"share": 1})
            await worker.ask("/sim/restart", {})
            await worker.generate(list(range(20)))
            assert (await worker.stats())["blocks_kept_back"] == 2 * stats["blocks_kept_back"]
            for wrong in ({"share": 2}, {"count": 1}):
                assert "error" in await worker.ask("/sim/keep_back_stores", wrong, 400)

    run(test())


async def outcome(worker: Worker, patience_s: float = WAIT_S / 2) -> str:
    """What a request meets, in one word."""
    try:
        async with asyncio.timeout(patience_s), worker.post("/generate", INFERENCE["/generate"]) as response:
            await response.read()
            return str(response.status)
    except TimeoutError:
        return "hangs"
    except aiohttp.ClientPayloadError:
        return "body cut"
    except aiohttp.ServerDisconnectedError:
        return "closed"
    except aiohttp.ClientConnectorError:
        return "refused"
    except aiohttp.ClientOSError:
        return "reset"
    except aiohttp.ClientError:
        return "head cut"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"mode": "refuse"}, "reset"),
        ({"mode": "hang"}, "hangs"),
        ({"mode": "error_500"}, "500"),
        ({"mode": "busy_503"}, "503"),
        ({"mode": "cut_headers"}, "closed"),
        ({"mode": "cut_body"}, "body cut"),
        ({"mode": "cut_body", "after_bytes": 0}, "body cut"),
        ({"mode": "slow_headers"}, "200"),
    ],
)
def test_a_fault_hits_so_many_requests_and_no_other(fault: dict[str, Any], expected: str) -> None:
    async def test() -> None:
        async with running() as worker:
            told = await worker.ask("/sim/fault", {**fault, "count": 2})
            assert (told["mode"], told["count"]) == (fault["mode"], 2)
            patience_s = 0.2 if expected == "hangs" else WAIT_S / 2
            assert await outcome(worker, patience_s) == expected
            async with worker.session.get(worker.worker.url + "/health") as response:
                assert response.status == 200
            assert await outcome(worker, patience_s) == expected
            assert await outcome(worker) == "200"
            stats = await worker.stats()
            assert (stats["fault_hits"], stats["fault"]["mode"]) == (2, "none")

    run(test())


def test_a_fault_of_scope_all_hits_health_and_is_taken_back() -> None:
    async def test() -> None:
        async with running() as worker:
            await worker.ask("/sim/fault", {"mode": "error_500", "scope": "all"})
            for path in ("/health", "/server_info", "/v1/models"):
                async with worker.session.get(worker.worker.url + path) as response:
                    assert response.status == 500
            await worker.ask("/sim/fault", {"mode": "none"})
            assert await outcome(worker) == "200"
            for wrong in ({"mode": "explode"}, [], {"mode": "hang", "count": 0}):
                assert "error" in await worker.ask("/sim/fault", wrong, 400)

    run(test())


def test_a_stream_that_is_cut_leaves_nothing_behind() -> None:
    async def test() -> None:
        async with running(**SLOW) as worker:
            await worker.ask("/sim/fault", {"mode": "cut_body", "count": 1, "after_bytes": 1000})
            async with worker.post("/generate", {**INFERENCE["/generate"], "stream": True}) as response:
                received = await response.content.readline()
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.content.read()
            assert received.startswith(b"data: ")
            stats = await worker.until(lambda stats: stats["running"] == 0)
            assert stats["streams_aborted"] == 1

    run(test())


def test_slow_headers_are_slow() -> None:
    async def test() -> None:
        async with running() as worker:
            await worker.ask("/sim/fault", {"mode": "slow_headers"})
            began_s = time.monotonic()
            assert await outcome(worker) == "200"
            # About 120 bytes of head in pieces of 8, 20 ms apart.
            assert time.monotonic() - began_s > 0.2

    run(test())


def test_a_restart_may_bring_fewer_ranks() -> None:
    async def test() -> None:
        async with running(dp_size=3) as worker:
            assert "error" in await worker.ask("/sim/restart", {"dp_size": 4}, 400)
            assert "error" in await worker.ask("/sim/restart", {"dp_size": 0}, 400)
            before = await worker.get("/server_info")
            for ranks in (2, 3, 1):
                await worker.ask("/sim/restart", {"dp_size": ranks})
                info = await worker.get("/server_info")
                assert (info["dp_size"], info["kv_events"]) == (ranks, before["kv_events"] | {"dp_size": ranks})
                assert len((await worker.stats())["ranks"]) == ranks
                await worker.ask("/generate", {"input_ids": [1, 2], "routed_dp_rank": ranks - 1})
                refused = await worker.ask("/generate", {"input_ids": [1, 2], "routed_dp_rank": ranks}, 400)
                assert f"routed_dp_rank={ranks} out of range [0, {ranks})" in str(refused)

    asyncio.run(test())


def test_a_restart_loses_everything_but_the_ports() -> None:
    async def test() -> None:
        async with running(**SLOW) as worker, following(worker.worker) as follower:
            for _ in range(1000):
                worker.worker.publisher.ranks[0].publish(all_cleared())
            await worker.generate(list(range(20)))
            before = await worker.get("/server_info")
            busy = asyncio.create_task(worker.ask("/generate", {"input_ids": list(range(30))}))
            await worker.until(lambda stats: stats["running"] == 1)
            await follower.settle()
            told = await worker.ask("/sim/restart", {})
            with pytest.raises(aiohttp.ClientOSError):
                await busy
            after = await worker.get("/server_info")
            assert after["startup_time"] == told["startup_time"] > before["startup_time"]
            assert after["kv_events"] == before["kv_events"]
            stats = await worker.stats()
            assert (stats["cache_used_blocks"], stats["running"], stats["restarts"], stats["streams_aborted"]) == (0, 0, 1, 1)
            assert stats["events_published"] > stats["ranks"][0]["next_sequence"] == 1
            ((sequence, payload),) = await replayed(worker.worker, 0)
            assert sequence == 0
            assert [type(event) for event in decode_batch(payload).events] == [AllBlocksCleared]
            assert (await worker.generate(list(range(20))))["meta_info"]["cached_tokens"] == 0
            # The subscriber, whose connection comes back a moment later, sees the sequence go back.
            last = follower.sequences[-1]
            while not await follower.socket.poll(20):
                worker.worker.publisher.ranks[0].publish(all_cleared())
            await follower.receive()
            assert follower.sequences[-1] < last

    run(test())


def test_a_worker_that_is_down_refuses_connections() -> None:
    async def test() -> None:
        async with running() as worker:
            restart = asyncio.create_task(worker.ask("/sim/restart", {"down_s": 0.4}))
            met = set()
            deadline = time.monotonic() + WAIT_S
            while not restart.done():
                met.add(await outcome(worker))
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            await restart
            assert "refused" in met
            assert await outcome(worker) == "200"
            assert "error" in await worker.ask("/sim/restart", {"down_s": -1}, 400)
            for _ in range(3):
                await worker.ask("/sim/restart", {})
            assert (await worker.stats())["restarts"] == 4

    run(test())
