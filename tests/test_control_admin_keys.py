"""sglfast.control.admin_keys: which key may do what."""

import pytest

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
