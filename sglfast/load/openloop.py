"""Sends a trace on time: an open loop, in which a slow server does not slow the arrivals down.

Runs in: `sglfast replay`, `sglfast demo`.
Contract: request i leaves at start + timestamp / speed_up, whether or not others have been answered; only `max_open` requests
    are open at once, and what that bound held back is counted. How late a request left is in its sample (`lag_ms`): if that is
    large, client or machine was the bottleneck and the run says little about the server.
    While it waits the loop writes the next requests' bytes ahead, because a trace sends bursts with one timestamp.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from sglfast.load.client import Answer, LoadClient
from sglfast.load.run import Sample, read_prediction
from sglfast.load.text import RequestWriter
from sglfast.load.trace import TraceRequest

START_DELAY_S = 0.2
AHEAD_REQUESTS = 32
AHEAD_MARGIN_S = 0.003
ERROR_TEXT_CHARS = 200


class OpenLoop:
    """One run of a trace against one server.

    samples: one for each finished request, at the position of the trace (None = not finished); the counters are for a live view.
    """

    def __init__(
        self,
        client: LoadClient,
        writer: RequestWriter,
        trace: Sequence[TraceRequest],
        *,
        speed_up: float = 1.0,
        max_open: int = 4096,
        timeout_s: float = 600.0,
    ) -> None:
        self._client = client
        self._writer = writer
        self._trace = trace
        self._speed_up = speed_up
        self._timeout_s = timeout_s
        self._room = asyncio.Semaphore(max_open)
        self._ahead: deque[bytes] = deque()  # the requests up to self._written that were not sent yet
        self._written = 0
        self.samples: list[Sample | None] = [None] * len(trace)
        self.error_texts: dict[str, str] = {}
        self.sent = self.done = self.errors = self.delayed = 0
        self.prompt_tokens = self.cached_tokens = 0

    async def run(self) -> float:
        """Send everything and wait for the answers; returns the time it took in seconds. Cancelling it drops what is open."""
        first_ms = self._trace[0].timestamp if self._trace else 0.0
        start_s = time.perf_counter() + START_DELAY_S
        held_until_s = 0.0  # when the loop last waited for room: what was due before that is late because of the bound
        async with asyncio.TaskGroup() as tasks:
            for position, request in enumerate(self._trace):
                due_s = start_s + (request.timestamp - first_ms) / 1000.0 / self._speed_up
                await self._wait_until(due_s)
                is_full = self._room.locked()
                await self._room.acquire()
                if is_full:
                    held_until_s = time.perf_counter()
                self.delayed += due_s < held_until_s
                tasks.create_task(self._send(position, self._next_bytes(), start_s, due_s))
                await asyncio.sleep(0)  # lets it write before the next one is made
        return time.perf_counter() - start_s

    async def _wait_until(self, due_s: float) -> None:
        while (wait_s := due_s - time.perf_counter()) > 0:
            if self._written < len(self._trace) and len(self._ahead) < AHEAD_REQUESTS and wait_s > AHEAD_MARGIN_S:
                self._write_one()
                wait_s = 0.0  # answers that arrived meanwhile are read first
            await asyncio.sleep(wait_s)

    def _next_bytes(self) -> bytes:
        if not self._ahead:
            self._write_one()
        return self._ahead.popleft()

    def _write_one(self) -> None:
        self._ahead.append(self._writer.request(self._trace[self._written]))
        self._written += 1

    async def _send(self, position: int, data: bytes, start_s: float, due_s: float) -> None:
        self.sent += 1
        try:
            answer = await self._client.send(data, timeout_s=self._timeout_s)
        finally:
            self._room.release()
        request = self._trace[position]
        sample = to_sample(request, answer)
        sample.due_ms = round((due_s - start_s) * 1000, 3)
        sample.lag_ms = round((answer.started_s - due_s) * 1000, 3)
        self.samples[position] = sample
        if sample.error:
            self.errors += 1
            self.error_texts.setdefault(sample.error, answer.body[:ERROR_TEXT_CHARS].decode("utf-8", "replace"))
        elif sample.cached_tokens >= 0:
            self.prompt_tokens += sample.prompt_tokens
            self.cached_tokens += sample.cached_tokens
        self.done += 1


def to_sample(request: TraceRequest, answer: Answer) -> Sample:
    """The sample of a request that was answered; due and lag are 0."""
    sample = Sample(
        due_ms=0.0,
        lag_ms=0.0,
        input_tokens=request.input_length,
        blocks=len(request.hash_ids),
        ttft_ms=round(answer.ttft_s * 1000, 3) if answer.ttft_s >= 0 else -1.0,
        latency_ms=round(answer.latency_s * 1000, 3),
        error=answer.error,
        prompt_tokens=answer.usage.prompt_tokens,
        cached_tokens=answer.usage.cached_tokens,
        output_tokens=answer.usage.output_tokens,
    )
    read_prediction(answer.kv, sample)
    return sample


async def send_settled(
    client: LoadClient, writer: RequestWriter, trace: Sequence[TraceRequest], *, pause_s: float, timeout_s: float
) -> list[Sample]:
    """Send requests one by one with a pause before each, in which the KV events of the one before arrive."""
    samples = []
    for request in trace:
        await asyncio.sleep(pause_s)
        samples.append(to_sample(request, await client.send(writer.request(request), timeout_s=timeout_s)))
    return samples
