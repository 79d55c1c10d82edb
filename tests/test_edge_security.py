"""The shard's outer defences: keys, TLS on both sides, pages of other origins, limits, and bytes that mean two things."""

import http.server
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme
from edge_harness import Edge, settled
from raw_client import WAIT_S, Client, chunk, post, request
from scripted_worker import SSE_HEAD, Worker, answer, echoes, says
from test_edge_exchange_failures import error_event, split_chunks

from sglfast import _counters as c

# ---- keys ----


@pytest.fixture(scope="module")
def locked_shard(worker: Worker) -> Iterator[Edge]:
    with Edge([worker], api_key="main-key", api_keys=("ann:key:of:ann",)) as edge:
        yield edge


@pytest.fixture
def locked(locked_shard: Edge, worker: Worker) -> Iterator[Edge]:
    worker.plan(echoes)
    with settled(locked_shard):
        yield locked_shard


@pytest.mark.parametrize("header", ["authorization: Bearer main-key", "Authorization:bearer  key:of:ann "])
def test_a_key_opens_and_is_not_handed_on(header: str, locked: Edge, worker: Worker) -> None:
    assert locked.ask(post(b"1", header)).body == b"1"
    assert worker.calls[-1].header("authorization") == []


@pytest.mark.parametrize(
    "header", ["", "authorization: Bearer wrong", "authorization: main-key", "authorization: Basic main-key", "x-api-key: main-key"]
)
@pytest.mark.parametrize("target", ["/v1/chat/completions", "/generate", "/v1/tokenize", "/explain/generate"])
def test_without_one_nothing_is_asked(header: str, target: str, locked: Edge, worker: Worker) -> None:
    with locked.client() as client:
        refused = client.ask(post(b"{}", *([header] if header else []), target=target))
        assert (refused.status, refused.code) == (401, "invalid_api_key")
        assert refused.header("www-authenticate") == [b"Bearer"]
        assert b"main-key" not in refused.raw_head + refused.body
        assert client.ask(post(b"2", "authorization: Bearer main-key")).body == b"2", "the connection goes on"
    assert worker.calls[-1].body == b"2"


def test_health_and_models_need_no_key(locked: Edge) -> None:
    for path in ("/health", "/readyz", "/v1/models"):
        assert locked.ask(request("GET", path)).status == 200


def test_a_worker_is_shown_its_own_key(worker: Worker) -> None:
    worker.plan(echoes)
    with Edge([worker]) as edge, settled(edge):
        assert edge.ask(post(b"1", "authorization: Bearer of-the-client")).status == 200
        assert worker.calls[-1].header("authorization") == [b"Bearer of-the-client"], "without keys nothing is changed"
        edge.put_record(0, api_key="of-the-worker")
        assert edge.ask(post(b"1", "authorization: Bearer of-the-client", "x-other: 1")).status == 200
        assert worker.calls[-1].header("authorization") == [b"Bearer of-the-worker"]
        assert worker.calls[-1].header("x-other") == [b"1"]


# ---- refused by the head alone: the body is neither asked for nor kept ----

ASKS_FIRST = ("expect: 100-continue", "content-length: 50000000")
KEY = "authorization: Bearer main-key"


def begun(target: str, *headers: str, method: str = "POST") -> bytes:
    return f"{method} {target} HTTP/1.1\r\n".encode() + b"".join(line.encode() + b"\r\n" for line in ("host: a", *headers)) + b"\r\n"


@pytest.mark.parametrize("framing", [("content-length: 50000000",), ASKS_FIRST, ("transfer-encoding: chunked",)])
@pytest.mark.parametrize("target", ["/v1/completions", "http://a/v1/completions", "/explain/generate?a=1", "/v1/tokenize"])
def test_a_body_without_a_key_is_not_waited_for(target: str, framing: tuple[str, ...], locked: Edge) -> None:
    with locked.client() as client:
        refused = client.ask(begun(target, *framing))
        assert (refused.status, refused.code, refused.closes, refused.interim) == (401, "invalid_api_key", True, [])
        client.send_what_fits(b"x" * 10000 + request("GET", "/health"))
        assert client.has_ended()


