"""/workers and its older names, as HTTP: what membership does, in the shapes of sglang-router (spec/gateway.md 1.5).

Runs in: control, behind AdminServer. Contract: an answer shows only what every shard acts by already; a key is never shown. Adding a URL
    that is there is refused at once with 409 and the present worker's id (sglang-router accepts it and fails later, where only a
    second request can see it). A worker that cannot be reached is no error: it is shown with a `job_status` until it is ready.

    POST   /workers        {"url", ...}     202, Location       GET    /workers                     200
    GET    /workers/{id}   200, 404         PUT    /workers/{id}  {...}   202                       id: uuid, or the URL percent-encoded
    DELETE /workers/{id}[?force=true]       202; 404 once it is gone
    POST   /add_worker[?url=][&api_key=]    200 when it is ready, 202 when it is not within 30 s
    POST   /remove_worker[?url=]            200                 GET    /list_workers                200 {"urls": [...]}
"""

import asyncio
import json
import uuid
from typing import Any
from urllib.parse import unquote

import msgspec
from aiohttp import web

from sglfast._counters import RankTable
from sglfast._workers import DRAINING, JOINING, READY, UNHEALTHY
from sglfast.config.worker_urls import worker_url
from sglfast.control.kv_state import rank_states, shown
from sglfast.control.membership import WAITING, AlreadyMemberError, LeavingError, Member, Membership
from sglfast.control.pool_watch import PoolWatch
from sglfast.control.worker_spec import SpecError, read_change, read_spec
from sglfast.control.workers import TableFullError, Workers
from sglfast.errors import ConfigError

STATES = {JOINING: "joining", READY: "ready", UNHEALTHY: "unhealthy", DRAINING: "draining"}
_PREFIX = "/workers/"
_READY_S, _READY_POLL_S = 30.0, 0.05
_URL_WANTED = "give the worker's URL as ?url= or in a JSON object"
_TRUE = frozenset({"", "1", "true", "yes"})


class _RefusalError(Exception):
    """An answer that ends a handler."""

    def __init__(self, status: int, code: str, message: str, **more: object) -> None:
        super().__init__(message)
        self.answer = web.json_response({"error": message, "code": code, **more}, status=status)


