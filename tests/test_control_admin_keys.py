"""sglfast.control.admin_keys: which key may do what."""

import asyncio
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from sglfast.config import ServeConfig
from sglfast.control.admin_keys import AdminKeys

ROLES = ServeConfig(api_key="data", control_plane_api_keys=("1:ann:admin:big:key", "2:bob:user:small"), admin_api_key="root")


@pytest.mark.parametrize(
    ("config", "method", "path", "authorization", "status"),
    [
        (ServeConfig(), "DELETE", "/workers/1", "", 200),
        (ServeConfig(api_key="data"), "GET", "/workers", "", 401),
        (ServeConfig(api_key="data"), "GET", "/workers", "Bearer wrong", 401),
        (ServeConfig(api_key="data"), "POST", "/workers", "Bearer data", 200),
        (ServeConfig(api_keys=("ann:k1", "bob:k2")), "POST", "/workers", "bearer k2", 200),
        (ServeConfig(admin_api_key="root"), "GET", "/workers", "", 401),
        (ROLES, "POST", "/workers", "Bearer data", 401),
        (ROLES, "POST", "/workers", "Bearer root", 200),
        (ROLES, "POST", "/workers", "Bearer big:key", 200),
        (ROLES, "GET", "/workers", "Bearer small", 200),
        (ROLES, "HEAD", "/workers", "Bearer small", 200),
        (ROLES, "POST", "/flush_cache", "Bearer small", 403),
        (ROLES, "DELETE", "/workers/1", "Bearer small", 403),
        (ROLES, "POST", "/workers", "Basic root", 401),
        (ROLES, "POST", "/workers", "root", 401),
        (ROLES, "POST", "/workers", "Bearer \udcff", 401),
        (ROLES, "GET", "/metrics", "", 200),
        (ROLES, "GET", "/server_info", "", 200),
    ],
)
def test_who_may(config: ServeConfig, method: str, path: str, authorization: str, status: int) -> None:
    assert AdminKeys(config).allows(method, path, authorization) == status


@pytest.mark.parametrize(
    ("origins", "method", "origin", "status"),
    [
        ((), "POST", None, 200),
        ((), "POST", "http://evil", 403),
        ((), "DELETE", "null", 403),
        ((), "GET", "http://evil", 200),
        (("http://page",), "POST", "http://page", 200),
        (("http://page",), "POST", "http://evil", 403),
        (("*",), "POST", "http://evil", 200),
    ],
)
def test_pages_of_other_origins_change_nothing(origins: tuple[str, ...], method: str, origin: str | None, status: int) -> None:
    """A browser sends a simple POST for any page without asking; without keys it would be obeyed."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def run() -> web.StreamResponse:
        request = make_mocked_request(method, "/workers", {"origin": origin} if origin is not None else {})
        return await AdminKeys(ServeConfig(cors_allowed_origins=origins)).middleware(request, handler)

    answer = asyncio.run(run())
    assert answer.status == status
    if status == 403:
        assert isinstance(answer, web.Response)
        assert json.loads(answer.body)["error"]["code"] == "origin_not_allowed"  # type: ignore[arg-type]
