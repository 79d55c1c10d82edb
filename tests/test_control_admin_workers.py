"""/workers and its older names over control's socket: shapes, statuses, both kinds of id, what is said when nothing can be done."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import pytest
from control_doubles import GOOD, ScriptedWorker, close_server, server_info, until
from control_house import Admin, admin

from sglfast._workers import READY

A, B = "http://127.0.0.1:1", "http://127.0.0.1:2"  # nothing listens there
KEY = "sk-never-shown"


def run(test: Callable[[Admin], Awaitable[None]], **settings: Any) -> None:
    async def inside() -> None:
        async with admin(**settings) as asking:
            await test(asking)
        assert KEY not in asking.house.seen.text

    asyncio.run(inside())


def by_url(url: str) -> str:
    return "/workers/" + quote(url, safe="")


def test_a_worker_is_accepted_as_sglang_router_does_it() -> None:
    async def test(asking: Admin) -> None:
        found = await asking.ask("POST", "/workers", {"url": A + "/", "api_key": KEY, "worker_type": "regular", "nonsense": 1})
        body = found.json
        assert found.status == 202
        assert uuid.UUID(body["worker_id"]).version == 4
        assert found.headers["location"] == body["location"] == f"/workers/{body['worker_id']}"
        assert body == {
            "status": "accepted", "worker_id": body["worker_id"], "url": A, "location": body["location"],
            "message": "Worker addition queued for background processing", "ignored_fields": ["nonsense"],
        }  # fmt: skip
        assert "Server" not in found.headers

    run(test)


def test_a_worker_is_shown_pending_then_ready_and_its_key_never() -> None:
    async def test(asking: Admin) -> None:
        worker = ScriptedWorker({"/health": [GOOD], "/server_info": [server_info(served_model_name="other")]})
        await worker.open()
        await worker.close()
        await asking.ask("POST", "/workers", {"url": worker.url, "api_key": KEY, "model_id": "mine", "priority": 1, "labels": {"a": "b"}})
        row = (await asking.ask("GET", by_url(worker.url))).json
        job = row.pop("job_status")
        assert (job["job_type"], job["worker_url"], job["status"]) == ("AddWorker", worker.url, "processing")
        assert row.pop("id")
        assert row == {
            "url": worker.url, "model_id": "mine", "priority": 1, "cost": 1.0, "worker_type": "regular", "is_healthy": False,
            "load": 0, "connection_mode": "HTTP", "state": "joining", "has_api_key": True, "dp_size": 1, "kv_block_size": 0,
            "metadata": {"a": "b"}, "disable_health_check": False,
            "kv": {
                "state": "BLIND", "reason": "is not followed yet",
                "ranks": [{"rank": 0, "state": "BLIND", "reason": "is not followed yet", "blocks": 0, "missing_batches": 0}],
            },
        }  # fmt: skip
        await until(lambda: asking.house.watch.progress(0).problem == "connection refused", "the first check")
        assert (await asking.ask("GET", by_url(worker.url))).json["job_status"]["message"] == "connection refused"
        await worker.open()
        try:
            await until(lambda: asking.house.table.state(0) == READY, "ready")
            found = await asking.ask("GET", "/workers")
        finally:
            await worker.close()
        assert KEY.encode() not in found.body
        assert found.json["total"] == 1
        assert found.json["stats"] == {"prefill_count": 0, "decode_count": 0, "regular_count": 1}
        (row,) = found.json["workers"]
        assert "job_status" not in row
        assert (row["state"], row["is_healthy"], row["model_id"], row["version"]) == ("ready", True, "mine", "0.5.23")
        assert (row["dp_size"], row["kv_block_size"]) == (2, 64)

    run(test)


def test_roles_are_taken_shown_and_counted() -> None:
    async def test(asking: Admin) -> None:
        told = server_info(disaggregation_mode="prefill", disaggregation_bootstrap_port=8998)
        async with ScriptedWorker({"/health": [GOOD], "/server_info": [told]}) as worker:
            bodies: list[dict[str, Any]] = [
                {"url": worker.url},
                {"url": A, "worker_type": "prefill", "bootstrap_port": 9000},
                {"url": B, "worker_type": "decode"},
                {"url": "http://127.0.0.1:4", "worker_type": "prefill", "bootstrap_port": "none"},
            ]
            for body in bodies:
                found = await asking.ask("POST", "/workers", body)
                assert (found.status, "ignored_fields" in found.json) == (202, False)
            await until(lambda: asking.house.table.state(0) == READY, "ready")
            found = await asking.ask("GET", "/workers")
        shown = [(row["worker_type"], row.get("bootstrap_port")) for row in found.json["workers"]]
        assert shown == [("prefill", 8998), ("prefill", 9000), ("decode", None), ("prefill", None)]
        assert found.json["stats"] == {"prefill_count": 3, "decode_count": 1, "regular_count": 0}
        assert (await asking.ask("GET", by_url(B))).json["worker_type"] == "decode"
        assert len((await asking.ask("GET", "/list_workers")).json["urls"]) == 4

    run(test)


def test_the_key_reaches_the_worker() -> None:
    async def test(asking: Admin) -> None:
        seen: list[bytes] = []

        async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                seen.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n")
            finally:  # also when the loop ends while a health check is under way
                writer.close()

        server = await asyncio.start_server(answers, "127.0.0.1", 0)
        try:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await asking.ask("POST", "/workers", {"url": url, "api_key": KEY})
            await until(lambda: seen, "a health check")
            await asking.ask("GET", "/get_loads")
        finally:
            await close_server(server)
        assert all(f"authorization: bearer {KEY}".encode() in head.lower() for head in seen)
        assert len(seen) >= 2

    run(test)


def test_one_that_is_not_ready_in_time_is_called_failed_and_taken_in_later() -> None:
    async def test(asking: Admin) -> None:
        worker = ScriptedWorker({"/health": [GOOD], "/server_info": [server_info()]})
        await worker.open()
        await worker.close()
        await asking.ask("POST", "/workers", {"url": worker.url})
        await until(lambda: asking.house.watch.progress(0).is_failed, "failed")
        job = (await asking.ask("GET", by_url(worker.url))).json["job_status"]
        assert (job["status"], job["message"]) == ("failed", "connection refused")
        async with worker:
            await until(lambda: asking.house.table.state(0) == READY, "it came late")
        assert "job_status" not in (await asking.ask("GET", by_url(worker.url))).json
        assert asking.house.members.changes.additions == {"failed": 1, "success": 1}

    run(test, worker_startup_timeout_secs=0.3)


def test_twice_is_a_conflict_that_names_the_worker() -> None:
    async def test(asking: Admin) -> None:
        first = (await asking.ask("POST", "/workers", {"url": A})).json
        found = await asking.ask("POST", "/workers", {"url": A.upper().replace("HTTP", "http")})
        assert found.status == 409
        assert found.json == {
            "error": f"Worker {A} already exists", "code": "WORKER_ALREADY_EXISTS", "worker_id": first["worker_id"],
            "location": first["location"],
        }  # fmt: skip

    run(test)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "must be a JSON object"),
        ({"url": "nowhere"}, "url nowhere: must look like http://host:port"),
        ({"url": A, "worker_type": "prefill", "bootstrap_port": 0}, "bootstrap_port"),
        ({"url": "http://" + "h" * 1100}, "longer than 1024 bytes"),
    ],
)
def test_bad_descriptions(body: Any, text: str) -> None:
    async def test(asking: Admin) -> None:
        found = await asking.ask("POST", "/workers", body)
        assert (found.status, found.json["code"]) == (400, "BAD_REQUEST")
        assert text in found.json["error"]
        assert (await asking.ask("GET", "/workers")).json["workers"] == []

    run(test)


def test_no_slot_is_said_as_such() -> None:
    async def test(asking: Admin) -> None:
        await asking.ask("POST", "/workers", {"url": A})
        found = await asking.ask("POST", "/workers", {"url": B})
        assert (found.status, found.json["code"]) == (503, "NO_SLOT")

    run(test, max_workers=1)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_ids_that_nobody_has(method: str) -> None:
    async def test(asking: Admin) -> None:
        body = {} if method == "PUT" else None
        for target in (f"/workers/{uuid.uuid4()}", by_url(B), by_url(B + "/")):
            found = await asking.ask(method, target, body)
            assert (found.status, found.json["code"]) == (404, "WORKER_NOT_FOUND"), target
            assert found.json["error"].endswith("not found")
        for target in ("/workers/abc", "/workers/", "/workers/%00", "/workers/a/b", "/workers/%ff", "/workers/" + "x" * 4000):
            found = await asking.ask(method, target, body)
            assert (found.status, found.json["code"]) == (400, "BAD_REQUEST"), target
            assert "expected a UUID or a percent-encoded URL" in found.json["error"]
            assert len(found.body) < 1500

    run(test)


def test_both_kinds_of_id_change_and_remove() -> None:
    async def test(asking: Admin) -> None:
        first = (await asking.ask("POST", "/workers", {"url": A})).json["location"]
        await asking.ask("POST", "/workers", {"url": B})
        found = await asking.ask("PUT", first, {"priority": 3, "labels": {"x": "y"}, "state": "draining", "api_key": KEY, "zz": 1})
        assert (found.status, found.json["status"], found.json["ignored_fields"]) == (202, "accepted", ["zz"])
        row = (await asking.ask("GET", by_url(A))).json
        assert (row["priority"], row["metadata"], row["state"], row["has_api_key"]) == (3, {"x": "y"}, "draining", True)
        assert (await asking.ask("PUT", by_url(A), {"state": "ready"})).status == 202
        assert (await asking.ask("GET", first)).json["state"] == "joining"
        assert (await asking.ask("PUT", first, {"priority": "high"})).json["code"] == "BAD_REQUEST"
        found = await asking.ask("DELETE", first)
        assert (found.status, found.json) == (
            202,
            {"status": "accepted", "worker_id": row["id"], "message": "Worker removal queued for background processing"},
        )
        assert (await asking.ask("DELETE", by_url(B))).status == 202
        await until(lambda: not asking.house.members.members, "both gone")
        assert (await asking.ask("DELETE", first)).status == 404
        assert (await asking.ask("GET", "/workers")).json["total"] == 0

    run(test)


def test_a_removal_under_way_is_shown_and_can_be_forced() -> None:
    async def test(asking: Admin) -> None:
        made = asking.house
        location = (await asking.ask("POST", "/workers", {"url": A})).json["location"]
        member = made.members.by_url(A)
        assert member is not None
        made.begin(member)
        assert (await asking.ask("DELETE", location)).status == 202
        row = (await asking.ask("GET", location)).json
        assert (row["state"], row["load"]) == ("draining", 1)
        assert (row["job_status"]["job_type"], row["job_status"]["message"]) == ("RemoveWorker", "1 requests in flight are being finished")
        assert (await asking.ask("PUT", location, {"state": "ready"})).json["code"] == "WORKER_IS_LEAVING"
        assert (await asking.ask("GET", "/list_workers")).json == {"urls": []}
        assert (await asking.ask("DELETE", location)).status == 202
        waiting = await asking.ask("POST", "/workers", {"url": A})
        assert waiting.status == 202
        row = (await asking.ask("GET", by_url(A))).json
        assert (row["id"], row["state"], row["job_status"]["status"]) == (waiting.json["worker_id"], "pending", "pending")
        assert (await asking.ask("DELETE", location + "?force=true")).status == 202
        await made.until_gone(member)
        made.end(0)
        await until(lambda: made.workers.views and made.workers.views[0].generation > 0 and made.watch.size == 1, "the other joins")
        assert (await asking.ask("GET", by_url(A))).json["state"] == "joining"

    run(test, max_workers=1)


def test_nothing_is_shown_that_a_shard_does_not_act_by() -> None:
    async def test(asking: Admin) -> None:
        await asking.ask("POST", "/workers", {"url": A})
        for step, target in enumerate(("/workers", by_url(A), by_url(B), "/list_workers")):
            await asking.ask("GET", "/workers")  # all have seen what was before
            asking.house.sees = {0, 1}
            asking.house.workers.set_draining(0, step % 2 == 0)
            late = asyncio.create_task(asking.ask("GET", target))
            await asyncio.sleep(0.1)
            assert not late.done(), target
            asking.house.sees = {0, 1, 2}
            assert (await late).status in (200, 404)

    run(test)


def test_the_older_names() -> None:
    async def test(asking: Admin) -> None:
        async with ScriptedWorker({"/health": [GOOD], "/server_info": [server_info()]}) as worker:
            found = await asking.ask("POST", f"/add_worker?url={quote(worker.url, safe='')}")
            assert (found.status, found.body.decode()) == (200, f"Successfully added worker: {worker.url}")
            assert asking.house.table.state(0) == READY
            found = await asking.ask("POST", f"/add_worker?url={worker.url}")
            assert (found.status, found.body.decode()) == (409, f"Worker {worker.url} already exists")
            assert (await asking.ask("GET", "/list_workers")).json == {"urls": [worker.url]}
            found = await asking.ask("POST", f"/remove_worker?url={worker.url}")
            assert (found.status, found.body.decode()) == (200, f"Successfully removed worker: {worker.url}")
            await until(lambda: not asking.house.members.members, "gone")
            assert (await asking.ask("POST", f"/remove_worker?url={worker.url}")).status == 404
            found = await asking.ask("POST", "/add_worker", {"url": worker.url, "api_key": KEY})
            assert found.status == 200
            assert (await asking.ask("POST", "/remove_worker", {"url": worker.url})).status == 200
            await until(lambda: not asking.house.members.members, "gone")
            assert (await asking.ask("POST", f"/add_worker?url={worker.url}&api_key={KEY}")).status == 200
            assert asking.house.members.members[0].spec.api_key == KEY
        for path in ("/add_worker", "/remove_worker"):
            assert b"?url=" in (await asking.ask("POST", path, b"")).body
        for target, body in (("/add_worker?url=x", None), ("/add_worker", b""), ("/remove_worker", b"[]"), ("/remove_worker?url=x", None)):
            assert (await asking.ask("POST", target, body)).status == 400, target

    run(test)


def test_an_old_add_of_a_worker_that_does_not_come_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglfast.control.admin_workers._READY_S", 0.2)

    async def test(asking: Admin) -> None:
        found = await asking.ask("POST", f"/add_worker?url={A}")
        assert (found.status, "not ready yet" in found.body.decode()) == (202, True)
        assert (await asking.ask("GET", "/list_workers")).json == {"urls": [A]}

    run(test)
