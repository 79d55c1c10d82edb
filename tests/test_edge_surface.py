"""Paths of the data plane beyond chat: relayed as they are, counted in load, unknown ones only when asked for."""

import json
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


@pytest.fixture
def edge(patient_shard: Edge, worker: Worker) -> Iterator[Edge]:
    worker.plan(echoes)
    with settled(patient_shard):
        yield patient_shard


def test_every_endpoint_has_a_kind_that_prompts_know() -> None:
    assert {RequestKind(endpoint.kind) for endpoint in ENDPOINTS.values()} == set(RequestKind)


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/completions", "/generate", "/v1/embeddings", "/v1/responses", "/v1/classify", "/v1/rerank"],
)
def test_relayed_and_counted(path: str, edge: Edge, worker: Worker) -> None:
    before = edge.worker_word(0, c.W_REQUESTS)
    body = b'{"unknown_field": [1, 2],  "odd" :  "spaces are kept"}'
    assert edge.ask(post(body, target=path)).body == body
    assert worker.calls[-1].request_line == f"POST {path} HTTP/1.1".encode()
    assert edge.worker_word(0, c.W_REQUESTS) == before + 1


@pytest.mark.parametrize("query", ["", "?a=1&b"])
def test_workers_have_rerank_under_v1(query: str, edge: Edge, worker: Worker) -> None:
    assert edge.ask(post(b'{"query":"a"}', target=f"/rerank{query}")).status == 200
    assert worker.calls[-1].request_line == f"POST /v1/rerank{query} HTTP/1.1".encode()


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


@pytest.mark.parametrize(
    "path",
    ["/v1/../flush_cache", "/v1/a/../../x", "/v1/%2e%2e/x", "/v1/.%2E/x", "/v1/a/..;b/x", "/v1/..\\x", "/v1/a%2f..%2f..%2fx", "/v1/./x"],
)
def test_passthrough_stays_under_v1(path: str, open_shard: Edge, worker: Worker) -> None:
    """A worker may sit behind a server that follows the dots, and what lies outside of /v1/ there is not for clients."""
    worker.plan(echoes)
    before = len(worker.calls)
    with settled(open_shard):
        assert open_shard.ask(post(target=path)).status == 404
        assert len(worker.calls) == before


def test_one_model(worker: Worker) -> None:
    with Edge([worker], models=["org/model 1"]) as edge, settled(edge):
        for path in ("/v1/models/org/model%201", "/v1/models/org%2Fmodel%201"):
            row = json.loads(edge.ask(request("GET", path)).body)
            assert (row["id"], row["object"]) == ("org/model 1", "model")
        assert edge.ask(request("GET", "/v1/models/org")).code == "model_not_found"
        with edge.client() as client:
            client.send(request("HEAD", "/v1/models/org/model%201"))
            assert client.read_answer(is_head=True).status == 200
