"""What only the embedded storage has: its file, its lock, its transactions."""

import asyncio
import sqlite3
from pathlib import Path

import pytest
from test_modelexpress_storage import KEY, NOW_MS, PAYLOAD, STATIC

from sglfast.modelexpress.records import Payload
from sglfast.modelexpress.roster import READY, UNKNOWN
from sglfast.modelexpress.sqlite_storage import SqliteStorage
from sglfast.modelexpress.storage import StorageError


async def opened(path: Path) -> SqliteStorage:
    storage = SqliteStorage(str(path))
    await storage.open()
    return storage


def test_a_file_belongs_to_one_service(tmp_path: Path) -> None:
    async def main() -> None:
        storage = await opened(tmp_path / "db")
        with pytest.raises(StorageError, match=r"another service has this file.*redis://"):
            await opened(tmp_path / "db")
        await storage.close()
        await (await opened(tmp_path / "db")).close()

    asyncio.run(main())


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, and long enough to be looked at " * 100)
    with sqlite3.connect(tmp_path / "newer") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    for name, text in {"none/db": "there is no folder", "text": "not a database", "newer": "version 99"}.items():
        with pytest.raises(StorageError, match=text) as caught:
            asyncio.run(opened(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)


def test_one_that_fails_leaves_the_others_of_its_transaction(tmp_path: Path) -> None:
    async def main() -> None:
        storage = await opened(tmp_path / "db")
        keys = [KEY._replace(worker_id=f"w{i}") for i in range(20)]
        statuses = [UNKNOWN if i % 5 else 1 << 70 for i in range(20)]  # more than a column holds
        done = await asyncio.gather(
            *(storage.publish(key, STATIC, PAYLOAD, status, NOW_MS) for key, status in zip(keys, statuses, strict=True)),
            return_exceptions=True,
        )
        assert [isinstance(result, StorageError) for result in done] == [i % 5 == 0 for i in range(20)]
        stored = {key for i, key in enumerate(keys) if i % 5}
        assert {entry.key for entry in await storage.roster()} == stored
        await storage.close()
        storage = await opened(tmp_path / "db")
        assert {entry.key for entry in await storage.roster()} == stored
        await storage.close()

    asyncio.run(main())


def test_a_full_disk_fails_in_band_and_passes(tmp_path: Path) -> None:
    async def main() -> None:
        storage = await opened(tmp_path / "db")
        (pages,) = storage._writing.execute("PRAGMA page_count").fetchone()
        storage._writing.execute(f"PRAGMA max_page_count = {pages + 10}")
        with pytest.raises(StorageError, match="full"):
            await storage.publish(KEY, STATIC, Payload(b"", bytes(1 << 20), True), UNKNOWN, NOW_MS)
        assert len(await storage.roster()) == 0
        storage._writing.execute("PRAGMA max_page_count = 1000000")
        await storage.publish(KEY, STATIC, Payload(b"", bytes(1 << 20), True), UNKNOWN, NOW_MS)
        assert await storage.update(KEY, READY, NOW_MS) is not None
        await storage.close()

    asyncio.run(main())


def test_a_heartbeat_rewrites_no_payload(tmp_path: Path) -> None:
    """10,000 heartbeats of a record of 4 MiB write kilobytes each, not megabytes."""

    async def main() -> None:
        storage = await opened(tmp_path / "db")
        await storage.publish(KEY, STATIC, Payload(b"", bytes(4 << 20), True), UNKNOWN, NOW_MS)
        storage._writing.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        storage._writing.execute("PRAGMA wal_autocheckpoint = 0")
        for i in range(100):
            await asyncio.gather(*(storage.update(KEY, READY, NOW_MS + i, is_beat=True) for _ in range(100)))
        written = (tmp_path / "db-wal").stat().st_size
        assert written < 4 << 20
        await storage.close()

    asyncio.run(main())
