"""A worker that refuses the rank that it was told: its client hears nothing of it, and it is told none before control has asked it."""

from collections.abc import Iterator, Sequence

import pytest
from edge_harness import Edge, wait_until
from raw_client import WAIT_S, chunk, post
from scripted_worker import Call, Script, Worker, answer, echoes, says, then_closes
from test_relay_rank import NAME, RANKS, SENT, steered

from sglfast import _counters as c
from sglfast._counters import Column
from sglfast.edge.rank_refusal import RankDoubt, is_about_rank
from sglfast.shm import WorkerRecord, WorkerView

REFUSAL = b'{"object":"error","message":"routed_dp_rank=3 out of range [0, 2)","type":"BadRequestError","code":400}'


def refuses_ranks(call: Call) -> None:
    (says(answer(REFUSAL, status="400 Bad Request")) if call.header(NAME) else echoes)(call)


def told(calls: Sequence[Call]) -> list[bool]:
    """Which of the calls named a rank."""
    return [bool(call.header(NAME)) for call in calls]


@pytest.fixture
def edge(workers: list[Worker]) -> Iterator[Edge]:
    with steered(workers[:1]) as edge:
        yield edge


def confirm(edge: Edge, ranks_asked: int) -> None:
    """Control has asked the worker again, and the shard acts by it."""
    edge.put_record(0, ranks_asked=ranks_asked)
    wait_until(lambda: edge.segment.workers_seen(1) == edge.table.version(), "the shard has seen it")


def test_the_request_goes_to_the_worker_again_as_its_client_wrote_it(edge: Edge, workers: list[Worker]) -> None:
    workers[0].plan(refuses_ranks)
    found = edge.ask(post(SENT))
    assert (found.status, found.body) == (200, SENT)
    assert told(workers[0].calls) == [True, False]
    assert edge.worker_word(0, c.W_RANK_REFUSED) == 1
    for _ in range(5):
        assert edge.ask(post(SENT)).status == 200
    assert told(workers[0].calls) == [True, *[False] * 6], "until control has asked it, it is told none"
    confirm(edge, 1)
    workers[0].plan(echoes)
    assert edge.ask(post(SENT)).status == 200
    assert told(workers[0].calls)[-1], "it has told what it is"


def test_all_that_were_on_their_way_are_saved(edge: Edge, workers: list[Worker]) -> None:
    asked = []

    def late(call: Call) -> None:
        asked.append(call)
        wait_until(lambda: len(asked) >= 4, "four requests are there")
        refuses_ranks(call)

    workers[0].plan(late)
    clients = [edge.client() for _ in range(4)]
    for client in clients:
        client.send(post(SENT))
    assert [client.read_answer().status for client in clients] == [200] * 4
    for client in clients:
        client.sock.close()
    assert told(workers[0].calls).count(True) == 4
    assert edge.worker_word(0, c.W_RANK_REFUSED) == 4


