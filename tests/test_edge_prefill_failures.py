"""sglfast.edge.prefill_leg, when one half of a pair fails, in each order. One attempt: what the client gets, what the other half sees."""

import time

import orjson
import pytest
from edge_harness import Edge, settled
from pair_scripts import AT_ONCE_S, DONE, ROLES, SENT, D, Ends, Half, Hang, P, after, status, unloaded, was_aborted
from raw_client import chunk, post
from scripted_worker import SSE_HEAD, Call, RefusingPort, Script, SilentPort, Worker, answer, echoes, says, then_closes

# ---- the prefill half fails ----

PREFILL_FAILS: dict[str, tuple[Script, str]] = {
    "resets": (Call.reset, "error"),
    "closes": (Call.close, "error"),
    "closes inside its head": (then_closes(b"HTTP/1.1 200 OK\r\ncontent-le"), "error"),
    "closes inside its body": (then_closes(answer(b"x" * 100)[:-50]), "error"),
    "speaks no HTTP": (says(b"hello\r\n\r\n"), "error"),
    "500": (status("500 Internal Server Error"), "error"),
    "500 without an end": (says(answer(b"x" * 100, status="500 Internal Server Error")[:-50]), "error"),
    "502": (status("502 Bad Gateway"), "error"),
    "503": (status("503 Service Unavailable"), "busy"),
}


@pytest.mark.parametrize("name", PREFILL_FAILS)
def test_the_decode_half_is_ended_and_the_client_told(name: str, pair: Edge, prefill: Half, decode: Half) -> None:
    hang, ends = Hang(), Ends(pair)
    script, outcome = PREFILL_FAILS[name]
    prefill.does(after(lambda: decode.calls, script))
    decode.does(hang, echoes)
    with pair.client() as client:
        start = time.monotonic()
        found = client.ask(post(SENT))
        assert (found.status, found.code) == (502, "prefill_failed")
        assert found.header("x-sgl-decode-url") == []
        hang.wait()
        assert hang.ended_s[0] - start < AT_ONCE_S
        was_aborted(decode)
        unloaded(pair)
        assert ends.found == ([outcome], ["cancelled"])
        prefill.does(DONE)
        assert client.ask(post(SENT)).status == 200, "the connection goes on, and nothing else came on it"


@pytest.mark.parametrize(
    "line", ["400 Bad Request", "413 Content Too Large", "422 Unprocessable Content", "429 Too Many Requests", "501 No"]
)
def test_what_the_prefill_worker_refuses_is_the_client_s_answer(line: str, pair: Edge, prefill: Half, decode: Half) -> None:
    hang, ends = Hang(), Ends(pair)
    prefill.does(after(lambda: decode.calls, status(line)), DONE)
    decode.does(hang, echoes)
    with pair.client() as client:
        found = client.ask(post(SENT))
        assert (found.status, found.body, found.header("x-why"), found.code) == (int(line[:3]), b'{"error":"why"}', [b"because"], None)
        assert found.header("x-sgl-decode-url") == []
        hang.wait()
        was_aborted(decode)
        unloaded(pair)
        assert ends.found == (["busy" if line.startswith("429") else "client_error"], ["cancelled"])
        assert client.ask(post(SENT)).status == 200
    assert prefill.aborted == []


@pytest.mark.parametrize("size", [10, 300_000])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_such_a_refusal_comes_whole_whatever_its_form(size: int, version: str, pair: Edge, prefill: Half, decode: Half) -> None:
    body = b"x" * size

    def in_chunks(call: Call) -> None:
        call.send(SSE_HEAD.replace(b"200 OK", b"400 Bad Request").replace(b"text/event-stream", b"text/plain"))
        for at in range(0, size, 10_000):
            call.send(chunk(body[at : at + 10_000]))
        call.send(chunk(b""))

    prefill.does(after(lambda: decode.calls, in_chunks))
    decode.does(Hang())
    with pair.client() as client:
        client.send(post(SENT, version=version))
        if version == "1.0":
            assert client.read_head().status == 400
            assert client.read_to_end() == body
        else:
            found = client.read_answer()
            assert (found.status, found.body) == (400, body)
    was_aborted(decode)
    unloaded(pair)


