"""Questions to the workers: to all of them at once, or to one that is ready; what they cost, hide and say when workers fail."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from control_doubles import GOOD, HANG, SECRET, ScriptedWorker, answer, server_info, until
from control_house import Admin, admin

from sglfast._workers import READY
from sglfast.control import fanout

LOADS = answer({"loads": [{"num_total_tokens": 40}, {"num_total_tokens": 2}]})
DOWN = "http://127.0.0.1:1"


def run(test: Callable[[Admin], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with admin() as asking:
            await test(asking)
        assert SECRET not in asking.house.seen.text

    asyncio.run(inside())


async def joined(asking: Admin, *workers: ScriptedWorker) -> None:
    for worker in workers:
        asking.house.add(worker.url)
    states = asking.house.table.state
    await until(lambda: all(states(idx) == READY for idx in range(len(workers))), "all are ready")


def test_loads_of_all_and_minus_one_for_who_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "_TIMEOUT_S", 0.2)

    async def test(asking: Admin) -> None:
        new = ScriptedWorker({"/health": [GOOD], "/v1/loads": [LOADS]})
        old = ScriptedWorker({"/health": [GOOD], "/get_load": [answer([{"num_tokens": 7}])]})
        mute = ScriptedWorker({"/health": [GOOD], "/v1/loads": [HANG]})
        async with new, old, mute:
            await joined(asking, new, old, mute)
            asking.house.add(DOWN)
            found = await asking.ask("GET", "/get_loads")
        assert found.json == {
            "workers": [
                {"worker": new.url, "load": 42}, {"worker": old.url, "load": 7}, {"worker": mute.url, "load": -1},
                {"worker": DOWN, "load": -1},
            ]
        }  # fmt: skip

    run(test)


def test_flush_of_all_some_and_none() -> None:
    async def test(asking: Admin) -> None:
        good = ScriptedWorker({"/health": [GOOD], "/flush_cache": [answer(b"Cache flushed.")]})
        busy = ScriptedWorker({"/health": [GOOD], "/flush_cache": [answer(b""), answer(b"Flush cache failed.", 400)]})
        async with good, busy:
            await joined(asking, good, busy)
            found = await asking.ask("POST", "/flush_cache")
            assert (found.status, found.json) == (
                200,
                {
                    "status": "success", "message": "Successfully flushed cache on all 2 HTTP workers", "workers_flushed": 2,
                    "total_http_workers": 2, "total_workers": 2,
                },
            )  # fmt: skip
            found = await asking.ask("POST", "/flush_cache")
            assert (found.status, found.json["status"]) == (206, "partial_success")
            assert found.json["successful"] == [good.url]
            assert found.json["failed"] == [{"worker": busy.url, "error": "status 400"}]
            assert (found.json["workers_flushed"], found.json["total_workers"]) == (1, 2)
            assert good.hits["/flush_cache"] == busy.hits["/flush_cache"] == 2
        found = await asking.ask("POST", "/flush_cache")
        assert (found.status, found.json["status"]) == (502, "failed")

    run(test)


def test_flush_without_workers_is_done() -> None:
    async def test(asking: Admin) -> None:
        found = await asking.ask("POST", "/flush_cache")
        assert (found.status, found.json["workers_flushed"]) == (200, 0)
        assert (await asking.ask("GET", "/get_loads")).json == {"workers": []}
        assert (await asking.ask("GET", "/engine_metrics")).body == b""

    run(test)


def test_engine_metrics_are_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(asking: Admin) -> None:
        text = b"# TYPE sglang:x gauge\nsglang:x 1\n"
        one = ScriptedWorker({"/health": [GOOD], "/metrics": [answer(text)]})
        two = ScriptedWorker({"/health": [GOOD], "/metrics": [answer(text)]})
        none = ScriptedWorker({"/health": [GOOD]})
        async with one, two, none:
            await joined(asking, one, two, none)
            found = await asking.ask("GET", "/engine_metrics")
            assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert found.body.decode() == (
                f"# {none.url}: status 404\n# TYPE sglang_x gauge\n"
                f'sglang_x{{worker_addr="{one.url}"}} 1\nsglang_x{{worker_addr="{two.url}"}} 1\n'
            )
            monkeypatch.setattr(fanout, "_ALL_METRICS_BYTES", len(text))
            found = await asking.ask("GET", "/engine_metrics")
            assert f"# {two.url}: left out" in found.body.decode()

    run(test)


def test_what_is_asked_twice_at_once_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "_TIMEOUT_S", 0.3)

    async def test(asking: Admin) -> None:
        worker = ScriptedWorker({"/health": [GOOD], "/v1/loads": [HANG, LOADS]})
        async with worker:
            await joined(asking, worker)
            found = await asyncio.gather(*(asking.ask("GET", "/get_loads") for _ in range(8)))
            assert {answer.json["workers"][0]["load"] for answer in found} == {-1}
            assert worker.hits["/v1/loads"] == 1
            assert (await asking.ask("GET", "/get_loads")).json["workers"][0]["load"] == 42

    run(test)


@pytest.mark.parametrize("path", ["/model_info", "/health_generate"])
def test_clients_without_a_key_make_no_crowd_at_a_worker(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "_TIMEOUT_S", 0.3)
    monkeypatch.setattr(fanout, "_GENERATE_S", 0.3)

    async def test(asking: Admin) -> None:
        worker = ScriptedWorker({"/health": [GOOD], "/server_info": [server_info()], path: [HANG]})
        async with worker:
            await joined(asking, worker)
            found = await asyncio.gather(*(asking.ask("GET", path) for _ in range(8)))
            assert worker.hits[path] == 1
            assert len({(answer.status, answer.headers.get("x-router-error-code"), answer.body) for answer in found}) == 1

    run(test)


def test_server_info_is_passed_on_without_secrets() -> None:
    async def test(asking: Admin) -> None:
        worker = ScriptedWorker({"/health": [GOOD], "/server_info": [server_info()], "/model_info": [answer({"model_path": "m"})]})
        async with worker:
            await joined(asking, worker)
            for path in ("/server_info", "/get_server_info"):
                found = await asking.ask("GET", path)
                assert (found.status, found.json["served_model_name"], found.json["api_key"]) == (200, "m1", "***")
                assert SECRET.encode() not in found.body
            for path in ("/model_info", "/get_model_info"):
                assert (await asking.ask("GET", path)).json == {"model_path": "m"}

    run(test)


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info", "/model_info", "/get_model_info", "/health_generate"])
def test_nobody_ready_and_nobody_able(path: str) -> None:
    async def test(asking: Admin) -> None:
        asking.house.add(DOWN)
        found = await asking.ask("GET", path)
        assert (found.status, found.headers["x-router-error-code"]) == (503, "no_healthy_workers")
        assert found.json["error"]["code"] == "no_healthy_workers"
        broken = ScriptedWorker({"/health": [GOOD], path: [answer(f'{{"api_key": "{SECRET}"'.encode(), 500)]})
        async with broken:
            asking.house.add(broken.url)
            await until(lambda: asking.house.table.state(1) == READY, "ready")
            found = await asking.ask("GET", path)
        is_health = path == "/health_generate"
        assert found.status == (503 if is_health else 502)
        assert found.json["error"]["code"] == ("health_generate_failed" if is_health else "upstream_bad_response")
        assert SECRET.encode() not in found.body

    run(test)


def test_another_worker_is_asked_when_one_fails() -> None:
    async def test(asking: Admin) -> None:
        bad = [ScriptedWorker({"/health": [GOOD]}) for _ in range(2)]
        good = ScriptedWorker({"/health": [GOOD], "/health_generate": [GOOD], "/model_info": [answer({"a": 1})]})
        async with bad[0], bad[1], good:
            await joined(asking, *bad, good)
            for _ in range(5):
                assert (await asking.ask("GET", "/health_generate")).status == 200
                assert (await asking.ask("GET", "/model_info")).json == {"a": 1}

    run(test)
