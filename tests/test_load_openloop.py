"""The open loop: on time whatever the server does, samples in place, bounded."""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from test_load_client import Seen, chunk, event, serving, text_event, uvloop_run, whole_stream

from sglfast.load.client import LoadClient
from sglfast.load.openloop import AHEAD_REQUESTS, OpenLoop, send_settled
from sglfast.load.run import Sample
from sglfast.load.text import RequestWriter
from sglfast.load.trace import TraceRequest


@dataclass
class PlainWriter(RequestWriter):
    """Names the request in its path instead of writing a prompt."""

    written: int = 0

    def request(self, request: TraceRequest) -> bytes:
        self.written += 1
        return f"GET /{request.hash_ids[0]} HTTP/1.1\r\nhost: x\r\n\r\n".encode()


def trace_of(times_ms: list[float]) -> list[TraceRequest]:
    return [TraceRequest(time_ms, 700, 3, [number, 10_000]) for number, time_ms in enumerate(times_ms)]


def run_loop(url: str, trace: list[TraceRequest], **settings: float) -> tuple[OpenLoop, float]:
    async def run() -> tuple[OpenLoop, float]:
        client = LoadClient(url)
        loop = OpenLoop(client, PlainWriter(), trace, **settings)  # type: ignore[arg-type]
        try:
            return loop, await loop.run()
        finally:
            await client.close()

    return uvloop_run(run())


def samples_of(loop: OpenLoop) -> list[Sample]:
    return [sample for sample in loop.samples if sample is not None]


def test_slow_answers_do_not_hold_arrivals_back() -> None:
    everybody_came = threading.Event()

    def script(seen: Seen) -> Iterator[bytes | threading.Event]:
        if len(server.seen) == 40:
            everybody_came.set()
        yield everybody_came
        yield whole_stream()

    with serving(script) as server:
        loop, _ = run_loop(server.url, trace_of([0.0] * 40), timeout_s=20)
    assert (loop.sent, loop.done, loop.errors, loop.delayed) == (40, 40, 0, 0)
    assert (loop.prompt_tokens, loop.cached_tokens) == (40 * 700, 40 * 640)


def test_requests_leave_in_order_and_not_early() -> None:
    arrivals: list[float] = []

    def script(seen: Seen) -> list[bytes]:
        arrivals.append(time.perf_counter())
        return [whole_stream(b"x-sglfast-kv: worker=http://w:1; rank=0; overlap_blocks=10; prompt_blocks=10; state=EXACT\r\n")]

    times_ms = [5000.0 + 200 * number for number in range(6)]  # a trace need not begin at 0
    with serving(script) as server:
        begin = time.perf_counter()
        loop, wall_s = run_loop(server.url, trace_of(times_ms), speed_up=4.0)
    assert [seen.path for seen in server.seen] == [f"/{number}" for number in range(6)]
    samples = samples_of(loop)
    assert [sample.due_ms for sample in samples] == pytest.approx([0, 50, 100, 150, 200, 250], abs=0.01)
    assert wall_s >= 0.25
    for sample, arrival in zip(samples, arrivals, strict=True):
        assert sample.lag_ms >= 0
        assert arrival >= begin + sample.due_ms / 1000
    one = samples[3]
    assert (one.input_tokens, one.blocks, one.prompt_tokens, one.cached_tokens, one.output_tokens) == (700, 2, 700, 640, 3)
    assert (one.worker, one.rank, one.overlap_blocks, one.prompt_blocks, one.state) == ("http://w:1", 0, 10, 10, "EXACT")
    assert 0 < one.ttft_ms <= one.latency_ms


def test_bound_of_open_requests_is_kept_and_counted() -> None:
    open_now = most_open = 0

    def script(seen: Seen) -> Iterator[bytes | float]:
        nonlocal open_now, most_open
        open_now += 1
        most_open = max(most_open, open_now)
        yield 0.02
        open_now -= 1
        yield whole_stream()

    with serving(script) as server:
        loop, _ = run_loop(server.url, trace_of([0.0] * 10), max_open=2)
    assert most_open == 2
    assert loop.delayed == 8
    assert max(sample.lag_ms for sample in samples_of(loop)) >= 60  # 10 requests in 5 rounds of 20 ms
    assert loop.errors == 0


def test_errors_are_counted_with_an_example() -> None:
    def script(seen: Seen) -> list[bytes]:
        if seen.path == "/1":
            return [b"HTTP/1.1 503 X\r\ncontent-length: 4\r\nx-router-error-code: no_healthy_workers\r\n\r\nnope"]
        return [whole_stream()]

    with serving(script) as server:
        loop, _ = run_loop(server.url, trace_of([0.0, 0.0, 0.0]))
    assert [sample.error for sample in samples_of(loop)] == ["", "http_503 no_healthy_workers", ""]
    assert loop.error_texts == {"http_503 no_healthy_workers": "nope"}
    assert (loop.errors, loop.done) == (1, 3)


def test_counts_that_are_not_reported_stay_unknown() -> None:
    body = chunk(text_event(" a") + event(b"[DONE]")) + b"0\r\n\r\n"
    with serving(lambda _: [b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n" + body]) as server:
        loop, _ = run_loop(server.url, trace_of([0.0]))
    (sample,) = samples_of(loop)
    assert (sample.error, sample.prompt_tokens, sample.cached_tokens, sample.overlap_blocks) == ("", -1, -1, -1)


def test_writes_ahead_but_not_everything() -> None:
    async def run(url: str) -> None:
        client, writer = LoadClient(url), PlainWriter()
        loop = OpenLoop(client, writer, trace_of([0.0] + [3_600_000.0] * 100))
        task = asyncio.create_task(loop.run())
        while loop.done < 1 or writer.written < 1 + AHEAD_REQUESTS:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert writer.written == 1 + AHEAD_REQUESTS
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()

    with serving(lambda _: [whole_stream()]) as server:
        uvloop_run(asyncio.wait_for(run(server.url), 20))


def test_cancelling_drops_what_is_open() -> None:
    never = threading.Event()

    async def run(url: str) -> None:
        client = LoadClient(url)
        task = asyncio.create_task(OpenLoop(client, PlainWriter(), trace_of([0.0] * 3)).run())
        while len(server.seen) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()
        assert not client.connections
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with serving(lambda _: [never]) as server:
        uvloop_run(run(server.url))


def test_settled_requests_go_one_by_one() -> None:
    async def run(url: str) -> list[Sample]:
        client = LoadClient(url)
        try:
            return await send_settled(client, PlainWriter(), trace_of([0.0] * 4), pause_s=0.0, timeout_s=10)
        finally:
            await client.close()

    with serving(lambda _: [whole_stream()]) as server:
        samples = uvloop_run(run(server.url))
    assert [sample.cached_tokens for sample in samples] == [640] * 4
    assert server.connections == 1
