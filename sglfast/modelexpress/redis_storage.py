"""The shared storage: Redis or Valkey, for any number of services.

Runs in: the metadata service. Contract: as `Storage`. Every change is one Lua script (`redis_scripts`); a large payload is put down
    first under a name that nobody knows and expires, and the script makes it the record's: a reader finds the old record or the new one.
    The roster is a mirror: each call of `roster` asks for what has changed since the last one.
Durability: that of the server. With `appendonly yes` and `appendfsync always` a killed Redis loses nothing that was acknowledged. With
    `everysec` it may answer up to two seconds before it writes (Redis docs, "Redis persistence"): then workers whose last words
    were lost publish again, or say them again with their next heartbeat. `open` says so in the log.
Mirror and server are compared by number only, so a new connection, behind which may be another server or older data, begins anew.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable
from typing import Any
from urllib.parse import urlsplit

import msgspec

from sglfast.errors import ConfigError
from sglfast.modelexpress import redis_scripts
from sglfast.modelexpress.records import Payload
from sglfast.modelexpress.roster import Key, Roster, State, Static
from sglfast.modelexpress.storage import StorageError

try:
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import ExponentialBackoff
    from redis.exceptions import ConnectionError as RedisConnectionError
    from redis.exceptions import RedisError
except ImportError as error:
    raise ConfigError(f"storage in Redis needs redis-py ({error}); install it: pip install 'sglfast[modelexpress-redis]'") from error

_log = logging.getLogger("modelexpress")

CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 10.0
_CONNECTIONS = 32
_PAYLOAD_TTL_S = 600  # of a payload that was put down and not published
_FAILURES = (RedisError, OSError, TimeoutError)


class RedisStorage:
    """Storage in Redis. url: redis:// rediss:// or unix://, as redis-py reads it; prefix: what names of keys begin with."""

    def __init__(self, url: str, prefix: str) -> None:
        # After a restart of Redis every kept connection is dead, and shows it only when it is used.
        retry = Retry(ExponentialBackoff(cap=0.2, base=0.02), retries=3, supported_errors=(RedisConnectionError,))
        options: dict[str, Any] = {
            "socket_timeout": _ANSWER_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S, "retry": retry,
        }  # fmt: skip
        try:
            pool = BlockingConnectionPool.from_url(url, max_connections=_CONNECTIONS, timeout=_ANSWER_TIMEOUT_S, **options)
            self._redis = Redis.from_pool(pool)
            # One connection of its own, so that a reconnect is noticed.
            self._reader = Redis.from_url(url, single_connection_client=True, redis_connect_func=self._on_connect, **options)
        except ValueError as error:
            raise ConfigError(f"--storage: {error}") from None
        self._where = urlsplit(url).hostname or urlsplit(url).path
        self._base = f"{{{prefix}}}"
        self._publish = self._redis.register_script(redis_scripts.PUBLISH)
        self._update = self._redis.register_script(redis_scripts.UPDATE)
        self._remove = self._redis.register_script(redis_scripts.REMOVE)
        self._payload = self._redis.register_script(redis_scripts.PAYLOAD)
        self._news = self._reader.register_script(redis_scripts.NEWS)
        self._roster = Roster()
        self._epoch = b""
        self._seen = -1
        self._connects = 0
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, within CONNECT_TIMEOUT_S, and load; see `Storage.open`."""
        deadline = asyncio.get_running_loop().time() + CONNECT_TIMEOUT_S
        while True:
            try:
                await self.roster()
                await self._look_at_durability()
                return
            except StorageError:
                if asyncio.get_running_loop().time() >= deadline:
                    await self.close()
                    raise
            await asyncio.sleep(0.3)

    async def _look_at_durability(self) -> None:
        try:
            answers = [await self._do(self._redis.config_get(name)) for name in ("appendonly", "appendfsync")]
        except StorageError:  # a hosted Redis does not tell
            return
        if [list(answer.values()) for answer in answers] not in ([["yes"], ["always"]], [[b"yes"], [b"always"]]):
            _log.warning("Redis may lose acknowledged records when it is killed: it has not `appendonly yes` and `appendfsync always`")

    async def close(self) -> None:
        """Close the connections."""
        for task in (self._running, self._next):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, StorageError):
                    await task
        await self._redis.aclose()
        await self._reader.aclose()

    async def publish(self, key: Key, static: Static, payload: Payload, status: int, now_ms: int) -> None:
        """See `Storage.publish`."""
        name = uuid.uuid4().hex
        place = f"{self._base}:payload:{name}"
        fields = {"head": payload.head, "tensors": payload.tensors, "is_legacy": int(payload.is_legacy)}
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(place, mapping=fields)  # type: ignore[arg-type]
            pipe.expire(place, _PAYLOAD_TTL_S)
            await self._do(pipe.execute())
        await self._do(self._publish([self._base], [_member(key), msgspec.msgpack.encode(static), name, status, now_ms]))

    async def update(
        self, key: Key, status: int, now_ms: int, *, source_load: float | None = None, is_beat: bool = False, seen: State | None = None
    ) -> State | None:
        """See `Storage.update`."""
        load = "" if source_load is None else repr(source_load)
        expected = "" if seen is None else _mark(seen)
        before = await self._do(self._update([self._base], [_member(key), status, now_ms, load, int(is_beat), expected]))
        return None if before is None else _state(before)

    async def remove(self, key: Key, seen: State) -> bool:
        """See `Storage.remove`."""
        return bool(await self._do(self._remove([self._base], [_member(key), _mark(seen)])))

    async def payload(self, key: Key, order: int) -> Payload | None:
        """See `Storage.payload`."""
        row = await self._do(self._payload([self._base], [_member(key), order]))
        if row is None or None in row:
            return None
        return Payload(row[0], row[1], row[2] == b"1")

    async def roster(self) -> Roster:
        """See `Storage.roster`."""
        # A refresh that is under way may have looked before what the caller must see; the next one cannot have.
        if self._next is None:
            self._next = asyncio.create_task(self._refresh_after(self._running))
        await asyncio.shield(self._next)
        return self._roster

    async def _refresh_after(self, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await asyncio.wait((earlier,))
        self._running, self._next = self._next, None
        connects = -1
        while connects != self._connects:
            # A script may have been sent again over a new connection: then its answer went by what the old one had told.
            connects = self._connects
            news = await self._do(self._news([self._base], [self._epoch, self._seen, uuid.uuid4().hex]))
        self._apply(*news)

    def _apply(
        self, epoch: bytes, version: bytes, is_all: int, gone: list[bytes], changed: list[bytes], statics: list[bytes], states: list[bytes]
    ) -> None:
        if is_all:
            self._roster.clear()
        for member in gone:
            self._roster.drop(_key(member))
        for member, static, text in zip(changed, statics, states, strict=True):
            key, state = _key(member), _state(text)
            entry = self._roster.get(key)
            if entry is not None and entry.state.order == state.order:
                self._roster.set_state(key, state)
            else:
                self._roster.put(key, msgspec.msgpack.decode(static, type=Static), state)
        self._epoch, self._seen = epoch, int(version)

    async def _on_connect(self, connection: Any) -> None:
        self._connects += 1
        self._seen = -1
        await connection.on_connect()

    async def _do(self, work: Awaitable[Any]) -> Any:
        try:
            return await work
        except _FAILURES as error:
            raise StorageError(f"Redis at {self._where}: {error}") from error


def _member(key: Key) -> bytes:
    return msgspec.msgpack.encode(key)


def _key(member: bytes) -> Key:
    return msgspec.msgpack.decode(member, type=Key)


def _mark(state: State) -> str:
    return " ".join(map(str, state.mark))


def _state(text: bytes) -> State:
    status, updated_at_ms, beats, order, load = text.decode().split(" ")
    return State(int(status), int(updated_at_ms), int(beats), int(order), float(load) if load else None)
