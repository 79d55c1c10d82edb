"""Seed and target for programs without an asyncio loop.

Runs in: the worker's process. Why it is here: SGLang loads weights in its scheduler's main thread, in plain blocking code, long before any
    loop runs, and the seed must heartbeat beside that code for as long as the process lives.
Contract: as seed.py and target.py. A BlockingSeed has a thread with a loop of its own, and marks its record STALE on `stop`, at interpreter
    exit, and on SIGTERM, which it handles first and then leaves to whatever handled it before.
"""

import asyncio
import atexit
import concurrent.futures
import os
import signal
import threading
from collections.abc import AsyncGenerator, Collection, Generator
from types import FrameType, TracebackType
from typing import Self

from sglfast.modelexpress.client import MetadataClient, ModelExpressError
from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.seed import HEARTBEAT_S, STOP_GRACE_S, Seed
from sglfast.modelexpress.target import CANDIDATES, Candidate, find_candidates


class BlockingSeed:
    """One worker's published weights, kept READY by a thread. Arguments: as Seed's; address: host:port of the service.

    handle_sigterm: mark the record STALE on SIGTERM; taken only when `start` is called in the main thread, Python allows no other.
    """

    def __init__(
        self,
        address: str,
        identity: p2p.SourceIdentity,
        worker: p2p.WorkerMetadata,
        *,
        worker_id: str = "",
        interval_s: float = HEARTBEAT_S,
        handle_sigterm: bool = True,
    ) -> None:
        self._address = address
        self._identity = identity
        self._worker = worker
        self._worker_id = worker_id
        self._interval_s = interval_s
        self._handle_sigterm = handle_sigterm
        self._before: signal.Handlers | object = None
        self._thread: threading.Thread | None = None
        self._started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, Seed]] = concurrent.futures.Future()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to publish and to heartbeat. Raises ConfigError for an address that cannot be one."""
        self._thread = threading.Thread(target=self._run, name="modelexpress-seed", daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self._thread = None
            raise
        atexit.register(self.stop)
        is_main = threading.current_thread() is threading.main_thread()
        if self._handle_sigterm and is_main and signal.getsignal(signal.SIGTERM) is not None:  # None: C code has it
            self._before = signal.signal(signal.SIGTERM, self._on_sigterm)

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the record is READY. Raises ModelExpressError: why it is not, after the timeout."""
        loop, _, seed = self._started.result()
        try:
            asyncio.run_coroutine_threadsafe(seed.wait_ready(timeout_s), loop).result()
        except concurrent.futures.CancelledError as error:
            raise ModelExpressError("the seed was stopped") from error

    @property
    def source_id(self) -> str:
        """mx_source_id of the record, "" until it is published."""
        return self._started.result()[2].source_id

    @property
    def worker_id(self) -> str:
        """Under which the record is published."""
        return self._started.result()[2].worker_id

    def stop(self) -> None:
        """Mark the record STALE and end the thread; takes at most twice STOP_GRACE_S. May be called twice."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        atexit.unregister(self.stop)
        if self._before is not None and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]  # what signal.signal returned
        loop, stopping, _ = self._started.result()
        loop.call_soon_threadsafe(stopping.set)
        thread.join(2 * STOP_GRACE_S + 1.0)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        before = self._before
        self.stop()  # gives the signal back to the one before
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            os.kill(os.getpid(), number)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        stopping = asyncio.Event()
        async with MetadataClient(self._address) as client:
            seed = Seed(client, self._identity, self._worker, worker_id=self._worker_id, interval_s=self._interval_s)
            async with seed:
                self._started.set_result((asyncio.get_running_loop(), stopping, seed))
                await stopping.wait()


def blocking_candidates(
    address: str,
    identity: p2p.SourceIdentity,
    worker_rank: int,
    *,
    limit: int = CANDIDATES,
    wait_s: float = 0.0,
    exclude: Collection[str] = (),
) -> Generator[Candidate]:
    """Yield workers as target.find_candidates does, with the same arguments and errors. Must not be called where a loop runs."""
    with asyncio.Runner() as runner:
        client = runner.run(_connect(address))
        candidates = find_candidates(client, identity, worker_rank, limit=limit, wait_s=wait_s, exclude=exclude)
        try:
            while True:
                candidate = runner.run(_next(candidates))
                if candidate is None:
                    return
                yield candidate
        finally:
            runner.run(_close(candidates, client))


async def _connect(address: str) -> MetadataClient:
    return MetadataClient(address)  # a channel belongs to the loop that runs when it is made


async def _next(candidates: AsyncGenerator[Candidate]) -> Candidate | None:
    return await anext(candidates, None)


async def _close(candidates: AsyncGenerator[Candidate], client: MetadataClient) -> None:
    await candidates.aclose()
    await client.close()
