"""A worker of another kind than the simulator, as a process of its own: it answers completions and publishes real KV events.

    python engine_standin.py --kind vllm --shape array --hashes bytes --announce-fd 7

`vllm`: no /server_info; blocks of 16 tokens, hashes that nobody can compute (seeded per process), events as arrays (before 0.24) or
maps, hashes as numbers or bytes; adapters are models of their own. `sglang`: 0.5.23 with /server_info; blocks of 64 tokens, the SHA chain,
of adapters hashed once more; adapters as `lora_path` or "base:adapter". Nothing is evicted but by POST /reset_prefix_cache. GET
/subscribers tells how many follow the events now. The line {"workers": [{"url": ..., "kv_port": ..., "replay_port": ...}]} goes to the
descriptor as soon as it listens; the port is 0 with `--no-replay`.
"""

import argparse
import asyncio
import hashlib
import json
import os
import threading
import time
from typing import Any

import msgspec
import zmq
from aiohttp import web

from sglfast._blockhash import page_keys
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.wire import kv_events

MODEL = "demo-model"
ADAPTERS = ("ad-1", "ad-2")
VLLM_FIELDS = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name")


class Publisher:
    """XPUB and ROUTER sockets on free ports; the ROUTER has a thread, as the buffer is all they share."""

    def __init__(self, *, has_replay: bool) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.live = self.context.socket(zmq.XPUB)
        self.n_subscribers = 0
        self.router = self.context.socket(zmq.ROUTER)
        for place in (self.live, self.router):
            place.setsockopt(zmq.LINGER, 0)
            place.setsockopt(zmq.SNDHWM, 0)
        self.port = self.live.bind_to_random_port("tcp://127.0.0.1")
        self.buffer: list[tuple[int, bytes]] = []
        self.replay_port = 0
        if has_replay:
            self.replay_port = self.router.bind_to_random_port("tcp://127.0.0.1")
            threading.Thread(target=self._replay, daemon=True).start()

    def subscribers(self) -> int:
        while self.live.poll(0):
            self.n_subscribers += 1 if self.live.recv()[0] else -1
        return self.n_subscribers

    def publish(self, events: list[Any]) -> None:
        seq, payload = len(self.buffer), msgspec.msgpack.encode([time.time(), events, 0])
        self.buffer.append((seq, payload))
        self.live.send_multipart(kv_events.live_frames(b"", seq, payload))

    def _replay(self) -> None:
        while True:
            identity, *request = self.router.recv_multipart()
            start = kv_events.parse_replay_request(request)
            for seq, payload in list(self.buffer):
                if start is not None and seq >= start:
                    self.router.send_multipart([identity, *kv_events.replay_data(b"", seq, payload)])
            self.router.send_multipart([identity, *kv_events.replay_end()])


