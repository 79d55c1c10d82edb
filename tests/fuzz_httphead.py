"""Differential fuzzer: our reading of HTTP/1.x against llhttp (httptools), on generated and mutated bytes under random cutting.

    python tests/fuzz_httphead.py [--seconds 60] [--seed N] [--only requests|answers|chunks|connections|upstreams]

Law: whatever the scanner, the chunk follower or a whole connection of the shard takes, llhttp takes with the same method, target,
version, header fields, body and end; what llhttp refuses is never relayed. To be stricter is allowed, to wait for ever is not.
A short run with fixed seeds is part of tests/test_httphead.py. On a difference: the input, its seed, and exit code 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run as a script of a tree that is not installed

from fuzz_connections import check_connection, check_upstream
from fuzz_grammar import any_answer, any_chunked, any_request, cuts, mutated
from llhttp_reference import Fields, Message, Reference, answers, connection_tokens, end_to_end, fields_of, requests

from sglfast._httphead import MORE, TOO_LARGE, UNUSUAL, Chunks, RequestHead, ResponseHead, scan_request, scan_response

LIMIT = 1 << 16
CHUNKED_POST = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNKED_200 = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
OTHER_IDS = (b"x-correlation-id", b"x-trace-id", b"request-id")
KINDS = {RequestHead: "taken", ResponseHead: "taken"}
CODES = {MORE: "more", UNUSUAL: "unusual", TOO_LARGE: "too large"}


class Difference(AssertionError):
    """We and llhttp do not agree."""


def same(ours: object, theirs: object, what: str) -> None:
    if ours != theirs:
        raise Difference(f"{what}: ours {ours!r}, llhttp {theirs!r}")


def probe(head: bytes, size: int, is_chunked: bool) -> bytes:
    """A body that fits the framing which we found in a head, up to 4 KiB."""
    return b"5;a=b\r\nhello\r\n0\r\n\r\n" if is_chunked else b"b" * min(size, 4096)


def check_framing(head: bytes, found: RequestHead | ResponseHead, read: Callable[[bytes], Reference]) -> Message:
    """llhttp must see the head end where we see it, and the body as we do; returns its message."""
    before = read(head[:-1]).messages
    same(False, bool(before) and before[-1].has_head, "the head is complete before its last byte")
    size = found.content_length
    body = probe(head, size, found.is_chunked)
    reference = read(head + body)
    same("", reference.error, "error")
    message = reference.messages[0]
    same(True, message.has_head, "the head is complete")
    if found.is_chunked:
        same((b"hello", True), (message.body, message.is_complete), "chunked body")
    elif size > 4096:
        same((body, False), (message.body, message.is_complete), "the beginning of a long body")
    elif size >= 0:
        same((body, True), (message.body, message.is_complete), "body by length")
        if size:
            short = read(head + body[:-1])
            same(False, short.messages[0].is_complete, "complete before the last byte of the body")
    return message


def check_prefixes(scan: Callable[[bytes, int], object], data: bytes, head_bytes: int, rng: Random) -> None:
    """A head that is taken whole is waited for at every cut."""
    for at in {rng.randrange(head_bytes) for _ in range(4)} | {head_bytes - 1}:
        same(scan(data[:at], LIMIT), MORE, f"a cut at {at}")


def first_id(headers: Fields) -> bytes | None:
    """The request id that a sender gave, unless it is empty or meant for one hop."""
    if b"x-request-id" in connection_tokens(headers):
        return None
    return next((value for name, value in headers if name.lower() == b"x-request-id" and value), None)


def other_id(headers: Fields) -> bytes | None:
    """The id under one of its other names, in their order; empty ones do not count."""
    named = ([value for name, value in headers if name.lower() == wanted and value] for wanted in OTHER_IDS)
    return next((values[0] for values in named if values), None)


def keeps_alive(message: Message) -> bool:
    """llhttp's opinion, but `close` always wins (RFC 9112 9.3): llhttp does not look for it in HTTP/1.0 or before a tab."""
    return message.keeps_alive and b"close" not in connection_tokens(message.headers)


def check_request(data: bytes, rng: Random) -> str:
    """scan_request against llhttp on one head. Returns what was found."""
    found = scan_request(data, LIMIT)
    if type(found) is not RequestHead:
        if found == MORE:
            seen = requests(data).messages
            same(False, bool(seen) and seen[0].has_head, "we wait for a head that is complete")
        elif found == UNUSUAL and data:
            same(True, scan_request(data[: rng.randrange(len(data))], LIMIT) in (MORE, UNUSUAL), "a cut of an unusual head")
        return CODES[found]
    head = data[: found.head_bytes]
    check_prefixes(scan_request, data, found.head_bytes, rng)
    message = check_framing(head, found, requests)
    if not found.is_chunked and found.content_length < 0:
        same(True, message.is_complete, "a request without framing has no body")
    same(found.method, message.method, "method")
    same(found.target, message.target, "target")
    same(found.is_http10, message.version == "1.0", "HTTP/1.0")
    same(True, message.version in ("1.0", "1.1"), "version")
    headers = message.headers
    kept = end_to_end(headers, b"host", b"content-length", b"transfer-encoding", b"expect", b"x-sglfast-kv")
    kept = [(name, value) for name, value in kept if name.lower() != b"x-request-id" or value]
    same(fields_of(found.kept), kept, "kept fields")
    same(True, all(line + b"\r\n" in head for line in found.kept.split(b"\r\n")), "kept lines are the client's own bytes")
    same(found.request_id, first_id(headers) or other_id(headers), "request id")
    same(found.n_hosts, len(message.values(b"host")), "hosts")
    same(True, found.n_hosts == 1 or (found.n_hosts == 0 and found.is_http10), "host rule of RFC 9112 3.2")
    expects = [value.lower() for value in message.values(b"expect")]
    same(found.expects_continue, b"100-continue" in expects and not found.is_http10, "expects 100-continue")
    same(found.expects_other, any(value != b"100-continue" for value in expects), "expects something else")
    same(found.wants_kv, any(value.lower() in (b"1", b"true") for value in message.values(b"x-sglfast-kv")), "wants_kv")
    same(found.is_chunked, bool(message.values(b"transfer-encoding")), "chunked")
    lengths = message.values(b"content-length")
    same(found.content_length, int(lengths[0]) if lengths else -1, "content length")
    if message.is_complete and not message.values(b"proxy-connection"):  # nobody's standard; llhttp reads it like Connection
        same(found.keeps_alive, keeps_alive(message), "keep-alive")
    return "taken"


