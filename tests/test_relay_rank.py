"""How a worker is told the rank that is to serve a request: what goes over the wire, what counts as load, and when it is given back."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
from edge_harness import Edge, Memory, run, settled, shard_in_loop, stub_client, stub_upstream, wait_until
from hypothesis import given
from hypothesis import strategies as st
from raw_client import WAIT_S, post
from scripted_worker import Call, Script, Worker, answer, echoes, says, then_closes

from sglfast import _counters as c
from sglfast._relay import names_rank

RANKS = 4
NAME = "x-data-parallel-rank"
SENT = b'{"model":"demo","prompt":"p"}'
SGLANG = {"dp_aware": True, "dp_size": RANKS, "rank_ways": "hhr-h"}


@contextmanager
def steered(workers: Sequence[Worker], **settings: object) -> Iterator[Edge]:
    with Edge(workers, **SGLANG | settings) as edge, settled(edge):  # type: ignore[arg-type]
        yield edge


def ranks_told(calls: Sequence[Call]) -> list[int]:
    found = [call.header(NAME) for call in calls]
    assert all(len(values) == 1 for values in found)
    return [int(values[0]) for values in found]


# ---- what the body says itself ----


@pytest.mark.parametrize("key", [b"routed_dp_rank", b"data_parallel_rank"])
@pytest.mark.parametrize("at", range(11, 260))
def test_a_rank_is_found_wherever_it_stands(key: bytes, at: int) -> None:
    front = b'{"a":"' + b"x" * (at - 8) + b'",'
    assert names_rank(front + b'"%b":1}' % key)
    assert names_rank(front + b'"%b" : null,"b":"' % key + b"y" * 300 + b'"}')
    for near in (b'"%bs":1}' % key, b'"x%b":1}' % key, b'"\\"%b\\"":1}' % key, b'"_rank":1}', b'"dp_rank":1}'):
        assert not names_rank(front + near + b" " * 80)


@given(st.text('_rank"dpouted{}:\\', max_size=200).map(str.encode))
def test_nothing_else_is_taken_for_one(body: bytes) -> None:
    assert names_rank(body) == (b'"routed_dp_rank"' in body or b'"data_parallel_rank"' in body)


# ---- over the wire ----


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_the_header_is_there_once_and_the_body_as_it_was(workers: list[Worker], target: str) -> None:
    with steered(workers[:1]) as edge, edge.client() as client:
        for _ in range(3 * RANKS):
            assert client.ask(post(SENT, target=target)).body == SENT
        assert set(ranks_told(workers[0].calls)) <= set(range(RANKS))
        assert len(set(ranks_told(workers[0].calls))) > 1, "idle ranks are equal"


def test_generate_is_told_in_front_of_its_body(workers: list[Worker]) -> None:
    for rid in (False, True):
        with steered(workers[:1], takes_rid=rid) as edge, edge.client() as client:
            client.ask(post(b' \n{ "text":"p"}', target="/generate"))
            (call,) = workers[0].calls
            assert not call.header(NAME)
            fields = json.loads(call.body)
            assert list(fields) == (["rid"] if rid else []) + ["routed_dp_rank", "text"]
            assert fields["routed_dp_rank"] in range(RANKS)
            assert call.header("content-length") == [b"%d" % len(call.body)]


def test_the_two_hundred_and_fifty_fifth_rank(workers: list[Worker]) -> None:
    """Numbers of more than one digit, and bodies that are not copied."""
    body = b'{"text":"' + b"x" * 100_000 + b'"}'
    with steered(workers[:1], dp_size=64) as edge, edge.client() as client:
        for _ in range(30):
            client.ask(post(body, target="/generate"))
        told = [json.loads(call.body)["routed_dp_rank"] for call in workers[0].calls]
        assert max(told) > 9
        assert all(json.loads(call.body)["text"] == "x" * 100_000 for call in workers[0].calls)


def test_an_old_sglang_is_told_in_the_body_everywhere(workers: list[Worker]) -> None:
    with steered(workers[:1], rank_ways="ddd") as edge, edge.client() as client:
        for target in ("/v1/chat/completions", "/v1/completions", "/generate"):
            client.ask(post(SENT, target=target))
        assert [list(json.loads(call.body)) for call in workers[0].calls] == [["data_parallel_rank", "model", "prompt"]] * 3
        assert not any(call.header(NAME) for call in workers[0].calls)


@pytest.mark.parametrize(
    ("target", "body"),
    [("/v1/embeddings", SENT), ("/v1/rerank", SENT), ("/generate", b"[1]"), ("/generate", b"{}"), ("/generate", b""), ("/generate", b'{"')],
)
def test_what_cannot_be_told_a_rank_goes_as_it_is(target: str, body: bytes, workers: list[Worker]) -> None:
    with steered(workers[:1]) as edge:
        seen: list[dict[str, int]] = []
        workers[0].plan(lambda call: (seen.append(edge.inflight()), echoes(call))[1])
        if body == b'{"':  # an object for all that is looked at: told, and the worker says what is wrong with it
            assert edge.ask(post(body, target=target)).body.startswith(b'{"routed_dp_rank":')
            return
        assert edge.ask(post(body, target=target)).body == body
        (call,) = workers[0].calls
        assert not call.header(NAME)
        assert not any("rank" in name for name in seen[0]), "nobody knows which rank has it"


@pytest.mark.parametrize("header", ["X-Data-Parallel-Rank: 7", "x-data-parallel-rank:7", "X-Override-Routed-Dp-Rank: 7"])
def test_a_client_s_own_header_wins(header: str, workers: list[Worker]) -> None:
    name = header.partition(":")[0].lower()
    with steered(workers[:1]) as edge:
        seen: list[dict[str, int]] = []
        workers[0].plan(lambda call: (seen.append(edge.inflight()), echoes(call))[1])
        for target in ("/v1/chat/completions", "/generate"):
            assert edge.ask(post(SENT, header, target=target)).body == SENT
        for call in workers[0].calls:
            assert call.header(name) == [b"7"]
            assert len(call.header(NAME)) == (name == NAME)
        assert not any("rank" in key for found in seen for key in found)


@pytest.mark.parametrize("key", ["routed_dp_rank", "data_parallel_rank"])
@pytest.mark.parametrize("target", ["/v1/chat/completions", "/generate"])
def test_a_client_s_own_field_wins(key: str, target: str, workers: list[Worker]) -> None:
    body = json.dumps({"model": "demo", key: 3}).encode()
    with steered(workers[:1]) as edge:
        assert edge.ask(post(body, target=target)).body == body
        assert not workers[0].calls[0].header(NAME)


def test_unusual_heads_are_no_way_around(workers: list[Worker]) -> None:
    """Read by llhttp, then in the plain form."""
    with steered(workers[:1]) as edge:
        own = post(SENT, "X-Data-Parallel-Rank: 2").replace(b"POST /v1", b"POST http://x/v1")
        assert edge.ask(own).status == 200
        assert workers[0].calls[0].header(NAME) == [b"2"]


@pytest.mark.parametrize(
    "settings",
    [{"dp_aware": False}, {"dp_size": 1}, {"rank_ways": ""}, {"roles": ("decode", "prefill")}],
    ids=lambda each: next(iter(each)),
)
def test_who_is_not_steered(settings: dict[str, object], workers: list[Worker]) -> None:
    with steered(workers[:2], **settings) as edge:
        for _ in range(4):
            assert edge.ask(post(SENT)).status == 200
        assert not any(call.header(NAME) for worker in workers for call in worker.calls)


# ---- load ----


def load_of_ranks(edge: Memory) -> tuple[int, int]:
    rows = [edge.totals.rank(rank) for rank in range(edge.segment.max_ranks)]
    return sum(row[0] for row in rows), sum(row[1] for row in rows)


def test_load_counts_at_the_rank_that_was_told(workers: list[Worker]) -> None:
    seen: list[tuple[int, list[list[int]]]] = []

    def look(call: Call) -> None:
        seen.append((int(call.header(NAME)[0]), [edge.totals.rank(rank) for rank in range(2 * RANKS)]))
        echoes(call)

    workers[1].plan(look)
    with steered(workers[:2]) as edge:
        for _ in range(6):
            edge.ask(post(SENT))
        assert len(seen) == 3, "every second one, by turns"
        for rank, rows in seen:
            assert rows == [[int(place == RANKS + rank), 0] for place in range(2 * RANKS)], "worker 1's ranks come behind worker 0's"


def test_ranks_are_filled_evenly_while_requests_last(workers: list[Worker]) -> None:
    def hold(call: Call) -> None:
        wait_until(lambda: is_over, "all have come", WAIT_S)
        echoes(call)

    is_over = False
    workers[0].plan(hold)
    with steered(workers[:1]) as edge, ExitStack() as open_ones:
        clients = [open_ones.enter_context(edge.client()) for _ in range(3 * RANKS)]
        for client in clients:
            client.send(post(SENT))
        wait_until(lambda: load_of_ranks(edge)[0] == 3 * RANKS, "all are in flight")
        assert [edge.totals.rank(rank)[0] for rank in range(RANKS)] == [3] * RANKS
        is_over = True
        for client in clients:
            assert client.read_answer().status == 200


@pytest.mark.parametrize("how", ["answered", "cut", "reset", "left", "refused", "retried"])
def test_load_is_given_back_however_it_ends(how: str, workers: list[Worker]) -> None:
    scripts: dict[str, Script] = {
        "answered": echoes,
        "cut": then_closes(answer(b"x" * 100)[:-40]),
        "reset": Call.reset,
        "left": lambda call: None if call.wait_for_end() else call.close(),
        "refused": says(answer(b"no", status="400 Bad Request")),
        "retried": says(answer(b"no", status="503 Service Unavailable")),
    }
    for worker in workers[:2]:
        worker.plan(scripts[how])
    with steered(workers[:2], disable_retries=how != "retried", retry_initial_backoff_ms=1) as edge:
        edge.allowed_log = ("worker cannot be reached",)
        for _ in range(4):
            with edge.client() as client:
                client.send(post(SENT))
                if how == "left":
                    wait_until(lambda: load_of_ranks(edge)[0], "it is counted")
                    client.reset()
                elif how != "cut":
                    client.read_answer()
        wait_until(lambda: load_of_ranks(edge) == (0, 0), "nothing is left")
        if how == "retried":
            assert len(workers[0].calls) + len(workers[1].calls) == 4 * 5
            for worker in workers[:2]:
                told = [call.header(NAME) for call in worker.calls]
                assert all(len(values) <= 1 for values in told)
                # The first attempt at a worker names a rank; a further one does not, because it is the rank that may be ill.
                assert sum(map(len, told)) == 4


def test_tokens_are_load_until_the_first_byte() -> None:
    memory = Memory(["http://127.0.0.1:9"], dp_size=RANKS, rank_ways="hh")

    async def test() -> None:
        shard = shard_in_loop(memory, dp_aware=True)
        client, _ = stub_client(shard)
        connection, wire = stub_upstream(shard)
        client.data_received(post(SENT))
        exchange = client.exchange
        rank = exchange.rank
        assert memory.totals.rank(rank) == [1, 0]
        assert b"\r\n%b: %d\r\n" % (NAME.encode(), rank) in wire.take()
        shard.column.begin_rank(rank, 70)  # as if it had brought so many tokens
        shard.column.begin(0, 70, 0, 0)
        exchange.tokens = 70
        connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        assert memory.totals.rank(rank) == [2, 70]
        connection.data_received(b"o")
        assert memory.totals.rank(rank) == [2, 0]
        connection.data_received(b"k")
        assert memory.totals.rank(rank) == [1, 0]
        assert (exchange.rank, exchange.dp_rank) == (-1, rank)

    run(test())


def test_a_request_that_is_sent_once_more_goes_to_the_same_rank(workers: list[Worker]) -> None:
    """Its pooled connection had died: it has not left the worker, nor the rank."""
    with steered(workers[:1]) as edge, edge.client() as client:
        workers[0].plan(echoes, Call.reset, echoes)
        client.ask(post(SENT))
        assert client.ask(post(SENT)).body == SENT
        assert edge.word(c.S_RESENDS) == 1
        _, second, third = ranks_told(workers[0].calls)
        assert second == third
        wait_until(lambda: load_of_ranks(edge) == (0, 0), "nothing is left")


# ---- the log ----


@pytest.mark.parametrize("request_id", ["plain", "needs quotes"])
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_the_request_log_names_the_rank(log_format: str, request_id: str, workers: list[Worker]) -> None:
    workers[0].reset()
    with Edge(workers[:1], **SGLANG | {"request_log": "all", "log_format": log_format}) as edge:  # type: ignore[arg-type]
        edge.ask(post(SENT, f"x-request-id: {request_id}"))
        edge.ask(post(SENT, f"x-request-id: {request_id}", target="/v1/embeddings"))
        told = int(workers[0].calls[0].header(NAME)[0])
        first, second = wait_until(lambda: len(lines := edge.log().splitlines()) >= 2 and lines, "two lines")
        if log_format == "json":
            assert (json.loads(first)["rank"], "rank" in json.loads(second)) == (told, False)
        else:
            assert f" rank={told} decision=" in first
            assert " rank=" not in second
