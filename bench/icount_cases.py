"""The calls whose instructions `make icount` counts.

A case is a function with the decorator below: it prepares everything and returns the call to repeat. It imports what it
measures inside, so that a case runs although another's module is not built. Its name is its key in icount.json.

As a program (icount.py runs it under valgrind): `icount_cases.py NAME TIMES`.
"""

import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from icount_events import EVENT_CASES
from icount_prompts import PROMPT_CASES

if TYPE_CHECKING:
    from sglfast._segment import Segment
    from sglfast.edge.shard import Shard
    from sglfast.shm import Role

Call = Callable[[], object]

CASES: dict[str, Callable[[], Call]] = {}


def case(prepare: Callable[[], Call]) -> Callable[[], Call]:
    CASES[prepare.__name__] = prepare
    return prepare


# ---- tokens to block keys ----


@case
def page_keys_of_8192_tokens_by_64() -> Call:
    """What a shard does for an uncached prompt of 8,192 tokens (portable SHA-256: valgrind knows no SHA-NI)."""
    from sglfast._blockhash import page_keys

    return partial(page_keys, list(range(8192)), 64)


@case
def token_keys_of_8192_tokens_by_16() -> Call:
    """The same for a vLLM worker: the token route's chain."""
    from array import array

    from sglfast._blockhash import token_keys

    return partial(token_keys, array("I", range(8192)), 16, seed=1)


@case
def token_keys_of_a_list_of_8192_tokens_by_64() -> Call:
    """From Python ints, as callers that have no buffer bring them."""
    from sglfast._blockhash import token_keys

    return partial(token_keys, list(range(8192)), 64, seed=1)


# ---- a chat prompt to block keys, as far as anybody owns its blocks; its parts ----

for prepare in PROMPT_CASES:
    case(prepare)


def chat_body(texts: list[str]) -> bytes:
    """A chat request whose messages have these texts."""
    messages = ",".join(f'{{"role":"{("user", "assistant")[n % 2]}","content":"{text}"}}' for n, text in enumerate(texts))
    return f'{{"model":"m","messages":[{messages}],"temperature":0.7,"stream":true}}'.encode()


# ---- KV events: decoded, and applied to the tree ----

for prepare in EVENT_CASES:
    case(prepare)


# ---- the hash tree in shared memory: match, apply ----


@case
def tree_match_of_128_blocks_over_64_ranks() -> Call:
    """A shard's question for a prompt of 128 blocks that 64 ranks own to different depths."""
    from sglfast._hashtree import TreeReader, TreeWriter

    _, segment = small_segment()
    writer, keys = TreeWriter(segment), block_keys(128)
    for rank in range(64):
        writer.store(rank, 0, keys[: 8 * (2 * rank + 2)])
    return partial(TreeReader(segment).match, keys)


@case
def tree_store_and_remove_of_128_blocks() -> Call:
    """What index does with a BlockStored of 128 pages and the BlockRemoved of the same."""
    from sglfast._hashtree import TreeWriter

    _, segment = small_segment()
    writer, keys = TreeWriter(segment), block_keys(128)

    def store_and_remove() -> None:
        writer.store(3, 0, keys)
        writer.remove(3, 7, keys)

    return store_and_remove


# ---- predictions ----


@case
def text_keys_of_a_32_kb_chat() -> Call:
    """A body's prompt and its keys from the raw bytes: all that cache_aware reads of a request without events."""
    from sglfast._predicted import text_keys

    return partial(text_keys, chat_of_32_kb())


@case
def predictions_match_of_a_32_kb_chat() -> Call:
    """What a shard asks for a prompt that was sent to 64 ranks, to different depths."""
    from sglfast._predicted import KEEP, Predictions, PredictionWriter, text_keys

    _, segment = small_segment()
    shard, writer, keys = Predictions(segment, 0), PredictionWriter(segment), text_keys(chat_of_32_kb())[0]
    for rank in range(64):
        writer.own(rank, 1)
        shard.put(KEEP, rank, 1, keys[: 8 * (rank + 10)])
    writer.drain()
    return partial(shard.match, keys)


@case
def prediction_of_a_32_kb_chat_to_ring_and_table() -> Call:
    """A shard puts a prompt's record into its ring, at its first token another, and index applies both."""
    from sglfast._predicted import SENT, SETTLED, Predictions, PredictionWriter, text_keys

    _, segment = small_segment()
    shard, writer, keys = Predictions(segment, 0), PredictionWriter(segment), text_keys(chat_of_32_kb())[0]
    writer.own(5, 1)

    def predict() -> None:
        shard.put(SENT, 5, 1, keys, 1000)
        shard.put(SETTLED, 5, 1, keys, 1000)
        assert writer.drain(1000) == 2

    return predict


