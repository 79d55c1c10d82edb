"""Where records live: the interface that both storages have, and how one is chosen.

Runs in: the metadata service. Contract: what a method has returned from is kept, whatever is killed afterwards (the process; and Redis,
    when it has `appendonly yes` and `appendfsync always`); what it has not returned from is there whole or not at all.
    A method that cannot do its work raises StorageError with a sentence that the client may read; the storage goes on and works
    again when its store does. Every method is called from one event loop and may be called many times at once.
"""

from typing import Protocol

from sglfast.errors import SglfastError
from sglfast.modelexpress.records import Payload
from sglfast.modelexpress.roster import Key, Roster, State, Static

DEFAULT_STORAGE = "modelexpress.sqlite3"


class StorageError(SglfastError):
    """The store did not do what it was asked to do."""


class Storage(Protocol):
    """Records by key. Times are unix milliseconds, given by the caller; a record's time never goes back."""

    async def open(self) -> None:
        """Connect and load. Raises StorageError; then `close` need not be called."""

    async def close(self) -> None:
        """Finish what was begun, release everything."""

    async def publish(self, key: Key, static: Static, payload: Payload, status: int, now_ms: int) -> None:
        """Store a record, in place of what the key held. Its state begins anew."""

    async def update(
        self, key: Key, status: int, now_ms: int, *, source_load: float | None = None, is_beat: bool = False, seen: State | None = None
    ) -> State | None:
        """Set status, time and load; returns the state before.

        is_beat: the worker itself says READY, count it; seen: only if the state still has the `mark` of this one. None: there is no
        such record, or it is not as seen; nothing was changed.
        """

    async def remove(self, key: Key, seen: State) -> bool:
        """Delete a record if its state still has the `mark` of `seen`; returns whether it was deleted."""

    async def payload(self, key: Key, order: int) -> Payload | None:
        """The large part of a record as its publish number `order` left it; None when that is gone."""

    async def roster(self) -> Roster:
        """All records without their payloads, with everything that was acknowledged, here or by another instance, before the call.

        It is the storage's own: read it before the next await.
        """


def open_storage(where: str, prefix: str) -> Storage:
    """The storage that `--storage` names: a redis:// rediss:// or unix:// URL, or the path of an SQLite file. Not opened yet.

    prefix: what names of keys in Redis begin with. Raises ConfigError for what is neither.
    """
    if where.partition("://")[0] in ("redis", "rediss", "unix"):
        from sglfast.modelexpress.redis_storage import RedisStorage

        return RedisStorage(where, prefix)
    from sglfast.modelexpress.sqlite_storage import SqliteStorage

    return SqliteStorage(where)
