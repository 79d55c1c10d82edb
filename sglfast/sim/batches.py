"""Several prompts in one request, and several answers to one prompt: split into requests of one each, and their answers put together again.

Runs in: sim, on the event loop. Contract: `split` raises RequestError; parts are bodies that inference.py takes like any other. A Batch
    owns the client's connection; each part answers through an outlet of its own, and when one fails, the others are ended and the
    client gets that failure. Shapes: sglang 0.5.23. Ids of parts are `rid_0`, `rid_1`, ..., so that /abort_request with the rid ends
    them all; a bootstrap_room that is one number counts up from part to part, as the engine has it.
"""

from collections.abc import Callable
from typing import Any

import orjson

from sglfast.prompt.keys import RequestKind
from sglfast.sim.answers import DONE, Answer
from sglfast.sim.http import JSON, Outlet, chunk
from sglfast.sim.requests import RequestError

PARTS_LIMIT = 256
_BOOTSTRAP = ("bootstrap_host", "bootstrap_port", "bootstrap_room")


def split(kind: RequestKind, body: dict[str, Any], request_id: str, *, has_rooms: bool) -> list[dict[str, Any]]:
    """The body itself, alone, or a body for each prompt and each of its `n` answers.

    request_id: of the whole; has_rooms: whether the bootstrap fields mean something to this worker. Raises RequestError.
    """
    field = {RequestKind.COMPLETIONS: "prompt", RequestKind.GENERATE: "text" if body.get("text") is not None else "input_ids"}.get(kind, "")
    prompts = body.get(field)
    if not (isinstance(prompts, list) and len(prompts) > 1 and isinstance(prompts[0], str | list)):
        prompts = None
    params = body.get("sampling_params") if kind == RequestKind.GENERATE else body
    n = params.get("n") if isinstance(params, dict) else None
    n = n if isinstance(n, int) and not isinstance(n, bool) and n > 1 and kind != RequestKind.EMBEDDINGS else 1
    count = n * len(prompts or [None])
    if count > PARTS_LIMIT:
        raise RequestError(400, f"{count} answers in one request are more than the simulator's {PARTS_LIMIT}.")
    if prompts is None and n == 1:
        return [body]
    parts = []
    for index in range(count):
        rid = body.get("rid")
        part = {**body, "rid": _own(rid, index, count, "rid") if isinstance(rid, list) else f"{request_id}_{index}"}
        if prompts is not None:
            part[field] = prompts[index // n]
        if kind == RequestKind.GENERATE:
            part["sampling_params"] = {**_own(params, index // n, count // n, "sampling_params"), "n": 1}
        else:
            part["n"] = 1
        if has_rooms:
            part |= {name: _own(body.get(name), index, count, name) for name in _BOOTSTRAP}
            room = body.get("bootstrap_room")
            if isinstance(room, int) and not isinstance(room, bool):
                part["bootstrap_room"] = room + index
        parts.append(part)
    return parts


def _own(value: Any, index: int, count: int, name: str) -> Any:
    """A part's own of a list that has one for each; the same for all otherwise."""
    if not isinstance(value, list):
        return {} if value is None and name == "sampling_params" else value
    if len(value) != count:
        raise RequestError(400, f"{name} has {len(value)} entries for {count} requests.")
    return value[index]


class Batch:
    """The answer to all parts. connection: the client's; with_usage: a stream ends with the sum of what was used."""

    def __init__(self, kind: RequestKind, connection: Outlet, request_id: str, count: int, *, with_usage: bool) -> None:
        self._kind = kind
        self._connection = connection
        self._request_id = request_id
        self._with_usage = with_usage
        self._bodies: list[Any] = [None] * count
        self._left = count
        self._is_streaming = False
        self.is_over = False
        self.parts = [Part(self, index) for index in range(count)]
        connection.on_gone = self._leave

    @property
    def is_paused(self) -> bool:
        """Whether the client reads too slowly."""
        return self._connection.is_paused

    def take(self, index: int, status: int, body: bytes, extra: bytes) -> None:
        """A part's whole answer."""
        if status != 200:
            self._fail(status, body, extra)
            return
        self._bodies[index] = orjson.loads(body)
        self._left -= 1
        if self._left == 0:
            self.is_over = True
            self._connection.respond(200, orjson.dumps(self._together()))

    def stream(self, chunks: bytes) -> None:
        """More of a part's stream."""
        if not self._is_streaming:
            self._is_streaming = True
            self._connection.start_stream()
        self._connection.send_chunks(chunks)

    def end_part(self, chunks: bytes) -> None:
        """The last of a part's stream."""
        self.stream(chunks.removesuffix(DONE))
        self._left -= 1
        if self._left == 0:
            self.is_over = True
            first = self.parts[0].answer
            usage = first.usage_event(self._usage()) if self._with_usage and first is not None else b""
            self._connection.end_stream(usage + DONE)

    def _fail(self, status: int, body: bytes, extra: bytes) -> None:
        self.is_over = True
        self._end_others()
        if self._is_streaming:
            self._connection.end_stream(chunk(b"data: " + body + b"\n\n") + DONE)
        else:
            self._connection.respond(status, body, JSON, extra)

    def _leave(self) -> None:
        """The client is gone."""
        self.is_over = True
        self._end_others()

    def _end_others(self) -> None:
        for part in self.parts:
            on_gone, part.on_gone = part.on_gone, None
            if on_gone is not None:
                on_gone()

    def _together(self) -> Any:
        if self._kind == RequestKind.GENERATE:
            return self._bodies
        choices = [{**choice, "index": index} for index, body in enumerate(self._bodies) for choice in body["choices"]]
        return {**self._bodies[0], "id": self._request_id, "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        usages = [part.answer.usage() for part in self.parts if part.answer is not None]
        summed: dict[str, Any] = {name: sum(usage[name] for usage in usages) for name in usages[0] if name != "prompt_tokens_details"}
        cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        return {**summed, "prompt_tokens_details": {"cached_tokens": cached}}


class Part:
    """What a part's answer takes for its connection. answer: set by whoever makes it."""

    __slots__ = ("_batch", "_index", "answer", "on_gone")

    def __init__(self, batch: Batch, index: int) -> None:
        self._batch = batch
        self._index = index
        self.on_gone: Callable[[], None] | None = None
        self.answer: Answer | None = None

    @property
    def is_paused(self) -> bool:
        """Whether the client reads too slowly."""
        return self._batch.is_paused

    def respond(self, status: int, body: bytes, content_type: bytes = JSON, extra: bytes = b"") -> None:
        """Take a whole answer."""
        self.on_gone = None
        if not self._batch.is_over:
            self._batch.take(self._index, status, body, extra)

    def respond_json(self, status: int, value: object, extra: bytes = b"") -> None:
        """Take a JSON answer."""
        self.respond(status, orjson.dumps(value), JSON, extra)

    def start_stream(self) -> None:
        """The stream begins with its first chunks."""

    def send_chunks(self, chunks: bytes) -> None:
        """Take more of a stream."""
        if not self._batch.is_over:
            self._batch.stream(chunks)

    def end_stream(self, last: bytes) -> None:
        """Take the last of a stream."""
        self.on_gone = None
        if not self._batch.is_over:
            self._batch.end_part(last)
