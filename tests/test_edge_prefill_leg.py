"""sglfast.edge.prefill_leg: two workers serve one request; a shard process between scripted workers, when all goes well."""

import time

import orjson
import pytest
from edge_harness import BOOTSTRAP_PORT, Edge, settled, wait_until
from pair_scripts import DONE, SENT, D, Half, Hang, P, after, fields, rid_of, room_of, stream, unloaded, was_aborted
from raw_client import chunk, post
from scripted_worker import SSE_HEAD, Worker, answer, answer_head, echoes, late, says

from sglfast import _counters as c
from sglfast._breaker import CLOSED, Breakers

# ---- what both get ----


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses"])
def test_both_get_the_bootstrap_fields(target: str, pair: Edge, prefill: Half, decode: Half) -> None:
    found = pair.ask(post(SENT, target=target))
    assert found.status == 200
    assert found.header("x-sgl-decode-url") == [decode.url.encode()]
    (first,), (second,) = prefill.wait_calls(1), decode.calls
    assert first.body == second.body == found.body
    told = fields(first)
    told.pop("rid", None)
    room = told.pop("bootstrap_room")
    assert 0 <= room < 1 << 63
    assert told == {**orjson.loads(SENT), "bootstrap_host": "127.0.0.1", "bootstrap_port": BOOTSTRAP_PORT}
    for call in (first, second):
        assert call.request_line == f"POST {target} HTTP/1.1".encode()
        assert call.header("x-request-id") == [found.request_id]
        assert call.header("x-sgl-decode-url") == [decode.url.encode()]
        assert call.header("content-length") == [b"%d" % len(call.body)]
    assert [call.header("host") for call in (first, second)] == [[b"127.0.0.1:%d" % half.worker.port] for half in (prefill, decode)]


def test_each_request_has_a_room_of_its_own(pair: Edge, prefill: Half, decode: Half) -> None:
    with pair.client() as client:
        for _ in range(20):
            assert client.ask(post(SENT)).status == 200
            unloaded(pair)
    rooms = [room_of(call) for call in prefill.calls]
    assert len(set(rooms)) == 20
    assert rooms == [room_of(call) for call in decode.calls]
    assert prefill.worker.connections == decode.worker.connections == 1, "connections are used again"


def test_a_batch_gets_lists(pair: Edge, prefill: Half, decode: Half) -> None:
    pair.ask(post(b'{"prompt":["a","b"],"n":2}', target="/v1/completions"))
    (call,) = decode.calls
    assert fields(call)["bootstrap_host"] == ["127.0.0.1"] * 4
    assert len(set(room_of(call))) == 4


@pytest.mark.parametrize("body", [b"", b"no JSON", b"[1]"])
def test_a_body_that_is_no_object_goes_to_both_as_it_is(body: bytes, pair: Edge, prefill: Half, decode: Half) -> None:
    assert pair.ask(post(body)).body == body
    assert [call.body for call in (*prefill.wait_calls(1), *decode.calls)] == [body] * 2


def test_what_the_client_says_of_pairs_is_replaced(pair: Edge, prefill: Half, decode: Half) -> None:
    pair.ask(post(b'{"bootstrap_room":1,"bootstrap_host":"evil"}', "x-sgl-decode-url: http://evil", "X-Sgl-Decode-Url: http://evil"))
    for call in (*prefill.wait_calls(1), *decode.calls):
        assert call.header("x-sgl-decode-url") == [decode.url.encode()]
        assert fields(call)["bootstrap_host"] == "127.0.0.1"
        assert room_of(call) != 1


@pytest.mark.parametrize("size", [16_300, 16_400, 2_000_000])
def test_large_bodies(size: int, pair: Edge, prefill: Half, decode: Half) -> None:
    body = b'{"prompt":"' + b"x" * size + b'"}'
    pair.ask(post(body))
    for call in (*prefill.wait_calls(1), *decode.calls):
        assert fields(call)["prompt"] == "x" * size


def test_each_worker_sees_its_own_key(pair_workers: list[Worker], prefill: Half, decode: Half) -> None:
    with Edge(pair_workers, takes_rid=True, roles=["prefill", "decode"]) as pair, settled(pair):
        pair.put_record(P, api_key="of-prefill")
        pair.put_record(D, api_key="of-decode")
        pair.ask(post(SENT, "authorization: Bearer mine"))
        assert prefill.wait_calls(1)[0].header("authorization") == [b"Bearer of-prefill"]
        assert decode.calls[0].header("authorization") == [b"Bearer of-decode"]


