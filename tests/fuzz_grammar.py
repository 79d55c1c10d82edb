"""Bytes for the HTTP fuzzers: requests, answers and chunked bodies from a grammar with faults in it, and mutations of them.

Most of what is made is valid or nearly so: a parser's borders are where nearly valid input lies, noise stops at the first byte.
"""

from __future__ import annotations

from random import Random

METHODS = [
    *[b"POST"] * 8, b"GET", b"GET", b"HEAD", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"CONNECT", b"TRACE", b"PURGE",
    b"MOVE", b"SOURCE", b"PRI", b"post", b"Get", b"FOO", b"POSTPOSTPOST", b"", b"P\x00ST", b"QUERY", b"M-SEARCH",
]  # fmt: skip
TARGETS = [
    *[b"/v1/chat/completions"] * 6, b"/v1/completions", b"/generate?stream=1", b"/v1/embeddings", b"/health", b"/v1/models",
    b"/nothing", b"/", b"*", b"*x", b"", b"http://a.test/v1/chat/completions", b"https://a.test/generate?x=1#f",
    b"HTTP://A.test", b"http://", b"ftp://a/b", b"a.test:80", b"//a//b", b"/a%00b", b"/a#b", b"/a b", b"/\x80\xff", b"/\x7f",
    b"/a\tb", b"/<>\"{}|\\^`", b"?x=1", b"/v1/chat/completions?a=b?c#", b"/" + b"x" * 300,
    b"http://a]b/", b"http://[::1]:1/generate",
]  # fmt: skip
VERSIONS = [
    *[b"HTTP/1.1"] * 12, *[b"HTTP/1.0"] * 3, b"HTTP/1.2", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1", b"HTTP/11", b"http/1.1",
    b"HTTP/1.1 ", b"HTTP/ 1.1", b"", b"RTSP/1.1", b"ICE/1.0",
]  # fmt: skip
STATUSES = [
    *[b"200 OK"] * 8, b"200", b"200 ", b"204 No Content", b"304 Not Modified", b"100 Continue", b"103 Early Hints",
    b"101 Switching Protocols", b"404 Not Found", b"429 Too Many Requests", b"500 \xff\t?", b"599 x", b"600 x", b"999 x",
    b"099 x", b"20 OK", b"2000 OK", b"2O0 OK", b"-20 x", b"200\tOK", b"200  OK", b"200 O\x00K", b"200 O\rK",
]  # fmt: skip
PLAIN = [
    (b"host", b"a.test"), (b"Accept", b"application/json"), (b"User-Agent", b"OpenAI/Python 1.2"),
    (b"Authorization", b"Bearer sk-x"), (b"X-Stainless-Lang", b"python"), (b"x-request-id", b"abc"), (b"X-Request-ID", b""),
    (b"X-Trace-Id", b"t"), (b"x-correlation-id", b"c"), (b"Request-Id", b"r"),
    (b"traceparent", b"00-1-2-03"), (b"x-sglfast-kv", b"1"), (b"X-Sglfast-KV", b"0"), (b"content-type", b"application/json"),
    (b"Content-Type", b"text/event-stream; charset=utf-8"), (b"accept-encoding", b"gzip, deflate"),
    (b"cookie", b"a=b; c=\"d\""), (b"!#$%&'*+-.^_`|~", b"token"), (b"x", b"\x80\xfe\xff"), (b"y", b""),
    (b"date", b"Mon, 01 Jan 2024"),
]  # fmt: skip
SPECIAL = [
    (b"Connection", b"keep-alive"), (b"Connection", b"close"), (b"connection", b"Close"), (b"Connection", b"x-a, X-B"),
    (b"X-A", b"1"), (b"x-b", b"2"), (b"connection", b"keep-alive, close"), (b"connection", b",, close ,"),
    (b"connection", b"foo bar"), (b"connection", b"close bar"), (b"connection", b"x-request-id"),
    (b"connection", b"content-length"), (b"connection", b"transfer-encoding, host"), (b"connection", b"\x80"),
    (b"connection", b"closed"), (b"connection", b"upgrade"), (b"connection", b""), (b"proxy-connection", b"close"),
    (b"proxy-connection", b"keep-alive"), (b"Keep-Alive", b"timeout=5"), (b"TE", b"trailers"), (b"te", b"deflate"),
    (b"Upgrade", b"h2c"), (b"Trailer", b"x-t"), (b"Expect", b"100-continue"), (b"expect", b"100-Continue"),
    (b"expect", b"200-ok"), (b"expect", b""), (b"Proxy-Authorization", b"x"), (b"proxy-authenticate", b"x"),
    (b"Host", b"b.test"), (b"HOST", b""), (b"content-length", b"0"), (b"content-length", b"3"), (b"Content-Length", b"5"),
    (b"content-length", b"+3"), (b"content-length", b"-1"), (b"content-length", b"3, 3"), (b"content-length", b"3 3"),
    (b"content-length", b""), (b"content-length", b"0x3"), (b"content-length", b"00000000000000000003"),
    (b"content-length", b"99999999999999999999"), (b"content-length", b"9223372036854775808"),
    (b"content-length", b"999999999999999999"), (b"transfer-encoding", b"chunked"), (b"Transfer-Encoding", b"Chunked"),
    (b"transfer-encoding", b"gzip"), (b"transfer-encoding", b"gzip, chunked"), (b"transfer-encoding", b"chunked, gzip"),
    (b"transfer-encoding", b"chunked, chunked"), (b"transfer-encoding", b"identity"), (b"transfer-encoding", b""),
    (b"transfer-encoding", b"chunke"), (b"transfer-encoding", b"xchunked"), (b"transfer-encoding", b"chunked;q=1"),
    (b"transfer-encoding", b"\x0bchunked"),
]  # fmt: skip
BROKEN = [
    b"no colon", b"name : value", b": empty name", b" folded: start", b"a: b\r\n folded", b"a: b\r\n\tfolded",
    b"na\x00me: x", b"name: x\x00y", b"name: x\x01", b"name: x\x7f", b"name: a\rb", b"name: a\nb", b"n\xc3\xa4me: x",
    b"na me: x", b"(name): x", b"name:", b"name:\t \t", b"name:\tx\t", b"a:b:c", b"content-length : 3",
    b"transfer-encoding : chunked", b"content-length\t: 3", b"content-length: 3\r", b"\tcontent-length: 3",
    b"connection: \x01", b"host : a",
]  # fmt: skip
ENDS = [
    *[b"\r\n"] * 300, b"\n", b"\r", b"\r\r\n", b"\n\r\n", b" \r\n", b"\t\r\n",
]  # fmt: skip
SIZES = [
    b"0", b"1", b"5", b"a", b"A", b"00000005", b"10", b"0x5", b"-1", b"", b" 5", b"5 ", b"5\t", b"g", b"fffffffffffffff",
    b"ffffffffffffffff", b"10000000000000000", b"+5", b"5_0", b"000000000000000000000000000000005",
]  # fmt: skip
EXTENSIONS = [
    *[b""] * 10, b";a", b";a=b", b";a=b;c=d", b";a=\"q;\\\"w\"", b";", b"; a", b";a=", b";;", b";a=\"x", b";a=\"x\"y", b";(",
    b";a=(", b";a b", b";a=\"\x01\"", b";a=\"\\\x01\"", b";a=\"\x80\"", b";\x80", b" ;a", b";a\t", b";a=\"\t\"",
    b";a=b\"c\"", b";=b", b";a==b", b";a=\"\"", b";a=\"x\" ", b";a\x7f", b";a=\"\x7f\"",
]  # fmt: skip
TRAILERS = [
    b"x-t: 1\r\n", b"a:\r\nb: c\r\n", b"Content-MD5: \x80\r\n", b"trailer\r\n", b" x: y\r\n", b"x : y\r\n", b"x: y\n", b": x\r\n",
    b"x: \x01\r\n", b"content-length: 3\r\n", b"transfer-encoding: chunked\r\n", b"connection: close\r\n", b"host: x\r\n",
    b"x:y\r\n z\r\n",
]  # fmt: skip
DICTIONARY = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b": ", b":", b" ", b"\t", b"\x00", b"\x7f", b"\x80", b"0", b"HTTP/1.1", b"chunked",
    b"close", b",", b";", b"content-length: 1\r\n", b"transfer-encoding: chunked\r\n", b"host: x\r\n",
    b"connection: close\r\n", b"POST / HTTP/1.1\r\n", b"0\r\n\r\n", b"\r\n \r\n", b"\"", b"\\",
]  # fmt: skip