class WorkerRoutes:
    """The handlers. `routes` for AdminServer."""

    def __init__(self, membership: Membership, workers: Workers, watch: PoolWatch, ranks: RankTable) -> None:
        self._membership = membership
        self._workers = workers
        self._watch = watch
        self._ranks = ranks

    def routes(self) -> list[web.RouteDef]:
        """All paths."""
        return [
            web.post("/workers", self._add),
            web.get("/workers", self._list),
            web.get(_PREFIX + "{tail:.*}", self._one),
            web.put(_PREFIX + "{tail:.*}", self._change),
            web.delete(_PREFIX + "{tail:.*}", self._remove),
            web.post("/add_worker", self._add_and_wait),
            web.post("/remove_worker", self._remove_by_url),
            web.get("/list_workers", self._urls),
        ]

    # ---- /workers ----

    async def _add(self, request: web.Request) -> web.Response:
        try:
            member, ignored = self._added(await request.read())
        except _RefusalError as refusal:
            return refusal.answer
        location = _PREFIX + member.worker_id
        body: dict[str, Any] = {
            "status": "accepted",
            "worker_id": member.worker_id,
            "url": member.spec.url,
            "location": location,
            "message": "Worker addition queued for background processing",
        }
        if ignored:
            body["ignored_fields"] = ignored
        return web.json_response(body, status=202, headers={"location": location})

    def _added(self, body: bytes) -> tuple[Member, list[str]]:
        try:
            spec, ignored = read_spec(body)
            return self._membership.add(spec), ignored
        except AlreadyMemberError as error:
            known = error.member.worker_id
            raise _RefusalError(409, "WORKER_ALREADY_EXISTS", str(error), worker_id=known, location=_PREFIX + known) from None
        except TableFullError as error:
            raise _RefusalError(503, "NO_SLOT", str(error)) from None
        except (SpecError, ConfigError) as error:
            raise _RefusalError(400, "BAD_REQUEST", str(error)) from None

    async def _list(self, request: web.Request) -> web.Response:
        rows = [self._row(member) for member in self._membership.members]
        await self._membership.settled()
        types = [row["worker_type"] for row in rows]
        stats = {f"{name}_count": types.count(name) for name in ("prefill", "decode", "regular")}
        return web.json_response({"workers": rows, "total": len(rows), "stats": stats})

    async def _one(self, request: web.Request) -> web.Response:
        try:
            row = self._row(self._named(request))
        except _RefusalError as refusal:
            await self._membership.settled()
            return refusal.answer
        await self._membership.settled()
        return web.json_response(row)

    async def _change(self, request: web.Request) -> web.Response:
        try:
            member = self._named(request)
            change, ignored = read_change(await request.read())
            self._membership.change(member, change)
        except _RefusalError as refusal:
            return refusal.answer
        except SpecError as error:
            return _RefusalError(400, "BAD_REQUEST", str(error)).answer
        except LeavingError as error:
            return _RefusalError(409, "WORKER_IS_LEAVING", str(error)).answer
        await self._membership.settled()
        body: dict[str, Any] = {"status": "accepted", "worker_id": member.worker_id, "message": "Worker updated"}
        if ignored:
            body["ignored_fields"] = ignored
        return web.json_response(body, status=202)

    async def _remove(self, request: web.Request) -> web.Response:
        try:
            member = self._named(request)
        except _RefusalError as refusal:
            return refusal.answer
        self._membership.remove(member, is_forced=_is_forced(request))
        await self._membership.settled()
        message = "Worker removal queued for background processing"
        return web.json_response({"status": "accepted", "worker_id": member.worker_id, "message": message}, status=202)

    def _named(self, request: web.Request) -> Member:
        """The worker that the path names."""
        # The raw path: an encoded slash is part of the id.
        text = unquote(request.rel_url.raw_path.removeprefix(_PREFIX))
        try:
            member = self._membership.by_id(str(uuid.UUID(text)))
        except ValueError:
            member = self._membership.by_url(self._url(text, "worker_id", "a UUID or a percent-encoded URL"))
        if member is None:
            raise _RefusalError(404, "WORKER_NOT_FOUND", f"Worker {text[:200]} not found")
        return member

    @staticmethod
    def _url(text: str, name: str, wanted: str) -> str:
        try:
            return worker_url(text, name)
        except ConfigError as error:
            message = f"Invalid {name} '{text[:200]}' (expected {wanted}). Error: {error}"
            raise _RefusalError(400, "BAD_REQUEST", message[:1000]) from None

    # ---- what is shown ----

    def _row(self, member: Member) -> dict[str, Any]:
        spec = member.spec
        row: dict[str, Any] = {
            "id": member.worker_id,
            "url": spec.url,
            "model_id": spec.model_id or "unknown",
            "priority": spec.priority,
            "cost": spec.cost,
            "worker_type": spec.worker_type,
            "is_healthy": False,
            "load": self._membership.inflight(member),
            "connection_mode": "HTTP",
            "state": "pending",
            "has_api_key": spec.api_key is not None,
        }
        if member.worker_idx != WAITING:
            view = self._workers.view(member.worker_idx)
            row["model_id"] = view.record.model or "unknown"
            row["is_healthy"] = self._workers.health(member.worker_idx) == READY
            row["state"] = STATES[view.state]
            row["worker_type"] = view.record.role
            if view.record.bootstrap_port is not None:
                row["bootstrap_port"] = view.record.bootstrap_port
            row |= {"has_api_key": view.record.api_key is not None, "dp_size": view.dp_size, "kv_block_size": view.block_size}
            row["kv"] = shown(rank_states(self._ranks, view, self._workers.parity_cause(view.worker_idx)))
            if view.record.version is not None:
                row["version"] = view.record.version
        if spec.labels:
            row["metadata"] = spec.labels
        row["disable_health_check"] = bool(spec.disable_health_check)
        job = self._job_of(member)
        if job is not None:
            row["job_status"] = job
        return row

    def _job_of(self, member: Member) -> dict[str, Any] | None:
        """What is being done with the worker, None when nothing is."""
        if member.is_leaving:
            message = f"{self._membership.inflight(member)} requests in flight are being finished"
            return _job("RemoveWorker", member, "processing", message, member.since)
        if member.worker_idx == WAITING:
            return _job("AddWorker", member, "pending", "waits for the removal of the worker with this URL", member.since)
        progress = self._watch.progress(member.worker_idx)
        if progress.was_ready:
            return None
        return _job("AddWorker", member, "failed" if progress.is_failed else "processing", progress.problem, progress.since)

    # ---- the older names (sglang-router 0.1 and 0.2) ----

    async def _add_and_wait(self, request: web.Request) -> web.Response:
        try:
            body = await request.read()
            if "url" in request.query:
                body = json.dumps({name: request.query[name] for name in ("url", "api_key") if name in request.query}).encode()
            elif not body:
                raise _RefusalError(400, "BAD_REQUEST", _URL_WANTED)
            member, _ = self._added(body)
        except _RefusalError as refusal:
            return web.Response(status=refusal.answer.status, text=str(refusal))
        loop = asyncio.get_running_loop()
        end_s = loop.time() + _READY_S
        while loop.time() < end_s and self._membership.by_id(member.worker_id) is member:
            if member.worker_idx != WAITING and self._workers.view(member.worker_idx).state == READY:
                await self._membership.settled()
                return web.Response(text=f"Successfully added worker: {member.spec.url}")
            await asyncio.sleep(_READY_POLL_S)
        return web.Response(status=202, text=f"Worker {member.spec.url} is added but not ready yet; it is checked on")

    async def _remove_by_url(self, request: web.Request) -> web.Response:
        try:
            text = request.query["url"] if "url" in request.query else msgspec.json.decode(await request.read(), type=dict[str, str])["url"]
            member = self._membership.by_url(self._url(text, "url", "the worker's URL"))
        except _RefusalError as refusal:
            return web.Response(status=refusal.answer.status, text=str(refusal))
        except (msgspec.MsgspecError, ValueError, KeyError):
            return web.Response(status=400, text=_URL_WANTED)
        if member is None:
            return web.Response(status=404, text=f"Worker {text[:200]} not found")
        self._membership.remove(member, is_forced=_is_forced(request))
        await self._membership.settled()
        return web.Response(text=f"Successfully removed worker: {member.spec.url}")

    async def _urls(self, request: web.Request) -> web.Response:
        urls = [member.spec.url for member in self._membership.members if not member.is_leaving]
        await self._membership.settled()
        return web.json_response({"urls": urls})


def _is_forced(request: web.Request) -> bool:
    return request.query.get("force", "false").lower() in _TRUE


def _job(kind: str, member: Member, status: str, message: str, since: float) -> dict[str, Any]:
    return {"job_type": kind, "worker_url": member.spec.url, "status": status, "message": message, "timestamp": int(since)}