def test_a_refusal_that_breaks_off(pair: Edge, prefill: Half, decode: Half) -> None:
    ends = Ends(pair)
    prefill.does(after(lambda: decode.calls, then_closes(answer(b"x" * 100, status="400 Bad Request")[:-50])))
    decode.does(Hang())
    with pair.client() as client:
        client.send(post(SENT))
        assert client.read_head().status == 400
        assert client.read_to_end() == b"x" * 50
    was_aborted(decode)
    unloaded(pair)
    assert ends.found == (["error"], ["cancelled"])


def test_a_client_that_leaves_during_a_refusal(pair: Edge, prefill: Half, decode: Half) -> None:
    hang, ends = Hang(answer(b"x" * 100, status="400 Bad Request")[:-50]), Ends(pair)
    prefill.does(after(lambda: decode.calls, hang))
    decode.does(Hang())
    with pair.client() as client:
        client.send(post(SENT))
        client.read_head()
    hang.wait()
    was_aborted(decode)
    unloaded(pair)
    assert ends.found == (["cancelled"], ["cancelled"])
    was_aborted(prefill)


@pytest.mark.parametrize("make", [RefusingPort, SilentPort])
def test_a_prefill_worker_that_takes_no_connection(make: type, pair_workers: list[Worker], decode: Half) -> None:
    hang = Hang()
    decode.does(hang)
    port = make()
    with Edge([port, pair_workers[D]], takes_rid=True, roles=ROLES, connect_timeout_secs=0.5) as pair, settled(pair):
        pair.allowed_log = ("cannot be reached",)
        ends = Ends(pair)
        found = pair.ask(post(SENT))
        assert (found.status, found.code) == (502, "prefill_failed")
        unloaded(pair)
        if make is SilentPort or decode.calls:  # else its connection was just being opened
            hang.wait()
            was_aborted(decode)
        assert ends.found == (["error"], ["cancelled"])
    port.close()


def test_a_prefill_half_that_hangs(pair_workers: list[Worker], prefill: Half, decode: Half) -> None:
    hangs = Hang(), Hang()
    prefill.does(hangs[P])
    decode.does(hangs[D])
    with Edge(pair_workers, takes_rid=True, roles=ROLES, request_timeout_secs=1.0) as pair, settled(pair):
        ends = Ends(pair)
        found = pair.ask(post(SENT))
        assert (found.status, found.code) == (504, "upstream_timeout")
        for hang, half in zip(hangs, (prefill, decode), strict=True):
            hang.wait()
            was_aborted(half)
        unloaded(pair)
        assert ends.found == (["error"], ["cancelled"]), "the decode half could not but wait"


@pytest.mark.parametrize("fails", ["500", "closes", "400"])
def test_in_the_middle_of_a_stream_it_ends_with_an_error_event(fails: str, pair: Edge, prefill: Half, decode: Half) -> None:
    ends, sends = Ends(pair), []
    script = {"500": status("500 No"), "closes": Call.close, "400": status("400 Bad Request")}[fails]
    prefill.does(after(lambda: sends, script))
    hang = Hang(SSE_HEAD, chunk(b"data: 1\n\n"))
    decode.does(hang)
    with pair.client() as client:
        client.send(post(SENT))
        assert client.read_head().status == 200
        client.read_until(b"data: 1\n\n\r\n")
        sends.append(1)
        event, end = client.read_to_end().split(b"\r\n", 1)[1].rsplit(b"\r\n0\r\n\r\n", 1)
        assert orjson.loads(event.strip().removeprefix(b"data: "))["error"]["code"] == "prefill_failed"
        assert end == b""
    hang.wait()
    was_aborted(decode)
    unloaded(pair)
    assert ends.found == (["client_error" if fails == "400" else "error"], ["cancelled"])