def test_the_first_attempt_has_one_rid_for_both(pair: Edge, prefill: Half, decode: Half) -> None:
    found = pair.ask(post(SENT))
    assert rid_of(prefill.wait_calls(1)[0]) == rid_of(decode.calls[0]) == found.request_id.decode()


# ---- whose answer it is ----


def test_the_answer_is_the_decode_worker_s(pair: Edge, prefill: Half, decode: Half) -> None:
    prefill.does(says(answer(b"x" * 500_000)))  # dropped as it comes
    decode.does(says(answer(b"mine", "x-from: decode")))
    with pair.client() as client:
        for _ in range(3):
            found = client.ask(post(SENT))
            assert (found.status, found.body, found.header("x-from")) == (200, b"mine", [b"decode"])
    unloaded(pair)
    assert prefill.aborted == decode.aborted == []


def test_a_stream_goes_on_as_it_comes(pair: Edge, prefill: Half, decode: Half) -> None:
    prefill.does(stream(b"data: first\n\n"))
    decode.does(after(lambda: prefill.calls, stream(*(b"data: %d\n\n" % n for n in range(5)))))
    found = pair.ask(post(SENT))
    assert found.body == b"".join(b"data: %d\n\n" % n for n in range(5))
    assert found.header("x-sgl-decode-url") == [decode.url.encode()]


def test_the_first_event_comes_before_the_last(pair: Edge, prefill: Half, decode: Half) -> None:
    decode.does(lambda call: (stream(b"data: 1\n\n", end=False)(call), late(0.3, chunk(b"data: 2\n\n"), chunk(b""))(call))[0])
    with pair.client() as client:
        client.send(post(SENT))
        client.read_until(b"data: 1")
        assert b"data: 2" not in client.buffer
        client.read_until(b"0\r\n\r\n")


def test_a_head_without_a_body_waits_for_the_prefill_half(pair: Edge, prefill: Half, decode: Half) -> None:
    """Engines send the head of a stream at once; what the prefill half comes to may still lead to another pair."""
    sends = []
    prefill.does(after(lambda: sends, DONE))
    decode.does(lambda call: (call.send(SSE_HEAD), call.wait_for_end(2.0))[0])
    with pair.client() as client:
        client.send(post(SENT))
        decode.wait_calls(1)
        prefill.wait_calls(1)
        assert client.is_silent(0.3)
        sends.append(1)
        assert client.read_head().status == 200, "and no longer"


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_such_a_head_goes_out_with_the_first_byte(version: str, pair: Edge, prefill: Half, decode: Half) -> None:
    hang = Hang()
    prefill.does(hang)
    decode.does(lambda call: (call.send(SSE_HEAD), late(0.1, chunk(b"data: 1\n\n"), chunk(b""))(call))[0])
    with pair.client() as client:
        client.send(post(SENT, version=version))
        found = client.read_head()
        assert found.header("x-sgl-decode-url") == [decode.url.encode()]
        assert client.read_until(b"data: 1\n\n").endswith(b"data: 1\n\n")


def test_a_stream_without_a_byte_is_an_answer(pair: Edge, prefill: Half, decode: Half) -> None:
    prefill.does(late(0.3, answer(b"{}")))
    decode.does(says(answer_head("content-type: text/event-stream", "content-length: 0")))
    with pair.client() as client:
        assert [client.ask(post(SENT)).body for _ in range(2)] == [b"", b""]
    unloaded(pair)


def test_to_a_client_of_http_1_0(pair: Edge, prefill: Half, decode: Half) -> None:
    decode.does(after(lambda: prefill.calls, stream(b"data: 1\n\n", b"data: 2\n\n")))
    with pair.client() as client:
        client.send(post(SENT, version="1.0"))
        assert client.read_head().status == 200
        assert client.read_to_end() == b"data: 1\n\ndata: 2\n\n"


def test_a_pipeline_goes_on(pair: Edge, prefill: Half, decode: Half) -> None:
    with pair.client() as client:
        client.send(b"".join(post(b'{"x":%d}' % number) for number in range(5)))
        assert [orjson.loads(client.read_answer().body)["x"] for _ in range(5)] == [0, 1, 2, 3, 4]


# ---- what is counted ----


