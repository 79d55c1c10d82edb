"""sglfast._httphead: one-pass heads and chunked framing, example by example and against llhttp (tests/fuzz_httphead.py)."""

import pytest
from conftest import SeededRandom
from fuzz_httphead import fuzz

from sglfast._httphead import MORE, TOO_LARGE, UNUSUAL, Chunks, RequestHead, ResponseHead, scan_request, scan_response

LIMIT = 1 << 16
LINE = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"


def request_head(lines: bytes, line: bytes = LINE, limit: int = LIMIT) -> RequestHead:
    found = scan_request(line + lines + b"\r\n", limit)
    assert isinstance(found, RequestHead), found
    return found


def response_head(lines: bytes, line: bytes = b"HTTP/1.1 200 OK\r\n") -> ResponseHead:
    found = scan_response(line + lines + b"\r\n", LIMIT)
    assert isinstance(found, ResponseHead), found
    return found


# ---- requests ----


def test_request_head_in_full() -> None:
    data = (
        b"POST /v1/completions?a=b HTTP/1.1\r\nHOST:h:80\r\nAuthorization:  Bearer x \t\r\nX-Request-Id: id-7\r\nContent-Length: 12\r\n"
        b"X-Mixed-CASE: v\r\nConnection: keep-alive\r\nexpect: 100-Continue\r\nx-sglfast-kv: 1\r\n\r\nbody bytes!!next"
    )
    head = scan_request(data, LIMIT)
    assert isinstance(head, RequestHead)
    assert (head.method, head.target) == (b"POST", b"/v1/completions?a=b")
    assert head.kept == b"Authorization:  Bearer x \t\r\nX-Request-Id: id-7\r\nX-Mixed-CASE: v\r\n"
    assert (head.content_length, head.is_chunked, head.head_bytes) == (12, False, data.index(b"body bytes"))
    assert (head.keeps_alive, head.is_http10, head.n_hosts) == (True, False, 1)
    assert (head.expects_continue, head.expects_other, head.wants_kv, head.request_id) == (True, False, True, b"id-7")


def test_a_head_without_anything() -> None:
    head = request_head(b"")
    assert (head.kept, head.content_length, head.is_chunked, head.request_id) == (b"", -1, False, None)
    assert (head.expects_continue, head.expects_other, head.wants_kv, head.keeps_alive) == (False, False, False, True)


def test_every_cut_of_a_head_waits() -> None:
    data = LINE + b"Accept: */*\r\nContent-Length: 3\r\nConnection: x-a\r\nx-a: \t1 \r\n\r\n"
    assert [scan_request(data[:at], LIMIT) for at in range(len(data))] == [MORE] * len(data)
    answer = b"HTTP/1.1 200 All is well\r\nContent-Type: a/b\r\nContent-Length: 3\r\n\r\n"
    assert [scan_response(answer[:at], LIMIT) for at in range(len(answer))] == [MORE] * len(answer)


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (b"te: trailers\r\nUpgrade: h2c\r\nKeep-Alive: timeout=5\r\nProxy-Connection: close\r\na: 1\r\n", b"a: 1\r\n"),
        (b"Proxy-Authorization: x\r\nProxy-Authenticate: y\r\nTransfer-Encoding: chunked\r\n", b""),
        (b"Connection: X-One, x-two\r\nx-one: 1\r\nX-TWO: 2\r\nx-three: 3\r\nx-one: 4\r\n", b"x-three: 3\r\n"),
        (b"x-one: 1\r\nConnection: close\r\nconnection: x-one\r\n", b""),
        (b"Trailer: x\r\nVia: 1.1 a\r\nForwarded: for=b\r\n", b"Trailer: x\r\nVia: 1.1 a\r\nForwarded: for=b\r\n"),
        (b"tea: 1\r\nupgrades: 2\r\nconnection-x: 3\r\nhosts: 4\r\n", b"tea: 1\r\nupgrades: 2\r\nconnection-x: 3\r\nhosts: 4\r\n"),
    ],
    ids=["hop-by-hop", "proxy and framing", "named", "named after", "end-to-end", "similar names"],
)
def test_kept_lines_of_a_request(lines: bytes, kept: bytes) -> None:
    assert request_head(lines).kept == kept


