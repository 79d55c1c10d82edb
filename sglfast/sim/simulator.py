"""All simulated workers of one process, as an async context manager: what `sglfast sim` runs and what tests embed.

Runs in: sim, or the loop of a test. Contract: after `async with Simulator(settings) as simulator` every worker listens;
    leaving releases every socket, timer and thread. Works on asyncio's loop and on uvloop.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import zmq

from sglfast.errors import ConfigError
from sglfast.prompt.tokenizer import load_tokenizer
from sglfast.sim.inference import Shared
from sglfast.sim.output import OutputText
from sglfast.sim.prompts import Prompts
from sglfast.sim.settings import SimSettings, check
from sglfast.sim.weights import Model, WeightDirectory, Weights
from sglfast.sim.worker import SimWorker

# (bytes copied so far, all bytes, endpoint of the peer that gave the last ones)
Progress = Callable[[int, int, str], None]

TOKENIZER_THREADS = 2
SWEEP_S = 1.0
SPARE_SOCKETS = 64


class Simulator:
    """Owns the workers and what they share, the weight directory too.

    progress: told of every piece of weights that targets copied, of all workers together.
    Raises on entry: ConfigError for settings, tokenizer, or a port that is taken; SglfastError for weights that no peer gives.
    """

    def __init__(
        self,
        settings: SimSettings,
        directory: WeightDirectory | None = None,
        progress: Progress = lambda done_bytes, size_bytes, source: None,
    ) -> None:
        self.settings = check(settings)
        self.workers: list[SimWorker] = []
        self._directory = directory
        self._progress = progress
        self._weights: list[Weights] = []
        if settings.mx_server and directory is None:
            raise ConfigError("--mx-server: only `sglfast sim` knows how to ask a metadata service")

    async def __aenter__(self) -> Self:
        settings = self.settings
        tokenizer = load_tokenizer(settings.tokenizer_path)
        self._executor = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="sim-tokenizer")
        output = OutputText(tokenizer, settings.seed)
        shared = Shared(Prompts(settings, tokenizer, output), output, self._executor)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 2 * settings.workers * settings.dp_size + SPARE_SOCKETS)
        try:
            await self._load_weights()
            for index in range(settings.workers):
                port = settings.base_port and settings.base_port + index
                kv_port = settings.kv_base_port and settings.kv_base_port + index * 2 * settings.dp_size
                room_port = settings.disaggregation_bootstrap_port and settings.disaggregation_bootstrap_port + index
                weights = self._weights[index] if self._weights else None
                worker = SimWorker(settings, shared, self._context, port, kv_port, weights, room_port)
                await worker.open()
                self.workers.append(worker)
            for weights in self._weights:
                await weights.announce()
        except BaseException:
            await self._close()
            raise
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sweeper.cancel()
        await self._close()

    async def _load_weights(self) -> None:
        """All workers at once, as so many machines would."""
        settings = self.settings
        if self._directory is None:
            return
        model = Model(settings.model, settings.mx_model_bytes)
        rate = settings.mx_bandwidth_bytes_per_s
        for _ in range(settings.workers):
            self._weights.append(Weights(model, self._directory, settings.mx_role, rate, settings.host, self._report))
        try:
            async with asyncio.TaskGroup() as loading:
                for weights in self._weights:
                    loading.create_task(weights.load())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one sentence for the user; the others say the same

    def _report(self, source: str) -> None:
        done_bytes = sum(weights.copied_bytes for weights in self._weights)
        self._progress(done_bytes, self.settings.workers * self.settings.mx_model_bytes, source)

    async def _close(self) -> None:
        if self._directory is not None:
            await self._directory.close()  # first: nobody is to be sent to what is about to end
        for weights in self._weights:
            await weights.close()
        for worker in self.workers:
            await worker.close()
        self._context.destroy(linger=0)
        self._executor.shutdown(wait=True, cancel_futures=True)

    async def _sweep(self) -> None:
        """Close idle connections; once a second is exact enough for a limit of seconds."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = time.monotonic()
            for worker in self.workers:
                worker.close_idle(now_s)

    def announcement(self) -> dict[str, Any]:
        """Return where the workers listen: {"workers": [{"url", "kv_port", "replay_port", "bootstrap_port"}]}, KV ports of rank 0."""
        return {
            "workers": [
                {
                    "url": worker.url,
                    "kv_port": worker.publisher.live_port,
                    "replay_port": worker.publisher.replay_port,
                    "bootstrap_port": worker.rooms and worker.rooms.port,
                }
                for worker in self.workers
            ]
        }
