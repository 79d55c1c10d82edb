"""Requests for tokens: from the parsed HTTP request to the rank that works on it, and out again when it ends.

Runs in: sim, on the event loop; long prompts are tokenized in a thread pool. Contract: every request that is let in ends in
    exactly one way, counted: answered, refused (4xx), failed (5xx, a transfer between prefill and decode), or aborted (the client
    left, or /abort_request). A client that leaves takes its request out of the engine at once.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import orjson
import xxhash

from sglfast.errors import PromptError
from sglfast.prompt.keys import RequestKind
from sglfast.sim.answers import ANSWERS, DONE, Answer
from sglfast.sim.batches import Batch, Part, split
from sglfast.sim.engine import Engine, Generation
from sglfast.sim.http import Connection, Outlet, Request, chunk
from sglfast.sim.jobs import DecodeJob, Job, PrefillJob
from sglfast.sim.output import OutputText
from sglfast.sim.pacer import Pacer
from sglfast.sim.prompts import LONG_PROMPT_CHARS, Prompt, Prompts
from sglfast.sim.requests import Asked, RequestError, new_request_id, parse_body, read, read_bootstrap, read_room, wants_usage
from sglfast.sim.rooms import Rooms
from sglfast.sim.settings import SimSettings

# Without a tokenizer run (--instant) a prompt is taken to have this many bytes of body a token.
INSTANT_BYTES_PER_TOKEN = 4
# An abort comes after the end of its request's connection, so the request may be gone by then.
_PAST_IDS = 256


@dataclass(frozen=True, slots=True)
class Shared:
    """What all workers of one process use together. executor: for long prompts."""

    prompts: Prompts
    output: OutputText
    executor: Executor


@dataclass(slots=True)
class Rank:
    """One data-parallel rank that runs."""

    engine: Engine
    pacer: Pacer


@dataclass(slots=True)
class InferenceTotals:
    """Requests let in, and those of them that were refused, failed or aborted; the rest were or will be answered. A batch is one
    request; each of its parts counts among the others.

    abort_calls: of /abort_request by id; abort_calls_known: those whose id a request here had, one that had just ended included.
    """

    requests: int = 0
    refused: int = 0
    failed: int = 0
    aborted: int = 0
    abort_calls: int = 0
    abort_calls_known: int = 0


class Inference:
    """The inference routes of one worker. ranks: replaced when the worker restarts; rooms: of a prefill worker."""

    def __init__(self, settings: SimSettings, shared: Shared, rooms: Rooms | None = None) -> None:
        self._settings = settings
        self._rooms = rooms
        self._shared = shared
        self._jobs: dict[str, Job] = {}
        self._past_ids: deque[str] = deque(maxlen=_PAST_IDS)
        self._last_rank = -1
        self.ranks: list[Rank] = []
        self.totals = InferenceTotals()

    def handle(self, kind: RequestKind, request: Request, connection: Connection) -> None:
        """Answer a request, now or later."""
        self.totals.requests += 1
        try:
            body = parse_body(request.body, request.content_type, kind)
            rid = body.get("rid")
            request_id = rid if isinstance(rid, str) and rid else new_request_id()
            parts = split(kind, body, request_id, has_rooms=self._settings.disaggregation_mode != "null")
        except RequestError as error:
            self._refuse(kind, connection, error)
            return
        if len(parts) == 1:
            self._begin(kind, body, request, connection, None)
            return
        batch = Batch(kind, connection, request_id, len(parts), with_usage=wants_usage(body))
        for index, (part, outlet) in enumerate(zip(parts, batch.parts, strict=True)):
            if not batch.is_over:
                self._begin(kind, part, request, outlet, index)

    def _begin(self, kind: RequestKind, body: dict[str, Any], request: Request, connection: Outlet, index: int | None) -> None:
        """Let one request in. index: of its choice, when it is a part of a batch."""
        in_stream = False
        try:
            asked = read(kind, body, request.rank, self._settings.model)
            if index is not None:
                asked = replace(asked, index=index, is_part=True, with_usage=False)
            in_stream = asked.is_stream and kind == RequestKind.GENERATE and index is None
            if self._rooms is not None and asked.max_tokens != 0:
                asked = replace(asked, max_tokens=1)  # what a prefill is asked for is the first token
            rank = self._rank_of(asked)
            if asked.request_id in self._jobs:
                raise RequestError(400, f"Duplicate request ID detected: {asked.request_id}")
            if self._settings.instant:
                self._answer_instantly(asked, request, connection)
                return
            prompt = self._shared.prompts.reader.text_of(kind, body)
            if prompt.text is None and prompt.token_ids is None:
                raise RequestError(400, f"The simulator cannot read this prompt: {prompt.detail}")
            job = self._job_of(asked, body, connection, rank)
        except RequestError as error:
            self._refuse(kind, connection, error, in_stream=in_stream)
            return
        self._jobs[asked.request_id] = job
        connection.on_gone = job.leave
        if prompt.text is not None and len(prompt.text) > LONG_PROMPT_CHARS:
            loop = asyncio.get_running_loop()
            reading = loop.run_in_executor(self._shared.executor, self._shared.prompts.read, prompt)
            reading.add_done_callback(lambda done: None if done.cancelled() else self._was_read(job, done.result))
        else:
            self._was_read(job, lambda: self._shared.prompts.read(prompt))

    def _answer_of(self, asked: Asked, connection: Outlet) -> Answer:
        answer = ANSWERS[asked.kind](asked, connection, self._shared.output)
        if isinstance(connection, Part):
            connection.answer = answer
        return answer

    def _job_of(self, asked: Asked, body: dict[str, Any], connection: Outlet, rank: Rank) -> Job:
        answer = self._answer_of(asked, connection)
        mode, timeout_s = self._settings.disaggregation_mode, self._settings.disaggregation_bootstrap_timeout
        if asked.kind != RequestKind.EMBEDDINGS:  # they have no KV cache that anybody would fetch
            if self._rooms is not None:
                room = read_room(body)
                try:
                    return PrefillJob(self, answer, rank, self._rooms, room, timeout_s)
                except ValueError as error:
                    raise RequestError(400, f"Invalid request: {error}") from None
            if mode == "decode":
                return DecodeJob(self, answer, rank, read_bootstrap(body, self._settings.disaggregation_bootstrap_port), timeout_s)
        return Job(self, answer, rank)

    def abort(self, request_id: str, *, is_all: bool) -> None:
        """End one request (a batch with all its parts), or all; an unknown id is no error."""

        def is_meant(key: str) -> bool:
            return key == request_id or key.startswith(f"{request_id}_")

        if not is_all:
            self.totals.abort_calls += 1
            self.totals.abort_calls_known += any(map(is_meant, (*self._jobs, *self._past_ids)))
        for job in [job for key, job in self._jobs.items() if is_all or is_meant(key)]:
            job.cut()

    def drop_all(self) -> None:
        """Forget every request without a word, as a killed process does; its connections are reset by the owner."""
        for job in list(self._jobs.values()):
            job.drop()

    def forget(self, job: Job) -> None:
        """Take a request out of the register."""
        self._jobs.pop(job.answer.asked.request_id, None)
        self._past_ids.append(job.answer.asked.request_id)
        job.answer.connection.on_gone = None

    def count_abort(self, job: Job) -> None:
        """A job ended before its answer did."""
        self.totals.aborted += 1

    def fail(self, job: Job, message: str) -> None:
        """Answer with status 500 and forget the job."""
        self.forget(job)
        self.totals.failed += 1
        job.answer.connection.respond_json(500, error_body(message, "InternalServerError", 500, job.answer.asked.kind))

    def _rank_of(self, asked: Asked) -> Rank:
        n = len(self.ranks)
        if asked.rank is None:
            self._last_rank = (self._last_rank + 1) % n
            return self.ranks[self._last_rank]
        if not 0 <= asked.rank < n:
            raise RequestError(400, f"routed_dp_rank={asked.rank} out of range [0, {n})")
        return self.ranks[asked.rank]

    def _answer_tokens(self, asked: Asked, start: int) -> int:
        natural_tokens = self._shared.output.natural_tokens(start)
        if asked.max_tokens is None:
            return natural_tokens
        return asked.max_tokens if asked.ignores_eos else min(asked.max_tokens, natural_tokens)

    def _was_read(self, job: Job, result: Callable[[], Prompt]) -> None:
        """Hand a request whose prompt was read to its rank, or refuse it when that failed."""
        if job.is_gone:
            return
        try:
            prompt = result()
        except (RequestError, PromptError) as error:
            self.forget(job)
            job.release(str(error))
            self._refuse(job.answer.asked.kind, job.answer.connection, error)
            return
        generation = Generation(
            token_ids=prompt.token_ids,
            prompt_tokens=len(prompt.token_ids),
            keys=prompt.keys,
            max_new_tokens=self._answer_tokens(job.answer.asked, prompt.start),
            start=prompt.start,
            sink=job,
            cache_salt=prompt.cache_salt,
            keeps_kv=job.keeps_kv,
        )
        job.begin(generation)

    def _refuse(self, kind: RequestKind, connection: Outlet, error: RequestError | PromptError, *, in_stream: bool = False) -> None:
        """in_stream: what is found out about a streamed /generate after its body was read comes in the stream, as from SGLang."""
        self.totals.refused += 1
        status, name = (error.status, error.kind) if isinstance(error, RequestError) else (400, "BadRequestError")
        if in_stream:
            event = {"error": {"message": str(error), "type": "invalid_request_error", "code": status, "retryable": False}}
            connection.start_stream()
            connection.end_stream(chunk(b"data: " + orjson.dumps(event) + b"\n\n") + DONE)
            return
        connection.respond_json(status, error_body(str(error), name, status, kind))

    def _answer_instantly(self, asked: Asked, request: Request, connection: Outlet) -> None:
        start = xxhash.xxh3_64_intdigest(request.body, self._settings.seed & 0xFFFF_FFFF_FFFF_FFFF)
        answer = self._answer_of(asked, connection)
        n = self._answer_tokens(asked, start)
        prompt_tokens = max(1, len(request.body) // INSTANT_BYTES_PER_TOKEN)
        generation = Generation([], prompt_tokens, b"", n, start, answer)
        answer.attach(generation)
        # A stream gets one event a token all the same: that is what its reader has to cope with.
        for tokens in range(1 if asked.is_stream and n else n, n + 1):
            generation.generated_tokens = tokens
            generation.is_finished = tokens == n
            answer.progress()


def error_body(message: str, kind: str, status: int, route: RequestKind | None = None) -> dict[str, Any]:
    """Return the error object of a route: /generate has a shape of its own."""
    if route == RequestKind.GENERATE and kind == "BadRequestError":
        return {"error": {"message": message}}
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}