@pytest.mark.parametrize("target", ["/v1/completions", "http://a/v1/completions"])
def test_with_a_key_it_is(target: str, locked: Edge) -> None:
    with locked.client() as client:
        client.send(begun(target, KEY, "expect: 100-continue", "content-length: 3"))
        assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert client.ask(b"abc").body == b"abc"


@pytest.mark.parametrize(("target", "status"), [("/workers", 413), ("/health", 413), ("/v1/files", 404), ("http://a/workers", 413)])
def test_other_paths_take_small_bodies_only(target: str, status: int, locked: Edge) -> None:
    assert locked.ask(begun(target, *ASKS_FIRST)).status == status
    with locked.client() as client:
        client.send(begun(target, "transfer-encoding: chunked"))
        client.send_what_fits(chunk(b"x" * 70_000))
        assert client.read_answer().status == 413


# ---- request ids ----


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (("x-request-id: a", "x-correlation-id: b"), b"a"),
        (("request-id: d", "x-trace-id: c", "X-Correlation-Id: b"), b"b"),
        (("request-id: d", "x-trace-id: c"), b"c"),
        (("request-id: d",), b"d"),
        (("x-request-id: ", "request-id: d"), b"d"),
    ],
)
def test_ids_that_others_have_given(headers: tuple[str, ...], expected: bytes, locked: Edge, worker: Worker) -> None:
    worker.plan(says(answer()))
    got = locked.ask(post(b"{}", "authorization: Bearer main-key", *headers))
    assert got.request_id == expected
    assert worker.calls[-1].header("x-request-id") == [expected]


def test_ids_by_headers_of_ones_own(worker: Worker) -> None:
    worker.plan(says(answer()))
    with Edge([worker], request_id_headers=("my-id",)) as edge, settled(edge):
        assert edge.ask(post(b"{}", "my-id: 7", "x-request-id: 8")).request_id == b"7"
        assert worker.calls[-1].header("x-request-id") == [b"7"]
        assert len(edge.ask(post(b"{}", "x-request-id: 8")).request_id) == 32


# ---- other origins ----


def test_no_cors_unless_asked(locked: Edge, worker: Worker) -> None:
    worker.plan(says(answer()))
    got = locked.ask(post(b"{}", "origin: http://evil", "authorization: Bearer main-key"))
    assert not [name for name, _ in got.headers if name.lower().startswith(b"access-control")]
    assert worker.calls[-1].header("origin") == [], "the worker cannot allow it either"
    assert locked.ask(request("OPTIONS", "/v1/models", "origin: http://evil", "access-control-request-method: POST")).status == 405


def test_listed_origins(worker: Worker) -> None:
    worker.plan(says(answer()))
    with Edge([worker], cors_allowed_origins=("http://page", "https://two/")) as edge, settled(edge), edge.client() as client:
        asked = request(
            "OPTIONS",
            "/v1/chat/completions",
            "origin: https://two",
            "access-control-request-method: POST",
            "access-control-request-headers: x-a",
        )
        allowed = client.ask(asked)
        assert allowed.status == 204
        assert allowed.header("access-control-allow-origin") == [b"https://two"]
        assert allowed.header("access-control-allow-headers") == [b"x-a"]
        assert b"POST" in allowed.header("access-control-allow-methods")[0]
        assert client.ask(post(b"{}", "origin: http://page")).header("access-control-allow-origin") == [b"http://page"]
        for got in (client.ask(post(b"{}", "origin: http://evil")), client.ask(post())):
            assert got.status == 200
            assert got.header("access-control-allow-origin") == []
        assert client.ask(request("GET", "/nothing", "origin: http://page")).header("access-control-allow-origin") == [b"http://page"]
        assert client.ask(request("OPTIONS", "/health", "origin: http://evil", "access-control-request-method: GET")).status == 405


