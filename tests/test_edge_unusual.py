"""sglfast.edge.unusual: requests that llhttp reads, one per object."""

import pytest

from sglfast import errors
from sglfast._httphead import RequestHead
from sglfast.edge.unusual import UnusualRequest

ABSOLUTE = b"POST http://a/generate HTTP/1.1\r\nhost: a\r\n"


def read(*pieces: bytes, head_limit: int = 4096, body_limit: int = 1000) -> tuple[RequestHead, bytes] | errors.Reason | None:
    """What comes of these pieces; nothing may come before the last one."""
    unusual = UnusualRequest(head_limit, body_limit)
    for piece in pieces[:-1]:
        assert unusual.feed(piece) is None, piece
    return unusual.feed(pieces[-1])


def taken(*pieces: bytes) -> tuple[RequestHead, bytes]:
    found = read(*pieces)
    assert isinstance(found, tuple), found
    return found


def test_absolute_target_under_every_cut() -> None:
    data = b"POST http://a.test:80/generate?x=1#f HTTP/1.1\r\nHost: a.test\r\nX-A:  b \r\nContent-Length: 5\r\n\r\nhello"
    for at in range(1, len(data)):
        head, body = taken(data[:at], data[at:])
        assert (head.method, head.target, body) == (b"POST", b"/generate?x=1", b"hello")
        assert head.kept == b"X-A: b \r\n"
        assert (head.content_length, head.is_chunked, head.is_http10, head.keeps_alive) == (5, False, False, True)


@pytest.mark.parametrize(
    ("target", "plain"),
    [
        (b"http://a", b"/"), (b"http://a?x=1", b"/?x=1"), (b"HTTPS://A/b", b"/b"), (b"/a#b?c", b"/a"), (b"*", b"*"),
        (b"http://a//b?c?d#e#f", b"//b?c?d"),
    ],
)  # fmt: skip
def test_targets(target: bytes, plain: bytes) -> None:
    assert taken(b"GET %b HTTP/1.1\r\nhost: a\r\n\r\n" % target)[0].target == plain


def test_chunks_are_decoded_and_trailers_are_no_headers() -> None:
    trailers = b"0\r\nAuthorization: mine\r\nx-request-id: t\r\n\r\n"
    head, body = taken(ABSOLUTE + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", trailers)
    assert (head.kept, head.request_id, body, head.content_length) == (b"", None, b"hello", 5)


def test_what_follows_in_the_same_bytes_changes_nothing() -> None:
    """Method, version and headers are those of the first request, not of the last one that was parsed."""
    following = b"POST /generate HTTP/1.0\r\nhost: b\r\nx-evil: 1\r\ncontent-length: 3\r\n\r\nabc"
    head, body = taken(b"PURGE /generate HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi" + following)
    assert (head.method, head.is_http10, head.kept, body) == (b"DELETE", False, b"", b"hi")
    head, body = taken(ABSOLUTE + b"\r\n" + b"garbage")
    assert (head.target, body) == (b"/generate", b"")


def test_rare_methods_become_one_that_no_path_takes() -> None:
    for method in (b"PURGE", b"MOVE", b"TRACE", b"SUBSCRIBE"):
        assert taken(b"%b /generate HTTP/1.1\r\nhost: a\r\n\r\n" % method)[0].method == b"DELETE"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nhost: a\nb: c\r\n\r\n",
        b"GET http://a/ HTTP/1.1\r\n\r\n",
        b"GET http://a/ HTTP/1.1\r\nhost: a\r\nHost: a\r\n\r\n",
        b"GET http://a/ HTTP/2.0\r\nhost: a\r\n\r\n",
        b"GET ftp://a/ HTTP/1.1\r\nhost: a\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET http://a]b/ HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET http://[::1/ HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /\x80 HTTP/1.1\r\nhost: a\r\n\r\n",
        ABSOLUTE + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        ABSOLUTE + b"transfer-encoding: gzip\r\n\r\n",
        ABSOLUTE + b"content-length: 1\r\ncontent-length: 1\r\n\r\na",
        ABSOLUTE + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ABSOLUTE + b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 5\r\n\r\nhello",
        ABSOLUTE + b"connection: upgrade\r\nupgrade: h2c\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ABSOLUTE + b"connection: a b\r\n\r\n",
    ],
)
def test_refusals(data: bytes) -> None:
    assert read(data) is errors.BAD_REQUEST


def test_too_many_headers() -> None:
    lines = [b"h%d: v\r\n" % number for number in range(126)]  # host is one more, and the length that a plain head has
    assert taken(ABSOLUTE + b"".join(lines) + b"\r\n")[0].kept == b"".join(lines)
    assert read(ABSOLUTE + b"".join(lines) + b"one: more\r\n\r\n") is errors.HEADERS_TOO_LARGE


def test_an_upgrade_without_a_body_is_ignored() -> None:
    head, body = taken(ABSOLUTE + b"connection: upgrade, x-a\r\nupgrade: h2c\r\nx-a: 1\r\nx-b: 2\r\n\r\n")
    assert (head.kept, body) == (b"x-b: 2\r\n", b"")


def test_limit_of_the_head() -> None:
    line = b"a: " + b"b" * 300 + b"\r\n"
    assert read(ABSOLUTE + line + b"\r\n", head_limit=400) != errors.HEADERS_TOO_LARGE
    for pieces in ((ABSOLUTE + line + line + b"\r\n",), (ABSOLUTE, line, line), (b"GET http://a/" + b"x" * 400,)):
        assert read(*pieces, head_limit=400) is errors.HEADERS_TOO_LARGE
    body = b"y" * 900
    assert isinstance(read(ABSOLUTE + b"content-length: 900\r\n\r\n", body, head_limit=400), tuple), "a body is no head"


def test_limit_of_the_body() -> None:
    assert isinstance(read(ABSOLUTE + b"content-length: 1000\r\n\r\n", b"x" * 1000), tuple)
    assert read(ABSOLUTE + b"content-length: 1002\r\n\r\n", b"x" * 1001) is errors.PAYLOAD_TOO_LARGE
    chunk = b"64\r\n" + b"x" * 100 + b"\r\n"
    assert read(ABSOLUTE + b"transfer-encoding: chunked\r\n\r\n" + chunk * 5, chunk * 6) is errors.PAYLOAD_TOO_LARGE


@pytest.mark.parametrize(
    ("version", "value", "wants"),
    [(b"1.1", b"100-continue", True), (b"1.1", b"100-Continue", True), (b"1.1", b"200-ok", False), (b"1.0", b"100-continue", False)],
)
def test_expect(version: bytes, value: bytes, wants: bool) -> None:
    unusual = UnusualRequest(4096, 1000)
    opening = ABSOLUTE.replace(b"1.1", version) + b"expect: %b\r\ncontent-length: 2\r\n" % value
    assert unusual.feed(opening) is None
    assert not unusual.wants_continue
    assert unusual.feed(b"\r\n") is None
    assert unusual.wants_continue == wants
    found = unusual.feed(b"hi")
    assert isinstance(found, tuple)
    assert found[0].expects_other == (value == b"200-ok")
    assert found[0].kept == b""
