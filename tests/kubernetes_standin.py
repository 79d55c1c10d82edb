"""Kubernetes' TokenReview over real HTTP, for the tests of tokens."""

from pathlib import Path
from typing import Any

from aiohttp import web

ACCOUNTS = {"good": "models:seed", "stranger": "elsewhere:stranger", "person": None}
OWN_TOKEN = "of the service itself"


class KubernetesStandin:
    """Knows three tokens. folder: gets the file `token` that a pod has; reviews: specs that were asked about; is_down: answers 500."""

    def __init__(self, folder: Path) -> None:
        (folder / "token").write_text(OWN_TOKEN + "\n")
        self.reviews: list[dict[str, Any]] = []
        self.is_down = False
        self.knows_audiences = True

    async def __aenter__(self) -> "KubernetesStandin":
        application = web.Application()
        application.add_routes([web.post("/apis/authentication.k8s.io/v1/tokenreviews", self._review)])
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()

    async def _review(self, request: web.Request) -> web.Response:
        if self.is_down:
            return web.Response(status=500)
        assert request.headers["authorization"] == f"Bearer {OWN_TOKEN}"
        body = await request.json()
        assert (body["apiVersion"], body["kind"]) == ("authentication.k8s.io/v1", "TokenReview")
        self.reviews.append(body["spec"])
        token = body["spec"]["token"]
        if token not in ACCOUNTS:
            return web.json_response({"status": {"error": "invalid bearer token"}}, status=201)
        account = ACCOUNTS[token]
        username = "kubernetes-admin" if account is None else f"system:serviceaccount:{account}"
        status: dict[str, Any] = {"authenticated": True, "user": {"username": username}}
        if self.knows_audiences and "audiences" in body["spec"]:
            status["audiences"] = body["spec"]["audiences"]
        return web.json_response({"status": status}, status=201)
