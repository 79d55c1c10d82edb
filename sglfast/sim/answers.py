"""Answers of the inference routes: tokens of a generation -> bytes in SGLang's and OpenAI's shapes.

Runs in: sim. Contract: one Answer a request; `progress` is called when tokens came and sends what the shape allows: events for a
    stream, everything at once at the end otherwise. A client that reads slowly gets fewer, longer events (as from the engine,
    whose tokens pile up meanwhile), so nothing is buffered without bound. Shapes: sglang 0.5.23 with cache report on; a
    stream's first event comes with the first token, so the time to it is the time to the first token.

    chat         role event, one event for every token, event with finish_reason, [usage], [DONE]
    completions  one event for every token, the last with finish_reason, [usage], [DONE]
    /generate    one event for every token with the text so far and meta_info, [DONE]
"""

import random
import time
from abc import ABC, abstractmethod
from typing import Any

import orjson

from sglfast.prompt.keys import RequestKind
from sglfast.sim.engine import Generation
from sglfast.sim.http import Outlet, chunk
from sglfast.sim.output import OutputText
from sglfast.sim.requests import Asked

DONE = chunk(b"data: [DONE]\n\n")
EMBEDDING_DIMENSIONS = 32
WEIGHT_VERSION = "default"


class Answer(ABC):
    """The answer under way on one connection. `attach` gives it the generation that it tells of, before any progress."""

    __slots__ = ("_created", "_generation", "_output", "_sent_tokens", "_started", "asked", "connection")

    def __init__(self, asked: Asked, connection: Outlet, output: OutputText) -> None:
        self.asked = asked
        self.connection = connection
        self._output = output
        self._created = int(time.time())
        self._started = time.monotonic()
        self._sent_tokens = -1  # -1 = the stream has not begun

    def attach(self, generation: Generation) -> None:
        """Take the generation that this answer tells of."""
        self._generation = generation

    def progress(self) -> None:
        """Send what is new. The engine's Sink."""
        generation = self._generation
        is_over = generation.is_finished or generation.is_aborted
        if not self.asked.is_stream:
            if is_over:
                self.connection.respond(200, self._whole())
            return
        if self.connection.is_paused and not is_over:
            return
        is_first, since = self._sent_tokens == -1, max(self._sent_tokens, 0)
        until = self._sent_tokens = generation.generated_tokens
        chunks = self._last_events(since, until) + DONE if is_over else self._events(since, until)
        if is_first:
            self.connection.start_stream()
            chunks = self._first_event() + chunks
        if is_over:
            self.connection.end_stream(chunks)
        else:
            self.connection.send_chunks(chunks)

    @abstractmethod
    def _whole(self) -> bytes:
        """Return the body of an answer that is no stream."""

    @abstractmethod
    def _events(self, since: int, until: int) -> bytes:
        """Return the events, as chunks, of tokens since..until, which are not the last."""

    @abstractmethod
    def _last_events(self, since: int, until: int) -> bytes:
        """Return the events of the last tokens since..until and of the end, without [DONE]."""

    def _first_event(self) -> bytes:
        return b""

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """Return the event, as a chunk, that tells what was used; none where a stream has no such event."""
        return b""

    def _text(self, since: int, until: int) -> str:
        return self._output.text(self._generation.start, since, until)

    def _finish(self) -> tuple[str, int | None]:
        """Return why the answer ended, and the token that it stopped at."""
        generation = self._generation
        if generation.is_aborted:
            return "abort", None
        if self.asked.max_tokens is not None and generation.generated_tokens >= self.asked.max_tokens:
            return "length", None
        return "stop", self._output.eos_token_id

    def usage(self) -> dict[str, Any]:
        """Return the tokens that were used, as OpenAI's object tells them."""
        generation = self._generation
        prompt, completion = generation.prompt_tokens, generation.generated_tokens
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
            "reasoning_tokens": 0,
        }


class _OpenAiAnswer(Answer):
    """What chat and completions share: a frame of id, object, created and model around choices and usage."""

    __slots__ = ("_token_head",)

    STREAM_OBJECT: str
    WHOLE_OBJECT: str
    # Around the text of one token's event, with a place for the choice's index; all in front of it is built once a request.
    TOKEN_HEAD: bytes
    TOKEN_TAIL: bytes

    def attach(self, generation: Generation) -> None:
        self._generation = generation
        frame = orjson.dumps(self._frame(self.STREAM_OBJECT))
        self._token_head = b"data: " + frame[:-1] + self.TOKEN_HEAD % self.asked.index

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.asked.request_id, "object": kind, "created": self._created, "model": self.asked.model}

    def _events(self, since: int, until: int) -> bytes:
        return chunk(self._token_head + orjson.dumps(self._text(since, until)) + self.TOKEN_TAIL)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        value = {**self._frame(self.STREAM_OBJECT), "choices": choices, "usage": usage}
        return chunk(b"data: " + orjson.dumps(value) + b"\n\n")

    def _usage_event(self) -> bytes:
        return self.usage_event(self.usage()) if self.asked.with_usage else b""

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return self._event([], usage)

    def _choice(self, payload: dict[str, Any]) -> dict[str, Any]:
        reason, matched = self._finish()
        return {"index": self.asked.index, **payload, "logprobs": None, "finish_reason": reason, "matched_stop": matched}

    def _whole(self) -> bytes:
        value = {
            **self._frame(self.WHOLE_OBJECT),
            "choices": [self._choice(self._payload(self._text(0, self._generation.generated_tokens)))],
            "usage": self.usage(),
            "metadata": {"weight_version": WEIGHT_VERSION},
        }
        return orjson.dumps(value)

    @abstractmethod
    def _payload(self, text: str) -> dict[str, Any]:
        """Return the fields of a choice that carry the text."""