def any_fields(rng: Random) -> bytes:
    """Header lines, the empty line included; each fault is rare, so that heads with one fault dominate those with many."""
    fields = [b"%b: %b" % (name, value) for name, value in rng.choices(PLAIN, k=rng.randrange(5))]
    if rng.random() < 0.9 and not any(line.lower().startswith(b"host") for line in fields):
        fields.insert(0, b"Host: a.test")
    for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 2))):
        name, value = rng.choice(SPECIAL)
        fields.append(b"%b:%b%b%b" % (name, rng.choice((b" ", b"", b"  ", b"\t")), value, rng.choice((b"", b"", b" ", b"\t "))))
    if rng.random() < 0.05:
        fields.append(rng.choice(BROKEN))
    if rng.random() < 0.02:
        fields += [b"x-%d: y" % i for i in range(rng.choice((100, 130, 200)))]
    rng.shuffle(fields)
    return b"".join(line + rng.choice(ENDS) for line in fields) + rng.choice(ENDS)


def any_chunked(rng: Random) -> bytes:
    """A chunked body, valid or with a fault; sometimes with more behind it."""
    pieces: list[bytes] = []
    faulty = rng.random() < 0.5
    for _ in range(rng.randrange(4)):
        data = rng.randbytes(rng.randrange(1, 20))
        size = rng.choice((b"%x", b"%X", b"0%x")) % len(data)
        if faulty and rng.random() < 0.3:
            size = rng.choice(SIZES)
        pieces += [size, rng.choice(EXTENSIONS) if faulty else rng.choice((b"", b";a=b", b';a="b c"')), b"\r\n", data, b"\r\n"]
        if faulty and rng.random() < 0.2:
            pieces[-rng.choice((1, 3))] = rng.choice((b"\n", b"", b"\r", b"\r\n\r\n", b"\r\r\n"))
    pieces.append(b"0" * rng.choice((1, 1, 1, 2, 20)) + (rng.choice(EXTENSIONS) if faulty else b"") + b"\r\n")
    if rng.random() < 0.3:
        pieces.append(rng.choice(TRAILERS))
    pieces.append(b"\r\n" if rng.random() < 0.9 else rng.choice((b"\n", b"", b"\r\r\n", b"\r")))
    if rng.random() < 0.3:
        pieces.append(rng.choice((b"GET / HTTP/1.1\r\n", b"\r\n", b"x", b"0\r\n\r\n")))
    return b"".join(pieces)