def test_in_the_middle_of_a_plain_answer_the_connection_is_closed(pair: Edge, prefill: Half, decode: Half) -> None:
    sends: list[int] = []
    prefill.does(after(lambda: sends, Call.close))
    decode.does(Hang(answer(b"x" * 100)[:-50]))
    with pair.client() as client:
        client.send(post(SENT))
        client.read_until(b"x" * 50)
        sends.append(1)
        assert client.has_ended()
    was_aborted(decode)
    unloaded(pair)


# ---- the decode half fails ----

DECODE_FAILS: dict[str, tuple[Script, int, str | None, str]] = {
    "resets": (Call.reset, 502, "upstream_closed", "error"),
    "closes inside its head": (then_closes(b"HTTP/1.1 200 OK\r\ncontent-le"), 502, "upstream_closed", "error"),
    "speaks no HTTP": (says(b"hello\r\n\r\n"), 502, "upstream_bad_response", "error"),
    "500": (status("500 Internal Server Error"), 500, None, "error"),
    "503": (status("503 Service Unavailable"), 503, None, "busy"),
    "429": (status("429 Too Many Requests"), 429, None, "busy"),
    "400": (status("400 Bad Request"), 400, None, "client_error"),
}


@pytest.mark.parametrize("name", DECODE_FAILS)
def test_the_prefill_half_is_ended_and_the_client_told(name: str, pair: Edge, prefill: Half, decode: Half) -> None:
    hang, ends = Hang(), Ends(pair)
    script, code, reason, outcome = DECODE_FAILS[name]
    prefill.does(hang, DONE)
    decode.does(after(lambda: prefill.calls, script), echoes)
    with pair.client() as client:
        start = time.monotonic()
        found = client.ask(post(SENT))
        assert (found.status, found.code) == (code, reason)
        hang.wait()
        assert hang.ended_s[0] - start < AT_ONCE_S
        was_aborted(prefill)
        unloaded(pair)
        assert ends.found == (["cancelled"], [outcome])
        assert client.ask(post(SENT)).status == 200


@pytest.mark.parametrize("make", [RefusingPort, SilentPort])
def test_a_decode_worker_that_takes_no_connection(make: type, pair_workers: list[Worker], prefill: Half) -> None:
    hang = Hang()
    prefill.does(hang)
    port = make()
    with Edge([pair_workers[P], port], takes_rid=True, roles=ROLES, connect_timeout_secs=0.5) as pair, settled(pair):
        pair.allowed_log = ("cannot be reached",)
        ends = Ends(pair)
        found = pair.ask(post(SENT))
        assert found.code == ("upstream_unreachable" if make is RefusingPort else "upstream_timeout")
        unloaded(pair)
        if make is SilentPort or prefill.calls:
            hang.wait()
            was_aborted(prefill)
        assert ends.found == (["cancelled"], ["error"])
    port.close()


def test_a_decode_half_that_hangs_behind_a_prefill_half_that_is_done(pair_workers: list[Worker], prefill: Half, decode: Half) -> None:
    hang = Hang()
    decode.does(hang)
    with Edge(pair_workers, takes_rid=True, roles=ROLES, request_timeout_secs=1.0) as pair, settled(pair):
        ends = Ends(pair)
        assert pair.ask(post(SENT)).code == "upstream_timeout"
        hang.wait()
        was_aborted(decode)
        unloaded(pair)
        assert ends.found == (["ok"], ["error"])
    assert prefill.aborted == []


def test_a_decode_worker_that_dies_in_the_middle_of_its_stream(pair: Edge, prefill: Half, decode: Half) -> None:
    hang, ends = Hang(), Ends(pair)
    prefill.does(hang)
    decode.does(after(lambda: prefill.calls, then_closes(SSE_HEAD, chunk(b"data: 1\n\n"))))
    with pair.client() as client:
        client.send(post(SENT))
        assert client.read_head().status == 200
        body = client.read_to_end()
    assert b"upstream_body_incomplete" in body
    assert body.endswith(b"\r\n0\r\n\r\n")
    hang.wait()
    was_aborted(prefill)
    unloaded(pair)
    assert ends.found == (["cancelled"], ["error"])