class ChatAnswer(_OpenAiAnswer):
    """POST /v1/chat/completions."""

    __slots__ = ()

    STREAM_OBJECT = "chat.completion.chunk"
    WHOLE_OBJECT = "chat.completion"
    TOKEN_HEAD = b',"choices":[{"index":%d,"delta":{"role":null,"content":'
    TOKEN_TAIL = (
        b',"reasoning_content":null,"tool_calls":null},"logprobs":null,"finish_reason":null,"matched_stop":null}],"usage":null}\n\n'
    )

    def _first_event(self) -> bytes:
        choice = {
            "index": self.asked.index,
            "delta": _delta("assistant", ""),
            "logprobs": None,
            "finish_reason": None,
            "matched_stop": None,
        }
        return self._event([choice])

    def _last_events(self, since: int, until: int) -> bytes:
        tokens = self._events(since, until) if until > since else b""
        return tokens + self._event([self._choice({"delta": _delta(None, None)})]) + self._usage_event()

    def _payload(self, text: str) -> dict[str, Any]:
        return {"message": _delta("assistant", text)}


class CompletionsAnswer(_OpenAiAnswer):
    """POST /v1/completions."""

    __slots__ = ()

    STREAM_OBJECT = WHOLE_OBJECT = "text_completion"
    TOKEN_HEAD = b',"choices":[{"index":%d,"text":'
    TOKEN_TAIL = b',"logprobs":null,"finish_reason":null,"matched_stop":null}],"usage":null}\n\n'

    def _last_events(self, since: int, until: int) -> bytes:
        return self._event([self._choice(self._payload(self._text(since, until)))]) + self._usage_event()

    def _payload(self, text: str) -> dict[str, Any]:
        return {"text": text}


class GenerateAnswer(Answer):
    """POST /generate, SGLang's own shape."""

    __slots__ = ()

    def _value(self, until: int, *, is_over: bool) -> dict[str, Any]:
        generation = self._generation
        finish: dict[str, Any] | None = None
        if is_over:
            kind, matched = self._finish()
            detail = {"length": ("length", until), "stop": ("matched", matched), "abort": ("message", "Aborted by AbortReq.")}
            finish = {"type": kind, **dict([detail[kind]])}
        meta: dict[str, Any] = {
            "id": self.asked.request_id,
            "finish_reason": finish,
            "prompt_tokens": generation.prompt_tokens,
            "weight_version": WEIGHT_VERSION,
            "total_retractions": 0,
            "completion_tokens": until,
            "cached_tokens": generation.cached_tokens,
        }
        if is_over:
            meta["e2e_latency"] = time.monotonic() - self._started
        index = {"index": self.asked.index} if self.asked.is_part and self.asked.is_stream else {}
        return index | {
            "text": self._text(0, until),
            "output_ids": self._output.token_ids(generation.start, until),
            "meta_info": meta,
        }

    def _events(self, since: int, until: int) -> bytes:
        return chunk(b"data: " + orjson.dumps(self._value(until, is_over=False)) + b"\n\n")

    def _last_events(self, since: int, until: int) -> bytes:
        return chunk(b"data: " + orjson.dumps(self._value(until, is_over=True)) + b"\n\n")

    def _whole(self) -> bytes:
        return orjson.dumps(self._value(self._generation.generated_tokens, is_over=True))


class EmbeddingsAnswer(Answer):
    """POST /v1/embeddings: numbers that depend on the prompt alone."""

    __slots__ = ()

    def _whole(self) -> bytes:
        numbers = random.Random(self._generation.start)
        vector = [round(numbers.uniform(-1.0, 1.0), 6) for _ in range(EMBEDDING_DIMENSIONS)]
        value = {
            "object": "list",
            "data": [{"object": "embedding", "embedding": vector, "index": 0}],
            "model": self.asked.model,
            "usage": self.usage(),
        }
        return orjson.dumps(value)

    def _events(self, since: int, until: int) -> bytes:
        raise NotImplementedError("embeddings are never streamed")

    _last_events = _events


ANSWERS: dict[RequestKind, type[Answer]] = {
    RequestKind.CHAT: ChatAnswer,
    RequestKind.COMPLETIONS: CompletionsAnswer,
    RequestKind.GENERATE: GenerateAnswer,
    RequestKind.EMBEDDINGS: EmbeddingsAnswer,
}


def _delta(role: str | None, content: str | None) -> dict[str, Any]:
    return {"role": role, "content": content, "reasoning_content": None, "tool_calls": None}