@pytest.mark.parametrize(
    ("lines", "request_id", "kept"),
    [
        (b"x-request-id: a\r\nX-REQUEST-ID: b\r\n", b"a", b"x-request-id: a\r\nX-REQUEST-ID: b\r\n"),
        (b"x-request-id:\r\n", None, b""),
        (b"x-request-id: \r\nx-request-id: b\r\n", b"b", b"x-request-id: b\r\n"),
        (b"Connection: x-request-id\r\nx-request-id: a\r\n", None, b""),
    ],
    ids=["first of two", "empty", "empty and one", "meant for one hop"],
)
def test_request_id(lines: bytes, request_id: bytes | None, kept: bytes) -> None:
    head = request_head(lines)
    assert (head.request_id, head.kept) == (request_id, kept)


@pytest.mark.parametrize(
    ("version", "connection", "keeps_alive"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: Close\r\n", False),
        (b"1.1", b"Connection: keep-alive, close\r\n", False),
        (b"1.1", b"Connection: closed\r\n", True),
        (b"1.1", b"Connection: x,,close ,\r\n", False),
        (b"1.0", b"", False),
        (b"1.0", b"connection: Keep-Alive\r\n", True),
        (b"1.0", b"connection: keep-alive\r\nconnection: close\r\n", False),
    ],
)
def test_keep_alive(version: bytes, connection: bytes, keeps_alive: bool) -> None:
    head = request_head(connection, b"GET / HTTP/%b\r\nhost: a\r\n" % version)
    assert (head.keeps_alive, head.is_http10) == (keeps_alive, version == b"1.0")
    assert response_head(connection, b"HTTP/%b 200 OK\r\n" % version).keeps_alive == keeps_alive


@pytest.mark.parametrize(
    ("lines", "wants_kv"),
    [
        (b"x-sglfast-kv: 1\r\n", True),
        (b"X-SGLFAST-KV:  True \r\n", True),
        (b"x-sglfast-kv: 0\r\nx-sglfast-kv: 1\r\n", True),
        (b"x-sglfast-kv: 0\r\n", False),
        (b"x-sglfast-kv: false\r\n", False),
        (b"x-sglfast-kv:\r\n", False),
        (b"x-sglfast-kv: 11\r\n", False),
        (b"x-sglfast-kv: truely\r\n", False),
        (b"x-sglfast-kw: 1\r\n", False),
    ],
)
def test_the_kv_line_has_to_be_asked_for(lines: bytes, wants_kv: bool) -> None:
    head = request_head(lines)
    assert head.wants_kv is wants_kv
    assert b"sglfast-kv" not in head.kept.lower(), "it is between the client and us"


