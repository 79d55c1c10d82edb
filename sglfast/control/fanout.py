"""Questions that are passed on to the workers: to all (loads, cache flush, metrics) or to one that is ready (what it is, does it work).

Runs in: control, behind AdminServer. Contract: at most 32 requests are on their way to workers for all callers together, each with a
    timeout, so that questions never take the places of health checks; what is asked for twice at once is asked once, so that clients
    without a key cannot make work for the workers. Secrets in a worker's `/server_info` are not passed on. Shapes: spec/gateway.md 3.1.

    GET /get_loads    POST /flush_cache    GET /engine_metrics                                                  all workers
    GET /get_server_info, /server_info     GET /get_model_info, /model_info     GET /health_generate             one that is ready
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from aiohttp import web

from sglfast._workers import READY
from sglfast.control.engine_metrics import merged
from sglfast.control.fetch import Answer, Fetcher, FetchError
from sglfast.control.metrics import CONTENT_TYPE
from sglfast.control.workers import Workers
from sglfast.errors import NO_HEALTHY_WORKERS, UPSTREAM_BAD_RESPONSE, Reason, WorkerInfoError
from sglfast.shm import WorkerView
from sglfast.wire.worker_answers import parse_loads, without_secrets

_AT_ONCE = 32
_TIMEOUT_S = 5.0
_GENERATE_S = 20.0  # the engine's own bound of its /health_generate
_TRIED = 3  # ready workers that are asked before a question has failed
_INFO_BYTES = 4 << 20
_METRICS_BYTES, _ALL_METRICS_BYTES = 8 << 20, 48 << 20
_UNKNOWN_LOAD = -1
_KEPT = ("content-type", "x-router-error-code")


class Fanout:
    """The handlers. `routes` for AdminServer; `close` ends what is under way."""

    def __init__(self, workers: Workers, fetcher: Fetcher) -> None:
        self._workers = workers
        self._fetcher = fetcher
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._running: dict[str, asyncio.Task[web.Response]] = {}

    def routes(self) -> list[web.RouteDef]:
        """All paths."""
        return [
            web.get("/get_loads", self._loads),
            web.post("/flush_cache", self._flush),
            web.get("/engine_metrics", self._metrics),
            web.get("/server_info", self._server_info),
            web.get("/get_server_info", self._server_info),
            web.get("/model_info", self._model_info),
            web.get("/get_model_info", self._model_info),
            web.get("/health_generate", self._health_generate),
        ]

    async def close(self) -> None:
        """End all questions."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _once(self, name: str, make: Callable[[], Coroutine[Any, Any, web.Response]]) -> web.Response:
        """The answer to whoever asks while it is being made. Its text is copied: a response is sent once."""
        task = self._running.get(name)
        if task is None:
            task = self._running[name] = asyncio.create_task(make())
            task.add_done_callback(lambda _: self._running.pop(name, None))
        made = await asyncio.shield(task)
        return web.Response(
            body=made.body, status=made.status, headers={name: made.headers[name] for name in _KEPT if name in made.headers}
        )

    async def _ask(
        self, view: WorkerView, method: str, paths: Sequence[str], limit_bytes: int = 0, timeout_s: float = _TIMEOUT_S
    ) -> Answer:
        """Ask for the first of `paths` that the worker has. Raises FetchError, also for an answer that is no 2xx."""
        answer = Answer(404, b"")
        for path in paths:
            async with self._places:
                answer = await self._fetcher.ask(method, view.record.url + path, timeout_s, limit_bytes, view.record.api_key)
            if answer.status != 404:
                break
        if not answer.is_good:
            raise FetchError(f"status {answer.status}")
        return answer

    async def _ask_all(self, method: str, paths: Sequence[str], limit_bytes: int = 0) -> list[tuple[WorkerView, Answer | FetchError]]:
        async def one(view: WorkerView) -> tuple[WorkerView, Answer | FetchError]:
            try:
                return view, await self._ask(view, method, paths, limit_bytes)
            except FetchError as error:
                return view, error

        return await asyncio.gather(*map(one, self._workers.views))

    # ---- all workers ----

    async def _loads(self, request: web.Request) -> web.Response:
        return await self._once("loads", self._make_loads)

    async def _make_loads(self) -> web.Response:
        rows = []
        for view, answer in await self._ask_all("GET", ("/v1/loads", "/get_load"), _INFO_BYTES):
            try:
                load = parse_loads(answer.body) if isinstance(answer, Answer) else _UNKNOWN_LOAD
            except WorkerInfoError:
                load = _UNKNOWN_LOAD
            rows.append({"worker": view.record.url, "load": load})
        return web.json_response({"workers": rows})

    async def _flush(self, request: web.Request) -> web.Response:
        answers = await self._ask_all("POST", ("/flush_cache",))
        failed = [{"worker": view.record.url, "error": str(answer)} for view, answer in answers if isinstance(answer, FetchError)]
        flushed = [view.record.url for view, answer in answers if isinstance(answer, Answer)]
        body: dict[str, Any] = {"workers_flushed": len(flushed), "total_http_workers": len(answers), "total_workers": len(answers)}
        if not failed:
            body |= {"status": "success", "message": f"Successfully flushed cache on all {len(flushed)} HTTP workers"}
            return web.json_response(body)
        message = f"Cache flush: {len(flushed)} succeeded, {len(failed)} failed"
        body |= {"status": "partial_success" if flushed else "failed", "message": message, "successful": flushed, "failed": failed}
        return web.json_response(body, status=206 if flushed else 502)

    async def _metrics(self, request: web.Request) -> web.Response:
        return await self._once("metrics", self._make_metrics)

    async def _make_metrics(self) -> web.Response:
        texts: list[tuple[str, str]] = []
        left_out: list[str] = []
        size_bytes = 0
        for view, answer in await self._ask_all("GET", ("/metrics",), _METRICS_BYTES):
            if isinstance(answer, FetchError):
                left_out.append(f"# {view.record.url}: {answer}\n")
            elif size_bytes + len(answer.body) > _ALL_METRICS_BYTES:
                left_out.append(f"# {view.record.url}: left out, all texts together are larger than {_ALL_METRICS_BYTES} bytes\n")
            else:
                size_bytes += len(answer.body)
                texts.append((view.record.url, answer.body.decode(errors="replace")))
        text = await asyncio.to_thread(merged, texts)
        return web.Response(body="".join([*left_out, text]).encode(), headers={"content-type": CONTENT_TYPE})

    # ---- one that is ready ----

    async def _ask_one(self, paths: Sequence[str], limit_bytes: int, timeout_s: float) -> Answer | None:
        """The first good answer of a few ready workers; None when they give none. Raises LookupError when none is ready."""
        ready = [view for view in self._workers.views if view.state == READY]
        if not ready:
            raise LookupError
        for view in random.sample(ready, min(_TRIED, len(ready))):
            try:
                return await self._ask(view, "GET", paths, limit_bytes, timeout_s)
            except FetchError:
                continue
        return None

    async def _passed_on(self, paths: Sequence[str], clean: Callable[[bytes], bytes]) -> web.Response:
        try:
            answer = await self._ask_one(paths, _INFO_BYTES, _TIMEOUT_S)
            if answer is not None:
                return web.Response(body=clean(answer.body), content_type="application/json")
        except LookupError:
            return refusal(NO_HEALTHY_WORKERS)
        except WorkerInfoError:
            pass
        return refusal(UPSTREAM_BAD_RESPONSE, message="no worker gives a usable answer")

    async def _server_info(self, request: web.Request) -> web.Response:
        return await self._once("server_info", lambda: self._passed_on(("/server_info", "/get_server_info"), without_secrets))

    async def _model_info(self, request: web.Request) -> web.Response:
        return await self._once("model_info", lambda: self._passed_on(("/model_info", "/get_model_info"), without_secrets))

    async def _health_generate(self, request: web.Request) -> web.Response:
        return await self._once("health_generate", self._make_health)

    async def _make_health(self) -> web.Response:
        try:
            answer = await self._ask_one(("/health_generate",), 0, _GENERATE_S)
        except LookupError:
            return refusal(NO_HEALTHY_WORKERS)
        if answer is None:
            return refusal(NO_HEALTHY_WORKERS, "health_generate_failed", "no worker could generate")
        return web.Response(text="OK")


def refusal(reason: Reason, code: str = "", message: str = "") -> web.Response:
    """An OpenAI error object; code and message: instead of the reason's."""
    code = code or reason.code
    body = {"error": {"message": message or reason.message, "type": reason.error_type, "param": None, "code": code}}
    return web.json_response(body, status=reason.status, headers={"x-router-error-code": code})
