"""The rest of the 41 rules: a storage that fails, and tokens."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from kubernetes_standin import KubernetesStandin
from mx_harness import publication, serving, settings
from test_modelexpress_behaviour import RULES, TESTS

from sglfast.modelexpress import server as server_module
from sglfast.modelexpress.roster import READY
from sglfast.modelexpress.storage import StorageError


def test_every_rule_has_its_test() -> None:
    assert len(RULES) == 41
    assert set(TESTS) | set(BROKEN) | set(AUTH) == set(RULES)


# ---- a storage that fails ----


class BrokenStorage:
    """Opens, and then fails with the text of the rules."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def _fail(self, *arguments: object, **more: object) -> Any:
        raise StorageError("storage unavailable")

    roster = publish = update = remove = payload = _fail


BROKEN = ["pub-backend-error", "list-backend-error", "get-backend-error"]


@pytest.mark.parametrize("rule_id", BROKEN)
def test_rule_of_a_failing_storage(rule_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "open_storage", lambda where, prefix: BrokenStorage())
    expect = RULES[rule_id]["expect"]

    async def main() -> None:
        async with serving(settings(tmp_path / "unused")) as (_, client):
            if rule_id == "pub-backend-error":
                answer = await client.publish(publication())
                assert (answer.success, answer.message) == (expect["success"], expect["message"])
                assert (answer.mx_source_id, answer.worker_id) == ("", "")
                updated = await client.update("s", "w", 0, READY)
                assert (updated.success, updated.message) == (False, "Failed to update status: storage unavailable")
            elif rule_id == "list-backend-error":
                assert await client.list() == expect["instances"]
            else:
                found = await client.get("s", "w")
                assert (found.found, found.mx_source_id, found.worker_id) == (False, "", "")

    asyncio.run(main())


# ---- tokens ----

AUTH = {
    "auth-missing": [None, "Bearer", "Bearer bad", "Basic good"],
    "auth-denied": ["Bearer stranger"],
    "auth-backend-down": ["Bearer good"],
}


@pytest.mark.parametrize(("rule_id", "header"), [(rule_id, header) for rule_id, headers in AUTH.items() for header in headers])
def test_rule_of_tokens(rule_id: str, header: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect = RULES[rule_id]["expect"]
    details = expect["details"].replace("<ns>:<sa>", "elsewhere:stranger")

    async def main() -> None:
        async with KubernetesStandin(tmp_path) as api:
            api.is_down = rule_id == "auth-backend-down"
            monkeypatch.setattr("sglfast.modelexpress.auth._POD", tmp_path)
            config = settings(tmp_path / "db", allowed_service_accounts=("models:seed",), kubernetes_api=api.url)
            async with serving(config) as (_, client):
                metadata = () if header is None else (("authorization", header),)
                for method in ("PublishMetadata", "ListSources", "GetMetadata", "UpdateStatus"):
                    with pytest.raises(grpc.RpcError) as caught:
                        await client.raw(method, b"", metadata)
                    assert (caught.value.code().name, caught.value.details()) == (expect["grpc"], details)
                assert await client.raw("/model_express.health.HealthService/GetHealth", b"", metadata)
                assert await client.raw("/grpc.health.v1.Health/Check", b"", metadata)

    asyncio.run(main())