def check_answer(data: bytes, rng: Random) -> str:
    """scan_response against llhttp on one head. Returns what was found."""
    found = scan_response(data, LIMIT)
    if type(found) is not ResponseHead:
        if found == MORE:
            seen = answers(data).messages
            same(False, bool(seen) and seen[0].has_head, "we wait for a head that is complete")
        return CODES[found]
    head = data[: found.head_bytes]
    check_prefixes(scan_response, data, found.head_bytes, rng)
    bodiless = found.status < 200 or found.status in (204, 304)
    message = answers(head).messages[0] if bodiless else check_framing(head, found, answers)
    same(True, message.has_head, "the head is complete")
    same(found.status, message.status, "status")
    same(True, message.version in ("1.0", "1.1"), "version")
    line, _, lines = found.kept.partition(b"\r\n")
    same(line, b"HTTP/1.1" + head[8 : head.index(b"\r\n")], "status line")
    kept = [(name, value) for name, value in end_to_end(message.headers) if name.lower() != b"x-request-id" or value]
    same(fields_of(lines), kept, "kept fields")
    same(found.has_request_id, first_id(message.headers) is not None, "request id")
    same(found.is_chunked, bool(message.values(b"transfer-encoding")), "chunked")
    lengths = message.values(b"content-length")
    same(found.content_length, int(lengths[0]) if lengths else -1, "content length")
    kinds = message.values(b"content-type")
    same(found.is_event_stream, bool(kinds) and kinds[-1].lower().startswith(b"text/event-stream"), "event stream")
    if message.is_complete and not bodiless and not message.values(b"proxy-connection"):
        same(found.keeps_alive, keeps_alive(message), "keep-alive")
    return "taken"


def check_chunks(data: bytes, rng: Random) -> str:
    """Chunks.follow and Chunks.decode against llhttp, each under its own cutting."""
    outcomes: list[tuple[str, int]] = []
    body = b""
    for is_decoding in (False, True):
        chunks, at, outcome = Chunks(), 0, "more"
        pieces: list[bytes] = []
        for piece in cuts(rng, data):
            ballast = rng.randrange(3)
            given = b"\r" * ballast + piece
            end = chunks.decode(given, ballast, pieces) if is_decoding else chunks.follow(given, ballast)
            if end == -2:
                outcome = "malformed"
                same(False, chunks.is_between, "something may be put behind malformed framing")
                break
            if end >= 0:
                outcome, at = "complete", at + end - ballast
                break
            at += len(piece)
        outcomes.append((outcome, at if outcome != "malformed" else -1))
        body = b"".join(pieces)
    same(outcomes[0], outcomes[1], "follow and decode")
    outcome, end = outcomes[0]
    for opening, read in ((CHUNKED_POST, requests), (CHUNKED_200, answers)):
        if outcome == "complete":
            whole = read(opening + data[:end])
            same("", whole.error, "error")
            same((body, True), (whole.messages[0].body, whole.messages[0].is_complete), "body")
            same(False, read(opening + data[: end - 1]).messages[0].is_complete, "complete before the last byte")
        elif outcome == "more":
            same(False, read(opening + data).messages[0].is_complete, "we wait for a body that is complete")
            same(True, read(opening + data).messages[0].body.startswith(body) or bool(read(opening + data).error), "body so far")
    return outcome


CHECKS: dict[str, tuple[Callable[[Random], bytes], Callable[[bytes, Random], str]]] = {
    "requests": (any_request, check_request),
    "answers": (any_answer, check_answer),
    "chunks": (any_chunked, check_chunks),
    "connections": (lambda rng: b"".join(any_request(rng) for _ in range(rng.choice((1, 1, 2, 3)))), check_connection),
    "upstreams": (any_answer, check_upstream),
}


def fuzz(name: str, seed: int, *, rounds: int | None = None, until_s: float = 0.0) -> Counter[str]:
    """Run one check on so many inputs, or until a monotonic time; returns how often each outcome was seen. Raises Difference."""
    make, check = CHECKS[name]
    seen: Counter[str] = Counter()
    count = 0
    while count < rounds if rounds is not None else time.monotonic() < until_s:
        one = f"{seed}:{count}"
        rng = random.Random(one)
        data = make(rng)
        if rng.random() < 0.5:
            data = mutated(rng, data)
        try:
            seen[check(data, rng)] += 1
        except Exception as error:
            raise Difference(f"{name}, seed {one}: {error}\n  input {data!r}") from error
        count += 1
    return seen


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--only", choices=sorted(CHECKS), default=None)
    args = parser.parse_args(argv)
    names = [args.only] if args.only else list(CHECKS)
    print(f"seed {args.seed}", flush=True)
    for name in names:
        try:
            seen = fuzz(name, args.seed, until_s=time.monotonic() + args.seconds / len(names))
        except Difference as difference:
            print(difference)
            return 1
        print(f"{name}: " + ", ".join(f"{what} {count}" for what, count in seen.most_common()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