def test_pages_of_other_origins_do_not_administer(locked: Edge) -> None:
    for method, path in (("POST", "/workers"), ("DELETE", "/workers/1"), ("POST", "/flush_cache"), ("POST", "/add_worker?url=http://a:1")):
        refused = locked.ask(request(method, path, "origin: http://evil", "content-type: text/plain"))
        assert (refused.status, refused.code) == (403, "origin_not_allowed")
    # What control would be asked: nobody plays control here.
    assert locked.ask(request("GET", "/workers", "origin: http://evil")).code == "control_unavailable"
    assert locked.ask(request("POST", "/workers")).code == "control_unavailable"


def test_any_origin(worker: Worker) -> None:
    worker.plan(says(answer()))
    with Edge([worker], cors_allowed_origins=("*",)) as edge, settled(edge):
        assert edge.ask(post(b"{}", "origin: null")).header("access-control-allow-origin") == [b"*"]


# ---- limits ----


def test_a_long_url(worker: Worker) -> None:
    with Edge([worker], max_url_bytes=100) as edge, settled(edge):
        worker.plan(says(answer()))
        assert edge.ask(post(target="/generate?" + "a" * 90)).status == 200
        refused = edge.ask(post(target="/generate?" + "a" * 91))
        assert (refused.status, refused.code, refused.closes) == (414, "uri_too_long", True)


def test_connections_of_a_shard(worker: Worker) -> None:
    with Edge([worker], max_connections=3) as edge, settled(edge):
        edge.allowed_log = ("connections above 3 are refused",)
        worker.plan(says(answer()))
        clients = [edge.client() for _ in range(3)]
        assert [client.ask(post()).status for client in clients] == [200] * 3
        with edge.client() as fourth:
            refused = fourth.read_answer()
            assert (refused.status, refused.code, refused.closes) == (503, "too_many_connections", True)
        assert clients[0].ask(post()).status == 200
        for client in clients:
            client.sock.close()


# ---- bytes that mean two things ----

SMUGGLED = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
LINES = {
    "two lengths": b"content-length: 4\r\ncontent-length: 5\r\n",
    "a list of lengths": b"content-length: 4, 5\r\n",
    "a signed length": b"content-length: +4\r\n",
    "a length in hex": b"content-length: 0x4\r\n",
    "length and chunks": b"content-length: 4\r\ntransfer-encoding: chunked\r\n",
    "two codings": b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
    "chunks not last": b"transfer-encoding: chunked, identity\r\n",
    "odd chunked": b"transfer-encoding: xchunked\r\n",
    "tab behind chunked": b"transfer-encoding: chunked\t\r\n",
    "bare LF": b"x-a: 1\ncontent-length: 0\r\n",
    "bare CR": b"x-a: 1\rcontent-length: 0\r\n",
    "obs-fold": b"x-a: 1\r\n content-length: 4\r\n",
    "two hosts": b"host: b\r\n",
    "blank before the colon": b"content-length : 4\r\n",
    "no name": b": 4\r\n",
    "NUL": b"x-a: 1\x00\r\n",
}
CHUNKS = {
    "a large extension": b"5;" + b"a" * 20_000 + b"\r\nhello\r\n0\r\n\r\n",
    "LF after the size": b"5\nhello\r\n0\r\n\r\n",
    "a signed size": b"+5\r\nhello\r\n0\r\n\r\n",
    "a size of 17 digits": b"00000000000000005\r\nhello\r\n0\r\n\r\n".replace(b"0000000000000000", b"10000000000000000"),
    "no end of a chunk": b"5\r\nhelloo\r\n0\r\n\r\n",
    "a trailer that frames": b"0\r\ncontent-length: 5\r\n\r\n",
}


@pytest.fixture(scope="module")
def plain_shard(worker: Worker) -> Iterator[Edge]:
    with Edge([worker]) as edge:
        yield edge


@pytest.mark.parametrize("case", [*LINES, *CHUNKS])
def test_smuggling_is_refused_and_the_connection_ends(case: str, plain_shard: Edge, worker: Worker) -> None:
    worker.plan(says(answer()))
    with settled(plain_shard), plain_shard.client() as client:
        before = plain_shard.word(c.S_REQUESTS)
        if case in LINES:
            client.send(b"POST /generate HTTP/1.1\r\nhost: a\r\n" + LINES[case] + b"\r\n" + SMUGGLED)
        else:
            client.send(b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNKS[case] + SMUGGLED)
        refused = client.read_answer()
        assert (refused.status, refused.closes) == (400, True)
        assert client.read_to_end() == b"", "nothing behind it is answered"
        assert plain_shard.word(c.S_REQUESTS) == before


