"""What the tests of predictions share: a router without a network, prompts, and the index's half, which the test plays."""

import random
from collections.abc import Callable
from typing import Any

import orjson
from edge_harness import Memory, run, shard_in_loop

from sglfast._predicted import PredictionWriter
from sglfast.edge.pools import Route
from sglfast.edge.request import ENDPOINTS, Facts
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH
from sglfast.shm import Variant

CHAT = ENDPOINTS[b"/v1/chat/completions"]
ENGINES = [f"http://10.0.0.{number}:30000" for number in range(1, 5)]
COLD = bytes(range(8))  # one key, which nobody owns: all that is made of a new prompt
EXACT = {"policy": "cache_aware", "tokenizer_path": DEMO_TOKENIZER_PATH}


class ColdKeyer:
    """Of every prompt: 4,000 tokens, and the first block's key."""

    def __init__(self, facts: Facts | None = None) -> None:
        self.facts = facts or Facts(4000, {Variant(64): COLD}, is_estimated=True)

    def key(self, kind: int, body: bytes, variants: object, then: Callable[[Facts], None], *, is_whole: bool = False, **_: object) -> None:
        then(self.facts)


def body(common: str, own: str = "", model: str = "demo") -> bytes:
    return orjson.dumps({"model": model, "messages": [{"role": "user", "content": common + own}], "max_tokens": 7})


def words(seed: int, n_bytes: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ", k=n_bytes))


def route_of(router: Router, data: bytes) -> Route:
    """The choice for a request, which is sent there."""
    found: list[Any] = []
    router.choose(CHAT, data, found.append)
    assert isinstance(found[0], Route), found
    router.note(found[0])
    return found[0]


class Index:
    """The writer, for the workers of a memory, with a clock that only the test moves."""

    def __init__(self, memory: Memory) -> None:
        self.writer = PredictionWriter(memory.segment)
        for rank in range(len(memory.urls)):
            self.writer.own(rank, 1)

    def drain(self) -> int:
        return self.writer.drain()


def shards(memory: Memory, test: Callable[..., None], n: int = 1, keyer: Any = None, **settings: Any) -> None:
    """Run `test` with n shards and the index of this memory."""

    async def inside() -> None:
        test(*(shard_in_loop(memory, keyer, shard, **settings) for shard in range(n)), Index(memory))

    run(inside())


def memory_of(block_size: int = 64, n_shards: int = 1, n_workers: int = 4) -> Memory:
    return Memory(ENGINES[:n_workers], block_size=block_size, shards=n_shards, prediction_blocks=4000)


def sent(shard: Shard, route: Route) -> None:
    """The request is on its way, as the exchange would count it."""
    shard.column.begin(route.upstream.worker_idx, route.uncached_tokens, route.decision, 0)
