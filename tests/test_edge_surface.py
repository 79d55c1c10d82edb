"""Paths of the data plane beyond chat: relayed as they are, counted in load, unknown ones only when asked for."""

from collections.abc import Iterator

import pytest
from edge_harness import Edge, settled, wait_until
from raw_client import post, request
from scripted_worker import Worker, echoes

from sglfast import _counters as c
from sglfast.edge.request import ENDPOINTS
from sglfast.prompt.keys import RequestKind


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    worker.plan(echoes)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def shard(worker: Worker) -> Iterator[Edge]:
    with Edge([worker]) as edge:
        yield edge


@pytest.fixture
def edge(shard: Edge, worker: Worker) -> Iterator[Edge]:
    worker.plan(echoes)
    with settled(shard):
        yield shard


def test_every_endpoint_has_a_kind_that_prompts_know() -> None:
    assert {RequestKind(endpoint.kind) for endpoint in ENDPOINTS.values()} == set(RequestKind)


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/completions", "/generate", "/v1/embeddings", "/v1/responses", "/v1/classify", "/v1/rerank", "/rerank"],
)
def test_relayed_and_counted(path: str, edge: Edge, worker: Worker) -> None:
    before = edge.worker_word(0, c.W_REQUESTS)
    body = b'{"unknown_field": [1, 2],  "odd" :  "spaces are kept"}'
    assert edge.ask(post(body, target=path)).body == body
    assert worker.calls[-1].request_line == f"POST {path} HTTP/1.1".encode()
    assert edge.worker_word(0, c.W_REQUESTS) == before + 1


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/audio/transcriptions"])
def test_unknown_paths_are_refused_with_the_way_out(path: str, edge: Edge) -> None:
    answer = edge.ask(post(target=path))
    assert (answer.status, answer.code) == (404, "not_found")
    assert b"--passthrough" in answer.body


@pytest.fixture(scope="module")
def open_shard(worker: Worker) -> Iterator[Edge]:
    with Edge([worker], passthrough=True) as edge:
        yield edge


def test_passthrough(open_shard: Edge, worker: Worker) -> None:
    worker.plan(echoes)
    with settled(open_shard):
        for target in ("/v1/messages", "/v1/messages/count_tokens?beta=true", "/v1/a/b"):
            assert open_shard.ask(post(b"[1]", target=target)).body == b"[1]"
            assert worker.calls[-1].request_line == f"POST {target} HTTP/1.1".encode()
        wait_until(lambda: open_shard.worker_word(0, c.W_OK) == 3, "all are counted")
        assert open_shard.ask(post(target="/v2/other")).status == 404
        assert open_shard.ask(request("GET", "/v1/messages")).status == 404
        assert open_shard.ask(request("DELETE", "/v1/messages")).status in (404, 405)