class Engine:
    """A paged cache that keeps everything, by adapter."""

    def __init__(self, kind: str, shape: str, hashes: str, publisher: Publisher) -> None:
        self.is_vllm = kind == "vllm"
        self.shape = shape
        self.has_bytes = hashes == "bytes"
        self.block_size = 16 if self.is_vllm else 64
        self.secret = os.urandom(32)
        self.cached: set[bytes] = set()
        self.publisher = publisher

    def names(self, tokens: list[int], adapter: str) -> list[bytes]:
        """Engine hash of each full block."""
        size = self.block_size
        if not self.is_vllm:
            keys = page_keys(tokens, size)
            names = [keys[at : at + 8][::-1] for at in range(0, len(keys), 8)]
            return [hashlib.sha256(adapter.encode() + name).digest()[:8] for name in names] if adapter else names
        names, parent = [], self.secret
        for at in range(0, len(tokens) - size + 1, size):
            parent = hashlib.sha256(parent + repr(tokens[at : at + size]).encode() + adapter.encode()).digest()
            names.append(parent)
        return names

    def prefill(self, tokens: list[int], adapter: str) -> int:
        """Tokens of the prompt that were cached; the others are now, and the events are out."""
        names = self.names(tokens, adapter)
        known = 0
        while known < len(names) and names[known] in self.cached:
            known += 1
        fresh = names[known:]
        if fresh:
            self.cached.update(fresh)
            size = self.block_size
            event = {
                "block_hashes": [self.wire(name) for name in fresh],
                "parent_block_hash": self.wire(names[known - 1]) if known else None,
                "token_ids": tokens[known * size : len(names) * size],
                "block_size": size,
                "lora_id": 1 if adapter and self.is_vllm else None,
                "medium": "GPU",
                "lora_name": adapter or None,
            }
            if self.shape == "array":
                self.publisher.publish([["BlockStored", *(event[name] for name in VLLM_FIELDS)]])
            else:
                more = {"extra_keys": [[adapter] if adapter else None] * len(fresh), "group_idx": 0, "kv_cache_spec_kind": "full_attention"}
                self.publisher.publish([{"type": "BlockStored", **event, **(more if self.is_vllm else {})}])
        return min(known, (len(tokens) - 1) // self.block_size) * self.block_size

    def wire(self, name: bytes) -> int | bytes:
        if self.has_bytes:
            return name
        return int.from_bytes(name[-8:], "big", signed=not self.is_vllm)

    def reset(self) -> None:
        self.cached.clear()
        self.publisher.publish([["AllBlocksCleared"] if self.shape == "array" else {"type": "AllBlocksCleared"}])

    def adapter_of(self, body: dict[str, Any]) -> str:
        model: str = body["model"]
        if self.is_vllm:
            return "" if model == MODEL else model
        return model.partition(":")[2] or body.get("lora_path") or ""


async def serve(engine: Engine, announce_fd: int) -> None:
    tokenizer = load_tokenizer(DEMO_TOKENIZER_PATH)
    publisher = engine.publisher

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    async def models(request: web.Request) -> web.Response:
        adapters = [{"id": name, "object": "model", "parent": MODEL} for name in ADAPTERS if engine.is_vllm]
        return web.json_response({"object": "list", "data": [*adapters, {"id": MODEL, "object": "model", "parent": None}]})

    async def server_info(request: web.Request) -> web.Response:
        if engine.is_vllm:
            raise web.HTTPNotFound
        descriptor = {
            "publisher": "zmq", "endpoint_host": "127.0.0.1", "endpoint_port_base": publisher.port, "topic": "",
            "block_size": engine.block_size, "dp_size": 1, "replay_endpoint_port_base": publisher.replay_port,
        }  # fmt: skip
        return web.json_response({"version": "0.5.23", "served_model_name": MODEL, "kv_events": descriptor})

    async def reset(request: web.Request) -> web.Response:
        engine.reset()
        return web.Response()

    async def subscribers(request: web.Request) -> web.Response:
        return web.json_response(publisher.subscribers())

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        tokens = list(tokenizer.encode(body["prompt"], True))
        cached = engine.prefill(tokens, engine.adapter_of(body))
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": cached}}
        return web.json_response({"object": "text_completion", "choices": [{"index": 0, "text": "x"}], "usage": usage})

    app = web.Application()
    app.add_routes(
        [
            web.get("/health", health),
            web.get("/v1/models", models),
            web.get("/server_info", server_info),
            web.post("/reset_prefix_cache", reset),
            web.get("/subscribers", subscribers),
            web.post("/v1/completions", complete),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    worker = {"url": f"http://127.0.0.1:{port}", "kv_port": publisher.port, "replay_port": publisher.replay_port}
    os.write(announce_fd, json.dumps({"workers": [worker]}).encode() + b"\n")
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--shape", choices=("array", "map"), default="map")
    parser.add_argument("--hashes", choices=("int", "bytes"), default="int")
    parser.add_argument("--no-replay", action="store_true")
    parser.add_argument("--announce-fd", type=int, required=True)
    options = parser.parse_args()
    publisher = Publisher(has_replay=not options.no_replay)
    asyncio.run(serve(Engine(options.kind, options.shape, options.hashes, publisher), options.announce_fd))


if __name__ == "__main__":
    main()
