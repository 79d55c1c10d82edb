"""sglfast.edge.given_ids: without a tokenizer, prompts of token ids are looked up in the KV index all the same, and others are not."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from edge_harness import Memory, StubTransport, run, shard_in_loop, stub_client
from raw_client import post

from sglfast._blockhash import page_keys
from sglfast._hashtree import DEVICE, HOST, TreeWriter
from sglfast.edge.given_ids import IdsPromptKeyer, may_be_ids
from sglfast.edge.policy.approximate import ApproximateCacheAware
from sglfast.edge.request import ENDPOINTS, Facts
from sglfast.edge.shard import Shard
from sglfast.shm import Variant

ENGINES = [f"http://10.0.0.{number}:30000" for number in range(1, 4)]
IDS = list(range(5, 1306))
KEYS = page_keys(IDS, 64)
CHAT, COMPLETIONS, GENERATE, EMBEDDINGS = b"/v1/chat/completions", b"/v1/completions", b"/generate", b"/v1/embeddings"


def connected(test: Callable[[Shard, Any, StubTransport], None], **settings: Any) -> None:
    """A shard without a tokenizer whose KV index has 10 of the 20 blocks of IDS at the first worker and 18 at the second."""
    memory = Memory(ENGINES, block_size=64, prediction_blocks=4000)
    writer = TreeWriter(memory.segment)
    writer.store(0, DEVICE.bit_length() - 1, KEYS[:80])
    writer.store(1, HOST.bit_length() - 1, KEYS[:144])

    async def inside() -> None:
        keyer = IdsPromptKeyer(asyncio.get_running_loop())
        shard = shard_in_loop(memory, keyer, **settings)
        try:
            test(shard, *stub_client(shard))
        finally:
            keyer.close()

    run(inside())


def explained(connection: Any, transport: StubTransport, path: bytes, body: dict[str, Any]) -> Any:
    connection.data_received(post(orjson.dumps(body), target=f"/explain{path.decode()}"))
    head, _, found = transport.take().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), found
    return orjson.loads(found)


BODIES: list[tuple[bytes, dict[str, Any]]] = [
    (GENERATE, {"input_ids": IDS}),
    (GENERATE, {"input_ids": [IDS]}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "input_ids": IDS}),
    (COMPLETIONS, {"prompt": IDS}),
    (COMPLETIONS, {"prompt": [IDS]}),
    (EMBEDDINGS, {"input": IDS}),
]


@pytest.mark.parametrize("policy", ["cache_aware", "auto", "round_robin"])
@pytest.mark.parametrize(("path", "body"), BODIES)
def test_overlaps_are_exact(path: bytes, body: dict[str, Any], policy: str) -> None:
    def test(shard: Shard, connection: Any, transport: StubTransport) -> None:
        found = explained(connection, transport, path, body)
        assert (found["prompt_tokens"], found["prompt_blocks"], found["is_approximate"]) == (1301, 20, False)
        assert [row["overlap_blocks"] for row in found["candidates"]] == [10, 18, 0]
        assert [row["overlap_blocks_by_tier"]["host"] for row in found["candidates"]] == [0, 18, 0]
        if policy == "cache_aware":
            assert found["choice"] == {"worker": ENGINES[1], "rank": 0, "decision": "cache_hit"}
            assert [row["score"] for row in found["candidates"]] == [1301 - 640, 1301 - 18 * 64, 1301]

    connected(test, policy=policy)


def test_a_request_goes_where_its_blocks_are_and_text_where_it_was_sent() -> None:
    def test(shard: Shard, connection: Any, transport: StubTransport) -> None:
        routes: list[Any] = []
        router = shard.router
        router.choose(ENDPOINTS[GENERATE], orjson.dumps({"input_ids": IDS}), routes.append)
        assert isinstance(router.pools["demo"].policy, ApproximateCacheAware)
        route = routes[0]
        assert (route.upstream.url, route.overlap_blocks, route.prompt_blocks) == (ENGINES[1], 18, 20)
        assert (route.is_approximate, route.predicted_tokens) == (False, 18 * 64)
        assert b"state=APPROXIMATE" not in router.describe(route)
        text = orjson.dumps({"text": "once upon a time " * 200})
        for _ in range(4):
            router.choose(ENDPOINTS[GENERATE], text, routes.append)
            router.note(routes[-1])
        assert {route.upstream.url for route in routes[2:]} == {routes[1].upstream.url}
        assert all(route.is_approximate for route in routes[1:])

    connected(test, policy="cache_aware")


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (GENERATE, b'{"text":"input_ids"}', False),
        (GENERATE, rb'{"text":"say \"input_ids\" to me"}', False),
        (GENERATE, b'{"input_ids" : [1]}', True),
        (CHAT, b'{"messages":[]}', False),
        (COMPLETIONS, b'{"prompt" :\n[1,2]}', True),
        (COMPLETIONS, b'{"prompt":"[1,2]"}', False),
        (EMBEDDINGS, b'{"input": [[3]]}', True),
        (b"/v1/responses", b'{"input": [{"role": "user"}]}', False),
        (b"/rerank", b'{"input_ids": [1]}', False),
    ],
)
def test_only_what_looks_like_ids_is_parsed(path: bytes, body: bytes, expected: bool) -> None:
    assert may_be_ids(ENDPOINTS[path].kind, body) is expected


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"input_ids": ["a"]}, "tokenizer"),
        ({"input_ids": [IDS, IDS]}, "several|2 prompts"),
        ({"input_ids": []}, "empty"),
        ({"text": "input", "x": {"input_ids": 1}}, "tokenizer"),
        ({"text": "plain"}, "no tokenizer is loaded"),
    ],
)
def test_what_has_no_keys_is_told(body: dict[str, Any], why: str) -> None:
    def test(shard: Shard, connection: Any, transport: StubTransport) -> None:
        found = explained(connection, transport, GENERATE, body)
        assert any(word in found["unkeyed_because"] for word in why.split("|"))
        assert [row["overlap_blocks"] for row in found["candidates"]] == [0, 0, 0]

    connected(test, policy="round_robin")


LONG_TEXT = b'{"input_ids_of":"' + b"once upon a time " * 30_000 + b'","x":1,%b}'


def keyed_later(*bodies: bytes) -> list[Facts]:
    """What the keyer finds in bodies that it does not look at before it returns."""

    async def inside() -> list[Facts]:
        loop = asyncio.get_running_loop()
        keyer = IdsPromptKeyer(loop)
        try:
            found: list[asyncio.Future[Facts]] = [loop.create_future() for _ in bodies]
            for body, facts in zip(bodies, found, strict=True):
                keyer.key(ENDPOINTS[GENERATE].kind, body, (Variant(64),), facts.set_result)
                assert not facts.done(), "a long body is not the loop's to look at"
            return await asyncio.gather(*found)
        finally:
            keyer.close()

    return run(inside())


def test_long_bodies_are_searched_in_the_thread() -> None:
    text, ids = keyed_later(LONG_TEXT % b'"y":2', LONG_TEXT % b'"input_ids":%b' % orjson.dumps(IDS))
    assert (text.keys, text.why_unkeyed) == ({}, "no tokenizer is loaded")
    assert (ids.prompt_tokens, ids.keys) == (1301, {Variant(64): KEYS})


def test_what_no_worker_keys_is_not_looked_at() -> None:
    """Neither here nor in the thread, however long it is."""

    async def inside() -> None:
        keyer = IdsPromptKeyer(asyncio.get_running_loop())
        found: list[Facts] = []
        keyer.key(ENDPOINTS[b"/rerank"].kind, LONG_TEXT, (Variant(64),), found.append)
        keyer.close()
        assert [facts.keys for facts in found] == [{}]

    run(inside())


@pytest.mark.parametrize("at", [*range(65_500, 65_560), 131_060, 196_600])
def test_ids_are_found_across_the_borders_of_the_search(at: int) -> None:
    body = b'{"x":"'.ljust(at - 2, b"y") + b'",' + b'"input_ids" \n :  [1]}' + b" " * 70_000
    assert body.index(b'"input_ids"') == at
    assert may_be_ids(ENDPOINTS[GENERATE].kind, body)
    assert not may_be_ids(ENDPOINTS[GENERATE].kind, body.replace(b"[", b"("))