@case
def choice_for_a_32_kb_chat_that_nobody_owns_with_predictions() -> Call:
    """From block keys to route: tree, predictions, policy, and the record of the choice."""
    import asyncio
    import logging

    from sglfast._counters import W_INFLIGHT_TOKENS
    from sglfast._predicted import PredictionWriter
    from sglfast._workers import READY, WorkerTable
    from sglfast.boot import Boot
    from sglfast.config import ServeConfig
    from sglfast.edge.request import Facts
    from sglfast.edge.shard import Shard
    from sglfast.shm import Variant, WorkerRecord, WorkerView, put_worker

    _, segment = small_segment()
    table, writer = WorkerTable(segment), PredictionWriter(segment)
    for i in range(4):
        at = WorkerRecord(url=f"http://127.0.0.1:{9001 + i}", model="m")
        view = WorkerView(worker_idx=i, generation=0, state=READY, rank_base=i, dp_size=1, block_size=64, bigram=False, record=at)
        put_worker(table, view, is_new=True)
        writer.own(i, 1)
    config = ServeConfig(worker_urls=("http://x",), policy="cache_aware", tokenizer_path="x", shards=1)
    boot = Boot(config=config, segment=segment, control=None, shard=0, listener=None, control_address="")  # type: ignore[arg-type]
    router = Shard(boot, asyncio.new_event_loop(), None, logging.getLogger("icount")).router
    router.refresh()
    for i in range(1, 4):  # so that it is always the same one: where its predictions lie in the table decides about some of the cost
        router._shard.column.add_worker(i, W_INFLIGHT_TOKENS, 1)
    pool, facts, body = router.pools["m"], Facts(8000, {Variant(64): bytes(range(8))}, is_estimated=True), chat_of_32_kb()

    def choose() -> None:
        router.note(router._choose_keyed(pool, facts, body))
        writer.drain(1000)

    return choose


def chat_of_32_kb() -> bytes:
    """A chat body of 20 messages."""
    import orjson

    text = "for every word that was said before there is a block of tokens " * 25
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"{n} {text}"} for n in range(20)]
    return orjson.dumps({"model": "m", "messages": messages, "stream": True, "max_tokens": 100})


# ---- ModelExpress records ----


@case
def split_publish_of_1000_tensors() -> Call:
    """Tensor descriptors taken out of a publish, as for one rank of a large model."""
    from sglfast._mxrecord import split

    def field(number: int, data: bytes) -> bytes:
        return bytes((number << 3 | 2, len(data) & 127 | 128, len(data) >> 7 & 127 | 128, len(data) >> 14)) + data

    tensors = [field(3, field(1, b"model.layers.%04d.weight" % i) + b"\x10\x80\x80\x80\x80\x20\x18\x80\x20") for i in range(1000)]
    request = field(2, b"".join(tensors))
    return partial(split, request)


# ---- HTTP heads: request, response ----

CHAT_BODY = b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % (b"hello world " * 160)
CHAT_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:30000\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
    b"Accept: application/json\r\nContent-Type: application/json\r\nUser-Agent: OpenAI/Python 2.8.0\r\nX-Stainless-Lang: python\r\n"
    b"X-Stainless-Package-Version: 2.8.0\r\nX-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\nX-Stainless-Runtime: CPython\r\n"
    b"X-Stainless-Runtime-Version: 3.11.7\r\nAuthorization: Bearer sk-0123456789\r\nX-Stainless-Async: false\r\n"
    b"x-stainless-retry-count: 0\r\nContent-Length: %d\r\n\r\n" % len(CHAT_BODY)
)
ANSWER_BODY = b'{"id":"chatcmpl-1","choices":[{"index":0,"message":{"role":"assistant","content":"%b"}}]}' % (b"hello " * 60)
ANSWER = (
    b"HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 09:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %d\r\n"
    b"content-type: application/json\r\n\r\n%b" % (len(ANSWER_BODY), ANSWER_BODY)
)


@case
def scan_request_with_the_headers_of_the_openai_client() -> Call:
    from sglfast._httphead import scan_request

    return partial(scan_request, CHAT_HEAD + CHAT_BODY, 65536)


@case
def scan_response_of_uvicorn() -> Call:
    from sglfast._httphead import scan_response

    return partial(scan_response, ANSWER, 65536)


# ---- the whole request path without the kernel: what a relayed request costs in our own code ----


class Wire:
    """A transport that takes everything and sends nothing."""

    def write(self, data: bytes) -> None: ...

    def writelines(self, parts: tuple[bytes, ...]) -> None: ...

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


