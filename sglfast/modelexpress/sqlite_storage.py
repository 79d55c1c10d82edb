"""The embedded storage: one SQLite file, which one service has for itself.

Runs in: the metadata service. Contract: as `Storage`. Two threads work on the file, the loop never does: one writes, all that waits in one
    transaction (a thousand heartbeats cost one commit), one reads payloads.
    The roster is changed after the commit and before the caller is answered, so a listing never shows what a kill could undo.
Durability: WAL with synchronous=NORMAL. A killed process loses nothing that was acknowledged. A machine that loses power may lose the
    last moments, never the file's consistency; then workers publish again, as they do whenever a heartbeat is refused.
Layout: the state is a table of its own, so that a heartbeat rewrites some bytes and never a payload.
"""

import asyncio
import fcntl
import queue
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

import msgspec

from sglfast.modelexpress.records import Payload
from sglfast.modelexpress.roster import Key, Roster, State, Static
from sglfast.modelexpress.storage import StorageError

_VERSION = 1
_BATCH_MAX = 1000  # operations of one transaction
_WAL_BYTES_KEPT = 64 << 20  # a log grown by large records is cut back to this
_SCHEMA = """
CREATE TABLE IF NOT EXISTS record (
    source_id TEXT NOT NULL, worker_id TEXT NOT NULL, rank INTEGER NOT NULL, static BLOB NOT NULL,
    PRIMARY KEY (source_id, worker_id, rank)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (
    source_id TEXT NOT NULL, worker_id TEXT NOT NULL, rank INTEGER NOT NULL,
    status INTEGER NOT NULL, updated_at_ms INTEGER NOT NULL, beats INTEGER NOT NULL, publish_order INTEGER NOT NULL, source_load REAL,
    PRIMARY KEY (source_id, worker_id, rank)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS payload (
    source_id TEXT NOT NULL, worker_id TEXT NOT NULL, rank INTEGER NOT NULL,
    publish_order INTEGER NOT NULL, is_legacy INTEGER NOT NULL, head BLOB NOT NULL, tensors BLOB NOT NULL,
    PRIMARY KEY (source_id, worker_id, rank)
);
"""
_WHERE = "WHERE source_id = ? AND worker_id = ? AND rank = ?"
_STATE = "status, updated_at_ms, beats, publish_order, source_load"


@dataclass(slots=True)
class _Task:
    """One operation on its way to the writer and back. work: in the writer's thread; then: on the loop, after the commit."""

    work: Callable[[sqlite3.Connection], Any]
    then: Callable[[Any], None]
    done: asyncio.Future[Any]


