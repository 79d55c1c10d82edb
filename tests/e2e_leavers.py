"""Clients that leave: many streams, some of them abandoned at a random byte, and what must be left afterwards: nothing."""

import asyncio
import random
from urllib.parse import urlsplit

import orjson
from e2e import metric, open_files, process_of, rss_bytes, wait_until

from sglfast.load.stack import Stack

LEAVING_SHARE = 1 / 3
STREAM_BYTES = 16_000  # about what 64 chunks have


def run_leavers(stack: Stack, rng: random.Random, *, streams: int, chunks: int, connections: int) -> None:
    """Run the load in two halves and hold memory, descriptors and counters of the shards against each other."""
    parts = urlsplit(stack.url)
    body = orjson.dumps({"model": "demo-model", "prompt": "hello there", "max_tokens": chunks, "ignore_eos": True, "stream": True})
    request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )
    shards = [process_of(stack, "sglfast.edge.main", number) for number in range(2)]
    completed = 0

    async def stream(queue: list[int]) -> None:
        nonlocal completed
        while queue:
            leaves_at = rng.randrange(STREAM_BYTES) if queue.pop() else None
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(request)
            seen, tail = 0, b""
            while leaves_at is None or seen < leaves_at:
                data = await reader.read(65536)
                seen += len(data)
                tail = tail[-16:] + data
                if not data or tail.endswith(b"0\r\n\r\n"):
                    break
            if leaves_at is None:
                assert tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), tail[-200:]
                completed += 1
            if rng.random() < 0.5:
                writer.transport.abort()  # a reset; else a close
            writer.close()

    async def half(count: int) -> None:
        queue = [int(rng.random() < LEAVING_SHARE) for _ in range(count)]
        await asyncio.gather(*(stream(queue) for _ in range(connections)))

    def settle() -> tuple[list[int], list[int]]:
        wait_until(lambda: metric(stack, "sglfast_inflight_requests") == 0, "in flight is back at 0")
        # The scrape itself is a connection.
        wait_until(lambda: metric(stack, "sglfast_connections") <= 1, "client connections are back at 0")
        return [rss_bytes(pid) for pid in shards], [open_files(pid) for pid in shards]

    asyncio.run(half(streams // 2))
    first_rss, first_files = settle()
    asyncio.run(half(streams - streams // 2))
    second_rss, second_files = settle()
    assert completed > streams // 2
    for before, after in zip(first_rss, second_rss, strict=True):
        assert after - before < 3 << 20, f"a shard grew by {(after - before) >> 10} KiB over the second half"
    for before, after in zip(first_files, second_files, strict=True):
        assert after - before < 140, "a shard keeps descriptors"  # idle connections to the workers come and go
    assert metric(stack, "sglfast_worker_inflight_requests") == 0
    assert metric(stack, "sglfast_worker_requests_total", outcome="cancelled") > streams // 10