def any_body(rng: Random) -> bytes:
    return rng.choice((b"", b"", b"abc", b"hello", b"5\r\nhello\r\n0\r\n\r\n", any_chunked(rng), rng.randbytes(rng.randrange(10))))


def framed(rng: Random, head: bytes) -> bytes:
    """A head and a body; mostly one that fits the head."""
    if rng.random() < 0.5 and head.endswith(b"\r\n\r\n"):
        if rng.random() < 0.5:
            body = rng.randbytes(rng.randrange(12))
            return head[:-2] + b"content-length: %d\r\n\r\n" % len(body) + body
        return head[:-2] + b"transfer-encoding: chunked\r\n\r\n" + any_chunked(rng)
    return head + any_body(rng)


def any_request(rng: Random) -> bytes:
    space = rng.choice((b" ",) * 40 + (b"  ", b"\t", b""))
    line = rng.choice(METHODS) + b" " + rng.choice(TARGETS) + space + rng.choice(VERSIONS)
    if rng.random() < 0.6:
        line = b"POST /v1/chat/completions HTTP/1.1"
    opening = rng.choice((b"",) * 20 + (b"\r\n", b"\r\n\r\n", b"\n", b" ", b"\r", b"\x00"))
    return opening + framed(rng, line + rng.choice(ENDS) + any_fields(rng))


def any_answer(rng: Random) -> bytes:
    line = rng.choice(VERSIONS) + rng.choice((b" ",) * 20 + (b"", b"  ")) + rng.choice(STATUSES)
    if rng.random() < 0.5:
        line = b"HTTP/1.1 200 OK"
    data = framed(rng, line + rng.choice(ENDS) + any_fields(rng))
    while rng.random() < 0.15:
        data = b"HTTP/1.1 1%02d x\r\n\r\n" % rng.choice((0, 2, 3, 99)) + data
    return data


def mutated(rng: Random, data: bytes) -> bytes:
    """A few bytes changed, cut, doubled or moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 if out:
                out[at % len(out)] = rng.randrange(256)
            case 1:
                out[at:at] = rng.choice(DICTIONARY)
            case 2:
                del out[at : at + rng.choice((1, 1, 2, 10))]
            case 3:
                out[at:at] = out[at : at + rng.randrange(1, 30)]
            case 4:
                del out[at:]
            case _ if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
    return bytes(out)


def cuts(rng: Random, data: bytes) -> list[bytes]:
    """The same bytes in pieces: whole, byte by byte, or cut at random."""
    match rng.randrange(4):
        case 0:
            return [data]
        case 1:
            return [data[i : i + 1] for i in range(len(data))]
        case _:
            points = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 6)))
            return [data[a:b] for a, b in zip([0, *points], [*points, len(data)], strict=True) if a < b]