def test_a_client_s_own_mistake_that_speaks_of_ranks_costs_little(edge: Edge, workers: list[Worker]) -> None:
    """Sent twice once; then, as the worker has the ranks that it had, nothing is held against them for a while."""
    mistake = b'{"message":"no such field: dp_rank_3"}'
    workers[0].plan(says(answer(mistake, status="400 Bad Request")))
    assert (edge.ask(post(SENT)).status, edge.ask(post(SENT)).body) == (400, mistake)
    assert told(workers[0].calls) == [True, False, False]
    confirm(edge, 1)
    for _ in range(3):
        assert edge.ask(post(SENT)).body == mistake
    assert told(workers[0].calls) == [True, False, False, True, True, True], "each once, and with a rank"


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "422 Unprocessable Entity"])
@pytest.mark.parametrize(
    "body", [answer(b'{"message":"no such thing"}'), b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nnever\r\n0\r\n\r\n"]
)
def test_other_refusals_are_the_client_s_as_they_come(edge: Edge, workers: list[Worker], status: str, body: bytes) -> None:
    workers[0].plan(says(body.replace(b"200 OK", status.encode())))
    for _ in range(3):
        found = edge.ask(post(SENT))
        assert found.status == int(status[:3])
        assert found.body in (b'{"message":"no such thing"}', b"never")
    assert told(workers[0].calls) == [True] * 3
    assert edge.worker_word(0, c.W_RANK_REFUSED) == 0


@pytest.mark.parametrize("header", ["X-Data-Parallel-Rank: 3", "X-Data-Parallel-Rank: 9"])
def test_a_rank_of_the_client_s_own_is_its_own_business(edge: Edge, workers: list[Worker], header: str) -> None:
    workers[0].plan(refuses_ranks)
    assert edge.ask(post(SENT, header)).body == REFUSAL
    assert len(workers[0].calls) == 1
    assert edge.worker_word(0, c.W_RANK_REFUSED) == 0


def test_a_refusal_without_end_is_passed_on(edge: Edge, workers: list[Worker]) -> None:
    long = b"dp_rank " * 25_000
    workers[0].plan(says(answer(long, status="400 Bad Request")))
    assert edge.ask(post(SENT)).body == long
    assert len(workers[0].calls) == 1


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_refusal_of_another_kind_is_an_answer_like_any_other(workers: list[Worker], pieces: int) -> None:
    """It is counted where it came from, and its head says where that was, as without steering."""
    found = []
    data = answer(b'{"message":"no such thing"}', status="400 Bad Request")
    for dp_aware in (False, True):
        with steered(workers[:1], dp_aware=dp_aware) as edge:
            workers[0].plan(says(*([data] if pieces == 1 else [data[:-5], data[-5:]])))
            got = edge.ask(post(SENT, "x-sglfast-kv: 1"))
            wait_until(lambda: edge.worker_word(0, c.W_CLIENT_ERRORS), "it has left the worker")
            counted = [edge.worker_word(0, word) for word in (c.W_BYTES_OUT, c.W_CLIENT_ERRORS, c.W_ERRORS, c.W_REQUESTS)]
            found.append((got.status, got.body, [value.split(b";")[0] for value in got.header("x-sglfast-kv")], counted))
    assert found[0] == found[1]
    assert found[1][2], "the line that it asked for"
    assert found[1][3] == [27, 1, 0, 1]


def test_a_refusal_that_stalls_is_passed_on_as_far_as_it_has_come(edge: Edge, workers: list[Worker]) -> None:
    workers[0].plan(says(answer(b"x" * 40, status="400 Bad Request")[:-20]))
    with edge.client() as client:
        client.send(post(SENT))
        assert client.read_head().status == 400
        assert client.read_exactly(20) == b"x" * 20
        workers[0].calls[0].send(b"y" * 20)
        assert client.read_exactly(20) == b"y" * 20
        workers[0].plan(echoes)
        assert client.ask(post(SENT)).body == SENT, "the connection is of use"
    assert told(workers[0].calls) == [True, True]


@pytest.mark.parametrize("disable_retries", [False, True])
def test_a_refusal_that_is_cut_is_passed_on_as_it_is(workers: list[Worker], disable_retries: bool) -> None:
    """As one to a request that named no rank: it is no failed attempt."""
    cut = answer(b"x" * 40, status="400 Bad Request")[:-20]
    with steered(workers[:2], disable_retries=disable_retries, retry_initial_backoff_ms=1) as edge:
        for worker in workers[:2]:
            worker.plan(then_closes(cut))
        with edge.client() as client:
            client.send(post(SENT))
            assert client.read_head().status == 400
            assert client.read_to_end() == b"x" * 20
        wait_until(lambda: edge.word(c.S_STREAMS_CUT), "it is counted")
        assert sum(len(worker.calls) for worker in workers[:2]) == 1
        assert edge.word(c.S_RETRIES) == 0


def test_it_is_done_in_the_body_of_generate_too(edge: Edge, workers: list[Worker]) -> None:
    def script(call: Call) -> None:
        (says(answer(REFUSAL, status="400 Bad Request")) if b"routed_dp_rank" in call.body else echoes)(call)

    workers[0].plan(script)
    body = b'{"text":"p"}'
    assert edge.ask(post(body, target="/generate")).body == body
    assert len(workers[0].calls) == 2


def test_the_second_attempt_may_fail_like_any_other(workers: list[Worker]) -> None:
    """It names no rank whatever control has found meanwhile, and goes elsewhere when it fails."""
    with steered(workers[:2], disable_retries=False, retry_initial_backoff_ms=1, policy="round_robin") as edge:

        def script(call: Call) -> None:
            if call.header(NAME):
                edge.put_record(0, ranks_asked=edge_asked.pop())
                says(answer(REFUSAL, status="400 Bad Request"))(call)
            else:
                says(answer(b"no", status="500 Internal Server Error"))(call)

        edge_asked = [3, 2, 1]
        workers[0].plan(script)
        workers[1].plan(echoes)
        for _ in range(2):
            assert edge.ask(post(SENT)).status == 200
        assert told(workers[0].calls) == [True, False]


def test_the_breaker_hears_of_a_failure_behind_a_refused_rank(workers: list[Worker]) -> None:
    with steered(workers[:1], cb_failure_threshold=2, disable_circuit_breaker=False, disable_retries=True) as edge:
        edge.allowed_log = ("circuit is open",)

        def script(call: Call) -> None:
            refusal, failure = answer(REFUSAL, status="400 Bad Request"), answer(b"no", status="500 Internal Server Error")
            says(refusal if call.header(NAME) else failure)(call)

        workers[0].plan(script)
        assert [edge.ask(post(SENT)).status for _ in range(3)] == [500, 500, 503]
        assert told(workers[0].calls) == [True, False, False]
        wait_until(lambda: edge.worker_word(0, c.W_ERRORS) == 2, "both are counted")


def test_a_request_whose_rank_was_refused_names_none_at_the_next_worker(workers: list[Worker]) -> None:
    """It is sent again once for that, however many workers have come back with fewer ranks."""
    with steered(workers[:2], disable_retries=False, retry_initial_backoff_ms=1, policy="round_robin") as edge:

        def script(call: Call) -> None:
            (refuses_ranks if call.header(NAME) else says(answer(b"no", status="500 Internal Server Error")))(call)

        for worker in workers[:2]:
            worker.plan(script)
        assert edge.ask(post(SENT)).status == 500
        assert [told(worker.calls).count(True) for worker in workers[:2]] in ([1, 0], [0, 1])


@pytest.mark.parametrize("has_other", [False, True])
def test_the_second_attempt_waits_for_room_like_any_other(workers: list[Worker], has_other: bool) -> None:
    """The place that the first has left is another shard's by then."""
    with steered(
        workers[: 1 + has_other], shards=2, worker_max_in_flight=1, queue_size=4, queue_timeout_secs=WAIT_S, policy="round_robin"
    ) as edge:
        other_shard = Column(edge.segment, 1)
        taken: list[int] = []

        def script(call: Call) -> None:
            if call.header(NAME):
                taken.append(workers.index(call.worker))
                other_shard.begin(taken[-1], 0, 16, 0)
                refuses_ranks(call)
            else:
                echoes(call)

        for worker in workers:
            worker.plan(script)
        with edge.client() as client:
            client.send(post(SENT))
            if has_other:
                assert client.read_answer().body == SENT
                assert told(workers[1 - taken[0]].calls) == [False], "there is room"
            else:
                wait_until(lambda: edge.word(c.S_WAITING) == 1, "it waits")
                assert len(workers[0].calls) == 1
            other_shard.end(taken[0], 0, c.W_OK, 0)
            if not has_other:
                assert client.read_answer().body == SENT
                assert told(workers[0].calls) == [True, False]


# ---- in a stream of /generate, under status 200 ----

EVENT_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
ERROR_EVENT = b'data: {"error":{"message":"%b","type":"invalid_request_error","code":400,"retryable":false}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM_BODY = b'{"text":"p","stream":true}'


def streams(first: bytes, *, is_split: bool = True) -> Script:
    pieces = [EVENT_STREAM_HEAD, chunk(first), chunk(DONE) + b"0\r\n\r\n"]
    return says(*(pieces if is_split else [b"".join(pieces)]))


@pytest.mark.parametrize("is_split", [False, True])
def test_a_rank_that_is_refused_in_a_stream_fails_that_one_only(edge: Edge, workers: list[Worker], is_split: bool) -> None:
    refusal = ERROR_EVENT % b"routed_dp_rank=3 out of range [0, 2)"
    workers[0].plan(streams(refusal, is_split=is_split))
    assert edge.ask(post(STREAM_BODY, target="/generate")).body == refusal + DONE
    assert edge.worker_word(0, c.W_RANK_REFUSED) == 1
    workers[0].plan(echoes)
    assert edge.ask(post(STREAM_BODY, target="/generate")).body == STREAM_BODY, "it is told no rank"
    confirm(edge, 1)
    assert b"routed_dp_rank" in edge.ask(post(STREAM_BODY, target="/generate")).body


@pytest.mark.parametrize(
    "first", [ERROR_EVENT % b"the prompt is too long", b'data: {"text":"of an {\\"error\\": routed_dp_rank=3 out of range}"}\n\n'],
    ids=["another error", "a text of it"],
)  # fmt: skip
def test_other_streams_say_nothing_of_ranks(edge: Edge, workers: list[Worker], first: bytes) -> None:
    workers[0].plan(streams(first))
    for _ in range(2):
        assert edge.ask(post(STREAM_BODY, target="/generate")).body == first + DONE
    assert all(b"routed_dp_rank" in call.body for call in workers[0].calls)
    assert edge.worker_word(0, c.W_RANK_REFUSED) == 0


def test_a_stream_that_refuses_its_client_s_own_rank_is_its_own_business(edge: Edge, workers: list[Worker]) -> None:
    workers[0].plan(streams(ERROR_EVENT % b"routed_dp_rank=3 out of range [0, 2)"))
    edge.ask(post(b'{"text":"p","stream":true,"routed_dp_rank":3}', target="/generate"))
    assert edge.worker_word(0, c.W_RANK_REFUSED) == 0


# ---- the doubt itself ----


@pytest.mark.parametrize(
    ("text", "is_it"),
    [
        (b"routed_dp_rank=3 out of range [0, 2)", True),
        (b"routed_dp_rank=3 invalid for dp_size=1", True),
        (b"data_parallel_rank 5 is out of range", True),
        (b"Data-Parallel rank 5", True),
        (b"data parallel rank 5", True),
        (b"DP rank 3", True),
        (b"the model bge-reranker-v2 is not known", False),
        (b"the tensor has rank 3", False),
        (b"frank", False),
        (b"parallel_tool_calls is no ranking", False),
    ],
)
def test_what_is_said_of_ranks(text: bytes, is_it: bool) -> None:
    assert is_about_rank(b'{"message":"' + text + b'"}') is is_it


def view(ranks_asked: int, dp_size: int = RANKS, rank_ways: str = "hhr") -> WorkerView:
    record = WorkerRecord(url="http://w", rank_ways=rank_ways, ranks_asked=ranks_asked)
    return WorkerView(
        worker_idx=0, generation=1, state=2, rank_base=0, dp_size=dp_size, block_size=0, bigram=False, record=record
    )  # fmt: skip


def test_false_alarms_are_heeded_ever_more_seldom() -> None:
    doubt, now_s, pauses = RankDoubt(), 100.0, []
    for ranks_asked in range(9):
        assert doubt.heeds(now_s)
        doubt.begin(view(ranks_asked))
        assert doubt.ways(view(ranks_asked), now_s) == b""
        assert doubt.heeds(now_s), "for those that are on their way"
        assert doubt.ways(view(ranks_asked + 1), now_s) == b"hhr"
        pause_s = next(n for n in range(100) if doubt.heeds(now_s + n))
        pauses.append(pause_s)
        now_s += pause_s
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    doubt.begin(view(20))
    assert doubt.ways(view(21, RANKS - 1), now_s) == b"hhr"
    assert doubt.heeds(now_s), "that one was none"


@pytest.mark.parametrize("known", [view(0, RANKS + 1), view(0, RANKS - 1), view(0, rank_ways="ddd")])
def test_what_is_new_of_the_worker_ends_the_doubt(known: WorkerView) -> None:
    """Control has heard of it in some other way than by asking for this shard."""
    doubt = RankDoubt()
    doubt.begin(view(0))
    assert doubt.ways(view(0), 1.0) == b""
    assert doubt.ways(known, 1.0) == known.record.rank_ways.encode()
    assert doubt.ways(view(0), 1.0) == b"hhr"
    assert doubt.heeds(1.0)


def test_a_worker_that_is_not_steered_any_more_is_not_in_doubt(edge: Edge, workers: list[Worker]) -> None:
    workers[0].plan(refuses_ranks)
    assert edge.ask(post(SENT)).status == 200
    for rank_ways in ("", "hhr-h"):  # it has come back with one rank, and later with those that it had
        edge.put_record(0, rank_ways=rank_ways)
        wait_until(lambda: edge.segment.workers_seen(1) == edge.table.version(), "the shard has seen it")
    workers[0].plan(echoes)
    assert edge.ask(post(SENT)).status == 200
    assert told(workers[0].calls) == [True, False, True]
