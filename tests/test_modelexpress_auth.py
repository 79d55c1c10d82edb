"""Tokens of Kubernetes service accounts, reviewed by a stand-in for its API over real HTTP. Codes: test_modelexpress_behaviour."""

import asyncio
from pathlib import Path

import grpc
import pytest
from kubernetes_standin import KubernetesStandin

from sglfast.modelexpress.auth import RefusedError, TokenReviewer

ALLOWED = ("models:seed", "models:target")


def test_a_good_token_is_asked_about_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with KubernetesStandin(tmp_path) as api:
            reviewer = TokenReviewer(api.url, ALLOWED, (), 60.0, tmp_path)
            for _ in range(3):
                await reviewer.check("Bearer good")
            await reviewer.check("bearer  good ")
            assert api.reviews == [{"token": "good"}]
            always = TokenReviewer(api.url, ALLOWED, (), 0.0, tmp_path)
            for _ in range(2):
                await always.check("Bearer good")
            assert len(api.reviews) == 3
            api.is_down = True
            await reviewer.check("Bearer good")
            with pytest.raises(RefusedError) as caught:
                await always.check("Bearer good")
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_bad_tokens_are_asked_about_each_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with KubernetesStandin(tmp_path) as api:
            reviewer = TokenReviewer(api.url, ALLOWED, (), 60.0, tmp_path)
            for token in ("bad", "person"):
                for _ in range(2):
                    with pytest.raises(RefusedError, match="missing or invalid"):
                        await reviewer.check(f"Bearer {token}")
            assert len(api.reviews) == 4

    asyncio.run(main())


@pytest.mark.parametrize("knows_audiences", [True, False])
def test_audiences_must_be_confirmed(tmp_path: Path, knows_audiences: bool) -> None:
    async def main() -> None:
        async with KubernetesStandin(tmp_path) as api:
            api.knows_audiences = knows_audiences
            reviewer = TokenReviewer(api.url, ALLOWED, ("modelexpress",), 60.0, tmp_path)
            if knows_audiences:
                await reviewer.check("Bearer good")
            else:
                with pytest.raises(RefusedError, match="missing or invalid"):
                    await reviewer.check("Bearer good")
            assert api.reviews == [{"token": "good", "audiences": ["modelexpress"]}]

    asyncio.run(main())


@pytest.mark.parametrize("has_token", [True, False])
def test_without_an_api_to_ask_nobody_may_call(tmp_path: Path, has_token: bool) -> None:
    if has_token:
        (tmp_path / "token").write_text("t")
    reviewer = TokenReviewer("http://127.0.0.1:1", ALLOWED, (), 60.0, tmp_path)
    with pytest.raises(RefusedError, match="authentication backend unavailable"):
        asyncio.run(reviewer.check("Bearer good"))
