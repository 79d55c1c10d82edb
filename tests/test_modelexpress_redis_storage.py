"""What only the shared storage has: mirrors of several services, a server that goes and comes back."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SeededRandom
from mx_harness import NO_REDIS, REDIS, RedisServer, redis_server
from test_modelexpress_storage import KEY, NOW_MS, PAYLOAD, STATIC, states

from sglfast.modelexpress import redis_scripts, redis_storage
from sglfast.modelexpress.redis_storage import RedisStorage
from sglfast.modelexpress.roster import READY, STALE, UNKNOWN, Key
from sglfast.modelexpress.storage import StorageError

pytestmark = pytest.mark.skipif(REDIS is None, reason=NO_REDIS)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path / "redis") as server:
        yield server


async def opened(redis: RedisServer, prefix: str = "p") -> RedisStorage:
    storage = RedisStorage(redis.url, prefix)
    await storage.open()
    return storage


def test_what_one_does_the_other_sees_at_once(redis: RedisServer, rng: SeededRandom) -> None:
    async def main() -> None:
        pair = [await opened(redis) for _ in range(2)]
        stranger = await opened(redis, "other")
        now_ms = NOW_MS
        for _ in range(200):
            one, two = rng.sample(pair, 2)
            now_ms += 1
            key = Key(f"s{rng.randrange(2)}", f"w{rng.randrange(4)}", 0)
            state = (await states(one)).get(key)
            if state is None or rng.random() < 0.3:
                await one.publish(key, STATIC, PAYLOAD, UNKNOWN, now_ms)
            elif rng.random() < 0.3:
                await one.remove(key, state)
            else:
                await one.update(key, rng.choice([READY, STALE]), now_ms)
            assert await states(two) == await states(one)
        assert await states(stranger) == {}
        for storage in (*pair, stranger):
            await storage.close()

    asyncio.run(main())


def test_a_mirror_that_slept_through_more_deletions_than_are_noted(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_scripts, "REMOVE", redis_scripts.REMOVE.replace("10000", "5"))

    async def main() -> None:
        sleeper, worker = await opened(redis), await opened(redis)
        keys = [KEY._replace(worker_id=f"w{i}") for i in range(30)]
        for key in keys:
            await worker.publish(key, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
        assert set(await states(sleeper)) == set(keys)
        for key in keys[:20]:
            assert await worker.remove(key, (await states(worker))[key])
        assert await worker._redis.zcard(f"{worker._base}:gone") == 5
        assert set(await states(sleeper)) == set(keys[20:])
        # One that is published again is no longer gone.
        await worker.publish(keys[19], STATIC, PAYLOAD, UNKNOWN, NOW_MS)
        assert set(await states(sleeper)) == set(keys[19:])
        for storage in (sleeper, worker):
            await storage.close()

    asyncio.run(main())


def test_a_store_that_was_emptied_is_seen_empty(redis: RedisServer) -> None:
    async def main() -> None:
        storage = await opened(redis)
        await storage.publish(KEY, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
        assert set(await states(storage)) == {KEY}
        await storage._redis.flushall()
        other = KEY._replace(worker_id="other")
        for _ in range(5):  # as many changes as there were before
            await storage.publish(other, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
        assert set(await states(storage)) == {other}
        assert await storage.update(KEY, READY, NOW_MS) is None, "its worker is told to publish again"
        await storage.close()

    asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_goes_and_comes_back(redis: RedisServer, number: int) -> None:
    async def main() -> None:
        storage = await opened(redis)
        for i in range(50):
            await storage.publish(KEY._replace(rank=i), STATIC, PAYLOAD, UNKNOWN, NOW_MS)
            await storage.update(KEY._replace(rank=i), READY, NOW_MS + i)
        before = await states(storage)
        redis.end(number)
        for call in (storage.roster, lambda: storage.update(KEY, READY, NOW_MS), lambda: storage.publish(KEY, STATIC, PAYLOAD, 0, NOW_MS)):
            with pytest.raises(StorageError, match=r"Redis at 127\.0\.0\.1: "):
                await call()
        await asyncio.to_thread(redis.start)
        assert await states(storage) == before
        assert await storage.payload(KEY, before[KEY].order) == PAYLOAD
        assert await storage.update(KEY, STALE, NOW_MS + 99) == before[KEY]
        await storage.close()

    asyncio.run(main())


def test_a_server_that_came_back_with_less_is_believed(redis: RedisServer) -> None:
    """An append-only file that lost its end: the numbers go on from an earlier one, and reach those that the mirror has seen."""

    async def main() -> None:
        storage = await opened(redis)
        await storage.publish(KEY, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
        redis.end()
        shorter = {path: path.read_bytes() for path in (redis.folder / "appendonlydir").iterdir()}
        await asyncio.to_thread(redis.start)
        await storage.publish(KEY._replace(worker_id="lost"), STATIC, PAYLOAD, UNKNOWN, NOW_MS)
        assert len(await states(storage)) == 2
        redis.end()
        for path in (redis.folder / "appendonlydir").iterdir():
            path.unlink()
        for path, data in shorter.items():
            path.write_bytes(data)
        await asyncio.to_thread(redis.start)
        other = KEY._replace(worker_id="other")
        await storage.publish(other, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
        assert set(await states(storage)) == {KEY, other}
        await storage.close()

    asyncio.run(main())


def test_what_was_put_down_and_not_published_expires(redis: RedisServer) -> None:
    async def main() -> None:
        storage = await opened(redis)
        await storage.publish(KEY, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
        await storage.publish(KEY, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
        (place,) = [name async for name in storage._redis.scan_iter(f"{storage._base}:payload:*")]
        assert await storage._redis.ttl(place) == -1, "the old payload went with its record, the new one stays"

        async def killed(*arguments: object) -> None:
            raise ConnectionResetError("killed between the two steps")

        storage._publish = killed  # type: ignore[assignment]
        with pytest.raises(StorageError, match="killed"):
            await storage.publish(KEY, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
        left = [name async for name in storage._redis.scan_iter(f"{storage._base}:payload:*")]
        ttls = sorted([await storage._redis.ttl(name) for name in left])
        assert ttls[0] == -1
        assert 0 < ttls[1] <= 600
        await storage.close()

    asyncio.run(main())


def test_a_script_that_runs_twice_does_no_harm(redis: RedisServer) -> None:
    """A connection that breaks after the work makes redis-py send it again."""

    async def main() -> None:
        storage = await opened(redis)
        once = storage._publish

        async def twice(*arguments: object) -> object:
            await once(*arguments)  # type: ignore[arg-type]
            return await once(*arguments)  # type: ignore[arg-type]

        storage._publish = twice  # type: ignore[assignment]
        await storage.publish(KEY, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
        assert await storage.payload(KEY, (await states(storage))[KEY].order) == PAYLOAD
        await storage.close()

    asyncio.run(main())


def test_no_server_to_connect_to_ends_the_start(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_storage, "CONNECT_TIMEOUT_S", 0.5)
    redis.end()
    with pytest.raises(StorageError, match=r"Redis at 127\.0\.0\.1: "):
        asyncio.run(opened(redis))


def test_a_server_that_is_late_is_waited_for(redis: RedisServer) -> None:
    redis.end()

    async def main() -> None:
        opening = asyncio.create_task(opened(redis))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(redis.start)
        await (await opening).close()

    asyncio.run(main())


@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_a_server_that_may_forget_is_named_in_the_log(redis: RedisServer, caplog: pytest.LogCaptureFixture, fsync: str) -> None:
    async def main() -> None:
        storage = await opened(redis)
        await storage._redis.config_set("appendfsync", fsync)
        await storage.close()
        await (await opened(redis)).close()

    asyncio.run(main())
    told = [record.getMessage() for record in caplog.records if record.name == "modelexpress"]
    assert [text.startswith("Redis may lose acknowledged records") for text in told] == [True] * (fsync == "everysec")


def test_without_redis_py_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['redis'] = sys.modules['redis.asyncio'] = None\nimport sglfast.modelexpress.redis_storage"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'sglfast[modelexpress-redis]'" in done.stderr.splitlines()[-1]
