"""The bounded GET of control: every failure is a FetchError whose text holds nothing that the worker sent."""

import asyncio
import contextlib
import socket
import ssl

import pytest
import trustme
from control_doubles import GOOD, HANG, SECRET, ScriptedWorker, answer

from sglfast.control.fetch import Answer, Fetcher, FetchError


def get(raw: bytes, *, timeout_s: float = 5.0, limit_bytes: int = 1000) -> Answer:
    async def run() -> Answer:
        async with ScriptedWorker({"/x": [raw]}) as worker, Fetcher() as fetcher:
            return await fetcher.get(worker.url + "/x", timeout_s, limit_bytes)

    return asyncio.run(run())


def test_status_and_body() -> None:
    assert get(answer(b"abc")) == Answer(200, b"abc")
    assert get(answer(b"abc"), limit_bytes=0) == Answer(200, b"")
    assert get(answer(b"x" * 1000)).body == b"x" * 1000
    assert get(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n") == Answer(302, b"")


@pytest.mark.parametrize(
    ("raw", "text", "is_transient"),
    [
        (HANG, "no answer within 0.2 s", True),
        (answer(b"half", claims_bytes=500), "the answer was cut short", True),
        (b"HTTP/1.1 200", "no valid HTTP answer|closed before an answer", True),
        (answer(b"x" * 1001), "larger than 1000 bytes", False),
        (f"HTTP/1.1 {SECRET}\r\n\r\n".encode(), "no valid HTTP answer", True),
        (f"HTTP/1.1 200 OK\r\n{SECRET} : x\r\n\r\n".encode(), "no valid HTTP answer", True),
        (f"HTTP/1.1 200 OK\r\ncontent-length: {SECRET}\r\n\r\n".encode(), "no valid HTTP answer", True),
    ],
)
def test_failures_say_what_without_the_workers_words(raw: bytes, text: str, is_transient: bool) -> None:
    with pytest.raises(FetchError, match=text) as caught:
        get(raw, timeout_s=0.2 if raw == HANG else 5.0)
    assert caught.value.is_transient is is_transient
    assert SECRET not in str(caught.value)
    shown = caught.value.__context__ if not caught.value.__suppress_context__ else None
    assert shown is None, "a traceback in the log would show the inner error, which quotes the worker"


def test_refused_connection_and_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def knows_nobody(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", knows_nobody)

    with socket.create_server(("127.0.0.1", 0)) as closed:
        closed_port = closed.getsockname()[1]

    async def run() -> list[str]:
        texts = []
        async with Fetcher() as fetcher:
            for url in (f"http://127.0.0.1:{closed_port}/x", "http://no-such-host.invalid/x"):
                try:
                    await fetcher.get(url, 5.0)
                except FetchError as error:
                    texts.append(str(error))
        return texts

    assert asyncio.run(run()) == ["connection refused", "the host name cannot be resolved"]


def test_silent_workers_cost_others_no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waits for its place behind silent workers is late, not failed: its own time has not begun."""
    monkeypatch.setattr("sglfast.control.fetch._AT_ONCE", 1)

    async def run() -> list[object]:
        async with ScriptedWorker({"/silent": [HANG], "/good": [GOOD]}) as worker, Fetcher() as fetcher:
            asked = [fetcher.get(worker.url + path, 0.3) for path in ("/silent", "/silent", "/good")]
            return list(await asyncio.gather(*asked, return_exceptions=True))

    first, second, third = asyncio.run(run())
    assert isinstance(first, FetchError)
    assert isinstance(second, FetchError)
    assert third == Answer(200, b"")


def test_a_certificate_that_is_not_trusted() -> None:
    async def ask(tls: ssl.SSLContext, host: str) -> str:
        async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                await reader.readuntil(b"\r\n\r\n")
            writer.write(GOOD)
            writer.close()

        server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ca.issue_cert("localhost").configure_cert(server_side)
        server = await asyncio.start_server(answers, "127.0.0.1", 0, ssl=server_side)
        async with server, Fetcher(tls) as fetcher:
            try:
                return str((await fetcher.get(f"https://{host}:{server.sockets[0].getsockname()[1]}/x", 5)).status)
            except FetchError as error:
                return str(error)

    ca = trustme.CA()
    stranger = ssl.create_default_context()
    friend = ssl.create_default_context()
    ca.configure_trust(friend)
    assert asyncio.run(ask(friend, "localhost")) == "200"
    assert "the certificate is not trusted (unable to get local issuer certificate)" in asyncio.run(ask(stranger, "localhost"))
    assert "the certificate is not trusted (" in asyncio.run(ask(friend, "127.0.0.1"))
    assert "IP address mismatch" in asyncio.run(ask(friend, "127.0.0.1"))
