"""What every storage does, run over each of them: SQLite in a file, Redis in a real server."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from conftest import SeededRandom
from mx_harness import NO_REDIS, REDIS, RedisServer, redis_server

from sglfast.errors import ConfigError
from sglfast.modelexpress.records import Payload
from sglfast.modelexpress.roster import INITIALIZING, READY, STALE, UNKNOWN, Key, State, Static
from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.storage import Storage, StorageError, open_storage

NOW_MS = 1_800_000_000_000
KEY = Key("0123456789abcdef", "w", 0)
STATIC = Static(p2p.SourceIdentity(model_name="M").SerializeToString(), "H100", {"node": "a"}, "10.0.0.1")
PAYLOAD = Payload(b"\x08\x01", b"\x0a\x03\x0a\x01t", True)
ODD_IDS = ["a:b", "__attributes__", "with blank", "{x}", "é€😀", "a\x00b", "*", "x" * 1000, "a|b", "'; DROP TABLE record; --"]
Opener = Callable[[], AbstractAsyncContextManager[Storage]]


@pytest.fixture(scope="module", autouse=True)
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer | None]:
    if REDIS is None:
        yield None
        return
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["sqlite", "redis"])
def opener(request: pytest.FixtureRequest, tmp_path: Path, shared_redis: RedisServer | None) -> Opener:
    """Opens the same, at first empty, storage each time it is called."""
    if request.param == "redis" and shared_redis is None:
        pytest.skip(NO_REDIS)
    where = shared_redis.url if request.param == "redis" and shared_redis else str(tmp_path / "records.sqlite3")

    @asynccontextmanager
    async def opened() -> AsyncIterator[Storage]:
        storage = open_storage(where, prefix=str(tmp_path))
        await storage.open()
        try:
            yield storage
        finally:
            await storage.close()

    return opened


async def states(storage: Storage) -> dict[Key, State]:
    return {entry.key: entry.state for entry in await storage.roster()}


def test_publish_is_there_at_once_and_after_a_restart(opener: Opener) -> None:
    async def main() -> None:
        async with opener() as storage:
            assert len(await storage.roster()) == 0
            await storage.publish(KEY, STATIC, PAYLOAD, INITIALIZING, NOW_MS)
            await look(storage)
        async with opener() as storage:
            await look(storage)

    async def look(storage: Storage) -> None:
        (entry,) = await storage.roster()
        assert (entry.key, entry.static) == (KEY, STATIC)
        state = entry.state
        assert (state.status, state.updated_at_ms, state.beats, state.source_load) == (INITIALIZING, NOW_MS, 0, None)
        assert await storage.payload(KEY, state.order) == PAYLOAD
        assert await storage.payload(KEY, state.order + 1) is None
        assert await storage.payload(KEY._replace(rank=1), state.order) is None

    asyncio.run(main())


def test_publish_again_begins_anew(opener: Opener) -> None:
    async def main() -> None:
        async with opener() as storage:
            await storage.publish(KEY, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
            await storage.update(KEY, READY, NOW_MS + 5, source_load=0.5, is_beat=True)
            first = (await states(storage))[KEY]
            other = msgspec.structs.replace(STATIC, accelerator="B200")
            await storage.publish(KEY, other, Payload(b"", b"", False), UNKNOWN, NOW_MS + 9)
            (entry,) = await storage.roster()
            assert entry.static == other
            assert entry.state.order > first.order
            assert entry.state == State(UNKNOWN, NOW_MS + 9, 0, entry.state.order, None)
            assert await storage.payload(KEY, first.order) is None, "the old payload is not to be had with the new state"
            assert await storage.payload(KEY, entry.state.order) == Payload(b"", b"", False)

    asyncio.run(main())


def test_order_rises_over_restarts_and_workers(opener: Opener) -> None:
    async def main() -> None:
        orders = []
        for i in range(3):
            async with opener() as storage:
                for worker in ("a", "b"):
                    key = KEY._replace(worker_id=f"{worker}{i}")
                    await storage.publish(key, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
                    orders.append((await states(storage))[key].order)
        assert orders == sorted(set(orders))

    asyncio.run(main())


def test_update_tells_what_was_before(opener: Opener) -> None:
    async def main() -> None:
        async with opener() as storage:
            assert await storage.update(KEY, READY, NOW_MS) is None, "no such record"
            await storage.publish(KEY, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
            before = (await states(storage))[KEY]
            assert await storage.update(KEY._replace(rank=1), READY, NOW_MS) is None
            assert await storage.update(KEY, READY, NOW_MS + 1, source_load=0.25, is_beat=True) == before
            ready = (await states(storage))[KEY]
            assert ready == State(READY, NOW_MS + 1, 1, before.order, 0.25)
            assert await storage.update(KEY, STALE, NOW_MS + 2) == ready
            assert (await states(storage))[KEY] == State(STALE, NOW_MS + 2, 1, before.order, None), "no load is no reading"
            assert await storage.payload(KEY, before.order) == PAYLOAD
        async with opener() as storage:
            assert (await states(storage))[KEY] == State(STALE, NOW_MS + 2, 1, before.order, None)

    asyncio.run(main())


@pytest.mark.parametrize("load", [0.0, 0.1, 1e-30, 3.4e38, float("inf"), -1.5])
def test_load_is_kept_to_the_last_digit(opener: Opener, load: float) -> None:
    async def main() -> None:
        async with opener() as storage:
            await storage.publish(KEY, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
            await storage.update(KEY, READY, NOW_MS, source_load=load)
        async with opener() as storage:
            assert (await states(storage))[KEY].source_load == load

    asyncio.run(main())


def test_time_never_goes_back_and_beats_are_counted_to_two(opener: Opener) -> None:
    async def main() -> None:
        async with opener() as storage:
            await storage.publish(KEY, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
            seen = []
            for step_ms, is_beat in ((5, True), (3, True), (4, True), (6, False)):
                await storage.update(KEY, READY, NOW_MS + step_ms, is_beat=is_beat)
                state = (await states(storage))[KEY]
                seen.append((state.updated_at_ms - NOW_MS, state.beats))
            assert seen == [(5, 1), (5, 2), (5, 2), (6, 2)]
            await storage.publish(KEY, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
            state = (await states(storage))[KEY]
            assert (state.updated_at_ms, state.beats) == (NOW_MS + 6, 0)

    asyncio.run(main())


def test_a_change_on_an_older_sight_is_not_made(opener: Opener) -> None:
    async def main() -> None:
        async with opener() as storage:
            await storage.publish(KEY, STATIC, PAYLOAD, READY, NOW_MS)
            old = (await states(storage))[KEY]
            await storage.update(KEY, READY, NOW_MS + 1)
            new = (await states(storage))[KEY]
            assert await storage.update(KEY, STALE, NOW_MS + 2, seen=old) is None
            assert not await storage.remove(KEY, old)
            assert (await states(storage))[KEY] == new
            assert await storage.update(KEY, STALE, NOW_MS + 2, seen=new) == new
            stale = (await states(storage))[KEY]
            assert await storage.remove(KEY, stale)
            assert not await storage.remove(KEY, stale)
            assert await states(storage) == {}
            assert await storage.payload(KEY, stale.order) is None
        async with opener() as storage:
            assert await states(storage) == {}

    asyncio.run(main())


@pytest.mark.parametrize("worker_id", ODD_IDS)
def test_worker_ids_are_any_text(opener: Opener, worker_id: str) -> None:
    async def main() -> None:
        key, other = KEY._replace(worker_id=worker_id), KEY._replace(worker_id=worker_id + "0")
        async with opener() as storage:
            await storage.publish(key, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
            await storage.publish(other, STATIC, PAYLOAD, UNKNOWN, NOW_MS)
            assert await storage.update(key, READY, NOW_MS) is not None
            assert {k: s.status for k, s in (await states(storage)).items()} == {key: READY, other: UNKNOWN}
            # Whoever asks with the parts of a key cut elsewhere means another record.
            assert await storage.update(Key(KEY.source_id + worker_id[:1], worker_id[1:], 0), READY, NOW_MS) is None
        async with opener() as storage:
            assert set(await states(storage)) == {key, other}

    asyncio.run(main())


def test_many_at_once(opener: Opener) -> None:
    async def main() -> None:
        keys = [KEY._replace(worker_id=f"w{i}", rank=i % 8) for i in range(300)]
        async with opener() as storage:
            await asyncio.gather(*(storage.publish(key, STATIC, PAYLOAD, UNKNOWN, NOW_MS) for key in keys))
            await asyncio.gather(
                *(storage.update(key, READY, NOW_MS + 1, is_beat=True) for key in keys), *(states(storage) for _ in range(20))
            )
            after = await states(storage)
            assert set(after) == set(keys)
            assert {state.status for state in after.values()} == {READY}
            assert len({state.order for state in after.values()}) == 300
            # All publish under one key: one of them stands, whole.
            rivals = [Payload(bytes([i]), b"", True) for i in range(20)]
            await asyncio.gather(*(storage.publish(KEY, STATIC, rival, UNKNOWN, NOW_MS) for rival in rivals))
            assert await storage.payload(KEY, (await states(storage))[KEY].order) in rivals

    asyncio.run(main())


def test_a_caller_that_goes_away_leaves_mirror_and_store_alike(opener: Opener) -> None:
    async def main() -> None:
        async with opener() as storage:
            for i in range(20):
                task = asyncio.create_task(storage.publish(KEY._replace(rank=i), STATIC, PAYLOAD, UNKNOWN, NOW_MS))
                for _ in range(i % 4):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await storage.publish(KEY._replace(rank=99), STATIC, PAYLOAD, UNKNOWN, NOW_MS)
            mirror = await states(storage)
        async with opener() as storage:
            assert await states(storage) == mirror

    asyncio.run(main())


def test_a_large_payload(opener: Opener) -> None:
    async def main() -> None:
        large = Payload(b"head", b"\x0a\x7f" + b"t" * 127 + bytes(24 << 20), False)
        async with opener() as storage:
            await storage.publish(KEY, STATIC, large, UNKNOWN, NOW_MS)
        async with opener() as storage:
            assert await storage.payload(KEY, (await states(storage))[KEY].order) == large

    asyncio.run(main())


def test_random_walk_against_a_dict(opener: Opener, rng: SeededRandom) -> None:
    async def main() -> None:
        model: dict[Key, tuple[int, int, Payload]] = {}
        now_ms = NOW_MS
        for _ in range(3):
            async with opener() as storage:
                for _ in range(60):
                    now_ms += rng.randrange(3)
                    key = Key(f"source{rng.randrange(3)}", f"w{rng.randrange(3)}", rng.randrange(2))
                    state = (await states(storage)).get(key)
                    action = rng.choice(["publish", "publish", "update", "update", "remove"])
                    if action == "publish":
                        payload = Payload(rng.randbytes(5), rng.randbytes(5), rng.random() < 0.5)
                        await storage.publish(key, STATIC, payload, UNKNOWN, now_ms)
                        model[key] = UNKNOWN, now_ms, payload
                    elif action == "update":
                        status = rng.choice([INITIALIZING, READY, STALE])
                        assert (await storage.update(key, status, now_ms) is not None) == (key in model)
                        if key in model:
                            model[key] = status, now_ms, model[key][2]
                    elif state is not None:
                        assert await storage.remove(key, state)
                        del model[key]
                found = await states(storage)
                assert {key: (state.status, state.updated_at_ms) for key, state in found.items()} == {
                    key: (status, at_ms) for key, (status, at_ms, _) in model.items()
                }
                for key, (_, _, payload) in model.items():
                    assert await storage.payload(key, found[key].order) == payload

    asyncio.run(main())


@pytest.mark.parametrize("where", ["redis://127.0.0.1:notaport/0", "redis://127.0.0.1/x/y?max_connections=many"])
def test_a_url_that_cannot_work_is_refused(where: str) -> None:
    with pytest.raises(ConfigError, match="--storage"):
        open_storage(where, "p")


def test_a_storage_error_is_ours() -> None:
    assert issubclass(StorageError, Exception)