UNUSUAL_REQUESTS = {
    "bare LF": b"GET / HTTP/1.1\nhost: a\r\n\r\n",
    "bare LF in a field": LINE + b"a: b\nc: d\r\n\r\n",
    "bare CR in a field": LINE + b"a: b\rc\r\n\r\n",
    "obsolete folding": LINE + b"a: b\r\n c\r\n\r\n",
    "space before colon": LINE + b"a : b\r\n\r\n",
    "space before name": LINE + b" a: b\r\n\r\n",
    "empty name": LINE + b": b\r\n\r\n",
    "no colon": LINE + b"abc\r\n\r\n",
    "NUL in a value": LINE + b"a: b\x00\r\n\r\n",
    "DEL in a value": LINE + b"a: b\x7f\r\n\r\n",
    "8-bit name": LINE + b"\xe4: b\r\n\r\n",
    "two lengths": LINE + b"content-length: 3\r\nContent-Length: 3\r\n\r\n",
    "empty length": LINE + b"content-length:\r\n\r\n",
    "signed length": LINE + b"content-length: +3\r\n\r\n",
    "list of lengths": LINE + b"content-length: 3, 3\r\n\r\n",
    "hexadecimal length": LINE + b"content-length: 0x3\r\n\r\n",
    "length of 19 digits": LINE + b"content-length: 1000000000000000000\r\n\r\n",
    "length and chunked": LINE + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
    "chunked and length": LINE + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n",
    "chunked twice": LINE + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
    "other coding": LINE + b"transfer-encoding: gzip, chunked\r\n\r\n",
    "coding in parts": LINE + b"transfer-encoding: chunke\r\n\r\n",
    "tab behind chunked": LINE + b"transfer-encoding: chunked\t\r\n\r\n",
    "HTTP/1.0 chunked": b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\na: b\r\n\r\n",
    "two hosts": LINE + b"host: a\r\n\r\n",
    "two hosts in 1.0": b"GET / HTTP/1.0\r\nhost: a\r\nhost: a\r\n\r\n",
    "Connection is no list": LINE + b"connection: a b\r\n\r\n",
    "absolute target": b"GET http://a/ HTTP/1.1\r\nhost: a\r\n\r\n",
    "authority target": b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
    "fragment": b"GET /a#b HTTP/1.1\r\nhost: a\r\n\r\n",
    "8-bit target": b"GET /\xe4 HTTP/1.1\r\nhost: a\r\n\r\n",
    "control in target": b"GET /\x01 HTTP/1.1\r\nhost: a\r\n\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\nhost: a\r\n\r\n",
    "space behind version": b"GET / HTTP/1.1 \r\nhost: a\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nhost: a\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\nhost: a\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n",
    "lower-case method": b"get / HTTP/1.1\r\nhost: a\r\n\r\n",
    "rare method": b"PURGE / HTTP/1.1\r\nhost: a\r\n\r\n",
    "long method": b"GETGETGETGETGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    "leading space": b" GET / HTTP/1.1\r\nhost: a\r\n\r\n",
    "leading CRLF": b"\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    "CR CR LF": b"GET / HTTP/1.1\r\nhost: a\r\n\r\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("name", UNUSUAL_REQUESTS)
def test_what_goes_to_llhttp(name: str) -> None:
    assert scan_request(UNUSUAL_REQUESTS[name], LIMIT) == UNUSUAL


@pytest.mark.parametrize("count", [127, 128])
def test_number_of_headers(count: int) -> None:
    lines = b"".join(b"h%d: v\r\n" % i for i in range(count))
    assert isinstance(scan_response(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n", LIMIT), ResponseHead)
    found = scan_request(LINE + lines + b"\r\n", LIMIT)  # Host is one more
    assert isinstance(found, RequestHead) if count == 127 else found == TOO_LARGE
    assert scan_request(LINE + lines + b"h", LIMIT) == TOO_LARGE, "as soon as one begins that is too many"


def test_limit_of_a_head() -> None:
    data = LINE + b"a: " + b"b" * 1000 + b"\r\n\r\n"
    assert isinstance(scan_request(data, len(data)), RequestHead)
    assert isinstance(scan_request(data + b"body", len(data)), RequestHead)
    assert scan_request(data, len(data) - 1) == TOO_LARGE
    assert scan_request(data[:200], 200) == TOO_LARGE
    assert scan_request(data[:200], 201) == MORE
    answer = b"HTTP/1.1 200 OK\r\na: " + b"b" * 1000 + b"\r\n\r\n"
    assert isinstance(scan_response(answer, len(answer)), ResponseHead)
    assert scan_response(answer, len(answer) - 1) == TOO_LARGE


# ---- answers ----


def test_answer_head_in_full() -> None:
    data = (
        b"HTTP/1.0 207 Sort of\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\nX-A: 1 \r\nKeep-Alive: x\r\n"
        b"Connection: keep-alive, x-b\r\nx-b: 2\r\nTE: x\r\nUpgrade: y\r\nContent-Length: 5\r\nX-Request-ID: w\r\nhost: kept\r\n\r\nhello"
    )
    head = scan_response(data, LIMIT)
    assert isinstance(head, ResponseHead)
    assert head.kept == (
        b"HTTP/1.1 207 Sort of\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\nX-A: 1 \r\nContent-Length: 5\r\n"
        b"X-Request-ID: w\r\nhost: kept\r\n"
    )
    assert (head.status, head.content_length, head.is_chunked, head.keeps_alive) == (207, 5, False, True)
    assert (head.has_request_id, head.is_event_stream, head.head_bytes) == (True, True, data.index(b"hello"))
    assert data.startswith(b"HTTP/1.0"), "the worker's own bytes are not written to"


def test_framing_lines_of_an_answer_stay_whatever_connection_names() -> None:
    """Without them the client would wait for the end of the connection, which we keep open."""
    head = response_head(b"Connection: content-length, x-a\r\ncontent-length: 3\r\nx-a: 1\r\n")
    assert (head.content_length, head.kept) == (3, b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n")
    head = response_head(b"transfer-encoding: chunked\r\nConnection: Transfer-Encoding\r\n")
    assert (head.is_chunked, head.kept) == (True, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n")


@pytest.mark.parametrize("lines", [b"x-request-id:\r\n", b"Connection: x-request-id\r\nx-request-id: a\r\n"], ids=["empty", "for one hop"])
def test_answer_without_a_usable_request_id(lines: bytes) -> None:
    head = response_head(lines)
    assert (head.has_request_id, head.kept) == (False, b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "line",
    [b"HTTP/1.1 200\r\n", b"HTTP/1.1 200 \r\n", b"HTTP/1.1 200 \x80\xff\t!\r\n", b"HTTP/1.0 599 x\r\n", b"HTTP/1.1 100 x\r\n"],
)
def test_status_lines(line: bytes) -> None:
    head = response_head(b"", line)
    assert head.kept == b"HTTP/1.1" + line[8:]
    assert head.status == int(line[9:12])


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 20 OK\r\n\r\n", b"HTTP/1.1 2000 OK\r\n\r\n", b"HTTP/1.1 099 x\r\n\r\n", b"HTTP/1.1 600 x\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n", b"HTTP/2.0 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\n\r\n", b"HTTP/1.1 200 O\x00K\r\n\r\n",
        b"HTTP/1.1\t200 OK\r\n\r\n", b"HTTX/1.1 200 OK\r\n\r\n", b"x", b"{\"error\":1}", b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na\r\n\r\n", b"HTTP/1.1 200 OK\r\n a: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
    ],
)  # fmt: skip
def test_answers_that_are_refused(data: bytes) -> None:
    assert scan_response(data, LIMIT) == UNUSUAL


# ---- chunked framing ----


def test_chunks_under_every_cut() -> None:
    data = b'5\r\nhello\r\nA;name=value;q="a \\" b"\r\n0123456789\r\n000;x\r\nTrailer: 1\r\nx-y:\r\n\r\n'
    behind = b"5\r\nnext!"
    for at in range(len(data) + 1):
        followed, decoded = Chunks(), Chunks()
        pieces: list[bytes] = []
        first, second = (data + behind)[:at], (data + behind)[at:]
        assert followed.follow(first) == (len(data) if at == len(data) else -1)
        assert decoded.decode(first, 0, pieces) == (len(data) if at == len(data) else -1)
        if at < len(data):
            assert followed.follow(b"__" + second, 2) == decoded.decode(b"__" + second, 2, pieces) == len(data) - at + 2
        assert b"".join(pieces) == b"hello0123456789"


def test_where_something_may_be_put_between_chunks() -> None:
    data, chunks = b"2;a\r\nab\r\n1\r\nc\r\n0\r\n\r\n", Chunks()
    assert chunks.is_between
    between = []
    for at in range(len(data)):
        chunks.follow(data[at : at + 1])
        if chunks.is_between:
            between.append(at + 1)
    assert between == [data.index(b"1\r\nc"), data.index(b"0\r\n\r\n")]


BROKEN_CHUNKS = [
    b"\r\n", b"x", b"5x\r\n", b"5 \r\n", b" 5\r\n", b"-5\r\n", b"+5\r\n", b"0x5\r\n", b"5\n", b"5\r\r", b"5\r\nhelloX",
    b"5\r\nhello\n", b"5\r\nhello\r\r", b"5;\r\n", b"5;;\r\n", b"5; a\r\n", b"5;a=\r\n", b"5;a b\r\n", b"5;a=b c\r\n",
    b"5;(\r\n", b'5;a="x"y\r\n', b'5;a="\x01"\r\n', b'5;a="\\\r\n', b"5;a\n", b'5;a="\r\n', b"5;\x80\r\n",
    b"1ffffffffffffffff\r\n", b"100000000000000000000\r\n", b"0\r\nx\r\n", b"0\r\n x: y\r\n", b"0\r\nx : y\r\n",
    b"0\r\n: y\r\n", b"0\r\nx: y\n", b"0\r\nx: \x01\r\n", b"0\r\n\n", b"0\r\nContent-Length: 3\r\n",
    b"0\r\ntransfer-encoding: chunked\r\n",
]  # fmt: skip


@pytest.mark.parametrize("data", BROKEN_CHUNKS)
def test_broken_framing_stays_broken(data: bytes) -> None:
    whole, bytewise, decoded = Chunks(), Chunks(), Chunks()
    assert whole.follow(data) == -2
    assert decoded.decode(data, 0, []) == -2
    assert -2 in [bytewise.follow(data[at : at + 1]) for at in range(len(data))]
    for chunks in (whole, bytewise, decoded):
        assert not chunks.is_between
        assert chunks.follow(b"5\r\nhello\r\n0\r\n\r\n") == -2


def test_names_that_only_resemble_framing_may_be_trailers() -> None:
    for name in (b"content-lengt", b"content-lengthx", b"transfer-encodin", b"transfer-encodings", b"x" * 300):
        data = b"0\r\n" + name + b": 1\r\n\r\n"
        assert Chunks().follow(data) == len(data)


@pytest.mark.parametrize("line", [b"5;" + b"x" * 16385, b"0\r\nx: " + b"y" * 16384, b"0\r\n" + b"x" * 16385, b"5;a\r\nhello\r\n" * 10000])
def test_extensions_and_trailers_are_bounded(line: bytes) -> None:
    assert Chunks().follow(line) == -2
    assert Chunks().follow(line[:16000]) == -1


def test_a_large_chunk_is_handed_on_in_pieces() -> None:
    chunks, data = Chunks(), b"z" * 100_000
    pieces: list[bytes] = []
    assert chunks.decode(b"186A0\r\n", 0, pieces) == -1
    for at in range(0, len(data), 30_000):
        assert chunks.decode(data[at : at + 30_000], 0, pieces) == -1
    assert chunks.decode(b"\r\n0\r\n\r\n", 0, pieces) == 7
    assert b"".join(pieces) == data


# ---- against llhttp ----

# What every run must have seen so often, or the generator has lost its edge.
SEEN = {
    "requests": ("taken", "unusual", "more"),
    "answers": ("taken", "unusual", "more"),
    "chunks": ("complete", "malformed", "more"),
    "connections": (
        "open after 1",
        "open after 0",
        "closed after bad_request",
        "closed after no_healthy_workers",
        "closed after not_found",
    ),
    "upstreams": ("complete", "waits, then complete", "waits, then lost", "malformed"),
}
ROUNDS = {"requests": 12_000, "answers": 12_000, "chunks": 12_000, "connections": 12_000, "upstreams": 8_000}


@pytest.mark.parametrize("name", SEEN)
def test_agrees_with_llhttp(name: str, rng: SeededRandom) -> None:
    for seed in (1, rng.getrandbits(32)):  # one that is always the same, one that is new on every run
        seen = fuzz(name, seed, rounds=ROUNDS[name] // 2)
        assert all(seen[outcome] >= 10 for outcome in SEEN[name]), seen