def test_both_halves_are_load_until_each_has_ended(pair: Edge, prefill: Half, decode: Half) -> None:
    sends: list[str] = []
    prefill.does(after(lambda: "prefill" in sends, DONE))
    decode.does(after(lambda: "decode" in sends, echoes))
    before = {row: pair.worker_word(row, c.W_OK) for row in (P, D)}
    decisions = sum(pair.word(c.S_DECISIONS + n) for n in range(16))
    with pair.client() as client:
        client.send(post(SENT))
        wait_until(lambda: len(pair.inflight()) == 3, "both count")
        assert pair.inflight() == {"S_INFLIGHT": 2, "W_INFLIGHT_REQUESTS of worker 0": 1, "W_INFLIGHT_REQUESTS of worker 1": 1}
        sends.append("prefill")
        wait_until(lambda: pair.inflight() == {"S_INFLIGHT": 1, "W_INFLIGHT_REQUESTS of worker 1": 1}, "prefill is done")
        sends.append("decode")
        assert client.read_answer().status == 200
    unloaded(pair)
    assert {row: pair.worker_word(row, c.W_OK) - before[row] for row in (P, D)} == {P: 1, D: 1}
    assert sum(pair.word(c.S_DECISIONS + n) for n in range(16)) == decisions + 1, "one choice"


def test_a_prefill_half_may_end_after_the_answer(pair: Edge, prefill: Half, decode: Half) -> None:
    sends: list[int] = []
    prefill.does(after(lambda: sends, DONE))
    before = pair.worker_word(P, c.W_OK)
    with pair.client() as client:
        assert client.ask(post(SENT)).status == 200
        wait_until(lambda: pair.inflight() == {"S_INFLIGHT": 1, "W_INFLIGHT_REQUESTS of worker 0": 1}, "the prefill half goes on")
        sends.append(1)
        unloaded(pair)
    assert pair.worker_word(P, c.W_OK) == before + 1
    assert prefill.aborted == []


def test_but_not_for_ever(pair: Edge, prefill: Half, decode: Half) -> None:
    hang = Hang()
    prefill.does(hang)
    before = pair.worker_word(P, c.W_CANCELLED)
    start = time.monotonic()
    assert pair.ask(post(SENT)).status == 200
    hang.wait()
    assert 4.0 < hang.ended_s[0] - start < 7.5
    was_aborted(prefill)
    unloaded(pair)
    assert pair.worker_word(P, c.W_CANCELLED) == before + 1


def test_the_affinity_is_counted(pair: Edge, prefill: Half, decode: Half) -> None:
    before = pair.word(c.S_AFFINITY_SAME_HOST)
    pair.ask(post(SENT))
    assert pair.word(c.S_AFFINITY_SAME_HOST) == before + 1, "all of these are on one host"


def test_the_request_log_names_both(pair_workers: list[Worker], prefill: Half, decode: Half) -> None:
    for log_format in ("text", "json"):
        with Edge(pair_workers, takes_rid=True, roles=["prefill", "decode"], request_log="all", log_format=log_format) as pair:
            with pair.client() as client:
                client.ask(post(SENT))
                client.ask(post(SENT, "x-request-id: " + "i" * 300))  # by the slow way
            wait_until(lambda: pair.log().count("decode_worker") == 2, pair.log)
            for line in pair.log().splitlines():
                if log_format == "json":
                    found = orjson.loads(line)
                    assert (found["worker"], found["decode_worker"]) == (prefill.url, decode.url)
                    assert found["outcome"] == "ok"
                else:
                    assert f" worker={prefill.url} decode_worker={decode.url} " in line


def test_the_kv_header_describes_the_prefill_worker(pair: Edge, prefill: Half, decode: Half) -> None:
    (found,) = pair.ask(post(SENT, "x-sglfast-kv: 1")).header("x-sglfast-kv")
    assert found.startswith(f"worker={prefill.url}; rank=0;".encode())


def test_a_probe_of_each_worker_closes_its_breaker(pair_workers: list[Worker], prefill: Half, decode: Half) -> None:
    settings = {"disable_circuit_breaker": False, "cb_failure_threshold": 1, "cb_success_threshold": 1, "cb_timeout_duration_secs": 0.3}
    with Edge(pair_workers, takes_rid=True, roles=["prefill", "decode"], **settings) as pair, settled(pair):
        pair.allowed_log = ("circuit",)
        table = Breakers(pair.segment, 0, failure_threshold=1, success_threshold=1, open_secs=0.3, window_secs=60.0)
        for row in (P, D):
            table.failed(row, 1, False, time.monotonic())
        assert pair.ask(post(SENT)).code == "breaker_open"
        assert not prefill.calls
        assert not decode.calls
        wait_until(lambda: pair.ask(post(SENT)).status == 200, "both have had their time")
        wait_until(lambda: table.state(P) == table.state(D) == CLOSED, "one probe each")
