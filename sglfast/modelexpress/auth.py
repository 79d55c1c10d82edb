"""Who may call: Kubernetes service accounts, by the tokens they send.

Runs in: the metadata service, when --allowed-service-accounts is given. Contract: both health services are exempt; every other call
    needs `authorization: Bearer TOKEN` of an account that is allowed. Codes and texts are upstream's (spec/modelexpress.md 2.7).
    Tokens are kept as digests, for a short time, and never logged.
Format: TokenReview of authentication.k8s.io/v1, Kubernetes API reference. Our own right to ask comes from the pod's service account.
"""

from __future__ import annotations  # the stubs have generic classes where grpc itself has none

import hashlib
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from sglfast.modelexpress.schema import HEALTH_SERVICE

_OPEN = (f"/{HEALTH_SERVICE}/", "/grpc.health.v1.Health/")
_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CACHE_MAX = 10_000
_TIMEOUT_S = 5.0
_ACCOUNT_PREFIX = "system:serviceaccount:"


class RefusedError(Exception):
    """A call that may not be made."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


class TokenReviewer:
    """Asks Kubernetes whose token it is. allowed: namespace:name; folder: where the pod's own token and the API's certificate are."""

    def __init__(
        self, api_url: str, allowed: tuple[str, ...], audiences: tuple[str, ...], cache_secs: float, folder: Path | None = None
    ) -> None:
        self._url = f"{api_url.rstrip('/')}/apis/authentication.k8s.io/v1/tokenreviews"
        self._allowed, self._audiences, self._cache_secs, self._folder = frozenset(allowed), audiences, cache_secs, folder or _POD
        self._known: dict[bytes, tuple[float, str]] = {}  # digest of a token -> until when, account

    async def check(self, authorization: str | None) -> None:
        """Raises RefusedError unless the header's token belongs to an allowed account."""
        kind, _, token = (authorization or "").partition(" ")
        token = token.strip()
        account = await self._account(token) if kind.lower() == "bearer" and token else None
        if account is None:
            raise RefusedError(grpc.StatusCode.UNAUTHENTICATED, "missing or invalid service account token")
        if account not in self._allowed:
            raise RefusedError(grpc.StatusCode.PERMISSION_DENIED, f"service account {account} is not in the allowlist")

    async def _account(self, token: str) -> str | None:
        digest, now = hashlib.sha256(token.encode()).digest(), time.monotonic()
        until, known = self._known.get(digest, (0.0, ""))
        if now < until:
            return known
        account = await self._review(token)
        if account is not None and self._cache_secs:
            if len(self._known) >= _CACHE_MAX:
                self._known.clear()
            self._known[digest] = now + self._cache_secs, account
        return account

    async def _review(self, token: str) -> str | None:
        """namespace:name of a good token of a service account, or None."""
        spec: dict[str, Any] = {"token": token}
        if self._audiences:
            spec["audiences"] = list(self._audiences)
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        try:
            own = (self._folder / "token").read_text().strip()
            certificate = self._folder / "ca.crt"
            context = ssl.create_default_context(cafile=str(certificate) if certificate.exists() else None)
            timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
            async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=context)) as session:
                headers = {"authorization": f"Bearer {own}"}
                async with session.post(self._url, json=body, headers=headers, raise_for_status=True) as answer:
                    status = (await answer.json()).get("status", {})
            name = status.get("user", {}).get("username", "")
            audiences = status.get("audiences") or []
        except (OSError, aiohttp.ClientError, TimeoutError, ValueError, AttributeError) as error:
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, "authentication backend unavailable") from error
        if status.get("authenticated") is not True or not isinstance(name, str) or not name.startswith(_ACCOUNT_PREFIX):
            return None
        # An API server that knows no audiences answers without: such a token was made for anybody.
        if self._audiences and not set(self._audiences) & set(audiences):
            return None
        return name.removeprefix(_ACCOUNT_PREFIX)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call through, or ends it with the code. on_refused: called for each that is ended."""

    def __init__(self, reviewer: TokenReviewer, on_refused: Callable[[], None]) -> None:
        self._reviewer, self._on_refused = reviewer, on_refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        header = metadata.get("authorization")
        try:
            await self._reviewer.check(header if isinstance(header, str) else None)
        except RefusedError as error:
            refused = error
        else:
            return handler
        self._on_refused()

        async def refuse(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            await context.abort(refused.code, refused.text)

        return grpc.unary_unary_rpc_method_handler(refuse)
