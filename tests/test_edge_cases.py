"""HTTP requests of tests/cases/http at a real shard: whole, byte by byte, cut at random, and many on one connection.

Every case must give the same answer however its bytes arrive, and must leave the connection where the next request begins.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import SeededRandom
from edge_harness import Edge
from raw_client import Answer, Client
from scripted_worker import Call, Worker


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request and what must be seen of it; the fields are explained in tests/cases/http/good.toml."""

    name: str
    sent: bytes
    status: int
    why: str = ""
    code: str | None = None
    body: bytes | None = None
    allow: str | None = None
    closes: bool = False
    says_keep_alive: bool = False
    is_head: bool = False
    may_continue: bool = False
    relayed: str | None = None
    headers: tuple[str, ...] = ()
    payload: bytes | None = None


def load() -> list[Case]:
    cases = []
    for path in sorted((Path(__file__).parent / "cases" / "http").glob("*.toml")):
        for name, fields in tomllib.loads(path.read_text(encoding="utf-8")).items():
            known: dict[str, Any] = {"name": f"{path.stem}-{name}", **fields}
            for key in ("sent", "body", "payload"):
                if key in known:
                    known[key] = known[key].encode("latin-1")
            known["headers"] = tuple(known.get("headers", ()))
            cases.append(Case(**known))
    return cases


CASES = load()
CLOSING = [case for case in CASES if case.closes]
STAYING = [case for case in CASES if not case.closes]


def check_answer(case: Case, found: Answer) -> None:
    assert (found.status, found.code) == (case.status, case.code), found.raw_head
    assert found.interim in ([], [100] if case.may_continue else [])
    assert found.request_id
    assert found.closes == case.closes, found.raw_head
    if case.says_keep_alive:
        assert found.header("connection") == [b"keep-alive"]
    assert found.header("allow") == ([case.allow.encode()] if case.allow else [])
    assert len(found.header("content-length")) == 1
    if case.is_head:
        assert int(found.header("content-length")[0]) > 0
    if case.body is not None:
        assert found.body == case.body


def check_call(case: Case, call: Call, found: Answer) -> None:
    assert case.relayed is not None, f"{case.name} must not reach a worker"
    assert call.request_line == case.relayed.encode("latin-1")
    lines = call.head.split(b"\r\n")[1:-2]
    assert lines[0] == b"host: " + call.worker.url.removeprefix("http://").encode()
    assert lines[1 : 1 + len(case.headers)] == [line.encode("latin-1") for line in case.headers]
    # The last two are always ours.
    assert lines[1 + len(case.headers) :] == [b"x-request-id: " + found.request_id, b"content-length: %d" % len(call.body)]
    assert call.body == (case.payload if case.payload is not None else case.body)


def check(case: Case, worker: Worker, client: Client) -> None:
    """The case was sent as the only request: its answer, what the worker saw, and how the connection goes on."""
    found = client.read_answer(is_head=case.is_head)
    check_answer(case, found)
    if case.relayed is None:
        assert worker.calls == [], f"{case.name} must not reach a worker"
    else:
        [call] = worker.wait_calls(1)
        check_call(case, call, found)
    if case.closes:
        assert client.read_to_end() == b""
    else:
        assert client.ask(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").status == 200


def test_there_are_cases() -> None:
    assert len(CLOSING) > 40
    assert len(STAYING) > 25
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_whole(case: Case, edge: Edge, worker: Worker) -> None:
    with edge.client() as client:
        client.send(case.sent)
        check(case, worker, client)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_byte_by_byte(case: Case, edge: Edge, worker: Worker) -> None:
    with edge.client() as client:
        for at in range(len(case.sent)):
            client.send_what_fits(case.sent[at : at + 1])
        check(case, worker, client)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_cut_at_random(case: Case, edge: Edge, worker: Worker, rng: SeededRandom) -> None:
    for _ in range(3):
        with edge.client() as client:
            points = sorted(rng.randrange(len(case.sent) + 1) for _ in range(3))
            for start, end in zip([0, *points], [*points, len(case.sent)], strict=True):
                client.send_what_fits(case.sent[start:end])
            check(case, worker, client)
        worker.reset()


@pytest.mark.parametrize("size_bytes", [1, 7, 100, 10**6])
def test_pipelines(size_bytes: int, edge: Edge, worker: Worker, rng: SeededRandom) -> None:
    """Twenty requests at once, in pieces of this size; the last one ends the connection. Answers come in order."""
    for last in rng.sample(CLOSING, 4):
        cases = [*rng.choices(STAYING, k=19), last]
        data = b"".join(case.sent for case in cases)
        with edge.client() as client:
            for at in range(0, len(data), size_bytes):
                client.send_what_fits(data[at : at + size_bytes])
            answers = []
            for case in cases:
                answers.append(client.read_answer(is_head=case.is_head))
                check_answer(case, answers[-1])
            assert client.read_to_end() == b""
        relayed = iter(worker.wait_calls(sum(case.relayed is not None for case in cases)))
        for case, found in zip(cases, answers, strict=True):
            if case.relayed is not None:
                check_call(case, next(relayed), found)
        assert list(relayed) == []
        worker.reset()
