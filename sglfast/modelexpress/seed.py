"""The seed side: publish what a worker holds, keep it READY by heartbeats, take it back at the end.

Runs in: the worker's process, on its asyncio loop (blocking.py has the same for programs without one). Contract: after `start` the record
    is published as soon as the service answers, and again whenever the service has lost it; nothing that the service does ends the worker.
    `stop` (or leaving `async with`) waits for a heartbeat in flight, so that it cannot overtake the STALE that follows it.

A heartbeat is UpdateStatus(READY); the server stamps the time. It calls a record STALE after 90 s without one (MX_HEARTBEAT_TIMEOUT_SECS).
A server that lost its store says success=false to heartbeats and nothing else: after two of those in a row the record is published again,
as the publisher of modelexpress 0.7.0 does; unlike it the second one is not left for a whole interval.
"""

import asyncio
import contextlib
import logging
import random
import uuid
from types import TracebackType
from typing import Self

from sglfast.modelexpress.client import CALL_TIMEOUT_S, BackOff, MetadataClient, ModelExpressError, Refused
from sglfast.modelexpress.schema import p2p

HEARTBEAT_S = 30.0  # a third of the time after which servers call a record STALE
REFUSALS_BEFORE_PUBLISH = 2
STOP_GRACE_S = 5.0

log = logging.getLogger("modelexpress")


class Seed:
    """One worker's published weights. The client stays the caller's; the seed must be stopped before it is closed.

    worker: the record; its worker_rank and tensors (addresses and sizes in bytes) must be set, its status is the server's business.
    worker_id: "" = a new one; one a process and start, never reused, so that a restarted worker is not taken for the one before.
    interval_s: between heartbeats, shortened by up to a tenth by chance; back_off: after failures, never longer than the interval.
    """

    def __init__(
        self,
        client: MetadataClient,
        identity: p2p.SourceIdentity,
        worker: p2p.WorkerMetadata,
        *,
        worker_id: str = "",
        interval_s: float = HEARTBEAT_S,
        back_off: BackOff | None = None,
    ) -> None:
        self._client = client
        self._identity = identity
        self._worker = worker
        self._interval_s = interval_s
        self._back_off = back_off or BackOff()
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._ready = asyncio.Event()
        self.worker_id = worker_id or uuid.uuid4().hex
        self.source_id = ""  # mx_source_id, once published
        self.publishes = 0
        self.heartbeats = 0
        self.last_error: ModelExpressError | None = None

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    @property
    def is_ready(self) -> bool:
        """Whether the service accepted the last READY."""
        return self._ready.is_set()

    def start(self) -> None:
        """Begin to publish and to heartbeat, in a task of the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="modelexpress seed")

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once the record is READY. Raises ModelExpressError: why it is not, after the timeout."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        if not self._ready.is_set():
            raise self.last_error or ModelExpressError(f"ModelExpress server {self._client.address} did not answer within {timeout_s:g} s")

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """End the heartbeats and mark the record STALE; takes at most twice the grace. What the service does is logged, not raised."""
        task, self._task = self._task, None
        if task is None:
            return
        self._stopping.set()
        try:
            await asyncio.wait([task], timeout=grace_s)
        finally:
            task.cancel()
        await asyncio.wait([task])
        self._ready.clear()
        if self.source_id:
            try:
                await self._set_status(p2p.SOURCE_STATUS_STALE, grace_s)
                log.info("record STALE: this worker ends", extra={"fields": self._fields()})
            except ModelExpressError as error:
                # Here and below text, not the error: a kept log record would keep its frames, and with them the channel.
                log.warning("record could not be marked STALE: %s", str(error), extra={"fields": self._fields()})
        if not task.cancelled():
            task.result()  # an error of our own must not stay unseen

    async def _run(self) -> None:
        failures = 0  # calls in a row that did not come through
        refusals = 0  # answers since the last READY that were no
        while not self._stopping.is_set():
            try:
                await self._beat()
            except ModelExpressError as error:
                if self._ready.is_set() or self.last_error is None:
                    log.warning("record not READY, trying again: %s", str(error), extra={"fields": self._fields()})
                self.last_error = error
                self._ready.clear()
                if isinstance(error, Refused):
                    failures, refusals = 0, refusals + 1
                    if self.source_id and refusals >= REFUSALS_BEFORE_PUBLISH:
                        log.warning("the service has lost this record, publishing it again", extra={"fields": self._fields()})
                        self.source_id = ""
                        if refusals == REFUSALS_BEFORE_PUBLISH:
                            continue
                else:
                    failures += 1
                pause_s = min(self._interval_s, self._back_off.pause_s(failures or refusals))
            else:
                if not self._ready.is_set():
                    log.info("record READY", extra={"fields": self._fields()})
                failures = refusals = 0
                self.last_error = None
                self._ready.set()
                pause_s = self._interval_s * random.uniform(0.9, 1.0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)

    async def _beat(self) -> None:
        """Publish if the service does not have the record, then say READY."""
        if not self.source_id:
            self.source_id = await self._client.publish(self._identity, self._worker, self.worker_id)
            self.publishes += 1
        await self._set_status(p2p.SOURCE_STATUS_READY, min(CALL_TIMEOUT_S, max(1.0, self._interval_s)))
        self.heartbeats += 1

    async def _set_status(self, status: p2p.SourceStatus, timeout_s: float) -> None:
        await self._client.update_status(self.source_id, self.worker_id, self._worker.worker_rank, status, timeout_s=timeout_s)

    def _fields(self) -> dict[str, object]:
        return {
            "model": self._identity.model_name,
            "source_id": self.source_id,
            "worker_id": self.worker_id,
            "worker_rank": self._worker.worker_rank,
        }
