"""What a prefill and a decode worker are told of each other: three keys in the body that both get.

Runs in: shards, event loop, for pairs only. `bootstrap_host` and `bootstrap_port` say where the prefill worker hands its KV caches over,
    `bootstrap_room` is a number below 2^63 by which both know this request; lists of them when the body asks for several answers
    (SGLang's disaggregation; spec/router.md 6, spec/gateway.md "PD").
Contract: the keys are put at the end of the body's bytes, where they win over equal ones of the client (the last of equal keys counts for
    SGLang's parsers); nothing else of it changes. A body that is no JSON object stays as it is: the workers own the schema and say so.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec
import orjson

from sglfast._relay import may_be_batch, spliced

if TYPE_CHECKING:
    from sglfast.edge.pools import Route
    from sglfast.shm import WorkerRecord

# Answers that a request may ask for and be told a room for each. Beyond it gets one number, from which SGLang counts up itself: else a
# small body could ask for any amount of our memory.
ROOMS_MAX = 4096
_ROOM_BITS = 63


class _Sampling(msgspec.Struct):
    n: int | None = None


class _Batch(msgspec.Struct):
    n: int | None = None
    prompt: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    input_ids: msgspec.Raw = msgspec.Raw()
    sampling_params: msgspec.Raw = msgspec.Raw()


_decode_batch = msgspec.json.Decoder(_Batch, strict=False).decode  # pydantic takes 2.0 for 2, too
_decode_sampling = msgspec.json.Decoder(_Sampling, strict=False).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_PROMPTS = (("prompt",), ("prompt",), ("text", "input_ids"))  # by kind; a chat has none of its own


def address_of(host: str, record: WorkerRecord) -> tuple[bytes, bytes]:
    """JSON of a prefill worker's bootstrap host and port; `null` for a port that it has not told. host: without brackets."""
    return orjson.dumps(host), b"null" if record.bootstrap_port is None else b"%d" % record.bootstrap_port


def with_bootstrap(body: bytes, kind: int, first: Route) -> bytes:
    """The body for both workers of a pair. kind: of the Endpoint; first: the route of the prefill worker."""
    host, port = first.upstream.bootstrap
    count = batch_size(body, kind) if may_be_batch(body, kind) else 0
    if count:
        rooms = b",".join(b"%d" % room_for(first) for _ in range(count))
        hosts, ports = b",".join([host] * count), b",".join([port] * count)
        keys = b'"bootstrap_host":[%b],"bootstrap_port":[%b],"bootstrap_room":[%b]' % (hosts, ports, rooms)
    else:
        keys = b'"bootstrap_host":%b,"bootstrap_port":%b,"bootstrap_room":%d' % (host, port, room_for(first))
    found = spliced(body, keys)
    return body if found is None else found


def room_for(first: Route) -> int:
    """A number for a request. A prefill worker of several ranks gives it to rank `room % dp_size`: to the one that has its prefix."""
    room = random.getrandbits(_ROOM_BITS)
    dp_size = first.upstream.dp_size
    if dp_size > 1 and first.overlap_blocks:
        room += first.dp_rank - room % dp_size
        if room >> _ROOM_BITS:
            room -= dp_size
    return room


def batch_size(body: bytes, kind: int) -> int:
    """How many answers a body asks for, where workers want a list of as many rooms; 0 = one, or more than ROOMS_MAX.

    A list of prompts counts as a list even with one in it. Parses the body but for its prompts.
    """
    try:
        fields = _decode_batch(body)
        prompts = 0
        for name in _PROMPTS[kind] if kind else ():
            value = bytes(getattr(fields, name))
            if value[:1] == b"[":
                items = _decode_items(value)
                if items and bytes(items[0])[:1] in (b'"', b"["):
                    prompts = len(items)
                break
        n = fields.n
        if kind == 2:
            value = bytes(fields.sampling_params)
            n = _decode_sampling(value).n if value[:1] == b"{" else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0  # the workers say what is wrong with it
    count = max(1, prompts) * max(1, n or 1)
    return count if (prompts or count > 1) and count <= ROOMS_MAX else 0
