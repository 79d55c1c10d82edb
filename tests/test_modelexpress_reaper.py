"""Keeping seeds that send no heartbeat; that heartbeats win; that a scan survives. The plain rules are in test_modelexpress_behaviour."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from mx_harness import NO_REDIS, REDIS, Client, Clock, publication, redis_server, serving, settings, until

from sglfast.modelexpress.reaper import url_of
from sglfast.modelexpress.roster import READY, STALE, Entry, Key, State, Static
from sglfast.modelexpress.server import Server
from sglfast.modelexpress.storage import StorageError


async def seed(client: Client, worker_id: str, model: str = "m", beats: int = 1, **more: Any) -> str:
    answer = await client.publish(publication(model=model, worker_id=worker_id, **more))
    for _ in range(beats):
        await client.update(answer.mx_source_id, worker_id, 0, READY, 0.5)
    return answer.mx_source_id


async def quiet(server: Server, clock: Clock, secs: float = 210.0) -> None:
    """Time passes with a scan every 30 seconds."""
    for _ in range(round(secs / 30)):
        clock.pass_secs(30)
        await server.reaper.scan()


async def ready(client: Client) -> set[str]:
    return {ref.worker_id for ref in await client.list(status_filter=READY)}


@pytest.mark.parametrize("names", [("all",), ("Kept",), ("ID",), ("other", "Kept")])
def test_seeds_without_heartbeat_stay_ready(tmp_path: Path, names: tuple[str, ...]) -> None:
    clock = Clock()

    async def main() -> None:
        async with serving(settings(tmp_path / "first", scan_interval_secs=30.0), clock) as (_, client):
            source = await seed(client, "x", "Kept")
        config = settings(tmp_path / "db", scan_interval_secs=30.0, keep_alive=tuple(source if name == "ID" else name for name in names))
        async with serving(config, clock) as (server, client):
            await seed(client, "silent", "Kept")
            await seed(client, "stranger", "unnamed")
            await seed(client, "beats", "Kept", beats=2)
            await seed(client, "unready", "Kept", beats=0)
            await quiet(server, clock)
            assert await ready(client) == {"silent"} | ({"stranger"} if names == ("all",) else set())
            (ref,) = [ref for ref in await client.list() if ref.worker_id == "silent"]
            assert (ref.updated_at, ref.source_load) == (clock.now_ms, 0.5), "renewed at the last scan; its load stays"
            assert server.meters.renewals.labels("kept")._value.get() >= 6
            await client.update(source, "silent", 0, STALE)
            await quiet(server, clock)
            assert await ready(client) <= {"stranger"}, "a seed that says goodbye is believed"

    asyncio.run(main())


def test_without_the_switch_they_do_not(tmp_path: Path) -> None:
    clock = Clock()

    async def main() -> None:
        async with serving(settings(tmp_path / "db"), clock) as (server, client):
            await seed(client, "silent")
            await quiet(server, clock)
            assert await ready(client) == set()

    asyncio.run(main())


def test_after_a_long_stop_the_first_scan_keeps_them(tmp_path: Path) -> None:
    clock = Clock()
    config = settings(tmp_path / "db", scan_interval_secs=30.0, keep_alive=("all",))

    async def main() -> None:
        async with serving(config, clock) as (_, client):
            await seed(client, "silent")
        clock.pass_secs(5000)
        async with serving(config, clock) as (server, client):
            await server.reaper.scan()
            assert await ready(client) == {"silent"}

    asyncio.run(main())


def test_kept_while_their_health_url_answers(tmp_path: Path) -> None:
    clock, asked, status = Clock(), list[str](), {"code": 200}

    async def health(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=status["code"], headers={"location": "/health"})

    async def main() -> None:
        application = web.Application()
        application.add_routes([web.get("/health", health)])
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://{{host}}:{runner.addresses[0][1]}/health"
        config = settings(tmp_path / "db", scan_interval_secs=30.0, keep_alive=("all",), keep_alive_health_url=url)
        try:
            async with serving(config, clock) as (server, client):
                await seed(client, "here", transfer_engine_session_id="127.0.0.1:9")
                await seed(client, "nowhere", transfer_engine_session_id="", metadata_endpoint="")
                await seed(client, "dead", transfer_engine_session_id="127.0.0.77:9")
                await quiet(server, clock)
                assert await ready(client) == {"here"}
                assert len(asked) == 7
                # A restarted engine answers at the same URL for the one before it, whose memory is gone.
                await seed(client, "successor", transfer_engine_session_id="127.0.0.1:10")
                await quiet(server, clock)
                assert await ready(client) == {"successor"}
                for code in (302, 503):
                    status["code"] = code
                    await quiet(server, clock)
                    assert await ready(client) == set()
                assert server.meters.renewals.labels("unhealthy")._value.get() > 0
        finally:
            await runner.cleanup()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "template", "url"),
    [("10.0.0.1", "http://{host}:30000/health", "http://10.0.0.1:30000/health"), ("fd00::1", "http://{host}:1/h", "http://[fd00::1]:1/h"),
     ("", "http://{host}:1/h", None), ("", "http://gateway/h", "http://gateway/h")],
)  # fmt: skip
def test_health_urls(host: str, template: str, url: str | None) -> None:
    entry = Entry(Key("s", "w", 0), Static(b"", "", {}, host), State(READY, 1, 1, 1, None))
    assert url_of(entry, template) == url


def test_a_heartbeat_that_comes_during_the_scan_wins(tmp_path: Path) -> None:
    clock = Clock()

    async def main() -> None:
        async with serving(settings(tmp_path / "db"), clock) as (server, client):
            sources = [await seed(client, f"w{i}", beats=2) for i in range(50)]
            clock.pass_secs(91)
            beats = [client.update(sources[i], f"w{i}", 0, READY) for i in range(50)]
            await asyncio.gather(server.reaper.scan(), *beats)
            assert await ready(client) == {f"w{i}" for i in range(50)}

    asyncio.run(main())


def test_two_services_on_one_storage_make_each_change_once(tmp_path: Path, caplog: Any) -> None:
    if REDIS is None:
        pytest.skip(NO_REDIS)
    clock = Clock()

    async def main(url: str) -> None:
        async with serving(settings(url), clock) as (one, client), serving(settings(url), clock) as (two, other):
            for i in range(20):
                await seed(client, f"w{i}")
            assert await ready(other) == {f"w{i}" for i in range(20)}
            clock.pass_secs(91)
            await asyncio.gather(one.reaper.scan(), two.reaper.scan())
            assert sum(server.meters.stale._value.get() for server in (one, two)) == 20
            clock.pass_secs(3601)
            await asyncio.gather(one.reaper.scan(), two.reaper.scan())
            assert await client.list() == await other.list() == []

    with redis_server(tmp_path / "redis") as redis, caplog.at_level(logging.INFO, "test.modelexpress"):
        asyncio.run(main(redis.url))
    told = [record.getMessage() for record in caplog.records]
    assert (told.count("STALE, no heartbeat"), told.count("DELETED, collected")) == (20, 20)


def test_a_scan_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans, levels = 0, list[str]()

    class Levels(logging.Handler):
        """Not caplog: what it keeps of an exception would keep the connections of this test."""

        def emit(self, record: logging.LogRecord) -> None:
            levels.append(record.levelname)

    async def main() -> None:
        async with serving(settings(tmp_path / "db", scan_interval_secs=0.05)) as (server, _):

            async def scan() -> None:
                nonlocal scans
                scans += 1
                if scans <= 2:
                    raise [StorageError("no store"), ValueError("a bug")][scans - 1]

            monkeypatch.setattr(server.reaper, "scan", scan)
            await until(lambda: scans >= 4, "scans go on")

    log, handler = logging.getLogger("test.modelexpress"), Levels(logging.WARNING)
    log.addHandler(handler)
    log.propagate = False
    try:
        asyncio.run(main())
    finally:
        log.propagate = True
        log.removeHandler(handler)
    assert levels == ["WARNING", "ERROR"]