# ---- TLS ----


class SecureWorker:
    """A worker behind TLS that wants a certificate of its client."""

    def __init__(self, ca: trustme.CA) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ca.issue_cert("localhost").configure_cert(context)
        ca.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://localhost:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(8)
        self._server.server_close()


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificates(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("tls")
    issued = ca.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "key")
    issued.cert_chain_pems[0].write_to_path(folder / "cert")
    ca.cert_pem.write_to_path(folder / "ca")
    return {name: str(folder / name) for name in ("key", "cert", "ca")}


class SecureClient(Client):
    def __init__(self, port: int, ca: trustme.CA) -> None:
        super().__init__(port)
        context = ssl.create_default_context()
        ca.configure_trust(context)
        self.sock = context.wrap_socket(self.sock, server_hostname="localhost")


def test_tls_on_both_sides(ca: trustme.CA, certificates: dict[str, str]) -> None:
    worker = SecureWorker(ca)
    settings = {
        "tls_cert_path": certificates["cert"], "tls_key_path": certificates["key"], "ca_cert_paths": (certificates["ca"],),
        "client_cert_path": certificates["cert"], "client_key_path": certificates["key"],
    }  # fmt: skip
    try:
        with Edge([worker], **settings) as edge, settled(edge):
            with SecureClient(edge.port, ca) as client:
                for size in (2, 100_000, 3_000_000):
                    body = json.dumps("x" * size).encode()
                    assert client.ask(post(body)).body == body
                refused = client.ask(b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n")
                assert (refused.status, refused.closes) == (400, True)
                assert client.read_to_end() == b""
            with socket.create_connection(("127.0.0.1", edge.port), 5) as plain:
                plain.settimeout(8)
                plain.sendall(request("GET", "/health"))
                assert b"HTTP/1.1 200" not in plain.recv(1000)
    finally:
        worker.close()


def test_streams_behind_tls_end_with_an_event_when_the_router_stops(worker: Worker, ca: trustme.CA, certificates: dict[str, str]) -> None:
    worker.plan(says(SSE_HEAD + chunk(b"data: 1\n\n")))
    tls = {"tls_cert_path": certificates["cert"], "tls_key_path": certificates["key"]}
    with Edge([worker], **tls) as edge, ExitStack() as stack:  # type: ignore[arg-type]
        clients = [stack.enter_context(SecureClient(edge.port, ca)) for _ in range(20)]
        for client in clients:
            client.send(post())
            client.read_until(chunk(b"data: 1\n\n"))
        edge.control.send(b"q")
        assert edge.process.wait(WAIT_S) == 0
        for client in clients:
            event, last = split_chunks(client)
            error_event(event, "shutting_down")
            assert last == b""
        assert edge.log() == ""
    worker.reset()


def test_a_handshake_has_as_long_as_a_head(worker: Worker, certificates: dict[str, str]) -> None:
    tls = {"tls_cert_path": certificates["cert"], "tls_key_path": certificates["key"]}
    with Edge([worker], header_timeout_secs=0.3, **tls) as edge, settled(edge):  # type: ignore[arg-type]
        silent = socket.create_connection(("127.0.0.1", edge.port), 5)
        silent.settimeout(5)
        assert silent.recv(100) == b""
        silent.close()


def test_a_worker_of_another_ca_is_not_trusted(ca: trustme.CA, certificates: dict[str, str]) -> None:
    worker = SecureWorker(trustme.CA())
    try:
        with Edge([worker], ca_cert_paths=(certificates["ca"],)) as edge:
            edge.allowed_log = ("worker cannot be reached", "CERTIFICATE_VERIFY_FAILED")
            with settled(edge):
                answer = edge.ask(post())
                assert (answer.status, answer.code) == (502, "upstream_unreachable")
    finally:
        worker.close()
