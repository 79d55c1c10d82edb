"""Who may administer: the keys of the admin plane, asked of every request that reaches control, by whichever door.

Runs in: control. Contract: with --admin-api-key or --control-plane-api-keys administration needs one of them: the role `admin` may do
    all, `user` may look (GET). Without them it needs a key of the data plane, if there are any. Keys are compared in constant
    time, and are in no message. What clients may always ask (_PUBLIC) needs no key.
"""

import hmac
from collections.abc import Awaitable, Callable

from aiohttp import web

from sglfast.config import ServeConfig
from sglfast.errors import ORIGIN_NOT_ALLOWED

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_PUBLIC = frozenset({
    "/metrics", "/engine_metrics", "/health_generate", "/server_info", "/get_server_info", "/model_info", "/get_model_info",
})  # fmt: skip


class AdminKeys:
    """The keys of the settings. `config` may be replaced while it runs."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config

    def allows(self, method: str, path: str, authorization: str) -> int:
        """200, 401 (no key that is known) or 403 (a key that may only look)."""
        keys = self._keys()
        if path in _PUBLIC or not keys:
            return 200
        scheme, _, shown = authorization.partition(" ")
        role = None
        # All are compared, so that the time says nothing of which one came near.
        for key, its_role in keys:
            if hmac.compare_digest(key.encode(), shown.strip().encode("utf-8", "surrogateescape")) and scheme.lower() == "bearer":
                role = its_role
        if role is None:
            return 401
        return 200 if role == "admin" or method in ("GET", "HEAD") else 403

    def _keys(self) -> list[tuple[str, str]]:
        """(key, role) of all that count."""
        config = self.config
        found = [(config.admin_api_key, "admin")] if config.admin_api_key is not None else []
        for entry in config.control_plane_api_keys:
            _, _, role, key = entry.split(":", 3)
            found.append((key, role))
        if found:
            return found
        plain = [config.api_key] if config.api_key is not None else []
        return [(key, "admin") for key in [*plain, *(entry.partition(":")[2] for entry in config.api_keys)]]

    def _may_come_from(self, request: web.Request) -> bool:
        """Whether this is no change that a browser sends for a page of some other origin. Shards ask the same, and drop `origin`."""
        origins = self.config.cors_allowed_origins
        origin = request.headers.get("origin")
        return origin is None or request.method in ("GET", "HEAD") or "*" in origins or origin in origins

    @web.middleware
    async def middleware(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Refuses what is not allowed."""
        status = self.allows(request.method, request.path, request.headers.get("authorization", ""))
        if status != 200:
            return _refusal(status, *_REFUSALS[status])
        if not self._may_come_from(request):
            return _refusal(ORIGIN_NOT_ALLOWED.status, ORIGIN_NOT_ALLOWED.code, ORIGIN_NOT_ALLOWED.message)
        return await handler(request)


_REFUSALS = {
    401: ("invalid_api_key", "administration needs a key: `authorization: Bearer KEY`"),
    403: ("forbidden", "this key may look, not change"),
}


def _refusal(status: int, code: str, message: str) -> web.Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    headers = {"x-router-error-code": code} | ({"www-authenticate": "Bearer"} if status == 401 else {})
    return web.json_response(body, status=status, headers=headers)
