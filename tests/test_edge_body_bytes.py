"""--max-buffered-bytes: how many bytes of request bodies a shard holds, counted from the first piece until nobody needs them."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
from edge_harness import Edge, Memory, run, settled, shard_in_loop, stub_client, wait_until
from raw_client import Client, chunk, post
from scripted_worker import SSE_HEAD, Call, Worker, answer, echoes

from sglfast import _counters as c
from sglfast.edge.request import Facts
from sglfast.shm import Variant

PATH = b"/v1/chat/completions"
LIMIT = 300_000
LARGE = 200_000


@pytest.fixture(scope="module")
def shard_of_one(worker: Worker) -> Iterator[Edge]:
    with Edge([worker], max_payload_size=LARGE, max_buffered_bytes=LIMIT, disable_health_check=True) as edge:
        yield edge


@pytest.fixture
def edge(shard_of_one: Edge, worker: Worker) -> Iterator[Edge]:
    worker.plan(echoes)
    with settled(shard_of_one):
        yield shard_of_one


def head(size: int, *headers: str, target: bytes = PATH) -> bytes:
    lines = "".join(f"{line}\r\n" for line in (*headers, f"content-length: {size}"))
    return b"POST %b HTTP/1.1\r\nhost: x\r\n%b\r\n" % (target, lines.encode())


def held(edge: Edge, n_bytes: int) -> None:
    wait_until(lambda: edge.word(c.S_BODY_BYTES) == n_bytes, lambda: f"{n_bytes} are held, not {edge.word(c.S_BODY_BYTES)}")


def half_sent(edge: Edge, client: Client, n_bytes: int = LARGE - 1) -> None:
    """A body of LARGE bytes, of which so many have come."""
    client.send(head(LARGE) + b"x" * n_bytes)
    held(edge, n_bytes)


def refused(client: Client) -> None:
    found = client.read_answer()
    assert (found.status, found.code, found.header("retry-after")) == (503, "bodies_full", [b"1"])
    assert found.closes


def test_a_body_for_which_there_is_no_room_is_refused_by_its_head(edge: Edge) -> None:
    with edge.client() as first, edge.client() as second:
        half_sent(edge, first)
        second.send(head(LIMIT - LARGE + 2, "expect: 100-continue"))
        refused(second)
        assert edge.ask(post(b"y" * 1000)).body == b"y" * 1000, "a small one has room"
        assert edge.ask(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").status == 200
        first.send(b"x")
        assert len(first.read_answer().body) == LARGE
        held(edge, 0)


SENT: dict[str, Callable[[int], bytes]] = {
    "by its length": lambda size: head(LARGE) + b"x" * size,
    "in chunks": lambda size: b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n%b" % (PATH, chunk(b"x" * size)),
    "for llhttp": lambda size: head(LARGE, target=b"http://x" + PATH) + b"x" * size,
}


@pytest.mark.parametrize("name", SENT)
def test_a_body_that_outgrows_the_room_is_refused_in_the_middle(name: str, edge: Edge) -> None:
    with edge.client() as first, edge.client() as second:
        second.send(SENT[name](50_000))
        wait_until(lambda: edge.word(c.S_BODY_BYTES) >= 50_000, "it begins")
        first.send(head(LARGE) + b"x" * (LARGE - 1))
        wait_until(lambda: edge.word(c.S_BODY_BYTES) >= LARGE + 49_999, "both are held")
        second.send(chunk(b"x" * 60_000) if name == "in chunks" else b"x" * 60_000)
        refused(second)
        held(edge, LARGE - 1)
        first.send(b"x")
        assert len(first.read_answer().body) == LARGE


@pytest.mark.parametrize("name", SENT)
def test_who_leaves_takes_it_along(name: str, edge: Edge) -> None:
    with edge.client() as client:
        client.send(SENT[name](50_000))
        wait_until(lambda: edge.word(c.S_BODY_BYTES) >= 50_000, "it begins")
    held(edge, 0)


def test_it_is_held_until_the_answer_begins(edge: Edge, worker: Worker) -> None:
    def script(call: Call) -> None:
        started.append(call)
        assert call.wait_for_end()

    started: list[Call] = []
    worker.plan(script)
    with edge.client() as first, edge.client() as second:
        first.send(post(b"x" * LARGE))
        wait_until(lambda: started, "the worker has it")
        held(edge, LARGE)
        second.send(head(LARGE))
        refused(second)
        started[0].send(SSE_HEAD)
        first.read_head()
        held(edge, 0)


def test_it_is_held_for_a_further_attempt(worker: Worker) -> None:
    worker.plan(lambda call: call.send(answer(b"busy", status="503 Service Unavailable")))
    settings = {"disable_retries": False, "retry_initial_backoff_ms": 300, "retry_max_retries": 2}
    with Edge([worker], **settings) as edge, settled(edge), edge.client() as client:  # type: ignore[arg-type]
        client.send(post(b"x" * 1000))
        worker.wait_calls(1)
        held(edge, 1000)
        worker.wait_calls(2)
        assert client.read_answer().body == b"busy"
        held(edge, 0)


@pytest.mark.parametrize("path", [b"/v1/tokenize", b"/explain/v1/chat/completions"])
def test_paths_that_answer_later(path: bytes, edge: Edge) -> None:
    answer = edge.ask(head(2, "content-type: application/json", target=path) + b"{}")
    assert answer.status in (200, 404)
    held(edge, 0)


def test_administration_counts_too(edge: Edge) -> None:
    assert edge.ask(head(2, target=b"/workers") + b"{}").code == "control_unavailable"
    held(edge, 0)


class LateKeyer:
    """Keeps bodies until the test lets them go."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[Facts], None]] = []

    def key(self, kind: int, body: bytes, variants: tuple[Variant, ...], then: Callable[[Facts], None], **_: object) -> None:
        self.waiting.append(then)


def test_the_tokenizer_may_hold_it_longer_than_its_client() -> None:
    memory, keyer = Memory(["http://127.0.0.1:1"], block_size=64), LateKeyer()

    async def test() -> None:
        shard = shard_in_loop(memory, keyer, policy="cache_aware", tokenizer_path=None)
        client, _ = stub_client(shard)
        client.data_received(post(b'{"model":"demo","messages":[]}'))
        assert len(keyer.waiting) == 1
        client.connection_lost(None)
        assert memory.word(c.S_BODY_BYTES) == 30
        keyer.waiting[0](Facts(0, {}, "late"))
        assert memory.word(c.S_BODY_BYTES) == 0
        assert memory.gauges() == {}

    run(test())


def test_settings_follow() -> None:
    memory = Memory(["http://127.0.0.1:1"])

    async def test() -> None:
        shard = shard_in_loop(memory, max_payload_size=1000, max_buffered_bytes=1500)
        client, _ = stub_client(shard)
        client.data_received(head(1000) + b"x" * 600)
        shard.apply(dataclasses.replace(shard.config, max_buffered_bytes=1000))
        other, refusal = stub_client(shard)
        other.data_received(head(500))
        assert b"bodies_full" in refusal.take()
        client.connection_lost(None)
        other.connection_lost(None)
        assert memory.gauges() == {}

    run(test())


def test_a_body_of_any_size_that_is_allowed_has_room() -> None:
    memory = Memory(["http://127.0.0.1:1"])

    async def test() -> None:
        shard = shard_in_loop(memory, max_payload_size=1000, max_buffered_bytes=10)
        client, transport = stub_client(shard)
        client.data_received(head(1000) + b"x" * 999)
        assert transport.take() == b""
        assert memory.word(c.S_BODY_BYTES) == 999
        client.connection_lost(None)

    run(test())
