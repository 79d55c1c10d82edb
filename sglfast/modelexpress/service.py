"""P2pService: the four calls, from the bytes of a request to the bytes of its answer.

Runs in: the metadata service. Contract: what goes wrong is told in the answer, as clients of every version expect (spec/modelexpress.md 2):
    `success=false` with a sentence, `found=false`, an empty list. Only bytes that are no request raise, MalformedError.
    Each change of a status is one log line; a heartbeat is none.
"""

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from logging import Logger
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from sglfast.modelexpress import listing
from sglfast.modelexpress.metrics import Meters
from sglfast.modelexpress.records import MalformedError, read_publish, write_found
from sglfast.modelexpress.roster import READY, STATUS_NAMES, Key, status_name
from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.settings import ServeSettings
from sglfast.modelexpress.source_id import Form, source_id
from sglfast.modelexpress.storage import Storage, StorageError

_THREAD_BYTES = 64 << 10  # a record of more bytes is read and written beside the loop
_GET_TRIES = 5  # of a record that is published again while it is being read

M = TypeVar("M", bound=Message)
R = TypeVar("R")


def wall_clock_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class P2pService:
    """The calls. is_working: told whether the storage did its last work; clock_ms: unix milliseconds."""

    def __init__(
        self,
        storage: Storage,
        settings: ServeSettings,
        meters: Meters,
        log: Logger,
        *,
        on_storage: Callable[[bool], None] = lambda is_working: None,
        clock_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._storage, self._settings, self._meters, self._log = storage, settings, meters, log
        self._on_storage, self._clock_ms = on_storage, clock_ms
        self._form: Form = "april" if settings.source_id_form == "april" else "current"
        self._fresh_ms = round(settings.heartbeat_timeout_secs * 1000)
        self._threads = ThreadPoolExecutor(2, "records")
        self._is_storage_working = True

    def close(self) -> None:
        """End the threads; call it when no call is in flight."""
        self._threads.shutdown()

    async def publish(self, data: bytes) -> bytes:
        """PublishMetadataRequest -> PublishMetadataResponse."""
        found = await self._beside(len(data), read_publish, data)
        if isinstance(found, str):
            return self._refuse_publish("refused", found)
        key = Key(source_id(found.identity, form=self._form), found.worker_id, found.rank)
        try:
            roster = await self._storage.roster()
            if len(roster) >= self._settings.max_records and roster.get(key) is None:
                text = f"{len(roster)} records are stored, the limit is {self._settings.max_records} (--max-records)"
                return self._refuse_publish("refused", f"Failed to publish metadata: {text}")
            await self._storage.publish(key, found.static, found.payload, found.status, self._clock_ms())
        except StorageError as error:
            self._storage_failed(error)
            return self._refuse_publish("error", f"Failed to publish metadata: {error}")
        self._storage_worked()
        self._meters.publishes.labels("ok").inc()
        self._meters.stored_bytes.inc(found.payload.size_bytes)
        fields = {"model": found.identity.model_name, "tensors": found.n_tensors, "bytes": found.payload.size_bytes}
        self.tell(key, status_name(found.status), "published", fields)
        text = (
            f"Published metadata for '{found.identity.model_name}' (source_id={key.source_id}, worker_id={key.worker_id}, "
            f"worker_rank={key.rank}, {found.n_tensors} tensors)"
        )
        answer = p2p.PublishMetadataResponse(success=True, message=text, mx_source_id=key.source_id, worker_id=key.worker_id)
        return answer.SerializeToString()

    def _refuse_publish(self, result: str, text: str) -> bytes:
        self._meters.publishes.labels(result).inc()
        return p2p.PublishMetadataResponse(success=False, message=text).SerializeToString()

    async def list_sources(self, data: bytes) -> bytes:
        """ListSourcesRequest -> ListSourcesResponse."""
        request = _parse(p2p.ListSourcesRequest, data)
        wanted = source_id(request.identity, form=self._form) if request.identity.model_name else None
        try:
            roster = await self._storage.roster()
        except StorageError as error:
            self._storage_failed(error)
            self._meters.lists.labels("error").inc()
            return b""
        self._storage_worked()
        self._meters.lists.labels("ok").inc()
        return listing.encode(listing.select(roster, request, wanted, self._clock_ms(), self._fresh_ms))

    async def get(self, data: bytes) -> bytes:
        """GetMetadataRequest -> GetMetadataResponse."""
        request = _parse(p2p.GetMetadataRequest, data)
        if not request.mx_source_id or not request.worker_id:
            self._meters.gets.labels("missing").inc()
            return b""
        try:
            answer = await self._found(request.mx_source_id, request.worker_id)
        except StorageError as error:
            self._storage_failed(error)
            self._meters.gets.labels("error").inc()
            return b""
        self._storage_worked()
        if answer is None:
            self._meters.gets.labels("missing").inc()
            return p2p.GetMetadataResponse(mx_source_id=request.mx_source_id, worker_id=request.worker_id).SerializeToString()
        self._meters.gets.labels("found").inc()
        return answer

    async def _found(self, source: str, worker_id: str) -> bytes | None:
        for _ in range(_GET_TRIES):
            roster = await self._storage.roster()
            entry = roster.lowest_rank(source, worker_id)
            if entry is None:
                return None
            identity, order = roster.sources[source].spelling, entry.state.order
            payload = await self._storage.payload(entry.key, order)
            if payload is not None:  # else it was published again meanwhile, and its status is not the one of this payload
                limit = self._settings.max_message_bytes
                return await self._beside(payload.size_bytes, write_found, entry, identity, payload, limit)
        return None

    async def update(self, data: bytes) -> bytes:
        """UpdateStatusRequest -> UpdateStatusResponse."""
        request = _parse(p2p.UpdateStatusRequest, data)
        status = int(request.status)
        problem = (
            "mx_source_id is required" if not request.mx_source_id
            else "worker_id is required" if not request.worker_id
            else f"invalid status value: {status}" if status not in STATUS_NAMES
            else None
        )  # fmt: skip
        if problem is not None:
            return self._refuse_update("refused", problem)
        key = Key(request.mx_source_id, request.worker_id, request.worker_rank)
        has_load = request.HasField("source_load") and not math.isnan(request.source_load)
        load = request.source_load if has_load else None
        try:
            before = await self._storage.update(key, status, self._clock_ms(), source_load=load, is_beat=status == READY)
        except StorageError as error:
            self._storage_failed(error)
            return self._refuse_update("error", f"Failed to update status: {error}")
        self._storage_worked()
        if before is None:
            where = f"rank {key.rank} not found in source '{key.source_id}' worker '{key.worker_id}'"
            return self._refuse_update("missing", f"Failed to update status: update_status: {where}")
        self._meters.updates.labels("ok").inc()
        if before.status != status:
            self.tell(key, status_name(status), "told by the worker", {"before": status_name(before.status)})
        text = f"Updated status for source '{key.source_id}' worker_id '{key.worker_id}' rank {key.rank}"
        return p2p.UpdateStatusResponse(success=True, message=text).SerializeToString()

    def _refuse_update(self, result: str, text: str) -> bytes:
        self._meters.updates.labels(result).inc()
        return p2p.UpdateStatusResponse(success=False, message=text).SerializeToString()

    def tell(self, key: Key, to: str, why: str, more: dict[str, object]) -> None:
        """Log and count one change of a record's status."""
        self._meters.transitions.labels(to if to in STATUS_NAMES.values() or to == "DELETED" else "UNKNOWN").inc()
        fields = {"source": key.source_id, "worker": key.worker_id, "rank": key.rank, **more}
        self._log.info(f"{to}, {why}", extra={"fields": fields})

    async def _beside(self, size_bytes: int, work: Callable[..., R], *arguments: object) -> R:
        if size_bytes <= _THREAD_BYTES:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _storage_failed(self, error: StorageError) -> None:
        if self._is_storage_working:
            self._is_storage_working = False
            self._log.error("storage fails; calls are answered with failures until it works again", extra={"fields": {"error": str(error)}})
            self._on_storage(False)

    def _storage_worked(self) -> None:
        if not self._is_storage_working:
            self._is_storage_working = True
            self._log.info("storage works again")
            self._on_storage(True)


def _parse(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise MalformedError(str(error)) from error