class SqliteStorage:
    """Storage in a file. path: made if it is not there, with `-wal`, `-shm` and `.lock` beside it."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._roster = Roster()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._order = 0

    async def open(self) -> None:
        """Load the file; see `Storage.open`."""
        self._loop = asyncio.get_running_loop()
        with ExitStack() as stack:
            try:
                stack.enter_context(self._take_lock())
                self._writing = stack.enter_context(closing(self._connect()))
                self._reading = stack.enter_context(closing(self._connect()))
                await self._loop.run_in_executor(None, self._load)
            except (OSError, sqlite3.Error, msgspec.MsgspecError) as error:
                raise StorageError(f"{self._path}: {error}") from error
            self._owned = stack.pop_all()
        self._readers = ThreadPoolExecutor(1, "sqlite-read")
        self._writer = Thread(target=self._write, name="sqlite-write", daemon=True)
        self._writer.start()

    async def close(self) -> None:
        """Write what waits, close the file."""
        self._tasks.put(None)
        await self._loop.run_in_executor(None, self._writer.join)
        await self._loop.run_in_executor(None, self._readers.shutdown)
        await self._loop.run_in_executor(None, self._owned.close)

    async def publish(self, key: Key, static: Static, payload: Payload, status: int, now_ms: int) -> None:
        """See `Storage.publish`."""
        encoded = msgspec.msgpack.encode(static)
        self._order += 1
        order = self._order

        def work(db: sqlite3.Connection) -> State:
            before = db.execute(f"SELECT updated_at_ms FROM state {_WHERE}", key).fetchone()
            state = State(status, max(now_ms, before[0] if before else 0), 0, order, None)
            db.execute("INSERT OR REPLACE INTO record VALUES (?, ?, ?, ?)", (*key, encoded))
            db.execute("INSERT OR REPLACE INTO state VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*key, *state))
            large = (order, payload.is_legacy, payload.head, payload.tensors)
            db.execute("INSERT OR REPLACE INTO payload VALUES (?, ?, ?, ?, ?, ?, ?)", (*key, *large))
            return state

        await self._run(work, lambda state: self._roster.put(key, static, state))

    async def update(
        self, key: Key, status: int, now_ms: int, *, source_load: float | None = None, is_beat: bool = False, seen: State | None = None
    ) -> State | None:
        """See `Storage.update`."""

        def work(db: sqlite3.Connection) -> tuple[State, State] | None:
            row = db.execute(f"SELECT {_STATE} FROM state {_WHERE}", key).fetchone()
            if row is None or (seen is not None and State(*row).mark != seen.mark):
                return None
            before = State(*row)
            after = State(status, max(now_ms, before.updated_at_ms), min(2, before.beats + is_beat), before.order, source_load)
            db.execute(f"UPDATE state SET ({_STATE}) = (?, ?, ?, ?, ?) {_WHERE}", (*after, *key))
            return before, after

        def then(states: tuple[State, State] | None) -> None:
            if states is not None:
                self._roster.set_state(key, states[1])

        states = await self._run(work, then)
        return None if states is None else states[0]

    async def remove(self, key: Key, seen: State) -> bool:
        """See `Storage.remove`."""

        def work(db: sqlite3.Connection) -> bool:
            row = db.execute(f"SELECT {_STATE} FROM state {_WHERE}", key).fetchone()
            if row is None or State(*row).mark != seen.mark:
                return False
            for table in ("record", "state", "payload"):
                db.execute(f"DELETE FROM {table} {_WHERE}", key)
            return True

        def then(is_removed: bool) -> None:
            if is_removed:
                self._roster.drop(key)

        return bool(await self._run(work, then))

    async def payload(self, key: Key, order: int) -> Payload | None:
        """See `Storage.payload`."""

        def read() -> Payload | None:
            query = f"SELECT head, tensors, is_legacy FROM payload {_WHERE} AND publish_order = ?"
            row = self._reading.execute(query, (*key, order)).fetchone()
            return None if row is None else Payload(row[0], row[1], bool(row[2]))

        try:
            return await self._loop.run_in_executor(self._readers, read)
        except sqlite3.Error as error:
            raise StorageError(str(error)) from error

    async def roster(self) -> Roster:
        """See `Storage.roster`."""
        return self._roster

    async def _run(self, work: Callable[[sqlite3.Connection], Any], then: Callable[[Any], None]) -> Any:
        task = _Task(work, then, self._loop.create_future())
        self._tasks.put(task)
        # What is in the writer's hands is written; a caller that goes away must not lose the roster its news.
        return await asyncio.shield(task.done)

    def _write(self) -> None:
        """The writer's thread: whatever waits, in one transaction."""
        is_open = True
        while is_open:
            batch: list[_Task] = []
            task = self._tasks.get()
            while task is not None:
                batch.append(task)
                if len(batch) == _BATCH_MAX:
                    break
                try:
                    task = self._tasks.get_nowait()
                except queue.Empty:
                    break
            is_open = task is not None
            if batch:
                self._commit(batch)

    def _commit(self, batch: list[_Task]) -> None:
        results: list[Any] = []
        failure: StorageError | None = None
        try:
            self._writing.execute("BEGIN IMMEDIATE")
            results = [task.work(self._writing) for task in batch]
            self._writing.execute("COMMIT")
        except Exception as error:
            with suppress(sqlite3.Error):
                self._writing.execute("ROLLBACK")
            if len(batch) > 1:  # only the one that cannot be done is to fail
                for task in batch:
                    self._commit([task])
                return
            failure = StorageError(str(error))
            failure.__cause__ = error
        self._loop.call_soon_threadsafe(self._settle, batch, results, failure)

    @staticmethod
    def _settle(batch: list[_Task], results: list[Any], failure: StorageError | None) -> None:
        for i, task in enumerate(batch):
            if failure is not None:
                task.done.set_exception(failure)
                continue
            task.then(results[i])
            task.done.set_result(results[i])

    def _take_lock(self) -> TextIO:
        if not self._path.parent.is_dir():
            raise StorageError(f"{self._path}: there is no folder {self._path.parent}")
        lock = self._path.with_name(self._path.name + ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise StorageError(
                f"{self._path}: another service has this file; give each its own, or let them share a Redis (--storage redis://...)"
            ) from None
        return lock

    def _connect(self) -> sqlite3.Connection:
        # Each connection is used by one thread at a time, though not by the one that made it.
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES_KEPT}")
        except BaseException:
            db.close()
            raise
        return db

    def _load(self) -> None:
        db = self._writing
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise StorageError(f"{self._path}: its layout has version {version}, this program knows {_VERSION}; give another file")
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version = {_VERSION}")
        rows = db.execute(
            f"SELECT source_id, worker_id, rank, static, {_STATE} FROM record JOIN state USING (source_id, worker_id, rank) "
            "ORDER BY updated_at_ms"
        )
        decode = msgspec.msgpack.Decoder(Static).decode
        for source_id, worker_id, rank, static, *state in rows:
            self._roster.put(Key(source_id, worker_id, rank), decode(static), State(*state))
        self._order = max((entry.state.order for entry in self._roster), default=0)