def shard_with_four_workers(*, takes_rid: bool = False, roles: "tuple[Role, ...]" = ("regular",) * 4, dp_size: int = 1) -> "Shard":
    import asyncio
    import logging

    from sglfast._workers import READY, WorkerTable
    from sglfast.boot import Boot
    from sglfast.config import ServeConfig
    from sglfast.edge.shard import Shard
    from sglfast.shm import WorkerRecord, WorkerView, put_worker

    _, segment = small_segment()
    urls = tuple(f"http://127.0.0.1:{9001 + i}" for i in range(4))
    for i, url in enumerate(urls):
        record = WorkerRecord(url=url, model="m", takes_rid=takes_rid, role=roles[i], bootstrap_port=8998, rank_ways="hhr")
        view = WorkerView(i, 0, READY, i * dp_size, dp_size, 0, False, record)
        put_worker(WorkerTable(segment), view, is_new=True)
    config = ServeConfig(worker_urls=urls, policy="round_robin", shards=1, dp_aware=True)
    boot = Boot(config, segment, None, 0, None, "")  # type: ignore[arg-type]
    shard = Shard(boot, asyncio.new_event_loop(), None, logging.getLogger("icount"))
    shard.router.refresh()
    return shard


@case
def relay_of_a_2_kb_chat_round_robin() -> Call:
    """Bytes of a request in, bytes of the answer out, over connections that exist already."""
    return relay(takes_rid=False)


@case
def relay_of_a_2_kb_chat_that_gets_a_rid() -> Call:
    """The same to an SGLang that is told when the client leaves."""
    return relay(takes_rid=True)


@case
def relay_of_a_2_kb_chat_that_is_steered_to_a_rank() -> Call:
    """The same under --dp-aware to workers of eight ranks: the idlest is chosen, told by a header, and has the load."""
    return relay(takes_rid=False, dp_size=8)


def relay(*, takes_rid: bool, dp_size: int = 1) -> Call:
    from sglfast.edge.server import ClientConnection
    from sglfast.edge.upstream import UpstreamConnection

    shard = shard_with_four_workers(takes_rid=takes_rid, dp_size=dp_size)
    connections = []
    for upstream in shard.router.pools["m"].upstreams:
        connection = UpstreamConnection(upstream)
        connection.connection_made(Wire())  # type: ignore[arg-type]
        upstream.give_back(connection)
        connections.append(connection)
    client = ClientConnection(shard)
    client.connection_made(Wire())  # type: ignore[arg-type]
    request = CHAT_HEAD + CHAT_BODY

    def relay_one() -> None:
        client.data_received(request)
        assert client.exchange is not None
        assert client.exchange.connection is not None
        client.exchange.connection.data_received(ANSWER)

    return relay_one


@case
def relay_of_a_2_kb_chat_to_a_pair() -> Call:
    """The same to two workers at once, by round robin over two prefill workers; the second answer is the client's."""
    from sglfast.edge.server import ClientConnection
    from sglfast.edge.upstream import UpstreamConnection

    shard = shard_with_four_workers(takes_rid=True, roles=("prefill", "prefill", "decode", "decode"))
    pool = shard.router.pools["m"]
    assert pool.decodes is not None
    for upstream in (*pool.upstreams, *pool.decodes.upstreams):
        connection = UpstreamConnection(upstream)
        connection.connection_made(Wire())  # type: ignore[arg-type]
        upstream.give_back(connection)
    client = ClientConnection(shard)
    client.connection_made(Wire())  # type: ignore[arg-type]
    request = CHAT_HEAD + CHAT_BODY

    def relay_one() -> None:
        client.data_received(request)
        exchange = client.exchange
        assert exchange is not None
        assert exchange.pair is not None
        assert exchange.pair.connection is not None
        assert exchange.connection is not None
        exchange.pair.connection.data_received(ANSWER)
        exchange.connection.data_received(ANSWER)

    return relay_one


@case
def tick_over_10000_idle_connections() -> Call:
    """One turn of the sweep: a fifth of them is looked at."""
    from sglfast.edge.server import ClientConnection

    shard = shard_with_four_workers()
    for _ in range(10_000):
        ClientConnection(shard).connection_made(Wire())  # type: ignore[arg-type]
    return partial(shard.clients.sweep, 0, shard.now_s)


def small_segment() -> tuple[int, "Segment"]:
    """A shared-memory segment for one shard and 64 ranks; its file descriptor keeps it."""
    from sglfast.shm import create

    return create(max_workers=64, max_ranks=64, max_shards=1, capacity_blocks=1 << 16, prediction_blocks=1 << 14)


def block_keys(n: int) -> bytes:
    """n block keys, 8 bytes each, the same on every run."""
    return b"".join((i * 0x9E3779B97F4A7C15 & (1 << 64) - 1).to_bytes(8, "little") for i in range(1, n + 1))


def main() -> None:
    name, times = sys.argv[1], int(sys.argv[2])
    call = CASES[name]()
    call()  # what is made once only is made now
    gc.collect()
    gc.disable()
    for _ in range(times):
        call()


if __name__ == "__main__":
    main()
